"""How fast a model could run on this machine at most: what its weights weigh over what the processor can do.

Owns the measurement of the processor (`machine_peaks.cc`, compiled for it) and the limits of each kind of work of
`bench/compare.py`. A limit counts the weights alone: no attention, no sampling, nothing but the file's bytes read once
a step and its products of eight bits. So nothing reaches it, and what is far below it is limited by something else.
"""

import math
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.native.build import BuildError, compiler

SOURCE = Path(__file__).with_name("machine_peaks.cc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """Of all threads together."""

    bytes_per_s: float  # read from memory
    products_per_s: float  # of int8, each with its sum

    @classmethod
    def mean(cls, several: "Sequence[Peaks]") -> "Peaks":
        """Of several measurements."""
        return cls(
            bytes_per_s=statistics.fmean(peaks.bytes_per_s for peaks in several),
            products_per_s=statistics.fmean(peaks.products_per_s for peaks in several),
        )


class Gauge:
    """Measures this machine's peaks, in less than a second each time: it is compiled once."""

    def __init__(self, threads: int, folder: Path):
        """For so many threads; its program goes into `folder`.

        Raises:
            BuildError: there is no C++ compiler, or it does not compile for the processor at hand.
        """
        self._threads = threads
        self._program = folder / "peaks"
        flags = ("-std=c++20", "-O2", "-march=native", "-pthread", "-Wno-psabi")
        built = subprocess.run(
            [compiler(), *flags, str(SOURCE), "-o", str(self._program)], capture_output=True, text=True, check=False
        )
        if built.returncode != 0:
            raise BuildError(f"{SOURCE.name} does not compile here: {built.stderr[-500:]}")

    def measure(self) -> Peaks:
        """What the machine does right now."""
        done = subprocess.run([str(self._program), str(self._threads)], capture_output=True, text=True, check=True)
        read, products = map(float, done.stdout.split())
        return Peaks(bytes_per_s=read, products_per_s=products)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """What a step has to do with a model's weights, from a file's header."""

    step_bytes: int  # read by every step that yields tokens
    token_products: int  # of every token but for the head
    head_products: int  # of every token that is continued

    @classmethod
    def of(cls, file: GGUFFile) -> "Weight":
        """Experts count as if all of them were used."""
        embedding, head = file.tensors["token_embd.weight"], file.tensors.get("output.weight")
        layers = [tensor for name, tensor in file.tensors.items() if name.startswith("blk.")]
        last = embedding if head is None else head
        return cls(
            step_bytes=sum(tensor.nbytes for tensor in layers) + last.nbytes,
            token_products=sum(math.prod(tensor.shape) for tensor in layers if len(tensor.shape) > 1),
            head_products=math.prod(last.shape),
        )

    def seconds(self, peaks: Peaks, *, tokens: int, continued: int) -> float:
        """Of a step at least: reading and multiplying may overlap."""
        products = tokens * self.token_products + continued * self.head_products
        return max(self.step_bytes / peaks.bytes_per_s, products / peaks.products_per_s)


def limits(
    weight: Weight, peaks: Peaks, *, prefill_tokens: int, num_seqs: int, prompt_tokens: int, output_tokens: int
) -> dict[str, float]:
    """Tokens a second at most, by kind of work of `bench/compare.py`."""
    prompts = num_seqs * prompt_tokens
    step = weight.seconds(peaks, tokens=num_seqs, continued=num_seqs)
    first = weight.seconds(peaks, tokens=prompts, continued=num_seqs)
    return {
        "prefill": prefill_tokens / weight.seconds(peaks, tokens=prefill_tokens, continued=1),
        "decode": 1 / weight.seconds(peaks, tokens=1, continued=1),
        "batch": num_seqs * output_tokens / (first + (output_tokens - 1) * step),
        "batch_decode": num_seqs / step,
    }

"""How fast a model could run on this machine at most: what it has to read and multiply over what the processor can do.

Owns the measurement of the processor (`machine_peaks.cc`, compiled for it) and the limits of each kind of work of
`bench/compare.py`. A limit counts the file's bytes and the cache's, each read once a step, and products with weights
and of attention (as model FLOPs utilization does, arXiv:2204.02311 appendix B), all as if they were of eight bits; no
norms, no gates, no softmax, no sampling. So nothing reaches it, and what is far below it is limited by something else.
"""

import math
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atoma_jax.loading.gguf.file import GGUFFile, GGUFTensor
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
class ModelCost:
    """What steps of a model have to do at least, from its file's header."""

    step_bytes: int  # weights, read by every step that yields tokens
    token_products: int  # of every token but for the head
    head_products: int  # of every token that is continued
    seen_products: int = 0  # of attention, of every token for each one that it sees, itself included
    seen_bytes: int = 0  # of a token's keys and values in 16 bits, read by every step for each token that it sees
    window: int | None = None  # how many a token sees at most

    @classmethod
    def of(cls, file: GGUFFile) -> "ModelCost":
        """Experts count as if all of them were used, and a window as if all layers had it."""
        embedding, head = file.tensors["token_embd.weight"], file.tensors.get("output.weight")
        layers = {name: tensor for name, tensor in file.tensors.items() if name.startswith("blk.")}
        last = embedding if head is None else head
        queries, keys = _attention_widths(layers)
        window = f"{file.metadata.get_str('general.architecture')}.attention.sliding_window"
        return cls(
            step_bytes=sum(tensor.nbytes for tensor in layers.values()) + last.nbytes,
            token_products=sum(math.prod(tensor.shape) for tensor in layers.values() if len(tensor.shape) > 1),
            head_products=math.prod(last.shape),
            seen_products=2 * queries,  # with its key, and of its value
            seen_bytes=2 * 2 * keys,
            window=file.metadata.get_int(window, 0) or None,
        )

    def prompt_seconds(self, peaks: Peaks, *, tokens: int, num_seqs: int) -> float:
        """Of reading prompts of so many tokens, each followed by one. Reading and multiplying may overlap."""
        window = min(tokens, self.window or tokens)
        seen = window * (window + 1) // 2 + (tokens - window) * window
        products = tokens * self.token_products + self.head_products + seen * self.seen_products
        return max(self.step_bytes / peaks.bytes_per_s, num_seqs * products / peaks.products_per_s)

    def step_seconds(self, peaks: Peaks, *, seen: float, num_seqs: int) -> float:
        """Of a step of sequences that decode, each of which sees so many tokens."""
        seen = min(seen, self.window or seen)
        products = self.token_products + self.head_products + seen * self.seen_products
        read = self.step_bytes + num_seqs * seen * self.seen_bytes
        return max(read / peaks.bytes_per_s, num_seqs * products / peaks.products_per_s)


def _attention_widths(layers: Mapping[str, GGUFTensor]) -> tuple[int, int]:
    """How many numbers queries have, and keys, of all layers together."""
    queries = keys = 0
    for name, tensor in layers.items():
        if name.endswith(".attn_output.weight"):
            queries += tensor.shape[1]
        elif name.endswith(".attn_k.weight"):
            keys += tensor.shape[0]
        elif name.endswith(".attn_qkv.weight"):
            keys += (tensor.shape[0] - layers[name.replace("attn_qkv", "attn_output")].shape[1]) // 2
    return queries, keys


def limits(
    cost: ModelCost,
    peaks: Peaks,
    *,
    prefill_tokens: int,
    decode: tuple[int, int],
    num_seqs: int,
    prompt_tokens: int,
    output_tokens: int,
) -> dict[str, float]:
    """Tokens a second at most, by kind of work of `bench/compare.py`; `decode`: tokens in and out of one sequence."""

    def step(prompt: int, output: int, seqs: int) -> float:
        """Seconds of the mean step that decodes: the first of `output` tokens is the prompt's."""
        return cost.step_seconds(peaks, seen=prompt + output / 2, num_seqs=seqs)

    first = cost.prompt_seconds(peaks, tokens=prompt_tokens, num_seqs=num_seqs)
    batch_step = step(prompt_tokens, output_tokens, num_seqs)
    return {
        "prefill": prefill_tokens / cost.prompt_seconds(peaks, tokens=prefill_tokens, num_seqs=1),
        "decode": 1 / step(*decode, 1),
        "batch": num_seqs * output_tokens / (first + (output_tokens - 1) * batch_step),
        "batch_decode": num_seqs / batch_step,
    }

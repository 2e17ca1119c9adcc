"""Program: opens mutated copies of a GGUF file under a memory limit; prints how many loaded and how many did not.

    python gguf_fuzz.py SAMPLE COUNT

Every loaded file is read completely, tensors decoded. Anything but a clean load or an error that names the damage ends
the program with a traceback and the seed of the file at fault. Run by test_gguf.py.
"""

import math
import random
import resource
import sys
import tempfile
import warnings
from pathlib import Path

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.quant.ggml import dequantize

MEMORY = 64 << 20  # bytes on top of what the interpreter has mapped
EDGES = (
    0,
    1,
    2,
    3,
    9,
    31,
    32,
    33,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 33,
    2**64 - 1,
)


def mutate(data: bytearray, rng: random.Random, header: int) -> None:
    """One to three small changes, most of them in the header."""
    for _ in range(rng.randint(1, 3)):
        end = header if rng.random() < 0.9 else len(data)
        at = rng.randrange(max(1, min(end, len(data))))
        length = rng.choice((1, 4, 8, 40))
        match rng.randrange(7):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b""
            case 2:
                data[at : at + 8] = rng.choice(EDGES).to_bytes(8, "little")
            case 3:
                data[at : at + 4] = (rng.choice(EDGES) & 0xFFFFFFFF).to_bytes(4, "little")
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length]
            case _:
                if rng.random() < 0.2:
                    del data[at:]


def load(path: Path) -> bool:
    """Whether the file loads; reads all of it."""
    try:
        with GGUFFile.open(path) as file:
            for value in file.metadata.values():
                repr(value)
            for tensor in file.tensors.values():
                assert tensor.nbytes == len(tensor.data.tobytes())
                assert dequantize(tensor.data, tensor.type).size == math.prod(tensor.shape)
    except (WeightFileError, UnsupportedModelError) as error:
        if str(path) not in error.field:
            raise RuntimeError("the error does not name the file") from error
        return False
    return True


def main(sample: Path, count: int) -> None:
    warnings.simplefilter("error")
    original = sample.read_bytes()
    header = original.rindex(b"Q1_0.weight") + 64  # the last tensor
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.gguf"
        assert load(sample)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        loaded = 0
        for seed in range(count):
            data = bytearray(original)
            mutate(data, random.Random(seed), header)
            path.write_bytes(data)
            try:
                loaded += load(path)
            except BaseException:
                print("seed of the file at fault:", seed, file=sys.stderr)
                raise
    print(loaded, count - loaded)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

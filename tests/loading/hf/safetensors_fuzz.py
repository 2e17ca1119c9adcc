"""Program: opens folders in HF layout with one file mutated, under a memory limit; prints how many loaded or did not.

    python safetensors_fuzz.py FOLDER COUNT

Folders of every quantization method take turns; a header, config.json or the index is changed. Every loaded folder is
read completely, tensors decoded. Anything but a clean load or an error that names the damage ends the program with a
traceback and the seed of the folder at fault. Run by test_safetensors.py.
"""

import json
import random
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from atoma_jax.errors import ModelNotFoundError, UnsupportedModelError, WeightFileError
from atoma_jax.loading.hf.checkpoint import HFCheckpoint

MEMORY = 64 << 20  # bytes on top of what the interpreter has mapped
BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00001.safetensors"
SNIPPETS = (b"0", b"1", b"-1", b"4", b"8", b"16", b"9223372036854775807", b"18446744073709551615", b"1e999", b"null")
SNIPPETS += (
    b"true",
    b"{}",
    b"[]",
    b'""',
    b"[[[[",
    b'{"a":',
    b'"',
    b",",
    b"\xff",
    b"\\ud800",
    b"I32",
    b"F16",
    b"F8_E4M3",
)
SNIPPETS += (b"re:.*", b"re:(a+)+$", b"gptq_v2", b"group", b"channel", b"block", b"[128,128]", b"../", b"\0")

Sample = tuple[dict[str, Any], dict[str, np.ndarray]]


def words(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def ones(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.ones(shape, dtype)


def samples() -> dict[str, Sample]:
    """A small folder for each method, N = 16 and K = 32."""
    gptq = {"qweight": words(4, 16), "qzeros": words(2, 2), "scales": ones(2, 16)}
    gptq["g_idx"] = np.arange(32, dtype=np.int32) % 2
    awq = {"qweight": words(32, 2), "qzeros": words(2, 2), "scales": ones(2, 16)}
    packed = {"weight_packed": words(16, 4), "weight_scale": ones(16, 2, dtype=BF16)}
    packed |= {"weight_zero_point": words(2, 2), "weight_shape": np.array([16, 32])}
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16}
    group = {"targets": ["Linear", "re:.*x"], "weights": weights}
    whole = {"num_bits": 8, "type": "float", "strategy": "channel"}
    token = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    channel = {"targets": ["x"], "weights": {"num_bits": 8, "strategy": "channel"}, "input_activations": token}
    eight = {"weight": ones(16, 32, dtype=np.int8), "weight_scale": ones(16, 1)}
    float8 = {"weight": ones(16, 32, dtype=F8), "weight_scale": ones(16, 1)}
    block = {"weight": ones(16, 32, dtype=F8), "weight_scale_inv": ones(2, 2, dtype=np.float32)}
    ternary = {"weight": np.ones((4, 32), np.uint8), "weight_scale": ones(1, dtype=BF16)}
    compressed = {"quant_method": "compressed-tensors", "ignore": ["head", "re:.*y$"]}
    return {
        "dense": ({}, {"weight": ones(4, 8), "bias": ones(4, dtype=BF16), "norm": ones(4, dtype=np.float32)}),
        "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": True}, gptq),
        "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}, awq),
        "packed": (compressed | {"format": "pack-quantized", "config_groups": {"a": group}}, packed),
        "int": (compressed | {"format": "int-quantized", "config_groups": {"a": channel}}, eight),
        "float": (
            compressed
            | {
                "format": "mixed-precision",
                "config_groups": {"a": {**channel, "weights": whole, "format": "float-quantized"}},
            },
            float8,
        ),
        "fp8": ({"quant_method": "fp8", "weight_block_size": [8, 16], "activation_scheme": "dynamic"}, block),
        "bitnet": ({"quant_method": "bitnet", "linear_class": "autobitlinear"}, ternary),
    }


def write(folder: Path, sample: Sample) -> dict[str, bytes]:
    """Writes a folder: its files' contents."""
    quantization, parts = sample
    config = {"model_type": "llama", "quantization_config": quantization or None}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"x.{part}": values for part, values in parts.items()}
    safetensors.numpy.save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, SHARD)}
    (folder / INDEX).write_text(json.dumps(index))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def mutate(data: bytearray, rng: random.Random, header: int) -> None:
    """One or two small changes of what is parsed, rarely of what follows it."""
    for _ in range(rng.randint(1, 2)):
        end = header if rng.random() < 0.9 else len(data)
        at = rng.randrange(max(1, min(end, len(data))))
        length = rng.choice((1, 1, 4, 8, 40))
        match rng.randrange(7):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b""
            case 2:
                data[at : at + length] = rng.choice(SNIPPETS)
            case 3:
                data[at:at] = rng.choice(SNIPPETS)
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length]
            case _:
                digits = [place for place, byte in enumerate(data[:header]) if 48 <= byte < 58]
                if digits:
                    data[rng.choice(digits)] = 48 + rng.randrange(10)


def load(folder: Path) -> bool:
    """Whether the folder loads; reads all of it."""
    try:
        with HFCheckpoint.open(folder) as checkpoint:
            for name, tensor in checkpoint.tensors.items():
                assert name == tensor.name
                values = tensor.dequantize(slice(None))
                assert values.size == np.prod(tensor.shape)
                if tensor.format is not None:
                    assert tensor.decode(slice(1, 2)).codes.shape == (
                        min(1, max(0, tensor.shape[0] - 1)),
                        tensor.shape[1],
                    )
    except (WeightFileError, UnsupportedModelError, ModelNotFoundError) as error:
        if str(folder) not in str(error):
            raise RuntimeError("the error does not name the folder") from error
        return False
    return True


def main(folder: Path, count: int) -> None:
    warnings.simplefilter("error")
    originals: list[tuple[Path, dict[str, bytes]]] = []
    for name, sample in samples().items():
        (folder / name).mkdir()
        originals.append((folder / name, write(folder / name, sample)))
        assert load(folder / name), name
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    loaded = 0
    for seed in range(count):
        rng = random.Random(seed)
        place, files = rng.choice(originals)
        name = rng.choices(("config.json", SHARD, INDEX), (3, 6, 1))[0]
        data = bytearray(files[name])
        mutate(data, rng, 8 + int.from_bytes(data[:8], "little") if name == SHARD else len(data))
        (place / name).write_bytes(data)
        try:
            loaded += load(place)
        except BaseException:
            print("seed of the folder at fault:", seed, file=sys.stderr)
            raise
        (place / name).write_bytes(files[name])
    print(loaded, count - loaded)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

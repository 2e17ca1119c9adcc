"""How long the weights of a 7B model take to load, and how much memory that takes beside the weights.

`python -m bench.loading --type Q4_K --layout planar` writes a GGUF file of Llama 2 7B's shapes with random blocks, in a
temporary folder (it needs the room of the model), loads its weights in a process of its own, and prints a JSON object.
With `--converted` they come from the folder that `atoma-jax convert` makes of it, with `--type BF16 --safetensors` from
a folder in HF layout. `--mesh fsdp=4` loads into shards, on devices that a CPU simulates.

- `seconds`: from the open file to weights on the device. The file is in the page cache, as it was just written.
- `device_bytes`: of the weights; on a CPU they lie in this process's memory, and what several devices hold alike may be
  there once.
- `largest_bytes`: of the largest tensor of the model as it lies on devices, all parts of it together.
- `peak_anonymous_bytes`: the most memory of its own that the process had, less what it had before. The mapped file is
  not in it: those pages are the system's to drop.
- `peak_over_weights`: what of that is beside the weights, in sizes of the largest tensor.
"""

import json
import math
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

D, F, N, V = 4096, 11008, 32, 32000  # Llama 2 7B
SAMPLE_ROWS = 64  # of random blocks, repeated: what they hold does not change the time


def main(
    type_name: Annotated[str, typer.Option("--type", help="ggml type of all matrices.")] = "Q4_K",
    layers: Annotated[int, typer.Option(min=1, help="7B has 32.")] = 32,
    layout: Annotated[str, typer.Option(help="rows or planar.")] = "planar",
    converted: Annotated[bool, typer.Option("--converted", help="What `atoma-jax convert` makes of the file.")] = False,
    safetensors: Annotated[bool, typer.Option("--safetensors", help="A folder in HF layout; of --type BF16.")] = False,
    mesh: Annotated[str | None, typer.Option(help="Devices along each axis, simulated ones on a CPU.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where the file is written; default: the temporary folder.")
    ] = None,
    load: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Write a synthetic model, load it, print what that took."""
    if load is not None:
        print(json.dumps(_load(load, layout, mesh)))
        return
    if safetensors and (converted or type_name != "BF16"):
        raise typer.BadParameter("is of --type BF16 and not --converted", param_hint="--safetensors")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / ("model" if safetensors else "model.gguf")
        if safetensors:
            parameters, size = _write_safetensors(path, layers)
        else:
            parameters = _write(path, type_name, layers)
            size = path.stat().st_size
        if converted:
            path = _convert(path, layout)
        own = [sys.executable, "-m", "bench.loading", "--load", str(path), "--layout", layout]
        own += [] if mesh is None else ["--mesh", mesh]
        measured = json.loads(subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True).stdout)
        about = {"type": type_name, "layers": layers, "layout": layout, "converted": converted, "mesh": mesh}
        print(json.dumps({**about, "parameters": parameters, "file_bytes": size, **measured}))


def _shapes(layers: int, outer: dict[str, str], inner: dict[str, str], prefix: str) -> dict[str, tuple[int, ...]]:
    """Of every tensor, by the names that a container gives them."""
    dims = {"embed": (V, D), "head": (V, D), "norm": (D,), "gate": (F, D), "up": (F, D), "down": (D, F)}
    dims |= dict.fromkeys(("attn_norm", "ffn_norm"), (D,)) | dict.fromkeys("qkvo", (D, D))
    shapes = {f"{name}.weight": dims[what] for what, name in outer.items()}
    for layer in range(layers):
        shapes |= {f"{prefix}.{layer}.{name}.weight": dims[what] for what, name in inner.items()}
    return shapes


def _write_safetensors(path: Path, layers: int) -> tuple[int, int]:
    """Writes a folder in HF layout, of random BF16; returns its parameters and bytes."""
    shapes = _shapes(
        layers,
        {"embed": "model.embed_tokens", "head": "lm_head", "norm": "model.norm"},
        {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            **{letter: f"self_attn.{letter}_proj" for letter in "qkvo"},
            **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
        },
        "model.layers",
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": layers,
        "num_attention_heads": N,
        "num_key_value_heads": N,
        "vocab_size": V,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            # The upper halves of numbers between 0.5 and 2.
            sample = rng.integers(0x3F00, 0x4000, (SAMPLE_ROWS, shape[-1]), dtype=np.uint16)
            for _ in range(math.prod(shape[:-1]) // SAMPLE_ROWS):
                file.write(sample.tobytes())
            if len(shape) == 1:
                file.write(sample[0].tobytes())
    return sum(map(math.prod, shapes.values())), at


def _write(path: Path, type_name: str, layers: int) -> int:
    """Writes the model; returns its parameters. Every byte of a block is random, so scales are of any size."""
    import gguf

    kind = gguf.GGMLQuantizationType[type_name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    shapes = _shapes(
        layers,
        {"embed": "token_embd", "head": "output", "norm": "output_norm"},
        {
            **{name: name for name in ("attn_norm", "ffn_norm")},
            **{name: f"ffn_{name}" for name in ("gate", "up", "down")},
            **{letter: f"attn_{letter}" for letter in "qkv"},
            "o": "attn_output",
        },
        "blk",
    )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(D)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            row_bytes = shape[1] // elements * size
            writer.add_tensor_info(
                name, (shape[0], row_bytes), np.dtype(np.uint8), shape[0] * row_bytes, raw_dtype=kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape in shapes.values():
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, np.float32))
            continue
        sample = rng.integers(0, 256, (SAMPLE_ROWS, shape[1] // elements * size), dtype=np.uint8)
        writer.write_tensor_data(np.tile(sample, (shape[0] // SAMPLE_ROWS, 1)))
    writer.close()
    return sum(map(math.prod, shapes.values()))


def _convert(path: Path, layout: str) -> Path:
    """Converts the model, which has no tokenizer, and removes it."""
    from atoma_jax.config import EngineConfig
    from atoma_jax.engine import convert

    # The check of the tokenizer is left out: the made-up model has none, and none of its bytes are measured.
    convert.tokenizer_of = lambda _: None  # type: ignore[assignment]
    out = path.with_suffix("")
    convert.convert_model(EngineConfig.from_options({"model": str(path), "weight_layout": layout}).model, out)
    path.unlink()
    return out


def _load(path: Path, layout: str, mesh: str | None) -> dict[str, float]:
    import jax

    from atoma_jax.config import EngineConfig
    from atoma_jax.cores import usable_cores
    from atoma_jax.engine.mesh_config import planned_mesh
    from atoma_jax.engine.model_setup import set_up_model
    from atoma_jax.loading.fetch.hub import resolve
    from atoma_jax.loading.model_files import open_model

    config = EngineConfig.from_options({"model": str(path), "weight_layout": layout, "mesh": mesh})
    shape = planned_mesh(mesh)
    if shape is not None:
        jax.config.update("jax_num_cpu_devices", shape.num_devices)
    for device in jax.devices():  # the backend starts outside of what is measured
        jax.block_until_ready(jax.device_put(np.zeros(1), device))
    before = _anonymous_bytes()
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak.append(max(peak[-1], _anonymous_bytes()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    with open_model(resolve(str(path))) as files:
        setup = set_up_model(config.model, files, mesh=shape)
        if shape is not None:
            setup = replace(setup, devices=shape.build(jax.devices()))
        weights = jax.block_until_ready(setup.load(threads=usable_cores()))
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    held = _held_bytes(weights)
    largest = max(
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(value)) for value in setup.planned.values()
    )
    return {
        "seconds": seconds,
        "device_bytes": held,
        "largest_bytes": largest,
        "peak_anonymous_bytes": peak[-1] - before,
        "peak_over_device": (peak[-1] - before) / held,
        "peak_over_weights": (peak[-1] - before - held) / largest,
    }


def _held_bytes(weights: Any) -> int:
    """What all devices hold, memory that they share counted once."""
    import jax

    shards = (shard.data for leaf in jax.tree.leaves(weights) for shard in leaf.addressable_shards)
    return sum({shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}.values())


def _anonymous_bytes() -> int:
    """Memory of this process that no file is behind (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process's anonymous memory")


if __name__ == "__main__":
    typer.run(main)

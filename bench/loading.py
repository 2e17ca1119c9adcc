"""How long the weights of a 7B model take to load, and how much memory that takes beside the weights.

`python -m bench.loading --type Q4_K --layout planar` writes a GGUF file of Llama 2 7B's shapes with random blocks, in a
temporary folder (it needs the room of the model), loads its weights in a process of its own, and prints a JSON object.

- `seconds`: from the open file to weights on the device. The file is in the page cache, as it was just written. With
  `--converted` they come from the folder that `atoma-jax convert` makes of it.
- `device_bytes`: of the weights; on a CPU they lie in this process's memory.
- `peak_anonymous_bytes`: the most memory of its own that the process had, less what it had before. The mapped file is
  not in it: those pages are the system's to drop.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

D, F, N, V = 4096, 11008, 32, 32000  # Llama 2 7B
SAMPLE_ROWS = 64  # of random blocks, repeated: what they hold does not change the time


def main(
    type_name: Annotated[str, typer.Option("--type", help="ggml type of all matrices.")] = "Q4_K",
    layers: Annotated[int, typer.Option(min=1, help="7B has 32.")] = 32,
    layout: Annotated[str, typer.Option(help="rows or planar.")] = "planar",
    converted: Annotated[bool, typer.Option("--converted", help="What `atoma-jax convert` makes of the file.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where the file is written; default: the temporary folder.")
    ] = None,
    load: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Write a synthetic model, load it, print what that took."""
    if load is not None:
        print(json.dumps(_load(load, layout)))
        return
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "model.gguf"
        parameters = _write(path, type_name, layers)
        size = path.stat().st_size
        if converted:
            path = _convert(path, layout)
        own = [sys.executable, "-m", "bench.loading", "--load", str(path), "--layout", layout]
        measured = json.loads(subprocess.run(own, check=True, capture_output=True, text=True).stdout)
        about = {"type": type_name, "layers": layers, "layout": layout, "converted": converted}
        print(json.dumps({**about, "parameters": parameters, "file_bytes": size, **measured}))


def _write(path: Path, type_name: str, layers: int) -> int:
    """Writes the model; returns its parameters. Every byte of a block is random, so scales are of any size."""
    import gguf

    kind = gguf.GGMLQuantizationType[type_name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (V, D),
        "output.weight": (V, D),
        "output_norm.weight": (D,),
    }
    for layer in range(layers):
        block = {"attn_norm": (D,), "ffn_norm": (D,), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
        block |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (D, D))
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
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
    return sum(int(np.prod(shape)) for shape in shapes.values())


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


def _load(path: Path, layout: str) -> dict[str, float]:
    import jax

    from atoma_jax.config import EngineConfig
    from atoma_jax.cores import usable_cores
    from atoma_jax.engine.model_setup import set_up_model
    from atoma_jax.loading.fetch.hub import resolve
    from atoma_jax.loading.model_files import open_model

    config = EngineConfig.from_options({"model": str(path), "weight_layout": layout})
    jax.block_until_ready(jax.numpy.zeros(1))  # the backend starts outside of what is measured
    before = _anonymous_bytes()
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak.append(max(peak[-1], _anonymous_bytes()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    with open_model(resolve(str(path))) as files:
        setup = set_up_model(config.model, files)
        weights = jax.block_until_ready(setup.load(threads=usable_cores()))
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    return {
        "seconds": seconds,
        "device_bytes": held,
        "peak_anonymous_bytes": peak[-1] - before,
        "peak_over_device": (peak[-1] - before) / held,
    }


def _anonymous_bytes() -> int:
    """Memory of this process that no file is behind (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process's anonymous memory")


if __name__ == "__main__":
    typer.run(main)

"""Small random models for tests: a `transformers` model, the GGUF file that llama.cpp makes of it, and a paged run.

Names of tensors and of metadata come from the `gguf` package, the arithmetic from `transformers`: neither is ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from flax import nnx

from atoma_jax import ops
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.model_files import open_model
from atoma_jax.loading.weights import load_weights
from atoma_jax.model_spec import ModelSpec
from atoma_jax.models.decoder import Decoder
from atoma_jax.models.params import fill, specs_of
from atoma_jax.quant.ggml_types import GGMLType
from tests.kv_cache import poisoned_pages
from tests.quant.ggml_samples import put_halves, reference

F32 = gguf.GGMLQuantizationType.F32


@dataclass(kw_only=True)
class Recipe:
    """How a `transformers` model becomes a file."""

    arch: str
    metadata: dict[str, Any] = field(default_factory=dict)  # keys behind "{arch}." beyond those that all have
    types: Callable[[str], gguf.GGMLQuantizationType] = lambda name: F32  # of each matrix, by its name in the file
    extra: dict[str, np.ndarray] = field(default_factory=dict)  # tensors of no parameter


@pytest.fixture(scope="session")
def recipe() -> type[Recipe]:
    return Recipe


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any, Recipe], Path]:
    """Writes a model's file; where it is quantized, puts the rounded weights back into the model."""

    def save(model: Any, how: Recipe) -> Path:
        import torch

        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, how.arch)
        _write_metadata(writer, model.config, how)
        names = gguf.get_tensor_name_map(_arch_enum(how.arch), model.config.num_hidden_layers)
        rng = np.random.default_rng(7)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                for name, part in _parts_in_file(key, parameter, names):
                    values = _to_file(name, part.numpy(), model.config, how.arch)
                    kind = how.types(name) if values.ndim == 2 else F32
                    raw = _quantize(values, kind, rng)
                    writer.add_tensor(name, raw, raw_dtype=kind)
                    exact = reference(raw, GGMLType(kind)).reshape(values.shape)
                    exact = _from_file(name, exact, model.config, how.arch).reshape(part.shape)
                    part.copy_(torch.from_numpy(exact))
        for name, values in how.extra.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return save


def _parts_in_file(key: str, parameter: Any, names: gguf.TensorNameMap) -> list[tuple[str, Any]]:
    """A parameter's tensors by their names in the file: `transformers` fuses the two projections of experts."""
    if key.endswith("experts.gate_up_proj"):
        gate, up = parameter.chunk(2, dim=1)
        prefix = key.removesuffix("gate_up_proj")
        return [
            (f"{names.get_name(prefix + part)}.weight", half) for part, half in (("gate_proj", gate), ("up_proj", up))
        ]
    name = names.get_name(key, try_suffixes=(".weight", ".bias"))
    assert name is not None, key
    return [(f"{name}.weight" if key.endswith("experts.down_proj") else name, parameter)]


def _arch_enum(arch: str) -> gguf.MODEL_ARCH:
    return next(enum for enum, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)


def _write_metadata(writer: gguf.GGUFWriter, config: Any, how: Recipe) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    for key, value in how.metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"{how.arch}.{key}", value)


def _permuted_heads(name: str, config: Any, arch: str) -> int:
    """Heads of a weight whose rows llama.cpp interleaves; 0 for the others."""
    if arch != "llama" or ".attn_output" in name:
        return 0
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2], 0)


def _to_file(name: str, values: np.ndarray, config: Any, arch: str) -> np.ndarray:
    if heads := _permuted_heads(name, config, arch):
        half = values.shape[0] // heads // 2
        values = values.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(values.shape)
    if arch.startswith("gemma") and "norm" in name:
        values = values + np.float32(1)
    if "ffn_gate_inp_shexp" in name:
        values = values[0]
    return np.ascontiguousarray(values, np.float32)


def _from_file(name: str, values: np.ndarray, config: Any, arch: str) -> np.ndarray:
    if heads := _permuted_heads(name, config, arch):
        half = values.shape[0] // heads // 2
        values = values.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(values.shape)
    if arch.startswith("gemma") and "norm" in name:
        values = values - np.float32(1)
    return np.ascontiguousarray(values)


def _quantize(values: np.ndarray, kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """Blocks of a matrix. Where the package cannot quantize: random blocks whose values spread as the matrix does."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        elements, size = gguf.GGML_QUANT_SIZES[kind]
    ours = GGMLType(kind)
    blocks = rng.integers(0, 256, (values.shape[0], values.shape[1] // elements, size), np.uint8)
    if ours is GGMLType.NVFP4:  # its scales are eight-bit floats: small ones
        blocks[..., :4] = rng.integers(8, 24, blocks[..., :4].shape, np.uint8)
        return blocks.reshape(len(values), -1)

    def decoded(*halves: float) -> np.ndarray:
        put_halves(blocks, ours, np.broadcast_to(np.asarray(halves, np.float16), (*blocks.shape[:2], 2)))
        return reference(blocks.reshape(len(values), -1), ours)

    # Of two numbers the second is of mins: as much of it as leaves a mean of zero.
    least = decoded(0, 1).mean()
    share = 0.0 if least == 0 else -float(decoded(1, 0).mean() / least)
    scale = float(values.std() / decoded(1, share).std())
    decoded(scale, scale * share)
    return blocks.reshape(len(values), -1)


@dataclass(frozen=True)
class Work:
    """What one sequence does in a step."""

    sequence: int
    count: int
    decode: bool = False


class Paged:
    """A model behind a paged cache. Pages of all sequences are shuffled, and hold NaN where nothing was written.

    S slots a page, B rows in a step, which are sequences, W pages each.
    """

    def __init__(
        self,
        path: Path,
        *,
        layout: str = "rows",
        operands: str = "float32",
        kv_dtype: str = "float32",
        max_model_len: int | None = None,
        change: Callable[[ModelSpec], ModelSpec] = lambda spec: spec,
        S: int = 32,
        B: int = 3,
        W: int = 3,
    ):
        self._S, self._B, self._W, self._kv_dtype = S, B, W, kv_dtype
        with open_model(resolve(str(path)), max_model_len=max_model_len) as files:
            self.spec = spec = change(files.spec)
            tiles = layout == "tiles"
            if tiles and not ops.has_native_kernels():
                pytest.skip("the native kernels are not built, or do not fit; the log says why")
            backend = ops.Backend(
                platform="cpu",
                operands=operands,  # type: ignore[arg-type]
                weight_layout=layout,  # type: ignore[arg-type]
                kernels="native" if tiles else "xla",
                precision="exact" if tiles else "default",
            )
            model = Decoder(spec, backend)
            wanted = specs_of(model)
            sources = files.sources(wanted)
            fill(model, load_weights(files.checkpoint, sources, wanted, backend, threads=2, on_bytes=lambda n: None))
        self._graph, self._weights = nnx.split(model)
        self._mixed = jax.jit(self._step, donate_argnums=1)
        self._decode = jax.jit(lambda *inputs: self._step(*inputs, blocks=False), donate_argnums=1)
        self.reset()

    def weight(self, path: str) -> Any:
        """A weight by its path, as it lies on the device."""
        return dict(nnx.to_flat_state(self._weights))[tuple(path.split("."))].get_value()

    def reset(self) -> None:
        """Forgets all sequences."""
        spec = self.spec
        num_pages = 2 + self._B * self._W
        shape = (spec.num_layers, num_pages, spec.num_kv_heads, self._S, spec.head_dim)
        self._pages = poisoned_pages(shape, self._kv_dtype)
        shuffled = np.random.default_rng(5).permutation(np.arange(1, num_pages))
        self._table = shuffled[: self._B * self._W].reshape(self._B, self._W).astype(np.int32)
        self._done = np.zeros(self._B, np.int32)

    def run(self, sequences: Sequence[np.ndarray], plan: Sequence[Sequence[Work]], *, tokens: int) -> list[np.ndarray]:
        """Runs the plan's steps, of at most `tokens` tokens each; logits of every token that it runs, by sequence.

        A step of nothing but B decoding rows takes a program that only decodes.
        """
        logits: list[list[np.ndarray]] = [[] for _ in sequences]
        for step in plan:
            only_decode = len(step) == self._B and all(work.decode for work in step)
            T = self._B if only_decode else tokens
            ids = np.full(T, -1, np.int32)  # padding
            position, page, slot = (np.zeros(T, np.int32) for _ in range(3))
            start, count, first, length = (np.zeros(self._B, np.int32) for _ in range(4))
            table = np.zeros((self._B, self._W), np.int32)
            at = 0
            places = []
            for row, work in enumerate(step):
                done = self._done[work.sequence]
                span, where = np.arange(done, done + work.count), slice(at, at + work.count)
                ids[where], position[where] = sequences[work.sequence][span], span
                table[row] = self._table[work.sequence]
                page[where], slot[where] = table[row][span // self._S], span % self._S
                first[row], start[row] = done, at
                count[row], length[row] = (0, done + 1) if work.decode else (work.count, 0)
                places.append((work.sequence, where))
                self._done[work.sequence] += work.count
                at += work.count
            run = self._decode if only_decode else self._mixed
            out, self._pages = run(
                self._weights, self._pages, ids, position, page, slot, table, start, count, first, length
            )
            for sequence, where in places:
                logits[sequence].append(np.asarray(out)[where])
            assert not np.asarray(out)[at:].any(), "padding is zeros in front of every product, the last one too"
        return [np.concatenate(pieces) for pieces in logits]

    def _step(self, weights, pages, ids, position, page, slot, table, start, count, first, length, blocks=True):
        model = nnx.merge(self._graph, weights)
        batch = ops.attention_batch(
            pages,
            self.spec.num_heads,
            model.backend,
            page=page,
            slot=slot,
            page_table=table,
            decode_lengths=length,
            chunks=ops.Chunks(start, count, first) if blocks else None,
            fixed_parts=False,
        )
        x, pages = model.hidden(ids, position, pages, batch)
        return model.logits(x), pages


@pytest.fixture(scope="session")
def paged() -> type[Paged]:
    return Paged


@pytest.fixture(scope="session")
def work() -> type[Work]:
    return Work

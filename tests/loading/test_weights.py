"""Weights arrive on the device with the exact values of the file, in the model's order of rows, or not at all."""

import threading
import tracemalloc

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading import weights as module
from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.loading.gguf.names import gguf_sources
from atoma_jax.loading.gguf.spec import read_spec
from atoma_jax.loading.weights import abstract_weights, load_weights
from atoma_jax.models.decoder import Decoder
from atoma_jax.models.params import fill, specs_of
from atoma_jax.ops import Backend
from atoma_jax.quant.qtensor import LayerVariants, QTensor

Q = gguf.GGMLQuantizationType
N, K, H, L = 4, 2, 64, 2


class Loaded:
    """A model read from a file, and what the file should have given."""

    def __init__(self, path, exact, backend, threads=2):
        with GGUFFile.open(path) as file:
            self.spec = read_spec(file)
            self.model = Decoder(self.spec, backend)
            self.wanted = specs_of(self.model)
            sources = gguf_sources(file, self.spec, self.wanted)
            self.bytes, lock = 0, threading.Lock()

            def count(n):
                with lock:
                    self.bytes += n

            self.file_bytes = sum(tensor.nbytes for tensor in file.tensors.values())
            self.abstract = abstract_weights(file, sources, self.wanted, backend)
            self.values = load_weights(file, sources, self.wanted, backend, threads=threads, on_bytes=count)
        self.exact = exact


@pytest.fixture
def load(tmp_path, tiny_model):
    def load(*, layout="rows", operands="float32", platform="cpu", threads=2, **changes):
        path = tmp_path / "model.gguf"
        exact = tiny_model(**changes).write(path)
        kernels = "native" if layout == "tiles" else "xla"
        backend = Backend(platform=platform, operands=operands, weight_layout=layout, kernels=kernels)
        return Loaded(path, exact, backend, threads)

    return load


def factors_of(values, supers) -> np.ndarray:
    """float32 scales or mins: as they are, or integers times the float of their supergroup, groups before rows."""
    values = np.asarray(values, np.float32)
    if supers is None:
        return values
    supers = np.asarray(supers)  # numpy repeats a JAX array by compiling a program for its shape
    return values * np.repeat(supers, values.shape[-2] // supers.shape[-2], axis=-2)


def values_of(weight) -> np.ndarray:
    """float32 values of a weight, whatever its form."""
    if isinstance(weight, LayerVariants):
        stacks = [values_of(stack) for stack in weight.stacks]
        return np.stack([stacks[which][place] for which, place in zip(weight.which, weight.place, strict=True)])
    if not isinstance(weight, QTensor):
        return np.asarray(weight, np.float32)
    codes, scales = np.asarray(weight.codes), factors_of(weight.scales, weight.scale_supers)
    mins = np.zeros_like(scales) if weight.mins is None else factors_of(weight.mins, weight.min_supers)
    lead = weight.lead
    if weight.layout == "tiles":
        rows, groups = weight.shape[0], weight.shape[1] // weight.group
        codes = untiled(codes, weight.bits)[..., :rows, : weight.shape[1]]
        codes = codes.reshape(*lead, rows, groups, weight.group)
        codes = codes.astype(np.int32) - 128 if weight.bits == 8 else codes
        scales, mins = (  # the last tile is filled up
            part.swapaxes(-1, -2).reshape(*lead, -1, part.shape[-2])[..., :rows, :groups] for part in (scales, mins)
        )
    if weight.layout == "planar":
        fields = np.arange(0, 16, weight.bits)[:, None]
        codes = codes.reshape(*lead, weight.shape[0], -1, 1, weight.plane) >> fields & (2**weight.bits - 1)
        codes = codes.reshape(*lead, weight.shape[0], -1, weight.group)
        scales, mins = scales.swapaxes(-1, -2), mins.swapaxes(-1, -2)
    values = (codes.astype(np.float32) - np.float32(weight.zero)) * scales[..., None] - mins[..., None]
    return values.reshape(*lead, *weight.shape)


def untiled(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[*lead, N, K]` from tiles of 32 rows and blocks of 32 inputs, as native/src/codes.h says."""
    *lead, tiles, blocks, _ = codes.shape
    words = np.moveaxis(codes.reshape(*lead, tiles, blocks, bits, 32, 4), -3, 0)
    if bits == 6:
        a, b, c, d, e, f = words >> 6
        steps = [*(words & 63), a | b << 2 | c << 4, d | e << 2 | f << 4]
    elif bits == 5:
        a, b, c, d, e = words >> 5
        steps = [*(words & 31), a | d >> 1 << 3, b | e >> 1 << 3, c | (d & 1) << 3 | (e & 1) << 4]
    elif bits == 3:
        a, b, c = words >> 6
        whole = [word >> bit & 7 for word in words for bit in (0, 3)]
        steps = [*whole, a | (c & 1) << 2, b | c >> 1 << 2]
    else:
        steps = [words[step % bits] >> (step // bits * bits) & (2**bits - 1) for step in range(8)]
    out = np.stack(steps, axis=-2).swapaxes(-3, -4)  # [*lead, tiles, 32, blocks, 8, 4]
    return out.reshape(*lead, tiles * 32, blocks * 32)


def fused_qkv(exact, layer: int, suffix: str) -> np.ndarray:
    """Grouped by kv head: its query heads, its key, its value; halves of q and k no longer interleaved."""
    q, k, v = (exact[f"blk.{layer}.attn_{part}.{suffix}"] for part in "qkv")

    def heads(w, n, interleaved):
        w = w.reshape(n, H // 2, 2, -1).swapaxes(1, 2) if interleaved else w
        return w.reshape(n, H, -1)

    q, k, v = heads(q, N, True), heads(k, K, True), heads(v, K, False)
    rows = [part for i in range(K) for part in (*q[i * N // K : (i + 1) * N // K], k[i], v[i])]
    return np.concatenate(rows).reshape((N + 2 * K) * H, -1)


MIXES = {kind.name: (lambda name, kind=kind: kind) for kind in (Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0)}
MIXES |= {kind.name: (lambda name, kind=kind: kind) for kind in (Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.F16, Q.BF16, Q.F32)}
INSIDE = {"attn_q": Q.Q4_K, "attn_k": Q.Q8_0, "attn_v": Q.Q6_K, "ffn_gate": Q.Q5_0, "ffn_up": Q.Q6_K}
MIXES |= {
    "inside of a weight": lambda name: INSIDE.get(name.split(".")[-2], Q.Q8_0),
    "Q4_K and Q6_K inside of a weight": lambda name: Q.Q6_K if "attn_v" in name or "ffn_up" in name else Q.Q4_K,
    "over layers": lambda name: Q.Q6_K if "blk.0" in name else Q.Q4_K,
    "Q4_0 and Q4_1 over layers": lambda name: Q.Q4_1 if "blk.0" in name else Q.Q4_0,
    "Q4_0 and Q8_0 over layers": lambda name: Q.Q4_0 if "blk.0" in name else Q.Q8_0,
    "Q5_K, Q5_0 and Q8_0": lambda name: Q.Q5_K if "_q" in name else Q.Q5_0 if "_k" in name else Q.Q8_0,
    "F16 and BF16 inside of a weight": lambda name: Q.BF16 if "attn_k" in name else Q.F16,
    "quantized and F16 over layers": lambda name: Q.Q4_0 if "blk.0" in name else Q.F16,
}


@pytest.mark.parametrize("layout", ["rows", "planar", "tiles"])
@pytest.mark.parametrize("mix", MIXES)
def test_every_type_and_every_mix_keeps_its_exact_values(load, mix, layout):
    got = load(layout=layout, types=MIXES[mix])
    exact = got.exact
    np.testing.assert_array_equal(values_of(got.values["embed"]), exact["token_embd.weight"])
    for i in range(L):
        gate_up = np.concatenate([exact[f"blk.{i}.ffn_gate.weight"], exact[f"blk.{i}.ffn_up.weight"]])
        layer = {name: values_of(got.values[f"layers.{name}"])[i] for name in ("qkv", "gate_up", "down", "attn_out")}
        np.testing.assert_array_equal(layer["qkv"], fused_qkv(exact, i, "weight"))
        np.testing.assert_array_equal(layer["gate_up"], gate_up)
        np.testing.assert_array_equal(layer["down"], exact[f"blk.{i}.ffn_down.weight"])
        np.testing.assert_array_equal(layer["attn_out"], exact[f"blk.{i}.attn_output.weight"])
    assert {name: spec.shape for name, spec in got.wanted.items() if len(spec.shape) == 1} == {
        "final_norm": (256,),
        "layers.attn_norm": (256,),
        "layers.ffn_norm": (256,),
    }
    np.testing.assert_array_equal(got.values["layers.ffn_norm"][1], exact["blk.1.ffn_norm.weight"])


@pytest.mark.parametrize("layout", ["rows", "planar", "tiles"])
@pytest.mark.parametrize("mix", ["Q4_K", "Q8_0", "inside of a weight", "F16"])
def test_the_plan_is_what_comes(load, mix, layout):
    got = load(layout=layout, types=MIXES[mix])
    assert jax.tree.structure(got.abstract) == jax.tree.structure(got.values)
    for plan, value in zip(jax.tree.leaves(got.abstract), jax.tree.leaves(got.values), strict=True):
        assert (plan.shape, plan.dtype) == (value.shape, value.dtype)


def test_quantized_weights_stay_as_narrow_as_their_type(load):
    planar = load(layout="planar", types=MIXES["Q4_1"]).values["layers.down"]
    assert planar.bits == 4
    assert planar.codes.nbytes == L * 256 * 512 // 2
    rows = load(layout="rows", types=MIXES["Q4_1"]).values["layers.down"]
    assert rows.codes.dtype == jnp.int8


def test_layers_of_different_types_are_packed_each_to_its_own_bits(load):
    down = load(layout="planar", types=MIXES["over layers"]).values["layers.down"]
    assert isinstance(down, LayerVariants)
    assert (down.which, down.place) == ((0, 1), (0, 0))
    assert [(stack.bits, stack.group) for stack in down.stacks] == [(8, 16), (4, 32)]  # Q6_K, then Q4_K
    apart = [load(layout="planar", types=MIXES[kind]).values["layers.down"].nbytes // L for kind in ("Q6_K", "Q4_K")]
    assert down.nbytes == sum(apart)


def test_biases_move_with_the_rows_they_belong_to(load):
    shapes = {f"blk.{i}.attn_{p}.bias": (n,) for i in range(L) for p, n in (("q", 256), ("k", 128), ("v", 128))}
    got = load(tensors=shapes)
    for i in range(L):
        np.testing.assert_array_equal(got.values["layers.qkv_bias"][i], fused_qkv(got.exact, i, "bias")[:, 0])


def test_on_bytes_adds_up_to_the_files_tensors_for_any_number_of_threads(load, monkeypatch):
    monkeypatch.setattr(module, "DECODED_AT_ONCE", 5000)  # chunks of rows that do not divide
    one, many = load(threads=1), load(threads=5)
    assert one.bytes == many.bytes == one.file_bytes
    for a, b in zip(jax.tree.leaves(one.values), jax.tree.leaves(many.values), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_loaded_fills_the_model(load):
    got = load()
    fill(got.model, got.values)
    assert got.model.embed.get_value().codes is got.values["embed"].codes


@pytest.mark.parametrize(
    ("platform", "operands", "dtype"),
    [("cpu", "bfloat16", "float32"), ("cuda", "bfloat16", "bfloat16"), ("cuda", "float32", "float32")],
)
def test_dense_matrices_are_narrow_only_where_products_are(load, platform, operands, dtype):
    got = load(types=MIXES["F16"], platform=platform, operands=operands)
    assert got.values["layers.down"].dtype == dtype
    assert got.values["layers.attn_norm"].dtype == jnp.float32


@pytest.mark.parametrize("mix", ["F16", "BF16", "F32", "F16 and BF16 inside of a weight"])
def test_native_kernels_get_dense_matrices_as_the_file_has_them(load, mix):
    got = load(types=MIXES[mix], layout="tiles")
    own = {"F16": jnp.float16, "BF16": jnp.bfloat16, "F32": jnp.float32}[mix[:4].strip()]
    assert got.values["embed"].dtype == got.values["layers.down"].dtype == own
    assert got.values["layers.qkv"].dtype == (jnp.float32 if "inside" in mix else own)
    assert got.values["layers.attn_norm"].dtype == jnp.float32


def test_a_missing_tensor(load):
    with pytest.raises(WeightFileError, match="is missing") as caught:
        load(tensors={"blk.1.attn_k.weight": None})
    assert "blk.1.attn_k.weight" in caught.value.field


@pytest.mark.parametrize("shape", [(128, 512), (64, 256), (32768,), (1, 128, 256)])
def test_a_tensor_of_the_wrong_shape(load, shape):
    with pytest.raises(WeightFileError, match=r"must be \(128, 256\)") as caught:
        load(tensors={"blk.1.attn_k.weight": shape}, types=MIXES["F32"])
    assert "blk.1.attn_k.weight" in caught.value.field


@pytest.mark.parametrize("name", ["blk.2.attn_norm.weight", "blk.0.attn_output.bias"])
def test_a_tensor_without_a_place_is_a_feature_that_is_missing(load, name):
    with pytest.raises(UnsupportedModelError) as caught:
        load(tensors={name: (256,)})
    assert name in caught.value.field


def test_inputs_that_do_not_fill_words_of_narrow_codes_get_wider_ones(load):
    narrow = {f"blk.{i}.{name}.weight": (480, 256) for i in range(L) for name in ("ffn_gate", "ffn_up")}
    narrow |= {f"blk.{i}.ffn_down.weight": (256, 480) for i in range(L)}
    got = load(layout="planar", metadata={"feed_forward_length": 480}, tensors=narrow)
    down = got.values["layers.down"]
    assert (down.bits, down.zero) == (8, 8)
    assert got.values["layers.gate_up"].bits == 4
    for i in range(L):
        np.testing.assert_array_equal(values_of(down)[i], got.exact[f"blk.{i}.ffn_down.weight"])


@pytest.mark.parametrize(
    "metadata",
    [
        {"block_count": 1024},
        {"feed_forward_length": 2**20},
        {"embedding_length": 2**20, "attention.key_length": 64},
        {"attention.head_count": 2**14, "attention.head_count_kv": 2**14, "attention.key_length": 64},
    ],
)
def test_dimensions_that_the_file_does_not_have_fail_before_anything_large_is_allocated(load, metadata):
    tracemalloc.start()
    try:
        with pytest.raises(WeightFileError):
            load(metadata=metadata)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 << 20


def test_a_failure_ends_loading_at_once(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(module, "DECODED_AT_ONCE", 256)
    path = tmp_path / "model.gguf"
    tiny_model().write(path)
    backend = Backend(platform="cpu", operands="float32", weight_layout="rows")
    calls = []

    def interrupt(n: int) -> None:
        calls.append(n)
        raise RuntimeError("stop")

    with GGUFFile.open(path) as file:
        spec = read_spec(file)
        wanted = specs_of(Decoder(spec, backend))
        sources = gguf_sources(file, spec, wanted)
        with pytest.raises(RuntimeError, match="stop"):
            load_weights(file, sources, wanted, backend, threads=1, on_bytes=interrupt)
    assert len(calls) < 40, "one chunk a row, and the first of 40 rows failed"

"""Factors beside a weight (`X.scale`) are in it, as y = (W · x) · factor says; `X.input_scale` changes nothing."""

from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.loading.gguf.side_scales import with_side_scales
from atoma_jax.loading.model_files import open_model
from atoma_jax.loading.weights import load_weights
from atoma_jax.models.decoder import Decoder
from atoma_jax.models.params import specs_of
from atoma_jax.ops import Backend
from atoma_jax.quant.dequantized import dequantized
from tests.loading.conftest import TinyModel

Q = gguf.GGMLQuantizationType
EXPERTS: dict[str, tuple[int, ...] | None] = {
    **{f"blk.{i}.ffn_{part}.weight": None for i in range(2) for part in ("gate", "up", "down")},
    **{f"blk.{i}.ffn_gate_inp.weight": (4, 256) for i in range(2)},
    **{f"blk.{i}.ffn_{part}_exps.weight": (4, 512, 256) for i in range(2) for part in ("gate", "up")},
    **{f"blk.{i}.ffn_down_exps.weight": (4, 256, 512) for i in range(2)},
    "blk.0.ffn_gate_exps.scale": (4,),
    "blk.0.ffn_down_exps.scale": (1,),
}
DENSE: dict[str, tuple[int, ...] | None] = {
    "output.weight": (40, 256),
    **{
        f"{name}.scale": (1,)
        for name in ("output", "blk.0.attn_q", "blk.0.attn_v", "blk.1.ffn_up", "blk.1.attn_output")
    },
    "blk.0.attn_q.input_scale": (1,),
    "blk.1.ffn_down.input_scale": (1,),
}


def scaled(exact: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """In float64, what the tensors of a file stand for."""
    found = {}
    for name, values in exact.items():
        if name.endswith("scale"):
            continue
        factor = exact.get(name.removesuffix(".weight") + ".scale", np.ones(1)).astype(np.float64)
        found[name] = values.astype(np.float64) * factor.reshape(-1, *[1] * (values.ndim - 1))
    return found


@pytest.mark.parametrize("kind", ["NVFP4", "TQ2_0", "Q4_K", "Q4_1", "Q8_0", "F16", "F32"])
def test_every_kind_of_weight_takes_them(tmp_path: Path, kind: str) -> None:
    exact = TinyModel(tensors=DENSE, types=lambda _: Q[kind]).write(tmp_path / "m.gguf")
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        tensors = with_side_scales(file).tensors
        wanted = scaled(exact)
        assert set(tensors) == set(wanted)
        for name, values in wanted.items():
            found = tensors[name].dequantize(slice(None)).reshape(values.shape)
            # Two roundings to float32 where a min is taken off, relative to the larger part.
            np.testing.assert_allclose(found, values, rtol=2**-22, atol=2**-22 * np.abs(values).max(), err_msg=name)
            if f"{name.removesuffix('weight')}scale" not in exact:
                np.testing.assert_array_equal(found, exact[name])
            if tensors[name].format is None:
                np.testing.assert_array_equal(found.astype(tensors[name].float_dtype), found, "float_dtype holds them")


def test_each_expert_has_its_own(tmp_path: Path) -> None:
    exact = TinyModel(tensors=EXPERTS, types=lambda _: Q.F32).write(tmp_path / "m.gguf")
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        tensors = with_side_scales(file).tensors
        for name, values in scaled(exact).items():
            rows = np.arange(200, 1000, 7) if "exps" in name else slice(None)
            found = tensors[name].dequantize(rows)
            expected = values.reshape(-1, values.shape[-1])[rows] if values.ndim > 1 else values[None]
            np.testing.assert_allclose(found, expected, rtol=2**-23, err_msg=name)


@pytest.mark.parametrize("layout", ["rows", "planar"])
def test_the_model_has_them(tmp_path: Path, layout: Any) -> None:
    both = DENSE | {"blk.0.attn_output.scale": (1,)}  # layers with and without would be stacked apart
    exact = TinyModel(tensors=both, types=lambda _: Q.NVFP4).write(tmp_path / "m.gguf")
    backend = Backend(platform="cpu", operands="float32", weight_layout=layout)
    with open_model(resolve(str(tmp_path / "m.gguf"))) as files:
        wanted = specs_of(Decoder(files.spec, backend))
        sources = files.sources(wanted)
        values = load_weights(files.checkpoint, sources, wanted, backend, threads=1, on_bytes=lambda _: None)
    head = dequantized(jax.tree.map(np.asarray, values["head"]))
    np.testing.assert_allclose(head, scaled(exact)["output.weight"], rtol=2**-22)
    for layer in range(2):
        found = dequantized(jax.tree.map(lambda leaf, layer=layer: np.asarray(leaf[layer]), values["layers.attn_out"]))
        np.testing.assert_allclose(found, scaled(exact)[f"blk.{layer}.attn_output.weight"], rtol=2**-22)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"blk.0.attn_q.scale": (2,)}, WeightFileError, "must be 1 plain floats"),
        (EXPERTS | {"blk.0.ffn_up_exps.scale": (3,)}, WeightFileError, "must be 1 or 4 plain floats"),
        ({"token_embd.scale": (1,)}, UnsupportedModelError, "has no place"),
        ({"output.scale": (1,)}, UnsupportedModelError, "has no place"),
        ({"blk.0.attn_norm.scale": (1,)}, UnsupportedModelError, "has no place"),
    ],
)
def test_what_cannot_be_applied_is_refused(
    tmp_path: Path, tensors: dict[str, Any], error: type[Exception], message: str
) -> None:
    metadata = {"expert_count": 4, "expert_used_count": 2} if "blk.0.ffn_gate_inp.weight" in tensors else {}
    TinyModel(tensors=tensors, metadata=metadata, types=lambda _: Q.F32).write(tmp_path / "m.gguf")
    backend = Backend(platform="cpu", operands="float32", weight_layout="rows")
    with pytest.raises(error, match=message), open_model(resolve(str(tmp_path / "m.gguf"))) as files:
        files.sources(specs_of(Decoder(files.spec, backend)))


def test_factors_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.loading.conftest.random_rows", lambda shape, kind, rng: np.full(shape, np.nan, "f4"))
    TinyModel(tensors={"blk.0.attn_q.scale": (1,)}, types=lambda _: Q.F32).write(tmp_path / "m.gguf")
    with GGUFFile.open(tmp_path / "m.gguf") as file, pytest.raises(WeightFileError, match="must be finite"):
        with_side_scales(file)

"""Which kernels and which layout settings come to, and what contradicts what."""

from typing import Any

import pytest

from atoma_jax.config import ModelConfig
from atoma_jax.engine import model_setup
from atoma_jax.engine.model_setup import _backend
from atoma_jax.errors import ConfigError
from atoma_jax.native import library


@pytest.fixture(params=[True, False], ids=["built", "not built"])
def built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(model_setup, "has_native_kernels", lambda: request.param)
    return request.param


def chosen(platform: Any = "cpu", **settings: Any) -> tuple[str, str]:
    backend = _backend(ModelConfig(model="m", **settings), platform, None)
    return backend.kernels, backend.weight_layout


def test_a_cpu_takes_native_kernels_where_they_are_built(built: bool) -> None:
    assert chosen() == (("native", "tiles") if built else ("xla", "rows"))


def test_who_asks_for_float32_gets_no_rounded_activations(built: bool) -> None:
    assert chosen(dtype="float32") == ("xla", "rows")
    if built:
        assert chosen(dtype="float32", cpu_precision="high") == ("native", "tiles")


@pytest.mark.parametrize("layout", ["rows", "planar"])
def test_a_layout_of_xlas_takes_xla(built: bool, layout: str) -> None:
    assert chosen(weight_layout=layout) == ("xla", layout)


def test_xla_may_be_asked_for(built: bool) -> None:
    assert chosen(kernels="xla") == ("xla", "rows")


def refused(platform: Any = "cpu", **settings: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        chosen(platform, **settings)
    return caught.value


@pytest.mark.parametrize(
    ("settings", "field", "problem"),
    [
        ({"kernels": "native", "weight_layout": "rows"}, "weight_layout", "does not go with the kernels native"),
        ({"kernels": "native", "dtype": "float32"}, "dtype", "rounds activations"),
        ({"kernels": "xla", "weight_layout": "tiles"}, "weight_layout", "does not go with the kernels xla"),
        ({"kernels": "xla", "cpu_precision": "high"}, "cpu_precision", "is a setting of the native kernels"),
        ({"weight_layout": "rows", "cpu_precision": "exact"}, "cpu_precision", "is a setting of the native kernels"),
    ],
)
def test_what_contradicts_itself_is_refused(settings: dict[str, Any], field: str, problem: str) -> None:
    error = refused(**settings)
    assert error.field == field
    assert problem in str(error)


def test_native_kernels_that_are_not_built_are_not_replaced_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_setup, "has_native_kernels", lambda: False)
    assert "cannot run here" in str(refused(kernels="native"))
    assert refused(weight_layout="tiles").field == "weight_layout"


def test_a_gpu_has_none() -> None:
    assert "is for CPUs" in str(refused("cuda", kernels="native"))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, "float16"),
        ({"cpu_precision": "high"}, "float32"),
        ({"cpu_precision": "exact"}, "float32"),
        ({"kernels": "xla"}, "float32"),
        ({"dtype": "float32"}, "float32"),
    ],
)
def test_a_cache_is_rounded_only_where_products_are(settings: dict[str, Any], wanted: str) -> None:
    native = library.library()
    if native is None:
        # Where no C++ compiler is, the engine runs on XLA, and no cache is rounded: nothing of this test is left.
        pytest.skip("the native kernels are not built, or do not fit; the log says why")
    backend = _backend(ModelConfig(model="m", **settings), "cpu", None)
    assert backend.kv_dtype == (wanted if native.converts_halves else "float32")
    with native.forced(variant="portable"):
        assert backend.kv_dtype == "float32"


def test_a_gpus_cache_is_bfloat16() -> None:
    assert _backend(ModelConfig(model="m"), "cuda", None).kv_dtype == "bfloat16"

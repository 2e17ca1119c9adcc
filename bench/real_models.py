"""Models of real shapes without their files: `ModelSpec`s, and weights of any packed type, abstract or random.

For the compile gate and the GPU benchmark, which need shapes and bytes, not answers.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from atoma_jax.engine.step import Weights
from atoma_jax.loading.weight_forms import DenseForm, QuantizedForm
from atoma_jax.model_spec import ModelSpec, RopeSpec
from atoma_jax.models.decoder import Decoder
from atoma_jax.models.params import ParamSpec, fill, specs_of
from atoma_jax.ops import Backend
from atoma_jax.quant.groups import F16, F32, I8, GroupFormat
from atoma_jax.quant.qtensor import Layout, QTensor, planar_plane


def _rope(head_dim: int, base: float) -> RopeSpec:
    return RopeSpec(frequencies=tuple(base ** (-2 * i / head_dim) for i in range(head_dim // 2)))


LLAMA_8B = ModelSpec(  # Llama-3.1-8B
    architecture="llama",
    family="llama",
    vocab_size=128256,
    dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_dim=14336,
    context_length=131072,
    norm_eps=1e-5,
    rope=_rope(128, 500_000.0),
    attention_scale=128**-0.5,
)
LLAMA_1B = replace(  # Llama-3.2-1B
    LLAMA_8B, dim=2048, num_layers=16, head_dim=64, ffn_dim=8192, tied_embeddings=True,
    rope=_rope(64, 500_000.0), attention_scale=64**-0.5,
)  # fmt: skip
TINY = replace(  # for a machine without a GPU
    LLAMA_8B, vocab_size=512, dim=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, ffn_dim=512,
    rope=_rope(64, 10_000.0), attention_scale=64**-0.5,
)  # fmt: skip

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FORMATS: dict[str, GroupFormat | None] = {
    "bf16": None,
    "Q4_0": GroupFormat(bits=4, group=32, zero=8, scale_dtype=F16),
    "W4 g128": GroupFormat(bits=4, group=128, zero=8, scale_dtype=F16),
    "IQ4_NL": GroupFormat(bits=4, group=32, table=IQ4_NL, scale_dtype=F16),
    "W4 g128 mins": GroupFormat(bits=4, group=128, scale_dtype=F16, min_dtype=F16),  # AWQ
    "Q2_K": GroupFormat(bits=2, group=16, scale_dtype=I8, min_dtype=I8, supergroup=256),
    "Q5_K": GroupFormat(bits=8, group=32, scale_dtype=I8, min_dtype=I8, supergroup=256),
    "Q6_K": GroupFormat(bits=8, group=16, zero=32, scale_dtype=I8, supergroup=256),
    "Q8_0": GroupFormat(bits=8, group=32, zero=128, scale_dtype=F16),
    "Q4_K": GroupFormat(bits=4, group=32, scale_dtype=I8, min_dtype=I8, supergroup=256),
    "ternary": GroupFormat(bits=2, group=0, zero=1, scale_dtype=F32),  # one scale a row
}


def with_type(spec: ModelSpec, type_name: str) -> ModelSpec:
    """The model as its weights of a type are used: ternary ones multiply int8 activations."""
    return replace(spec, int8_activations=type_name == "ternary")


def abstract_values(spec: ModelSpec, type_name: str, backend: Backend) -> dict[str, Any]:
    """Every weight by path, without values. Embedding and head of a ternary model are bfloat16, as BitNet's."""
    wanted = specs_of(Decoder(spec, backend))
    return {path: _form(want, spec, type_name, backend).abstract() for path, want in wanted.items()}


def graph_and_state(spec: ModelSpec, backend: Backend, values: Mapping[str, Any]) -> tuple[Any, Weights]:
    """The model's `nnx.GraphDef` and its state with these values, real or abstract."""
    model = Decoder(spec, backend)
    fill(model, values)
    return nnx.graphdef(model), nnx.state(model)


def packed_weight(type_name: str, count: int, N: int, K: int) -> QTensor:
    """A stack of `count` weights `[N, K]` in the planar layout, without values."""
    kind = FORMATS[type_name]
    assert kind is not None, "a dense weight is not packed"
    return _quantized(kind, "planar", (count,), N, K).abstract()


def random_values(abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Random weights on the device, of the size that keeps activations finite. Made side by side: most is compiling."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(abstract, pool.map(random_value, abstract.values(), range(len(abstract))), strict=True))


def random_value(abstract: Any, seed: int = 0) -> Any:
    """One of them."""
    keys = iter(jax.random.split(jax.random.key(seed), 4))
    return _random(abstract, lambda: next(keys))


def _form(want: ParamSpec, spec: ModelSpec, type_name: str, backend: Backend) -> DenseForm | QuantizedForm:
    kind = FORMATS[type_name]
    lead = (spec.num_layers,) if want.stacked else ()
    if not want.quantizable or kind is None or (type_name == "ternary" and not want.stacked):
        dtype = "float32" if not want.quantizable or backend.platform == "cpu" else "bfloat16"
        return DenseForm(shape=(*lead, *want.shape), dtype=jnp.dtype(dtype))
    return _quantized(kind, backend.weight_layout, lead, *want.shape[-2:])


def _quantized(kind: GroupFormat, layout: Layout, lead: tuple[int, ...], N: int, K: int) -> QuantizedForm:
    kind = replace(kind, group=kind.group or K)
    plane = planar_plane(K, kind.group, kind.bits) if layout == "planar" else 0
    assert plane is not None, (K, kind)
    return QuantizedForm(layout=layout, lead=lead, shape=(N, K), format=kind, plane=plane, permuted=False)


def _random(value: Any, key: Callable[[], jax.Array]) -> Any:
    if not isinstance(value, QTensor):
        scale = 1.0 if len(value.shape) < 2 or value.shape[-1] < 64 else value.shape[-1] ** -0.5
        return _normal(key(), value.shape, value.dtype, scale)
    size = value.shape[1] ** -0.5 / 2**value.bits

    def factors(part: Any, supers: Any, high: float) -> Any:
        if part is None:
            return None
        if supers is not None:
            return jax.random.randint(key(), part.shape, 1, 63, jnp.int8)
        return (jax.random.uniform(key(), part.shape, jnp.float32, 0.5, 1.0) * high).astype(part.dtype)

    def constant(part: Any, amount: float) -> Any:
        return None if part is None else jnp.full(part.shape, amount, part.dtype)

    if value.layout == "planar":
        codes = jax.random.bits(key(), value.codes.shape, np.uint16)
    else:
        codes = jax.random.randint(key(), value.codes.shape, -8, 8, jnp.int8)
    middle = 2.0 ** (value.bits - 1)  # a min that undoes the mean of unsigned codes
    return replace(
        value,
        codes=codes,
        scales=factors(value.scales, value.scale_supers, size),
        mins=factors(value.mins, value.min_supers, size * middle),
        scale_supers=constant(value.scale_supers, size / 32),
        min_supers=constant(value.min_supers, size * middle / 32),
    )


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: float) -> jax.Array:
    make = jax.jit(
        lambda key: (jax.random.normal(key, shape, jnp.bfloat16) * scale).astype(dtype)
    )  # one pass: no float32 copy of a stack
    return make(key)

"""The compile gate's cases of kernels that make activations, at the widths of Llama-3.1-8B and BitNet 2B4T."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct

from atoma_jax.model_spec import Activation
from atoma_jax.ops.rowwise import activated
from bench.compile_gate.cases import KernelCase
from pallas_kernels.activations import (
    IN_ORDER,
    Form,
    GatedRows,
    InFields,
    InPairs,
    InSpans,
    Made,
    NormedRows,
    Rows,
    activations,
)
from pallas_kernels.decode_combine import DecodedParts, combined, combined_activations

LAYERS = 4
FORMS: dict[str, Form] = {
    "spans of 32": InSpans(32),
    "bfloat16": IN_ORDER,
    "bfloat16 in pairs": InPairs(32, 4),
    "fields": InFields(64),
}


def normed_case(form: str, M: int, K: int, *, parts: int, quick: bool = False) -> KernelCase:
    """Rows that `parts` are added to, normalized."""

    def function(x: Array, more: Array, scales: Array, layer: Array) -> Made:
        return activations(NormedRows(x, more if parts else None, scales, layer, 1e-5), FORMS[form])

    arguments = numbers(M, K), numbers(max(1, parts), M, K), numbers(LAYERS, K), ShapeDtypeStruct((), jnp.int32)
    return _case(f"sum of {1 + parts}, norm, {form}, {M} × {K}", "NormedRows", function, arguments, quick=quick)


def rows_case(form: str, M: int, K: int) -> KernelCase:
    """Rows as they are."""

    def function(x: Array) -> Made:
        return activations(Rows(x), FORMS[form])

    return _case(f"rows, {form}, {M} × {K}", "Rows", function, (numbers(M, K),))


def gated_case(activation: Activation, form: str, M: int, K: int, *, quick: bool = False) -> KernelCase:
    """Gates and ups."""

    def function(parts: Array) -> Made:
        return activations(GatedRows(parts, partial(activated, activation=activation)), FORMS[form])

    return _case(
        f"gates by {activation}, {form}, {M} × {K}", "GatedRows", function, (numbers(1, M, 2 * K),), quick=quick
    )


def combined_case(form: str | None, B: int, N: int, H: int, *, quick: bool = False) -> KernelCase:
    """Attention put together from parts."""

    def function(*decoded: Array) -> Any:
        parts = DecodedParts(*decoded)
        return combined(parts) if form is None else combined_activations(parts, FORMS[form])

    items = B + 64
    arguments = numbers(items, N, H), numbers(items, N), numbers(items, N), numbers(B, N, H)
    name = f"attention of parts, {form or 'rows'}, {B} × {N} heads of {H}"
    return _case(name, "combine", function, (ShapeDtypeStruct((B, 2), jnp.int32), *arguments), quick=quick)


def numbers(*shape: int) -> ShapeDtypeStruct:
    """An array of float32."""
    return ShapeDtypeStruct(shape, jnp.float32)


def _case(
    name: str, kernel: str, function: Callable[..., Any], arguments: tuple[Any, ...], *, quick: bool = False
) -> KernelCase:
    def on(*arrays: Any, device: str) -> Any:
        del device  # they are the same for all
        return function(*arrays)

    return KernelCase(name=name, kernel=kernel, function=on, arguments=arguments, quick=quick)


CASES = [
    normed_case("spans of 32", 1, 4096, parts=8, quick=True),
    normed_case("spans of 32", 4, 4096, parts=0),
    normed_case("bfloat16", 1, 4096, parts=8),
    normed_case("bfloat16 in pairs", 128, 4096, parts=1),
    normed_case("fields", 1, 6912, parts=0),
    *(gated_case(how, "spans of 32", 1, 14336, quick=how == "silu") for how in get_args(Activation)),
    gated_case("silu", "fields", 1, 14336),
    rows_case("spans of 32", 1, 4096),
    rows_case("fields", 1, 2560),
    combined_case(None, 64, 32, 128),
    combined_case("spans of 32", 1, 32, 128, quick=True),
    combined_case("bfloat16 in pairs", 64, 32, 128),
]

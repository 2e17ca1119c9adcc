"""Types of tensors when a model is quantized: those that llama.cpp chose for the same names and shapes, recorded."""

import json
from pathlib import Path
from typing import Any

import pytest

from atoma_jax.errors import UserError
from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.loading.gguf.mixtures import (
    MIXTURES,
    ModelFacts,
    TypeOptions,
    choose_types,
    may_be_quantized,
)
from atoma_jax.quant.ggml_types import GGMLType

RECORDED = json.loads((Path(__file__).parents[2] / "data" / "llama_cpp_types.json").read_text())
MODELS: dict[str, Any] = RECORDED["models"]
SHAPES = {"token_embd.weight": (64, 512), "blk.0.attn_q.weight": (512, 512), "output.weight": (64, 512)}
PLAIN = ModelFacts(layers=1, experts=0, queries_a_kv_head=1)


def spread(by_layer: dict[str, str]) -> dict[str, str]:
    """Undoes the file's run lengths: the type of every tensor by its full name."""
    types: dict[str, str] = {}
    for name, value in by_layer.items():
        if "*" not in value:
            types[name] = value
            continue
        runs = [run.split("*") for run in value.split()]
        for layer, kind in enumerate(kind for kind, count in runs for _ in range(int(count))):
            types[f"blk.{layer}.{name}"] = kind
    return types


def choose(shapes: dict[str, tuple[int, ...]], facts: ModelFacts, **options: Any) -> dict[str, str]:
    choices = choose_types(shapes, facts, TypeOptions(**options), "m.gguf")
    return {name: choice.type.name for name, choice in choices.items()}


@pytest.mark.parametrize("mixture", sorted(next(iter(MODELS.values()))["types"]))
@pytest.mark.parametrize("model", MODELS)
def test_types_are_those_of_llama_cpp(model: str, mixture: str) -> None:
    recorded = MODELS[model]
    shapes = {name: tuple(shape) for name, shape in recorded["tensors"].items()}
    for layer in range(recorded["layers"]):
        shapes |= {f"blk.{layer}.{name}": tuple(shape) for name, shape in recorded["layer_tensors"].items()}
    facts = ModelFacts(
        layers=recorded["layers"],
        experts=recorded["experts"],
        queries_a_kv_head=recorded["heads"] // recorded["kv_heads"],
    )
    assert choose(shapes, facts, mixture=MIXTURES[mixture]) == spread(recorded["types"][mixture])


@pytest.mark.model
def test_types_of_smollm2_are_those_of_llama_cpp(smollm2_path: Path) -> None:
    """A real model whose width, 576, is no multiple of 256: nearly all of its tensors fall back."""
    with GGUFFile.open(smollm2_path) as file:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        facts = ModelFacts.read(file.metadata)
        assert facts == ModelFacts(layers=30, experts=0, queries_a_kv_head=3)
        assert choose(shapes, facts, mixture=MIXTURES["Q4_K_M"]) == spread(RECORDED["smollm2_q4_k_m"])


@pytest.mark.model
def test_types_of_a_published_q4_k_m_file_are_the_ones_chosen_for_it(gemma3_path: Path) -> None:
    with GGUFFile.open(gemma3_path) as file:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        published = {name: tensor.type.name for name, tensor in file.tensors.items() if len(tensor.shape) > 1}
        assert choose(shapes, ModelFacts.read(file.metadata), mixture=MIXTURES["Q4_K_M"]) == published


def test_pure_gives_every_matrix_the_base_type() -> None:
    assert set(choose(SHAPES, PLAIN, mixture=MIXTURES["Q4_K_M"], pure=True).values()) == {"Q4_K"}


def test_embedding_and_output_may_be_asked_for_even_where_all_else_is_pure() -> None:
    options = {"mixture": MIXTURES["Q4_K_M"], "token_embedding": GGMLType.Q8_0, "output": GGMLType.F16}
    expected = {"token_embd.weight": "Q8_0", "blk.0.attn_q.weight": "Q4_K", "output.weight": "F16"}
    assert choose(SHAPES, PLAIN, **options) == expected
    assert choose(SHAPES, PLAIN, **options, pure=True) == expected


def test_a_type_for_the_output_is_for_the_embedding_where_that_is_the_output() -> None:
    tied = {name: shape for name, shape in SHAPES.items() if name != "output.weight"}
    options = {"mixture": MIXTURES["Q4_K_M"], "output": GGMLType.Q5_0}
    assert choose(tied, PLAIN, **options)["token_embd.weight"] == "Q5_0"
    assert choose(tied, PLAIN, **options, token_embedding=GGMLType.Q8_0)["token_embd.weight"] == "Q8_0"


def test_a_type_that_was_asked_for_and_does_not_fit_is_refused_with_one_that_does() -> None:
    shapes = {"token_embd.weight": (64, 576), "output.weight": (64, 576)}
    with pytest.raises(
        UserError, match=r"m\.gguf: tensor 'output\.weight': needs rows of a multiple of 256 and this one"
    ):
        choose(shapes, PLAIN, mixture=MIXTURES["Q8_0"], output=GGMLType.Q6_K)


@pytest.mark.parametrize("mixture", ["Q4_0", "Q4_K_M", "IQ4_NL", "MXFP4", "TQ2_0"])
def test_rows_that_no_block_fits_become_f16(mixture: str) -> None:
    shapes = {"blk.0.attn_q.weight": (8, 40), "output.weight": (8, 64)}
    assert choose(shapes, PLAIN, mixture=MIXTURES[mixture])["blk.0.attn_q.weight"] == "F16"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("output_norm.weight", (512,)),
        ("blk.0.attn_v.bias", (512,)),
        ("blk.0.attn_q.weight", (1, 512)),  # a vector, for llama.cpp does not count leading ones
        ("blk.0.ffn_gate_inp.weight", (8, 512)),
        ("blk.0.attn_q_norm.weight", (8, 64)),
        ("blk.0.ssm_conv1d.weight", (512, 4)),
        ("rope_freqs.table", (2, 64)),
        ("position_embd.weight", (512, 512)),
    ],
)
def test_what_llama_cpp_never_quantizes_is_left_alone(name: str, shape: tuple[int, ...]) -> None:
    assert not may_be_quantized(name, shape)
    assert not choose({name: shape, "output.weight": (8, 256)}, PLAIN, mixture=MIXTURES["Q8_0"]).keys() & {name}


def test_names_are_read_in_any_case_and_short() -> None:
    options = TypeOptions.named("q4_k", output_tensor_type="q6_k")
    assert options == TypeOptions.named("Q4_K_M", output_tensor_type="Q6_K")
    assert (options.mixture.name, options.token_embedding, options.output) == ("Q4_K_M", None, GGMLType.Q6_K)


def test_names_that_mean_nothing_are_refused_with_those_that_do() -> None:
    with pytest.raises(UserError, match=r"type: must be one of F32, F16.*Q4_K \(Q4_K_M\).*got 'Q4_K_XL'"):
        TypeOptions.named("Q4_K_XL")
    with pytest.raises(UserError, match=r"token_embedding_type: must be one of F32.*MXFP4, got 'Q4_K_M'"):
        TypeOptions.named("Q8_0", token_embedding_type="Q4_K_M")

"""Tiny models of every kind that a mesh cuts in another way. Those that need PyTorch say so when they are skipped."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import pytest

from atoma_jax.loading.gguf.mixtures import TypeOptions
from atoma_jax.loading.gguf.requantize import requantize
from tests.conftest import pulled
from tests.tiny_model import write_tiny_llama

TERNARY = Path(__file__).parents[1] / "data" / "ternary"


def _tiny(kind: str, **changes: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        quantization = getattr(gguf.GGMLQuantizationType, kind)
        return write_tiny_llama(folder / "m.gguf", kind=quantization, embedding_scale=0.35, **changes)

    return make


def _mixture(folder: Path) -> Path:
    whole = write_tiny_llama(
        folder / "f32.gguf", kind=gguf.GGMLQuantizationType.F32, embedding_scale=0.35, width=512, heads=(8, 4), layers=4
    )
    requantize(whole, folder / "m.gguf", TypeOptions.named("Q4_K_M"))
    return folder / "m.gguf"


def _hf(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pytest.importorskip("torch", reason="needs the extra `oracle`: torch")
        from tests.models import families, test_hf_quantized

        def mixtral() -> Any:
            return families.transformers.MixtralForCausalLM(
                families.transformers.MixtralConfig(
                    **{**families.COMMON, "intermediate_size": 128}, num_key_value_heads=2, num_local_experts=4
                )
            )

        def llama_of_eight_groups() -> Any:
            return families.llama(
                hidden_size=256, intermediate_size=256, num_attention_heads=8, num_key_value_heads=2,
                initializer_range=0.08,
            )  # fmt: skip

        makers: dict[str, Callable[[], Any]] = {
            "gemma": lambda: families.gemma(num_hidden_layers=3, sliding_window=6, head_dim=16, intermediate_size=128),
            "mixtral": mixtral,
            "shared expert": families.qwen2_moe,
            "biases": families.llama_with_biases,
            "GPTQ": llama_of_eight_groups,
            "AWQ": llama_of_eight_groups,
        }
        model = families.randomized(makers[name])
        if name in test_hf_quantized.FORMATS:
            return test_hf_quantized.quantized_folder(model, folder, name)
        model.save_pretrained(folder)
        return folder

    return make


MODELS: dict[str, Callable[[Path], Path]] = {
    "Q4_1": _tiny("Q4_1", width=256, heads=(8, 2)),
    "Q4_K": _mixture,  # two supergroups of inputs, and layers of several types
    "F32": _tiny("F32", heads=(8, 8)),
    "three heads": _tiny("Q4_1", width=192, heads=(3, 3)),
    "ternary": lambda folder: TERNARY / "hf",
    **{name: _hf(name) for name in ("gemma", "mixtral", "shared expert", "biases", "GPTQ", "AWQ")},
    "smollm2": lambda _: pulled("smollm2-135m-instruct"),  # in Q4_1
    "gemma3": lambda _: pulled("gemma3-270m"),  # in Q4_K_M
}


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler() -> Iterator[None]:
    """LLVM does not optimize programs of tiny models, which run a few steps; what XLA makes of them is the same."""
    compiled = jax.stages.Lowered.compile

    def quickly(lowered: Any, options: Mapping[str, Any]) -> Any:
        if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0":  # a real model's, which run many
            return compiled(lowered, {**options})
        return compiled(lowered, {**options, "xla_backend_optimization_level": 0})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", quickly)
        yield


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file or folder of a model of `MODELS`, made once."""
    made: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in made:
            made[name] = MODELS[name](tmp_path_factory.mktemp("model"))
        return made[name]

    return path

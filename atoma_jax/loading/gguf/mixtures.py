"""Which type each tensor gets when a model is quantized: llama.cpp's mixtures, chosen from names and shapes alone.

A mixture gives most tensors its base type, and more bits to those that suffer most: values, the down projection, the
output. The rules are those of llama.cpp's quantizer without an importance matrix (src/llama-quant.cpp), down to which
layers get more, so that a file made here has the types of one made there. Left out are its exceptions for the Falcon
architecture of 2023. Owns no quantizing (`requantize.py`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

from atoma_jax.errors import UserError
from atoma_jax.loading.gguf.metadata import Metadata
from atoma_jax.quant.ggml_types import BLOCK_SIZES, GGMLType

T = GGMLType
_Role: TypeAlias = Literal["output", "token_embd", "attn_v", "attn_k", "attn_output", "ffn_down", "other"]


@dataclass(frozen=True, slots=True)
class Mixture:
    """What `--type` names."""

    name: str
    base: GGMLType
    file_type: int  # of `general.file_type`


MIXTURES: Mapping[str, Mixture] = MappingProxyType(
    {
        name: Mixture(name, base, file_type)
        for name, base, file_type in (
            ("F32", T.F32, 0),
            ("F16", T.F16, 1),
            ("BF16", T.BF16, 32),
            ("Q4_0", T.Q4_0, 2),
            ("Q4_1", T.Q4_1, 3),
            ("Q5_0", T.Q5_0, 8),
            ("Q5_1", T.Q5_1, 9),
            ("Q8_0", T.Q8_0, 7),
            ("Q2_K", T.Q2_K, 10),
            ("Q3_K_S", T.Q3_K, 11),
            ("Q3_K_M", T.Q3_K, 12),
            ("Q3_K_L", T.Q3_K, 13),
            ("Q4_K_S", T.Q4_K, 14),
            ("Q4_K_M", T.Q4_K, 15),
            ("Q5_K_S", T.Q5_K, 16),
            ("Q5_K_M", T.Q5_K, 17),
            ("Q6_K", T.Q6_K, 18),
            ("IQ4_NL", T.IQ4_NL, 25),
            ("TQ1_0", T.TQ1_0, 36),
            ("TQ2_0", T.TQ2_0, 37),
            ("MXFP4", T.MXFP4, 38),  # all matrices; llama.cpp's own is the next, and shares its number
            ("MXFP4_MOE", T.MXFP4, 38),  # experts alone, the rest in Q8_0
        )
    }
)
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# Where rows are no multiple of a block of 256.
_FALLBACKS: Mapping[GGMLType, GGMLType] = MappingProxyType(
    {T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0, T.TQ1_0: T.Q4_0, T.TQ2_0: T.Q4_0}
)
_PLAIN = frozenset({T.F32, T.F16, T.BF16})

# Small, or of a kind that quantizing spoils; any matrix whose name holds one of these stays as it is.
_KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight"),
    *("time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight"),
    *("time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight"),
    *("time_mix_a2.weight", "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight"),
    *("time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", ".position_embd", "sam.pos_embd", "sam.neck."),
    *("sam.net_", ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd"),
)
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the rules ask of a model."""

    layers: int
    experts: int
    queries_a_kv_head: int

    @classmethod
    def read(cls, metadata: Metadata) -> "ModelFacts":
        """From a GGUF file's metadata; what is missing counts as a plain dense model.

        Raises:
            WeightFileError: a key has a value that cannot be.
        """
        arch = metadata.get_str("general.architecture")
        layers = metadata.get_int(f"{arch}.block_count", 0, maximum=1 << 16)
        heads, kv_heads = 1, 1
        if layers:
            heads = metadata.get_int_per_layer(f"{arch}.attention.head_count", 1, layers=layers)[0]
            kv_heads = metadata.get_int_per_layer(f"{arch}.attention.head_count_kv", heads, layers=layers)[0]
        return cls(
            layers=layers,
            experts=metadata.get_int(f"{arch}.expert_count", 0),
            queries_a_kv_head=heads // kv_heads if kv_heads else 0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeOptions:
    """What the caller asks for.

    Attributes:
        mixture: most tensors, and how others differ.
        token_embedding: type of the token embedding; None leaves it to the mixture.
        output: type of the output matrix, which is the token embedding in a model without one of its own.
        pure: every matrix gets the mixture's base type, but for the two above.
    """

    mixture: Mixture
    token_embedding: GGMLType | None = None
    output: GGMLType | None = None
    pure: bool = False

    @classmethod
    def named(
        cls,
        mixture: str,
        *,
        token_embedding_type: str | None = None,
        output_tensor_type: str | None = None,
        pure: bool = False,
    ) -> "TypeOptions":
        """From what users write, in any case.

        Raises:
            UserError: nothing has such a name; the message lists those that there are.
        """
        return cls(
            mixture=_mixture_named(mixture),
            token_embedding=_type_named(token_embedding_type, "token_embedding_type"),
            output=_type_named(output_tensor_type, "output_tensor_type"),
            pure=pure,
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """The type of one tensor.

    Attributes:
        type: what it gets.
        wanted: what it would have got if its rows were a multiple of that type's block.
    """

    type: GGMLType
    wanted: GGMLType


def may_be_quantized(name: str, shape: Sequence[int]) -> bool:
    """Whether llama.cpp quantizes such a tensor at all: vectors, biases, norms and routers are kept."""
    if all(size == 1 for size in shape[:-1]):  # a vector, whatever its number of dimensions says
        return False
    return name.endswith("weight") and name not in _KEPT_NAMES and not any(part in name for part in _KEPT)


def choose_types(
    shapes: Mapping[str, tuple[int, ...]], facts: ModelFacts, options: TypeOptions, field: str
) -> dict[str, Choice]:
    """The types of all tensors that are to be quantized, by name; those that stay as they are have no entry.

    Args:
        shapes: of the whole model, outermost dimension first.
        facts: of the same.
        options: what was asked for.
        field: names the file in errors.

    Raises:
        UserError: a type that was asked for by tensor does not fit that tensor's rows.
    """
    tied = "output.weight" not in shapes
    rules = _Rules(facts, options.mixture, shapes, tied=tied)
    choices: dict[str, Choice] = {}
    for name in sorted(shapes, key=_layer_and_name):  # the rules count tensors in this order
        shape = shapes[name]
        if not may_be_quantized(name, shape):
            continue
        asked = _asked_for(name, options, tied=tied)
        if asked is not None:
            _check_fits(f"{field}: tensor {name!r}", shape[-1], asked)
            choices[name] = Choice(asked, asked)
            continue
        base = options.mixture.base
        wanted = base if options.pure or base in _PLAIN else rules.wanted(name, shape)
        choices[name] = Choice(_fitting(wanted, shape[-1]), wanted)
    return choices


def _layer_and_name(name: str) -> tuple[int, str]:
    match = _LAYER.match(name)
    return (-1 if match is None else int(match[1]), name)


def _asked_for(name: str, options: TypeOptions, *, tied: bool) -> GGMLType | None:
    role = _role(name)
    if role == "token_embd":
        return options.output if tied and options.token_embedding is None else options.token_embedding
    return options.output if role == "output" else None


def _check_fits(field: str, K: int, ggml_type: GGMLType) -> None:
    block = BLOCK_SIZES[ggml_type].elements
    if K % block:
        fitting = _fitting(ggml_type, K).name
        raise UserError(
            field, ggml_type.name, f"needs rows of a multiple of {block} and this one has {K}; ask {fitting}"
        )


def _fitting(wanted: GGMLType, K: int) -> GGMLType:
    """The type itself, or the nearest one whose blocks fit."""
    for ggml_type in (wanted, _FALLBACKS.get(wanted, wanted)):
        if K % BLOCK_SIZES[ggml_type].elements == 0:
            return ggml_type
    return T.F16


def _role(name: str) -> _Role:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    for part in ("attn_qkv", "attn_kv_b", "attn_v"):  # all hold values
        if f"{part}.weight" in name:
            return "attn_v"
    if "attn_k.weight" in name:
        return "attn_k"
    if "attn_output.weight" in name:
        return "attn_output"
    return "ffn_down" if "ffn_down" in name else "other"


def _gets_more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


class _Rules:
    """llama.cpp's choice for one tensor after another, in the order of layers: it counts those it has seen."""

    def __init__(self, facts: ModelFacts, mixture: Mixture, shapes: Mapping[str, tuple[int, ...]], *, tied: bool):
        self._facts = facts
        self._mixture = mixture.name
        self._base = mixture.base
        self._tied = tied
        self._values = sum(_role(name) == "attn_v" for name in shapes)
        self._values_seen = 0
        self._downs_seen = 0

    def wanted(self, name: str, shape: tuple[int, ...]) -> GGMLType:
        """The type for the next tensor, whether or not its rows fit."""
        role = _role(name)
        if role == "output" or (role == "token_embd" and self._tied):
            return self._output(shape[-1])
        if self._mixture == "MXFP4_MOE":
            return T.MXFP4 if len(shape) > 2 and shape[-3] > 1 else T.Q8_0
        if role == "token_embd":
            return T.Q4_K if self._mixture in ("TQ1_0", "TQ2_0") else self._base
        if role == "attn_v":
            self._values_seen += 1
            return self._value(self._values_seen - 1)
        if role == "attn_k" and self._facts.experts == 8:
            return T.Q8_0
        if role == "attn_output":
            return self._attention_output()
        if role == "ffn_down":
            self._downs_seen += 1
            return self._down(name, self._downs_seen - 1)
        return self._base

    def _output(self, K: int) -> GGMLType:
        if self._mixture == "MXFP4_MOE" or self._base == T.Q8_0 or K % BLOCK_SIZES[self._base].elements:
            return T.Q8_0
        return T.Q6_K

    def _value(self, index: int) -> GGMLType:
        if self._facts.experts == 8:
            return T.Q8_0
        grouped = self._facts.queries_a_kv_head >= 4
        wanted = self._base
        if self._mixture == "Q2_K":
            wanted = T.Q4_K if grouped else T.Q3_K
        elif self._mixture == "Q3_K_M":
            wanted = T.Q5_K if index < 2 else T.Q4_K
        elif self._mixture == "Q3_K_L" or (self._mixture == "IQ4_NL" and grouped):
            wanted = T.Q5_K
        elif self._mixture in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(index, self._values):
            wanted = T.Q6_K
        elif self._mixture == "Q4_K_S" and index < 4:
            wanted = T.Q5_K
        # What llama.cpp calls a 70B model: its values are an eighth of its queries and cost little.
        if self._facts.layers == 80 and self._facts.queries_a_kv_head > 1 and wanted in (T.Q3_K, T.Q4_K):
            return T.Q5_K
        return wanted

    def _attention_output(self) -> GGMLType:
        if self._facts.experts == 8:
            many = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M")
            return T.Q5_K if self._mixture in many else self._base
        return {"Q2_K": T.Q3_K, "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K}.get(self._mixture, self._base)

    def _down(self, name: str, seen: int) -> GGMLType:
        layers = self._facts.layers
        layer = max(_layer_and_name(name)[0], 0) if self._facts.experts > 1 else seen
        if self._mixture == "Q2_K":
            return T.Q3_K
        if self._mixture == "Q3_K_M":
            return T.Q5_K if layer < layers // 16 else T.Q4_K
        if self._mixture == "Q3_K_L":
            return T.Q5_K
        if self._mixture in ("Q4_K_M", "Q5_K_M"):
            return T.Q6_K if _gets_more_bits(layer, layers) else self._base
        if self._mixture in ("Q4_K_S", "IQ4_NL"):
            return T.Q5_K if layer < layers // 8 else self._base
        return self._base


def _mixture_named(name: str) -> Mixture:
    upper = name.upper()
    upper = _ALIASES.get(upper, upper)
    if upper not in MIXTURES:
        aliases = ", ".join(f"{short} ({long})" for short, long in _ALIASES.items())
        raise UserError("type", name, f"must be one of {', '.join(MIXTURES)}, or {aliases}")
    return MIXTURES[upper]


def _type_named(name: str | None, field: str) -> GGMLType | None:
    if name is None:
        return None
    types = {mixture.base.name: mixture.base for mixture in MIXTURES.values()}
    if name.upper() not in types:
        raise UserError(field, name, f"must be one of {', '.join(types)}")
    return types[name.upper()]

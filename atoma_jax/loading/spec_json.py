"""A `ModelSpec` from JSON, with the limits that `gguf/spec.py` holds a file's metadata to. Writing it is `asdict`'s."""

from collections.abc import Collection
from dataclasses import fields
from typing import get_args

from atoma_jax.errors import WeightFileError
from atoma_jax.loading.json_file import Section
from atoma_jax.loading.orbax.manifest_values import choice, known_keys, numbers, optional
from atoma_jax.loading.spec_limits import MAX_DIM, MAX_EXPERTS, MAX_HEAD_DIM, MAX_LAYERS, MAX_POSITIONS
from atoma_jax.model_spec import Activation, ExpertSpec, Family, ModelSpec, RopeSpec

_TINY = 1e-30  # what has to be above zero


def read_spec(section: Section) -> ModelSpec:
    """The shape of a model.

    Raises:
        WeightFileError: a value is missing, unknown or outside its limits, or contradicts another.
    """
    known_keys(section, _names(ModelSpec))
    heads = section.integer("num_heads", minimum=1, maximum=MAX_DIM)
    kv_heads = section.integer("num_kv_heads", minimum=1, maximum=MAX_DIM)
    if heads % kv_heads:
        raise WeightFileError(section.field("num_kv_heads"), kv_heads, f"must divide the {heads} heads")
    head_dim = section.integer("head_dim", minimum=2, maximum=MAX_HEAD_DIM)
    if head_dim % 2:
        raise WeightFileError(section.field("head_dim"), head_dim, "must be even")
    if heads * head_dim > MAX_DIM:
        limit = MAX_DIM // head_dim
        raise WeightFileError(section.field("num_heads"), heads, f"must be at most {limit} for heads of {head_dim}")
    layers = section.integer("num_layers", minimum=1, maximum=MAX_LAYERS)
    family: Family = choice(section, "family", get_args(Family))
    experts = optional(section, "experts", lambda key: _read_experts(section.section(key)))
    if (family == "mixture") != (experts is not None):
        raise WeightFileError(section.field("experts"), section.values.get("experts"), f"contradicts family {family!r}")
    ffn_dim = section.integer("ffn_dim", minimum=1, maximum=MAX_DIM)
    if experts is not None and experts.ffn_dim != ffn_dim:
        raise WeightFileError(section.field("ffn_dim"), ffn_dim, f"must be {experts.ffn_dim}, that of one expert")
    return ModelSpec(
        architecture=section.text("architecture"),
        family=family,
        vocab_size=section.integer("vocab_size", minimum=1),
        dim=section.integer("dim", minimum=1, maximum=MAX_DIM),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        context_length=section.integer("context_length", minimum=1, maximum=MAX_POSITIONS),
        norm_eps=section.number("norm_eps", minimum=0.0),
        rope=_read_rope(section.section("rope"), head_dim),
        windows=_read_windows(section, layers),
        attention_scale=section.number("attention_scale", minimum=_TINY),
        attention_softcap=optional(section, "attention_softcap", lambda key: section.number(key, minimum=_TINY)),
        final_softcap=optional(section, "final_softcap", lambda key: section.number(key, minimum=_TINY)),
        embedding_scale=section.number("embedding_scale", minimum=_TINY),
        activation=choice(section, "activation", get_args(Activation)),
        tied_embeddings=section.boolean("tied_embeddings"),
        qkv_bias=section.boolean("qkv_bias"),
        qk_norm=section.boolean("qk_norm"),
        sub_norms=section.boolean("sub_norms"),
        int8_activations=section.boolean("int8_activations"),
        experts=experts,
    )


def _names(kind: type[ModelSpec] | type[RopeSpec] | type[ExpertSpec]) -> Collection[str]:
    return [entry.name for entry in fields(kind)]


def _read_rope(section: Section, head_dim: int) -> RopeSpec:
    known_keys(section, _names(RopeSpec))
    frequencies = numbers(section, "frequencies", longest=head_dim // 2)
    local = optional(section, "local_frequencies", lambda key: numbers(section, key, longest=head_dim // 2))
    if local is not None and len(local) != len(frequencies):
        problem = f"must be as many as the {len(frequencies)} of other layers"
        raise WeightFileError(section.field("local_frequencies"), len(local), problem)
    return RopeSpec(
        frequencies=frequencies, local_frequencies=local, magnitude=section.number("magnitude", minimum=_TINY)
    )


def _read_windows(section: Section, layers: int) -> tuple[int | None, ...]:
    values = section.values.get("windows")
    if not isinstance(values, list) or len(values) not in (0, layers):
        raise WeightFileError(section.field("windows"), values, f"must be a list of {layers}, or empty")
    for value in values:
        if value is not None and (type(value) is not int or not 1 <= value <= MAX_POSITIONS):
            raise WeightFileError(section.field("windows"), value, f"must be null or in [1, {MAX_POSITIONS}]")
    return tuple(values)


def _read_experts(section: Section) -> ExpertSpec:
    known_keys(section, _names(ExpertSpec))
    count = section.integer("count", minimum=1, maximum=MAX_EXPERTS)
    return ExpertSpec(
        count=count,
        used=section.integer("used", minimum=1, maximum=count),
        ffn_dim=section.integer("ffn_dim", minimum=1, maximum=MAX_DIM),
        normalized=section.boolean("normalized"),
        shared_ffn_dim=section.integer("shared_ffn_dim", maximum=MAX_DIM),
    )

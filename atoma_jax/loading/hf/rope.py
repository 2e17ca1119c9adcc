"""How a model in HF layout rotates positions: `rope_parameters` of config.json, or the older `rope_scaling` beside it.

Owns the spellings, defaults and checks of these settings; the formulas are `rope.py`'s. Defaults are those of
transformers (modeling_rope_utils.py), which wrote both spellings.
"""

from dataclasses import dataclass

import numpy as np

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading import rope
from atoma_jax.loading.json_file import Section
from atoma_jax.loading.spec_limits import MAX_POSITIONS
from atoma_jax.model_spec import RopeSpec

_THETA = (2.0, 1e12)
_FACTOR = (1e-3, 1e6)  # of a stretch, a magnitude, or turns
_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
_OLD_KINDS = {"su": "longrope", "yarn": "longrope"}  # of early Phi-3 models


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeDefaults:
    """What an architecture takes for granted."""

    theta: float = 1e4
    local_theta: float | None = None  # layers with a window rotate by this one; None: as the others
    partial: bool = False  # a part of each head may stay unrotated
    old_kinds: bool = False  # as early Phi-3 models call them


def trained_positions(config: Section) -> int:
    """Tokens of context that the model is for: with YaRN, the stretched ones, whichever of both the config counts."""
    positions = config.integer("max_position_embeddings", minimum=1, maximum=MAX_POSITIONS)
    scaling = _parameters(config)
    if _text_kind(scaling) != "yarn" or "factor" not in scaling:
        return positions
    stretched = scaling.number("factor", minimum=_FACTOR[0], maximum=_FACTOR[1]) * _original(config, scaling)
    return min(max(positions, int(stretched)), MAX_POSITIONS)


def read_rope(config: Section, defaults: RopeDefaults, *, head_dim: int, context: int) -> RopeSpec:
    """Frequencies for contexts of up to `context` tokens.

    Args:
        config: config.json.
        defaults: of the architecture.
        head_dim: dimensions of a head.
        context: tokens that will be served; LongRoPE has frequencies for short and for long contexts.

    Raises:
        UnsupportedModelError: a scaling that is not implemented.
        WeightFileError: a setting is missing, or has the wrong type or an impossible value.
    """
    scaling = _parameters(config)
    if defaults.local_theta is None:
        scaling.refuse("full_attention", "must be left out: this architecture rotates all layers alike")
        frequencies, magnitude = _scaled(config, scaling, defaults, head_dim, context)
        return RopeSpec(frequencies=rope.as_tuple(frequencies), magnitude=magnitude)
    if "rope_scaling" in config or "rope_parameters" not in config:
        theta = config.number("rope_local_base_freq", defaults.local_theta, minimum=_THETA[0], maximum=_THETA[1])
        everywhere, local = scaling, Section(config.where, {"rope_theta": theta})
    else:
        everywhere, local = scaling.section("full_attention"), scaling.section("sliding_attention")
        if not everywhere.values:
            raise WeightFileError(everywhere.where, None, "is missing")
    frequencies, magnitude = _scaled(config, everywhere, defaults, head_dim, context)
    local_defaults = RopeDefaults(theta=defaults.local_theta)
    local_frequencies, local_magnitude = _scaled(config, local, local_defaults, head_dim, context, outer_theta=False)
    if local_magnitude != 1.0:
        field, kind = local.field("rope_type"), _text_kind(local)
        raise UnsupportedModelError(field, kind, "must be default or linear on layers with a window")
    return RopeSpec(
        frequencies=rope.as_tuple(frequencies),
        local_frequencies=rope.as_tuple(local_frequencies),
        magnitude=magnitude,
    )


def _parameters(config: Section) -> Section:
    return config.section("rope_scaling" if config.values.get("rope_scaling") else "rope_parameters")


def _text_kind(scaling: Section) -> str:
    return scaling.text("rope_type", scaling.text("type", "default"))


def _original(config: Section, scaling: Section) -> int:
    """Tokens of the context that the model was first trained on."""
    key = "original_max_position_embeddings"
    place = config if key in config else scaling
    positions = config.integer("max_position_embeddings", minimum=1, maximum=MAX_POSITIONS)
    return place.integer(key, positions, minimum=2, maximum=MAX_POSITIONS)


def _scaled(
    config: Section,
    scaling: Section,
    defaults: RopeDefaults,
    head_dim: int,
    context: int,
    *,
    outer_theta: bool = True,
) -> tuple[np.ndarray, float]:
    """Frequencies and magnitude of one kind of layers."""
    theta = defaults.theta
    if outer_theta:
        theta = config.number("rope_theta", theta, minimum=_THETA[0], maximum=_THETA[1])
    theta = scaling.number("rope_theta", theta, minimum=_THETA[0], maximum=_THETA[1])
    dims = _rotated(config, scaling, defaults, head_dim)
    plain = rope.plain(theta, dims)
    kind = _text_kind(scaling)
    if defaults.old_kinds:
        kind = _OLD_KINDS.get(kind, kind)
    match kind:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / scaling.number("factor", minimum=_FACTOR[0], maximum=_FACTOR[1]), 1.0
        case "llama3":
            return _llama3(config, scaling, plain), 1.0
        case "yarn":
            return _yarn(config, scaling, theta, dims)
        case "longrope":
            return _longrope(config, scaling, plain, context)
        case _:
            field = scaling.field("rope_type" if "rope_type" in scaling else "type")
            raise UnsupportedModelError(field, kind, f"is not implemented; those that are: {', '.join(_KINDS)}")


def _rotated(config: Section, scaling: Section, defaults: RopeDefaults, head_dim: int) -> int:
    """Dimensions of a head that rotate."""
    place = scaling if "partial_rotary_factor" in scaling else config
    share = place.number("partial_rotary_factor", 1.0, minimum=0.0, maximum=1.0)
    dims = int(head_dim * share)
    if dims < 2 or dims % 2 or (dims != head_dim and not defaults.partial):
        limit = f"must leave an even number of the {head_dim} dimensions of a head, and at least 2"
        if not defaults.partial:
            limit = "must be 1: this architecture rotates whole heads"
        raise UnsupportedModelError(place.field("partial_rotary_factor"), share, limit)
    return dims


def _llama3(config: Section, scaling: Section, plain: np.ndarray) -> np.ndarray:
    low = scaling.number("low_freq_factor", minimum=_FACTOR[0], maximum=_FACTOR[1])
    high = scaling.number("high_freq_factor", minimum=_FACTOR[0], maximum=_FACTOR[1])
    if high <= low:
        raise WeightFileError(scaling.field("high_freq_factor"), high, f"must be above low_freq_factor = {low:g}")
    factor = scaling.number("factor", minimum=_FACTOR[0], maximum=_FACTOR[1])
    return rope.llama3(plain, factor=factor, low=low, high=high, original=_original(config, scaling))


def _yarn(config: Section, scaling: Section, theta: float, dims: int) -> tuple[np.ndarray, float]:
    factor, original = _factor(config, scaling), _original(config, scaling)
    slope = scaling.number("mscale", 0.0, minimum=0.0, maximum=_FACTOR[1])
    slope_of_all = scaling.number("mscale_all_dim", 0.0, minimum=0.0, maximum=_FACTOR[1])
    magnitude = rope.yarn_magnitude(factor)
    if slope and slope_of_all:
        magnitude = rope.yarn_magnitude(factor, slope) / rope.yarn_magnitude(factor, slope_of_all)
    frequencies = rope.yarn(
        theta,
        dims,
        factor=factor,
        original=original,
        beta_fast=scaling.number("beta_fast", 32.0, minimum=_FACTOR[0], maximum=_FACTOR[1]),
        beta_slow=scaling.number("beta_slow", 1.0, minimum=_FACTOR[0], maximum=_FACTOR[1]),
        truncate=scaling.boolean("truncate", True),
    )
    return frequencies, scaling.number("attention_factor", magnitude, minimum=_FACTOR[0], maximum=_FACTOR[1])


def _longrope(config: Section, scaling: Section, plain: np.ndarray, context: int) -> tuple[np.ndarray, float]:
    for key in ("short_mscale", "long_mscale"):
        scaling.refuse(key, "must be left out: magnitudes of their own for short and long contexts are not implemented")
    original = _original(config, scaling)
    factors = {
        key: scaling.numbers(key, len(plain), minimum=_FACTOR[0], maximum=_FACTOR[1])
        for key in ("short_factor", "long_factor")
    }
    magnitude = rope.longrope_magnitude(_factor(config, scaling), original)
    chosen = np.asarray(factors["long_factor" if context > original else "short_factor"])
    return plain / chosen, scaling.number("attention_factor", magnitude, minimum=_FACTOR[0], maximum=_FACTOR[1])


def _factor(config: Section, scaling: Section) -> float:
    """Of the stretch; unless the config says it, from the first context to the present one."""
    positions = config.integer("max_position_embeddings", minimum=1, maximum=MAX_POSITIONS)
    stretch = positions / _original(config, scaling)
    return scaling.number("factor", stretch, minimum=_FACTOR[0], maximum=_FACTOR[1])

"""Pieces that decoders share: rotary positions, capped logits, windows. All in float32."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from atoma_jax.model_spec import ModelSpec, RopeSpec


class Rope(NamedTuple):
    """Cosines and sines of a step's positions, for layers that see everything and for layers with a window."""

    cos: Float32[Array, "2 T half"]
    sin: Float32[Array, "2 T half"]

    @property
    def tokens(self) -> int:
        """T, of the whole step."""
        return self.cos.shape[1]

    def of(self, windowed: Bool[Array, ""]) -> tuple[Float32[Array, "T half"], Float32[Array, "T half"]]:
        """Those of a layer with a window, or without."""
        kind = windowed.astype(jnp.int32)
        return self.cos[kind], self.sin[kind]


def rope_tables(positions: Int32[Array, " T"], spec: RopeSpec) -> Rope:
    """Rotary embedding (arXiv:2104.09864) of each position of its sequence."""
    everywhere = np.asarray(spec.frequencies, np.float32)
    local = everywhere if spec.local_frequencies is None else np.asarray(spec.local_frequencies, np.float32)
    angles = positions.astype(jnp.float32)[None, :, None] * np.stack([everywhere, local])[:, None]  # [2, T, half]
    magnitude = np.asarray([spec.magnitude, 1.0 if spec.local_frequencies else spec.magnitude], np.float32)
    return Rope(jnp.cos(angles) * magnitude[:, None, None], jnp.sin(angles) * magnitude[:, None, None])


def softcapped(logits: Float32[Array, "B V"], limit: float | None) -> Float32[Array, "B V"]:
    """limit · tanh(logits / limit)."""
    return logits if limit is None else limit * jnp.tanh(logits / limit)


def window_sizes(spec: ModelSpec) -> np.ndarray:
    """int32 [L]: tokens that each layer looks back; more than any context where it sees everything."""
    unlimited = np.iinfo(np.int32).max // 2  # sums with a position must not wrap
    windows = spec.windows or (None,) * spec.num_layers
    return np.asarray([unlimited if window is None else window for window in windows], np.int32)

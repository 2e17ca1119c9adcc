"""BitNet b1.58 as `transformers` computes it, in plain JAX and float32: shapes, initial weights, quantizers, forward.

Owns the arithmetic. It knows nothing of text (`text.py`), of optimizers (`bench/train_ternary.py`) or of files
(`export.py`). Weights are one flat dictionary under the names they have in a Hugging Face folder.
Sources: "The Era of 1-bit LLMs" (arXiv 2402.17764); `models/bitnet` and `integrations/bitnet.py` of transformers.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Weights = dict[str, Float[Array, "..."]]

SMALLEST = 1e-5  # what no quantizer divides by less than
EMBEDDING = "model.embed_tokens.weight"  # also the output matrix
OUTPUT_NORM = "model.norm.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The model's sizes. TQ2_0 cuts rows into 256 weights, so D and F are multiples of 256."""

    V: int = 1024
    D: int = 256
    F: int = 768
    L: int = 4
    N: int = 4
    K: int = 2
    H: int = 64  # N · H = D: attn_sub_norm of transformers has D entries
    context: int = 256  # tokens of a training window
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The ternary matrices, [rows, columns] as PyTorch stores a linear layer: outputs first."""
        layer = {
            "self_attn.q_proj": (self.N * self.H, self.D),
            "self_attn.k_proj": (self.K * self.H, self.D),
            "self_attn.v_proj": (self.K * self.H, self.D),
            "self_attn.o_proj": (self.D, self.N * self.H),
            "mlp.gate_proj": (self.F, self.D),
            "mlp.up_proj": (self.F, self.D),
            "mlp.down_proj": (self.D, self.F),
        }
        return {f"model.layers.{i}.{name}.weight": size for i in range(self.L) for name, size in layer.items()}

    def norms(self) -> dict[str, int]:
        """The lengths of the norms' weights."""
        layer = {
            "input_layernorm": self.D,
            "self_attn.attn_sub_norm": self.N * self.H,
            "post_attention_layernorm": self.D,
            "mlp.ffn_sub_norm": self.F,
        }
        inner = {f"model.layers.{i}.{name}.weight": size for i in range(self.L) for name, size in layer.items()}
        return {**inner, OUTPUT_NORM: self.D}


def initial_weights(shape: Shape, seed: int) -> Weights:
    """Matrices of variance 1 / columns, a small embedding, norms of one."""
    rng = np.random.default_rng(seed)
    weights = {EMBEDDING: 0.02 * rng.standard_normal((shape.V, shape.D))}
    weights |= {name: rng.standard_normal(size) / size[1] ** 0.5 for name, size in shape.matrices().items()}
    weights |= {name: np.ones(size) for name, size in shape.norms().items()}
    return {name: jnp.asarray(values, jnp.float32) for name, values in weights.items()}


def ternary(w: Float[Array, "M N"]) -> tuple[Float[Array, "M N"], Float[Array, ""]]:
    """Codes −1, 0, 1 and the scale of a tensor; code · scale is the nearest of three values to each weight."""
    scale = jnp.maximum(jnp.abs(w).mean(), SMALLEST)
    return jnp.clip(jnp.round(w * (1 / scale)), -1, 1), scale


def as_ternary(weights: Weights, shape: Shape) -> Weights:
    """The weights that the forward pass sees while training; gradients pass straight through the rounding."""

    def straight_through(w: Float[Array, "M N"]) -> Float[Array, "M N"]:
        codes, scale = ternary(w)
        return w + jax.lax.stop_gradient(codes * scale - w)

    return weights | {name: straight_through(weights[name]) for name in shape.matrices()}


def int8_activations(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Each token's row rounded to 255 steps of its largest entry; gradients pass straight through."""
    scale = 127 / jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True), SMALLEST)
    rounded = jnp.clip(jnp.round(x * scale), -128, 127) / scale
    return x + jax.lax.stop_gradient(rounded - x)


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    return weight * (x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps))


def rotate(x: Float[Array, "B T N H"], shape: Shape) -> Float[Array, "B T N H"]:
    """Rotary positions 0 … T−1; the halves of a head are the pairs."""
    half = shape.H // 2
    frequencies = 1 / shape.rope_theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies  # [T, 1, H/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def forward(weights: Weights, ids: Int[Array, "B T"], shape: Shape, *, quantized: bool = True) -> Float[Array, "B T V"]:
    """Logits of every position. `quantized` is false only for the dense twin, which rounds no activations."""

    def linear(x: Float[Array, "B T D"], name: str) -> Float[Array, "B T M"]:
        rows = (int8_activations(x) if quantized else x).reshape(-1, x.shape[-1])  # [B·T, D]
        return (rows @ weights[f"{name}.weight"].T).reshape(*x.shape[:2], -1)  # [B, T, M]

    def norm(x: Float[Array, "B T D"], name: str) -> Float[Array, "B T D"]:
        return rms_norm(x, weights[f"{name}.weight"], shape.rms_eps)

    x = weights[EMBEDDING][ids]
    for i in range(shape.L):
        layer = f"model.layers.{i}"
        with jax.named_scope(layer):
            y = norm(x, f"{layer}.input_layernorm")
            q, k, v = (linear(y, f"{layer}.self_attn.{name}_proj") for name in "qkv")
            y = norm(_attention(q, k, v, shape), f"{layer}.self_attn.attn_sub_norm")
            x = x + linear(y, f"{layer}.self_attn.o_proj")
            y = norm(x, f"{layer}.post_attention_layernorm")
            y = jnp.square(jax.nn.relu(linear(y, f"{layer}.mlp.gate_proj"))) * linear(y, f"{layer}.mlp.up_proj")
            x = x + linear(norm(y, f"{layer}.mlp.ffn_sub_norm"), f"{layer}.mlp.down_proj")
    return jnp.einsum("BTD,VD->BTV", rms_norm(x, weights[OUTPUT_NORM], shape.rms_eps), weights[EMBEDDING])


def _attention(
    q: Float[Array, "B T NH"], k: Float[Array, "B T KH"], v: Float[Array, "B T KH"], shape: Shape
) -> Float[Array, "B T NH"]:
    """Causal attention; each kv head serves N / K neighbouring query heads."""
    B, T, _ = q.shape
    q = rotate(q.reshape(B, T, shape.N, shape.H), shape).reshape(B, T, shape.K, -1, shape.H)  # [B, T, K, N/K, H]
    k = rotate(k.reshape(B, T, shape.K, shape.H), shape)
    v = v.reshape(B, T, shape.K, shape.H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) * shape.H**-0.5
    causal = jnp.arange(T)[:, None] >= jnp.arange(T)
    shares = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    return jnp.einsum("BKGTS,BSKH->BTKGH", shares, v).reshape(B, T, -1)  # [B, T, N·H]


def mean_nll(
    weights: Weights,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    shape: Shape,
    *,
    quantized: bool = True,
) -> Float[Array, ""]:
    """Nats a token."""
    logits = forward(weights, inputs, shape, quantized=quantized)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()

"""The llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2 (biases), Qwen3 (norms of queries and keys)."""

from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32

from atoma_jax import ops
from atoma_jax.model_spec import ModelSpec
from atoma_jax.models.layers import Rope, gated, rms_norm, rotate
from atoma_jax.models.params import matrix, vector


class LlamaLayer(nnx.Module):
    """Attention, then a gated feed-forward net, each behind a norm and added to its input.

    Rows of `qkv` are grouped by kv head: its G query heads, then its key, then its value, H rows each, so that a cut by
    kv heads keeps together what belongs together. Rows of `gate_up` are all gates, then all ups.
    """

    def __init__(self, spec: ModelSpec, backend: ops.Backend):
        self.spec, self.backend = spec, backend
        D, F, H = spec.dim, spec.ffn_dim, spec.head_dim
        heads = spec.num_heads + 2 * spec.num_kv_heads
        self.attn_norm = vector(D, "embed")
        self.qkv = matrix(heads * H, D, ("heads", "embed"))
        if spec.qkv_bias:
            self.qkv_bias = vector(heads * H, "heads")
        if spec.qk_norm:
            self.q_norm = vector(H, "head_dim")
            self.k_norm = vector(H, "head_dim")
        self.attn_out = matrix(D, spec.num_heads * H, ("embed", "heads"))
        self.ffn_norm = vector(D, "embed")
        self.gate_up = matrix(2 * F, D, ("ffn", "embed"))
        self.down = matrix(D, F, ("embed", "ffn"))

    def __call__(
        self,
        x: Float32[Array, "T D"],
        pages: ops.KVPages,
        rope: Rope,
        batch: ops.AttentionBatch,
        *,
        layer: Int32[Array, ""],
        window: Int32[Array, ""],
        windowed: Bool[Array, ""],
    ) -> tuple[Float32[Array, "T D"], ops.KVPages]:
        """One layer over the step's tokens; `layer` is its place in the cache."""
        h = rms_norm(x, self.attn_norm[...], self.spec.norm_eps)
        h, pages = self.attention(h, pages, rope, batch, layer=layer, window=window, windowed=windowed)
        x = x + h
        return x + self.feed_forward(rms_norm(x, self.ffn_norm[...], self.spec.norm_eps)), pages

    def attention(
        self,
        x: Float32[Array, "T D"],
        pages: ops.KVPages,
        rope: Rope,
        batch: ops.AttentionBatch,
        *,
        layer: Int32[Array, ""],
        window: Int32[Array, ""],
        windowed: Bool[Array, ""],
    ) -> tuple[Float32[Array, "T D"], ops.KVPages]:
        """Projections, rotation, paged attention, output projection."""
        spec = self.spec
        T, N, K, H = x.shape[0], spec.num_heads, spec.num_kv_heads, spec.head_dim
        qkv = ops.linear(x, self.qkv.get_value(), self.backend)
        if spec.qkv_bias:
            qkv = qkv + self.qkv_bias[...]
        qkv = qkv.reshape(T, K, N // K + 2, H)
        q, k, v = qkv[:, :, :-2].reshape(T, N, H), qkv[:, :, -2], qkv[:, :, -1]
        if spec.qk_norm:
            q = rms_norm(q, self.q_norm[...], spec.norm_eps)
            k = rms_norm(k, self.k_norm[...], spec.norm_eps)
        out, pages = ops.attend(
            rotate(q, rope, windowed),
            rotate(k, rope, windowed),
            v,
            pages,
            batch,
            layer=layer,
            window=window,
            scale=spec.attention_scale,
            softcap=spec.attention_softcap,
        )
        return ops.linear(out.reshape(T, N * H), self.attn_out.get_value(), self.backend), pages

    def feed_forward(self, x: Float32[Array, "T D"]) -> Float32[Array, "T D"]:
        """down(activation(gate · x) · (up · x))."""
        gate_up = ops.linear(x, self.gate_up.get_value(), self.backend)
        return ops.linear(gated(gate_up, self.spec.activation), self.down.get_value(), self.backend)

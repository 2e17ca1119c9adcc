"""The llama family: Llama 2 and 3, SmolLM2, Mistral, Phi-3, Qwen2 (biases), Qwen3 (norms of queries and keys), BitNet
(norms in front of the output and down projections, activations of eight bits).
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32

from atoma_jax import ops
from atoma_jax.model_spec import ModelSpec
from atoma_jax.models.layers import Rope
from atoma_jax.models.params import matrix, norm, vector


class LlamaLayer(nnx.Module):
    """Attention, then a gated feed-forward net, each behind a norm and added to its input.

    Rows of `qkv` are grouped by kv head: its G query heads, then its key, then its value, H rows each, so that a cut by
    kv heads keeps together what belongs together. Rows of `gate_up` are all gates, then all ups.
    """

    def __init__(self, spec: ModelSpec, backend: ops.Backend):
        self.spec, self.backend = spec, backend
        D, H = spec.dim, spec.head_dim
        heads = spec.num_heads + 2 * spec.num_kv_heads
        self.attn_norm = norm(D, "embed")
        self.qkv = matrix(heads * H, D, ("heads_out", "embed"))
        if spec.qkv_bias:
            self.qkv_bias = vector(heads * H, "heads")
        if spec.qk_norm:
            self.q_norm = vector(H, "head_dim")
            self.k_norm = vector(H, "head_dim")
        if spec.sub_norms:
            self.attn_sub_norm = norm(spec.num_heads * H, "heads")
        self.attn_out = matrix(D, spec.num_heads * H, ("embed_out", "heads"))
        self.ffn_norm = norm(D, "embed")
        self.add_feed_forward()

    def add_feed_forward(self) -> None:
        """Declares the weights of `feed_forward`."""
        D, F = self.spec.dim, self.spec.ffn_dim
        self.gate_up = matrix(2 * F, D, ("ffn_out", "embed"))
        if self.spec.sub_norms:
            self.ffn_sub_norm = norm(F, "ffn")
        self.down = matrix(D, F, ("embed_out", "ffn"))

    def __call__(
        self,
        x: Float32[Array, "t D"],
        pages: ops.KVPages,
        rope: Rope,
        batch: ops.AttentionBatch,
        *,
        layer: Int32[Array, ""],
        window: Int32[Array, ""],
        windowed: Bool[Array, ""],
    ) -> tuple[Float32[Array, "t D"], ops.KVPages]:
        """One layer over the step's tokens; `layer` is its place in the cache.

        Of the T tokens, devices that share a layer may have t each in front of the norms and behind the branches.
        """
        h = ops.Normed(x, self.attn_norm[...], layer, self.spec.norm_eps)
        y, pages = self.attention(h, pages, rope, batch, layer=layer, window=window, windowed=windowed, residual=x)
        h = ops.Normed(y, self.ffn_norm[...], layer, self.spec.norm_eps)
        return self.feed_forward(h, rope.tokens, layer, residual=y), pages

    def attention(
        self,
        x: Float32[Array, "t D"] | ops.Normed,
        pages: ops.KVPages,
        rope: Rope,
        batch: ops.AttentionBatch,
        *,
        layer: Int32[Array, ""],
        window: Int32[Array, ""],
        windowed: Bool[Array, ""],
        residual: Float32[Array, "t D"] | None = None,
    ) -> tuple[Float32[Array, "t D"] | ops.Added, ops.KVPages]:
        """Projections, rotation, paged attention, output projection; with a residual, what that is added to."""
        spec, whole = self.spec, self.backend.whole_heads
        T, N, K = rope.tokens, spec.num_heads, spec.num_kv_heads
        int8, weight = spec.int8_activations, self.qkv.get_value()
        qkv = ops.linear_of_stream(x, weight, self.backend, tokens=T, layer=layer, int8_activations=int8)
        if spec.qkv_bias:
            qkv = qkv + self.qkv_bias[...]
        norms = (self.q_norm[...], self.k_norm[...]) if spec.qk_norm else None
        heads = {"num_heads": N, "num_kv_heads": K}
        q, k, v = ops.rotated_heads(qkv, *rope.of(windowed), self.backend, **heads, norms=norms, eps=spec.norm_eps)
        out, pages = ops.attend(
            *(q, k, v),
            pages,
            batch,
            self.backend,
            layer=layer,
            window=window,
            scale=spec.attention_scale,
            softcap=spec.attention_softcap,
        )
        if spec.sub_norms:
            scales = self.attn_sub_norm[...]
            out = ops.norm_in_front(out, scales, layer, spec.norm_eps, self.backend, is_cut=not whole)
        out = ops.linear_of_parts(
            out,
            self.attn_out.get_value(),
            self.backend,
            width=spec.dim,
            layer=layer,
            int8_activations=int8,
            whole=whole,
            residual=residual,
        )
        return out, pages

    def feed_forward(
        self,
        x: Float32[Array, "t D"] | ops.Normed,
        tokens: int,
        layer: Int32[Array, ""],
        residual: Float32[Array, "t D"] | ops.Added | None = None,
    ) -> Float32[Array, "t D"]:
        """down(activation(gate · x) · (up · x)), of a step of so many tokens, and what it is added to."""
        return self.gated_net(x, self.gate_up, self.down, tokens, layer, residual)

    def gated_net(
        self,
        x: Float32[Array, "any D"] | ops.Normed,
        gate_up: Any,
        down: Any,
        tokens: int,
        layer: Int32[Array, ""],
        residual: Float32[Array, "t D"] | ops.Added | None = None,
    ) -> Float32[Array, "t D"]:
        """The same with the weights given; `x` is of all tokens or of this device's."""
        spec, backend = self.spec, self.backend

        def sub_norm(h: Float32[Array, "T F"]) -> Float32[Array, "T F"] | ops.Normed:
            return ops.norm_in_front(h, self.ffn_sub_norm[...], layer, spec.norm_eps, backend, is_cut=True)

        return ops.net_of_stream(
            x,
            gate_up.get_value(),
            down.get_value(),
            spec.activation,
            backend,
            tokens=tokens,
            layer=layer,
            int8_activations=spec.int8_activations,
            sub_norm=sub_norm if spec.sub_norms else None,
            residual=residual,
        )

"""Gemma 2 and 3: the llama layer with a norm behind each branch too, and layers with and without windows."""

from jaxtyping import Array, Bool, Float32, Int32

from atoma_jax import ops
from atoma_jax.model_spec import ModelSpec
from atoma_jax.models.layers import Rope
from atoma_jax.models.llama import LlamaLayer
from atoma_jax.models.params import vector


class GemmaLayer(LlamaLayer):
    """The branches of a llama layer, each normalized again before it is added. Norm scales are stored as 1 + w."""

    def __init__(self, spec: ModelSpec, backend: ops.Backend):
        super().__init__(spec, backend)
        self.post_attn_norm = vector(spec.dim, "embed")
        self.post_ffn_norm = vector(spec.dim, "embed")

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
        """One layer over the step's tokens; `layer` is its place in the cache."""
        eps, backend = self.spec.norm_eps, self.backend
        h = ops.Normed(x, self.attn_norm[...], layer, eps)
        h, pages = self.attention(h, pages, rope, batch, layer=layer, window=window, windowed=windowed)
        x = x + ops.rms_norm(ops.computed(h, backend), self.post_attn_norm[...], eps, backend)
        h = self.feed_forward(ops.Normed(x, self.ffn_norm[...], layer, eps), rope.tokens, layer)
        return x + ops.rms_norm(h, self.post_ffn_norm[...], eps, backend), pages

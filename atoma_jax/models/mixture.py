"""Mixtures of experts: Mixtral, Qwen2-MoE (one more expert for all tokens), Qwen3-MoE. The llama layer otherwise."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from atoma_jax import ops
from atoma_jax.models.llama import LlamaLayer
from atoma_jax.models.params import dense_matrix, expert_matrix, matrix, vector


class MixtureLayer(LlamaLayer):
    """A llama layer whose feed-forward net is the weighted sum of k experts that a router chooses for each token."""

    def add_feed_forward(self) -> None:
        """Declares the weights of `feed_forward`."""
        assert self.spec.experts is not None
        D, E, F = self.spec.dim, self.spec.experts.count, self.spec.experts.ffn_dim
        self.router = dense_matrix(E, D, ("router", "embed"))
        self.experts_gate_up = expert_matrix(E, 2 * F, D, ("expert", "ffn_out", "embed"))
        self.experts_down = expert_matrix(E, D, F, ("expert", "embed_out", "ffn"))
        if shared := self.spec.experts.shared_ffn_dim:
            self.shared_gate_up = matrix(2 * shared, D, ("ffn_out", "embed"))
            self.shared_down = matrix(D, shared, ("embed_out", "ffn"))
            self.shared_gate = vector(D, "embed")

    def feed_forward(
        self,
        x: Float32[Array, "t D"] | ops.Normed,
        tokens: int,
        layer: Int32[Array, ""],
        residual: Float32[Array, "t D"] | ops.Added | None = None,
    ) -> Float32[Array, "t D"]:
        """The chosen experts' outputs by their weights, and the shared expert's behind its own gate."""
        assert self.spec.experts is not None
        x = ops.computed(x, self.backend)
        whole = ops.all_tokens(x, tokens, self.backend.mesh)  # in float32, for the router
        experts, weights = self.route(whole)
        out = ops.grouped_feed_forward(
            whole,
            experts,
            weights,
            self.experts_gate_up.get_value(),
            self.experts_down.get_value(),
            partial(ops.gated, activation=self.spec.activation, backend=self.backend),
            self.backend,
            layer=layer,
            int8_activations=self.spec.int8_activations,
        )
        if self.spec.experts.shared_ffn_dim:
            gate = jax.nn.sigmoid(jnp.sum(x * self.shared_gate[...], axis=-1, keepdims=True))
            out = out + gate * self.gated_net(whole, self.shared_gate_up, self.shared_down, tokens, layer)
        return out if residual is None else ops.computed(residual, self.backend) + out

    def route(self, x: Float32[Array, "T D"]) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
        """The k likeliest experts of each token and their weights, in float32 whatever the operands of products are:
        a choice that flips changes the output by a whole expert."""
        assert self.spec.experts is not None
        logits = jnp.einsum("td,ed->te", x, self.router[...], precision=jax.lax.Precision.HIGHEST)
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.spec.experts.used)
        if self.spec.experts.normalized:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return experts.astype(jnp.int32), weights

"""A whole decoder: embedding, a stack of one family's layers, final norm and head. Owns no sampling and no batching."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int32

from atoma_jax import ops
from atoma_jax.model_spec import ModelSpec
from atoma_jax.models.layers import rope_tables, softcapped, window_sizes
from atoma_jax.models.params import gathered_ahead, indexed, matrix, vector
from atoma_jax.models.registry import LAYERS
from atoma_jax.ops import tables
from atoma_jax.quant.qtensor import QTensor


class Decoder(nnx.Module):
    """Built abstractly: every weight is a `ParamSpec` until `params.fill` puts arrays in.

    Layers are one module whose weights have a leading axis of layers; a scan runs over it, so that a program's size and
    compile time do not depend on depth.
    """

    def __init__(self, spec: ModelSpec, backend: ops.Backend):
        self.spec, self.backend = spec, backend
        D, V = spec.dim, spec.vocab_size
        self.embed = matrix(V, D, ("vocab", "embed"), stacked=False)
        self.layers = LAYERS[spec.family](spec, backend)
        self.final_norm = vector(D, "embed", stacked=False)
        if not spec.tied_embeddings:
            self.head = matrix(V, D, ("vocab", "embed"), stacked=False)

    def hidden(
        self,
        tokens: Int32[Array, " T"],
        positions: Int32[Array, " T"],
        pages: ops.KVPages,
        batch: ops.AttentionBatch,
    ) -> tuple[Float32[Array, "t D"], ops.KVPages]:
        """Runs all layers over the step's tokens; writes their K and V into `pages`.

        What comes back may be this device's part of the tokens; `rows` picks from all.

        A token of -1 is padding: its row is zeros in front of every product, which native kernels leave out.
        """
        spec = self.spec
        with jax.named_scope("embed"):
            x = tables.embed(jnp.maximum(tokens, 0), self.embed.get_value(), self.backend) * spec.embedding_scale
            x = jnp.where((ops.own_tokens(tokens, self.backend.mesh) >= 0)[:, None], x, 0.0)
        rope = rope_tables(positions, spec.rope)
        windows = window_sizes(spec)
        graph, spread, whole, weights = nnx.split(
            self.layers, gathered_ahead if self.backend.gathers else False, indexed, ...
        )
        gather = self._gather(spread)
        gathers = self.backend.gathers  # else nothing of that is in the program

        def layer(
            carry: tuple[Array, Array, ops.KVPages, Any], inputs: tuple[Array, Array, Any]
        ) -> tuple[tuple[Array, Array, ops.KVPages, Any], None]:
            window, windowed, state = inputs
            index, x, pages, gathered = carry
            ahead = gather(index + 1) if gathers else gathered
            module = nnx.merge(graph, gathered, whole, state)
            with jax.named_scope("layer"):
                x, pages = module(x, pages, rope, batch, layer=index, window=window, windowed=windowed)
            return (index + 1, x, pages, ahead), None

        is_windowed = jnp.asarray([window is not None for window in spec.windows or (None,) * spec.num_layers])
        inputs: Any = (jnp.asarray(windows), is_windowed, weights)
        first = gather(jnp.int32(0)) if gathers else spread
        (_, x, pages, _), _ = jax.lax.scan(layer, (jnp.int32(0), x, pages, first), inputs)
        return x, pages

    def _gather(self, spread: Any) -> Callable[[Int32[Array, ""]], Any]:
        """Gathers a layer's part of what is spread over devices.

        The layer that runs was gathered by the one before it: so devices talk while they compute. The last layer
        gathers itself once more, for nobody.
        """
        last = self.spec.num_layers - 1

        def gather(layer: Int32[Array, ""]) -> Any:
            place = jnp.minimum(layer, last)
            return jax.tree.map(
                lambda weight: ops.layer_of(weight, place, self.backend),
                spread,
                is_leaf=lambda leaf: isinstance(leaf, QTensor),
            )

        return gather

    def rows(self, hidden: Float32[Array, "t D"], token: Int32[Array, " Q"], tokens: int) -> Float32[Array, "Q D"]:
        """Hidden states of some of a step's `tokens`, on every device; zeros for -1."""
        return ops.rows_of(hidden, token, tokens, self.backend.mesh)

    def normed(self, x: Float32[Array, "B D"]) -> Float32[Array, "B D"]:
        """Hidden states as the head reads them: what embeddings are made of."""
        return ops.rms_norm(x, self.final_norm[...], self.spec.norm_eps, self.backend)

    def logits(self, x: Float32[Array, "B D"]) -> Float32[Array, "B V"]:
        """Scores of the next token, from the hidden states of some tokens."""
        with jax.named_scope("head"):
            normed = ops.Normed(x, self.final_norm[...][None], jnp.int32(0), self.spec.norm_eps)
            table = self.embed.get_value() if self.spec.tied_embeddings else self.head.get_value()
            logits = softcapped(tables.logits(normed, table, self.backend), self.spec.final_softcap)
            return tables.without_filling(logits, self.spec.vocab_size, self.backend)

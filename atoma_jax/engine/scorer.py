"""Next-token distributions of a text under teacher forcing: of one model, or of two, compared token by token.

Chunks of a fixed shape go through one jitted program. Distributions over the vocabulary stay on the device, where two
models' are reduced to four numbers a token. Apart from the serving engine: one sequence, no sampling, no prefixes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32

from atoma_jax import ops
from atoma_jax.config import EngineConfig
from atoma_jax.engine.memory import kv_cache_dtype
from atoma_jax.engine.model_setup import ModelSetup, set_up_model
from atoma_jax.engine.startup import tokenizer_of, use_compile_cache
from atoma_jax.engine.step import Weights
from atoma_jax.errors import ConfigError, UserError
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.model_files import open_model
from atoma_jax.loading.threads import usable_cores
from atoma_jax.models.decoder import Decoder
from atoma_jax.outputs import ComparedTokens
from atoma_jax.tokenizer import Tokenizer

CHUNK = 128  # positions that go through the model together: bounds what distributions take, CHUNK · V · 4 bytes
PAGE_SIZE = 16


class Scorer:
    """One model on the device, with a KV cache for one sequence."""

    def __init__(self, config: EngineConfig, setup: ModelSetup, tokenizer: Tokenizer, *, progress: bool = False):
        """Loads the weights; `load` is the usual way."""
        spec = setup.spec
        length = config.model.max_model_len or spec.context_length
        if length > spec.context_length:
            problem = f"must be at most {spec.context_length}, what {setup.checkpoint.path.name} was trained for"
            raise ConfigError("max_model_len", length, problem)
        self.model, self.vocab_size, self.max_model_len = config.model.model, spec.vocab_size, length
        self.tokenizer = tokenizer
        self._spec = spec
        self._kv_dtype = kv_cache_dtype(config.cache, is_cpu=setup.backend.platform == "cpu")
        self._weights = setup.load(threads=usable_cores(), progress=progress)
        jax.block_until_ready(self._weights)
        self._run = jax.jit(
            partial(_run_chunk, graph=setup.graph()), static_argnames="table_width", donate_argnames="pages"
        )

    @classmethod
    def load(cls, config: EngineConfig, *, progress: bool = True) -> "Scorer":
        """Finds and loads the model that `config` names.

        Args:
            config: checked settings; those of model, KV type and compile cache count.
            progress: show bars on standard error, where that is a terminal, for what is fetched and loaded.

        Raises:
            UserError: the model or a setting cannot be used; see the subclasses.
            DownloadError: the model could not be fetched.
        """
        use_compile_cache(config.compile.compile_cache_dir)
        found = resolve(config.model.model, revision=config.model.revision, progress=progress)
        with open_model(found, max_model_len=config.model.max_model_len) as files:
            setup = set_up_model(config.model, files)
            return cls(config, setup, tokenizer_of(files), progress=progress)

    def logprobs(self, token_ids: Sequence[int], *, context: int) -> Iterator[Float32[Array, "C V"]]:
        """Log-probabilities of the next token behind every token of a sequence, `CHUNK` rows at a time.

        Args:
            token_ids: at most `context`.
            context: tokens of the longest sequence to come: fixes the programs' shapes.

        Yields:
            Arrays on the device; rows behind the sequence's end mean nothing. NaN where logits were not finite.
        """
        assert len(token_ids) <= context <= self.max_model_len, (len(token_ids), context, self.max_model_len)
        table_width = -(-context // PAGE_SIZE)
        spec = self._spec
        shape = (spec.num_layers, 1 + table_width, spec.num_kv_heads, PAGE_SIZE, spec.head_dim)
        pages = ops.empty_pages(shape, self._kv_dtype)
        for start in range(0, len(token_ids), CHUNK):
            chunk = token_ids[start : start + CHUNK]
            pages, logprobs = self._run(
                self._weights,
                pages=pages,
                tokens=_padded(chunk),
                start=np.int32(start),
                count=np.int32(len(chunk)),
                table_width=table_width,
            )
            yield logprobs


class ModelPair:
    """A model beside the base that it is measured against."""

    def __init__(self, base: Scorer, model: Scorer):
        """Both stay usable on their own.

        Raises:
            UserError: their vocabularies differ in size.
        """
        if base.vocab_size != model.vocab_size:
            problem = f"must have the vocabulary of the model: {base.vocab_size} tokens, and {model.model} has "
            raise UserError("base", base.model, f"{problem}{model.vocab_size}")
        self.base, self.model = base, model

    @classmethod
    def load(
        cls,
        base: EngineConfig,
        model: EngineConfig,
        *,
        on_loaded: Callable[[str], object] = lambda _: None,
        progress: bool = True,
    ) -> "ModelPair":
        """Finds and loads both.

        Args:
            base: settings of the base; errors as in `Scorer.load`.
            model: of the other.
            on_loaded: called with "base" and "model" as each is there.
            progress: as in `Scorer.load`.
        """
        loaded: list[Scorer] = []
        for name, config in (("base", base), ("model", model)):
            loaded.append(Scorer.load(config, progress=progress))
            on_loaded(name)
        return cls(*loaded)

    @property
    def max_model_len(self) -> int:
        """Tokens that both models take."""
        return min(self.base.max_model_len, self.model.max_model_len)

    def get_tokenizer(self) -> Tokenizer:
        """The base's."""
        return self.base.tokenizer

    def compare(self, token_ids: Sequence[int], *, first: int, context: int) -> Iterator[ComparedTokens]:
        """Runs both models over a sequence, chunk by chunk.

        Args:
            token_ids: of the sequence.
            first: index of the first token that is scored, at least 1; all after it are.
            context: as in `Scorer.logprobs`.

        Yields:
            Scores of consecutive tokens, from `first` to the last.
        """
        assert 1 <= first < len(token_ids), (first, len(token_ids))
        inputs, targets = token_ids[:-1], token_ids[1:]
        chunks = zip(
            self.base.logprobs(inputs, context=context), self.model.logprobs(inputs, context=context), strict=True
        )
        for number, (base, model) in enumerate(chunks):
            start = number * CHUNK
            wanted = slice(max(0, first - 1 - start), min(CHUNK, len(targets) - start))
            if wanted.start >= wanted.stop:
                continue
            numbers = np.asarray(compare_rows(base, model, _padded(targets[start : start + CHUNK])))[:, wanted]
            base_nll, nll, kld, same_top = numbers
            yield ComparedTokens(base_nll=base_nll, nll=nll, kld=kld, same_top=same_top.astype(np.bool_))


@jax.jit
def compare_rows(
    base: Float32[Array, "C V"], model: Float32[Array, "C V"], targets: Int32[np.ndarray | Array, " C"]
) -> Float32[Array, "4 C"]:
    """Two models' log-probabilities of the next token, reduced to what `ComparedTokens` holds, in its order.

    The divergence is Σ p·d − p + q with d = ln p − ln q, which equals Σ p·d as p and q both sum to 1. No term of it is
    negative, and that sums of f32 are 1 only to rounding does not matter: small divergences keep their digits.
    """
    p, q, d = jnp.exp(base), jnp.exp(model), base - model
    near = p * (d + jnp.expm1(-d))  # the same without cancellation, where expm1 cannot overflow
    terms = jnp.where(jnp.abs(d) < 1, near, jnp.where(p > 0, p * d, 0) - p + q)
    is_nan = jnp.isnan(base[:, 0]) | jnp.isnan(model[:, 0])  # a row of log-softmax is NaN as a whole
    kld = jnp.where(is_nan, jnp.nan, terms.sum(axis=1))
    same_top = (base.argmax(axis=1) == model.argmax(axis=1)) & ~is_nan
    at = targets[:, None]
    base_nll, nll = (-jnp.take_along_axis(rows, at, axis=1)[:, 0] for rows in (base, model))
    return jnp.stack([base_nll, nll, kld, same_top.astype(jnp.float32)])


def _run_chunk(
    weights: Weights,
    pages: ops.KVPages,
    tokens: Int32[Array, " C"],
    start: Int32[Array, ""],
    count: Int32[Array, ""],
    *,
    graph: Any,
    table_width: int,
) -> tuple[ops.KVPages, Float32[Array, "C V"]]:
    """`count` tokens of the sequence from position `start` on; the rest of `tokens` is padding. `pages` is donated."""
    model: Decoder = nnx.merge(graph, weights)
    index = jnp.arange(CHUNK, dtype=jnp.int32)
    position, none = start + index, jnp.zeros(1, jnp.int32)
    batch = ops.AttentionBatch(
        page=jnp.where(index < count, 1 + position // PAGE_SIZE, 0),  # padding writes to the scratch page
        slot=position % PAGE_SIZE,
        page_table=1 + jnp.arange(table_width, dtype=jnp.int32)[None],  # [1, W]
        decode_lengths=none,
        blocks=ops.query_blocks(none, count[None], start[None], CHUNK),
    )
    hidden, pages = model.hidden(tokens, position, pages, batch)
    return pages, jax.nn.log_softmax(model.logits(hidden))


def _padded(ids: Sequence[int]) -> Int32[np.ndarray, " C"]:
    return np.pad(np.asarray(ids, np.int32), (0, CHUNK - len(ids)))

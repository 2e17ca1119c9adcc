"""Next-token distributions of a text under teacher forcing: of one model, or of two, compared token by token.

Chunks of a fixed shape, of several windows of the text at once, go through one jitted program. Distributions over the
vocabulary stay on the device, where two models' are reduced to four numbers a token. Apart from the serving engine:
windows advance in lockstep, no sampling, no prefixes.
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
from atoma_jax.cores import usable_cores
from atoma_jax.engine.compile_cache import use_compile_cache
from atoma_jax.engine.model_setup import ModelSetup, served_length, set_up_model
from atoma_jax.engine.model_tokenizer import tokenizer_of
from atoma_jax.engine.step import Weights
from atoma_jax.errors import UserError
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.model_files import open_model
from atoma_jax.model_spec import KVDtype
from atoma_jax.models.decoder import Decoder
from atoma_jax.outputs import ComparedTokens
from atoma_jax.tokenizer import Tokenizer

CHUNK = 128  # positions of a window that go through the model together
PAGE_SIZE = 16
MOST_ROWS = 8  # windows that go through the model together: with more, 1,024 tokens, no platform gains
ROW_BYTES = 1 << 30  # that distributions and KV caches of all windows may take together
_ROWS_OF_V = 4  # arrays [C, V] of a window that are alive at once: logits and log-probabilities, of two models


class Scorer:
    """One model on the device, with a KV cache for the windows that go through it together."""

    def __init__(self, config: EngineConfig, setup: ModelSetup, tokenizer: Tokenizer, *, progress: bool = False):
        """Loads the weights; `load` is the usual way."""
        spec = setup.spec
        length = served_length(config.model, setup)
        self.model, self.vocab_size, self.max_model_len = config.model.model, spec.vocab_size, length
        self.tokenizer = tokenizer
        self._spec = spec
        self._backend = setup.backend
        self._kv_dtype: KVDtype = setup.kv_dtype(config.cache)
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

    def row_bytes(self, context: int) -> int:
        """Bytes that one window of `context` tokens takes beside the weights, but for distributions."""
        return _padded_length(context) * self._spec.kv_bytes_per_token(self._kv_dtype)

    def logprobs(self, windows: Sequence[Sequence[int]], *, context: int) -> Iterator[Float32[Array, "RC V"]]:
        """Log-probabilities of the next token behind every token of some windows, `CHUNK` positions of each at a time.

        Args:
            windows: R sequences of at most `context` tokens; their number is part of the programs' shapes.
            context: tokens of the longest sequence to come: fixes the programs' shapes.

        Yields:
            Arrays on the device, the windows' rows one after the other; rows behind a window's end mean nothing. NaN
            where logits were not finite.
        """
        longest = max(len(window) for window in windows)
        assert longest <= context <= self.max_model_len, (longest, context, self.max_model_len)
        rows, table_width = len(windows), _padded_length(context) // PAGE_SIZE
        spec = self._spec
        shape = (spec.num_layers, 1 + rows * table_width, spec.num_kv_heads, PAGE_SIZE, spec.head_dim)
        pages = ops.empty_pages(shape, self._kv_dtype, self._backend)
        for start in range(0, longest, CHUNK):
            pages, logprobs = self._run(
                self._weights,
                pages=pages,
                tokens=_chunk(windows, start),
                start=np.int32(start),
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

    def windows_at_once(self, context: int) -> int:
        """Windows of up to `context` tokens that should go through the models together."""
        distributions = _ROWS_OF_V * 4 * CHUNK * self.base.vocab_size
        each = distributions + self.base.row_bytes(context) + self.model.row_bytes(context)
        return max(1, min(MOST_ROWS, ROW_BYTES // each))

    def compare(
        self,
        windows: Sequence[tuple[Sequence[int], int]],
        *,
        context: int,
        rows: int,
        on_tokens: Callable[[int], object] = lambda _: None,
    ) -> list[ComparedTokens]:
        """Runs both models over some windows, chunk by chunk.

        Args:
            windows: the tokens of each, and the index of the first one that is scored, at least 1; all after it are.
            context: as in `Scorer.logprobs`.
            rows: windows that the programs are made for, as many as there are or more.
            on_tokens: told how many tokens were scored, chunk by chunk.

        Returns:
            Scores of each window's tokens, from the first that is scored to the last.
        """
        assert 1 <= len(windows) <= rows, (len(windows), rows)
        assert all(1 <= first < len(ids) for ids, first in windows)
        spare = [[0]] * (rows - len(windows))
        inputs = [ids[:-1] for ids, _ in windows] + spare
        targets = [ids[1:] for ids, _ in windows] + spare
        chunks = zip(
            self.base.logprobs(inputs, context=context), self.model.logprobs(inputs, context=context), strict=True
        )
        parts: list[list[np.ndarray[Any, Any]]] = [[] for _ in windows]
        for number, (base, model) in enumerate(chunks):
            start = number * CHUNK
            numbers = np.asarray(compare_rows(base, model, _chunk(targets, start))).reshape(4, rows, CHUNK)
            for row, (ids, first) in enumerate(windows):
                wanted = numbers[:, row, max(0, first - 1 - start) : max(0, len(ids) - 1 - start)]
                parts[row].append(wanted)
                on_tokens(wanted.shape[1])
        return [_compared(np.concatenate(part, axis=1)) for part in parts]


def _compared(numbers: Float32[np.ndarray, "4 T"]) -> ComparedTokens:
    base_nll, nll, kld, same_top = numbers
    return ComparedTokens(base_nll=base_nll, nll=nll, kld=kld, same_top=same_top.astype(np.bool_))


@jax.jit
def compare_rows(
    base: Float32[Array, "T V"], model: Float32[Array, "T V"], targets: Int32[np.ndarray | Array, "R C"]
) -> Float32[Array, "4 T"]:
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
    at = targets.reshape(-1, 1)  # T = R · C
    base_nll, nll = (-jnp.take_along_axis(rows, at, axis=1)[:, 0] for rows in (base, model))
    return jnp.stack([base_nll, nll, kld, same_top.astype(jnp.float32)])


def _run_chunk(
    weights: Weights,
    pages: ops.KVPages,
    tokens: Int32[Array, "R C"],
    start: Int32[Array, ""],
    *,
    graph: Any,
    table_width: int,
) -> tuple[ops.KVPages, Float32[Array, "RC V"]]:
    """Tokens of all windows from position `start` on. `pages` is donated.

    What is behind a window's end goes through the model like everything else: nothing before it looks there.
    """
    model: Decoder = nnx.merge(graph, weights)
    R = tokens.shape[0]
    row = jnp.arange(R, dtype=jnp.int32)
    position = jnp.tile(start + jnp.arange(CHUNK, dtype=jnp.int32), R)  # [R·C]
    batch = ops.attention_batch(
        pages,
        model.spec.num_heads,
        model.backend,
        page=1 + jnp.repeat(row, CHUNK) * table_width + position // PAGE_SIZE,  # page 0 is scratch
        slot=position % PAGE_SIZE,
        page_table=1 + row[:, None] * table_width + jnp.arange(table_width, dtype=jnp.int32),  # [R, W]
        decode_lengths=jnp.zeros(R, jnp.int32),
        chunks=ops.Chunks(row * CHUNK, jnp.full(R, CHUNK, jnp.int32), jnp.full(R, start)),
        fixed_parts=False,
    )
    hidden, pages = model.hidden(tokens.reshape(-1), position, pages, batch)
    return pages, jax.nn.log_softmax(model.logits(hidden))


def _padded_length(context: int) -> int:
    """Whole chunks."""
    return -(-context // CHUNK) * CHUNK


def _chunk(windows: Sequence[Sequence[int]], start: int) -> Int32[np.ndarray, "R C"]:
    """Positions `start` to `start + CHUNK` of each window; zeros behind its end."""
    chunk = np.zeros((len(windows), CHUNK), np.int32)
    for row, ids in zip(chunk, windows, strict=True):
        part = ids[start : start + CHUNK]
        row[: len(part)] = part
    return chunk

"""Compiles what answers must look like, with llguidance, into matchers over the tokens of one model.

Owns llguidance: the view of our tokenizer that it takes, limits of size and time, the cache of compiled grammars, and
the bits of all rows of a step. llguidance is no part of the core install, and is asked for when a request needs it.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from jaxtyping import Int32

from atoma_jax.cores import usable_cores
from atoma_jax.engine.guide import Guide
from atoma_jax.errors import ParameterError
from atoma_jax.sampling_params import SamplingParams
from atoma_jax.structured_outputs import StructuredOutputsParams
from atoma_jax.tokenizer import Tokenizer

COMPILE_SECONDS = 2.0  # that a caller waits for a grammar
MAX_CACHED = 128  # grammars
# What llguidance may do for the bits of one row: its own limits let a hostile regex take seconds.
_STEP_LIMITS: dict[str, Any] = {"step_lexer_fuel": 20_000, "max_lexer_states": 20_000, "verbose_errors": False}
_THREADS = 8  # at most, for the bits of many rows


def has_llguidance() -> bool:
    """Whether structured outputs can be served: the package is installed."""
    return find_spec("llguidance") is not None


class Grammars:
    """The compiled grammars of one model. May be used from several threads."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int):
        """`vocab_size` is that of the model's logits, padding included: no such token is ever allowed."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._own: Any = None  # llguidance's view of the tokenizer, made for the first request
        self._executor: Any = None
        self._compiled: OrderedDict[StructuredOutputsParams, Any] = OrderedDict()

    @property
    def is_ready(self) -> bool:
        """Whether llguidance knows the vocabulary: `prepare` has run."""
        return self._own is not None

    def prepare(self) -> None:
        """Hands the vocabulary to llguidance, once: half a second for 100,000 tokens.

        Raises:
            ParameterError: llguidance is not installed, or no token of the model ends an answer.
        """
        if self._own is not None:
            return
        if not has_llguidance():
            problem = "structured_outputs need llguidance, which is not installed: pip install 'atoma-jax[server]'."
            raise ParameterError("structured_outputs", None, problem)
        ends = sorted(token for token in self._tokenizer.eos_token_ids if token < self._vocab_size)
        if not ends:
            problem = "structured_outputs need a token that ends an answer, and this model's tokenizer has none."
            raise ParameterError("structured_outputs", None, problem)
        from llguidance import LLExecutor, LLTokenizer

        with self._lock:
            if self._own is None:
                vocabulary: Any = _Vocabulary(self._tokenizer, self._vocab_size, ends)
                own = LLTokenizer(vocabulary, eos_token=ends)
                self._executor = LLExecutor(min(usable_cores(), _THREADS))
                self._own = own

    def compile(self, wanted: StructuredOutputsParams) -> Any:
        """A matcher at its beginning, to be copied for each sample.

        Raises:
            ParameterError: the constraint is not valid, too large, or fits no text; or as of `prepare`.
        """
        self.prepare()
        with self._lock:
            found = self._compiled.get(wanted)
            if found is not None:
                self._compiled.move_to_end(wanted)
                return found
        from llguidance import LLMatcher, LLParserLimits

        try:
            grammar = _grammar_of(wanted)
        except ValueError as error:
            raise _refusal(wanted, str(error)) from None
        matcher = LLMatcher(self._own, grammar, log_level=0, limits=LLParserLimits(**_STEP_LIMITS))
        if not matcher.is_error():
            matcher.compute_bitmask()  # what fits no text is only found out here
        if matcher.is_error():
            raise _refusal(wanted, matcher.get_error())
        with self._lock:
            self._compiled[wanted] = matcher
            while len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
        return matcher

    def guide(self, params: SamplingParams) -> Guide:
        """The guide of one sample of a request with `structured_outputs`. Raises as `compile`."""
        assert params.structured_outputs is not None
        special = self._tokenizer.special_ids
        allowed = None
        if params.allowed_token_ids is not None:
            flags = np.zeros(-(-self._vocab_size // 32) * 32, np.bool_)
            flags[np.asarray(params.allowed_token_ids)] = True
            allowed = np.packbits(flags, bitorder="little").view(np.int32)
        return Guide(
            self.compile(params.structured_outputs).deep_copy(),
            ends=[token for token in params.stop_token_ids if token in special],
            allowed=allowed,
        )

    def bits(self, guides: Sequence[Guide]) -> Int32[np.ndarray, "B M"]:
        """The tokens that each of B samples may go on with, bit i of word w for token 32·w + i."""
        bits = np.zeros((len(guides), -(-self._vocab_size // 32)), np.int32)
        if len(guides) == 1:
            guides[0].matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        else:
            rows = [(guide.matcher, row) for row, guide in enumerate(guides)]
            self._executor.unsafe_compute_mask_ptr(rows, bits.ctypes.data, bits.strides[0], len(guides))
        for guide, row in zip(guides, bits, strict=True):
            guide.finish_bits(row)
        return bits


class _Vocabulary:
    """Our tokenizer as llguidance asks for it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]):
        size = min(vocab_size, tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self.eos_token_id = ends[0]
        self.bos_token_id = tokenizer.bos_token_id
        # Padding has no bytes, and is never allowed.
        self.tokens = [tokenizer.token_bytes(token) for token in range(size)] + [b""] * (vocab_size - size)
        self.special_token_ids = sorted(token for token in tokenizer.special_ids | set(ends) if token < size)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _grammar_of(wanted: StructuredOutputsParams) -> str:
    """As llguidance reads it. Raises `ValueError` for a schema that is neither an object nor a boolean."""
    from llguidance import LLMatcher

    if wanted.kind in ("json", "json_object"):
        options: Any = {"whitespace_flexible": not wanted.disable_any_whitespace}
        if wanted.whitespace_pattern is not None:
            options["whitespace_pattern"] = wanted.whitespace_pattern
        return LLMatcher.grammar_from_json_schema(wanted.json or '{"type": "object"}', overrides=options)
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.grammar is not None:
        return LLMatcher.grammar_from_lark(wanted.grammar)
    assert wanted.choice is not None
    return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in wanted.choice))


def _refusal(wanted: StructuredOutputsParams, why: str) -> ParameterError:
    why = (why.strip() or "no text fits it")[:300]
    if "NoExtension" in why:
        why = "no text fits it"
    return ParameterError(wanted.field, getattr(wanted, wanted.kind), f"{wanted.field} cannot be used: {why}.")

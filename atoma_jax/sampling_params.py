"""What a caller may ask of one request: sampling settings, output form, limits; and the check of a prompt's token ids.

Owns every rule that can be checked without a model at construction, and those that need its sizes in `validate_for`.
Does not know how the sampler carries them out (`engine/sampling_rows.py`, `engine/sampler_state.py`).
Names, defaults and wording of the messages are vLLM's, which clients match on.
"""

import enum
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, no_type_check

from atoma_jax.errors import ParameterError
from atoma_jax.structured_outputs import StructuredOutputsParams

GREEDY_BELOW = 1e-5  # temperatures below it mean greedy
MAX_N = 1024  # samples of one request
MAX_COUNT = 2**31 - 1  # of tokens: they are int32 on the device
MAX_STRINGS = 256  # of `stop` or `bad_words`
MAX_STRING_CHARS = 4096
REPETITION_RANGE = (0.01, 100.0)  # beyond it logits overflow


class RequestOutputKind(enum.Enum):
    """What each output of a stream holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new
    FINAL_ONLY = 2  # one output, at the end


@no_type_check  # for the run-time checks of our tests: it refuses wrong types itself, in its own words
@dataclass(frozen=True, slots=True, init=False)
class SamplingParams:
    """Settings of one request. Immutable; `dataclasses.replace` makes a changed copy, checked anew.

    Attributes:
        n: samples to draw from the prompt.
        presence_penalty: subtracted from the logit of every token in the output so far, in [-2, 2].
        frequency_penalty: subtracted once for each time that a token is in the output so far, in [-2, 2].
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output.
        temperature: divides the logits, in [0, 2]; below 1e-5 the most likely token is taken.
        top_p: keeps the likeliest tokens that together reach this probability, in (0, 1].
        top_k: keeps this many of the likeliest tokens; 0 (or -1) keeps all. Ties at either border are kept.
        min_p: keeps tokens at least this likely relative to the likeliest, in [0, 1].
        seed: 64-bit seed: the same one gives the same tokens whatever else is served; None (or -1) draws one.
        stop: strings that end the output.
        stop_token_ids: tokens that end the output.
        ignore_eos: goes on after the model's end-of-sequence token.
        max_tokens: tokens to generate at most; None up to the model's length.
        min_tokens: tokens before which no stop token may be drawn.
        logprobs: logprobs to return for each output token beside its own; -1 for the whole vocabulary.
        prompt_logprobs: the same for each prompt token.
        detokenize: False returns token ids without text.
        skip_special_tokens: leaves special tokens out of the text.
        spaces_between_special_tokens: puts spaces between special tokens in the text.
        include_stop_str_in_output: keeps the stop string at the end of the text.
        output_kind: what each output of a stream holds.
        logit_bias: added to the logits of token ids, in [-100, 100].
        allowed_token_ids: the only tokens that may be drawn.
        bad_words: texts that may not be generated: the last token of one is never drawn after the others.
        structured_outputs: what the text must look like; only tokens that keep it so are drawn.
    """

    n: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    max_tokens: int | None
    min_tokens: int
    logprobs: int | None
    prompt_logprobs: int | None
    detokenize: bool
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    include_stop_str_in_output: bool
    output_kind: RequestOutputKind
    logit_bias: Mapping[int, float] | None = field(hash=False)
    allowed_token_ids: tuple[int, ...] | None
    bad_words: tuple[str, ...]
    structured_outputs: StructuredOutputsParams | None

    def __init__(
        self,
        n: int = 1,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: str | Iterable[str] | None = None,
        stop_token_ids: Iterable[int] | None = None,
        ignore_eos: bool = False,
        max_tokens: int | None = 16,
        min_tokens: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        detokenize: bool = True,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
        output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
        logit_bias: Mapping[int, float] | None = None,
        allowed_token_ids: Iterable[int] | None = None,
        bad_words: Iterable[str] | None = None,
        *,
        structured_outputs: StructuredOutputsParams | None = None,
        logprob_token_ids: None = None,
        flat_logprobs: bool = False,
        extra_args: None = None,
    ):
        """Checks and stores the settings.

        Raises:
            ParameterError: a setting is outside its limits, or one that this engine does not implement is given.
        """
        _refuse("logprob_token_ids", logprob_token_ids)
        _refuse("flat_logprobs", flat_logprobs)
        _refuse("extra_args", extra_args)
        self._set_distribution(temperature, top_p, top_k, min_p, seed)
        self._set_penalties(presence_penalty, frequency_penalty, repetition_penalty)
        self._set_lengths(n, max_tokens, min_tokens)
        self._set_token_rules(stop_token_ids, allowed_token_ids, logit_bias)
        self._set_strings(stop, bad_words, _flag("detokenize", detokenize))
        _store(
            self,
            ignore_eos=_flag("ignore_eos", ignore_eos),
            logprobs=_logprobs("logprobs", logprobs),
            prompt_logprobs=_logprobs("prompt_logprobs", prompt_logprobs),
            skip_special_tokens=_flag("skip_special_tokens", skip_special_tokens),
            spaces_between_special_tokens=_flag("spaces_between_special_tokens", spaces_between_special_tokens),
            include_stop_str_in_output=_flag("include_stop_str_in_output", include_stop_str_in_output),
            output_kind=_output_kind(output_kind),
            structured_outputs=_structured(structured_outputs, ignore_eos),
        )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW

    def validate_for(self, *, vocab_size: int, max_logprobs: int = 20) -> None:
        """Checks what only a model's sizes can tell.

        Args:
            vocab_size: ids must be below it.
            max_logprobs: limit of `logprobs` and `prompt_logprobs`, a setting of the engine.

        Raises:
            ParameterError: an id is outside the vocabulary, or more logprobs are asked for than allowed.
        """
        for name, kind, asked in (
            ("logprobs", "sample", self.logprobs),
            ("prompt_logprobs", "prompt", self.prompt_logprobs),
        ):
            count = vocab_size if asked == -1 else asked or 0
            if count > max_logprobs:
                raise ParameterError(
                    name,
                    asked,
                    f"Requested {kind} logprobs of {count}, which is greater than max allowed: {max_logprobs}. "
                    f"Ask for fewer {name}, or raise max_logprobs of the engine.",
                )
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", tuple(self.logit_bias or ())),
            ("allowed_token_ids", self.allowed_token_ids or ()),
        ):
            outside = [i for i in ids if i >= vocab_size]
            if outside:
                raise ParameterError(
                    name,
                    outside,
                    f"token_id(s) {_shown(outside)} in {name} contain out-of-vocab token ids. "
                    f"Vocabulary size: {vocab_size}",
                )

    def output_limit(self, *, prompt_len: int, max_model_len: int) -> int:
        """How many tokens a prompt of `prompt_len` tokens may yield before it ends with "length"."""
        room = max_model_len - prompt_len
        return room if self.max_tokens is None else min(self.max_tokens, room)

    def _set_distribution(self, temperature: Any, top_p: Any, top_k: Any, min_p: Any, seed: Any) -> None:
        temperature = _real("temperature", temperature)
        if temperature < 0:
            raise _error("temperature", temperature, "must be non-negative")
        _check(temperature <= 2, "temperature", temperature, "must be in [0, 2]")
        top_p = _real("top_p", top_p, "must be in (0, 1]")
        _check(0 < top_p <= 1, "top_p", top_p, "must be in (0, 1]")
        top_k = _integer("top_k", top_k)
        _check(top_k >= -1, "top_k", top_k, "must be 0 (disable), or at least 1")
        min_p = _real("min_p", min_p, "must be in [0, 1]")
        _check(0 <= min_p <= 1, "min_p", min_p, "must be in [0, 1]")
        if seed is not None:
            seed = _integer("seed", seed)
            _check(-(2**63) <= seed < 2**63, "seed", seed, "must be a signed 64-bit integer")
        _store(
            self,
            temperature=temperature,
            top_p=top_p,
            top_k=min(max(top_k, 0), MAX_COUNT),  # above the vocabulary it keeps everything
            min_p=min_p,
            seed=None if seed == -1 else seed,
        )

    def _set_penalties(self, presence: Any, frequency: Any, repetition: Any) -> None:
        for name, value in (("presence_penalty", presence), ("frequency_penalty", frequency)):
            number = _real(name, value, "must be in [-2, 2]")
            _check(-2 <= number <= 2, name, number, "must be in [-2, 2]")
            _store(self, **{name: number})
        repetition = _real("repetition_penalty", repetition)
        _check(repetition > 0, "repetition_penalty", repetition, "must be greater than zero")
        low, high = REPETITION_RANGE
        _check(low <= repetition <= high, "repetition_penalty", repetition, f"must be in [{low:g}, {high:g}]")
        _store(self, repetition_penalty=repetition)

    def _set_lengths(self, n: Any, max_tokens: Any, min_tokens: Any) -> None:
        n = _integer("n", n)
        _check(n >= 1, "n", n, "must be at least 1")
        _check(n <= MAX_N, "n", n, f"must be at most {MAX_N}")
        if max_tokens is not None:
            max_tokens = _integer("max_tokens", max_tokens)
            _check(max_tokens >= 1, "max_tokens", max_tokens, "must be at least 1")
            _check(max_tokens <= MAX_COUNT, "max_tokens", max_tokens, f"must be at most {MAX_COUNT}")
        min_tokens = _integer("min_tokens", min_tokens)
        _check(min_tokens >= 0, "min_tokens", min_tokens, "must be greater than or equal to 0")
        limit = MAX_COUNT if max_tokens is None else max_tokens
        _check(min_tokens <= limit, "min_tokens", min_tokens, f"must be less than or equal to max_tokens={limit}")
        _store(self, n=n, max_tokens=max_tokens, min_tokens=min_tokens)

    def _set_token_rules(self, stop_token_ids: Any, allowed_token_ids: Any, logit_bias: Any) -> None:
        allowed = None if allowed_token_ids is None else _ids("allowed_token_ids", allowed_token_ids)
        if allowed == ():
            raise ParameterError("allowed_token_ids", (), "allowed_token_ids is not None and empty!")
        bias: dict[int, float] | None = None
        if logit_bias is not None:
            if not isinstance(logit_bias, Mapping):
                raise _error("logit_bias", logit_bias, "must map token ids to numbers in [-100, 100]")
            keys = _ids("logit_bias", logit_bias.keys())
            bias = {}
            for token, value in zip(keys, logit_bias.values(), strict=True):
                name = f"logit_bias[{token}]"
                bias[token] = _real(name, value, "must be in [-100, 100]")
                _check(-100 <= bias[token] <= 100, name, bias[token], "must be in [-100, 100]")
        stops = () if stop_token_ids is None else _ids("stop_token_ids", stop_token_ids)
        _store(self, stop_token_ids=stops, allowed_token_ids=allowed, logit_bias=bias)

    def _set_strings(self, stop: Any, bad_words: Any, detokenize: bool) -> None:
        stops = _strings("stop", (stop,) if isinstance(stop, str) else stop)
        if stops and not detokenize:
            raise ParameterError(
                "stop",
                stops,
                "stop strings are only supported when detokenize is True. Set detokenize=True to use stop.",
            )
        words = _strings("bad_words", bad_words)
        if any(not word.strip() for word in words):
            raise _error("bad_words", words, "cannot contain a string of spaces alone")
        _store(self, stop=stops, bad_words=words, detokenize=detokenize)


def validate_prompt(token_ids: Sequence[Any], *, vocab_size: int, max_model_len: int, room: int = 1) -> None:
    """Checks a prompt's token ids against the model's vocabulary and length; `room`: tokens that must fit behind it.

    Raises:
        ParameterError: the prompt is empty, leaves no room for an output token, or holds an id outside the vocabulary.
    """
    length = len(token_ids)
    if length == 0:
        raise ParameterError("prompt", (), "The prompt cannot be empty: give at least one token.")
    if length + room > max_model_len:
        why = (
            "exceeds this limit even without any output tokens"
            if length > max_model_len
            else "leaves no room for an output token"
        )
        raise ParameterError(
            "prompt",
            length,
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains {length} "
            f"input tokens, which {why}. Please reduce the length of the input prompt.",
        )
    for token in token_ids:
        token = _integer("prompt_token_ids", token)
        if not 0 <= token < vocab_size:
            raise ParameterError(
                "prompt_token_ids", token, f"prompt_token_ids: {_shown(token)} is out of vocabulary [0, {vocab_size})."
            )


def _store(params: SamplingParams, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(params, name, value)  # frozen: this is the constructor's one way in


def _shown(value: Any) -> str:
    # An int of thousands of digits cannot be printed, and a long list must not come back in its own error.
    if isinstance(value, int) and not -(10**40) < value < 10**40:
        return "an integer of more than 40 digits"
    text = str(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _error(name: str, value: Any, rule: str) -> ParameterError:
    return ParameterError(name, value, f"{name} {rule}, got {_shown(value)}.")


def _check(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise _error(name, value, rule)


def _refuse(name: str, value: Any) -> None:
    if value is not None and value is not False:
        raise ParameterError(name, value, f"{name} is not supported by this engine: leave it out.")


def _integer(name: str, value: Any) -> int:
    # bool is an int in Python, and "true" for n is a mistake
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _error(name, repr(value), f"must be an integer, not {type(value).__name__}")
    return int(value)


def _real(name: str, value: Any, rule: str = "must be a finite number") -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _error(name, repr(value), f"must be a number, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond the largest float
        number = math.inf
    if not math.isfinite(number):
        raise _error(name, value, rule)
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _error(name, repr(value), "must be True or False")
    return value


def _output_kind(value: Any) -> RequestOutputKind:
    if not isinstance(value, RequestOutputKind):
        raise _error("output_kind", repr(value), "must be a RequestOutputKind")
    return value


def _structured(value: Any, ignore_eos: bool) -> StructuredOutputsParams | None:
    if value is None:
        return None
    if not isinstance(value, StructuredOutputsParams):
        raise _error("structured_outputs", repr(value), "must be a StructuredOutputsParams")
    if ignore_eos:
        problem = f"ignore_eos contradicts {value.named}, which says where an answer ends: leave one of them out."
        raise ParameterError("ignore_eos", True, problem)
    return value


def _logprobs(name: str, value: Any) -> int | None:
    if value is None:
        return None
    count = _integer(name, value)
    _check(-1 <= count <= MAX_COUNT, name, count, "must be non-negative or -1, and at most the engine's max_logprobs")
    return count


def _ids(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise _error(name, repr(values), "must be a list of token ids")
    ids = tuple(dict.fromkeys(_integer(name, value) for value in values))
    for token in ids:
        _check(0 <= token <= MAX_COUNT, name, token, "must hold token ids of the vocabulary")
    return ids


def _strings(name: str, values: Any) -> tuple[str, ...]:
    if values is None:
        return ()
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise _error(name, repr(values), "must be a list of strings")
    strings = tuple(dict.fromkeys(values))
    _check(len(strings) <= MAX_STRINGS, name, len(strings), f"must hold at most {MAX_STRINGS} strings")
    for string in strings:
        if not isinstance(string, str):
            raise _error(name, repr(string), "must contain only strings")
        if not string:
            raise ParameterError(name, string, f"{name} cannot contain an empty string.")
        length = len(string)
        _check(length <= MAX_STRING_CHARS, name, length, f"must hold strings of at most {MAX_STRING_CHARS} characters")
    return strings

"""The text of one sample as its tokens come: decoding, stop strings, and what may be shown already."""

from atoma_jax.sampling_params import SamplingParams
from atoma_jax.tokenizer import IncrementalDecoder, Tokenizer


class TextStream:
    """Shows text as soon as no stop string can begin in it, and nothing behind a stop string. Linear in the text."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens=params.skip_special_tokens, continues=True)
        self._stops = params.stop
        self._min_tokens = params.min_tokens
        self._keep_stop = params.include_stop_str_in_output
        self._longest = max((len(stop) for stop in self._stops), default=1) - 1  # that may be held back
        self._tokens = 0
        self._stopped = False
        self._shown: list[str] = []
        self._fresh: list[str] = []  # shown since the last `take`
        self._held = ""  # decoded, may be the beginning of a stop string

    @property
    def text(self) -> str:
        """All that is shown. What was joined once stays joined, for streams that ask for the whole text every time."""
        if len(self._shown) > 1:
            self._shown = ["".join(self._shown)]
        return self._shown[0] if self._shown else ""

    def take(self) -> str:
        """What was shown since the last call."""
        fresh, self._fresh = self._fresh, []
        return "".join(fresh)

    def push(self, token: int, *, ends: bool) -> str | None:
        """Takes one token; returns the stop string that it completed, if any: the text ends there.

        Args:
            token: sampled.
            ends: it is an end or stop token, whose own text is not part of the answer unless stop strings are kept.
        """
        self._tokens += 1
        before = len(self._held)
        if not ends or self._keep_stop:
            self._held += self._decoder.push([token])
        if self._tokens > self._min_tokens:
            hits: list[tuple[int, int, str]] = []
            for stop in self._stops:  # those that ended in earlier text came before min_tokens
                at = self._held.find(stop, max(0, before - len(stop) + 1))
                if at >= 0:
                    hits.append((at + len(stop), at, stop))
            if hits:
                end, at, stop = min(hits)  # the first to be complete, however tokens cut the text
                self._show(end if self._keep_stop else at)
                self._held, self._stopped = "", True
                return stop
        self._show(len(self._held) - self._possible_stop())
        return None

    def finish(self) -> None:
        """No more tokens will come: shows what was held back, unless a stop string ended the text."""
        if self._stopped:
            return
        self._held += self._decoder.flush()
        self._show(len(self._held))

    def _show(self, count: int) -> None:
        if count:
            piece = self._held[:count]
            self._shown.append(piece)
            self._fresh.append(piece)
            self._held = self._held[count:]

    def _possible_stop(self) -> int:
        """Characters at the end of what is held that a stop string may begin with."""
        for count in range(min(self._longest, len(self._held)), 0, -1):
            tail = self._held[-count:]
            if any(stop.startswith(tail) for stop in self._stops):
                return count
        return 0

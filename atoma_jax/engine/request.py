"""One request on the host: its samples' texts, logprobs and times, turned into `RequestOutput`s as tokens come."""

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

import numpy as np

from atoma_jax.engine.runner import HostOutput
from atoma_jax.engine.sampler_state import SlotRules
from atoma_jax.engine.sequence import Sequence
from atoma_jax.engine.stats import StepTotals
from atoma_jax.engine.text_stream import TextStream
from atoma_jax.outputs import (
    CompletionOutput,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
    position_logprobs,
)
from atoma_jax.sampling_params import RequestOutputKind, SamplingParams
from atoma_jax.tokenizer import Tokenizer


@dataclass(slots=True)
class Sample:
    """One of a request's n samples."""

    seq: Sequence
    settings: np.ndarray  # see sampling_rows.encode; the slot is filled in when there is one
    stream: TextStream | None  # None where detokenization is off
    logprobs: list[PositionLogprobs] = field(default_factory=lambda: list[PositionLogprobs]())
    cumulative_logprob: float = 0.0
    num_shown: int = 0  # tokens given out, for outputs that hold differences


class Request:
    """What the caller asked for and what came of it so far."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        params: SamplingParams,
        samples: ListLike[Sample],
        rules: SlotRules | None,
        tokenizer: Tokenizer,
        arrival: float,
    ):
        self.request_id, self.prompt, self.params = request_id, prompt, params
        self.samples = list(samples)
        self.rules = rules
        self.embedding: np.ndarray | None = None
        self._before = StepTotals()  # its first step
        self.metrics = RequestMetrics(arrival_time=arrival)
        self._tokenizer = tokenizer
        self._prompt_ids = list(self.samples[0].seq.tokens)
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None if params.prompt_logprobs is None else [None]

    def begin(self, now: float, before: StepTotals) -> None:
        """A step will hold one of its samples; `before` it, there were so many. Only the first one counts."""
        if self.metrics.first_scheduled_time is None:
            self.metrics.first_scheduled_time, self._before = now, before

    @property
    def finished(self) -> bool:
        """All samples have ended."""
        for sample in self.samples:  # noqa: SIM110  asked for every token, and twice as fast as all()
            if sample.seq.finish_reason is None:
                return False
        return True

    def add_token(self, sample: Sample, token: int, row: int, output: HostOutput, now: float) -> str | None:
        """Takes a committed token; returns the stop string that ended the text, if one did."""
        seq, metrics = sample.seq, self.metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = now
        metrics.last_token_time = now
        metrics.num_generation_tokens += 1
        if self.params.logprobs is not None:
            assert output.logprob is not None
            sample.cumulative_logprob += float(output.logprob[row])
            sample.logprobs.append(self._entry(token, row, output, self.params.logprobs))
        if sample.stream is None:
            return None
        stopped = sample.stream.push(token, ends=seq.finish_reason == "stop")
        if stopped is None and seq.is_finished:
            sample.stream.finish()
        return stopped

    def add_scores(self, start: int, count: int, row: int, output: HostOutput) -> None:
        """Takes prompt log-probabilities: `count` rows from `row` on score the tokens behind `start`."""
        assert self._prompt_logprobs is not None
        assert self.params.prompt_logprobs is not None
        for index in range(count):
            token = self._prompt_ids[start + index + 1]
            self._prompt_logprobs.append(self._entry(token, row + index, output, self.params.prompt_logprobs))

    def end_texts(self) -> None:
        """Shows what is held back of samples that ended without a last token, by abort or error."""
        for sample in self.samples:
            if sample.stream is not None and sample.seq.is_finished:
                sample.stream.finish()

    def output(self, now: float, totals: StepTotals | None = None) -> RequestOutput:
        """The state to hand out: everything so far, or what is new, as the request's `output_kind` says.

        Args:
            now: of the engine's clock.
            totals: of steps, up to the one whose results came last.
        """
        metrics = self.metrics
        finished = self.finished
        if finished and metrics.finished_time is None:
            metrics.finished_time = now
            metrics.num_preemptions = sum(sample.seq.num_preemptions for sample in self.samples)
            if totals is not None:
                metrics.num_steps = totals.steps - self._before.steps
                metrics.padding_ratio = totals.padding_since(self._before)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self._prompt_ids,
            outputs=[self._completion(sample) for sample in self.samples],
            finished=finished,
            prompt_logprobs=self._prompt_logprobs,
            metrics=metrics,
            num_cached_tokens=self.samples[0].seq.num_cached_tokens or 0,
            embedding=self.embedding,
        )

    def _completion(self, sample: Sample) -> CompletionOutput:
        seq = sample.seq
        first = 0
        if self.params.output_kind is RequestOutputKind.DELTA:
            first, sample.num_shown = sample.num_shown, len(seq.tokens) - seq.prompt_len
            text = "" if sample.stream is None else sample.stream.take()
        else:
            text = "" if sample.stream is None else sample.stream.text
        wants = self.params.logprobs is not None
        return CompletionOutput(
            index=seq.index,
            text=text,
            token_ids=seq.tokens[seq.prompt_len + first :],
            cumulative_logprob=sample.cumulative_logprob if wants else None,
            logprobs=sample.logprobs[first:] if wants else None,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )

    def _entry(self, token: int, row: int, output: HostOutput, count: int) -> PositionLogprobs:
        assert output.logprob is not None
        assert output.rank is not None
        assert output.top_ids is not None
        assert output.top_logprobs is not None
        return position_logprobs(
            token_id=token,
            logprob=float(output.logprob[row]),
            rank=int(output.rank[row]),
            top_ids=output.top_ids[row, :count].tolist(),
            top_logprobs=output.top_logprobs[row, :count].tolist(),
            decode=self._token_text if self.params.detokenize else None,
        )

    def _token_text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False, continues=True)

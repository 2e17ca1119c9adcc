"""OpenTelemetry: a span for each prompt that was answered, under the names of vLLM's, sent to a collector over HTTP.

Spans are made from the engine's own times once a prompt is done, so that serving waits for nothing. They are sent from
a thread with a bounded queue; a collector that is away loses spans and slows nobody. No text is in any.
"""

# OpenTelemetry's SDK is not in every environment.
# pyright: reportMissingImports=false, reportMissingTypeStubs=false

import time
from typing import Any

from atoma_jax import RequestOutput, SamplingParams, UserError, __version__

_NAME = "llm_request"


class Tracing:
    """Makes spans and hands them on."""

    def __init__(self, processor: Any, model_name: str):
        """`processor` is an OpenTelemetry `SpanProcessor`."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "atoma-jax", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("atoma_jax", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name

    @classmethod
    def to_endpoint(cls, endpoint: str, model_name: str) -> "Tracing":
        """Sends to a collector's address, such as http://127.0.0.1:4318/v1/traces.

        Raises:
            UserError: the extra `otel` is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            problem = "needs the extra `otel`: pip install 'atoma-jax[otel]'"
            raise UserError("otlp_traces_endpoint", endpoint, problem) from error
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)), model_name)

    def add_request(self, output: RequestOutput, params: SamplingParams | None, traceparent: str | None) -> None:
        """A prompt is done.

        Args:
            output: its last one.
            params: what was asked for; None: a vector.
            traceparent: the header of W3C's trace context, where the client sent one: the span is its child.
        """
        from opentelemetry.trace import SpanKind

        times = output.metrics
        assert times is not None, "the engine fills the metrics of every output"
        end = time.time_ns()
        start = end - round((times.e2e_time or 0.0) * 1e9)
        parent = None if traceparent is None else self._propagator.extract({"traceparent": traceparent})
        span = self._tracer.start_span(_NAME, context=parent, kind=SpanKind.SERVER, start_time=start)
        values: dict[str, Any] = {
            "gen_ai.response.model": self._model_name,
            "gen_ai.request.id": output.request_id,
            "gen_ai.usage.prompt_tokens": len(output.prompt_token_ids),
            "gen_ai.usage.completion_tokens": times.num_generation_tokens,
            "gen_ai.latency.time_in_queue": times.queue_time,
            "gen_ai.latency.time_in_model_prefill": times.prefill_time,
            "gen_ai.latency.time_in_model_decode": times.decode_time,
            "gen_ai.latency.time_to_first_token": times.time_to_first_token,
            "gen_ai.latency.e2e": times.e2e_time,
            "atoma.cached_tokens": output.num_cached_tokens,
            "atoma.preemptions": times.num_preemptions,
        }
        if params is not None:
            values |= {
                "gen_ai.request.n": params.n,
                "gen_ai.request.temperature": params.temperature,
                "gen_ai.request.top_p": params.top_p,
                "gen_ai.request.max_tokens": params.max_tokens,
            }
        span.set_attributes({name: value for name, value in values.items() if value is not None})
        span.set_attribute("gen_ai.response.finish_reasons", [sample.finish_reason or "" for sample in output.outputs])
        span.end(end)

    def close(self) -> None:
        """Sends what is left; takes seconds at most."""
        self._provider.shutdown()

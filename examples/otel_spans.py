"""OpenTelemetry: a span for each request, with the names of the GenAI semantic conventions.

    python examples/otel_spans.py "Why is the sky blue?"      # prints the spans

The spans are children of the current span, for example of the web framework's. They hold no
prompts and no answers. Read a stream in the thread that opened it; else the next call ends its
span.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode

from copilot_router import Event, FailoverChain, LMStudioProvider, OpenAIProvider, ProviderTier

ENDS_A_REQUEST = ("retry", "failover", "escalation", "wait", "skip", "attempt", "done")


class Spans:
    """Events come in the thread of their call, so each thread has one open span at most.

    ``providers``: the convention's name of a provider, for tiers that have another name.
    """

    def __init__(
        self, tracer: trace.Tracer | None = None, providers: Mapping[str, str] | None = None
    ) -> None:
        self._tracer = tracer or trace.get_tracer("copilot_router")
        self._providers = providers or {}
        self._here = threading.local()

    def __call__(self, event: Event) -> None:
        span = getattr(self._here, "span", None)
        if span is not None and event.kind in ENDS_A_REQUEST:
            self._end(span, event)
            self._here.span = None
        elif span is not None:
            facts = {name: str(value) for name, value in event.data.items()}
            span.add_event(event.kind, facts)  # resend, breaker
        if event.kind == "attempt":
            self._here.span = self._begin(event)

    def _begin(self, event: Event) -> trace.Span:
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": self._providers.get(event.tier, event.tier),
        }
        if event.model:
            attributes["gen_ai.request.model"] = event.model
        return self._tracer.start_span(
            f"chat {event.model}".strip(), kind=SpanKind.CLIENT, attributes=attributes
        )

    @staticmethod
    def _end(span: trace.Span, event: Event) -> None:
        if event.kind == "done" and event.data["outcome"] == "ok":
            span.set_attribute("gen_ai.response.model", event.model)
            span.set_attribute("gen_ai.usage.input_tokens", event.data["prompt_tokens"])
            span.set_attribute("gen_ai.usage.output_tokens", event.data["completion_tokens"])
        elif event.kind != "escalation":  # an answer too, if a weak one
            span.set_attribute("error.type", event.data.get("outcome", "_OTHER"))
            span.set_status(StatusCode.ERROR)
        span.end()


def make_chain(on_event: Callable[[Event], None]) -> FailoverChain:
    tiers = [
        ProviderTier("local", LMStudioProvider()),
        ProviderTier("cloud", OpenAIProvider(), ["gpt-6-luna"]),
    ]
    return FailoverChain(tiers, on_event=on_event)


if __name__ == "__main__":
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
    spans = Spans(provider.get_tracer("copilot_router"), {"local": "lmstudio", "cloud": "openai"})
    print(make_chain(spans).chat(sys.argv[1]).text)

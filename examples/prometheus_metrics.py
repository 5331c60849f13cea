"""Prometheus: calls, requests, failovers, tokens, cost and open breakers, from ``on_event``.

    python examples/prometheus_metrics.py "Why is the sky blue?"

asks once and prints what would be scraped. In a web application, write
``FailoverChain(tiers, on_event=Metrics())`` and ``prometheus_client.start_http_server(9100)``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from copilot_router import Event, FailoverChain, LMStudioProvider, OpenAIProvider, ProviderTier


class Metrics:
    """Called in the thread of the call, for every step of it: count and return."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.calls = Counter(
            "llm_calls",
            "Calls by how they ended: ok, or an error's class",
            ["outcome"],
            registry=registry,
        )
        self.requests = Counter(
            "llm_requests", "Requests sent", ["tier", "model"], registry=registry
        )
        self.failovers = Counter(
            "llm_failovers", "From one tier to the next", ["tier", "to"], registry=registry
        )
        self.tokens = Counter(
            "llm_tokens", "Tokens of the answers", ["tier", "kind"], registry=registry
        )
        self.cost = Counter(
            "llm_cost_usd",
            "Money spent on answered calls, where prices are known",
            registry=registry,
        )
        self.seconds = Histogram(
            "llm_call_seconds", "How long calls took", ["outcome"], registry=registry
        )
        self.open = Gauge(
            "llm_breaker_open", "1 while a tier is not asked", ["tier"], registry=registry
        )

    def __call__(self, event: Event) -> None:
        if event.kind == "attempt":
            self.requests.labels(event.tier, event.model).inc()
        elif event.kind == "failover":
            self.failovers.labels(event.tier, event.data["to"]).inc()
        elif event.kind == "breaker" and "new" in event.data:
            self.open.labels(event.tier).set(event.data["new"] != "closed")
        elif event.kind == "done":
            self.calls.labels(event.data["outcome"]).inc()
            self.seconds.labels(event.data["outcome"]).observe(event.data["latency"])
            if event.data["outcome"] == "ok":
                self.tokens.labels(event.tier, "prompt").inc(event.data["prompt_tokens"])
                self.tokens.labels(event.tier, "completion").inc(event.data["completion_tokens"])
                self.cost.inc(event.data["cost"] or 0.0)


def make_chain(on_event: Callable[[Event], None]) -> FailoverChain:
    tiers = [
        ProviderTier("local", LMStudioProvider(), prices=(0, 0)),
        ProviderTier("cloud", OpenAIProvider(), ["gpt-6-luna"], prices=(0.1, 0.5)),
    ]
    return FailoverChain(tiers, on_event=on_event)


if __name__ == "__main__":
    print(make_chain(Metrics()).chat(sys.argv[1]).text)
    print(generate_latest(REGISTRY).decode())

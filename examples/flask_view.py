"""Flask: a view that answers within 25 seconds or says 503, and a health endpoint.

export OPENAI_API_KEY=...
flask --app examples/flask_view.py run
curl --json '{"question": "Why is the sky blue?"}' localhost:5000/ask
curl localhost:5000/health
"""

from __future__ import annotations

import math
from typing import Any

from flask import Flask, request

from copilot_router import (
    AllProvidersFailed,
    ContentFiltered,
    ContextLengthExceeded,
    FailoverChain,
    LMStudioProvider,
    OpenAIProvider,
    ProviderError,
    ProviderTier,
)


def make_chain() -> FailoverChain:
    return FailoverChain(
        [
            ProviderTier("local", LMStudioProvider()),
            ProviderTier("cloud", OpenAIProvider(), ["gpt-6-luna"]),
        ]
    )


def create_app(chain: FailoverChain | None = None) -> Flask:
    app = Flask(__name__)
    chain = chain or make_chain()  # one for the process: its threads share it

    @app.post("/ask")
    def ask() -> Any:
        question = request.get_json()["question"]
        response = chain.chat(question, timeout=25)  # less than the server's own limit
        return {"answer": response.text, "by": response.provider}

    @app.errorhandler(AllProvidersFailed)  # DeadlineExceeded and EscalationFailed are subclasses
    def unavailable(error: AllProvidersFailed) -> Any:
        wait = (
            {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
        )
        return {"error": "no answer at the moment"}, 503, wait  # None: waiting will not help

    @app.errorhandler(ContentFiltered)
    @app.errorhandler(ContextLengthExceeded)
    def unanswerable(error: ProviderError) -> Any:
        return {"error": "this question cannot be answered", "why": type(error).__name__}, 422

    @app.get("/health")
    def health() -> Any:
        tiers = chain.health()  # plain data; asks nobody
        ready = any(
            tier.breaker.state == "closed" or tier.breaker.retry_after == 0 for tier in tiers
        )
        return {tier.name: tier.breaker.state for tier in tiers}, 200 if ready else 503

    return app

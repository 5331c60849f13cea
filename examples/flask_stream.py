"""Flask: show an answer while it is being written, or answer 503 if no provider can.

    export OPENAI_API_KEY=...
    gunicorn --chdir examples 'flask_stream:create_app()' --worker-class gthread --threads 8
    curl -N --json '{"question": "Why is the sky blue?"}' localhost:8000/ask

``stream()`` returns when the first piece of text is there. Until then it goes on to the next
tier, and an error becomes a status of its own. Status 200 is sent only after that. If the
visitor leaves, the stream is closed, and with it the connection to the provider.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from flask import Flask, Response, request

from copilot_router import (
    AllProvidersFailed,
    FailoverChain,
    LMStudioProvider,
    OpenAIProvider,
    ProviderTier,
    StreamInterrupted,
)


def make_chain() -> FailoverChain:
    return FailoverChain(
        [
            ProviderTier("local", LMStudioProvider()),  # LMSTUDIO_BASE_URL
            ProviderTier("cloud", OpenAIProvider(), [os.environ.get("OPENAI_MODEL", "gpt-6-luna")]),
        ]
    )


def create_app(chain: FailoverChain | None = None) -> Flask:
    app = Flask(__name__)
    chain = chain or make_chain()  # one for the process: its threads share it

    @app.post("/ask")
    def ask() -> Any:
        stream = chain.stream(request.get_json()["question"], timeout=60)
        return Response(
            stream, mimetype="text/plain; charset=utf-8", headers={"X-Accel-Buffering": "no"}
        )

    @app.post("/ask-politely")
    def ask_politely() -> Any:
        """The same, but it tells the visitor if the answer breaks off. /ask cuts the connection."""
        stream = chain.stream(request.get_json()["question"], timeout=60)

        def told() -> Iterator[str]:
            with stream:
                try:
                    yield from stream
                except StreamInterrupted:
                    yield "\n[The answer broke off here. Please ask again.]"

        return Response(
            told(), mimetype="text/plain; charset=utf-8", headers={"X-Accel-Buffering": "no"}
        )

    @app.errorhandler(AllProvidersFailed)  # DeadlineExceeded and EscalationFailed are subclasses
    def unavailable(error: AllProvidersFailed) -> Any:
        wait = (
            {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
        )
        return {"error": "no answer at the moment"}, 503, wait  # None: waiting will not help

    return app

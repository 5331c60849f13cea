"""Server-sent events to a browser, with a heartbeat while the model is silent.

    export OPENAI_API_KEY=...
    gunicorn --chdir examples 'sse_heartbeat:create_app()' --worker-class gthread --threads 8
    curl -N 'localhost:8000/events?question=Why+is+the+sky+blue'

    new EventSource("/events?question=...").onmessage = (e) => page.append(JSON.parse(e.data))

Proxies and browsers close a connection that is silent for too long, and a model may be silent
for longer. ``next()`` on a stream blocks until there is text. So a thread reads the stream and
puts the text into a queue. When the queue stays empty, a comment is sent as heartbeat. The
thread belongs to this recipe; the library needs none. Before the first piece of text nothing is
sent, so an outage can still become a 503. The setting first_token_timeout limits that time.
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
from collections.abc import Iterator
from typing import Any

from flask import Flask, Response, request

from copilot_router import (
    AllProvidersFailed,
    ChatStream,
    FailoverChain,
    LMStudioProvider,
    OpenAIProvider,
    ProviderTier,
    StreamInterrupted,
)

#: Seconds. Less than the shortest time limit between here and the browser.
HEARTBEAT = float(os.environ.get("HEARTBEAT", "15"))


def make_chain() -> FailoverChain:
    return FailoverChain(
        [
            ProviderTier("local", LMStudioProvider()),  # LMSTUDIO_BASE_URL
            ProviderTier("cloud", OpenAIProvider(), [os.environ.get("OPENAI_MODEL", "gpt-6-luna")]),
        ]
    )


def event(data: Any, name: str = "message") -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"  # JSON has no newline in it


def with_heartbeat(stream: ChatStream, seconds: float) -> Iterator[str]:
    """The stream's text as events, and a comment whenever it has been silent for so long."""
    # The queue has a limit, so that a slow browser slows the reading down.
    events: queue.Queue[str | None] = queue.Queue(maxsize=100)
    gone = threading.Event()  # the browser has hung up

    def put(item: str | None) -> bool:
        while not gone.is_set():
            try:
                events.put(item, timeout=1.0)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        with stream:  # the thread that reads it closes it
            try:
                for delta in stream:
                    if not put(event(delta)):
                        return
                put(
                    event(
                        {
                            "by": stream.response.provider,
                            "tokens": stream.response.usage.total_tokens,
                        },
                        "end",
                    )
                )
            except StreamInterrupted:
                put(event("the answer broke off", "broken"))
            finally:
                put(None)

    threading.Thread(target=read, name="sse reader", daemon=True).start()
    try:
        while True:
            try:
                item = events.get(timeout=seconds)
            except queue.Empty:
                yield ": still there\n\n"
                continue
            if item is None:
                return
            yield item
    finally:
        gone.set()


def create_app(chain: FailoverChain | None = None) -> Flask:
    app = Flask(__name__)
    chain = chain or make_chain()  # one for the process: its threads share it

    @app.get("/events")
    def events() -> Any:
        # When this returns, the first text is there; else it raises.
        stream = chain.stream(request.args["question"], timeout=120)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return Response(
            with_heartbeat(stream, HEARTBEAT), mimetype="text/event-stream", headers=headers
        )

    @app.errorhandler(AllProvidersFailed)
    def unavailable(error: AllProvidersFailed) -> Any:
        wait = (
            {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
        )
        return {"error": "no answer at the moment"}, 503, wait

    return app

"""Server-sent events with a thinking pane: what the model thinks is shown beside its answer.

    export OPENAI_API_KEY=...
    gunicorn --chdir examples 'sse_thoughts:create_app()' --worker-class gthread --threads 8
    open http://localhost:8000/ in a browser, or:
    curl -N 'localhost:8000/events?question=Why+is+the+sky+blue'

Events: ``thought`` and ``message`` carry a piece of text. ``restart`` says that the thoughts so
far belong to a request that failed. ``end`` comes after a whole answer, ``broken`` after one
that broke off.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator
from typing import Any

from flask import Flask, Response, request

from copilot_router import (
    AllProvidersFailed,
    ChatStream,
    Event,
    FailoverChain,
    LMStudioProvider,
    OpenAIProvider,
    ProviderTier,
    RouterError,
    Thought,
)

PAGE = """<!doctype html><title>Thinking</title>
<form><input name=question size=60 autofocus></form>
<pre id=thought style="color:gray;white-space:pre-wrap"></pre>
<pre id=message style="white-space:pre-wrap"></pre>
<script>
  const pane = (name) => document.getElementById(name);
  const asked = new URLSearchParams(location.search).get("question");
  if (asked) {
    const source = new EventSource("/events?question=" + encodeURIComponent(asked));
    for (const name of ["thought", "message"])
      source.addEventListener(name, (event) => pane(name).append(JSON.parse(event.data)));
    source.addEventListener("restart", () => pane("thought").replaceChildren());
    source.addEventListener("end", () => source.close());
    source.addEventListener("broken", () => {
      source.close();
      pane("message").append("\\n[broken off]");
    });
  }
</script>"""


class Requests(threading.local):
    """Notices a new request. The events of a stream come in the thread that reads it."""

    sent = False

    def __call__(self, event: Event) -> None:
        if event.kind == "attempt":
            self.sent = True

    def take(self) -> bool:
        sent, self.sent = self.sent, False
        return sent


requests = Requests()


def make_chain() -> FailoverChain:
    tiers = [
        ProviderTier("local", LMStudioProvider()),  # LMSTUDIO_BASE_URL
        ProviderTier("cloud", OpenAIProvider(), [os.environ.get("OPENAI_MODEL", "gpt-6-luna")]),
    ]
    return FailoverChain(tiers, on_event=requests)


def event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"  # JSON has no newline in it


def told(stream: ChatStream) -> Iterator[str]:
    with stream:
        try:
            for delta in stream:
                if requests.take():  # a tier failed after its thoughts were shown
                    yield event("restart", "")
                yield event("thought" if isinstance(delta, Thought) else "message", delta)
            yield event("end", {"by": stream.response.provider})
        except RouterError as error:  # after text, or all tiers failed after thoughts
            yield event("broken", type(error).__name__)


def create_app(chain: FailoverChain | None = None) -> Flask:
    app = Flask(__name__)
    chain = chain or make_chain()  # one for the process: its threads share it

    @app.get("/")
    def page() -> Any:
        return PAGE

    @app.get("/events")
    def events() -> Any:
        stream = chain.stream(request.args["question"], timeout=120, thoughts=True)
        requests.take()  # those until the first piece
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return Response(told(stream), mimetype="text/event-stream", headers=headers)

    @app.errorhandler(AllProvidersFailed)
    def unavailable(error: AllProvidersFailed) -> Any:
        wait = (
            {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
        )
        return {"error": "no answer at the moment"}, 503, wait

    return app

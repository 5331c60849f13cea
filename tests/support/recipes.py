"""What the recipes need: two chat servers that play a script, the environment, and a web server for
their views."""

from __future__ import annotations

import http.client
import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import dialects
from support.server import HEAD, Serve, Server, delta, parsed, reply, sse

from copilot_router import Usage

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
#: How each recipe that streams is asked.
STREAMS = {"flask_stream": ("POST", "/ask", '{"question": "hi"}', "application/json"),
    "django_stream": ("POST", "/ask", "question=hi", "application/x-www-form-urlencoded"),
    "sse_heartbeat": ("GET", "/events?question=hi", None, ""),
    "sse_thoughts": ("GET", "/events?question=hi", None, "")}
#: A program that asks both Django views, an answer and a failure each.
DJANGO = """
import json, django_view, django
from django.test import Client
django.setup()
for path in ("/ask", "/ask-async"):
    for _ in range(2):
        seen = Client().post(path, {"question": "hi"}, HTTP_HOST="localhost")
        print(json.dumps([seen.status_code, seen.headers.get("Retry-After"), seen.json()]))
    django_view.chain().reset()
"""


class Luna(dialects.Chat):
    model = "gpt-6-luna"


def says(*text: str, broken: bool = False, gate: Any = None, **fields: Any) -> Serve:
    """An answer of the model. Each piece of text is an event of a stream.

    ``broken``: the connection is closed instead of the end. ``gate`` is acquired before each text
    and before the end.
    """
    answer = dialects.Answer(text, usage=Usage(20, 15), **fields)
    def serve(_: Server, connection: Any, request: bytes) -> bool:
        if not parsed(request).body.get("stream"):
            connection.sendall(reply(Luna().body(answer)))
            return False
        connection.sendall(HEAD)
        for event in Luna().events(answer):
            ends = Luna.ends in event
            if ends and broken:
                break
            waits = ends or any(json.dumps(piece).encode() in event for piece in text)
            assert not (gate and waits) or gate.acquire(timeout=20)
            connection.sendall(event)
        return False
    return serve


def refusal(status: int, message: str = "no", **headers: str) -> bytes:
    return reply({"error": {"message": message}}, status, **headers)


BROKEN, BUSY = refusal(500), refusal(429, Retry_After="30")


class Endless:
    """Text without end. ``gone`` is released when the client hangs up."""
    def __init__(self) -> None:
        self.gone = threading.Semaphore(0)

    def __call__(self, server: Server, connection: Any, request: bytes) -> bool:
        connection.sendall(HEAD)
        try:
            while True:
                connection.sendall(sse(delta(content="more ")))
                server.stopping.wait(0.01)
        finally:
            self.gone.release()


class ChatServer(Server):
    """Each request takes the next answer of ``script``, or "ok" where it is empty."""
    def __init__(self) -> None:
        self.script: deque[bytes | Serve] = deque()
        super().__init__(self._told)
        self.url += "/v1"

    def _told(self, _: Server, connection: Any, request: bytes) -> bool:
        item = self.script.popleft() if self.script else says("ok")
        if not isinstance(item, bytes):
            return item(self, connection, request)
        connection.sendall(item)
        return False


class Machine(NamedTuple):
    """What the recipes find: a server where LM Studio would be, and one for the cloud."""
    local: ChatServer
    cloud: ChatServer

    def both(self, item: Any, times: int = 1) -> None:
        self.local.script.extend([item] * times)
        self.cloud.script.extend([item] * times)


@contextmanager
def two_servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("CELERY_BROKER_URL", "memory://")
    monkeypatch.setenv("LM_API_TOKEN", "a-key-for-local")
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-for-cloud")
    with ChatServer() as local, ChatServer() as cloud:
        monkeypatch.setenv("LMSTUDIO_BASE_URL", local.url)
        monkeypatch.setenv("OPENAI_BASE_URL", cloud.url)
        yield Machine(local, cloud)


def example(name: str, needs: str = "requests") -> Any:
    """A recipe, imported anew: its chain is that of the test."""
    pytest.importorskip(needs)
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, which finds the module and the recipes."""
    path = os.pathsep.join((str(ROOT), str(EXAMPLES)))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    line = [sys.executable, *command]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)


def application(name: str) -> Any:
    if name != "django_stream":
        return example(name, "flask").create_app()
    module = example(name, "django")
    from django.urls import clear_url_caches
    clear_url_caches()
    return module.application


@contextmanager
def served(name: str, path: str = "") -> Iterator[http.client.HTTPResponse]:
    """The answer of a recipe that a server of this process serves."""
    site = application(name)
    serving = pytest.importorskip("werkzeug.serving")
    server = serving.make_server("127.0.0.1", 0, site, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    method, usual, body, kind = STREAMS[name]
    try:
        connection.request(method, path or usual, body, {"Content-Type": kind})
        yield connection.getresponse()
    finally:
        connection.close()
        server.shutdown()
        thread.join()
        server.server_close()


def pieces(response: http.client.HTTPResponse) -> Iterator[str]:
    """What the visitor sees, as it comes: text, or names and data of events."""
    while piece := response.read1(65536).decode():
        if not piece.startswith(("event: ", ": ")):
            yield piece
            continue
        for name, data in re.findall(r"(?m)^event: (\w+)\ndata: (.*)$", piece):
            yield json.loads(data) if name == "message" else f"{name} {data}"

"""The streaming recipes under gunicorn: with a dead primary the visitor sees 200 and text piece by piece, else a 503."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import Peer, peer
from test_stream import Gated, text_event

import copilot_router

pytest.importorskip("flask")
pytest.importorskip("django")
pytest.importorskip("gunicorn")

ROOT = Path(__file__).resolve().parent.parent
SITE = """
import django_stream, flask_stream, sse_heartbeat
from werkzeug.middleware.dispatcher import DispatcherMiddleware

chains = [flask_stream.make_chain(), sse_heartbeat.make_chain(), django_stream.make_chain()]

def reset(environ, start_response):
    for chain in chains:
        chain.reset()
    start_response("204 No Content", [])
    return []

events = sse_heartbeat.create_app(chains[1])
site = DispatcherMiddleware(
    flask_stream.create_app(chains[0]), {"/django": django_stream.application, "/sse": events, "/reset": reset}
)
"""
TEXTS = ("one ", "two\n", "three")


class Second(Gated):
    """The second tier: texts at a gate; or more and more of them, a break, a refusal."""

    def __init__(self) -> None:
        super().__init__(*TEXTS)
        self.mode = "gated"

    def answer(self, server: Peer, connection: socket.socket, request: bytes) -> bool:
        if self.mode == "busy":
            head = b"HTTP/1.1 429 Slow Down\r\nRetry-After: 7\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
            connection.sendall(head)
            return False
        if self.mode != "endless":
            return self.serve(server, connection, request)
        connection.settimeout(0.01)
        self.head(connection)
        while not server.stopping.is_set():
            try:
                connection.sendall(text_event("more "))
                if not connection.recv(1):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        self.gone.release()
        return False


class Site:
    """The recipes, served by gunicorn on loopback."""

    def __init__(self, second: Second, port: int) -> None:
        self.second = second
        self.port = port

    def renew(self) -> None:
        """As if nothing had happened: breakers closed, the second tier well and its gate shut."""
        vars(self.second).update(vars(Second()))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", "/reset")
        assert connection.getresponse().status == 204
        connection.close()

    def ask(self, where: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        if where == "django":
            kind = {"Content-Type": "application/x-www-form-urlencoded"}
            connection.request("POST", "/django/ask", "question=hi", kind)
        elif where == "sse":
            connection.request("GET", "/sse/events?question=hi")
        else:
            path = "/ask-politely" if where == "politely" else "/ask"
            connection.request("POST", path, json.dumps({"question": "hi"}), {"Content-Type": "application/json"})
        return connection, connection.getresponse()


@pytest.fixture(scope="module", params=["sync", "gthread"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """All recipes in one gunicorn: nobody listens where the first tier should be, the second is ours."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "served.py").write_text(SITE)
    second = Second()
    dead = socket.create_server(("127.0.0.1", 0))
    nobody = dead.getsockname()[1]
    dead.close()
    with peer(second.answer) as server, socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        environment = {
            "PATH": os.environ.get("PATH", ""), "HEARTBEAT": "0.05",
            "PYTHONPATH": os.pathsep.join(map(str, (Path(copilot_router.__file__).parent, ROOT / "examples", folder))),
            "LMSTUDIO_BASE_URL": f"http://127.0.0.1:{nobody}/v1", "LM_API_TOKEN": "a-key",
            "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "a-key",
        }  # fmt: skip
        command = [sys.executable, "-m", "gunicorn", "served:site", "--bind", f"fd://{listener.fileno()}"]
        command += ["--worker-class", request.param, "--threads", "1" if request.param == "sync" else "4"]
        log = folder / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command, env=environment, pass_fds=[listener.fileno()], stdout=output, stderr=subprocess.STDOUT
            )
        try:
            yield Site(second, listener.getsockname()[1])
        except BaseException:
            print(log.read_text())
            raise
        finally:
            second.allow(100)
            process.terminate()
            assert process.wait(20) == 0, log.read_text()


@pytest.fixture
def site(served: Site) -> Site:
    served.renew()
    return served


def pieces(response: http.client.HTTPResponse, where: str) -> Iterator[str]:
    """What the visitor sees, as it comes."""
    while piece := response.read1(65536).decode():
        if where != "sse":
            yield piece
            continue
        for item in piece.split("\n\n"):
            found = re.fullmatch(r"event: (\w+)\ndata: (.*)", item)
            if found:
                yield json.loads(found[2]) if found[1] == "message" else f"{found[1]} {found[2]}"
            elif item:
                assert item == ": still there"
                yield ""


def next_text(seen: Iterator[str]) -> str:
    return next(text for text in seen if text)


@pytest.mark.parametrize("where", ["flask", "politely", "django", "sse"])
def test_deltas_arrive_one_by_one_from_the_second_tier(site: Site, where: str) -> None:
    """Status 200, and each piece is seen before the provider may send the next one."""
    site.second.allow()
    connection, response = site.ask(where)
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/event-stream" if where == "sse" else "text/plain")
    seen = pieces(response, where)
    for text in TEXTS:
        assert next_text(seen) == text
        if where == "sse":
            assert [next(seen), next(seen)] == ["", ""]  # the heart beats while the provider is silent
        site.second.allow()
    rest = [text for text in seen if text]
    assert rest == (['end {"by": "cloud", "tokens": 18}'] if where == "sse" else [])
    connection.close()


@pytest.mark.parametrize("where", ["flask", "politely", "django", "sse"])
def test_an_answer_that_breaks_off_never_looks_complete(site: Site, where: str) -> None:
    """The plain recipes cut the connection, the others say so in words."""
    site.second.allow()
    connection, response = site.ask(where)
    seen = pieces(response, where)
    assert next_text(seen) == TEXTS[0]
    site.second.broken = True
    site.second.allow()
    if where in ("flask", "django"):
        with pytest.raises(http.client.IncompleteRead):
            response.read()
    else:
        last = "".join(seen)
        words = "\n[The answer broke off here. Please ask again.]"
        assert last == ('broken "the answer broke off"' if where == "sse" else words)
    connection.close()


@pytest.mark.parametrize("where", ["flask", "politely", "django", "sse"])
def test_a_visitor_who_hangs_up_frees_the_provider(site: Site, where: str) -> None:
    """In the middle of an endless answer: the connection to the provider is closed, and the next visitor is served."""
    site.second.mode = "endless"
    connection, response = site.ask(where)
    assert next_text(pieces(response, where)).startswith("more ")
    response.close()
    connection.close()
    assert site.second.gone.acquire(timeout=10)
    site.second.mode = "gated"
    site.second.allow(4)
    connection, response = site.ask(where)
    assert response.status == 200
    assert "".join(text for text in pieces(response, where) if not text.startswith("end")) == "".join(TEXTS)
    connection.close()


@pytest.mark.parametrize("where", ["flask", "django", "sse"])
def test_with_all_tiers_dead_the_visitor_gets_503(site: Site, where: str) -> None:
    """With Retry-After, because nothing was sent before the first delta was there; afterwards all is well again."""
    site.second.mode = "busy"
    for _ in range(2):  # asked and refused; then not asked at all
        connection, response = site.ask(where)
        assert response.status == 503
        assert 1 <= int(response.headers["Retry-After"]) <= 7
        assert json.loads(response.read()) == {"error": "no answer at the moment"}
        connection.close()


def test_the_recipes_say_how_to_run_them() -> None:
    """The commands in their docstrings name what is there."""
    for name, target in (("flask_stream", "create_app"), ("django_stream", "application"), ("sse_heartbeat", "create_app")):
        text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        told: Any = re.search(rf"gunicorn --chdir examples '?{name}:(\w+)", text)
        assert told[1] == target
        assert re.search(rf"^(def {target}|{target} =)", text, re.MULTILINE)

"""``copilot-router chat --provider …`` against loopback servers that write each vendor's own format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dialects import DIALECTS, Answer, Dialect, answers, chunk, found_in, head, parsed, reply
from faults import Peer, peer

from copilot_router import Usage, main

KEY = "sk-test-contract-key-1234567890"
#: --provider -> the format it speaks, and the variable of its key.
PROVIDERS = {
    "openai": ("chat", "OPENAI_API_KEY"), "lmstudio": ("lmstudio", "LM_API_TOKEN"), "ollama": ("ollama", "OLLAMA_API_KEY"),
    "anthropic": ("anthropic", "ANTHROPIC_API_KEY"), "gemini": ("gemini", "GOOGLE_API_KEY"),
}  # fmt: skip
ANSWER = Answer(text=("Grüße, ", "Welt"), reasoning=("Hm.",), usage=Usage(11, 5))


@pytest.fixture(params=PROVIDERS)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    provider = str(request.param)
    monkeypatch.setenv(PROVIDERS[provider][1], KEY)
    return provider


def dialect_of(name: str) -> Dialect:
    return next(dialect for dialect in DIALECTS if dialect.name == PROVIDERS[name][0])


@contextmanager
def asked(name: str, *more: str) -> Iterator[tuple[Peer, list[str]]]:
    """A server that answers, and the arguments that lead to it."""
    with peer(answers(dialect_of(name), lambda _: ANSWER)) as server:
        where = ["--provider", name, "--base-url", f"http://127.0.0.1:{server.port}", "--model", "m"]
        yield server, ["chat", *where, *more]


def test_chat(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer on stdout and nothing else; the key of the environment, the system text and the prompt reach the server."""
    with asked(name, "--system", "Be brief.", "How is it?") as (server, arguments):
        assert main(arguments) == 0
        (request,) = server.requests
    assert capsys.readouterr() == ("Grüße, Welt\n", "")
    path, headers, body = parsed(request)
    assert any(KEY in value for value in headers.values())
    assert dialect_of(name).streams(path, body)
    assert found_in(r"Be brief\.", body)
    assert found_in(r"How is it\?", body)


def test_chat_as_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything that the response knows, for another program."""
    with asked(name, "--json", "hi") as (_, arguments):
        assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["content"], told["reasoning"], told["provider"], told["model"]) == ("Grüße, Welt", "Hm.", name, "m-2026")
    assert (told["usage"]["prompt_tokens"], told["usage"]["completion_tokens"]) == (11, 5)


def test_chat_at_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--no-stream prints the same, -v says on stderr who answered."""
    with asked(name, "--no-stream", "-v", "hi") as (_, arguments):
        assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == "Grüße, Welt\n"
    assert f"{name}: ok" in err
    assert KEY not in err


def test_a_failure(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1, nothing on stdout, and the class of the vendor's own failure on stderr without the key."""
    status, headers, body, kind, _ = dialect_of(name).failures["401"]

    def refuse(server: Peer, connection: object, request: bytes) -> bool:
        connection.sendall(reply(body, status, **headers))  # type: ignore[attr-defined]
        return True

    with peer(refuse) as server:
        where = ["--provider", name, "--base-url", f"http://127.0.0.1:{server.port}", "--model", "m"]
        assert main(["chat", *where, "-v", "hi"]) == 1
        assert main(["check", *where]) == 1
    out, err = capsys.readouterr()
    assert kind.__name__ in err
    assert kind.__name__ in out  # of check, whose result it is
    assert KEY not in out + err


def test_a_stream_that_breaks(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What has been printed stays, ends with a line of its own, and the exit status says that it is not all."""
    dialect = dialect_of(name)
    events = dialect.events(ANSWER)
    at = next(at for at, event in enumerate(events) if b"Welt" in event)
    wire, _ = dialect.broken

    def broken(server: Peer, connection: object, request: bytes) -> bool:
        data = head(dialect) + b"".join(map(chunk, [*events[:at], wire])) + b"0\r\n\r\n"
        connection.sendall(data)  # type: ignore[attr-defined]
        return True

    with peer(broken) as server:
        where = ["--provider", name, "--base-url", f"http://127.0.0.1:{server.port}", "--model", "m"]
        assert main(["chat", *where, "hi"]) == 1
    out, err = capsys.readouterr()
    assert out == "Grüße, \n"
    assert err.startswith("copilot-router: ")


def test_a_good_check(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """check lists the models and asks none of them anything."""
    dialect = dialect_of(name)

    def list_models(server: Peer, connection: object, request: bytes) -> bool:
        connection.sendall(reply(dialect.models))  # type: ignore[attr-defined]
        return True

    with peer(list_models) as server:
        where = ["--provider", name, "--base-url", f"http://127.0.0.1:{server.port}"]
        assert main(["check", *where]) == 0
        assert [request.split(b" ")[0] for request in server.requests] == [b"GET"]
    assert "ok" in capsys.readouterr().out


def test_as_a_process(name: str) -> None:
    """The real command, with the prompt on standard input."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONPATH": root, PROVIDERS[name][1]: KEY}
    if os.environ.get("COPILOT_ROUTER_INSTALLED"):
        del environment["PYTHONPATH"]
    with asked(name) as (server, arguments):
        done = subprocess.run([sys.executable, "-m", "copilot_router", *arguments], input=b"How is it?\n", env=environment,
                              capture_output=True, timeout=30)  # fmt: skip
        assert found_in(r"How is it\?\n?", parsed(server.requests[0])[2])
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (0, f"Grüße, Welt{os.linesep}", "")

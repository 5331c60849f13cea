"""The command line, against a real loopback server."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import copilot_router
from copilot_router import OpenAIProvider, main


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: dict[str, Any], **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.reply(401 if "bad-key" in self.headers.get("Authorization", "") else 200, {"data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, model = body["messages"][-1]["content"], body.get("model")
        if text == "limit":
            return self.reply(429, {"error": {"message": "slow"}}, **{"Retry-After": "30"})
        if text == "bad":
            return self.reply(400, {"error": {"message": "no"}})
        if text == "silence":
            self.server.over.wait(5)  # type: ignore[attr-defined]
            return None
        answer = "[ESCALATE] no" if model == "weak" else f"{model}: {text}"
        return self.reply(200, {"model": model, "choices": [{"message": {"content": answer}, "finish_reason": "stop"}]})


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.over = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.over.set()  # type: ignore[attr-defined]
    server.shutdown()
    thread.join(5)
    server.server_close()


def test_chat_prints_the_answer(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The result on stdout, and with -v what happened on stderr."""
    assert main(["chat", "--base-url", url, "--model", "m", "-v", "hello"]) == 0
    out, err = capsys.readouterr()
    assert out == "m: hello\n"
    assert "openai: ok" in err


def test_chat_reads_standard_input(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With - and without an argument; as JSON; by a named provider."""
    for arguments in (["-"], []):
        monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin"))
        assert main(["chat", "--provider", "lmstudio", "--base-url", url, "--json", *arguments]) == 0
        assert json.loads(capsys.readouterr().out)["content"] == "None: from stdin"


def test_chat_escalates(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--escalation-model answers when the first model gives up."""
    assert main(["chat", "--base-url", url, "--model", "weak", "--escalation-model", "strong", "hi"]) == 0
    assert capsys.readouterr().out == "strong: hi\n"


def test_chat_from_the_environment(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without flags: what the environment names; --tiers restricts."""
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_MODEL", "m")
    assert main(["chat", "--model", "m", "--tiers", "openai", "hi"]) == 0
    assert capsys.readouterr().out == "m: hi\n"
    assert main(["chat", "--tiers", "nobody", "hi"]) == 2
    assert "no tier is called 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["limit"], 1, "try again in 30 s"),
        (["bad"], 1, "copilot-router: no"),
        (["--timeout", "0.1", "silence"], 124, "the deadline passed"),
        ([" "], 2, "the prompt is empty"),
        (["--timeout", "-1", "hi"], 2, "timeout=-1"),
    ],
)
def test_exit_statuses(url: str, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str) -> None:
    """1 every tier failed, 124 deadline, 2 usage; nothing on stdout."""
    assert main(["chat", "--base-url", url, "--model", "m", *arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_no_provider_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    """The message says what to set."""
    assert main(["chat", "hi"]) == 2
    assert "OPENAI_API_KEY or OPENAI_BASE_URL" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (BrokenPipeError, 0)])
def test_interruptions(url: str, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], status: int) -> None:
    """130 interrupted; a pipe that closes ends it quietly."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(OpenAIProvider, "stream", interrupt)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    if error is BrokenPipeError:
        monkeypatch.setattr(copilot_router, "_chat_command", interrupt)
    assert main(["chat", "--base-url", url, "hi"]) == status


def test_check(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """0 when every provider answers the ping, 1 when one does not; a line each, or JSON."""
    assert main(["check", "--base-url", url]) == 0
    assert capsys.readouterr().out == "openai  ok\n"
    monkeypatch.setenv("OPENAI_API_KEY", "bad-key")
    assert main(["check", "--base-url", url, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found[0]["name"] == "openai"
    assert found[0]["last_error"].startswith("AuthenticationError")
    assert found[0]["breaker"]["state"] == "open"


@pytest.mark.parametrize("how", [["-m", "copilot_router"], [copilot_router.__file__]])
def test_as_a_module_and_as_a_file(how: list[str]) -> None:
    """python -m copilot_router, and python copilot_router.py for a vendored copy."""
    path = os.pathsep.join((str(Path(copilot_router.__file__).parent), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, *how, "--version"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == f"copilot-router {copilot_router.__version__}"


def test_run_as_a_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is its own command."""
    monkeypatch.setattr(sys, "argv", ["copilot_router.py", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(copilot_router.__file__, run_name="__main__")
    assert end.value.code == 0
    monkeypatch.setattr(sys, "argv", ["copilot_router.py", "chat", "hi"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(copilot_router.__file__, run_name="__main__")
    assert end.value.code == 2

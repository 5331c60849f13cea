"""The command line, as a new user would use it: in this process, and as a vendored file in an empty directory."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from dialects import chunk, reply
from faults import Peer, chunked, event, peer

import copilot_router
from copilot_router import OpenAIProvider, main

MODULE = Path(copilot_router.__file__)
KEY = "sk-test-cli-key-1234567890"
#: Seconds that a test waits for what is to come at once.
SOON = 20.0
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"data: [DONE]\n\n"


class Gate:
    """A server whose behaviour is the prompt, and which stops in the middle of an answer until it is let go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()  #: a request has come to where it waits
        self.go = threading.Event()
        self.asked = 0  #: questions, not pings
        self.healthy = True
        self.silent = False  #: when pinged
        self.bodies: list[dict[str, Any]] = []
        self.url = ""

    def serve(self, server: Peer, connection: socket.socket, request: bytes) -> bool:
        head, _, data = request.partition(b"\r\n\r\n")
        if head.startswith(b"GET"):
            if self.silent:
                self.hold(server)
            bad = b"bad-key" in head or not self.healthy
            connection.sendall(reply({"data": []}, 401 if bad else 200))
            return True
        self.asked += 1
        body = json.loads(data)
        self.bodies.append(body)
        text, model = body["messages"][-1]["content"], body.get("model")
        if not self.healthy:
            connection.sendall(reply({"error": {"message": "no such page"}}, 404))
        elif text == "limit":
            connection.sendall(reply({"error": {"message": "slow"}}, 429, **{"Retry-After": "30"}))
        elif text == "limit once":
            slow = reply({"error": {"message": "slow"}}, 429, **{"retry-after-ms": "50"})
            connection.sendall(slow if self.asked < 3 else self.whole("at last", model))
        elif text == "bad":
            connection.sendall(reply({"error": {"message": "no"}}, 400))
        elif text in ("hold", "break", "go on"):
            connection.sendall(STREAM + chunk(event("one ")))
            self.hold(server)
            if text == "break":
                return False
            more = [event("line\n")] * 20000 if text == "go on" else []
            connection.sendall(chunked(event("two"), *more, event(finish="stop"), END))
        elif text == "silence":
            self.hold(server)
            connection.sendall(self.whole("after all", model))
        elif text == "lines":
            connection.sendall(STREAM + chunked(event("one\n"), event("Grüße, ☺"), event(finish="stop"), END))
        elif text == "weak":
            connection.sendall(self.whole("[ESCALATE] no", model))
        else:
            answer = "[ESCALATE] no" if model == "weak" else f"{model}: {text}"
            connection.sendall(self.whole(answer, model))
        return True

    def whole(self, text: str, model: Any) -> bytes:
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        return reply({"model": model, "choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})

    def hold(self, server: Peer) -> None:
        self.reached.set()
        while not self.go.wait(0.02) and not server.stopping.is_set():
            pass


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    with peer(gate.serve) as server:
        gate.url = server.url
        yield gate


@pytest.fixture
def url(gate: Gate) -> str:
    return gate.url


@pytest.fixture
def vendored(tmp_path: Path) -> Path:
    """A directory with nothing but the file."""
    folder = tmp_path / "vendored"
    folder.mkdir()
    shutil.copy(MODULE, folder / "copilot_router.py")
    return folder


@contextmanager
def started(folder: Path, *arguments: str, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """``python copilot_router.py …``, ended with the block."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", **settings.pop("env", {})}
    environment.pop("PYTHONUNBUFFERED", None)  # it would do the flushing
    settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    process = subprocess.Popen([sys.executable, "copilot_router.py", *arguments], cwd=folder, env=environment, **settings)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()


def run(folder: Path, *arguments: str, **settings: Any) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    with started(folder, *arguments, **settings) as process:
        out, err = process.communicate(timeout=2 * SOON)
        return process.returncode, out.decode(), (err or b"").decode()


class Terminal(io.StringIO):
    """Says that it is a terminal; ``seen`` is set when something is written that matches ``awaited``."""

    def __init__(self, text: str = "", awaited: str = ".") -> None:
        super().__init__(text)
        self.awaited = awaited
        self.seen = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if re.search(self.awaited, text):
            self.seen.set()
        return super().write(text)


class Recorder(io.StringIO):
    """Keeps what is written, piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


# -- chat


def test_chat_prints_the_answer(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The result on stdout, and with -v what happened on stderr."""
    assert main(["chat", "--base-url", url, "--model", "m", "hello"]) == 0
    assert capsys.readouterr() == ("m: hello\n", "")
    assert main(["chat", "--base-url", url, "--model", "m", "-v", "hello"]) == 0
    out, err = capsys.readouterr()
    assert out == "m: hello\n"
    assert "openai: ok" in err


def test_a_vendored_file_alone_answers(gate: Gate, vendored: Path) -> None:
    """``python copilot_router.py chat`` in an empty directory: the answer, nothing else, and no file left behind."""
    asked = ["chat", "--provider", "lmstudio", "--base-url", gate.url]
    assert run(vendored, *asked, "hello") == (0, "None: hello\n", "")
    assert gate.bodies[0]["messages"][-1] == {"role": "user", "content": "hello"}
    assert os.listdir(vendored) == ["copilot_router.py"]


def test_chat_streams(gate: Gate, vendored: Path) -> None:
    """A delta is in the reader's hands before the next one exists, through a pipe too."""
    with started(vendored, "chat", "--base-url", gate.url, "hold") as process:
        assert process.stdout
        assert os.read(process.stdout.fileno(), 100) == b"one "
        gate.go.set()
        assert process.stdout.read() == b"two\n"
        assert process.wait(SOON) == 0


@pytest.mark.parametrize(("more", "pieces"), [([], ["one ", "two", "\n"]), (["--no-stream"], ["one two", "\n"])])
def test_chat_at_once(gate: Gate, monkeypatch: pytest.MonkeyPatch, more: list[str], pieces: list[str]) -> None:
    """Delta by delta, or with --no-stream in one piece."""
    gate.go.set()
    written = Recorder()
    monkeypatch.setattr(sys, "stdout", written)
    assert main(["chat", "--base-url", gate.url, *more, "hold"]) == 0
    assert [piece for piece in written.pieces if piece] == pieces


@pytest.mark.parametrize("arguments", [["-"], []])
def test_chat_reads_standard_input(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """With - and without an argument; on a terminal it says that it waits."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin"))
    assert main(["chat", "--provider", "lmstudio", "--base-url", url, *arguments]) == 0
    assert capsys.readouterr() == ("None: from stdin\n", "")
    monkeypatch.setattr(sys, "stdin", Terminal("typed"))
    assert main(["chat", "--provider", "lmstudio", "--base-url", url, *arguments]) == 0
    out, err = capsys.readouterr()
    assert out == "None: typed\n"
    assert "reading the question from standard input; Ctrl-D ends it" in err


def test_standard_input_that_is_no_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A usage error that names the encoding, not a traceback."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert main(["chat", "--provider", "lmstudio"]) == 2
    assert capsys.readouterr() == ("", "copilot-router: standard input is not utf-8: convert it\n")


def test_a_terminal_that_cannot_show_a_letter(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the answer is shown, with a question mark for the letter."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert main(["chat", "--base-url", url, "lines"]) == 0
    assert shown.getvalue().decode().splitlines() == ["one", "Gr??e, ?"]


def test_chat_escalates(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--escalation-model answers when the first model gives up; when it does so too, that is a failure."""
    asked = ["chat", "--base-url", url, "--model", "weak", "--escalation-model", "strong"]
    assert main([*asked, "hi"]) == 0
    assert capsys.readouterr().out == "strong: hi\n"
    assert main([*asked, "weak"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("copilot-router: ")


def test_chat_from_the_environment(
    gate: Gate, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without flags: what the environment names; --tiers restricts, --escalation-model and --system go along."""
    monkeypatch.setenv("OPENAI_BASE_URL", gate.url)
    monkeypatch.setenv("OPENAI_MODEL", "m")
    monkeypatch.setenv("LMSTUDIO_BASE_URL", "http://127.0.0.1:9")
    assert main(["chat", "--model", "m", "--tiers", "openai, lmstudio", "hi"]) == 0
    assert main(["chat", "--tiers", "openai", "--system", "Be brief.", "hi"]) == 0
    assert gate.bodies[-1]["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert capsys.readouterr().out == "m: hi\nm: hi\n"
    assert main(["chat", "--tiers", "opnai", "hi"]) == 2
    assert "no tier is called 'opnai'. Did you mean 'openai'?" in capsys.readouterr().err
    monkeypatch.setenv("LMSTUDIO_BASE_URL", gate.url)
    assert main(["chat", "--escalation-model", "strong", "hi"]) == 0
    assert "[ESCALATE]" in gate.bodies[-1]["messages"][0]["content"]


def test_chat_waits_if_told_to(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    """--wait is the time that a call may sleep until its tier is ready again."""
    asked = ["chat", "--base-url", gate.url, "--no-stream"]
    assert main([*asked, "limit once"]) == 1
    assert capsys.readouterr().out == ""
    gate.asked = 0
    assert main([*asked, "--wait", "20", "limit once"]) == 0
    assert capsys.readouterr().out == "at last\n"


RESPONSE_KEYS = {
    "content", "tool_calls", "finish_reason", "usage", "model", "provider", "reasoning", "request_id", "cost", "latency",
    "attempts", "escalation", "raw", "carry",
}  # fmt: skip


def test_chat_as_json(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One object on one line, with keys that scripts may rely on; a failure prints none."""
    asked = ["chat", "--base-url", url, "--model", "m", "--json"]
    assert main([*asked, "hi"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert set(told) == RESPONSE_KEYS
    assert (told["content"], told["provider"], told["finish_reason"]) == ("m: hi", "openai", "stop")
    assert (told["usage"]["prompt_tokens"], told["usage"]["completion_tokens"]) == (3, 2)
    (attempt,) = told["attempts"]
    assert set(attempt) == {"tier", "model", "outcome", "error", "status", "latency", "usage"}
    assert main([*asked, "bad"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("copilot-router: ")


# -- how it ends


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["limit"], 1, "try again in 30 s"),
        (["bad"], 1, "copilot-router: no"),
        (["--timeout", "0.1", "silence"], 124, "the deadline passed"),
        ([" "], 2, "the prompt is empty"),
        (["--timeout", "-1", "hi"], 2, "timeout=-1"),
        (["--config", "x.toml", "hi"], 2, "--config and --provider or --base-url: give one or the other"),
    ],
)
def test_exit_statuses(url: str, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str) -> None:
    """1 every tier failed, 124 deadline, 2 usage; nothing on stdout."""
    assert main(["chat", "--base-url", url, "--model", "m", *arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "status", "out", "err"),
    [
        (["hi"], 0, "None: hi\n", ""),
        (["limit"], 1, "", "copilot-router: no tier answered: openai: RateLimited"),
        (["--timeout", "0.2", "silence"], 124, "", "copilot-router: "),
        (["--timeout", "soon", "hi"], 2, "", "usage: copilot-router chat"),
        (["--config", "missing.toml", "hi"], 2, "", "copilot-router: --config and --provider or --base-url"),
    ],
)
def test_exit_statuses_of_the_process(
    url: str, vendored: Path, arguments: list[str], status: int, out: str, err: str
) -> None:
    """What a shell sees: the status, the answer on stdout alone, the reason on stderr alone, never a traceback."""
    ended, printed, told = run(vendored, "chat", "--base-url", url, *arguments)
    assert (ended, printed) == (status, out)
    assert told.startswith(err)
    assert bool(told) == bool(status)
    assert "Traceback" not in told


@pytest.mark.parametrize("prompt", ["silence", "hold"])
def test_interrupted(gate: Gate, vendored: Path, prompt: str) -> None:
    """Ctrl-C before the answer and in its middle: status 130, no traceback."""
    with started(vendored, "chat", "--base-url", gate.url, prompt) as process:
        assert gate.reached.wait(SOON)
        if prompt == "hold":
            assert process.stdout
            assert os.read(process.stdout.fileno(), 100) == b"one "
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SOON)
    assert (process.returncode, out, err) == (130, b"", b"")


@pytest.mark.parametrize("more", [[], ["-v"]])
def test_a_pipe_that_closes(gate: Gate, vendored: Path, more: list[str]) -> None:
    """As with ``| head -1``: the reader goes away in the middle, and the command ends quietly."""
    with started(vendored, "chat", "--base-url", gate.url, *more, "go on") as process:
        assert process.stdout and process.stderr
        assert os.read(process.stdout.fileno(), 100) == b"one "
        process.stdout.close()
        gate.go.set()
        err = process.stderr.read().decode()
        assert process.wait(SOON) == 0
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert bool(err) == bool(more)


@pytest.mark.parametrize("command", ["check", "status"])
def test_a_pipe_that_is_closed_already(url: str, vendored: Path, command: str) -> None:
    """The other commands, whose output fits a buffer, do not complain at exit either."""
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        with started(vendored, command, env={"LMSTUDIO_BASE_URL": url}, stdout=theirs) as process:
            err = process.communicate(timeout=SOON)[1].decode()
    finally:
        os.close(theirs)
    assert process.returncode == 0
    assert "Pipe" not in err


def test_a_pipe_that_closes_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor leads nowhere from then on, so that Python's exit has nothing to complain of."""

    def closed(_: Any) -> NoReturn:
        raise BrokenPipeError

    turned: list[int] = []
    with monkeypatch.context() as patch:  # pytest's own capture needs dup2 afterwards
        patch.setattr(os, "dup2", lambda source, target: turned.append(target) or os.close(source))
        patch.setattr(copilot_router, "_chat_command", closed)
        assert main(["chat", "hi"]) == 0
    assert turned == [1]


def test_interrupted_in_this_process(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """130, from wherever it comes."""

    def interrupt(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(OpenAIProvider, "stream", interrupt)
    assert main(["chat", "--base-url", url, "hi"]) == 130


def test_an_answer_that_breaks(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    """What was printed stays and gets its line end; the status says that it is not all, and stderr why."""
    gate.go.set()
    assert main(["chat", "--base-url", gate.url, "break"]) == 1
    out, err = capsys.readouterr()
    assert out == "one \n"
    assert err.startswith("copilot-router: ")


def test_a_deadline_in_the_middle(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    """The same with the status of a deadline."""
    assert main(["chat", "--base-url", gate.url, "--timeout", "0.5", "hold"]) == 124
    out, err = capsys.readouterr()
    assert out == "one \n"
    assert err.startswith("copilot-router: ")


# -- what a new user meets first


def test_no_provider_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    """The message says what to set."""
    assert main(["chat", "hi"]) == 2
    assert "OPENAI_API_KEY or OPENAI_BASE_URL" in capsys.readouterr().err


def test_no_model_is_a_usage_error(
    gate: Gate, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the flag and the variable; beside a tier that needs none it is no error."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    assert main(["chat", "hi"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "copilot-router: anthropic has no model: pass --model, set ANTHROPIC_MODEL, or list models in the configuration\n"
    )
    monkeypatch.setenv("LMSTUDIO_BASE_URL", gate.url)
    assert main(["chat", "hi"]) == 0
    assert capsys.readouterr() == ("None: hi\n", "")
    assert main(["chat", "--tiers", "anthropic", "hi"]) == 2
    assert "anthropic has no model" in capsys.readouterr().err


def test_no_key_is_said_in_one_line(vendored: Path) -> None:
    """Not as a warning with a line of the source."""
    status, out, err = run(vendored, "chat", "--provider", "openai", "hi")
    assert (status, out) == (2, "")
    first, second = err.splitlines()
    assert first == "copilot-router: OpenAIProvider has no key: set OPENAI_API_KEY or pass api_key="
    assert second.startswith("copilot-router: openai has no model: pass --model")


def test_no_requests_is_a_usage_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A vendored copy where requests is not installed says what to install."""
    monkeypatch.setitem(sys.modules, "requests", None)
    monkeypatch.setattr(copilot_router, "_http", copilot_router._http.__wrapped__)
    assert main(["chat", "--provider", "lmstudio", "hi"]) == 2
    assert capsys.readouterr().err == "copilot-router: HTTP providers need PyPI's requests: pip install requests\n"


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("chat", ["--config", "--provider", "--base-url", "--model", "--escalation-model", "--system", "--timeout", "--wait",
                  "--tiers", "--json", "--no-stream", "-v"]),
        ("status", ["--config", "--json"]), ("check", ["--config", "--json"]), ("reset", ["TIER"]), ("init", ["FILE"]),
    ],
)  # fmt: skip
def test_help(command: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command, and each of its parts, teaches what there is and how it ends."""
    for arguments in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        told = capsys.readouterr().out
        assert "exit status: 0 answered, 1 every tier failed, 2 usage or configuration,\n124 deadline, 130 interrupted" in told
        assert max(map(len, told.splitlines())) <= 100
        assert command in told
    for flag in flags:
        assert flag in told


def test_help_shows_how_to_begin(
    gate: Gate, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The commands under --help work as they stand, given a server."""
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = re.findall(r"(?m)^  copilot-router (.*)", capsys.readouterr().out)
    assert len(shown) == 5
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMSTUDIO_BASE_URL", gate.url)
    for line in shown:
        assert main([word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]) == 0
    assert capsys.readouterr().out.count("Say hello.\n") == 3


@pytest.mark.parametrize("arguments", [[], ["chat", "--nonsense"], ["chat", "--timeout", "soon", "hi"], ["sing"], ["reset"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2 and the usage on stderr."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "usage: copilot-router" in err


def test_the_verbose_log_holds_no_secret(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """-v tells what the environment named and what was tried; never the key, the prompt or the answer."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    assert main(["chat", "-v", "a question"]) == 0
    out, err = capsys.readouterr()
    assert out == "None: a question\n"
    assert "openai: ok" in err
    assert KEY not in err
    assert "question" not in err


# -- progress


def test_progress_on_a_terminal(gate: Gate, vendored: Path) -> None:
    """When an answer takes long: which tier is asked, and for how long, on stderr; cleared when the answer comes."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    try:
        with started(vendored, "chat", "--base-url", gate.url, "silence", stderr=theirs) as process:
            shown = b""
            while b"2 s" not in shown:
                shown += os.read(ours, 1000)
            gate.go.set()
            assert process.stdout
            assert process.stdout.read() == b"after all\n"
            assert process.wait(SOON) == 0
        shown += os.read(ours, 1000)
    finally:
        os.close(theirs)
        os.close(ours)
    assert shown == b"\r\033[Kopenai: 1 s\r\033[Kopenai: 2 s\r\033[K"


@pytest.mark.parametrize("more", [[], ["--no-stream"], ["--json"]])
def test_progress_in_this_process(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """The same for all forms of the answer, which is untouched by it."""
    terminal = Terminal(awaited=r"openai: 1 s")
    monkeypatch.setattr(sys, "stderr", terminal)
    helper = threading.Thread(target=lambda: (terminal.seen.wait(SOON), gate.go.set()))
    helper.start()
    assert main(["chat", "--base-url", gate.url, *more, "silence"]) == 0
    helper.join()
    assert re.fullmatch(r"(\r\033\[Kopenai: \d s)+\r\033\[K", terminal.getvalue())
    assert "after all" in capsys.readouterr().out


def test_a_quick_answer_shows_no_progress(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that has nothing to wait for stays as it is."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["chat", "--base-url", url, "hi"]) == 0
    assert terminal.getvalue() == ""


def test_no_progress_where_nobody_looks(gate: Gate, vendored: Path) -> None:
    """A slow answer writes nothing to a stderr that is no terminal."""
    with started(vendored, "chat", "--base-url", gate.url, "silence") as process:
        assert gate.reached.wait(SOON)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)  # longer than a terminal would be left in silence
        gate.go.set()
        assert process.communicate(timeout=SOON) == (b"after all\n", b"")


# -- status, check, reset


@pytest.fixture
def configured(gate: Gate, vendored: Path) -> Path:
    """A configuration with a store: one failure opens a breaker for an hour."""
    path = vendored / "router.toml"
    path.write_text(f"""
        [chain]
        failure_threshold = 1
        recovery_timeout = 3600.0
        [store]
        type = "sqlite"
        path = {json.dumps(str(vendored / "breakers.db"))}
        refresh = 0.0
        [[tier]]
        name = "first"
        retries = 0
        [tier.provider]
        type = "lmstudio"
        base_url = {json.dumps(gate.url)}
        [[tier]]
        name = "last"
        role = "secondary"
        [tier.provider]
        type = "lmstudio"
        base_url = "http://127.0.0.1:9"
    """, encoding="utf-8")  # fmt: skip
    return path


def table(out: str) -> dict[str, list[str]]:
    """A printed table's rows by their first cell; every column begins at the same place in all rows."""
    lines = out.splitlines()
    starts = [found.start() for found in re.finditer(r"\S+( \S+)*", lines[0])]
    rows = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_status_shows_what_another_process_did(
    gate: Gate, configured: Path, vendored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A breaker that a chat of another process opened, in a table; check makes its trial due, a good answer closes it."""
    flags = ["--config", str(configured)]
    assert main(["status", *flags]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert table(out) == {
        "TIER": ["ROLE", "STATE", "FAILURES", "RETRY IN", "LAST REASON"],
        "first": ["primary", "closed", "0", "-", "-"],
        "last": ["secondary", "closed", "0", "-", "-"],
    }

    gate.healthy = False
    assert run(vendored, "chat", *flags, "--tiers", "first", "hi")[0] == 1
    assert main(["status", *flags]) == 0
    rows = table(capsys.readouterr().out)
    role, state, _, retry, reason = rows["first"]
    assert (role, state) == ("primary", "open")
    assert 3500 < int(retry.removesuffix(" s")) <= 3600
    assert "ProviderUnavailable" in reason
    assert rows["last"][1] == "closed"

    assert main(["status", *flags, "--json"]) == 0
    first, last = json.loads(capsys.readouterr().out)
    assert set(first) == {"name", "role", "models", "breaker", "calls", "failures", "last_error", "last_latency"}
    assert set(first["breaker"]) == {
        "state", "generation", "failures", "retry_after", "reason", "opened", "rejected", "stale",
    }  # fmt: skip
    assert (first["breaker"]["state"], last["breaker"]["state"]) == ("open", "closed")

    asked = gate.asked
    assert run(vendored, "chat", *flags, "--tiers", "first", "hi")[0] == 1
    assert gate.asked == asked  # open: nobody was asked
    gate.healthy = True
    assert main(["check", *flags]) == 1  # the other tier is refused
    assert table_of_check(capsys.readouterr().out) == {"first": "ok", "last": "ProviderUnavailable: refused"}
    assert main(["status", *flags]) == 0
    rows = table(capsys.readouterr().out)
    assert (rows["first"][1], rows["first"][3]) == ("open", "0 s")
    assert run(vendored, "chat", *flags, "--tiers", "first", "hi") == (0, "None: hi\n", "")
    assert main(["status", *flags]) == 0
    rows = table(capsys.readouterr().out)
    assert (rows["first"][1], rows["last"][1]) == ("closed", "open")


def table_of_check(out: str) -> dict[str, str]:
    return {name: rest.strip() for name, _, rest in (line.partition(" ") for line in out.splitlines())}


def test_reset(gate: Gate, configured: Path, vendored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It closes the breaker for every process, says what it was, and knows no tier of another name."""
    flags = ["--config", str(configured)]
    gate.healthy = False
    assert run(vendored, "chat", *flags, "--tiers", "first", "hi")[0] == 1
    gate.healthy = True
    assert main(["reset", *flags, "first"]) == 0
    assert capsys.readouterr() == ("first: was open, is closed\n", "")
    assert run(vendored, "chat", *flags, "--tiers", "first", "hi")[0] == 0
    assert main(["reset", *flags, "first", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"tier": "first", "was": "closed"}
    assert main(["reset", *flags, "frist"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Did you mean 'first'?" in err


def test_without_a_store_it_says_so(
    configured: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """status and reset of one process alone, whether no store is configured or the store does not answer."""
    monkeypatch.setenv("LMSTUDIO_BASE_URL", "http://127.0.0.1:9")
    for arguments in (["status"], ["reset", "lmstudio"]):
        assert main(arguments) == 0
        assert "lmstudio: no [store] is configured: other processes' breakers" in capsys.readouterr().err
    text = configured.read_text(encoding="utf-8").replace("breakers.db", "missing/breakers.db")
    configured.write_text(text, encoding="utf-8")
    for arguments in (["status"], ["reset", "first"]):
        assert main([*arguments, "--config", str(configured)]) == 0
        assert "the store does not answer: other processes' breakers" in capsys.readouterr().err


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


def test_check_has_a_limit(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    """--timeout is for each ping; a tier that is silent for so long fails."""
    gate.silent = True
    start = time.monotonic()
    assert main(["check", "--base-url", gate.url, "--timeout", "0.1"]) == 1
    assert time.monotonic() - start < 4  # and not the 5 s that are the default
    assert capsys.readouterr().out.startswith("openai  ProviderTimeout")


# -- as a program


@pytest.mark.parametrize("how", [["-m", "copilot_router"], [copilot_router.__file__]])
def test_as_a_module_and_as_a_file(how: list[str]) -> None:
    """python -m copilot_router, and python copilot_router.py for a vendored copy."""
    path = os.pathsep.join((str(MODULE.parent), os.environ.get("PYTHONPATH", "")))
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


def test_from_nothing_to_an_answer(gate: Gate, vendored: Path) -> None:
    """The five minutes of a new user: init, check, chat, status, in an empty directory."""
    environ = {"LMSTUDIO_BASE_URL": gate.url}
    status, out, err = run(vendored, "init", env=environ)
    assert (status, err) == (0, "")
    assert "chat --config copilot-router.toml Hello" in out
    flags = ["--config", "copilot-router.toml"]
    assert run(vendored, "check", *flags) == (0, "lmstudio  ok\n", "")
    assert run(vendored, "chat", *flags, "Hello") == (0, "None: Hello\n", "")
    status, out, err = run(vendored, "status", *flags)
    assert status == 0
    assert "lmstudio" in out
    assert "no [store] is configured" in err



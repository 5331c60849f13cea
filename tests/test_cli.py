"""The command line as a person meets it: mostly ``main([...])`` in this process, against a server
on this machine."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import copilot_router
from copilot_router import main

KEY = "sk-test-cli-key-1234567890"
REFUSED = "http://127.0.0.1:9/v1"
#: Escape, bell, C1, and the character that turns the direction of writing.
HOSTILE = "a\x1b]0;owned\x07\x9b2J\u202eb"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
Printed = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server. The prompt says how it behaves."""

    daemon_threads = True
    silent = False  #: when it is pinged
    healthy = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.go = threading.Event()  #: lets an answer that waits in its middle go on

    def handle_error(self, *_: Any) -> None:
        """A client that has gone away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def reply(self, body: Any, status: int = 200, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.heads.append(f"{self.path}\n{self.headers}")
        if self.server.silent:
            self.server.go.wait(20)
        bad = "bad-key" in str(self.headers) or not self.server.healthy
        self.reply({"error": {"message": f"no {HOSTILE}"}} if bad else {}, 401 if bad else 200)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        prompt = body["messages"][-1]["content"]
        if "bad-key" in str(self.headers):
            self.reply({"error": {"message": "wrong key"}}, 401)
        elif not self.server.healthy or prompt == "down":
            self.reply({"error": {"message": f"broken {HOSTILE}"}}, 500)
        elif prompt == "limit":
            self.reply({"error": {"message": "slow"}}, 429, Retry_After="30")
        elif prompt == "limit once" and len(self.server.bodies) < 3:
            self.reply({"error": {"message": "slow"}}, 429, retry_after_ms="50")
        elif prompt == "refuse":
            self.reply({"error": {"message": "not so"}}, 400)
        elif prompt in ("silence", "interrupt"):
            if prompt == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            self.server.go.wait(20)
            self.whole("after all", body)
        elif prompt in ("lines", "hold", "break", "hostile"):
            self.stream(prompt)
        else:
            weak = body.get("model") == "weak" or prompt == "give up"
            self.whole("[ESCALATE] too hard" if weak else f"you said {prompt}", body)

    def whole(self, text: str, body: dict[str, Any]) -> None:
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 21, "completion_tokens": 10}
        self.reply({"model": body.get("model"), "choices": [choice], "usage": usage})

    def stream(self, prompt: str) -> None:
        first = {"lines": "one\n", "hostile": f"{HOSTILE}\n\ttab"}.get(prompt, "one ")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.delta(first)
        if prompt == "hold":
            self.server.go.wait(20)
        if prompt != "break":
            self.delta("two", "stop")
            self.wfile.write(b"data: [DONE]\n\n")

    def delta(self, text: str, finish: str | None = None) -> None:
        event = {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: Patch) -> Iterator[Server]:
    monkeypatch.chdir(tmp_path)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.go.set()
            server.shutdown()
            thread.join()


class Terminal(io.StringIO):
    """Says that it is a terminal, and tells when a text has been written to it."""

    def __init__(self, text: str = "", awaited: str = "nothing", seen: Any = None) -> None:
        super().__init__(text)
        self.awaited, self.seen = awaited, seen

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.awaited in text:
            self.seen.set()
        return super().write(text)


def chat(server: Server, *more: str) -> list[str]:
    return ["chat", "--base-url", server.url, "--model", "m", *more]


def config(folder: Path, text: str, name: str = "copilot-router.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# -- chat: the answer


def test_chat_prints_the_answer_and_nothing_else(server: Server, capsys: Printed) -> None:
    assert main(chat(server, "hello")) == 0
    assert capsys.readouterr() == ("you said hello\n", "")
    assert server.bodies[0]["messages"][-1] == {"role": "user", "content": "hello"}


@pytest.mark.parametrize(("name", "path"), [("openai", "/v1/models"), ("lmstudio", "/v1/models"),
                                            ("ollama", "/api/tags"), ("anthropic", "/v1/models"),
                                            ("gemini", "/v1beta/models")])  # fmt: skip
def test_provider_base_url_and_api_key_env_say_who_is_asked_with_which_key(
    name: str, path: str, server: Server, capsys: Printed, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    aim = ["--provider", name, "--base-url", server.url, "--api-key-env", "MY_KEY"]
    assert main(["check", *aim]) == 0
    assert server.heads[0].startswith(path)
    assert KEY in server.heads[0]


def test_chat_streams_and_no_stream_prints_in_one_piece(server: Server, monkeypatch: Patch) -> None:
    class Pieces(io.StringIO):
        def write(self, text: str) -> int:
            pieces.extend([text] if text else [])
            return super().write(text)

    for more, expected in ((["lines"], ["one\n", "two", "\n"]),
                           (["--no-stream", "lines"], ["one\ntwo", "\n"])):  # fmt: skip
        pieces: list[str] = []
        monkeypatch.setattr(sys, "stdout", Pieces())
        assert main(chat(server, *more)) == 0
        assert pieces == expected


def test_chat_as_json_prints_the_whole_response(server: Server, capsys: Printed) -> None:
    assert main(chat(server, "--json", "hi")) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert (told["content"], told["provider"], told["model"]) == ("you said hi", "openai", "m")
    assert told["usage"]["prompt_tokens"] == 21
    assert [attempt["outcome"] for attempt in told["attempts"]] == ["ok"]


def test_chat_takes_its_tiers_from_the_environment(
    server: Server, capsys: Printed, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_MODEL", "m")
    monkeypatch.setenv("LMSTUDIO_BASE_URL", REFUSED)
    assert main(["chat", "--tiers", "openai, lmstudio", "--model", "m", "hi"]) == 0
    assert main(["chat", "--tiers", "openai", "--system", "Be brief.", "hi"]) == 0
    assert server.bodies[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert capsys.readouterr().out == "you said hi\n" * 2
    assert main(["chat", "--tiers", "opnai", "hi"]) == 2
    assert "'openai'" in capsys.readouterr().err


def test_chat_escalates_and_fails_if_the_stronger_model_gives_up_too(
    server: Server, capsys: Printed
) -> None:
    asked = ["chat", "--base-url", server.url, "--model", "weak", "--escalation-model", "strong"]
    assert main([*asked, "hi"]) == 0
    assert capsys.readouterr().out == "you said hi\n"
    assert main([*asked, "give up"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "openai" in err


def test_wait_lets_a_call_sleep_until_its_tier_is_ready(server: Server, capsys: Printed) -> None:
    assert main(chat(server, "limit once")) == 1
    server.bodies.clear()
    assert main(chat(server, "--wait", "20", "limit once")) == 0
    assert capsys.readouterr().out == "you said limit once\n"


# -- chat: the prompt


@pytest.mark.parametrize("prompt", [[], ["-"]])
def test_standard_input_is_the_prompt_where_none_is_given(
    prompt: list[str], server: Server, capsys: Printed, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert main(chat(server, *prompt)) == 0
    assert capsys.readouterr() == ("you said from a pipe\n", "")
    monkeypatch.setattr(sys, "stdin", Terminal("typed"))
    assert main(chat(server, *prompt)) == 0
    out, err = capsys.readouterr()
    assert out == "you said typed\n"
    assert "Ctrl-D" in err


@pytest.mark.parametrize("kind", ["pipe", "file"])
@pytest.mark.parametrize(("text", "sent"), [("some text\n", "sum up\n\nsome text\n"), ("", "sum up")])
def test_a_pipe_or_file_is_joined_to_a_given_prompt(
    kind: str, text: str, sent: str, server: Server, tmp_path: Path, monkeypatch: Patch
) -> None:
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    (tmp_path / "input").write_text(text)
    with open(reading) as pipe, open(tmp_path / "input") as file:
        monkeypatch.setattr(sys, "stdin", pipe if kind == "pipe" else file)
        assert main(chat(server, "sum up")) == 0
    assert server.bodies[0]["messages"][-1]["content"] == sent


def test_a_given_prompt_does_not_wait_for_other_kinds_of_standard_input(
    server: Server, monkeypatch: Patch
) -> None:
    closed = io.StringIO()
    closed.close()
    with open(os.devnull) as device:
        for stdin in (None, closed, device, Terminal("typed"), io.StringIO("no file")):
            monkeypatch.setattr(sys, "stdin", stdin)
            assert main(chat(server, "hi")) == 0
    assert {body["messages"][-1]["content"] for body in server.bodies} == {"hi"}


@pytest.mark.parametrize("stdin", [None, b"", b" \n", b"\xff\xfe"])
def test_no_prompt_and_one_that_is_no_text_are_usage_errors(
    stdin: bytes | None, server: Server, capsys: Printed, monkeypatch: Patch
) -> None:
    given = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", given)
    assert main(chat(server)) == 2
    assert main(chat(server, "half a character: \udcff")) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines()), server.bodies) == ("", 2, [])


def test_a_prompt_without_quotes_is_told_to_be_quoted(server: Server, capsys: Printed) -> None:
    with pytest.raises(SystemExit) as end:
        main(chat(server, "what", "is", "the", "sky"))
    assert end.value.code == 2
    assert '"what is the sky"' in capsys.readouterr().err


# -- how it ends


@pytest.mark.parametrize(
    ("arguments", "status", "parts"),
    [
        (["limit"], 1, ["RateLimited", "try again in"]),
        (["down"], 1, ["ServerError", "(2 times)"]),
        (["refuse"], 1, ["BadRequest", "not so"]),
        (["--timeout", "0.1", "silence"], 124, ["deadline"]),
        (["--wait", "-1", "hi"], 2, ["wait=-1"]),
        (["--tiers", "other", "hi"], 2, ["'other'"]),
        (["--api-key-env", "NOT_SET", "hi"], 2, ["--api-key-env", "NOT_SET"]),
        (["--config", "x.toml", "hi"], 2, ["--config", "--base-url"]),
    ],
)
def test_a_failure_has_its_exit_status_and_its_reason_in_words_and_as_json(
    arguments: list[str], status: int, parts: list[str], server: Server, capsys: Printed
) -> None:
    assert main(chat(server, *arguments)) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert [part for part in parts if part not in err] == []
    assert (server.url in err) == (status != 2)
    assert all(line.startswith("copilot-router: ") for line in err.splitlines())
    assert main(chat(server, "--json", *arguments)) == status
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["error"]["message"]
    assert issubclass(getattr(copilot_router, told["error"]["type"]), copilot_router.RouterError)
    assert bool(told.get("attempts")) == (status != 2)
    assert arguments != ["limit"] or 20 < told["retry_after"] <= 30
    assert all(part not in out for part in ("null", '""', "[]", "{}"))
    assert err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon"])
@pytest.mark.parametrize("command", [["chat", "hi"], ["check"]])
def test_a_timeout_that_is_not_above_zero_is_a_usage_error(
    command: list[str], value: str, capsys: Printed
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--timeout", value])
    assert end.value.code == 2
    assert "--timeout" in capsys.readouterr().err


def test_a_tier_that_is_not_running_is_named_with_its_address(
    capsys: Printed, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("LMSTUDIO_BASE_URL", "http://127.0.0.1:9")
    assert main(["chat", "hi"]) == 1
    assert f"lmstudio: refused at {REFUSED}: is it running?" in capsys.readouterr().err
    assert main(["check"]) == 1
    assert f"refused at {REFUSED}: is it running?" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["environment", "flag", "configuration"])
def test_a_wrong_key_names_the_variable_to_check_and_no_time_to_wait(
    how: str, server: Server, tmp_path: Path, capsys: Printed, monkeypatch: Patch
) -> None:
    variable = "OPENAI_API_KEY" if how == "environment" else "MY_KEY"
    monkeypatch.setenv(variable, "bad-key")
    flags = ["--base-url", server.url, "--api-key-env", "MY_KEY"] if how == "flag" else []
    if how == "environment":
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    if how == "configuration":
        config(tmp_path, f"""
            [[tier]]
            name = "cloud"
            [tier.provider]
            type = "openai"
            base_url = "{server.url}"
            api_key_env = "MY_KEY"
        """)  # fmt: skip
    assert main(["chat", *flags, "--model", "m", "hi"]) == 1
    err = capsys.readouterr().err
    assert f"check {variable}" in err
    assert server.url in err
    assert "try again" not in err
    assert main(["check", *flags]) == 1
    assert f"check {variable}" in capsys.readouterr().out


def test_a_broken_answer_keeps_its_text_ends_its_line_and_fails(
    server: Server, capsys: Printed
) -> None:
    for more, status in ((["break"], 1), (["--timeout", "0.5", "hold"], 124)):
        assert main(chat(server, *more)) == status
        out, err = capsys.readouterr()
        assert out == "one \n"
        assert server.url in err


@pytest.mark.parametrize(
    ("prompt", "left"), [("interrupt", ""), ("lines", "one\n"), ("hold", "one \n")]
)
def test_an_interrupt_ends_the_line_and_is_status_130(
    prompt: str, left: str, server: Server, capsys: Printed, monkeypatch: Patch
) -> None:
    """While the server is silent, and as soon as the first text is shown."""

    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            done = super().write(text)
            if text.startswith("one"):
                signal.raise_signal(signal.SIGINT)
            return done

    monkeypatch.setattr(sys, "stdout", shown := Interrupted())
    assert main(chat(server, prompt)) == 130
    assert (shown.getvalue(), capsys.readouterr().err) == (left, "")


# -- streams and terminals


def open_stream(kind: str) -> Any:
    if kind == "pipe":
        reading, writing = os.pipe()
        os.close(reading)
        return open(writing, "w")
    if kind == "closed":
        stream = io.StringIO()
        stream.close()
        return stream
    return open("/dev/full", "w") if kind == "full" else None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize(("kind", "status"), [("full", 1), ("none", 1), ("closed", 1), ("pipe", 0)])
@pytest.mark.parametrize("arguments", [["chat", "lines"], ["chat", "--json", "down"], ["check"],
                                       ["status"], ["reset", "openai"]])  # fmt: skip
def test_an_output_that_cannot_be_written_is_one_sentence(
    arguments: list[str], kind: str, status: int, server: Server, capsys: Printed, monkeypatch: Patch
) -> None:
    """A pipe whose reader has gone is no failure."""
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_MODEL", "m")
    monkeypatch.setattr(sys, "stdout", stream := open_stream(kind))
    assert main(arguments) == status
    err = capsys.readouterr().err
    assert err.count("standard output") == status
    if stream is not None:
        stream.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("kind", ["full", "none", "closed", "pipe"])
def test_a_standard_error_that_cannot_be_written_changes_nothing(
    kind: str, server: Server, monkeypatch: Patch, capsys: Printed
) -> None:
    monkeypatch.setattr(sys, "stderr", stream := open_stream(kind))
    assert main(chat(server, "-v", "hi")) == 0
    assert main(chat(server, "-v", "down")) == 1
    assert capsys.readouterr().out == "you said hi\n"
    if stream is not None:
        with pytest.raises(OSError) if kind in ("full", "pipe") else io.StringIO():
            stream.close()


def test_a_letter_that_the_terminal_lacks_does_not_stop_the_answer(
    server: Server, monkeypatch: Patch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert main(chat(server, "Grüße")) == 0
    assert shown.getvalue().decode().startswith("you said Gr")


def test_an_answer_cannot_steer_a_terminal_and_is_untouched_in_a_pipe(
    server: Server, capsys: Printed, monkeypatch: Patch
) -> None:
    assert main(chat(server, "hostile")) == 0
    assert capsys.readouterr().out == f"{HOSTILE}\n\ttabtwo\n"
    for more in ([], ["--no-stream"]):
        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        assert main(chat(server, *more, "hostile")) == 0
        assert STEERS.search(terminal.getvalue()) is None
        assert terminal.getvalue().endswith("b\n\ttabtwo\n")
        assert "\\x1b" in terminal.getvalue()


@pytest.mark.parametrize("arguments", [["chat", "down"], ["chat", "-v", "down"], ["check"],
                                       ["status"], ["reset", "cl\u202eoud"]])  # fmt: skip
def test_messages_and_names_cannot_steer_a_terminal(
    arguments: list[str], server: Server, tmp_path: Path, capsys: Printed
) -> None:
    server.healthy = False
    config(tmp_path, f"""
        [[tier]]
        name = "cl\\u202eoud"
        models = ["m"]
        [tier.provider]
        type = "lmstudio"
        base_url = "{server.url}"
    """)  # fmt: skip
    main(arguments)
    out, err = capsys.readouterr()
    assert STEERS.search(out.replace("\n", "") + err.replace("\n", "")) is None
    assert "cl\\u202eoud" in out + err


def test_verbose_says_each_sentence_once_and_the_price_with_two_digits(
    server: Server, tmp_path: Path, capsys: Printed, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    config(tmp_path, f"""
        [[tier]]
        name = "local"
        [tier.provider]
        type = "lmstudio"
        base_url = "{REFUSED}"
        [[tier]]
        name = "cloud"
        models = ["m"]
        prices = [1.0, 1.0]
        [tier.provider]
        type = "openai"
        base_url = "{server.url}"
        api_key_env = "MY_KEY"
    """)  # fmt: skip
    assert main(["chat", "-v", "a question"]) == 0
    out, err = capsys.readouterr()
    assert out == "you said a question\n"
    lines = err.splitlines()
    assert len(lines) == len(set(lines)) > 3
    assert all(line.startswith("copilot-router: ") for line in lines)
    assert f"local: refused at {REFUSED}: is it running?" in err
    assert "$0.000031" in lines[-1]
    assert KEY not in err
    assert "question" not in err


def test_verbose_is_not_glued_to_an_unfinished_answer(server: Server, monkeypatch: Patch) -> None:
    """Both streams of a terminal, in the order of writing."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(chat(server, "-v", "break")) == 1
    shown = terminal.getvalue()
    assert "one \n" in shown
    assert all(line.startswith(("copilot-router: ", "one ")) for line in shown.splitlines())


def test_a_person_who_waits_is_told_for_whom(server: Server, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal("", "openai", server.go))
    assert main(chat(server, "silence")) == 0
    assert terminal.getvalue().count("openai") == 1
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(chat(server, "hi")) == 0
    assert terminal.getvalue() == ""


# -- what a new user meets first


def test_no_arguments_print_the_help(capsys: Printed) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert "usage: copilot-router" in out
    assert err == ""


VARIABLES = ["LMSTUDIO_BASE_URL", "OLLAMA_HOST", "GOOGLE_API_KEY", "GEMINI_API_KEY",
             "OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"]  # fmt: skip
HELP = {
    "chat": ["--config", "--provider", "--base-url", "--api-key-env", "--model", "--system", "-v",
             "--escalation-model", "--timeout", "--wait", "--tiers", "--json", "--no-stream"],
    "status": ["--config", "--json"], "check": ["--config", "--json", "--timeout"],
    "reset": ["TIER", "--config"], "init": ["FILE"],
}  # fmt: skip


@pytest.mark.parametrize("command", HELP)
def test_help_names_flags_variables_and_exit_statuses(command: str, capsys: Printed) -> None:
    told = []
    for arguments in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        told.append(capsys.readouterr().out)
        assert end.value.code == 0
        assert all(f"{status} " in told[-1] for status in (0, 1, 2, 124, 130))
        assert max(map(len, told[-1].splitlines())) <= 100
    assert [name for name in (command, *VARIABLES) if name not in told[0]] == []
    assert [flag for flag in HELP[command] if flag not in told[1]] == []


@pytest.mark.parametrize("arguments", [["chat", "--nonsense"], ["sing"], ["reset"], ["--nonsense"]])
def test_wrong_usage_is_status_2(arguments: list[str], capsys: Printed) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: copilot-router" in capsys.readouterr().err


def test_no_provider_and_no_model_name_what_to_set(
    server: Server, capsys: Printed, monkeypatch: Patch
) -> None:
    for command in (["chat", "hi"], ["status"], ["check"]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert "OPENAI_API_KEY" in err
        assert "--provider" not in err or command != ["status"]
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    assert main(["chat", "hi"]) == 2
    assert "ANTHROPIC_MODEL" in capsys.readouterr().err
    monkeypatch.setenv("LMSTUDIO_BASE_URL", server.url)
    assert main(["chat", "hi"]) == 0  # LM Studio needs no model
    assert main(["chat", "--tiers", "anthropic", "hi"]) == 2
    assert capsys.readouterr().out == "you said hi\n"


# -- the configuration of this directory, status, check, reset

TWO_TIERS = """
[chain]
failure_threshold = 1
recovery_timeout = 3600.0
[store]
type = "sqlite"
path = "breakers.db"
refresh = 0.0
[[tier]]
name = "first"
retries = 0
[tier.provider]
type = "lmstudio"
base_url = "{url}"
[[tier]]
name = "last"
role = "secondary"
[tier.provider]
type = "lmstudio"
base_url = "http://127.0.0.1:9"
"""


def table(out: str) -> dict[str, list[str]]:
    """A printed table's rows by the tier; every column begins at the same place in all rows."""
    lines = out.splitlines()
    starts = [found.start() for found in re.finditer(r"\S+( \S+)*", lines[0])]
    ends = [*starts[1:], None]
    rows = [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in lines]
    return {row[1]: row[:1] + row[2:] for row in rows}


def test_a_configuration_in_this_directory_is_used_and_said(
    server: Server, tmp_path: Path, capsys: Printed, monkeypatch: Patch
) -> None:
    """Unless --config or --provider or --base-url say otherwise; it goes before the environment."""
    monkeypatch.setenv("OLLAMA_HOST", REFUSED)
    config(tmp_path, TWO_TIERS.format(url=server.url))
    other = config(tmp_path, TWO_TIERS.format(url=server.url).replace("first", "other"), "o.toml")
    for arguments in (["chat", "hi"], ["status"], ["check"], ["reset", "first"]):
        main(arguments)
        out, err = capsys.readouterr()
        assert "copilot-router.toml" in err
        assert "ollama" not in out + err
    assert main(["status", "--config", str(other)]) == 0
    assert main(chat(server, "hi")) == 0
    out, err = capsys.readouterr()
    assert "other" in out
    assert "copilot-router.toml" not in err


def test_status_check_and_reset_work_on_what_all_processes_share(
    server: Server, tmp_path: Path, capsys: Printed
) -> None:
    config(tmp_path, TWO_TIERS.format(url=server.url))
    assert main(["status"]) == 0
    out, err = capsys.readouterr()
    assert [row[0] for row in table(out).values()] == ["STATE", "closed", "closed"]
    assert len(err.splitlines()) == 1  # which configuration is used

    server.healthy = False
    assert main(["chat", "--tiers", "first", "hi"]) == 1
    assert main(["status"]) == 0
    rows = table(capsys.readouterr().out)
    assert (rows["first"][:2], rows["last"][:2]) == (["open", "primary"], ["closed", "secondary"])
    assert 3500 < int(rows["first"][3].removesuffix(" s")) <= 3600
    assert "ServerError" in rows["first"][4]
    asked = len(server.bodies)
    assert main(["chat", "--tiers", "first", "hi"]) == 1
    assert len(server.bodies) == asked  # its breaker is open: nobody was asked

    server.healthy = True
    capsys.readouterr()
    assert main(["check"]) == 1
    rows = table(capsys.readouterr().out)
    assert (rows["first"][0], rows["last"][0]) == ("ok", "failed")
    assert main(["reset", "first"]) == 0
    assert "open" in capsys.readouterr().out
    assert main(["reset", "frist"]) == 2
    assert "'first'" in capsys.readouterr().err
    assert main(["chat", "--tiers", "first", "hi"]) == 0
    assert capsys.readouterr().out == "you said hi\n"


def test_status_check_and_reset_as_json(server: Server, tmp_path: Path, capsys: Printed) -> None:
    config(tmp_path, TWO_TIERS.format(url=server.url))
    assert main(["check", "--json"]) == 1
    first, last = json.loads(capsys.readouterr().out)
    assert (first["name"], first["last_error"]) == ("first", None)
    assert last["last_error"].startswith("ProviderUnavailable")
    assert main(["status", "--json"]) == 0
    states = [tier["breaker"]["state"] for tier in json.loads(capsys.readouterr().out)]
    assert states == ["closed", "open"]
    assert main(["reset", "last", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"tier": "last", "was": "open"}


def test_a_store_that_is_missing_or_down_is_said(
    server: Server, tmp_path: Path, capsys: Printed
) -> None:
    text = TWO_TIERS.format(url=server.url)
    for said, told in ((text.replace("breakers.db", "missing/breakers.db"), "store"),
                       (re.sub(r"(?s)\[store\].*?(?=\[\[)", "", text, count=1), "[store]")):  # fmt: skip
        config(tmp_path, said)
        for arguments in (["status"], ["reset", "first"]):
            assert main(arguments) == 0
            assert told in capsys.readouterr().err.partition("\n")[2]


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colour_only_on_a_terminal_and_never_with_no_color(
    no_color: str, coloured: bool, server: Server, tmp_path: Path, monkeypatch: Patch
) -> None:
    config(tmp_path, TWO_TIERS.format(url=server.url))
    monkeypatch.setenv("NO_COLOR", no_color)
    for kind, expected in ((Terminal, coloured), (io.StringIO, False)):
        for command, words in (("check", ["ok", "failed"]), ("status", ["closed"])):
            monkeypatch.setattr(sys, "stdout", shown := kind())
            main([command])
            assert ("\033[" in shown.getvalue()) == expected
            assert all(word in shown.getvalue() for word in words)


def test_check_waits_no_longer_than_its_timeout(server: Server, capsys: Printed) -> None:
    server.silent = True
    start = time.monotonic()
    assert main(["check", "--base-url", server.url, "--timeout", "0.1"]) == 1
    assert time.monotonic() - start < 4.0  # and not the five seconds that are the default
    assert "ProviderTimeout" in capsys.readouterr().out


# -- as a program


def run(folder: Path, *arguments: str, python: str = "", shell: str = "", **environ: str) -> Any:
    """``python copilot_router.py …`` in a folder with nothing but the file."""
    if not (folder / "copilot_router.py").exists():
        shutil.copy(copilot_router.__file__, folder)
    words = [sys.executable, *python.split(), "copilot_router.py", *arguments]
    if shell:
        words = ["/bin/sh", "-c", f'"$@" {shell}', "sh", *words]
    return subprocess.run(words, cwd=folder, env={**os.environ, **environ}, capture_output=True,
                          stdin=subprocess.DEVNULL, text=True, timeout=60)  # fmt: skip


def test_a_vendored_file_goes_from_init_to_an_answer(server: Server, tmp_path: Path) -> None:
    done = run(tmp_path, "init", LMSTUDIO_BASE_URL=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    done = run(tmp_path, "check")
    assert (done.returncode, done.stderr) == (0, "copilot-router: using copilot-router.toml\n")
    done = run(tmp_path, "chat", "Hello")
    assert (done.returncode, done.stdout) == (0, "you said Hello\n")
    assert {path.name for path in tmp_path.iterdir()} == {"copilot_router.py", "copilot-router.toml"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize(("shell", "status"), [("> /dev/full", 1), (">&-", 1), ("<&- 2>&-", 0)])
def test_python_complains_of_no_stream_when_it_exits(
    shell: str, status: int, server: Server, tmp_path: Path
) -> None:
    done = run(tmp_path, *chat(server, "hi"), shell=shell)
    assert (done.returncode, len(done.stderr.splitlines())) == (status, status)
    assert "Traceback" not in run(tmp_path, "--help", shell=shell).stderr


def test_a_program_without_requests_says_what_to_install(tmp_path: Path) -> None:
    done = run(tmp_path, "chat", "--provider", "lmstudio", "hi", python="-S")
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install requests" in done.stderr

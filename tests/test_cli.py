"""The command line as a person meets it: mostly ``main([...])`` in this process, against a server
on this machine."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.server import HEAD, Server, delta, message, parsed, reply, sse

import copilot_router
from copilot_router import main

KEY = "sk-test-cli-key-1234567890"
REFUSED = "http://127.0.0.1:9/v1"
#: Escape, bell, C1, and the character that turns the direction of writing.
HOSTILE = "a\x1b]0;owned\x07\x9b2J\u202eb"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class ChatServer(Server):
    """An OpenAI-compatible server. The prompt says how it behaves."""

    silent = False  #: when it is pinged
    healthy = True

    def __init__(self) -> None:
        self.go = threading.Event()  #: lets an answer that waits in its middle go on
        super().__init__(self.serve)

    def serve(self, _: Server, connection: Any, request: bytes) -> bool:
        came = parsed(request)
        prompt = came.body["messages"][-1]["content"] if came.body else ""
        streamed = prompt in ("lines", "hold", "break", "hostile") and self.healthy
        if streamed:
            first = {"lines": "one\n", "hostile": f"{HOSTILE}\n\ttab"}.get(prompt, "one ")
            connection.sendall(HEAD + sse(delta(content=first)))
            if prompt == "hold":
                self.go.wait(20)
            if prompt != "break":
                connection.sendall(sse(delta("stop", content="two"), done=True))
        elif "bad-key" in str(came.headers) or not (self.healthy or came.body):
            connection.sendall(reply({"error": {"message": f"no {HOSTILE}"}}, 401))
        elif "seed" in came.body:
            connection.sendall(reply({"error": {"message": "Unsupported value: 'seed'"}}, 400))
        elif not came.body:
            if self.silent:
                self.go.wait(20)
            connection.sendall(reply({}))
        else:
            connection.sendall(self.said(prompt, came.body.get("model")))
        return not streamed

    def said(self, prompt: str, model: Any) -> bytes:
        error = {"error": {"message": f"not so {HOSTILE}"}}
        if not self.healthy or prompt in ("down", "refuse"):
            return reply(error, 400 if prompt == "refuse" else 500)
        if prompt == "limit" or (prompt == "limit once" and len(self.requests) < 3):
            return reply(error, 429, retry_after_ms="30000" if prompt == "limit" else "50")
        if prompt == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if prompt in ("silence", "interrupt"):
            self.go.wait(20)
        weak = model == "weak" or prompt == "give up"
        whole = message(content="[ESCALATE] too hard" if weak else f"you said {prompt}")
        return reply({**whole, "model": model,
                      "usage": {"prompt_tokens": 21, "completion_tokens": 10}})


class Cli:
    """Runs commands in this process, in an empty directory, against a server."""
    def __init__(self, folder: Path, server: ChatServer, patch: Any, capsys: Any) -> None:
        self.folder, self.server, self.patch, self.capsys = folder, server, patch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.capsys.readouterr()
        try:
            return (main(arguments), *self.capsys.readouterr())
        except SystemExit as end:
            return (int(str(end.code or 0)), *self.capsys.readouterr())

    def ask(self, *more: str) -> tuple[int, str, str]:
        return self("chat", "--base-url", self.server.url, "--model", "m", *more)

    def config(self, text: str = "", name: str = "copilot-router.toml", url: str = "") -> None:
        text = (text or TWO_TIERS).replace("{url}", url or self.server.url)
        (self.folder / name).write_text(text, encoding="utf-8")

    def streams(self, **streams: Any) -> None:
        for name, stream in streams.items():
            self.patch.setattr(sys, name, stream)

    def environ(self, **variables: str) -> None:
        for name, value in variables.items():
            self.patch.setenv(name, value)

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.server.bodies if body]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Iterator[Cli]:
    monkeypatch.chdir(tmp_path)
    with ChatServer() as server:
        try:
            yield Cli(tmp_path, server, monkeypatch, capsys)
        finally:
            server.go.set()


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


# -- chat: the answer
@pytest.mark.parametrize(("name", "path"), [("openai", "/v1/models"), ("lmstudio", "/v1/models"),
    ("ollama", "/api/tags"), ("anthropic", "/v1/models"), ("gemini", "/v1beta/models")])
def test_provider_base_url_and_api_key_env_say_who_is_asked_with_which_key(name: str, path: str,
        cli: Cli) -> None:
    cli.environ(MY_KEY=KEY)
    aim = ["--provider", name, "--base-url", cli.server.url, "--api-key-env", "MY_KEY"]
    assert cli("check", *aim)[0] == 0
    (asked,) = cli.server.requests
    assert asked.path.startswith(path) and KEY in str(asked.headers)


def test_chat_streams_and_no_stream_prints_in_one_piece(cli: Cli) -> None:
    class Pieces(io.StringIO):
        def write(self, text: str) -> int:
            pieces.extend([text] if text else [])
            return super().write(text)
    for more, expected in ((["lines"], ["one\n", "two", "\n"]),
                           (["--no-stream", "lines"], ["one\ntwo", "\n"])):
        pieces: list[str] = []
        cli.streams(stdout=Pieces())
        assert (cli.ask(*more)[0], pieces) == (0, expected)


def test_chat_as_json_prints_the_whole_response(cli: Cli) -> None:
    status, out, _ = cli.ask("--json", "hi")
    told = json.loads(out)
    assert (status, len(out.splitlines())) == (0, 1)
    assert (told["content"], told["provider"], told["model"]) == ("you said hi", "openai", "m")
    assert told["usage"]["prompt_tokens"] == 21
    assert [attempt["outcome"] for attempt in told["attempts"]] == ["ok"]


def test_chat_takes_its_tiers_from_the_environment(cli: Cli) -> None:
    cli.environ(OPENAI_BASE_URL=cli.server.url, OPENAI_MODEL="m", LMSTUDIO_BASE_URL=REFUSED)
    assert cli("chat", "--tiers", "openai, lmstudio", "--model", "m", "hi")[0] == 0
    assert cli("chat", "--tiers", "openai", "--system", "Be brief.", "hi")[1] == "you said hi\n"
    assert cli.server.bodies[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    status, _, err = cli("chat", "--tiers", "opnai", "hi")
    assert (status, "'openai'" in err) == (2, True)


def test_chat_escalates_and_fails_if_the_stronger_model_gives_up_too(cli: Cli) -> None:
    asked = ["chat", "--base-url", cli.server.url, "--model", "weak", "--escalation-model", "top"]
    assert cli(*asked, "hi")[:2] == (0, "you said hi\n") and cli(*asked, "give up")[:2] == (1, "")


# -- chat: the prompt
@pytest.mark.parametrize("prompt", [[], ["-"]])
def test_standard_input_is_the_prompt_where_none_is_given(prompt: list[str], cli: Cli) -> None:
    cli.streams(stdin=io.StringIO("from a pipe"))
    assert cli.ask(*prompt) == (0, "you said from a pipe\n", "")
    cli.streams(stdin=Terminal("typed"))
    status, out, err = cli.ask(*prompt)
    assert (status, out, "Ctrl-D" in err) == (0, "you said typed\n", True)


@pytest.mark.parametrize("kind", ["pipe", "file"])
@pytest.mark.parametrize(("text", "sent"),
    [("some text\n", "sum up\n\nsome text\n"), ("", "sum up")])
def test_a_pipe_or_file_joins_a_given_prompt(kind: str, text: str, sent: str, cli: Cli) -> None:
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    Path("input").write_text(text)
    with open(reading) as pipe, open("input") as file:
        cli.streams(stdin=pipe if kind == "pipe" else file)
        assert cli.ask("sum up")[0] == 0
    assert cli.prompts == [sent]


def test_a_given_prompt_does_not_wait_for_other_kinds_of_standard_input(cli: Cli) -> None:
    closed = io.StringIO()
    closed.close()
    with open(os.devnull) as device:
        for stdin in (None, closed, device, Terminal("typed"), io.StringIO("no file")):
            cli.streams(stdin=stdin)
            assert cli.ask("hi")[0] == 0
    assert cli.prompts == ["hi"] * 5


@pytest.mark.parametrize("stdin", [None, b"", b" \n", b"\xff\xfe"])
def test_no_prompt_and_one_that_is_no_text_are_usage_errors(stdin: bytes | None, cli: Cli) -> None:
    given = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    cli.streams(stdin=given)
    for prompt in ([], ["half a character: \udcff"]):
        status, out, err = cli.ask(*prompt)
        assert (status, out, len(err.splitlines()), cli.prompts) == (2, "", 1, [])
        assert ("convert it" in err) == (bool(prompt) or stdin == b"\xff\xfe")


# -- how it ends
@pytest.mark.parametrize(("arguments", "status", "parts"),
    [(["limit"], 1, ["RateLimited", "try again in"]), (["down"], 1, ["ServerError", "(2 times)"]),
        (["refuse"], 1, ["BadRequest", "not so"]),
        (["--timeout", "0.1", "silence"], 124, ["deadline"]),
        (["--wait", "-1", "hi"], 2, ["wait=-1"]), (["--tiers", "other", "hi"], 2, ["'other'"]),
        (["--api-key-env", "NOT_SET", "hi"], 2, ["--api-key-env", "NOT_SET"]),
        (["--provider=openai", "--api-key-env=NOT_SET", "hi"], 2, ["--api-key-env: the variable"]),
        (["--config", "x.toml", "hi"], 2, ["--config", "--base-url"])])
def test_a_failure_has_its_exit_status_and_its_reason_in_words_and_as_json(arguments: list[str],
        status: int, parts: list[str], cli: Cli) -> None:
    ended, out, err = cli.ask(*arguments)
    assert (ended, out) == (status, "")
    assert ([part for part in parts if part not in err], cli.server.url in err) == ([], status != 2)
    assert status == 124 or not re.search("no tier answered|deadline", err)
    assert all(line.startswith("copilot-router: ") for line in err.splitlines())
    ended, out, err = cli.ask("--json", *arguments)
    told = json.loads(out)
    assert (ended, bool(err)) == (status, True) and told["error"]["message"]
    assert issubclass(getattr(copilot_router, told["error"]["type"]), copilot_router.RouterError)
    assert bool(told.get("attempts")) == (status != 2)
    assert arguments != ["limit"] or 20 < told["retry_after"] <= 30


def test_a_tier_that_is_not_running_is_named_with_its_address(cli: Cli) -> None:
    cli.environ(LMSTUDIO_BASE_URL="http://127.0.0.1:9")
    status, out, err = cli("chat", "hi")
    assert (status, out) == (1, "") and f"lmstudio: refused at {REFUSED}: is it running?" in err
    status, out, _ = cli("check")
    assert (status, f"refused at {REFUSED}: is it running?" in out) == (1, True)


@pytest.mark.parametrize("how", ["environment", "flag", "configuration"])
def test_a_wrong_key_names_the_variable_to_check_and_no_time_to_wait(how: str, cli: Cli) -> None:
    variable = "OPENAI_API_KEY" if how == "environment" else "MY_KEY"
    cli.environ(**{variable: "bad-key"})
    flags = ["--base-url", cli.server.url, "--api-key-env", "MY_KEY"] if how == "flag" else []
    if how == "environment":
        cli.environ(OPENAI_BASE_URL=cli.server.url)
    if how == "configuration":
        cli.config('[[tier]]\nname = "cloud"\n[tier.provider]\ntype = "openai"\n'
                   'base_url = "{url}"\napi_key_env = "MY_KEY"\n')
    status, out, err = cli("chat", *flags, "--model", "m", "hi")
    assert (status, out, "try again" in err) == (1, "", False)
    assert all(part in err for part in (f"check {variable}", cli.server.url))
    status, out, _ = cli("check", *flags)
    assert (status, f"check {variable}" in out) == (1, True)
    cli.server.healthy = False
    cli.environ(**{variable: ""})
    assert "--api-key-env" in cli("check", "--base-url", cli.server.url)[1]


def test_a_broken_answer_keeps_its_text_ends_its_line_and_fails(cli: Cli) -> None:
    for more, status in ((["break"], 1), (["--timeout", "0.5", "hold"], 124)):
        ended, out, err = cli.ask(*more)
        assert (ended, out, cli.server.url in err) == (status, "one \n", True)


@pytest.mark.parametrize(("prompt", "left"),
    [("interrupt", ""), ("lines", "one\n"), ("hold", "one \n")])
def test_an_interrupt_ends_the_line_and_is_status_130(prompt: str, left: str, cli: Cli) -> None:
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            done = super().write(text)
            if text.startswith("one"):
                signal.raise_signal(signal.SIGINT)
            return done
    cli.streams(stdout=Interrupted())
    shown: Any = sys.stdout
    status, _, err = cli.ask(prompt)
    assert (status, shown.getvalue(), err) == (130, left, "")


# -- streams and terminals
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")


def lost(kind: str) -> Any:
    if kind == "pipe":
        reading, writing = os.pipe()
        os.close(reading)
        return open(writing, "w")
    stream = open("/dev/full", "w") if kind == "full" else io.StringIO()  # noqa: SIM115
    if kind == "closed":
        stream.close()
    return None if kind == "none" else stream


@needs_full
@pytest.mark.parametrize(("kind", "status"), [("full", 1), ("none", 1), ("closed", 1), ("pipe", 0)])
@pytest.mark.parametrize("arguments", [["chat", "lines"], ["chat", "--json", "down"], ["check"],
                                       ["status"], ["reset", "openai"]])
def test_an_output_that_cannot_be_written_is_one_sentence(arguments: list[str], kind: str,
        status: int, cli: Cli) -> None:
    """A pipe whose reader has gone is no failure."""
    cli.environ(OPENAI_BASE_URL=cli.server.url, OPENAI_MODEL="m")
    cli.streams(stdout=lost(kind))
    stream: Any = sys.stdout
    ended, _, err = cli(*arguments)
    assert (ended, err.count("standard output")) == (status, status)
    with contextlib.suppress(AttributeError):
        stream.close()  # nothing is left to be written, which would fail


@needs_full
@pytest.mark.parametrize("kind", ["full", "none", "closed", "pipe"])
def test_a_standard_error_that_cannot_be_written_changes_nothing(kind: str, cli: Cli) -> None:
    cli.streams(stderr=lost(kind))
    stream: Any = sys.stderr
    assert cli.ask("-v", "hi")[:2] == (0, "you said hi\n") and cli.ask("-v", "down")[:2] == (1, "")
    with contextlib.suppress(AttributeError, OSError):
        stream.close()


def test_a_letter_that_the_terminal_lacks_does_not_stop_the_answer(cli: Cli) -> None:
    shown = io.BytesIO()
    cli.streams(stdout=io.TextIOWrapper(shown, encoding="ascii"))
    assert cli.ask("Grüße")[0] == 0 and shown.getvalue().startswith(b"you said Gr")


def test_an_answer_cannot_steer_a_terminal_and_is_untouched_in_a_pipe(cli: Cli) -> None:
    assert cli.ask("hostile")[:2] == (0, f"{HOSTILE}\n\ttabtwo\n")
    for more in ([], ["--no-stream"]):
        cli.streams(stdout=Terminal())
        terminal: Any = sys.stdout
        assert cli.ask(*more, "hostile")[0] == 0 and STEERS.search(terminal.getvalue()) is None
        assert terminal.getvalue().endswith("b\n\ttabtwo\n") and "\\x1b" in terminal.getvalue()


@pytest.mark.parametrize("arguments", [["chat", "down"], ["chat", "-v", "down"], ["check"],
                                       ["status"], ["reset", "cl\u202eoud"]])
def test_messages_and_names_cannot_steer_a_terminal(arguments: list[str], cli: Cli) -> None:
    cli.server.healthy = False
    cli.config(TWO_TIERS.replace("first", "cl\\u202eoud"))
    _, out, err = cli(*arguments)
    assert STEERS.search(out.replace("\n", "") + err.replace("\n", "")) is None
    assert "cl\\u202eoud" in out + err


def test_verbose_says_each_sentence_once_and_the_price_with_two_digits(cli: Cli) -> None:
    cli.environ(MY_KEY=KEY)
    cli.config(
        f'[[tier]]\nname = "local"\nprovider = {{type = "lmstudio", base_url = "{REFUSED}"}}\n'
        '[[tier]]\nname = "cloud"\nmodels = ["m"]\nprices = [1.0, 1.0]\n'
        'provider = {type = "openai", base_url = "{url}", api_key_env = "MY_KEY"}\n')
    status, out, err = cli("chat", "-v", "a question")
    assert (status, out) == (0, "you said a question\n")
    lines = err.splitlines()
    assert len(lines) == len(set(lines)) > 3
    assert all(line.startswith("copilot-router: ") for line in lines)
    assert "local: ProviderUnavailable: refused" in lines[-1] and "$0.000031" in lines[-1]
    assert KEY not in err and "question" not in err


def test_verbose_tells_every_step(cli: Cli) -> None:
    asked = [cli.ask("-v", *more) for more in (["--wait", "20", "limit once"], ["down"],
        ["--model", "weak", "--escalation-model", "top", "hi"])]
    assert [status for status, _, _ in asked] == [0, 1, 0]
    told = "".join(err for _, _, err in asked)
    cli.config(TWO_TIERS.replace("retries = 0", "retries = 0\nparams = {seed = 1}"))
    told += "".join(cli("chat", "-v", "down")[2] for _ in range(2))
    for words in ("asking openai\n", r"asking openai once more, in 0\.\d s",
            "openai gave up: asking (openai|top)", r"no tier is ready: waiting 0\.\d s",
            "passing over first: CircuitOpen: first is open",
            "first does not take seed as it was sent: sending it corrected", "asking last\n",
            "the breaker of first was closed and is open: ServerError"):
        assert re.search(f"copilot-router: {words}", told), told


def test_verbose_is_not_glued_to_an_unfinished_answer(cli: Cli) -> None:
    """Both streams of a terminal, in the order of writing."""
    terminal = Terminal()
    cli.streams(stdout=terminal, stderr=terminal)
    assert cli.ask("-v", "break")[0] == 1
    lines = terminal.getvalue().splitlines()
    assert "one " in lines and all(line.startswith(("copilot-router: ", "one ")) for line in lines)


def test_a_person_who_waits_is_told_for_whom(cli: Cli) -> None:
    for prompt, times in (("silence", 1), ("hi", 0)):
        terminal = Terminal("", "openai", cli.server.go)
        cli.streams(stderr=terminal)
        assert (cli.ask(prompt)[0], terminal.getvalue().count("openai")) == (0, times)


# -- what a new user meets first
VARIABLES = ["LMSTUDIO_BASE_URL", "OLLAMA_HOST", "GOOGLE_API_KEY", "GEMINI_API_KEY",
    "OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"]
HELP = {"chat": ["--config", "--provider", "--base-url", "--api-key-env", "--model", "--system",
    "-v", "--escalation-model", "--timeout", "--wait", "--tiers", "--json", "--no-stream"],
    "status": ["--config", "--json"], "check": ["--config", "--json", "--timeout"],
    "reset": ["TIER", "--config"], "init": ["FILE"]}


@pytest.mark.parametrize("command", HELP)
def test_help_names_flags_variables_and_exit_statuses(command: str, cli: Cli) -> None:
    whole, part = cli("--help"), cli(command, "--help")
    assert whole == cli()  # which is what no arguments print
    for status, out, err in (whole, part):
        assert (status, err) == (0, "")
        assert all(f"{number} " in out for number in (0, 1, 2, 124, 130))
        assert max(map(len, out.splitlines())) <= 100
    assert [name for name in (command, *VARIABLES) if name not in whole[1]] == []
    assert [flag for flag in HELP[command] if flag not in part[1]] == []


@pytest.mark.parametrize(("arguments", "part"), [*((words.split(), "usage: copilot-router")
    for words in ("chat --nonsense", "sing", "reset", "--nonsense", "status -v")),
    *(([*command, "--timeout", value], "--timeout") for value in ("0", "-1", "nan", "soon")
        for command in (["chat", "hi"], ["check"])),
    (["chat", "what", "is", "the", "sky"], '"what is the sky"')])
def test_wrong_usage_is_status_2(arguments: list[str], part: str, cli: Cli) -> None:
    status, out, err = cli(*arguments)
    assert (status, out, part in err) == (2, "", True)


def test_no_provider_and_no_model_name_what_to_set(cli: Cli) -> None:
    for command in (["chat", "hi"], ["status"], ["check"]):
        status, _, err = cli(*command)
        assert (status, [name for name in VARIABLES if name not in err]) == (2, [])
        assert "--provider" not in err or command != ["status"]
    cli.environ(ANTHROPIC_API_KEY=KEY)
    status, _, err = cli("chat", "hi")
    assert (status, "ANTHROPIC_MODEL" in err) == (2, True)
    cli.environ(LMSTUDIO_BASE_URL=cli.server.url)  # which needs no model
    assert cli("chat", "hi") == (0, "you said hi\n", "")
    assert cli("chat", "--tiers", "anthropic", "hi")[0] == 2


# -- the configuration of this directory, status, check, reset
def table(out: str) -> dict[str, list[str]]:
    """A printed table's rows by the tier; every column begins at the same place in all rows."""
    lines = out.splitlines()
    starts = [found.start() for found in re.finditer(r"\S+( \S+)*", lines[0])]
    ends = [*starts[1:], None]
    rows = [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in lines]
    return {row[1]: row[:1] + row[2:] for row in rows}


def test_a_configuration_in_this_directory_is_used_and_said(cli: Cli) -> None:
    cli.environ(OLLAMA_HOST=REFUSED)
    cli.config()
    cli.config(TWO_TIERS.replace("first", "other"), "o.toml")
    for arguments in (["chat", "hi"], ["status"], ["check"], ["reset", "first"]):
        _, out, err = cli(*arguments)
        assert "copilot-router.toml" in err and "ollama" not in out + err
    status, out, err = cli("status", "--config", "o.toml")
    assert (status, "other" in out, "copilot-router.toml" in err) == (0, True, False)
    assert cli.ask("hi") == (0, "you said hi\n", "")


def test_status_check_and_reset_work_on_what_all_processes_share(cli: Cli) -> None:
    cli.config()
    status, out, err = cli("status")
    assert [row[0] for row in table(out).values()] == ["STATE", "closed", "closed"]
    assert (status, len(err.splitlines())) == (0, 1)  # which configuration is used
    cli.server.healthy = False
    assert cli("chat", "--tiers", "first", "hi")[0] == 1
    rows = table(cli("status")[1])
    assert (rows["first"][:2], rows["last"][:2]) == (["open", "primary"], ["closed", "secondary"])
    assert 3500 < int(rows["first"][3].removesuffix(" s")) <= 3600
    assert "ServerError" in rows["first"][4] and cli("chat", "--tiers", "first", "hi")[0] == 1
    assert cli.prompts == ["hi"]  # its breaker is open: the second call did not ask
    cli.server.healthy = True
    status, out, _ = cli("check")
    assert (status, table(out)["first"][0], table(out)["last"][0]) == (1, "ok", "failed")
    status, out, _ = cli("reset", "first")
    assert (status, "open" in out) == (0, True)
    status, _, err = cli("reset", "frist")
    assert (status, "'first'" in err) == (2, True)
    assert cli("chat", "--tiers", "first", "hi")[:2] == (0, "you said hi\n")


def test_status_check_and_reset_as_json(cli: Cli) -> None:
    cli.config()
    status, out, _ = cli("check", "--json")
    first, last = json.loads(out)
    assert (status, first["name"], first["last_error"]) == (1, "first", None)
    assert last["last_error"].startswith("ProviderUnavailable")
    for expected in (["closed", "open"], ["closed", "closed"]):
        tiers = json.loads(cli("status", "--json")[1])
        assert [tier["breaker"]["state"] for tier in tiers] == expected
        was = {"tier": "last", "was": expected[1]}
        assert json.loads(cli("reset", "last", "--json")[1]) == was


def test_a_store_that_is_missing_or_down_is_said(cli: Cli) -> None:
    down = TWO_TIERS.replace("breakers.db", "missing/breakers.db")
    missing = re.sub(r"(?s)\[store\].*?(?=\[\[)", "", TWO_TIERS, count=1)
    for text, told in ((down, "store"), (missing, "[store]")):
        cli.config(text)
        for arguments in (["status"], ["reset", "first"]):
            status, _, err = cli(*arguments)
            lost = int(text == down and arguments[0] == "reset")
            assert (status, told in err.partition("\n")[2]) == (lost, True)


def test_check_waits_no_longer_than_its_timeout(cli: Cli) -> None:
    cli.server.silent = True
    start = time.monotonic()
    status, out, _ = cli("check", "--base-url", cli.server.url, "--timeout", "0.1")
    assert time.monotonic() - start < 4.0  # and not the five seconds that are the default
    assert (status, "ProviderTimeout" in out) == (1, True)


# -- as a program
def run(*arguments: str, python: str = "", shell: str = "", **environ: str) -> Any:
    """``python copilot_router.py …`` in this directory, which has nothing but the file."""
    shutil.copy(copilot_router.__file__, "copilot_router.py")
    words = [sys.executable, *python.split(), "copilot_router.py", *arguments]
    if shell:
        words = ["/bin/sh", "-c", f'"$@" {shell}', "sh", *words]
    return subprocess.run(words, env={**os.environ, **environ}, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=60)


def test_a_vendored_file_goes_from_init_to_an_answer(cli: Cli) -> None:
    done = run("init", LMSTUDIO_BASE_URL=cli.server.url)
    assert (done.returncode, done.stderr, "--config" in done.stdout) == (0, "", False)
    assert run("check").returncode == 0 and "lmstudio" in run("status").stdout
    done = run("chat", "Hello")
    assert (done.returncode, done.stdout) == (0, "you said Hello\n")
    assert sorted(os.listdir()) == ["copilot-router.toml", "copilot_router.py"]


@needs_full
@pytest.mark.parametrize(("shell", "status"), [("> /dev/full", 1), (">&-", 1), ("<&- 2>&-", 0)])
def test_python_complains_of_no_stream_when_it_exits(shell: str, status: int, cli: Cli) -> None:
    done = run("chat", "--base-url", cli.server.url, "hi", shell=shell)
    assert (done.returncode, len(done.stderr.splitlines())) == (status, status)
    assert "Traceback" not in run("--help", shell=shell).stderr


def test_a_program_without_requests_says_what_to_install(cli: Cli) -> None:
    done = run("chat", "--provider", "lmstudio", "hi", python="-S")
    assert (done.returncode, done.stdout) == (2, "") and "pip install requests" in done.stderr


def test_the_file_is_its_own_command(cli: Cli) -> None:
    cli.patch.setattr(sys, "argv", ["copilot_router.py", "chat", "hi"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(copilot_router.__file__, run_name="__main__")
    assert end.value.code == 2

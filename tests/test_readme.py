"""The README and the guides are true: their code runs, their tables equal the module."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.clocks import FakeClock

import copilot_router
from copilot_router import (
    AllProvidersFailed,
    AnthropicProvider,
    Attempt,
    BadRequest,
    CircuitBreaker,
    ContentFiltered,
    EscalationFailed,
    Event,
    FailoverChain,
    GeminiProvider,
    LLMResponse,
    LMStudioProvider,
    OllamaProvider,
    OpenAIProvider,
    ProviderError,
    ProviderTier,
    RateLimited,
    RedisStore,
    RouterError,
    ScriptedProvider,
    ServerError,
    SQLiteStore,
    StreamInterrupted,
)

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES]
ALL_PAGES = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
HTTP_PROVIDERS = [
    OpenAIProvider,
    LMStudioProvider,
    OllamaProvider,
    AnthropicProvider,
    GeminiProvider,
]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def section(page: str, title: str) -> str:
    """What stands below a heading, up to the next one."""
    found = re.search(rf"(?ms)^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text_of(page))
    assert found, title
    return found[1]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of each table row, without headings and without the backquotes of code."""
    heading = True
    for line in text.splitlines():
        if not line.startswith("|"):
            heading = True
        elif line.startswith("|---"):
            heading = False
        elif not heading:
            yield [cell.strip() for cell in line.strip("|").split("|")]


def plain(cell: str) -> str:
    return cell.strip("`")


def by_name(path: Path) -> str:
    return path.stem


# ==== the code of the pages ====


def told(block: str) -> list[str]:
    """What a block says that it prints: the comment behind a print, and comments at its end."""
    lines = block.rstrip().splitlines()
    end = len(lines)
    while lines[end - 1].startswith("# "):
        end -= 1
    behind = [
        found[1] for line in lines[:end] if (found := re.search(r"print\(.*\)\s+# (.*)$", line))
    ]
    return behind + [line[2:] for line in lines[end:]]


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_python_blocks_run_and_print_what_their_comments_say(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        if "from flask" in block:
            pytest.importorskip("flask")
        exec(compile(block, page.name, "exec"), names)
        printed = [
            re.sub(r"\d+ ms", "0 ms", line.rstrip())
            for line in capsys.readouterr().out.splitlines()
        ]
        assert printed == told(block)


def readme_names() -> dict[str, Any]:
    pytest.importorskip("flask")
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(text_of("README.md"), "python")[1:]:
        exec(block, names)
    return names


def scripted(*script: Any) -> FailoverChain:
    return FailoverChain([ProviderTier("a", ScriptedProvider(script), retries=0)])


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        ("fine", 200, {"answer": "fine"}),
        (RateLimited("no", retry_after=30), 503, {"error": "no answer now", "retry_after": 30}),
        (ServerError("down"), 503, {"error": "no answer now"}),
        (ContentFiltered("no"), 422, {"error": "ContentFiltered"}),
        (BadRequest("no"), 422, {"error": "BadRequest"}),
    ],
)
def test_the_flask_view_of_the_readme_turns_each_outcome_into_a_status(
    answer: Any, status: int, body: dict[str, Any]
) -> None:
    names = readme_names()
    names["chain"] = scripted(answer)
    seen = names["app"].test_client().post("/ask", json={"question": "hi"})
    found = (
        {**seen.json, "retry_after": round(seen.json["retry_after"])}
        if seen.json.get("retry_after")
        else seen.json
    )
    assert seen.status_code == status
    assert body.items() <= found.items()


def test_the_stream_of_the_readme_says_when_an_answer_breaks_off(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = readme_names()
    names["chain"] = scripted(["to ", "the end"], ["half", ServerError("gone")])
    names["show"]("hi")
    names["show"]("hi")
    assert capsys.readouterr().out == "to the endhalf\n[broken off after 4 characters]\n"


def test_the_picture_of_the_readme_reaches_the_provider() -> None:
    names = readme_names()
    provider = ScriptedProvider(["a cat"])
    names["chain"] = FailoverChain([ProviderTier("a", provider)])
    assert names["describe"]("iVBORw0KGgo=") == "a cat"
    kinds = [part["type"] for part in provider.calls[0]["messages"][0]["content"]]
    assert kinds == ["text", "image_url"]


def tool_loop(*script: Any) -> tuple[str, list[Any]]:
    names: dict[str, Any] = {}
    exec(blocks(text_of("docs/tools.md"), "python")[0], names)
    provider = ScriptedProvider(script)
    answer = names["answer"](FailoverChain([ProviderTier("a", provider)]), "How is the weather?")
    return answer, provider.calls[-1]["messages"]


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("weather", {"city": "Bern"}, '"celsius": 21'),
        ("weather", {"town": "Bern"}, "error: "),
        ("weather", None, "error: the arguments were not a JSON object"),
        ("delete_all", {}, "error: there is no tool 'delete_all'"),
    ],
)
def test_the_tool_loop_gives_the_model_a_result_or_an_error(
    name: str, arguments: Any, result: str
) -> None:
    call = copilot_router.ToolCall("1", name, arguments)
    text, messages = tool_loop(LLMResponse(tool_calls=[call]), "Clear.")
    assert text == "Clear."
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert result in messages[-1]["content"]


def test_the_tool_loop_ends_when_the_model_never_answers() -> None:
    call = copilot_router.ToolCall("1", "weather", {"city": "Bern"})
    with pytest.raises(RuntimeError, match="5 rounds"):
        tool_loop(*[LLMResponse(tool_calls=[call])] * 5)


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_toml_blocks_build_a_chain(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-test")
    for block in blocks(page.read_text(encoding="utf-8"), "toml"):
        path = tmp_path / "router.toml"
        path.write_text(block.replace("/var/tmp", tmp_path.as_posix()), encoding="utf-8")
        with FailoverChain.from_config(path) as chain:
            assert [tier.name for tier in chain.tiers] == ["local", "strong"]
            assert chain.timeout == 60


COMMANDS = [
    command
    for page in ALL_PAGES
    for block in blocks(page.read_text(encoding="utf-8"), "sh")
    for line in block.splitlines()
    if (command := line.split("#")[0].split("|")[-1].strip())
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages_exist_with_their_flags(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program, what, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"(?m)^{re.escape(what)}:", text_of("Makefile")), command
    elif program == "copilot-router":
        with pytest.raises(SystemExit, match="0"):
            copilot_router.main([what, "--help"])
        known = set(re.findall(r"(?<!\w)--?[a-z-]+", capsys.readouterr().out))
        assert {word for word in arguments if word.startswith("-") and word != "-"} <= known
    else:
        assert program == "pip"


@pytest.mark.parametrize("page", ALL_PAGES, ids=by_name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        headings = re.findall(r"(?m)^#+ (.*)$", path.read_text(encoding="utf-8")) if anchor else []
        anchors = [
            re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
            for heading in headings
        ]
        assert not anchor or anchor in anchors, target


def test_the_readme_is_short_and_links_every_page() -> None:
    text = text_of("README.md")
    assert text.count("\n") <= 160
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    paragraphs = [part for part in outside.split("\n\n") if not re.match(r"[|\d-]", part.strip())]
    assert max(part.strip().count("\n") + 1 for part in paragraphs) <= 5
    for path in [
        *GUIDES,
        *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE")),
    ]:
        assert f"({path.relative_to(ROOT).as_posix()})" in text, path
    size = (ROOT / "copilot_router.py").stat().st_size / 1000
    said = re.search(r"about (\d+) kB", text)
    assert said
    assert abs(int(said[1]) - size) < 0.1 * size


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_lines_fit_a_screen(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    long = [line for line in text.splitlines() if len(line) > 105 and not line.startswith("|")]
    assert long == []


# ==== tables that repeat the module ====


def parameters(*functions: Any) -> dict[str, Any]:
    """Name and default of every argument, also of those that a class hands on to its base."""
    found: dict[str, Any] = {}
    for function in functions:
        for name, item in inspect.signature(function).parameters.items():
            if name not in ("self", "args") and item.kind not in (
                item.VAR_KEYWORD,
                item.VAR_POSITIONAL,
            ):
                found.setdefault(name, item.default)
    return found


def shown(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return "required"
    named = {time.monotonic: "time.monotonic", time.sleep: "time.sleep"}
    return named.get(default, repr(default)) if callable(default) else repr(default)


@pytest.mark.parametrize(
    ("title", "functions"),
    [
        ("FailoverChain", [FailoverChain]),
        ("One call", [FailoverChain.chat]),
        ("ProviderTier", [ProviderTier]),
        ("HTTP providers", [kind for provider in HTTP_PROVIDERS for kind in provider.__mro__[:-3]]),
        ("CircuitBreaker", [CircuitBreaker]),
        ("SQLiteStore", [SQLiteStore]),
        ("RedisStore", [RedisStore]),
    ],
)
def test_settings_and_their_defaults_are_those_of_the_signatures(
    title: str, functions: list[Any]
) -> None:
    table = {plain(row[0]): plain(row[1]) for row in rows(section("docs/settings.md", title))}
    assert table == {name: shown(default) for name, default in parameters(*functions).items()}


def test_options_of_a_call_are_those_that_a_provider_knows() -> None:
    """Each documented option is accepted by every provider class; a word beside them is not."""
    names = [plain(row[0]) for row in rows(section("docs/settings.md", "Options of a call"))]
    assert len(names) == 14
    for name in names:
        ProviderTier("a", OpenAIProvider("k", "http://127.0.0.1:9"), params={name: None})
    with pytest.raises(TypeError):
        FailoverChain([ProviderTier("a", OpenAIProvider("k", "http://127.0.0.1:9"))]).chat(
            "hi", temprature=1
        )


def test_limits_of_silence_are_those_of_the_providers() -> None:
    for kind in HTTP_PROVIDERS:
        expected = 60.0 if kind in (LMStudioProvider, OllamaProvider) else 12.0
        assert kind("a-key").first_token_timeout == expected


ENVIRONMENT = list(rows(section("docs/settings.md", "The environment")))


def test_from_env_makes_its_tiers_in_the_order_of_the_table() -> None:
    everything = {
        variable: "http://127.0.0.1:9"
        for row in ENVIRONMENT
        for variable in re.findall(r"`(\w+)`", row[1])
    }
    models = {plain(row[2]): "a-model" for row in ENVIRONMENT}
    with FailoverChain.from_env(everything | models) as chain:
        assert [tier.name for tier in chain.tiers] == [plain(row[0]) for row in ENVIRONMENT]


@pytest.mark.parametrize("row", ENVIRONMENT, ids=lambda row: plain(row[0]))
def test_from_env_makes_the_tiers_of_the_table(row: list[str]) -> None:
    name, variables, model = plain(row[0]), re.findall(r"`(\w+)`", row[1]), plain(row[2])
    for variable in variables:
        value = "http://127.0.0.1:9" if variable.endswith(("_URL", "_HOST")) else "a-key"
        with FailoverChain.from_env({variable: value, model: "a-model"}) as chain:
            assert [(tier.name, list(tier.models)) for tier in chain.tiers] == [(name, ["a-model"])]


PROVIDER_ROWS = list(rows(text_of("docs/providers.md").split("These servers")[0]))


def test_every_provider_class_has_a_row() -> None:
    assert [plain(row[0]) for row in PROVIDER_ROWS] == [kind.__name__ for kind in HTTP_PROVIDERS]


@pytest.mark.parametrize("row", PROVIDER_ROWS, ids=lambda row: plain(row[0]))
def test_addresses_and_variables_of_the_providers_are_true(
    row: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(copilot_router, plain(row[0]))
    assert kind("a-key").base_url == plain(row[2])
    (variable,) = [
        name for name in re.findall(r"`(\w+)`", row[3]) if name.endswith(("_URL", "_HOST"))
    ] or [None]
    if variable:
        monkeypatch.setenv(variable, "http://127.0.0.1:9/v1")
        assert "127.0.0.1:9" in kind("a-key").base_url


def test_every_server_of_the_second_table_can_be_built_and_has_a_paragraph() -> None:
    text = text_of("docs/providers.md")
    second = text.split("These servers")[1].split("## ")[0]
    for name, url, _ in rows(second):
        assert OpenAIProvider("a-key", plain(url)).base_url == plain(url)
        assert f"\n## {name}\n" in text
    for name in ("OpenAI", "LM Studio", "Ollama", "Anthropic", "Gemini"):
        assert f"\n## {name}\n" in text


def test_the_error_tree_and_its_policy_are_those_of_the_module() -> None:
    """Names, nesting, what follows and what the breaker learns."""
    found: dict[str, tuple[str, str, str]] = {}
    parents: list[str] = []
    for cell, _, then, breaker in rows(section("docs/errors.md", "The tree")):
        match = re.fullmatch(r"((?:[│├└ ] )*)(\w+)", plain(cell))
        assert match, cell
        depth = len(match[1]) // 2
        parents[depth:] = [match[2]]
        found[match[2]] = (parents[depth - 1] if depth else "Exception", then, breaker)
    expected = {
        name: (
            kind.__bases__[0].__name__,
            kind.then if issubclass(kind, ProviderError) else "",
            kind.breaker if issubclass(kind, ProviderError) else "",
        )
        for name in copilot_router.__all__
        if isinstance(kind := getattr(copilot_router, name), type) and issubclass(kind, RouterError)
    }
    assert found == expected


def attributes(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")} | (
        {field.name for field in dataclasses.fields(kind)}
        if dataclasses.is_dataclass(kind)
        else set()
    )


def test_tables_of_attributes_name_all_that_an_answer_and_an_attempt_have() -> None:
    text = section("docs/errors.md", "What one gets")
    answer, attempt = text.split("An error:")[0].split("One request")
    for part, kind in ((answer, LLMResponse), (attempt, Attempt)):
        names = {plain(row[0]).strip(".").removesuffix("()") for row in rows(part)}
        missing = attributes(kind) - names - {"has_tool_calls", "carry", "count", "index"}
        assert (names - attributes(kind), missing) == (set(), set())


def test_table_of_errors_names_attributes_that_they_have() -> None:
    text = section("docs/errors.md", "What one gets").split("An error:")[1]
    made = [
        ProviderError("x"),
        AllProvidersFailed("x"),
        EscalationFailed("x"),
        StreamInterrupted("x"),
    ]
    for name, of, _ in rows(text):
        kinds = re.findall(r"`(\w+)`", of) or ["ProviderError", "AllProvidersFailed"]
        for error in made:
            if type(error).__name__ in kinds:
                assert hasattr(error, plain(name).strip(".").removesuffix("()")), (name, error)


def test_events_hold_what_the_guide_and_the_docstring_say() -> None:
    """Every kind and every fact of a call with all kinds of steps stands in both tables."""
    table = rows(section("docs/operations.md", "Logs, events, metrics"))
    guide = {plain(row[0]): set(re.findall(r"`(\w+)`", row[2])) for row in table}
    seen: list[Event] = []
    tiers = [
        ProviderTier("a", ScriptedProvider([ServerError("x")] * 3), ["a"]),
        ProviderTier(
            "b",
            ScriptedProvider([RateLimited("x", retry_after=1), "[ESCALATE] no"]),
            ["b"],
            prices=(1, 2),
        ),
        ProviderTier("c", ScriptedProvider([BadRequest("x"), "ok"]), ["c"]),
        ProviderTier("d", ScriptedProvider(["never"]), ["d"], supports_tools=False),
    ]
    clock = FakeClock()
    chain = FailoverChain(
        tiers,
        escalation_model="c",
        failure_threshold=2,
        recovery_timeout=1.0,
        max_retry_after=0.5,
        wait=60.0,
        on_event=seen.append,
        clock=clock,
        sleep=clock.sleep,
    )
    assert chain.chat("hi", [{"type": "function", "function": {"name": "f"}}]).text == "ok"
    assert {event.kind for event in seen} == set(guide) - {"resend"}
    for event in seen:
        assert set(event.data) <= guide[event.kind], event.kind
        assert [name for name in event.data if f"``{name}``" not in str(Event.__doc__)] == []


def test_migration_says_as_much_as_the_module_can() -> None:
    """Names of this library in the right column of the tables are arguments, methods or classes."""
    known = set(copilot_router.__all__) | set(
        parameters(FailoverChain, ProviderTier, FailoverChain.chat)
    )
    for row in rows(text_of("docs/migration.md")):
        for name in re.findall(r"`(\w+)(?:=[^`]*)?`", row[1]):
            assert name in known | {"response_format"}, name


def test_the_version_has_an_entry_in_the_changelog() -> None:
    newest = re.search(r"(?m)^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", text_of("CHANGELOG.md"))
    assert newest
    assert newest[1] == copilot_router.__version__


def test_files_that_security_names_exist() -> None:
    text = text_of("SECURITY.md")
    named = set(re.findall(r"`(tests/\w+\.py)`", text))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []

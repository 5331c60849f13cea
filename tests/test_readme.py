"""The README and the guides are true: their code runs, and their tables equal the module."""

from __future__ import annotations

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

import copilot_router as cr
from copilot_router import (
    FailoverChain,
    LLMResponse,
    OpenAIProvider,
    ProviderTier,
    ScriptedProvider,
)

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES]
PAPERS = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
HTTP_PROVIDERS = [
    OpenAIProvider, cr.LMStudioProvider, cr.OllamaProvider, cr.AnthropicProvider, cr.GeminiProvider,
]  # fmt: skip


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
    """The cells of the rows of all tables, without the headings."""
    lines = text.splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("| ") and before.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def plain(cell: str) -> str:
    return cell.strip("`")


def name_of(cell: str) -> str:
    return cell.strip("`.").removesuffix("()")


def names_in(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def stem(path: Path) -> str:
    return path.stem


def first(row: list[str]) -> str:
    return plain(row[0])


# ==== the code of the pages ====


def told(block: str) -> list[str]:
    """What a block says that it prints: the comment behind a print, and comments at its end."""
    code = re.sub(r"(\n# .*)+\n$", "\n", block)
    behind = [
        found[1]
        for line in code.splitlines()
        if (found := re.search(r"print\(.*\)\s+# (.*)$", line))
    ]
    return behind + [line[2:] for line in block[len(code) :].splitlines() if line]


def run(page: Path, *, first: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs the Python blocks of a page, one after the other, in one namespace."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page.read_text(encoding="utf-8"), "python")[first:]:
        if "from flask" in block:
            pytest.importorskip("flask")
        exec(compile(block, page.name, "exec"), names)
        yield block, names


@pytest.mark.parametrize("page", PAGES, ids=stem)
def test_python_blocks_run_and_print_what_their_comments_say(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for block, _ in run(page):
        printed = [
            re.sub(r"\d+ ms", "0 ms", line.rstrip())
            for line in capsys.readouterr().out.splitlines()
        ]
        assert printed == told(block)


def readme(*script: Any) -> dict[str, Any]:
    """The names of the README, whose chain is one scripted tier."""
    *_, (_, names) = run(ROOT / "README.md", first=1)
    return with_chain(names, script)


def with_chain(names: dict[str, Any], script: tuple[Any, ...]) -> dict[str, Any]:
    names["provider"] = ScriptedProvider(script)
    names["chain"] = FailoverChain([ProviderTier("a", names["provider"], retries=0)])
    return names


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        ("fine", 200, {"answer": "fine"}),
        (cr.RateLimited("no", retry_after=30), 503, {"error": "no answer now", "retry_after": 30}),
        (cr.ContentFiltered("no"), 422, {"error": "ContentFiltered"}),
        (cr.BadRequest("no"), 422, {"error": "BadRequest"}),
    ],
)
def test_flask_view_of_the_readme_turns_each_outcome_into_a_status(
    answer: Any, status: int, body: dict[str, Any]
) -> None:
    seen = readme(answer)["app"].test_client().post("/ask", json={"question": "hi"})
    found = {
        name: round(value) if name == "retry_after" else value for name, value in seen.json.items()
    }
    assert (seen.status_code, found) == (status, body)


def test_stream_and_picture_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    names = readme(["to ", "the end"], ["half", cr.ServerError("gone")], "a cat")
    names["show"]("hi")
    names["show"]("hi")
    assert capsys.readouterr().out == "to the endhalf\n[broken off after 4 characters]\n"
    assert names["describe"]("iVBORw0KGgo=") == "a cat"
    sent = names["provider"].calls[-1]["messages"][0]["content"]
    assert [part["type"] for part in sent] == ["text", "image_url"]


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("weather", {"city": "Bern"}, '"celsius": 21'),
        ("weather", {"town": "Bern"}, "error: "),
        ("weather", None, "error: the arguments"),
        ("delete_all", {}, "error: there is no tool"),
    ],
)
def test_tool_loop_gives_the_model_a_result_or_an_error(
    name: str, arguments: Any, result: str
) -> None:
    _, names = next(run(ROOT / "docs" / "tools.md"))
    call = LLMResponse(tool_calls=[cr.ToolCall("1", name, arguments)])
    names = with_chain(names, (call, "Clear.", *[call] * 5))
    assert names["answer"](names["chain"], "How is the weather?") == "Clear."
    question, wanted, given = names["provider"].calls[-1]["messages"][:3]
    assert (question["role"], wanted["role"], given["role"]) == ("user", "assistant", "tool")
    assert result in given["content"]
    with pytest.raises(RuntimeError, match="5 rounds"):  # a model that never answers
        names["answer"](names["chain"], "How is the weather?")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")
@pytest.mark.parametrize(
    "block", [block for page in PAGES for block in blocks(text_of(str(page)), "toml")]
)
def test_toml_blocks_build_a_chain(
    block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-test")
    path = tmp_path / "router.toml"
    path.write_text(block.replace("/var/tmp", tmp_path.as_posix()), encoding="utf-8")
    with FailoverChain.from_config(path) as chain:
        assert [tier.name for tier in chain.tiers] == ["local", "strong"]


COMMANDS = [
    command
    for page in PAGES + PAPERS
    for line in "".join(blocks(text_of(str(page)), "sh")).splitlines()
    if (command := line.split("#")[0].split("|")[-1].strip())
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages_exist_with_their_flags(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program, what, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"(?m)^{re.escape(what)}:", text_of("Makefile")), command
        return
    assert program == "copilot-router"
    with pytest.raises(SystemExit, match="0"):
        cr.main([what, "--help"])
    known = set(re.findall(r"(?<!\w)--?[a-z-]+", capsys.readouterr().out))
    assert {word for word in arguments if word.startswith("-")} <= known


@pytest.mark.parametrize("page", PAGES + PAPERS, ids=stem)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https://)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        headings = re.findall(r"(?m)^#+ (.*)$", path.read_text(encoding="utf-8")) if anchor else []
        found = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
        assert not anchor or anchor in found, target


def test_readme_is_short_and_links_every_page() -> None:
    text = text_of("README.md")
    assert text.count("\n") <= 160
    paragraphs = re.sub(r"```.*?```", "", text, flags=re.DOTALL).split("\n\n")
    assert max(part.count("\n") + 1 for part in paragraphs if part.strip()[:1] not in "|-1") <= 5
    for path in [*GUIDES, *PAPERS, ROOT / "LICENSE"]:
        assert f"({path.relative_to(ROOT).as_posix()})" in text, path
    (size,) = re.findall(r"about (\d+) kB", text)
    assert float(size) == pytest.approx((ROOT / "copilot_router.py").stat().st_size / 1000, rel=0.1)


# ==== tables that repeat the module ====


def parameters(*functions: Any) -> dict[str, Any]:
    """Name and default of every argument, also of those that a class hands on to its base."""
    return {
        name: item.default
        for function in functions
        for name, item in inspect.signature(function).parameters.items()
        if name != "self" and item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)
    }


def shown(default: Any) -> str:
    known = {
        inspect.Parameter.empty: "required",
        time.monotonic: "time.monotonic",
        time.sleep: "time.sleep",
    }
    return known.get(default) or repr(default)


@pytest.mark.parametrize(
    ("title", "functions"),
    [
        ("FailoverChain", [FailoverChain]),
        ("One call", [FailoverChain.chat]),
        ("ProviderTier", [ProviderTier]),
        ("HTTP providers", [kind for one in HTTP_PROVIDERS for kind in one.__mro__[-4::-1]]),
        ("CircuitBreaker", [cr.CircuitBreaker]),
        ("SQLiteStore", [cr.SQLiteStore]),
        ("RedisStore", [cr.RedisStore]),
    ],
)
def test_settings_and_their_defaults_are_those_of_the_signatures(
    title: str, functions: list[Any]
) -> None:
    table = {first(row): plain(row[1]) for row in rows(section("docs/settings.md", title))}
    assert table == {name: shown(default) for name, default in parameters(*functions).items()}


def test_options_of_a_call_are_known_to_a_provider() -> None:
    for row in rows(section("docs/settings.md", "Options of a call")):
        ProviderTier("a", OpenAIProvider("k", "http://127.0.0.1:9"), params={first(row): None})
    with pytest.raises(TypeError, match="temperature"):
        FailoverChain([ProviderTier("a", OpenAIProvider("k", "http://127.0.0.1:9"))]).chat(
            "hi", temprature=1
        )


ENVIRONMENT = list(rows(section("docs/settings.md", "The environment")))


def test_from_env_makes_the_tiers_of_the_table_in_its_order() -> None:
    every = {}
    for name, variables, model in ENVIRONMENT:
        for variable in names_in(variables):
            one = {variable: "http://127.0.0.1:9", plain(model): "a-model"}
            with FailoverChain.from_env(one) as chain:
                assert [(tier.name, list(tier.models)) for tier in chain.tiers] == [
                    (plain(name), ["a-model"])
                ]
            every |= one
    with FailoverChain.from_env(every) as chain:
        assert [tier.name for tier in chain.tiers] == [first(row) for row in ENVIRONMENT]


def test_addresses_and_variables_of_the_providers_are_true(monkeypatch: pytest.MonkeyPatch) -> None:
    classes, servers = text_of("docs/providers.md").split("\n## ")[0].split("These servers")
    for (_, _, url, variables), kind in zip(rows(classes), HTTP_PROVIDERS, strict=True):
        assert kind("a-key").base_url == plain(url)
        assert kind("a-key").first_token_timeout == (60.0 if "localhost" in url else 12.0)
        for variable in names_in(variables):
            if variable.endswith(("_URL", "_HOST")):
                monkeypatch.setenv(variable, "http://127.0.0.1:9/v1")
                assert "127.0.0.1:9" in kind("a-key").base_url
    for _, url, _ in rows(servers):
        assert OpenAIProvider("a-key", plain(url)).base_url == plain(url)
    named = [row[0] for row in rows(servers)] + [
        "OpenAI",
        "LM Studio",
        "Ollama",
        "Anthropic",
        "Gemini",
    ]
    assert [name for name in named if f"\n## {name}\n" not in text_of("docs/providers.md")] == []


def test_error_tree_and_policy_are_those_of_the_module() -> None:
    """Names, nesting, what follows and what the breaker learns."""
    found: dict[str, tuple[str, str, str]] = {}
    parents: list[str] = []
    for cell, _, then, breaker in rows(section("docs/errors.md", "The tree")):
        indent, name = re.fullmatch(r"((?:[│├└ ] )*)(\w+)", plain(cell)).groups()  # type: ignore[union-attr]
        parents[len(indent) // 2 :] = [name]
        found[name] = (parents[-2] if indent else "Exception", then, breaker)
    kinds = [kind for kind in map(cr.__dict__.get, cr.__all__) if isinstance(kind, type)]
    assert found == {
        kind.__name__: (
            kind.__bases__[0].__name__,
            getattr(kind, "then", ""),
            getattr(kind, "breaker", ""),
        )
        for kind in kinds
        if issubclass(kind, cr.RouterError)
    }


def public(kind: type) -> set[str]:
    names = {
        name for name in (*dir(kind), *getattr(kind, "__dataclass_fields__", ())) if name[0] != "_"
    }
    return names - {"has_tool_calls", "carry", "count", "index"}


def test_tables_of_attributes_are_those_of_answers_attempts_and_errors() -> None:
    answer, attempt, error = re.split(
        "One request|An error:", section("docs/errors.md", "What one gets")
    )
    assert {name_of(row[0]) for row in rows(answer)} == public(LLMResponse)
    assert {name_of(row[0]) for row in rows(attempt)} == public(cr.Attempt)
    for cell, owners, _ in rows(error):
        for owner in names_in(owners) or ["AllProvidersFailed", "ProviderError"]:
            assert hasattr(getattr(cr, owner)("x"), name_of(cell)), (owner, cell)


def test_events_hold_what_the_guide_and_the_docstring_say() -> None:
    """Every kind and every fact of a call with all kinds of steps stands in both tables."""
    table = rows(section("docs/operations.md", "Logs, events, metrics"))
    guide = {first(row): set(names_in(row[2])) for row in table}
    seen: list[cr.Event] = []
    limited, gives_up = cr.RateLimited("x", retry_after=1), "[ESCALATE] no"
    tiers = [
        ProviderTier("a", ScriptedProvider([cr.ServerError("x")] * 3), ["a"]),
        ProviderTier("b", ScriptedProvider([limited, gives_up]), ["b"], prices=(1, 2)),
        ProviderTier("c", ScriptedProvider([cr.BadRequest("x"), "ok"]), ["c"]),
        ProviderTier("d", ScriptedProvider(["never"]), ["d"], supports_tools=False),
    ]
    clock = FakeClock()
    limits = {"failure_threshold": 2, "recovery_timeout": 1.0, "max_retry_after": 0.5, "wait": 60.0}
    hooks = {"on_event": seen.append, "clock": clock, "sleep": clock.sleep}
    chain = FailoverChain(tiers, escalation_model="c", **limits, **hooks)  # type: ignore[arg-type]
    assert chain.chat("hi", [{"type": "function", "function": {"name": "f"}}]).text == "ok"
    assert {event.kind for event in seen} == set(guide) - {"resend"}
    for event in seen:
        assert set(event.data) <= guide[event.kind], event.kind
        assert [name for name in event.data if f"``{name}``" not in str(cr.Event.__doc__)] == []


def test_newest_entry_of_the_changelog_is_this_version() -> None:
    assert re.findall(r"(?m)^## \[([\d.]+)\]", text_of("CHANGELOG.md"))[0] == cr.__version__


def test_files_that_security_names_exist() -> None:
    named = set(re.findall(r"`(tests/\w+\.py)`", text_of("SECURITY.md")))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []

"""The README and the guides are true: their code runs, and their tables equal the module."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from support import pages
from support.fakes import VirtualClock
from support.pages import PAGES, PAPERS, blocks, names_in, rows, run_blocks, section, text_of

import copilot_router as cr
from copilot_router import FailoverChain, OpenAIProvider, ProviderTier, ScriptedProvider

HTTP_PROVIDERS = [OpenAIProvider, cr.LMStudioProvider, cr.OllamaProvider, cr.AnthropicProvider,
    cr.GeminiProvider]


# -- the code of the pages
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_python_blocks_run_and_print_what_their_comments_say(page: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for block, _ in run_blocks(page):
        printed = re.sub(r"\d+ ms", "0 ms", capsys.readouterr().out).splitlines()
        assert [line.rstrip() for line in printed] == pages.told(block)


def page_with_chain(page: str, *script: Any) -> tuple[dict[str, Any], ScriptedProvider]:
    """The names of a page, whose chain is replaced by one scripted tier; and that provider."""
    *_, (_, names) = run_blocks(page)
    provider = ScriptedProvider(script)
    names["chain"] = FailoverChain([ProviderTier("a", provider, retries=0)])
    return names, provider


NOT_NOW = {"error": "no answer now", "retry_after": pytest.approx(30, abs=1)}


@pytest.mark.parametrize(("answer", "status", "body"), [("fine", 200, {"answer": "fine"}),
    (cr.RateLimited("no", retry_after=30), 503, NOT_NOW),
    (cr.ContentFiltered("no"), 422, {"error": "ContentFiltered"}),
    (cr.BadRequest("no"), 422, {"error": "BadRequest"})])
def test_flask_view_of_the_readme_turns_each_outcome_into_a_status(answer: Any, status: int,
        body: dict[str, Any]) -> None:
    names, _ = page_with_chain("README.md", answer)
    seen = names["app"].test_client().post("/ask", json={"question": "hi"})
    assert seen.status_code == status and seen.json == body


def test_stream_and_picture_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    script = (["to ", "the end"], ["half", cr.ServerError("gone")], "a cat")
    names, provider = page_with_chain("README.md", *script)
    capsys.readouterr()
    names["show"]("hi")
    names["show"]("hi")
    assert capsys.readouterr().out == "to the endhalf\n[broken off after 4 characters]\n"
    assert names["describe"]("iVBORw0KGgo=") == "a cat"
    sent = provider.calls[-1]["messages"][0]["content"]
    assert [part["type"] for part in sent] == ["text", "image_url"]


@pytest.mark.parametrize(("name", "arguments", "result"), [
    ("weather", {"city": "Bern"}, '"celsius": 21'), ("weather", {"town": "Bern"}, "error: "),
    ("weather", None, "error: the arguments"), ("delete_all", {}, "error: there is no tool")])
def test_tool_loop_gives_the_model_a_result_or_an_error(name: str, arguments: Any,
        result: str) -> None:
    call = cr.LLMResponse(tool_calls=[cr.ToolCall("1", name, arguments)])
    names, provider = page_with_chain("docs/tools.md", call, "Clear.", *[call] * 5)
    assert names["answer"](names["chain"], "How is the weather?") == "Clear."
    question, wanted, given = provider.calls[-1]["messages"][:3]
    assert (question["role"], wanted["role"], given["role"]) == ("user", "assistant", "tool")
    assert result in given["content"]
    with pytest.raises(RuntimeError, match="5 rounds"):  # a model that never answers
        names["answer"](names["chain"], "How is the weather?")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")
@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page, "toml")])
def test_toml_blocks_build_a_chain(block: str, monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-test")
    path = tmp_path / "router.toml"
    path.write_text(block.replace("/var/tmp", tmp_path.as_posix()), encoding="utf-8")
    with FailoverChain.from_config(path) as chain:
        assert [tier.name for tier in chain.tiers] == ["local", "strong"]


LINES = [line for page in PAGES + PAPERS for line in "".join(blocks(page, "sh")).splitlines()]


@pytest.mark.parametrize("command", [line.split("#")[0].split("|")[-1].strip() for line in LINES])
def test_commands_of_the_pages_exist_with_their_flags(command: str,
        capsys: pytest.CaptureFixture[str]) -> None:
    program, what, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"(?m)^{re.escape(what)}:", text_of("Makefile")), command
        return
    assert program == "copilot-router"
    with pytest.raises(SystemExit, match="0"):
        cr.main([what, "--help"])
    known = set(re.findall(r"(?<!\w)--?[a-z-]+", capsys.readouterr().out))
    assert {word for word in arguments if word.startswith("-")} <= known


@pytest.mark.parametrize("page", PAGES + PAPERS, ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\((?!https://)([^)\s]+)\)", pages.without_code(page)):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        headings = re.findall(r"(?m)^#+ (.*)$", text_of(path)) if anchor else []
        found = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
        assert not anchor or anchor in found, target


def test_readme_is_short_and_links_every_page() -> None:
    text = text_of("README.md")
    assert text.count("\n") <= 160
    paragraphs = [part.strip() for part in pages.without_code("README.md").split("\n\n")]
    assert max(part.count("\n") + 1 for part in paragraphs if part[:1] not in "|-1") <= 5
    for path in [*PAGES[1:], *PAPERS, pages.ROOT / "LICENSE"]:
        assert f"({path.relative_to(pages.ROOT).as_posix()})" in text, path
    (size,) = re.findall(r"about (\d+) kB", text)
    found = len(text_of("copilot_router.py").encode()) / 1000
    assert float(size) == pytest.approx(found, rel=0.1)


# -- tables that repeat the module
@pytest.mark.parametrize(("title", "functions"), [
    ("FailoverChain", [FailoverChain]), ("One call", [FailoverChain.chat]),
    ("ProviderTier", [ProviderTier]),
    ("HTTP providers", [kind for one in HTTP_PROVIDERS for kind in one.__mro__[-4::-1]]),
    ("CircuitBreaker", [cr.CircuitBreaker]), ("SQLiteStore", [cr.SQLiteStore]),
    ("RedisStore", [cr.RedisStore])])
def test_settings_and_their_defaults_are_those_of_the_signatures(title: str,
        functions: list[Any]) -> None:
    table = {name: default for name, default, _ in rows(section("docs/settings.md", title))}
    assert table == pages.parameters(*functions)
    provider = OpenAIProvider("k", "http://127.0.0.1:9")  # which knows all options of a call
    for option, *_ in rows(section("docs/settings.md", "Options of a call")):
        ProviderTier("a", provider, params={option: None})


def test_from_env_makes_the_tiers_of_the_table_in_its_order() -> None:
    table, every = list(rows(section("docs/settings.md", "The environment"))), {}
    for name, variables, model in table:
        for variable in names_in(variables):
            one = {variable: "http://127.0.0.1:9"[7 * variable.endswith("_KEY"):], model: "a-model"}
            with FailoverChain.from_env(one) as chain:
                (tier,) = chain.tiers
                assert (tier.name, list(tier.models)) == (name, ["a-model"])
            every |= one
    with FailoverChain.from_env(every) as chain:
        assert [tier.name for tier in chain.tiers] == [row[0] for row in table]


def test_addresses_and_variables_of_the_providers_are_true(monkeypatch: pytest.MonkeyPatch) -> None:
    classes, servers = text_of("docs/providers.md").split("\n## ")[0].split("These servers")
    for (name, _, url, variables), kind in zip(rows(classes), HTTP_PROVIDERS, strict=True):
        assert (name, kind("a-key").base_url) == (kind.__name__, url)
        assert kind("a-key").first_token_timeout == (60.0 if "localhost" in url else 12.0)
        assert kind("a-key", stream_upstream=False).first_token_timeout == float("inf")
        for variable in names_in(variables):
            if variable.endswith(("_URL", "_HOST")):
                monkeypatch.setenv(variable, "http://127.0.0.1:9/v1")
                assert "127.0.0.1:9" in kind("a-key").base_url
    named = ["OpenAI", "LM Studio", "Ollama", "Anthropic", "Gemini"]
    for name, url, _ in rows(servers):
        assert OpenAIProvider("a-key", url).base_url == url
        named.append(name)
    assert [name for name in named if f"\n## {name}\n" not in text_of("docs/providers.md")] == []


def test_error_tree_and_policy_are_those_of_the_module() -> None:
    found, parents = {}, ["Exception"]
    for cell, _, then, breaker in rows(section("docs/errors.md", "The tree")):
        name = cell.lstrip("│├└ ")
        depth = (len(cell) - len(name)) // 2
        parents[depth + 1 :] = [name]
        found[name] = (parents[depth], then, breaker)
    kinds = [kind for kind in map(cr.__dict__.get, cr.__all__) if isinstance(kind, type)]
    errors = [kind for kind in kinds if issubclass(kind, cr.RouterError)]
    expected = {}
    for kind in errors:
        policy = (getattr(kind, "then", ""), getattr(kind, "breaker", ""))
        expected[kind.__name__] = (kind.__bases__[0].__name__, *policy)
    assert found == expected


def test_table_of_attributes_is_that_of_answers_attempts_and_errors() -> None:
    found: dict[str, set[str]] = {}
    for name, owners, _ in rows(section("docs/errors.md", "What one gets")):
        for owner in names_in(owners):
            found.setdefault(owner, set()).add(name.strip(".()"))
    assert found.pop("LLMResponse") == pages.public(cr.LLMResponse)
    assert found.pop("Attempt") == pages.public(cr.Attempt)
    for owner, names in found.items():
        assert [name for name in names if not hasattr(getattr(cr, owner)("x"), name)] == [], owner


def test_events_hold_what_the_guide_and_the_docstring_say() -> None:
    table = rows(section("docs/operations.md", "Logs, events, metrics"))
    guide = {kind: set(names_in(data)) for kind, _, data in table}
    seen: list[cr.Event] = []
    limited, gives_up = cr.RateLimited("x", retry_after=1), "[ESCALATE] no"
    tiers = [ProviderTier("a", ScriptedProvider([cr.ServerError("x")] * 3), ["a"]),
        ProviderTier("b", ScriptedProvider([limited, gives_up]), ["b"], prices=(1, 2)),
        ProviderTier("c", ScriptedProvider([cr.BadRequest("x"), "ok"]), ["c"]),
        ProviderTier("d", ScriptedProvider(["never"]), ["d"], supports_tools=False)]
    clock = VirtualClock()
    limits = {"failure_threshold": 2, "recovery_timeout": 1.0, "max_retry_after": 0.5, "wait": 60.0}
    hooks = {"on_event": seen.append, "clock": clock, "sleep": clock.sleep}
    chain = FailoverChain(tiers, escalation_model="c", **limits, **hooks)  # type: ignore[arg-type]
    assert chain.chat("hi", [{"type": "function", "function": {"name": "f"}}]).text == "ok"
    assert {event.kind for event in seen} == set(guide) - {"resend"}
    for event in seen:
        assert set(event.data) <= guide[event.kind], event.kind
        assert [name for name in event.data if f"``{name}``" not in str(cr.Event.__doc__)] == []


def test_changelog_and_security_speak_of_this_version_and_of_files_that_exist() -> None:
    assert re.findall(r"(?m)^## \[([\d.]+)\]", text_of("CHANGELOG.md"))[0] == cr.__version__
    named = set(re.findall(r"`(tests/\w+\.py)`", text_of("SECURITY.md")))
    assert [name for name in sorted(named) if not (pages.ROOT / name).exists()] == []

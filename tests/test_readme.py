"""The README's Python runs, and what it says of the errors is true."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from clocks import FakeClock

import copilot_router
from copilot_router import (
    BadRequest,
    CircuitBreaker,
    ContentFiltered,
    Event,
    FailoverChain,
    OpenAIProvider,
    ProviderTier,
    RateLimited,
    RedisStore,
    RouterError,
    ScriptedProvider,
    ServerError,
    SQLiteStore,
)

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_quickstart_runs_offline_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """The first block stands within the first twenty lines' reach and prints its own comments."""
    assert README.split("```python")[0].count("\n") < 20
    exec(BLOCKS[0], {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Hello from the cloud."
    assert re.sub(r"\d+ ms", "0 ms", printed[1]) == "local: ProviderUnavailable: refused 0 ms -> cloud: ok 0 ms"


def test_every_block_runs() -> None:
    """All blocks in order, in one namespace; none of them sends anything."""
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(block, names)
    assert names["chain"].chat("x").text == "forty-two"  # type: ignore[attr-defined]


def test_the_views_do_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    """The functions of the page, called with a chain that answers, one that is down, one that refuses, one that breaks off."""
    names: dict[str, Any] = {}
    for block in BLOCKS[1:3]:
        exec(block, names)

    def play(*script: Any) -> None:
        names["chain"].close()
        names["chain"] = FailoverChain([ProviderTier("a", ScriptedProvider(script), retries=0)])

    play("fine", RateLimited("no", retry_after=30))
    answers = [names["answer"]("hi") for _ in range(2)]
    assert answers == [(200, "fine"), (503, "try again in 30 s")]
    play(ContentFiltered("no"))
    assert names["answer"]("hi")[0] == 422
    names["chain"].tiers[0].breaker.open()
    assert names["answer"]("hi") == (503, "not now")
    play(["to ", "the end"], ["half", ServerError("gone")])
    names["show"]("hi")
    names["show"]("hi")
    whole, broken = capsys.readouterr().out.split("]\n", 1)
    assert re.fullmatch(r"to the end\n\[a: ok \d+ ms", whole)
    assert broken == "half\n[broken off after 4 characters]\n"


def test_the_configuration_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The TOML of the page builds a chain of two tiers, with its store."""
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-test")
    monkeypatch.chdir(tmp_path)
    (toml,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "router.toml").write_text(toml)
    chain = FailoverChain.from_config(tmp_path / "router.toml")
    assert [tier.name for tier in chain.tiers] == ["local", "strong"]
    assert chain.timeout == 60


def test_the_settings_are_all_there_with_their_defaults() -> None:
    """Every argument of the public classes and of a call stands in the table of settings."""
    table = README.split("## Settings", 1)[1].split("## Configuration", 1)[0]
    kinds = [
        FailoverChain, ProviderTier, CircuitBreaker, SQLiteStore, RedisStore, OpenAIProvider,
        OpenAIProvider.__mro__[1], FailoverChain.chat,
    ]  # fmt: skip
    missing = [
        f"{kind.__qualname__}({name})"
        for kind in kinds
        for name, item in inspect.signature(kind).parameters.items()
        if item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL) and f"`{name}`" not in table
        and name not in ("self", "tiers", "messages", "tools", "name", "provider")
    ]  # fmt: skip
    assert missing == []
    for name in copilot_router._OPTIONS:
        assert f"`{name}" in table, name


def test_the_docstring_of_event_names_all_that_events_hold() -> None:
    """Every kind and every fact of a call with all kinds of steps stands in the table that is a vendored copy's manual."""
    seen: list[Event] = []
    tiers = [
        ProviderTier("a", ScriptedProvider([ServerError("x")] * 3), ["a"]),
        ProviderTier("b", ScriptedProvider([RateLimited("x", retry_after=1), "[ESCALATE] too hard"]), ["b"], prices=(1, 2)),
        ProviderTier("c", ScriptedProvider([BadRequest("x"), "ok"]), ["c"]),
        ProviderTier("d", ScriptedProvider(["never"]), ["d"], supports_tools=False),
    ]
    clock = FakeClock()
    chain = FailoverChain(
        tiers, escalation_model="c", failure_threshold=2, recovery_timeout=1.0, max_retry_after=0.5, wait=60.0,
        on_event=seen.append, clock=clock, sleep=clock.sleep,
    )  # fmt: skip
    assert chain.chat("hi", [{"type": "function", "function": {"name": "f"}}]).text == "ok"
    table = str(Event.__doc__)
    kinds = {event.kind for event in seen}
    assert kinds == {"attempt", "retry", "skip", "failover", "wait", "escalation", "breaker", "done"}
    for event in seen:
        assert re.search(rf"(?m)^ *{event.kind} ", table), event.kind
        assert [name for name in event.data if f"``{name}``" not in table] == []


def test_the_error_tree_is_the_one_in_the_module() -> None:
    """Names and nesting of the drawn tree equal the classes and their bases."""
    tree = README.split("RouterError   ", 1)[1].split("```", 1)[0]
    found: list[tuple[str, str]] = []
    parents = ["RouterError"]
    for line in tree.splitlines()[1:]:
        match = re.match(r"([│├└─ ]+)(\w+)", line)
        assert match, line
        depth = len(match.group(1)) // 3
        found.append((match.group(2), parents[depth - 1]))
        parents[depth:] = [match.group(2)]
    public = {
        name: kind
        for name, kind in vars(copilot_router).items()
        if isinstance(kind, type) and issubclass(kind, RouterError) and kind is not RouterError
    }
    assert dict(found) == {name: kind.__bases__[0].__name__ for name, kind in public.items()}

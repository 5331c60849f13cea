"""Every fault of the fault server through ``stream()``: whether it comes before or after the first delta, and what that means.

The rows are those of test_faults.py; what is added is the column that says which side of the first delta a fault is on.
"""

from __future__ import annotations

import functools
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from faults import DIALECTS, FAULTS, WRONG_EVENTS, Dialect, Exchange, Fault, FaultServer, answer_to, descriptors, fault_server
from test_faults import ANSWER, BY_NAME, KEY, LIMITS, PROMPT, ROWS, Row, each_fault, stands, tier

from copilot_router import (
    ContentFiltered,
    DeadlineExceeded,
    FailoverChain,
    ProviderTier,
    ProviderTimeout,
    RouterError,
    StreamInterrupted,
)

#: Faults that strike after some text was shown. The reader gets StreamInterrupted: once asked, one failure counted, nobody
#: else is asked. All others strike before: then a stream is as good as a whole answer.
AFTER = {
    "keep_alives_in_the_middle", "stall", "stall_after_20_tokens", "long_content_length", "slow_tokens",  # time
    "cut_chunked", "cut_between_chunks", "cut_until_closed", "cut_after_40_tokens", "short_content_length", "ended_too_early",
    "content_length_too_short", "enormous_content_length", "cut_in_a_character", "reset_in_the_body",  # the connection
    "endless_line", "endless_text",  # size
    "garbled_event", "error_in_a_stream", *WRONG_EVENTS,  # content
} - {"event_is_an_empty_list"}  # fmt: skip  # which says nothing and does no harm

#: Seconds for a call that nobody can answer in time.
DEADLINE = 0.2


def limits(row: Row) -> dict[str, Any]:
    """Short silence limits only where silence is the fault: a busy machine is slow, too."""
    short = dict(LIMITS)
    if row.expect is not ProviderTimeout or row.fault in AFTER:
        short["first_token_timeout"] = 5.0
    if row.expect is not ProviderTimeout and row.fault != "healthy_then_silence":
        short["stall_timeout"] = 5.0
    return short


def pair(ill: FaultServer, well: FaultServer, row: Row, dialect: Dialect | None = None) -> FailoverChain:
    """A chain of the tier that is ill and one that is not; it does not pause before it asks again."""
    if dialect is None:
        tiers = [tier("ill", ill, row.fault, timeout=row.timeout, **limits(row)), tier("well", well, "healthy")]
    else:
        sick = ProviderTier("ill", dialect.client(KEY, ill.url, **limits(row)), [row.fault], timeout=row.timeout)
        tiers = [sick, ProviderTier("well", dialect.client(KEY, well.url), ["healthy"])]
    return FailoverChain(tiers, sleep=lambda seconds: None)


def outcome(chain: FailoverChain, prompt: str, row: Row) -> str:
    """Read one stream, check what holds of each, and say what became of it: ill, before, after, or an error's name."""
    seen: list[str] = []
    try:
        stream = chain.stream(prompt, timeout=5, **row.options)
    except RouterError as error:
        return type(error).__name__
    try:
        for delta in stream:
            assert delta
            seen.append(delta)
    except StreamInterrupted as broken:
        assert "".join(seen) == broken.partial == stream.text != ""
        assert type(broken.__cause__) is row.expect
        assert [(one.tier, one.outcome) for one in broken.attempts] == [("ill", "failed")]
        shown = f"{broken} {broken!r} {broken.attempts}"
        assert prompt not in shown
        assert KEY not in shown
        return "after"
    response = stream.response
    text = row.told(answer_to(prompt)) if response.provider == "ill" else answer_to(prompt)
    assert "".join(seen) == stream.text == response.text == text
    failed = {(one.error or "").partition(":")[0] for one in response.attempts if one.outcome == "failed"}
    if response.provider == "ill":
        return "ill"
    assert failed == {row.expect.__name__}
    return "before"


def expected(row: Row) -> str:
    if row.expect is ANSWER:
        return "ill"
    if row.expect is ContentFiltered:
        return "ContentFiltered"
    return "after" if row.fault in AFTER else "before"


def check(row: Row, dialect: Dialect | None = None, slack: float = 0.0) -> str:
    """All calls of one row; requests, breaker and time are as the table says."""
    with fault_server(dialect) as ill, fault_server(dialect) as well, pair(ill, well, row, dialect) as chain:
        for call in range(row.calls):
            start = time.monotonic()
            assert outcome(chain, f"{PROMPT}{row.fault} {call}", row) == expected(row), row.fault
            assert time.monotonic() - start < row.within + slack, row.fault
        if row.fault in AFTER:
            assert ill.count(row.fault) == 1, row.fault
            assert stands(chain, "closed 1"), row.fault
            assert well.log == [], row.fault
        else:
            assert ill.count(row.fault) == row.requests, row.fault
            assert stands(chain, row.breaker), row.fault
    return expected(row)


def test_the_column_is_complete() -> None:
    """Every fault has its side; both sides are well filled."""
    assert set(BY_NAME) >= AFTER
    assert all(BY_NAME[name].expect is not ANSWER for name in AFTER)
    sides = [expected(row) for row in ROWS]
    assert len(AFTER) >= 30
    assert sides.count("before") >= 100


@each_fault
def test_a_fault_before_or_after_the_first_delta(row: Row) -> None:
    """Before it the second tier answers, as if a whole answer had been asked for; after it the reader is told the truth."""
    check(row)


@pytest.mark.parametrize("dialect", DIALECTS[1:], ids=lambda dialect: dialect.name)
def test_every_wire_format_streams_as_honestly(dialect: type[Dialect]) -> None:
    """The same side and the same outcome for every fault that is not Chat Completions' own.

    But for ``cut_gzip``: how much text there is in half of the compressed bytes is another matter in each format.
    """
    rows = [row for row in ROWS if FAULTS[row.fault].only is None and row.fault != "cut_gzip"]
    with ThreadPoolExecutor(8) as pool:
        sides = list(pool.map(lambda row: check(row, dialect(), slack=1.0), rows))
    assert sides.count("after") > 15
    assert sides.count("before") > 60


def first(odd: bytes, x: Exchange) -> None:
    """The event that is none comes before all text."""
    x.ok(x.opening + odd + x.body[len(x.opening) :])


@pytest.mark.parametrize("name", sorted(AFTER & {*WRONG_EVENTS}))
def test_the_same_event_before_the_first_delta_is_unseen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The second tier answers, and the attempts are those of a whole answer."""
    monkeypatch.setitem(FAULTS, name, Fault(name, functools.partial(first, WRONG_EVENTS[name]), None))
    row = BY_NAME[name]
    with fault_server() as ill, fault_server() as well, pair(ill, well, row) as chain:
        assert outcome(chain, PROMPT, row) == "before"
        assert ill.count(name) == row.requests
        assert stands(chain, row.breaker)


@pytest.mark.parametrize("row", [row for row in ROWS if row.expect is ProviderTimeout and row.fault != "page_408"],
                         ids=lambda row: row.fault)  # fmt: skip
def test_whatever_takes_long_ends_with_the_deadline(row: Row) -> None:
    """With nobody else to ask and no other limit: from ``stream()`` itself before the first delta, StreamInterrupted after it.

    In time, and neutral: the call's own time was over.
    """
    with fault_server() as ill, FailoverChain([tier("ill", ill, row.fault)], timeout=DEADLINE) as chain:
        for _ in range(3):  # a busy machine may be late, but not each time
            start = time.monotonic()
            with pytest.raises(RouterError) as late:
                list(chain.stream(PROMPT))
            taken = time.monotonic() - start
            if taken < DEADLINE * 1.05 + 0.1:
                break
        assert DEADLINE * 0.9 < taken < DEADLINE * 1.05 + 0.1
        if row.fault in AFTER:
            assert isinstance(late.value, StreamInterrupted)
            assert late.value.code == "attempt_timeout"
            assert late.value.partial
        else:
            assert isinstance(late.value, DeadlineExceeded)
        assert stands(chain, "closed 0")


def test_nothing_is_left_of_broken_and_abandoned_streams() -> None:
    """Every fault after the first delta, read to its end and given up after one delta: no descriptor, no thread remains."""
    with fault_server() as ill:
        provider = tier("ill", ill, "healthy", **LIMITS).provider
        chain = FailoverChain([ProviderTier("ill", provider, sorted(AFTER), retries=0)], failure_threshold=10_000)
        names = [name for name in sorted(AFTER) if BY_NAME[name].expect is not ProviderTimeout]
        with pytest.raises(StreamInterrupted):
            list(chain.stream(PROMPT, model=names[0]))
        before, threads = descriptors(), threading.active_count()
        for name in names:
            with pytest.raises(StreamInterrupted):
                list(chain.stream(PROMPT, model=name, timeout=5))
            next(chain.stream(PROMPT, model=name, timeout=5))
        gc.collect()
        chain.close()
        until = time.monotonic() + 5
        while (descriptors() > before or threading.active_count() > threads) and time.monotonic() < until:
            threading.Event().wait(0.01)  # the server's own ends
        assert descriptors() <= before
        assert threading.active_count() <= threads

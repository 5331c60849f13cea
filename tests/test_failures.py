"""Reading failures: each fault of the fault server, and what statuses, bodies and headers mean."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
import requests
from support.faults import (
    ANSWER,
    BY_NAME,
    DIALECTS,
    FOOLED,
    HELD,
    HONEST,
    RAW,
    RIGHT,
    ROWS,
    WRONG,
    Chat,
    Dialect,
    FaultServer,
    Row,
    answer_to,
    descriptors,
    fault_server,
)

from copilot_router import (
    AllProvidersFailed,
    ContentFiltered,
    DeadlineExceeded,
    FailoverChain,
    InvalidResponse,
    ProviderError,
    ProviderTier,
    ProviderTimeout,
    RouterError,
    ServerError,
    StreamInterrupted,
)

KEY = "sk-test-faults-key-5678901234"
PROMPT = "the secret question about "
#: Seconds for a call that nobody can answer.
DEADLINE = 0.6
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def limits(row: Row) -> dict[str, Any]:
    """Short limits of silence only where silence is the fault: a busy machine is slow, too."""
    short: dict[str, Any] = {"max_response_bytes": 300_000}
    slow = row.expect is ProviderTimeout or row.name == "dripped_refusal"
    short["first_token_timeout"] = 0.3 if slow and not row.after else 5.0
    short["stall_timeout"] = 0.3 if slow or row.name == "healthy_then_silence" else 5.0
    return short


def tier(name: str, server: FaultServer, model: str, row: Row, **settings: Any) -> ProviderTier:
    client = server.dialect.client(KEY, server.url, **settings)
    return ProviderTier(name, client, [model], timeout=row.timeout if name == "ill" else None)


def pair(ill: FaultServer, well: FaultServer, row: Row) -> FailoverChain:
    """The tier that is ill and one that is not; the chain does not pause long before a retry."""
    tiers = [tier("ill", ill, row.name, row, **limits(row)), tier("well", well, "healthy", row)]
    return FailoverChain(tiers, sleep=lambda seconds: time.sleep(min(seconds, 0.02)))


def stands(chain: FailoverChain, expected: str) -> bool:
    """Whether the first breaker is as the row says; dates have no fractions of seconds."""
    state, _, number = expected.partition(" ")
    seen = chain.tiers[0].breaker.snapshot()
    if state == "closed":
        return seen.state == state and (not number or seen.failures == int(number))
    wide = {"long": (14, 600), "15": (14, 20)}  # a chain draws the time of its own breakers
    low, high = wide.get(number) or (int(number) - 1, int(number) + 1)
    return seen.state == state and low <= (seen.retry_after or 0.0) <= high


def failures(attempts: Any) -> set[str]:
    return {(one.error or "").partition(":")[0] for one in attempts if one.outcome == "failed"}


def fits(names: set[str], row: Row) -> bool:
    """Whether these failures are the row's; an answer of the wrong form may also count as empty."""
    also = {"EmptyResponse"} if row.expect is InvalidResponse else set()
    return bool(names) and names <= {row.expect.__name__} | also


def hidden(error: RouterError) -> bool:
    shown = f"{error} {error!r} {error.attempts}"
    return PROMPT not in shown and KEY not in shown


def check_chat(row: Row, dialect: Dialect, slack: float = 0.0) -> None:
    """All calls of a row: what comes out, how soon, after how many requests, and the breaker."""
    with fault_server(dialect) as ill, fault_server(dialect) as well, pair(ill, well, row) as chain:
        for call in range(row.calls):
            prompt = f"{PROMPT}{row.name} {call}"
            start = time.monotonic()
            if row.expect is ContentFiltered:
                with pytest.raises(ContentFiltered) as refused:
                    chain.chat(prompt, timeout=5, **row.options)
                attempts = refused.value.attempts
            else:
                response = chain.chat(prompt, timeout=5, **row.options)
                attempts = response.attempts
                own = response.provider == "ill"
                assert own == (row.expect is ANSWER), (row.name, attempts)
                assert response.text == (row.told if own else str)(answer_to(prompt)), row.name
            assert time.monotonic() - start < row.within + slack, row.name
            if row.expect is ANSWER:
                assert attempts[-1].outcome == "ok"
            else:
                assert fits(failures(attempts), row), (row.name, attempts)
        assert ill.count(row.name) == row.requests, row.name
        assert stands(chain, row.breaker), (row.name, chain.tiers[0].breaker.snapshot())


def read(chain: FailoverChain, prompt: str, row: Row) -> str:
    """Read one stream, check what holds of each, and say who gave the answer."""
    seen: list[str] = []
    stream = chain.stream(prompt, timeout=5, **row.options)
    try:
        seen += stream
    except StreamInterrupted as error:
        assert "".join(seen) == error.partial == stream.text != ""
        assert type(error.__cause__) is row.expect
        assert [(one.tier, one.outcome) for one in error.attempts] == [("ill", "failed")]
        assert hidden(error)
        return "nobody"
    own = stream.response.provider == "ill"
    text = (row.told if own else str)(answer_to(prompt))
    assert "".join(seen) == stream.text == stream.response.text == text
    if not own:
        assert fits(failures(stream.response.attempts), row)
    return stream.response.provider


def check_stream(row: Row, dialect: Dialect, slack: float = 0.0) -> None:
    """Before the first delta a stream fails over as chat() does; after it the reader is told."""
    side = "ill" if row.expect is ANSWER else "nobody" if row.after else "well"
    with fault_server(dialect) as ill, fault_server(dialect) as well, pair(ill, well, row) as chain:
        for call in range(row.calls):
            start = time.monotonic()
            if row.expect is ContentFiltered:
                with pytest.raises(ContentFiltered):
                    chain.stream(PROMPT, timeout=5)
            else:
                assert read(chain, f"{PROMPT}{row.name} {call}", row) == side, row.name
            assert time.monotonic() - start < row.within + slack, row.name
        assert ill.count(row.name) == (1 if row.after else row.requests), row.name
        assert stands(chain, "closed 1" if row.after else row.breaker), row.name
        assert not (row.after and well.log), row.name


def test_the_table_of_faults_is_wide() -> None:
    assert len(BY_NAME) == len(ROWS) >= 190
    assert sum(row.naive in FOOLED for row in ROWS) >= 120
    assert sum(row.after for row in ROWS) >= 30


@each_row
def test_a_healthy_second_tier_answers(row: Row) -> None:
    check_chat(row, Chat())


@each_row
def test_a_stream_fails_over_or_says_that_it_broke(row: Row) -> None:
    check_stream(row, Chat())


@pytest.mark.parametrize("dialect", DIALECTS[1:], ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("check", [check_chat, check_stream], ids=["chat", "stream"])
def test_every_wire_format_is_as_safe(dialect: type[Dialect], check: Any) -> None:
    """Each fault that is not of Chat Completions' own content; how much text is in half of the
    compressed bytes differs from format to format."""
    rows = [
        row for row in ROWS if row.only is None and (check is check_chat or row.name != "cut_gzip")
    ]
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(lambda row: check(row, dialect(), slack=2.0), rows))) > 95


@each_row
def test_alone_a_tier_fails_in_time(row: Row) -> None:
    """With no other tier to ask: the error's class, never later than the deadline allows."""
    prompt = f"{PROMPT}{row.name}"
    expected: Any = row.alone or row.expect
    short = {**limits(row), "first_token_timeout": 0.3, "stall_timeout": 0.3}
    with fault_server() as ill:
        chain = FailoverChain(
            [tier("ill", ill, row.name, row, **short)], timeout=DEADLINE, sleep=lambda seconds: None
        )
        start, failure = time.monotonic(), None
        try:
            assert chain.chat(prompt, **row.options).text == row.told(answer_to(prompt))
        except RouterError as error:
            failure = error
        taken = time.monotonic() - start
        chain.close()
    assert taken < DEADLINE * 1.05 + 0.1
    assert (failure is None) == (expected is ANSWER)
    if isinstance(failure, AllProvidersFailed):
        assert all(isinstance(error, expected) for error in failure.errors)
        assert failure.__cause__ is failure.errors[0]
        assert isinstance(failure, DeadlineExceeded) == (taken >= DEADLINE)
    elif failure is not None:
        assert type(failure) is expected
        assert row.breaker in ("closed 0", "closed")
    if failure is not None:
        assert issubclass(expected, ProviderError)
        assert failure.attempts[0].tier == "ill"
        assert hidden(failure)


def test_what_the_faults_do_to_a_client_of_one_line() -> None:
    """The column says it, and here it is tried: all faults at once, one thread each."""

    def naive(server: FaultServer, model: str) -> str:
        question = {"model": model, "messages": [{"role": "user", "content": PROMPT}]}
        url = server.url + "/chat/completions"
        try:
            answer = requests.post(url, json=question, timeout=1).json()
            content = answer["choices"][0]["message"]["content"]
        except requests.exceptions.JSONDecodeError:
            return RAW
        except requests.exceptions.RequestException:
            return HONEST
        except Exception:
            return RAW
        return RIGHT if content == answer_to(PROMPT) else WRONG

    server = FaultServer()
    with ThreadPoolExecutor(len(ROWS)) as pool:
        try:
            futures = {row.name: pool.submit(naive, server, row.name) for row in ROWS}
            wait(futures.values(), timeout=4)
            seen = {name: one.result() if one.done() else HELD for name, one in futures.items()}
        finally:
            server.stop()
    assert seen == {row.name: row.naive for row in ROWS}


def test_nothing_is_left_of_broken_connections() -> None:
    """After faults that break or abandon one: no descriptor and no thread more than before."""
    names = [row.name for row in ROWS if row.expect in (InvalidResponse, ServerError)]
    with fault_server() as ill:
        provider = Chat().client(KEY, ill.url, max_response_bytes=300_000, stall_timeout=0.3)
        chain = FailoverChain(
            [ProviderTier("ill", provider, names, retries=0)], failure_threshold=10_000
        )
        for name in names[:3]:
            with pytest.raises(RouterError):
                chain.chat(PROMPT, model=name)
        before, threads = descriptors(), threading.active_count()
        for name in names:
            with pytest.raises(RouterError):
                chain.chat(PROMPT, model=name, timeout=5)
            if BY_NAME[name].after:
                next(chain.stream(PROMPT, model=name, timeout=5))
        chain.close()
        until = time.monotonic() + 5
        while (descriptors() > before or threading.active_count() > threads) and (
            time.monotonic() < until
        ):
            threading.Event().wait(0.01)  # for the server's own ends
        assert descriptors() <= before
        assert threading.active_count() <= threads

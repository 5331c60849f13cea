"""gunicorn --preload, two workers of eight threads: one breaker for both, and every answer the caller's own.

A few hundred requests by default; ``make processes`` makes 2,000 (COPILOT_ROUTER_REQUESTS=2000) and prints the figures.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import answer_to, fault_server
from gunicorn_apps import RECOVERY, THRESHOLD
from stores import TESTS, RedisServer, Wrapped, spare_port

import copilot_router
from copilot_router import FailoverChain, ProviderTier, RedisStore, ScriptedProvider, ServerError

pytestmark = [pytest.mark.quiet, pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")]
REQUESTS = int(os.environ.get("COPILOT_ROUTER_REQUESTS", "400"))
WORKERS, THREADS = 2, 8


@contextlib.contextmanager
def gunicorn(app: str, **environment: str) -> Iterator[int]:
    """The port of a running gunicorn."""
    from gunicorn import config

    port = spare_port()
    path = os.pathsep.join((str(Path(copilot_router.__file__).parent), str(TESTS), os.environ.get("PYTHONPATH", "")))
    options = {"workers": WORKERS, "threads": THREADS, "worker-connections": THREADS, "bind": f"127.0.0.1:{port}"}
    quiet = ["--log-level", "error", *(["--no-control-socket"] if hasattr(config, "ControlSocketDisable") else [])]
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    server = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", "--preload", *words, *quiet, f"gunicorn_apps:{app}()"],
        env={**os.environ, "PYTHONPATH": path, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while True:
            try:
                ask(port, "up")
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, server.communicate()[0]
                time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        out = server.communicate(timeout=60)[0]
    assert "Traceback" not in out, out


def ask(port: int, prompt: str) -> dict[str, Any]:
    """One request on a connection of its own."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        return get(connection, prompt)


def get(connection: http.client.HTTPConnection, prompt: str) -> dict[str, Any]:
    connection.request("GET", f"/ask/{prompt}")
    response = connection.getresponse()
    body = response.read()
    assert response.status == 200, body
    found: dict[str, Any] = json.loads(body)
    return found


@pytest.mark.parametrize(("app", "kind"), [("flask_app", "sqlite"), ("django_app", "sqlite"), ("flask_app", "redis")])
def test_92_a_primary_that_fails_and_recovers(
    app: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """92, 99: every answer is the caller's own; the dead primary sees the threshold and what was under way, then one
    attempt in each recovery window, for both workers together; when it is well again, both go back to it."""
    pytest.importorskip("gunicorn")
    pytest.importorskip(app.partition("_")[0])
    where = str(tmp_path / "breakers.sqlite") if kind == "sqlite" else request.getfixturevalue("redis_server").url
    mode = "healthy"
    wrong: list[str] = []
    by: Counter[tuple[str, int]] = Counter()
    numbers = itertools.count()
    broke = mended = math_inf = float("inf")

    def load() -> None:
        nonlocal mode, broke, mended
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while (number := next(numbers)) < REQUESTS or time.monotonic() < mended + 1.0:
            if number == REQUESTS // 5:
                mode, broke = "page_500", time.monotonic()
            if mended == math_inf and number >= REQUESTS * 3 // 4 and time.monotonic() > broke + 4 * RECOVERY:
                mode, mended = "healthy", time.monotonic()
            prompt = f"nonce-{number}-{os.urandom(4).hex()}"
            try:
                found = get(connection, prompt)
            except Exception as error:
                wrong.append(f"{number}: {error!r}")
                continue
            by[found["provider"], found["pid"]] += 1
            if found["text"] != answer_to(prompt):
                wrong.append(f"{number}: another text by {found['provider']}")
        connection.close()

    with fault_server(pick=lambda _: mode) as primary, fault_server() as secondary:
        urls = {"TEST_PRIMARY": primary.url, "TEST_SECONDARY": secondary.url}
        with gunicorn(app, TEST_STORE=f"{kind} {where}", **urls) as port:
            start = time.monotonic()
            callers = [threading.Thread(target=load) for _ in range(WORKERS * THREADS)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join(300)
            took = time.monotonic() - start
            dead = [entry.time for entry in primary.log if entry.fault == "page_500"]
            again: set[int] = set()
            until = time.monotonic() + 20
            while len(again) < WORKERS and time.monotonic() < until:
                found = ask(port, "once-more")
                if found["provider"] == "primary":
                    again.add(found["pid"])
    first = [at for at in dead if at < dead[0] + RECOVERY * 0.9]
    later = dead[len(first) :]
    gaps = [one - before for before, one in itertools.pairwise([first[0], *later])]
    print(f"\n{app}, {kind}: {sum(by.values())} answers in {took:.1f} s, {len(wrong)} wrong; the dead primary saw "
          f"{len(first)} attempts, then {len(later)} in {mended - broke:.1f} s, at least {min(gaps):.2f} s apart "
          f"(window {RECOVERY} s); answered by {dict(by)}")  # fmt: skip
    assert not wrong
    assert {provider for provider, _ in by} == {"primary", "secondary"}
    assert len({pid for _, pid in by}) == WORKERS
    assert THRESHOLD <= len(first) <= THRESHOLD + WORKERS * THREADS
    assert 1 <= len(later) <= (mended - broke) / RECOVERY + 1
    assert min(gaps) >= RECOVERY * 0.9
    assert len(again) == WORKERS


def test_107_redis_in_trouble_under_load(redis_server: RedisServer) -> None:
    """107, 109, 119: stopped, paused, flushed, restarted while four threads call: no call fails, and none waits for longer
    than the budget, once for each thread and each time that the store is tried."""
    store = Wrapped(RedisStore(redis_server.url, "load", refresh=0.02, shared_counts=True))
    turn = itertools.count()

    def flaky(*_: Any, **__: Any) -> str:
        if next(turn) % 3 == 0:
            raise ServerError("now and then")
        return "fine"

    tiers = [
        ProviderTier("flaky", ScriptedProvider([flaky], repeat=True), retries=0),
        ProviderTier("steady", ScriptedProvider(["steady"], repeat=True)),
    ]
    chain = FailoverChain(tiers, store=store, failure_threshold=2, recovery_timeout=0.01)
    stopping = threading.Event()
    wrong: list[BaseException] = []
    took: list[tuple[str, float]] = []
    phase = "well"

    def work() -> None:
        while not stopping.is_set():
            now, start = phase, time.monotonic()
            try:
                chain.chat("hi")
            except BaseException as error:
                wrong.append(error)
            took.append((now, time.monotonic() - start))
            stopping.wait(0.001)

    def trouble(name: str, seconds: float, *steps: Any) -> int:
        nonlocal phase
        phase = name
        tries = store.loads + store.swaps
        for step in steps:
            step()
        assert not stopping.wait(seconds)
        return store.loads + store.swaps - tries

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        trouble("well", 0.5)
        tries = {"paused": trouble("paused", 1.5, redis_server.pause)}
        trouble("resumed", 1.0, redis_server.resume)
        trouble("flushed", 0.3, redis_server.flush)
        tries["stopped"] = trouble("stopped", 1.0, redis_server.stop)
        trouble("restarted", 2.0, redis_server.start)
        used, until = 0, time.monotonic() + 10  # a back-off may have to run out first
        while not used and time.monotonic() < until:
            used = trouble("well again", 0.3)
    finally:
        stopping.set()
        for thread in threads:
            thread.join(30)
        redis_server.resume()
    store.store.close()
    worst: dict[str, float] = {}
    for name, seconds in took:
        worst[name] = max(seconds, worst.get(name, 0.0))
    slow = sum(seconds > 0.09 for name, seconds in took if name == "paused")
    print(f"\n{len(took)} calls, {len(wrong)} failed; worst in ms: { {n: round(s * 1000) for n, s in worst.items()} }; "
          f"{tries['paused']} operations tried while paused, {slow} calls waited")  # fmt: skip
    assert not wrong
    assert max(worst.values()) <= 0.25 + worst["well"]  # what the machine's other work costs is seen while all is well
    assert 1 <= tries["paused"] <= 8
    assert slow <= tries["paused"] * len(threads)
    assert used > 0

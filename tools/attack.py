"""Everything that may break a promise: hostile servers, signals, fuzzed bodies, many threads.

    python tools/attack.py [SECONDS, 600]

Hostile servers: every row of tests/support/faults.py in every wire format, ``chat()`` and
``stream()``. Signals: a handler raises at a random point of a call, over HTTP and over each store;
the next call has to work. Fuzzed bodies: tests/test_fuzz.py. Threads: sixteen call while faults are
picked at random. The closing table counts cases, how late the latest call was, leaks (descriptors,
threads) and wrong answers. The exit status is 1 if a promise was broken.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.faults import DIALECTS, ROWS, FaultServer, answer_to, descriptors
from support.stores import REDIS, RedisServer

import copilot_router as cr

KEY = "sk-test-attack-key-5647382910"
ROOT = Path(__file__).resolve().parent.parent
#: Seconds that a call may end after its deadline, beside what a mere sleep was late meanwhile.
LATE = 0.1
#: Seconds after which a call counts as one that hangs.
HANGS = 20.0
#: Interrupted points that each kind of call has to reach.
POINTS = 1400
LIMITS = {"first_token_timeout": 0.3, "stall_timeout": 0.3, "max_response_bytes": 300_000}


class Interrupt(BaseException):
    """What the signal handler raises."""


class Part:
    """One line of the closing table."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cases = 0
        self.late = float("-inf")
        self.leaks: list[str] = []
        self.wrong: list[str] = []
        self.lock = threading.Lock()

    def say(self, what: str, leak: bool = False) -> None:
        with self.lock:
            (self.leaks if leak else self.wrong).append(what)

    def ended(self, taken: float, timeout: float, what: str, machine: Machine) -> None:
        """A call is over: how late was it, and was the machine to blame?"""
        with self.lock:
            self.cases += 1
            self.late = max(self.late, taken - timeout)
        if taken - timeout > LATE + machine.late(taken):
            self.say(f"{what}: {taken:.2f} s for a deadline of {timeout} s")

    def line(self) -> str:
        late = f"{self.late * 1000:+.0f} ms" if self.late > float("-inf") else "-"
        numbers = f"{len(self.leaks):>8}{len(self.wrong):>8}"
        return f"{self.name:<28}{self.cases:>9}{late:>12}{numbers}"


class Machine(threading.Thread):
    """Measures how late a sleep of ten milliseconds is: the calls cannot be better than that."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.overslept: list[tuple[float, float]] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            start = time.monotonic()
            time.sleep(0.01)
            late = time.monotonic() - start - 0.01
            if late > 0.02:
                self.overslept.append((start, late))
                del self.overslept[:-2000]

    def late(self, seconds: float) -> float:
        """The worst of the last so many seconds."""
        since = time.monotonic() - seconds - 1
        return max((late for start, late in list(self.overslept) if start > since), default=0.0)


@contextlib.contextmanager
def nothing_left(part: Part, what: str) -> Iterator[None]:
    """Descriptors and threads are as many as before."""
    gc.collect()
    files, threads = descriptors(), threading.active_count()
    yield
    until = time.monotonic() + 5
    while time.monotonic() < until:
        gc.collect()
        if descriptors() <= files and threading.active_count() <= threads:
            return
        time.sleep(0.05)
    now = f"descriptors {files} to {descriptors()}, threads {threads} to {threading.active_count()}"
    part.say(f"{what}: {now}", leak=True)


def serve() -> None:
    """A server for each wire format, and one that picks a fault at random, until the input ends."""
    usual = [row.name for row in ROWS if row.only is None and row.told is str and not row.options]

    def pick(model: str) -> str:
        return random.choice((random.choice(usual), "healthy")) if model == "any" else model

    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(FaultServer(dialect(), pick=pick)) for dialect in DIALECTS]
        print(json.dumps([server.url for server in servers]), flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def other_process() -> Iterator[list[str]]:
    command = [sys.executable, __file__, "serve"]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def judged(part: Part, what: str, chain: cr.FailoverChain, row: Any, streamed: bool) -> None:
    """One call: the whole answer, or an error; never a part of the answer, never another text."""
    prompt = f"the question {random.random()}"
    wanted = row.told(answer_to(prompt))
    try:
        if streamed:
            with chain.stream(prompt, **row.options) as stream:
                text = "".join(stream)
        else:
            text = chain.chat(prompt, **row.options).text
        if text != wanted:
            part.say(f"{what}: answered {text[:80]!r}")
    except cr.StreamInterrupted as error:
        if not streamed or not error.partial:
            part.say(f"{what}: interrupted before the first delta")
    except cr.RouterError:
        if row.expect.__name__ == "ANSWER" and row.alone is None and row.calls == 1:
            part.say(f"{what}: no answer, although the server gave one")
    except Exception as error:
        part.say(f"{what}: {type(error).__name__}: {str(error)[:100]}")


def hostile(urls: list[str], machine: Machine, seconds: float) -> Part:
    part, until = Part("hostile servers"), time.monotonic() + seconds
    cases = [
        (dialect, url, row, streamed)
        for dialect, url in zip(DIALECTS, urls, strict=True)
        for row in ROWS
        for streamed in (False, True)
        if row.only in (None, dialect)
    ]
    random.shuffle(cases)

    def one(case: Any) -> None:
        dialect, url, row, streamed = case
        what = f"{dialect.__name__} {row.name} {'stream' if streamed else 'chat'}"
        if time.monotonic() > until:
            return
        provider = dialect().client(KEY, url, **LIMITS)
        timeout = 3.0 if row.within > 2 or row.expect.__name__ == "ANSWER" else 0.6
        tier = cr.ProviderTier("ill", provider, [row.name], timeout=row.timeout)
        with cr.FailoverChain([tier], timeout=timeout) as chain:
            for _ in range(row.calls):
                begin = time.monotonic()
                judged(part, what, chain, row, streamed)
                part.ended(time.monotonic() - begin, timeout, what, machine)

    with nothing_left(part, "hostile servers"), ThreadPoolExecutor(8) as pool:
        list(pool.map(one, cases))
    print(f"hostile servers: {part.cases} calls for {len(cases)} rows")
    return part


def interrupted(work: Callable[[], Any], within: float) -> bool:
    """Let a signal handler raise at a random point; whether it did before the work was done."""
    armed = True

    def handle(*_: Any) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Interrupt

    signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-6, within))
        work()
        armed = False
        return False
    except Interrupt:
        return True
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def sweep(name: str, until: float, made: Callable[[], Any]) -> Part:
    """Interrupt a call at many points. ``made()`` gives the call, and what ends it."""
    part = Part(f"signals: {name}")
    with nothing_left(part, name):
        work, close = made()
        start = time.perf_counter()
        for _ in range(20):
            work()
        span = (time.perf_counter() - start) / 20
        while time.monotonic() < until or (part.cases < POINTS and not part.wrong):
            if time.monotonic() > until + 60:
                break
            faulthandler.dump_traceback_later(HANGS, exit=True)  # a lock is held for ever
            try:
                hit = interrupted(work, 1.2 * span)
                part.cases += hit
                begin = time.monotonic()
                if hit:
                    work()
                    part.late = max(part.late, time.monotonic() - begin - span)
            except Exception as error:
                part.say(f"{name}: the call after an interrupt: {type(error).__name__}: {error}")
                close()
                work, close = made()
                if len(part.wrong) > 20:
                    break
        faulthandler.cancel_dump_traceback_later()
        close()
        del work, close
    return part


def chain_of(provider: Any) -> cr.FailoverChain:
    """With one place: if an interrupt loses it, the next call ends at its deadline."""
    tier = cr.ProviderTier("one", provider, ["healthy"], max_concurrency=1)
    return cr.FailoverChain([tier], timeout=3.0, failure_threshold=10**6)


def over_http(url: str, streamed: bool) -> Callable[[], Any]:
    def made() -> tuple[Callable[[], Any], Callable[[], Any]]:
        chain = chain_of(DIALECTS[0]().client(KEY, url))

        def work() -> None:
            prompt = f"n{random.random()}"
            if streamed:
                with chain.stream(prompt) as stream:
                    text = "".join(stream)
            else:
                text = chain.chat(prompt).text
            assert text == answer_to(prompt), f"another text: {text!r}"

        return work, chain.close

    return made


def in_process() -> tuple[Callable[[], Any], Callable[[], Any]]:
    chain = chain_of(cr.ScriptedProvider(["fine"], repeat=True))
    return lambda: [chain.chat("hi") for _ in range(5)], chain.close


def over_store(make: Callable[[], Any]) -> Callable[[], Any]:
    """A breaker that fails, opens, is closed by a trial: each call writes to the store."""

    def made() -> tuple[Callable[[], Any], Callable[[], Any]]:
        store = make()
        breaker = cr.CircuitBreaker(1, 0.001, name=f"b{random.random()}", store=store)
        witness = cr.CircuitBreaker(1, 0.001, name="witness", store=store)

        def work() -> None:
            with contextlib.suppress(cr.CircuitOpen):
                breaker.admit().failure("down")
            time.sleep(0.001)
            with contextlib.suppress(cr.CircuitOpen):
                breaker.admit().success()
            begin = time.monotonic()
            witness.snapshot()
            assert time.monotonic() - begin < 3, "the store holds up its callers"

        return work, store.close

    return made


def signals(urls: list[str], seconds: float) -> list[Part]:
    if not hasattr(signal, "setitimer"):
        print("  this system has no SIGALRM: no signals")
        return []
    sys.unraisablehook = lambda _: None  # the signal may come while a finalizer runs
    kinds: dict[str, Callable[[], Any]] = {"in process": in_process}
    kinds |= {"chat": over_http(urls[0], False), "stream": over_http(urls[0], True)}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="attack-"))
        path = Path(folder) / "breakers.sqlite"
        kinds["SQLite"] = over_store(lambda: cr.SQLiteStore(path, refresh=0.0))
        if REDIS:
            server = RedisServer()
            stack.callback(server.stop)
            kinds["Redis"] = over_store(lambda: cr.RedisStore(server.url, "attack", refresh=0.0))
        return [
            sweep(name, time.monotonic() + seconds / len(kinds), made)
            for name, made in kinds.items()
        ]


def fuzz(seconds: float) -> Part:
    part = Part("fuzzed bodies")
    examples = max(60, int(seconds * 12))
    environment = {**os.environ, "COPILOT_ROUTER_FUZZ": str(examples)}
    command = [sys.executable, "-m", "pytest", "-q", "-s", str(ROOT / "tests" / "test_fuzz.py")]
    try:
        settings: Any = {"cwd": ROOT, "env": environment, "timeout": seconds * 4 + 60}
        done = subprocess.run(command, capture_output=True, text=True, **settings)
    except subprocess.TimeoutExpired:
        part.say("the fuzzers did not end in time")
        return part
    passed = re.search(r"(\d+) passed", done.stdout)
    part.cases = int(passed[1]) * examples if passed else 0
    if done.returncode:
        failed = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)
        part.say("the fuzzers: " + " / ".join(failed[:3]))
    return part


def storm(urls: list[str], machine: Machine, seconds: float) -> Part:
    """Sixteen threads on one chain whose first tier is ill half of the time."""
    part, until, timeout = Part("a storm of threads"), time.monotonic() + seconds, 5.0
    kind = DIALECTS[0]()
    with nothing_left(part, "storm"):
        tiers = [
            cr.ProviderTier("ill", kind.client(KEY, urls[0], **LIMITS), ["any"], timeout=1.0),
            cr.ProviderTier("well", kind.client(KEY, urls[0]), ["healthy"], role="secondary"),
        ]
        chain = cr.FailoverChain(tiers, timeout=timeout, recovery_timeout=0.01)

        def ask(who: int) -> None:
            while time.monotonic() < until:
                prompt, begin = f"question {who} {random.random()}", time.monotonic()
                try:
                    text = chain.chat(prompt).text
                    if text != answer_to(prompt):
                        part.say(f"another text: {text[:80]!r}")
                except cr.RouterError as error:
                    if not isinstance(error, (cr.DeadlineExceeded, cr.ContentFiltered)):
                        part.say(f"{type(error).__name__}: {str(error)[:100]}")
                part.ended(time.monotonic() - begin, timeout, "storm", machine)
                if random.random() < 0.05:
                    chain.reset()

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, range(16)))
        chain.close()
    return part


def main() -> None:
    if sys.argv[1:] == ["serve"]:
        return serve()
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 600.0
    start, machine = time.monotonic(), Machine()
    tenth = (seconds - 10) / 10
    with other_process() as urls:
        parts = signals(urls, 3.5 * tenth)  # first, while this process has no other thread
        machine.start()
        parts.append(hostile(urls, machine, 3.5 * tenth))
        parts.append(storm(urls, machine, 1.5 * tenth))
        machine.over.set()
    parts.append(fuzz(1.5 * tenth))
    for part in parts:
        for told in (part.leaks + part.wrong)[:10]:
            print(f"WRONG: {told}")
    print(f"\n{'':<28}{'cases':>9}{'latest':>12}{'leaks':>8}{'wrong':>8}")
    print(*(part.line() for part in parts), sep="\n")
    broken = sum(len(part.leaks) + len(part.wrong) for part in parts)
    print(f"{broken or 'no'} broken promises, in {time.monotonic() - start:.0f} s")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()

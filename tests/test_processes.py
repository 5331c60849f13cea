"""Several processes and one provider that is down: exactly one of them tries, whatever happens to it.

Twenty rounds by default; ``make processes`` plays 200 (COPILOT_ROUTER_ROUNDS=200) and prints the figures.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from stores import done, python

ROUNDS = int(os.environ.get("COPILOT_ROUTER_ROUNDS", "20"))
PROCESSES = 8
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

STORE = """
import os, sys, time
from copilot_router import CircuitBreaker, CircuitOpen, RedisStore, SQLiteStore
def store(kind, where):
    return SQLiteStore(where, timeout=5) if kind == "sqlite" else RedisStore(where, "processes", timeout=5, shared_counts=True)
"""

#: A parent that reads "round" and lets its children, which wait at a pipe, ask at the same moment.
RACE = STORE + """
import select
kind, where, processes, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
trials = []
for turn in range(rounds):
    name = f"round {turn}"
    operator = CircuitBreaker(1, 0.0, name=name, store=store(kind, where))
    operator.admit().failure()  # open, and due at once
    go, start = os.pipe()
    answers, answer = os.pipe()
    ready, say_ready = os.pipe()
    children = []
    for _ in range(processes):
        child = os.fork()
        if child == 0:
            os.close(start)
            shared = store(kind, where) if turn % 2 else operator._shared._store  # a handle of its own, or its parent's
            breaker = CircuitBreaker(1, 0.0, name=name, store=shared)
            assert breaker.state == "open"
            os.write(say_ready, b"r")
            os.read(go, 1)  # until the parent closes its end
            try:
                ticket = breaker.admit()
                os.write(answer, b"T" if ticket.is_trial else b"c")
            except CircuitOpen:
                os.write(answer, b".")
            os._exit(0)
        children.append(child)
    seen = b""
    while len(seen) < processes:
        seen += os.read(ready, processes)
    os.close(start)
    said = b""
    while len(said) < processes:
        said += os.read(answers, processes)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    for end in (go, answers, answer, ready, say_ready):
        os.close(end)
    trials.append(said.count(b"T"))
    assert b"c" not in said, said
    operator._shared._store.close()
print(*trials)
"""


@pytest.fixture(params=["sqlite", "redis"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """The kind of store, and where it is."""
    if request.param == "sqlite":
        return "sqlite", str(tmp_path / "breakers.sqlite")
    server = request.getfixturevalue("redis_server")
    return "redis", server.url


def test_96_one_trial_in_each_round(where: tuple[str, str]) -> None:
    """96: eight processes at a barrier, the open time over: one trial, round after round."""
    start = time.monotonic()
    trials = done(python(RACE, *where, PROCESSES, ROUNDS), timeout=60 + 2 * ROUNDS).split()
    print(f"\n{where[0]}: {len(trials)} rounds of {PROCESSES} processes in {time.monotonic() - start:.1f} s, "
          f"trials in a round: {sorted(set(trials))}")  # fmt: skip
    assert trials == ["1"] * ROUNDS


LEASE = 1.5

#: Asks as soon as it is told to, says when it is the trial, and settles it when told to.
HOLDER = STORE + f"""
kind, where = sys.argv[1:3]
shared = store(kind, where)
breaker = CircuitBreaker(1, 0.0, name="x", store=shared, trial_timeout={LEASE})
if len(sys.argv) > 3:
    breaker.admit().failure()
sys.stdin.readline()
ticket = breaker.admit()
print(ticket.is_trial, time.monotonic(), flush=True)
sys.stdin.readline()
ticket.success()
print(breaker.state, breaker.snapshot().stale, flush=True)
"""

#: Waits for the next trial and says when it came.
SUCCESSOR = STORE + f"""
kind, where = sys.argv[1:3]
breaker = CircuitBreaker(1, 0.0, name="x", store=store(kind, where), trial_timeout=60.0)
print("ready", flush=True)
sys.stdin.readline()
until = time.monotonic() + {LEASE} + 20
print(breaker.state, flush=True)
first = breaker.snapshot().generation
while time.monotonic() < until:
    try:
        ticket = breaker.admit()
    except CircuitOpen:
        time.sleep(0.01)
        if breaker.snapshot().generation > first:
            break  # somebody else's trial, for the next minute
        continue
    print("trial", time.monotonic(), flush=True)
    sys.stdin.readline()
    print(breaker.state, flush=True)
    ticket.failure("still down")
    print(breaker.state, flush=True)
    sys.exit()
print("refused", flush=True)
"""


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@contextmanager
def ending(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever happens, none of them survives."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_97_the_holder_of_the_trial_is_gone(fate: signal.Signals, where: tuple[str, str]) -> None:
    """97, 98: the next trial after the lease and at most a second later, exactly one; the late verdict has no effect."""
    heirs = [python(SUCCESSOR, *where) for _ in range(3)]
    holder = python(HOLDER, *where, "trip first")
    with ending(holder, *heirs):
        assert [line(heir) for heir in heirs] == ["ready"] * 3
        tell(holder)
        is_trial, began = line(holder).split()
        assert is_trial == "True"
        holder.send_signal(fate)
        for heir in heirs:
            tell(heir)
        assert [line(heir) for heir in heirs] == ["half_open"] * 3
        answers = [line(heir).split() for heir in heirs]
        assert sorted(answer[0] for answer in answers) == ["refused"] * 2 + ["trial"]
        (took,) = (float(answer[1]) - float(began) for answer in answers if answer[0] == "trial")
        assert LEASE - 0.05 <= took <= LEASE + 1.0
        heir = heirs[[answer[0] for answer in answers].index("trial")]
        if fate == signal.SIGSTOP:
            holder.send_signal(signal.SIGCONT)
            tell(holder)
            assert line(holder) == "half_open 1"
        tell(heir)
        assert line(heir) == "half_open"  # the late success closed nothing
        assert line(heir) == "open"


ONCE = STORE + """
breaker = CircuitBreaker(5, 600.0, name="cron", store=store(*sys.argv[1:]))
try:
    with breaker.admit():
        print("called")
        raise ConnectionResetError
except CircuitOpen as error:
    print("refused", 0 < error.retry_after <= 600)
except ConnectionResetError:
    pass
"""


def test_117_five_runs_that_fail_once_each(tmp_path: Path) -> None:
    """117: five processes, one after the other, each fail once: the sixth does not call."""
    runs = [done(python(ONCE, "sqlite", tmp_path / "breakers.sqlite")).strip() for _ in range(6)]
    assert runs == ["called"] * 5 + ["refused True"]

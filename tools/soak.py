"""Sixteen threads call for minutes while everything around them fails: every answer is right.

    python tools/soak.py [SECONDS, 600]

Three chains share the work: with breakers in memory, SQLite and, if installed, Redis. Their first
tier has faults of tests/support/faults.py, their second is well; the servers are another process.
Meanwhile the SQLite file is locked, overwritten and removed, Redis is paused, stopped and started,
breakers are reset, and the process forks; a child has to get its answers, too. A call that ends too
late is excused only if, past its deadline, a mere sleep lasted as much too long.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict, deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.faults import ROWS, Entry, FaultServer, answer_to, descriptors
from support.stores import REDIS, RedisServer

import copilot_router as cr

KEY = "sk-test-soak-key-1029384756"
THREADS = 16
#: Seconds for a call: most have time enough to be answered, some have not.
DEADLINES = (5.0, 5.0, 5.0, 0.5)
SILENCE = 0.2
LIMITS: Any = dict(first_token_timeout=SILENCE, stall_timeout=SILENCE, max_response_bytes=300_000)
#: What a call may take longer than its deadline: a twentieth, and as many seconds.
LATE = 0.1
#: Bytes that the process may have grown from the second to the last fifth of the time.
GROWTH = 16 * 2**20
#: By name: what a call gets from such a tier. Not here: rows that change the text.
KINDS = {row.name: row.expect.__name__ for row in ROWS if row.told is str and not row.options}

#: What some faults say on their own: numbers, more and more, or again and again.
OTHER_TEXT = re.compile(r"^0 1 2 .*|(half|(more )+|again and .*)$")


class Tally:
    """Takes the place of a server's log: counts, and keeps nothing."""

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()

    def append(self, entry: Entry) -> None:
        self.faults[entry.fault] += 1


def serve() -> None:
    """The other process: an ill server and a well one, until its input ends; then the tally."""
    names = list(KINDS)
    picked = FaultServer(pick=lambda model: random.choice((random.choice(names), "healthy")))
    with picked as ill, FaultServer() as well:
        tally: Any = Tally()
        ill.log, well.log = tally, Tally()  # type: ignore[assignment]
        print(json.dumps([ill.url, well.url]), flush=True)
        sys.stdin.read()
    print(json.dumps(tally.faults), flush=True)


def size() -> int:
    """Bytes of memory that this process holds, 0 where nobody knows."""
    known = Path("/proc/self/statm")
    pages = int(known.read_text().split()[1]) if known.exists() else 0
    return pages and pages * os.sysconf("SC_PAGE_SIZE")


class Soak:
    """The chains, those who call them, and those who disturb them."""

    def __init__(self, seconds: float, folder: Path, ill: str, well: str, redis: Any) -> None:
        self.seconds = seconds
        self.path = folder / "breakers.sqlite"
        self.redis = redis
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.latest = 0.0
        self.overslept: deque[tuple[float, float]] = deque(maxlen=3000)  #: when, and for how long
        self.samples: list[tuple[int, int, int]] = []
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.stores: dict[str, Any] = {"memory": None}
        self.stores["sqlite"] = cr.SQLiteStore(self.path, refresh=0.05)
        if redis is not None:
            shared: Any = {"shared_counts": True, "refresh": 0.05}
            self.stores["redis"] = cr.RedisStore(redis.url, "soak", **shared)
        self.chains = {}
        for name, store in self.stores.items():
            tiers = [
                cr.ProviderTier("ill", cr.OpenAIProvider(KEY, ill, **LIMITS), ["any"], timeout=1.0),
                cr.ProviderTier("well", cr.OpenAIProvider(KEY, well), ["healthy"]),
            ]
            policy: Any = {"on_error": {cr.ContentFiltered: "next"}, "on_event": self.heard}
            self.chains[name] = cr.FailoverChain(tiers, store=store, recovery_timeout=0.2, **policy)

    def heard(self, event: Any) -> None:
        with self.lock:
            self.kinds[event.kind] += 1

    def say(self, what: str) -> None:
        with self.lock:
            self.wrong.append(what)

    def ask(self, who: int) -> None:
        chance = random.Random(who)
        turn = 0
        while not self.over.is_set():
            turn += 1
            name = chance.choice(list(self.chains))
            timeout, streamed = chance.choice(DEADLINES), chance.random() < 0.4
            self.call(name, f"prompt {who:x}/{turn:x}", timeout, streamed)

    def call(self, name: str, prompt: str, timeout: float, streamed: bool) -> None:
        begin = time.monotonic()
        by = text = ""
        try:
            if streamed:
                with self.chains[name].stream(prompt, timeout=timeout) as stream:
                    text = "".join(stream)
                    by = stream.response.provider
            else:
                response = self.chains[name].chat(prompt, timeout=timeout)
                text, by = response.text, response.provider
            outcome = f"answered by {by}"
            if text != answer_to(prompt):
                self.say(f"{name}: another text by {by}")
        except cr.DeadlineExceeded:
            outcome = "deadline of half a second" if timeout < 1 else "deadline of five seconds"
        except cr.StreamInterrupted as error:
            outcome = "stream interrupted"
            told = OTHER_TEXT.sub("", error.partial)  # the text of a fault itself
            if not streamed or not error.partial or not answer_to(prompt).startswith(told):
                self.say(f"{name}: {error.partial[-60:]!r} and then {error.__cause__!r}")
        except Exception as error:
            outcome = "another error"
            self.say(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        taken = time.monotonic() - begin
        with self.lock:
            self.outcomes[name][outcome] += 1
            self.latest = max(self.latest, taken - timeout)
        late = taken - timeout * 1.05 - LATE
        if late > 0:
            time.sleep(0.05)  # the watch may be on its way
            due = begin + timeout
            overslept = list(self.overslept)
            machine = sum(min(most, when - due) for when, most in overslept if when > due)
            if machine < late:
                self.say(f"{name}: {taken:.3f} s of {timeout} s ({outcome}), machine {machine:.3f}")
            else:
                self.counts["calls late with the machine"] += 1

    def watch(self) -> None:
        """Notes where a sleep of ten milliseconds takes more than twice as long."""
        while not self.over.is_set():
            start = time.monotonic()
            time.sleep(0.01)
            now = time.monotonic()
            if now - start > 0.02:
                self.overslept.append((now, now - start - 0.01))

    def disturb_sqlite(self) -> None:
        chance = random.Random("sqlite")
        while not self.over.wait(chance.uniform(0.5, 2)):
            how = chance.choice(("locked", "garbage", "gone"))
            if how == "locked":
                try:
                    other = sqlite3.connect(self.path, isolation_level=None, timeout=2)
                    other.execute("BEGIN EXCLUSIVE")
                    self.over.wait(1)
                    other.close()
                except sqlite3.Error:
                    continue  # it is garbage still
                self.counts["SQLite locked"] += 1
                continue
            if how == "garbage":
                self.path.write_bytes(b"this is no database" * 500)
                self.over.wait(0.5)
            for path in self.path.parent.glob("breakers.sqlite*"):
                path.unlink(missing_ok=True)
            self.counts[f"SQLite {how}"] += 1

    def disturb_redis(self) -> None:
        assert self.redis is not None
        chance = random.Random("redis")
        while not self.over.wait(chance.uniform(0.5, 2)):
            how = chance.choice(("paused", "stopped", "emptied"))
            if how == "paused":
                self.redis.pause()
                self.over.wait(1)
                self.redis.resume()
            elif how == "stopped":
                self.redis.stop()
                self.over.wait(1)
                self.redis.start()
            else:
                self.redis.flush()
            self.counts[f"Redis {how}"] += 1

    def disturb_breakers(self) -> None:
        """Some faults park a tier for an hour: an operator mends that, or shuts it for a moment."""
        chance = random.Random("breakers")
        while not self.over.wait(0.1):
            chain = chance.choice(list(self.chains.values()))
            if chance.random() < 0.9:
                chain.reset()
            else:
                chain.tiers[0].breaker.open(0.1, "maintenance")
            chain.health()
            self.counts["resets by hand"] += 1

    def fork(self) -> None:
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            self.wrong.clear()
            self.lock = threading.Lock()  # another thread may have held it
            for name in self.chains:
                self.call(name, f"prompt of a child {os.getpid()}", 20.0, False)
            os._exit(min(len(self.wrong), 100))
        until = time.monotonic() + 90
        while time.monotonic() < until:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                if status:
                    self.say(f"a forked child ended with {status}")
                self.counts["forks"] += 1
                return
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        self.say("a forked child hung")

    def run(self) -> None:
        tasks = [self.watch, self.disturb_sqlite, self.disturb_breakers]
        tasks += [self.disturb_redis] if self.redis else []
        threads = [threading.Thread(target=task) for task in tasks]
        threads += [threading.Thread(target=self.ask, args=(who,)) for who in range(THREADS)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            time.sleep(min(1.0, self.seconds / 20))
            if len(self.samples) % 4 == 0 and hasattr(os, "fork"):
                self.fork()
            self.samples.append((size(), threading.active_count(), descriptors()))
        self.over.set()
        for thread in threads:
            thread.join(60)
            if thread.is_alive():
                self.say(f"{thread.name} did not end")
        for chain in self.chains.values():
            chain.close()
        for store in self.stores.values():
            if store is not None:
                store.close()


def lowest(samples: list[tuple[int, int, int]]) -> tuple[int, ...]:
    return tuple(min(column) for column in zip(*samples, strict=True))


def main() -> None:
    if sys.argv[1:] == ["serve"]:
        return serve()
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 600.0
    threads, files = threading.active_count(), descriptors()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-"))
        redis = RedisServer() if REDIS else None
        if redis is not None:
            stack.callback(redis.stop)
        command = [sys.executable, __file__, "serve"]
        servers = stack.enter_context(subprocess.Popen(command, stdin=-1, stdout=-1, text=True))
        stack.callback(servers.kill)
        assert servers.stdin is not None and servers.stdout is not None
        ill, well = json.loads(servers.stdout.readline())
        soak = Soak(seconds, Path(folder), ill, well, redis)
        print(f"{THREADS} threads, {len(KINDS)} faults, stores:", *soak.chains, flush=True)
        soak.run()
        servers.stdin.close()
        asked: dict[str, int] = json.loads(servers.stdout.readline())
    gc.collect()
    fifth = max(1, len(soak.samples) // 5)
    early, late = lowest(soak.samples[fifth : 2 * fifth]), lowest(soak.samples[-fifth:])
    missed = [name for name in KINDS if not asked.get(name, 0)]
    print(f"\nFaults: {len(KINDS) - len(missed)} of {len(KINDS)} kinds reached")
    lines = {"Disturbances": soak.counts, "Events": soak.kinds, **soak.outcomes}
    for title, counts in lines.items():
        told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        print(f"{title}, {sum(counts.values())}: {told}")
    now = (threading.active_count(), descriptors())
    print(f"Memory at its lowest: {early[0] / 2**20:.1f} MiB in the second fifth of the time,"
          f" {late[0] / 2**20:.1f} MiB in the last")  # fmt: skip
    print(f"Threads and descriptors: {(threads, files)} before, {now} after")
    print(f"The latest call ended {soak.latest:+.3f} s from its deadline.")
    wrong = soak.wrong
    calls = sum(sum(counts.values()) for counts in soak.outcomes.values())
    if missed and seconds >= 100:
        wrong.append(f"faults never reached: {', '.join(missed)}")
    if late[0] - early[0] > GROWTH:
        wrong.append(f"memory grew by {(late[0] - early[0]) / 2**20:.1f} MiB")
    if threading.active_count() > threads or descriptors() > files:
        wrong.append("threads or descriptors are left")
    if sum(counts["deadline of five seconds"] for counts in soak.outcomes.values()) > calls / 100:
        wrong.append("more than one call in a hundred had no answer within five seconds")
    for line in wrong[:20]:
        print("WRONG:", line)
    print(f"{calls} calls, {sum(asked.values())} requests to the ill server: {len(wrong)} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

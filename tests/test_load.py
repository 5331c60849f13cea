"""Load: many threads against a faulty server, what is left afterwards, and the rules of conftest.

A few hundred calls by default; ``make stress`` makes 10,000 (COPILOT_ROUTER_STRESS=10000).
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.fakes import running
from support.faults import BY_NAME, Chat, FaultServer, answer_to, descriptors

from copilot_router import FailoverChain, OpenAIProvider, ProviderTier, RouterError

KEY = "sk-test-stress-key-9081726354"
PROMPT = "the secret question with the nonce "
CALLS = int(os.environ.get("COPILOT_ROUTER_STRESS", "400"))
FULL = CALLS >= 10_000
THREADS = 16
DEADLINE = 5.0
#: Faults of every kind; half of the requests fare well in any case: breakers have to close again.
KINDS = ["healthy_until_closed", "closed_while_idle", "a_second_answer", "early_hints_first",
    "given_up_while_idle", "page_500", "hint_absent", "bad_request", "reset_before_headers",
    "cut_chunked", "cut_until_closed", "short_content_length", "garbled_event", "empty_text",
    "error_in_a_stream", "redirect_307", "silence", "stall", "keep_alives_for_ever", "dripped_body"]


@pytest.mark.quiet
def test_many_threads_against_a_faulty_server_get_whole_answers_in_time() -> None:
    gc.collect()
    threads, files = threading.active_count(), descriptors()
    wrong: list[str] = []
    times: list[float] = []
    answered: Counter[str] = Counter()
    start = time.monotonic()
    picked = random.Random(start)
    def pick(model: str) -> str:
        return picked.choice((picked.choice(KINDS), "healthy"))
    with FaultServer(pick=pick) as ill, FaultServer() as well:
        short = {"first_token_timeout": 0.05, "stall_timeout": 0.05}
        tiers = [ProviderTier("ill", OpenAIProvider(KEY, ill.url, **short), ["any"]),
                 ProviderTier("well", OpenAIProvider(KEY, well.url), ["healthy"])]
        chain = FailoverChain(tiers, timeout=DEADLINE, failure_threshold=60,
            recovery_timeout=0.001, sleep=lambda seconds: time.sleep(seconds / 20))
        def ask(who: int) -> None:
            barrier.wait(10)
            for turn in range(who, CALLS, THREADS):
                prompt = f"{PROMPT}{turn:x}/{random.random()}"
                begin = running()
                try:
                    response = chain.chat(prompt)
                except Exception as error:
                    wrong.append(f"{turn}: {type(error).__name__}")
                    continue
                times.append(running() - begin)
                answered[response.provider] += 1
                if response.text != answer_to(prompt):
                    wrong.append(f"{turn}: another text by {response.provider}")
        barrier = threading.Barrier(THREADS)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(ask, range(THREADS)))
        chain.close()
        opened = chain.tiers[0].breaker.snapshot().opened
        seen = Counter(entry.fault for entry in ill.log)
    gc.collect()
    print(f"\n{len(times)} answers to {CALLS} calls in {time.monotonic() - start:.0f} s, "
        f"slowest {max(times):.2f} s; {sum(seen.values())} requests to the faulty server, of "
        f"{len(seen)} faults; its breaker opened {opened} times; answered by {dict(answered)}")
    assert not wrong and len(times) == CALLS
    assert max(times) < DEADLINE * 1.05 + 0.1
    assert descriptors() <= files and threading.active_count() <= threads
    assert answered["ill"] and answered["well"] and opened and set(KINDS) <= set(BY_NAME)
    if FULL:
        assert sum(seen.values()) >= 3000 and set(seen) == {"healthy", *KINDS}
        assert min(seen.values()) >= 100


def held() -> int:
    """Bytes of all objects, without what coverage keeps of each thread of the server."""
    beside = [tracemalloc.Filter(False, name) for name in ("*coverage*", tracemalloc.__file__)]
    snapshot = tracemalloc.take_snapshot().filter_traces(beside)
    return sum(trace.size for trace in snapshot.traces)


@pytest.mark.quiet
@pytest.mark.parametrize("name", ["healthy", "garbled_event", "page_500", "html"])
def test_memory_does_not_grow_with_the_number_of_calls(name: str,
        caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "copilot_router")  # pytest keeps each record
    with FaultServer() as server:
        tier = ProviderTier("a", Chat().client(KEY, server.url), [name], retries=0)
        with FailoverChain([tier], failure_threshold=10_000) as chain:
            def call(times: int) -> None:
                for _ in range(times):
                    try:
                        chain.chat("hi", timeout=5)
                    except RouterError:
                        pass
                server.log.clear()
                gc.collect()
            call(20)
            tracemalloc.start()
            try:
                call(50)
                grown = [20_000]
                while grown[-1] >= 20_000 and len(grown) < 4:  # something else may grow once
                    before = held()
                    call(200)
                    grown.append(held() - before)
                assert grown[-1] < 20_000, grown
            finally:
                tracemalloc.stop()


@pytest.mark.quiet
def test_an_interrupt_inside_a_weak_reference_keeps_no_connection(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler may also raise in a callback of the standard library, which passes over it."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with FaultServer() as server:
        files = descriptors()
        for number in range(12):
            looks = itertools.count()
            def strike(frame: Any, what: str, _: Any, looks: Any = looks, at: int = number) -> None:
                inside = what == "call" and "weakref" in frame.f_code.co_filename
                if inside and next(looks) == at:
                    raise KeyboardInterrupt
            tier = ProviderTier("a", Chat().client(KEY, server.url), ["healthy"])
            with FailoverChain([tier]) as chain:
                chain.chat("hi", timeout=5)
                sys.setprofile(strike)
                try:
                    list(chain.stream("hi", timeout=5))
                except KeyboardInterrupt:
                    pass
                finally:
                    sys.setprofile(None)
        until = time.monotonic() + 5
        while descriptors() > files and time.monotonic() < until:
            gc.collect()
        assert descriptors() <= files


# -- the rules that conftest.py lays down
HERE = Path(__file__).resolve().parent
HEAD = """
import logging, os, socket, sys, threading
import pytest
from copilot_router import *
key = "sk-test-" + "planted-key-1"
prompt = "the secret " + "question that was planted"
event = threading.Event()
def chain(*script, **settings):
    return FailoverChain([ProviderTier("a", ScriptedProvider(script), ["m"])], **settings)
def fails(error, messages="x"):
    with pytest.raises((RouterError, OSError)):
        chain(error, error).chat(messages)
def swallowed(function, *args):
    try:
        function(*args)
    except BaseException:
        pass
"""
#: Name of a test -> its body, and what its report must say.
PLANTED = {"log_record": ("logging.getLogger('copilot_router').debug('sent %s', key)", "eaked: "),
    "error": ("fails(BadRequest(f'cannot read {prompt}'))", "eaked: "),
    "attribute_of_an_error": ("fails(BadRequest('x', code=key))", "eaked: "),
    "event": ("FailoverChain([ProviderTier('a', ScriptedProvider(['x']))], "
              "on_event=lambda event: None).chat('x', model=key)", "eaked: "),
    "repr": ("chain(LLMResponse('fine', model=prompt)).chat('x')", "eaked: "),
    "stdout": ("print('the key is', key)", "eaked: "),
    "connecting": ("swallowed(socket.create_connection, ('192.0.2.1', 80), 0.01)", "only loopback"),
    "a_look_up": ("swallowed(socket.getaddrinfo, 'example.org', 80)", "only loopback"),
    "a_thread": ("threading.Thread(target=event.wait, name='left', daemon=True).start()",
                 "the thread left is still running"), "environment": ("event.set()\n"
                    "    assert not [x for x in os.environ if '192.0.2.1' in os.environ[x]]", None)}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a session of its own: what it finds must not be found in this one."""
    folder = tmp_path_factory.mktemp("planted")
    rules = (HERE / "conftest.py").read_text(encoding="utf-8")
    rules = rules.replace("_GRACE = 5.0", "_GRACE = 0.01")
    (folder / "conftest.py").write_text(rules, encoding="utf-8")
    tests = [f"def test_{name}():\n    {body}\n" for name, (body, _) in PLANTED.items()]
    (folder / "test_planted.py").write_text(HEAD + "".join(tests), encoding="utf-8")
    names = ("OPENAI_API_KEY", "https_proxy", "HTTP_PROXY", "LMSTUDIO_BASE_URL", "NO_PROXY")
    environment = {**os.environ, **dict.fromkeys(names, "http://192.0.2.1:1"),
        "PY_COLORS": "0", "COLUMNS": "250",  # lines of the summary are cut at its width
        "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent)))}
    command = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "-rA", "--tb=short", str(folder)], env=environment, cwd=folder,
        capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", PLANTED)
def test_conftest_finds_what_it_is_for_and_nothing_else(outcomes: str, name: str) -> None:
    told = PLANTED[name][1]
    lines = [line for line in outcomes.splitlines() if line.endswith(f"::test_{name}")
            or f"::test_{name} - " in line]
    ill = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    assert lines and bool(ill) == (told is not None)
    assert all((told or "") in line for line in ill)

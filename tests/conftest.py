"""No test reaches beyond this machine, sees its environment, leaves threads, or shows a secret."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.dialects import dialect  # noqa: F401 - a fixture
from support.leaks import MARKS, LeakWatch
from support.stores import clock, make_store, redis_server, redis_url  # noqa: F401 - fixtures

_real_connect = socket.socket.connect
_real_connect_ex = socket.socket.connect_ex
_real_getaddrinfo = socket.getaddrinfo

#: What a person may have set for their own use. Upper and lower case mean the same.
_PREFIXES = ("OPENAI_", "LM_", "LMSTUDIO_", "ANTHROPIC_", "GEMINI_", "GOOGLE_", "OLLAMA_", "AZURE_")
_ENDINGS = ("_PROXY", "_API_KEY", "_API_TOKEN", "_BASE_URL")
_NAMES = ("NETRC", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "NO_COLOR", "FORCE_COLOR")
#: Seconds that a thread has to end once its test is over.
_GRACE = 5.0


class ReachedOut(AssertionError):
    """A test wanted to talk to another machine."""


def _is_local(host: Any) -> bool:
    if isinstance(host, (bytes, bytearray)):
        host = host.decode("ascii", "replace")
    return host in (None, "", "localhost", "::1") or str(host).startswith("127.")


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sockets lead to this machine only. A test that tries otherwise fails, whatever it catches."""
    attempts: list[str] = []
    def check(host: Any) -> None:
        if not _is_local(host):
            attempts.append(f"a test wants to reach {host!r}: only loopback is allowed")
            raise ReachedOut(attempts[-1])
    def connect(self: socket.socket, address: Any) -> None:
        check(address[0] if isinstance(address, tuple) else None)
        _real_connect(self, address)
    def connect_ex(self: socket.socket, address: Any) -> int:
        check(address[0] if isinstance(address, tuple) else None)
        return _real_connect_ex(self, address)
    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if str(host).endswith(".invalid"):  # RFC 6761: never resolves; nobody is asked
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        check(host)
        return _real_getaddrinfo(host, *args, **kwargs)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    if attempts:
        pytest.fail("; ".join(attempts))


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, address, proxy or colour setting of the person who runs the tests."""
    for name in list(os.environ):
        upper = name.upper()
        ours = upper.endswith(_ENDINGS) or upper.startswith(_PREFIXES)
        if ours or upper in _NAMES:
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _no_thread_survives() -> Iterator[None]:
    """A test that leaves a thread behind fails: the thread would run into the next test."""
    before = set(threading.enumerate())
    yield
    until = time.monotonic() + _GRACE
    for thread in set(threading.enumerate()) - before:
        if thread.daemon and "process_request_thread" in thread.name:
            continue  # a handler of http.server, which ends by itself
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            pytest.fail(f"the thread {thread.name} is still running")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "quiet: run without the library's log at DEBUG")


@pytest.fixture(autouse=True)
def _nothing_leaks(request: pytest.FixtureRequest,
        monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A key, a prompt or an answer in a log, an event, an error or a repr fails the test."""
    watch = LeakWatch()
    watch.install(monkeypatch, quiet=request.node.get_closest_marker("quiet") is not None)
    yield
    if watch.found:
        pytest.fail("leaked: " + "; ".join(watch.found[:3]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """What a test printed is looked at, too."""
    report = yield
    printed = MARKS.search("\n".join(text for _, text in report.sections))
    if printed and report.passed:
        report.outcome = "failed"
        report.longrepr = f"leaked: {printed.group()!r} was printed or logged"
    return report

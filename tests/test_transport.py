"""The HTTP transport over real sockets: connections, deadlines, forks, TLS and proxies."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.faults import Peer, chunked, descriptors, event, peer

from copilot_router import (
    FailoverChain,
    InvalidResponse,
    OpenAIProvider,
    ProviderTier,
    ProviderTimeout,
    ProviderUnavailable,
    ServerError,
    _Answer,
    _Limits,
    _unchunked,
)

KEY = "sk-test-transport-key-1234567890"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


ANSWER = event("good") + event(finish="stop") + b"data: [DONE]\n\n"


STREAM = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*ANSWER.splitlines(keepends=True))


def healthy(server: Peer, connection: socket.socket, request: bytes) -> bool:
    connection.sendall(STREAM)
    return True


@contextmanager
def provider(url: str, **settings: object) -> Iterator[OpenAIProvider]:
    made = OpenAIProvider(KEY, url, **settings)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


def test_twenty_calls_use_one_connection() -> None:
    """A finished stream gives its connection back, because the body is read to its end and not only to [DONE]."""
    with peer(healthy) as server, provider(server.url) as client:
        for _ in range(20):
            assert client.chat("hi", model="m", timeout=5).text == "good"
        assert server.connections == 1


def test_whole_json_uses_one_connection_too() -> None:
    """An answer with a Content-Length gives its connection back."""
    body = b'{"choices": [{"message": {"content": "whole"}, "finish_reason": "stop"}]}'

    def whole(server: Peer, connection: socket.socket, request: bytes) -> bool:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        return True

    with peer(whole) as server, provider(server.url, stream_upstream=False) as client:
        for _ in range(5):
            assert client.chat("hi", model="m", timeout=5).text == "whole"
        assert server.connections == 1


def test_closing_leaves_the_provider_usable() -> None:
    """close() drops the pool; the next call makes a new one."""
    with peer(healthy) as server, provider(server.url) as client:
        client.chat("hi", model="m", timeout=5)
        client.close()
        assert client.chat("hi", model="m", timeout=5).text == "good"
        assert server.connections == 2


def test_a_kept_connection_that_was_closed_is_replaced_unseen() -> None:
    """The server closes after each answer without saying so: every call still succeeds, with no failed attempt."""

    def answer_and_close(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(STREAM)
        return False

    with peer(answer_and_close) as server, provider(server.url) as client:
        chain = FailoverChain([ProviderTier("only", client, ["m"])])
        for _ in range(5):
            response = chain.chat("hi", timeout=5)
            assert [attempt.outcome for attempt in response.attempts] == ["ok"]


def test_a_kept_connection_reset_after_sending_is_retried_once_on_a_new_one() -> None:
    """The race of keep-alive: the server drops the connection on receiving the second request."""

    def drop_the_second(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if len(server.requests) == 2:
            return False
        connection.sendall(STREAM)
        return True

    with peer(drop_the_second) as server, provider(server.url) as client:
        assert client.chat("one", model="m", timeout=5).text == "good"
        assert client.chat("two", model="m", timeout=5).text == "good"
        assert (len(server.requests), server.connections) == (3, 2)


def test_a_new_connection_that_closes_is_not_retried_by_the_transport() -> None:
    """Only a reused connection earns the unseen retry; otherwise it is a ServerError and the policy's business."""
    with peer(lambda *_: False) as server, provider(server.url) as client:
        with pytest.raises(ServerError):
            client.chat("hi", model="m", timeout=5)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "data",
    [STREAM, HEAD + b"\r\n" + b": keep-alive\n\n" * 500, HEAD + b"\r\n" + event("x") * 200],
    ids=["from the status line on", "keep-alives", "tokens"],
)
def test_a_dripping_server_cannot_hold_a_call(data: bytes) -> None:
    """A byte every 20 ms, wherever it drips: the call ends at its deadline."""

    def drip(server: Peer, connection: socket.socket, request: bytes) -> bool:
        server.drip(connection, data)
        return False

    with peer(drip) as server, provider(server.url) as client:
        start = time.monotonic()
        with pytest.raises(ProviderTimeout):
            client.chat("hi", model="m", timeout=0.5)
        assert time.monotonic() - start < 0.5 * 1.05 + 0.1


def test_a_server_that_does_not_read_cannot_hold_a_call() -> None:
    """The upload of a large body counts, too."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with provider(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            start = time.monotonic()
            with pytest.raises(ProviderTimeout):
                client.chat("x" * 20_000_000, model="m", timeout=0.6)
            assert time.monotonic() - start < 1.2  # 20 MB of JSON are written before the first byte is sent


def test_silence_is_judged_by_the_providers_own_limit() -> None:
    """When the attempt's time is over, silence that had reached the provider's own limit is named for what it is."""

    def silent(server: Peer, connection: socket.socket, request: bytes) -> bool:
        server.stopping.wait(5)
        return False

    with peer(silent) as server, provider(server.url, first_token_timeout=0.1) as client:
        with pytest.raises(ProviderTimeout) as patient:
            client.chat("hi", model="m", timeout=0.3, first_token_timeout=60)
        assert patient.value.code == "first_token_timeout"
    with peer(silent) as server, provider(server.url, first_token_timeout=5) as client:
        with pytest.raises(ProviderTimeout) as hurried:
            client.chat("hi", model="m", timeout=0.2)
        assert hurried.value.code == "attempt_timeout"


def test_the_callers_pauses_are_not_the_servers_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """stall_timeout counts the server's silence, never the time the caller takes between deltas."""

    def two_parts(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(HEAD + b"Connection: close\r\n\r\n" + event("one ") + event("two"))
        paused.wait(5)
        connection.sendall(event(finish="stop"))
        return False

    paused, pause = threading.Event(), [0.0]
    monkeypatch.setattr("copilot_router.time", types.SimpleNamespace(monotonic=lambda: time.monotonic() + pause[0]))
    with peer(two_parts) as server, provider(server.url, stall_timeout=2) as client:
        stream = client.stream("hi", model="m", timeout=60)
        assert next(stream) == "one "
        pause[0] = 10.0  # longer than the stall limit: this is the caller's own time
        paused.set()
        assert list(stream) == ["two"]


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to a thread")
@pytest.mark.parametrize("sent", [b"", HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(event("half"))[:-5]])
def test_a_tasks_time_limit_is_no_fault_of_the_server(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal's exception out of the middle of a request, before or after the headers, reaches the task; nobody is blamed."""

    class JobTimeout(Exception):
        """As RQ and Celery raise it."""

    def stop(*_: object) -> None:
        raise JobTimeout

    def silent(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(sent)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        connection.recv(1)  # until the client is gone
        return False

    module = types.ModuleType("rq.timeouts")
    module.BaseTimeoutException = JobTimeout  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rq.timeouts", module)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with peer(silent) as server, provider(server.url) as client:
            chain = FailoverChain([ProviderTier("only", client, ["m"]), ProviderTier("next", client, ["m"])])
            with pytest.raises(JobTimeout):
                chain.chat("hi", timeout=5)
            assert len(server.requests) == 1
            assert chain.tiers[0].breaker.snapshot().failures == 0
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_abandoned_stream_closes_its_connection() -> None:
    """Closing a stream early closes the connection and leaks no descriptor; the next call opens a new one."""
    with peer(healthy) as server, provider(server.url) as client:
        client.chat("hi", model="m", timeout=5)
        before = descriptors()
        for _ in range(5):
            stream = client.stream("hi", model="m", timeout=5)
            next(stream)
            stream.close()
        assert client.chat("hi", model="m", timeout=5).text == "good"
        assert descriptors() <= before + 1


def test_a_stream_may_be_read_in_another_thread() -> None:
    """The limits travel with the connection, not with the thread that opened it."""
    got: list[str] = []
    with peer(healthy) as server, provider(server.url) as client:
        stream = client.stream("hi", model="m", timeout=5)
        first = next(stream)
        reader = threading.Thread(target=lambda: got.extend(stream))
        reader.start()
        reader.join(5)
        assert [first, *got] == ["good"]


def test_sixteen_threads_share_a_provider() -> None:
    """Every caller gets the answer to its own question."""

    def echo(server: Peer, connection: socket.socket, request: bytes) -> bool:
        body = json.loads(request.partition(b"\r\n\r\n")[2])
        text = body["messages"][0]["content"]
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(event(text), event(finish="stop")))
        return True

    wrong: list[str] = []

    def ask(client: OpenAIProvider, who: int) -> None:
        barrier.wait(5)
        for turn in range(10):
            answer = client.chat(f"question {who}/{turn}", model="m", timeout=10).text
            if answer != f"question {who}/{turn}":
                wrong.append(answer)

    barrier = threading.Barrier(16)
    with peer(echo) as server, provider(server.url) as client:
        threads = [threading.Thread(target=ask, args=(client, who)) for who in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not wrong
        assert server.connections <= 16


FORK = """
import os, sys, threading
from copilot_router import FailoverChain, OpenAIProvider, ProviderTier
inside = threading.Event()
chain = FailoverChain([ProviderTier("t", OpenAIProvider("k" * 20, sys.argv[1]), ["m"])],
                      on_event=lambda event: inside.set() if event.kind == "attempt" else None)
assert chain.chat("before").text == "good"
inside.clear()
busy = threading.Thread(target=lambda: chain.chat("slow", timeout=20))
busy.start()
inside.wait(10)
child = os.fork()
if child == 0:
    ok = chain.chat("in the child", timeout=10).text == "good"
    os._exit(0 if ok else 1)
_, status = os.waitpid(child, 0)
busy.join()
assert chain.chat("after").text == "good"
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_uses_its_own_sockets() -> None:
    """Fork while another thread's call is under way: the child's call works, and so does the parent's next one."""

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if b'"slow"' in request:
            server.stopping.wait(0.3)
        connection.sendall(STREAM)
        return True

    root = str(Path(__file__).resolve().parent.parent)
    with peer(serve) as server:
        environment = {**os.environ, "PYTHONWARNINGS": "ignore::DeprecationWarning"}
        environment["PYTHONPATH"] = os.pathsep.join((root, environment.get("PYTHONPATH", "")))
        done = subprocess.run(
            [sys.executable, "-c", FORK, server.url], env=environment, timeout=60, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert server.connections == 2  # one of the parent's, one of the child's own


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """http_proxy is honoured, and the key goes along."""
    with peer(healthy) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        with provider("http://provider.invalid/v1") as client:
            assert client.chat("hi", model="m", timeout=5).text == "good"
        assert proxy.requests[0].startswith(b"POST http://provider.invalid/v1/chat/completions HTTP/1.1")
        assert KEY.encode() in proxy.requests[0]


def test_a_tunnel_through_a_proxy_that_refuses_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONNECT answered with 403: the provider cannot be reached."""

    def refuse(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        return False

    with peer(refuse) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        with provider("https://provider.invalid/v1") as client, pytest.raises(ProviderUnavailable):
            client.chat("hi", model="m", timeout=5)
        assert proxy.requests[0].startswith(b"CONNECT provider.invalid:443")


def test_a_dripping_proxy_cannot_hold_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer to CONNECT, a byte every 20 ms, is under the same deadline as everything else."""

    def drip(server: Peer, connection: socket.socket, request: bytes) -> bool:
        server.drip(connection, b"HTTP/1.1 200 OK\r\n" + b"X-Padding: padding\r\n" * 50 + b"\r\n")
        return False

    with peer(drip) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        with provider("https://provider.invalid/v1") as client:
            start = time.monotonic()
            with pytest.raises(ProviderTimeout):
                client.chat("hi", model="m", timeout=0.5)
            assert time.monotonic() - start < 0.5 * 1.05 + 0.1


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    """A server's side of TLS for provider.invalid and this machine, and the file with its certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    names = "subjectAltName=DNS:provider.invalid,IP:127.0.0.1"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=provider.invalid"]
    subprocess.run([*make, "-addext", names, "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


def over_tls(context: ssl.SSLContext, server: Peer, connection: socket.socket, serve: Any = healthy) -> bool:
    """Everything more on this connection, inside of TLS."""
    with context.wrap_socket(connection, server_side=True) as inside:
        while (request := server._request(inside)) and not server.stopping.is_set():
            server.requests.append(request)
            if not serve(server, inside, request):
                break
    return False


def test_tls_and_a_tunnel_through_a_proxy(tls: tuple[ssl.SSLContext, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """CONNECT, then TLS to the provider inside: one connection for all calls, and the proxy is not shown the key."""
    context, certificate = tls

    def tunnel(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        return over_tls(context, server, connection)

    with peer(tunnel) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        with provider("https://provider.invalid/v1") as client:
            assert [client.chat("hi", model="m", timeout=5).text for _ in range(3)] == ["good"] * 3
        assert proxy.connections == 1
        assert proxy.requests[0].startswith(b"CONNECT provider.invalid:443")
        assert KEY.encode() not in proxy.requests[0]
        assert [request.split(b" ", 2)[:2] for request in proxy.requests[1:]] == [[b"POST", b"/v1/chat/completions"]] * 3


def test_tls_without_a_proxy(tls: tuple[ssl.SSLContext, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same to the provider itself; what it drips is bounded as without TLS; a certificate that nobody knows is refused."""
    context, certificate = tls

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if b"drip" in request:
            server.drip(connection, HEAD + b"Connection: close\r\n\r\n" + event("x" * 2000))
        return healthy(server, connection, request)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server: Any = SimpleNamespace(requests=[], stopping=threading.Event(), _request=Peer._request)
        server.drip = functools.partial(Peer.drip, server)

        def accept() -> None:
            while not server.stopping.is_set():
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    over_tls(context, server, connection, serve)

        thread = threading.Thread(target=accept)
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        with provider(url) as client, pytest.raises(ProviderUnavailable, match="TLS failed"):
            client.chat("hi", model="m", timeout=5)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        with provider(url) as client:
            assert [client.chat("hi", model="m", timeout=5).text for _ in range(3)] == ["good"] * 3
            start = time.monotonic()
            with pytest.raises(ProviderTimeout):
                client.chat("drip", model="m", timeout=0.5)
            assert time.monotonic() - start < 0.5 * 1.05 + 0.1
        server.stopping.set()
        with socket.socket() as waker:
            waker.connect_ex(listener.getsockname())
        thread.join(5)


def test_a_server_without_tls_is_unavailable_over_https() -> None:
    """A failed handshake is ProviderUnavailable, in time."""

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk_plain() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=talk_plain)
        thread.start()
        with provider(f"https://127.0.0.1:{listener.getsockname()[1]}") as client, pytest.raises(ProviderUnavailable):
            client.chat("hi", model="m", timeout=5)
        thread.join(5)


def test_a_handshake_that_hangs_ends_at_the_connect_limit() -> None:
    """TLS counts as connecting."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        with provider(url, connect_timeout=0.3) as client:
            start = time.monotonic()
            with pytest.raises((ProviderUnavailable, ProviderTimeout)):
                client.chat("hi", model="m", timeout=5)
            assert time.monotonic() - start < 0.6


def test_names_that_do_not_resolve_are_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DNS failure says so."""

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with provider("http://nowhere.invalid") as client, pytest.raises(ProviderUnavailable, match="resolved"):
        client.chat("hi", model="m", timeout=5)


def test_the_second_address_is_tried_when_the_first_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several addresses share the connect limit."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        closed = unused.getsockname()[1]
    with peer(healthy) as server:

        def two(*_: object, **__: object) -> list[tuple[object, ...]]:
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in (closed, server.port)
            ]

        monkeypatch.setattr(socket, "getaddrinfo", two)
        with provider("http://two.invalid:1234") as client:
            assert client.chat("hi", model="m", timeout=5).text == "good"


@pytest.mark.parametrize("size", [1, 7, 64])
def test_an_answer_is_the_same_however_it_is_cut(size: int) -> None:
    """Chunks of any size, UTF-8 split between them."""
    text = "Grüße, 世界 \u2028 \U0001f600"
    body = event(text) + event(finish="stop") + b"data: [DONE]\n\n"
    pieces = [body[at : at + size] for at in range(0, len(body), size)]

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*pieces))
        return True

    with peer(serve) as server, provider(server.url) as client:
        assert client.chat("hi", model="m", timeout=5).text == text


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_compressed_answer_is_read(coding: str) -> None:
    """We ask for none, but a server may compress all the same."""
    import gzip
    import zlib

    data = gzip.compress(ANSWER) if coding == "gzip" else zlib.compress(ANSWER)

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        head = HEAD + f"Content-Encoding: {coding}\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        connection.sendall(head + data)
        return True

    with peer(serve) as server, provider(server.url) as client:
        assert client.chat("hi", model="m", timeout=5).text == "good"


def test_a_gzip_bomb_is_stopped_at_the_limit() -> None:
    """max_response_bytes counts decompressed bytes, and memory stays bounded."""
    import gzip

    data = gzip.compress(b" " * 30_000_000)

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        return False

    with peer(serve) as server, provider(server.url, max_response_bytes=1_000_000) as client:
        too_large = pytest.raises(InvalidResponse, match="max_response_bytes")
        with too_large:
            client.chat("hi", model="m", timeout=5)


def test_all_kept_connections_may_have_been_dropped() -> None:
    """The unseen retry insists on a new connection, not on the next kept one."""
    both = threading.Barrier(2)
    old: list[socket.socket] = []

    def one_answer_each(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if connection in old:
            return False
        if b'"first"' in request:
            both.wait(5)
        old.append(connection)
        connection.sendall(STREAM)
        return True

    with peer(one_answer_each) as server, provider(server.url) as client:
        threads = [threading.Thread(target=client.chat, args=("first",), kwargs={"model": "m"}) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        assert client.chat("second", model="m", timeout=5).text == "good"
        assert server.connections == 3


def test_a_new_connection_is_insisted_on() -> None:
    """After a kept connection failed, no other kept one is trusted, whoever put it back meanwhile."""
    with peer(healthy) as server, provider(server.url) as client:
        client.chat("hi", model="m", timeout=5)
        limits = _Limits(5.0, 5.0, 5.0, 5.0, (5.0, 5.0))
        limits.fresh = True
        client._send("POST", "/chat/completions", b'{"messages": [{"content": "x"}]}', limits).close()
        assert not limits.reused
        assert server.connections == 2


def test_no_time_is_left_for_a_read() -> None:
    """The limits say so before the socket is asked."""
    limits = _Limits(0.0, 5.0, 5.0, 5.0, (5.0, 5.0))
    for left in (limits.left, limits.connect_left):
        with pytest.raises(TimeoutError):
            left()


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n" % 500 + event("half"),
        HEAD + b"Connection: close\r\n\r\n" + event("half"),
        HEAD + b"Content-Length: 500\r\n\r\n" + event("half"),
        HEAD + b"Content-Length: 500\r\nContent-Type: application/json\r\n\r\n{}",
    ],
    ids=["chunked", "close", "length", "whole"],
)
def test_17_a_cut_answer_is_no_answer(data: bytes) -> None:
    """However the body's end is told."""

    def cut(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(data)
        return False

    with peer(cut) as server, provider(server.url) as client, pytest.raises(InvalidResponse, match="truncated"):
        client.chat("hi", model="m", timeout=5)


CHUNKED = {
    "plain": b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n",
    "an extension": b"3;name=value\r\nabc\r\n4 ; x\r\ndefg\r\n0;last\r\n\r\n",
    "trailers": b"3\r\nabc\r\n4\r\ndefg\r\n0\r\nExpires: never\r\nA: b\r\n\r\n",
    "line feeds": b"3\nabc\r\n4\ndefg\r\n0\n\n",
    "zeros and capitals": b"0003\r\nabc\r\n0000000000004\r\ndefg\r\n000\r\n\r\n",
    "line ends inside": b"a\r\n\r\n0\r\n\r\n\n\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "no blank line": b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n",
}


def unchunked(*reads: bytes) -> list[bytes]:
    left = list(reads)
    return list(_unchunked(lambda: left.pop(0) if left else b""))


@pytest.mark.parametrize("body", CHUNKED.values(), ids=CHUNKED)
def test_chunks_may_be_cut_anywhere(body: bytes) -> None:
    """Two reads, or a read for every byte: the same content, nothing empty in it, and as much at once as has come."""
    content = b"\r\n0\r\n\r\n\n\r\nabc" if body.startswith(b"a") else b"abcdefg" if b"defg" in body else b"abc"
    assert unchunked(body) == [content]
    for at in range(1, len(body)):
        pieces = unchunked(body[:at], body[at:])
        assert b"".join(pieces) == content and all(pieces)
    assert unchunked(*(body[at : at + 1] for at in range(len(body)))) == [content[at : at + 1] for at in range(len(content))]


def test_content_is_not_held_back_for_the_rest_of_its_chunk() -> None:
    reads = iter([b"8\r\nab", b"cd", b"efgh", b"\r\n0\r\n", b"\r\n"])
    chunks = _unchunked(lambda: next(reads))
    assert [next(chunks), next(chunks), next(chunks)] == [b"ab", b"cd", b"efgh"]
    assert list(reads) == [b"\r\n0\r\n", b"\r\n"]


def test_nothing_is_read_behind_the_blank_line() -> None:
    reads = iter([b"1\r\na\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n", b"more"])
    assert list(_unchunked(lambda: next(reads))) == [b"a"]
    assert list(reads) == [b"more"]


@pytest.mark.parametrize(
    "size", [b"", b"x", b"-1", b"-0x1", b"3 3", b"HTTP/1.1 200 OK", b"\xff", b"1" * 70_000, b"1" * 65_530]
)
def test_a_chunk_without_a_size_is_no_answer(size: bytes) -> None:
    for reads in ([size + b"\r\nabc\r\n0\r\n\r\n"], [b"1\r\na\r\n" + size, b"\r\nabc\r\n0\r\n\r\n"]):
        with pytest.raises(InvalidResponse, match=r"garbled HTTP|truncated"):
            unchunked(*reads)


def test_trailers_without_end_are_no_answer() -> None:
    endless = (b"0\r\n", *[b"X-Trailer: " + b"x" * 1000 + b"\r\n"] * 1000)
    with pytest.raises(InvalidResponse, match="garbled HTTP"):
        unchunked(*endless)


@pytest.mark.parametrize("body", CHUNKED.values(), ids=CHUNKED)
def test_a_chunked_body_that_is_cut_says_so(body: bytes) -> None:
    """Until the size of the last chunk, that is: what may stand behind it is of no use to anybody."""
    end = body.rindex(b"\n0") + 2
    for at in range(1, end):
        with pytest.raises(InvalidResponse, match="truncated"):
            unchunked(body[:at])


def test_a_complete_answer_survives_a_cut_afterwards() -> None:
    """The finish reason has come; that the connection then breaks costs nothing. A role alone is no sign of life."""
    role = b'data: {"choices": [{"delta": {"role": "assistant"}, "finish_reason": null}]}\n\n'
    body = role + event("all") + event(finish="stop")

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n")
        return False

    with peer(serve) as server, provider(server.url) as client:
        assert client.chat("hi", model="m", timeout=5).text == "all"


def test_a_mid_stream_error_is_classified() -> None:
    """An error object in the middle of a stream, with the usage so far."""
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 7}}\n\n'
    error = b'data: {"error": {"message": "overloaded", "code": "server_is_overloaded"}}\n\n'

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(HEAD + b"Connection: close\r\n\r\n" + event("par") + usage + error)
        return False

    with peer(serve) as server, provider(server.url) as client, pytest.raises(ServerError) as raised:
        client.chat("hi", model="m", timeout=5)
    assert raised.value.usage is not None
    assert raised.value.usage.prompt_tokens == 7


def test_no_time_to_connect_and_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connect limit of 0, and a name without addresses."""
    with provider("http://127.0.0.1:9", connect_timeout=0) as client, pytest.raises(ProviderUnavailable, match="timeout"):
        client.chat("hi", model="m", timeout=5)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    with provider("http://nowhere.invalid") as client, pytest.raises(ProviderUnavailable, match="cannot connect"):
        client.chat("hi", model="m", timeout=5)


def test_no_time_at_all_is_a_timeout() -> None:
    """timeout=0: nothing is sent."""
    with peer(healthy) as server, provider(server.url) as client:
        with pytest.raises(ProviderTimeout):
            client.chat("hi", model="m", timeout=0)
        assert not server.requests


def test_a_stream_that_is_given_up_needs_no_collector() -> None:
    """What was read of it goes at once, also in programs that have switched the collector off."""
    with peer(healthy) as server, provider(server.url) as client:
        before = set(_Answer._under_way)
        stream = client.stream("hi", model="m", timeout=5)
        assert next(stream) == "good"
        (answer,) = (weakref.ref(found) for found in _Answer._under_way - before)
        before.clear()
        gc.disable()
        try:
            stream.close()
            del stream
            assert answer() is None
        finally:
            gc.enable()

"""The transport over real sockets: connecting, proxies, TLS, limits, bodies, kept connections."""

from __future__ import annotations

import contextlib
import gc
import gzip
import io
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import requests
import urllib3
from support.fakes import error_of, event, in_threads, running, tier
from support.faults import chunked
from support.server import Canned, Dripping, Peer, received, reply
from support.stores import Interrupted, at_each_line, done, needs_fork, python, spare_port

from copilot_router import (FailoverChain, InvalidResponse, OpenAIProvider, ProviderError,
    ProviderTier, ProviderTimeout, ProviderUnavailable, RateLimited, ServerError)

KEY = "sk-test-transport-key-1234567890"
PLAIN = "http://provider.invalid/v1"
OK = b"HTTP/1.1 200 OK\r\n"
HEAD = OK + b"Content-Type: text/event-stream\r\n"
CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ANSWER = event("good") + event(finish="stop") + b"data: [DONE]\n\n"
STREAM = CHUNKS + chunked(*ANSWER.splitlines(keepends=True))
WHOLE = json.dumps({"choices": [{"message": {"content": "good"},
    "finish_reason": "stop"}]}).encode()


def says(data: bytes, keep: bool = True, then_silent: bool = False) -> Callable[..., bool]:
    """A server that gives this answer to each request."""
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(data)
        if then_silent:
            server.stopping.wait(10)
        return keep
    return serve


def silent(server: Peer, connection: socket.socket, request: bytes) -> bool:
    return server.stopping.wait(10)


healthy = says(STREAM)


@contextlib.contextmanager
def provider(url: str, **settings: Any) -> Iterator[OpenAIProvider]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the key that goes out over plain http
        made = OpenAIProvider(KEY, url, **settings)
    try:
        yield made
    finally:
        made.close()


def chain_of(url: str) -> FailoverChain:
    """Its second tier answers "from b"."""
    return FailoverChain([ProviderTier("a", OpenAIProvider(KEY, url), ["m"]), tier("b", "from b")])


def ask(client: OpenAIProvider, text: str = "hi", **options: Any) -> str:
    return client.chat(text, **{"model": "m", "timeout": 5, **options}).text


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    start = running()
    yield
    assert running() - start < seconds * 1.05 + 0.15


def fails(client: OpenAIProvider, kind: Any, text: str = "hi", *, seconds: float = 9.0,
        match: str | None = None, **options: Any) -> ProviderError:
    """The error of a call that must fail within these seconds."""
    with within(seconds):
        return error_of(kind, ask, client, text, match=match, **options)


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``proxied(url)``: a provider; every kind of request has this proxy in the environment."""
    def use(url: str, base: str = "https://provider.invalid/v1", **settings: Any) -> Any:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, url)
            monkeypatch.setenv(name.upper(), url)
        return provider(base, **settings)
    return use


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """``resolved(*ports)``: every name has these ports of loopback; returns ports connected to."""
    tried: list[int] = []
    connect = socket.socket.connect
    def noted(self: socket.socket, address: Any) -> None:
        tried.append(address[1])
        connect(self, address)
    def use(*ports: int) -> list[int]:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        monkeypatch.setattr(socket.socket, "connect", noted)
        return tried
    return use


# -- connections
@pytest.mark.parametrize("answer", [STREAM, reply(WHOLE)], ids=["stream", "whole"])
def test_calls_use_one_connection_until_the_provider_is_closed(answer: bytes) -> None:
    with Peer(says(answer)) as server, provider(server.url) as client:
        assert [ask(client) for _ in range(5)] == ["good"] * 5 and server.connections == 1
        client.close()
        assert ask(client) == "good" and server.connections == 2


def test_a_ping_gives_its_connection_back_and_ends_in_its_time() -> None:
    with Peer(says(reply({"data": []}))) as server, provider(server.url) as client:
        for _ in range(3):
            client.ping()
        assert (server.connections, len(server.requests)) == (1, 3)
    with Peer(silent) as server, within(0.2), pytest.raises(ProviderTimeout):
        OpenAIProvider(KEY, server.url).ping(0.2)


@pytest.mark.parametrize("told", [b"", b"HTTP/1.1 408 Idle\r\nContent-Length: 9\r\n\r\n"])
def test_all_kept_connections_may_have_been_dropped(told: bytes) -> None:
    both = threading.Barrier(2)
    old: list[socket.socket] = []
    def one_answer_each(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if connection in old:
            connection.sendall(told)
            return False
        if b'"first"' in request:
            both.wait(5)
        old.append(connection)
        connection.sendall(STREAM)
        return True
    with Peer(one_answer_each) as server, provider(server.url) as client:
        for thread in in_threads(2, lambda: ask(client, "first")):
            thread.join(5)
        assert ask(client, "second") == "good" and server.connections == 3


def test_more_connections_at_once_than_are_kept_and_streams_that_another_thread_reads() -> None:
    rest: list[list[str]] = []
    with Peer(healthy) as server, provider(server.url) as client:
        streams = [client.stream("hi", model="m", timeout=20) for _ in range(101)]
        assert [next(stream) for stream in streams] == ["good"] * 101
        (reader,) = in_threads(1, lambda: rest.extend(map(list, streams)))
        reader.join(5)
        assert rest == [[]] * 101 and ask(client) == "good"
        assert server.connections == 101


def test_a_kept_connection_takes_the_limits_of_the_new_request() -> None:
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        return (healthy(server, connection, request) if b"one" in request
            else silent(server, connection, b""))
    with Peer(serve) as server, provider(server.url, first_token_timeout=8) as client:
        assert ask(client, "one", timeout=60) == "good"
        fails(client, ProviderTimeout, "two", timeout=0.2, seconds=0.2)
        assert server.connections == 1


def test_a_connection_that_was_idle_for_long_is_not_used_again(monkeypatch: Any) -> None:
    """A firewall may have dropped it without a word."""
    real, later = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + later[0])
    with Peer(healthy) as server, provider(server.url) as client:
        for seconds, connections in ((0, 1), (50, 1), (120, 2)):
            later[0] = seconds
            assert (ask(client), server.connections) == ("good", connections)


@pytest.mark.quiet
@pytest.mark.filterwarnings("ignore:unclosed <socket")  # it is closed all the same
def test_no_connection_is_left_to_the_garbage_collector(resolved: Any,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """An address refuses, a stream is abandoned, an answer is garbled, an interrupt strikes."""
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(b"?" if b"garbled" in request else STREAM)
        return b"garbled" not in request
    def make() -> OpenAIProvider:
        client = OpenAIProvider("", f"http://provider.invalid:{spare_port()}/v1")
        next(client.stream("hi", model="m", timeout=5))
        return client
    def work(client: OpenAIProvider) -> None:
        fails(client, ProviderError, "garbled")
        ask(client)
        client.close()
    def interrupt(_: Any) -> None:
        raise Interrupted
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # raised by a finalizer
    with Peer(serve) as server, contextlib.ExitStack() as stack:
        resolved(spare_port(), server.port)
        gc.disable()
        stack.callback(gc.enable)
        for point, client in at_each_line(make, work, interrupt, "call c_return", callers=False):
            client.close()
            until = time.monotonic() + 5
            while server._open:
                assert time.monotonic() < until, point


FORK = """
import os, sys, threading
from copilot_router import OpenAIProvider
client = OpenAIProvider("k" * 20, sys.argv[1])
assert client.chat("before", model="m").text == "good"
busy = threading.Thread(target=lambda: client.chat("slow", model="m", timeout=20))
busy.start()
while not sys.stdin.read(1): pass
child = os.fork()
if child == 0:
    os._exit(0 if client.chat("in the child", model="m", timeout=10).text == "good" else 1)
_, status = os.waitpid(child, 0)
busy.join()
assert client.chat("after", model="m").text == "good"
sys.exit(os.waitstatus_to_exitcode(status))
"""


@needs_fork
def test_a_forked_child_uses_its_own_sockets() -> None:
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if b'"slow"' in request:
            child.stdin.write("x")
            child.stdin.flush()
            forked.wait(10)
        if b"in the child" in request:
            forked.set()
        return healthy(server, connection, request)
    forked = threading.Event()
    with Peer(serve) as server:
        child: Any = python(FORK, server.url)
        assert child.wait(30) == 0
        done(child)
        assert server.connections in (2, 3)  # the parent's one or two, and the child's own


# -- connecting
def test_the_second_address_is_tried_and_comes_first_in_the_next_call(resolved: Any) -> None:
    with Peer(healthy) as server, provider("http://two.invalid", headers={"Host": "h"}) as client:
        closed = spare_port()
        tried = resolved(closed, server.port)
        assert ask(client) == "good" and tried == [closed, server.port]
        client.close()
        assert ask(client) == "good" and tried == [closed, server.port, server.port]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's queue of connections")
def test_an_address_that_swallows_packets_costs_its_share_once(resolved: Any) -> None:
    with socket.socket() as full, Peer(healthy) as server, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        with provider("http://two.invalid", connect_timeout=0.6) as client:
            resolved(full.getsockname()[1], server.port)
            with within(0.6):
                assert ask(client) == "good"
            client.close()
            with within(0.1):
                assert ask(client) == "good"
        with provider("http://one.invalid", connect_timeout=0.1) as client:
            resolved(full.getsockname()[1])
            error = fails(client, ProviderUnavailable, match="connect timeout", seconds=0.3)
            assert error.code == "connect_timeout"


def test_what_cannot_be_connected_to_is_unavailable(resolved: Any) -> None:
    here, told = f"http://127.0.0.1:{spare_port()}", "the name cannot be resolved"
    for url, settings, match in (("http://nowhere.invalid", {}, told), (here, {}, "refused"),
                                 (here, {"connect_timeout": 0}, "connect timeout")):
        with provider(url, **settings) as client:
            fails(client, ProviderUnavailable, match=match)
    resolved()
    with provider("http://nowhere.invalid") as client:
        fails(client, ProviderUnavailable)


@pytest.mark.parametrize("proxy", ["", "socks5", "http"])
@pytest.mark.parametrize("ahead", [0, 60])
def test_a_socket_whose_time_ran_out_while_it_connected_is_closed(proxy: str, ahead: int,
        resolved: Any, proxied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, late, made = time.monotonic, [0], []
    connect, begin = socket.socket.connect, socket.socket.__init__
    def slow(self: socket.socket, address: Any) -> None:
        connect(self, address)
        late.append(ahead)
    def noted(self: socket.socket, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        made.append(self)
    with socket.create_server(("127.0.0.1", 0)) as silent_one:
        here = "127.0.0.1:{1}".format(*silent_one.getsockname())
        url = f"http://{'provider.invalid' if proxy else here}/v1"
        with proxied(f"{proxy or 'http'}://{here}", url, connect_timeout=ahead / 2) as client:
            client.first_token_timeout = 99
            monkeypatch.setattr(time, "monotonic", lambda: clock() + sum(late))
            monkeypatch.setattr(socket.socket, "connect", slow)
            monkeypatch.setattr(socket.socket, "__init__", noted)
            error = fails(client, ProviderUnavailable, seconds=70, timeout=99)
            assert sum(late) == ahead and all(one.fileno() == -1 for one in made)
            assert proxy == "socks5" or error.code == "connect_timeout"
            monkeypatch.undo()


# -- limits
def test_a_server_that_does_not_read_cannot_hold_a_call() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with provider(url) as client:  # 20 MB of JSON are written first
            fails(client, ProviderTimeout, "x" * 20_000_000, timeout=0.6, seconds=1.2)


@pytest.mark.parametrize(("own", "options", "code"), [(0.1, {"timeout": 5}, "first_token_timeout"),
    (0.1, {"timeout": 0.3, "first_token_timeout": 60}, "first_token_timeout"),
    (5, {"timeout": 0.2}, "attempt_timeout"), (5, {"timeout": 0}, "attempt_timeout"),
    (5, {"first_token_timeout": 0.1}, "first_token_timeout")])
def test_silence_is_judged_by_the_providers_own_limit(own: float, options: dict[str, float],
        code: str) -> None:
    with Peer(silent) as server, provider(server.url, first_token_timeout=own) as client:
        error = fails(client, ProviderTimeout, **options)
        silent_for = "no first token for" if code == "first_token_timeout" else "no whole answer"
        assert (error.code, str(error).startswith(silent_for)) == (code, True)
        assert len(server.requests) == (options.get("timeout") != 0)  # then nothing is sent


def test_the_callers_own_time_is_not_the_servers_silence() -> None:
    paused = threading.Event()
    def two_parts(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(HEAD + b"Connection: close\r\n\r\n" + event("one ") + event("two"))
        paused.wait(5)
        connection.sendall(event(finish="stop"))
        return False
    with Peer(two_parts) as server, provider(server.url, stall_timeout=0.2) as client:
        stream = client.stream("hi", model="m", timeout=60)
        assert next(stream) == "one "
        until = time.monotonic() + 0.3
        while time.monotonic() < until:  # the caller works
            pass
        paused.set()
        assert list(stream) == ["two"]


# -- bodies
def in_chunks(form: str) -> bytes:
    """The answer in two chunks; ``form`` has a place for each size, and for the last one."""
    half = len(ANSWER) // 2
    parts = [ANSWER[:half], ANSWER[half:], b""]
    data = b"".join((line % len(part)).encode() + part + (b"\r\n" if part else b"")
            for line, part in zip(form.split("|"), parts, strict=True))
    return CHUNKS + data


@pytest.mark.parametrize("form", ["%x\r\n|%x\r\n|%x\r\n\r\n",
    "%x;name=value\r\n|%x ; x\r\n|%x;last\r\n\r\n", "%X\r\n|000%x\r\n|000%x\r\n\r\n",
    "%x\n|%x\n|%x\n\n", "%x\r\n|%x\r\n|%x\r\nExpires: never\r\nA: b\r\n\r\n",
    "%x\r\n|%x\r\n|%x\r\n"])
def test_forms_of_chunks(form: str) -> None:
    """Extensions, capitals, zeros, line feeds alone, trailers; without a blank line at the end."""
    with Peer(says(in_chunks(form), keep=False)) as server, provider(server.url) as client:
        assert ask(client) == "good"


@pytest.mark.parametrize("size",
    ["", "x", "-1", "-0x1", "3 3", "HTTP/1.1 200 OK", "\xff", "1" * 70_000, "f" * 65_530])
def test_a_chunk_without_a_size_is_no_answer(size: str) -> None:
    half = event("half")
    for data in (size.encode() + b"\r\n" + half, b"1\r\nd\r\n" + size.encode() + b"\r\n"):
        with Peer(says(CHUNKS + data, keep=False)) as server, provider(server.url) as client:
            fails(client, InvalidResponse, match="garbled HTTP" if size else None)


def test_content_is_not_held_back_for_the_rest_of_its_chunk() -> None:
    seen = threading.Event()
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(CHUNKS + b"%x\r\n" % len(ANSWER) + event("good"))
        assert seen.wait(5)
        connection.sendall(ANSWER[len(event("good")) :] + b"\r\n0\r\n\r\n")
        return True
    with Peer(serve) as server, provider(server.url) as client:
        stream = client.stream("hi", model="m", timeout=4)
        assert next(stream) == "good"
        seen.set()
        assert not list(stream)


@pytest.mark.parametrize("more", ["\r\nHTTP/1.1 500 No\r\n\r\n", "Content-Length: 9999\r\n"])
def test_chunks_count_and_not_what_stands_beside_or_behind_them(more: str) -> None:
    data = STREAM + more.encode() if more[0] == "\r" else STREAM.replace(HEAD, HEAD + more.encode())
    with Peer(says(data)) as server, provider(server.url) as client:
        assert [ask(client) for _ in range(2)] == ["good"] * 2


def test_the_end_of_a_whole_answer_may_come_in_pieces() -> None:
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(WHOLE)[:-2])
        server.drip(connection, b"X: y\r\n\r\n", 0.01)
        return True
    with Peer(serve) as server, provider(server.url) as client:
        assert [ask(client) for _ in range(2)] == ["good"] * 2 and server.connections == 1


def test_a_whole_answer_needs_a_body_its_last_chunk_and_an_end_of_its_trailers() -> None:
    body = OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(WHOLE).removesuffix(b"0\r\n\r\n")
    for data, match in ((body, "truncated"), (body + b"0\r\n" + bytes(70_000), "garbled HTTP"),
                        (OK + b"Content-Length: 0\r\n\r\n", "an empty body"),
                        (reply(gzip.compress(WHOLE)[:-1], Content_Encoding="gzip"), "breaks off")):
        with Peer(says(data, keep=False)) as server, provider(server.url) as client:
            fails(client, InvalidResponse, match=match)


def test_what_a_small_body_unpacks_to_cannot_hold_a_call() -> None:
    bomb = reply(gzip.compress(bytes(1 << 24)) * 64, Content_Encoding="gzip")  # a gigabyte
    with Peer(says(bomb)) as server, provider(server.url, max_response_bytes=1 << 40) as client:
        fails(client, ProviderTimeout, timeout=0.1, seconds=0.2)


@pytest.mark.parametrize(("coding", "data"), [
    ("gzip", gzip.compress(WHOLE)), ("X-GZip", gzip.compress(WHOLE)), ("none", WHOLE),
    ("identity, gzip", gzip.compress(WHOLE)),
    ("deflate", zlib.compress(WHOLE)), ("identity", WHOLE), ("identity, UTF-8", WHOLE)])
def test_codings_of_a_body(coding: str, data: bytes) -> None:
    with Peer(says(reply(data, Content_Encoding=coding))) as server, provider(server.url) as client:
        assert ask(client) == "good"


@pytest.mark.parametrize("body", [ANSWER, WHOLE], ids=["stream", "whole"])
@pytest.mark.parametrize("zipped", [False, True])
def test_the_largest_answer(body: bytes, zipped: bool) -> None:
    """``max_response_bytes`` counts decompressed bytes."""
    body += b"\n" * 500
    data = reply(gzip.compress(body), Content_Encoding="gzip") if zipped else reply(body)
    with Peer(says(data)) as server:
        with provider(server.url, max_response_bytes=len(body)) as client:
            assert ask(client) == "good"
        with provider(server.url, max_response_bytes=len(ANSWER)) as client:
            fails(client, InvalidResponse, match="max_response_bytes")


@pytest.mark.parametrize("promised", [10**9, 10**12, 10**18, 10**30])
@pytest.mark.parametrize("body", [WHOLE[:-9], ANSWER[:20]], ids=["json", "sse"])
def test_a_length_that_lies_takes_no_memory(promised: int, body: bytes) -> None:
    data = OK + b"Content-Length: %d\r\n\r\n" % promised + body
    with Peer(says(data, keep=False)) as server, provider(server.url) as client:
        fails(client, InvalidResponse, seconds=1)


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_no_silence_takes_more_than_half_of_what_is_left_for_a_later_tier(scheme: str) -> None:
    """While connecting, and behind a first token that came late."""
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        server.stopping.wait(0.6)
        connection.sendall(HEAD + b"\r\n" + event("late"))
        return silent(server, connection, request)
    with Peer(silent if scheme == "https" else serve) as server:
        chain = chain_of(f"{scheme}://127.0.0.1:{server.port}/v1")
        start, found = running(), chain.chat("q", timeout=1.6)
        assert found.text == "from b" and running() - start < 1.3
        told = "connect timeout" if scheme == "https" else "no further data"
        assert told in str(found.attempts[0].error)


def test_the_time_of_a_function_for_a_key_is_not_the_servers(monkeypatch: Any) -> None:
    real, taken = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + sum(taken))
    with Peer(healthy) as server:
        client = OpenAIProvider(lambda: taken.append(3) or KEY,  # type: ignore[func-returns-value]
                                server.url, connect_timeout=1, first_token_timeout=2)
        assert ask(client) == "good"


@pytest.mark.parametrize("way", ["chat", "stream"])
def test_a_model_that_thinks_without_an_end_leaves_time_for_the_next_tier(way: str) -> None:
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(HEAD + b"\r\n")
        while not server.stopping.wait(0.2):
            connection.sendall(event(reasoning_content="hm"))
        return False
    with Peer(serve) as server:
        chain = chain_of(server.url)
        found = getattr(chain, way)("q", timeout=1)
        assert (found.text if way == "chat" else "".join(found)) == "from b"


def test_a_stream_that_has_shown_text_has_the_time_of_the_later_tiers_too() -> None:
    """Nobody else is asked then: a pause of more than half of what is left is no stall."""
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(HEAD + b"\r\n")
        for data in (event(reasoning_content="hm"), event("one "), event("two", "stop")):
            connection.sendall(data)
            server.stopping.wait(1)
        return False
    with Peer(serve) as server:
        chain = chain_of(server.url)
        assert "".join(chain.stream("q", timeout=2.5)) == "one two"


# -- the session of a user
def test_a_session_of_the_users_keeps_its_settings_and_the_limits() -> None:
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if b"/silent/" in request:
            return silent(server, connection, request)
        if b"/drip/" in request:
            connection.sendall(HEAD + b"\r\n")
            server.drip(connection, event("and on ") * 100)
        elif b"/moved/" in request:
            connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n")
        else:
            connection.sendall(STREAM)
        return True
    with Peer(serve) as server, requests.Session() as session:
        session.headers["X-Session"] = "yes"
        assert ask(OpenAIProvider(KEY, server.url, session=session)) == "good"
        assert b"X-Session: yes" in server.requests[0]
        for place, error in (("silent", ProviderTimeout), ("drip", ProviderTimeout),
                             ("moved", InvalidResponse)):
            client = OpenAIProvider(KEY, f"{server.url}/{place}", session=session)
            fails(client, error, timeout=0.3, seconds=1)
        assert len(server.requests) == 4
        client = OpenAIProvider(KEY, server.url, session=session)
        assert ask(client, timeout=float("inf"), first_token_timeout=float("inf")) == "good"
        for url, match in ((f"http://127.0.0.1:{spare_port()}", "^refused"),
                           ("http://nowhere.invalid", "^the name cannot be resolved")):
            with provider(url, session=session) as client:
                fails(client, ProviderUnavailable, match=match)


@pytest.mark.parametrize(("kind", "said"), [(RecursionError, "gevent"), (AttributeError, "Attr")])
def test_a_session_of_the_users_that_is_at_fault_is_unavailable(kind: Any, said: str) -> None:
    def faulty(*_: Any, **__: Any) -> Any:
        raise kind("at fault")
    with requests.Session() as session:
        session.mount("http://", canned := Canned())
        canned.send = faulty  # type: ignore[method-assign]
        client = OpenAIProvider(KEY, "http://127.0.0.1:9", session=session)
        fails(client, ProviderUnavailable, match=said)


def test_a_hook_of_the_users_session_may_read_the_body_or_raise_for_the_status() -> None:
    def hooked(hook: Any, data: bytes) -> OpenAIProvider:
        session = requests.Session()
        session.hooks["response"].append(lambda found, **_: hook(found) and None)
        session.mount("http://", canned := Canned())
        canned.pieces, canned.status = [data], 429 if data == b"{}" else 200
        return OpenAIProvider(KEY, "http://h", session=session)
    assert ask(hooked(lambda found: found.text, ANSWER)) == "good"
    fails(hooked(lambda found: found.raise_for_status(), b"{}"), RateLimited)
    def faulty(_: Any) -> None:
        raise requests.HTTPError
    fails(hooked(faulty, ANSWER), ProviderUnavailable)


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_of_the_users_may_give_a_file_or_the_content(whole: bool) -> None:
    def send(request: Any, **_: Any) -> Any:
        found = requests.Response()
        found.status_code, found.request, found.url = 200, request, request.url
        found.headers.update({"Content-Length": "999", "Content-Encoding": "gzip"})  # as it was
        found._content, found.raw = (WHOLE, None) if whole else (False, io.BytesIO(WHOLE))
        return found
    with requests.Session() as session:
        session.mount("http://", canned := Canned())
        canned.send = send  # type: ignore[method-assign]
        assert ask(OpenAIProvider(KEY, "http://h", session=session)) == "good"


@pytest.mark.parametrize("place", [(requests.Session, "send"),  # OpenTelemetry, requests-mock
    (urllib3.HTTPConnectionPool, "ConnectionCls")])  # vcrpy
def test_tools_that_patch_what_is_below_see_the_request(place: Any, monkeypatch: Any) -> None:
    with Peer(healthy) as server, provider(server.url) as client:
        assert ask(client) == "good"
        client.close()
        monkeypatch.setattr(*place, taped := Mock(cassette=None, spec=["cassette"]))
        fails(client, ProviderUnavailable)
        assert taped.called and len(server.requests) == 1


# -- proxies
def test_a_proxy_of_the_environment_is_used(proxied: Any) -> None:
    with Peer(healthy) as proxy:
        with proxied(f"http://127.0.0.1:{proxy.port}", PLAIN) as client:
            assert ask(client) == "good"
        assert proxy.requests[0].startswith(b"POST http://provider.invalid/v1/chat/completions")
        assert KEY.encode() in proxy.requests[0]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "127.0.0.2", "127.1"])
def test_requests_to_loopback_never_use_a_proxy_of_the_environment(host: str, proxied: Any) -> None:
    with Peer(says(b"HTTP/1.1 502 No\r\n\r\n")) as proxy, Peer(healthy) as server:
        near = f"http://{host}:{server.port}/v1"
        with proxied(f"http://127.0.0.1:{proxy.port}", near, connect_timeout=1) as client:
            if host == "127.0.0.2":  # nobody listens there
                fails(client, ProviderUnavailable)
            else:
                assert ask(client) == "good"
        assert not proxy.requests


@pytest.mark.parametrize(("answer", "error"), [
    *((b"HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n" % status, ProviderUnavailable)
        for status in (b"403 Forbidden", b"407 Who are you?")),
    (b"not HTTP at all\r\n\r\n", (ProviderUnavailable, InvalidResponse)),
    (b"", (ProviderUnavailable, ServerError))])
def test_a_proxy_that_refuses_a_tunnel(answer: bytes, error: Any, proxied: Any) -> None:
    with Peer(says(answer, keep=False)) as proxy:
        with proxied(f"http://127.0.0.1:{proxy.port}") as client:
            told = "^the proxy failed" if error is ProviderUnavailable else None
            fails(client, error, match=told)
        assert proxy.requests[0].startswith(b"CONNECT provider.invalid:443")
        assert KEY.encode() not in proxy.requests[0]


@pytest.mark.parametrize("form", ["dripped", "late"])
def test_a_slow_proxy_cannot_hold_a_call(form: str, proxied: Any) -> None:
    """Its answer comes a byte at a time, or late; then TLS is silent."""
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if form == "dripped":
            server.drip(connection, OK + b"X-Padding: padding\r\n" * 50 + b"\r\n")
        server.stopping.wait(0.4)
        connection.sendall(OK + b"\r\n")
        return silent(server, connection, request)
    with Peer(serve) as proxy, proxied(f"http://127.0.0.1:{proxy.port}") as client:
        fails(client, (ProviderTimeout, ProviderUnavailable), timeout=0.5, seconds=0.5)


def test_a_socks_proxy_of_the_environment_is_used(proxied: Any) -> None:
    pytest.importorskip("socks", reason="PyPI's pysocks is not installed")
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def socks() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                connection.recv(connection.recv(2)[1])
                connection.sendall(b"\5\0")
                asked.append(connection.recv(262))
                connection.sendall(b"\5\0\0\1\x7f\0\0\1\0\0")
                while received(connection):
                    threading.Event().wait(0.4)  # longer than connecting may take
                    connection.sendall(STREAM)
        listener.settimeout(3)
        (thread,) = in_threads(1, socks)
        port = listener.getsockname()[1]
        with proxied(f"socks5h://127.0.0.1:{port}", PLAIN, connect_timeout=0.3) as client:
            assert [ask(client) for _ in range(2)] == ["good"] * 2
        thread.join(5)
    assert b"provider.invalid" in asked[0]
    with Peer(silent) as server:  # the limits hold there, too
        url = f"socks5h://127.0.0.1:{server.port}"
        with proxied(url, PLAIN, connect_timeout=0.3) as client:
            fails(client, (ProviderTimeout, ProviderUnavailable), timeout=0.5, seconds=0.5)
    slow = Dripping(b"\5\0\5\0\0\3\xff" + b"x" * 250)
    with slow as server, proxied(f"socks5h://127.0.0.1:{server.port}", PLAIN) as client:
        fails(client, (ProviderTimeout, ProviderUnavailable), timeout=0.5, seconds=0.5)


def test_a_socks_proxy_without_pysocks_is_named(proxied: Any,
        monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support.")
    monkeypatch.setattr("requests.adapters.SOCKSProxyManager", missing)
    with proxied("socks5h://127.0.0.1:9") as client:
        fails(client, ProviderUnavailable, match="speaks SOCKS: pip install pysocks")


# -- TLS
@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, str]:
    """A server's side of TLS for provider.invalid and loopback, and the file of its certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    names = "subjectAltName=DNS:provider.invalid,IP:127.0.0.1"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run(
        [*make, "-subj", "/CN=provider.invalid", "-addext", names, "-keyout", key, "-out",
            certificate], check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, str(certificate)


@pytest.fixture
def trusted(tls: Any, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """The server's side, whose certificate the client trusts."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", tls[1])
    return tls[0]


class SecurePeer(Peer):
    """A Peer behind TLS."""
    def __init__(self, serve: Any, context: ssl.SSLContext) -> None:
        self.context = context
        super().__init__(serve)
        self.url = self.url.replace("http:", "https:")
    def _talk(self, connection: socket.socket) -> None:
        try:
            with self.context.wrap_socket(connection, server_side=True) as inside:
                self._open.add(inside)
                super()._talk(inside)
        except OSError:
            self._threads.discard(threading.current_thread())


def tunnel(context: ssl.SSLContext | None, server: Peer, connection: Any, answers: int = 0) -> bool:
    """The answer to CONNECT, and TLS inside of the tunnel: healthy, or silent without a context."""
    connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    if context is None:
        return silent(server, connection, b"")
    with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as inside:
        while answers and (request := received(inside)):
            answers -= 1
            server.requests.append(request)
            inside.sendall(STREAM)
    return False


def test_tls_to_the_provider(tls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    context, certificate = tls
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if b"drip" in request:
            server.drip(connection, HEAD + b"Connection: close\r\n\r\n" + event("x" * 2000))
        return healthy(server, connection, request)
    with SecurePeer(serve, context) as server:
        with provider(server.url) as client:
            fails(client, ProviderUnavailable, match="TLS failed: self.signed .*REQUESTS_CA_BUNDLE")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", certificate)
        with provider(server.url) as client:
            assert [ask(client) for _ in range(3)] == ["good"] * 3
            fails(client, ProviderTimeout, "drip", timeout=0.5, seconds=0.5)


@pytest.mark.parametrize(("answers", "connections"), [(sys.maxsize, 1), (1, 3)])
def test_a_tunnel_through_a_proxy_is_kept_and_made_anew_when_it_has_ended(answers: int,
        connections: int, trusted: Any, proxied: Any) -> None:
    with Peer(lambda server, connection, _: tunnel(trusted, server, connection, answers)) as proxy:
        with proxied(f"http://127.0.0.1:{proxy.port}") as client:
            assert [ask(client) for _ in range(3)] == ["good"] * 3
        assert proxy.connections == connections and KEY.encode() not in proxy.requests[0]


def test_an_answer_that_tls_holds_already_belongs_to_no_later_request(trusted: Any) -> None:
    stale = WHOLE.replace(b"good", b"stale")
    def serve(server: Peer, connection: Any, request: bytes) -> bool:
        connection.sendall(reply(WHOLE).removesuffix(WHOLE))
        connection.sendall(WHOLE + reply(stale) * (len(server.requests) == 1))  # in one record
        return True
    with SecurePeer(serve, trusted) as server, provider(
            server.url, stream_upstream=False) as client:
        assert [ask(client) for _ in range(3)] == ["good"] * 3


@pytest.mark.parametrize("inner", ["silent", "late"])
def test_tls_inside_of_tls_is_under_the_same_limit(trusted: Any, proxied: Any, inner: str) -> None:
    def serve(server: Peer, connection: Any, request: bytes) -> bool:
        if inner == "late":
            server.stopping.wait(0.3)
        return tunnel(None, server, connection)
    with SecurePeer(serve, trusted) as proxy, proxied(f"https://127.0.0.1:{proxy.port}") as client:
        fails(client, (ProviderTimeout, ProviderUnavailable), timeout=0.6, seconds=0.6)


def test_a_handshake_that_fails_or_hangs_is_unavailable() -> None:
    """The server speaks no TLS, or it refuses what is offered (an alert)."""
    for said, match in ((b"HTTP/1.1 400 Bad Request\r\n\r\n", "TLS failed: .*is it http"),
                        (b"\x15\x03\x03\0\x02\x02\x28", "^TLS failed$")):
        with Dripping([said]) as server, provider(f"https://127.0.0.1:{server.port}") as client:
            fails(client, ProviderUnavailable, match=match)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        with provider(url, connect_timeout=0.3) as client:
            fails(client, (ProviderUnavailable, ProviderTimeout), seconds=0.3)


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_bundle_of_certificates_that_is_not_there_is_named(variable: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "/nonexistent/bundle.pem")
    with Peer(healthy) as server, provider(server.url.replace("http:", "https:")) as client:
        fails(client, ProviderUnavailable, match=r"no such certificates: see REQUESTS")


GEVENT = """
import sys, warnings
from copilot_router import *
warnings.simplefilter("ignore")
first = ProviderTier("a", OpenAIProvider("k" * 20, sys.argv[1]), ["m"])
chain = FailoverChain([first, ProviderTier("b", ScriptedProvider(["ok"]), ["n"])])
import gevent.monkey
gevent.monkey.patch_all()
print(chain.chat("hi", timeout=10).text)
"""


def test_a_program_that_gevent_patched_late_fails_over() -> None:
    """gevent replaces ssl after the provider was made: no bare RecursionError."""
    pytest.importorskip("gevent", reason="gevent is not installed")
    with Peer(lambda *_: False) as server:
        assert done(python(GEVENT, server.url.replace("http:", "https:"))) == "ok\n"

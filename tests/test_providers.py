"""Settings of the HTTP providers: keys, addresses, the environment, headers, ping, close."""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
import threading
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import requests
import responses
from support.fakes import error_of, in_threads
from support.server import Canned, Server, reply

import copilot_router
from copilot_router import (AnthropicProvider, AuthenticationError, BadRequest, ConfigError,
    FailoverChain, GeminiProvider, InvalidResponse, LMStudioProvider, ModelNotFound, OllamaProvider,
    OpenAIProvider, ProviderError, ProviderTier, ProviderUnavailable, RateLimited, ScriptedProvider,
    ServerError)

KEY = "sk-test-provider-key-0987654321"
BASE = "https://server.test/v1"
URL = BASE + "/chat/completions"
WHOLE = {"model": "m-1", "choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}
#: Class -> its name, and the variables for a key and for an address.
VENDORS: dict[Any, tuple[str, tuple[str, ...], str]] = {
    OpenAIProvider: ("openai", ("OPENAI_API_KEY",), "OPENAI_BASE_URL"),
    LMStudioProvider: ("lmstudio", ("LM_API_TOKEN",), "LMSTUDIO_BASE_URL"),
    OllamaProvider: ("ollama", ("OLLAMA_API_KEY",), "OLLAMA_HOST"),
    AnthropicProvider: ("anthropic", ("ANTHROPIC_API_KEY",), "ANTHROPIC_BASE_URL"),
    GeminiProvider: ("gemini", ("GOOGLE_API_KEY", "GEMINI_API_KEY"), "")}
KEY_HEADERS = ("Authorization", "x-api-key", "x-goog-api-key", "api-key")
CLOUDS = [OpenAIProvider, AnthropicProvider, GeminiProvider]
without_key = pytest.mark.filterwarnings("ignore:.* has no key")
each_vendor = pytest.mark.parametrize("kind", VENDORS, ids=lambda kind: kind.__name__)


@pytest.fixture
def mocked() -> Any:
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        mock.post(URL, json=WHOLE)
        yield mock


def request_of(client: Any, **options: Any) -> Any:
    """The request that a call sends."""
    with responses.RequestsMock() as mock:
        mock.post(re.compile(".*"), status=400, json={})
        error_of(BadRequest, client.chat, "hi", model="m", **options)
        return mock.calls[0].request


def key_sent(client: Any) -> str | None:
    """The key that goes out with a request, under any of the vendors' headers."""
    names, headers = KEY_HEADERS, request_of(client).headers
    found = [headers[name].removeprefix("Bearer ") for name in names if name in headers]
    assert len(found) <= 1
    return found[0] if found else None


# -- addresses
GOOGLE = "https://generativelanguage.googleapis.com"
CLAUDE, AZURE = "https://api.anthropic.com", "https://r.openai.azure.com/openai/deployments/d"


@pytest.mark.parametrize(("kind", "given", "full"), [*((OpenAIProvider, *row) for row in (
        ("http://h", "http://h/v1"), ("http://h/", "http://h/v1"), ("http://h:1/v1/", "http://h:1/v1"),
        ("http://h/v1/chat/completions", "http://h/v1"), (" https://h/api ", "https://h/api"),
        ("http://h/v1X/chat/completions/", "http://h/v1X"),
        ("http://h/v1X", "http://h/v1X"), ("http://h/a@b/v1", "http://h/a@b/v1"),
        (f"{AZURE}?api-version=1", AZURE), ("http://me:pass@h/v1", "http://h/v1"),
        ("http://[::1]", "http://[::1]/v1"), ("https://h/v1/responses", "https://h/v1"))),
    *((AnthropicProvider, *row) for row in (
        (CLAUDE, f"{CLAUDE}/v1"), (f"{CLAUDE}/v1/messages", f"{CLAUDE}/v1"),
        ("https://h/anthropic/v1/", "https://h/anthropic/v1"), ("http://h:40", "http://h:40/v1"),
        ("https://api.deepseek.com/anthropic", "https://api.deepseek.com/anthropic/v1"))),
    (GeminiProvider, GOOGLE, f"{GOOGLE}/v1beta"), (GeminiProvider, f"{GOOGLE}/v1", f"{GOOGLE}/v1"),
    (GeminiProvider, "HTTP://h/x/", "http://h/x"), *((OllamaProvider, *row) for row in (
        ("http://h", "http://h"), ("http://h:11434/api/chat", "http://h:11434"),
        ("h:1/api", "http://h:1"), *((one, "https://ollama.com") for one in (
            "https://ollama.com/", "ollama.com", "https://me:pw@ollama.com")),
        ("http://h:11434/v1", "http://h:11434")))])
@without_key
def test_base_urls_lose_what_was_copied_along(kind: Any, given: str, full: str) -> None:
    """The API's own path where there is none, else as it is; no name, password or query."""
    client = kind("", given)
    assert client.base_url == full and full in repr(client)
    for bad in (5, "ftp://h"):
        with pytest.raises(ConfigError, match="base_url"):
            kind(KEY, bad)


@pytest.mark.parametrize("url", ["localhost:1234", "ftp://h", "http://", "/v1", 5, "http://[::1",
    "http://h:99999/v1", "http://h:ab", "http://hunter2@h:0",
    "user:hunter2@host/v1", "http//h?k=hunter2", "htp://user:hunter2@host", "user:hun/ter2@host",
    "host/v1?key=hunter2"])
def test_an_address_without_scheme_is_refused_without_its_password(url: Any) -> None:
    assert "ter2" not in str(error_of(ConfigError, OpenAIProvider, KEY, url, match="base_url"))


@pytest.mark.parametrize(("kind", "base", "asked"), [
    (OpenAIProvider, "https://h/v1?api-version=1", "https://h/v1/chat/completions?api-version=1"),
    (GeminiProvider, "https://h/v1beta?k=1",
        "https://h/v1beta/models/m:streamGenerateContent?alt=sse&k=1"),
    (OpenAIProvider, "https://h/a@b/v1", "https://h/a@b/v1/chat/completions")])
def test_a_query_of_the_address_stands_behind_the_path(kind: Any, base: str, asked: str) -> None:
    assert request_of(kind(KEY, base)).url == asked


def test_a_name_and_password_in_the_address_become_a_header() -> None:
    """A key goes before them."""
    for key, sent in (("", "Basic bWU6cEBzcw=="), (KEY, f"Bearer {KEY}")):
        client = OpenAIProvider(key, "https://me:p%40ss@server.test/v1")
        assert request_of(client).headers["Authorization"] == sent


# -- keys and the environment
@each_vendor
@without_key
def test_keys_and_addresses_of_the_environment(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments win; white space around a key is stripped; no key sends no header."""
    _, names, url = VENDORS[kind]
    for name in reversed(names):
        monkeypatch.setenv(name, f" {name}-sent\n")
        assert key_sent(kind()) == f"{name}-sent" and key_sent(kind("other")) == "other"
        assert key_sent(kind("")) is None
    if url:
        monkeypatch.setenv(url, "https://env.test")
        assert kind().base_url.startswith("https://env.test")
        assert kind("", "https://arg.test").base_url.startswith("https://arg.test")


@pytest.mark.parametrize("kind", CLOUDS)
def test_a_cloud_without_a_key_warns_of_the_variable(kind: Any) -> None:
    for key in (None, ""):
        with pytest.warns(UserWarning, match=VENDORS[kind][1][0]):
            kind(key)


@pytest.mark.parametrize(("kind", "url", "goes"), [
    *((OpenAIProvider, f"https://{place}", True) for place in ("api.openai.com/v1",
        "eu.api.openai.com/v1", "r.openai.azure.com/openai/deployments/d", "r.openai.azure.us/v1",
        "r.openai.azure.cn/v1", "env.test/other")),  # the host of the variable
    *((OpenAIProvider, f"https://{place}", False) for place in ("api.groq.com/openai/v1",
        "api.openai.com.evil.test/v1", "evil.test/api.openai.com", "evilapi.openai.com.test",
        "api.openai.com@evil.test/v1", "notopenai.azure.com.evil.test")),
    (AnthropicProvider, "https://api.anthropic.com", True),
    (AnthropicProvider, "https://evil.test", False),
    (GeminiProvider, "https://generativelanguage.googleapis.com", True),
    (GeminiProvider, "https://eu-generativelanguage.googleapis.com", True),
    (GeminiProvider, "https://evil.test", False),
    *((kind, url, True) for kind in (OllamaProvider, LMStudioProvider)
        for url in ("http://localhost:1", "http://127.0.0.1:1")),
    (LMStudioProvider, "https://evil.test", False), (OllamaProvider, "https://evil.test", False),
    (OllamaProvider, "https://ollama.com", True), (OllamaProvider, "https://x.ollama.com", True)])
def test_a_key_of_the_environment_goes_only_to_the_vendors_hosts(kind: Any, url: str, goes: bool,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VENDORS[kind][1][0], "of-the-environment")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://env.test/v1")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        client = kind(base_url=url)
    sent = key_sent(client)
    if goes:
        assert (sent, told) == ("of-the-environment", [])
    else:
        assert sent is None or sent.startswith("Basic ")
        assert any("api_key" in str(one.message) for one in told)
    assert key_sent(kind("own", url)) == "own"


@pytest.mark.parametrize(("url", "warns"), [
    ("http://example.test/v1", True), ("http://8.8.8.8/v1", True), ("https://example.test", False),
    ("http://127.0.0.1:1/v1", False), ("http://localhost:1/v1", False), ("http://[::1]:1", False),
    ("http://10.1.2.3", False), ("http://192.168.0.7:8000", False), ("http://172.16.0.1", False),
    ("http://[2606:4700::1111]/v1", True), ("http://[fd12::1]:8000", False),
    *((f"http://{host}/v1", False) for host in ("box", "box.local", "box.internal", "x.localhost",
        "localhost.", "0.0.0.0", "2130706433", "[::ffff:10.0.0.1]")),
    ("http://box.internal.test", True), ("http://box.localhost.test", True)])
def test_a_key_over_plain_http_to_a_public_host_warns(url: str, warns: bool) -> None:
    for key, expected in ((KEY, warns), ("", False)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            OpenAIProvider(key, url)
        assert len(told) == expected and KEY not in "".join(str(one.message) for one in told)


@pytest.mark.parametrize(("key", "good"), [("caf\xe9", True), ("\xff", True), (" a\n", True),
    ("\u0100", False), ("a\x7f", False), ("a\x1fb", False), ("sk-\u201cabc", False),
    ("sk-a\nbc", False), (5, False)])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key: Any, good: bool) -> None:
    if good:
        assert OpenAIProvider(key, BASE)
        return
    assert "sk-" not in str(error_of(ConfigError, OpenAIProvider, key, BASE))


def test_a_key_may_be_a_function_that_is_asked_for_each_request(mocked: Any) -> None:
    """Tokens expire. What it raises, and what cannot be sent, is an AuthenticationError."""
    keys = iter(["one", " two\n", "a\nb", 5, ""])
    client = OpenAIProvider(lambda: next(keys), BASE)  # type: ignore[arg-type]
    assert [client.chat("hi", model="m").text for _ in range(2)] == ["fine"] * 2
    sent = [call.request.headers["Authorization"] for call in mocked.calls]
    assert sent == ["Bearer one", "Bearer two"]
    for _ in range(2):
        error_of(AuthenticationError, client.chat, "hi", model="m")
    def broken() -> str:
        raise OSError("no token for sk-test-provider-key-1")
    client = OpenAIProvider(broken, BASE)  # type: ignore[arg-type]
    spare = ProviderTier("b", ScriptedProvider(["spare"]))
    chain = FailoverChain([ProviderTier("a", client, ["m"]), spare])
    assert chain.chat("hi").text == "spare"
    assert "AuthenticationError" in (chain.health()[0].last_error or "")
    for method in (client.ping, lambda: client.chat("hi", model="m")):
        caught = error_of(AuthenticationError, method)
        assert "sk-test" not in f"{caught} {caught!r}"


@pytest.mark.parametrize(("module", "error"), [
    ("celery.exceptions", type("SoftTimeLimitExceeded", (Exception,), {})),
    ("rq.timeouts", type("BaseTimeoutException", (Exception,), {})), ("none", AssertionError),
    ("none", KeyboardInterrupt)])
def test_what_is_not_the_servers_fault_passes_through(module: str, error: Any,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a task's time, in a key's function too, and mistakes."""
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{error.__name__: error}))
    def over(*_: Any, **__: Any) -> Any:
        raise error
    with requests.Session() as session:
        session.mount("https://", canned := Canned())
        canned.send = over  # type: ignore[method-assign]
        asked = [OpenAIProvider(KEY, BASE, session=session), OpenAIProvider(over, BASE)]
        for client in asked[: 1 if error is AssertionError else 2]:
            for ask in (client.ping, lambda one=client: one.chat("hi", model="m")):
                error_of(error, ask)


# -- requests
def test_what_is_sent(mocked: Any) -> None:
    mocked.replace(responses.POST, URL, json=WHOLE, headers={"Set-Cookie": "a=b"})
    client = OpenAIProvider(KEY, BASE, headers={"X-Team": "blue"})
    for _ in range(2):
        client.chat("hi", model="m", temperature=0.5)
    request = mocked.calls[1].request
    assert dict(request.headers) == {"Content-Type": "application/json",
        "Accept": "application/json, text/event-stream", "Accept-Encoding": "identity",
        "User-Agent": f"copilot-router/{copilot_router.__version__}",
        "Authorization": f"Bearer {KEY}", "X-Team": "blue",
        "Content-Length": str(len(request.body))}


def test_azure_has_its_own_header_and_limit_and_access_tokens_are_no_keys() -> None:
    """They go where OAuth wants them; a function usually returns them, since they expire."""
    for kind, base, token in ((OpenAIProvider, AZURE, "eyJh.eyJz.c2ln"),
            (GeminiProvider, "https://aiplatform.googleapis.com/v1/publishers/google", "ya29.c")):
        sent = request_of(kind(lambda token=token: token, base)).headers
        assert sent["Authorization"] == f"Bearer {token}"
        assert "api-key" not in sent and "x-goog-api-key" not in sent
    request = request_of(OpenAIProvider(KEY, AZURE + "?api-version=1"), max_tokens=5)
    assert request.url == AZURE + "/chat/completions?api-version=1"
    assert request.headers["api-key"] == KEY
    assert json.loads(request.body)["max_completion_tokens"] == 5


def test_netrc_never_replaces_the_key_and_a_users_auth_does(mocked: Any,
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine server.test login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with requests.Session() as session:
        OpenAIProvider(KEY, BASE).chat("hi", model="m")
        client = OpenAIProvider(KEY, BASE, session=session)
        client.chat("hi", model="m")
        sent = [call.request.headers["Authorization"] for call in mocked.calls]
        assert sent == [f"Bearer {KEY}"] * 2
        session.auth = ("user", "pass")
        client.chat("hi", model="m")
        assert mocked.calls[2].request.headers["Authorization"].startswith("Basic ")
        client.close()
        assert client.chat("hi", model="m").text == "fine"


def test_a_session_of_the_users_own_may_change_each_request(mocked: Any) -> None:
    class Signing(requests.Session):
        def request(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            kwargs["headers"]["X-Signed"] = "by-a-second-key"
            return super().request(*args, **kwargs)
    with Signing() as session:
        client = OpenAIProvider(KEY, BASE, session=session)
        client.chat("hi", model="m")
        assert mocked.calls[0].request.headers["X-Signed"] == "by-a-second-key"
        mocked.replace("POST", URL, status=400, json={"error": "not by-a-second-key"})
        assert str(error_of(BadRequest, client.chat, "hi", model="m")) == "not ***"


@pytest.mark.parametrize("kind", CLOUDS)
def test_a_cloud_needs_a_model_and_seconds_that_are_some(kind: Any) -> None:
    for name, value in (("model", None), ("model", 5), ("model", ["m"]), ("timeout", -1),
                        ("first_token_timeout", "1")):
        error_of(ConfigError, kind(KEY).chat, "hi", match=name, **{"model": "m", name: value})


@each_vendor
@pytest.mark.parametrize("settings", [
    {"connect_timeout": -1}, {"first_token_timeout": "1"}, {"stall_timeout": math.nan},
    {"max_response_bytes": 0}, {"max_response_bytes": 1.5}, {"headers": {"X-A": "a\nb"}},
    {"headers": {"X\r\nA": "b"}}, {"connect_timeout": 10**400}, {"headers": [("a", "b")]},
    {"session": "s"}])
def test_bad_settings_are_named(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(settings))}"):
        kind(KEY, "https://h", **settings)
    with pytest.raises(TypeError, match=rf"{kind.__name__}.*'stal_timeout'.*'stall_timeout'"):
        kind(KEY, stal_timeout=1)
    error_of(ConfigError, kind, "http://127.0.0.1:1234", match="api_key. is an address")


# -- sessions
def test_a_password_of_the_environments_proxy_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "bob:s3cr3tPw99 and Basic Ym9iOnMzY3IzdFB3OTk= denied"
    with Server(reply({"error": {"message": told}}, 407)) as server, Server(reply(WHOLE)) as new:
        monkeypatch.setenv("http_proxy", server.url.replace("//", "//bob:s3cr3tPw99@"))
        client = LMStudioProvider("", "http://server.test")
        with pytest.raises(ProviderError, match=r"\*\*\* denied") as caught:
            client.chat("q", model="m", timeout=5)
        assert not re.search("s3cr3t|Ym9i", f"{caught.value} {caught.value!r}")
        monkeypatch.setenv("http_proxy", new.url)
        client.close()  # the next session looks at the environment anew
        assert client.chat("q", model="m", timeout=5).text and len(new.requests) == 1


def test_threads_that_begin_together_share_one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one waits at the lock; a signal's handler may call close() meanwhile."""
    real, made_lock = requests.Session.merge_environment_settings, threading.RLock
    at_the_lock, made = threading.Semaphore(0), []
    class Lock:
        def __init__(self) -> None:
            self.lock = made_lock()

        def __enter__(self) -> None:
            at_the_lock.release()
            self.lock.acquire()

        def __exit__(self, *_: Any) -> None:
            self.lock.release()
    def slowly(self: Any, *args: Any) -> Any:
        made.append(self)
        assert at_the_lock.acquire(timeout=5) and at_the_lock.acquire(timeout=5)
        client.close()
        return real(self, *args)
    monkeypatch.setattr(requests.Session, "merge_environment_settings", slowly)
    with Server(reply(WHOLE)) as server:
        with monkeypatch.context() as patch:
            patch.setattr(threading, "RLock", Lock)
            client = OpenAIProvider(KEY, server.url)
        for thread in in_threads(2, lambda: client.chat("q", None, "m")):
            thread.join()
        client.close()
        assert (len(made), len(server.requests)) == (1, 2)


# -- ping
@each_vendor
@pytest.mark.parametrize(("status", "error"), [(200, None), (401, AuthenticationError),
    (429, RateLimited), (500, ServerError), (300, InvalidResponse),
    (302, InvalidResponse), (404, (ProviderUnavailable, ModelNotFound))])
def test_a_ping_asks_for_the_models(kind: Any, status: int, error: Any) -> None:
    with responses.RequestsMock() as mock:
        mock.get(re.compile("https://h/.*"), status=status, json={"data": [], "models": []})
        client = kind(KEY, "https://h")
        if error is None:
            assert client.ping() is None and "= 5.0" in str(inspect.signature(kind.ping))
        else:
            caught = error_of(error, client.ping)
            assert (caught.provider, caught.status) == (VENDORS[kind][0], status)
            assert len(mock.calls) == 1
        error_of(ConfigError, client.ping, -1, match="timeout")


@pytest.mark.parametrize(("status", "state"), [(500, "open"),
    *((status, "closed") for status in (403, 404, 405, 501))])
def test_a_server_without_a_list_of_models_is_not_ill(status: int, state: str) -> None:
    with responses.RequestsMock() as mock:
        mock.get(re.compile(".*"), status=status, json={"error": {"message": "no"}})
        chain = FailoverChain([ProviderTier("a", OpenAIProvider(KEY, BASE), ["m"])])
        for _ in range(3):
            assert chain.check()[0].last_error
        assert chain.tiers[0].breaker.state == state

"""The HTTP providers through the `responses` package: what is sent, what is refused, what an error carries."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import requests
import responses

from copilot_router import (
    AuthenticationError,
    BadRequest,
    ConfigError,
    FailoverChain,
    InvalidResponse,
    LMStudioProvider,
    OpenAIProvider,
    ProviderTier,
    ProviderUnavailable,
    QuotaExceeded,
    RateLimited,
    ServerError,
    UnsupportedRequest,
)

KEY = "sk-test-provider-key-0987654321"
BASE = "https://server.test/v1"
URL = BASE + "/chat/completions"
WHOLE = {"model": "m-1", "choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}


@pytest.fixture
def mocked() -> Any:
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        yield mock


def sent(mocked: Any, at: int = -1) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(mocked.calls[at].request.body)
    return body


# -- addresses, keys, headers


@pytest.mark.parametrize(
    ("given", "full"),
    [
        ("http://h", "http://h/v1"), ("http://h/", "http://h/v1"), ("http://h:1/v1/", "http://h:1/v1"),
        ("http://h/v1/chat/completions", "http://h/v1"), (" https://h/api ", "https://h/api"),
        ("https://r.openai.azure.com/openai/deployments/d?api-version=1", "https://r.openai.azure.com/openai/deployments/d"),
    ],
)  # fmt: skip
def test_base_urls(given: str, full: str) -> None:
    """The API's own path where there is none; else as it is."""
    assert OpenAIProvider(KEY, given).base_url == full
    assert repr(OpenAIProvider(KEY, given)) == f"<OpenAIProvider {full}>"


@pytest.mark.parametrize("url", ["localhost:1234", "ftp://h", "http://", "/v1", 5])
def test_a_url_without_scheme_is_refused(url: Any) -> None:
    """Naming the value and an example."""
    with pytest.raises(ConfigError, match=r"base_url.*give a URL with its scheme, such as https://api.openai.com/v1"):
        OpenAIProvider(KEY, url)


@pytest.mark.parametrize(("key", "shown"), [("sk-\u201cabc", r"U\+201C"), ("sk-a\nbc", r"U\+000A"), (5, "is a int")])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key: Any, shown: str) -> None:
    """Curly quotes and newlines inside; surrounding white space is only stripped."""
    with pytest.raises(ConfigError, match=shown) as refused:
        OpenAIProvider(key, BASE)
    assert "sk-" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"headers\['X-A'\]"):
        OpenAIProvider(KEY, BASE, headers={"X-A": "a\nb"})


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and addresses; arguments win; a cloud without a key warns."""
    with pytest.warns(UserWarning, match="set OPENAI_API_KEY"):
        assert OpenAIProvider().base_url == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://env")
    assert OpenAIProvider()._headers["Authorization"] == f"Bearer {KEY}"
    assert OpenAIProvider().base_url == "http://env/v1"
    assert OpenAIProvider("other", BASE)._headers["Authorization"] == "Bearer other"
    assert LMStudioProvider().base_url == "http://localhost:1234/v1"
    assert LMStudioProvider().first_token_timeout == 60
    monkeypatch.setenv("LMSTUDIO_BASE_URL", "http://lm/v1")
    assert LMStudioProvider().base_url == "http://lm/v1"


def test_what_is_sent(mocked: Any) -> None:
    """Key, type, no cookies; a query of the base URL is kept; Azure has its own header; no key, no header."""
    mocked.post(URL, json=WHOLE, headers={"Set-Cookie": "a=b", "X-Request-Id": "r-1"})
    provider = OpenAIProvider(KEY, BASE, headers={"X-Own": "1"})
    response = provider.chat("hi", model="m", temperature=0.5)
    assert (response.text, response.model, response.request_id) == ("fine", "m-1", "r-1")
    provider.chat("hi", model="m")
    headers = mocked.calls[-1].request.headers
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (headers["X-Own"], headers["Content-Type"]) == ("1", "application/json")
    assert "Cookie" not in headers
    assert sent(mocked, 0) == {
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0.5,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    azure = "https://r.openai.azure.com/openai/deployments/d"
    mocked.post(azure + "/chat/completions", json=WHOLE)
    OpenAIProvider(KEY, azure + "?api-version=1").chat("hi", model="d", max_tokens=5)
    assert mocked.calls[-1].request.url == azure + "/chat/completions?api-version=1"
    assert mocked.calls[-1].request.headers["api-key"] == KEY
    assert sent(mocked)["max_completion_tokens"] == 5
    OpenAIProvider("", BASE).chat("hi")
    assert "Authorization" not in mocked.calls[-1].request.headers
    assert "model" not in sent(mocked)


def test_35_netrc_never_replaces_the_key(mocked: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither with our own session nor with the user's; the user's own auth is kept."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine server.test login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    mocked.post(URL, json=WHOLE)
    with requests.Session() as session:
        session.headers["X-Session"] = "yes"
        OpenAIProvider(KEY, BASE).chat("hi")
        provider = OpenAIProvider(KEY, BASE, session=session)
        provider.chat("hi")
        assert [call.request.headers["Authorization"] for call in mocked.calls] == [f"Bearer {KEY}"] * 2
        assert mocked.calls[1].request.headers["X-Session"] == "yes"
        session.auth = ("user", "pass")
        provider.chat("hi")
        assert mocked.calls[2].request.headers["Authorization"].startswith("Basic ")
        provider.close()
        provider._renew_after_fork()
        assert provider.chat("hi").text == "fine"


# -- options


def test_an_unknown_option_names_the_nearest(mocked: Any) -> None:
    """A TypeError that passes straight through a chain."""
    with pytest.raises(TypeError, match=r"unknown option 'temprature'.*Did you mean 'temperature'.*extra_body"):
        OpenAIProvider(KEY, BASE).chat("hi", temprature=1)
    chain = FailoverChain([ProviderTier("a", OpenAIProvider(KEY, BASE)), ProviderTier("b", OpenAIProvider(KEY, BASE))])
    with pytest.raises(TypeError, match="temprature"):
        chain.chat("hi", temprature=1)
    assert chain.health()[0].failures == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": math.nan}, "NaN"), ({"extra_body": {"x": {1, 2}}}, "set is not JSON"), ({"timeout": -1}, "timeout=-1")],
)
def test_options_that_cannot_be_written(options: dict[str, Any], message: str) -> None:
    """Refused before anything is sent."""
    with pytest.raises((BadRequest, ConfigError), match=message):
        OpenAIProvider(KEY, BASE).chat("hi", **options)


def test_a_cloud_needs_a_model() -> None:
    """A ConfigError, before anything is sent."""
    with pytest.raises(ConfigError, match="needs a model"):
        OpenAIProvider(KEY, "https://api.openai.com").chat("hi")


@pytest.mark.parametrize(
    "settings",
    [{"connect_timeout": -1}, {"first_token_timeout": "1"}, {"stall_timeout": math.nan}, {"max_response_bytes": 0}],
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    """Named in the message."""
    with pytest.raises(ConfigError, match=next(iter(settings))):
        OpenAIProvider(KEY, BASE, **settings)


# -- failures


@pytest.mark.parametrize(
    ("status", "answer", "kind"),
    [
        (500, {"body": "<html>"}, ServerError),
        (500, {"body": "it crashed", "content_type": "text/plain"}, ServerError),
        (401, {"json": {"error": {"message": "no", "code": "invalid_api_key"}}}, AuthenticationError),
        (302, {"headers": {"Location": "http://elsewhere.test/"}}, InvalidResponse),
        (200, {"body": ""}, InvalidResponse),
        (200, {"body": "<html>", "content_type": "text/html"}, InvalidResponse),
        (200, {"json": {"error": {"message": "out", "type": "insufficient_quota"}}}, QuotaExceeded),
        (200, {"body": b"x", "headers": {"Content-Encoding": "br"}}, InvalidResponse),
        (200, {"body": b"this is not gzip", "headers": {"Content-Encoding": "gzip"}}, InvalidResponse),
        (200, {"body": requests.ConnectionError("boom")}, ProviderUnavailable),
    ],
)
def test_failures_carry_what_is_known(mocked: Any, status: int, answer: dict[str, Any], kind: type) -> None:
    """Provider, model, status; never a key or the prompt."""
    mocked.post(URL, status=status, **answer)
    with pytest.raises(kind) as raised:
        OpenAIProvider(KEY, BASE).chat("the prompt of this test", model="m")
    error = raised.value
    assert error.provider == "openai"
    assert error.status in (status, None)
    assert "prompt of this" not in repr(vars(error)) + str(error)
    assert KEY not in repr(vars(error)) + str(error)
    assert len(mocked.calls) == 1


def test_a_rate_limit_in_full(mocked: Any) -> None:
    """Status, code, retry_after, request id, and a message without secrets."""
    message = f"Limit for key {KEY}: you asked 'what is the prompt of this test'"
    mocked.post(
        URL, status=429, json={"error": {"message": message, "code": "rate_limit_exceeded"}},
        headers={"Retry-After": "7", "x-request-id": "r-9"},
    )  # fmt: skip
    with pytest.raises(RateLimited) as raised:
        OpenAIProvider(KEY, BASE).chat("what is the prompt of this test", model="m")
    error = raised.value
    assert (error.status, error.code, error.retry_after, error.request_id, error.model) == (429, "rate_limit_exceeded", 7,
        "r-9", "m")
    assert str(error) == "Limit for key ***: you asked '***'"


def test_no_secret_in_debug_logs(mocked: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Neither ours nor urllib3's."""
    caplog.set_level(logging.DEBUG)
    mocked.post(URL, json=WHOLE)
    FailoverChain([ProviderTier("a", OpenAIProvider(KEY, BASE))]).chat("the prompt of this test")
    assert KEY not in caplog.text
    assert "prompt of this" not in caplog.text


# -- corrections


def test_one_corrected_resend_is_remembered(mocked: Any) -> None:
    """Unseen by the breaker, part of the same attempt, an event; the next call is right at once."""
    refusal = {"error": {"message": "Unsupported parameter: 'temperature' is not supported", "code": "unsupported_parameter",
        "param": "temperature"}}
    mocked.post(URL, status=400, json=refusal)
    mocked.post(URL, json=WHOLE)
    events: list[Any] = []
    chain = FailoverChain([ProviderTier("a", OpenAIProvider(KEY, BASE), ["m"])], on_event=events.append)
    response = chain.chat("hi", temperature=0.1)
    assert [attempt.outcome for attempt in response.attempts] == ["ok"]
    assert [event.data for event in events if event.kind == "resend"] == [{"change": "drop", "field": "temperature"}]
    assert ["temperature" in sent(mocked, at) for at in (0, 1)] == [True, False]
    chain.chat("hi", temperature=0.1)
    assert len(mocked.calls) == 3
    assert "temperature" not in sent(mocked)
    assert chain.chat("hi", top_p=0.1).text == "fine"


def test_a_correction_is_tried_once(mocked: Any) -> None:
    """The same refusal again is the error; so is one for what cannot be dropped."""
    mocked.post(URL, status=400, json={"error": {"message": "unsupported: 'max_tokens', Use 'max_completion_tokens' instead"}})
    provider = OpenAIProvider(KEY, BASE)
    with pytest.raises(BadRequest):
        provider.chat("hi", model="m", max_tokens=5)
    assert [("max_tokens" in sent(mocked, at), "max_completion_tokens" in sent(mocked, at)) for at in (0, 1)] == [
        (True, False), (False, True),
    ]  # fmt: skip
    assert len(mocked.calls) == 2


def test_an_effort_is_replaced_and_a_known_fix_is_not_learned_again(mocked: Any) -> None:
    """Set to none, as the error asks; when that is refused too, that is the answer."""
    text = "Function tools with reasoning_effort are not supported for m. To use them, set reasoning_effort to 'none'."
    mocked.post(URL, status=400, json={"error": {"message": text, "param": "reasoning_effort"}})
    provider = OpenAIProvider(KEY, BASE)
    for requests_sent in (2, 3):
        with pytest.raises(UnsupportedRequest):
            provider.chat("hi", model="m", reasoning_effort="high")
        assert len(mocked.calls) == requests_sent
    assert sent(mocked)["reasoning_effort"] == "none"


# -- ping


def test_ping_lists_the_models(mocked: Any) -> None:
    """Good: nothing; wrong key: the error."""
    mocked.get(BASE + "/models", json={"data": []})
    provider = OpenAIProvider(KEY, BASE)
    provider.ping()
    mocked.replace(responses.GET, BASE + "/models", status=401, json={"error": "no"})
    with pytest.raises(AuthenticationError):
        provider.ping()


def test_from_env(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tier for each that is named; nothing is probed; nothing named is an error that says what to set."""
    with pytest.raises(ConfigError, match="set LMSTUDIO_BASE_URL, "):
        FailoverChain.from_env({"LM_API_TOKEN": "x"})
    chain = FailoverChain.from_env(
        {"OPENAI_API_KEY": KEY, "OPENAI_MODEL": "m", "LMSTUDIO_BASE_URL": "http://lm"}, escalation_model="m"
    )
    assert [(tier.name, tuple(tier.models)) for tier in chain.tiers] == [("lmstudio", ()), ("openai", ("m",))]


def test_a_session_is_opened_once() -> None:
    """Two threads that both find none share the first one's."""
    provider = OpenAIProvider(KEY, BASE)
    assert provider._open_session(URL) is provider._open_session(URL)
    provider.close()


def test_a_name_and_password_in_the_address_become_a_header(mocked: Any) -> None:
    """As for any HTTP client; no message, repr or carried part shows them. A key goes before them."""
    mocked.post(URL, json={"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})
    provider = OpenAIProvider("", "http://me:p%40ss-word@" + BASE.partition("://")[2])
    provider.chat("hi", model="m")
    assert mocked.calls[0].request.headers["Authorization"] == "Basic bWU6cEBzcy13b3Jk"
    assert "word" not in f"{provider!r} {provider.base_url}"


def test_an_error_whose_body_is_unreadable_is_read_by_its_status(mocked: Any) -> None:
    """A compression nobody asked for hides the message, not the status and the Retry-After."""
    mocked.post(URL, status=429, body=b"\x00", headers={"Content-Encoding": "br", "Retry-After": "30"})
    with pytest.raises(RateLimited) as caught:
        OpenAIProvider(KEY, BASE).chat("hi", model="m")
    assert (caught.value.status, caught.value.retry_after) == (429, 30)


def test_the_deltas_are_the_whole_text_also_at_its_end(mocked: Any) -> None:
    """Half a character that never got its other half, as the last thing that came."""
    chunks = [{"choices": [{"delta": {"content": text}}]} for text in ("ab", "c\ud83d")]
    chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    body = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
    mocked.post(URL, body=body, headers={"Content-Type": "text/event-stream"})
    assert "".join(OpenAIProvider(KEY, BASE).stream("hi", model="m")) == "abc\ufffd"

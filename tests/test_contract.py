"""What every HTTP provider promises, whatever it speaks: one suite, run against each vendor's own format on loopback."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import requests
from dialects import DIALECTS, Answer, Dialect, answers, chunk, found_in, head, parsed, reply, streamed, texts_in
from faults import Peer, peer

from copilot_router import (
    AuthenticationError,
    ConfigError,
    ContentFiltered,
    EmptyResponse,
    FailoverChain,
    InvalidResponse,
    LLMResponse,
    ProviderError,
    ProviderTier,
    ProviderTimeout,
    ProviderUnavailable,
    ServerError,
    StreamInterrupted,
    ToolCall,
    UnsupportedRequest,
    Usage,
)

KEY = "sk-test-contract-key-1234567890"
Serve = Callable[[Peer, socket.socket, bytes], bool]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "description": f"Says the {name}.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
    for name in ("weather", "time")
]  # fmt: skip
CALLS = (("weather", {"city": "Oslo", "days": [1, 2.5, None]}), ("time", {"city": "Rømø"}), ("weather", {"city": "東京"}))
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(range(60))).decode()


@pytest.fixture(params=DIALECTS, ids=lambda dialect: dialect.name)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    found: Dialect = request.param
    return found


@pytest.fixture(params=[True, False], ids=["streamed", "whole"])
def streaming(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@contextmanager
def served(dialect: Dialect, serve: Serve | Answer, **settings: Any) -> Iterator[tuple[Peer, Any]]:
    """A server, and a provider that talks to it."""
    with peer(answers(dialect, lambda _: serve) if isinstance(serve, Answer) else serve) as server:
        client = dialect.make(f"http://127.0.0.1:{server.port}", KEY, **settings)
        try:
            yield server, client
        finally:
            client.close()


def says(data: bytes, keep: bool = True) -> Serve:
    """A server that says the same to everybody."""

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(data)
        return keep

    return serve


def drained(stream: Any) -> tuple[list[str], LLMResponse]:
    """The deltas of a stream, and its response."""
    deltas = []
    while True:
        try:
            deltas.append(next(stream))
        except StopIteration as end:
            return deltas, end.value


def expected(dialect: Dialect, usage: Usage) -> Usage:
    """A usage, without what the vendor does not count."""
    return replace(
        usage,
        cached_tokens=usage.cached_tokens * dialect.counts_cached,
        cache_write_tokens=usage.cache_write_tokens * dialect.counts_written,
        reasoning_tokens=usage.reasoning_tokens * dialect.counts_reasoning,
    )


# -- answers -----------------------------------------------------------------------------------------------------------


def test_an_answer(dialect: Dialect, streaming: bool) -> None:
    """Text, model, finish reason and usage, asked as a stream and as whole JSON."""
    with served(dialect, Answer(), stream_upstream=streaming) as (server, client):
        response = client.chat("hi", model="m", timeout=5)
    assert (response.content, response.model, response.finish_reason) == ("Hello, world", "m-2026", "stop")
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (9, 4)
    assert (response.tool_calls, response.reasoning) == ([], None)
    assert (response.raw is None) == streaming
    path, _, body = parsed(server.requests[0])
    assert dialect.streams(path, body) == streaming


def test_a_stream_yields_what_the_server_sent(dialect: Dialect) -> None:
    """Every delta is yielded as it came; the returned response is the one that chat() gives."""
    answer = Answer(text=("One ", "två ", "三 ", "\u2028four\U0001f600"), reasoning=("Hm. ", "So."))
    with served(dialect, answer) as (_, client):
        deltas, response = drained(client.stream("hi", model="m", timeout=5))
        assert tuple(deltas) == answer.text
        assert response == client.chat("hi", model="m", timeout=5)


def test_a_stream_of_whole_json_is_one_delta(dialect: Dialect) -> None:
    """stream() over a provider that may not stream."""
    with served(dialect, Answer(), stream_upstream=False) as (_, client):
        deltas, response = drained(client.stream("hi", model="m", timeout=5))
    assert (deltas, response.content) == (["Hello, world"], "Hello, world")


def test_whole_json_where_a_stream_was_asked(dialect: Dialect) -> None:
    """A server that does not stream is read all the same."""
    answer = Answer(calls=CALLS, finish="tool_calls")
    with served(dialect, says(reply(dialect.body(answer)))) as (_, client):
        response = client.chat("hi", model="m", tools=TOOLS, timeout=5)
    assert [(call.name, call.arguments) for call in response.tool_calls] == list(CALLS)
    assert response.raw == dialect.body(answer)


def test_deltas_arrive_while_the_server_still_writes(dialect: Dialect) -> None:
    """The first delta is in the caller's hands before the server has sent the second."""
    taken = threading.Event()

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        events = dialect.events(Answer(text=("first", "second")))
        at = next(at for at, event in enumerate(events) if b"second" in event)
        connection.sendall(head(dialect) + b"".join(map(chunk, events[:at])))
        if taken.wait(5):
            connection.sendall(b"".join(map(chunk, events[at:])) + b"0\r\n\r\n")
        return True

    with served(dialect, serve) as (_, client):
        stream = client.stream("hi", model="m", timeout=10)
        assert next(stream) == "first"
        taken.set()
        assert drained(stream)[0] == ["second"]


def test_reasoning_is_kept_apart(dialect: Dialect, streaming: bool) -> None:
    """The vendor's own field for thinking lands in .reasoning and never in the text."""
    with served(dialect, Answer(reasoning=("Let me ", "think.")), stream_upstream=streaming) as (_, client):
        response = client.chat("hi", model="m", timeout=5)
    assert (response.reasoning, response.content) == ("Let me think.", "Hello, world")


def test_a_leading_think_block_is_reasoning(dialect: Dialect, streaming: bool) -> None:
    """Thinking inside the text, cut in the middle of its tags."""
    answer = Answer(text=("<thi", "nk>Let me th", "ink.</th", "ink>\n", "\nHello,", " <think>world"))
    with served(dialect, answer, stream_upstream=streaming) as (_, client):
        deltas, response = drained(client.stream("hi", model="m", timeout=5))
    assert (response.reasoning, response.content) == ("Let me think.", "Hello, <think>world")
    assert "".join(deltas) == response.content


def test_only_reasoning_is_no_answer(dialect: Dialect, streaming: bool) -> None:
    """Thinking without a word of answer is EmptyResponse."""
    with (
        served(dialect, Answer(text=(), reasoning=("Hm.",)), stream_upstream=streaming) as (_, client),
        pytest.raises(EmptyResponse) as raised,
    ):
        client.chat("hi", model="m", timeout=5)
    assert raised.value.usage == Usage(9, 4)


def test_a_tool_call(dialect: Dialect, streaming: bool) -> None:
    """One call with its arguments, which come in pieces."""
    with served(dialect, Answer(text=(), calls=CALLS[:1], finish="tool_calls"), stream_upstream=streaming) as (_, client):
        response = client.chat("hi", model="m", tools=TOOLS, timeout=5)
    (call,) = response.tool_calls
    assert (call.name, call.arguments, bool(call.id)) == ("weather", CALLS[0][1], True)
    assert json.loads(call.raw_arguments) == CALLS[0][1]
    assert (response.content, response.finish_reason) == (None, "tool_calls")


def test_several_tool_calls_with_text_and_reasoning(dialect: Dialect, streaming: bool) -> None:
    """Three calls in one answer, in order, with ids of their own, next to text and reasoning."""
    answer = Answer(text=("Let me ", "look."), reasoning=("Two ", "tools."), calls=CALLS, finish="tool_calls")
    with served(dialect, answer, stream_upstream=streaming) as (_, client):
        deltas, response = drained(client.stream("hi", model="m", tools=TOOLS, timeout=5))
    assert [(call.name, call.arguments) for call in response.tool_calls] == list(CALLS)
    assert len({call.id for call in response.tool_calls}) == 3
    assert (response.content, response.reasoning, response.finish_reason) == ("Let me look.", "Two tools.", "tool_calls")
    assert "".join(deltas) == "Let me look."


def test_a_tool_call_without_arguments(dialect: Dialect, streaming: bool) -> None:
    """{} where the model gives none."""
    answer = Answer(text=(), calls=(("weather", {}),), finish="tool_calls")
    with served(dialect, answer, stream_upstream=streaming) as (_, client):
        (call,) = client.chat("hi", model="m", tools=TOOLS, timeout=5).tool_calls
    assert (call.name, call.arguments) == ("weather", {})


def test_tools_are_declared(dialect: Dialect) -> None:
    """Names, descriptions and schemas reach the server unchanged."""
    with served(dialect, Answer()) as (server, client):
        client.chat("hi", model="m", tools=TOOLS, timeout=5)
    sent = dialect.declared(parsed(server.requests[0])[2])
    assert sent == [tuple(tool["function"].values()) for tool in TOOLS]


def test_a_tool_loop(dialect: Dialect, streaming: bool) -> None:
    """response.message and the results go back: the server sees every call with its arguments and its own result."""
    script = iter([Answer(text=("Look. ",), reasoning=("Hm.",), calls=CALLS, finish="tool_calls"), Answer()])
    with served(dialect, answers(dialect, lambda _: next(script)), stream_upstream=streaming) as (server, client):
        messages: list[dict[str, Any]] = [{"role": "user", "content": "How is it?"}]
        first = client.chat(messages, model="m", tools=TOOLS, timeout=5)
        messages.append(json.loads(json.dumps(first.message)))
        messages += [
            {"role": "tool", "tool_call_id": call.id, "content": f"result {at}"} for at, call in enumerate(first.tool_calls)
        ]
        assert client.chat(messages, model="m", tools=TOOLS, timeout=5).content == "Hello, world"
    sent = dialect.answered(parsed(server.requests[1])[2])
    assert sent == [(name, arguments, f"result {at}") for at, (name, arguments) in enumerate(CALLS)]


def test_results_in_another_order_and_missing(dialect: Dialect) -> None:
    """Results are matched to their calls by id; a call that was interrupted gets a result that says so."""
    first = LLMResponse("", [ToolCall(f"call_{at}", name, args) for at, (name, args) in enumerate(CALLS)], "tool_calls")
    messages: list[dict[str, Any]] = [{"role": "user", "content": "How is it?"}, first.message]
    messages += [{"role": "tool", "tool_call_id": f"call_{at}", "content": f"result {at}"} for at in (2, 0)]
    with served(dialect, Answer()) as (server, client):
        client.chat(messages, model="m", tools=TOOLS, timeout=5)
    body = parsed(server.requests[0])[2]
    places = [json.dumps(body).index(text) for text in ("result 0", "no result", "result 2")]
    assert places == sorted(places)


@pytest.mark.parametrize("media", ["image/png", "image/jpeg"])
def test_an_image(dialect: Dialect, media: str) -> None:
    """A data URL arrives with its bytes, and with its media type where the format has one."""
    content = [{"type": "text", "text": "What is it?"},
               {"type": "image_url", "image_url": {"url": f"data:{media};base64,{PNG}"}}]  # fmt: skip
    with served(dialect, Answer()) as (server, client):
        client.chat([{"role": "user", "content": content}], model="m", timeout=5)
    body = parsed(server.requests[0])[2]
    texts = list(texts_in(body))
    assert "What is it?" in texts
    assert [text.rpartition(",")[2] for text in texts if PNG in text] == [PNG]
    assert dialect.name == "ollama" or any(media in text for text in texts)


def test_a_remote_image(dialect: Dialect) -> None:
    """The URL is sent where the vendor fetches images; elsewhere the request is refused before anything is sent."""
    url = "https://images.invalid/cat.png"
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    with served(dialect, Answer()) as (server, client):
        if dialect.remote_images:
            client.chat(messages, model="m", timeout=5)
            assert found_in("https:.*", parsed(server.requests[0])[2]) == url
        else:
            with pytest.raises(UnsupportedRequest):
                client.chat(messages, model="m", timeout=5)
            assert not server.requests


def test_usage_in_one_arithmetic(dialect: Dialect, streaming: bool) -> None:
    """Prompt includes what was cached and written to the cache, completion includes reasoning, whatever the vendor adds up."""
    usage = Usage(1000, 200, 400, 100 if dialect.counts_written else 0, 50)
    with served(dialect, Answer(usage=usage), stream_upstream=streaming) as (_, client):
        response = client.chat("hi", model="m", timeout=5)
    assert response.usage == expected(dialect, usage)
    assert response.usage.total_tokens == 1200


def test_what_it_costs(dialect: Dialect) -> None:
    """prices= of a tier: plain, cached and written prompt tokens at their own price, reasoning at the completion's."""
    usage = Usage(1000, 200, 400, 100, 50)
    with served(dialect, Answer(usage=usage)) as (_, client):
        chain = FailoverChain([ProviderTier("only", client, ["m"], prices={"m": (2.0, 10.0, 0.5, 2.5)})])
        cost = chain.chat("hi", timeout=5).cost
        free = FailoverChain([ProviderTier("only", client, ["m"])]).chat("hi", timeout=5).cost
    cached, written = 400 * dialect.counts_cached, 100 * dialect.counts_written
    assert cost == pytest.approx(((1000 - cached - written) * 2 + cached * 0.5 + written * 2.5 + 200 * 10) / 1e6)
    assert free is None


@pytest.mark.parametrize(
    ("dialect", "finish"),
    [(dialect, finish) for dialect in DIALECTS for finish in ("stop", "length", "tool_calls", "content_filter")
     if finish != "content_filter" or dialect.filters],
    ids=str,
)  # fmt: skip
def test_finish_reasons(dialect: Dialect, streaming: bool, finish: str) -> None:
    """Four words, whatever the vendor calls them; text that a filter has cut is kept."""
    answer = Answer(calls=CALLS[:1] if finish == "tool_calls" else (), finish=finish)
    with served(dialect, answer, stream_upstream=streaming) as (_, client):
        response = client.chat("hi", model="m", timeout=5)
    assert (response.finish_reason, response.content) == (finish, "Hello, world")


def test_a_call_cut_by_the_limit_is_not_finished(dialect: Dialect) -> None:
    """"length" stays "length" when there is a tool call: it may be half of one."""
    with served(dialect, Answer(calls=CALLS[:1], finish="length")) as (_, client):
        assert client.chat("hi", model="m", tools=TOOLS, timeout=5).finish_reason == "length"


def test_length_without_text_is_empty(dialect: Dialect, streaming: bool) -> None:
    """An answer that was cut before its first word is EmptyResponse, and says why."""
    with (
        served(dialect, Answer(text=(), finish="length"), stream_upstream=streaming) as (_, client),
        pytest.raises(EmptyResponse, match="token limit"),
    ):
        client.chat("hi", model="m", timeout=5)


@pytest.mark.parametrize("text", [(), (" \n", " ")], ids=["nothing", "white space"])
def test_an_empty_answer_is_no_answer(dialect: Dialect, streaming: bool, text: tuple[str, ...]) -> None:
    """Status 200 with neither text nor tool call."""
    with served(dialect, Answer(text=text), stream_upstream=streaming) as (_, client), pytest.raises(EmptyResponse):
        client.chat("hi", model="m", timeout=5)


@pytest.mark.parametrize("dialect", [d for d in DIALECTS if d.blocked is not None], ids=repr)
def test_a_refusal_without_text_is_filtered(dialect: Dialect) -> None:
    """A 200 in which a safety system left nothing over: ContentFiltered."""
    with served(dialect, says(reply(dialect.blocked))) as (_, client), pytest.raises(ContentFiltered):
        client.chat("hi", model="m", timeout=5)


def test_fields_nobody_knows_change_nothing(dialect: Dialect) -> None:
    """Servers add fields: to the body, inside it, and as lists."""
    body = {**dialect.body(Answer()), "x_new": {"deep": [1, None]}, "extra": None, "service": ["a"]}
    with served(dialect, says(reply(body))) as (_, client):
        assert client.chat("hi", model="m", timeout=5).content == "Hello, world"


@pytest.mark.parametrize("size", [1, 5, 333])
def test_an_answer_is_the_same_however_it_is_cut(dialect: Dialect, size: int) -> None:
    """Chunks of any size, UTF-8 split between them."""
    answer = Answer(text=("Grüße, ", "世界 \u2028", " \U0001f600"), calls=CALLS[1:], finish="tool_calls")
    body = b"".join(dialect.events(answer))
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    with served(dialect, says(streamed(dialect, pieces))) as (_, client):
        response = client.chat("hi", model="m", tools=TOOLS, timeout=5)
    assert response.content == answer.whole
    assert [(call.name, call.arguments) for call in response.tool_calls] == list(CALLS[1:])


# -- requests ----------------------------------------------------------------------------------------------------------


OPTIONS: dict[str, Any] = {
    "max_tokens": 77, "temperature": 0.5, "top_p": 0.75, "seed": 3, "user": "somebody", "reasoning_effort": "low",
    "parallel_tool_calls": False, "tool_choice": "auto",
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object", "properties": {}}}},
    "extra_body": {"x_own": {"a": 1}},
}  # fmt: skip


def test_what_is_passed_in_is_never_modified(dialect: Dialect) -> None:
    """messages, tools and options are the caller's: equal afterwards, down to the last nested value."""
    foreign = LLMResponse("Look.", [ToolCall(f"a.b:{at}", name, args) for at, (name, args) in enumerate(CALLS)], "tool_calls")
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpg;base64,{PNG}"}}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "How is it?"}, image]},
        foreign.message,
        {"role": "tool", "tool_call_id": "a.b:1", "content": [{"type": "text", "text": "fine"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "", "type": "function", "function": {
            "name": "gone", "arguments": "not JSON"}}]},
        {"role": "tool", "tool_call_id": "unknown", "content": "orphan"},
        {"role": "assistant", "content": "and"},
    ]  # fmt: skip
    tools = copy.deepcopy(TOOLS)
    options = copy.deepcopy(OPTIONS)
    before = copy.deepcopy((messages, tools, options))
    with served(dialect, Answer()) as (_, client):
        client.chat(messages, tools=tools, model="m", timeout=5, **options)
        drained(client.stream(messages, tools=tools, model="m", timeout=5, **options))
    assert (messages, tools, options) == before


def test_extra_body_goes_on_top(dialect: Dialect) -> None:
    """Fields of one vendor reach its server as they are."""
    with served(dialect, Answer()) as (server, client):
        client.chat("hi", model="m", timeout=5, extra_body={"x_own": {"deep": [1]}, "model": "other"})
    body = parsed(server.requests[0])[2]
    assert (body["x_own"], body["model"]) == ({"deep": [1]}, "other")


def test_the_token_limit_is_sent(dialect: Dialect) -> None:
    """max_tokens and max_completion_tokens mean the same, whatever the vendor calls it."""
    with served(dialect, Answer()) as (server, client):
        client.chat("hi", model="m", timeout=5, max_tokens=77)
        client.chat("hi", model="m", timeout=5, max_completion_tokens=77)
    first, second = (parsed(request)[2] for request in server.requests)
    assert first == second
    assert "77" in json.dumps(first)


@pytest.mark.parametrize(
    ("option", "nearest"), [("temprature", "temperature"), ("max_token", "max_tokens"), ("tool_choise", "tool_choice")]
)
def test_an_unknown_option_is_a_type_error(dialect: Dialect, option: str, nearest: str) -> None:
    """It names the nearest known one and where vendors' own fields go; nothing is sent. A chain passes it on."""
    with served(dialect, Answer()) as (server, client):
        chain = FailoverChain([ProviderTier("only", client, ["m"])])
        for ask in (lambda: client.chat("hi", model="m", **{option: 1}), lambda: chain.chat("hi", **{option: 1})):
            with pytest.raises(TypeError, match=rf"{option}.*{nearest}.*extra_body"):
                ask()
        assert not server.requests


def test_malformed_requests_are_refused_before_they_are_sent(dialect: Dialect) -> None:
    """Messages and tools of the wrong shape, and what JSON cannot carry."""
    with served(dialect, Answer()) as (server, client):
        for asked in (
            {"messages": []},
            {"messages": [{"role": "nobody", "content": "x"}]},
            {"messages": "hi", "tools": [{"type": "function", "function": {}}]},
            {"messages": "hi", "extra_body": {"x": float("nan")}},
        ):
            with pytest.raises((ProviderError, ConfigError)):
                client.chat(model="m", timeout=5, **asked)
        assert not server.requests


def test_a_model_is_needed_or_not(dialect: Dialect) -> None:
    """Cloud vendors and Ollama need a model's name; compatible servers have one of their own."""
    with served(dialect, Answer()) as (server, client):
        if dialect.needs_model:
            with pytest.raises(ConfigError, match="model"):
                client.chat("hi", timeout=5)
            assert not server.requests
        else:
            assert client.chat("hi", timeout=5).content == "Hello, world"
            assert not parsed(server.requests[0])[2].get("model")


def test_the_key_goes_into_a_header_only(dialect: Dialect) -> None:
    """One header carries it; neither the address nor the body does. No key, no header."""
    with served(dialect, Answer()) as (server, client):
        client.chat("hi", model="m", timeout=5)
        keyless = dialect.make(f"http://127.0.0.1:{server.port}", "")
        keyless.chat("hi", model="m", timeout=5)
        keyless.close()
    path, headers, body = parsed(server.requests[0])
    carrying = [name for name, value in headers.items() if KEY in value]
    assert len(carrying) == 1
    assert KEY not in path + json.dumps(body)
    assert carrying[0] not in parsed(server.requests[1])[1]


# -- failures ----------------------------------------------------------------------------------------------------------

FAILURES = [(dialect, name) for dialect in DIALECTS for name in dialect.failures]


@pytest.mark.parametrize(("dialect", "name"), FAILURES, ids=str)
def test_failures_have_their_class(dialect: Dialect, name: str, streaming: bool) -> None:
    """Each vendor's own body for each kind of failure: class, status, provider, model, retry_after; one request."""
    status, headers, body, kind, wait = dialect.failures[name]
    with served(dialect, says(reply(body, status, **headers)), stream_upstream=streaming) as (server, client):
        with pytest.raises(ProviderError) as raised:
            client.chat("hi", model="m", timeout=5)
        assert len(server.requests) == 1
    error = raised.value
    assert type(error) is kind
    assert (error.status, error.provider, error.model, error.retry_after) == (status, client._vendor, "m", wait)


@pytest.mark.parametrize(
    ("status", "kind"), [(502, ServerError), (504, ServerError), (404, ProviderUnavailable), (401, AuthenticationError),
                         (307, InvalidResponse)]
)  # fmt: skip
def test_failures_that_are_no_json(dialect: Dialect, status: int, kind: type) -> None:
    """Proxies answer in HTML, and redirects are not followed: the status decides."""
    page = reply(b"<html><h1>Oops</h1></html>", status, "text/html", Location="http://127.0.0.1:9/elsewhere")
    with served(dialect, says(page)) as (server, client):
        with pytest.raises(ProviderError) as raised:
            client.chat("hi", model="m", timeout=5)
        assert len(server.requests) == 1
    assert type(raised.value) is kind
    assert "<" not in str(raised.value)


def test_a_page_with_status_200_is_no_answer(dialect: Dialect) -> None:
    """A captive portal: InvalidResponse."""
    with served(dialect, says(reply(b"<html>Log in</html>", 200, "text/html"))) as (_, client), pytest.raises(InvalidResponse):
        client.chat("hi", model="m", timeout=5)


def test_a_hint_that_a_model_refuses_is_dropped(dialect: Dialect, streaming: bool) -> None:
    """One corrected resend within the same attempt, told as an event; the next call knows, another model is asked anew."""
    option, value, body = dialect.refused
    events = []

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if f'"{dialect.hint}":'.encode() in request:
            connection.sendall(reply(body, 400))
            return True
        return answers(dialect, lambda _: Answer())(server, connection, request)

    with served(dialect, serve, stream_upstream=streaming) as (server, client):
        chain = FailoverChain([ProviderTier("only", client, ["m", "n"])], on_event=events.append)
        response = chain.chat("hi", timeout=5, **{option: value})
        assert (response.content, len(response.attempts), len(server.requests)) == ("Hello, world", 1, 2)
        assert [event.data["field"] for event in events if event.kind == "resend"] == [option]
        chain.chat("hi", timeout=5, **{option: value})
        assert len(server.requests) == 3
        chain.chat("hi", model="n", timeout=5, **{option: value})
        assert len(server.requests) == 5


def test_a_hint_that_is_refused_again_is_an_error(dialect: Dialect) -> None:
    """There is no second resend: what still fails is the model's answer."""
    option, value, body = dialect.refused
    with served(dialect, says(reply(body, 400))) as (server, client):
        with pytest.raises(ProviderError) as raised:
            client.chat("hi", model="m", timeout=5, **{option: value})
        assert (raised.value.status, len(server.requests)) == (400, 2)


def test_the_request_id_of_an_answer_and_of_a_failure(dialect: Dialect) -> None:
    """As the header says; it is what a vendor's support asks for."""
    with served(dialect, says(reply(dialect.body(Answer()), X_Request_Id="req-7"))) as (_, client):
        assert client.chat("hi", model="m", timeout=5).request_id == "req-7"
    status, headers, body, _, _ = dialect.failures["500"]
    failing = says(reply(body, status, X_Request_Id="req-8", **headers))
    with served(dialect, failing) as (_, client), pytest.raises(ProviderError) as raised:
        client.chat("hi", model="m", timeout=5)
    assert raised.value.request_id == "req-8"


def test_a_session_of_the_users_own(dialect: Dialect) -> None:
    """It is used as it is, its headers go along, and close() leaves it alone."""
    session = requests.Session()
    session.headers["X-Mine"] = "1"
    with session, served(dialect, Answer(reasoning=("Hm.",)), session=session) as (server, client):
        for _ in range(2):
            assert client.chat("hi", model="m", timeout=5).content == "Hello, world"
            client.close()
        assert [parsed(request)[1]["x-mine"] for request in server.requests] == ["1", "1"]
        assert server.connections == 1


def test_nobody_listens(dialect: Dialect) -> None:
    """A refused connection is ProviderUnavailable."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    client = dialect.make(f"http://127.0.0.1:{port}")
    with pytest.raises(ProviderUnavailable, match="refused"):
        client.chat("hi", model="m", timeout=5)


def test_an_error_inside_a_stream(dialect: Dialect) -> None:
    """HTTP 200, text, then the vendor's error: chat() raises its class, stream() raises it after the text."""
    events = dialect.events(Answer(text=("par", "tial")))
    at = next(at for at, event in enumerate(events) if b"tial" in event)
    wire, kind = dialect.broken
    with served(dialect, says(streamed(dialect, [*events[:at], wire]))) as (server, client):
        with pytest.raises(ProviderError) as raised:
            client.chat("hi", model="m", timeout=5)
        assert type(raised.value) is kind
        stream = client.stream("hi", model="m", timeout=5)
        assert next(stream) == "par"
        with pytest.raises(kind):
            next(stream)
        assert len(server.requests) == 2


def test_an_error_inside_a_stream_interrupts_a_chain(dialect: Dialect) -> None:
    """After text was handed out nobody else is asked: StreamInterrupted with the partial text and the cause."""
    events = dialect.events(Answer(text=("par", "tial")))
    at = next(at for at, event in enumerate(events) if b"tial" in event)
    wire, kind = dialect.broken
    with served(dialect, says(streamed(dialect, [*events[:at], wire]))) as (server, client):
        chain = FailoverChain([ProviderTier(name, client, ["m"]) for name in ("a", "b")])
        stream = chain.stream("hi", timeout=5)
        assert next(stream) == "par"
        with pytest.raises(StreamInterrupted) as raised:
            next(stream)
        assert len(server.requests) == 1
    assert raised.value.partial == "par"
    assert type(raised.value.__cause__) is kind


def test_an_error_as_whole_json_with_status_200(dialect: Dialect) -> None:
    """Some gateways answer 200 with an error in it."""
    body = {"error": {"message": "Provider returned error", "code": 429}}
    with served(dialect, says(reply(body))) as (_, client), pytest.raises(ProviderError) as raised:
        client.chat("hi", model="m", timeout=5)
    assert type(raised.value).__name__ == "RateLimited"


@pytest.mark.parametrize("ending", ["closed", "length", "whole"])
def test_a_cut_answer_is_no_answer(dialect: Dialect, ending: str) -> None:
    """The body ends before the vendor's own sign of the end: InvalidResponse, however the end of the body is told."""
    events = dialect.events(Answer())
    half = b"".join(events[: next(at for at, event in enumerate(events) if b"world" in event) + 1])
    kind = f"HTTP/1.1 200 OK\r\nContent-Type: {dialect.stream_kind}\r\n".encode()
    data = {
        "closed": kind + b"Connection: close\r\n\r\n" + half,
        "length": kind + b"Content-Length: %d\r\n\r\n" % (len(half) + 500) + half,
        "whole": reply(json.dumps(dialect.body(Answer())).encode()[:-20]),
    }[ending]
    with served(dialect, says(data, keep=False)) as (_, client), pytest.raises(InvalidResponse):
        client.chat("hi", model="m", timeout=5)


@pytest.mark.parametrize("dialect", [d for d in DIALECTS if d.unfinished is not None], ids=repr)
def test_a_whole_answer_that_says_it_is_not_finished(dialect: Dialect) -> None:
    """Where the format has a word for it, it is no answer."""
    body = {**dialect.body(Answer()), **dialect.unfinished}
    with served(dialect, says(reply(body))) as (_, client), pytest.raises(InvalidResponse):
        client.chat("hi", model="m", timeout=5)


def test_an_answer_cut_after_its_end_is_an_answer(dialect: Dialect) -> None:
    """All of the answer has come; that the connection then breaks inside the body costs nothing."""
    data = head(dialect) + b"".join(map(chunk, dialect.events(Answer())))
    with served(dialect, says(data, keep=False)) as (_, client):
        assert client.chat("hi", model="m", timeout=5).content == "Hello, world"


# -- limits ------------------------------------------------------------------------------------------------------------


def waits(data: bytes) -> Serve:
    """A server that says this and then nothing, until the client goes."""

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(data)
        server.stopping.wait(5)
        return False

    return serve


def ends_in_time(limit: float, ask: Callable[[], Any]) -> ProviderTimeout:
    """The error of a call that ends at its limit, and not 5 % and 100 ms later. A busy machine gets three tries: a limit that
    does not hold would miss them all."""
    late = []
    while len(late) < 3:
        start = time.monotonic()
        with pytest.raises(ProviderTimeout) as raised:
            ask()
        took = time.monotonic() - start
        assert took >= limit - 0.01
        if took < limit * 1.05 + 0.1:
            return raised.value
        late.append(took)
    raise AssertionError(f"{late} s instead of {limit} s")


def test_silence_before_the_first_token(dialect: Dialect) -> None:
    """Headers, roles and keep-alives are no token: first_token_timeout ends it, by setting and by call."""
    data = head(dialect) + chunk(dialect.idle)
    for settings, asked in (({"first_token_timeout": 0.15}, {}), ({}, {"first_token_timeout": 0.15})):
        with served(dialect, waits(data), **settings) as (_, client):
            error = ends_in_time(0.15, lambda client=client, asked=asked: client.chat("hi", model="m", timeout=10, **asked))
        assert error.code == "first_token_timeout"


def test_silence_inside_the_answer(dialect: Dialect) -> None:
    """stall_timeout ends it once a token has come, by setting and by call."""
    events = dialect.events(Answer())
    at = next(at for at, event in enumerate(events) if b"world" in event)
    data = head(dialect) + b"".join(map(chunk, events[:at]))
    for settings, asked in (({"stall_timeout": 0.15}, {}), ({}, {"stall_timeout": 0.15})):
        with served(dialect, waits(data), **settings) as (_, client):
            error = ends_in_time(0.15, lambda client=client, asked=asked: client.chat("hi", model="m", timeout=10, **asked))
        assert error.code == "stall_timeout"


def test_an_answer_that_never_ends(dialect: Dialect) -> None:
    """Tokens keep coming, so no silence ends it; timeout does."""
    events = dialect.events(Answer())
    token = next(event for event in events if b"Hello" in event)
    before = events[: events.index(token)]

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(head(dialect) + b"".join(map(chunk, before)))
        while not server.stopping.wait(0.02):
            connection.sendall(chunk(token))
        return False

    with served(dialect, serve) as (_, client):
        error = ends_in_time(0.25, lambda: client.chat("hi", model="m", timeout=0.25))
    assert error.code == "attempt_timeout"


def test_an_answer_that_is_too_large(dialect: Dialect, streaming: bool) -> None:
    """max_response_bytes ends it."""
    answer = Answer(text=tuple("x" * 100 for _ in range(100)))
    with (
        served(dialect, answer, stream_upstream=streaming, max_response_bytes=5000) as (_, client),
        pytest.raises(InvalidResponse, match="max_response_bytes"),
    ):
        client.chat("hi", model="m", timeout=5)


def test_an_error_body_that_is_too_large(dialect: Dialect) -> None:
    """Error bodies count, too."""
    with (
        served(dialect, says(reply(b"x" * 9000, 500, "text/plain")), max_response_bytes=5000) as (_, client),
        pytest.raises(InvalidResponse, match="max_response_bytes"),
    ):
        client.chat("hi", model="m", timeout=5)


# -- connections -------------------------------------------------------------------------------------------------------


def test_connections_are_kept(dialect: Dialect, streaming: bool) -> None:
    """A finished answer gives its connection back."""
    with served(dialect, Answer(), stream_upstream=streaming) as (server, client):
        for _ in range(5):
            client.chat("hi", model="m", timeout=5)
        assert (len(server.requests), server.connections) == (5, 1)


def test_an_error_gives_its_connection_back(dialect: Dialect) -> None:
    """An error body is read to its end."""
    status, headers, body, kind, _ = dialect.failures["bad request"]
    with served(dialect, says(reply(body, status, **headers))) as (server, client):
        for _ in range(3):
            with pytest.raises(kind):
                client.chat("hi", model="m", timeout=5)
        assert server.connections == 1


def test_closing_a_stream_early_closes_the_connection(dialect: Dialect) -> None:
    """The server sees the caller go, so that it can stop generating; the next call opens another connection."""
    gone = threading.Event()
    events = dialect.events(Answer())
    at = next(at for at, event in enumerate(events) if b"world" in event)

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if server.connections > 1:
            connection.sendall(streamed(dialect, events))
            return True
        connection.sendall(head(dialect) + b"".join(map(chunk, events[:at])))
        connection.settimeout(5)
        if connection.recv(1) == b"":
            gone.set()
        return False

    with served(dialect, serve) as (server, client):
        stream = client.stream("hi", model="m", timeout=5)
        assert next(stream) == "Hello, "
        stream.close()
        assert gone.wait(5)
        assert client.chat("hi", model="m", timeout=5).content == "Hello, world"
        assert server.connections == 2


def test_eight_threads_share_a_provider(dialect: Dialect) -> None:
    """Every caller gets the answer to its own question, text and tool call."""

    def echo(body: dict[str, Any]) -> Answer:
        question = found_in(r"question \d+/\d+", body)
        return Answer(text=(question[:6], question[6:]), calls=(("weather", {"city": question}),), finish="tool_calls")

    wrong: list[Any] = []
    barrier = threading.Barrier(8)

    def ask(client: Any, who: int) -> None:
        barrier.wait(5)
        for turn in range(5):
            question = f"question {who}/{turn}"
            response = client.chat(question, model="m", tools=TOOLS, timeout=10)
            if (response.content, response.tool_calls[0].arguments) != (question, {"city": question}):
                wrong.append(response)

    with served(dialect, answers(dialect, echo)) as (server, client):
        threads = [threading.Thread(target=ask, args=(client, who)) for who in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert (wrong, len(server.requests)) == ([], 40)
        assert server.connections <= 8


def test_close_and_use_again(dialect: Dialect) -> None:
    """close() frees the idle connections; the provider stays usable, and may be closed twice."""
    with served(dialect, Answer()) as (server, client):
        client.chat("hi", model="m", timeout=5)
        client.close()
        client.close()
        assert client.chat("hi", model="m", timeout=5).content == "Hello, world"
        assert server.connections == 2


# -- probes, secrets, records ------------------------------------------------------------------------------------------


def test_a_good_ping(dialect: Dialect) -> None:
    """It lists the models, with the key, and asks no model anything."""
    with served(dialect, says(reply(dialect.models))) as (server, client):
        assert client.ping(timeout=5) is None
    (request,) = server.requests
    assert request.startswith(f"GET {dialect.ping_path} HTTP/1.1\r\n".encode())
    assert KEY.encode() in request


def test_bad_pings(dialect: Dialect) -> None:
    """A wrong key, a server in trouble, one that is silent and one that is none."""
    status, headers, body, kind, _ = dialect.failures["401"]
    with served(dialect, says(reply(body, status, **headers))) as (_, client), pytest.raises(kind):
        client.ping(timeout=5)
    with served(dialect, says(reply(b"oops", 500, "text/plain"))) as (_, client), pytest.raises(ServerError):
        client.ping(timeout=5)
    with served(dialect, says(reply(b"<html>", 200, "text/html"))) as (_, client), pytest.raises(InvalidResponse):
        client.ping(timeout=5)
    with served(dialect, waits(b"")) as (server, client):
        ends_in_time(0.1, lambda: client.ping(timeout=0.1))
        port = server.port
    with pytest.raises(ProviderUnavailable):
        dialect.make(f"http://127.0.0.1:{port}").ping(timeout=5)


@pytest.mark.parametrize("key", [KEY, "tr0ub4dor&3"], ids=["like a key", "like anything"])
def test_no_key_and_no_prompt_is_ever_shown(dialect: Dialect, key: str) -> None:
    """A server that repeats the key and the prompt: neither is in the str, repr, args or pickle of anything."""
    prompt = "the launch code is tangerine seventeen"
    echo = f"wrong key {key} for the prompt {prompt}"
    bodies = [{"error": {"message": echo, "type": "x", "code": None}}, {"error": echo}, {"message": echo}]
    for body in bodies:
        for status in (400, 401, 500, 200):
            with peer(says(reply(body, status))) as server:
                client = dialect.make(f"http://127.0.0.1:{server.port}", key)
                with pytest.raises(ProviderError) as raised:
                    client.chat(prompt, model="m", timeout=5)
                client.close()
                error = raised.value
                seen = f"{error!s} {error!r} {error.args} {error.__cause__!r} {error.__context__!r} {client!r} {vars(error)}"
                assert key not in seen
                assert prompt not in seen
                assert key.encode() not in pickle.dumps(error)


def test_answers_are_shown_without_their_text(dialect: Dialect) -> None:
    """The repr of a response holds neither text, reasoning nor arguments."""
    answer = Answer(reasoning=("secret thought",), text=("secret text",), calls=(("weather", {"city": "secret city"}),),
                    finish="tool_calls")  # fmt: skip
    with served(dialect, answer) as (_, client):
        response = client.chat("hi", model="m", tools=TOOLS, timeout=5)
    assert "secret" not in f"{response!r} {response!s} {response.explain()}"


def test_answers_and_failures_pickle(dialect: Dialect) -> None:
    """They cross a process boundary; a response is also JSON."""
    with served(dialect, Answer(reasoning=("Hm.",), calls=CALLS, finish="tool_calls")) as (_, client):
        response = client.chat("hi", model="m", tools=TOOLS, timeout=5)
    assert pickle.loads(pickle.dumps(response)) == response
    assert json.loads(json.dumps(response.to_dict()))["content"] == "Hello, world"
    status, headers, body, _, _ = dialect.failures["429 with a hint"]
    with served(dialect, says(reply(body, status, **headers))) as (_, client), pytest.raises(ProviderError) as raised:
        client.chat("hi", model="m", timeout=5)
    copied = pickle.loads(pickle.dumps(raised.value))
    assert (type(copied), copied.status, copied.retry_after, copied.args) == (
        type(raised.value), 429, 7.0, raised.value.args,
    )  # fmt: skip


def test_a_chain_tells_what_happened(dialect: Dialect) -> None:
    """A tier that fails in this format, then one that answers in it: both attempts are on record with usage and status."""
    status, headers, body, _, _ = dialect.failures["overloaded"]
    usage = Usage(11, 5)
    with (
        served(dialect, says(reply(body, status, **headers))) as (_, bad),
        served(dialect, Answer(usage=usage)) as (_, good),
    ):
        chain = FailoverChain([ProviderTier("bad", bad, ["m"], retries=0), ProviderTier("good", good, ["m"])])
        response = chain.chat("hi", timeout=5)
    assert [(attempt.tier, attempt.outcome, attempt.status) for attempt in response.attempts] == [
        ("bad", "failed", status), ("good", "ok", None),
    ]  # fmt: skip
    assert (response.provider, response.attempts[1].usage, response.total_usage) == ("good", usage, usage)

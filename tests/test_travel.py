"""Conversations that travel from vendor to vendor, and the pieces that every wire format shares."""

from __future__ import annotations

import datetime
import itertools
import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from email.utils import format_datetime
from typing import Any

import pytest
from vendors import KEY, Anthropic, Chat, Gemini, Ollama, Raw, Reply, Responses, Vendor, detour

from copilot_router import (
    AnthropicProvider,
    AuthenticationError,
    BadRequest,
    ConfigError,
    ContentFiltered,
    FailoverChain,
    GeminiProvider,
    InvalidResponse,
    LLMResponse,
    ModelNotFound,
    OllamaProvider,
    OpenAIProvider,
    Overloaded,
    ProviderError,
    ProviderTier,
    ProviderUnavailable,
    ServerError,
    UnsupportedRequest,
    Usage,
    _Call,
    _conversation,
    _google_details,
    _media,
    _ollama_host,
    _parts,
    _repaired,
    _reset,
    _safe,
    _until,
)

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": name, "description": "d", "parameters": PARAMETERS}}
         for name in ("weather", "time")]  # fmt: skip
NAMES = ("openai", "responses", "anthropic", "gemini", "ollama")
MODELS = ("m-1", "m-2")
SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "compare some cities"}


@contextmanager
def at(name: str, *script: Any, **settings: Any) -> Iterator[tuple[Any, Any]]:
    """A fake vendor and a provider for it; OpenAI under its own address."""
    with ExitStack() as stack:
        if name in ("openai", "responses"):
            official = stack.enter_context(Responses(*script))
            session = stack.enter_context(detour(official))
            yield official, OpenAIProvider(KEY, session=session, api="chat" if name == "openai" else "responses", **settings)
            return
        kinds: dict[str, tuple[type[Vendor], Any]] = {
            "anthropic": (Anthropic, AnthropicProvider), "gemini": (Gemini, GeminiProvider),
            "ollama": (Ollama, OllamaProvider),
        }  # fmt: skip
        fake, kind = kinds[name]
        server = stack.enter_context(fake(*script))
        provider = kind(KEY, server.url, **settings)
        stack.callback(provider.close)
        yield server, provider


def turns(*whose: str) -> list[Reply]:
    """Four answers, three of them with calls; each has a thought that names whose it is."""
    one, two, three, four = whose
    return [
        Reply("", [("weather", {"city": "Oslo"}), ("time", {"city": "Oslo"})], thinking=f"thought 1 of {one}"),
        Reply("and next", [("weather", {"city": "Rome"})], thinking=f"thought 2 of {two}"),
        Reply("then", [("time", {"city": "Rome"}), ("weather", {"city": "Bern"})], thinking=f"thought 3 of {three}"),
        Reply("all done", thinking=f"thought 4 of {four}"),
    ]


DOWN = Raw({"error": {"message": "down", "type": "server_error"}}, 500)


def looped(chain: FailoverChain, streaming: bool) -> tuple[list[dict[str, Any]], list[LLMResponse]]:
    """A tool loop to its end: the conversation, which went through JSON at every turn, and the answers."""
    history: list[dict[str, Any]] = [SYSTEM, USER]
    responses = []
    for _ in range(4):
        if streaming:
            stream = chain.stream(history, TOOLS)
            assert "".join(stream) == (stream.response.text if stream.response else None)
            response = stream.response
        else:
            response = chain.chat(history, TOOLS)
        assert response is not None
        responses.append(response)
        history.append(json.loads(json.dumps(response.message)))
        assert history[-1] == response.message
        for call in response.tool_calls:
            assert call.arguments is not None
            text = f"{call.name} in {call.arguments['city']}"
            history.append({"role": "tool", "tool_call_id": call.id, "content": text})
    return history, responses


def check_the_answers(responses: list[LLMResponse], tiers: list[str]) -> None:
    assert [response.provider for response in responses] == tiers
    assert [response.text for response in responses] == ["", "and next", "then", "all done"]
    assert [response.finish_reason for response in responses] == ["tool_calls"] * 3 + ["stop"]
    assert [[(call.name, call.arguments) for call in response.tool_calls] for response in responses] == [
        [("weather", {"city": "Oslo"}), ("time", {"city": "Oslo"})], [("weather", {"city": "Rome"})],
        [("time", {"city": "Rome"}), ("weather", {"city": "Bern"})], [],
    ]  # fmt: skip


RESULTS = ["weather in Oslo", "time in Oslo", "weather in Rome", "time in Rome", "weather in Bern"]
#: Whether a vendor's own thinking comes back to the same model.
RETURNS = {"openai": False, "responses": True, "anthropic": True, "gemini": False, "ollama": False}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("one", "two"), list(itertools.permutations(NAMES, 2)))
def test_a_tool_loop_changes_vendor_at_every_turn(one: str, two: str, streaming: bool) -> None:
    """All ordered pairs: complete, nothing foreign on the wire, and each gets its own back unchanged (or would refuse)."""
    a1, b2, a3, b4 = turns(one, two, one, two)
    with at(one, a1, DOWN, a3, DOWN, stream_upstream=streaming) as (first, provider), \
            at(two, b2, b4, stream_upstream=streaming) as (second, other):  # fmt: skip
        chain = FailoverChain([ProviderTier("a", provider, ["m-1"], retries=0), ProviderTier("b", other, ["m-1"], retries=0)])
        _, responses = looped(chain, streaming)
        check_the_answers(responses, ["a", "b", "a", "b"])
        assert not first.refusals
        assert not second.refusals
        assert (len(first.requests), len(second.requests)) == (4, 2)
        for server, mine, foreign in ((first, one, (2, two)), (second, two, (1, one))):
            sent = json.dumps(server.bodies)
            assert "copilot_router" not in sent
            assert f"thought {foreign[0]} of {foreign[1]}" not in sent
            for secret in signatures(first if server is second else second):
                assert secret not in sent
            own = f"thought {1 if server is first else 2} of {mine}"
            assert (own in json.dumps(server.bodies[-1])) == RETURNS[mine]
            last = json.dumps(server.bodies[-1])
            positions = [last.index(text) for text in RESULTS]
            assert positions == sorted(positions)
        if one == "gemini":
            assert [part["thoughtSignature"] for part in first.bodies[2]["contents"][1]["parts"] if "thoughtSignature" in part
                    ] == signatures(first)[:1]  # fmt: skip


def signatures(server: Vendor) -> list[str]:
    """What a fake signed itself, in the order in which it did."""
    found = []
    for issued in server.issued.values():
        if isinstance(server, Gemini):
            found += [issued[1]["thoughtSignature"]] if "thoughtSignature" in issued[1] else []
        elif isinstance(server, Anthropic):
            found.append(issued[1][0]["signature"])
        else:
            found.append(issued[1]["encrypted_content"])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_tool_loop_changes_the_model_at_every_turn(name: str) -> None:
    """Two models of one vendor are strangers too: the server refuses what is bound to the other one."""
    a1, b2, a3, b4 = turns("m-1", "m-2", "m-1", "m-2")
    with at(name, a1, DOWN, b2, a3, DOWN, b4) as (server, provider):
        chain = FailoverChain([ProviderTier(model, provider, [model], retries=0) for model in MODELS])
        _, responses = looped(chain, True)
        check_the_answers(responses, [*MODELS, *MODELS])
        assert not server.refusals
        for request in server.requests:
            model = request.body.get("model") or request.path.partition("/models/")[2].partition(":")[0]
            (other,) = {*MODELS} - {model}
            assert f"of {other}" not in json.dumps(request.body)
            assert "copilot_router" not in json.dumps(request.body)
        assert ("of m-1" in json.dumps(server.bodies[3])) == RETURNS[name]


@pytest.mark.parametrize("name", ["responses", "anthropic", "gemini"])
def test_what_a_message_carries_goes_back_only_as_it_was(name: str) -> None:
    """An edited text, another id, another base URL: then the rest of the message is sent without it."""
    reply = Reply("text", [("weather", {"city": "Oslo"})], thinking="a thought")
    with at(name, reply) as (server, provider):
        response = provider.chat([USER], TOOLS, "m-1")
        message = response.message
        assert message["copilot_router"]
        answer = {"role": "tool", "tool_call_id": response.tool_calls[0].id, "content": "cold"}
        assert provider.chat([USER, message, answer], TOOLS, "m-1").text == "ok"
        edited = {**message, "content": "other text"}
        (call,) = message["tool_calls"]
        renamed = {**message, "tool_calls": [{**call, "id": "mine"}]}
        with at(name) as (stranger, other):
            for changed, result in ((edited, answer), (renamed, {**answer, "tool_call_id": "mine"})):
                stranger.requests.clear()
                assert other.chat([USER, changed, result], TOOLS, "m-1").text == "ok"
                sent = json.dumps(stranger.bodies)
                assert not any(secret in sent for secret in signatures(server))
                assert "a thought" not in sent
            if name != "responses":  # whose two fakes stand behind one address, OpenAI's
                assert other.chat([USER, message, answer], TOOLS, "m-1").text == "ok"
                assert not any(secret in json.dumps(stranger.bodies) for secret in signatures(server))
        call_of_it = provider._checked_call([USER, edited, answer], TOOLS, "m-1", {})
        assert call_of_it.carried(edited) == {}
        assert call_of_it.carried(message) == message["copilot_router"]


def test_a_tool_loop_goes_on_at_deepseek() -> None:
    """Which in thinking mode wants reasoning_content on every turn of the assistant, also on those of other models."""
    calls = [("weather", {"city": "Rome"})]
    with at("anthropic", Reply(calls=[("time", {"city": "Oslo"})], thinking="t")) as (_, provider), \
            Chat(Reply(calls=calls, thinking="a thought"), local=True, thinking=True) as server:  # fmt: skip
        deepseek = OpenAIProvider(KEY, server.url)
        history: list[Any] = [USER]
        for one in (provider, deepseek, deepseek):
            response = one.chat(history, TOOLS, "m-1")
            history.append(response.message)
            history += [{"role": "tool", "tool_call_id": call.id, "content": "x"} for call in response.tool_calls]
        assert response.text == "ok"
        assert [len(server.refusals), len(server.requests)] == [1, 3]
        sent = server.bodies[2]["messages"]
        given = [message.get("reasoning_content") for message in sent if message["role"] == "assistant"]
        assert given == [" ", "a thought"]
        deepseek.close()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_carried_where_there_is_nothing_to_carry(name: str) -> None:
    """A plain answer is a plain message."""
    with at(name, Reply("text")) as (_, provider):
        assert provider.chat("q", model="m-1").message == {"role": "assistant", "content": "text"}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,iVBORw0KGgo="}}


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_with_everything(name: str) -> None:
    """Every vendor takes it: system and developer in the middle, images, empty and null content, lost and foreign results,
    two turns of one side in a row, an assistant at the beginning and at the end."""
    given = [("functions.x:0", ""), ("", "null"), ("same", '{"city": "Oslo"}'), ("same", "{broken"), ("long" * 20, "{}")]
    calls = [{"id": one, "type": "function", "function": {"name": "weather", "arguments": text}} for one, text in given]
    history = [
        {"role": "assistant", "content": "hello"}, SYSTEM, {"role": "developer", "content": [{"type": "text", "text": "d"}]},
        {"role": "user", "content": [{"type": "text", "text": "look"}, IMAGE]}, {"role": "user", "content": ""}, USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "same", "content": [{"type": "text", "text": "first"}]},
        {"role": "tool", "tool_call_id": "", "content": ""}, {"role": "tool", "tool_call_id": "stranger", "content": "lost"},
        {"role": "tool", "tool_call_id": "long" * 20, "content": "long one"},
        {"role": "user", "content": " \n"}, {"role": "assistant", "content": None}, {"role": "assistant", "content": "so"},
    ]  # fmt: skip
    before = json.dumps(history)
    with at(name) as (server, provider):
        assert provider.chat(history, TOOLS, "m-1").text == "ok"
        assert provider.chat(history, None, "m-1").text == "ok"
        assert not server.refusals
        sent = json.dumps(server.bodies[0])
        for text in ("hello", "be brief", "look", "iVBORw0KGgo=", "first", "no result", "lost", "long one", "so"):
            assert text in sent
    assert json.dumps(history) == before


OPTIONS: dict[str, Any] = {
    "max_tokens": 99, "temperature": 0.5, "top_p": 0.9, "seed": 3, "presence_penalty": 0.1, "frequency_penalty": 0.1,
    "user": "u", "parallel_tool_calls": False,
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
CHOICES = ["auto", "none", "required", {"type": "function", "function": {"name": "time"}}]
FORMATS = [{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}]


FORMS: dict[str, list[Any]] = {  #: of tool_choice, in the order of CHOICES
    "openai": CHOICES, "responses": [*CHOICES[:3], {"type": "function", "name": "time"}],
    "anthropic": [None, {"type": "none"}, {"type": "any"}, {"type": "tool", "name": "time"}],
    "gemini": [{"functionCallingConfig": {"mode": mode}} for mode in ("AUTO", "NONE", "ANY")] + [
        {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["time"]}}],
}  # fmt: skip


@pytest.mark.parametrize("name", list(FORMS))
def test_tool_choice_in_all_its_forms(name: str) -> None:
    """As each vendor writes it; parallel calls are switched off where there is a switch."""
    key = "toolConfig" if name == "gemini" else "tool_choice"
    with at(name) as (server, provider):
        for choice in CHOICES:
            provider.chat("q", TOOLS, "m-1", tool_choice=choice)
        assert [body.get(key) for body in server.bodies] == FORMS[name]
        for choice in CHOICES if name == "anthropic" else ():
            provider.chat("q", TOOLS, "m-1", tool_choice=choice, parallel_tool_calls=False)
            off = {} if choice == "none" else {"disable_parallel_tool_use": True}
            assert server.bodies[-1][key] == {"type": "auto", **(FORMS[name][CHOICES.index(choice)] or {}), **off}


@pytest.mark.parametrize("name", NAMES)
def test_usage_in_one_vocabulary(name: str) -> None:
    """The same numbers from each, whatever the vendor's own arithmetic, streamed and whole."""
    for streaming in (False, True):
        with at(name, stream_upstream=streaming) as (_, provider):
            usage = provider.chat("q", model="m-1").usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (20, 15, 35)
        assert (usage.cached_tokens, usage.reasoning_tokens) == ((0, 0) if name == "ollama" else (4, 6))
        assert usage.cache_write_tokens == (6 if name == "anthropic" else 0)


def test_anthropics_temperature_ends_at_one() -> None:
    """What goes up to two elsewhere is brought down to it."""
    with at("anthropic") as (server, provider):
        for given in (0, 0.7, 1, 1.5):
            provider.chat("q", model="m-1", temperature=given)
        assert [body["temperature"] for body in server.bodies] == [0, 0.7, 1, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_blank_text_beside_thinking_is_not_sent_back(streaming: bool) -> None:
    """Anthropic's models write one now and then, and its API refuses it."""
    reply = Reply("\n\n", [("time", {"city": "Oslo"})], "a thought")
    with at("anthropic", reply, stream_upstream=streaming) as (server, provider):
        response = provider.chat([USER], TOOLS, "m-1")
        answer = {"role": "tool", "tool_call_id": response.tool_calls[0].id, "content": "late"}
        assert provider.chat([USER, response.message, answer], TOOLS, "m-1").text == "ok"
        assert [one["type"] for one in server.bodies[1]["messages"][1]["content"]] == ["thinking", "tool_use"]


@pytest.mark.parametrize("name", NAMES)
def test_every_option_at_every_vendor(name: str) -> None:
    """Accepted by the server in the first request, in each form of tool_choice, format and effort, or refused here."""
    efforts = ["none", "minimal", "low", "high", "xhigh", "max"]
    varied: list[dict[str, Any]] = [
        OPTIONS, {"stop": "END"}, {"stop": ["a", "b"]}, {"max_completion_tokens": 50},
        *({"tool_choice": choice} for choice in CHOICES), *({"response_format": wanted} for wanted in FORMATS),
        *({"reasoning_effort": effort} for effort in efforts), {"tool_choice": "none", "parallel_tool_calls": False},
    ]  # fmt: skip
    unable = 0
    with at(name) as (server, provider):
        for options in varied:
            try:
                assert provider.chat("in json", TOOLS, "m-1", **options).text == "ok"
            except UnsupportedRequest:
                unable += 1
                assert (name == "ollama" and options.get("tool_choice") in CHOICES[2:]) or (name, *options) == (
                    "responses", "stop")  # fmt: skip
        assert len(server.requests) == len(varied) - unable
        assert not server.refusals
        assert unable == (2 if name in ("ollama", "responses") else 0)


# -- what the wire formats share


def test_calls_and_results_are_paired() -> None:
    """In the calls' order, under ids of their own, with what is missing made up; the original is not touched."""
    def call(one: Any) -> dict[str, Any]:
        return {"id": one, "function": {"name": "f", "arguments": "{}"}}

    def tool(one: Any, text: str) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": one, "content": text}

    plain = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert _repaired(plain) is plain
    messages = [
        tool("early", "no call before it"),
        {"role": "assistant", "tool_calls": [call("a"), call("b"), call(None)]},
        tool("b", "2"), tool("a", "1"), tool(None, "3"),
        {"role": "assistant", "tool_calls": [call("a"), call("lost")]}, tool("a", "again"), tool("a", "twice"),
        {"role": "user", "content": "meanwhile"}, {"role": "tool", "tool_call_id": "lost", "content": [{"type": "text"}]},
        {"role": "assistant", "tool_calls": []},
    ]  # fmt: skip
    before = json.dumps(messages)
    done = _repaired(messages)
    assert json.dumps(messages) == before
    assert [message["role"] for message in done] == [
        "user", "assistant", "tool", "tool", "tool", "assistant", "tool", "tool", "user", "user", "user", "assistant",
    ]  # fmt: skip
    assert [one["id"] for one in done[1]["tool_calls"]] == ["a", "b", "call_2"]
    assert [(one["tool_call_id"], one["content"]) for one in done[2:5]] == [("a", "1"), ("b", "2"), ("call_2", "3")]
    assert [one["id"] for one in done[5]["tool_calls"]] == ["a_3", "lost"]
    assert [(one["tool_call_id"], one["content"]) for one in done[6:8]] == [
        ("a_3", "again"), ("lost", "no result: the call was interrupted"),
    ]  # fmt: skip
    lead = "Result of a tool call:"
    assert [one["content"] for one in done[8:11]] == [
        f"{lead} twice", "meanwhile", [{"type": "text", "text": lead}, {"type": "text"}],
    ]  # fmt: skip
    assert done[0] == {"role": "user", "content": f"{lead} no call before it"}


def test_a_made_up_id_is_not_one_that_is_there() -> None:
    """Ids that look like made-up ones, and calls without any: all distinct in the end."""
    calls = [{"id": one, "function": {"name": "f"}} for one in ("", "call_0", "", "call_1", "call_0", "call_0_4", "")]
    (message, *results) = _repaired([{"role": "assistant", "tool_calls": calls}])
    ids = [one["id"] for one in message["tool_calls"]]
    assert len(set(ids)) == len(calls)
    assert [one["tool_call_id"] for one in results] == ids


def conversation(*messages: Any) -> tuple[str, list[Any]]:
    system, found = _conversation(_Call(list(messages), None, "m", {}), "X")
    return system, [(turn.role, [text for _, _, text in turn.parts], [one[1:] for one in turn.calls],
                     [one[0] for one in turn.results]) for turn in found]  # fmt: skip


def test_turns_alternate() -> None:
    """System texts apart, one side's messages merged, nothing for empty ones, the user first and last."""
    calls = [{"id": "a", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    assert conversation(
        {"role": "system", "content": "s"}, {"role": "developer", "content": " "}, {"role": "assistant", "content": "1"},
        {"role": "assistant", "content": "2", "tool_calls": calls}, {"role": "tool", "tool_call_id": "a", "content": ""},
        {"role": "user", "content": "3"}, {"role": "user", "content": ""}, {"role": "system", "content": "t"},
        {"role": "assistant", "content": None}, {"role": "assistant", "content": "4"},
    ) == ("s\n\nt", [
        ("user", ["Continue."], [], []), ("assistant", ["1", "2"], [("f", {"x": 1})], []), ("user", ["3"], [], ["a"]),
        ("assistant", ["4"], [], []), ("user", ["Continue."], [], []),
    ])  # fmt: skip
    assert conversation({"role": "system", "content": "s"}) == ("s", [("user", ["Continue."], [], [])])
    with pytest.raises(UnsupportedRequest, match="only text"):
        conversation({"role": "system", "content": [IMAGE]})


def test_what_is_carried_never_replaces_what_came_before() -> None:
    """Two of the assistant's messages in a row: the second one's blocks must not stand for both."""
    kept = {"for": "me", "text": "2", "ids": [], "blocks": [{"type": "text", "text": "2"}]}
    carrying = {"role": "assistant", "content": "2", "copilot_router": kept}
    for before, carried in ((USER, kept), ({"role": "assistant", "content": "1"}, {})):
        _, found = _conversation(_Call([USER, before, carrying], None, "m", {}, identity="me"), "X")
        assert found[1].carry == carried
        assert [text for turn in found[:2] for _, _, text in turn.parts][-1] == "2"


def test_parts_of_all_kinds() -> None:
    """Texts, refusals, images under two names, as URL, data URL and bare text, files; what has no form is refused."""
    assert _parts(None, "X") == _parts("", "X") == _parts([], "X") == []
    assert _parts("x", "X") == [("text", "", "x")]
    data = "data:image/png;base64,QQ=="
    assert _parts([
        {"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"type": "refusal", "refusal": "no"},
        {"type": "image_url", "image_url": data}, {"type": "image_url", "image_url": {"url": "http://h/x.png"}},
        {"type": "input_image", "image_url": data}, {"type": "output_text", "text": "b"},
        {"type": "file", "file": {"filename": "f", "file_data": "data:application/pdf;base64,QQ=="}},
    ], "X") == [
        ("text", "", "a"), ("text", "", "no"), ("data", "image/png", "QQ=="), ("url", "", "http://h/x.png"),
        ("data", "image/png", "QQ=="), ("text", "", "b"), ("data", "application/pdf", "QQ=="),
    ]  # fmt: skip
    for part in ({"type": "input_audio", "input_audio": {}}, {"type": "text"}, {}):
        with pytest.raises(UnsupportedRequest, match="X cannot be sent"):
            _parts([part], "X")
    for part in ({"type": "image_url"}, {"type": "image_url", "image_url": {"url": 5}}, {"type": "file", "file": {}}):
        with pytest.raises(BadRequest, match="no URL"):
            _parts([part], "X")


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://h/x.png", None), ("data:image/png;base64,QQ==", ("image/png", "QQ==")),
        ("DATA:IMAGE/JPG;base64,QQ==", ("image/jpeg", "QQ==")), ("data:;base64,QQ==", ("image/png", "QQ==")),
        ("data:image/webp;charset=utf-8;base64,Q Q\n==", ("image/webp", "QQ==")),
        ("data:image/gif;base64,-_8=", ("image/gif", "+/8=")), ("data:image/png", ("image/png", "")),
    ],
)  # fmt: skip
def test_data_urls_are_read_leniently(url: str, found: Any) -> None:
    """Upper case, image/jpg, no type, parameters, white space, the other alphabet."""
    assert _media(url) == found


def test_names_and_ids_made_safe_stay_distinct() -> None:
    """What is fine stays; what is not, empty or too long is marked by a checksum of what it was."""
    bad = r"[^a-zA-Z0-9_-]"
    given = ["fine-1", "a.b", "a:b", "a b", "", "x" * 64, "x" * 65, "x" * 66, "é", "è"]
    made = [_safe(text, bad, 64) for text in given]
    assert made[0] == "fine-1"
    assert made[5] == "x" * 64
    assert len(set(made)) == len(given)
    assert all(0 < len(text) <= 64 and not re.search(bad, text) for text in made)
    assert made == [_safe(text, bad, 64) for text in given]


def test_tool_names_are_made_valid_and_back() -> None:
    """What OpenAI's form allows to nobody else: dots for Anthropic, a leading digit for Gemini; the caller sees his own."""
    tool = {"type": "function", "function": {"name": "1st.tool", "parameters": SCHEMA}}
    choice = {"type": "function", "function": {"name": "1st.tool"}}
    for name in ("anthropic", "gemini"):
        def reply(body: Any) -> Reply:
            declared = body["tools"][0].get("functionDeclarations", body["tools"])
            return Reply(calls=[(declared[0]["name"], {"a": "x"})])

        with at(name, reply) as (server, provider):
            response = provider.chat([USER], [tool], "m-1", tool_choice=choice)
            (call,) = response.tool_calls
            assert call.name == "1st.tool"
            history = [USER, response.message, {"role": "tool", "tool_call_id": call.id, "content": "x"}]
            assert provider.chat(history, [tool], "m-1").text == "ok"
            assert not server.refusals


@pytest.mark.parametrize(
    ("kind", "given", "full"),
    [
        (AnthropicProvider, "https://api.anthropic.com", "https://api.anthropic.com/v1"),
        (AnthropicProvider, "https://api.anthropic.com/", "https://api.anthropic.com/v1"),
        (AnthropicProvider, "https://api.anthropic.com/v1/", "https://api.anthropic.com/v1"),
        (AnthropicProvider, "https://api.anthropic.com/v1/messages", "https://api.anthropic.com/v1"),
        (AnthropicProvider, "https://h/anthropic/v1", "https://h/anthropic/v1"),
        (GeminiProvider, "https://generativelanguage.googleapis.com", "https://generativelanguage.googleapis.com/v1beta"),
        (GeminiProvider, "https://generativelanguage.googleapis.com/v1", "https://generativelanguage.googleapis.com/v1"),
        (OpenAIProvider, "https://h/v1/responses", "https://h/v1"), (OpenAIProvider, "https://h/openai/", "https://h/openai"),
        (OllamaProvider, "http://h", "http://h"), (OllamaProvider, "http://h:11434/api/chat", "http://h:11434"),
        (OllamaProvider, "h:1/api", "http://h:1"), (OllamaProvider, "https://ollama.com/", "https://ollama.com"),
    ],
)  # fmt: skip
def test_base_urls_of_all_vendors(kind: Any, given: str, full: str) -> None:
    """Without a path the API's own; what people copy along is cut."""
    assert kind(KEY, given).base_url == full


def test_addresses_that_are_none() -> None:
    """ConfigError when built, for Ollama too, whose address needs no scheme."""
    for url in (5, "ftp://h", "http://"):
        with pytest.raises(ConfigError, match="base_url"):
            AnthropicProvider(KEY, url)  # type: ignore[arg-type]
    for url in (5, "ftp://h"):
        with pytest.raises(ConfigError, match="base_url"):
            OllamaProvider(KEY, url)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="api='both'"):
        OpenAIProvider(KEY, api="both")
    assert _ollama_host("[fe80::1%25eth0]:9/x") == "http://[fe80::1%25eth0]:9/x"


def test_keys_of_all_vendors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its own header, from its own variable; no key is no header, and a warning for a cloud."""
    monkeypatch.setenv("GEMINI_API_KEY", "gemini-key")
    assert GeminiProvider()._headers["x-goog-api-key"] == "gemini-key"
    monkeypatch.setenv("GOOGLE_API_KEY", "google-key")
    assert GeminiProvider()._headers["x-goog-api-key"] == "google-key"
    monkeypatch.setenv("ANTHROPIC_API_KEY", " key\n")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://proxy")
    provider = AnthropicProvider(headers={"anthropic-version": "2026-10-21"})
    assert (provider.base_url, provider._headers["x-api-key"]) == ("http://proxy/v1", "key")
    assert provider._headers["anthropic-version"] == "2026-10-21"
    monkeypatch.setenv("OLLAMA_API_KEY", "cloud")
    assert OllamaProvider()._headers["Authorization"] == "Bearer cloud"
    assert "Authorization" not in OllamaProvider("")._headers
    for kind, name in ((AnthropicProvider, "x-api-key"), (GeminiProvider, "x-goog-api-key")):
        monkeypatch.delenv("ANTHROPIC_BASE_URL", raising=False)
        with pytest.warns(UserWarning, match="has no key: set (ANTHROPIC|GOOGLE)_API_KEY"):
            assert name not in kind("")._headers


@pytest.mark.parametrize("name", NAMES)
def test_ping_lists_the_models(name: str) -> None:
    """At each vendor's own address, with the key, and nothing is generated."""
    with at(name) as (server, provider):
        provider.ping()
        assert not server.requests


def test_details_of_google() -> None:
    """Reasons, a daily quota, the delay; whatever else stands there is passed over."""
    daily = {"violations": [{"quotaId": "PerMinute"}, {"quotaId": "RequestsPerDay-FreeTier"}, 5]}
    assert _google_details([{"reason": "API_KEY_INVALID"}, daily, {"retryDelay": "26s"}, {"retryDelay": 5}, "x", None]) == (
        ["API_KEY_INVALID", None, "insufficient_quota", None, None, None, None], 26.0,
    )  # fmt: skip
    for nothing in (None, {}, "x", [], 5):
        assert _google_details(nothing) == ([], None)
    assert _google_details([{"violations": "x", "retryDelay": "soon"}]) == ([None], None)


def test_dates_to_wait_for() -> None:
    """HTTP dates and RFC 3339 in several forms; the past is now; what is no date is None."""
    soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=60)
    for text in (format_datetime(soon, usegmt=True), soon.strftime("%Y-%m-%dT%H:%M:%SZ"), soon.isoformat(timespec="seconds")):
        assert 50 < (_until(text) or 0) <= 60
    assert _until("Thu, 01 Jan 1970 00:00:00 GMT") == _until("1999-01-01T00:00:00+02:00") == 0
    for text in ("", "x", "30", "2026-99-99T00:00:00Z", "0001-01-01T00:00:00", "Thu, 99 Foo", "9999T"):
        assert _until(text) in (None, 0.0)
    assert _until("2026-99-99T00:00:00Z") is _until("30") is _until("") is None


def test_a_limit_that_is_not_used_up_is_nothing_to_wait_for() -> None:
    """Each vendor's headers; a reset counts when nothing remains, or nobody says what does."""
    in_a_minute = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60))
    openai, anthropic = "x-ratelimit-reset-tokens", "anthropic-ratelimit-tokens-reset"
    assert _reset({openai: "1m0s", "x-ratelimit-remaining-tokens": " 0 "}, "tokens") == 60
    assert _reset({openai: "1m0s"}, "tokens") == 60
    assert _reset({openai: "1m0s", "x-ratelimit-remaining-tokens": "7"}, "tokens") is None
    assert _reset({openai: "1m0s"}, "requests") is None
    assert 50 < (_reset({anthropic: in_a_minute, "anthropic-ratelimit-tokens-remaining": "0"}, "tokens") or 0) <= 60
    assert _reset({anthropic: in_a_minute, "anthropic-ratelimit-tokens-remaining": "5"}, "tokens") is None


@pytest.mark.parametrize("name", NAMES)
def test_errors_in_one_vocabulary(name: str) -> None:
    """A model that is not there, by its own words or by its name alone; a wrong key; a wrong path; an overload."""
    nameless = Raw({"error": {"message": "nothing like no-such-thing here", "code": 404, "status": "NOT_FOUND"}}, 404)
    busy = Raw({"error": {"message": "the server is overloaded, please try again later"}}, 503)
    with at(name) as (server, provider):
        with pytest.raises(ModelNotFound):
            provider.chat("q", model="no-such-thing")
        server.models = (*server.models, "no-such-thing")
        server.script.extend((nameless, busy))
        with pytest.raises(ModelNotFound) as missing:
            provider.chat("q", model="no-such-thing")
        assert (missing.value.model, missing.value.status) == ("no-such-thing", 404)
        with pytest.raises(Overloaded):
            provider.chat("q", model="m-1")
        provider.base_url += "/wrong"
        with pytest.raises(ProviderError) as lost:
            provider.chat("q", model="m-1")
        assert type(lost.value) is (ModelNotFound if name == "gemini" else ProviderUnavailable)
        with pytest.raises(ProviderUnavailable):
            provider.ping()
    for kind in () if name == "ollama" else (AuthenticationError,):
        with at(name) as (_, provider):
            provider._headers = {header: value.replace(KEY, "wrong-key") for header, value in provider._headers.items()}
            with pytest.raises(kind):
                provider.chat("q", model="m-1")


def test_request_ids() -> None:
    """From each vendor's own header, from Gemini's body, of failures too."""
    content = {"content": [{"type": "text", "text": "x"}], "stop_reason": "end_turn"}
    chat = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
    gemini = {"candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": "STOP"}], "responseId": "r-1"}
    table: list[tuple[str, Any, str]] = [
        ("openai", chat, "x-request-id"), ("openai", chat, "apim-request-id"), ("openai", chat, "X-Generation-Id"),
        ("anthropic", content, "request-id"), ("gemini", gemini, ""),
    ]  # fmt: skip
    for name, body, header in table:
        headers = {header: "r-1"} if header else {}
        with at(name, Raw(body, headers=headers), Raw({"error": {"message": "x"}}, 500, headers=headers)) as (_, provider):
            assert provider.chat("q", model="m-1").request_id == "r-1"
            with pytest.raises(ServerError) as broken:
                provider.chat("q", model="m-1")
            assert broken.value.request_id == ("r-1" if header else None)


# -- what is malformed, and what cannot be expressed


def calling(**fields: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}, **fields}]}]


@pytest.mark.parametrize(
    ("messages", "tools", "options", "message"),
    [
        ("q", "weather", {}, "tools is a str"), ("q", TOOLS[0], {}, "tools is a dict"), ("q", 5, {}, "tools is a int"),
        ("q", [5], {}, r"tools\[0\]: give"), ("q", [*TOOLS, {"type": "function"}], {}, r"tools\[2\]: give"),
        ("q", [{"function": {"name": 5}}], {}, r"tools\[0\]: give"),
        ("q", TOOLS, {"tool_choice": "always"}, "tool_choice: give"), ("q", TOOLS, {"tool_choice": {}}, "tool_choice: give"),
        ("q", None, {"response_format": "json"}, "response_format: give"),
        ("q", None, {"response_format": {"type": "xml"}}, "response_format: give"),
        ("q", None, {"response_format": {"type": "json_schema"}}, "response_format: give"),
        ("q", None, {"stop": 5}, "stop: give"), ("q", None, {"stop": ["a", 5]}, "stop: give"),
        ("q", None, {"extra_body": "x"}, "extra_body is a str"),
        (calling(id=5), TOOLS, {}, r"messages\[1\].tool_calls\[0\]: give"), (calling(function={}), TOOLS, {}, "tool_calls"),
        (calling(function={"name": "f", "arguments": 5}), TOOLS, {}, "tool_calls"),
        ([{**calling()[1], "role": "user", "content": "x"}], TOOLS, {}, r"messages\[0\] \(user\) has tool_calls"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["anthropic", "gemini", "ollama"])
def test_malformed_requests_are_the_callers_fault(
    name: str, messages: Any, tools: Any, options: dict[str, Any], message: str
) -> None:
    """BadRequest that says what to give, before anything is sent, and neutral to the breaker."""
    with at(name) as (server, provider):
        chain = FailoverChain([ProviderTier("a", provider, ["m-1"])], failure_threshold=1)
        with pytest.raises(BadRequest, match=message):
            chain.chat(messages, tools, **options)
        assert not server.requests
        assert chain.tiers[0].breaker.is_closed


WEB_IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://h/x.png"}}]}]
PDF = {"type": "file", "file": {"filename": "f", "file_data": "data:application/pdf;base64,QQ=="}}
CUSTOM = [{"type": "custom", "custom": {"name": "x"}}]


def test_what_a_vendor_cannot_express() -> None:
    """UnsupportedRequest before anything is sent; where it can, it is."""
    paper = [{"role": "user", "content": [PDF]}]
    sound = [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "QQ==", "format": "wav"}}]}]
    table: list[tuple[str, list[tuple[Any, Any]], list[Any]]] = [
        ("gemini", [(WEB_IMAGE, None), ("q", CUSTOM), (sound, None)], [paper]),
        ("ollama", [(WEB_IMAGE, None), ("q", CUSTOM), (sound, None), (paper, None)], []),
        ("anthropic", [("q", CUSTOM), (sound, None)], [WEB_IMAGE, paper]),
        ("responses", [("q", CUSTOM), (sound, None)], [WEB_IMAGE, paper]),
        ("openai", [], [WEB_IMAGE, paper, sound]),
    ]
    for name, unable, able in table:
        with at(name) as (server, provider):
            for messages, tools in unable:
                with pytest.raises(UnsupportedRequest):
                    provider.chat(messages, tools, "m-1")
            assert not server.requests
            for messages in able:
                assert provider.chat(messages, None, "m-1").text == "ok"
            assert not server.refusals


def test_images_of_tool_results() -> None:
    """A tool may answer with a picture where the vendor has a place for it; where it has none, that is said."""
    answer = {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "here"}, IMAGE]}
    for name in NAMES:
        with at(name) as (server, provider):
            history = [*calling(type="function", function={"name": "weather", "arguments": {"city": "Oslo"}}), answer]
            if name == "openai":  # which gets messages as they are, and refuses this one itself
                history[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Oslo"}'
            if name in ("openai", "responses"):
                with pytest.raises((UnsupportedRequest, BadRequest)):
                    provider.chat(history, TOOLS, "m-1")
                continue
            assert provider.chat(history, TOOLS, "m-1").text == "ok"
            assert "iVBORw0KGgo=" in json.dumps(server.bodies[0])


def test_schemas_for_gemini() -> None:
    """Left out if they allow no arguments; kept if the properties stand behind a reference or the object is a free map."""
    shared = {"type": "object", "$defs": {"X": {"type": "object", "properties": {"a": {}}}}}
    schemas: list[tuple[Any, bool]] = [
        (None, False), ({}, False), ({"type": "object", "properties": {}}, False), ({**shared, "required": []}, False),
        (SCHEMA, True), ({**shared, "$ref": "#/$defs/X"}, True), ({"anyOf": [SCHEMA]}, True),
        ({"type": "object", "additionalProperties": {"type": "string"}}, True),
    ]  # fmt: skip
    tools = [{"function": {"name": f"f{n}", "parameters": given}} for n, (given, _) in enumerate(schemas)]
    with at("gemini") as (server, provider):
        assert provider.chat("q", tools, "m-1").text == "ok"
        declared = server.bodies[0]["tools"][0]["functionDeclarations"]
        assert ["parametersJsonSchema" in one for one in declared] == [kept for _, kept in schemas]


# -- what servers get wrong


GARBLED: list[tuple[str, Any]] = [
    ("ollama", {"message": {"content": 5}, "done": True}), ("ollama", {"message": {"content": "x"}}),
    ("ollama", {"message": "x"}),
    ("ollama", {"message": {"tool_calls": [{"function": {"name": "f", "arguments": 5}}]}, "done": True}),
    ("ollama", {"message": {"tool_calls": [{"function": {"arguments": {}}}]}, "done": True}),
    ("ollama", {"message": {"tool_calls": "x"}, "done": True}),
    ("anthropic", {"content": "x", "stop_reason": "end_turn"}), ("anthropic", {"content": ["x"], "stop_reason": "end_turn"}),
    ("anthropic", [{"type": "content_block_start", "content_block": {}}]), ("anthropic", [{"type": "message_start"}]),
    ("anthropic", [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x"}}]),
    ("anthropic", [{"type": "content_block_start", "index": 0, "content_block": {"type": "text"}},
                   {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta"}}]),
    ("anthropic", [{"type": "message_delta", "delta": {"stop_reason": 5}}]),
    ("gemini", {"candidates": "x"}), ("gemini", {"candidates": ["x"]}),
    ("gemini", {"candidates": [{"content": {"parts": "x"}}]}),
    ("gemini", {"candidates": [{"content": {"parts": [{"functionCall": "x"}]}}]}),
    ("gemini", {"candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": "OTHER"}]}),
    ("responses", {"status": "queued", "output": []}), ("responses", {"status": "completed", "output": "x"}),
    ("responses", {"status": "completed", "output": [None]}), ("responses", [{"type": "response.completed", "response": "x"}]),
    ("responses", {"output": [{"type": "message", "content": "x"}]}),
    ("responses", {"error": None}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "answer"), GARBLED)
def test_answers_of_the_wrong_shape(name: str, answer: Any) -> None:
    """InvalidResponse, never an exception of another kind."""
    raw = Raw(b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in answer), kind="text/event-stream")
    with at(name, raw if isinstance(answer, list) else Raw(answer)) as (_, provider), pytest.raises(InvalidResponse):
        provider.chat("q", TOOLS, "m-1")


def test_odd_answers_that_are_answers() -> None:
    """Unknown items and blocks beside the text, no model's name, summaries that are none, arguments as an object."""
    usage = {"input_tokens": 1, "output_tokens": 2}
    output = [{"type": "web_search_call"}, {"type": "reasoning", "summary": "x", "content": [{"type": "y", "text": "hm"}]},
              {"type": "message", "content": [{"type": "output_text", "text": "fine"}, {"type": "output_text"}]},
              {"type": "function_call", "call_id": "a", "name": "f", "arguments": {"x": 1}}]  # fmt: skip
    refusal = {"status": "completed", "output": [{"type": "message", "content": [{"type": "refusal", "refusal": "no"}]}]}
    with at("responses", Raw({"output": output, "usage": usage}), Raw(refusal)) as (_, provider):
        response = provider.chat("q", TOOLS, "m-1")
        assert (response.text, response.reasoning, response.model, response.usage) == ("fine", "hm", "m-1", Usage(1, 2))
        assert response.tool_calls[0].arguments == {"x": 1}
        with pytest.raises(ContentFiltered):
            provider.chat("q", TOOLS, "m-1")
    parts = [{"functionCall": {"name": "f"}}, {"executableCode": {}}, {"text": "", "thoughtSignature": "s"}]
    with at("gemini", Raw({"candidates": [{"content": {"parts": parts}, "finishReason": "NEWS"}]})) as (_, provider):
        response = provider.chat("q", TOOLS, "m-1")
        assert ([call.arguments for call in response.tool_calls], response.finish_reason) == ([{}], "tool_calls")
        assert response.message["copilot_router"]["parts"] == [parts[0], parts[2]]
    vague = {"content": {"parts": [{"text": "x"}]}, "finishReason": "FINISH_REASON_UNSPECIFIED"}
    with at("gemini", Raw({"candidates": [vague], "responseId": 5})) as (_, provider):
        assert provider.chat("q", TOOLS, "m-1").finish_reason == "stop"


def test_stream_options_that_a_server_does_not_know() -> None:
    """Left out after its own 400, remembered."""
    unknown = Raw({"error": {"message": "unknown field stream_options", "type": "invalid_request_error"}}, 400)
    with Chat(unknown, local=True) as server:
        provider = OpenAIProvider(KEY, server.url)
        for _ in range(2):
            assert provider.chat("q", model="m-1").text == "ok"
        assert ["stream_options" in body for body in server.bodies] == [True, False, False]
        provider.close()


def test_a_session_of_the_users_is_left_alone() -> None:
    """Neither closed nor replaced after a fork; one's own is opened anew."""
    with at("openai") as (server, provider):
        session = provider._session
        provider.close()
        provider._renew_after_fork()
        assert provider._session is session
        assert provider.chat("q", model="m-1").text == "ok"
    with at("ollama") as (server, provider):
        provider.chat("q", model="m-1")
        provider._renew_after_fork()
        assert provider._session is None
        assert provider.chat("q", model="m-1").text == "ok"
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("given", "full"),
    [
        ("https://api.deepseek.com/anthropic", "https://api.deepseek.com/anthropic/v1"),
        ("https://api.deepseek.com/anthropic/v1/", "https://api.deepseek.com/anthropic/v1"),
        ("http://localhost:4000", "http://localhost:4000/v1"),
        ("http://localhost:4000/v1/messages", "http://localhost:4000/v1"),
    ],
)
def test_an_anthropic_address_is_given_as_to_its_own_client(given: str, full: str) -> None:
    """With or without its /v1."""
    assert AnthropicProvider("key", given).base_url == full


def test_made_up_ids_never_meet_given_ones() -> None:
    """An empty id becomes one that no other call has, earlier or later; a list that is none is refused."""
    function = {"name": "f", "arguments": "{}"}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": name, "type": "function", "function": function}]}
        for name in ("call_1", "", "call_2", "call_1")
    ]
    ids = [message["tool_calls"][0]["id"] for message in _repaired(messages) if message["role"] == "assistant"]
    assert len(set(ids)) == 4
    with pytest.raises(BadRequest, match="give a list"):
        OpenAIProvider("key", "http://127.0.0.1:9").chat([{**messages[0], "tool_calls": messages[0]["tool_calls"][0]}])

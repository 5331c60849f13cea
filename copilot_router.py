# copilot_router 0.2.0 (SPDX-License-Identifier: MIT) Copyright (c) 2026 copilot_router contributors
"""Call several LLM providers through one blocking ``chain.chat(...)`` that keeps answering.

    from copilot_router import FailoverChain, LMStudioProvider, OpenAIProvider, ProviderTier

    chain = FailoverChain([
        ProviderTier("local", LMStudioProvider()),
        ProviderTier("cloud", OpenAIProvider(), models=["gpt-6-luna"]),
    ])
    print(chain.chat("Say hello.", timeout=25).text)

Tiers are asked in order under one deadline. Each has a circuit breaker: after three failures in a
row it is skipped, and 15 seconds later one call tries it again. The class of an exception says what
follows from it (section "errors").

Contents: errors · data · circuit breaker · stores · provider interface · transport ·
reading failures · wire formats · HTTP provider · OpenAI · Anthropic · Gemini · Ollama ·
scripted provider · tier · configuration · one call · chain · command line. Search for "# ====".
A section uses only what stands above it: a call enters at the chain and goes up the file.

Times are seconds (float). A limit of None takes the next outer one, ``math.inf`` sets no limit.
A deadline covers everything; only a DNS look-up cannot be interrupted: the call ends after it.
Threads may share all objects, which work across a fork. No background thread is started. An import
connects to nothing; ``requests`` is imported with the first HTTP provider.

Everything raised is a RouterError, except a TypeError for an unknown option, what your own
``accept`` raises, and what passes straight through (``_PASS_THROUGH``, interrupts). Errors and
responses can be pickled. No key, prompt or answer is ever in a log, an event, a traceback, or the
str, repr or args of anything.
"""

from __future__ import annotations

__version__ = "0.2.0"
__all__ = [  # noqa: RUF022 - grouped as the file is
    "RouterError", "ProviderError", "ProviderUnavailable", "ServerError", "Overloaded",
    "ProviderTimeout", "InvalidResponse", "EmptyResponse", "RateLimited", "QuotaExceeded",
    "AuthenticationError", "ModelNotFound", "ContextLengthExceeded", "UnsupportedRequest",
    "BadRequest", "ContentFiltered", "StreamInterrupted", "CircuitOpen", "AllProvidersFailed",
    "DeadlineExceeded", "EscalationFailed", "UnknownModel", "ConfigError",
    "LLMResponse", "ToolCall", "Usage", "Attempt", "Event", "Thought",
    "CircuitBreaker", "Ticket", "BreakerSnapshot", "BreakerRecord",
    "MemoryStore", "SQLiteStore", "RedisStore",
    "LLMProvider", "OpenAIProvider", "LMStudioProvider", "AnthropicProvider", "GeminiProvider",
    "OllamaProvider", "ScriptedProvider", "ProviderTier", "FailoverChain",
    "ChatStream", "TierHealth",
]

import contextlib
import functools
import inspect
import io
import itertools
import json
import logging
import math
import operator
import os
import queue
import random
import re
import sys
import threading
import time
import weakref
import zlib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, TypeVar

if TYPE_CHECKING:
    import requests

T = TypeVar("T")
Own = TypeVar("Own", bound="FailoverChain")
F = TypeVar("F", bound=Callable[..., Any])
Message = Mapping[str, Any]
Messages = str | Sequence[Message]
Tools = Sequence[Mapping[str, Any]] | None

_log = logging.getLogger("copilot_router")
_log.addHandler(logging.NullHandler())


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    """A pattern, compiled at its first use: most programs need few of them."""
    return re.compile(text)


#: Objects that make new locks or sockets in a forked child, by ``_renew_after_fork()``.
_renewed_after_fork: weakref.WeakSet[Any] = weakref.WeakSet()


def _after_fork() -> None:
    for item in list(_renewed_after_fork):
        item._renew_after_fork()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)

# ==== errors ======================================================================================
# Class attributes of an exception say what follows from it; ``_judged``, below, reads them.

class RouterError(Exception):
    """The root of all errors here. ``.attempts``: the Attempts of the call until then."""
    attempts: tuple[Attempt, ...] = ()
    _cost: float | None = None  #: USD of those attempts
    _had_begun = False  #: an answer had begun: tokens were used, even if no count has come

class ProviderError(RouterError):
    """One provider could not answer. A custom provider raises it or a subclass.

    ``message`` goes to the log: no key, prompt or answer in it. ``provider``, ``model``: who
    failed; a chain fills in the tier. ``status``: the HTTP status or None. ``code``: the
    provider's own, or the limit that a ProviderTimeout reached. ``retry_after``: seconds until the
    provider wants to be asked again, None if it did not say.

    Two attributes, of a class or of one error, are the policy for the chain and the breaker.
    ``then``: ``again`` (the same tier once more, then the next), ``next`` (tier) or ``raise``.
    ``breaker``: ``failure`` (counted), ``neutral`` (not counted), ``park`` (opened at once, for
    ``retry_after``, else for the recovery timeout) or ``park long`` (each further one in a row is
    four times as long, up to 600 s).
    """
    then: str = "next"
    breaker: str = "failure"
    usage: Usage | None = None  #: tokens that the failed request had used, None if unknown
    provider = model = ""  # these defaults are for a subclass that does not call __init__
    status = code = retry_after = request_id = None

    def __init__(
        self, message: str = "", *, provider: str = "", model: str = "", status: int | None = None,
        code: str | None = None, retry_after: float | None = None, request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.provider, self.model, self.status = provider, model, status
        self.code, self.retry_after, self.request_id = code, retry_after, request_id

class ProviderUnavailable(ProviderError):
    """Refused, DNS, TLS, connect timeout, or a 404 that means a wrong path."""

class ServerError(ProviderError):
    """5xx, 409, 425, or closed or reset before the headers."""
    then = "again"

class Overloaded(ServerError):
    """529, 498, or a 503 that says overloaded or loading."""

class ProviderTimeout(ProviderError):
    """408, or a limit was reached (``.code``): first_token_, stall_ or attempt_timeout."""

class InvalidResponse(ProviderError):
    """Not the format that was asked for: a redirect, not JSON, truncated, garbled, too large."""

class EmptyResponse(InvalidResponse):
    """Neither text nor tool call. Neutral for the breaker if the token limit cut it (code
    ``length``) or tool results were sent."""

class RateLimited(ProviderError):
    """429. Without a ``retry_after`` the tier is parked for its breaker's recovery timeout."""
    breaker = "park"

class QuotaExceeded(RateLimited):
    """The account is empty, or a limit of spending, hours, a week or a month is used up. Never
    waited out. Its first park is four times as long."""
    breaker = "park long"

class AuthenticationError(ProviderError):
    """401, 403, an invalid key, no permission."""
    breaker = "park long"

class ModelNotFound(ProviderError):
    """The provider does not have this model: a 404 or 410 that names it."""
    breaker = "neutral"

class ContextLengthExceeded(ProviderError):
    """The prompt is too long for the model, or larger than its rate limit ever allows."""
    breaker = "neutral"

class UnsupportedRequest(ProviderError):
    """The vendor or the model cannot do what the request asks for."""
    breaker = "neutral"

class BadRequest(ProviderError):
    """Another 4xx, or a request that cannot be written (nothing is sent)."""
    breaker = "neutral"

class ContentFiltered(ProviderError):
    """A safety system refused. No other provider is asked: that would be evasion."""
    then = "raise"
    breaker = "neutral"

class StreamInterrupted(ProviderError):
    """A stream broke after text had been handed out. ``.partial``: that text.

    ``__cause__`` is what broke it, a DeadlineExceeded if the call's time was over. The breaker
    judges by that cause; status, code, retry_after and request_id are the cause's.
    """
    then = "raise"
    partial: str = ""

class CircuitOpen(RouterError):
    """A breaker refused. ``.retry_after``: seconds until it admits one, None: open until reset."""
    retry_after: float | None = None

class AllProvidersFailed(RouterError):
    """No tier answered. The message names every tier and its reason.

    ``.errors``: an exception for each request that failed and each tier passed over, in order.
    ``.retry_after``: seconds until a new try is sensible, None if waiting will not help.
    """
    errors: tuple[BaseException, ...] = ()
    retry_after: float | None = None

    def __reduce__(self) -> Any:
        """What cannot be pickled is replaced by a ProviderError that names it."""
        import pickle

        errors = list(self.errors)
        for at, error in enumerate(errors):
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:
                errors[at] = ProviderError(_error_text(error))
        return type(self), self.args, {**vars(self), "errors": tuple(errors)}

    def explain(self) -> str:
        """One ASCII line: what was tried, what happened, how long it took."""
        return _explain(self.attempts)

class DeadlineExceeded(AllProvidersFailed, TimeoutError):
    """The call's time was over. Also a TimeoutError."""

class EscalationFailed(AllProvidersFailed):
    """The stronger side failed too, or ``accept`` refused every answer. ``.response``: the last
    answer, without the marker."""
    response: LLMResponse | None = None

class UnknownModel(RouterError):
    """No tier serves this model; the message names the known ones."""

class ConfigError(RouterError, ValueError):
    """A setting is wrong. The message says where and what to do. Also a ValueError."""

class _UnknownOption(TypeError):
    """An option that no provider knows. It shows and pickles as a plain TypeError."""
    __qualname__, __module__ = "TypeError", "builtins"

    def __reduce__(self) -> Any:
        return TypeError, self.args

_UnknownOption.__name__ = "TypeError"


# -- checking settings and showing errors

_drawn = random.uniform  #: clients draw their pauses, so that they do not all come back at once
#: Control, escape and bidirectional characters, separators of lines, halves of characters.
_UNSHOWN = r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
#: Libraries that this module calls, besides the standard library.
_LIBRARIES = frozenset({"requests", "urllib3", "socks", "redis", "certifi", "idna", __name__})


def _kind(value: Any) -> str:
    return type(value).__name__


def _number(
    value: T, where: str, *, least: float = 0.0, finite: bool = False, whole: bool = False
) -> T:
    """A checked setting. NaN, booleans and text are refused."""
    number: Any = value
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not number >= least or (number > 1e300 and (finite or number != math.inf)):
        kind = "a whole number" if whole else "a finite number" if finite else "a number"
        raise ConfigError(f"{where}={value!r:.60}: give {kind} of at least {least:g}")
    return value


def _seconds(given: Mapping[str, Any], name: str, default: float) -> float:
    """A checked time limit of this name; None inherits the default."""
    value = given.get(name)
    limit: float = _number(default if value is None else value, name)
    return limit


def _function(value: Any, where: str, optional: bool = False) -> Any:
    """A checked setting that is to be called; ``optional``: or None."""
    if not callable(value) and not (optional and value is None):
        raise ConfigError(f"{where}={value!r:.60}: give a function{', or None' * optional}")
    if inspect.iscoroutinefunction(value):
        raise ConfigError(f"{where} is an async function, which nobody awaits: give a plain one")
    return value


def _near(name: Any, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` or nothing."""
    import difflib

    close = difflib.get_close_matches(str(name), list(dict.fromkeys(known)), cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _error_text(error: BaseException) -> str:
    """``RateLimited: slow down``, without a foreign exception's text: it may hold a key."""
    text = ""
    if isinstance(error, RouterError):
        with contextlib.suppress(Exception):  # a user's subclass may have a faulty __str__
            text = str(error)
    return f"{_kind(error)}: {text}" if text else _kind(error)


def _escaped(text: str, pattern: str = _UNSHOWN) -> str:
    return _pattern(pattern).sub(lambda found: ascii(found[0])[1:-1], text)


def _ascii(text: str) -> str:
    """One printable line: no control character of a server reaches a log or a terminal."""
    return _escaped(" ".join(text.split()), "[^ -~]")


def _explain(attempts: Iterable[Attempt], cost: float | None = None) -> str:
    steps = []
    for attempt in attempts:
        what = attempt.outcome if attempt.error is None else attempt.error[:80]
        if attempt.outcome in ("skipped", "escalated") and attempt.error:
            what = f"{attempt.outcome} ({what})"
        took = "" if attempt.outcome == "skipped" else f" {attempt.latency * 1000:.0f} ms"
        steps.append(f"{attempt.tier}: {what}{took}")
    price = "" if cost is None else f" ${cost:.2f}"
    if cost is not None and 0 < cost < 1:  # two significant digits, never as 3e-05
        price = f" ${float(f'{cost:.2g}'):.15f}".rstrip("0")
    return _ascii(" -> ".join(steps) + price)


def _traces(error: BaseException) -> Iterator[TracebackType]:
    """The steps of its traceback, the innermost last."""
    trace = error.__traceback__
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _raised_at(error: BaseException) -> str:
    """``KeyError in provider.py, line 12``."""
    at = ""
    for step in _traces(error):
        at = f" in {step.tb_frame.f_code.co_filename}, line {step.tb_lineno}"
    return _kind(error) + at


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and all that it wraps, also as requests, urllib3 and groups do; at most 50.

    Not what our caller is handling: Python makes it the context of whatever is raised meanwhile.
    """
    frame, callers = inspect.currentframe(), []
    while frame is not None:
        callers += [frame] if frame.f_globals is not globals() else []
        frame = frame.f_back
    seen: list[BaseException] = []
    queue: list[Any] = [error]
    while queue and len(seen) < 50:
        item = queue.pop(0)
        if isinstance(item, BaseException) and not any(item is known for known in seen):
            if item.__traceback__ is not None and item.__traceback__.tb_frame in callers:
                continue
            seen.append(item)
            queue += [getattr(item, "reason", None), item.__cause__, item.__context__, *item.args]
            group = getattr(item, "exceptions", ())
            queue += group if isinstance(group, tuple) else ()
            yield item


def _bare(error: BaseException) -> BaseException:
    """The error without the frames of this module and its libraries: they hold prompts and keys."""
    for item in _causes(error):
        kept: TracebackType | None = None
        for step in reversed([] if isinstance(item, RouterError) else [*_traces(item)]):
            names = step.tb_frame.f_globals
            package = names.get("__name__", "").partition(".")[0]
            hidden = package in _LIBRARIES or package in sys.stdlib_module_names
            if not hidden and names is not globals():
                kept = TracebackType(kept, step.tb_frame, step.tb_lasti, step.tb_lineno)
        item.__traceback__ = kept
    return error


# -- what follows from an error

#: Not about a provider: they pass straight through a chain.
_PASS_THROUGH: tuple[type[Exception], ...] = (
    ConfigError, UnknownModel, _UnknownOption, AssertionError, MemoryError, RecursionError,
)
#: What task queues raise when the task's time is up, by module.
_TASK_LIMITS = (
    ("billiard.exceptions", "SoftTimeLimitExceeded"),
    ("celery.exceptions", "SoftTimeLimitExceeded"),
    ("rq.timeouts", "BaseTimeoutException"),
)
_MAX_PARK = 3600.0  #: seconds that a provider's Retry-After may park a tier at most
_FAIR_CHANCE = 5.0  #: seconds after which a call's deadline counts as a failure of the tier
_EARLY = 0.005  #: seconds that a socket's timeout may fire before a deadline


def _is_task_limit(error: BaseException) -> bool:
    found = (getattr(sys.modules.get(module), name, None) for module, name in _TASK_LIMITS)
    return any(isinstance(kind, type) and isinstance(error, kind) for kind in found)


def _passes_through(error: BaseException) -> bool:
    mistake = not isinstance(error, Exception) or isinstance(error, _PASS_THROUGH)
    return mistake or _is_task_limit(error)


class _Circumstances(NamedTuple):
    """What a verdict depends on besides the error. Times in seconds."""

    overruled: str | None = None  #: by ``on_error``: next, raise or None
    retries: int = 0  #: how often this tier may still be asked again
    may_wait: bool = False  #: a Retry-After may still be waited out
    max_wait: float = math.inf  #: the longest Retry-After that is waited out
    left: float = math.inf  #: until the deadline of the call
    given: float = 0.0  #: that the tier has had for this request
    pause: float = 0.0  #: before a retry, where the error names no time


class _Verdict(NamedTuple):
    then: str  #: again | next | raise | pass (straight through, as the caller's own)
    breaker: str  #: failure | neutral | park | park long | park longer
    seconds: float | None = None  #: to park; None: by the breaker's settings
    pause: float = 0.0  #: before a retry


_ALONE = _Circumstances()  #: of a breaker without a chain


def _judged(error: BaseException, facts: _Circumstances = _ALONE) -> _Verdict:
    """What follows from an error. Pure."""
    if isinstance(error, StreamInterrupted) and error.__cause__ is not None:
        return _judged(error.__cause__, facts)._replace(then=facts.overruled or error.then)
    if _passes_through(error):
        return _Verdict("pass", "neutral")
    then, outcome = _declared(error)
    then, hint = facts.overruled or then, _hint_of(error)
    pause = facts.pause if hint is None else hint
    soon = pause < facts.left and (hint is None or hint <= facts.max_wait)
    again = then == "again" and facts.retries > 0
    if limited := isinstance(error, RateLimited):
        again = hint is not None and facts.may_wait and outcome == "park" and not facts.overruled
    if again and soon:
        return _Verdict("again", "neutral" if limited else outcome, pause=pause)
    then = "next" if then == "again" else then
    late = facts.left <= _EARLY and isinstance(error, (ProviderTimeout, TimeoutError))
    if late and getattr(error, "code", None) not in ("first_token_timeout", "stall_timeout"):
        # the deadline of the call ended the request
        return _Verdict(then, "failure" if facts.given >= _FAIR_CHANCE - _EARLY else "neutral")
    if isinstance(error, ServerError) and hint is not None and hint > facts.max_wait:
        outcome = "park"
    elif outcome == "park long" and isinstance(error, QuotaExceeded):
        outcome = "park longer"  # an account is seldom filled up at once
    return _Verdict(then, outcome, hint if outcome.startswith("park") else None)


def _declared(error: BaseException) -> tuple[str, str]:
    """``then`` and ``breaker`` of an error; a custom class may declare anything."""
    if isinstance(error, ProviderError):
        then = error.then if error.then in ("again", "next", "raise") else "next"
        if isinstance(error, EmptyResponse) and error.code == "length":
            return then, "neutral"
        known = error.breaker in ("neutral", "park", "park long")
        return then, error.breaker if known else "failure"
    if not isinstance(error, AllProvidersFailed) or isinstance(error, DeadlineExceeded):
        return "next", "failure"
    # A nested chain may answer other requests. While its breakers are open it says when to come.
    inner = {
        "park" if isinstance(one, CircuitOpen) else _judged(one).breaker
        for one in error.errors or ()
    }
    failed = not inner or ("failure" in inner and "neutral" not in inner)
    return "next", "failure" if failed and not isinstance(error, EscalationFailed) else "neutral"


def _hint_of(error: Any) -> float | None:
    """Its ``retry_after`` from 0 to _MAX_PARK; a custom provider may give anything."""
    given = getattr(error, "retry_after", None)
    if not isinstance(given, (int, float)) or given != given:
        return None
    return float(min(max(given, 0), _MAX_PARK))


# ==== data ========================================================================================

@dataclass(frozen=True)
class Usage:
    """Tokens; 0 if not reported. ``a + b`` adds field by field.

    ``prompt_tokens`` includes cached and cache-written ones, ``completion_tokens`` reasoning.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(operator.add, vars(self).values(), vars(other).values()))


_NO_USAGE = Usage()
#: The key in a message for what only the same provider and model may see again.
_CARRY = "copilot_router"


class Attempt(NamedTuple):
    """One request sent, or one tier passed over.

    ``model``: as asked, else as answered, "" if unknown. ``outcome``: ok, failed, skipped or
    escalated (gave up, or refused by ``accept``). ``error``: ``"RateLimited: ..."`` or None.
    ``status``: the HTTP status of a failure or None. ``latency``: seconds. ``usage``: of this
    request, 0 if unknown.
    """

    tier: str
    model: str
    outcome: str
    error: str | None = None
    status: int | None = None
    latency: float = 0.0
    usage: Usage = _NO_USAGE


@dataclass
class ToolCall:
    """A tool that the model wants called.

    ``arguments`` is None if the model's JSON (``raw_arguments``) is no object or was cut, {} if it
    is empty. Give ``id`` back as ``tool_call_id`` with the result.
    """

    id: str
    name: str
    arguments: dict[str, Any] | None = field(default=None, repr=False)
    raw_arguments: str = field(default="", repr=False)


class Thought(str):
    """A delta of a stream that is thinking and no part of the answer."""

    __slots__ = ()


@dataclass
class LLMResponse:
    """An answer. A custom provider fills in what it knows, the chain the rest."""

    content: str | None = field(default=None, repr=False)
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = "stop"  #: stop | length | tool_calls | content_filter, else as it came
    usage: Usage = _NO_USAGE  #: of this answer alone
    model: str = ""  #: as the provider reports it, else as asked
    provider: str = ""  #: the name of the tier that answered
    reasoning: str | None = field(default=None, repr=False)  #: thinking text
    request_id: str | None = None
    cost: float | None = None  #: USD over all attempts; None if one that used tokens has no price
    latency: float = 0.0  #: seconds of the whole call
    attempts: tuple[Attempt, ...] = ()
    escalation: str | None = field(default=None, repr=False)  #: why a weaker model gave up
    raw: dict[str, Any] | None = field(default=None, repr=False)  #: whole JSON answers only
    carry: dict[str, Any] | None = field(default=None, repr=False)  #: see ``message``

    @property
    def text(self) -> str:
        """The content or ""."""
        return self.content or ""

    @property
    def has_tool_calls(self) -> bool:
        """Whether the model wants tools called."""
        return bool(self.tool_calls)

    @property
    def message(self) -> dict[str, Any]:
        """The assistant message to append to ``messages``: OpenAI form, JSON-able. A separate key
        holds what only the same provider and model need back (thinking, signatures)."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.carry:
            message[_CARRY] = self.carry
        for call in self.tool_calls:
            text = call.raw_arguments
            if not text and call.arguments is not None:
                text = json.dumps(call.arguments)
            sent = {"type": "function", "function": {"name": call.name, "arguments": text}}
            message.setdefault("tool_calls", []).append({"id": call.id, **sent})
        return message

    @property
    def total_usage(self) -> Usage:
        """Tokens of all attempts; ``usage`` if there is no record of attempts."""
        used = [attempt.usage for attempt in self.attempts]
        return functools.reduce(Usage.__add__, used) if used else self.usage

    def explain(self) -> str:
        """One ASCII line: ``a: ProviderUnavailable: refused 2 ms -> b: ok 412 ms $0.0003``."""
        return _explain(self.attempts, self.cost)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able data, the texts too."""
        return {
            **vars(self), "usage": vars(self.usage).copy(),
            "tool_calls": [vars(call).copy() for call in self.tool_calls],
            "attempts": [{**a._asdict(), "usage": vars(a.usage).copy()} for a in self.attempts],
        }


class Event(NamedTuple):
    """A step of a call, for ``on_event``. ``time``: the chain's clock. ``tier`` and ``model`` are
    "" if there is none.

    It comes in the thread of the call or its reader. ``data`` holds no key, prompt or answer:

    ==========  ====================================================================================
    attempt     a request is about to be sent; ``timeout``: seconds left for it, None: no limit
    retry       the same tier again, after ``pause`` seconds
    resend      the same request once more, corrected; ``field``, ``change`` (drop or replace)
    skip        a tier is passed over; ``reason``
    failover    a tier has failed, or ``accept`` refused its answer; ``to``: the next one
    escalation  an answer gave up or was refused; ``to``: the model asked instead
    wait        no tier is ready; ``seconds`` until the order starts again
    breaker     a change of state: ``old``, ``new``, ``reason``; or of its store: ``store``
    done        the end, unless a mistake of the caller, an interrupt or a stream's reader ended
                the call; ``outcome`` (ok, or an error's class), ``latency`` in seconds; of an
                answer also ``cost`` (USD or None), ``attempts`` (how many), ``prompt_tokens``,
                ``completion_tokens``
    ==========  ====================================================================================
    """

    kind: str
    tier: str
    model: str
    data: dict[str, Any]
    time: float

    def to_dict(self) -> dict[str, Any]:
        """The same by name, JSON-able."""
        return self._asdict()


# ==== circuit breaker =============================================================================
# One immutable record holds the state. A change is a function from the old record to the new one;
# if another thread has changed the record meanwhile, it is applied again. Reads take no lock; only
# the thread that asks a store waits for it. No thread waits for another one's ``on_change``.

_SHORT_WAIT = 1.0  #: seconds: what retry_after says during a trial, or where nobody named a time
_STORE_BUDGET = 0.1  #: seconds that one operation of a store may take


class BreakerSnapshot(NamedTuple):
    """A breaker at one moment."""

    state: str  #: closed | open | half_open
    generation: int  #: grows with every change
    failures: int  #: in a row
    retry_after: float | None  #: seconds until a call may get through; None: closed, or until reset
    reason: str  #: of the last change
    opened: int  #: how often
    rejected: int  #: calls
    stale: int  #: late results that were dropped

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return self._asdict()


class BreakerRecord(NamedTuple):
    """What a store keeps of a breaker. ``_asdict()`` is JSON-able."""

    state: str = "closed"  #: closed | open | half_open
    generation: int = 0  #: grows with every change
    era: int = 0  #: the generation in which this state, or this trial, began
    failures: int = 0  #: consecutive
    deadline: float = 0.0  #: of the open time (inf: until reset) or lease, in the time of its owner
    span: float = 0.0  #: until the deadline when it was set: a clock that jumps adds nothing
    trips: int = 0  #: openings by failures since a success: they double the open time
    takeovers: int = 0  #: trials in a row whose lease ran out without a verdict
    opened: int = 0
    reason: str = ""
    parks: int = 0  #: long parks since a success: each is four times as long
    heals: bool = True  #: False: a person must mend it (key, money)


def _changed(old: BreakerRecord, **changes: Any) -> BreakerRecord:
    return old._replace(generation=old.generation + 1, **changes)


def _begun(
    old: BreakerRecord, state: str, now: float, length: float, **changes: Any
) -> BreakerRecord:
    """A new state or trial, for ``length`` seconds."""
    era = old.generation + 1
    return _changed(old, state=state, era=era, deadline=now + length, span=length, **changes)


def _opened(old: BreakerRecord, now: float, length: float, **changes: Any) -> BreakerRecord:
    changes = {"takeovers": 0, "heals": True, "opened": old.opened + 1, **changes}
    return _begun(old, "open", now, length, **changes)


def _closed(old: BreakerRecord, reason: str) -> BreakerRecord:
    new = BreakerRecord(generation=old.generation, opened=old.opened, reason=reason)
    return _begun(new, "closed", 0.0, 0.0)


def _trial_if_due(old: BreakerRecord, now: float, rules: CircuitBreaker) -> BreakerRecord:
    """With a new trial, if one is due."""
    if old.state == "closed" or now < old.deadline:
        return old
    takeovers = old.takeovers + (old.state == "half_open")
    # The lease grows, so that a slow provider can close in the end.
    lease = rules.trial_timeout * 2 ** min(max(0, takeovers - 1), 3)
    return _begun(old, "half_open", now, lease, takeovers=takeovers)


def _after(
    old: BreakerRecord, ticket: Ticket, kind: str, seconds: float | None, reason: str, now: float
) -> BreakerRecord:
    """The record after a ticket's verdict; the same object if that changes nothing.

    ``kind``: success, failure, neutral, park, park long or park longer.
    """
    rules = ticket._breaker
    stretch = _drawn(1.0, 1.0 + rules.jitter) if rules.jitter else 1.0
    if kind.startswith("park"):
        again, long = old.state == "open", kind != "park"
        level = max(old.parks - again, int(kind == "park longer")) if long else 0
        most = max(600.0, rules.recovery_timeout)
        grown = min(rules.recovery_timeout * 4.0 ** min(level, 64), most) * stretch
        length = max(grown, seconds or 0.0) if long or seconds is None else seconds
        parks, heals = (level + 1, seconds is not None) if long else (old.parks, True)
        more = {"parks": parks, "heals": heals, "reason": reason or "parked"}
        if not again:
            return _opened(old, now, length, **more)
        later = now + length > old.deadline  # a park never shortens the open time
        return _changed(old, deadline=now + length, span=length, **more) if later else old
    if ticket._era != old.era:
        return old
    if kind == "success":
        if ticket.is_trial:
            return _closed(old, "recovered")
        return _changed(old, failures=0, trips=0) if old.failures else old
    if kind == "neutral":
        return _begun(old, "open", now, 0.0)  # of a trial: the next caller may have it
    failures = old.failures + 1
    if not ticket.is_trial and failures < rules.failure_threshold:
        return _changed(old, failures=failures)
    grown = rules.recovery_timeout * 2.0 ** min(old.trips, 64)
    length = min(grown, rules.max_recovery_timeout) * stretch
    why = reason or "failed"
    return _opened(old, now, length, trips=old.trips + 1, failures=failures, reason=why)


_Change = Callable[[BreakerRecord], BreakerRecord]
_Step = tuple[BreakerRecord, BreakerRecord]  #: before and after a change
_NO_ERA = -1  #: of tickets given while the breaker is open (emergency, ping): only parks count


class Ticket:
    """Leave to make one call. A method, or leaving its ``with`` block, settles it, once.

    Thread-safe, also in a finalizer. A trial that is never settled ends with its lease.
    """

    __slots__ = ("_breaker", "_era", "_local", "_settled", "is_trial")

    def __init__(self, breaker: CircuitBreaker, era: int, is_trial: bool) -> None:
        self._breaker, self._era, self.is_trial, self._settled = breaker, era, is_trial, False
        self._local = False  #: the trouble may be of this machine

    def success(self) -> None:
        """The call worked: closes after a trial, resets the count of failures."""
        record = self._breaker._record
        if record.era == self._era and record.failures == 0 and not self.is_trial:
            self._settled = True  # most calls: nothing to change, no lock
        else:
            self._settle("success")

    def failure(self, reason: str | BaseException = "") -> None:
        """The call failed: counted; after a trial the breaker opens again."""
        text = _error_text(reason) if isinstance(reason, BaseException) else reason
        self._settle("failure", reason=text)

    def neutral(self) -> None:
        """It says nothing about the other side; the next caller may have the trial."""
        self._settle("neutral")

    def park(self, seconds: float | None = None, reason: str = "") -> None:
        """Open at once, for ``seconds`` (None: the recovery timeout)."""
        if seconds is not None:
            _number(seconds, "seconds")
        self._settle("park", seconds, reason)

    def _settle(self, kind: str, seconds: float | None = None, reason: str = "") -> None:
        if kind == "neutral" and not self.is_trial:
            self._settled = True
        if not self._settled:
            now = self._breaker._clock()
            self._breaker._change(lambda old: _after(old, self, kind, seconds, reason, now), self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.success()
        else:
            self._judge(error)

    def _judge(self, error: BaseException, verdict: _Verdict | None = None) -> None:
        """Settle by what an error means (``verdict``, if that is known)."""
        if not self._settled:
            found = verdict or _judged(error)
            self._local = isinstance(error, (ProviderUnavailable, AuthenticationError))
            self._settle(found.breaker, found.seconds, _error_text(error))

    def _begin_anew(self) -> None:
        """A stream's first item settles a trial; the rest counts as an ordinary call."""
        if self.is_trial:
            self.success()
            record = self._breaker._record
            if record.state == "closed":
                self._era, self.is_trial, self._settled = record.era, False, False


class CircuitBreaker:
    """Stops calling what keeps failing, and finds out with one call when it works again.

    Closed, it counts consecutive failures and opens at ``failure_threshold`` of them. Open, it
    refuses for ``recovery_timeout`` seconds (0: not at all). Then one caller gets a trial. Success
    closes it. Failure opens it again, each time for twice as long, up to ``max_recovery_timeout``
    (None: for the same time). After ``trial_timeout`` seconds the next caller takes a trial over.

    Use ``breaker.call(fn, ...)``, ``@breaker``, ``with breaker.admit():`` or a Ticket's methods. A
    ProviderError's class says failure, neutral or park; another Exception is a failure; what is no
    Exception (KeyboardInterrupt, a closed generator) is neutral.

    ``jitter``: each open time is drawn from 1 to 1 + ``jitter`` times its length. ``name``: in a
    chain "" takes the tier's. ``clock``: seconds that only grow. ``store``: shares the state with
    other breakers of this name; None does not. ``on_change(name, old, new, reason)`` is called
    after each change of state; what it raises is logged. Thread-safe; a forked child has its own
    copy. Raises ConfigError.
    """

    def __init__(
        self, failure_threshold: int = 3, recovery_timeout: float = 15.0, *, name: str = "",
        max_recovery_timeout: float | None = None, trial_timeout: float = 120.0,
        clock: Callable[[], float] = time.monotonic, store: Any = None,
        on_change: Callable[[str, str, str, str], None] | None = None, jitter: float = 0.0,
    ) -> None:
        self.failure_threshold = _number(
            failure_threshold, "failure_threshold", least=1, whole=True
        )
        self.recovery_timeout = _number(recovery_timeout, "recovery_timeout", finite=True)
        longest = recovery_timeout if max_recovery_timeout is None else max_recovery_timeout
        self.max_recovery_timeout = _number(longest, "max_recovery_timeout", least=recovery_timeout)
        self.trial_timeout = _number(trial_timeout, "trial_timeout", least=1e-3)
        self.jitter = _number(jitter, "jitter", finite=True)
        if not isinstance(name, str):
            raise ConfigError(f"name={name!r:.60}: give a str")
        self.name = name
        self._on_change = _function(on_change, "on_change", optional=True)
        self._clock: Callable[[], float] = _function(clock, "clock")
        self._watchers: weakref.WeakSet[Any] = weakref.WeakSet()  #: chains
        self._record = BreakerRecord()
        self._rejected = self._stale = 0
        self._shared: _SharedView | None = None
        self._set_up()
        if store is not None:
            self._share(store)
        _renewed_after_fork.add(self)

    def _set_up(self) -> None:
        self._brief = threading.RLock()  # a finalizer may enter
        self._delivering = threading.Lock()
        #: (old state, new state, reason), or ("store", "down" or "back", what to say)
        self._changes: deque[tuple[str, str, str]] = deque()

    def _share(self, store: Any) -> None:
        if not self.name:
            raise ConfigError("a breaker with a store needs a name: give CircuitBreaker(name=...)")
        if not (hasattr(store, "load") and hasattr(store, "swap")):
            known = "SQLiteStore(path) or RedisStore(url)"
            raise ConfigError(f"a {type(store).__name__} has no load and swap: give {known}")
        self._shared = _SharedView(self, store)

    def _look(self) -> BreakerRecord:
        """The record, read from the store if that is due."""
        if self._shared is not None:
            self._shared.refresh()
        return self._record

    @property
    def state(self) -> str:
        """closed, open or half_open; open until a trial begins."""
        return self._look().state

    @property
    def is_closed(self) -> bool:
        """Whether everybody is let through."""
        return self._look().state == "closed"

    @property
    def is_open(self) -> bool:
        """Whether calls are refused or the next one is the trial."""
        return self._look().state == "open"

    @property
    def is_half_open(self) -> bool:
        """Whether a trial is under way."""
        return self._look().state == "half_open"

    @property
    def retry_after(self) -> float | None:
        """Seconds until a call may get through; None when closed or open until reset."""
        return self._remaining(self._look())

    def snapshot(self) -> BreakerSnapshot:
        """Takes no lock: safe in a signal handler."""
        record = self._record
        return BreakerSnapshot(
            record.state, record.generation, record.failures, self._remaining(record),
            record.reason, record.opened, self._rejected, self._stale,
        )

    def _remaining(self, record: BreakerRecord) -> float | None:
        if record.state == "closed" or record.deadline == math.inf:
            return None
        left = max(0.0, record.deadline - self._clock())
        return min(left, _SHORT_WAIT) if record.state == "half_open" else left

    def _would_admit(self) -> bool:
        record = self._look()
        return record.state == "closed" or self._clock() >= record.deadline

    def admit(self) -> Ticket:
        """Leave to make one call. Raises CircuitOpen. Settle the ticket."""
        ticket = self._try_admit()
        if ticket is None:
            raise self._refusal(self._record)
        return ticket

    def call(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """``fn(*args, **kwargs)``, guarded. Raises CircuitOpen without calling it."""
        record = self._record if self._shared is None else self._look()
        if record.state != "closed":
            with self.admit():
                return fn(*args, **kwargs)
        try:
            result = fn(*args, **kwargs)
        except BaseException as error:
            Ticket(self, record.era, False)._judge(error)
            raise
        if record.failures or self._record is not record:  # else there is nothing to settle
            Ticket(self, record.era, False).success()
        return result

    def __call__(self, fn: F) -> F:
        """Decorate a function, or a generator function: admitted at its first ``next()``."""
        if inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn):
            raise TypeError("a CircuitBreaker guards blocking functions")

        def stream(*args: Any, **kwargs: Any) -> Any:
            with self.admit():
                return (yield from fn(*args, **kwargs))

        def once(*args: Any, **kwargs: Any) -> Any:
            return self.call(fn, *args, **kwargs)

        guarded = stream if inspect.isgeneratorfunction(fn) else once
        return functools.wraps(fn)(guarded)  # type: ignore[return-value]

    def open(self, seconds: float | None = None, reason: str = "") -> None:
        """Refuse all calls for ``seconds``, or until ``reset()`` if None."""
        length = math.inf if seconds is None else _number(seconds, "seconds")
        now, why = self._clock(), reason or "opened by hand"
        self._change(lambda old: _opened(old, now, length, reason=why))

    def reset(self) -> None:
        """Close, forget what was counted, ignore the results of calls under way."""
        self._change(lambda old: _closed(old, "reset"))

    def _try_admit(self, forced: bool = False) -> Ticket | None:
        """``forced``: also while open, unless by hand."""
        record = self._record if self._shared is None else self._look()
        if record.state == "closed":
            return Ticket(self, record.era, False)
        now = self._clock()
        if now >= record.deadline and not (self._shared and self._shared.is_busy()):
            old, new = self._replace(lambda old: _trial_if_due(old, now, self))
            if new is not old or new.state == "closed":
                ticket = Ticket(self, new.era, is_trial=new is not old)
                try:
                    self._deliver()
                except BaseException:
                    ticket.neutral()
                    raise
                return ticket
        with self._brief:
            self._rejected += 1
        if forced and self._record.deadline != math.inf:
            return Ticket(self, _NO_ERA, False)
        return None

    def _refusal(self, record: BreakerRecord) -> CircuitOpen:
        error = CircuitOpen(self._why(record))  # a new one each time, or its traceback would grow
        error.retry_after = self._remaining(record)
        return error

    def _why(self, record: BreakerRecord) -> str:
        state = "trying again with one call" if record.state == "half_open" else "open"
        until = " until reset" if record.deadline == math.inf else ""
        reason = f" ({record.reason})" if record.reason else ""
        return f"{self.name or 'circuit'} is {state}{until}{reason}"

    def _observe(self, error: BaseException | None) -> None:
        """Take in a ping. A good one makes the trial due."""
        record = self._look()
        if error is not None:
            Ticket(self, record.era if record.state == "closed" else _NO_ERA, False)._judge(error)
        elif record.state == "open" and record.deadline != math.inf:
            now, era = self._clock(), record.era
            self._change(lambda old: _changed(old, deadline=now, span=0) if old.era == era else old)

    def _change(self, change: _Change, ticket: Ticket | None = None) -> None:
        self._replace(change, ticket)
        self._deliver()

    def _replace(self, change: _Change, ticket: Ticket | None = None) -> _Step:
        keep = self._change_alone if self._shared is None else self._shared.change
        return keep(change, ticket)

    def _change_alone(self, change: _Change, ticket: Ticket | None = None) -> _Step:
        while True:
            old = self._record
            new = change(old)
            if self._set(old, new, ticket):
                return old, new

    def _set(self, old: BreakerRecord, new: BreakerRecord, ticket: Ticket | None = None) -> bool:
        """Replace the record unless somebody else did. A ticket's first verdict counts."""
        with self._brief:
            if self._record is not old:
                return False
            if ticket is not None:
                if ticket._settled:
                    return True
                ticket._settled = True
                self._stale += new is old and ticket._era not in (old.era, _NO_ERA)
            self._record = new
            if new.state != old.state:
                self._changes.append((old.state, new.state, new.reason))
        return True

    def _deliver(self) -> None:
        """Tell of all changes in order, unless somebody else does."""
        while self._changes and not self._delivering.locked():
            with self._delivering:
                while self._changes:
                    self._tell(*self._changes.popleft())

    def _tell(self, old: str, new: str, reason: str) -> None:
        levels = {"open": logging.WARNING, "down": logging.WARNING, "half_open": logging.DEBUG}
        what = reason if old == "store" else f"{new} ({reason})"
        _log.log(levels.get(new, logging.INFO), "%s", _ascii(f"{self.name or 'circuit'}: {what}"))
        data = {"old": old, "new": new, "reason": reason}
        if old == "store":
            data = {"store": reason}
        elif self._on_change is not None:
            try:
                self._on_change(self.name, old, new, reason)
            except Exception as error:
                if _is_task_limit(error):
                    raise
                _log.exception("%s: on_change failed", _ascii(self.name))
        for chain in tuple(self._watchers):
            chain._breaker_changed(self, data)

    def _renew_after_fork(self) -> None:
        """A child has locks anew, and leaves a trial to its parent."""
        self._set_up()
        if self._shared is not None:
            self._shared.begin()
        elif self._record.state == "half_open":
            self._record = _begun(self._record, "open", self._clock(), 0.0)

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self.name!r} {self._record.state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CircuitBreaker cannot be copied or pickled")


class _Outage:
    """Until when a store that did not answer is left alone."""

    until, error = -math.inf, ""


#: By store and clock. Breakers share it, or each would wait for a hung store in turn.
_outages: weakref.WeakKeyDictionary[Any, dict[Any, _Outage]] = weakref.WeakKeyDictionary()


def _checked_record(record: Any) -> BreakerRecord:
    """A record that a store of any author returned. Raises TypeError or ValueError."""
    if not isinstance(record, BreakerRecord):
        raise TypeError(f"a store returned a {type(record).__name__}, not a BreakerRecord")
    right = record.state in ("closed", "open", "half_open")
    for value, default in zip(record, BreakerRecord(), strict=True):
        kinds = (int, float) if isinstance(default, float) else type(default)
        right = right and isinstance(value, kinds) and value == value
    if not right:
        raise ValueError("not a breaker's record")
    return record


class _SharedView:
    """One breaker's record in a store, which only the holder of the lock asks.

    ``_standing`` says how the breaker's record relates to the stored one. shared: it is that one,
    perhaps with failures of this process added. ahead: it has changed while the store was away, and
    is written when the store answers. own: trouble of this machine opened it; never written.
    """

    def __init__(self, breaker: CircuitBreaker, store: Any) -> None:
        self._breaker, self._store = breaker, store
        self._refresh = getattr(store, "refresh", 1.0)
        self._shared_counts = getattr(store, "shared_counts", False)
        self._shares_local_errors = getattr(store, "shares_local_errors", False)
        self._standing = "shared"
        self._seen: int | None = -1  #: the stored generation; None: no record; -1: unknown
        self._offset = 0.0  #: the store's time less the breaker's
        self._down, self._pause = False, 0.0  #: the store is left alone, for seconds that grow
        self._overtaken = False  #: another thread has changed the breaker's record only
        self.begin()
        self._outage = _Outage()
        with contextlib.suppress(TypeError):  # a store without weak references, an unhashable clock
            self._outage = _outages.setdefault(store, {}).setdefault(breaker._clock, self._outage)

    def begin(self) -> None:
        """At first, and in a forked child: the store is asked anew."""
        self._lock = threading.Lock()
        self._in_store = math.inf  #: since when the store is asked; inf: nobody asks it
        self._next_read = -math.inf  #: at once

    def is_busy(self) -> bool:
        """Whether the store is asked now, and does not hang."""
        return self._lock.locked() and time.monotonic() - self._in_store < 2 * _STORE_BUDGET

    def refresh(self) -> None:
        due = self._breaker._clock() >= self._next_read or (self._overtaken and not self._down)
        if due and not self._lock.locked():
            with self._lock:
                self._try(self._load)
            self._breaker._deliver()

    def change(self, change: _Change, ticket: Ticket | None) -> _Step:
        if not self._lock.locked():
            with self._lock:
                return self._keep(change, ticket)
        step = self._breaker._change_alone(change, ticket)
        self._overtaken = True
        return step

    def _load(self) -> None:
        """Take over the stored record, or write what is ahead of it."""
        breaker = self._breaker
        record, store_now = self._store.load(breaker.name)
        if record is not None:
            _checked_record(record)
        if not math.isfinite(store_now):
            raise ValueError("the time of a store is no number")
        self._offset = store_now - breaker._clock()
        if self._overtaken and self._standing == "shared":
            self._standing, self._seen = "ahead", -1
        self._overtaken = False
        mine, stored = breaker._record, None if record is None else record.generation
        if record is None and self._seen is not None:  # it is new, or lost
            least = max(mine.generation, int(store_now * 1000))  # above all that was lost
            breaker._set(mine, mine._replace(generation=least))
            if mine.state != "closed" and self._standing == "shared":
                self._standing = "ahead"
            self._seen = None
        elif record is not None and record.generation != self._seen:
            newer = record.generation > mine.generation
            newer = newer or (mine.state == "closed" and record.state != "closed")
            opens = record.state != "closed" or mine.state == "closed"  # or it would end our outage
            left = min(max(record.deadline - store_now, 0.0), record.span)
            new = record._replace(deadline=breaker._clock() + left)
            longer = record.state != "closed" and new.deadline > mine.deadline
            wins = {"shared": True, "ahead": newer and opens, "own": longer}
            if wins[self._standing]:
                if record.state == "closed" and not self._shared_counts:
                    same = mine.state == "closed" and record.era == mine.era
                    new = new._replace(failures=mine.failures if same else 0)
                self._take(mine, new)
                if record.deadline - store_now > record.span + 1e-3:  # that clock was ahead:
                    self._standing = "ahead"  # written anew, or each new process would wait so long
        if self._standing == "ahead":
            mine = breaker._record
            new = mine._replace(generation=max(mine.generation, (stored or 0) + 1))
            if self._write(stored, new):
                self._take(mine, new)
        if self._down:
            self._down, self._pause = False, 0.0
            breaker._changes.append(("store", "back", "the store is back"))
        self._next_read = breaker._clock() + self._refresh

    def _take(self, old: BreakerRecord, new: BreakerRecord, ticket: Ticket | None = None) -> bool:
        """Make the stored record the breaker's, unless others have changed that."""
        self._seen, self._standing = new.generation, "shared"
        return self._breaker._set(old, new, ticket)

    def _keep(self, change: _Change, ticket: Ticket | None) -> _Step:
        """Change both records, or the breaker's alone."""
        breaker, until = self._breaker, time.monotonic() + 2 * _STORE_BUDGET
        if self._down or self._overtaken or self._next_read == -math.inf:
            self._try(self._load)
        local = ticket is not None and ticket._local and not self._shares_local_errors
        counts = False
        for _ in range(20):  # saved: False if another process was quicker, None if it is down
            old = breaker._record
            new = change(old)
            counts = new.era == old.era and new.state == "closed" and not self._shared_counts
            apart = new is old or counts or local or self._standing == "own"
            saved = None if apart or self._down else self._try(self._write, self._seen, new)
            if saved:
                taken = self._take(old, new, ticket)
                return (old, new) if taken else breaker._change_alone(change, ticket)
            if saved is None:
                break
            self._try(self._load)  # another one was quicker: its record counts
            if time.monotonic() > until:
                break
        old, new = breaker._change_alone(change, ticket)
        if new is old:
            return old, new
        trial = ticket is not None and ticket.is_trial and ticket._era == old.era
        if local and trial and self._standing == "shared":
            given_back = _begun(old, "open", breaker._clock(), 0.0)  # others may have the trial
            if self._try(self._write, self._seen, given_back):
                self._seen = given_back.generation
        if local or self._standing == "own":
            self._standing = "own"
            if new.state == "closed":
                self._standing, self._seen, self._next_read = "shared", -1, -math.inf
        elif not counts:
            self._standing = "ahead"
        return old, new

    def _write(self, expected: int | None, record: BreakerRecord) -> bool:
        moved = record._replace(deadline=record.deadline + self._offset)
        return operator.index(self._store.swap(self._breaker.name, expected, moved)) != 0

    def _try(self, operation: Callable[..., Any], *args: Any) -> Any:
        """None while the store is down: it is left alone for a while that grows."""
        clock, outage = self._breaker._clock, self._outage
        if self._down and clock() < self._next_read:
            return None
        if clock() >= outage.until:
            try:
                self._in_store = time.monotonic()
                return operation(*args)
            except Exception as error:
                if _is_task_limit(error):
                    raise
                if isinstance(error, (ValueError, TypeError, LookupError, AttributeError)):
                    outage = _Outage()  # for this breaker alone: its record is wrong
                if clock() >= outage.until:  # else another breaker has just found out
                    self._pause = min(max(1.0, 2 * self._pause), 60.0)
                    outage.until = clock() + _drawn(self._pause / 2, self._pause)
                    outage.error = _kind(error)
            finally:
                self._in_store = math.inf
        self._next_read = outage.until
        if not self._down:
            self._down = True
            name = f"the store {getattr(self._store, 'path', '')}".rstrip()
            what = f"{name} is down ({outage.error}): going on alone"
            self._breaker._changes.append(("store", "down", what))
        return None


# ==== stores ======================================================================================
# A store keeps breakers' records for several processes or machines, and knows no rules.
# ``load(name) -> (record or None, the store's time)``. ``swap(name, expected_generation, record) ->
# bool`` writes the record if the stored one has that generation (None: if none is stored). It
# returns whether it wrote. Both may raise: then a breaker goes on alone. A store may have these
# attributes: ``refresh = 1.0`` (seconds that a read serves), ``shared_counts = False`` (of
# failures), ``shares_local_errors = False`` (one machine's trouble to connect, or with its key).


class MemoryStore:
    """Records in this process: breakers of one name share a state. ``clock``: its time."""

    refresh = 0.0
    shared_counts = True
    shares_local_errors = True

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = _function(clock, "MemoryStore(clock)")
        self._records: dict[str, BreakerRecord] = {}
        self._renew_after_fork()
        _renewed_after_fork.add(self)

    def _renew_after_fork(self) -> None:
        self._lock = threading.RLock()

    def load(self, name: str) -> tuple[BreakerRecord | None, float]:
        """The record or None, and the time."""
        return self._records.get(name), self._clock()

    def swap(self, name: str, expected_generation: int | None, record: BreakerRecord) -> bool:
        """Compare the generation and write; None expects no record."""
        with self._lock:
            present = self._records.get(name)
            if (None if present is None else present.generation) != expected_generation:
                return False
            self._records[name] = record
            return True


def _record_of(text: Any) -> BreakerRecord:
    """Raises ValueError, TypeError or LookupError for what is no record."""
    found = {"parks": 0, "heals": True, **json.loads(text)}  # version 0.1 wrote neither
    return _checked_record(BreakerRecord(*(found[name] for name in BreakerRecord._fields)))


class SQLiteStore:
    """Records in a SQLite file, for the processes of one machine.

    ``path``: made when first needed, in a folder that exists, not on a network drive. Failures are
    counted together. ``timeout``: seconds that an operation may wait for other processes. A read
    serves for ``refresh`` seconds (0: every look reads). Thread-safe and fork-safe.
    """

    shared_counts = True
    shares_local_errors = True
    _lock: ClassVar[Any] = threading.RLock()  #: held while a thread is inside SQLite

    def __init__(
        self, path: str | os.PathLike[str], *, timeout: float = _STORE_BUDGET, refresh: float = 0.25
    ) -> None:
        if not isinstance(path, (str, os.PathLike)) or str(path) in ("", ":memory:"):
            raise ConfigError(f"SQLiteStore(path={path!r}): give the path of a file")
        self.path = os.fspath(path)
        self.timeout = _number(timeout, "SQLiteStore(timeout)", finite=True)
        self.refresh = _number(refresh, "SQLiteStore(refresh)")
        # absolute: SQLite reads "file:x" as a URI
        self._file = os.path.abspath(os.path.expanduser(self.path))

    def load(self, name: str) -> tuple[BreakerRecord | None, float]:
        """The record or None, and the time. Raises sqlite3.Error, ValueError."""
        rows = self._run("SELECT record FROM breakers WHERE name = ?", name)[1]
        return (_record_of(rows[0][0]) if rows else None), time.time()

    def swap(self, name: str, expected_generation: int | None, record: BreakerRecord) -> bool:
        """Compare the generation and write; None expects no record."""
        text = json.dumps(record._asdict())
        if expected_generation is None:  # in capitals, "insert" counts no rows in a Turkish locale
            sql = "insert OR IGNORE INTO breakers (generation, record, name) VALUES (?, ?, ?)"
            return self._run(sql, record.generation, text, name)[0] > 0
        sql = "UPDATE breakers SET generation = ?, record = ? WHERE name = ? AND generation = ?"
        return self._run(sql, record.generation, text, name, expected_generation)[0] > 0

    def close(self) -> None:
        """Does nothing: no file is open."""

    def _run(self, statement: str, *values: Any) -> tuple[int, list[Any]]:
        """The count of changed rows, and those found. While another process holds the file, the
        lock is free between two tries: other threads go on."""
        until = time.monotonic() + self.timeout
        while True:
            try:
                with self._lock:
                    return self._try(statement, values)
            except ImportError:
                raise OSError("this Python was built without sqlite3") from None
            except Exception as error:
                if "locked" not in str(error) or time.monotonic() >= until:
                    raise
            time.sleep(0.005)

    def _try(self, statement: str, values: tuple[Any, ...]) -> tuple[int, list[Any]]:
        import sqlite3  # not while a child is forked: it would wait for the import

        connection = sqlite3.connect(self._file, timeout=0.0, isolation_level=None)
        with contextlib.closing(connection):
            connection.execute("PRAGMA synchronous = OFF")  # a lost record is learned anew
            columns = "(name TEXT PRIMARY KEY, generation INTEGER, record TEXT)"
            connection.execute(f"CREATE TABLE IF NOT EXISTS breakers {columns}")
            cursor = connection.execute(statement, values)
            return cursor.rowcount, cursor.fetchall()

    def __repr__(self) -> str:
        return f"<SQLiteStore {self.path}>"


if hasattr(os, "register_at_fork"):  # a child would inherit locks that nobody gives back
    os.register_at_fork(
        before=SQLiteStore._lock.acquire, after_in_parent=SQLiteStore._lock.release,
        after_in_child=SQLiteStore._lock.release,
    )


class _BoundedSocket:
    """A socket whose operations have only the time that ``left()`` still allows."""

    def __init__(self, sock: Any, left: Callable[[], float]) -> None:
        self._sock, self._left, self._given = sock, left, math.inf

    def __getattr__(self, name: str) -> Any:
        if name in ("recv", "recv_into", "send"):
            self._sock.settimeout(min(self._left(), self._given))
        return getattr(self._sock, name)

    def settimeout(self, seconds: float | None) -> None:
        self._given = math.inf if seconds is None else seconds
        self._sock.settimeout(seconds)

    def sendall(self, data: Any, *_: Any) -> None:
        view = memoryview(data).cast("B")
        while view:
            view = view[self.send(view) :]


class RedisStore:
    """Records in Redis, for many machines. Needs PyPI's ``redis``.

    ``client_or_url``: a URL or a ``redis.Redis``, whose time limits and retries are not used.
    ``namespace``: a prefix of the keys. ``shared_counts``: whether failures are counted together;
    else each process needs its own ``failure_threshold`` of them. If one machine cannot connect, or
    has a wrong key, only its own breaker opens. ``timeout``: seconds for one operation. A read
    serves for ``refresh`` seconds. Thread-safe and fork-safe.
    """

    shares_local_errors = False
    #: Its values: expected generation ("": none), new one, record, milliseconds to keep.
    _script: ClassVar[str] = """
        if (redis.call('HGET', KEYS[1], 'generation') or '') ~= ARGV[1] then return 0 end
        redis.call('HSET', KEYS[1], 'generation', ARGV[2], 'record', ARGV[3])
        redis.call('PEXPIRE', KEYS[1], ARGV[4])
        return 1"""

    def __init__(
        self, client_or_url: Any, namespace: str = "copilot_router", *,
        shared_counts: bool = False, timeout: float = _STORE_BUDGET, refresh: float = 1.0,
    ) -> None:
        try:
            import redis  # type: ignore[import-not-found, unused-ignore]
            from redis import backoff, retry  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise ConfigError("RedisStore needs PyPI's redis: pip install redis") from None
        if not isinstance(namespace, str):
            raise ConfigError(f"RedisStore(namespace) is a {_kind(namespace)}: give a str")
        self.shared_counts = shared_counts
        self.timeout = _number(timeout, "RedisStore(timeout)", finite=True)
        self.refresh = _number(refresh, "RedisStore(refresh)")
        self._namespace = namespace
        self._operation = threading.local()  #: .until: when the operation of this thread is over
        given: Any = client_or_url
        try:
            by_url = redis.ConnectionPool.from_url
            given = by_url(given) if isinstance(given, str) else given.connection_pool
            kind, store = given.connection_class, self
            _function(kind.connect, "redis.asyncio")
        except (ValueError, AttributeError):  # a ConfigError is a ValueError
            cure = "RedisStore: give a redis.Redis or a URL like redis://localhost:6379/0"
            raise ConfigError(cure) from None  # a URL may hold a password

        class Connection(kind):  # type: ignore[valid-type, misc]
            def _connect(self) -> Any:
                sock = super()._connect()
                store._begin()
                return _BoundedSocket(sock, store._left)

            def connect(self) -> None:
                super().connect()  # it has its own time
                store._begin()

        settings = {
            **given.connection_kwargs, "socket_timeout": timeout, "socket_connect_timeout": timeout,
            "retry": retry.Retry(backoff.NoBackoff(), 0), "retry_on_error": [],
        }
        pool = redis.ConnectionPool(Connection, **settings)
        self._client: Any = redis.Redis(connection_pool=pool)

    def _begin(self) -> None:
        self._operation.until = time.monotonic() + self.timeout

    def _left(self) -> float:
        """Of the operation: redis-py's limit counts anew for each byte."""
        left: float = self._operation.until - time.monotonic()
        return max(1e-4, left)

    def _asked(self, ask: Callable[..., Any], *values: Any) -> Any:
        self._begin()
        try:
            return ask(*values)
        except BaseException:  # after an interrupt the next question would read this one's answer
            self._client.connection_pool.disconnect(inuse_connections=False)
            raise

    def _key(self, name: str) -> str:
        from urllib.parse import quote

        return f"{quote(self._namespace, safe='')}:{quote(name, safe='')}"

    def load(self, name: str) -> tuple[BreakerRecord | None, float]:
        """The record or None, and the server's time."""
        asked = self._client.pipeline(transaction=False).hget(self._key(name), "record").time()
        text, (seconds, micros) = self._asked(asked.execute)
        return (None if text is None else _record_of(text)), seconds + micros / 1e6

    def swap(self, name: str, expected_generation: int | None, record: BreakerRecord) -> bool:
        """Compare the generation and write; None expects no record."""
        expected = "" if expected_generation is None else expected_generation
        text = json.dumps(record._asdict())
        kept = int(1000 * (86_400 + min(record.span, 3e7)))  # a day longer than open
        values = (self._key(name), expected, record.generation, text, kept)
        return bool(self._asked(self._client.eval, self._script, 1, *values))

    def close(self) -> None:
        """Close idle connections; the store stays usable."""
        self._client.connection_pool.disconnect()


# ==== provider interface ==========================================================================

class LLMProvider(ABC):
    """One provider. A custom one implements ``chat``.

    A chain may call it from many threads at once. It logs ProviderErrors: no key or prompt in them.
    """

    _is_chain: ClassVar[bool] = False  #: whether it is a FailoverChain

    @abstractmethod
    def chat(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> LLMResponse:
        """One whole answer, or a ProviderError. Another Exception counts as a failure, except
        ConfigError, which passes through.

        ``messages``, ``tools``: lists of dicts in OpenAI's form: the caller's own, so change none
        in place. ``model``: None where the tier lists none. ``kwargs``: ``timeout`` (seconds for
        this request; obey it, or the deadline is not kept), and the options of the call and of the
        tier's ``params``. Without ``**kwargs`` a tier is passed over for an option that has no
        argument here; hints such as ``temperature`` are left out.
        """

    def stream(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> Generator[str, None, LLMResponse]:
        """Yields deltas of text, returns the whole answer. By default one delta of ``chat()``."""
        response = self.chat(messages, tools, model, **kwargs)
        if isinstance(response, LLMResponse) and response.content:
            yield response.content
        return response

    def ping(self, timeout: float = 5.0) -> None:  # noqa: B027 - optional
        """A cheap probe of health that raises ProviderError. By default it does nothing."""

    def close(self) -> None:  # noqa: B027 - optional
        """Free idle connections; the provider stays usable. By default there are none."""


# ==== transport ===================================================================================
# All that goes wrong becomes a ProviderError. Before each read and write the socket's timeout is
# set to what the request's limits still allow: so a server that drips its answer is bounded.

_READ_SIZE = 65536  #: bytes
_LONGEST_IDLE = 60.0  #: seconds: a firewall may drop a connection after some minutes, silently
_TAIL_TIMEOUT = 2.0  #: seconds that a complete answer waits for the end of its body
#: What servers write into Content-Encoding of a body that is not compressed.
_NO_CODINGS = ("", "identity", "none", "utf-8", "utf8", "binary", "8bit", "chunked")
#: By (host, port): the address that answered last, so that a dead one costs its time once.
_last_address: dict[tuple[str, int], Any] = {}
_sending = threading.local()  #: .limits of this thread's request, .under_way: it is being sent


class _Limits:
    """The time limits of one request. The one that runs out first names the error.

    ``silence``: for this request, before generation has begun and after; ``own``: the same of the
    provider. A longer silence than those is the server's fault, also at the deadline.
    """

    def __init__(
        self, deadline: float, connect: float, silence: Sequence[float], own: Sequence[float]
    ) -> None:
        self.deadline = deadline
        self.since = time.monotonic()  #: the server has been silent since then
        self.silence, self.stall = silence
        self.connect_by = self.since + min(connect, self.silence)
        self.blamed_after, self.own_stall = own
        self.started = False
        self.shared_until = math.inf  #: of the call, if a later tier is ready: half of it is theirs
        self.connecting = False
        self.fresh = False  #: insist on a new connection
        self.reused = False  #: whether a kept connection was used

    def left(self) -> float:
        """Seconds that an operation may take now; TimeoutError if there are none."""
        until = self.connect_by if self.connecting else self.since + self.silence
        left = min(until, self.deadline) - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, 1e6)  # poll() counts milliseconds in 32 bits

    def expired(self, ahead: float = _EARLY) -> ProviderTimeout | None:
        """The error of the limit that ends within so many seconds."""
        now = time.monotonic() + ahead
        silent = now - self.since
        over = now >= min(self.deadline, self.since + self.silence)
        if silent >= min(self.silence, self.blamed_after) and over:
            code, what = "first_token_timeout", "no first token"
            if self.started:
                code, what = "stall_timeout", "no further data"
            return ProviderTimeout(f"{what} for {silent:.1f} s", code=code)
        if now >= self.deadline:
            return ProviderTimeout("no whole answer in the attempt's time", code="attempt_timeout")
        return None

    def begin(self) -> None:
        """A function that gives a key has taken its time: the server's begins now."""
        self.connect_by += time.monotonic() - self.since
        self.since = time.monotonic()

    def progress(self) -> None:
        """The server generates, the caller wants more: silence counts from now."""
        self.since = time.monotonic()
        if not self.started:
            self.started = True
            self.silence, self.blamed_after = self.stall, self.own_stall
        if self.shared_until != math.inf:
            self.silence = min(self.stall, (self.shared_until - self.since) / 2)


class _CurrentLimits:
    """The limits of the request that a connection serves now."""

    def __init__(self, limits: _Limits) -> None:
        self.limits = limits

    def left(self) -> float:
        return self.limits.left()


class _LimitedSocket(_BoundedSocket):
    """What http.client writes to and reads from."""

    def makefile(self, *_: Any, **__: Any) -> Any:
        raw = self._sock.makefile("rb", buffering=0)
        raw._sock = self  # so that each read sets the timeout
        return io.BufferedReader(raw, 16384)


class _IdleConnections(deque[Any]):
    """A queue for a pool: an exception of a signal handler can leave urllib3's locked for ever."""

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxlen=maxsize)

    qsize = deque.__len__
    empty = lambda self: not self  # noqa: E731

    def put(self, item: Any, **_: Any) -> None:
        if len(self) == self.maxlen:
            raise queue.Full
        self.append(item)

    def get(self, **_: Any) -> Any:
        try:
            return self.pop()
        except IndexError:
            raise queue.Empty from None


class _Limited:
    """Mixed into urllib3's connections: bounds what they do."""

    sock: Any

    def connect(self) -> None:
        self.now = _CurrentLimits(limits := _sending.limits)
        limits.connecting = True
        super().connect()  # type: ignore[misc]
        limits.connecting = False
        self.sock = _LimitedSocket(self.sock, self.now.left)

    def _new_conn(self) -> Any:
        return _connect_by_socks(self) if hasattr(self, "_socks_options") else _connect(self)

    def _connect_tls_proxy(self, *args: Any, **kwargs: Any) -> Any:
        """TLS inside of TLS reads through this socket, many times for one handshake."""
        sock = super()._connect_tls_proxy(*args, **kwargs)  # type: ignore[misc]
        return _LimitedSocket(sock, self.now.left)

    def _tunnel(self) -> None:
        plain, self.sock = self.sock, _LimitedSocket(self.sock, self.now.left)
        super()._tunnel()  # type: ignore[misc]
        plain.settimeout(self.now.left())  # for all of TLS
        self.sock = plain  # TLS wraps the socket itself

    def request(self, *args: Any, **kwargs: Any) -> Any:
        limits = _sending.limits
        if self.sock is not None and self.now.limits is not limits:  # a kept connection
            idle = limits.since - self.now.limits.since > _LONGEST_IDLE
            if limits.fresh or idle or getattr(self.sock, "pending", int)():  # TLS holds an answer
                self.close()  # type: ignore[attr-defined]
            else:
                self.now.limits, limits.reused = limits, True
        return super().request(*args, **kwargs)  # type: ignore[misc]


def _connected(sock: Any, connection: Any, address: Any, share: int = 1) -> Any:
    """The socket, connected in this part of the time left; closed if that fails."""
    try:
        for option in connection.socket_options or ():
            sock.setsockopt(*option)
        sock.settimeout(connection.now.left() / share)
        sock.connect(address)
        sock.settimeout(connection.now.left())  # for all of TLS
        return sock
    except BaseException:
        sock.close()
        raise


def _connect_by_socks(connection: Any) -> Any:
    import socks  # type: ignore[import-untyped]

    now = connection.now

    class Socket(socks.socksocket):  # type: ignore[misc]
        def recv_into(self, *args: Any, **kwargs: Any) -> Any:
            self.settimeout(now.left())
            return super().recv_into(*args, **kwargs)

    given, sock = connection._socks_options, Socket()
    names = ("socks_version", "proxy_host", "proxy_port", "rdns", "username", "password")
    sock.set_proxy(*(given[name] for name in names))
    try:
        return _connected(sock, connection, (connection.host, connection.port))
    except OSError:
        told = "the SOCKS proxy does not connect"
        raise now.limits.expired() or ProviderUnavailable(told) from None


def _connect(connection: Any) -> Any:
    """A socket connected to the first address that answers."""
    import socket

    host, port = getattr(connection, "_dns_host", connection.host), connection.port
    whose = "the proxy: " if getattr(connection, "proxy", None) else ""
    try:
        addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ProviderUnavailable(f"{whose}the name cannot be resolved") from None
    addresses.sort(key=lambda found: found[4] != _last_address.get((host, port)))
    failure: OSError | None = None
    for at, (family, kind, proto, _, address) in enumerate(addresses, 1):
        try:
            share = 2 if at < len(addresses) else 1
            sock = _connected(socket.socket(family, kind, proto), connection, address, share)
        except OSError as error:
            failure = error.with_traceback(None)  # which would hold this frame, and so the pool
        else:
            _last_address[host, port] = address
            return sock
    if isinstance(failure, TimeoutError):
        raise failure
    refused = isinstance(failure, ConnectionRefusedError)
    raise ProviderUnavailable(whose + ("refused" if refused else "cannot connect"))


@functools.cache
def _limited(pool: Any) -> Any:
    """urllib3's pool class (plain, TLS or SOCKS) with our connections."""
    import http.client

    if isinstance(pool.ConnectionCls, property):
        return pool

    class Response(http.client.HTTPResponse):
        """Passes over interim answers such as 103; http.client takes all but 100 for final."""

        def _read_status(self) -> Any:
            while 101 < (found := super()._read_status())[1] < 200:  # type: ignore[misc]
                http.client.parse_headers(self.fp)
            return found

    @functools.lru_cache(8)
    def kind(given: Any) -> Any:  # vcrpy puts its own there for a while
        added = {"response_class": Response}
        return given if hasattr(given, "cassette") else type("Connection", (_Limited, given), added)

    now = property(lambda _: kind(pool.ConnectionCls))
    return type("Pool", (pool,), {"ConnectionCls": now, "QueueCls": _IdleConnections})


def _without_secrets(record: logging.LogRecord) -> bool:
    """Takes queries of addresses, and headers that cannot be read, out of what urllib3 logs."""
    if getattr(_sending, "under_way", False):
        shown = re.sub(r"(?s)\?[^\s\"')]*|,? unparsed data.*", "", record.getMessage())
        record.msg, record.args, record.exc_info, record.exc_text = shown, (), None, None
    return True


@functools.cache
def _http() -> tuple[Any, Callable[[], Any]]:
    """requests, and what makes its sessions; imported when first needed."""
    try:
        import requests
    except ImportError:
        raise ImportError("HTTP providers need PyPI's requests: pip install requests") from None
    from requests.adapters import HTTPAdapter
    from urllib3 import connection, connectionpool

    kinds = (connection.HTTPSConnection, connectionpool.HTTPConnectionPool, HTTPAdapter)
    for name in ("_new_conn", "_connect_tls_proxy", "_tunnel", "QueueCls", "proxy_manager_for"):
        found = any(hasattr(kind, name) for kind in kinds)
        if not found and sys.platform != "emscripten":  # which has no sockets
            cure = "install requests 2.31 to 2.x with urllib3 1.26 or 2.x"
            raise ConfigError(f"the installed requests or urllib3 has no {name}: {cure}")
    for module in (connection, connectionpool):
        logging.getLogger(module.__name__).addFilter(_without_secrets)

    def equipped(manager: Any) -> Any:
        given = manager.pool_classes_by_scheme
        manager.pool_classes_by_scheme = {name: _limited(pool) for name, pool in given.items()}
        return manager

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            equipped(self.poolmanager)

        def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
            return equipped(super().proxy_manager_for(*args, **kwargs))

    def session() -> requests.Session:
        made, adapter = requests.Session(), Adapter(pool_connections=4, pool_maxsize=100)
        # else send() reads a redirect's body, however long, and keeps cookies that nobody sends
        made.get_redirect_target = lambda _: None  # type: ignore[assignment, method-assign]
        made.cookies.extract_cookies = lambda *_: None  # type: ignore[method-assign]
        made.mount("http://", adapter)
        made.mount("https://", adapter)
        return made

    return requests, session


def _pieces(read1: Callable[..., bytes], limits: _Limits) -> Iterator[bytes]:
    """What each read brings. It does not know the _Answer: a cycle would keep a lost one open."""
    try:
        while limits.left() and (piece := read1(_READ_SIZE)):  # a user's socket has no limits
            yield piece
    except Exception as error:
        if _passes_through(error):
            raise
        raise _transport_error(error, limits, "the answer") from None


def _unchunked(received: Iterator[bytes]) -> Iterator[bytes]:
    """What a chunked body holds. For speed only: http.client makes six calls for each event."""
    # behind the line end of the chunk before it
    head = re.compile(rb"(?:\r?\n)?[ \t]*([0-9a-fA-F]{1,16})[ \t]*(?:;[^\n]*)?\r?\n")
    rest, lacking = b"", 0  # lacking: bytes of this chunk
    for piece in received:
        data, at = rest + piece, 0
        pieces: list[bytes] = []
        is_last = False
        while at < len(data) and not is_last:
            if not lacking:
                found = head.match(data, at)
                if not found:
                    break
                at, lacking = found.end(), int(found[1], 16)
                is_last = not lacking
            pieces.append(data[at : at + lacking])
            at += len(pieces[-1])
            lacking -= len(pieces[-1])
        rest = data[at:]
        if content := b"".join(pieces):
            yield content
        if is_last:
            break
        if b"\n" in rest[2:] or len(rest) > _READ_SIZE:  # a whole line, and no head of a chunk
            raise InvalidResponse("garbled HTTP")
    else:
        raise InvalidResponse("truncated: the connection broke")
    rest = b"\n" + rest  # trailers, and a blank line
    while b"\n\r\n" not in rest and b"\n\n" not in rest and (piece := next(received, b"")):
        rest += piece
        if len(rest) > _READ_SIZE:
            raise InvalidResponse("garbled HTTP")


class _Answer:
    """An HTTP answer whose headers have arrived."""

    def __init__(self, response: Any, limits: _Limits, most: int) -> None:
        import http.client

        self.status: int = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self.secrets: tuple[str, ...] = ()  #: that were sent
        self.limits, self.most = limits, most
        self._raw, self._ended = response.raw, False
        original = getattr(self._raw, "_original_response", None)
        self._original = original if isinstance(original, http.client.HTTPResponse) else None
        self._content: Iterator[bytes]  #: as sent: compressed, perhaps
        read = getattr(response, "_content", False) is not False
        if read or not hasattr(self._raw, "release_conn"):
            # a session of the user's: a hook has read the body, or an adapter gives a file
            from requests.structures import CaseInsensitiveDict

            self._raw = io.BytesIO() if response.raw is None else response
            self._content = iter([response.content]) if read else response.iter_content(_READ_SIZE)
            headers = CaseInsensitiveDict(response.headers)
            for name in ("Content-Encoding", "Content-Length"):  # they are not of this content
                headers.pop(name, None)
            self.headers = headers
        elif self._original is None:  # a session of the user's
            read1 = getattr(self._raw, "read1", self._raw.read)  # urllib3 1.26 has no read1
            self._content = _pieces(functools.partial(read1, decode_content=False), limits)
        elif getattr(self._original, "chunked", False):  # vcrpy's has none
            self._content = _unchunked(_pieces(self._original.fp.read1, limits))
        else:  # urllib3's own takes twice the time
            self._content = _pieces(self._original.read1, limits)

    def chunks(self) -> Iterator[bytes]:
        """Decompressed bytes as they come. ProviderError for whatever breaks."""
        total, given = 0, self.headers.get("Content-Encoding", "").lower()
        plain = not given or all(name.strip() in _NO_CODINGS for name in given.split(","))
        for piece in self._received() if plain else self._inflated():
            total += len(piece)
            if total > self.most:
                what = f"the answer is larger than max_response_bytes={self.most}"
                raise InvalidResponse(what, code="too_large")
            yield piece
        self._ended = self.status >= 200  # behind an interim answer another one comes

    def body(self) -> bytes:
        return b"".join(self.chunks())

    def _received(self) -> Iterator[bytes]:
        """The body as it was sent. InvalidResponse if it is cut."""
        received = 0
        for data in self._content:
            received += len(data)
            yield data
        length = self.headers.get("Content-Length", "")
        counts = length.isdecimal() and len(length) < 20 and "Transfer-Encoding" not in self.headers
        if counts and received < int(length):
            raise InvalidResponse(f"truncated: {received} of {length} bytes")

    def _inflated(self) -> Iterator[bytes]:
        machine, window_bits = zlib.decompressobj(47), 0  # 0: nothing has come
        try:
            for data in self._received():
                if not window_bits:
                    # gzip or deflate with its header, or deflate without one
                    window_bits = 47 if data[:1] in (b"\x1f", b"\x78") else -15
                    machine = zlib.decompressobj(window_bits)
                while data:
                    yield machine.decompress(data, _READ_SIZE)
                    data = machine.unconsumed_tail
                    if machine.unused_data.startswith(b"\x1f\x8b"):  # another member of gzip
                        data, machine = machine.unused_data, zlib.decompressobj(47)
                    if late := self.limits.expired():  # one read may unpack to gigabytes
                        raise late
        except zlib.error as error:
            raise InvalidResponse("damaged, or compressed by neither gzip nor deflate") from error
        if not machine.eof:
            raise InvalidResponse("truncated: the compressed body breaks off")

    def finish(self) -> None:
        """Reads what little is left, so that the connection can be kept."""
        limits = self.limits
        limits.deadline = min(limits.deadline, time.monotonic() + _TAIL_TIMEOUT / 10)
        with contextlib.suppress(ProviderError):  # the answer is complete all the same
            self._ended = self._ended or next(self._content, None) is None

    def close(self) -> None:
        """Gives the connection back if the body was read to its end, else closes it."""
        if not self._ended:
            self._raw.close()
            return
        if self._original is not None:
            self._original.close()  # else http.client refuses the next request on it
        getattr(self._raw, "release_conn", self._raw.close)()


#: Names and words of exceptions, in this order, and what is said of them.
_TROUBLE = {
    "RecursionError": "RecursionError: with gevent, patch_all() comes before providers are made",
    "SOCKS support": "the proxy of the environment speaks SOCKS: pip install pysocks",
    "(?:CA|TLS) certificate": "no such certificates: see REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE",
    "gaierror": "the name cannot be resolved",
    "ConnectionRefusedError": "refused",
    "NewConnectionError": "cannot connect",
    r"certificate verify failed: ([^(]*\b)": r"TLS failed: \1: see REQUESTS_CA_BUNDLE",
    "WRONG_VERSION|RECORD_LAYER": "TLS failed: the server does not speak it: is it http?",
    "SSL": "TLS failed",
    "ProxyError": "the proxy failed",
}


def _transport_error(error: BaseException, limits: _Limits, what: str) -> ProviderError:
    """What an exception from below means, without its text, which may hold a password."""
    if isinstance(error, ProviderError):
        return error
    from http import client as http

    from requests import exceptions as theirs

    causes = list(_causes(error))

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if among(TimeoutError, theirs.Timeout):
        slow: ProviderError = ProviderTimeout("timed out", code="attempt_timeout")
        if limits.connecting or among(theirs.ConnectTimeout):
            slow = ProviderUnavailable("connect timeout", code="connect_timeout")
            if time.monotonic() + _EARLY < limits.deadline:
                return slow
        return limits.expired() or slow
    if among(ConnectionError, http.IncompleteRead) and not among(ConnectionRefusedError):
        if what == "the answer":
            return InvalidResponse("truncated: the connection broke")
        return ServerError("closed before the answer")  # also of a kept tunnel through a proxy
    if among(http.HTTPException):
        return InvalidResponse("not an HTTP answer")
    text = " ".join(f"{type(cause).__name__} {cause}" for cause in causes)
    for pattern, told in _TROUBLE.items():
        if found := re.search(pattern, text):
            return ProviderUnavailable(_ascii(found.expand(told)))
    _log.warning("%s failed: %s", what, _ascii(_raised_at(error)))
    return ProviderUnavailable(f"{what} failed: {type(causes[-1]).__name__}")


# ==== reading failures ============================================================================
# What a failed answer means is read in this order: specific codes in the body, phrases in its
# message, its generic type, a number in the body, the status. What the message repeats of the
# request is taken out before: a prompt may speak of invalid keys.

#: Characters of a server's message that are shown, and that are searched.
_MESSAGE_LIMIT, _SEARCHED = 300, 2000
_ECHO = 16  #: so many characters in a row that the request holds, too, are an echo of it
_COMPARED = 128 * 1024  #: characters of the longest request that is compared with a message

#: Patterns of messages, in lower case, with what they mean.
_Phrases = tuple[tuple[str, type[ProviderError]], ...]


class _Rows(NamedTuple):
    """A vendor's own words for failures: each kind is read before the shared ones of that kind.

    Codes come before phrases, phrases before statuses: a shared phrase before a vendor's status.
    What is named here may park its tier; a shared phrase may do so at some statuses only.
    """

    codes: Mapping[str, type[ProviderError]] = MappingProxyType({})  #: in lower case
    phrases: _Phrases = ()
    statuses: Mapping[int, type[ProviderError]] = MappingProxyType({})
    options: Mapping[str, str] = MappingProxyType({})  #: ours -> a pattern of its name in errors


def _coded(kinds: Mapping[type[ProviderError], str]) -> dict[str, type[ProviderError]]:
    return {code: kind for kind, codes in kinds.items() for code in codes.split()}


#: Specific codes and types, by the vendors' error pages; the numbers are z.ai's and MiniMax's.
_CODES = _coded({
    ContextLengthExceeded: "context_length_exceeded exceed_context_size_error 1261"
    " context_exceeded model_max_prompt_tokens_exceeded tokens_limit_reached"
    " max_context_length_exceeded tokens_too_long characters_too_long",  # the last two: Baidu
    QuotaExceeded: "insufficient_quota credit_balance_exhausted organization_spend_limit_exceeded"
    " billing_error project_spend_limit_exceeded organization_usage_limit_exceeded"
    " billing_hard_limit_reached enforced_spend_limit_reached contract_spend_limit_reached"
    " insufficient_balance payment_required weight_exceeds_budget arrearage billing_not_active"
    " exceeded_current_quota_error insufficient_credits insufficient_funds 1113 1008"
    " insufficient_user_quota pre_consume_token_quota_failed budget_exceeded"  # new-api, LiteLLM
    " spend_limit_reached blocked_api_access invalidsubscription"  # Groq, Ark
    " allocationquota.freetieronly account_deactivated token_quota_reached"
    " usage_limit_reached usage_not_included 1308 1309 1310 1316 1317 1318 1319 1320 1321",
    RateLimited: "in_flight_budget_exhausted ramp_limit_exceeded limit_requests limit_burst_rate",
    AuthenticationError: "invalid_api_key unsupported_country_region_territory api_key_invalid"
    " invalidapikey 1004 2049 api_key_expired invalid_authentication_error no_db_connection"
    " organization_restricted access_terminated",  # Groq, OpenAI
    ModelNotFound: "model_not_found deploymentnotfound model_not_exist unknown_model"
    " model_not_supported 1311 key_model_access_denied team_model_access_denied"
    " user_model_access_denied org_model_access_denied project_model_access_denied"
    " model_permission_blocked_org model_permission_blocked_project invalid_model",  # Groq, Baidu
    ContentFiltered: "content_filter content_policy_violation cyber_policy hooks_failed"
    " responsibleaipolicyviolation data_inspection_failed datainspectionfailed 1301 1026 1027"
    " sensitive_words_detected inputtextsensitivecontentdetected bio_policy refusal"
    " censorship_blocked unsafe_request image_content_policy_violation",  # StepFun, Baidu, OpenAI
    Overloaded: "slow_down server_is_overloaded overloaded_error capacity_exceeded"
    " engine_overloaded_error engine_overloaded",
    InvalidResponse: "tool_use_failed json_validate_failed output_parse_failed",
    UnsupportedRequest: "unsupported_parameter unsupported_value not_supported_error"
    " model_no_support_for_function unsupported_api_for_model",
    BadRequest: "string_above_max_length",
})

#: More numbers of MiniMax, at status 200; z.ai has others of the same form at other statuses.
#: Source: https://platform.minimax.io/docs/api-reference/errorcode
_MINIMAX_CODES = _coded({
    QuotaExceeded: "2056", RateLimited: "1002 1039 1041 2045", ServerError: "1000 1024 1033",
    ProviderTimeout: "1001", BadRequest: "1042 2013",
})

_PHRASES: _Phrases = (
    # OpenAI, Anthropic, llama.cpp, LM Studio, Mistral, TGI, Moonshot, DashScope, GLM, Bedrock, xAI
    (r"context (length|window|size)|maximum context|context the overflows|exceed context limit|"
     r"(input|prompt)( tokens?)?( length)?( is)? too long|is longer than the (maximum )?model|"
     r"input tokens( \d{1,9} cannot)? exceed|input token count|request( body)? too large for|"
     r"exceeded model token limit|range of input length should be|prompt exceeds max length|"
     r"inputs?` ?tokens? \+ `?max_new_tokens|reduce (the length|your prompt)|"
     r"maximum prompt length|input length \d{1,9} exceeds|model max length|than max_seq_len|"
     r"must have less than \d{1,9} tokens|prompt token count .{0,60}exceeds|"
     r"too many tokens: (total|size)|>= n_ctx", ContextLengthExceeded),
    # quotas of a day: Gemini's, as LiteLLM quotes it, Bedrock, Cerebras; budgets of LiteLLM
    (r"requestsperday|(crossed|exceeded) budget|tokens per day(,| limit)", QuotaExceeded),
    (r"litellm\.timeout|timeout on reading data", ProviderTimeout),
    # OpenRouter, DeepSeek, xAI, Moonshot, Together, Cohere's trial, SiliconFlow, Novita, Copilot;
    # free allowances of Cloudflare and Ark; plans whose hours, week or month are used up
    (r"credit balance is too low|exceeded your current quota|insufficient (balance|credits|funds)|"
     r"credits are depleted|limit: 0\b|spend(ing)? (limit|cap)|never purchased credits|"
     r"out of (credits|extra usage)|(requires more|have any) credits|not enough balance|"
     r"balance is insufficient|overdue balance|account is (suspended|in arrears)|"
     r"exceeded your monthly included credits|usage (limit|quota)|monthly quota|limit exhausted|"
     r"weekly rate limit|calls / month|daily free allocation|free trial quota|"
     r"set inference limit|out of call volume quota", QuotaExceeded),
    (r"incorrect api key|invalid api[ -]key|api key (is )?(not valid|expired|invalid)|"
     r"invalid (bearer |api )?token|location is not supported", AuthenticationError),
    # LM Studio and NVIDIA at 400, TGI and Bedrock at 424
    (r"failed to load (the )?model|model has crashed|degraded function|failed during generation|"
     r"error while processing the model", ServerError),
    # llama.cpp and llama-cpp-python, at 500; OpenRouter, with invalid_prompt
    (r"jinja exception|invalid responses api request|backend request failed with status 400|"
     r"^\d{1,3} validation errors?:", BadRequest),
    # the second line: Ollama's cloud at 403, MiniMax at 500
    (r"no models? loaded|model (is )?unloaded|unknown model|^invalid model|invalid model name|"
     r"model requires a subscription|plan not support model|is not a valid model|"
     r"not found for account|model .{0,120}(not found|not exist|no longer available|"
     r"has been (retired|deprecated))", ModelNotFound),
    # the last lines: xAI, LiteLLM, OpenRouter, MiniMax, Cloudflare's gateway, Portkey, new-api, Ark
    (r"content management policy|content filtering policy|violating our usage policy|flagged as|"
     r"moderation(?! service is|=)|data may contain inappropriate content|content exists risk|"
     r"content violates usage guidelines|prompt injection (attack|pattern)|new_sensitive \(102|"
     r"violated .{0,40}(guardrail|content safety|jailbreak|injection)|"
     r"blocked by .{0,40}(guardrail|model armor)|"
     r"(prompt|response|content) blocked due to (security|guardrail|dlp)|^content blocked: |"
     r"content_?policy_?violation|result of our safety system|"
     r"guardrail checks .{0,40}failed|sensitive words detected|sensitive content that violates|"
     r"(text|image|^) ?may contain sensitive info", ContentFiltered),
    (r"unexpected endpoint|invalid url", ProviderUnavailable),
    (r"^litellm\.ratelimiterror", RateLimited),
    (r"^litellm\.contextwindowexceedederror", ContextLengthExceeded),
    (r"loading model|is (currently )?loading|overloaded|server busy|at capacity", Overloaded),
    (r"does(n't| not) support (the )?(tool|image|vision|thinking|chat|function|response.format)|"
     r"requires --(enable-auto-tool-choice|jinja|tool-call-parser)|not a multimodal model|"
     r"for image input|unknown variant .image_url|no endpoints (found|available) (that|matching)|"
     r"(tool|image|function call|response_format|json.(mode|schema)).{0,60}not (support|enabl)ed|"
     r"unsupported param: tools|tool_?choice.{0,80}(support|permitted|allowed|forces)",
     UnsupportedRequest),
)

#: For classes that count against a tier a phrase must be the server's own.
_BLAMING = (AuthenticationError, QuotaExceeded, ProviderUnavailable, Overloaded, ServerError)
#: Phrases of these classes count at these statuses only: at others they may speak of a service
#: behind the server, or of a picture's address.
_MEANT_AT: dict[type[ProviderError], Sequence[int]] = {
    AuthenticationError: range(200, 500), ContentFiltered: (200, 400, 403, 422, 424, 446),
    ProviderUnavailable: (200, 404, 405),
}
#: Generic types. They say less than a 4xx status; those of _LAST_TYPES say less than any status.
_TYPES = _coded({
    AuthenticationError: "authentication_error permission_error unauthenticated permission_denied",
    RateLimited: "rate_limit_error rate_limit_exceeded tokens requests",
    ProviderTimeout: "timeout_error timeout request_timeout",
    ServerError: "server_error api_error internal_error internal_server_error internal",
    Overloaded: "unavailable_error service_unavailable_error unavailable",
    ContentFiltered: "invalid_prompt",
})
_LAST_TYPES = _coded({
    BadRequest: "invalid_request_error badrequesterror invalid_argument",
    ModelNotFound: "not_found_error notfounderror not_found",
})
_STATUSES: dict[int, type[ProviderError]] = {
    401: AuthenticationError, 402: QuotaExceeded, 403: AuthenticationError,
    404: ProviderUnavailable, 407: ProviderUnavailable, 408: ProviderTimeout, 409: ServerError,
    410: ProviderUnavailable, 425: ServerError, 429: RateLimited,
    498: Overloaded, 529: Overloaded,  # Groq, Anthropic
}
#: What a 403 speaks of if a key has no permission; others dislike a prompt.
_NAMES_PERMISSION = (
    r"key|permission|credential|token|auth|account|organi[sz]ation|project|billing|credit|balance|"
    r"quota|plan\b|subscription|country|region|location"
)
#: Headers with the provider's id of a request.
_REQUEST_IDS = ("x-request-id", "request-id", "apim-request-id", "x-ms-request-id", "inference-id",
                "x-generation-id", "mistral-correlation-id", "x-ds-trace-id", "x-amzn-requestid",
                "x-kong-request-id", "x-debug-trace-id", "x-litellm-call-id")


def _dict(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    return dict(value) if isinstance(value, Mapping) else {}


def _int(value: Any) -> int | None:
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


class _Report(NamedTuple):
    """What the body of a failure says, whatever its shape."""

    message: str
    codes: tuple[str, ...]  #: in lower case
    param: str
    number: int | None  #: a status of HTTP among the codes
    delay: str  #: as it was said


#: Names of a failure's parts, of their texts, and of their codes.
_PARTS = ("error", "errors", "message", "detail", "details", "base_resp", "innererror", "metadata",
          "headers")
_TEXTS = ("message", "Message", "detail", "error_description", "error_message", "error_msg",
          "status_msg", "msg")
_CODE_NAMES = ("reason", "code", "error_code", "status_code", "limit_source", "type", "status",
               "error_type")
#: Names of a time to wait: Google's, Codex's, z.ai's, Hugging Face's, OpenRouter's.
_DELAY_NAMES = ("retryDelay", "resets_in_seconds", "retry_after", "estimated_time",
                "X-RateLimit-Reset")
#: Headers with a time to wait; the second one is LiteLLM's.
_WAITS = ("retry-after", "llm_provider-retry-after")
#: How units begin, and their seconds.
_UNITS = (("ms", 0.001), ("mil", 0.001), ("m", 60.0), ("h", 3600.0), ("d", 86400.0), ("", 1.0))
#: A number and its unit, perhaps.
_SPAN = (
    r"(\d{1,15}(?:\.\d{1,12})?)"
    r" ?(ms|milli[a-z]{0,9}|m|min[a-z]{0,4}|h|hrs?|hours?|d|days?|s|sec[a-z]{0,4}|)(?![a-z])"
)
_ASKS = rf"(?i)(?:try again|retry|wait)(?: in| after| for)? ({_SPAN}(?: ?{_SPAN}){{0,3}})"
_RESETS = r"(?i)resets at:? ([\d-]{10}[ T][\d:]{8}(?:[+-]\d\d:\d\d)?)"
#: What a message quotes of the model's words: all behind these marks (llama.cpp, Ollama, LM Studio,
#: vLLM, Groq), and one value of Pydantic's (vLLM, SGLang).
_MODELS_WORDS = (
    r"(?is)(failed to parse input at pos \d{1,9}:|last read:|parsing tool call: raw=|model output:|"
    r"tokens remaining in message header:|failed_generation\\{0,3}['\"]:).+|"
    r"(?<=input_value=).{1,200}?(?=, input_type=)"
)


def _pieces_of(body: Any, depth: int = 8) -> Iterator[dict[str, Any]]:
    """The objects in a failure's body, inner ones first. A text becomes one."""
    if isinstance(body, str):
        yield {"message": body}
    elif isinstance(body, list) and depth:
        for item in body[:20]:
            yield from _pieces_of(item, depth - 1)
    elif isinstance(body, dict) and depth:
        for name in _PARTS:
            yield from _pieces_of(body.get(name), depth - 1)
        yield from _pieces_of(_dict(body.get("value")), depth - 1)  # Vercel; others repeat a text
        yield body
        raw = body.get("raw")  # OpenRouter: of the provider behind it
        if isinstance(raw, str):
            with contextlib.suppress(ValueError, RecursionError):
                raw = json.loads(raw[: 8 * _SEARCHED])
        yield from _pieces_of(raw, depth - 1)


def _report(body: Any) -> _Report:
    parts = list(_pieces_of(body))
    texts, fields = [], []
    for part in parts:
        loc = part.get("loc")  # ["body", "temperature"]
        place = [str(name) for name in loc if name != "body"] if isinstance(loc, list) else []
        fields += place[:1]
        said = [part[name] for name in _TEXTS if isinstance(part.get(name), str)]
        said = [_pattern(_MODELS_WORDS).sub(r"\1***", text) for text in said]
        texts += [": ".join([" ".join(place), text] if place else [text]) for text in said]
    coded = [part for part in parts if "cloudflare_error" not in part  # whose codes are its own
             and part.get("error_type") != "invalid_prompt"]  # OpenRouter: a malformed message
    values = [part[name] for name in _CODE_NAMES for part in coded if name in part]
    if any("PerDay" in str(part.get("violations")) for part in parts):  # Gemini's quota of a day
        values.insert(0, "insufficient_quota")
    if any(part.get("reasons") or "flagged_input" in part for part in parts):  # OpenRouter
        values.insert(0, "content_filter")
    codes = [str(value).lower() for value in values if isinstance(value, (str, int))]
    numbers = (number for value in values if (number := _int(value)) and number < 1000)
    params = [part["param"] for part in parts if isinstance(part.get("param"), str)]
    params = [param.removeprefix("body.") for param in params]  # vLLM
    delays = [str(part[name]) for name in _DELAY_NAMES for part in parts if part.get(name)]
    return _Report(
        "; ".join(dict.fromkeys(filter(None, texts))),
        tuple(code for code in codes if not code.isdecimal() or len(code) == 4),
        next(iter([*params, *fields]), ""), next(numbers, None), next(iter(delays), ""),
    )


class _Words:
    """A server's message without what it repeats of the request. ``shown`` is safe to show.

    A very large request is not compared: nothing is shown, no phrase counts that it holds.
    """

    def __init__(self, message: str, texts: Iterable[str]) -> None:
        known = "\n".join(texts)
        message = _unescaped(message[: 2 * _SEARCHED])[:_SEARCHED]
        self._message, self.shown = " ".join(message.split()), ""
        self._known, self._large = _folded(known), len(known) > _COMPARED
        if not self._large:
            self._message = self.shown = _without_echo(self._message, self._known)

    def find(self, pattern: str, own: bool = False) -> re.Match[str] | None:
        """The first match; ``own``: the request has no such words."""
        for found in itertools.islice(_pattern(pattern).finditer(self._message), 4):
            around = 6 if self._large else 0  # what surrounds the words tells whose they are
            start, end = max(0, found.start() - around), found.end() + around
            if not (own or self._large) or _folded(self._message[start:end]) not in self._known:
                return found
        return None

    def say(self, text: str) -> bool:
        return text.lower() in self._message.lower()


def _unescaped(text: str) -> str:
    """The text without the escapes of JSON's and Python's quotes: an echo may have them."""
    escape = _pattern(r"\\+(?:u([0-9a-fA-F]{4})|([nrt])|(?=[\"'/]))")
    return escape.sub(lambda at: chr(int(at[1], 16)) if at[1] else " " if at[2] else "", text)


def _folded(text: str) -> str:
    """In lower case, at the same length: only one character would become two."""
    return text.replace("\u0130", "i").lower()


def _without_echo(message: str, known: str) -> str:
    """The message with *** for short lines of the request and for long runs of it."""
    lines, folded = {" ".join(line.split()) for line in known.split("\n")}, _folded(message)
    short = [line for line in lines if 4 <= len(line) < _ECHO and line in folded]
    for line in sorted(short, key=len, reverse=True):
        message = re.sub(rf"(?i)(?<!\w){re.escape(line)}(?!\w)", "***", message)
    known = "\n".join(lines)
    runs = {known[at : at + _ECHO] for at in range(len(known))}
    echoed, folded = set[int](), _folded(message)
    for at in range(len(message) - _ECHO + 1):
        if folded[at : at + _ECHO] in runs:
            echoed.update(range(at, at + _ECHO))
    kept = ("\0" if at in echoed else char for at, char in enumerate(message))
    return re.sub("\0+", "***", "".join(kept))


def _hidden(message: str, secrets: Iterable[str]) -> str:
    """The message without these keys, also as a URL or as JSON writes them."""
    from urllib.parse import quote

    for secret in secrets:
        if len(secret) >= 4:
            forms = (secret, quote(secret, ""), secret.replace("/", "\\/"))
            message = re.sub("(?i)" + "|".join(map(re.escape, forms)), "***", message)
    return message


def _masked(message: str) -> str:
    """One clipped line without what looks like a key, and without control characters."""
    key = r"(?i)\b(?:sk|pk|gsk|xai|key|AIza|AQ)[-_.][\w\-.*]{6,}|\bAIza[\w-]{10,}|[\w-]{40,}"
    message = _pattern(key + r"|bearer\s{1,9}\S+").sub("***", message)
    if len(message) > _MESSAGE_LIMIT:
        message = message[: _MESSAGE_LIMIT - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


#: Words of every request, and pictures: base64, or a data URL of it.
_NO_TEXT = (
    r"system|developer|user|assistant|tool|text|image_url|function|file|object|string|number|"
    r"integer|boolean|array|auto|none|required|json_object|json_schema|"
    r"(?:data:[^\s,]{0,99},)?[A-Za-z0-9_+/=-]{99,}"
)


def _texts_of(value: Any) -> Iterator[str]:
    """Every text in a request; no role, type or picture."""
    if isinstance(value, Mapping):
        value = [item for name, item in value.items() if name != _CARRY]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts_of(item)
    elif isinstance(value, str) and not _pattern(_NO_TEXT).fullmatch(value):
        yield value


def _class_of(
    report: _Report, words: _Words, status: int, model: str | None, waits: bool, own: _Rows
) -> tuple[type[ProviderError], bool]:
    """The class of a failure, and whether it may park the tier. ``own``: the vendor's rows."""
    if status == 402 and waits:
        return RateLimited, True
    codes = {**_CODES, **(_MINIMAX_CODES if status == 200 else {}), **own.codes}
    for code in report.codes:
        if code in codes:
            return codes[code], True
    for pattern, kind in (*own.phrases, *_PHRASES):
        doubtful = kind in _BLAMING and status in (200, 400, 413, 422)
        found = words.find(f"(?i){pattern}", own=doubtful)
        if not found or status not in _MEANT_AT.get(kind, (status,)):
            continue
        is_gemini = found[0].lower() == "exceeded your current quota" and words.find(_ASKS)
        if kind is QuotaExceeded and found[0].lower() != "limit: 0" and (report.delay or is_gemini):
            continue  # Gemini calls any rate limit a quota, and then names a delay
        sure = (
            status in (401, 402, 403, 412, 429) or (pattern, kind) in own.phrases
            or own.statuses.get(status) is kind or kind not in (QuotaExceeded, AuthenticationError)
            or (status == 200 and bool(report.number or report.codes))  # not a word in a text
        )
        return kind, sure
    number = status if status >= 300 else report.number or status
    if number in (404, 410) and (words.say(model or "model") or words.say("model")):
        return ModelNotFound, True
    for code in report.codes:
        weak = 400 <= number < 500 or number in (503, 529)
        if code in _TYPES and not (weak and issubclass(_TYPES[code], ServerError)):
            return _TYPES[code], True
    statuses = {**_STATUSES, **own.statuses}
    if number in statuses:
        sure = number != 403 or bool(words.find(f"(?i){_NAMES_PERMISSION}"))
        return statuses[number], sure
    if number == 503 and waits:
        return Overloaded, True
    last = (_LAST_TYPES[code] for code in report.codes if code in _LAST_TYPES)
    by_hundred = {5: ServerError, 4: BadRequest, 3: InvalidResponse}
    return by_hundred.get(number // 100) or next(last, InvalidResponse), True


def _retry_hint(
    headers: Mapping[str, str], report: _Report, words: _Words, limited: bool
) -> float | None:
    """Seconds to wait by the server's own word; None for nonsense."""
    resets = [
        value for name, value in headers.items()
        if "ratelimit" in name.lower() and "reset" in name.lower()
        and headers.get(name.lower().replace("reset", "remaining"), "0").strip() in ("0", "")
    ]
    asks = words.find(_ASKS) or words.find(_RESETS)
    for texts in (
        # several of them are joined by commas; a date needs no day of the week
        [headers.get("retry-after-ms", "") + "ms",
         *(one for name in _WAITS for one in headers.get(name, "").split(","))],
        [report.delay or (asks[1] if asks else "")],
        resets if limited else [],
    ):
        found = [seconds for text in texts if (seconds := _delay(text)) is not None]
        if found:
            return max(found)  # milliseconds may be rounded down to 0
    return None


def _delay(text: str) -> float | None:
    """Seconds of ``7``, ``6m0s``, ``2 minutes``, or until a date or a moment since 1970."""
    text = text[:64].strip().rstrip(".")
    span, folded = _pattern(_SPAN), text.lower()
    if not text or span.sub("", folded).strip():
        return _seconds_until(text)
    total = 0.0
    for number, unit in span.findall(folded):
        total += float(number) * next(size for start, size in _UNITS if unit.startswith(start))
    if total > 1e9:  # OpenRouter says milliseconds since 1970
        total = max(0.0, (total / 1000 if total > 1e11 else total) - time.time())
    return total


def _seconds_until(text: str) -> float | None:
    """Seconds until an HTTP or RFC 3339 date; 0 if it is past."""
    import datetime
    from email.utils import parsedate_to_datetime

    for read in (datetime.datetime.fromisoformat, parsedate_to_datetime):
        with contextlib.suppress(ValueError, TypeError, OverflowError, IndexError):
            when = read(text.replace("Z", "+00:00"))
            zone = when.tzinfo or datetime.timezone.utc  # without one it is not this machine's
            return max(0.0, when.replace(tzinfo=zone).timestamp() - time.time())
    return None


# ==== wire formats ================================================================================
# What all vendors share. What the caller gives is checked, and an encoder makes a body of it. The
# bytes of an answer are cut into events. A reader is a generator function that finds facts in an
# event; it raises KeyError, TypeError or the like if the event is malformed. The collector makes
# deltas and one LLMResponse of the facts; it knows no vendor. None does I/O.

_Object = dict[str, Any]  #: as JSON has them
#: Portable options. A vendor that lacks a hint ignores it; any other one it lacks is refused.
_HINTS = frozenset({"temperature", "top_p", "seed", "presence_penalty", "frequency_penalty",
                    "reasoning_effort", "parallel_tool_calls", "user"})
_TOKEN_LIMITS = frozenset({"max_tokens", "max_completion_tokens"})  #: of one option
_OPTIONS = _HINTS | _TOKEN_LIMITS | {"stop", "tool_choice", "response_format", "extra_body"}
_TIME_LIMITS = ("timeout", "first_token_timeout", "stall_timeout")  #: of one request
_GO_ON = "Continue."  #: the user's turn that a vendor insists on
_NO_RESULT = "no result: the call was interrupted"  #: of a tool call without one
_STRAY_RESULT = "Result of a tool call:"  #: before one that is sent as the user's
_ASKS_JSON = "Answer with one JSON object and nothing else."
_NO_PARAMETERS = {"type": "object", "properties": {}}
_PICTURES = ("image_url", "image", "input_image")  #: types of parts
_NOT_PLAIN = r"[^a-zA-Z0-9_-]"  #: not allowed in ids and names of tools at OpenAI and Anthropic


class _Call(NamedTuple):
    """One request to a provider, checked."""

    messages: list[Message]
    tools: Tools
    model: str | None
    options: _Object
    learned: Mapping[str, Any] = MappingProxyType({})  #: what this model refuses (_correction)
    identity: str = ""  #: provider and model: whose carried parts may be sent
    token_limit: Any = None  #: of the completion
    thoughts: bool = False  #: the caller wants to read the model's thinking
    names: Mapping[str, str] = MappingProxyType({})  #: of tools -> as they are sent

    def carried(self, message: Message) -> _Object:
        """What ``LLMResponse.message`` kept for this provider and model; {} if it was edited."""
        if _CARRY not in message or "carry" in self.learned:
            return {}
        kept = _dict(message[_CARRY])
        if kept.get("for") != self.identity or kept.get("text") != message.get("content"):
            return {}
        ids = [call.get("id") for call in message.get("tool_calls") or ()]
        return kept if kept.get("ids") == ids else {}

    def renamed(self, names: Mapping[str, str]) -> _Object:
        """The options of these names that were given, under a vendor's names."""
        given = {**self.options, "max_tokens": self.token_limit}
        return _given({theirs: given.get(own) for own, theirs in names.items()})

    def finished(self, body: _Object) -> _Object:
        """The body without fields that are None, with ``extra_body`` on top."""
        extra = self.options.get("extra_body") or {}
        if not isinstance(extra, Mapping):
            raise BadRequest(f"extra_body is a {_kind(extra)}: give a dict")
        return _merged(_given(body), extra) if extra else _given(body)


def _given(fields: _Object) -> _Object:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> _Object:
    done = {**base, **top}
    for name in base.keys() & top.keys():
        if isinstance(base[name], Mapping) and isinstance(top[name], Mapping):
            done[name] = _merged(base[name], top[name])
    return done


# -- checking what the caller gives

_ROLES = ("system", "developer", "user", "assistant", "tool")


class _CheckedMessages(list[Message]):
    """Messages that need no second check."""


def _checked_messages(messages: Any, system: str | None = None) -> list[Message]:
    """The messages, checked as far as every provider needs it. BadRequest shows no text of them."""
    if isinstance(messages, _CheckedMessages) and system is None:
        return messages
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    elif not isinstance(messages, (list, tuple)):
        raise BadRequest(f"messages is a {_kind(messages)}: give a str, or dicts with 'role'")
    if not messages:
        raise BadRequest("messages is empty: give at least one message")
    for at, message in enumerate(messages):
        if fault := _fault_of(message):
            raise BadRequest(f"messages[{at}]{fault}")
    if system is not None:
        first = {"role": "system", "content": system}
        if fault := _fault_of(first):
            raise BadRequest(f"the argument system{fault}")
        messages = [first, *messages]
    return _CheckedMessages(messages)


def _fault_of(message: Any) -> str:
    """What is wrong with a message, "" if nothing is."""
    if type(message) is not dict and not isinstance(message, Mapping):
        return f" is a {_kind(message)}: give a dict with 'role' and 'content'"
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in _ROLES:
        shown = role if isinstance(role, str) and len(role) < 20 else _kind(role)
        return f" has the role {shown!r}: give one of {', '.join(_ROLES)}"
    if calls and role != "assistant":
        return f" ({role}) has tool_calls: only the assistant calls tools"
    if calls is not None and (fault := _fault_of_calls(calls)):
        return f".tool_calls{fault}"
    if isinstance(content, str) or (content is None and role == "assistant"):
        return ""
    if content is None:
        return f" ({role}) has no content: give a str or a list of parts"
    if not isinstance(content, (list, tuple)):
        return f" ({role}) has content of type {_kind(content)}: give str or list"
    if all(isinstance(part, Mapping) for part in content):
        return ""
    return f" ({role}) has a part that is no dict: give {{'type': 'text', 'text': ...}}"


def _fault_of_calls(calls: Any) -> str:
    if not isinstance(calls, (list, tuple)):
        return f" is a {_kind(calls)}: give a list"
    for at, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not (
            isinstance(function, Mapping)
            and isinstance(function.get("name"), str)
            and isinstance(call.get("id") or "", str)
            and isinstance(function.get("arguments") or "", (str, dict))
        ):
            form = "{'id': …, 'type': 'function', 'function': {'name': …, 'arguments': …}}"
            return f"[{at}]: give {form}"
    return ""


def _checked_tools(tools: Any) -> Tools:
    """The tools. BadRequest says which one is malformed."""
    form = "{'type': 'function', 'function': {'name': …, 'parameters': …}}"
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise BadRequest(f"tools is a {_kind(tools)}: give a list of {form}")
    for at, tool in enumerate(tools):
        kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
        if kind not in ("function", None):
            continue  # a vendor's own kind of tool
        function = tool.get("function") if kind else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRequest(f"tools[{at}]: give {form}")
    return tools


# -- from the OpenAI form


def _instructed(messages: list[Message], instruction: str) -> list[Message]:
    """A copy whose first system message (made if there is none) ends with the instruction."""
    for at, message in enumerate(messages):
        if message["role"] in ("system", "developer"):
            content = message["content"]
            text, part = f"{content}\n\n{instruction}", {"type": "text", "text": instruction}
            changed = {**message, "content": text if isinstance(content, str) else [*content, part]}
            return _CheckedMessages([*messages[:at], changed, *messages[at + 1 :]])
    return _CheckedMessages([{"role": "system", "content": instruction}, *messages])


class _Part(NamedTuple):
    """A piece of a message's content."""

    kind: str  #: text | data | url
    data: str  #: the text, the base64 or the address
    media: str = ""  #: of data, such as image/png
    cache: Any = None  #: cache_control, as it was given
    detail: Any = None  #: of a picture, as it was given
    name: str = ""  #: of a file; "" for a picture or a text


def _parts(content: Any, vendor: str) -> list[_Part]:
    """Content as parts. Raises UnsupportedRequest for parts of an unknown type."""
    import base64
    from urllib.parse import unquote_to_bytes

    if not isinstance(content, (list, tuple)):
        return [_Part("text", content)] if content else []
    found = []
    for part in content:
        kind, cache, name = part.get("type"), part.get("cache_control"), ""
        what, detail = f"a message part of the type {kind!r:.40}", part.get("detail")
        if kind in ("image_url", "input_image"):
            url: Any = part.get("image_url")
            if isinstance(url, Mapping):
                url, detail = url.get("url"), url.get("detail")
        elif kind == "file":
            file = _dict(part.get("file"))
            url, name = file.get("file_data"), str(file.get("filename") or "file")
            if not url and "file_id" in file:
                raise UnsupportedRequest(f"{vendor} cannot be sent a file by its id")
        elif isinstance(text := part.get("refusal" if kind == "refusal" else "text"), str):
            found += [_Part("text", text, cache=cache)] if text else []
            continue
        else:
            raise UnsupportedRequest(f"{vendor} cannot be sent {what}")
        form = "(?i)data:|[a-z]{2,9}://" if name else "."  # base64 alone has no type
        if not isinstance(url, str) or not _pattern(form).match(url):
            raise BadRequest(f"{what} has no URL: give a URL or a data URL")
        if url[:5].lower() != "data:":
            found.append(_Part("url", url, cache=cache, detail=detail, name=name))
            continue
        head, _, data = url[5:].partition(",")
        if not head.lower().rstrip().endswith("base64"):
            data = base64.b64encode(unquote_to_bytes(data)).decode()
        media = head.partition(";")[0].strip().lower().replace("image/jpg", "image/jpeg")
        data = "".join(data.split()).replace("-", "+").replace("_", "/")  # the URL-safe alphabet
        found.append(_Part("data", data, media or "image/png", cache, detail, name))
    return found


def _joined(content: Any, vendor: str) -> str:
    """Content that may only be text."""
    parts = _parts(content, vendor)
    if any(part.kind != "text" for part in parts):
        raise UnsupportedRequest(f"{vendor} takes only text in this message")
    return "\n".join(part.data for part in parts)


def _functions(call: _Call, vendor: str) -> list[_Object]:
    """The ``function`` objects of its tools, as they are sent."""
    for at, tool in enumerate(call.tools or ()):
        if (kind := tool.get("type", "function")) != "function":
            what = f"tools[{at}] of the type {kind!r:.40}"
            raise UnsupportedRequest(f"{vendor} cannot be sent {what}")
    return [_function_sent(call, tool["function"]) for tool in call.tools or ()]


def _function_sent(call: _Call, function: Mapping[str, Any]) -> _Object:
    """A function with its name as it is sent. All servers refuse null as parameters: it means none.
    OpenAI insists on the type and the properties of their schema."""
    sent = {**function, "name": call.names.get(function["name"], function["name"])}
    if "schemas" in call.learned or sent.get("parameters", "") is None:
        sent["parameters"] = {**_NO_PARAMETERS, **(sent.get("parameters") or {})}
    return sent


def _choice(call: _Call) -> tuple[str, str | None]:
    """tool_choice as ``(auto | none | required | named, name)``; auto if there is none."""
    choice = call.options.get("tool_choice", "auto")
    if choice in ("auto", "none", "required"):
        return choice, None
    given = _dict(choice)
    name = _dict(given.get("function")).get("name") or given.get("name")
    if isinstance(name, str):
        return "named", call.names.get(name, name)
    form = "{'type': 'function', 'function': {'name': …}}"
    raise BadRequest(f"tool_choice: give auto, none, required or {form}")


def _format(call: _Call) -> tuple[str, _Object]:
    """response_format as ``(text | json_object | json_schema, the schema's object)``."""
    wanted = _dict(call.options.get("response_format") or {"type": "text"})
    kind, schema = _plain(wanted.get("type")), _dict(wanted.get("json_schema"))
    if kind in ("text", "json_object") or (kind == "json_schema" and schema):
        return kind, schema
    form = "{'type': 'text' | 'json_object' | 'json_schema', 'json_schema': {…}}"
    raise BadRequest(f"response_format: give {form}")


def _plain(value: Any) -> Any:
    """The value; of a str that is a member of an Enum the text itself."""
    return str.__str__(value) if isinstance(value, str) else value


def _stops(call: _Call) -> list[str]:
    stop = call.options.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    if isinstance(stops, (list, tuple)) and all(isinstance(text, str) for text in stops):
        return list(stops)
    raise BadRequest("stop: give a str or a list of them")


def _repaired(messages: list[Message]) -> list[Message]:
    """Every tool call answered right after it, in its order and under a distinct id.

    All vendors demand that. A call without a result gets one that says so. A result without its
    call becomes a user's text. An assistant's empty turn is left out: some servers refuse it.
    """
    done: list[Message] = []
    ids: set[str] = set()
    waiting: dict[str, list[int]] = {}  #: ids of the last calls -> places in done of their results
    for message in messages:
        role, content = message["role"], message.get("content")
        if role == "assistant" and not content and isinstance(message.get("refusal"), str):
            content = message["refusal"]
            message = {**message, "content": content}
        if role == "tool":
            if places := waiting.get(message.get("tool_call_id") or ""):
                at = places.pop(0)
                done[at] = {**message, "tool_call_id": done[at]["tool_call_id"]}
            elif isinstance(content, str):
                done.append({"role": "user", "content": f"{_STRAY_RESULT} {content}"})
            else:
                told = {"type": "text", "text": _STRAY_RESULT}
                done.append({"role": "user", "content": [told, *message["content"]]})
        elif calls := message.get("tool_calls"):
            sent = [{**call, "id": _distinct(call.get("id") or "", ids)} for call in calls]
            done.append({**message, "tool_calls": sent})
            pairs = [(old.get("id") or "", new["id"]) for old, new in zip(calls, sent, strict=True)]
            renamed = {old: new for old, new in pairs if old and old != new}
            if renamed and _CARRY in message:  # some servers repeat ids in each turn
                done[-1] = {**done[-1], _CARRY: _with_ids(message[_CARRY], renamed)}
            waiting = {}
            for old, new in pairs:
                waiting.setdefault(old, []).append(len(done))
                done.append({"role": "tool", "content": _NO_RESULT, "tool_call_id": new})
        elif role != "assistant" or (content and (
            isinstance(content, str) or any(part.get("text", "-") for part in content)
        )):
            done.append(message)
    return done or messages


def _with_ids(value: Any, names: Mapping[Any, str], key: str = "") -> Any:
    """A carried part with new ids of its tool calls. ``key``: the one whose value this is."""
    if isinstance(value, dict) and key not in ("input", "args"):
        ids = names if key == "extra" else {}
        return {ids.get(name, name): _with_ids(item, names, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_ids(item, names, key) for item in value]
    return names.get(value, value) if key in ("id", "ids", "call_id") else value


def _distinct(call_id: str, ids: set[str]) -> str:
    """The id, or one made of it that is not among ``ids``; it is added to them."""
    new, numbers = call_id, itertools.count(len(ids))
    while not new or new in ids:
        new = f"{call_id or 'call'}_{next(numbers)}"
    ids.add(new)
    return new


class _Turn:
    """All that one side says in a row, for vendors where user and assistant must alternate."""

    def __init__(self, role: str) -> None:
        self.role = role  #: user | assistant
        self.parts: list[_Part] = []
        self.calls: list[tuple[str, str, _Object]] = []  #: id, name, arguments
        self.results: list[tuple[str, str, list[_Part]]] = []  #: id, name, parts
        self.carry: _Object = {}


def _conversation(call: _Call, vendor: str) -> tuple[list[_Part], list[_Turn]]:
    """The system's parts, and turns that begin with the user, alternate, and end with the user.
    Names of tools are those of ``call.names``, if ``_renamed_tools`` has filled it."""
    system: list[_Part] = []
    turns = [_Turn("user")]
    names: dict[str, str] = {}  #: id of a call -> its tool, as it is sent
    for message in call.messages:
        role, content = message["role"], message.get("content")
        parts, calls = _parts(content, vendor), message.get("tool_calls") or ()
        if message.get("cache_control") and parts:
            parts[-1] = parts[-1]._replace(cache=message["cache_control"])
        if role in ("system", "developer"):
            _joined(content, vendor)  # raises if it is more than text
            system += [part for part in parts if part.data.strip()]
            continue
        if not (parts or calls or role == "tool"):
            continue
        side = "assistant" if role == "assistant" else "user"
        fresh = turns[-1].role != side
        turns += [_Turn(side)] if fresh else []
        turn = turns[-1]
        turn.carry = call.carried(message) if fresh else {}
        if role == "tool":
            turn.results.append((message["tool_call_id"], names[message["tool_call_id"]], parts))
        else:
            turn.parts += parts
        for item in calls:
            own = item["function"]["name"]
            names[item["id"]] = name = call.names.get(own, own)
            arguments = _argument_object(item["function"].get("arguments"))
            turn.calls.append((item["id"], name, arguments))
    turns += [_Turn("user")] if turns[-1].role == "assistant" else []
    for turn in (turns[0], turns[-1]):
        if not turn.parts and not turn.results:
            turn.parts.append(_Part("text", _GO_ON))
    return system, turns


def _safe(text: str, bad: str, most: int) -> str:
    """A name or id without characters that a vendor refuses, distinct from all others."""
    clean = _pattern(bad).sub("_", text)
    if clean == text and 0 < len(text) <= most:
        return text
    return f"{clean[: most - 9]}_{zlib.crc32(text.encode()):08x}"


def _renamed_tools(call: _Call, bad: str, most: int) -> _Call:
    """The call with names of its tools that the vendor accepts: see ``_safe``."""
    items = [*(call.tools or ())]
    for message in call.messages:
        items += message.get("tool_calls") or ()
    names = [_dict(item.get("function")).get("name", "") for item in items]
    return call._replace(names={name: _safe(name, bad, most) for name in names})


def _textual(call: _Call, item: Mapping[str, Any]) -> _Object:
    """A tool call as it is sent, with its arguments as a text: callers may have parsed them.

    What a model wrote wrongly would be refused in every later turn by llama.cpp and vLLM.
    """
    name, arguments = item["function"]["name"], item["function"].get("arguments")
    try:
        valid = isinstance(json.loads(arguments, parse_constant=int), dict)  # no NaN
    except (TypeError, ValueError, RecursionError):
        valid = False
    if not valid:
        arguments = json.dumps(_argument_object(arguments), allow_nan=False)
    function = {**item["function"], "name": call.names.get(name, name), "arguments": arguments}
    return {"type": "function", **item, "function": function}


#: Reads JSON. int() refuses NaN, Infinity and 1e999; strings may hold control characters.
_strictly = json.JSONDecoder(
    strict=False, parse_constant=int,
    parse_float=lambda text: int(text) if math.isinf(float(text)) else float(text),
)


def _parsed(text: str) -> Any:
    """JSON of a tool call; the text itself if it is none."""
    try:
        return _strictly.decode(text.strip())
    except (ValueError, RecursionError):
        return text


def _argument_object(arguments: Any) -> _Object:
    """Arguments for vendors that take only an object; any other value goes under ``_raw``."""
    if isinstance(arguments, dict):
        return arguments
    parsed = _parsed((arguments or "").strip())
    if isinstance(parsed, dict):
        return parsed
    return {} if parsed is None or parsed == "" else {"_raw": arguments}


def _count(usage: Any, *names: str) -> int:
    """The first number of tokens under these names; a wrong one must not cost an answer."""
    for name in names if isinstance(usage, dict) else ():
        count: Any = usage.get(name)
        if type(count) in (int, float) and 0 < count < 2**53:
            return int(count)
    return 0


# -- an answer's bytes, cut into events

#: First bytes of a body that is server-sent events.
_SSE_BEGINS = (b"data:", b"event:", b":", b"id:", b"retry:", b"error:")


class _Lines:
    """Splits a body into lines, without their ends."""

    def __init__(self) -> None:
        self._open: list[bytes] = []  # of a line whose end has not come

    def lines(self, chunk: bytes) -> list[bytes]:
        self._open.append(chunk)
        if b"\n" not in chunk:
            return []
        *whole, rest = b"".join(self._open).replace(b"\r\n", b"\n").split(b"\n")
        self._open = [rest]
        return whole


class _SSE(_Lines):
    """Server-sent events (WHATWG HTML, 9.2.6), as ``(name, data)``."""

    _event = ""

    def __init__(self) -> None:
        super().__init__()
        self._data: list[bytes] = []
        self._plain_json: list[bytes] = []  # lines of JSON without "data:": Gemini's errors

    def feed(self, chunk: bytes) -> list[tuple[str, bytes]]:
        events: list[tuple[str, bytes]] = []
        for line in self.lines(chunk):
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line:
                if self._data:
                    events.append((self._event, b"\n".join(self._data)))
                    self._data.clear()
                self._event = ""
            elif self._plain_json or line.startswith(b"{"):
                self._plain_json.append(line)
                if line.startswith((b"{", b"}")) and line.rstrip().endswith(b"}"):
                    events.append(("", b"\n".join(self._plain_json)))
                    self._plain_json.clear()
            elif line.startswith(b"event:"):
                self._event = line[6:].strip().decode("utf-8", "replace")
            elif line.startswith(b"error:"):  # llama.cpp before 2025
                events.append(("error", line[6:]))
        return events

    def close(self) -> list[tuple[str, bytes]]:
        """The body is over: the last event may have no blank line."""
        return self.feed(b"\n\n")


class _JSONBody(_Lines):
    """A body of JSON: one value, or a piece of an answer in each line."""

    def __init__(self, in_lines: bool) -> None:
        super().__init__()
        self._in_lines = in_lines  # by its label: any line is a piece
        self._in_pieces: bool | None = None  # None: not known yet
        self._kept: list[bytes] = []

    def feed(self, chunk: bytes) -> list[tuple[str, bytes]]:
        lines = [line for line in self.lines(chunk) if line.strip()]
        if self._in_pieces is None:
            lines = list(itertools.dropwhile(_is_heartbeat, lines))
            self._in_pieces = _holds_piece(lines[0], self._in_lines) if lines else None
        if self._in_pieces:
            return [("", line) for line in lines]
        self._kept += lines
        return []

    def rest(self) -> bytes | None:
        """All of it, if it is one value."""
        return None if self._in_pieces else b"\n".join([*self._kept, b"".join(self._open)])

    def close(self) -> list[tuple[str, bytes]]:
        return self.feed(b"\n") if self._in_pieces else []


def _form_of(begun: bytes, label: str) -> _SSE | _JSONBody:
    """What a body is, by its first bytes rather than by its Content-Type."""
    labelled = "event-stream" in label and not begun.startswith((b"{", b"["))
    if labelled or begun.startswith(_SSE_BEGINS):
        return _SSE()
    return _JSONBody(in_lines="ndjson" in label)


#: (text, start) -> (value, end): half the steps of json.loads. Control characters are read.
_scan: Any = json.JSONDecoder(strict=False).scan_once  # type: ignore[attr-defined]


def _is_heartbeat(data: bytes) -> bool:
    """Whether an event can have held nothing: it is empty or one bare word."""
    return _pattern(r"[\w.-]{0,40}").fullmatch(data.strip().decode("latin-1")) is not None


def _holds_piece(line: bytes, labelled: bool) -> bool:
    try:
        value = _json(line, "a line") if len(line) < _READ_SIZE else None
        return labelled or _is_piece(value)
    except InvalidResponse:
        return False


def _is_piece(value: Any) -> bool:
    """Whether a value is a piece of an answer, in Ollama's form or one of OpenAI's."""
    try:
        named = str(value.get("type")).startswith("response.")
        return named or value.get("done") is False or "delta" in value["choices"][0]
    except (AttributeError, LookupError, TypeError):
        return False


def _json(data: bytes | str, what: str) -> Any:
    """Parsed JSON; invalid UTF-8 becomes U+FFFD. InvalidResponse if it is none."""
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    text = text.removeprefix("\ufeff").strip(" \t\r\n")
    value, end = None, -1
    try:
        value, end = _scan(text, 0)
    except (ValueError, RecursionError, StopIteration):
        pass
    if end != len(text):
        raise InvalidResponse(f"{what} is not JSON")
    return value


# -- from events to the answer

_Facts = Iterator[tuple[Any, ...]]  #: what a reader finds in an event; see _Collector
#: Finish reasons of all vendors, in lower case -> ours. "stop" with calls becomes "tool_calls".
_FINISHES = {word: reason for reason, words in {
    "stop": "stop end_turn stop_sequence tool_call tool_calls tool_use function_call eos eos_token"
            " completed complete end",
    "length": "length max_tokens model_length model_context_window_exceeded max_output_tokens"
              " max_length continuation pause_turn",
    "content_filter": "content_filter content_filtered sensitive refusal guardrail_intervened"
                      # Google, in Chat Completions, too
                      " safety recitation language blocklist prohibited_content spii escalation"
                      " image_safety image_prohibited_content image_recitation model_armor"
                      " pup_limited_disabled",
}.items() for word in words.split()}
_REASONS = frozenset({*_FINISHES.values(), "tool_calls"})
#: Finish reasons of an answer that failed or was cut off.
_FAILED = frozenset({
    "error", "abort", "aborted", "network_error", "insufficient_system_resource", "cancelled",
    "canceled", "timeout", "connection_error", "failed", "server_error", "incomplete",
    "interrupted", "upstream_error", "disconnected", "internal_error", "internal_server_error",
    "deadline_exceeded", "user_cancel", "error_limit", "error_toxic",  # the last three: Cohere
    # Google: the model's own failures, whatever text came with them
    "malformed_function_call", "unexpected_tool_call", "malformed_response", "no_image",
    "too_many_tool_calls", "image_other", "missing_thought_signature", "function_call_filter",
})
_PARSE_RATE = 50e6  #: bytes of JSON that are parsed in a second, at least
#: Facts that are passed over behind the finish reason.
_ANSWERING = frozenset({"text", "full", "thought", "call", "arguments", "grow", "stop"})


def _says_failure(body: _Object) -> bool:
    """Whether an object without a key "error" reports one all the same."""
    if "base_resp" in body:  # MiniMax
        return bool(_dict(body["base_resp"]).get("status_code"))
    if str(body.get("type")).startswith("response."):  # "code" may be a program's there
        return False
    number = _int(body.get("code")) or _int(body.get("status_code")) or 0
    kinds = (body.get("object"), body.get("type"), body.get("status"))
    return number >= 400 or "error" in kinds or bool(body.get("errors") or body.get("detail"))


class _InBandError(Exception):
    """An error inside a 200: ``args[0]`` is what it said."""


def _clean(text: Any) -> str:
    """A text with U+FFFD for each half of a surrogate pair; "" for any other value."""
    if not isinstance(text, str):
        return ""
    if text.isascii() or not _pattern("[\ud800-\udfff]").search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _cleaned(value: Any) -> Any:
    """A JSON value whose texts hold no half of a surrogate pair."""
    text = json.dumps(value, ensure_ascii=False)
    whole = _clean(text)
    return value if whole is text else json.loads(whole)


def _error_of_empty(response: LLMResponse, messages: Sequence[Message]) -> ProviderError:
    """What an answer with neither text nor tool call means."""
    error: ProviderError = EmptyResponse("neither text nor tool call")
    if response.finish_reason == "content_filter":
        error = ContentFiltered("refused by a safety system")
    elif response.finish_reason == "length":
        error = EmptyResponse("cut by the token limit before any text", code="length")
    elif messages and messages[-1]["role"] == "tool":
        error.breaker = "neutral"  # some models have nothing to add to the results
    error.model, error.request_id, error.usage = response.model, response.request_id, response.usage
    return error


class _ThinkSplitter:
    """Takes a leading <think>…</think> block out of text that comes in pieces."""

    state = "start"  #: start | thinking | gap | answer
    held = ""  #: what may be the beginning of a tag
    tag = "think"
    opened = False

    def feed(self, text: str) -> tuple[str, str]:
        """(thought, answer) of this piece."""
        text, self.held, thought = self.held + text, "", ""
        opening, closing = f"<{self.tag}>", f"</{self.tag}>"
        if self.state == "start":
            begun = text.lstrip()
            if begun.startswith(opening):
                self.state, text, self.opened = "thinking", begun[len(opening) :], True
            elif opening.startswith(begun) and len(text) < 200:
                self.held = text
                return "", ""
            else:
                self.state = "answer"
        if self.state == "thinking":
            thought, tag, rest = text.partition(closing)
            if not tag:
                keep = max(0, len(text) - len(opening))
                self.held = text[keep:]
                return text[:keep], ""
            self.state, text = "gap", rest
        if self.state == "gap":
            text = text.lstrip()
            self.state = "answer" if text else "gap"
        return thought, text


class _Collector:
    """Collects facts into deltas and one LLMResponse. The facts:

    model name · id text        the model that answers · the provider's id of the request
    text str · thought str      a delta of the answer, of the thinking
    full str                    the whole text, of which deltas may have come
    tag str                     the tag around thinking that stands in front of the text
    call key id name arguments  a tool call, or more of the one that has this key. Key None: more of
                                the last call. Arguments: a str, a dict, or None for none
    arguments key str           more arguments of call `key` (never None); kept until it has begun
    extra key value             what must go back with that call
    open key · closed key       a part has begun, is complete. Without a finish reason an answer
                                with an open part is cut, whatever end marker comes. Calls have the
                                same keys here
    grow name str               a text that must go back with the message, in pieces
    keep name key item needed   an item of a list. All items go back if one is needed. Key None: a
                                new item
    piece name key field str    one field of such an item grows
    item name key field value   a field of such an item that is a list gets one more
    usage dict function         counts, merged into those so far; function(all counts) -> Usage
    refusal                     the model refuses, in words
    alive                       the model generates, without one of the facts above
    choice index                the facts that follow are of this one of several: 0 is taken
    again                       a whole message follows: what has come of its thinking is repeated
    stop reason                 the finish reason as the server says it
    stop None                   the field is there and empty: an end marker completes no answer
    stop ""                     the server has no such field: an end marker completes the answer
    end                         the end marker
    begin                       the answer begins, perhaps once more
    """

    def __init__(self, call: _Call, read: Callable[[Any], _Facts]) -> None:
        self.request_id: str | None = None
        self.usage: Usage | None = None
        self.shows: list[str] | None = None  #: deltas for the reader; None: nobody reads along
        self.check: Callable[..., ProviderError | None] = lambda *_: None  #: is the time over?
        self.most = sys.maxsize  #: bytes of the answer
        self._call, self._read = call, read
        self._begin()

    def _begin(self) -> None:
        self.alive = False  #: a sign of generation has come; ``_events`` sets it back
        self.complete = False  #: the answer has its finish reason
        self.may_go_on = False  #: but more may come: it came with the first piece
        self.ended = False  #: the end marker has come: nothing follows
        self._whole = False  #: the answer came as one value, and not in events
        self._raw: Any = None  #: that value
        self._keeps_rest = False  #: what comes behind the finish reason may be more of the answer
        self._behind: list[tuple[Any, ...]] = []  #: facts behind it
        self._has_many_ends = False  #: several pieces had a finish reason: the last one counts
        self._begun = False  #: events before this one had text or calls
        self._finish: str = "stop"
        self._names_finish = False  #: the server speaks of finish reasons
        self._repeated: list[tuple[Any, ...]] = [(), ()]  #: facts that stand in every event
        self._refused = self._needed = False
        self._passes: set[str] = set()  #: kinds of facts that are not taken now
        self._model = ""
        self._half = ""  #: of a surrogate pair, whose other half may come
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._think = _ThinkSplitter()
        self._calls: list[_Object] = []
        self._by_key: dict[Any, _Object] = {}  #: calls
        self._early: dict[Any, list[str]] = {}  #: arguments of calls that have not begun
        self._open: set[Any] = set()  #: parts whose end has not come
        self._closed: set[Any] = set()  #: parts whose end has come
        self._counts: _Object = {}
        self._grown: dict[str, list[str]] = {}
        self._kept: dict[str, dict[Any, Any]] = {}
        self._pieces: dict[tuple[str, Any, str], list[str]] = {}  #: by name, key and field

    # -- events

    def take(self, name: str, data: bytes) -> None:
        """Take one event. Raises InvalidResponse or _InBandError."""
        if large := len(data) > _READ_SIZE:
            self._weigh(data)
        if data.startswith(b"[DONE]"):
            self.ended = True
            return
        is_error = name in ("error", "exception")
        try:
            body = _json(data, "an event")
        except InvalidResponse:
            lines = data.split(b"\n")
            if len(lines) > 1 and all(line[:1] + line[-1:] in (b"{}", b"[]") for line in lines):
                for line in lines:  # GLM and Kimi may send no blank line between events
                    self.take(name, line)
                return
            if not is_error:
                if self.is_over() or _is_heartbeat(data):
                    return
                raise
            body = data[:_READ_SIZE].decode("utf-8", "replace")
        if is_error and not _dict(body).get("error"):
            raise _InBandError({"error": body})
        self._event(body, large)

    def take_whole(self, text: bytes, what: str) -> None:
        """Take a body of JSON: one value, or a value in each line."""
        self._weigh(text)
        lines = [line.strip() for line in text.split(b"\n") if line.strip()]
        if len(lines) > 1 and all(line[:1] + line[-1:] == b"{}" for line in lines):
            text = b"[" + b",".join(lines) + b"]"
        body = _json(text, what)
        if not isinstance(body, (dict, list)):
            raise InvalidResponse("the answer is no object")
        # a list holds the events of a stream; one event is no whole answer either
        self._whole = not body or (isinstance(body, dict) and not _is_piece(body))
        if self._whole:
            self._raw = _cleaned(body) if b"\\ud" in text.lower() else body
        self._event(body, True)

    def _weigh(self, data: bytes) -> None:
        """Refuse a large text if parsing it would take too much memory or time."""
        if len(data) >= 1 << 19:
            weights = {b"{": 184, b"[": 64, b'"': 30, b",": 36}
            memory = sum(data.count(mark) * weight for mark, weight in weights.items())
            if memory > min(16 * len(data), 7 * max(self.most, 1 << 20)):
                raise InvalidResponse("the answer has too many values to read", code="too_large")
        if late := self.check(len(data) / _PARSE_RATE):
            raise late

    def _event(self, body: Any, large: bool) -> None:
        if type(body) is not dict:
            if isinstance(body, str) and body and not self.is_over():
                raise InvalidResponse("an event is a text")
            for item in body if isinstance(body, list) else ():  # as from Gemini without alt=sse
                if late := self.check():
                    raise late
                self._event(item, large)
            return
        goes_on = not self.complete or self._has_many_ends
        empty = goes_on and (not body.get("choices") or "base_resp" in body)
        if body.get("error") or (empty and _says_failure(body)):
            raise _InBandError(body)
        self._passes, self._begun = set(), bool(self._text or self._calls)
        try:
            for fact in self._watched(body) if large else self._read(body):
                kind = fact[0]
                if kind in self._passes:
                    continue
                if kind == "text" and not self.complete:
                    self._take_text(fact[1])  # as most of them
                elif self.complete and kind in _ANSWERING:
                    self._take_behind(fact)
                elif fact not in self._repeated:
                    _TAKERS[kind](self, *fact[1:])
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            if not self.is_over():  # what follows a whole answer cannot spoil it
                what = f"the answer has not the form that it should have ({type(error).__name__})"
                raise InvalidResponse(what) from None

    def _watched(self, body: Any) -> _Facts:
        """The facts of a large event, with a look at the clock from time to time."""
        for at, fact in enumerate(self._read(body), 1):
            yield fact
            if not at % 256 and (late := self.check()):
                raise late

    def _take_behind(self, fact: tuple[Any, ...]) -> None:
        """A fact behind the finish reason. Some servers send a finish reason with every piece: it
        counts if one more follows, unless it all repeats what had come (a proxy sends it twice)."""
        is_stop = fact[0] == "stop"
        if not self._keeps_rest or not any(fact[1:]) or (is_stop and not self._has_rest()):
            return
        self._behind.append(fact)
        if is_stop and (self._has_many_ends or not self._repeats()):
            facts, self._behind = self._behind, []
            self.may_go_on = self._has_many_ends = True
            for one in facts:
                _TAKERS[one[0]](self, *one[1:])

    def _repeats(self) -> bool:
        """Whether what has come since the last finish reason had come before."""
        before = itertools.islice(reversed(self._behind), 1, None)
        facts = [*itertools.takewhile(lambda one: one[0] != "stop", before)][::-1]
        said = "".join(one[1] for one in facts if one[0] == "text").strip()
        calls = [f"{one[3] or ''}{one[4] or ''}" for one in facts if one[0] == "call"]
        known = [call["name"] + "".join(call["pieces"]) for call in self._calls]
        same = said in ("", self.text.strip()) and "".join(calls) in ("", *known)
        return (same and bool(said or calls)) or any(one[0] == "full" for one in facts)

    # -- facts

    def _take_model(self, name: Any) -> None:
        if name and isinstance(name, str):
            self._model = name
        self._repeated[0] = ("model", name)

    def _take_id(self, request_id: Any) -> None:
        if not self.request_id and isinstance(request_id, str):
            self.request_id = request_id

    def _take_text(self, text: str | None) -> None:
        if not text:
            return
        self.alive = True
        if self._half or not text.isascii():
            text = self._half + text
            self._half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
            text = _clean(text.removesuffix(self._half))
        if self._think.state != "answer":
            thought, text = self._think.feed(text)
            if thought and not self._grown:  # MiniMax may send it in a field of its own, too
                self._take_thought(thought)
            if not text:
                return
        self._text.append(text)
        if self.shows is not None:
            self.shows.append(text)

    def _take_full(self, text: str) -> None:
        come = self.text
        if text.startswith(come):
            self._take_text(text[len(come) :])
        elif text and not text.endswith(come):  # a think block stood before it
            raise InvalidResponse("the answer contradicts its own deltas")

    def _take_thought(self, text: Any) -> None:
        if isinstance(text, str) and text:
            self.alive = True
            self._reasoning.append(text)
            if self.shows is not None and self._call.thoughts:
                self.shows.append(Thought(_clean(text)))

    def _take_tag(self, tag: str) -> None:
        self._think.tag = tag

    def _take_call(self, key: Any, call_id: Any, name: Any, arguments: Any) -> None:
        call_id, name = _clean(call_id), _clean(name)
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments)
        arguments = "" if arguments is None else "" + arguments  # TypeError if it is no text
        call = self._by_key.get(key)
        if key is None and self._calls and not (name and self._calls[-1]["name"]):
            call = self._by_key.get(("id", call_id), self._calls[-1])
        if call is None or (name and call["name"] and self._is_another(call, call_id, name)):
            call = {"id": "", "name": "", "pieces": self._early.pop(key, []), "size": 0, "key": key}
            self._calls.append(call)
        if call_id:
            self._by_key["id", call_id] = call
        if key is not None:
            self._by_key[key] = call
        call["id"] = call["id"] or call_id
        call["name"] += name if name != call["name"] else ""
        call["pieces"] += [arguments] if arguments else []
        call["size"] += len(arguments)
        self.alive = True

    def _is_another(self, call: _Object, call_id: str, name: str) -> bool:
        """Whether a piece with a name begins a new call, although ``call`` has its key."""
        other = bool(call_id and call["id"] and call_id != call["id"])
        if other and call["key"] in self._closed:
            return True
        if name == call["name"]:
            whole = other and call["size"] < _READ_SIZE  # this may be looked at in every event
            return whole and isinstance(_parsed("".join(call["pieces"])), dict)
        own = {_dict(tool.get("function")).get("name", "") for tool in self._call.tools or ()}
        known = {self._call.names.get(one, one) for one in own}
        return name in known or call["name"] + name not in known

    def _take_arguments(self, key: Any, text: str) -> None:
        self.alive = True
        call = self._by_key.get(key)
        pieces = call["pieces"] if call else self._early.setdefault(key, [])
        pieces.append("" + text)  # TypeError if it is no text

    def _take_extra(self, key: Any, value: Any) -> None:
        call = self._calls[-1] if key is None else self._by_key.get(key)
        if value and call:
            call["extra"], self._needed = value, True

    def _take_open(self, key: Any) -> None:
        self._open.add(key)

    def _take_closed(self, key: Any) -> None:
        self._open.discard(key)
        self._closed.add(key)

    def _take_grow(self, name: str, text: Any) -> None:
        if isinstance(text, str):
            self._grown.setdefault(name, []).append(text)
            self._needed = self.alive = True

    def _take_keep(self, name: str, key: Any, item: Any, needed: bool) -> None:
        self.alive, self._needed = True, self._needed or needed
        items = self._kept.setdefault(name, {})
        items[len(items) if key is None else key] = item
        if 700 * len(items) > 7 * max(self.most, 1 << 20):  # bytes of a small object and its copy
            raise InvalidResponse("the answer has too many values to read", code="too_large")

    def _take_piece(self, name: str, key: Any, field_name: str, text: str) -> None:
        begun = self._kept[name][key].get(field_name)
        begun = begun if isinstance(begun, str) else ""
        pieces = self._pieces.setdefault((name, key, field_name), [begun])
        pieces.append("" + text)  # TypeError if it is no text

    def _take_item(self, name: str, key: Any, field_name: str, value: Any) -> None:
        kept = self._kept[name][key]
        kept[field_name] = kept.get(field_name) or []
        kept[field_name].append(value)

    def _take_usage(self, counts: Any, read: Callable[[_Object], Usage]) -> None:
        if isinstance(counts, dict):
            for name, value in counts.items():
                known = self._counts.get(name)
                if isinstance(value, dict):  # its details: a null takes nothing back
                    value = {**_dict(known), **{kind: n for kind, n in value.items() if n}}
                self._counts[name] = value or known
            self.usage = read(self._counts)

    def _take_refusal(self) -> None:
        self._refused = self.alive = True

    def _take_alive(self) -> None:
        self.alive = True

    def _take_choice(self, index: Any) -> None:
        self._passes = _TAKERS.keys() - {"choice", "model"} if index != 0 else set()

    def _take_again(self) -> None:
        come = {"thought": self._reasoning, "grow": self._grown, "keep": self._kept}
        self._passes = {kind for kind in come if come[kind] and self._begun}

    def _take_stop(self, reason: Any) -> None:
        self._names_finish = self._names_finish or reason != ""
        if not reason:  # as in most events
            self._repeated[1] = ("stop", reason)
            return
        word = reason.lower().partition(":")[0]  # Google: "content_filter: RECITATION"
        if word in _FAILED:
            raise InvalidResponse(f"the answer failed or was cut off: {word}", code=word)
        if word.endswith("_error"):  # Portkey: the type of an error that broke the stream
            raise _InBandError({"error": {"type": word, "message": f"the answer ended: {word}"}})
        if word not in ("null", "none"):
            self.may_go_on = self.may_go_on or not self._begun
            self._finish = _FINISHES[word] if word in _FINISHES else reason[:40]
            pieces = len(self._text) + sum(len(call["pieces"]) or 1 for call in self._calls)
            early = pieces < 2 or self.may_go_on
            self._keeps_rest = early and self._finish in ("stop", "tool_calls")
            self.complete = True

    def _take_end(self) -> None:
        self.ended = True

    def _take_begin(self) -> None:
        """A proxy may ask its server again in the middle of an answer."""
        if self._text or self._calls or self._reasoning:
            if self.shows is not None and (self._text or self._call.thoughts):
                raise InvalidResponse("the answer began a second time")
            self._begin()

    # -- the answer

    def is_over(self) -> bool:
        """Whether nothing can be missing: a finish reason has come, and it is not one of many."""
        return self.complete and not self._has_many_ends

    def _has_rest(self) -> bool:
        """Whether something has come behind the last finish reason."""
        return bool(self._behind) and self._behind[-1][0] != "stop"

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._text)

    def texts(self) -> list[str]:
        """All that the model has said so far."""
        calls = ("".join(call["pieces"]) for call in self._calls)
        return [self.text, "".join(self._reasoning), *calls]

    def response(self) -> LLMResponse:
        """The answer. Raises InvalidResponse if it is cut, ContentFiltered, EmptyResponse."""
        by_marker = self.ended and not self._names_finish  # a server without finish reasons
        cut = self._has_many_ends and self._has_rest()
        if cut or (not self.complete and (self._open or not (self._whole or by_marker))):
            raise InvalidResponse("truncated: neither a finish reason nor an end marker")
        finish = self._finish
        texts = self._reasoning if self._think.state == "thinking" else self._text
        texts.append(self._think.held)
        self._text.append("\ufffd" if self._half else "")
        calls = self._tool_calls() if self._calls else []
        if finish == "stop" and calls:
            finish = "tool_calls"
        text = "".join(self._text)
        if "</think>" in text and self.shows is None and not self._think.opened:
            text = self._without_thoughts(text)
        reasoning = _clean("".join(self._reasoning)).strip() if self._reasoning else ""
        if self._refused and not text and not calls:
            finish = "content_filter"
        response = LLMResponse(
            text or None, calls, finish, self.usage or _NO_USAGE,
            self._model or self._call.model or "",
            reasoning=reasoning or None,
            request_id=self.request_id,
            carry=self._carry(text, calls) if self._needed else None,
            raw=self._raw,
        )
        if not calls and not text.strip():
            raise _error_of_empty(response, self._call.messages)
        return response

    def _without_thoughts(self, text: str) -> str:
        """The text behind a </think> whose opening tag stood in the prompt."""
        thought, _, rest = text.partition("</think>")
        if thought.endswith(("`", "'", '"')) or "<think>" in thought:
            return text  # it is spoken of
        self._reasoning.append(thought)
        return rest.lstrip()

    def _carry(self, text: str, calls: list[ToolCall]) -> Any:
        """What the same provider and model get back, if text and ids are unchanged by then."""
        for (name, key, field_name), texts in self._pieces.items():
            self._kept[name][key][field_name] = "".join(texts)
        kept: _Object = {name: "".join(texts) for name, texts in self._grown.items()}
        kept |= {name: list(items.values()) for name, items in self._kept.items()}
        pairs = zip(calls, self._calls, strict=True)
        if extra := {call.id: found["extra"] for call, found in pairs if "extra" in found}:
            kept["extra"] = extra
        ids = [call.id for call in calls]
        return _cleaned({**kept, "text": text or None, "ids": ids, "for": self._call.identity})

    def _tool_calls(self) -> list[ToolCall]:
        cut = self._finish not in ("stop", "tool_calls") or self._has_rest()
        given = [call for call in self._calls if call["name"] or "".join(call["pieces"]).strip()]
        self._calls = given
        earlier = sum(len(message.get("tool_calls") or ()) for message in self._call.messages)
        own_names = {sent: own for own, sent in self._call.names.items()}
        found: list[ToolCall] = []
        ids: set[str] = set()
        for at, call in enumerate(given):
            if not call["name"]:
                raise InvalidResponse("a tool call has no name")
            name = own_names.get(call["name"]) or call["name"]
            arguments, raw = self._arguments(call["pieces"], name)
            if not raw.strip() and (call["key"] in self._open or (cut and call is given[-1])):
                arguments = None
            call_id = call["id"] or f"call_{earlier + at}"
            call_id = f"{call_id}_{at}" if call_id in ids else call_id
            ids.add(call_id)
            found.append(ToolCall(call_id, name, arguments, raw))
        return found

    def _arguments(self, pieces: list[str], name: str) -> tuple[_Object | None, str]:
        """The arguments as an object, None if the model wrote no object; and their text.

        Some servers send them behind an empty {}, twice, as growing snapshots, or encoded twice.
        """
        text = _clean("".join(pieces))
        if not text.strip():
            return {}, text
        readings, half = [text], text[: len(text) // 2]
        if pieces[0].strip() == "{}":
            readings.append("".join(pieces[1:]))
        if all(later.startswith(piece) for piece, later in itertools.pairwise(pieces)):
            readings.append(pieces[-1])
        if half * 2 == text:
            readings.append(half)
        for reading in readings:
            value = _parsed(reading)
            if isinstance(value, str) and value != reading:
                reading, value = value, _parsed(value)
            if isinstance(value, dict):
                return _cleaned(value), _clean(reading)
        tools = (_dict(tool.get("function")) for tool in self._call.tools or ())
        schemas = [_dict(tool.get("parameters")) for tool in tools if tool.get("name") == name]
        optional = text.strip() == "null" and not any(schema.get("required") for schema in schemas)
        return ({} if optional else None), text


#: By the kind of a fact, what takes it.
_TAKERS = {name[6:]: taker for name, taker in vars(_Collector).items() if name[:6] == "_take_"}


# ==== HTTP provider ===============================================================================

_ERROR_SIZE = 256 * 1024  #: bytes of a failed answer that are read for its message
#: Statuses of a server that has no time: they say nothing about the fields of a request.
_BUSY = (408, 409, 425, 429, 503, 529)
#: What is shown of a Content-Type: a server may echo a key in any header.
_MEDIA_TYPE = r"(text|application|image)/[a-z-]{1,15}"
#: What the name of a model may be: with spaces only if it is the name of a file.
_NAME = (
    r"[^\s\x00-\x1f\x7f\ud800-\udfff]{0,200}|"
    r"[^\x00-\x1f\x7f\ud800-\udfff]{0,200}\.[a-z]{2,5}"
)
#: The answers that are being read, by the ids of their collectors. The garbage collector might
#: otherwise find the socket of a forgotten stream before the stream that closes it.
_open_answers: dict[int, _Answer] = {}
#: What servers call our options and fields when they complain, if it is another name.
_COMPLAINTS = {
    "top_p": "top_?p",
    "presence_penalty": "presence_?penalty|penalty",
    "frequency_penalty": "frequency_?penalty|penalty",
    "reasoning_effort": r"reasoning_?effort|reasoning\.effort|output_config(?:\.effort)?|effort|"
    r"thinking[\w.]{0,40}|think",
    "parallel_tool_calls": "parallel_tool_calls|disable_parallel_tool_use",
    "user": r"user|metadata(?:\.user_id)?|safety_identifier",
    "stream": "stream(?:ing)?",  # OpenAI: only for organizations that are verified
}
#: What servers say of thinking that goes back to them (Groq of a field that it sends itself).
_REFUSES_CARRY = (
    r"(?i)messages?\b.{0,200}\breasoning(_(?!effort)\w+)?\b.{0,60}"
    r"(unsupported|not supported|not permitted)|"
    r"encrypted content .{0,120}could not be|invalid .?signature"
)
#: An error about a value: with another one the field may be taken.
_OF_VALUE = r"(?i)\bvalues?\b|\bonly\b|must be|between|at (?:most|least)|less than|greater than"
_REFUSES = (
    r"(?i)unsupported|not supported|does(?:n't| not) support|unrecognized|not permitted|deprecated|"
    r"unknown (?:name|field|parameter|argument)|extra (?:inputs|fields)|not allowed|"
    r"unexpected (?:field|keyword|parameter)|cannot (?:both )?be (?:set|used|specified)|"
    r"invalid .{1,40}: only|only .{1,40} (?:is|are) (?:allowed|supported)|may only be|not enabled|"
    r"must be (?:1|unset|one of)\b|or unset|input should be|unused fields?\b|only works in"
)
#: An error that lists fields, each of which is refused.
_LISTS = (
    r"(?i)(?:unused|unknown|unrecognized|unsupported|extra|support) (?:fields|parameters|arguments)"
)


def _credentials(url: str) -> list[str]:
    """The name and password of a URL as Basic authentication sends them, and the password."""
    import base64
    from urllib.parse import unquote

    found = re.match(r"[^/]*//([^/?#]*)@", url.strip())
    user = unquote(found[1]) if found else ""
    return [base64.b64encode(user.encode()).decode(), *user.split(":", 1)[1:]] if found else []


def _with_words(secrets: Sequence[str]) -> tuple[str, ...]:
    """The secrets and their longer words: a message may repeat only one word of a header."""
    words = (word for text in secrets for word in re.split(r"[\s=;,]+", text) if len(word) > 7)
    return (*secrets, *words)


def _added_secrets(asked: Any, session: Any, headers: Mapping[str, str]) -> tuple[str, ...]:
    """What a user's session has put into a request, which may be a key."""
    from urllib.parse import parse_qsl, urlsplit

    sent = [text for text in map(str, asked.headers.values()) if text not in headers.values()]
    sent += [value for _, value in parse_qsl(urlsplit(asked.url).query)]
    auth = getattr(session, "auth", None)
    found = auth if isinstance(auth, tuple) else [getattr(auth, "password", "")]
    return _with_words([*sent, *map(str, found)])


class _Fix(NamedTuple):
    """A change of the requests to a model that refuses a field."""

    name: str  #: an option, or what ``_prepare`` looks up in ``call.learned``
    value: Any = None  #: what is sent instead; None: nothing
    refused: tuple[Any, ...] = ()  #: the values that are refused; (): any value

    def change(self) -> str:
        return "drop" if self.value is None else "replace"


class _HTTPProvider(LLMProvider):
    """What all HTTP providers share. A vendor's class adds names, addresses and ``_prepare``."""

    _vendor: ClassVar[str]  #: its name in messages and in `identity`
    _default_url: ClassVar[str]
    _api_path: ClassVar[str] = ""  #: added to a base URL without a path: the version
    _cut_paths: ClassVar[tuple[str, ...]] = ()  #: ends that people copy along; cut in this order
    _ping_path: ClassVar[str] = "/models"
    _key_variables: ClassVar[tuple[str, ...]]
    _url_variable: ClassVar[str] = ""
    _key_hosts: ClassVar[tuple[str, ...]]  #: where its key may go; .x.com: x.com and hosts below
    _first_token: ClassVar[float] = 12.0  #: seconds
    _rows: ClassVar[_Rows] = _Rows()
    _wants_model: bool = True  #: a call without a model is a mistake

    def __init__(
        self, api_key: str | Callable[[], str] | None = None, base_url: str | None = None, *,
        headers: Mapping[str, str] | None = None, connect_timeout: float = 5.0,
        first_token_timeout: float | None = None, stall_timeout: float = 20.0,
        max_response_bytes: int = 32 * 1024 * 1024, stream_upstream: bool = True,
        session: requests.Session | None = None, **unknown: Any,
    ) -> None:
        for name in unknown:
            near = _near(name, inspect.signature(_HTTPProvider).parameters)
            raise TypeError(f"{type(self).__name__} has no argument {name!r}.{near}")
        if headers is not None and not isinstance(headers, Mapping):
            raise ConfigError(f"headers is a {_kind(headers)}: give a dict")
        if session is not None and not hasattr(session, "prepare_request"):
            raise ConfigError(f"session is a {_kind(session)}: give a requests.Session")
        if first_token_timeout is None:  # a whole answer shows no sign of life before its end
            first_token_timeout = self._first_token if stream_upstream else math.inf
        most = _number(max_response_bytes, "max_response_bytes", least=1, whole=True)
        self.connect_timeout = _number(connect_timeout, "connect_timeout")
        self.first_token_timeout = _number(first_token_timeout, "first_token_timeout")
        self.stall_timeout = _number(stall_timeout, "stall_timeout")
        self.max_response_bytes = most
        self.stream_upstream = stream_upstream
        if base_url is None:
            base_url = self._from_environment(os.environ)[1] or self._default_url
        self.base_url = self._full_url(base_url)
        self._query = base_url.strip().partition("?")[2]
        self._host = _host_of(self.base_url)
        self._key = self._checked_key(api_key)
        self._own_headers = {
            _header_name(name): _sendable(text, f"headers[{name!r}]")
            for name, text in (headers or {}).items()
        }
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
            "Accept-Encoding": "identity",  # compression would only delay the first token
            "User-Agent": f"copilot-router/{__version__}",
        }
        if credentials := _credentials(base_url):
            self._headers["Authorization"] = f"Basic {credentials[0]}"
        secrets = re.findall(r"(?i)(?:^|&)(?![^=&]*version)[^=&]*=([^&]+)", self._query)
        #: what no message may show
        self._secrets = _with_words((*secrets, *credentials, *self._own_headers.values()))
        if isinstance(self._key, str):
            self._headers = self._with_key(self._key)
        self._learned: dict[str | None, Mapping[str, _Fix]] = {}  # by model; replaced, not changed
        self._requests, self._new_session = _http()
        self._session: Any = session
        self._own_session = session is None
        self._proxies = {"no_proxy": self._host} if _network_of(self._host) == "local" else {}
        self._settings: dict[str, Any] = {}
        self._lock = threading.RLock()  # a signal's handler may call close()
        _renewed_after_fork.add(self)

    # -- keys and addresses

    @classmethod
    def _from_environment(cls, environ: Mapping[str, str]) -> tuple[str, str]:
        """The key and the base URL that an environment names, "" for neither."""
        keys = (environ[name] for name in cls._key_variables if environ.get(name, "").strip())
        return next(keys, ""), environ.get(cls._url_variable, "")

    def _checked_key(self, key: Any) -> str | Callable[[], str]:
        """The key, or its function. A key of the environment goes to its vendor only."""
        where, variable, host = type(self).__name__, self._key_variables[0], self._host
        warning = ""
        own = any(f".{host}".endswith(e) if e[0] == "." else host == e for e in self._key_hosts)
        if key is None:
            key, url = self._from_environment(os.environ)
            if key and not own and host != (url and _host_of(self._full_url(url))):
                warning = f"does not send {variable} to {host}: pass api_key= ('' sends none)"
                key = ""
        if callable(key):
            return key  # type: ignore[no-any-return]
        text = _sendable(key, f"{where}(api_key)")
        if "://" in text:
            raise ConfigError(f"{where}(api_key) is an address: give it as base_url=")
        if not text and self._default_url.startswith("https") and own:
            warning = f"has no key: set {variable} or pass api_key="
        if text and self.base_url.startswith("http:") and _network_of(host) == "public":
            warning = f"sends its key unencrypted to {host}: use https"
        if warning:
            _warn(f"{where} {warning}")
        return text

    def _full_url(self, url: str) -> str:
        """The address, with the API's path if it has none, without name, password and query."""
        from urllib.parse import urlsplit

        if not isinstance(url, str) or not _host_of(url.strip()):
            example = self._default_url + self._api_path
            if isinstance(url, str):  # without what may be a password or a key
                url = ("***@" if "@" in url else "") + url.rpartition("@")[2].partition("?")[0]
                example = f"http://{url}" if re.fullmatch(r"[\w.-]+:\d{1,5}\S*", url) else example
            told = f"give a URL with its scheme, such as {example}"
            raise ConfigError(f"{type(self).__name__}(base_url)={url!r}: {told}")
        scheme, place, path, *_ = urlsplit(url.strip())
        path = path.rstrip("/")
        for end in self._cut_paths:
            path = path.removesuffix(end).rstrip("/")
        return f"{scheme}://{place.rpartition('@')[2]}{path or self._api_path}"

    def _asked_key(self, ask: Callable[[], str]) -> str:
        """A key that a function returns. What that raises counts as an AuthenticationError."""
        try:
            return _sendable(ask(), f"{type(self).__name__}(api_key)")
        except Exception as error:
            if _is_task_limit(error):
                raise
            _log.warning("the api_key function failed: %s", _ascii(_raised_at(error)))
            told = f"the api_key function raised {type(error).__name__}"
        raise AuthenticationError(told, provider=self._vendor)

    def _with_key(self, key: str) -> dict[str, str]:
        """All headers of a request."""
        return {**self._headers, **self._auth_headers(key), **self._own_headers}

    # -- a vendor's own part

    def _auth_headers(self, key: str) -> dict[str, str]:
        """The headers that carry the key; "": there is none."""
        return {"Authorization": f"Bearer {key}"} if key else {}

    @abstractmethod
    def _prepare(self, call: _Call, streaming: bool) -> tuple[str, dict[str, Any], _Collector]:
        """The path behind ``base_url``, such as /chat, the body and the collector. Pure. It raises
        UnsupportedRequest and BadRequest; TypeError and ValueError become BadRequest."""

    # -- the interface

    def chat(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> LLMResponse:
        """One whole answer. ``messages``: OpenAI form or a str. An unknown option is a TypeError.

        ``timeout``, ``first_token_timeout``, ``stall_timeout`` (seconds) limit it. Raises
        ProviderError classes.
        """
        kwargs.pop("thoughts", None)
        try:
            return _drained(self._deltas(messages, tools, model, kwargs, shown=False))
        except BaseException as error:
            del messages, tools, kwargs
            raise _bare(error)  # noqa: B904 - it is the same error

    def stream(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> Generator[str, None, LLMResponse]:
        """Yields deltas of text as they come, returns the whole answer. Arguments: see ``chat()``.

        Time that the caller takes between deltas counts towards ``timeout``, never as the server's
        silence. ``thoughts=True`` also yields the model's thinking, as deltas of class Thought.
        """
        return _sealed(self._deltas(messages, tools, model, kwargs, shown=True))

    def ping(self, timeout: float = 5.0) -> None:
        """Lists the models: cheap, free, and proof of address and key (not of quota)."""
        deadline = time.monotonic() + _number(timeout, "timeout")
        limits = _Limits(deadline, self.connect_timeout, (timeout, timeout), (timeout, timeout))
        try:
            with contextlib.closing(self._send("GET", self._ping_path, b"", limits)) as answer:
                if answer.status >= 300:
                    raise self._failure(answer, _Call([], None, None, {}))[0]
                _json(answer.body(), "the list of models")
        except BaseException as error:
            raise _bare(error)  # noqa: B904 - it is the same error

    def close(self) -> None:
        """Close idle connections; the provider stays usable. A user's session stays open."""
        if self._own_session:
            with self._lock:
                session, self._session = self._session, None
            if session is not None:
                session.close()

    def _renew_after_fork(self) -> None:
        self._lock = threading.RLock()
        if self._own_session:
            self._session = None  # its sockets are the parent's
            return
        for adapter in getattr(self._session, "adapters", {}).values():
            if isinstance(adapter, self._requests.adapters.HTTPAdapter):  # its sockets, too
                for manager in (adapter.poolmanager, *adapter.proxy_manager.values()):
                    manager.pools = type(manager.pools)(10)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.base_url}>"

    # -- one request

    def _deltas(
        self, messages: Any, tools: Any, model: Any, kwargs: dict[str, Any], shown: bool
    ) -> Generator[str, None, LLMResponse]:
        """One answer, with one corrected resend for each refused field. ``shown``: yield deltas."""
        asked = self._checked_call(messages, tools, model, kwargs)
        own = (self.first_token_timeout, self.stall_timeout)
        silence = tuple(map(_seconds, [kwargs] * 2, _TIME_LIMITS[1:], own))
        deadline = time.monotonic() + _seconds(kwargs, "timeout", math.inf)
        shared_until = time.monotonic() + kwargs.get("_shared", math.inf)
        fixed: list[str] = []  #: fields that were corrected for this request
        last: Any = ()  #: path, body and error of the last request
        while True:
            call = self._corrected(asked) if model in self._learned else asked
            streaming = self.stream_upstream and "stream" not in call.learned
            path, body, collector = self._written(call, streaming)
            if last[:2] == (path, body):  # the correction changes nothing
                self._forget(model, fixed)
                raise last[2]
            collector.shows = [] if shown else None
            limits = _Limits(deadline, self.connect_timeout, silence, own)
            limits.shared_until = shared_until
            if self.stream_upstream and not streaming:  # this model only gives whole answers
                first = max(limits.silence, (deadline - limits.since) / 2)
                limits.silence = limits.blamed_after = first
            status, key = None, id(collector)
            try:
                answer = self._send("POST", path, body, limits)
                status = answer.status
                _open_answers[key] = answer
                try:
                    if 200 <= status < 300:
                        return (yield from self._read(answer, call, collector))
                    error, report, words = self._failure(answer, call)
                finally:
                    del _open_answers[key]  # first: a signal's handler may raise in any call
                    answer.close()
            except ProviderError as failure:
                failure.model = failure.model or model or ""
                failure.provider = failure.provider or self._vendor
                failure.status = failure.status or status
                raise
            fix = self._correction(report, words, status, call)
            if not fix or fix.name in fixed or (fix.name, fix.value) in call.learned.items():
                if fixed and status not in _BUSY:
                    self._forget(model, fixed)  # nothing shows that they help
                raise error
            last = path, body, error
            fixed.append(fix.name)
            self._learn(fix, asked, words.find(_OF_VALUE) or "unsupported_value" in report.codes)
            if tell := kwargs.get("on_resend"):
                tell({"field": fix.name, "change": fix.change()})

    def _checked_call(self, messages: Any, tools: Any, model: Any, kwargs: dict[str, Any]) -> _Call:
        options: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name in _OPTIONS:
                given = value is not None and (name != "stop" or value not in ("", [], ()))
                options |= {name: _plain(value)} if given else {}
            elif name not in (*_TIME_LIMITS, "on_resend", "thoughts", "_shared"):
                near = _near(name, (*_OPTIONS, *_TIME_LIMITS))
                told = f"unknown option {name!r} for {type(self).__name__}.{near}"
                raise _UnknownOption(f"{told} Fields of one vendor go into extra_body={{}}")
        if model is not None and not isinstance(model, str):
            raise ConfigError(f"model={model!r:.60}: give a name, or None")
        if model is None and self._wants_model:
            raise ConfigError(f"{self!r} needs a model: give the tier models=[...] or pass model=")
        return _Call(
            _repaired(_checked_messages(messages)), _checked_tools(tools) if tools else None,
            model, options,
            identity=f"{self._vendor} {self.base_url} {model or ''}",
            token_limit=options.get("max_completion_tokens", options.get("max_tokens")),
            thoughts=bool(kwargs.get("thoughts")),
        )

    def _written(self, call: _Call, streaming: bool) -> tuple[str, bytes, _Collector]:
        """Path, body and collector. BadRequest if the request cannot be written as JSON."""
        try:
            path, body, collector = self._prepare(call, streaming)
            data = json.dumps(body, allow_nan=False, separators=(",", ":"), default=_as_dict)
            if "\\ud" in data:  # characters beyond the first 65,536: none of them may be a half
                json.dumps(body, ensure_ascii=False, default=_as_dict).encode()
            return path, data.encode("ascii"), collector
        except (TypeError, ValueError, RecursionError) as error:
            what = str(error) if type(error) is TypeError else "half a character, NaN or a cycle"
        raise BadRequest(f"the request cannot be written as JSON: {what}", provider=self._vendor)

    def _send(self, method: str, path: str, body: bytes, limits: _Limits) -> _Answer:
        """The answer's headers. A kept connection that turns out closed is replaced, once."""
        mark = "" if not self._query else "&" if "?" in path else "?"
        url = f"{self.base_url}{path}{mark}{self._query}"
        key, headers = self._key, self._headers
        if not isinstance(key, str):
            key = self._asked_key(key)
            headers = self._with_key(key)
            limits.begin()
        _sending.limits = limits
        while True:
            try:
                _sending.under_way = True
                response = self._dispatch(method, url, body, headers, limits)
                answer = _Answer(response, limits, self.max_response_bytes)
                answer.secrets = (*self._secrets, key)
                if not self._own_session:
                    answer.secrets += _added_secrets(response.request, self._session, headers)
                if answer.status != 408 or limits.fresh or not limits.reused:
                    return answer
                answer.close()
                failure: ProviderError = ServerError("the kept connection was idle for too long")
            except Exception as error:
                if _passes_through(error) and not isinstance(error, RecursionError):
                    raise
                failure = _transport_error(error, limits, "connecting")
                _bare(error)  # urllib3's frames hold the pool, and so idle connections
            finally:
                _sending.under_way = False
            if limits.fresh or not limits.reused or not isinstance(failure, ServerError):
                failure.provider = self._vendor
                raise failure  # outside the handler: what requests raised holds headers and body
            limits.fresh = True

    def _dispatch(
        self, method: str, url: str, body: bytes, headers: dict[str, str], limits: _Limits
    ) -> Any:
        session = self._session  # read once: close() may take it away at any moment
        if session is None:
            session = self._open_session(url)
        if not self._own_session:  # its sockets are not limited
            limits.connecting = True
            connect, limits.connecting = limits.left(), False
            try:
                return session.request(
                    method, url, headers={**headers}, data=body or None, stream=True,
                    auth=session.auth or (lambda prepared: prepared),  # or .netrc replaces the key
                    timeout=(connect, limits.left()),
                    allow_redirects=False, proxies=self._proxies,
                )
            except self._requests.HTTPError as error:  # a hook may call raise_for_status()
                if error.response is None:
                    raise
                return error.response
        prepared = self._requests.PreparedRequest()
        prepared.method, prepared.url, prepared.body = method, url, body or None
        prepared.headers = self._requests.structures.CaseInsensitiveDict(headers)
        prepared.headers["Content-Length"] = str(len(body))
        return session.send(prepared, timeout=None, allow_redirects=False, **self._settings)

    def _open_session(self, url: str) -> Any:
        """A session, with the environment's settings looked up once instead of at every call."""
        with self._lock:
            if self._session is None:
                session = self._new_session()
                proxies = {**self._proxies}  # requests adds the environment's to it
                settings = session.merge_environment_settings(url, proxies, True, None, None)
                for proxy in settings["proxies"].values():
                    self._secrets = tuple(dict.fromkeys([*self._secrets, *_credentials(proxy)]))
                self._settings, self._session = settings, session  # in this order: no lock to read
            return self._session

    # -- reading

    def _read(
        self, answer: _Answer, call: _Call, collector: _Collector
    ) -> Generator[str, None, LLMResponse]:
        """Read an answer of status 2xx as it comes. Raises what is wrong with it."""
        collector.request_id = _request_id(answer)
        limits = answer.limits
        collector.check, collector.most = limits.expired, answer.most
        take, shows = collector.take, collector.shows
        try:
            for events in self._events(answer, collector):
                for name, data in events:
                    take(name, data)
                    if shows:
                        if not isinstance(shows[-1], Thought):
                            # a stream that has shown text goes to nobody else
                            limits.shared_until, limits.silence = math.inf, limits.stall
                        yield from shows
                        shows.clear()
                    if collector.ended:
                        break
            yield from shows or ()  # of a body that was one value
            shown = "" if shows is None else collector.text
            response = collector.response()
            if response.model != call.model:  # words of the server's own may repeat a key
                response.model = _token(response.model, answer, _NAME) or call.model or ""
            if response.finish_reason not in _REASONS:
                response.finish_reason = _token(response.finish_reason, answer) or "unknown"
            response.request_id = _token(response.request_id, answer)
            if shows is not None and (rest := response.text[len(shown) :]):
                yield rest  # what might have become a think block or half a character
            if collector.ended:
                answer.finish()
            return response
        except (ProviderError, _InBandError, RecursionError, MemoryError) as error:
            failure = self._broken(error, answer, call, collector)
        raise failure  # outside the handler: an in-band error holds what the server said

    def _broken(
        self, error: Exception, answer: _Answer, call: _Call, collector: _Collector
    ) -> ProviderError:
        """The error for an answer of status 2xx that breaks off or reports a failure."""
        texts = collector.texts()
        if isinstance(error, ProviderError):
            failure = error
            failure.model = _token(error.model, answer, _NAME) or call.model or ""
            failure.request_id = _token(error.request_id or collector.request_id, answer)
        elif isinstance(error, _InBandError):
            failure = self._failure(answer, call, error.args[0], texts)[0]
        else:
            failure = InvalidResponse(f"the answer cannot be read: {type(error).__name__}")
        failure._had_begun = any(texts)
        failure.usage = failure.usage or collector.usage
        return failure

    def _events(self, answer: _Answer, collector: _Collector) -> Iterator[list[tuple[str, bytes]]]:
        """The events that each read brings. What breaks after the finish reason is passed over."""
        limits = answer.limits
        try:
            begun, chunks = b"", answer.chunks()
            for chunk in chunks:
                begun = (begun + chunk).lstrip(b"\xef\xbb\xbf \t\r\n")
                if len(begun) > 5 or b"\n" in begun:
                    break
            if not begun:
                raise InvalidResponse("an empty body")
            body = _form_of(begun, answer.headers.get("Content-Type", "").lower())
            for chunk in itertools.chain([begun], chunks):
                yield body.feed(chunk)
                if collector.ended:
                    return
                if collector.alive:
                    collector.alive = False
                    limits.progress()
                tail = limits.stall if collector.may_go_on else min(limits.stall, _TAIL_TIMEOUT)
                if collector.complete and limits.silence != tail:
                    limits.since, limits.silence = time.monotonic(), tail
            text = body.rest() if isinstance(body, _JSONBody) and not collector.complete else None
            if text is not None:  # no line of it was an event by itself
                label = answer.headers.get("Content-Type", "").partition(";")[0]
                shown = _token(label, answer, _MEDIA_TYPE) or "of an odd type"
                collector.take_whole(text, f"the answer ({shown})")
            yield body.close()
        except (ProviderTimeout, InvalidResponse):
            if not collector.is_over():
                raise

    # -- failures

    def _failure(
        self, answer: _Answer, call: _Call, body: Any = None, said: Sequence[str] = ()
    ) -> tuple[ProviderError, _Report, _Words]:
        """The error that an answer reports, safe to show, and what it says for our own eyes.

        ``body``: None is read from the answer. ``said``: what the model has said before.
        """
        headers, status = answer.headers, answer.status
        if 300 <= status < 400:
            told = "a redirect, which is not followed: correct the base_url"
            raise InvalidResponse(told, provider=self._vendor, status=status)
        report = _report(_error_body(answer) if body is None else body)
        told = _hidden(report.message, answer.secrets)  # whole, before it is cut
        words = _Words(told, (*_texts_of((call.messages, call.tools, call.options)), *said))
        hint = _retry_hint(headers, report, words, status in (429, 503, 529))
        waits = any(name in headers for name in (*_WAITS, "retry-after-ms"))
        kind, certain = _class_of(report, words, status, call.model, waits, self._rows)
        may_wait = issubclass(kind, (RateLimited, ServerError, ProviderTimeout))
        shown = _masked(_clean(words.shown)) or f"status {status} without a message to show"
        error = kind(
            shown, provider=self._vendor, model=call.model or "", status=status,
            code=_token(next(iter(report.codes), None), answer),
            retry_after=hint if may_wait else None, request_id=_request_id(answer),
        )
        if not certain:
            error.breaker = "neutral"  # it may be about this one request
        return error, report, words

    # -- what a model refuses is learned from its error

    def _correction(self, report: _Report, words: _Words, status: int, call: _Call) -> _Fix | None:
        """How to change the one optional field that a 400 names; None if that is not clear."""
        if status not in (400, 422) and not words.find(r"^\d+ validation error"):
            return None
        if words.find(_REFUSES_CARRY) and any(map(call.carried, call.messages)):
            return _Fix("carry")
        if not (words.find(_REFUSES) or re.search(_REFUSES, " ".join(report.codes))):
            return None
        limits = _TOKEN_LIMITS if call.token_limit is not None else ()
        names = (*(_HINTS & call.options.keys()), *limits, "stream_options", "stream")
        theirs = {**_COMPLAINTS, **self._rows.options}
        patterns = {name: theirs.get(name, name) for name in names}
        if call.thoughts or "reasoning_effort" in call.options:  # Responses ask for both
            patterns["thoughts"] = r"(?:reasoning\.)?summar(?:y|ies)"
        if call.thoughts:
            more = r"|thinking[\w.]{0,40}|think|includeThoughts|adaptive|reasoning[._]effort"
            patterns["thoughts"] += more
        advice = words.find("(?i) (?:use|when) ")  # behind it stands what to send, or what is set
        named = [] if report.param not in patterns else [report.param]
        for name, pattern in ({} if named else patterns).items():
            found = words.find(rf"(?i)(?<![\w.])(?:{pattern})(?!\w)")
            if found and (not advice or found.start() < advice.start()):
                named.append(name)
        if "thoughts" in named:
            named = ["thoughts"]
        elif "top_p" in named and words.find(r"(?i)\bboth\b"):  # Anthropic: not with temperature
            named = ["top_p"]
        elif named and (words.find(_LISTS) or all("_penalty" in name for name in named)):
            named = [min(named)]  # one by one; Gemini speaks of penalties
        elif len(named) > 1:
            named = [name for name in named if name != "stream"]  # refused only while streaming
        if len(named) != 1:
            return None
        name = named[0]
        if name in limits:
            (other,) = _TOKEN_LIMITS - {name}
            drops = words.say(other) or words.find("(?i)nsupported|nrecognized")
            return _Fix("token_limit", other) if drops else None
        none = name == "reasoning_effort" and words.find(r"(?i)set reasoning_effort to ['\"]?none")
        return _Fix(name, "none" if none else None)

    def _learn(self, fix: _Fix, asked: _Call, of_value: Any) -> None:
        """Remember a correction; ``of_value``: for the value that was asked for, not for any."""
        refused = asked.options.get(fix.name) if of_value else None
        with self._lock:
            known = self._learned.get(asked.model, {})
            if refused is not None:
                before = known[fix.name].refused[-20:] if fix.name in known else ()
                fix = fix._replace(refused=(*before, refused))
            self._learned[asked.model] = {**known, fix.name: fix}

    def _forget(self, model: str | None = None, names: Sequence[str] = ()) -> None:
        """Forget corrections of a model, or all of all models."""
        known = self._learned.get(model, {}).items()
        kept = {name: fix for name, fix in known if name not in names}
        self._learned = {**self._learned, model: kept} if names else {}

    def _corrections(self) -> dict[str, dict[str, str]]:
        """Model -> field -> drop or replace, to show."""
        return {
            model or "": {name: fix.change() for name, fix in fixes.items()}
            for model, fixes in list(self._learned.items()) if fixes
        }

    def _corrected(self, call: _Call) -> _Call:
        """The call without what this model is known to refuse."""
        learned = {
            name: fix.value for name, fix in self._learned.get(call.model, {}).items()
            if not fix.refused or call.options.get(name) in fix.refused  # else it may do
        }
        options = _given({name: learned.get(name, item) for name, item in call.options.items()})
        thoughts = call.thoughts and "thoughts" not in learned
        return call._replace(options=options, learned=learned, thoughts=thoughts)


def _error_body(answer: _Answer) -> Any:
    """What an error says; {} if it is cut, garbled or late: status and headers say enough."""
    limits = answer.limits
    limits.deadline = min(limits.deadline, time.monotonic() + _TAIL_TIMEOUT)
    try:
        body = answer.body()[:_ERROR_SIZE]
    except (InvalidResponse, ProviderTimeout) as error:
        if error.code == "too_large":
            raise
        return {}
    if body.lstrip().startswith(_SSE_BEGINS):
        body = next((data for _, data in _SSE().feed(body + b"\n\n")), b"")
    try:
        return json.loads(body.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):  # a text, unless it is HTML or JSON that was cut
        is_text = not body.lstrip().startswith((b"<", b"{", b"["))
        return body.decode("utf-8", "replace") if is_text else {}


def _as_dict(value: Any) -> dict[str, Any]:
    """What JSON is to write for an object that it does not know: any mapping."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"Object of type {_kind(value)} is not JSON serializable")


def _token(text: str | None, answer: _Answer, form: str = r"[\w.:/+=-]{1,100}") -> str | None:
    """A server's code, id or name; None for any other text, or if it repeats a secret."""
    if not text or not _pattern(form).fullmatch(text):
        return None
    told = any(len(secret) > 3 and secret.lower() in text.lower() for secret in answer.secrets)
    return None if told else text


def _request_id(answer: _Answer) -> str | None:
    ids = filter(None, map(answer.headers.get, _REQUEST_IDS))
    return _token(next(ids, None), answer)


def _sealed(stream: Generator[str, None, LLMResponse]) -> Generator[str, None, LLMResponse]:
    """The same stream; its errors come without the frames in which they arose."""
    try:
        return (yield from stream)
    except GeneratorExit:
        raise
    except BaseException as error:
        del stream
        raise _bare(error)  # noqa: B904 - it is the same error


def _drained(stream: Generator[str, None, LLMResponse]) -> LLMResponse:
    """What a stream returns in the end."""
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def _warn(text: str) -> None:
    """A warning at the user's line that builds the provider."""
    import warnings

    level, frame = 1, inspect.currentframe()
    while frame and frame.f_back and frame.f_globals is globals():
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)


def _host_of(url: str) -> str:
    """The host of a URL of http or https; "" for any other text, and for a port that cannot be."""
    from urllib.parse import urlsplit

    with contextlib.suppress(ValueError):
        found = urlsplit(url)
        if re.fullmatch(r"(?i)https?://\S+", url) and found.port != 0:
            return found.hostname or ""
    return ""


def _network_of(host: str) -> str:
    """Where a host is: local (this machine, in any form of its address), private or public."""
    import ipaddress
    import socket

    name = host.rstrip(".")
    if name in ("localhost", socket.gethostname().lower()) or name.endswith(".localhost"):
        return "local"
    with contextlib.suppress(OSError, ValueError):  # "127.1" and numbers, as sockets read them
        host = socket.inet_ntoa(socket.inet_aton(name))
    with contextlib.suppress(ValueError):
        address: Any = ipaddress.ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address
        if address.is_loopback or address.is_unspecified:
            return "local"
        return "private" if address.is_private else "public"
    return "private" if "." not in host or host.endswith((".local", ".internal")) else "public"


def _sendable(value: Any, where: str) -> str:
    """A header value, stripped of white space. ConfigError if HTTP cannot carry it."""
    if not isinstance(value, str):
        raise ConfigError(f"{where} is a {_kind(value)}: give a str")
    text: str = value.strip()
    if bad := _pattern(r"[\x00-\x1f\x7f\u0100-\U0010ffff]").search(text):
        what = f"the character U+{ord(bad.group()):04X}, which HTTP cannot carry"
        raise ConfigError(f"{where} holds {what}: copy it again")
    return text


def _header_name(name: Any) -> str:
    if isinstance(name, str) and _pattern(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch(name.strip()):
        return name.strip()
    raise ConfigError(f"headers: {name!r:.60} is no name of a header: give letters, digits and -")


# ==== OpenAI ======================================================================================
# Chat Completions (https://platform.openai.com/docs/api-reference/chat), spoken by many servers,
# and OpenAI's own Responses API.

#: Names under which servers send thinking that they want back as it came.
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "reasoning_text")
#: Fields of a tool call that go back with it: signatures of Google, and of LiteLLM's Gemini.
_CALL_EXTRAS = ("extra_content", "provider_specific_fields")
#: What servers call tokens that were read from a cache, and that were written into one.
_CACHED = (
    "cached_tokens", "prompt_cache_hit_tokens", "num_cached_tokens", "cache_read_input_tokens",
)
_WRITTEN = ("cache_write_tokens", "cache_creation_tokens", "cache_creation_input_tokens")
#: Keys of a message that are sent. Other keys are another vendor's or an answer's.
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "cache_control")


def _chat_facts(body: _Object) -> _Facts:
    """One event of a stream, or one whole answer: they differ in the name of the message."""
    choices: Any = body.get("choices") or ()
    if usage := body.get("usage") or ("x_groq" in body and _dict(body["x_groq"]).get("usage")):
        yield "usage", usage, _openai_usage
    for choice in choices:
        index = choice.get("index")
        if index or len(choices) > 1:  # Copilot: text and calls in choices without an index
            yield "choice", index if isinstance(index, float) else _int(index) or 0
        if choice.get("error"):
            raise _InBandError(choice)
        if usage := choice.get("usage"):  # Kimi
            yield "usage", usage, _openai_usage
        delta, message = choice.get("delta"), choice.get("message")
        whole = message is not None and (  # Perplexity sends both: an empty delta hides nothing
            delta is None or not any(delta[name] for name in delta if name != "role"))
        if whole:  # MiniMax ends a stream so
            yield ("again",)
        message = message if whole else delta
        if message:
            content = message.get("content")
            if len(message) > 1 or content is None:  # most events hold nothing but text
                yield from _chat_extras(message, whole)
            if isinstance(content, str):
                yield "full" if whole else "text", content
            elif content is not None:
                yield from _chat_content(content)
        else:
            yield "text", choice.get("text")
        if "finish_reason" in choice:
            finish, native = choice["finish_reason"], choice.get("native_finish_reason")
            failed = finish is not None and str(native).lower() in _FAILED
            yield "stop", native if failed else finish
    yield "model", body.get("model")


def _chat_content(content: Any) -> _Facts:
    """Content as parts, thinking among them, or as an object (JSON modes)."""
    for part in [json.dumps(content)] if isinstance(content, dict) else content:
        fields = {"text": part} if isinstance(part, str) else _dict(part)
        if fields.get("type") in ("thinking", "reasoning"):
            yield "thought", _thinking(fields)
        else:
            yield "text", fields.get("text")


def _thinking(value: Any) -> str:
    """Thinking as a text, in parts (Magistral, Databricks) or in an object (Envoy's gateway)."""
    if isinstance(value, list):
        return "".join(map(_thinking, value))
    inner = next(filter(None, map(_dict(value).get, ("text", "thinking", "summary"))), None)
    return value if isinstance(value, str) else _thinking(inner) if inner else ""


def _chat_extras(message: _Object, whole: bool) -> _Facts:
    """Thinking, tool calls and refusals."""
    name = next(filter(message.get, _THOUGHT_KEYS), "")
    extra = message.get("extra_content")
    if extra and _dict(_dict(extra).get("google")).get("thought"):
        yield "tag", "thought"
    if name:
        yield "thought", _thinking(message[name])
    for kept in (name, "reasoning_opaque"):
        if message.get(kept):
            yield "grow", kept, message[kept]
    for kept in ("reasoning_details", "thinking_blocks"):  # OpenRouter, LiteLLM
        for item in filter(None, map(_dict, message.get(kept) or ())):
            if not name:
                yield "thought", _thinking(item)
            yield "keep", kept, None, item, True
    calls = message.get("tool_calls") or ()
    if isinstance(calls, dict):  # TGI before 3.0
        calls = [calls]
    for at, call in enumerate(calls):
        function = call.get("function") or call.get("custom") or {}
        key = call.get("index")
        if key is None and (whole or len(calls) > 1):
            key = at if whole else ("at", at)  # of a whole one deltas may have come
        arguments = function.get("arguments", function.get("input"))
        yield "call", key, call.get("id"), function.get("name"), arguments
        yield "extra", key, {name: call[name] for name in _CALL_EXTRAS if call.get(name)}
    if not calls and (old := message.get("function_call")):
        yield "call", 0, None, old.get("name"), old.get("arguments")
    if message.get("refusal"):
        yield ("refusal",)


def _openai_usage(usage: _Object) -> Usage:
    """What total_tokens leaves unexplained is thinking (xAI, Gemini), or of the prompt: sound, or
    all that the cache had (Portkey)."""
    prompt = _count(usage, "prompt_tokens", "input_tokens")
    completion = _count(usage, "completion_tokens", "output_tokens")
    inside = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    outside = usage.get("completion_tokens_details") or usage.get("output_tokens_details")
    rest = max(0, _count(usage, "total_tokens") - prompt - completion)
    cached = _count(inside, *_CACHED) or _count(usage, *_CACHED)
    written = _count(inside, *_WRITTEN) or _count(usage, *_WRITTEN)
    asked = rest if rest in (_count(inside, "audio_tokens"), cached + written) else 0
    # Perplexity and SGLang say it at the top, and Perplexity does not count it in
    thought = _count(outside, "reasoning_tokens") or _count(usage, "reasoning_tokens")
    completion += rest - asked
    completion += thought if thought > completion else 0
    return Usage(prompt + asked, completion, cached, written, thought)


def _chat_message(call: _Call, message: Message, at_openai: bool) -> _Object:
    """As it is sent. Local templates know neither the developer role nor lists of texts."""
    sent = {key: message[key] for key in _MESSAGE_KEYS if message.get(key) is not None}
    # characters of a tool id: Mistral's, OpenAI's, those of all others
    most = 9 if "tool_ids" in call.learned else 40 if at_openai else sys.maxsize
    if "tool_call_id" in sent:
        sent["tool_call_id"] = _short_id(sent["tool_call_id"], most)
    kept = {} if at_openai else call.carried(message)
    calls = []
    for item in sent.pop("tool_calls", ()):
        calls.append({**_textual(call, item), "id": _short_id(item["id"], most)})
        if item["id"] in kept.get("extra", {}):
            calls[-1] |= kept["extra"][item["id"]]
    if calls:  # an empty list is refused
        sent["tool_calls"] = calls
    parts: Any = sent.setdefault("content", call.learned.get("content") if calls else "")
    has_parts = isinstance(parts, (list, tuple))
    if at_openai:
        sent["content"] = [_without_cache(part) for part in parts] if has_parts else parts
        return _without_cache(sent)
    if sent["role"] == "developer":
        sent["role"] = "system"
    if has_parts and all(part.keys() == {"type", "text"} for part in parts):
        sent["content"] = "\n".join(part["text"] for part in parts)
    if sent["role"] == "assistant":  # the thinking that the same server and model need back
        for name, value in kept.items():
            if name.startswith(("reasoning", "thinking")):
                sent[name] = _details(value) if isinstance(value, list) else value
        if "reasoning_content" in call.learned:
            sent.setdefault("reasoning_content", call.learned["reasoning_content"])
    return sent


def _details(items: list[_Object]) -> list[_Object]:
    """reasoning_details or thinking_blocks, the pieces of a stream put together again."""
    whole: list[_Object] = []
    for item in items:
        last = whole[-1] if whole else {}
        more = _given(item)
        same = all(last.get(name) == more.get(name, last.get(name)) for name in ("type", "id"))
        if "index" in more:
            same = same and last.get("index") == more["index"]
        else:
            same = same and last.get("type") == "thinking" and not last.get("signature")
        grows = [name for name in ("text", "summary", "thinking")
                 if isinstance(more.get(name), str) and isinstance(last.get(name) or "", str)]
        if same and (grows or "signature" in more):
            more |= {name: (last.get(name) or "") + more[name] for name in grows}
            whole[-1] = {**last, **more}
        else:
            whole.append(item)
    return whole


def _without_cache(item: Mapping[str, Any]) -> _Object:
    """A message, part or tool for OpenAI."""
    return {name: value for name, value in item.items() if name != "cache_control"}


def _short_id(tool_id: str, most: int) -> str:
    """A tool id of at most so many characters. Nine are Mistral's form: letters and digits only."""
    if most > 9:
        return _safe(tool_id, "$^", most)  # this pattern finds nothing: any character may stay
    fits = re.fullmatch("[a-zA-Z0-9]{9}", tool_id)
    return tool_id if fits else f"{zlib.crc32(tool_id.encode()):09x}"


def _merged_turns(call: _Call) -> list[Message]:
    """At most one message of the system, in front; then the user's; no side twice in a row."""
    role, of_system = "user" if "system" in call.learned else "system", ("system", "developer")
    first = [{**one, "role": role} for one in call.messages if one["role"] in of_system]
    merged: list[Message] = []
    rest = [one for one in call.messages if one["role"] not in of_system]
    for message in (*first, *rest):
        last = merged[-1] if merged else {}
        if message["role"] != last.get("role") or last.get("tool_calls") or "tool_call_id" in last:
            if message["role"] == "assistant" and last.get("role", "system") == "system":
                merged.append({"role": "user", "content": _GO_ON})
            merged.append(message)
            continue
        both, parts = [last["content"], message.get("content") or ""], list[Any]()
        for content in both:
            parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
        are_texts = all(isinstance(content, str) for content in both)
        text = "\n\n".join(filter(None, both)) if are_texts else parts
        merged[-1] = {**last, **message, "content": text}
    return merged


def _pictures_apart(messages: list[Message]) -> list[Message]:
    """Chat Completions takes only text in a tool's result: the rest follows as the user's."""
    done: list[Message] = []
    for is_tool, group in itertools.groupby(messages, lambda message: message["role"] == "tool"):
        moved: list[Any] = []
        for message in group:
            has_parts = is_tool and not isinstance(message["content"], str)
            parts: Any = message["content"] if has_parts else ()
            if apart := [part for part in parts if part.get("type") in (*_PICTURES, "file")]:
                moved += [{"type": "text", "text": _STRAY_RESULT}, *apart]
                texts = [part for part in parts if part not in apart]
                message = {**message, "content": texts or "It follows in the next message."}
            done.append(message)
        done += [{"role": "user", "content": moved}] if moved else []
    return done


def _arranged(call: _Call) -> list[Message]:
    """The messages as this model is known to insist on them."""
    form = _dict(call.options.get("response_format")).get("type")
    if "json_word" in call.learned and form == "json_object":
        said = str([message.get("content") for message in call.messages]).lower()
        if "json" not in said:
            call = call._replace(messages=_instructed(call.messages, _ASKS_JSON))
    messages = _merged_turns(call) if "turns" in call.learned else call.messages
    if "after_tool" not in call.learned:
        return messages
    done: list[Message] = []
    for message in messages:
        if done and (done[-1]["role"], message["role"]) == ("tool", "user"):
            done.append({"role": "assistant", "content": "Noted."})
        done.append(message)
    return done


def _chat_tool(call: _Call, tool: Mapping[str, Any], at_openai: bool) -> _Object:
    if tool.get("type", "function") != "function":
        return dict(tool)
    sent = {"type": "function", **tool, "function": _function_sent(call, tool["function"])}
    if at_openai:
        sent = {**_without_cache(sent), "function": _without_cache(sent["function"])}
    return sent


def _chat_body(call: _Call, streaming: bool, at_openai: bool) -> _Object:
    messages = [_chat_message(call, one, at_openai) for one in call.messages]
    body: _Object = {"messages": messages, "model": call.model, **call.options}
    unsent = {*_TOKEN_LIMITS, "extra_body"}
    if call.tools:
        body["tools"] = [_chat_tool(call, tool, at_openai) for tool in call.tools]
    else:
        unsent |= {"tool_choice", "parallel_tool_calls"}  # both are refused without tools
    for name in unsent:
        body.pop(name, None)
    if call.tools and _dict(call.options.get("tool_choice")).get("type") == "function":
        body["tool_choice"] = {"type": "function", "function": {"name": _choice(call)[1]}}
    guess = "max_completion_tokens" if at_openai else "max_tokens"
    body[call.learned.get("token_limit", guess)] = call.token_limit
    if streaming:
        body["stream"] = True
        if "stream_options" not in call.learned:
            body["stream_options"] = {"include_usage": True}
    return call.finished(body)


# -- Responses API


class _ResponsesFacts:
    """Events of the Responses API. It remembers what has come of each text.

    A text, or a call's arguments, may come as deltas, in a ``…done`` event, in its finished item,
    or only in the final object. Some servers leave indexes out, repeat or shift them.
    """

    def __init__(self, limit: Any) -> None:
        self._limit = limit  #: of tokens, as it was asked for
        self._come: dict[Any, list[str]] = {}  #: texts and arguments by their place, in pieces
        self._at: dict[Any, Any] = {}  #: ids of calls and items -> their places
        self._calls: dict[Any, _Object] = {}  #: places -> the calls there, as they began
        self._thought: set[Any] = set()  #: places of reasoning items that have come

    def __call__(self, body: _Object) -> _Facts:
        kind, at = str(body.get("type", "")).removeprefix("response."), body.get("output_index")
        at = self._at.get(body.get("item_id")) if at is None else at
        if kind == "created":
            yield ("begin",)
            for known in (self._come, self._at, self._calls, self._thought):
                known.clear()
        ends = kind in ("completed", "incomplete", "failed", "cancelled")
        if ends or "output" in body or body.get("object") == "response":
            yield from self._end(body.get("response", body))
        elif kind in ("output_item.added", "output_item.done"):
            yield from self._item(at, body["item"], whole=kind.endswith("done"))
        elif kind in ("output_text.delta", "output_text.done"):
            yield "text", self._new(("text", at, body.get("content_index") or 0), body, "text")
        elif kind in ("function_call_arguments.delta", "function_call_arguments.done"):
            yield "arguments", ("item", at), self._new(("call", at), body, "arguments")
        elif kind in ("reasoning_summary_text.delta", "reasoning_text.delta"):
            self._thought.add(at)
            yield "thought", body.get("delta")
        elif kind.endswith(".delta") or "_call." in kind:  # a tool of the vendor's is at work
            yield ("alive",)

    def _new(self, place: Any, found: _Object, name: str) -> str:
        """What has not come yet of a text, in a delta or as a whole."""
        if found.get("delta") is None:
            return self._rest(found.get(name) or "", place)
        self._come.setdefault(place, []).append("" + found["delta"])  # TypeError: it is no text
        return str(found["delta"])

    def _rest(self, text: str, place: Any) -> str:
        """What has not come yet of a text. ``place``: a key of ``_come``, or how several begin."""
        come = self._text_at(place)
        if place[0] == "text" and len(place) > 1 and not come:  # perhaps under another place
            elsewhere = self._text_at(place[:1])
            named = place[1] is not None and all(key[1] is not None for key in self._come)
            come = elsewhere if elsewhere == text or not named else ""
        if text and not text.startswith(come):
            known = _dict(_parsed(come)) if place[0] == "call" else {}
            if not known or _parsed(text) not in ({}, known):
                raise InvalidResponse("the answer contradicts its own deltas")
            text = come  # written otherwise, or by LM Studio as {}
        key = place if len(place) > 1 else (*place, "rest")
        self._come.setdefault(key, []).append(text[len(come) :])
        return text[len(come) :]

    def _text_at(self, place: Any) -> str:
        found = (pieces for key, pieces in self._come.items() if key[: len(place)] == place)
        return "".join(itertools.chain.from_iterable(found))

    def _end(self, body: _Object) -> _Facts:
        status = body.get("status")
        if status == "failed":
            raise _InBandError({"error": body.get("error") or {"message": "the response failed"}})
        if status not in ("completed", "incomplete", None):
            raise InvalidResponse("the response is neither completed nor incomplete")
        yield "model", body.get("model")
        yield "usage", body.get("usage"), _openai_usage
        items = body.get("output") or ()
        self._recognize([item for item in items if item.get("type") == "function_call"])
        for at, item in enumerate(items):
            yield from self._item(at, item, final=True)
        yield "text", self._rest("".join(map(self._text_of, items)), ("text",))
        reason = _dict(body.get("incomplete_details")).get("reason") or "max_output_tokens"
        full = self._limit and _count(body.get("usage"), "output_tokens") == self._limit
        # llama.cpp and transformers call an answer completed that the limit has cut
        yield "stop", reason if status == "incomplete" or full else "completed"
        yield ("end",)

    @staticmethod
    def _text_of(item: _Object) -> str:
        parts = item["content"] if item.get("type") == "message" else ()
        return "".join(part.get("text") or "" for part in parts)

    def _recognize(self, calls: list[_Object]) -> None:
        """Find the streamed calls that have other ids in the final object (of vLLM)."""
        known = {None, *(begun["call_id"] for begun in self._calls.values())}
        new = [call for call in calls if call.get("call_id") not in known]
        ids = {call.get("call_id") for call in calls}
        lost = [(at, begun) for at, begun in self._calls.items() if begun["call_id"] not in ids]
        for place, begun in lost:
            come = self._text_at(("call", place))
            for call in new:
                text = call.get("arguments") or ""
                same = text.startswith(come) or _parsed(text) == _parsed(come)
                if same and call.get("name") == begun.get("name"):
                    self._at[call["call_id"], call.get("id")] = place
                    new.remove(call)
                    break

    def _where(self, at: Any, item: _Object) -> Any:
        """The place of an item: that of its id, else its index if no other call is there."""
        call_id, item_id = item.get("call_id"), item.get("id")
        name = call_id, item_id
        known = self._at.get(name, self._at.get(call_id) if at is None else None)
        if known is not None:
            return known
        taken = call_id and self._calls.get(at, item)["call_id"] != call_id
        place = name if taken or (at is None and any(name)) else at
        self._at |= {one: place for one in (name, *name) if one and one != (None, None)}
        if call_id:
            self._calls[place] = item
        return place

    def _item(self, index: Any, item: _Object, whole: bool = True, final: bool = False) -> _Facts:
        kind, at = item.get("type"), self._where(index, item)
        yield ("alive",)
        if kind == "function_call":
            new = self._new(("call", at), item, "arguments")
            call_id = self._calls.get(at, item).get("call_id")
            yield "call", ("item", at), call_id, item["name"], new
            item = {**item, "call_id": call_id, "arguments": self._text_at(("call", at))}
        if not whole:
            yield "open", ("item", at)
            return
        yield "keep", "items", at, item, kind in ("reasoning", "compaction")
        if item.get("status") != "incomplete":
            yield "closed", ("item", at)
        if kind == "reasoning":
            for part in (*(item.get("summary") or ()), *(item.get("content") or ())):
                if at not in self._thought:
                    yield "thought", part.get("text")
            self._thought.add(at)
        elif kind == "message":
            if any(part.get("type") == "refusal" for part in item["content"]):
                yield ("refusal",)
            if not final:  # the final object is compared as a whole
                yield "text", self._rest(self._text_of(item), ("text", at))


def _responses_items(call: _Call, message: Message) -> list[Any]:
    """The input items of one message."""
    role, content, vendor = message["role"], message.get("content"), "the Responses API"
    if kept := call.carried(message).get("items"):
        return list(kept)
    if role != "assistant":
        parts = [_responses_part(part) for part in _parts(content, vendor)]
        if role != "tool":
            return [{"role": role, "content": parts or ""}]
        plain = all(part["type"] == "input_text" for part in parts)
        output = _joined(content, vendor) if plain else parts
        call_id = _short_id(message["tool_call_id"], 64)
        return [{"type": "function_call_output", "call_id": call_id, "output": output}]
    items: list[Any] = []
    if text := _joined(content, vendor):  # parts would need the ids that the API gave them
        items.append({"type": "message", "role": role, "content": text})
    for item in message.get("tool_calls") or ():
        function = _textual(call, item)["function"]
        items.append({
            "type": "function_call", "call_id": _short_id(item["id"], 64),
            "name": function["name"], "arguments": function["arguments"],
        })
    return items


def _responses_part(part: _Part) -> _Object:
    url = part.data if part.kind == "url" else f"data:{part.media};base64,{part.data}"
    if part.kind == "text":
        return {"type": "input_text", "text": part.data}
    if part.media.startswith("image/") or (part.kind == "url" and not part.name):
        return {"type": "input_image", "image_url": url, "detail": part.detail or "auto"}
    if part.kind == "url":
        return {"type": "input_file", "file_url": url}
    import mimetypes

    end = "" if "." in part.name else mimetypes.guess_extension(part.media) or ""
    return {"type": "input_file", "filename": f"{part.name or 'file'}{end}", "file_data": url}


def _responses_body(call: _Call, streaming: bool) -> _Object:
    """Nothing is stored at OpenAI; reasoning travels along, encrypted."""
    if "stop" in call.options:
        raise UnsupportedRequest("the Responses API knows no stop sequences")
    body: _Object = {
        "model": call.model, "store": False, "stream": streaming or None,
        "max_output_tokens": call.token_limit,
        "include": None if "include" in call.learned else ["reasoning.encrypted_content"],
        "input": [item for message in call.messages for item in _responses_items(call, message)],
    }
    same = ("temperature", "top_p", "user", *(("parallel_tool_calls",) if call.tools else ()))
    body |= call.renamed({name: name for name in same})
    if call.tools:
        basis = {"type": "function", "strict": False, "parameters": _NO_PARAMETERS}
        functions = _functions(call, "the Responses API")
        body["tools"] = [_without_cache({**basis, **function}) for function in functions]
        kind, name = _choice(call)
        if "tool_choice" in call.options:
            body["tool_choice"] = {"type": "function", "name": name} if kind == "named" else kind
    effort = call.renamed({"reasoning_effort": "effort"})
    if effort or call.thoughts:
        shown = {} if "thoughts" in call.learned else {"summary": "auto"}
        body["reasoning"] = {**effort, **shown}
    kind, schema = _format(call)
    if kind != "text":
        body["text"] = {"format": {"type": kind, **schema}}
    return call.finished(body)


#: What servers with strict chat templates (llama.cpp, vLLM, LM Studio) say of messages that are not
#: one of the system and then the user's and the model's in turn.
_STRICT_TEMPLATE = (
    "(?i)system message must be|roles must alternate|should (be )?alternat|successive user or|"
    "system role not supported|developer instruction is not|only user and assistant roles"
)
#: What servers say that want a text beside tool calls, too (llama-cpp-python).
_WANTS_CONTENT = (
    r"(?i)\bcontent\b.{0,60}(valid string|none is not|not be (null|none)|be a string|required)"
)
_AZURE = (".azure.com", ".azure.us", ".azure.cn")


class OpenAIProvider(_HTTPProvider):
    """Chat Completions at OpenAI, Azure, and every compatible server by its ``base_url``.

    ``api_key``: a str; a function without arguments that returns one, asked for each request; None
    takes OPENAI_API_KEY, which goes only to OpenAI, Azure and the host of OPENAI_BASE_URL; "" sends
    none. ``base_url``: None takes OPENAI_BASE_URL, else OpenAI's; without a path ``/v1`` is added.
    ``first_token_timeout`` (None: 12), ``stall_timeout``, ``connect_timeout``: seconds of silence
    before the first token, inside the answer, and for connecting. ``headers`` go over our own of
    the same name. ``max_response_bytes``: of one answer, decompressed; more is InvalidResponse.
    ``stream_upstream=False`` asks for whole JSON: then None is no limit for the first token.
    ``session``: your own ``requests.Session``, used as it is, with these time limits. ``api``:
    "chat", "responses", or "auto": Chat Completions until an error says that a model is served by
    the Responses API, which is remembered. Thread-safe, also across fork. Raises ConfigError.
    """

    _vendor, _default_url, _api_path = "openai", "https://api.openai.com", "/v1"
    _cut_paths = ("/chat/completions", "/responses")
    _key_variables, _url_variable = ("OPENAI_API_KEY",), "OPENAI_BASE_URL"
    _key_hosts: ClassVar[tuple[str, ...]] = (".openai.com", *_AZURE)
    _rows = _Rows(phrases=(  # both at 400: xAI; Anthropic behind a gateway such as LiteLLM
        (r"^incorrect api key provided", AuthenticationError),
        (r"your credit balance is too low to access", QuotaExceeded),
    ))

    def __init__(
        self, api_key: str | Callable[[], str] | None = None, base_url: str | None = None, *,
        api: str = "auto", **settings: Any,
    ) -> None:
        if api not in ("auto", "chat", "responses"):
            told = "give 'auto', 'chat' or 'responses'"
            raise ConfigError(f"{type(self).__name__}(api={api!r}): {told}")
        super().__init__(api_key, base_url, **settings)
        self.api = api
        self._at_openai = self._host == "api.openai.com" or self._host.endswith(_AZURE)
        self._wants_model = self._at_openai  # other servers have a model of their own

    def _auth_headers(self, key: str) -> dict[str, str]:
        is_token = key.startswith("eyJ")  # a JWT of Entra ID
        azure = key and self._host.endswith(_AZURE) and not is_token
        return {"api-key": key} if azure else super()._auth_headers(key)

    def _prepare(self, call: _Call, streaming: bool) -> tuple[str, _Object, _Collector]:
        responses = self.api == "responses" or (self.api == "auto" and "api" in call.learned)
        if self._at_openai:
            call = _renamed_tools(call, _NOT_PLAIN, 64)
        results = (one["content"] for one in call.messages if one["role"] == "tool")
        if not responses and not all(isinstance(content, str) for content in results):
            call = call._replace(messages=_pictures_apart(call.messages))
        if call.learned:
            call = call._replace(messages=_arranged(call))
        if responses:
            body = _responses_body(call, streaming)
            return "/responses", body, _Collector(call, _ResponsesFacts(call.token_limit))
        body = _chat_body(call, streaming, self._at_openai)
        return "/chat/completions", body, _Collector(call, _chat_facts)

    def _correction(self, report: _Report, words: _Words, status: int, call: _Call) -> _Fix | None:
        if status < 501 and words.find(_STRICT_TEMPLATE):
            return _Fix("system", "user") if "turns" in call.learned else _Fix("turns", "merged")
        silent = any(one.get("tool_calls") and not one.get("content") for one in call.messages)
        if status in (400, 422, 500) and silent and words.find(_WANTS_CONTENT):
            return _Fix("content", "")
        if status in (400, 404, 422):
            if words.say("reasoning_content") and words.find("(?i)passed back|missing"):
                return _Fix("reasoning_content", " ")  # DeepSeek, Kimi: on turns of other models
            if words.find("(?i)unexpected role .user. after role .tool"):
                return _Fix("after_tool", "assistant")  # Mistral
            if report.param == "include" or words.find("(?i)encrypted content is not supported"):
                return _Fix("include")  # of a model that does not think
            if words.find("(?i)contain the word .{0,3}json"):  # also DeepSeek, Groq and Qwen
                return _Fix("json_word", "said")
            if words.find("(?i)object schema missing properties|schema of .type: .{0,2}object"):
                return _Fix("schemas", "typed")
            if words.find(r"(?i)tool call id .{0,80}a-z|length of 9"):
                return _Fix("tool_ids", "nine")
            if words.find(r"(?i)response_format.{0,20} must be .json_schema"):  # LM Studio
                schema = {"name": "answer", "schema": {"type": "object"}}
                return _Fix("response_format", {"type": "json_schema", "json_schema": schema})
            served = words.find("(?i)v1/responses|responses api|via the /chat/completions endpoint")
            if self.api == "auto" and status != 422 and served:
                return _Fix("api", "responses")
        return super()._correction(report, words, status, call)


class LMStudioProvider(OpenAIProvider):
    """LM Studio on this machine: ``http://localhost:1234/v1``; else as OpenAIProvider.

    The environment may name LM_API_TOKEN and LMSTUDIO_BASE_URL. Without a model the loaded one
    answers. The first token may take 60 seconds: the model may have to be loaded first.
    """

    _vendor, _default_url = "lmstudio", "http://localhost:1234"
    _key_variables, _url_variable = ("LM_API_TOKEN",), "LMSTUDIO_BASE_URL"
    _key_hosts = ("localhost", "127.0.0.1")
    _wants_model, _first_token = False, 60.0


# ==== Anthropic ===================================================================================
# The Messages API (https://docs.anthropic.com/en/api/messages).

#: Kind of a delta -> the field of its block that grows.
_ANTHROPIC_GROWS = {
    "text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature",
    "input_json_delta": "partial_json", "compaction_delta": "content",
}
_MAX_TOKENS = 8192  #: where a call names no limit
_ANTHROPIC_MEDIA = ("image/jpeg", "image/png", "image/gif", "image/webp", "application/pdf")
#: Bounds in a schema that structured outputs refuse.
_BOUNDS = frozenset({
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength",
    "maxLength", "pattern", "minItems", "maxItems", "uniqueItems",
})


def _anthropic_facts(body: _Object) -> _Facts:
    kind = body.get("type")
    if kind == "message_start":
        yield ("begin",)
        kind, body = "message", body["message"]
    if kind == "content_block_start":
        yield from _anthropic_begins(body["index"], body["content_block"])
    elif kind == "content_block_delta":
        at, delta = body["index"], body["delta"]
        name = _ANTHROPIC_GROWS.get(delta["type"])
        if name is not None:  # else it is a citation, or of a kind that nobody knows
            yield "piece", "blocks", at, name, delta[name] or ""
            yield ("alive",)
        elif "citation" in delta:
            yield "item", "blocks", at, "citations", delta["citation"]
        if name == "text":
            yield "text", delta["text"]
        elif name == "thinking":
            yield "thought", delta["thinking"]
        elif name == "partial_json":
            yield "arguments", at, delta["partial_json"]
    elif kind == "content_block_stop":
        yield "closed", body.get("index")
    elif kind == "message_delta":
        yield "usage", body.get("usage"), _anthropic_usage
        yield "stop", body["delta"].get("stop_reason")
    elif kind == "message_stop":
        yield ("end",)
    elif kind == "message" or "content" in body:
        yield "model", body.get("model")
        yield "usage", body.get("usage"), _anthropic_usage
        for at, block in enumerate(body.get("content") or ()):
            yield from _anthropic_begins(at, block)
            yield "closed", at
        yield "stop", body.get("stop_reason", "")


def _anthropic_begins(at: int, block: _Object) -> _Facts:
    kind = block.get("type")
    yield "open", at + 0  # TypeError if it is no number
    yield "keep", "blocks", at, block, kind not in ("text", "tool_use")
    if kind == "text":
        yield "text", block.get("text")
    elif kind == "tool_use":
        yield "call", at, block.get("id"), block.get("name"), block.get("input") or None
    else:  # thinking, or of a tool that the server itself has called
        yield "thought", block.get("thinking")


def _anthropic_usage(usage: _Object) -> Usage:
    """Input counts leave the cache out."""
    names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    plain, read, written = (_count(usage, name) for name in names)
    thought = _count(usage.get("output_tokens_details"), "thinking_tokens")
    return Usage(plain + read + written, _count(usage, "output_tokens"), read, written, thought)


def _anthropic_body(call: _Call, streaming: bool) -> _Object:
    system, turns = _conversation(call, "Anthropic")
    kind, schema = _format(call)
    if kind == "json_object":
        system.append(_Part("text", _ASKS_JSON))
    cached = any(part.cache for part in system)
    said: Any = _anthropic_blocks(system) if cached else "\n\n".join(part.data for part in system)
    effort, temperature = call.options.get("reasoning_effort"), call.options.get("temperature")
    if isinstance(temperature, (int, float)):
        temperature = min(temperature, 1)
    wanted = schema.get("schema", {})
    wanted = _anthropic_schema(wanted) if "answer_schema" in call.learned else wanted
    form = {"type": kind, "schema": wanted} if kind == "json_schema" else None
    level = {"none": None, "minimal": "low"}.get(str(effort), effort)
    limit = call.token_limit
    limit = call.learned.get("default_tokens", _MAX_TOKENS) if limit is None else limit
    forced = call.tools and _choice(call)[0] in ("required", "named")  # not while it thinks
    shown = {"type": "adaptive", "display": "summarized"} if call.thoughts and not forced else None
    kept = [block.get("id") for turn in turns for block in turn.carry.get("blocks", ())]
    return call.finished({
        "model": call.model,
        "max_tokens": limit,  # it is required
        "system": said or None,
        "messages": [
            {"role": turn.role, "content": _anthropic_content(turn, kept)} for turn in turns
        ],
        "temperature": temperature, "top_p": call.options.get("top_p"),
        "stop_sequences": _anthropic_stops(call),
        "metadata": {"user_id": call.options["user"]} if "user" in call.options else None,
        **_anthropic_tools(call, turns),
        "output_config": _given({"format": form, "effort": level}) or None,
        "thinking": {"type": "disabled"} if effort == "none" else shown,
        "stream": streaming or None,
    })


def _anthropic_stops(call: _Call) -> list[str] | None:
    """White space alone is refused there."""
    stops = _stops(call)
    kept = [stop for stop in stops if stop.strip()]
    if stops and not kept:
        raise UnsupportedRequest("Anthropic takes no stop that is white space alone")
    return kept or None


def _anthropic_schema(schema: Any) -> Any:
    """The schema of an answer as structured outputs take it
    (https://platform.claude.com/docs/en/build-with-claude/structured-outputs): every object is
    closed, bounds become words for the model."""
    if isinstance(schema, (list, tuple)):
        return [_anthropic_schema(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    sent = {name: value for name, value in schema.items() if name not in _BOUNDS}
    for name in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(name), Mapping):
            sent[name] = {key: _anthropic_schema(item) for key, item in schema[name].items()}
    for name in ("items", "anyOf", "oneOf", "allOf"):
        if name in sent:
            either = "anyOf" if name == "oneOf" and "anyOf" not in sent else name
            sent[either] = _anthropic_schema(sent.pop(name))
    if "properties" in sent or "object" in (sent.get("type") or ""):
        sent["additionalProperties"] = False
    if bounds := ", ".join(f"{name}: {schema[name]}" for name in schema if name in _BOUNDS):
        sent["description"] = f"{schema.get('description') or ''} ({bounds})".strip()
    return sent


def _anthropic_content(turn: _Turn, kept: Sequence[Any]) -> list[_Object]:
    """The blocks of one turn: an assistant's own as they were, results before other content.
    ``kept``: ids of calls that go back as they came."""
    if turn.carry.get("blocks"):
        return _anthropic_kept(turn.carry["blocks"])
    blocks: list[_Object] = []
    for call_id, _, parts in turn.results:
        caches = [part.cache for part in parts if part.cache]  # refused inside of its content
        blocks.append(_given({
            "type": "tool_result",
            "tool_use_id": call_id if call_id in kept else _safe(call_id, _NOT_PLAIN, 64),
            "content": _anthropic_blocks(part._replace(cache=None) for part in parts) or "(empty)",
            "is_error": [part.data for part in parts] == [_NO_RESULT] or None,
            "cache_control": caches[-1] if caches else None,
        }))
    blocks += _anthropic_blocks(turn.parts)
    for call_id, name, arguments in turn.calls:
        sent = _safe(call_id, _NOT_PLAIN, 64)
        blocks.append({"type": "tool_use", "id": sent, "name": name, "input": arguments})
    return blocks or [{"type": "text", "text": _GO_ON if turn.role == "user" else "(empty)"}]


def _anthropic_kept(blocks: list[_Object]) -> list[_Object]:
    """An answer's blocks on their way back. Blank texts are refused."""
    kept = []
    for block in blocks:
        sent = {name: value for name, value in block.items() if name != "partial_json"}
        if block.get("partial_json"):
            sent["input"] = _argument_object(block["partial_json"])
        if sent.get("type") != "text" or str(sent.get("text") or "").strip():
            kept.append(sent)
    return kept


def _anthropic_blocks(parts: Iterable[_Part]) -> list[_Object]:
    """Without blank texts, which are refused."""
    blocks: list[_Object] = []
    for part in parts:
        block: _Object = {"type": "text", "text": part.data}
        if part.kind != "text":
            block = _anthropic_file(part)
        elif not part.data.strip():
            continue
        blocks.append({**block, "cache_control": part.cache} if part.cache else block)
    return blocks


def _anthropic_file(part: _Part) -> _Object:
    """The block of a picture, a PDF or a text file."""
    if part.kind == "url":
        kind = "document" if part.name else "image"
        return {"type": kind, "source": {"type": "url", "url": part.data}}
    source = {"type": "base64", "media_type": part.media, "data": part.data}
    if part.media.startswith("text/"):
        import base64

        text = base64.b64decode(part.data + "==").decode("utf-8", "replace")
        source = {"type": "text", "media_type": "text/plain", "data": text}
    elif part.media not in _ANTHROPIC_MEDIA:
        raise UnsupportedRequest(f"Anthropic cannot be sent a file of the type {part.media!r:.40}")
    return {"type": "image" if part.media.startswith("image/") else "document", "source": source}


def _anthropic_tools(call: _Call, turns: list[_Turn]) -> _Object:
    """tools and tool_choice. A history with tool calls needs its tools declared in any case."""
    tools = [_given({
        "name": function["name"],
        "input_schema": {"type": "object", **(function.get("parameters") or _NO_PARAMETERS)},
        "description": function.get("description"), "strict": function.get("strict"),
        "cache_control": given.get("cache_control") or function.get("cache_control"),
    }) for given, function in zip(call.tools or (), _functions(call, "Anthropic"), strict=True)]
    kind, name = _choice(call)
    if not tools:
        used = dict.fromkeys(name for turn in turns for _, name, _ in turn.calls)
        tools, kind = [{"name": name, "input_schema": _NO_PARAMETERS} for name in used], "none"
    if not tools:
        return {}
    choice: _Object = {"type": {"required": "any", "named": "tool"}.get(kind, kind)}
    if kind == "named":
        choice["name"] = name
    if call.options.get("parallel_tool_calls") is False and kind != "none":
        choice["disable_parallel_tool_use"] = True
    return {"tools": tools, "tool_choice": None if choice == {"type": "auto"} else choice}


class AnthropicProvider(_HTTPProvider):
    """Anthropic's Messages API: ``https://api.anthropic.com/v1``.

    The environment may name ANTHROPIC_API_KEY and ANTHROPIC_BASE_URL. Settings as for
    OpenAIProvider, without ``api``; a base URL is given as to Anthropic's client, with or without
    its ``/v1``, such as ``https://api.deepseek.com/anthropic``. The version is 2023-06-01 unless
    ``headers`` has an ``anthropic-version``. ``max_tokens`` is 8192 where a call names none.
    Thinking blocks go back to the same provider and model in ``response.message`` only.
    """

    _vendor, _default_url, _api_path = "anthropic", "https://api.anthropic.com", "/v1"
    _cut_paths, _ping_path = ("/messages",), "/models?limit=1"
    _key_variables, _url_variable = ("ANTHROPIC_API_KEY",), "ANTHROPIC_BASE_URL"
    _key_hosts = (".anthropic.com",)
    _rows = _Rows(phrases=(  # all at 400
        (r"specified api usage limits|your credit balance is too low to access", QuotaExceeded),
        (r"^this organization has been disabled", AuthenticationError),
    ))

    def _full_url(self, url: str) -> str:
        """Anthropic's own client adds /v1 to any path, and compatible servers expect that."""
        full = super()._full_url(url)
        return full if full.endswith("/v1") else full + "/v1"

    def _auth_headers(self, key: str) -> dict[str, str]:
        return {"anthropic-version": "2023-06-01", **({"x-api-key": key} if key else {})}

    def _correction(self, report: _Report, words: _Words, status: int, call: _Call) -> _Fix | None:
        """A model may allow less than our own limit, or have no room for it (vLLM); structured
        outputs refuse open objects and bounds in a schema."""
        found = words.find(rf"{_MAX_TOKENS}\D{{1,60}}?(\d{{2,7}})", own=True)
        most = int(found[1]) if found and call.token_limit is None else 0
        if status == 400 and words.find(r"(?i)output_[\w.]{1,40}\.schema"):
            return _Fix("answer_schema", "closed")
        if status == 400 and 0 < most < _MAX_TOKENS:
            return _Fix("default_tokens", most // (2 if words.find("(?i)model_len|context") else 1))
        return super()._correction(report, words, status, call)

    def _prepare(self, call: _Call, streaming: bool) -> tuple[str, _Object, _Collector]:
        call = _renamed_tools(call, _NOT_PLAIN, 128)
        return "/messages", _anthropic_body(call, streaming), _Collector(call, _anthropic_facts)


# ==== Gemini ======================================================================================
# generateContent (https://ai.google.dev/api/generate-content).

#: What Google's documentation says to send as the signature of a call that another model has made.
_FOREIGN_SIGNATURE = "skip_thought_signature_validator"
#: Keys of a schema that leave an object as empty as it is without them.
_NO_ARGUMENTS = (
    "type", "title", "description", "required", "$schema", "$id", "$defs", "definitions",
)


def _gemini_facts(body: _Object) -> _Facts:
    yield "model", body.get("modelVersion")
    yield "id", body.get("responseId")
    yield "usage", body.get("usageMetadata"), _gemini_usage
    if _dict(body.get("promptFeedback")).get("blockReason"):
        yield "stop", "SAFETY"
    for candidate in body.get("candidates") or ():
        yield "choice", candidate.get("index") or 0
        for part in (candidate.get("content") or {}).get("parts") or ():
            text, called = part.get("text"), part.get("functionCall")
            if part.get("thought"):
                yield "thought", text
                continue
            if any(part.values()):  # an empty one would be refused
                yield "keep", "parts", None, part, bool(part.get("thoughtSignature"))
            if called is not None:  # a whole call: no other one has the key object()
                yield "call", object(), called.get("id"), called["name"], called.get("args") or {}
            yield "text", text
        reason = candidate.get("finishReason")
        if reason == "OTHER":  # other vendors say it of whole answers
            raise InvalidResponse("the model's own answer failed", code="other")
        yield "stop", None if reason == "FINISH_REASON_UNSPECIFIED" else reason


def _gemini_usage(usage: _Object) -> Usage:
    names = ("prompt", "toolUsePrompt", "candidates", "thoughts", "cachedContent")
    prompt, used, written, thought, cached = (_count(usage, f"{name}TokenCount") for name in names)
    return Usage(prompt + used, written + thought, cached, 0, thought)


def _gemini_body(call: _Call) -> _Object:
    system, turns = _conversation(call, "Gemini")
    text = "\n\n".join(part.data for part in system)
    contents: list[_Object] = []
    ids: list[str | None] = []
    for turn in turns:
        parts = _gemini_parts(turn, ids)
        contents.append({"role": "user" if turn.role == "user" else "model", "parts": parts})
        ids = [part["functionCall"].get("id") for part in parts if "functionCall" in part]
    return call.finished({
        "contents": contents,
        "systemInstruction": {"parts": [{"text": text}]} if text else None,
        **(_gemini_tools(call) if call.tools else {}),
        "generationConfig": _gemini_config(call) or None,
    })


def _gemini_tools(call: _Call) -> _Object:
    declared: list[_Object] = []
    for function in _functions(call, "Gemini"):
        schema = _dict(function.get("parameters"))  # refused if it allows no arguments
        takes = any(value for key, value in schema.items() if key not in _NO_ARGUMENTS)
        declared.append(_given({
            "name": function["name"],
            "description": function.get("description") or None,
            "parametersJsonSchema": schema if takes else None,
        }))
    kind, name = _choice(call)
    mode = _given({
        "mode": "ANY" if kind in ("required", "named") else kind.upper(),
        "allowedFunctionNames": [name] if kind == "named" else None,
    })
    config = {"functionCallingConfig": mode} if "tool_choice" in call.options else None
    return {"tools": [{"functionDeclarations": declared}], "toolConfig": config}


def _gemini_config(call: _Call) -> _Object:
    kind, schema = _format(call)
    effort = call.options.get("reasoning_effort")
    thinking = None
    if (effort or call.thoughts) and "thoughts" not in call.learned:
        level = {"none": "LOW", "max": "XHIGH"}.get(str(effort), str(effort).upper())
        thinking = {"includeThoughts": True, **({"thinkingLevel": level} if effort else {})}
    return _given({
        **call.renamed({
            "temperature": "temperature", "top_p": "topP", "seed": "seed",
            "presence_penalty": "presencePenalty", "frequency_penalty": "frequencyPenalty",
            "max_tokens": "maxOutputTokens",
        }),
        "stopSequences": _stops(call) or None,
        "responseMimeType": None if kind == "text" else "application/json",
        "responseJsonSchema": schema.get("schema", {}) if kind == "json_schema" else None,
        "thinkingConfig": thinking,
    })


def _gemini_parts(turn: _Turn, ids: list[str | None]) -> list[_Object]:
    """The parts of one turn. ``ids``: those of the model's own calls that this turn answers."""
    if turn.carry.get("parts"):
        return list(turn.carry["parts"])
    parts: list[_Object] = []
    for at, (_, name, content) in enumerate(turn.results):
        given = {"id": ids[at]} if at < len(ids) and ids[at] else {}
        text = "\n".join(part.data for part in content if part.kind == "text")
        answer = _dict(_parsed(text)) or {"error" if text == _NO_RESULT else "output": text}
        parts.append({"functionResponse": {**given, "name": name, "response": answer}})
    images = [part for _, _, content in turn.results for part in content if part.kind != "text"]
    for part in (*images, *turn.parts):
        if part.kind == "url":
            raise UnsupportedRequest("Gemini fetches no image by its URL: send it as a data URL")
        data = {"inlineData": {"mimeType": part.media, "data": part.data}}
        parts.append({"text": part.data} if part.kind == "text" else data)
    for at, (_, name, arguments) in enumerate(turn.calls):
        signed = {"thoughtSignature": _FOREIGN_SIGNATURE} if at == 0 else {}
        parts.append({"functionCall": {"name": name, "args": arguments}, **signed})
    return parts


class GeminiProvider(_HTTPProvider):
    """Google's Gemini API: ``https://generativelanguage.googleapis.com/v1beta``.

    The environment may name GOOGLE_API_KEY, else GEMINI_API_KEY. Settings as for OpenAIProvider,
    without ``api``. A model may be given with or without ``models/``. Images must be data URLs.
    Thought signatures go back to the same provider and model in ``response.message`` only.
    """

    _vendor, _default_url = "gemini", "https://generativelanguage.googleapis.com"
    _api_path, _ping_path = "/v1beta", "/models?pageSize=1"
    _key_variables = ("GOOGLE_API_KEY", "GEMINI_API_KEY")
    _key_hosts = (".googleapis.com",)
    _rows = _Rows(phrases=((r"^user location is|free tier is not", AuthenticationError),))  # at 400

    def _auth_headers(self, key: str) -> dict[str, str]:
        is_token = key.startswith("ya29.")  # Google's OAuth, as Vertex AI wants it
        return {"x-goog-api-key": key} if key and not is_token else super()._auth_headers(key)

    def _prepare(self, call: _Call, streaming: bool) -> tuple[str, _Object, _Collector]:
        call = _renamed_tools(call, r"^[^a-zA-Z_]|[^a-zA-Z0-9_.:-]", 64)
        method = "streamGenerateContent?alt=sse" if streaming else "generateContent"
        path = f"/models/{str(call.model).removeprefix('models/')}:{method}"
        return path, _gemini_body(call), _Collector(call, _gemini_facts)


# ==== Ollama ======================================================================================
# Its own API (https://github.com/ollama/ollama/blob/main/docs/api.md): the OpenAI-compatible one
# drops the beginning of a prompt that does not fit, without a word.


def _ollama_facts(body: _Object) -> _Facts:
    message = body.get("message") or {}
    yield "model", body.get("model")
    if thinking := message.get("thinking"):
        yield "thought", thinking
        yield "grow", "thinking", thinking
    yield "text", message.get("content")
    for call in message.get("tool_calls") or ():  # whole calls: no other one has the key object()
        called = call["function"]
        yield "call", object(), call.get("id"), called["name"], called.get("arguments") or {}
    if not body.get("done"):
        yield "open", "answer"
        return
    yield "usage", body, _ollama_usage
    reason = body.get("done_reason", "stop")
    if not reason:
        raise InvalidResponse("truncated: the server gave up")
    yield "closed", "answer"
    yield "stop", reason
    yield ("end",)


def _ollama_usage(body: _Object) -> Usage:
    return Usage(_count(body, "prompt_eval_count"), _count(body, "eval_count"))


def _ollama_message(call: _Call, message: Message, names: dict[str, str]) -> _Object:
    """One message: text and images apart, arguments as objects, results with their tool's name."""
    role, parts = message["role"], _parts(message.get("content"), "Ollama")
    others = [part for part in parts if part.kind != "text"]
    if any(not part.media.startswith("image/") for part in others):
        raise UnsupportedRequest("Ollama takes images only, and as data URLs")
    call_id = message["tool_call_id"] if role == "tool" else None
    calls = []
    for item in message.get("tool_calls") or ():
        name, arguments = item["function"]["name"], item["function"].get("arguments")
        names[item["id"]] = name
        function = {"name": name, "arguments": _argument_object(arguments)}
        calls.append({"id": item["id"], "function": function})
    return _given({
        "role": "system" if role == "developer" else role,
        "content": "\n".join(part.data for part in parts if part.kind == "text"),
        "images": [part.data for part in others] or None,
        "tool_name": names[call_id] if call_id else None, "tool_call_id": call_id,
        "thinking": call.carried(message).get("thinking") or None,
        "tool_calls": calls or None,
    })


def _ollama_body(call: _Call, streaming: bool) -> _Object:
    choice, _ = _choice(call)
    if call.tools and choice in ("required", "named"):
        raise UnsupportedRequest(f"Ollama cannot force a tool call (tool_choice={choice!r})")
    names: dict[str, str] = {}
    tools = _functions(call, "Ollama") if choice != "none" else []
    same = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")
    options = call.renamed({**{name: name for name in same}, "max_tokens": "num_predict"})
    if stops := _stops(call):
        options["stop"] = stops
    kind, schema = _format(call)
    forms = {"text": None, "json_object": "json", "json_schema": schema.get("schema", {})}
    think: Any = call.thoughts or None
    effort = call.options.get("reasoning_effort")
    if effort and "thoughts" not in call.learned:
        think = {"none": False, "minimal": "low", "xhigh": "max"}.get(effort, effort)
    return call.finished({
        "model": call.model, "stream": streaming,
        "truncate": False, "shift": False,  # or it drops what does not fit, without a word
        "messages": [_ollama_message(call, message, names) for message in call.messages],
        "tools": [{"type": "function", "function": function} for function in tools] or None,
        "options": options or None,
        "format": forms[kind],
        "think": think,
    })


def _ollama_host(text: str) -> str:
    """OLLAMA_HOST as a URL: without a scheme the port is 11434; 0.0.0.0 is this machine."""
    text = text.strip().strip("\"'")
    scheme, mark, rest = ("https://" * (text == "ollama.com") + text).rpartition("://")
    place, slash, path = rest.partition("/")
    user, at, host = place.rpartition("@")
    found = re.fullmatch(r"(\[.*\]|[^:]*):?(\d*)", host)
    name, port = found.groups() if found else (f"[{host}]", "")  # IPv6 without its brackets
    name = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(name, name)
    port = port or ("" if mark else "11434")
    return f"{scheme or 'http'}://{user}{at}{name}{port and ':' + port}{slash}{path}"


class OllamaProvider(_HTTPProvider):
    """Ollama's own API: ``http://localhost:11434``.

    The environment may name OLLAMA_HOST, in any form that Ollama accepts, and OLLAMA_API_KEY for
    its cloud. Settings as for OpenAIProvider, without ``api``. The first token may take 60 seconds,
    since the model may have to be loaded first. A prompt that does not fit is an error instead of
    losing its beginning; ``extra_body={"options": {"num_ctx": …}}`` makes room. It cannot force a
    tool call (UnsupportedRequest), and images must be data URLs.
    """

    _vendor, _default_url = "ollama", "http://localhost:11434"
    _cut_paths, _ping_path = ("/api/chat", "/api", "/v1"), "/api/tags"
    _key_variables, _url_variable = ("OLLAMA_API_KEY",), "OLLAMA_HOST"
    _key_hosts = ("localhost", "127.0.0.1", "ollama.com", ".ollama.com")
    _first_token = 60.0

    def _full_url(self, url: str) -> str:
        return super()._full_url(_ollama_host(url) if isinstance(url, str) else url)

    def _prepare(self, call: _Call, streaming: bool) -> tuple[str, _Object, _Collector]:
        return "/api/chat", _ollama_body(call, streaming), _Collector(call, _ollama_facts)


# ==== scripted provider ===========================================================================

class ScriptedProvider(LLMProvider):
    """A provider without a network, to test your own failover with.

    Each call takes the next item of ``script``: a str (the answer), an LLMResponse, a list of
    deltas (an exception breaks the stream, a Thought is thinking), an exception class or instance
    (raised), or a callable that gets the call's arguments and returns any of these. Past the end:
    ConfigError, or the start again with ``repeat=True``. ``.calls``: a list of dicts with the
    messages, tools, model, kwargs of each call. Thread-safe.
    """

    def __init__(self, script: Iterable[Any], repeat: bool = False) -> None:
        if isinstance(script, (str, bytes)) or not isinstance(script, Iterable):
            cure = "give a list of answers, such as ['hello']"
            raise ConfigError(f"script is a {_kind(script)}: {cure}")
        self._script = list(script)
        self._repeat = repeat
        self._turns = itertools.count()  # its next() is atomic
        self.calls: list[_Object] = []

    def chat(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> LLMResponse:
        """The next item of the script as a whole answer."""
        return _drained(self.stream(messages, tools, model, **kwargs))

    def stream(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> Generator[str, None, LLMResponse]:
        """The next item of the script as deltas."""
        self.calls.append({"messages": messages, "tools": tools, "model": model, "kwargs": kwargs})
        at, number = next(self._turns), len(self._script)
        if at >= number and not (self._repeat and number):
            over = f"ScriptedProvider's script of {number} items is over"
            raise ConfigError(f"{over}: add more, or repeat=True")
        item = self._script[at % number]
        if callable(item) and not isinstance(item, type):
            item = item(messages, tools=tools, model=model, **kwargs)
        if isinstance(item, LLMResponse):
            if item.content:
                yield item.content
            return item
        texts: list[str] = []
        thoughts: list[str] = []
        for delta in item if isinstance(item, (list, tuple)) else [item]:
            if isinstance(delta, type) and issubclass(delta, BaseException):
                raise delta
            if isinstance(delta, BaseException):
                raise delta
            if not isinstance(delta, str):
                known = "str, LLMResponse, exceptions or callables"
                raise ConfigError(f"script holds a {_kind(delta)}: give {known}")
            (thoughts if isinstance(delta, Thought) else texts).append(delta)
            yield delta
        reasoning = "".join(thoughts) or None
        return LLMResponse(content="".join(texts), model=model or "", reasoning=reasoning)


# ==== tier ========================================================================================

_ROLE_ORDER = ("primary", "secondary", "emergency")


class TierHealth(NamedTuple):
    """What a chain knows of one tier, in this process. Plain data.

    ``calls`` and ``failures`` count requests. ``last_error``: of the last failed request or ping,
    None if there was none or a ping has succeeded since. ``last_latency``: seconds of the last
    request, None before. ``learned``: model -> field that its errors refused -> drop or replace.
    """

    name: str
    role: str
    models: tuple[str, ...]
    breaker: BreakerSnapshot
    calls: int
    failures: int
    last_error: str | None
    last_latency: float | None
    learned: dict[str, dict[str, str]] = {}  # noqa: RUF012 - never changed

    def to_dict(self) -> dict[str, Any]:
        """The same by name, JSON-able."""
        return {**self._asdict(), "models": list(self.models), "breaker": self.breaker.to_dict()}


class _Places:
    """The places of a tier with ``max_concurrency``.

    A place is a list that holds a common mark: the mark's reference count tells how many are taken.
    So a place that an exception lost is free again.
    """

    def __init__(self, most: int) -> None:
        self._most, self._mark = most, object()
        self._lock, self._bell = threading.RLock(), threading.Lock()
        self._unused = sys.getrefcount(self._mark)

    def qsize(self) -> int:
        """The number of free places."""
        return self._most - (sys.getrefcount(self._mark) - self._unused)

    def take(self) -> list[object] | None:
        """A place, to be dropped after use; None if there is none."""
        with self._lock:
            return [self._mark] if self.qsize() > 0 else None

    def wait(self, seconds: float) -> None:
        """Wait until a place may be free; a place that was lost rings no bell."""
        self._bell.acquire(timeout=seconds)

    def ring(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._bell.release()


class ProviderTier:
    """One provider in its place in a chain.

    ``models``: ids, the first is the default, or a dict alias -> id; empty: any name is passed on.
    ``role``: primary, secondary or emergency (asked when all else failed, even if its breaker is
    open). ``breaker``: None: the chain makes one. ``timeout``: seconds for a request, None: the
    call's. ``retries``: how often it is asked again after a ServerError, 0: never.
    ``max_concurrency``: requests at once in this process, None: no limit. ``prices``: ``{model or
    alias: (prompt, completion[, cached[, cache_write]])}`` in USD per million tokens, or one tuple
    for all; None: unknown. ``supports_tools``, ``supports_images``: False skips the tier for such
    requests. ``params``: defaults of a call's options; a None in the call removes one. Raises
    ConfigError. Thread-safe.
    """

    def __init__(
        self, name: str, provider: LLMProvider, models: Sequence[str] | Mapping[str, str] = (), *,
        role: str = "primary", breaker: CircuitBreaker | None = None, timeout: float | None = None,
        retries: int = 1, max_concurrency: int | None = None, prices: Any = None,
        supports_tools: bool = True, supports_images: bool = True,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"name={name!r}: give the tier a name")
        try:
            self.params = _checked_params(params)
            if role not in _ROLE_ORDER:
                cure = f"give one of {', '.join(_ROLE_ORDER)}.{_near(role, _ROLE_ORDER)}"
                raise ConfigError(f"role={role!r}: {cure}")
            if breaker is not None and not isinstance(breaker, CircuitBreaker):
                raise ConfigError(f"breaker is a {_kind(breaker)}: give a CircuitBreaker or None")
            self._takes = _options_taken(provider, self.params)
            self.models = _checked_models(models)
            self.timeout = None if timeout is None else float(_number(timeout, "timeout"))
            self.retries = _number(retries, "retries", whole=True)
            if max_concurrency is not None:
                _number(max_concurrency, "max_concurrency", least=1, whole=True)
            self.prices: Any = _checked_prices(prices, self.models)
        except ConfigError as error:
            raise ConfigError(f"tier {name!r}: {error}") from None
        self.name, self.provider, self.role = name, provider, role
        self._ids = tuple(self.models.values())
        self._default = self._ids[0] if self._ids else None
        self.breaker: CircuitBreaker = breaker  # type: ignore[assignment]  # the chain makes one
        self.max_concurrency = max_concurrency
        self.supports_tools, self.supports_images = supports_tools, supports_images
        self._speaks_http = isinstance(provider, _HTTPProvider)
        self._is_chain = getattr(provider, "_is_chain", False) is True  # a mock has any attribute
        #: knows carried parts and thoughts=; also behind a wrapper that passes all attributes on
        self._is_ours = self._is_chain or isinstance(getattr(provider, "_rows", None), _Rows)
        self._open: Callable[..., Generator[str, None, LLMResponse]] = (
            getattr(provider, "stream", None) or functools.partial(LLMProvider.stream, provider)
        )
        self._calls = self._failures = 0  # these four are guarded by _lock
        self._last_error: str | None = None
        self._last_latency: float | None = None
        self._thinkers: set[str | None] = set()  #: models that are known to think before they speak
        self._noted: tuple[BreakerRecord, str | None, Attempt, _Failure] | None = None
        self._renew_after_fork()
        _renewed_after_fork.add(self)

    def _renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal's handler may ask for the health
        self._slots: Any = _Places(self.max_concurrency) if self.max_concurrency else None

    def _id_of(self, model: str) -> str | None:
        """The id to send for a name, None if this tier does not list it."""
        return self.models.get(model) or (model if model in self._ids else None)

    def _sent_for(self, model: str) -> str | None:
        """The same, but a tier that lists no models sends any name as it is."""
        return self._id_of(model) if self.models else model

    def _note(self, error: str | None, latency: float) -> None:
        with self._lock:
            self._calls += 1
            self._last_latency = latency
            if error is not None:
                self._failures += 1
                self._last_error = error

    def _cost(self, usage: Usage, models: Iterable[str | None]) -> float | None:
        """USD, None without a price. Cached tokens without a price cost the prompt's."""
        price = self.prices
        if isinstance(price, dict):
            price = next((price[model] for model in models if model in price), None)
        if price is None:
            return None
        prompt, completion, cached, written = price + (price[0],) * (4 - len(price))
        plain = max(0, usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens)
        total = plain * prompt + usage.cached_tokens * cached + usage.cache_write_tokens * written
        return float(total + usage.completion_tokens * completion) / 1e6

    def _health(self) -> TierHealth:
        self.breaker._look()
        with self._lock:
            seen = (self._calls, self._failures, self._last_error, self._last_latency)
        learned = self.provider._corrections() if isinstance(self.provider, _HTTPProvider) else {}
        models, breaker = tuple(self.models), self.breaker.snapshot()
        return TierHealth(self.name, self.role, models, breaker, *seen, learned)

    def __repr__(self) -> str:
        return f"<ProviderTier {self.name!r} {self.role} {self.provider!r}>"


def _options_taken(provider: Any, params: Mapping[str, Any]) -> frozenset[str] | None:
    """The arguments that a provider's ``chat`` and ``stream`` have names for, None: any."""
    is_class = isinstance(provider, type)
    kind = provider.__name__ if is_class else _kind(provider)
    if is_class or not callable(getattr(provider, "chat", None)):
        cure = "give an object with a chat() method, such as OpenAIProvider()"
        raise ConfigError(f"provider is {kind}: {cure}")
    taken: frozenset[str] | None = None
    for name in ("chat", "stream") if hasattr(provider, "stream") else ("chat",):
        try:
            signature = inspect.signature(getattr(provider, name))
            signature.bind([], tools=None, model=None, timeout=1.0, **params)
        except TypeError as error:
            cure = f"write def {name}(self, messages, tools=None, model=None, **kwargs)"
            raise ConfigError(f"{name}() of {kind} cannot be called ({error}): {cure}") from None
        except ValueError:
            continue  # some built-ins have no signature
        if all(one.kind is not one.VAR_KEYWORD for one in signature.parameters.values()):
            names = frozenset(signature.parameters)
            taken = names if taken is None else taken & names
    return taken


def _checked_models(models: Any) -> dict[str, str]:
    if isinstance(models, (str, bytes)) or not isinstance(models, (Mapping, Sequence)):
        cure = "give a list, such as models=['gpt-6-luna'], or a dict alias -> id"
        raise ConfigError(f"models={models!r}: {cure}")
    pairs = models.items() if isinstance(models, Mapping) else [(model, model) for model in models]
    for alias, model in pairs:
        if not (isinstance(alias, str) and alias and isinstance(model, str) and model):
            raise ConfigError(f"models holds {alias!r}: {model!r}: every model is a non-empty str")
    return dict(pairs)


def _checked_prices(prices: Any, models: Mapping[str, str]) -> Any:
    """None, one tuple, or a dict by ids and aliases."""
    def checked(price: Any, name: str) -> tuple[Any, ...]:
        if not isinstance(price, (tuple, list)) or not 2 <= len(price) <= 4:
            cure = "give (prompt, completion[, cached[, cache_write]])"
            raise ConfigError(f"{name}={price!r}: {cure}")
        return tuple(_number(value, name) for value in price)

    if not isinstance(prices, Mapping):
        return None if prices is None else checked(prices, "prices")
    fixed = {model: checked(price, f"prices[{model!r}]") for model, price in prices.items()}
    by_id = {models[model]: price for model, price in fixed.items() if model in models}
    return {**by_id, **fixed}  # a price under the id itself comes first


def _checked_params(params: Any) -> dict[str, Any]:
    params = {} if params is None else params
    if not isinstance(params, Mapping):
        raise ConfigError(f"params is a {_kind(params)}: give a dict, such as {{'temperature': 0}}")
    for own in ("messages", "tools", "model", "timeout"):
        if own in params:
            cure = "the chain gives it itself; a tier has models= and timeout="
            raise ConfigError(f"params[{own!r}]: {cure}")
    return dict(params)


# ==== configuration ===============================================================================
# A chain from a mapping, a TOML file or the environment. Names, variables and addresses come from
# the classes: a new provider needs here one row in this table.

#: ``from_env`` makes tiers in this order; a name in capitals begins NAME_MODEL.
_PROVIDERS: dict[str, type[_HTTPProvider]] = {
    "lmstudio": LMStudioProvider, "ollama": OllamaProvider, "gemini": GeminiProvider,
    "openai": OpenAIProvider, "anthropic": AnthropicProvider,
}
_STORES: dict[str, type] = {"memory": MemoryStore, "sqlite": SQLiteStore, "redis": RedisStore}
#: Arguments that are objects of Python: a file cannot hold them.
_OBJECTS = frozenset({"accept", "on_event", "on_change", "clock", "sleep", "session"})
#: Arguments and headers that carry a key, and the part of a URL that may hold one.
_KEY_NAMES = r"(?i).*(auth|authorization|cookie|key|token|secret|password)"
_KEY_IN_URL = r"(?i)://[^/?#]*@|[?&][^=&]*(key|token|secret|password|sig|signature)="


def _variables(kind: type[_HTTPProvider]) -> list[str]:
    """The environment variables that make a tier. A server on this machine needs its address."""
    keys = kind._key_variables if kind._default_url.startswith("https") else ()
    return [name for name in (*keys, kind._url_variable) if name]


def _tiers_from_env(environ: Mapping[str, str]) -> list[ProviderTier]:
    tiers, missing = [], []
    for name, kind in _PROVIDERS.items():
        if any(map(environ.get, _variables(kind))):
            key, url = kind._from_environment(environ)
            model = environ.get(variable := f"{name.upper()}_MODEL")
            provider = kind(key, url or kind._default_url)
            tiers.append(ProviderTier(name, provider, [model] if model else []))
            _log.info("from_env: %s with %s", name, model or f"no {variable}")
        else:
            missing.append(" or ".join(_variables(kind)))
    if not tiers:
        raise ConfigError(f"the environment names no provider: set {', '.join(missing)}")
    _log.info("from_env: not set: %s", ", ".join(missing) or "nothing")
    return tiers


def _chain_from_config(kind: type[Own], config: Any, **overrides: Any) -> Own:
    in_file = not isinstance(config, Mapping)
    table, where = (_read_toml(config), f"{config}: ") if in_file else (config, "")
    for name in table:
        if name not in ("chain", "tier", "store"):
            raise ConfigError(f"{where}unknown section {name!r}: give chain, tier or store")
    tiers = table.get("tier")
    if not isinstance(tiers, (list, tuple)) or not tiers:
        raise ConfigError(f"{where}no tiers: write [[tier]], once for each, with a [tier.provider]")
    settings = _settings(table.get("chain", {}), f"{where}[chain]", in_file)
    for name in settings.keys() & {"tiers", "store"}:
        raise ConfigError(f"{where}[chain]: {name} does not stand here: write [[tier]] or [store]")
    if isinstance(policy := settings.get("on_error"), Mapping):  # a file has names of classes
        public = {name: globals()[name] for name in __all__}
        settings["on_error"] = {public.get(name, name): then for name, then in policy.items()}
    settings["tiers"] = [
        _tier_from(tier, f"{where}[[tier]] {at}", in_file) for at, tier in enumerate(tiers, 1)
    ]
    if "store" in table:
        settings["store"] = _typed(table["store"], _STORES, f"{where}[store]", in_file)
    return _built(kind, {**settings, **overrides}, f"{where}[chain]")


def _read_toml(path: Any) -> Any:
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"a {_kind(path)}: give a mapping, or the path of a TOML file")
    try:
        toml = __import__("tomllib" if sys.version_info >= (3, 11) else "tomli")
        with open(path, encoding="utf-8-sig") as file:  # Windows puts a mark in front
            return toml.loads(file.read())
    except ImportError:
        raise ConfigError("TOML on Python 3.10: pip install tomli, or give a mapping") from None
    except OSError as error:
        raise ConfigError(f"{path}: the file cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def _settings(table: Any, where: str, in_file: bool) -> dict[str, Any]:
    """A copy of a table, with the values of the variables that its ``…_env`` entries name."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} is a {_kind(table)}: give a table")
    found = dict(table)
    headers, named = found.get("headers") or {}, found.pop("headers_env", None) or {}
    if not isinstance(headers, Mapping) or not isinstance(named, Mapping):
        raise ConfigError(f"{where}: headers and headers_env have to be tables")
    for name, value in {**headers, **table}.items() if in_file else ():
        if name in _OBJECTS and name in table:  # a header may be called accept
            raise ConfigError(f"{where}: {name} is an object: give it in a mapping, not in a file")
        held = name.endswith("url") and _pattern(_KEY_IN_URL).search(str(value))
        if held or _pattern(_KEY_NAMES).fullmatch(name):
            cure = "name an environment variable: api_key_env, base_url_env, url_env, headers_env"
            raise ConfigError(f"{where}: a file must not hold the key in {name!r}: {cure}")
    for name in found.keys() & {"api_key_env", "base_url_env", "url_env"}:
        plain = name.removesuffix("_env")
        if plain in table:
            raise ConfigError(f"{where}: both {plain} and {name}: give one of them")
        found[plain] = _variable(found.pop(name), f"{where} {name}")
    if named:
        read = {name: _variable(item, f"{where} headers_env") for name, item in named.items()}
        found["headers"] = {**headers, **read}
    return found


def _variable(name: Any, where: str) -> str:
    """What an environment variable holds. A name not in capitals is not shown: it may be a key."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: give the name of an environment variable, as a str")
    if not os.environ.get(name):
        shown = f" {name}" if _pattern("[A-Z][A-Z0-9_]*").fullmatch(name) else ""
        raise ConfigError(f"{where}: the variable{shown} is not set: set it, or name another")
    return os.environ[name]


def _tier_from(table: Any, where: str, in_file: bool) -> ProviderTier:
    settings = _settings(table, where, in_file)
    where = f"{where} ({settings['name']})" if isinstance(settings.get("name"), str) else where
    provider, params = settings.get("provider"), settings.get("params")
    if provider is None:
        raise ConfigError(f'{where}: no provider: give a [tier.provider] with type = "openai"')
    settings["provider"] = made = _typed(provider, _PROVIDERS, f"{where} [tier.provider]", in_file)
    if isinstance(provider, Mapping):
        made._key_from = provider.get("api_key_env")  # the command line names it after a 401
        for name in params.keys() - _OPTIONS if isinstance(params, Mapping) else ():
            cure = f"{_near(name, _OPTIONS)} Fields of one vendor go into extra_body"
            raise ConfigError(f"{where} [tier.params]: unknown option {name!r}.{cure}")
    if isinstance(breaker := settings.get("breaker"), Mapping):
        place = f"{where} [tier.breaker]"
        breaker = {"name": settings.get("name", ""), **_settings(breaker, place, in_file)}
        if isinstance(breaker.get("store"), Mapping):
            breaker["store"] = _typed(breaker["store"], _STORES, f"{place} store", in_file)
        settings["breaker"] = _built(CircuitBreaker, breaker, place)
    return _built(ProviderTier, settings, where)


def _typed(table: Any, kinds: Mapping[str, type], where: str, in_file: bool) -> Any:
    """An object of the class that a table's ``type`` names; an object is taken as it is."""
    if not isinstance(table, Mapping) and not in_file:
        return table
    settings = _settings(table, where, in_file)
    name = settings.pop("type", None)
    if not isinstance(name, str) or name not in kinds:
        cure = f"give one of {', '.join(kinds)}.{_near(name, kinds)}"
        raise ConfigError(f"{where}: {'no type' if name is None else f'type={name!r}'}: {cure}")
    if "url" in settings and kinds is _STORES:  # RedisStore: one argument for a client and a URL
        settings["client_or_url"] = settings.pop("url")
    return _built(kinds[name], settings, where)


def _built(kind: type[T], settings: Mapping[str, Any], where: str) -> T:
    """``kind(**settings)``, with errors that say where."""
    makers: list[Any] = [base for base in kind.__mro__[:-1] if "__init__" in vars(base)]
    taken = [inspect.signature(base.__init__).parameters.values() for base in reversed(makers)]
    known = {item.name: item for items in taken for item in items if item.kind != item.VAR_KEYWORD}
    known.pop("self", None)
    for name, value in settings.items():
        if name not in known:
            cure = f"{_near(name, known)} Known: {', '.join(known)}"
            raise ConfigError(f"{where}: {kind.__name__} has no argument {name!r}.{cure}")
        switch = isinstance(known[name].default, bool) and name != "escalation_prompt"
        if switch and not isinstance(value, bool):
            raise ConfigError(f"{where}: {name}={value!r}: give true or false")
    for name, item in known.items():
        if item.default is item.empty and name not in settings:
            raise ConfigError(f"{where}: no {name.removeprefix('client_or_')}: give one")
    try:
        return kind(**settings)
    except ConfigError as error:
        text = str(error).removeprefix(f"tier {settings.get('name')!r}: ")  # the place says it
        raise ConfigError(f"{where}: {text}") from None
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


# ==== one call ====================================================================================
# _Run is one call of a chain: the list ``later`` says who comes next, the loop in ``answer`` asks
# them. _Request is one request: it alone holds a ticket and a place, and ends both in ``end``.
# ``_judged`` says what follows from a failure. Time is absolute, on the chain's clock.

_Plan = Sequence[tuple[ProviderTier, "str | None"]]  #: who is asked, in which order, for what model
#: Characters at the beginning of an answer that can be decoration before the marker.
_DECORATION = 300
#: What may stand before the marker: white space, quotes, markdown, the language of a code fence.
_BEFORE_MARKER = r"(?:\s|[*_\"'`>~#\u2018-\u201f\u00ab\u00bb\u2039\u203a]|(?<=```)\w{1,20}(?=\s))*"
_warned_of: set[str] = set()  #: places of faults in custom providers, said once in a process


class _Failure(NamedTuple):
    """Why a tier did not answer."""

    tier: ProviderTier
    error: BaseException | BreakerRecord  #: a record: of the breaker that refused
    asked: bool  #: a request was sent


def _each_once(texts: Iterable[str]) -> list[str]:
    """Each text once, with the number of times that it was said."""
    times = Counter(texts).items()
    return [text if number == 1 else f"{text} ({number} times)" for text, number in times]


def _are_counts(usage: Usage) -> bool:
    return all(isinstance(count, int) for count in vars(usage).values())


def _undecorated(text: str) -> int:
    """Where a text begins, white space and decoration left out."""
    return _pattern(_BEFORE_MARKER).match(text[:_DECORATION]).end()  # type: ignore[union-attr]


def _after_thoughts(text: str) -> str:
    """The text without white space and think blocks before it. Of a block that has not ended, only
    the beginning and the last characters stay."""
    found: Any = _pattern(r"(?s)\s*(?:<think>.*?</think>\s*)*").match(text)
    text = text[found.end() :]
    return "<think>" + text[7:][-7:] if text.startswith("<think>") else text


def _after_marker(text: str, marker: str) -> str | None:
    """What follows the marker if the text begins with it, else None."""
    text = _after_thoughts(text)
    end = _undecorated(text) + len(marker)
    if text[end - len(marker) : end].lower() != marker.lower():
        return None
    return text[end:].strip(" \t\r\n*_\"'`>~#:-\u2018\u2019\u201c\u201d")


def _may_begin(text: str, marker: str) -> bool:
    """Whether a text that goes on begins with the marker, or may do so in the end."""
    at = _undecorated(text)
    rest, marker = text[at:].lower(), marker.lower()
    begins = rest.startswith(marker) or marker.startswith(rest)
    fence = text[:at].endswith("```") and re.fullmatch(r"\w{1,20}", rest)
    return "<think>".startswith(text[:7]) or (at < _DECORATION and bool(begins or fence))


class _Request:
    """One request to one tier. It owns a ticket and perhaps one of the tier's places."""

    place: Any = None
    stream: Any = None
    held: list[str] | None = None  #: of a stream: text that is blank or may become the marker
    head = ""  #: what of it is looked at
    response: LLMResponse | None = None  #: the whole answer; of a stream at its end
    taken: Any = ()  #: text that the reader of its stream has got
    idle = 0.0  #: seconds that the reader of its stream has taken between deltas

    def __init__(self, run: _Run, tier: ProviderTier, model: str | None, ticket: Ticket) -> None:
        self.run, self.tier, self.model, self.ticket = run, tier, model, ticket
        self.start = run.clock()

    def send(self) -> None:
        """Get ``response``, or begin a stream: then ``delta`` is its first one."""
        run, tier = self.run, self.tier
        messages, options = run.prepared(self)
        if run.streaming:
            self.held, self.taken = [], []
            self.stream = tier._open(messages, tools=run.tools, model=self.model, **options)
            self.read()
        else:
            self.keep(tier.provider.chat(messages, tools=run.tools, model=self.model, **options))

    def read(self) -> None:
        """Read the stream on to the next ``delta`` for its reader, or to the end."""
        while True:
            try:
                delta = next(self.stream)
            except StopIteration as end:
                response = end.value
                break
            except StreamInterrupted as error:  # of a nested chain: this one may have shown nothing
                cause: Any = error.__cause__ or error
                if isinstance(cause, RouterError):
                    cause.attempts, cause._cost = error.attempts, error._cost
                raise cause from None
            if delta is None:  # as some clients give it for an event without text
                continue
            if not isinstance(delta, str):
                told = f"a stream gave a {_kind(delta)}: yield str"
                raise ConfigError(f"tier {self.tier.name!r}: {told}")
            thought = isinstance(delta, Thought)
            if self.held is not None and not thought:
                marker = self.run.chain._marker
                self.held.append(delta)
                self.head = _after_thoughts(self.head + delta) if marker else delta.strip()
                if not self.head or (marker and _may_begin(self.head, marker)):
                    continue
                delta, self.held = "".join(self.held), None
            if self.run.thoughts or not thought:
                self.delta, self.since = delta, self.run.clock()
                return
        self.keep(response)  # not in the except clause: StopIteration holds what was returned

    def keep(self, response: Any) -> None:
        """Take the whole answer, if it is one."""
        if not isinstance(response, LLMResponse):
            told = f"{_kind(self.tier.provider)} returned {_kind(response)}"
            cure = "return an LLMResponse, or raise a ProviderError"
            raise ConfigError(f"tier {self.tier.name!r}: {told}: {cure}")
        if not isinstance(response.usage, Usage) or not isinstance(response.content or "", str):
            told = f"usage is a {_kind(response.usage)}, content a {_kind(response.content)}"
            raise ConfigError(f"tier {self.tier.name!r}: {told}: give a Usage, and a str or None")
        custom = response.usage is not _NO_USAGE and not self.tier._is_ours
        if custom and not _are_counts(response.usage):  # some clients give None
            counts = vars(response.usage).values()
            response.usage = Usage(*(one if isinstance(one, int) else 0 for one in counts))
        if not response.tool_calls and not (response.content or "").strip():
            raise _error_of_empty(response, self.run.messages)
        self.response = response

    def end(self, settle: Callable[[], None]) -> None:
        """Settle the ticket, close the stream (that may take time), give the place back; once."""
        settle()
        try:
            if self.stream is not None:
                stream, self.stream = self.stream, None
                getattr(stream, "close", dict)()
        except Exception as error:
            if _is_task_limit(error):
                raise
            told = f"{self.tier.name}: closing its stream raised {_raised_at(error)}"
            _log.warning("%s", _ascii(told))
        finally:
            if self.place is not None:
                self.place = None
                self.tier._slots.ring()

    def failed(self, error: BaseException, retries: int = 0, waits: bool = False) -> float | None:
        """End a failed request and record it. Returns the pause before the same tier is asked
        again, None if the next one is to be asked. Raises the error if nobody else is."""
        run, tier, now = self.run, self.tier, self.run.clock()
        if isinstance(error, UnknownModel) and tier._is_chain:
            error = ModelNotFound(str(error))  # another tier may serve it
        left, given = run.deadline - now, now - self.start - self.idle
        late = getattr(error, "code", None) == "attempt_timeout"
        if late and self.idle > given and tier.timeout is not None and given < tier.timeout:
            given = left = 0.0  # it was the caller who was slow, between deltas
        policy = run.chain._on_error
        verdict = _judged(error, _Circumstances(
            next((policy[kind] for kind in type(error).__mro__ if kind in policy), None), retries,
            waits and not self.ticket.is_trial, run.chain.max_retry_after, left, given,
            pause=_drawn(0.1, 0.3),  # drawn, so that clients do not come back all at once
        ))
        self.end(lambda: self.ticket._judge(error, verdict))
        if verdict.then == "pass":
            raise error
        if isinstance(error, ProviderError):
            error.provider, error.model = tier.name, error.model or self.model or ""
        elif not isinstance(error, RouterError):
            self._warn_of(_raised_at(error))
        run.record(self, error)
        if verdict.then == "raise" and not self.taken:
            raise error
        run.failures.append(_Failure(tier, _bare(error), True))
        if verdict.then == "again" and tier.breaker.is_closed:
            return verdict.pause
        if not self.taken:
            run.tell_failover(tier, self.model)
        return None

    def _warn_of(self, place: str) -> None:
        """A fault in a custom provider, once for each place in its code."""
        if place not in _warned_of and len(_warned_of) < 1000:
            _warned_of.add(place)
            told = f"{self.tier.name}: {place} is no ProviderError: it counts as a failure"
            _log.warning("%s", _ascii(told))

    def ended(self, error: BaseException | None) -> _Request | None:
        """End a request whose stream has ended. None if the next tier is to be asked."""
        if error is None:
            self.end(self.ticket.success)
            return self
        if self.taken:
            raise self.interrupted(error)
        self.failed(error)
        return None

    def abandoned(self) -> None:
        """End a request whose reader wants no more of its stream."""
        if self.stream is not None:
            self.end(self.ticket.success if self.taken else self.ticket.neutral)
            self.tier._note(None, self.run.clock() - self.start)

    def interrupted(self, error: BaseException) -> StreamInterrupted:
        """What the reader of a broken stream gets; the ticket takes the verdict of the cause."""
        self.failed(error)
        run, cause, why = self.run, error, _error_text(error)
        silent = getattr(error, "code", None) in ("first_token_timeout", "stall_timeout")
        timed_out = isinstance(error, (ProviderTimeout, TimeoutError)) and not silent
        if timed_out and run.clock() >= run.deadline - _EARLY:
            run.last = None  # of who gave up before: the stronger model was answering
            cause, why = run.failure(late=True), f"the call's timeout of {run.limit:g} s"
        told = _escaped(f"{self.tier.name} broke off: {why}")
        broken = StreamInterrupted(told, provider=self.tier.name, model=self.model or "")
        if isinstance(error, ProviderError):
            for name in ("model", "status", "code", "retry_after", "request_id"):
                setattr(broken, name, getattr(error, name))
        broken.partial, broken.__cause__ = "".join(self.taken), _bare(cause)
        return broken


class _Run:
    """One call of a chain: what was asked, what time is left, what has happened. Of one thread."""

    naps, slept = 0, 0.0
    rung = 0  #: of the ladder: where the next escalation goes
    tops: Sequence[str] = ()  #: the strongest model here and above; others are told the marker
    busy: Sequence[tuple[ProviderTier, str | None]] = ()  #: who had no free place in this round
    escalation: str | None = None  #: why a weaker model gave up
    last: LLMResponse | None = None  #: the last answer that gave up or was refused
    cost: float | None = 0.0
    streaming = thoughts = False

    def __init__(
        self, chain: FailoverChain, messages: list[Message], tools: Tools, model: str | None,
        limits: tuple[float | None, float | None, Sequence[str] | None], options: dict[str, Any],
    ) -> None:
        self.chain, self.clock = chain, chain._clock
        self.messages, self.tools = messages, tools or None
        #: whether the chain around this one has a later tier that is ready
        self.backed = options.pop("_backed", False)
        self.model, self.options = model, options
        timeout, wait, names = limits
        self.wait = chain.wait if wait is None else _number(wait, "wait")
        self.limit: float = chain.timeout + self.wait
        if timeout is not None:
            self.limit = _number(timeout, "timeout")
        plain = model is None and names is None
        self.order: _Plan = chain._plan if plain else chain._order(model, names)
        self.plan = self.order  #: who is asked in this round
        self.later = [*self.order]  #: who is still to be asked in it
        self.observed = chain._on_event is not None or _log.isEnabledFor(logging.DEBUG)
        if chain._marker and chain._instruction:
            tiers = [tier for tier, _ in self.order]
            for rung, name in enumerate(chain._ladder):
                self.tops = chain._ladder[rung:] if chain._serving(name, tiers) else self.tops
        self.attempts: list[Attempt] = []
        self.failures: list[_Failure] = []
        self.start = self.clock()
        self.deadline = self.start + self.limit

    # -- the loop

    def answer(
        self, request: _Request | None = None, broken: BaseException | None = None
    ) -> LLMResponse | _Request:
        """The answer, or a stream that has begun; or the error, with the record of the call.
        ``request``: the request whose stream has ended, ``broken``: by that error."""
        try:
            if request is not None:
                request = request.ended(broken)
            while True:
                if request is not None:
                    if request.response is None:
                        return request
                    if (answer := self._accepted(request, request.response)) is not None:
                        return answer
                if not self.later:
                    self._await_place()
                if not self.later and not self._nap():
                    raise self.failure()
                if self.clock() >= self.deadline:
                    asked = [failure.tier for failure in self.failures]
                    for tier, model in self.later:
                        if tier not in asked:
                            self._skip(tier, model, CircuitOpen("no time left to ask it"))
                    self.plan = self.order
                    raise self.failure()
                tier, model = self.later.pop(0)
                request = self._ask(tier, model)
        except RouterError as error:
            error.attempts, error._cost = tuple(self.attempts), self.cost
            if isinstance(error, (ProviderError, AllProvidersFailed)):
                _log.warning("call failed: %s", _explain(self.attempts))
                data = {"outcome": type(error).__name__, "latency": self.clock() - self.start}
                self.chain._emit("done", "", "", data)
            raise

    def _ask(self, tier: ProviderTier, model: str | None) -> _Request | None:
        """Ask one tier, again if its error says so. None if the next one is to be asked."""
        retries, may_wait = tier.retries, True
        while (request := self._admitted(tier, model)) is not None:
            try:
                request.send()
                if request.response is None:
                    request.ticket._begin_anew()
                else:
                    request.end(request.ticket.success)
                return request
            except BaseException as error:
                try:
                    pause = request.failed(error, retries, may_wait)
                finally:
                    request.ticket.neutral()  # does nothing unless a signal broke into failed()
                if isinstance(error, RateLimited):
                    may_wait = False
                else:
                    retries -= 1
            if pause is None:
                break
            self.tell("retry", tier, model, {"pause": pause})
            self.chain._sleep(pause)
            if not tier.breaker.is_closed:
                self._skip(tier, model)
                break
        return None

    def _admitted(self, tier: ProviderTier, model: str | None) -> _Request | None:
        """A request with a ticket and a place; None if the tier is passed over or full."""
        error = self._unable(tier) if self.chain._picky else None
        ticket = None if error else tier.breaker._try_admit(tier.role == "emergency")
        places = tier._slots
        if ticket is not None:
            try:
                request = _Request(self, tier, model, ticket)
                if places is not None:
                    request.place = places.take()
            except BaseException:
                ticket.neutral()
                raise
            full = places is not None and request.place is None
            if not full and request.start < self.deadline:
                return request
            request.end(ticket.neutral)
            error = CircuitOpen("no time left to ask it")  # a store or a listener took the time
            if full:
                self.busy = [*self.busy, (tier, model)]
                if not self._later_ready(tier):  # then it is waited for
                    return None
                error = CircuitOpen(f"{tier.name} is busy")
        self._skip(tier, model, error)
        return None

    def _await_place(self) -> None:
        """When all others have failed: wait until a full tier has a place, and ask it next."""
        while self.busy and not self.later:
            free = [pair for pair in self.busy if pair[0]._slots.qsize() > 0]
            left = self.deadline - self.clock()
            if left <= 0:
                self.later, self.busy = [*self.busy], ()  # there is no time left to ask them
            elif free:
                self.later = free[:1]
                self.busy = [pair for pair in self.busy if pair is not free[0]]
            elif self.backed:
                return
            else:
                self.busy[0][0]._slots.wait(min(left, 0.05))

    def prepared(self, request: _Request) -> tuple[list[Message], dict[str, Any]]:
        """Messages and options for one request (see FailoverChain). Here time becomes seconds."""
        tier, model, messages = request.tier, request.model, self.messages
        params = tier.params
        if params and self.options.keys() & _TOKEN_LIMITS:  # two names of one option
            params = {name: value for name, value in params.items() if name not in _TOKEN_LIMITS}
        options = {**params, **self.options}
        for name in [*options]:
            if options[name] is None or (tier._takes is not None and name not in tier._takes):
                del options[name]
        left = self.deadline - request.start
        options["timeout"] = left if tier.timeout is None else min(left, tier.timeout)
        ready = tier._is_ours and bool(self.later or self.backed) and self._later_ready(tier)
        if tier._is_chain:
            inner = tier.provider.timeout + tier.provider.wait  # type: ignore[attr-defined]
            options["timeout"] = min(options["timeout"], inner)
            options |= {"_backed": True} if ready else {}
        elif tier._speaks_http:
            named = self.model is not None or "reasoning_effort" in options
            patient = not ready or self.rung or named or model in tier._thinkers
            for name in _TIME_LIMITS[1:]:
                limit = _seconds(options, name, getattr(tier.provider, name))
                limit *= 5.0 if patient else 1.0
                options[name] = min(limit, left / 2) if ready else limit
            options |= {"_shared": left} if ready else {}
            if self.observed:
                options["on_resend"] = lambda data: self.tell("resend", tier, model, data)
        if not tier._is_ours:  # it may change its list, and knows nothing of carried parts
            messages = [
                {name: item for name, item in each.items() if name != _CARRY}
                if _CARRY in each else each for each in messages
            ]
        elif self.thoughts:
            options["thoughts"] = True
        if self.tops and model not in map(tier._sent_for, self.tops):
            form = options.get("response_format")
            kind = form.get("type") if isinstance(form, Mapping) else None
            if kind not in ("json_object", "json_schema"):
                messages = _instructed(messages, self.chain._instruction)
        if self.observed:
            left = None if options["timeout"] == math.inf else options["timeout"]
            self.tell("attempt", tier, model, {"timeout": left})
        return messages, options

    def _later_ready(self, tier: ProviderTier) -> bool:
        """Whether another tier that comes after this one would take the request now."""
        for other, _ in self.later:
            forced = other.role == "emergency" and other.breaker._record.deadline != math.inf
            ready = forced or other.breaker._would_admit()
            if ready and other is not tier and not self._unable(other):
                return True
        return bool(self.backed)

    def _unable(self, tier: ProviderTier) -> RouterError | None:
        """What of the request the tier cannot take, as an error."""
        if self.tools and not tier.supports_tools:
            return UnsupportedRequest(f"{tier.name} takes no tools")
        for message in () if tier.supports_images else self.messages:
            content = message.get("content")
            for part in content if isinstance(content, (list, tuple)) else ():
                if part.get("type") in _PICTURES:
                    return UnsupportedRequest(f"{tier.name} takes no images")
        given = _given(self.options).keys()
        if tier._takes is not None and (lacking := sorted(given - tier._takes - _HINTS)):
            return UnsupportedRequest(f"{tier.name} takes no {', '.join(lacking)}")
        return None

    # -- streams

    def deltas(self, found: LLMResponse | _Request) -> Generator[str, None, LLMResponse]:
        """The deltas of the answer. Until the first text another tier may still be asked."""
        try:
            yield ""  # ChatStream takes it at once: only a generator that has begun can be closed
            while isinstance(found, _Request):
                request, broken = found, None
                if not isinstance(request.delta, Thought):
                    request.taken.append(request.delta)
                yield request.delta
                try:
                    now = self.clock()
                    request.idle += now - request.since
                    if now >= self.deadline:
                        told = "the deadline of the call passed"
                        raise ProviderTimeout(told, code="attempt_timeout")
                    request.read()
                except BaseException as error:
                    broken = error
                if broken is not None or request.response is not None:
                    found = self.answer(request, broken)
                    if request.taken:
                        return found  # type: ignore[return-value]  # no other tier is asked
        except BaseException:
            if isinstance(found, _Request):
                found.abandoned()
            raise
        if found.content:
            yield found.content
        return found

    # -- the record and the answer

    def _skip(
        self, tier: ProviderTier, model: str | None, error: RouterError | None = None
    ) -> None:
        """Note that a tier is passed over; without an error because its breaker refused. That note
        is kept, because in an outage every call makes it."""
        record, noted = tier.breaker._record, tier._noted
        if error is not None or noted is None or noted[0] is not record or noted[1] != model:
            why = _error_text(error) if error else f"CircuitOpen: {tier.breaker._why(record)}"
            attempt = Attempt(tier.name, model or "", "skipped", why)
            noted = (record, model, attempt, _Failure(tier, error or record, False))
            if error is None:
                tier._noted = noted
        self.attempts.append(noted[2])
        self.failures.append(noted[3])
        if self.observed:
            self.tell("skip", tier, model, {"reason": str(error or noted[2].error)})

    def record(self, request: _Request, error: BaseException | None = None) -> None:
        """One request, with what it used. A nested chain's own attempts count in this one."""
        tier, model, response = request.tier, request.model, request.response
        found: Any = error if response is None else response
        inner: Any = getattr(found, "attempts", ())
        if error is not None and not (tier._is_chain or isinstance(error, AllProvidersFailed)):
            inner = ()  # of an earlier call that raised the same object
        usage: Any = getattr(found, "usage", None)
        if not isinstance(usage, Usage) or (error is not None and not _are_counts(usage)):
            usage = _NO_USAGE
        if inner:  # a custom error may call something else so
            are = isinstance(inner, tuple) and all(isinstance(each, Attempt) for each in inner)
            inner = inner if are else ()
            usage = functools.reduce(Usage.__add__, [each.usage for each in inner] or [usage])
        outcome, answered = ("failed", "") if response is None else ("ok", response.model)
        if response is not None and (usage.reasoning_tokens or response.reasoning):
            tier._thinkers.add(model)
        used = usage.prompt_tokens or usage.completion_tokens
        if response is not None or used or getattr(error, "_had_begun", False):
            cost: float | None = None
            if inner:
                cost = getattr(found, "_cost" if response is None else "cost")
            elif used and tier.prices is not None:  # without usage nobody knows what was used
                cost = tier._cost(usage, (answered, model))
            self.cost = None if cost is None or self.cost is None else self.cost + cost
        text, status, latency = None, None, self.clock() - request.start
        if error is not None:
            text, status = _error_text(error), getattr(error, "status", None)
        tier._note(text, latency)
        noted = Attempt(tier.name, model or answered, outcome, text, status, latency, usage)
        self.attempts.append(noted)

    def _accepted(self, request: _Request, response: LLMResponse) -> LLMResponse | None:
        """A copy of the answer with what the chain knows: a provider may keep its own object. None
        if it gave up or is refused: then ``later`` says who is asked instead."""
        self.record(request)
        chain, label, reason = self.chain, "", None
        if chain._marker and not request.taken:
            reason = _after_marker(response.text, chain._marker)
        if reason is not None:
            label = "gave up"
        elif chain._accept is not None and not chain._accept(response):
            label = "refused by accept"
        if label:
            self.attempts[-1] = self.attempts[-1]._replace(outcome="escalated", error=label)
        answer: LLMResponse = object.__new__(type(response))
        answer.__dict__ = response.__dict__.copy()
        answer.provider, answer.model = request.tier.name, answer.model or request.model or ""
        answer.attempts, answer.cost = tuple(self.attempts), self.cost
        answer.latency = self.clock() - self.start
        answer.escalation = self.escalation or response.escalation
        if label:
            self.last, self.escalation = answer, label
            if reason is not None:
                answer.content, self.escalation = reason or None, reason or "no reason given"
            if chain._ladder:
                self._climb(request)
            else:
                self.tell_failover(request.tier, request.model)
            return None
        if len(answer.attempts) > 1 and _log.isEnabledFor(logging.INFO):
            _log.info("answered: %s", answer.explain())
        if self.observed:
            chain._emit("done", answer.provider, answer.model, {
                "outcome": "ok", "latency": answer.latency, "cost": answer.cost,
                "attempts": len(answer.attempts), "prompt_tokens": answer.usage.prompt_tokens,
                "completion_tokens": answer.usage.completion_tokens,
            })
        return answer

    def _climb(self, request: _Request) -> None:
        """Ask the next rung of the ladder, then the tiers that come after the one that gave up."""
        chain, tier, tiers = self.chain, request.tier, [other for other, _ in self.order]
        ids = [tier._sent_for(name) for name in chain._ladder]
        passed = [at + 1 for at, name in enumerate(ids) if name == request.model]
        for rung in range(max(self.rung, *passed, 0), len(ids)):
            if stronger := chain._serving(chain._ladder[rung], tiers):
                break
        else:
            raise self.failure()
        self.rung = rung + 1
        self.tell("escalation", tier, request.model, {"to": chain._ladder[rung]})
        asked, after = dict(stronger), self.order[tiers.index(tier) + 1 :]
        self.plan = [*stronger, *(pair for pair in after if pair[0] not in asked)]
        self.later, self.busy = [*self.plan], ()

    # -- waiting and failing

    def _ready_in(self, patience: float = 1.0) -> float | None:
        """Seconds until it makes sense to ask one of these tiers again; None if it never does.
        ``patience``: so many times as long for a tier that failed just now."""
        hints: list[float] = []
        last = {tier: error for tier, error, _ in self.failures}
        for tier, _ in self.plan:
            error, record = last.get(tier), tier.breaker._record  # asking a store would take time
            left = tier.breaker._remaining(record)
            inner = isinstance(error, AllProvidersFailed)
            if record.state == "closed" and error is not None:
                left = (_hint_of(error) or _SHORT_WAIT) * patience
                if inner and getattr(error, "retry_after", None) is None:
                    left = None  # a chain inside this one knows that waiting does not help
            elif inner and left is not None:
                left = max(left, _hint_of(error) or 0.0)
            elif record.state == "open" and not record.heals:
                left = None  # a wrong key or an empty account
            stays = isinstance(error, ProviderError) and _declared(error)[1] == "neutral"
            if left is not None and not stays:  # such an error is about the request
                hints.append(left)
        return min(hints, default=None)

    def _nap(self) -> bool:
        """Sleep until a tier is worth asking again, if ``wait`` and the deadline allow it."""
        refused = self.last is not None and not self.chain._ladder
        ready = self._ready_in(min(2.0**self.naps, 8.0)) if self.wait and not refused else None
        if ready is None:
            return False
        ready = max(ready, 0.25 * 2.0 ** min(self.naps, 5))
        if ready > self.wait - self.slept or self.clock() + ready >= self.deadline:
            return False
        self.naps, self.slept = self.naps + 1, self.slept + ready
        self.chain._emit("wait", "", "", {"seconds": ready})
        _log.info("all tiers failed: waiting %.1f s", ready)
        self.chain._sleep(ready)
        self.later = [*self.plan]
        return True

    def failure(self, late: bool = False) -> RouterError:
        """What the caller gets when nobody answered."""
        late = late or self.clock() >= self.deadline
        errors: list[BaseException] = [
            tier.breaker._refusal(error) if isinstance(error, BreakerRecord) else error
            for tier, error, _ in self.failures
        ]
        asked: list[Any] = [error for _, error, sent in self.failures if sent]
        if self.last is None and not late:
            only = asked[0] if len({(type(one), _declared(one)) for one in asked}) == 1 else None
            doubtful = isinstance(only, (AuthenticationError, QuotaExceeded))
            if isinstance(only, ProviderError) and not doubtful and _declared(only)[1] == "neutral":
                return only
            if not asked and all(isinstance(error, UnsupportedRequest) for error in errors):
                return UnsupportedRequest("; ".join(map(str, errors)))
        error: AllProvidersFailed
        told = (f"{attempt.tier}: {attempt.error or attempt.outcome}" for attempt in self.attempts)
        reasons = "; ".join(_each_once(map(_escaped, told))) or "nowhere to escalate to"
        if self.last is not None:
            what = "no stronger answer" if self.chain._ladder else "accept refused every answer"
            error = EscalationFailed(f"{what}: {reasons}")
            error.response = self.last
        elif late:
            limits = f"timeout={self.limit:g} s" + (f", wait={self.wait:g} s" if self.wait else "")
            error = DeadlineExceeded(f"the deadline passed ({limits}): {reasons}")
        else:
            error = AllProvidersFailed(f"no tier answered: {reasons}")
        error.errors, error.retry_after = tuple(map(_bare, errors)), self._ready_in()
        error.__cause__ = error.errors[0] if errors else None
        return error

    # -- telling

    def tell_failover(self, tier: ProviderTier, model: str | None) -> None:
        if self.later and self.clock() < self.deadline:
            self.tell("failover", tier, model, {"to": self.later[0][0].name})

    def tell(self, kind: str, tier: ProviderTier, model: str | None, data: dict[str, Any]) -> None:
        level = logging.INFO if kind in ("failover", "escalation") else logging.DEBUG
        if _log.isEnabledFor(level):
            _log.log(level, "%s", _ascii(f"{tier.name} {kind} {model or ''} {data}"))
        self.chain._emit(kind, tier.name, model or "", data)


# ==== chain =======================================================================================

_INSTRUCTION = (
    "If this task is beyond your ability, or you are not confident that your answer is right, do"
    " not guess: reply with {marker} as the very first characters, followed by one short sentence"
    " that says why. A stronger model will then answer instead. Otherwise answer normally and never"
    " mention {marker}."
)


class FailoverChain(LLMProvider):
    """Asks its tiers in order until one answers, within one deadline.

    Primary tiers come first, then secondary, then emergency, within a role as listed. A failure
    goes to the next tier, after one more try on the same tier where the error's class says so. A
    tier that keeps failing is skipped until its breaker lets a trial through. A Retry-After of at
    most ``max_retry_after`` seconds is waited out, once; a longer one parks the tier.

    A tier that exceeds its provider's ``first_token_timeout`` or ``stall_timeout`` is given up.
    While a later tier is ready, neither takes more than half of the time left. Both are five times
    as long when none is ready, the caller named the model or set ``reasoning_effort``, on
    escalation, and for a model that has reported thinking.

    ``escalation_model``: a name, or names, weakest first, asked when an answer begins with
    ``escalation_marker``. ``escalation_prompt``: whether weaker models are told so; a str replaces
    the text. ``accept(response) -> bool``: your own check; a refused answer escalates, or goes to
    the next tier. ``timeout``: seconds for a call. ``wait``: seconds in all that a call may sleep
    until a tier is ready (0: fail at once). ``failure_threshold``, ``recovery_timeout``: of the
    breakers made here. ``store``: shares the breakers with other processes (SQLiteStore) or
    machines (RedisStore); None: not. ``on_error={Class: "next" | "raise"}`` overrides a class's
    policy. ``on_event(event)`` is told of every step; what it raises is logged. ``clock`` and
    ``sleep`` drive all but sockets.

    Thread-safe, fork-safe; a chain can be a tier of another. Raises ConfigError.
    """

    _is_chain = True

    def __init__(
        self, tiers: Iterable[ProviderTier], *,
        escalation_model: str | Sequence[str] | None = None, escalation_marker: str = "[ESCALATE]",
        escalation_prompt: bool | str = True, accept: Callable[[LLMResponse], bool] | None = None,
        timeout: float = 300.0, wait: float = 0.0, max_retry_after: float = 2.0,
        failure_threshold: int = 3, recovery_timeout: float = 15.0, store: Any = None,
        on_error: Mapping[type[Exception], str] | None = None,
        on_event: Callable[[Event], Any] | None = None,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], Any] = time.sleep,
    ) -> None:
        self.tiers = _checked_tiers(tiers)
        self.timeout = _number(timeout, "timeout")
        self.wait = _number(wait, "wait")
        self.max_retry_after = _number(max_retry_after, "max_retry_after")
        self._on_error = _checked_policy(on_error)
        self._on_event = _function(on_event, "on_event", optional=True)
        self._accept = _function(accept, "accept", optional=True)
        self._clock, self._sleep = _function(clock, "clock"), _function(sleep, "sleep")
        self._set_escalation(escalation_model, escalation_marker, escalation_prompt)
        for tier in self.tiers:
            if tier.breaker is None:
                tier.breaker = CircuitBreaker(
                    failure_threshold, recovery_timeout, name=tier.name, clock=clock,
                    jitter=0.25 if store is None else 0.0,  # processes do not try all at once
                )
            tier.breaker.name = tier.breaker.name or tier.name
            if store is not None and tier.breaker._shared is None:
                tier.breaker._share(store)
            tier.breaker._watchers.add(self)
        self._plan: _Plan = [(tier, tier._default) for tier in self.tiers]
        self._picky = not all(
            tier.supports_tools and tier.supports_images and tier._takes is None
            for tier in self.tiers
        )

    def _set_escalation(self, model: Any, marker: Any, prompt: Any) -> None:
        core = marker.strip() if isinstance(marker, str) else ""
        bare = core[_undecorated(core) :]  # decoration is left out on both sides
        if not bare:
            cure = "give a text that is more than decoration, such as '[ESCALATE]'"
            raise ConfigError(f"escalation_marker={marker!r}: {cure}")
        if not isinstance(prompt, (bool, str)):
            raise ConfigError(f"escalation_prompt={prompt!r}: give True, False, or your own text")
        text = _INSTRUCTION if prompt is True else prompt or ""
        self._instruction = text.replace("{marker}", core)
        names = model if isinstance(model, (list, tuple)) else [] if model is None else [model]
        if not all(isinstance(name, str) and name for name in names):
            raise ConfigError(f"escalation_model={model!r}: give a name, or a list of names")
        self._ladder: tuple[str, ...] = tuple(names)
        self._marker = bare if names else ""
        for name in self._ladder:
            if not self._serving(name, self.tiers):
                raise ConfigError(f"escalation_model={name!r}: no tier lists it.{self._hint(name)}")

    # -- public

    def chat(
        self, messages: Messages, tools: Tools = None, model: str | None = None, *,
        system: str | None = None, timeout: float | None = None, wait: float | None = None,
        tiers: Sequence[str] | None = None, **kwargs: Any,
    ) -> LLMResponse:
        """One answer, from the first tier that gives one.

        ``messages``: OpenAI form, or a str for one user message; ``tools``: OpenAI form; neither is
        modified. ``model``: tiers that list it are asked first; None asks each for its default.
        ``system``: a system message put in front. ``timeout``: seconds for everything, None: the
        chain's plus ``wait``. ``wait``: seconds to sleep for a tier, None: the chain's, 0: fail at
        once. ``tiers``: names; no other tier is asked. Other arguments are options for the
        providers; None leaves one out.

        Raises AllProvidersFailed, DeadlineExceeded, EscalationFailed; the error itself if all tiers
        failed with one neutral class, or if its class says "raise" (ContentFiltered); for wrong
        arguments UnknownModel, ConfigError, BadRequest, TypeError.
        """
        try:
            kwargs.pop("thoughts", None)
            checked, limits = _checked_messages(messages, system), (timeout, wait, tiers)
            return _Run(self, checked, tools, model, limits, kwargs).answer()  # type: ignore
        except BaseException as error:
            checked = []  # a traceback shows the locals of this frame
            del messages, tools, system, kwargs
            raise _bare(error)  # noqa: B904 - it is the same error

    def stream(
        self, messages: Messages, tools: Tools = None, model: str | None = None, *,
        system: str | None = None, timeout: float | None = None, wait: float | None = None,
        tiers: Sequence[str] | None = None, thoughts: bool = False, **kwargs: Any,
    ) -> ChatStream:
        """The answer as deltas of text; arguments as for ``chat()``. Returns with the first one.

        Until then it fails over and raises like ``chat()``. After that a break, a stall or the
        deadline (the reader's time included) raises StreamInterrupted with ``.partial``. With
        ``accept`` the whole answer comes as one delta. ``thoughts=True`` also hands out the model's
        thinking, as deltas of the class Thought; until the first text another tier may be asked.
        """
        try:
            checked, limits = _checked_messages(messages, system), (timeout, wait, tiers)
            run = _Run(self, checked, tools, model, limits, kwargs)
            run.streaming, run.thoughts = self._accept is None, thoughts
            return ChatStream(run.deltas(run.answer()))
        except BaseException as error:
            checked = run = None  # type: ignore[assignment]
            del messages, tools, system, kwargs
            raise _bare(error)  # noqa: B904 - it is the same error

    def health(self) -> list[TierHealth]:
        """What is known of each tier, as plain data; asks nobody."""
        return [tier._health() for tier in self.tiers]

    def check(self, timeout: float = 5.0) -> list[TierHealth]:
        """Ping every tier, at most ``timeout`` seconds each, and return the health.

        A failed ping stands in ``last_error`` and counts as a failure (but for 403, 404, 405 and
        501: some servers list no models, or not for this key). A good one clears ``last_error`` and
        lets the next call be an open breaker's trial. It does not close the breaker: a provider may
        list its models and answer nothing.
        """
        _number(timeout, "timeout")
        for tier in self.tiers:
            error = _pinged(tier, timeout)
            if getattr(error, "status", None) not in (403, 404, 405, 501):
                tier.breaker._observe(error)
            with tier._lock:
                tier._last_error = None if error is None else _error_text(error)
        return self.health()

    def ping(self, timeout: float = 5.0) -> None:
        """Returns if any tier's ping does, raises the last one's error. ``timeout``: for all."""
        until = time.monotonic() + _number(timeout, "timeout")
        for tier in self.tiers:
            error = _pinged(tier, max(0.0, until - time.monotonic()))
            if error is None:
                return
        raise error  # type: ignore[misc]

    def reset(self) -> None:
        """Close all breakers, forget what they counted and what providers learned of models."""
        for tier in self.tiers:
            tier.breaker.reset()
            if isinstance(tier.provider, _HTTPProvider):
                tier.provider._forget()

    def close(self) -> None:
        """Free idle connections; the chain stays usable."""
        for tier in self.tiers:
            getattr(tier.provider, "close", dict)()

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<FailoverChain {' -> '.join(tier.name for tier in self.tiers)}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a FailoverChain cannot be copied or pickled; build it where it is used")

    @classmethod
    def from_config(cls: type[Own], config: Mapping[str, Any] | str | os.PathLike[str]) -> Own:
        """A chain from a mapping, or from a TOML file (on Python 3.10 with PyPI's tomli).

        ``[chain]``, ``[[tier]]`` with ``[tier.provider]`` (``type`` and its arguments) and
        ``[tier.breaker]``, and ``[store]`` (``type``: memory, sqlite or redis) take their classes'
        arguments. ``api_key_env``, ``base_url_env``, ``url_env`` and ``headers_env`` name
        environment variables. Only a mapping may hold a key, or objects in place of tables. Raises
        ConfigError that says where.
        """
        return _chain_from_config(cls, config)

    @classmethod
    def from_env(cls: type[Own], environ: Mapping[str, str] | None = None, **settings: Any) -> Own:
        """A chain of what the environment names (None: ``os.environ``); nothing is probed.

        A tier for each provider whose key or base URL is set (a local one needs its address), in
        the order that ``copilot-router --help`` shows. LMSTUDIO_MODEL and so on name the models;
        without one a call has to. ``settings``: the chain's arguments. The log says at INFO what
        was found. Raises ConfigError if nothing was.
        """
        return cls(_tiers_from_env(os.environ if environ is None else environ), **settings)

    # -- before the first tier

    def _order(self, model: str | None, names: Sequence[str] | None) -> _Plan:
        """Who is asked, in which order, with which model."""
        known = [tier.name for tier in self.tiers]
        listed = isinstance(names, Iterable) and not isinstance(names, str)
        asked = known if names is None else [*names] if listed else []
        if not asked:
            cure = f"give a list of names, such as tiers=[{known[0]!r}]"
            raise ConfigError(f"tiers={names!r}: {cure}")
        for name in asked:
            if name not in known:
                told = f"no tier is called {name!r}.{_near(name, known)} Known: {', '.join(known)}"
                raise ConfigError(f"tiers={asked!r}: {told}")
        tiers = [tier for tier in self.tiers if tier.name in asked]
        if model is None:
            return [(tier, tier._default) for tier in tiers]
        if not isinstance(model, str) or not model:
            raise ConfigError(f"model={model!r}: give a name, or None for each tier's default")
        if not any(tier._sent_for(model) for tier in tiers):
            raise UnknownModel(f"no tier serves the model {model!r}.{self._hint(model, tiers)}")
        tiers.sort(key=lambda tier: tier.role == "emergency" or not tier._id_of(model))
        return [(tier, tier._sent_for(model) or tier._default) for tier in tiers]

    def _serving(self, model: str, tiers: Iterable[ProviderTier]) -> _Plan:
        """Those of the tiers that list a model; those that take any, if no tier here lists it."""
        if any(tier._id_of(model) for tier in self.tiers):
            return [(tier, tier._id_of(model)) for tier in tiers if tier._id_of(model)]
        return [(tier, model) for tier in tiers if not tier.models]

    def _hint(self, model: str, tiers: Sequence[ProviderTier] = ()) -> str:
        """The near misses of a name, and at most ten known names."""
        tiers = tiers or self.tiers
        names = dict.fromkeys(name for tier in tiers for name in (*tier.models, *tier._ids))
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        return _near(model, names) + (f" Known: {', '.join([*names][:10])}{more}" if names else "")

    def _emit(self, kind: str, tier: str, model: str, data: dict[str, Any]) -> None:
        try:
            if self._on_event is not None:
                self._on_event(Event(kind, tier, model, data, self._clock()))
        except Exception as error:
            if _is_task_limit(error):
                raise
            _log.exception("on_event failed")

    def _breaker_changed(self, breaker: CircuitBreaker, data: dict[str, Any]) -> None:
        for tier in self.tiers:
            if tier.breaker is breaker:
                self._emit("breaker", tier.name, "", data)


def _pinged(tier: ProviderTier, timeout: float) -> BaseException | None:
    """What the tier's ping raises. A custom provider may have none."""
    try:
        getattr(tier.provider, "ping", lambda _: None)(timeout)
    except Exception as error:
        if _is_task_limit(error):
            raise
        return _bare(error)
    return None


def _checked_tiers(tiers: Any) -> tuple[ProviderTier, ...]:
    if isinstance(tiers, (str, bytes)) or not isinstance(tiers, Iterable):
        raise ConfigError(f"tiers is a {_kind(tiers)}: give a list of ProviderTier")
    found = tuple(tiers)
    if not found:
        raise ConfigError("tiers is empty: give at least one ProviderTier")
    for at, tier in enumerate(found):
        if not isinstance(tier, ProviderTier):
            told = f"tiers[{at}] is a {_kind(tier)}"
            raise ConfigError(f"{told}: give a ProviderTier(name, provider, models)")
        if any(tier.name == other.name for other in found[:at]):
            raise ConfigError(f"tiers[{at}]: the name {tier.name!r} is taken: give another")
    return tuple(sorted(found, key=lambda tier: _ROLE_ORDER.index(tier.role)))


def _checked_policy(on_error: Any) -> dict[type, str]:
    if on_error is not None and not isinstance(on_error, Mapping):
        raise ConfigError(f"on_error={on_error!r}: give a table, such as {{RateLimited: 'raise'}}")
    policy = dict(on_error or {})
    for kind, then in policy.items():
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise ConfigError(f"on_error: {kind!r} is no exception class")
        if then not in ("next", "raise"):
            raise ConfigError(f"on_error[{kind.__name__}]={then!r}: give 'next' or 'raise'")
    return policy


class ChatStream(Generator[str, None, LLMResponse]):
    """A running answer, from ``FailoverChain.stream()``: iterate over its deltas of text.

    Closing it early, or dropping it, frees its connection and counts as no failure. Any thread may
    read or close it, one at a time.
    """

    def __init__(self, deltas: Generator[str, None, LLMResponse]) -> None:
        next(deltas)  # its first item is no delta: once begun, it ends properly when it is lost
        self._deltas = deltas
        self._taken: list[str] = []
        self._response: LLMResponse | None = None

    def __next__(self) -> str:
        try:
            delta = next(self._deltas)
        except StopIteration as end:
            self._response = self._response or end.value
            raise
        except BaseException as error:
            raise _bare(error)  # noqa: B904 - it is the same error
        if not isinstance(delta, Thought):
            self._taken.append(delta)
        return delta

    def send(self, value: None) -> str:
        """The next delta; a stream takes no values."""
        return next(self)

    def throw(self, *error: Any) -> str:
        """Ends the stream, as an exception of its reader; raises it."""
        try:
            return self._deltas.throw(*error)
        except BaseException as raised:
            raise _bare(raised)  # noqa: B904 - it is the same error

    @property
    def text(self) -> str:
        """What has been handed out so far, without thoughts."""
        return "".join(self._taken)

    @property
    def response(self) -> LLMResponse:
        """The whole answer. RouterError before the end of the stream."""
        if self._response is None:
            raise RouterError("the stream is not exhausted: it was not read to its end, or broke")
        return self._response

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        seen = "exhausted" if self._response else f"{len(self._taken)} deltas so far"
        return f"<ChatStream {seen}>"


# ==== command line ================================================================================
# A command's result goes to standard output, everything else to standard error. What servers say
# is escaped before it is shown, so that it cannot steer the terminal.

_CONFIG_FILE = "copilot-router.toml"
_EXIT_CODES = """\
exit status: 0 answered, 1 every tier failed (or output or reset was lost),
2 usage or configuration, 124 deadline, 130 interrupted"""
_BEGIN = f"""\
begin with a model on this machine (LM Studio here), or with a key:
  copilot-router chat --provider lmstudio "Say hello."
  export OPENAI_API_KEY=... OPENAI_MODEL=...
  copilot-router chat "Say hello."
then write several tiers down: copilot-router init

without --config, {_CONFIG_FILE} in this directory is used, else the
environment: a tier for each of these, with its model in OPENAI_MODEL and so on"""
#: What -v says about the events of a call, by their kind.
_SENTENCES = {
    "attempt": "asking {tier}", "retry": "asking {tier} once more, in {pause:.1f} s",
    "resend": "{tier} does not take {field} as it was sent: sending it corrected",
    "skip": "passing over {tier}: {reason}", "escalation": "{tier} gave up: asking {to}",
    "wait": "no tier is ready: waiting {seconds:.1f} s",
    "breaker": "the breaker of {tier} was {old} and is {new}: {reason}",
}


def _program() -> str:
    """How this program was started: installed, or as a copied file."""
    return f"python {sys.argv[0]}" if __name__ == "__main__" else "copilot-router"


def _is_open(stream: Any, *, terminal: bool = False) -> bool:
    """Whether a standard stream is there (and is a terminal)."""
    return not getattr(stream, "closed", True) and (not terminal or stream.isatty())


class _Screen:
    """What a command shows besides its result; it is the chain's ``on_event``."""

    chain: FailoverChain | None = None
    verbose = json = False
    unfinished = False  #: whether the answer has begun a line and not ended it
    _tier = ""
    _timer: threading.Timer | None = None

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, event: Event) -> None:
        self._tier = event.tier or self._tier
        if "store" in event.data:
            self.say(f"the store of {event.tier}: {event.data['store']}")
        elif self.verbose and event.kind in _SENTENCES:
            self.say(_SENTENCES[event.kind].format(tier=event.tier, **event.data))

    def say(self, text: str) -> None:
        """A sentence on standard error, once, on a line of its own."""
        self.patient(False)
        if _is_open(sys.stdout, terminal=True):
            self.end_line()
        if text not in self._said and _is_open(sys.stderr):
            self._said.add(text)
            with contextlib.suppress(OSError):  # a full disk
                print(f"copilot-router: {_escaped(text)}", file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """A piece of the answer. On a terminal it keeps only its line ends and tabs."""
        self.patient(False)
        self.unfinished = not text.endswith("\n") if text else self.unfinished
        safe = _is_open(sys.stdout, terminal=True)
        print(_escaped(text, rf"(?![\n\t]){_UNSHOWN}") if safe else text, end="", flush=True)

    def end_line(self) -> None:
        if self.unfinished:
            self.unfinished = False
            print(flush=True)

    def patient(self, waiting: bool) -> None:
        """Whether a person at a terminal is to be told, after two seconds, who is being asked."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if waiting and not self.verbose and _is_open(sys.stderr, terminal=True):
            self._timer = threading.Timer(2.0, lambda: self.say(f"waiting for {self._tier}"))
            self._timer.daemon = True
            self._timer.start()


def _why(name: str, error: str, chain: FailoverChain) -> str:
    """Why a tier failed, from ``"Class: message"``: with its address and what to look at."""
    provider: Any = next((tier.provider for tier in chain.tiers if tier.name == name), None)
    kind, _, text = error.partition(": ")
    url = getattr(provider, "base_url", "")
    where = f" at {url}" if url not in text else ""
    if kind == "CircuitOpen":
        refused = text.startswith((f"{name} is open", f"{name} is trying"))
        return f"not asked: its breaker{text.removeprefix(name)}" if refused else text
    if kind == "ProviderUnavailable" and text:
        return f"{text}{where}{': is it running?' if text.startswith('refused') else ''}"
    names = getattr(provider, "_key_variables", ())
    used = [getattr(provider, "_key_from", None), *filter(os.environ.get, names), *names]
    named, cure = next(filter(None, used), ""), ""
    if kind == "AuthenticationError" and named:
        none = "name its variable with --api-key-env, or api_key_env in a file"
        none = none if hasattr(provider, "_key_from") else f"set {named}"
        sent = getattr(provider, "_key", "")
        cure = f": check {named}" if sent else f": no key was sent: {none}"
    return f"{kind}{where}{text and ': ' + text.rstrip(':')}{cure}"


def _steps(attempts: Iterable[Attempt], chain: Any) -> list[str]:
    """A sentence for each tier that did not answer, with the number of its failures."""
    bad = [attempt for attempt in attempts if attempt.outcome != "ok"]
    return _each_once(f"{at.tier}: {_why(at.tier, at.error or '', chain)}" for at in bad)


def _failed(screen: _Screen, error: BaseException) -> int:
    """Say what went wrong, with --json also as an object; the exit status."""
    screen.end_line()
    attempts: tuple[Attempt, ...] = getattr(error, "attempts", ())
    lines = _steps(attempts, screen.chain) or [str(error) or type(error).__name__]
    if attempts and isinstance(error, (DeadlineExceeded, EscalationFailed, StreamInterrupted)):
        lines.insert(0, str(error).partition(": ")[0])
    later = getattr(error, "retry_after", None) or 0.0
    if later > 1.0:
        lines.append(f"try again in {math.ceil(later)} s")
    for line in lines:
        screen.say(line)
    if screen.json:
        what = {"type": type(error).__name__, "message": str(error)}
        records = [{**at._asdict(), "usage": vars(at.usage)} for at in attempts]
        told = {"error": what, "attempts": records, "retry_after": later or None}
        print(json.dumps(told), flush=True)
    if isinstance(error, DeadlineExceeded) or isinstance(error.__cause__, DeadlineExceeded):
        return 124
    return 1 if isinstance(error, (AllProvidersFailed, ProviderError)) else 2


def _chain_from(options: Any) -> FailoverChain:
    """The chain that the flags, the configuration or the environment describe."""
    screen, flags = options.screen, vars(options)
    name, url, variable = (flags.get(flag) for flag in ("provider", "base_url", "api_key_env"))
    ladder, direct = flags.get("escalation_model"), bool(name or url)
    settings = {"on_event": screen, **({"escalation_model": ladder} if ladder else {})}
    if options.config is None and not direct and os.path.exists(_CONFIG_FILE):
        options.config = _CONFIG_FILE
        screen.say(f"using {_CONFIG_FILE}")
    alone = variable and not direct and not options.config
    if alone or (options.config and direct):
        raise ConfigError("give --config, or --provider or --base-url with --api-key-env")
    if direct:
        key = _variable(variable, "--api-key-env") if variable else None
        provider: Any = _PROVIDERS[name or "openai"](key, url)
        provider._key_from = variable
        models = [model for model in (options.model, ladder) if model]
        chain = FailoverChain([ProviderTier(name or "openai", provider, models)], **settings)
    elif options.config:
        chain = _chain_from_config(FailoverChain, options.config, **settings)
    else:
        try:
            chain = FailoverChain.from_env(**settings)
        except ConfigError as error:
            raise ConfigError(f"{error}; or write a file: {_program()} init") from None
    screen.chain = chain
    return chain


def _prompt(given: str, screen: _Screen) -> str:
    """The prompt, joined to what is piped in. A given one waits for no terminal and no socket."""
    import stat

    alone, piped = given == "-", ""
    try:
        if alone and _is_open(sys.stdin, terminal=True):
            screen.say("reading the question from standard input; Ctrl-D ends it")
        files = (stat.S_IFIFO, stat.S_IFREG)
        if alone or stat.S_IFMT(os.fstat(sys.stdin.fileno()).st_mode) in files:
            piped = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not {error.encoding}: convert it") from None
    except (AttributeError, OSError, ValueError):
        pass  # closed, or none
    prompt = piped if alone else f"{given}\n\n{piped}" if piped.strip() else given
    if not prompt.strip():
        raise ConfigError("the prompt is empty: give it as an argument or on standard input")
    prompt.encode()  # half a character is a UnicodeError
    return prompt


def _chat_command(options: Any) -> int:
    screen, prompt = options.screen, _prompt(options.prompt, options.screen)
    asked = {name: getattr(options, name) for name in ("model", "system", "timeout", "wait")}
    asked["tiers"] = options.tiers and [name.strip() for name in options.tiers.split(",")]
    with _chain_from(options) as chain:
        names = asked["tiers"] or [tier.name for tier in chain.tiers]
        tiers = [tier for tier in chain.tiers if tier.name in names]
        lost = (getattr(one.provider, "_wants_model", False) and not one.models for one in tiers)
        if tiers and all(lost) and not options.model:
            name, path = tiers[0].name, options.config
            cure = f"list one in {path}" if path else f"set {name.upper()}_MODEL"
            raise ConfigError(f"{name} has no model: pass --model, or {cure}")
        screen.patient(True)
        if options.json or options.no_stream:
            response = chain.chat(prompt, **asked)
            screen.show(json.dumps(response.to_dict()) if options.json else response.text)
        else:
            with chain.stream(prompt, **asked) as stream:
                for delta in stream:
                    screen.show(delta)
            response = stream.response
        screen.end_line()
    if options.verbose:
        screen.say(response.explain())
    return 0


def _tiers_command(options: Any) -> int:
    """status and check: a table with the state in front."""
    checked = options.command == "check"
    with _chain_from(options) as chain:
        found = chain.check(options.timeout) if checked else chain.health()
    bad = checked and any(tier.last_error is not None for tier in found)
    if options.json:
        print(json.dumps([tier.to_dict() for tier in found]))
        return bad
    rows = [["STATE", "TIER", "ROLE", "FAILURES", "RETRY IN", "REASON"]]
    for tier in found:
        seen, error = tier.breaker, tier.last_error
        state, reason = seen.state, seen.reason
        if checked:
            state, reason = ("failed", _why(tier.name, error, chain)) if error else ("ok", "")
        left = "" if seen.retry_after is None else f"{math.ceil(seen.retry_after)} s"
        shown = (state, tier.name, tier.role, str(seen.failures), left, reason)
        rows.append([_escaped(cell) or "-" for cell in shown])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    if not checked:
        _say_whose(options.screen, chain.tiers)
    return bad


def _say_whose(screen: _Screen, tiers: Iterable[ProviderTier]) -> None:
    if alone := ", ".join(tier.name for tier in tiers if tier.breaker._shared is None):
        screen.say(f"{alone}: without a [store] the breakers of other processes are not seen")


def _reset_command(options: Any) -> int:
    with _chain_from(options) as chain:
        known = [tier.name for tier in chain.tiers]
        if options.tier not in known:
            told = f"no tier is called {options.tier!r}.{_near(options.tier, known)}"
            raise ConfigError(f"{told} Known: {', '.join(known)}")
        tier = chain.tiers[known.index(options.tier)]
        old = tier.breaker.state
        tier.breaker.reset()
        _say_whose(options.screen, [tier])
    plain = f"{_escaped(tier.name)}: was {old}, is closed"
    print(json.dumps({"tier": tier.name, "was": old}) if options.json else plain)
    return tier.breaker._shared is not None and tier.breaker._shared._down


#: What init writes above the tiers.
_TEMPLATE = """\
# copilot-router asks these tiers from top to bottom until one answers. To switch one on, take the
# "# " from its lines and name a model. Arguments of FailoverChain, ProviderTier, CircuitBreaker,
# providers and stores may stand here, but no key: api_key_env names the variable that holds one.

[chain]
timeout = 60.0              # seconds for a whole call, failover included
# wait = 120.0              # seconds that a call may sleep until a tier is ready (cron jobs)
# escalation_model = "…"    # who answers when a weaker model begins with [ESCALATE]

# [store]                   # share the breakers between processes; "redis" has a url_env
# type = "sqlite"
# path = "copilot-router.db"  # better absolute: else it depends on where a program is started
"""


def _tier_text(name: str, kind: type[_HTTPProvider]) -> str:
    """A tier as TOML. It is switched on if the environment has what it needs but for a model."""

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

    key, url = kind._from_environment(os.environ)
    model, on = os.environ.get(f"{name.upper()}_MODEL"), any(map(os.environ.get, _variables(kind)))
    variable = next(filter(os.environ.get, kind._key_variables), kind._key_variables[0])
    wants_key = variable in _variables(kind)
    gap = "  # FILL IN the name of a model" if kind._wants_model and not model else ""
    lines = ["[[tier]]", f'name = "{name}"', f"models = [{quoted(model) if model else ''}]{gap}",
             "# prices = [0.1, 0.5]       # USD per million tokens: prompt, completion",
             "[tier.provider]", f'type = "{name}"']
    if key or (wants_key and not url):
        lines.append(f'api_key_env = "{variable}"')
    if _pattern(_KEY_IN_URL).search(url):
        lines.append(f'base_url_env = "{kind._url_variable}"')
    elif url or not wants_key:
        lines.append(f"base_url = {quoted(url or kind._default_url)}")
    return "\n".join(("", *(line if on else f"# {line}" for line in lines), ""))


def _init_command(options: Any) -> int:
    tiers = [_tier_text(name, kind) for name, kind in _PROVIDERS.items()]
    if all(text.startswith("\n#") for text in tiers):  # nothing is set: LM Studio needs nothing
        tiers[0] = tiers[0].replace("\n# ", "\n")
    path = options.path
    try:
        data = (_TEMPLATE + "".join(tiers)).encode()
        with open(path, "xb") as file:
            file.write(data)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        cure = f"name another file: {_program()} init OTHER.toml"
        raise ConfigError(f"{path}: cannot be written ({why}): {cure}") from None
    # of the tiers that are switched on: the name, and what is to be filled in
    on = _pattern(r'(?m)^name = "(.*)"\n(.*FILL IN)?').findall("".join(tiers))
    gaps = ", ".join(name for name, gap in on if gap)
    told = f"Fill in the models of {gaps}, then try:" if gaps else "Try:"
    flag = "" if path == _CONFIG_FILE else f" --config {path}"
    text = f"{path} is written, with {', '.join(name for name, _ in on)}. {told}"
    print(_escaped(f"{text} {_program()} check{flag}"))
    return 0


def _parser() -> Any:
    import argparse

    shape: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    rows = [f"  {name:<10} {' or '.join(_variables(kind))}" for name, kind in _PROVIDERS.items()]
    begin = "\n".join((_BEGIN, *rows, "", _EXIT_CODES))
    says = "Ask LLM providers, one after the other, until one answers."
    parser = argparse.ArgumentParser("copilot-router", description=says, epilog=begin, **shape)
    parser.add_argument("--version", action="version", version=f"copilot-router {__version__}")
    parser.set_defaults(run=None, json=False, verbose=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--config", metavar="FILE", help=f"TOML; else {_CONFIG_FILE} if it is there")
    which.add_argument("--json", action="store_true", help="print the whole result as JSON")
    aim = argparse.ArgumentParser(add_help=False, parents=[which])
    aim.add_argument("--provider", choices=sorted(_PROVIDERS), help="ask this one instead")
    aim.add_argument("--base-url", metavar="URL", help="its address: http://localhost:8080/v1")
    aim.add_argument("--api-key-env", metavar="NAME", help="the variable that holds its key")
    aim.add_argument("--model", help="the model to ask first")

    def command(name: str, says: str, run: Callable[[Any], int], *parents: Any) -> Any:
        words = {"help": says, "description": f"{says}.", "epilog": _EXIT_CODES, **shape}
        made = commands.add_parser(name, parents=parents, **words)
        made.set_defaults(run=run)
        return made

    chat = command("chat", "ask a question and print the answer as it comes", _chat_command, aim)
    says = "the question, in quotes; piped input is added to it; - or nothing reads the input alone"
    chat.add_argument("prompt", nargs="?", default="-", help=says)
    chat.add_argument("--escalation-model", metavar="MODEL", help="asked when the first gives up")
    chat.add_argument("--system", metavar="TEXT", help="a system message")
    chat.add_argument("--timeout", type=float, metavar="SECONDS", help="for everything")
    chat.add_argument("--wait", type=float, metavar="SECONDS", help="for a tier to be ready again")
    chat.add_argument("--tiers", metavar="NAMES", help="ask only these, separated by commas")
    chat.add_argument("--no-stream", action="store_true", help="print the answer when it is whole")
    chat.add_argument("-v", "--verbose", action="store_true", help="say what happens")
    command("status", "show the state of every tier, as its store has it", _tiers_command, which)
    says = "ping every tier: address and key, not the model; exits 1 if one fails"
    check, each = command("check", says, _tiers_command, aim), "for each (default 5)"
    check.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help=each)
    reset = command("reset", "close the breaker of a tier", _reset_command, which)
    reset.add_argument("tier", metavar="TIER", help="its name")
    init = command("init", "write a commented configuration", _init_command)
    init.add_argument("path", nargs="?", default=_CONFIG_FILE, metavar="FILE", help=_CONFIG_FILE)
    return parser


def _run(argv: Sequence[str] | None, screen: _Screen) -> int:
    import warnings

    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest and options.command == "chat" and not any(word.startswith("-") for word in rest):
        parser.error(f'quote the prompt: copilot-router chat "{" ".join((options.prompt, *rest))}"')
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    limit = getattr(options, "timeout", None)
    if limit is not None and not limit > 0.0:
        parser.error("argument --timeout: give a number of seconds above 0")
    options.screen, screen.json, screen.verbose = screen, options.json, options.verbose
    if not _is_open(sys.stdout):
        raise OSError(0, "it is closed")
    getattr(sys.stdout, "reconfigure", dict)(errors="replace")  # a letter it lacks becomes "?"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: screen.say(str(message))
            return int(options.run(options)) if options.run else parser.print_help() or 0
    except UnicodeError:
        text = "text that is not UTF-8 stands in the arguments, the input or the environment"
        return _failed(screen, ConfigError(f"{text}: convert it"))
    except (RouterError, TypeError, ImportError, RecursionError) as error:
        return _failed(screen, error)  # requests, redis or tomli may be missing


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    screen, status = _Screen(), 1
    try:
        try:
            return _run(argv, screen)
        finally:
            screen.patient(False)
            if _is_open(sys.stdout):
                sys.stdout.flush()
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            screen.unfinished = screen.unfinished or _is_open(sys.stdout, terminal=True)
            screen.end_line()
        return 130
    except BrokenPipeError:
        status = 0  # the reader has had enough
    except OSError as error:
        screen.unfinished = False
        screen.say(f"standard output cannot be written: {error.strerror or error}")
    with contextlib.suppress(OSError, ValueError, AttributeError):  # Python flushes at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


if __name__ == "__main__":
    sys.exit(main())

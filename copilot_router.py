# copilot_router 0.1.0 - SPDX-License-Identifier: MIT - Copyright (c) 2026 copilot_router contributors
"""Call several LLM providers through one blocking ``chain.chat(...)`` that keeps answering when some of them fail.

    from copilot_router import FailoverChain, LMStudioProvider, OpenAIProvider, ProviderTier

    chain = FailoverChain([
        ProviderTier("local", LMStudioProvider()),
        ProviderTier("cloud", OpenAIProvider(), models=["gpt-6-luna"]),
    ])
    print(chain.chat("Say hello.", timeout=25).text)

Tiers are asked in order, one after the other, under one deadline. Each has a circuit breaker: after three failures in a
row a tier is skipped at once, and after 15 seconds one single call tries it again. What happens after a failure is
declared by its exception class; the table stands in the section "errors".

Contents: defaults · errors · data · circuit breaker · stores · provider interface · HTTP transport · wire formats: what they
share · HTTP providers · OpenAI Chat Completions and Responses · Anthropic Messages · Gemini generateContent · Ollama ·
scripted provider · tiers and chain · streams · configuration · command line. Search for "# ====".

Times
    All times are seconds (float). For every limit None inherits the next outer one and ``math.inf`` means none. Deadlines
    are wall clock: they cover connecting, dripping bytes, pauses, failover and escalation. A DNS look-up is the one thing
    that cannot be interrupted; it is counted, and the call ends as soon as it returns.
Threads and forks
    Chains, tiers, breakers and providers may be shared by threads and used across a fork. No background thread is started
    and nothing happens at import.
Errors
    Everything raised is a RouterError, but for a TypeError on an unknown option, and what your ``accept`` raises. Errors and
    responses pickle.
Secrets
    Keys, prompts and answers are never in a log, an event, or the str, repr or args of anything.
Dependencies
    ``requests``, imported when the first HTTP provider is built. Custom providers do not need it.
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022 - grouped as the file is, not sorted
    # errors
    "RouterError", "ProviderError", "ProviderUnavailable", "ServerError", "Overloaded", "ProviderTimeout", "InvalidResponse",
    "EmptyResponse", "RateLimited", "QuotaExceeded", "AuthenticationError", "ModelNotFound", "ContextLengthExceeded",
    "UnsupportedRequest", "BadRequest", "ContentFiltered", "StreamInterrupted", "CircuitOpen", "AllProvidersFailed",
    "DeadlineExceeded", "EscalationFailed", "UnknownModel", "ConfigError",
    # data
    "LLMResponse", "ToolCall", "Usage", "Attempt", "Event",
    # circuit breaker
    "CircuitBreaker", "Ticket", "BreakerSnapshot", "BreakerRecord", "MemoryStore", "SQLiteStore", "RedisStore",
    # providers
    "LLMProvider", "OpenAIProvider", "LMStudioProvider", "AnthropicProvider", "GeminiProvider", "OllamaProvider",
    "ScriptedProvider",
    # chain
    "ProviderTier", "FailoverChain", "ChatStream", "TierHealth",
]  # fmt: skip

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
import re
import sys
import threading
import time
import weakref
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, TypeVar

if TYPE_CHECKING:
    import requests

T = TypeVar("T")
Message = Mapping[str, Any]
Messages = str | Sequence[Message]
Tools = Sequence[Mapping[str, Any]] | None

_log = logging.getLogger("copilot_router")
_log.addHandler(logging.NullHandler())

# ==== defaults ========================================================================================================

#: Seconds for a whole call of a chain, failover and escalation included: the SDKs' 600 s is too long for a person.
_CALL_TIMEOUT = 300.0
#: Seconds for TCP and TLS together, per request: what the vendors' SDKs use.
_CONNECT_TIMEOUT = 5.0
#: Seconds from sending to the first sign of generation: cloud models think, but not for longer without saying so.
_FIRST_TOKEN_TIMEOUT = 12.0
#: The same for servers on one's own machine, which may have to load the model first.
_LOCAL_FIRST_TOKEN_TIMEOUT = 60.0
#: Seconds of silence in the middle of an answer.
_STALL_TIMEOUT = 20.0
#: Silence limits are this much longer where nobody else could answer sooner (see FailoverChain).
_PATIENCE = 5.0
#: Bytes of one answer after decompression.
_MAX_RESPONSE_BYTES = 32 * 1024 * 1024
#: Seconds that a complete answer may still wait for its usage numbers and the end of the body.
_TAIL_TIMEOUT = 2.0
#: Seconds a tier stays parked after an error that only a person can mend (key, quota).
_LONG_PARK = 600.0
#: max_tokens for Anthropic, which wants one, where the caller names none.
_ANTHROPIC_MAX_TOKENS = 8192
#: Seconds that a provider's own Retry-After may park a tier at most.
_MAX_PARK = 3600.0
#: The pause before the same tier is asked again, drawn evenly from this range so that clients do not move in step.
_RETRY_PAUSE = (0.1, 0.3)
#: What retry_after says at the most while a trial is under way, and for a tier that failed but is still closed.
_SOON = 1.0
#: A trial's lease doubles with each takeover up to this multiple, so that a slow provider can close its breaker in the end.
_MAX_LEASE_GROWTH = 8
#: What a socket can be told for "no limit": poll() counts milliseconds in 32 bits.
_LONGEST_WAIT = 1e6
#: Bytes read at once; also the most that a line of HTTP's own may have.
_READ_SIZE = 65536
#: Characters kept of a server's own error message.
_MESSAGE_LIMIT = 300
#: Characters of it that are searched for what it means: patterns take long over a long text.
_SEARCHED = 8000


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    """A pattern, compiled when it is first needed: most programs never need most of them. ``re`` itself keeps only 512 in all,
    which a large program has of its own."""
    return re.compile(text)


_never_inherited: weakref.WeakSet[Any] = weakref.WeakSet()  #: objects with locks or sockets to renew in a forked child


def _before_fork() -> None:
    """No other thread may be inside SQLite: a child would inherit its locks, and wait for them for ever."""
    for item in list(_never_inherited):
        if isinstance(item, SQLiteStore):
            item._lock.acquire(timeout=10 * _STORE_BUDGET)


def _after_fork_in_parent() -> None:
    for item in list(_never_inherited):
        if isinstance(item, SQLiteStore):
            try:
                item._lock.release()
            except RuntimeError:
                pass  # made since, or not to be had in time


def _after_fork() -> None:
    for item in list(_never_inherited):
        item._renew_after_fork()


getattr(os, "register_at_fork", dict)(  # Windows has no fork
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork
)

# ==== errors ==========================================================================================================


class RouterError(Exception):
    """The root of all errors here. ``.attempts``: what the chain's call had done by then, a tuple of Attempt; else empty."""

    attempts: tuple[Attempt, ...] = ()


class ProviderError(RouterError):
    """One provider could not answer. Raise it, or a subclass, in a custom provider.

    The class attributes are the policy, for the chain and the breaker alike; a subclass may set its own.

    =========  =====================================================================================================
    then       ``again`` (the same tier once more, then the next), ``next`` (tier) or ``raise`` (to the caller)
    breaker    ``failure`` (counted), ``neutral`` (not counted), ``park`` (opened for ``retry_after``, else for the
               recovery timeout) or ``park long`` (the same, but for 600 s at least)
    =========  =====================================================================================================

    ``message``: for the log and the operator; put no key and no text of a prompt or answer into it. ``provider``, ``model``:
    who failed; a chain fills in the tier's name, "" means unknown. ``status``: the HTTP status, None without one. ``code``:
    the provider's own code, or for a ProviderTimeout which limit was reached. ``retry_after``: seconds after which the
    provider wants to be asked again, None if it did not say. ``request_id``: the provider's own. ``usage``: tokens that were
    used all the same, None if unknown.
    """

    then: ClassVar[str] = "next"
    breaker: ClassVar[str] = "failure"
    usage: Usage | None = None  #: tokens that the failed request had used, where the provider said so

    def __init__(
        self,
        message: str = "",
        *,
        provider: str = "",
        model: str = "",
        status: int | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.provider = provider
        self.model = model
        self.status = status
        self.code = code
        self.retry_after = retry_after
        self.request_id = request_id


class ProviderUnavailable(ProviderError):
    """Refused, DNS, TLS, connect timeout, or a 404 that means a wrong path."""


class ServerError(ProviderError):
    """5xx, 409, 425, or closed or reset before the headers."""

    then = "again"


class Overloaded(ServerError):
    """529, 498, or a 503 that says overloaded or loading."""


class ProviderTimeout(ProviderError):
    """408, or a limit was reached: ``.code`` is first_token_timeout, stall_timeout or attempt_timeout."""


class InvalidResponse(ProviderError):
    """Not the format that was asked for: a redirect, not JSON, truncated, garbled, too large."""


class EmptyResponse(InvalidResponse):
    """A success with neither text nor tool call. Neutral for the breaker if it was cut by length (code ``length``)."""


class RateLimited(ProviderError):
    """429. Without a ``retry_after`` the tier is parked for its breaker's recovery timeout."""

    breaker = "park"


class QuotaExceeded(RateLimited):
    """Out of money, or at a spend limit. Never waited out."""

    breaker = "park long"


class AuthenticationError(ProviderError):
    """401, 403, an invalid key, no permission."""

    breaker = "park long"


class ModelNotFound(ProviderError):
    """The provider does not have this model: a 404 or 410 that names it."""

    breaker = "neutral"


class ContextLengthExceeded(ProviderError):
    """The prompt does not fit, or can never pass the rate limit."""

    breaker = "neutral"


class UnsupportedRequest(ProviderError):
    """The vendor or the model cannot do what the request asks for."""

    breaker = "neutral"


class BadRequest(ProviderError):
    """Not accepted as it stands: any other 4xx, or messages that no provider could take (then nothing was sent)."""

    breaker = "neutral"


class ContentFiltered(ProviderError):
    """Refused by a safety system, without text. Another provider is not asked: that would be evasion."""

    then = "raise"
    breaker = "neutral"


class StreamInterrupted(ProviderError):
    """A stream broke after text had been handed out. ``.partial``: that text.

    ``__cause__`` is what broke it: the breaker judges by that, and status, code, retry_after and request_id are taken from it.
    """

    then = "raise"
    partial: str = ""


class CircuitOpen(RouterError):
    """A breaker said no. ``.retry_after``: seconds until it will let a call through, None if only ``reset()`` will."""

    retry_after: float | None = None


class AllProvidersFailed(RouterError):
    """No tier answered. The message names every tier and its reason.

    ``.errors``: the exceptions, one for each tier that failed or was skipped, in order. ``.retry_after``: seconds until it
    is sensible to try again, None if waiting will not help.
    """

    errors: tuple[BaseException, ...] = ()
    retry_after: float | None = None

    def __reduce__(self) -> Any:
        """A foreign exception that does not survive pickling is replaced by a ProviderError that names it."""
        state = {**vars(self), "errors": tuple(map(_picklable, self.errors))}
        return type(self), self.args, state

    def explain(self) -> str:
        """One ASCII line for an operator: what was tried, what happened, how long it took."""
        return _explain(self.attempts, None)


def _picklable(error: BaseException) -> BaseException:
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return ProviderError(_error_text(error))
    return error


class DeadlineExceeded(AllProvidersFailed, TimeoutError):
    """The call's own time was over. Also a TimeoutError."""


class EscalationFailed(AllProvidersFailed):
    """The stronger side failed or gave up too. ``.response``: the last answer that gave up or was refused, without marker."""

    response: LLMResponse | None = None


class UnknownModel(RouterError):
    """No tier serves this model; the message names the near misses."""


class ConfigError(RouterError, ValueError):
    """A setting is wrong. The message says where, what it was and what to do. Also a ValueError."""


class _UnknownOption(TypeError):
    """An option that no provider knows: the caller's mistake, which no other tier could mend."""


#: The caller's own mistakes and the interpreter's own troubles: they pass straight through a chain.
_PASS_THROUGH: tuple[type[Exception], ...] = (
    ConfigError, UnknownModel, _UnknownOption, AssertionError, MemoryError, RecursionError,
)  # fmt: skip
#: The time limits of task queues, by module: they are Exceptions, but meant for the task and not for us.
_TASK_LIMITS = (
    ("billiard.exceptions", "SoftTimeLimitExceeded"),
    ("celery.exceptions", "SoftTimeLimitExceeded"),
    ("rq.timeouts", "BaseTimeoutException"),
)


def _is_task_limit(error: BaseException) -> bool:
    """Whether a task queue says that the task's time is up: it may do so anywhere, also inside a listener or a store."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _TASK_LIMITS)
    return any(isinstance(kind, type) and isinstance(error, kind) for kind in found)


def _passes_through(error: BaseException) -> bool:
    return not isinstance(error, Exception) or isinstance(error, _PASS_THROUGH) or _is_task_limit(error)


def _verdict(error: BaseException) -> tuple[str, float | None]:
    """What an exception means for a breaker: ``(failure | neutral | park, seconds to park or None for the default)``."""
    if isinstance(error, StreamInterrupted) and error.__cause__ is not None:
        return _verdict(error.__cause__)
    if isinstance(error, ProviderError):
        wanted = None if error.retry_after is None else min(max(error.retry_after, 0.0), _MAX_PARK)
        if error.breaker == "park long":
            return "park", max(wanted or 0.0, _LONG_PARK)
        if isinstance(error, EmptyResponse) and error.code == "length":
            return "neutral", None
        return error.breaker, wanted if error.breaker == "park" else None
    return ("neutral" if _passes_through(error) else "failure"), None


def _is_local(error: BaseException) -> bool:
    """Whether the trouble may be this machine's own: it could not connect, or its key is wrong."""
    return isinstance(error, (ProviderUnavailable, AuthenticationError))


def _number(value: Any, where: str, *, least: float = 0.0, finite: bool = False, whole: bool = False) -> Any:
    """A checked setting. The least value itself is allowed; NaN, booleans and text never are."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least or (finite and math.isinf(value)):
        kind = "a whole number" if whole else "a finite number" if finite else "a number"
        raise ConfigError(f"{where}={value!r}: give {kind} of at least {least:g}")
    return value


def _drawn(least: float, most: float) -> float:
    """A number at random, so that clients do not move in step."""
    import random

    return random.uniform(least, most)


def _near(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` or nothing."""
    import difflib

    close = difflib.get_close_matches(str(name), list(dict.fromkeys(known)), cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


# ==== data ============================================================================================================


@dataclass(frozen=True)
class Usage:
    """Tokens; 0 for what the provider did not report. ``a + b`` adds field by field.

    ``prompt_tokens`` includes cached and cache-written ones, ``completion_tokens`` includes reasoning, for every vendor.
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
        if not isinstance(other, Usage):
            return NotImplemented
        return Usage(*map(operator.add, vars(self).values(), vars(other).values()))


_NO_USAGE = Usage()
#: The key of a message under which it keeps what only the same provider and model may see again.
_CARRY = "copilot_router"


class Attempt(NamedTuple):
    """One request sent, or one tier passed over.

    ``tier``: its name, ``outer/inner`` where the tier is a chain itself. ``model``: as asked, else as answered; "" if neither
    is known. ``outcome``: ok, failed, skipped or escalated (gave up, or refused by ``accept``). ``error``:
    ``"RateLimited: ..."`` or None. ``status``: the HTTP status of a failure, None without one. ``latency``: seconds, 0.0 for a
    skip. ``usage``: tokens of this request, all 0 if it failed and nothing was reported.
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

    ``arguments`` is None when the model's JSON (``raw_arguments``) is no object; no text at all counts as {}. ``id``: to be
    given back as ``tool_call_id`` of the message with the result.
    """

    id: str
    name: str
    arguments: dict[str, Any] | None = field(default=None, repr=False)
    raw_arguments: str = field(default="", repr=False)


@dataclass
class LLMResponse:
    """An answer. A custom provider fills in what it knows; the chain adds provider, latency, cost and attempts."""

    content: str | None = field(default=None, repr=False)
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = "stop"  #: stop | length | tool_calls | content_filter
    usage: Usage = _NO_USAGE  #: of this answer alone
    model: str = ""  #: the model that answered, as the provider reports it, else as asked
    provider: str = ""  #: the name of the tier that answered
    reasoning: str | None = field(default=None, repr=False)  #: thinking text
    request_id: str | None = None
    cost: float | None = None  #: USD over all attempts; None as soon as one that used tokens has no price
    latency: float = 0.0  #: seconds of the whole call
    attempts: tuple[Attempt, ...] = ()
    escalation: str | None = field(default=None, repr=False)  #: why a weaker model gave up
    raw: dict[str, Any] | None = field(default=None, repr=False)  #: whole JSON answers only
    carry: dict[str, Any] | None = field(default=None, repr=False)  #: what ``message`` keeps for the same provider and model

    @property
    def text(self) -> str:
        """The content, "" if there is none."""
        return self.content or ""

    @property
    def has_tool_calls(self) -> bool:
        """Whether the model wants tools called."""
        return bool(self.tool_calls)

    @property
    def message(self) -> dict[str, Any]:
        """The assistant message to append to ``messages``: OpenAI form, JSON-able.

        Thinking blocks, signatures and the like that the same provider and model need back are kept under one more key,
        which is never sent to any other.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.carry:
            message[_CARRY] = self.carry
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _arguments_text(call)}}
                for call in self.tool_calls
            ]
        return message

    @property
    def total_usage(self) -> Usage:
        """Tokens summed over all attempts; this answer's own if there is no record of attempts."""
        return functools.reduce(Usage.__add__, (a.usage for a in self.attempts)) if self.attempts else self.usage

    def explain(self) -> str:
        """One ASCII line for an operator: ``local: ProviderUnavailable: refused 2 ms -> cheap: ok 412 ms $0.0003``."""
        return _explain(self.attempts, self.cost)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able data, for a cache or the result of a task; the texts too."""
        plain = dict(vars(self))
        plain["tool_calls"] = [dict(vars(call)) for call in self.tool_calls]
        plain["usage"] = dict(vars(self.usage))
        plain["attempts"] = [{**a._asdict(), "usage": dict(vars(a.usage))} for a in self.attempts]
        return plain


class Event(NamedTuple):
    """A step of a call, for ``on_event``. ``time`` is the chain's clock. ``tier`` and ``model`` are "" where there is none.

    Events of a call come in its own thread, those of a stream in its reader's. ``data`` by ``kind``, never a key or a text:

    ==========  ====================================================================================================
    attempt     a request is about to be sent; ``timeout``: seconds left for it
    retry       the same tier again; ``pause``: seconds until then
    resend      the same request once more, corrected; ``field``, ``change`` (drop or replace)
    skip        a tier is passed over; ``reason``
    failover    a tier has failed; ``to``: the next one
    escalation  an answer gave up or was refused; ``to``: the model asked instead
    wait        nobody is ready; ``seconds`` until the order starts again
    breaker     a change of state: ``old``, ``new``, ``reason``; or of its store: ``store``
    done        the end; ``outcome`` (ok, or an error's class) and ``latency`` in seconds; for an answer also ``cost`` (USD or
                None), ``attempts`` (how many), ``prompt_tokens``, ``completion_tokens``
    ==========  ====================================================================================================

    There is no ``done`` where the caller's own mistake or an interrupt ended the call, or a stream was given up by its reader.
    """

    kind: str
    tier: str
    model: str
    data: dict[str, Any]
    time: float


def _arguments_text(call: ToolCall) -> str:
    if call.raw_arguments or call.arguments is None:
        return call.raw_arguments
    return json.dumps(call.arguments)


def _explain(attempts: Iterable[Attempt], cost: float | None) -> str:
    steps = []
    for attempt in attempts:
        what = attempt.outcome if attempt.error is None else attempt.error[:80]
        if attempt.outcome in ("skipped", "escalated") and attempt.error:
            what = f"{attempt.outcome} ({what})"
        took = "" if attempt.outcome == "skipped" else f" {attempt.latency * 1000:.0f} ms"
        steps.append(f"{attempt.tier}: {what}{took}")
    line = " -> ".join(steps) + (f" ${cost:.4f}" if cost is not None else "")
    return " ".join(line.encode("ascii", "backslashreplace").decode("ascii").split())


def _error_text(error: BaseException) -> str:
    """``RateLimited: slow down``: our own messages only, since a foreign exception's text could hold anything."""
    return f"{type(error).__name__}: {error}" if isinstance(error, RouterError) and str(error) else type(error).__name__


# ==== circuit breaker =================================================================================================
# One immutable record holds the whole state. A change is a pure function from the old record to the new one, applied under
# the lock by compare and swap. Reads take no lock, so that signal handlers and finalizers may read at any time. The lock is
# re-entrant for the same reason: a finalizer may settle a ticket in the middle of another change, which then starts again.
# No user code (call, clock, listener) ever runs under the lock.


class BreakerSnapshot(NamedTuple):
    """A breaker at one moment; old as soon as it is read. Plain data.

    ``state``: closed, open or half_open. ``generation``: grows with every change. ``failures``: in a row. ``reason``: of the
    last change, "" before. ``retry_after``: seconds until a call may get through, None when closed or open until reset; 0
    when the next caller is the trial. ``opened``, ``rejected``, ``stale``: how often it opened, said no, and dropped a late
    result.
    """

    state: str
    generation: int
    failures: int
    retry_after: float | None
    reason: str
    opened: int
    rejected: int
    stale: int


class BreakerRecord(NamedTuple):
    """The whole state of a breaker, as a store keeps it: plain values, JSON-able by ``_asdict()``.

    ``deadline`` is in the breaker's own time, and in a store in the store's.
    """

    state: str = "closed"  #: closed | open | half_open
    generation: int = 0  #: grows at every transition and with every trial, and in a store at every write: what it compares
    era: int = 0  #: the generation in which this state, or this trial, began: a ticket of another era is stale
    failures: int = 0  #: consecutive
    deadline: float = 0.0  #: open: when a trial is due (inf: until reset); half-open: when the lease is over
    span: float = 0.0  #: seconds that the deadline was away when it was set: no clock that jumps can make it longer
    trips: int = 0  #: openings since the last success, which is what doubles the open time
    takeovers: int = 0  #: trials since the last verdict whose lease ran out
    opened: int = 0
    reason: str = ""


_NO_ERA = -1  #: of tickets whose verdict decides nothing, except that a Retry-After is a fact


class Ticket:
    """Leave to make one call. Settle it once, by a method or by leaving its ``with`` block; the first verdict counts.

    Safe to settle from any thread. A ticket that is never settled does no harm: a trial's lease runs out by itself.
    """

    __slots__ = ("_breaker", "_era", "_settled", "is_trial")

    def __init__(self, breaker: CircuitBreaker, era: int, is_trial: bool) -> None:
        self._breaker = breaker
        self._era = era
        self._settled = False
        self.is_trial = is_trial

    def success(self) -> None:
        """The call worked: closes after a trial, resets the count of failures."""
        record = self._breaker._record
        if record.era == self._era and record.failures == 0 and not self.is_trial:
            self._settled = True  # nothing to change: the path of every healthy call, without the lock
        else:
            self._breaker._settle(self, "success")

    def failure(self, reason: str = "") -> None:
        """The call failed: counted; after a trial the breaker opens again."""
        self._breaker._settle(self, "failure", reason=reason)

    def neutral(self) -> None:
        """The call says nothing about the other side; a trial is handed on to the next caller."""
        self._breaker._settle(self, "neutral")

    def park(self, seconds: float | None = None, reason: str = "") -> None:
        """The other side wants to be left alone for ``seconds`` (None: the recovery timeout)."""
        if seconds is not None:
            _number(seconds, "seconds")
        self._breaker._settle(self, "park", seconds, reason)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._settle_by(error)

    def _settle_by(self, error: BaseException | None) -> None:
        if error is None:
            self.success()
        elif not self._settled:
            outcome, seconds = _verdict(error)
            self._breaker._settle(self, outcome, seconds, _error_text(error), _is_local(error))

    def _renew_after_trial(self) -> None:
        """A stream's first item proves the other side: settle a trial now; what comes later counts as an ordinary call."""
        if self.is_trial:
            self.success()
            record = self._breaker._record
            if record.state == "closed":
                self._era, self.is_trial, self._settled = record.era, False, False


class CircuitBreaker:
    """Stops calling what keeps failing, and finds out with one single call when it works again.

    Closed, it counts consecutive failures and opens at ``failure_threshold`` of them. Open, it refuses for
    ``recovery_timeout`` seconds (0: not at all). Then exactly one caller gets a trial while the others are refused: success
    closes, failure opens again, for the same time or, with ``max_recovery_timeout``, for twice as long up to that. A trial
    is a lease: if it is not settled within ``trial_timeout`` seconds the next caller takes it over.

    Use it as ``breaker.call(fn, ...)``, ``@breaker``, ``with breaker.admit():`` or through a Ticket's methods: all give the
    same verdicts. A ProviderError's class says failure, neutral or park; any other Exception is a failure; what is not an
    Exception (KeyboardInterrupt, a closed generator) is neutral.

    ``max_recovery_timeout``: None means always the same time. ``name``: for messages, and the key in a store; in a chain ""
    takes the tier's. ``clock``: seconds that only grow. ``store``: None keeps the state in this object alone; else a store,
    which other breakers of this name may share, and whose time then counts. ``on_change(name, old, new, reason)`` is called
    after every change of state, in order, outside the lock; what it raises is logged. Thread-safe; a forked child goes on
    with its own copy. Raises ConfigError for a setting out of range.
    """

    def __init__(
        self,
        failure_threshold: int = 3,
        recovery_timeout: float = 15.0,
        *,
        name: str = "",
        max_recovery_timeout: float | None = None,
        trial_timeout: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
        store: Any = None,
        on_change: Callable[[str, str, str, str], None] | None = None,
    ) -> None:
        self.failure_threshold: int = _number(failure_threshold, "failure_threshold", least=1, whole=True)
        self.recovery_timeout: float = _number(recovery_timeout, "recovery_timeout", finite=True)
        longest = recovery_timeout if max_recovery_timeout is None else max_recovery_timeout
        self.max_recovery_timeout: float = _number(longest, "max_recovery_timeout", least=recovery_timeout)
        self.trial_timeout: float = _number(trial_timeout, "trial_timeout")
        self.name = name
        self._clock = clock
        self._listeners: list[Callable[[str, str, str, str], None]] = [on_change] if on_change else []
        self._watchers: weakref.WeakSet[FailoverChain] = weakref.WeakSet()  #: a chain may come and go with its tiers staying
        self._record = BreakerRecord()  # guarded by _lock for writing, as are the next four
        self._rejected = 0
        self._stale = 0
        self._reason: tuple[BreakerRecord | None, str] = (None, "")
        self._changes: deque[tuple[str, str, str]] = deque()
        self._shared: _SharedView | None = None
        self._lock = threading.RLock()
        self._delivering = threading.Lock()
        if store is not None:
            self._share(store)
        _never_inherited.add(self)

    def _share(self, store: Any) -> None:
        """Keep the record in a store from now on."""
        if not self.name:
            raise ConfigError("a CircuitBreaker with a store needs a name: CircuitBreaker(name='openai', store=...)")
        for method in ("load", "swap"):
            if not callable(getattr(store, method, None)):
                known = "MemoryStore(), SQLiteStore(path) or RedisStore(url)"
                raise ConfigError(f"store is a {type(store).__name__}, without {method}(): give {known}")
        self._shared = _SharedView(self, store)

    # -- reading

    def _look(self) -> BreakerRecord:
        """The record, taken from the store if there is one and the last look was long enough ago."""
        if self._shared is not None:
            self._shared.refresh()
        return self._record

    @property
    def state(self) -> str:
        """``closed``, ``open`` or ``half_open``. Reading changes nothing: open until somebody is admitted."""
        return self._look().state

    @property
    def is_closed(self) -> bool:
        """Whether everybody is let through."""
        return self._look().state == "closed"

    @property
    def is_open(self) -> bool:
        """Whether calls are refused, or the next one will be the trial."""
        return self._look().state == "open"

    @property
    def is_half_open(self) -> bool:
        """Whether a trial is under way."""
        return self._look().state == "half_open"

    @property
    def retry_after(self) -> float | None:
        """Seconds until a call may get through; None when closed or open until reset; 1 at most during a trial."""
        return self._remaining(self._look())

    def snapshot(self) -> BreakerSnapshot:
        """Everything at one moment, without the lock: safe in a signal handler."""
        record = self._record
        return BreakerSnapshot(
            record.state, record.generation, record.failures, self._remaining(record), record.reason, record.opened,
            self._rejected, self._stale,
        )  # fmt: skip

    def _remaining(self, record: BreakerRecord) -> float | None:
        if record.state == "closed" or record.deadline == math.inf:
            return None
        left = max(0.0, record.deadline - self._clock())
        return min(left, _SOON) if record.state == "half_open" else left

    def _would_admit(self) -> bool:
        record = self._look()
        return record.state == "closed" or self._clock() >= record.deadline

    # -- guarding calls

    def admit(self) -> Ticket:
        """Leave to make one call, or CircuitOpen. Every ticket is to be settled."""
        ticket = self._try_admit()
        if ticket is None:
            raise self._refusal(self._record)
        return ticket

    def call(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """``fn(*args, **kwargs)``, guarded. Raises CircuitOpen without calling, else whatever ``fn`` raises."""
        record = self._record if self._shared is None else self._look()
        if record.state != "closed":
            ticket = self._try_admit()
            if ticket is None:
                raise self._refusal(self._record)
            with ticket:
                return fn(*args, **kwargs)
        try:
            result = fn(*args, **kwargs)
        except BaseException as error:
            Ticket(self, record.era, False)._settle_by(error)
            raise
        if record.failures or self._record is not record:  # else there is nothing to settle
            Ticket(self, record.era, False).success()
        return result

    def __call__(self, fn: Callable[..., T]) -> Callable[..., T]:
        """Decorate a function, or a generator function, which is then admitted at its first ``next()``."""
        if inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn):
            raise TypeError("a CircuitBreaker guards blocking functions: an async one would be over before it has begun")
        if inspect.isgeneratorfunction(fn):

            @functools.wraps(fn)
            def guarded_stream(*args: Any, **kwargs: Any) -> Any:
                return self._guard_stream(fn, args, kwargs)

            return guarded_stream

        @functools.wraps(fn)
        def guarded(*args: Any, **kwargs: Any) -> T:
            return self.call(fn, *args, **kwargs)

        return guarded

    def _guard_stream(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> Generator[Any, Any, Any]:
        with self.admit() as ticket:
            stream = fn(*args, **kwargs)
            step: Callable[[], Any] = functools.partial(next, stream)
            thrown: BaseException | None = None
            while True:
                try:
                    item = step()
                except StopIteration as end:
                    return end.value
                except BaseException as error:
                    if error is thrown:
                        ticket.success()  # its reader's own exception came back
                    raise
                ticket._renew_after_trial()
                try:
                    sent = yield item
                except GeneratorExit:
                    ticket.success()  # an item was delivered, and the reader has had enough
                    stream.close()
                    raise
                except BaseException as error:
                    thrown, step = error, functools.partial(stream.throw, error)
                else:
                    step = functools.partial(stream.send, sent)

    # -- by hand

    def open(self, seconds: float | None = None, reason: str = "") -> None:
        """Refuse all calls for ``seconds``, or until ``reset()`` if None."""
        length = math.inf if seconds is None else _number(seconds, "seconds")
        now = self._clock()
        self._swap(lambda old: _opened(old, now, length, old.trips, reason or "opened by hand"))

    def reset(self) -> None:
        """Close, forget everything counted, and ignore the results of calls that are still under way."""
        self._swap(lambda old: _closed(old, "reset"))

    # -- the machine

    def _try_admit(self) -> Ticket | None:
        record = self._record if self._shared is None else self._look()
        if record.state == "closed":
            return Ticket(self, record.era, False)
        now = self._clock()
        if now < record.deadline:
            with self._lock:
                self._rejected += 1
            return None
        return self._begin_trial(now)

    def _begin_trial(self, now: float) -> Ticket | None:
        granted: list[Ticket] = []

        def step(old: BreakerRecord) -> BreakerRecord:
            granted.clear()
            if old.state == "closed":
                granted.append(Ticket(self, old.era, False))
                return old
            if now < old.deadline:
                return old
            takeovers = old.takeovers + 1 if old.state == "half_open" else old.takeovers
            lease = self.trial_timeout * min(2 ** max(0, takeovers - 1), _MAX_LEASE_GROWTH)
            at = old.generation + 1
            granted.append(Ticket(self, at, True))
            return old._replace(
                state="half_open", generation=at, era=at, deadline=now + lease, span=lease, takeovers=takeovers
            )

        self._swap(step)
        if granted:
            return granted[0]
        with self._lock:
            self._rejected += 1
        return None

    def _refusal(self, record: BreakerRecord) -> CircuitOpen:
        """The exception for a refusal: a new one each time, or its traceback would grow."""
        error = CircuitOpen(self._why(record))
        error.retry_after = self._remaining(record)
        return error

    def _why(self, record: BreakerRecord) -> str:
        """Why a call is refused; kept with the record it was made for, since an outage asks for it at every call."""
        if self._reason[0] is not record:
            state = "trying again with one call" if record.state == "half_open" else "open"
            until = " until reset" if record.deadline == math.inf else ""
            reason = f" ({record.reason})" if record.reason else ""
            self._reason = (record, f"{self.name or 'circuit'} is {state}{until}{reason}")
        return self._reason[1]

    def _force_admit(self) -> Ticket | None:
        """For a last resort: admitted also while open, unless that was ordered by hand. Its verdict then decides nothing."""
        ticket = self._try_admit()
        if ticket is None and self._record.deadline != math.inf:
            ticket = Ticket(self, _NO_ERA, False)
        return ticket

    def _settle(
        self, ticket: Ticket, outcome: str, seconds: float | None = None, reason: str = "", local: bool = False
    ) -> None:
        """Take in a verdict. ``local``: the trouble is this machine's own, and not for a store that other machines read."""
        with self._lock:
            if ticket._settled:
                return
            ticket._settled = True
        now = self._clock()
        stale = False

        def step(old: BreakerRecord) -> BreakerRecord:
            nonlocal stale
            stale = ticket._era != old.era and outcome != "park"
            if stale:
                return old
            if outcome == "success":
                return self._succeeded(old, ticket)
            if outcome == "failure":
                return self._failed(old, ticket, now, reason)
            if outcome == "park":
                return self._parked(old, now, seconds, reason)
            return _opened(old, now, 0.0, old.trips, old.reason, opened=False) if ticket.is_trial else old

        local = local and self._shared is not None and not self._shared.shares_local_errors
        self._swap(step, ticket._era if local else None)
        if stale and ticket._era != _NO_ERA:
            with self._lock:
                self._stale += 1

    def _succeeded(self, old: BreakerRecord, ticket: Ticket) -> BreakerRecord:
        if ticket.is_trial:
            return _closed(old, "recovered")
        return old._replace(failures=0, trips=0) if old.failures else old

    def _failed(self, old: BreakerRecord, ticket: Ticket, now: float, reason: str) -> BreakerRecord:
        failures = old.failures + 1
        if not ticket.is_trial and failures < self.failure_threshold:
            return old._replace(failures=failures)
        length = min(self.recovery_timeout * 2.0 ** min(old.trips, 64), self.max_recovery_timeout)
        return _opened(old, now, length, old.trips + 1, reason or "failed", failures)

    def _parked(self, old: BreakerRecord, now: float, seconds: float | None, reason: str) -> BreakerRecord:
        length = self.recovery_timeout if seconds is None else seconds
        if old.state != "open":
            return _opened(old, now, length, old.trips, reason or "parked")
        if now + length <= old.deadline:
            return old
        return old._replace(deadline=now + length, span=length, reason=reason or "parked")

    def _swap(self, step: Callable[[BreakerRecord], BreakerRecord], local: int | None = None) -> None:
        """Apply a pure change, to the store first if there is one, then tell the listeners outside all locks.

        ``local``: the era of a ticket whose trouble is not for a store that other machines read.
        """
        if self._shared is None:
            while not self._put(old := self._record, step(old)):
                pass  # a finalizer came between
        else:
            self._shared.change(step, local)
        if self._changes:
            self._deliver()

    def _put(self, old: BreakerRecord, new: BreakerRecord) -> bool:
        """Replace the record, unless it is another by now."""
        with self._lock:
            if self._record is not old:
                return False
            self._record = new
            if new.state != old.state:
                self._changes.append((old.state, new.state, new.reason))
            return True

    def _deliver(self) -> None:
        """Whoever finds the queue idle delivers, so that each listener sees the changes in order; nobody else waits."""
        while self._changes and self._delivering.acquire(blocking=False):
            try:
                while self._changes:
                    self._tell(*self._changes.popleft())
            finally:
                self._delivering.release()

    def _tell(self, old: str, new: str, reason: str) -> None:
        if old == "store":
            _log.log(logging.WARNING if new == "down" else logging.INFO, "%s: %s", self.name, reason)
            self._tell_chains({"store": reason})
            return
        if new == "closed":
            _log.info("%s: closed (%s)", self.name or "circuit", reason)
        elif new == "open":
            _log.warning("%s: open (%s)", self.name or "circuit", reason)
        else:
            _log.debug("%s: trying again with one call", self.name or "circuit")
        for listener in tuple(self._listeners):
            try:
                listener(self.name, old, new, reason)
            except Exception as error:
                if _is_task_limit(error):
                    raise
                _log.exception("%s: a listener failed", self.name or "circuit")
        self._tell_chains({"old": old, "new": new, "reason": reason})

    def _tell_chains(self, data: dict[str, Any]) -> None:
        for chain in tuple(self._watchers):
            chain._breaker_told(self, data)

    def _observe(self, error: BaseException | None) -> None:
        """Take in a health probe: a failure counts, a good one makes an open breaker's trial due and no more."""
        record = self._look()
        if error is not None:
            Ticket(self, record.era if record.state == "closed" else _NO_ERA, False)._settle_by(error)
        elif record.state == "open" and record.deadline != math.inf:
            now = self._clock()
            due = min(record.deadline, now)
            self._swap(lambda old: old._replace(deadline=due, span=0.0) if old.era == record.era else old)

    def _renew_after_fork(self) -> None:
        self._lock, self._delivering = threading.RLock(), threading.Lock()
        self._changes.clear()
        old = self._record
        if self._shared is not None:
            self._shared.renew()
        elif old.state == "half_open":  # the trial is the parent's; the child may make its own
            self._record = _opened(old, self._clock(), 0.0, old.trips, old.reason, opened=False)

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self.name!r} {self._record.state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CircuitBreaker cannot be copied or pickled; share it, or keep its snapshot()")


def _opened(
    old: BreakerRecord, now: float, length: float, trips: int, reason: str, failures: int | None = None, opened: bool = True
) -> BreakerRecord:
    """Open for ``length`` seconds; not ``opened``: a trial that is handed on, with all that was counted."""
    at = old.generation + 1
    return BreakerRecord(
        state="open", generation=at, era=at, failures=old.failures if failures is None else failures, deadline=now + length,
        span=length, trips=trips, takeovers=0 if opened else old.takeovers, opened=old.opened + opened, reason=reason,
    )  # fmt: skip


def _closed(old: BreakerRecord, reason: str) -> BreakerRecord:
    at = old.generation + 1
    return BreakerRecord(generation=at, era=at, opened=old.opened, reason=reason)


# ==== stores ==========================================================================================================
# A store keeps the records of breakers for several processes or machines. It is two methods, so that the state machine above
# exists once: ``load(name) -> (record or None, the store's time)`` and ``swap(name, expected_generation, record) -> bool``,
# which writes the record only if the stored one has that generation (None: if there is none) and says whether it did.
# They may raise anything: a breaker whose store is down goes on by itself. Three attributes may be set, else they are as here:
# ``refresh = 1.0`` (seconds that a read serves), ``shared_counts = False`` (whether failures are counted together) and
# ``shares_local_errors = False`` (whether one machine's trouble to connect, or with its key, is everybody's).

#: How often a change that others keep overtaking is tried again, before it is kept for later.
_STORE_TRIES = 20
#: Seconds until a store that is down is tried again: the first pause and the longest, doubling, drawn from the upper half.
_STORE_PAUSES = (1.0, 60.0)
#: Seconds that a thread waits for another one's work on the same breaker's record, and that one operation of a store takes.
_STORE_BUDGET = 0.1


class _Outage:
    """How long a store that did not answer is left alone."""

    until = -math.inf
    pause = 0.0
    error = ""


#: By store and clock, for all breakers that have both: or each would wait for a hung store in the same call.
_outages: weakref.WeakKeyDictionary[Any, dict[Any, _Outage]] = weakref.WeakKeyDictionary()


def _outage_of(store: Any, clock: Callable[[], float]) -> _Outage:
    try:
        return _outages.setdefault(store, {}).setdefault(clock, _Outage())
    except TypeError:  # a user's own store, or clock, that cannot be a key
        return _Outage()


class _SharedView:
    """What one breaker knows of its record in a store: reads that are kept a while, compare-and-set writes, and the peace to
    go on alone when the store does not answer. Its lock is never held together with the breaker's while the store works."""

    def __init__(self, breaker: CircuitBreaker, store: Any) -> None:
        self._breaker = breaker
        self._store = store
        self._refresh = getattr(store, "refresh", 1.0)
        self._shared_counts = getattr(store, "shared_counts", False)
        self.shares_local_errors = getattr(store, "shares_local_errors", False)
        # The breaker's record is the stored one as of the last look, with three exceptions, each with a flag below: changes
        # that could not be written yet (_unsaved), an opening that is nobody else's business (_alone), and failures that are
        # not counted together. While _down nothing is read or written before _next_read. A write names the generation in
        # _seen; after a write that lost, or a look that a finalizer overtook, _seen is -1, which no record has.
        self._seen: int | None = None  #: the stored generation, as last seen; None: no record
        self._offset = 0.0  #: the store's time less the breaker's
        self._next_read = -math.inf
        self._unsaved = False  #: a change that was meant for the store has not reached it
        self._alone = False  #: the breaker is not closed for reasons of this machine's own
        self._down = False
        self._outage, self._unreadable = _outage_of(store, breaker._clock), _Outage()
        self.renew()

    def renew(self) -> None:
        """New locks, for a forked child."""
        self._lock = threading.RLock()
        self._next_read = -math.inf

    def refresh(self) -> None:
        """Read the store if that is due; while one thread does, the others go on with what is known."""
        if self._breaker._clock() >= self._next_read and self._lock.acquire(blocking=False):
            try:
                self._load()
            finally:
                self._lock.release()
            if self._breaker._changes:
                self._breaker._deliver()

    def change(self, step: Callable[[BreakerRecord], BreakerRecord], local: int | None) -> None:
        """Apply a change to the stored record and to the breaker's, or to the breaker's alone if it must be."""
        breaker = self._breaker
        if not self._lock.acquire(timeout=2 * _STORE_BUDGET):
            self._put(step)  # another thread is waiting for the store: it, or the next look, will save this
            self._unsaved = self._unsaved or local is None
            return
        until, private = time.monotonic() + 2 * _STORE_BUDGET, False
        try:
            if self._down or self._next_read == -math.inf:
                self._load()
            for _ in range(_STORE_TRIES):
                seen, old = self._seen, breaker._record  # as they are before a finalizer comes between
                if seen is None and old.generation < self._now_ms():
                    breaker._put(old, old._replace(generation=self._now_ms()))  # above any number that a lost record had
                    old = breaker._record
                new = step(old)
                if new is old:
                    return
                if new.generation == old.generation:
                    new = new._replace(generation=old.generation + 1)
                counts_only = new.era == old.era and new.state == "closed" and not self._shared_counts
                private = local is not None or self._alone or counts_only
                if private or self._down:
                    break
                saved = self._try(self._store.swap, breaker.name, seen, self._to_store(new))
                if saved is None:
                    break
                if saved:
                    self._seen = new.generation
                    if not breaker._put(old, new):
                        self._forget()
                    return
                self._forget()
                self._load()  # somebody was quicker
                if time.monotonic() > until:
                    break
            self._go_alone(step, local, private)
        finally:
            self._lock.release()

    def _go_alone(self, step: Callable[[BreakerRecord], BreakerRecord], local: int | None, private: bool) -> None:
        """Keep a change to this breaker, for later if it is not private. Trouble of this machine's own is: its trial, taken
        from the others, goes back to them."""
        old, new = self._put(step)
        if local == old.era and old.state == "half_open" and not self._alone and not self._down:
            given_back = _opened(old, old.deadline, -old.span, old.trips, old.reason, opened=False)
            if self._try(self._store.swap, self._breaker.name, self._seen, self._to_store(given_back)):
                self._seen = given_back.generation
        was_alone = self._alone
        self._alone = new.state != "closed" and (local is not None or was_alone)
        if was_alone and not self._alone:
            self._forget()
        self._unsaved = self._unsaved or not (private or new is old)

    def _put(self, step: Callable[[BreakerRecord], BreakerRecord]) -> tuple[BreakerRecord, BreakerRecord]:
        while True:
            old = self._breaker._record
            new = step(old)
            if self._breaker._put(old, new):
                return old, new

    def _forget(self) -> None:
        """What was seen of the store is out of date."""
        self._seen, self._next_read = -1, -math.inf

    def _load(self) -> None:
        """Read the stored record and take it over, or save what could not be saved before."""
        clock = self._breaker._clock
        now = clock()
        if self._down and now < self._next_read:
            return
        self._next_read, seen = now + self._refresh, self._seen
        found = self._try(self._store.load, self._breaker.name)
        if found is None or self._seen != seen:  # a finalizer has changed it meanwhile: what was read is old
            return
        record, store_now = found
        self._offset = store_now - clock()
        generation = None if record is None else record.generation
        mine = self._breaker._record
        if generation != self._seen:
            if record is None:
                self._seen, self._unsaved = None, mine.state != "closed" and not self._alone
            elif not self._unsaved or record.generation > mine.generation or mine.state == "closed":
                self._adopt(mine, record, store_now)
        if self._unsaved and not self._alone:
            mine = self._breaker._record
            newer = generation is None or mine.generation > generation
            new = mine if newer else mine._replace(generation=(generation or 0) + 1)
            self._unsaved = False  # before: another thread may have more to save meanwhile
            saved = self._try(self._store.swap, self._breaker.name, generation, self._to_store(new))
            self._unsaved = self._unsaved or not saved
            if saved is None:
                return
            self._seen = new.generation if saved else -1
            if saved and new is not mine:
                self._breaker._put(mine, new)
        if self._down:
            self._down, self._outage.pause, self._unreadable.pause = False, 0.0, 0.0
            self._tell("the store is back")

    def _adopt(self, mine: BreakerRecord, record: BreakerRecord, store_now: float) -> None:
        if self._alone and record.state == "closed":
            self._seen = record.generation
            return
        left = math.inf if record.deadline == math.inf else min(max(record.deadline - store_now, 0.0), record.span)
        new = record._replace(deadline=0.0 if record.state == "closed" else self._breaker._clock() + left)
        if not self._shared_counts and new.state == "closed":
            new = new._replace(failures=mine.failures if mine.state == "closed" and new.era == mine.era else 0)
        self._alone = self._unsaved = False
        if self._breaker._put(mine, new):
            self._seen = record.generation  # not before: a finalizer's change would pass for one made in this knowledge
        else:
            self._unsaved = True
            self._forget()

    def _to_store(self, record: BreakerRecord) -> BreakerRecord:
        return record._replace(deadline=record.deadline + self._offset if record.state != "closed" else 0.0)

    def _now_ms(self) -> int:
        return int((self._breaker._clock() + self._offset) * 1000)

    def _try(self, operation: Callable[..., Any], *args: Any) -> Any:
        """What the store says, None if it is down: then it is left alone for a while that grows."""
        clock, outage = self._breaker._clock, self._outage
        until = outage.until
        if clock() >= until:
            try:
                return operation(*args)
            except Exception as error:
                if _is_task_limit(error):
                    raise
                if isinstance(error, (ValueError, TypeError, LookupError)):  # this record, not the store
                    outage = self._unreadable
                    until = outage.until
                if outage.until == until:  # else another breaker has just found out
                    first, longest = _STORE_PAUSES
                    outage.pause = min(max(first, 2 * outage.pause), longest)
                    outage.until = clock() + _drawn(outage.pause / 2, outage.pause)
                    outage.error = type(error).__name__
        self._next_read = outage.until
        if not self._down:
            self._down = True
            self._tell(f"the store is down ({outage.error}): going on alone")
        return None

    def _tell(self, what: str) -> None:
        """Said by the breaker, in order with its changes, as soon as no lock is held."""
        self._breaker._changes.append(("store", "down" if self._down else "back", what))


class MemoryStore:
    """Records in this process: breakers of one name share one state. Never down. ``clock`` is its time. Thread-safe."""

    refresh = 0.0
    shared_counts = True
    shares_local_errors = True

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: dict[str, BreakerRecord] = {}
        self._renew_after_fork()
        _never_inherited.add(self)

    def _renew_after_fork(self) -> None:
        self._lock = threading.RLock()

    def load(self, name: str) -> tuple[BreakerRecord | None, float]:
        """The record of a breaker, None if there is none, and the time."""
        return self._records.get(name), self._clock()

    def swap(self, name: str, expected_generation: int | None, record: BreakerRecord) -> bool:
        """Write the record if the present one has the expected generation; None expects no record."""
        with self._lock:
            present = self._records.get(name)
            if (None if present is None else present.generation) != expected_generation:
                return False
            self._records[name] = record
            return True


def _record_text(record: BreakerRecord) -> str:
    return json.dumps(record._asdict())


def _record_of(text: Any) -> BreakerRecord:
    """A stored record. Raises ValueError, TypeError or KeyError for anything else."""
    data = json.loads(text)
    record = BreakerRecord(**{name: data[name] for name in BreakerRecord._fields})
    for value, default in zip(record, BreakerRecord(), strict=True):
        if not isinstance(value, (int, float) if isinstance(default, float) else type(default)) or value != value:
            raise ValueError("not a breaker's record")
    if record.state not in ("closed", "open", "half_open"):
        raise ValueError("not a breaker's state")
    return record


class SQLiteStore:
    """Records in a SQLite file, for the processes of one machine: gunicorn workers, cron jobs, scripts.

    ``path``: the file; it is made when first needed, its folder must exist, and it must not be on a network drive. Failures
    are counted together. ``timeout``: seconds that one operation may wait for other processes. A read serves for ``refresh``
    seconds (0: every look reads). Its time is the wall clock. Thread-safe, and used across a fork. Nothing is opened when it
    is built.
    """

    shared_counts = True
    shares_local_errors = True
    _version: ClassVar[int] = 1  #: of the table, as PRAGMA user_version

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = _STORE_BUDGET, refresh: float = 0.25) -> None:
        if not isinstance(path, (str, os.PathLike)) or not str(path):
            raise ConfigError(f"SQLiteStore(path={path!r}): give the path of a file")
        self.path = os.fspath(path)
        self.timeout: float = _number(timeout, "SQLiteStore(timeout)", finite=True)
        self.refresh: float = _number(refresh, "SQLiteStore(refresh)")
        self._inherited: list[Any] = []  # connections of a parent process: closing them could release its locks
        self._connection: Any = None
        self._file: tuple[int, int] | None = None
        self._lock = threading.RLock()
        _never_inherited.add(self)

    def _renew_after_fork(self) -> None:
        self._lock = threading.RLock()
        self._inherited.append(self._connection)
        self._connection = None

    def load(self, name: str) -> tuple[BreakerRecord | None, float]:
        """The record of a breaker, None if there is none, and the time.

        Raises sqlite3.Error, OSError, TimeoutError, or ValueError for what is no record.
        """
        rows = self._run("SELECT record FROM breakers WHERE name = ?", name)[1]
        return (_record_of(rows[0][0]) if rows else None), time.time()

    def swap(self, name: str, expected_generation: int | None, record: BreakerRecord) -> bool:
        """Write the record if the present one has the expected generation; None expects no record."""
        values: tuple[Any, ...] = (record.generation, _record_text(record), name)
        if expected_generation is None:
            statement = "INSERT OR IGNORE INTO breakers (generation, record, name) VALUES (?, ?, ?)"
        else:
            statement = "UPDATE breakers SET generation = ?, record = ? WHERE name = ? AND generation = ?"
            values = (*values, expected_generation)
        return bool(self._run(statement, *values)[0])

    def close(self) -> None:
        """Close the file; it is opened again when needed."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def _run(self, statement: str, *values: Any) -> tuple[int, list[Any]]:
        """How many rows were changed, and those found. Raises sqlite3.Error, OSError or TimeoutError."""
        if not self._lock.acquire(timeout=self.timeout):
            raise TimeoutError
        try:
            cursor = self._open().execute(statement, values)
            return cursor.rowcount, cursor.fetchall()
        except Exception:
            self.close()
            raise
        finally:
            self._lock.release()

    def _open(self) -> Any:
        """The connection of this process; a new one if the file is another than it was."""
        import sqlite3

        if self._connection is not None and self._file == self._identity():
            return self._connection
        self.close()
        connection = sqlite3.connect(self.path, timeout=self.timeout, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA synchronous = OFF")  # a record lost in a power cut is learned anew
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, self._version):
                raise sqlite3.DatabaseError(f"{self.path} is of version {version}, this is version {self._version}")
            if version == 0:
                self._make(connection)
        except BaseException:
            connection.close()
            raise
        self._connection, self._file = connection, self._identity()
        return connection

    def _make(self, connection: Any) -> None:
        """Make the table. SQLite does not always wait by itself for another process that is making it at the same moment."""
        until = time.monotonic() + self.timeout
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                break
            except Exception as error:
                if "locked" not in str(error) or time.monotonic() >= until:
                    raise
            time.sleep(0.002)
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE IF NOT EXISTS breakers (name TEXT PRIMARY KEY, generation INTEGER, record TEXT)")
        connection.execute(f"PRAGMA user_version = {self._version}")
        connection.execute("COMMIT")

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def __del__(self) -> None:
        connection = getattr(self, "_connection", None)  # none of one that was never built
        if connection is not None:
            connection.close()

    def __repr__(self) -> str:
        return f"<SQLiteStore {self.path}>"


class RedisStore:
    """Records in Redis, for many machines. Needs PyPI's ``redis`` (``pip install copilot-router[redis]``).

    ``client_or_url``: a ``redis.Redis``, whose settings are used but for its time limits and retries, or a URL.
    ``namespace``: a prefix of the keys; breakers of one name in one namespace share one state. ``shared_counts``: whether
    failures are counted together, or each process needs its own ``failure_threshold`` of them. One machine's trouble to
    connect, or with its key, opens only its own breaker. ``timeout``: seconds for one operation, without a retry. A read
    serves for ``refresh`` seconds. Its time is the server's. Nothing is sent when it is built. Thread- and fork-safe.
    """

    shares_local_errors = False
    #: Compare and set: KEYS[1]; expected generation ("" for none), new one, record, milliseconds to keep it.
    _script: ClassVar[str] = """
        if (redis.call('HGET', KEYS[1], 'generation') or '') ~= ARGV[1] then return 0 end
        redis.call('HSET', KEYS[1], 'generation', ARGV[2], 'record', ARGV[3])
        redis.call('PEXPIRE', KEYS[1], ARGV[4])
        return 1"""

    def __init__(
        self, client_or_url: Any, namespace: str = "copilot_router", *, shared_counts: bool = False,
        timeout: float = _STORE_BUDGET, refresh: float = 1.0,
    ) -> None:  # fmt: skip
        try:
            import redis
        except ImportError:
            raise ConfigError("RedisStore needs PyPI's redis: pip install copilot-router[redis]") from None
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self.shared_counts = shared_counts
        self.refresh: float = _number(refresh, "RedisStore(refresh)")
        limits: dict[str, Any] = {
            "socket_timeout": _number(timeout, "RedisStore(timeout)", finite=True), "socket_connect_timeout": timeout,
            "retry": Retry(NoBackoff(), 0), "retry_on_error": [],
        }  # fmt: skip
        try:
            if isinstance(client_or_url, str):
                pool: Any = redis.ConnectionPool.from_url(client_or_url, **limits)
            else:
                theirs = client_or_url.connection_pool
                pool = redis.ConnectionPool(theirs.connection_class, **{**theirs.connection_kwargs, **limits})
        except (ValueError, AttributeError):
            shown = type(client_or_url).__name__  # a URL may hold a password
            raise ConfigError(f"RedisStore of a {shown}: give a redis.Redis or a URL like redis://localhost:6379/0") from None
        self._client: Any = redis.Redis(connection_pool=pool)
        self._namespace = namespace

    def _key(self, name: str) -> str:
        from urllib.parse import quote

        return f"{quote(self._namespace, safe='')}:{quote(name, safe='')}"

    def load(self, name: str) -> tuple[BreakerRecord | None, float]:
        """The record of a breaker, None if there is none, and the server's time."""
        text, (seconds, micros) = self._client.pipeline(transaction=False).hget(self._key(name), "record").time().execute()
        return (None if text is None else _record_of(text)), seconds + micros / 1e6

    def swap(self, name: str, expected_generation: int | None, record: BreakerRecord) -> bool:
        """Write the record if the present one has the expected generation; None expects no record."""
        expected = "" if expected_generation is None else expected_generation
        keep = int(1000 * (_REDIS_KEEPS + (record.span if record.span < math.inf else 365 * _REDIS_KEEPS)))
        values = (expected, record.generation, _record_text(record), keep)
        return bool(self._client.eval(self._script, 1, self._key(name), *values))

    def close(self) -> None:
        """Close idle connections; the store stays usable."""
        self._client.connection_pool.disconnect()


#: Seconds that Redis keeps a record that nobody changes, beyond its deadline.
_REDIS_KEEPS = 86400.0


# ==== provider interface ==============================================================================================


class LLMProvider(ABC):
    """One provider. A custom one implements ``chat``, raising ProviderError classes; the rest is optional.

    The chain passes ``messages`` always as a list of dicts in OpenAI form, and ``timeout=`` (seconds for this attempt) among
    the keyword arguments: the deadline is kept only if it is obeyed. ``model`` is None where the tier lists no models. A chain
    may call it from many threads at once. Its errors' texts are logged: no key and no message may stand in them.
    """

    @abstractmethod
    def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> LLMResponse:
        """One whole answer, or a ProviderError. ``messages``: OpenAI form. ``tools``: OpenAI's function form, or None.

        ``kwargs``: ``timeout`` and whatever options the call and the tier's ``params`` hold. Any other Exception counts as a
        failure; ConfigError and what is no Exception pass through the chain.
        """

    def stream(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> Generator[str, None, LLMResponse]:
        """Yields deltas of text, returns the whole answer. By default the text of ``chat()`` as one delta."""
        response = self.chat(messages, tools, model, **kwargs)
        if response.content:
            yield response.content
        return response

    def ping(self, timeout: float = 5.0) -> None:  # noqa: B027 - optional, not forgotten
        """A cheap probe of health that raises ProviderError. By default it does nothing."""

    def close(self) -> None:  # noqa: B027 - optional, not forgotten
        """Free idle connections; the provider stays usable. By default there are none."""


def _checked_messages(messages: Any, system: str | None = None) -> list[Message]:
    """The messages as a list, checked as far as every provider needs it. Raises BadRequest; never shows a text."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    elif not isinstance(messages, (list, tuple)):
        raise BadRequest(f"messages is a {type(messages).__name__}: give a list of dicts with 'role', or a str")
    if not messages:
        raise BadRequest("messages is empty: give at least one message")
    for at, message in enumerate(messages):
        if type(message) is not dict and not isinstance(message, Mapping):
            raise BadRequest(f"messages[{at}] is a {type(message).__name__}: give a dict with 'role' and 'content'")
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            shown = role if isinstance(role, str) and len(role) < 20 else type(role).__name__
            raise BadRequest(f"messages[{at}] has the role {shown!r}: give one of {', '.join(_ROLES)}")
        if "tool_calls" in message:
            if role != "assistant" and message["tool_calls"]:
                raise BadRequest(f"messages[{at}] ({role}) has tool_calls: only the assistant calls tools")
            _check_tool_calls(message["tool_calls"], f"messages[{at}].tool_calls")
        if type(content) is str:
            continue
        if content is None and role != "assistant":
            raise BadRequest(f"messages[{at}] ({role}) has no content: give a str or a list of parts")
        if content is not None and not isinstance(content, (str, list, tuple)):
            raise BadRequest(f"messages[{at}] ({role}) has content of type {type(content).__name__}: give a str or list")
        if isinstance(content, (list, tuple)) and not all(isinstance(part, Mapping) for part in content):
            raise BadRequest(f"messages[{at}] ({role}) has a part that is no dict: give {{'type': 'text', 'text': ...}}")
    return [*messages] if system is None else [{"role": "system", "content": system}, *messages]


_ROLES = ("system", "developer", "user", "assistant", "tool")


def _check_tool_calls(calls: Any, where: str) -> None:
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise BadRequest(f"{where} is a {type(calls).__name__}: give a list")
    for at, call in enumerate(calls or ()):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not (
            isinstance(function, Mapping)
            and isinstance(function.get("name"), str)
            and isinstance(call.get("id") or "", str)
            and isinstance(function.get("arguments") or "", (str, dict))
        ):
            raise BadRequest(f"{where}[{at}]: give {{'id': …, 'type': 'function', 'function': {{'name': …, 'arguments': …}}}}")


def _checked_answer(response: LLMResponse) -> LLMResponse:
    """The answer, or ContentFiltered or EmptyResponse if there is nothing in it."""
    if response.tool_calls or (response.content and not response.content.isspace()):
        return response
    error: ProviderError
    if response.finish_reason == "content_filter":
        error = ContentFiltered("refused by a safety system", model=response.model, request_id=response.request_id)
    else:
        cut = response.finish_reason == "length"
        why = "cut by the token limit before any text" if cut else "neither text nor tool call"
        error = EmptyResponse(
            why, model=response.model, request_id=response.request_id, code="length" if cut else None
        )
    error.usage = response.usage
    raise error


# ==== HTTP transport ==================================================================================================
# The one place that touches sockets. A request carries its limits (_Limits) with it; the connection's socket is wrapped so
# that every single read and write first sets its timeout to what the limits still allow. That is what bounds a server that
# drips its headers or its body, without a thread per call. Everything that can go wrong comes out as a ProviderError.


class _Limits:
    """The time limits of one request, in real time. The clock that runs out first decides what the timeout is called."""

    __slots__ = (
        "connect_by", "deadline", "fresh", "own_stall", "reused", "silence", "since", "stall", "started", "suspicious",
    )  # fmt: skip

    def __init__(
        self, timeout: float, connect: float, first_token: float, stall: float, own: tuple[float, float]
    ) -> None:
        now = time.monotonic()
        self.deadline = now + timeout
        self.connect_by = now + connect
        self.since = now  #: since when the server has been silent while we wait
        self.silence = first_token  #: how long it may be; the stall limit once generation has begun
        self.stall = stall
        self.suspicious, self.own_stall = own  #: the provider's own limits: silence that long counts against it in any case
        self.started = False
        self.fresh = False  #: insist on a new connection
        self.reused = False  #: whether a kept connection was used

    def left(self) -> float:
        """Seconds that the next read or write may take; TimeoutError if there are none."""
        now = time.monotonic()
        left = min(self.deadline, self.since + self.silence, now + _LONGEST_WAIT) - now
        if left <= 0:
            raise TimeoutError
        return left

    def connect_left(self) -> float:
        """Seconds that connecting may still take; TimeoutError if there are none."""
        left = min(self.connect_by, self.deadline) - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, _LONGEST_WAIT)

    def expired(self) -> ProviderTimeout | None:
        """The error that these limits amount to by now, None if there is time left."""
        now = time.monotonic() + 0.002  # a socket's timeout may fire that much early
        silent = now - self.since
        if silent >= min(self.silence, self.suspicious) and now >= min(self.deadline, self.since + self.silence):
            code = "stall_timeout" if self.started else "first_token_timeout"
            what = "no further data" if self.started else "no first token"
            return ProviderTimeout(f"{what} for {silent:.1f} s", code=code)
        if now >= self.deadline:
            return ProviderTimeout("no complete answer in the time of this attempt", code="attempt_timeout")
        return None

    def progress(self) -> None:
        """Generation goes on, and the caller wants the next event: from here on silence is the server's."""
        self.since = time.monotonic()
        if not self.started:
            self.started = True
            self.silence, self.suspicious = self.stall, self.own_stall


_current = threading.local()  #: .limits of the request that this thread is sending, picked up by the connection


class _LimitedSocket:
    """A socket whose every operation respects the limits of the request being served."""

    def __init__(self, sock: Any, limits: _Limits) -> None:
        self._sock = sock
        self.limits = limits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendall(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while view:
            self._sock.settimeout(self.limits.left())
            view = view[self._sock.send(view) :]

    def makefile(self, mode: str, *_: Any, **__: Any) -> Any:
        return io.BufferedReader(_LimitedReader(self), 16384)


class _LimitedReader(io.RawIOBase):
    """What http.client reads from: each read has the time that the limits leave."""

    def __init__(self, owner: _LimitedSocket) -> None:
        self._owner = owner
        self._raw = owner._sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._owner._sock.settimeout(self._owner.limits.left())
        count: int | None = self._raw.readinto(buffer)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


@functools.cache
def _http() -> Any:
    """requests, and our adapter for it, imported when first needed."""
    import http.client

    try:
        import requests
    except ImportError:
        raise ImportError("HTTP providers need PyPI's requests: pip install requests") from None
    import urllib3.connection
    import urllib3.connectionpool
    from requests.adapters import HTTPAdapter

    class Response(http.client.HTTPResponse):
        """Passes over interim answers such as 103: http.client takes all but 100 for the final one."""

        def _read_status(self) -> Any:
            while True:
                found = super()._read_status()  # type: ignore[misc]
                if not 101 < found[1] < 200:
                    return found
                http.client.parse_headers(self.fp)

    class Limited:
        """Mixed into urllib3's connections: bounded connecting, limited sockets, and a memory of being reused."""

        response_class: Any = Response
        sock: Any
        timeout: Any
        used = False

        def connect(self) -> None:
            limits = _current.limits
            super().connect()  # type: ignore[misc]
            self.sock = _LimitedSocket(self.sock, limits)

        def _new_conn(self) -> Any:
            limits = _current.limits
            sock = _connect(self, limits)
            sock.settimeout(limits.connect_left())  # for TLS, which measures it as a whole
            return sock

        def _tunnel(self) -> None:
            plain, self.sock = self.sock, _LimitedSocket(self.sock, _current.limits)
            try:
                super()._tunnel()  # type: ignore[misc]
            finally:
                self.sock = plain if self.sock is not None else None  # TLS wraps the socket itself

        def request(self, *args: Any, **kwargs: Any) -> Any:
            limits = _current.limits
            if self.sock is not None and limits.fresh:
                self.close()  # type: ignore[attr-defined]
            limits.reused = self.used and self.sock is not None
            if self.sock is not None:
                self.sock.limits = limits
            self.used = True
            return super().request(*args, **kwargs)  # type: ignore[misc]

    class HTTPConnection(Limited, urllib3.connection.HTTPConnection):
        pass

    class HTTPSConnection(Limited, urllib3.connection.HTTPSConnection):
        pass

    class HTTPPool(urllib3.connectionpool.HTTPConnectionPool):
        ConnectionCls = HTTPConnection  # pyright: ignore[reportAssignmentType]

    class HTTPSPool(urllib3.connectionpool.HTTPSConnectionPool):
        ConnectionCls = HTTPSConnection  # pyright: ignore[reportAssignmentType]

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = {"http": HTTPPool, "https": HTTPSPool}

        def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
            manager = super().proxy_manager_for(*args, **kwargs)
            manager.pool_classes_by_scheme = {"http": HTTPPool, "https": HTTPSPool}
            return manager

    def session() -> requests.Session:
        made = requests.Session()
        for scheme in ("http://", "https://"):
            made.mount(scheme, Adapter(pool_connections=4, pool_maxsize=100, max_retries=0))
        return made

    return requests, session


def _connect(connection: Any, limits: _Limits) -> Any:
    """A TCP connection to the first address that answers; all addresses together have the connect limit."""
    import socket

    from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

    host = connection._dns_host
    try:
        addresses = socket.getaddrinfo(host, connection.port, 0, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise NameResolutionError(host, connection, error) from error  # type: ignore[arg-type]
    failure: Exception = OSError("no address")
    for at, (family, kind, proto, _, address) in enumerate(addresses):
        sock = None
        try:
            left = limits.connect_left()
            sock = socket.socket(family, kind, proto)
            sock.settimeout(left if at == len(addresses) - 1 else left / 2)  # leave time for the next address
            for option in connection.socket_options or ():
                sock.setsockopt(*option)
            sock.connect(address)
            return sock
        except OSError as error:
            failure = error
            if sock is not None:
                sock.close()
    if isinstance(failure, TimeoutError):
        raise ConnectTimeoutError(connection, "connect timeout") from failure
    raise NewConnectionError(connection, str(failure)) from failure


def _unchunked(read: Callable[[], bytes]) -> Iterator[bytes]:
    """What a chunked body holds (RFC 9112, 7.1): after each read, all of it that has come.

    http.client makes half a dozen calls for a chunk, and each event of a stream is one. ``read`` gives b"" at the end.
    """
    rest, lacking, skip = b"", 0, 0  # lacking: bytes of the chunk under way; skip: of the end of line behind it
    while received := read():
        data, at = rest + received, 0
        pieces: list[bytes] = []
        while True:
            if lacking:
                pieces.append(data[at : at + lacking])
                at += len(pieces[-1])
                lacking -= len(pieces[-1])
            end = data.find(b"\n", at + skip)
            if lacking or end < 0:
                break
            lacking = _chunk_size(data[at + skip : end])
            at, skip = end + 1, 2
            if not lacking:
                break
        rest = data[at:]
        if content := b"".join(pieces):
            yield content
        if end >= 0:  # that was the last chunk: trailers, and a blank line
            break
        if len(rest) > _READ_SIZE:
            raise InvalidResponse("garbled HTTP")
    else:
        raise InvalidResponse("truncated: the connection broke")
    rest = b"\n" + rest
    while b"\n\r\n" not in rest and b"\n\n" not in rest and (received := read()):  # some leave the blank line out
        rest += received
        if len(rest) > _READ_SIZE:
            raise InvalidResponse("garbled HTTP")


def _chunk_size(line: bytes) -> int:
    try:
        size = int(line.partition(b";")[0], 16)
    except ValueError:
        size = -1
    if size < 0:
        raise InvalidResponse("garbled HTTP")
    return size


class _Answer:
    """An HTTP answer whose headers have arrived: bytes to come, bounded in time and size."""

    _under_way: ClassVar[set[_Answer]] = set()  #: or a cycle's collector could find the socket before what closes it

    def __init__(self, response: Any, limits: _Limits, most: int) -> None:
        import http.client

        self.status: int = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self.limits = limits
        self._raw = response.raw
        self._most = most
        self._ended = False
        self._under_way.add(self)
        original = getattr(self._raw, "_original_response", None)
        self._original = original if isinstance(original, http.client.HTTPResponse) else None
        self._content: Iterator[bytes] = iter(self._read, b"")  #: as it was sent: compressed, perhaps
        self._read1: Callable[[], bytes]
        if self._original is None:  # a session of the user's
            self._read1 = functools.partial(self._raw.read1, _READ_SIZE, decode_content=False)
        elif self._original.chunked:
            self._read1 = functools.partial(self._original.fp.read1, _READ_SIZE)
            self._content = _unchunked(self._read)
        else:
            self._read1 = self._original.read1  # urllib3's own costs as much again

    def chunks(self) -> Iterator[bytes]:
        """Decompressed bytes as they come, to the end of the body. Raises ProviderError for whatever breaks."""
        inflate = self._decoder()
        length = self._announced()
        received = total = 0
        for data in self._content:
            received += len(data)
            for piece in inflate(data) if inflate else (data,):
                total += len(piece)
                if total > self._most:
                    raise InvalidResponse(f"the answer is larger than max_response_bytes={self._most}", code="too_large")
                yield piece
                if inflate and (late := self.limits.expired()):  # one read may hold megabytes of work
                    raise late
        if length is not None and received < length:
            raise InvalidResponse(f"truncated: {received} of {length} bytes")
        self._ended = self.status >= 200  # after an interim answer another one could follow

    def body(self) -> bytes:
        """All of it."""
        return b"".join(self.chunks())

    def _announced(self) -> int | None:
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isdecimal() and len(text) < 20 and "Transfer-Encoding" not in self.headers else None

    def _read(self) -> bytes:
        try:
            self.limits.left()  # also where the socket is not ours: a session of the user's
            return self._read1()
        except Exception as error:
            if _passes_through(error):
                raise
            failure = _transport_error(error, self.limits, "the answer")
        raise failure

    def _decoder(self) -> Callable[[bytes], Iterable[bytes]] | None:
        coding = self.headers.get("Content-Encoding", "").strip().lower()
        if coding in ("", "identity"):
            return None
        if coding not in ("gzip", "x-gzip", "deflate"):
            shown = f" {coding!r}" if coding.isalpha() and len(coding) < 10 else ""
            raise InvalidResponse(f"unknown Content-Encoding{shown}")
        machine = zlib.decompressobj(47)  # gzip or zlib, told apart by their headers

        def inflate(data: bytes) -> Iterator[bytes]:
            try:
                while data and not machine.eof:
                    yield machine.decompress(data, _READ_SIZE)
                    data = machine.unconsumed_tail
            except zlib.error as error:
                raise InvalidResponse("the compressed body is damaged") from error

        return inflate

    def finish(self) -> None:
        """Read the little that may be left, so that the connection can serve the next request."""
        limits = self.limits
        limits.deadline = min(limits.deadline, time.monotonic() + _TAIL_TIMEOUT / 10)
        with contextlib.suppress(ProviderError):  # the answer is complete: only the connection would be lost
            self._ended = self._ended or next(self._content, None) is None

    def close(self) -> None:
        """Give the connection back if the body was read to its end, else close it."""
        self._under_way.discard(self)
        self._content = iter(())  # what reads refers to this object: without a cycle both go at once
        if self._ended:
            if self._original is not None:
                self._original.close()  # http.client must know, or it refuses the next request on this connection
            self._raw.release_conn()
        else:
            self._raw.close()


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and everything it wraps, as requests and urllib3 wrap things."""
    seen: list[BaseException] = []
    queue: list[Any] = [error]
    while queue and len(seen) < 20:
        item = queue.pop(0)
        if isinstance(item, BaseException) and item not in seen:
            seen.append(item)
            queue += [getattr(item, "reason", None), item.__cause__, item.__context__, *item.args]
            yield item


def _transport_error(error: BaseException, limits: _Limits, what: str) -> ProviderError:
    """What an exception of requests, urllib3, http.client or the socket means. Its own text is not repeated."""
    causes = list(_causes(error))
    names = {type(cause).__name__ for cause in causes}
    if names & {"ConnectTimeoutError", "ConnectTimeout"}:
        return limits.expired() or ProviderUnavailable("connect timeout", code="connect_timeout")
    if any(isinstance(cause, TimeoutError) for cause in causes) or names & {"ReadTimeoutError", "ReadTimeout"}:
        if time.monotonic() >= limits.connect_by and what == "connecting":
            return limits.expired() or ProviderUnavailable("connect timeout", code="connect_timeout")
        return limits.expired() or ProviderTimeout("timed out", code="attempt_timeout")
    for kinds, answer in _TRANSPORT_ERRORS:
        if names & kinds:
            return ServerError("closed before the answer") if what != "the answer" and answer is None else (
                InvalidResponse("truncated: the connection broke") if answer is None else answer[0](answer[1])
            )
    return ProviderUnavailable(f"{what} failed: {type(causes[-1]).__name__}")


#: Names of exceptions anywhere in the chain of causes -> what they mean; None: it depends on whether the answer had begun.
_TRANSPORT_ERRORS: tuple[tuple[set[str], tuple[type[ProviderError], str] | None], ...] = (
    ({"NameResolutionError", "gaierror"}, (ProviderUnavailable, "the name cannot be resolved")),
    ({"SSLError", "SSLCertVerificationError", "SSLZeroReturnError", "SSLEOFError"}, (ProviderUnavailable, "TLS failed")),
    ({"ProxyError"}, (ProviderUnavailable, "the proxy failed")),
    ({"ConnectionRefusedError"}, (ProviderUnavailable, "refused")),
    ({"NewConnectionError"}, (ProviderUnavailable, "cannot connect")),
    ({"RemoteDisconnected", "ConnectionResetError", "BrokenPipeError", "ConnectionAbortedError"}, None),
    ({"BadStatusLine", "LineTooLong", "UnknownProtocol"}, (InvalidResponse, "not an HTTP answer")),
    ({"IncompleteRead", "InvalidChunkLength"}, None),
    ({"HTTPException", "HeaderParsingError", "InvalidHeader", "DecodeError", "ContentDecodingError"},
     (InvalidResponse, "garbled HTTP")),
    ({"ProtocolError", "ChunkedEncodingError"}, None),
    ({"InvalidURL", "LocationParseError", "MissingSchema", "InvalidSchema"}, (ProviderUnavailable, "the URL is not valid")),
)


class _Lines:
    """JSON objects in lines of their own (NDJSON). Lines end at CR, LF or CRLF, and at nothing else."""

    def __init__(self) -> None:
        self._open: list[bytes] = []  # pieces of a line whose end has not come
        self._after_cr = False
        self._first = True

    def feed(self, chunk: bytes) -> list[tuple[str, bytes]]:
        """``(event name, data)`` for each event that this chunk completes."""
        return [("", line) for line in self._split(chunk) if line.strip()]

    def close(self) -> list[tuple[str, bytes]]:
        """The body is over: what stands there without an end of line, or without a blank line after it."""
        return self.feed(b"\n\n")

    def _split(self, chunk: bytes) -> list[bytes]:
        """The lines that this chunk completes."""
        if not chunk:
            return []
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._after_cr = chunk.endswith(b"\r")
        if b"\n" not in chunk and b"\r" not in chunk:
            self._open.append(chunk)
            return []
        if self._open:
            chunk = b"".join((*self._open, chunk))
            self._open.clear()
        if self._first:
            self._first = False
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")
        lines = chunk.splitlines()  # bytes: splits at CR, LF and CRLF only
        if not chunk.endswith((b"\n", b"\r")):
            self._open.append(lines.pop())
        return lines


class _SSE(_Lines):
    """Server-sent events by the book (WHATWG HTML, 9.2.6)."""

    def __init__(self) -> None:
        super().__init__()
        self._event = ""
        self._data: list[bytes] = []
        self._bare: list[bytes] = []  # JSON without "data:", in one line or several: an error of Gemini's

    def feed(self, chunk: bytes) -> list[tuple[str, bytes]]:
        events: list[tuple[str, bytes]] = []
        for line in self._split(chunk):
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line:
                if self._data:
                    events.append((self._event, b"\n".join(self._data)))
                    self._data.clear()
                self._event = ""
            elif self._bare or line.startswith(b"{"):
                self._bare.append(line)
                if line.startswith((b"{", b"}")) and line.rstrip().endswith(b"}"):
                    events.append(("error", b"\n".join(self._bare)))
                    self._bare.clear()
            elif line.startswith(b"event:"):
                self._event = line[6:].strip().decode("utf-8", "replace")
            elif line.startswith(b"error:"):  # llama.cpp before 2025
                events.append(("error", line[6:]))
        return events


# -- what an error says ------------------------------------------------------------------------------------------------

#: Specific codes and types of the vendors -> class (wire formats' own names, in lower case).
_CODES: dict[str, type[ProviderError]] = {
    **dict.fromkeys(("context_length_exceeded", "exceed_context_size_error"), ContextLengthExceeded),
    **dict.fromkeys(
        ("insufficient_quota", "credit_balance_exhausted", "organization_spend_limit_exceeded", "billing_error",
         "project_spend_limit_exceeded", "organization_usage_limit_exceeded", "billing_hard_limit_reached",
         "enforced_spend_limit_reached", "contract_spend_limit_reached", "insufficient_balance", "payment_required",
         "weight_exceeds_budget"),
        QuotaExceeded,
    ),
    **dict.fromkeys(("in_flight_budget_exhausted", "ramp_limit_exceeded", "rate_limit_exceeded"), RateLimited),
    **dict.fromkeys(("invalid_api_key", "unsupported_country_region_territory", "api_key_invalid"), AuthenticationError),
    **dict.fromkeys(("model_not_found", "deploymentnotfound"), ModelNotFound),
    **dict.fromkeys(
        ("content_filter", "content_policy_violation", "invalid_prompt", "cyber_policy", "responsibleaipolicyviolation"),
        ContentFiltered,
    ),
    **dict.fromkeys(("slow_down", "server_is_overloaded", "overloaded_error", "capacity_exceeded"), Overloaded),
    **dict.fromkeys(("tool_use_failed", "json_validate_failed"), InvalidResponse),
    **dict.fromkeys(("unsupported_parameter", "unsupported_value", "not_supported_error"), UnsupportedRequest),
    "string_above_max_length": BadRequest,
}  # fmt: skip

#: Phrases of messages, searched in this order in lower case -> class.
_PHRASES: tuple[tuple[str, type[ProviderError]], ...] = (
    (r"context length|context window|maximum context|context size|prompt is too long|is longer than the model|"
     r"context the overflows|n_keep.*n_ctx|exceed context limit|input tokens exceed|input token count|"
     r"request too large for|current length is \d+ while limit", ContextLengthExceeded),
    (r"credit balance is too low|exceeded your current quota|insufficient balance|credits are depleted|limit: 0\b|"
     r"spend limit", QuotaExceeded),
    (r"incorrect api key|invalid api key|api key not valid|api key expired|invalid x-api-key|"
     r"location is not supported", AuthenticationError),
    (r"no models? loaded|model is unloaded|model .{0,120}(not found|does not exist|has been (retired|deprecated)|"
     r"no longer available)|unknown model|^model: ", ModelNotFound),
    (r"content management policy|content filtering policy|violating our usage policy|flagged as|moderation",
     ContentFiltered),
    (r"unexpected endpoint|invalid url", ProviderUnavailable),
    (r"loading model|overloaded|server busy|maximum pending requests", Overloaded),
    (r"does not support (tools|images|vision|thinking|chat)|image input|requires --enable-auto-tool-choice|"
     r"(tools?|image|response_format|json_schema).{0,60}not supported|"
     r"tool_?choice.{0,80}(support|permitted|allowed|forces)", UnsupportedRequest),
)  # fmt: skip

#: Generic types -> class; "invalid_request_error" says too little and stands last, after the status.
_TYPES: dict[str, type[ProviderError]] = {
    "authentication_error": AuthenticationError, "permission_error": AuthenticationError,
    "rate_limit_error": RateLimited, "tokens": RateLimited, "requests": RateLimited,
    "timeout_error": ProviderTimeout, "timeout": ProviderTimeout, "request_timeout": ProviderTimeout,
    "server_error": ServerError, "api_error": ServerError, "internal_error": ServerError, "internal_server_error": ServerError,
    "unavailable_error": Overloaded, "service_unavailable_error": Overloaded, "unavailable": Overloaded,
    "unauthenticated": AuthenticationError, "permission_denied": AuthenticationError, "internal": ServerError,
}  # fmt: skip
_LAST_TYPES: dict[str, type[ProviderError]] = {
    "invalid_request_error": BadRequest, "badrequesterror": BadRequest, "not_found_error": ModelNotFound,
    "notfounderror": ModelNotFound, "not_found": ModelNotFound, "invalid_argument": BadRequest,
}  # fmt: skip
_STATUSES: dict[int, type[ProviderError]] = {
    401: AuthenticationError, 402: QuotaExceeded, 403: AuthenticationError, 404: ProviderUnavailable, 408: ProviderTimeout,
    409: ServerError, 410: ProviderUnavailable, 425: ServerError, 429: RateLimited, 498: Overloaded, 529: Overloaded,
}  # fmt: skip


class _ErrorFacts(NamedTuple):
    """What the body of a failure says, whatever its shape."""

    message: str = ""
    codes: tuple[str, ...] = ()  #: code, type and details' codes, as lower-case text
    param: str = ""
    number: int | None = None  #: an HTTP-like number among the codes
    delay: float | None = None  #: seconds to wait, where the body says so


def _error_facts(body: Any) -> _ErrorFacts:
    """Reads {"error": {…}}, {"error": "…"}, {"message": …}, {"detail": […]}, {"object": "error"} and a list of one of them."""
    inner = body
    while inner and isinstance(inner, (dict, str, list)):  # the innermost of them that says anything
        body = inner
        inner = body.get("error") if isinstance(body, dict) else body[0] if isinstance(body, list) else None
    if isinstance(body, str):
        return _ErrorFacts(body[:_SEARCHED])
    if not isinstance(body, dict):
        return _ErrorFacts()
    message = body.get("message") or body.get("detail") or body.get("error_description") or ""
    if isinstance(message, list):
        message = "; ".join(str(item.get("msg", "")) for item in message if isinstance(item, dict))
    details, inner_error, metadata = (_dict(body.get(name)) for name in ("details", "innererror", "metadata"))
    found, delay = _google_details(body.get("details"))
    values = [*found, body.get("code"), details.get("error_code"), inner_error.get("code"), metadata.get("limit_source"),
              body.get("type"), body.get("status")]  # fmt: skip
    number = next((_int(value) for value in (*values, body.get("status_code")) if _int(value) is not None), None)
    codes = tuple(value.lower() for value in values if isinstance(value, str) and not value.isdecimal())
    if metadata.get("reasons") or "flagged_input" in metadata:
        codes = ("content_filter", *codes)
    param = body.get("param")
    return _ErrorFacts(str(message)[:_SEARCHED], codes, param if isinstance(param, str) else "", number, delay)


def _google_details(details: Any) -> tuple[list[Any], float | None]:
    """The reasons among google.rpc details (a spent daily quota is one), and the delay that they ask for."""
    found: list[Any] = []
    delay = None
    for item in details if isinstance(details, list) else ():
        item = _dict(item)
        found.append(item.get("reason"))
        violations = item.get("violations")
        for violation in violations if isinstance(violations, list) else ():
            if "PerDay" in str(_dict(violation).get("quotaId")):
                found.append("insufficient_quota")
        if isinstance(item.get("retryDelay"), str):
            delay = _duration(item["retryDelay"])
    return found, delay


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _int(value: Any) -> int | None:
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _class_of(facts: _ErrorFacts, status: int, model: str | None, waits: bool) -> type[ProviderError]:
    """The class of a failure: a specific code, then phrases, then the generic type, a number in the body, the status."""
    text = facts.message.lower()
    for code in facts.codes:
        if code in _CODES:
            kind = _CODES[code]
            return RateLimited if kind is QuotaExceeded and status == 402 and waits else kind
    for pattern, kind in _PHRASES:
        if _pattern(pattern).search(text) and not (
            (kind is AuthenticationError and status >= 500)
            or (kind is ContentFiltered and status not in (200, 400, 403, 422))  # else a service of that name has trouble
            or (kind is QuotaExceeded and facts.delay is not None and "limit: 0" not in text)  # Gemini: any rate limit
        ):
            return kind
    number = status if status >= 300 else facts.number or status
    if number in (404, 410) and ((model and model.lower() in text) or "model" in text):
        return ModelNotFound
    if number == 402 and waits:
        return RateLimited
    for code in facts.codes:
        if code in _TYPES and not (_TYPES[code] is ServerError and number in (429, 503, 529)):
            return _TYPES[code]
    if number in _STATUSES:
        return _STATUSES[number]
    if number == 503 and waits:
        return Overloaded
    if 500 <= number < 600:
        return ServerError
    if 300 <= number < 400:
        return InvalidResponse
    if 400 <= number < 500:
        return BadRequest
    return next((_LAST_TYPES[code] for code in facts.codes if code in _LAST_TYPES), InvalidResponse)


def _retry_hint(headers: Mapping[str, str], facts: _ErrorFacts, limited: bool) -> float | None:
    """Seconds to wait by the server's own word, in any of its forms; None for nonsense, NaN and negative numbers."""
    hints = [
        _seconds(headers.get("retry-after-ms", ""), 0.001),
        _seconds(headers.get("retry-after", "")),
        _until(headers.get("retry-after", "")),
        facts.delay,
        _in_words(facts.message),
    ]
    if limited:
        resets = [_reset(headers, what) for what in ("requests", "tokens", "input-tokens", "output-tokens")]
        hints.append(max((reset for reset in resets if reset is not None), default=None))
    return next((hint for hint in hints if hint is not None), None)


def _in_words(message: str) -> float | None:
    """Seconds of ``try again in 6m0s``, ``retry after 20 seconds`` or ``try again in 2 minutes``; None of anything else."""
    said = r"(?i)(?:try again|retry) (?:in|after) ((?:\d+(?:\.\d+)?(?:ms|[hms])(?![a-z]))+|\d+(?:\.\d+)?) ?([a-z]*)"
    found = _pattern(said).search(message)
    if found is None:
        return None
    number, unit = found.group(1).lower(), found.group(2).lower()
    if not number[-1].isdigit():
        return _duration(number)
    scales = (("ms|milli.*", 0.001), ("m|min.*", 60.0), ("h|hr.*|hour.*", 3600.0), ("d|days?", 86400.0))
    return _seconds(number, next((scale for pattern, scale in scales if _pattern(pattern).fullmatch(unit)), 1.0))


def _reset(headers: Mapping[str, str], what: str) -> float | None:
    """Seconds until a rate limit that is used up is reset: as a duration at OpenAI, as a date at Anthropic."""
    for name, remaining, read in (
        (f"x-ratelimit-reset-{what}", f"x-ratelimit-remaining-{what}", _duration),
        (f"anthropic-ratelimit-{what}-reset", f"anthropic-ratelimit-{what}-remaining", _until),
    ):
        if name in headers and headers.get(remaining, "0").strip() in ("0", ""):
            return read(headers[name])
    return None


def _until(text: str) -> float | None:
    """Seconds until an HTTP date or an RFC 3339 date; 0 if it is past, None if it is no date."""
    import datetime
    from email.utils import parsedate_to_datetime

    try:
        iso = text[:4].isdigit() and "T" in text
        when = datetime.datetime.fromisoformat(text.replace("Z", "+00:00")) if iso else parsedate_to_datetime(text)
        return max(0.0, when.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _seconds(text: str, unit: float = 1.0) -> float | None:
    try:
        value = float(text) * unit
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None


def _duration(text: str) -> float | None:
    """Go's durations: ``6m0s``, ``120ms``, ``1h2m3s``; a bare number is seconds."""
    text = text.strip().rstrip(".")
    parts = _pattern(r"(\d+(?:\.\d+)?)(ms|h|m|s)").findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return _seconds(text)
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    total = sum(float(number) * units[unit] for number, unit in parts)
    return total if total < math.inf else None


#: Anything that looks like a credential.
_KEY_LIKE = r"(?i)\b(?:sk|pk|gsk|xai|key|AIza|AQ)[-_.][\w\-.*]{6,}|\bAIza[\w-]{10,}|bearer\s+\S+|[\w-]{40,}"


def _texts_of(value: Any) -> Iterator[str]:
    """Every text in a request's messages; names, ids and images are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if name not in ("role", "type", "name", "id", "tool_call_id", "url", "data"):
                yield from _texts_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts_of(item)


def _masked(message: str, secrets: Iterable[str], texts: Iterable[str]) -> str:
    """A server's message in one clipped line, without keys and without what it repeats of the request."""
    message = " ".join(message[: 8 * _MESSAGE_LIMIT].split())
    for secret in secrets:
        if len(secret) >= 4:
            message = message.replace(secret, "***")
    message = _pattern(_KEY_LIKE).sub("***", message)
    if len(message) > _MESSAGE_LIMIT:
        message = message[: _MESSAGE_LIMIT - 3] + "..."
    known = "\n".join(" ".join(text.split()) for text in texts)
    short = sorted({line for line in known.split("\n") if 4 <= len(line) < _ECHO}, key=len, reverse=True)
    for line in short:
        message = re.sub(rf"(?<!\w){re.escape(line)}(?!\w)", "***", message)
    kept, at = [], 0
    while at < len(message):
        if message[at : at + _ECHO] in known and at + _ECHO <= len(message):
            end = at + _ECHO
            while end < len(message) and message[at : end + 1] in known:
                end += 1
            kept.append("***")
            at = end
        else:
            kept.append(message[at])
            at += 1
    return "".join(kept)


#: A run of this many characters that also stands in the request is taken for an echo of it.
_ECHO = 16


_scanned = json.JSONDecoder().raw_decode  # json.loads, less its look at the options and at white space


def _json(data: bytes | str, what: str) -> Any:
    """Parsed JSON; invalid UTF-8 becomes U+FFFD. InvalidResponse, without the text, if it is none."""
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    try:
        text = text.removeprefix("\ufeff").strip(" \t\r\n")
        value, end = _scanned(text)
        if end == len(text):
            return value
    except (ValueError, RecursionError):
        pass
    raise InvalidResponse(f"{what} is not JSON")


# ==== wire formats: what they share ===================================================================================
# An encoder is a pure function from messages, tools and options to a body; a decoder turns events into deltas of text and one
# LLMResponse. Servers take liberties of their own, which is why nothing here trusts the type of anything.

#: Portable options of chat() and stream(). Hints may be dropped where a vendor has none; the others never silently.
_HINTS = frozenset({
    "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "reasoning_effort", "parallel_tool_calls", "user",
})  # fmt: skip
_OPTIONS: frozenset[str] = _HINTS | {
    "max_tokens", "max_completion_tokens", "stop", "tool_choice", "response_format", "extra_body",
}  # fmt: skip
_LIMIT_OPTIONS = ("timeout", "first_token_timeout", "stall_timeout", "on_resend")
#: What a conversation says where a vendor insists that the user speaks and the user has said nothing.
_GO_ON = "Continue."
#: What stands for the result of a tool call that has none.
_NO_RESULT = "no result: the call was interrupted"


class _Call(NamedTuple):
    """One request to a provider, checked and unpacked."""

    messages: list[Message]
    tools: Tools
    model: str | None
    options: dict[str, Any]
    quirks: Mapping[str, Any] = MappingProxyType({})  #: what this model refuses, learned from its errors (_correction)
    identity: str = ""  #: provider and model: whose carried parts may be sent

    def carried(self, message: Message) -> dict[str, Any]:
        """What ``LLMResponse.message`` kept for this provider and model; {} for any other, or if the message was edited."""
        kept = _dict(message.get(_CARRY))
        ids = [call.get("id") for call in message.get("tool_calls") or ()]
        untouched = kept.get("text") == message.get("content") and kept.get("ids") == ids
        return kept if kept.get("for") == self.identity and untouched else {}

    def limit(self) -> Any:
        """The limit on completion tokens, under whichever name; None if there is none."""
        named = self.options.get("max_completion_tokens")
        return self.options.get("max_tokens") if named is None else named

    def renamed(self, names: Mapping[str, str]) -> dict[str, Any]:
        """The options that were given, of those named, under a vendor's names."""
        return {theirs: self.options[ours] for ours, theirs in names.items() if ours in self.options}

    def finished(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body with the caller's own fields of one vendor on top."""
        extra = self.options.get("extra_body") or {}
        if not isinstance(extra, Mapping):
            raise BadRequest(f"extra_body is a {type(extra).__name__}: give a dict")
        return _merged(body, extra)


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    both = {name: _merged(base[name], top[name]) for name in base.keys() & top.keys()
            if isinstance(base[name], Mapping) and isinstance(top[name], Mapping)}  # fmt: skip
    return {**base, **top, **both}


class _InBandError(Exception):
    """An error inside a 200: ``body`` is what it said."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body


# -- from the OpenAI form ----------------------------------------------------------------------------------------------


def _media(url: str) -> tuple[str, str] | None:
    """``(media type, base64)`` of a data URL, read leniently; None for any other URL."""
    if url[:5].lower() != "data:":
        return None
    head, _, data = url[5:].partition(",")
    kind = head.partition(";")[0].strip().lower() or "image/png"
    return "image/jpeg" if kind == "image/jpg" else kind, "".join(data.split()).replace("-", "+").replace("_", "/")


def _parts(content: Any, vendor: str) -> list[tuple[str, str, str]]:
    """Content as ``(text, "", text)``, ``(data, media type, base64)``, ``(url, "", address)``; else UnsupportedRequest."""
    if not isinstance(content, (list, tuple)):
        return [("text", "", content)] if content else []
    found = []
    for part in content:
        kind = part.get("type")
        if kind in ("image_url", "input_image"):
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, Mapping) else url
        elif kind == "file":
            url = _dict(part.get("file")).get("file_data")
        else:
            text = part.get("refusal" if kind == "refusal" else "text")
            if not isinstance(text, str):
                raise UnsupportedRequest(f"{vendor} cannot be sent a message part of the type {str(kind)[:40]!r}")
            found += [("text", "", text)] if text else []
            continue
        if not isinstance(url, str) or not url:
            raise BadRequest(f"a message part of the type {kind!r} has no URL: give a URL or a data URL")
        media = _media(url)
        found.append(("data", *media) if media else ("url", "", url))
    return found


def _joined(content: Any, vendor: str) -> str:
    """Content that can only be text."""
    parts = _parts(content, vendor)
    if any(kind != "text" for kind, _, _ in parts):
        raise UnsupportedRequest(f"{vendor} takes only text in this message")
    return "\n".join(text for _, _, text in parts)


def _functions(tools: Tools, vendor: str) -> list[Mapping[str, Any]]:
    """The ``function`` objects of tools in OpenAI form."""
    for at, tool in enumerate(tools or ()):
        if tool.get("type", "function") != "function":
            raise UnsupportedRequest(f"{vendor} cannot be sent tools[{at}] of the type {str(tool.get('type'))[:40]!r}")
    return [tool["function"] for tool in tools or ()]


def _checked_tools(tools: Any) -> Tools:
    """The tools, or BadRequest that says which one is malformed. None for an empty list."""
    if tools is not None and (isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence)):
        raise BadRequest(f"tools is a {type(tools).__name__}: give a list of {{'type': 'function', 'function': {{…}}}}")
    for at, tool in enumerate(tools or ()):
        kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
        function = tool.get("function") if kind == "function" else {"name": "-"}
        if kind is None or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRequest(f"tools[{at}]: give {{'type': 'function', 'function': {{'name': …, 'parameters': …}}}}")
    return tools or None


def _choice(call: _Call) -> tuple[str, str | None]:
    """tool_choice as ``(auto | none | required | named, name)``; auto if there is none."""
    choice = call.options.get("tool_choice", "auto")
    if choice in ("auto", "none", "required"):
        return choice, None
    name = _dict(_dict(choice).get("function")).get("name") or _dict(choice).get("name")
    if not isinstance(name, str):
        raise BadRequest("tool_choice: give auto, none, required or {'type': 'function', 'function': {'name': …}}")
    return "named", name


def _format(call: _Call) -> tuple[str, Any]:
    """response_format as ``(text | json_object | json_schema, the schema's object)``."""
    wanted = call.options.get("response_format") or {"type": "text"}
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    schema = _dict(_dict(wanted).get("json_schema"))
    if kind not in ("text", "json_object", "json_schema") or (kind == "json_schema" and not schema):
        raise BadRequest("response_format: give {'type': 'text' | 'json_object' | 'json_schema', 'json_schema': {…}}")
    return kind, schema


def _stops(call: _Call) -> list[str]:
    stop = call.options.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, (list, tuple)) or not all(isinstance(text, str) for text in stops):
        raise BadRequest("stop: give a str or a list of them")
    return list(stops)


def _repaired(messages: list[Message]) -> list[Message]:
    """Every tool call answered right after it, in its order and under an id of its own, as all vendors demand.

    A call without a result gets one that says so; a result without its call becomes a user's text.
    """
    if not any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        return messages
    done: list[Message] = []
    ids: set[str] = set()
    rest = deque(messages)
    while rest:
        message = rest.popleft()
        calls: list[Any] = list(message.get("tool_calls") or ()) if message["role"] == "assistant" else []
        results = []
        while rest and calls and rest[0]["role"] == "tool":
            results.append(rest.popleft())
        answers = []
        for at, call in enumerate(calls):
            old = call.get("id") or ""
            result = next((result for result in results if (result.get("tool_call_id") or "") == old), None)
            if result is not None:
                results.remove(result)
            fresh = (f"{old or 'call'}_{number}" for number in itertools.count(len(ids)))
            new = old if old and old not in ids else next(name for name in fresh if name not in ids)
            ids.add(new)
            if new != old:
                calls[at] = {**call, "id": new}
            answer = {"role": "tool", "content": _NO_RESULT} if result is None else result
            answers.append({**answer, "tool_call_id": new})
        if message["role"] == "tool":
            results = [message]
        elif calls:
            done += [{**message, "tool_calls": calls}, *answers]
        else:
            done.append(message)
        done += [{"role": "user", "content": _as_text(result["content"])} for result in results]
    return done


def _as_text(content: Any) -> Any:
    """The result of an unknown tool call, as something a user can say."""
    lead = "Result of a tool call:"
    return f"{lead} {content}" if isinstance(content, str) else [{"type": "text", "text": lead}, *content]


class _Turn:
    """One side's whole turn, for vendors that insist on user and assistant taking turns."""

    def __init__(self, role: str) -> None:
        self.role = role  #: user | assistant
        self.parts: list[tuple[str, str, str]] = []
        self.calls: list[tuple[str, str, dict[str, Any]]] = []  #: id, name, arguments
        self.results: list[tuple[str, str, list[tuple[str, str, str]]]] = []  #: id, name, parts
        self.carry: dict[str, Any] = {}


def _conversation(call: _Call, vendor: str) -> tuple[str, list[_Turn]]:
    """All system texts, and turns that alternate, begin with the user and end with the user."""
    system: list[str] = []
    turns: list[_Turn] = []
    names: dict[str, str] = {}
    for message in call.messages:
        role, content = message["role"], message.get("content")
        if role in ("system", "developer"):
            system.append(_joined(content, vendor))
            continue
        parts, calls = _parts(content, vendor), message.get("tool_calls") or ()
        if not (parts or calls or role == "tool"):
            continue
        side = "assistant" if role == "assistant" else "user"
        fresh = not turns or turns[-1].role != side
        turn = _Turn(side) if fresh else turns[-1]
        turns += [turn] if fresh else []
        turn.carry = call.carried(message) if fresh else {}
        if role == "tool":
            turn.results.append((message["tool_call_id"], names[message["tool_call_id"]], parts))
        else:
            turn.parts += parts
        for item in calls:
            name = item["function"]["name"]
            turn.calls.append((item["id"], name, _argument_object(item["function"].get("arguments"))))
            names[item["id"]] = name
    for place in (0, -1):
        if not turns or turns[place].role == "assistant":
            filler = _Turn("user")
            filler.parts.append(("text", "", _GO_ON))
            turns.insert(0 if place == 0 else len(turns), filler)
    return "\n\n".join(text for text in system if text.strip()), turns


def _safe(text: str, bad: str, most: int) -> str:
    """A name or id without the characters that a vendor refuses (``bad``: a pattern), still distinct from all others."""
    clean = _pattern(bad).sub("_", text)
    if clean == text and 0 < len(text) <= most:
        return text
    return f"{clean[: most - 9]}_{zlib.crc32(text.encode()):08x}"


# -- to the answer -----------------------------------------------------------------------------------------------------


class _ThinkSplitter:
    """Takes a leading <think>…</think> block out of text that comes in pieces."""

    def __init__(self) -> None:
        self._state = "start"  # start | thinking | gap | answer
        self._held = ""
        self.thought: list[str] = []

    def feed(self, text: str) -> str:
        """What of this piece belongs to the answer."""
        if self._state == "answer":
            return text
        if self._state == "gap":
            text = text.lstrip()
            self._state = "answer" if text else "gap"
            return text
        self._held += text
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith("<think>"):
                self._state, self._held = "thinking", begun[7:]
            elif "<think>".startswith(begun):
                return ""
            else:
                return self._release()
        end = self._held.find("</think>")
        if end < 0:
            keep = max(0, len(self._held) - 7)
            self.thought.append(self._held[:keep])
            self._held = self._held[keep:]
            return ""
        self.thought.append(self._held[:end])
        self._state, rest, self._held = "gap", self._held[end + 8 :], ""
        return self.feed(rest)

    def _release(self) -> str:
        self._state, held, self._held = "answer", self._held, ""
        return held

    def close(self) -> str:
        """The text is over: what was held back."""
        if self._state == "thinking":
            self.thought.append(self._held)
            return ""
        return self._release()


class _Decoder(ABC):
    """Turns the events of one answer, or one whole JSON answer, into deltas of text and one LLMResponse. No I/O."""

    #: A vendor's finish reasons -> ours; one that is not listed means "stop".
    _finishes: ClassVar[dict[str, str]] = {}
    #: What stands in the place of a last event.
    _end_marker: ClassVar[bytes | None] = None

    def __init__(self, call: _Call, names: Mapping[str, str] = MappingProxyType({})) -> None:
        self.alive = False  #: a sign of generation has come; the reader takes it back when it has seen it
        self.complete = False  #: the answer has its finish reason
        self.ended = False  #: the end marker has come: nothing follows
        self.usage: Usage | None = None
        self.request_id: str | None = None
        self._call = call
        self._names = names  #: tools' names as they were sent -> as the caller knows them
        self._finish: str | None = None
        self._refused = False
        self._model = ""
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._think = _ThinkSplitter()
        self._half = ""  #: of a character that JSON writes as two, while the other half may still come
        self._raw: dict[str, Any] | None = None
        self._carry: dict[str, Any] = {}

    def feed(self, name: str, data: bytes) -> str:
        """Take one event; returns its text for the reader, "" if it has none. Raises InvalidResponse or _InBandError."""
        if data.strip() == self._end_marker:
            self.ended = True
            return ""
        body = _json(data, "an event")
        if name == "error" and not (isinstance(body, dict) and body.get("error")):
            raise _InBandError({"error": body})
        return self._take_any(body, whole=False)

    def feed_late(self, name: str, data: bytes) -> str:
        """An event behind the finish reason: usage, perhaps. What makes no sense there cannot spoil a whole answer."""
        before = len(self._text)
        try:
            return self.feed(name, data)
        except InvalidResponse:
            del self._text[before:]
            return ""

    def feed_whole(self, body: Any) -> None:
        """Take a whole JSON answer."""
        self._take_any(body, whole=True)
        self._raw = body if isinstance(body, dict) else None
        self.ended = True

    def _take_any(self, body: Any, whole: bool) -> str:
        if not isinstance(body, dict):
            if isinstance(body, list):  # Gemini without alt=sse, and its errors
                return "".join([self._take_any(item, whole) for item in body])
            raise InvalidResponse("the answer is no object")
        if body.get("error") or body.get("object") == "error":
            raise _InBandError(body)
        return self._take(body, whole)

    @property
    def length(self) -> int:
        """How much text of the answer has been returned."""
        return sum(map(len, self._text))

    @abstractmethod
    def _take(self, body: dict[str, Any], whole: bool) -> str:
        """One event, or one whole answer, that is an object and no error; returns the text in it."""

    def _add_text(self, text: str) -> str:
        self.alive = True
        if self._half or not text.isascii():
            text, self._half = _whole_characters(self._half + text)
        text = self._think.feed(text)
        if text:
            self._text.append(text)
        return text

    def _add_reasoning(self, text: Any) -> bool:
        if isinstance(text, str) and text:
            self._reasoning.append(text)
            self.alive = True
            return True
        return False

    def _add_call(self, call_id: Any, name: Any, arguments: Any) -> dict[str, Any]:
        """A new tool call; more arguments may be appended to it. An argument object is as good as its text."""
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments)
        call = {"id": call_id if isinstance(call_id, str) else "", "name": name if isinstance(name, str) else "",
                "arguments": [arguments] if arguments else []}  # fmt: skip
        self._calls.append(call)
        self.alive = True
        return call

    def _finished(self, reason: Any) -> None:
        if not isinstance(reason, str):
            raise InvalidResponse("the finish reason is no text")
        self._finish, self.complete = self._finishes.get(reason, "stop"), True

    def response(self) -> LLMResponse:
        """The answer. Raises InvalidResponse if it is not complete, EmptyResponse or ContentFiltered if it is empty."""
        finish = self._finish or ("stop" if self.ended else None)
        if finish is None:
            raise InvalidResponse("truncated: neither a finish reason nor an end marker")
        self._text.append(self._think.close() + ("\ufffd" if self._half else ""))
        calls = [self._tool_call(at, call) for at, call in enumerate(self._calls)]
        if finish in ("stop", "tool_calls"):
            finish = "tool_calls" if calls else "stop"
        text = "".join(self._text)
        if self._refused and not text and not calls:
            finish = "content_filter"
        if self._carry:
            self._carry.update(text=text or None, ids=[call.id for call in calls])
            self._carry["for"] = self._call.identity
        return _checked_answer(LLMResponse(
            text or None, calls, finish, self.usage or _NO_USAGE, self._model or self._call.model or "",
            reasoning=_whole_characters("".join((*self._reasoning, *self._think.thought)))[0].strip() or None,
            request_id=self.request_id, raw=self._raw, carry=self._carry or None,
        ))  # fmt: skip

    def _tool_call(self, at: int, call: dict[str, Any]) -> ToolCall:
        if not call["name"]:
            raise InvalidResponse("a tool call has no name")
        earlier = sum(len(message.get("tool_calls") or ()) for message in self._call.messages)
        name = self._names.get(call["name"], call["name"])
        try:
            parsed = _parsed_arguments("".join(call["arguments"]))
        except TypeError:
            raise InvalidResponse("a tool call's arguments are no text") from None
        return ToolCall(call["id"] or f"call_{earlier + at}", name, *parsed)


def _whole_characters(text: str) -> tuple[str, str]:
    """A text whose surrogate pairs are characters and whose lone ones are U+FFFD; and a first half that stood at its end."""
    half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
    text = text.removesuffix(half)
    if _pattern("[\ud800-\udfff]").search(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text, half


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidResponse(f"{what} is no object")
    return value


def _items(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidResponse(f"{what} is no list")
    return value


def _parsed_arguments(text: str) -> tuple[dict[str, Any] | None, str]:
    """The arguments as an object, {} for empty text, None if the model wrote something else; and the text as it was."""
    if not text.strip():
        return {}, text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None, text
    return (value if isinstance(value, dict) else None), text


def _count(value: Any) -> int:
    """A number of tokens. What makes no sense counts as 0: it must not cost an answer."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53 else 0


def _argument_object(arguments: Any) -> dict[str, Any]:
    """A tool call's arguments for vendors that take only an object; what is none goes under "_raw"."""
    if isinstance(arguments, dict):
        return arguments
    parsed = _parsed_arguments(arguments or "")[0]
    return {"_raw": arguments} if parsed is None else parsed


# ==== HTTP providers ==================================================================================================


class _HTTPProvider(LLMProvider):
    """What all HTTP providers share: the session, the limits, one corrected resend, and the reading of failures.

    A vendor adds its names and addresses, its headers, and ``_prepare``, which picks path, body and decoder.
    """

    _vendor: ClassVar[str]
    _default_url: ClassVar[str]
    _api_path: ClassVar[str]
    _ping_path: ClassVar[str] = "/models"
    _cut_paths: ClassVar[tuple[str, ...]] = ()  #: ends of a base URL that people copy along
    _key_variables: ClassVar[tuple[str, ...]]
    _url_variable: ClassVar[str] = ""
    _needs_model: ClassVar[bool] = True
    _first_token_timeout: ClassVar[float] = _FIRST_TOKEN_TIMEOUT

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        connect_timeout: float = _CONNECT_TIMEOUT,
        first_token_timeout: float | None = None,
        stall_timeout: float = _STALL_TIMEOUT,
        max_response_bytes: int = _MAX_RESPONSE_BYTES,
        stream_upstream: bool = True,
        session: requests.Session | None = None,
    ) -> None:
        first = self._first_token_timeout if first_token_timeout is None else first_token_timeout
        self.connect_timeout: float = _number(connect_timeout, "connect_timeout")
        self.first_token_timeout: float = _number(first, "first_token_timeout")
        self.stall_timeout: float = _number(stall_timeout, "stall_timeout")
        self.max_response_bytes: int = _number(max_response_bytes, "max_response_bytes", least=1, whole=True)
        self.stream_upstream = stream_upstream
        self._wants_model = self._needs_model
        key = self._from_environment(os.environ)[0] if api_key is None else api_key
        self._key = _sendable(key, f"{type(self).__name__}(api_key)")
        self._basic: dict[str, str] = {}
        self.base_url = self._full_url(base_url or self._from_environment(os.environ)[1] or self._default_url)
        own = {name: _sendable(value, f"headers[{name!r}]") for name, value in (headers or {}).items()}
        self._secrets = (self._key, *self._basic.values(), *own.values())
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
            "Accept-Encoding": "identity",  # compression would only delay the first token
            "User-Agent": f"copilot-router/{__version__}",
            **self._basic,
            **self._auth_headers(),
            **own,
        }
        self._quirks: dict[str | None, Mapping[str, Any]] = {}  # by model; replaced, never changed
        self._requests, self._new_session = _http()
        self._own_session = session is None
        self._session = session
        self._settings: dict[str, Any] = {}
        self._lock = threading.Lock()
        if not self._key and self._default_url.startswith("https") and self.base_url.startswith(self._default_url):
            self._warn_without_key()
        _never_inherited.add(self)

    @classmethod
    def _from_environment(cls, environ: Mapping[str, str]) -> tuple[str, str]:
        """The key and the base URL that an environment names, "" for neither."""
        key = next((environ[name] for name in cls._key_variables if environ.get(name)), "")
        return key, environ.get(cls._url_variable, "")

    def _warn_without_key(self) -> None:
        import warnings

        level, frame = 1, inspect.currentframe()
        while frame and frame.f_back and frame.f_globals is globals():  # up to who builds it
            level, frame = level + 1, frame.f_back
        text = f"{type(self).__name__} has no key: set {self._key_variables[0]} or pass api_key="
        warnings.warn(text, UserWarning, stacklevel=level)

    def _full_url(self, url: str) -> str:
        """The base URL with the API's own path if it has none. A query (Azure's api-version) is kept."""
        import base64
        from urllib.parse import unquote

        where = f"{type(self).__name__}(base_url)"
        if not isinstance(url, str) or not _pattern(r"https?://[^\s/?#]+[^\s]*").fullmatch(url.strip()):
            if isinstance(url, str):  # without what may be a password or a key
                url = ("***@" if "@" in url else "") + url.rpartition("@")[2].partition("?")[0]
            raise ConfigError(f"{where}={url!r}: give a URL with its scheme, such as {self._default_url}{self._api_path}")
        address, _, self._query = url.strip().partition("?")
        scheme, _, rest = address.partition("://")
        user, at, _ = rest.partition("/")[0].rpartition("@")
        if at:  # a name and password become a header, so that no message shows them
            address = f"{scheme}://{rest.removeprefix(user + at)}"
            self._basic = {"Authorization": f"Basic {base64.b64encode(unquote(user).encode()).decode()}"}
        address = address.rstrip("/")
        for end in self._cut_paths:
            address = address.removesuffix(end).rstrip("/")
        has_path = "/" in address.partition("://")[2]
        return address if has_path else address + self._api_path

    # -- a vendor's own part

    def _auth_headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    @abstractmethod
    def _prepare(self, call: _Call, streaming: bool) -> tuple[str, dict[str, Any], _Decoder]:
        """The path, the body and the decoder for a call. Pure."""

    # -- the interface

    def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> LLMResponse:
        """One whole answer. ``messages``: OpenAI form or a str. Options as in the README's table, else TypeError.

        ``timeout``, ``first_token_timeout``, ``stall_timeout`` (seconds) limit this request. Raises ProviderError classes.
        """
        events = self._events(messages, tools, model, kwargs)
        del messages, tools, kwargs  # or a traceback with locals would show them
        return _drained(_sealed(events))

    def stream(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> Generator[str, None, LLMResponse]:
        """Yields deltas of text as they come, returns the whole answer; arguments as for ``chat()``.

        Time that the caller takes between deltas counts towards ``timeout``, but never as silence of the server.
        """
        return _sealed(self._events(messages, tools, model, kwargs, every_delta=True))

    def ping(self, timeout: float = 5.0) -> None:
        """Lists the models: cheap, free, and proof of address and key (not of quota). Raises ProviderError."""
        _number(timeout, "timeout")
        limits = _Limits(timeout, self.connect_timeout, timeout, timeout, (timeout, timeout))
        answer = self._send("GET", self._ping_path, b"", limits)
        try:
            if answer.status >= 300:
                raise self._failure(answer, self._error_body(answer), _Call([], None, None, {}))[0]
            _json(answer.body(), "the list of models")
        finally:
            answer.close()

    def close(self) -> None:
        """Close idle connections; the provider stays usable. A session of the user's is left alone."""
        if self._own_session:
            with self._lock:
                session, self._session = self._session, None
            if session is not None:
                session.close()

    def _renew_after_fork(self) -> None:
        self._lock = threading.Lock()
        if self._own_session:
            self._session = None  # its sockets are the parent's

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.base_url}>"

    # -- one request

    def _events(
        self, messages: Any, tools: Any, model: Any, kwargs: dict[str, Any], every_delta: bool = False
    ) -> Generator[str, None, LLMResponse]:
        """One answer, with one corrected resend: yields deltas if wanted, returns the response."""
        asked = self._checked_call(messages, tools, model, kwargs)
        timeout = kwargs.get("timeout")
        deadline = math.inf if timeout is None else time.monotonic() + _number(timeout, "timeout")
        resent = False
        while True:
            call = self._corrected(asked)
            path, body, decoder = self._prepare(call, self.stream_upstream)
            answer = self._send("POST", path, _dumped(body), self._limits(kwargs, deadline))
            try:
                if 200 <= answer.status < 300:
                    return (yield from self._read(answer, call, decoder, every_delta))
                error, facts = self._failure(answer, self._error_body(answer), call)
            except ProviderError as failure:
                failure.model = failure.model or model or ""
                failure.provider = failure.provider or self._vendor
                failure.status = failure.status or answer.status
                raise
            finally:
                answer.close()
            if resent or not self._learn(facts, answer.status, call, kwargs.get("on_resend")):
                raise error
            resent = True

    def _checked_call(self, messages: Any, tools: Any, model: Any, kwargs: dict[str, Any]) -> _Call:
        for name in kwargs:
            if name not in _OPTIONS and name not in _LIMIT_OPTIONS:
                raise _UnknownOption(f"unknown option {name!r} for {type(self).__name__}.{_near(name, _OPTIONS)}"
                                     " Fields of one vendor go into extra_body={}")  # fmt: skip
        if model is None and self._wants_model:
            raise ConfigError(f"{self!r} needs a model: give the tier models=[...] or pass model=")
        options = {name: value for name, value in kwargs.items() if name in _OPTIONS and value is not None}
        identity = f"{self._vendor} {self.base_url} {model or ''}"
        return _Call(_repaired(_checked_messages(messages)), _checked_tools(tools), model, options, identity=identity)

    def _limits(self, kwargs: dict[str, Any], deadline: float) -> _Limits:
        first = kwargs.get("first_token_timeout")
        stall = kwargs.get("stall_timeout")
        return _Limits(
            deadline - time.monotonic(),
            self.connect_timeout,
            self.first_token_timeout if first is None else _number(first, "first_token_timeout"),
            self.stall_timeout if stall is None else _number(stall, "stall_timeout"),
            (self.first_token_timeout, self.stall_timeout),
        )

    def _send(self, method: str, path: str, body: bytes, limits: _Limits) -> _Answer:
        """The answer's headers. A kept connection that turns out closed is replaced, once, unseen."""
        mark = "" if not self._query else "&" if "?" in path else "?"
        url = f"{self.base_url}{path}{mark}{self._query}"
        _current.limits = limits
        while True:
            try:
                return _Answer(self._dispatch(method, url, body, limits), limits, self.max_response_bytes)
            except Exception as error:
                if _passes_through(error):
                    raise
                failure = _transport_error(error, limits, "connecting")
            if not (limits.reused and not limits.fresh and isinstance(failure, ServerError)):
                failure.provider = self._vendor
                raise failure  # outside the handler: what requests raised holds the headers and the body
            limits.fresh = True

    def _dispatch(self, method: str, url: str, body: bytes, limits: _Limits) -> Any:
        session = self._session
        if not self._own_session and session is not None:
            request = self._requests.Request(method, url, headers=self._headers, data=body or None)
            request.auth = session.auth or (lambda prepared: prepared)  # or .netrc would replace the key
            prepared = session.prepare_request(request)
            settings: Any = session.merge_environment_settings(url, {}, True, None, None)
            settings["timeout"] = (limits.connect_left(), limits.left())  # its sockets are not ours to watch
            return session.send(prepared, allow_redirects=False, **settings)
        if session is None:
            session = self._open_session(url)
        prepared = self._requests.PreparedRequest()
        prepared.prepare_method(method)
        prepared.url, prepared.body = url, body or None
        prepared.headers = self._requests.structures.CaseInsensitiveDict(self._headers)
        prepared.headers["Content-Length"] = str(len(body))
        return session.get_adapter(url).send(prepared, timeout=None, **self._settings)

    def _open_session(self, url: str) -> Any:
        """A session, with the proxies and certificates of the environment looked up once instead of at every call."""
        with self._lock:
            if self._session is None:
                session = self._new_session()
                self._settings = session.merge_environment_settings(url, {}, True, None, None)
                self._session = session
            return self._session

    def _read(
        self, answer: _Answer, call: _Call, decoder: _Decoder, every_delta: bool
    ) -> Generator[str, None, LLMResponse]:
        """Decode an answer of status 2xx as it comes. Raises what is wrong with it."""
        decoder.request_id = self._request_id(answer)
        kind = answer.headers.get("Content-Type", "").lower()
        try:
            if "event-stream" in kind or "ndjson" in kind:
                parser = _Lines() if "ndjson" in kind else _SSE()
                yield from self._read_events(answer, parser, decoder, every_delta)
                shown = decoder.length
            else:
                self._read_whole(answer, decoder)
                shown = 0
            response = decoder.response()
            if every_delta and (rest := response.text[shown:]):
                yield rest  # whole JSON, or what might have become a think block or half a character
            return response
        except RecursionError:
            raise InvalidResponse("the answer is nested too deeply") from None
        except _InBandError as in_band:
            error, _ = self._reported(in_band.body, answer, call, decoder.usage)
            raise error from None
        except ProviderError as error:
            error.usage = error.usage or decoder.usage
            error.request_id = error.request_id or decoder.request_id
            raise

    def _read_events(
        self, answer: _Answer, parser: _Lines, decoder: _Decoder, every_delta: bool
    ) -> Generator[str, None, None]:
        limits = answer.limits
        feed = decoder.feed
        for events in self._event_batches(answer, parser, decoder):
            for name, data in events:
                text = feed(name, data) if not decoder.complete else decoder.feed_late(name, data)
                if text and every_delta:
                    yield text
                if decoder.ended:
                    answer.finish()
                    return
            if decoder.alive:
                decoder.alive = False
                limits.progress()

    @staticmethod
    def _event_batches(answer: _Answer, parser: _Lines, decoder: _Decoder) -> Iterator[Iterable[tuple[str, bytes]]]:
        limits = answer.limits
        try:
            for chunk in answer.chunks():
                yield parser.feed(chunk)
                if decoder.complete and limits.silence > _TAIL_TIMEOUT:  # all but usage and the end is here
                    limits.since, limits.silence = time.monotonic(), _TAIL_TIMEOUT
            yield parser.close()
        except (ProviderTimeout, InvalidResponse):
            if not decoder.complete:
                raise

    @staticmethod
    def _read_whole(answer: _Answer, decoder: _Decoder) -> None:
        body = answer.body()
        if not body.strip():
            raise InvalidResponse("an empty body")
        kind = answer.headers.get("Content-Type", "no content type").partition(";")[0]
        decoder.feed_whole(_json(body, f"the answer ({kind if _pattern(_MEDIA_TYPE).fullmatch(kind) else 'of an odd type'})"))

    @staticmethod
    def _error_body(answer: _Answer) -> bytes:
        """What an error says; nothing if it is cut, garbled or late, since its status and headers still say enough."""
        limits = answer.limits
        limits.deadline = min(limits.deadline, time.monotonic() + _TAIL_TIMEOUT)
        try:
            return answer.body()
        except (InvalidResponse, ProviderTimeout) as error:
            if error.code == "too_large":
                raise
            return b""

    def _failure(self, answer: _Answer, body: bytes, call: _Call) -> tuple[ProviderError, _ErrorFacts]:
        """The error for an answer whose status is not 2xx, and the facts in it for our own eyes only."""
        if 300 <= answer.status < 400:
            text = "a redirect, which is not followed: correct the base_url"
            return InvalidResponse(text, provider=self._vendor, model=call.model or "", status=answer.status), _ErrorFacts()
        try:
            parsed = json.loads(body.decode("utf-8-sig", "replace"))
        except (ValueError, RecursionError):
            plain = answer.headers.get("Content-Type", "").startswith("text/plain")
            parsed = body.decode("utf-8", "replace") if plain else {"message": f"status {answer.status} without JSON"}
        return self._reported(parsed, answer, call, None)

    def _reported(
        self, body: Any, answer: _Answer, call: _Call, usage: Usage | None
    ) -> tuple[ProviderError, _ErrorFacts]:
        """The error that a body reports, at whatever status, with a message that is safe to show."""
        facts = _error_facts(body)
        hint = _retry_hint(answer.headers, facts, answer.status in (429, 503, 529))
        waits = "retry-after" in answer.headers or "retry-after-ms" in answer.headers
        kind = _class_of(facts, answer.status, call.model, waits)
        message = _masked(facts.message, self._secrets, _texts_of(call.messages))
        error = kind(
            message or f"status {answer.status} without a message",
            provider=self._vendor, model=call.model or "", status=answer.status,
            request_id=self._request_id(answer), code=self._token(facts.codes[0]) if facts.codes else None,
            retry_after=hint if issubclass(kind, (RateLimited, ServerError, ProviderTimeout)) else None,
        )  # fmt: skip
        error.usage = usage
        return error, facts

    def _request_id(self, answer: _Answer) -> str | None:
        return self._token(next((answer.headers[name] for name in _REQUEST_IDS if name in answer.headers), ""))

    def _token(self, text: str) -> str | None:
        """A server's code or id; None for what is none, or repeats the key."""
        is_one = _pattern(r"[\w.:/+=-]{1,100}").fullmatch(text) and not (self._key and self._key.lower() in text.lower())
        return text if is_one else None

    # -- what a model refuses is learned from its error

    def _learn(self, facts: _ErrorFacts, status: int, call: _Call, told: Any) -> bool:
        """Whether the error names one optional field that can be dropped, renamed or replaced; remembered per model."""
        fix = _correction(facts, status, call, self._moves(facts))
        if fix is None:
            return False
        name, value = fix
        if name in call.quirks and call.quirks[name] == value:  # as it was sent; what another thread has just learned was not
            return False
        with self._lock:
            self._quirks[call.model] = {**self._quirks.get(call.model, {}), name: value}
        if told is not None:
            told({"field": name, "change": "drop" if value is None else "replace"})
        return True

    def _moves(self, facts: _ErrorFacts) -> tuple[str, Any] | None:
        """A correction of the vendor's own, if the error asks for it."""
        return None

    def _corrected(self, call: _Call) -> _Call:
        """The call without what this model is known to refuse."""
        quirks = self._quirks.get(call.model)
        if not quirks:
            return call
        options = {name: quirks.get(name, value) for name, value in call.options.items()}
        return call._replace(options={name: value for name, value in options.items() if value is not None}, quirks=quirks)


def _sealed(stream: Generator[str, None, LLMResponse]) -> Generator[str, None, LLMResponse]:
    """The same stream; its errors come without the frames in which they arose: those hold the request."""
    try:
        return (yield from stream)
    except ProviderError as error:
        raise _bare(error)  # noqa: B904 - it is the same error


def _drained(stream: Generator[str, None, LLMResponse]) -> LLMResponse:
    """What a stream returns in the end."""
    while True:
        try:
            next(stream)
        except StopIteration as end:
            response: LLMResponse = end.value
            return response


#: What is shown of a Content-Type: a server may echo a key in any header.
_MEDIA_TYPE = r"(text|application|image)/[a-z-]{1,15}|no content type"
_REQUEST_IDS = ("x-request-id", "request-id", "apim-request-id", "x-ms-request-id", "x-generation-id")

#: Our options -> what vendors call them when they complain.
_COMPLAINTS = {
    **{name: name for name in _HINTS},
    "top_p": "top_?p",
    "presence_penalty": "presence_?penalty",
    "frequency_penalty": "frequency_?penalty",
    "reasoning_effort": r"reasoning_effort|reasoning\.effort|output_config(?:\.effort)?|effort|thinking[\w.]*|think",
    "parallel_tool_calls": "parallel_tool_calls|disable_parallel_tool_use",
    "user": r"user|metadata(?:\.user_id)?|safety_identifier",
}
_REFUSES = (
    r"(?i)unsupported|not supported|does not support|unrecognized|unknown (?:name|field|parameter|argument)|"
    r"extra inputs|not permitted|deprecated|not allowed|unexpected (?:field|keyword|parameter)|cannot be (?:set|used)"
)


def _correction(
    facts: _ErrorFacts, status: int, call: _Call, moved: tuple[str, Any] | None
) -> tuple[str, Any] | None:
    """How to change the one optional field that a 400 names: an option and its new value (None: drop it), or ``token_limit``
    or ``stream_options`` and what to do with that field of the body. None if there is nothing to correct."""
    text = facts.message
    if status not in (400, 422) or not (moved or _pattern(_REFUSES).search(text + " " + " ".join(facts.codes))):
        return None
    if moved is not None:
        return moved
    limits = ("max_tokens", "max_completion_tokens") if call.limit() is not None else ()
    candidates = {name: _COMPLAINTS[name] for name in _HINTS if name in call.options}
    candidates |= dict.fromkeys((*limits, "stream_options"), "")
    refused = text.partition(" Use ")[0].partition(" use ")[0]
    named = [
        name
        for name, pattern in candidates.items()
        if facts.param == name or re.search(rf"(?i)(?<![\w.])(?:{pattern or name})(?!\w)", refused)
    ]
    if facts.param in named:
        named = [facts.param]
    if len(named) != 1:
        return None
    name = named[0]
    if name in limits:
        other = next(limit for limit in limits if limit != name)
        return ("token_limit", other) if other in text or _pattern("nsupported|nrecognized").search(text) else None
    none = name == "reasoning_effort" and _pattern(r"(?i)set reasoning_effort to ['\"]?none").search(text)
    return name, "none" if none else None


def _sendable(value: Any, where: str) -> str:
    """A header value without surrounding white space. ConfigError, without the value, if HTTP cannot carry it."""
    if not isinstance(value, str):
        raise ConfigError(f"{where} is a {type(value).__name__}: give a str")
    text: str = value.strip()
    bad = next((char for char in text if ord(char) < 32 or ord(char) == 127 or ord(char) > 255), None)
    if bad is not None:
        raise ConfigError(f"{where} holds the character U+{ord(bad):04X}, which HTTP cannot carry: copy it again")
    return text


def _dumped(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, TypeError) else "NaN, infinity or a cycle"
        raise BadRequest(f"the request cannot be written as JSON: {reason}") from None


# ==== OpenAI Chat Completions and Responses ===========================================================================
# https://platform.openai.com/docs/api-reference/chat; spoken by LM Studio, llama.cpp, vLLM, Ollama, OpenRouter and others.


#: What a message holds that says nothing but text.
_TEXT_KEYS = frozenset({"role", "content"})


class _ChatDecoder(_Decoder):
    _finishes: ClassVar[dict[str, str]] = {
        "length": "length", "content_filter": "content_filter", "sensitive": "content_filter",
    }  # fmt: skip
    _end_marker = b"[DONE]"

    def __init__(self, call: _Call) -> None:
        super().__init__(call)
        self._by_index: dict[Any, dict[str, Any]] = {}
        self._returned: list[str] = []  # reasoning that a thinking DeepSeek wants back
        self._index: Any = None  # of the choice that is taken: extra_body may ask for several

    def _take(self, body: dict[str, Any], whole: bool) -> str:
        model = body.get("model")
        if model and isinstance(model, str):
            self._model = model
        usage = body.get("usage")
        if not usage and "x_groq" in body:
            usage = _dict(body["x_groq"]).get("usage")
        if usage is not None:
            self.usage = _chat_usage(usage) or self.usage
        choices = body.get("choices")
        if choices is None and not whole and "usage" in body:
            return ""
        if not isinstance(choices, list) or (whole and not choices):
            raise InvalidResponse("no choices")
        if not choices:
            return ""
        choice = _object(choices[0], "choices[0]")
        self._index = choice.get("index") if self._index is None else self._index
        if choice.get("index") not in (self._index, None):
            return ""
        if choice.get("error"):
            raise _InBandError(choice)
        return self._take_choice(choice, "message" if whole else "delta")

    def _take_choice(self, choice: dict[str, Any], part: str) -> str:
        """One chunk, or one whole answer: they differ only in the name of the part."""
        message = choice.get(part)
        text = ""
        if isinstance(message, dict):
            text = self._take_message(message)
        elif isinstance(choice.get("text"), str):
            text = self._add_text(choice["text"])
        elif part == "message" or message is not None:
            raise InvalidResponse(f"choices[0].{part} is no object")
        finish = choice.get("finish_reason")
        if finish == "error":
            raise _InBandError({"error": {"message": "the model reported an error"}})
        if finish is not None:
            self._finished(finish)
        return text

    def _take_message(self, message: dict[str, Any]) -> str:
        if not message.keys() <= _TEXT_KEYS:  # most events of a stream hold nothing but text
            self._take_extras(message)
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(
                part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
            )
        if content is not None and not isinstance(content, str):
            raise InvalidResponse("content is no text")
        return self._add_text(content) if content else ""

    def _take_extras(self, message: dict[str, Any]) -> None:
        """Reasoning, tool calls and refusals."""
        if self._add_reasoning(message.get("reasoning_content")):
            self._returned.append(message["reasoning_content"])
        elif not self._add_reasoning(message.get("reasoning")):
            details = message.get("reasoning_details")
            for item in details if isinstance(details, list) else ():
                self._add_reasoning(_dict(item).get("text") or _dict(item).get("summary"))
        calls = message.get("tool_calls")
        for call in _items(calls, "tool_calls") if calls is not None else ():
            self._take_call(_object(call, "a tool call"))
        if isinstance(message.get("function_call"), dict):
            self._take_call({"index": 0, "function": message["function_call"]})
        if isinstance(message.get("refusal"), str) and message["refusal"]:
            self._refused = self.alive = True

    def _take_call(self, call: dict[str, Any]) -> None:
        """One piece of a tool call. Index, id and name may be missing, repeated, or all in one piece."""
        function = call.get("function", call.get("custom"))
        function = {} if function is None else _object(function, "a tool call's function")
        key, call_id = call.get("index"), call.get("id")
        arguments = function.get("arguments", function.get("input"))
        name, indexed = function.get("name"), isinstance(key, (int, str))
        known = self._by_index.get(key) if indexed else (self._calls[-1] if self._calls else None)
        if known is not None and not indexed and name and known["name"] and not (call_id and name == known["name"]):
            known = None  # neither index nor id, as whole JSON of llama.cpp: a second name begins a second call
        if known is None or (call_id and known["id"] and call_id != known["id"]):
            known = self._add_call(call_id, name, arguments)
        elif arguments:
            self.alive = True
            known["arguments"].append(json.dumps(arguments) if isinstance(arguments, dict) else arguments)
        if indexed:
            self._by_index[key] = known
        for field_name, value in (("id", call_id), ("name", name)):
            if isinstance(value, str) and value:
                known[field_name] = value

    def response(self) -> LLMResponse:
        if self._returned:
            self._carry = {"reasoning_content": "".join(self._returned)}
        return super().response()


def _chat_usage(usage: Any) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    prompt, completion = (_dict(usage.get(f"{side}_tokens_details")) for side in ("prompt", "completion"))
    return Usage(
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        _count(prompt.get("cached_tokens")) or _count(usage.get("prompt_cache_hit_tokens")),
        _count(prompt.get("cache_write_tokens")),
        _count(completion.get("reasoning_tokens")),
    )


#: Keys of a message that are sent; anything else is another vendor's, or only ever an answer's.
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")


def _chat_message(call: _Call, message: Message, at_openai: bool) -> dict[str, Any]:
    """A message as it is sent. Local templates know neither the developer role nor lists of text parts."""
    sent = {key: message[key] for key in _MESSAGE_KEYS if message.get(key) is not None}
    if "tool_calls" in sent:
        sent["tool_calls"] = [_textual(item) for item in sent["tool_calls"]]
    if not sent.get("tool_calls"):
        sent.pop("tool_calls", None)  # an empty list is refused
    sent.setdefault("content", None if "tool_calls" in sent else "")
    if not at_openai:
        if sent["role"] == "developer":
            sent["role"] = "system"
        parts = sent["content"]
        if isinstance(parts, (list, tuple)) and parts and all(part.get("type") == "text" for part in parts):
            sent["content"] = "\n".join(str(part.get("text", "")) for part in parts)
        kept = call.carried(message).get("reasoning_content") if _CARRY in message else None
        if sent["role"] == "assistant" and (kept := kept or call.quirks.get("reasoning_content")):
            sent["reasoning_content"] = kept
    return sent


def _textual(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool call whose arguments are text, as they are sent; callers may have parsed them."""
    arguments = item["function"].get("arguments")
    if isinstance(arguments, str):
        return item
    return {**item, "function": {**item["function"], "arguments": json.dumps(arguments or {})}}


def _short_ids(messages: list[Message], most: int) -> list[Message]:
    """Messages whose tool ids OpenAI takes: other servers' are longer, or hold packed data."""
    short: list[Message] = []
    for message in messages:
        if calls := message.get("tool_calls"):
            message = {**message, "tool_calls": [{**item, "id": _safe(item["id"], "$^", most)} for item in calls]}
        elif message["role"] == "tool":
            message = {**message, "tool_call_id": _safe(message["tool_call_id"], "$^", most)}
        short.append(message)
    return short


def _chat_body(call: _Call, streaming: bool, at_openai: bool) -> dict[str, Any]:
    """The body of a Chat Completions request."""
    options = {name: value for name, value in call.options.items() if name not in _EXPRESSED}
    body: dict[str, Any] = {} if call.model is None else {"model": call.model}
    messages = _short_ids(call.messages, 40) if at_openai else call.messages
    body["messages"] = [_chat_message(call, message, at_openai) for message in messages]
    if call.tools:
        body["tools"] = list(call.tools)
    else:
        options.pop("tool_choice", None)  # both are refused without tools
        options.pop("parallel_tool_calls", None)
    body.update(options)
    if call.limit() is not None:
        guess = "max_completion_tokens" if at_openai else "max_tokens"
        body[call.quirks.get("token_limit", guess)] = call.limit()
    if streaming:
        body["stream"] = True
        if "stream_options" not in call.quirks:
            body["stream_options"] = {"include_usage": True}
    return call.finished(body)


_EXPRESSED = ("max_tokens", "max_completion_tokens", "extra_body")


class _ResponsesDecoder(_Decoder):
    _finishes: ClassVar[dict[str, str]] = {"max_output_tokens": "length", "content_filter": "content_filter"}

    def __init__(self, call: _Call) -> None:
        super().__init__(call)
        self._done: list[Any] = []
        self._begun = False  #: text has come as deltas: some of it may still be held back

    def _take(self, body: dict[str, Any], whole: bool) -> str:
        if whole:
            return self._end(body)
        kind = str(body.get("type"))
        if kind in ("response.completed", "response.incomplete", "response.failed", "response.cancelled"):
            return self._end(_object(body.get("response"), "response"))
        if kind == "error":
            raise _InBandError({"error": body})
        if kind == "response.output_item.done":
            self._done.append(body.get("item"))
        elif kind == "response.output_text.delta" and isinstance(body.get("delta"), str):
            self._begun = True
            return self._add_text(body["delta"])
        self.alive = self.alive or kind.endswith(".delta") or kind == "response.output_item.added"
        return ""

    def _end(self, body: dict[str, Any]) -> str:
        """The response object: its output is complete, whatever came as deltas before."""
        status = body.get("status")
        if status == "failed" or (status is None and not isinstance(body.get("output"), list)):
            raise _InBandError({"error": body.get("error") or {"message": "the response failed"}})
        if status not in ("completed", "incomplete", None):
            raise InvalidResponse(f"the response is {str(status)[:20]}")
        if isinstance(body.get("model"), str):
            self._model = body["model"]
        self.usage = _responses_usage(body.get("usage"))
        items = body.get("output") or self._done
        text = "".join([self._take_item(_object(item, "an output item")) for item in _items(items, "output")])
        self._carry = {"items": items} if any(item.get("type") == "reasoning" for item in items) else {}
        reason = _dict(body.get("incomplete_details")).get("reason") or "max_output_tokens"
        self._finished(reason if status == "incomplete" else "stop")
        self.ended = True
        return "" if self._begun or not text else self._add_text(text)

    def _take_item(self, item: dict[str, Any]) -> str:
        kind, text = item.get("type"), ""
        if kind == "reasoning":
            for parts in (item.get("summary"), item.get("content")):
                for part in parts if isinstance(parts, list) else ():
                    self._add_reasoning(_dict(part).get("text"))
        elif kind == "function_call":
            self._add_call(item.get("call_id"), item.get("name"), item.get("arguments"))
        elif kind == "message":
            for part in _items(item.get("content"), "content"):
                self._refused = self._refused or _dict(part).get("type") == "refusal"
                found = _dict(part).get("text")
                text += found if isinstance(found, str) else ""
        return text


def _responses_usage(usage: Any) -> Usage:
    inside, outside = (_dict(_dict(usage).get(f"{side}_tokens_details")) for side in ("input", "output"))
    return Usage(
        _count(_dict(usage).get("input_tokens")), _count(_dict(usage).get("output_tokens")),
        _count(inside.get("cached_tokens")), _count(inside.get("cache_write_tokens")), _count(outside.get("reasoning_tokens")),
    )  # fmt: skip


def _responses_items(call: _Call, message: Message) -> list[Any]:
    """The input items of one message."""
    role = message["role"]
    if role == "tool":
        output = _joined(message["content"], "the Responses API")
        return [{"type": "function_call_output", "call_id": message["tool_call_id"], "output": output}]
    if kept := call.carried(message).get("items"):
        return list(kept)
    content: Any = []
    if role == "assistant":  # parts would need the ids that the API gave them
        content = _joined(message.get("content"), "the Responses API")
    for kind, media, data in _parts(message.get("content"), "the Responses API") if role != "assistant" else ():
        if kind == "text":
            content.append({"type": "input_text", "text": data})
        elif kind == "url" or media.startswith("image/"):
            url = data if kind == "url" else f"data:{media};base64,{data}"
            content.append({"type": "input_image", "image_url": url, "detail": "auto"})
        else:
            content.append({"type": "input_file", "filename": "file", "file_data": f"data:{media};base64,{data}"})
    items: list[Any] = [{"role": role, "content": content}] if content else []
    for item in message.get("tool_calls") or ():
        text = _textual(item)["function"]["arguments"] or "{}"
        items.append({"type": "function_call", "call_id": item["id"], "name": item["function"]["name"], "arguments": text})
    return items


def _responses_body(call: _Call, streaming: bool) -> dict[str, Any]:
    """The body of a Responses request. Nothing is stored; reasoning travels with the conversation, encrypted."""
    if "stop" in call.options:
        raise UnsupportedRequest("the Responses API knows no stop sequences")
    body: dict[str, Any] = {"model": call.model, "store": False, "include": ["reasoning.encrypted_content"]}
    body["input"] = [item for message in _short_ids(call.messages, 64) for item in _responses_items(call, message)]
    if call.tools:
        body["tools"] = [
            {"type": "function", "parameters": {"type": "object", "properties": {}}, "strict": False, **function}
            for function in _functions(call.tools, "the Responses API")
        ]
        kind, name = _choice(call)
        if "tool_choice" in call.options:
            body["tool_choice"] = {"type": "function", "name": name} if kind == "named" else kind
        body |= call.renamed({"parallel_tool_calls": "parallel_tool_calls"})
    body |= call.renamed({"temperature": "temperature", "top_p": "top_p", "user": "user"})
    if call.limit() is not None:
        body["max_output_tokens"] = call.limit()
    if "reasoning_effort" in call.options:
        body["reasoning"] = {"effort": call.options["reasoning_effort"], "summary": "auto"}
    kind, schema = _format(call)
    if kind != "text":
        body["text"] = {"format": {"type": kind, **schema}}
    if streaming:
        body["stream"] = True
    return call.finished(body)


class OpenAIProvider(_HTTPProvider):
    """Chat Completions at OpenAI, Azure, and every compatible server (llama.cpp, vLLM, OpenRouter, …) by its ``base_url``.

    ``api_key``: None takes OPENAI_API_KEY, "" sends none. ``base_url``: None takes OPENAI_BASE_URL, else OpenAI's; without
    a path ``/v1`` is added. ``first_token_timeout``, ``stall_timeout``, ``connect_timeout``: seconds of silence allowed
    before the first token (None: 12), inside the answer, and for connecting. ``headers``: sent with every request, over our
    own of the same name. ``max_response_bytes``: of one answer, after decompression; more is InvalidResponse.
    ``stream_upstream=False`` asks for whole JSON. ``session``: your own ``requests.Session``, used as it is, and then its
    time limits are yours. ``api``: "chat" speaks Chat Completions, "responses" the Responses API, "auto" the first until
    the provider's own error says that a model needs the second for these tools, which is remembered. Safe to share between
    threads and across fork. Raises ConfigError for a setting that cannot work. Facts: OpenAI's API reference.
    """

    _vendor = "openai"
    _default_url = "https://api.openai.com"
    _api_path = "/v1"
    _cut_paths = ("/chat/completions", "/responses")
    _key_variables = ("OPENAI_API_KEY",)
    _url_variable = "OPENAI_BASE_URL"

    def __init__(
        self, api_key: str | None = None, base_url: str | None = None, *, api: str = "auto", **settings: Any
    ) -> None:
        if api not in ("auto", "chat", "responses"):
            raise ConfigError(f"{type(self).__name__}(api={api!r}): give 'auto', 'chat' or 'responses'")
        super().__init__(api_key, base_url, **settings)
        self.api = api
        host = self.base_url.partition("://")[2].partition("/")[0].partition(":")[0]
        self._at_openai = host == "api.openai.com" or host.endswith(".azure.com")
        self._wants_model = self._at_openai  # other servers have a model of their own

    def _auth_headers(self) -> dict[str, str]:
        if self._key and ".azure.com" in self.base_url:
            return {"api-key": self._key}
        return super()._auth_headers()

    def _prepare(self, call: _Call, streaming: bool) -> tuple[str, dict[str, Any], _Decoder]:
        if self.api == "responses" or (self.api == "auto" and call.tools and "api" in call.quirks):
            return "/responses", _responses_body(call, streaming), _ResponsesDecoder(call)
        return "/chat/completions", _chat_body(call, streaming, self._at_openai), _ChatDecoder(call)

    def _moves(self, facts: _ErrorFacts) -> tuple[str, Any] | None:
        if "reasoning_content" in facts.message and "passed back" in facts.message:
            return "reasoning_content", " "  # DeepSeek wants some on turns of other models, too
        return ("api", "responses") if self.api == "auto" and "/v1/responses" in facts.message else None


class LMStudioProvider(OpenAIProvider):
    """LM Studio on this machine: ``http://localhost:1234/v1``, LM_API_TOKEN, LMSTUDIO_BASE_URL; else as OpenAIProvider.

    No model need be named: the loaded one answers. The first token may take 60 seconds, since the model may have to be
    loaded first.
    """

    _vendor = "lmstudio"
    _needs_model = False
    _default_url = "http://localhost:1234"
    _key_variables = ("LM_API_TOKEN",)
    _url_variable = "LMSTUDIO_BASE_URL"
    _first_token_timeout = _LOCAL_FIRST_TOKEN_TIMEOUT


# ==== Anthropic Messages ==============================================================================================
# https://docs.anthropic.com/en/api/messages


class _AnthropicDecoder(_Decoder):
    _finishes: ClassVar[dict[str, str]] = {
        "max_tokens": "length", "model_context_window_exceeded": "length", "pause_turn": "length", "refusal": "content_filter",
    }  # fmt: skip
    #: Kind of a delta -> the field that grows.
    _grows: ClassVar[dict[str, str]] = {
        "text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature", "input_json_delta": "partial_json",
    }  # fmt: skip

    def __init__(self, call: _Call, names: Mapping[str, str]) -> None:
        super().__init__(call, names)
        self._blocks: dict[Any, dict[str, Any]] = {}
        self._pieces: dict[Any, dict[str, list[str]]] = {}
        self._counts: dict[str, Any] = {}

    def _take(self, body: dict[str, Any], whole: bool) -> str:
        kind = body.get("type")
        if whole:
            self._begin(body)
            blocks = _items(body.get("content"), "content")
            text = "".join([self._open(at, block) for at, block in enumerate(blocks)])
            self._stop(body)
            return text
        if kind == "message_start":
            self._begin(_object(body.get("message"), "message"))
        elif kind == "content_block_start":
            return self._open(body.get("index"), body.get("content_block"))
        elif kind == "content_block_delta":
            return self._grow(body.get("index"), _object(body.get("delta"), "delta"))
        elif kind == "message_delta":
            self._count(body.get("usage"))
            self._stop(_object(body.get("delta"), "delta"))
        elif kind == "message_stop":
            self.ended = True
        return ""

    def _begin(self, message: dict[str, Any]) -> None:
        if isinstance(message.get("model"), str):
            self._model = message["model"]
        self._count(message.get("usage"))

    def _open(self, at: Any, block: Any) -> str:
        block = dict(_object(block, "a content block"))
        if not isinstance(at, int):
            raise InvalidResponse("a content block has no index")
        self._blocks[at] = block
        self._pieces[at] = {name: [] for name in self._grows.values()}
        self.alive = True
        self._add_reasoning(block.get("thinking"))
        text = block.get("text")
        return self._add_text(text) if block.get("type") == "text" and isinstance(text, str) and text else ""

    def _grow(self, at: Any, delta: dict[str, Any]) -> str:
        name = self._grows.get(str(delta.get("type")))
        if name is None:
            return ""  # a citation, or something new
        piece = delta.get(name)
        if not isinstance(at, int) or at not in self._pieces or not isinstance(piece, str):
            raise InvalidResponse("a delta without its block, or without its text")
        self._pieces[at][name].append(piece)
        self.alive = True
        if name == "thinking":
            self._add_reasoning(piece)
        return self._add_text(piece) if name == "text" and piece else ""

    def _stop(self, delta: dict[str, Any]) -> None:
        if delta.get("stop_reason") is not None:
            self._finished(delta["stop_reason"])

    def _count(self, usage: Any) -> None:
        """Counts are cumulative and may be repeated: the last of each is right. Input counts leave the cache out."""
        self._counts.update({name: value for name, value in _dict(usage).items() if value is not None})
        plain, read, written, out = (
            _count(self._counts.get(name))
            for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "output_tokens")
        )
        thought = _count(_dict(self._counts.get("output_tokens_details")).get("thinking_tokens"))
        self.usage = Usage(plain + read + written, out, read, written, thought)

    def response(self) -> LLMResponse:
        blocks = []
        for at, block in self._blocks.items():
            grown = {name: "".join(pieces) for name, pieces in self._pieces[at].items() if pieces}
            arguments = grown.pop("partial_json", "")
            for name, text in grown.items():
                begun = block.get(name)
                block[name] = (begun if isinstance(begun, str) else "") + text
            if block.get("type") == "tool_use":
                given = block.get("input")
                self._add_call(block.get("id"), block.get("name"), arguments or (given if isinstance(given, dict) else None))
                block["input"] = _parsed_arguments(arguments)[0] or {} if arguments else _dict(given)
            blank = block.get("type") == "text" and not str(block.get("text") or "").strip()  # refused when it comes back
            if block.get("type") in ("text", "tool_use", "thinking", "redacted_thinking") and not blank:
                blocks.append(block)
        if any("thinking" in block["type"] for block in blocks):
            self._carry = {"blocks": blocks}
        return super().response()


#: What tool ids and tool names must not hold.
_NOT_PLAIN = r"[^a-zA-Z0-9_-]"


def _anthropic_body(call: _Call, streaming: bool, names: Mapping[str, str]) -> dict[str, Any]:
    system, turns = _conversation(call, "Anthropic")
    kind, schema = _format(call)
    if kind == "json_object":
        system = f"{system}\n\nAnswer with one JSON object and nothing else.".strip()
    body: dict[str, Any] = {"model": call.model, "max_tokens": call.limit() or _ANTHROPIC_MAX_TOKENS}
    if system:
        body["system"] = system
    body["messages"] = [{"role": turn.role, "content": _anthropic_content(turn, names)} for turn in turns]
    body |= call.renamed({"temperature": "temperature", "top_p": "top_p"})
    if isinstance(body.get("temperature"), (int, float)):
        body["temperature"] = min(body["temperature"], 1)
    if stops := [stop for stop in _stops(call) if stop.strip()]:
        body["stop_sequences"] = stops
    if "user" in call.options:
        body["metadata"] = {"user_id": call.options["user"]}
    body |= _anthropic_tools(call, turns, names)
    output: dict[str, Any] = {"format": {"type": kind, "schema": schema.get("schema", {})}} if kind == "json_schema" else {}
    effort = call.options.get("reasoning_effort")
    if effort == "none":
        body["thinking"] = {"type": "disabled"}
    elif effort is not None:
        output["effort"] = "low" if effort == "minimal" else effort
    if output:
        body["output_config"] = output
    if streaming:
        body["stream"] = True
    return call.finished(body)


def _anthropic_content(turn: _Turn, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """The blocks of one turn: an assistant's own as they were, results before anything else the user says."""
    if turn.carry.get("blocks"):
        return list(turn.carry["blocks"])
    blocks: list[dict[str, Any]] = [
        {"type": "tool_result", "tool_use_id": _safe(call_id, _NOT_PLAIN, 64),
         "content": _anthropic_blocks(parts) or "(empty)",
         **({"is_error": True} if parts == [("text", "", _NO_RESULT)] else {})}
        for call_id, _, parts in turn.results
    ]  # fmt: skip
    blocks += _anthropic_blocks(turn.parts)
    blocks += [
        {"type": "tool_use", "id": _safe(call_id, _NOT_PLAIN, 64), "name": names[name], "input": arguments}
        for call_id, name, arguments in turn.calls
    ]
    return blocks or [{"type": "text", "text": _GO_ON if turn.role == "user" else "(empty)"}]


def _anthropic_blocks(parts: Iterable[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Without blank texts, which are refused."""
    return [_anthropic_block(part) for part in parts if part[0] != "text" or part[2].strip()]


def _anthropic_block(part: tuple[str, str, str]) -> dict[str, Any]:
    kind, media, data = part
    if kind == "text":
        return {"type": "text", "text": data}
    source = {"type": "url", "url": data} if kind == "url" else {"type": "base64", "media_type": media, "data": data}
    return {"type": "document" if media == "application/pdf" else "image", "source": source}


def _anthropic_tools(call: _Call, turns: list[_Turn], names: Mapping[str, str]) -> dict[str, Any]:
    """tools and tool_choice. A history with tool calls needs its tools declared, even if none is to be called."""
    anything = {"type": "object", "properties": {}}
    tools: list[dict[str, Any]] = []
    for function in _functions(call.tools, "Anthropic"):
        tool = {"name": names[function["name"]], "input_schema": function.get("parameters") or anything}
        tools.append({**tool, **{key: function[key] for key in ("description", "strict") if function.get(key) is not None}})
    kind, name = _choice(call)
    if not tools:
        used = {names[name]: None for turn in turns for _, name, _ in turn.calls}
        tools, kind = [{"name": name, "input_schema": anything} for name in used], "none"
    if not tools:
        return {}
    choice: dict[str, Any] = {"type": {"required": "any", "named": "tool"}.get(kind, kind)}
    if kind == "named":
        choice["name"] = names.get(name or "", name)
    if call.options.get("parallel_tool_calls") is False and kind != "none":
        choice["disable_parallel_tool_use"] = True
    return {"tools": tools, **({} if choice == {"type": "auto"} else {"tool_choice": choice})}


def _names_sent(call: _Call, bad: str, most: int) -> dict[str, str]:
    """Every tool name of a call -> the name that the vendor accepts for it."""
    names = [function["name"] for function in _functions(call.tools, "this provider")]
    names += [item["function"]["name"] for message in call.messages for item in message.get("tool_calls") or ()]
    return {name: _safe(name, bad, most) for name in names}


class AnthropicProvider(_HTTPProvider):
    """Anthropic's Messages API: ``https://api.anthropic.com/v1``, ANTHROPIC_API_KEY, ANTHROPIC_BASE_URL.

    Settings as for OpenAIProvider, without ``api``; a base URL is given as to Anthropic's client, with or without its ``/v1``,
    such as ``https://api.deepseek.com/anthropic``. The version header is 2023-06-01, which still knows temperature; pass
    ``headers={"anthropic-version": …}`` for another. ``max_tokens`` is 8192 where a call names none, since one is required.
    Thinking blocks go back to the same provider and model in ``response.message``, and to nobody else.
    """

    _vendor = "anthropic"
    _default_url = "https://api.anthropic.com"
    _api_path = "/v1"
    _cut_paths = ("/messages",)
    _ping_path = "/models?limit=1"
    _key_variables = ("ANTHROPIC_API_KEY",)
    _url_variable = "ANTHROPIC_BASE_URL"

    def _full_url(self, url: str) -> str:
        """Anthropic's own client adds /v1 to any path, and so do the addresses that its compatible servers publish."""
        full = super()._full_url(url)
        return full if full.endswith("/v1") else full + "/v1"

    def _auth_headers(self) -> dict[str, str]:
        key = {"x-api-key": self._key} if self._key else {}
        return {"anthropic-version": "2023-06-01", **key}

    def _prepare(self, call: _Call, streaming: bool) -> tuple[str, dict[str, Any], _Decoder]:
        names = _names_sent(call, _NOT_PLAIN, 128)
        back = {theirs: ours for ours, theirs in names.items()}
        return "/messages", _anthropic_body(call, streaming, names), _AnthropicDecoder(call, back)


# ==== Gemini generateContent ==========================================================================================
# https://ai.google.dev/api/generate-content

#: What Google's documentation says to send in place of the signature of a call that another model has made.
_FOREIGN_SIGNATURE = "skip_thought_signature_validator"


class _GeminiDecoder(_Decoder):
    _finishes: ClassVar[dict[str, str]] = {
        "MAX_TOKENS": "length", "CONTINUATION": "length",
        **dict.fromkeys(("SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY",
                         "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "MODEL_ARMOR", "ESCALATION",
                         "PUP_LIMITED_DISABLED"), "content_filter"),
    }  # fmt: skip
    #: The model's own failures: whatever text came with them is no answer.
    _failures: ClassVar[tuple[str, ...]] = (
        "MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "MALFORMED_RESPONSE", "TOO_MANY_TOOL_CALLS", "OTHER", "NO_IMAGE",
        "IMAGE_OTHER", "MISSING_THOUGHT_SIGNATURE",
    )  # fmt: skip

    def __init__(self, call: _Call, names: Mapping[str, str]) -> None:
        super().__init__(call, names)
        self._kept: list[dict[str, Any]] = []

    def _take(self, body: dict[str, Any], whole: bool) -> str:
        if isinstance(body.get("modelVersion"), str):
            self._model = body["modelVersion"]
        if self.request_id is None and isinstance(body.get("responseId"), str):
            self.request_id = body["responseId"]
        if body.get("usageMetadata") is not None:
            self.usage = _gemini_usage(_dict(body["usageMetadata"]))
        if _dict(body.get("promptFeedback")).get("blockReason"):
            self._finished("SAFETY")
        candidates = body.get("candidates")
        if not candidates:
            return ""
        candidate = _object(_items(candidates, "candidates")[0], "a candidate")
        parts = _dict(candidate.get("content")).get("parts") or []
        text = "".join([self._take_part(_object(part, "a part")) for part in _items(parts, "parts")])
        reason = candidate.get("finishReason")
        if reason in self._failures:
            raise InvalidResponse("the model's own answer failed", code=reason.lower())
        if reason is not None and reason != "FINISH_REASON_UNSPECIFIED":
            self._finished(reason)
        return text

    def _take_part(self, part: dict[str, Any]) -> str:
        text, called = part.get("text"), part.get("functionCall")
        self.alive = self.alive or "thoughtSignature" in part
        if part.get("thought"):
            self._add_reasoning(text)
            return ""
        if called is not None or text or "thoughtSignature" in part:
            self._kept.append(part)
        if called is not None:
            called = _object(called, "a function call")
            self._add_call(called.get("id"), called.get("name"), called.get("args"))
        return self._add_text(text) if isinstance(text, str) and text else ""

    def response(self) -> LLMResponse:
        if any("thoughtSignature" in part for part in self._kept):
            self._carry = {"parts": self._kept}
        return super().response()


def _gemini_usage(usage: dict[str, Any]) -> Usage:
    names = ("prompt", "toolUsePrompt", "candidates", "thoughts", "cachedContent")
    prompt, used, written, thought, cached = (_count(usage.get(f"{name}TokenCount")) for name in names)
    return Usage(prompt + used, written + thought, cached, 0, thought)


def _gemini_body(call: _Call, names: Mapping[str, str]) -> dict[str, Any]:
    system, turns = _conversation(call, "Gemini")
    body: dict[str, Any] = {"contents": []}
    if system:
        body["systemInstruction"] = {"parts": [{"text": system}]}
    ids: list[str | None] = []
    for turn in turns:
        parts = _gemini_parts(turn, names, ids)
        body["contents"].append({"role": "user" if turn.role == "user" else "model", "parts": parts})
        ids = [_dict(part.get("functionCall")).get("id") for part in parts if "functionCall" in part]
    if call.tools:
        declared = [_gemini_function(function, names) for function in _functions(call.tools, "Gemini")]
        body["tools"] = [{"functionDeclarations": declared}]
        kind, name = _choice(call)
        if "tool_choice" in call.options:
            mode: dict[str, Any] = {"mode": {"required": "ANY", "named": "ANY"}.get(kind, kind.upper())}
            if kind == "named":
                mode["allowedFunctionNames"] = [names.get(name or "", name)]
            body["toolConfig"] = {"functionCallingConfig": mode}
    if config := _gemini_config(call):
        body["generationConfig"] = config
    return call.finished(body)


#: Keys of a schema that leave an object as empty as it is without them.
_NO_ARGUMENTS = ("type", "title", "description", "required", "$schema", "$id", "$defs", "definitions")


def _gemini_function(function: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A declaration; a schema that allows no arguments is left out, as Gemini refuses it."""
    declared = {"name": names[function["name"]]}
    if function.get("description"):
        declared["description"] = function["description"]
    if any(value for key, value in _dict(function.get("parameters")).items() if key not in _NO_ARGUMENTS):
        declared["parametersJsonSchema"] = function["parameters"]
    return declared


def _gemini_config(call: _Call) -> dict[str, Any]:
    config = call.renamed({
        "temperature": "temperature", "top_p": "topP", "seed": "seed", "presence_penalty": "presencePenalty",
        "frequency_penalty": "frequencyPenalty",
    })  # fmt: skip
    if call.limit() is not None:
        config["maxOutputTokens"] = call.limit()
    if stops := _stops(call):
        config["stopSequences"] = stops
    kind, schema = _format(call)
    if kind != "text":
        config["responseMimeType"] = "application/json"
    if kind == "json_schema":
        config["responseJsonSchema"] = schema.get("schema", {})
    if effort := call.options.get("reasoning_effort"):
        level = {"none": "LOW", "max": "XHIGH"}.get(effort, str(effort).upper())
        config["thinkingConfig"] = {"thinkingLevel": level, "includeThoughts": True}
    return config


def _gemini_parts(turn: _Turn, names: Mapping[str, str], ids: list[str | None]) -> list[dict[str, Any]]:
    """The parts of one turn. ``ids``: those that the model itself gave to the calls that this turn answers."""
    if turn.carry.get("parts"):
        return list(turn.carry["parts"])
    parts: list[dict[str, Any]] = []
    for at, (_, name, content) in enumerate(turn.results):
        given = {"id": ids[at]} if at < len(ids) and ids[at] else {}
        text = "\n".join(data for kind, _, data in content if kind == "text")
        parsed = _parsed_arguments(text)[0] if text.strip() else None
        key = "error" if text == _NO_RESULT else "output"
        parts.append({"functionResponse": {**given, "name": names[name], "response": parsed or {key: text}}})
    images = [part for _, _, content in turn.results for part in content if part[0] != "text"]
    for kind, media, data in (*images, *turn.parts):
        if kind == "url":
            raise UnsupportedRequest("Gemini fetches no image by its URL: send it as a data URL")
        parts.append({"text": data} if kind == "text" else {"inlineData": {"mimeType": media, "data": data}})
    for at, (_, name, arguments) in enumerate(turn.calls):
        signed = {"thoughtSignature": _FOREIGN_SIGNATURE} if at == 0 else {}
        parts.append({"functionCall": {"name": names[name], "args": arguments}, **signed})
    return parts


class GeminiProvider(_HTTPProvider):
    """Google's Gemini API: ``https://generativelanguage.googleapis.com/v1beta``, GOOGLE_API_KEY, else GEMINI_API_KEY.

    Settings as for OpenAIProvider, without ``api``. A model may be given with or without ``models/``. Images must be data
    URLs. Thought signatures go back to the same provider and model in ``response.message``, and to nobody else.
    """

    _vendor = "gemini"
    _default_url = "https://generativelanguage.googleapis.com"
    _api_path = "/v1beta"
    _ping_path = "/models?pageSize=1"
    _key_variables = ("GOOGLE_API_KEY", "GEMINI_API_KEY")

    def _auth_headers(self) -> dict[str, str]:
        return {"x-goog-api-key": self._key} if self._key else {}

    def _prepare(self, call: _Call, streaming: bool) -> tuple[str, dict[str, Any], _Decoder]:
        names = _names_sent(call, r"^[^a-zA-Z_]|[^a-zA-Z0-9_.:-]", 64)
        back = {theirs: ours for ours, theirs in names.items()}
        method = "streamGenerateContent?alt=sse" if streaming else "generateContent"
        path = f"/models/{str(call.model).removeprefix('models/')}:{method}"
        return path, _gemini_body(call, names), _GeminiDecoder(call, back)


# ==== Ollama ==========================================================================================================
# https://github.com/ollama/ollama/blob/main/docs/api.md


class _OllamaDecoder(_Decoder):
    _finishes: ClassVar[dict[str, str]] = {"length": "length"}

    def _take(self, body: dict[str, Any], whole: bool) -> str:
        if isinstance(body.get("model"), str):
            self._model = body["model"]
        message = _object(body.get("message", {}), "message")
        self._add_reasoning(message.get("thinking"))
        for call in _items(message.get("tool_calls") or [], "tool_calls"):
            function = _object(_object(call, "a tool call").get("function"), "a tool call's function")
            self._add_call(call.get("id"), function.get("name"), function.get("arguments"))
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise InvalidResponse("content is no text")
        if body.get("done"):
            self.usage = Usage(_count(body.get("prompt_eval_count")), _count(body.get("eval_count")))
            reason = body.get("done_reason", "stop")
            if not reason:
                raise InvalidResponse("truncated: the server gave up")
            self._finished(reason)
            self.ended = True
        elif whole:
            raise InvalidResponse("truncated: not done")
        return self._add_text(content) if content else ""


def _ollama_message(message: Message, names: dict[str, str]) -> dict[str, Any]:
    """One message: text and images apart, arguments as objects, results with the name of their tool."""
    role = message["role"]
    parts = _parts(message.get("content"), "Ollama")
    sent: dict[str, Any] = {"role": "system" if role == "developer" else role}
    sent["content"] = "\n".join(data for kind, _, data in parts if kind == "text")
    if any(kind == "url" or (kind == "data" and not media.startswith("image/")) for kind, media, _ in parts):
        raise UnsupportedRequest("Ollama takes images only, and as data URLs")
    if images := [data for kind, _, data in parts if kind == "data"]:
        sent["images"] = images
    if role == "tool":
        sent |= {"tool_name": names[message["tool_call_id"]], "tool_call_id": message["tool_call_id"]}
    if calls := message.get("tool_calls"):
        names.update({item["id"]: item["function"]["name"] for item in calls})
        sent["tool_calls"] = [{"id": item["id"], "function": {
            "name": item["function"]["name"], "arguments": _argument_object(item["function"].get("arguments")),
        }} for item in calls]  # fmt: skip
    return sent


def _ollama_body(call: _Call, streaming: bool) -> dict[str, Any]:
    choice, _ = _choice(call)
    if call.tools and choice in ("required", "named"):
        raise UnsupportedRequest(f"Ollama cannot force a tool call (tool_choice={choice!r})")
    names: dict[str, str] = {}
    body: dict[str, Any] = {
        "model": call.model,
        "messages": [_ollama_message(message, names) for message in call.messages],
        "stream": streaming,
        "truncate": False,  # by default it drops what does not fit, without a word
        "shift": False,
    }
    if call.tools and choice != "none":
        body["tools"] = [{"type": "function", "function": function} for function in _functions(call.tools, "Ollama")]
    options = call.renamed({
        "temperature": "temperature", "top_p": "top_p", "seed": "seed", "presence_penalty": "presence_penalty",
        "frequency_penalty": "frequency_penalty",
    })  # fmt: skip
    if call.limit() is not None:
        options["num_predict"] = call.limit()
    if stops := _stops(call):
        options["stop"] = stops
    if options:
        body["options"] = options
    kind, schema = _format(call)
    if kind != "text":
        body["format"] = "json" if kind == "json_object" else schema.get("schema", {})
    if effort := call.options.get("reasoning_effort"):
        body["think"] = {"none": False, "minimal": "low", "xhigh": "max"}.get(effort, effort)
    return call.finished(body)


class OllamaProvider(_HTTPProvider):
    """Ollama's own API: ``http://localhost:11434``, or OLLAMA_HOST in any form that Ollama itself accepts.

    Settings as for OpenAIProvider, without ``api``. The first token may take 60 seconds, since the model may have to be
    loaded first. A prompt that does not fit is an error instead of losing its beginning; ``extra_body={"options":
    {"num_ctx": …}}`` makes room. It cannot force a tool call (UnsupportedRequest), and images must be data URLs.
    """

    _vendor = "ollama"
    _default_url = "http://localhost:11434"
    _api_path = ""
    _cut_paths = ("/api/chat", "/api")
    _ping_path = "/api/tags"
    _key_variables = ("OLLAMA_API_KEY",)
    _url_variable = "OLLAMA_HOST"
    _first_token_timeout = _LOCAL_FIRST_TOKEN_TIMEOUT

    def _full_url(self, url: str) -> str:
        return super()._full_url(_ollama_host(url) if isinstance(url, str) else url)

    def _prepare(self, call: _Call, streaming: bool) -> tuple[str, dict[str, Any], _Decoder]:
        return "/api/chat", _ollama_body(call, streaming), _OllamaDecoder(call)


def _ollama_host(text: str) -> str:
    """OLLAMA_HOST as a URL: no scheme means http and port 11434, and an address to listen on means this machine."""
    scheme, mark, rest = text.strip().strip("\"'").rpartition("://")
    host, slash, path = rest.partition("/")
    found = _pattern(r"(\[.*\]|[^:]*):?(\d*)").fullmatch(host)
    name, port = found.groups() if found else (f"[{host}]", "")  # an IPv6 address without its brackets
    name = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(name, name)
    if not mark and not port:
        port = "11434"
    return f"{scheme or 'http'}://{name}{port and ':' + port}{slash}{path}"


# ==== scripted provider ===============================================================================================


class ScriptedProvider(LLMProvider):
    """A provider without a network, to test your own failover with.

    Each call takes the next item of ``script``: a str (the answer), an LLMResponse, a list of deltas (in which an exception
    breaks the stream at that point), an exception class or instance (raised), or a callable that is given the call's
    arguments and returns any of these. Past the end: ConfigError, or from the start again with ``repeat=True``.
    ``.calls``: what it was given, a list of dicts with messages, tools, model, kwargs. Thread-safe.
    """

    def __init__(self, script: Iterable[Any], repeat: bool = False) -> None:
        if isinstance(script, (str, bytes)) or not isinstance(script, Iterable):
            raise ConfigError(f"script is a {type(script).__name__}: give a list of answers, such as ['hello']")
        self._script = list(script)
        self._repeat = repeat
        self._turns = itertools.count()  # its next() is atomic
        self.calls: list[dict[str, Any]] = []

    def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> LLMResponse:
        """The next item of the script as a whole answer."""
        return _drained(self.stream(messages, tools, model, **kwargs))

    def stream(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> Generator[str, None, LLMResponse]:
        """The next item of the script as deltas."""
        item = self._next(messages, tools, model, kwargs)
        if callable(item) and not isinstance(item, type):
            item = item(messages, tools=tools, model=model, **kwargs)
        if isinstance(item, LLMResponse):
            if item.content:
                yield item.content
            return item
        text = ""
        for delta in [item] if not isinstance(item, (list, tuple)) else item:
            if isinstance(delta, BaseException) or (isinstance(delta, type) and issubclass(delta, BaseException)):
                raise delta
            if not isinstance(delta, str):
                raise ConfigError(f"script holds a {type(delta).__name__}: give str, LLMResponse, exceptions or callables")
            text += delta
            yield delta
        return LLMResponse(content=text, model=model or "")

    def _next(self, messages: Any, tools: Any, model: Any, kwargs: dict[str, Any]) -> Any:
        self.calls.append({"messages": messages, "tools": tools, "model": model, "kwargs": kwargs})
        at = next(self._turns)
        if self._repeat and self._script:
            at %= len(self._script)
        if at >= len(self._script):
            raise ConfigError(f"ScriptedProvider's script of {len(self._script)} items is over: add more, or repeat=True")
        return self._script[at]


# ==== tiers and chain =================================================================================================

_ROLE_ORDER = ("primary", "secondary", "emergency")
_Plan = Sequence[tuple["ProviderTier", "str | None"]]  #: who is asked, in which order, with which model


class TierHealth(NamedTuple):
    """What a chain knows of one tier, in this process. Plain data.

    ``calls`` and ``failures`` count requests. ``last_error``: of the last failed request or ping, None if there was none or a
    ping has succeeded since. ``last_latency``: seconds of the last request, None before the first.
    """

    name: str
    role: str
    models: tuple[str, ...]
    breaker: BreakerSnapshot
    calls: int
    failures: int
    last_error: str | None
    last_latency: float | None


class ProviderTier:
    """One provider in its place in a chain.

    ``models``: ids, the first being the default, or a dict alias -> id; empty: any name is passed on as it is. ``role``:
    primary, secondary or emergency (asked when all else failed, even when its breaker is open). ``breaker``: None lets the
    chain make one. ``timeout``: seconds for one request, None inherits the call's. ``retries``: how often the same tier is
    asked again after a ServerError; 0 never. ``max_concurrency``: requests under way at once in this process, None means no
    limit. ``prices``: ``{model or alias: (prompt, completion[, cached[, cache_write]])}`` in USD per million tokens, or one
    tuple for all models; None: unknown. ``supports_tools``, ``supports_images``: False skips the tier for such requests.
    ``params``: options under each call's own; a None in the call removes one. Raises ConfigError. Thread-safe.
    """

    def __init__(
        self,
        name: str,
        provider: LLMProvider,
        models: Sequence[str] | Mapping[str, str] = (),
        *,
        role: str = "primary",
        breaker: CircuitBreaker | None = None,
        timeout: float | None = None,
        retries: int = 1,
        max_concurrency: int | None = None,
        prices: Any = None,
        supports_tools: bool = True,
        supports_images: bool = True,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"name={name!r}: give the tier a name")
        where = f"tier {name!r}"
        if role not in _ROLE_ORDER:
            raise ConfigError(f"{where}: role={role!r}: give one of {', '.join(_ROLE_ORDER)}.{_near(role, _ROLE_ORDER)}")
        if breaker is not None and not isinstance(breaker, CircuitBreaker):
            raise ConfigError(f"{where}: breaker is a {type(breaker).__name__}: give a CircuitBreaker or None")
        _check_provider(provider, where)
        self.name = name
        self.provider = provider
        self.models = _checked_models(models, where)
        self.role = role
        self.breaker: CircuitBreaker = breaker  # type: ignore[assignment]  # the chain makes one for None
        self.timeout: float | None = None if timeout is None else _number(timeout, f"{where}: timeout")
        self.retries: int = _number(retries, f"{where}: retries", whole=True)
        self.max_concurrency = max_concurrency
        if max_concurrency is not None:
            _number(max_concurrency, f"{where}: max_concurrency", least=1, whole=True)
        self.prices: Any = _checked_prices(prices, where)
        if isinstance(self.prices, dict):
            ids = {self.models[name]: price for name, price in self.prices.items() if name in self.models}
            self.prices = {**ids, **self.prices}  # a price under the id itself comes first
        self.supports_tools = supports_tools
        self.supports_images = supports_images
        if params is not None and not isinstance(params, Mapping):
            raise ConfigError(f"{where}: params is a {type(params).__name__}: give a dict, such as {{'temperature': 0}}")
        self.params = dict(params or {})
        for own in ("messages", "tools", "model", "timeout"):
            if own in self.params:
                raise ConfigError(f"{where}: params[{own!r}]: the chain gives it itself; a tier has models= and timeout=")
        self._ids = tuple(self.models.values())
        self._speaks_http = isinstance(provider, _HTTPProvider)
        self._passes_carry = isinstance(provider, (_HTTPProvider, FailoverChain))  # they know what to leave out
        self._open: Callable[..., Generator[str, None, LLMResponse]] = (
            getattr(provider, "stream", None) or functools.partial(LLMProvider.stream, provider)
        )
        self._calls = self._failures = 0  # these four are guarded by _lock
        self._last_error: str | None = None
        self._last_latency: float | None = None
        self._passed_over: tuple[BreakerRecord, str | None, Attempt, _Failure] | None = None  #: the last refusal's entries
        self._renew_after_fork()
        _never_inherited.add(self)

    def _renew_after_fork(self) -> None:
        self._lock = threading.Lock()
        self._slots: Any = None
        if self.max_concurrency is not None:
            import queue

            self._slots = queue.SimpleQueue()  # unlike a semaphore it may be put to by a finalizer, at any moment
            for _ in range(self.max_concurrency):
                self._slots.put(None)

    def _id_of(self, model: str) -> str | None:
        """The id to send for a name, None if this tier does not list it."""
        return self.models.get(model) or (model if model in self._ids else None)

    @property
    def _default(self) -> str | None:
        return self._ids[0] if self._ids else None

    def _count(self, error: str | None, latency: float) -> None:
        with self._lock:
            self._calls += 1
            self._last_latency = latency
            if error is not None:
                self._failures += 1
                self._last_error = error

    def _price(self, models: Iterable[str | None]) -> tuple[float, ...] | None:
        if self.prices is None or isinstance(self.prices, tuple):
            return self.prices
        return next((self.prices[model] for model in models if model in self.prices), None)

    def _health(self) -> TierHealth:
        with self._lock:
            seen = (self._calls, self._failures, self._last_error, self._last_latency)
        return TierHealth(self.name, self.role, tuple(self.models), self.breaker.snapshot(), *seen)

    def __repr__(self) -> str:
        return f"<ProviderTier {self.name!r} {self.role} {self.provider!r}>"


def _check_provider(provider: Any, where: str) -> None:
    chat = getattr(provider, "chat", None)
    if isinstance(provider, type) or not callable(chat):
        shown = provider.__name__ if isinstance(provider, type) else type(provider).__name__
        raise ConfigError(f"{where}: provider is {shown}: give an object with a chat() method, such as OpenAIProvider()")
    try:
        inspect.signature(chat).bind([], tools=None, model=None, timeout=1.0)
    except TypeError as error:
        raise ConfigError(
            f"{where}: chat() of {type(provider).__name__} cannot be called ({error}): write"
            " def chat(self, messages, tools=None, model=None, **kwargs)"
        ) from None
    except ValueError:
        pass  # no signature to be had, as for some built-ins


def _checked_models(models: Any, where: str) -> dict[str, str]:
    if isinstance(models, (str, bytes)) or not isinstance(models, (Mapping, Sequence)):
        raise ConfigError(f"{where}: models={models!r}: give a list, such as models=['gpt-6-luna'], or a dict alias -> id")
    pairs = models.items() if isinstance(models, Mapping) else [(model, model) for model in models]
    for alias, model in pairs:
        if not (isinstance(alias, str) and alias and isinstance(model, str) and model):
            raise ConfigError(f"{where}: models holds {alias!r}: {model!r}: every model is a non-empty str")
    return dict(pairs)


def _checked_prices(prices: Any, where: str) -> Any:
    if prices is None:
        return None
    table = prices if isinstance(prices, Mapping) else {"": prices}
    for model, price in table.items():
        name = f"{where}: prices[{model!r}]" if table is prices else f"{where}: prices"
        if not isinstance(price, (tuple, list)) or not 2 <= len(price) <= 4:
            raise ConfigError(f"{name}={price!r}: give (prompt, completion[, cached[, cache_write]])")
        for value in price:
            _number(value, name)
    fixed = {model: tuple(price) for model, price in table.items()}
    return fixed if isinstance(prices, Mapping) else fixed[""]


def _cost(usage: Usage, price: tuple[float, ...]) -> float:
    """USD. Cached and cache-written tokens cost the prompt's price where they have none of their own."""
    prompt, completion, cached, written = (*price, *(price[0],) * (4 - len(price)))
    plain = max(0, usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens)
    total = plain * prompt + usage.cached_tokens * cached + usage.cache_write_tokens * written
    return (total + usage.completion_tokens * completion) / 1e6


def _has_images(messages: Iterable[Message]) -> bool:
    return any(
        part.get("type") in ("image_url", "image", "input_image")
        for message in messages
        if isinstance(message.get("content"), (list, tuple))
        for part in message["content"]
    )


def _instructed(messages: list[Message], instruction: str) -> list[Message]:
    """A copy whose first system message ends with the instruction; one is added where there is none."""
    for at, message in enumerate(messages):
        if message["role"] in ("system", "developer"):
            content = message["content"]
            if isinstance(content, str):
                content = f"{content}\n\n{instruction}"
            else:
                content = [*content, {"type": "text", "text": instruction}]
            return [*messages[:at], {**message, "content": content}, *messages[at + 1 :]]
    return [{"role": "system", "content": instruction}, *messages]


#: What may stand before the marker: white space, quotes, markdown, a think block, the language of a code fence.
_BEFORE_MARKER = r"(?s)(?:\s|[*_\"'`>~#\u2018-\u201f\u00ab\u00bb\u2039\u203a]|<think>.*?</think>|(?<=```)\w+(?=\s))*"


def _after_marker(text: str | None, marker: str) -> str | None:
    """What follows the marker if the text begins with it, white space and decoration left out; None if it does not."""
    if not text:
        return None
    at = _undecorated(text)
    if text[at : at + len(marker)].lower() != marker.lower():
        return None
    return text[at + len(marker) :].strip(" \t\r\n*_\"'`>~#:-\u2018\u2019\u201c\u201d")


def _undecorated(text: str) -> int:
    """Where a text begins, white space and decoration left out."""
    decoration = _pattern(_BEFORE_MARKER).match(text)
    return decoration.end() if decoration else 0


def _undecided(text: str, marker: str) -> bool:
    """Whether a text begins with the marker, or may yet turn out to when more of it has come."""
    at = _undecorated(text)
    rest = text[at:]
    begins = rest.lower().startswith(marker.lower()) or marker.lower().startswith(rest.lower())
    language = text[:at].endswith("```") and _pattern(r"\w+").fullmatch(rest) is not None
    return begins or language or "<think>".startswith(rest[:7])


class _Failure(NamedTuple):
    """Why a tier did not answer: an exception, or the record of the breaker that refused."""

    tier: ProviderTier
    error: BaseException | BreakerRecord
    sent: bool

    @property
    def exception(self) -> BaseException:
        """The exception; made only now for a refusal, since most refusals are never looked at."""
        return self.tier.breaker._refusal(self.error) if isinstance(self.error, BreakerRecord) else self.error


class _Live:
    """A stream that has begun: its first text is in hand, and the rest is its reader's."""

    tier: ProviderTier
    model: str | None
    ticket: Ticket
    start: float
    idle = 0.0  #: seconds that its reader has taken between deltas

    def __init__(self, stream: Generator[str, None, LLMResponse], held: str) -> None:
        self.stream = stream
        self.held = held
        self.close: Callable[[], Any] = getattr(stream, "close", lambda: None)  # a custom provider's may be a plain iterator


class _State:
    """What one call of a chain knows and has done; used by one thread."""

    cost: float | None = 0.0
    plain = True  #: no escalation instruction
    rung = 0  #: of the ladder: where the next escalation goes
    escalating = False
    escalation: str | None = None
    last: LLMResponse | None = None  #: the last answer that gave up or was refused
    naps = 0
    streaming = False
    images: bool | None = None
    order: _Plan
    start: float
    deadline: float
    wait: float
    observed: bool

    def __init__(self, messages: list[Message], tools: Tools, model: str | None, kwargs: dict[str, Any]) -> None:
        self.messages = messages
        self.tools = tools
        self.model = model
        self.kwargs = kwargs
        self.attempts: list[Attempt] = []
        self.errors: list[_Failure] = []

    def bare_messages(self) -> list[Message]:
        """The messages without what they keep for the provider that they came from."""
        for message in self.messages:
            if _CARRY in message:
                return [{name: item for name, item in each.items() if name != _CARRY} for each in self.messages]
        return self.messages


_INSTRUCTION = (
    "If this task is beyond your ability, or you are not confident that your answer is right, do not guess: reply with "
    "{marker} as the very first characters, followed by one short sentence that says why. A stronger model will then answer "
    "instead. Otherwise answer normally and never mention {marker}."
)


class FailoverChain(LLMProvider):
    """Asks its tiers in order until one answers, within one deadline.

    Tiers of the role primary come first, then secondary, then emergency, and within a role as listed. A failure goes on to
    the next tier, after one more try on the same tier where the error's class says so. A tier that keeps failing is skipped
    until its breaker lets a trial through. A Retry-After of at most ``max_retry_after`` seconds is waited out, once; a
    longer one parks the tier.

    Silence: a tier that has not begun to answer within its provider's ``first_token_timeout``, or goes silent for its
    ``stall_timeout``, is given up. While a later tier is ready neither takes more than half of the time left; when none is,
    when the caller named the model or set ``reasoning_effort``, and on escalation, both are five times as long.

    ``escalation_model``: a name, or names, weakest first: an answer that begins with ``escalation_marker`` is asked again
    there. ``escalation_prompt``: whether weaker models are told so; a str replaces the text. ``accept(response) -> bool``:
    your own check; a refused answer escalates, or goes to the next tier. ``timeout``: seconds for a call. ``wait``: seconds
    in all that a call may sleep until a tier is ready again (0: fail at once). ``failure_threshold``,
    ``recovery_timeout``: for the breakers made here. ``store``: where the breakers keep their state, to share it with other
    processes (SQLiteStore) or machines (RedisStore); None: in this chain alone. ``on_error={Class: "next" | "raise"}``
    overrides a class's policy. ``on_event(event)`` is told of every step; what it raises is logged. ``clock`` and ``sleep``
    drive everything but sockets.

    Thread-safe, fork-safe, and itself a provider: a chain can be a tier of another. Raises ConfigError when built wrong.
    """

    def __init__(
        self,
        tiers: Iterable[ProviderTier],
        *,
        escalation_model: str | Sequence[str] | None = None,
        escalation_marker: str = "[ESCALATE]",
        escalation_prompt: bool | str = True,
        accept: Callable[[LLMResponse], bool] | None = None,
        timeout: float = _CALL_TIMEOUT,
        wait: float = 0.0,
        max_retry_after: float = 2.0,
        failure_threshold: int = 3,
        recovery_timeout: float = 15.0,
        store: Any = None,
        on_error: Mapping[type[Exception], str] | None = None,
        on_event: Callable[[Event], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] = time.sleep,
    ) -> None:
        self.tiers = _checked_tiers(tiers)
        self.timeout: float = _number(timeout, "timeout")
        self.wait: float = _number(wait, "wait")
        self.max_retry_after: float = _number(max_retry_after, "max_retry_after")
        for where, function in (("accept", accept), ("on_event", on_event)):
            if function is not None and not callable(function):
                raise ConfigError(f"{where}={function!r}: give a function, or None")
        self._on_error = _checked_policy(on_error)
        self._on_event = on_event
        self._accept = accept
        self._clock = clock
        self._sleep = sleep
        if not isinstance(escalation_marker, str) or not escalation_marker.strip():
            raise ConfigError(f"escalation_marker={escalation_marker!r}: give a text such as '[ESCALATE]'")
        self._marker = escalation_marker.strip()
        self._core = self._marker[_undecorated(self._marker) :]  # decoration is left out on both sides
        if not self._core:
            raise ConfigError(f"escalation_marker={escalation_marker!r}: give more than decoration, such as '[ESCALATE]'")
        if not isinstance(escalation_prompt, (bool, str)):
            raise ConfigError(f"escalation_prompt={escalation_prompt!r}: give True, False, or a text of your own")
        text = _INSTRUCTION if escalation_prompt is True else escalation_prompt or ""
        if not isinstance(escalation_model, (str, Sequence, type(None))):
            raise ConfigError(f"escalation_model={escalation_model!r}: give a name, or a list of names")
        self._instruction = text.replace("{marker}", self._marker)
        names = (escalation_model,) if isinstance(escalation_model, str) else tuple(escalation_model or ())
        self._ladder: tuple[str, ...] = names
        for name in names:
            if not self._serving(name, self.tiers):
                raise ConfigError(f"escalation_model={name!r}: no tier lists it.{_near(name, self._names())}")
        for tier in self.tiers:
            if tier.breaker is None:
                tier.breaker = CircuitBreaker(failure_threshold, recovery_timeout, name=tier.name, clock=clock)
            tier.breaker.name = tier.breaker.name or tier.name
            if store is not None and tier.breaker._shared is None:
                tier.breaker._share(store)
            tier.breaker._watchers.add(self)
        self._plan: _Plan = [(tier, tier._default) for tier in self.tiers]
        self._picky = not all(tier.supports_tools and tier.supports_images for tier in self.tiers)

    # -- public

    def chat(
        self,
        messages: Messages,
        tools: Tools = None,
        model: str | None = None,
        *,
        system: str | None = None,
        timeout: float | None = None,
        wait: float | None = None,
        tiers: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> LLMResponse:
        """One answer, from the first tier that gives one.

        ``messages``: OpenAI form, or a str for one user message; ``tools``: OpenAI form; neither is modified. ``model``:
        tiers that list it are asked first; None asks each for its default. ``system``: a system message put in front.
        ``timeout``: seconds for everything, None: the chain's (plus ``wait``). ``wait``: seconds in all that it may sleep
        for a tier, None: the chain's, 0: fail at once. ``tiers``: names; no other tier is asked, nothing leaves them. Other
        keyword arguments are options for the providers; None leaves one out.

        Raises AllProvidersFailed, DeadlineExceeded, EscalationFailed; the error itself where one class of it holds for all
        tiers or says "raise" (ContentFiltered); UnknownModel, ConfigError, BadRequest and TypeError for wrong arguments.
        """
        state = self._begin(messages, tools, model, system, timeout, wait, tiers, kwargs)
        del messages, tools, system, kwargs  # or a traceback with locals would show them
        response = self._answer(state)
        assert isinstance(response, LLMResponse)  # live streams are for stream()
        return response

    def stream(
        self,
        messages: Messages,
        tools: Tools = None,
        model: str | None = None,
        *,
        system: str | None = None,
        timeout: float | None = None,
        wait: float | None = None,
        tiers: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> ChatStream:
        """The answer as deltas of text; arguments as for ``chat()``. Returns with the first delta, or the end, in hand.

        Until then it raises what ``chat()`` raises, and fails over like it. After that a break, a stall or the deadline (the
        caller's own time included) raises StreamInterrupted with ``.partial``. With ``accept`` the whole answer has to be
        seen first: it comes as one delta.
        """
        state = self._begin(messages, tools, model, system, timeout, wait, tiers, kwargs)
        del messages, tools, system, kwargs
        state.streaming = self._accept is None
        found = self._answer(state)
        return ChatStream(_whole(found) if isinstance(found, LLMResponse) else self._deltas(state, found))

    def health(self) -> list[TierHealth]:
        """What is known of each tier, as plain data; asks nobody."""
        for tier in self.tiers:
            tier.breaker._look()
        return [tier._health() for tier in self.tiers]

    def check(self, timeout: float = 5.0) -> list[TierHealth]:
        """Ping every tier, at most ``timeout`` seconds each, and return the health.

        A failed ping counts as a failure and stands in ``last_error`` (a 404 only the latter: some servers list no models); a
        good one makes an open breaker's trial due and clears ``last_error``. It closes nothing: a provider may list its models
        and answer nothing.
        """
        _number(timeout, "timeout")
        for tier in self.tiers:
            error: Exception | None = None
            try:
                ping = getattr(tier.provider, "ping", None)
                if ping is not None:
                    ping(timeout)
            except Exception as failure:
                if _is_task_limit(failure):
                    raise
                error = failure
            if getattr(error, "status", None) != 404:  # no list of models is no trouble with its answers
                tier.breaker._observe(error)
            with tier._lock:
                tier._last_error = None if error is None else _error_text(error)
        return self.health()

    def ping(self, timeout: float = 5.0) -> None:
        """Returns if any tier's ping does, raises the last one's error. ``timeout``: seconds for all of them together."""
        until = time.monotonic() + _number(timeout, "timeout")
        errors: list[Exception] = []
        for tier in self.tiers:
            try:
                getattr(tier.provider, "ping", lambda _: None)(max(0.0, until - time.monotonic()))
                return
            except Exception as error:
                if _is_task_limit(error):
                    raise
                errors.append(error)
        raise errors[-1]

    def reset(self) -> None:
        """Close all breakers and forget what they counted, for tests and operators."""
        for tier in self.tiers:
            tier.breaker.reset()

    def close(self) -> None:
        """Free idle connections; the chain stays usable."""
        for tier in self.tiers:
            close = getattr(tier.provider, "close", None)
            if close is not None:
                close()

    def __enter__(self) -> FailoverChain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<FailoverChain {' -> '.join(tier.name for tier in self.tiers)}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a FailoverChain cannot be copied or pickled; build it where it is used")

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | os.PathLike[str]) -> FailoverChain:
        """A chain from a mapping, or from a TOML file (on Python 3.10 with PyPI's tomli).

        ``[chain]``, ``[[tier]]`` with ``[tier.provider]`` (``type`` and its arguments) and ``[tier.breaker]``, and ``[store]``
        (``type``: memory, sqlite or redis) take the arguments of their classes under the same names. ``api_key_env``,
        ``url_env`` and ``headers_env`` name environment variables; a file must not hold a key itself. A mapping may, and may
        hold objects where a file has tables. Raises ConfigError that says where, what and what to do.
        """
        return _chain_from_config(cls, config)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **settings: Any) -> FailoverChain:
        """A chain of what the environment names (None: ``os.environ``); nothing is probed. Other arguments are the chain's.

        A tier for each of LM Studio (LMSTUDIO_BASE_URL), Ollama (OLLAMA_HOST), Gemini (GOOGLE_API_KEY or GEMINI_API_KEY),
        OpenAI (OPENAI_API_KEY or OPENAI_BASE_URL) and Anthropic (ANTHROPIC_API_KEY or ANTHROPIC_BASE_URL), in this order, with
        the model in LMSTUDIO_MODEL, OLLAMA_MODEL and so on; without one a call has to name it. The log says at INFO what was
        found and what was not. Raises ConfigError if nothing was.
        """
        return cls(_tiers_from_env(os.environ if environ is None else environ), **settings)

    # -- before the first tier

    def _begin(
        self, messages: Any, tools: Tools, model: str | None, system: str | None, timeout: float | None,
        wait: float | None, names: Sequence[str] | None, kwargs: dict[str, Any],
    ) -> _State:  # fmt: skip
        state = _State(_checked_messages(messages, system), tools or None, model, kwargs)
        state.wait = self.wait if wait is None else _number(wait, "wait")
        limit = self.timeout + state.wait if timeout is None else _number(timeout, "timeout")
        state.order = self._plan if model is None and names is None else self._order(model, names)
        if self._ladder and self._instruction:
            state.plain = not self._rungs_left(state, 0)
        state.observed = self._on_event is not None or _log.isEnabledFor(logging.DEBUG)
        state.start = self._clock()
        state.deadline = state.start + limit
        return state

    def _order(self, model: str | None, names: Sequence[str] | None) -> _Plan:
        """Who is asked, in which order, with which model."""
        tiers: Sequence[ProviderTier] = self.tiers
        if names is not None:
            tiers = self._restricted(names)
        if model is None:
            return [(tier, tier._default) for tier in tiers]
        if not isinstance(model, str) or not model:
            raise ConfigError(f"model={model!r}: give a name, or None for each tier's default")
        if not self._serving(model, tiers):
            raise UnknownModel(f"no tier serves the model {model!r}.{_near(model, self._names())}")
        ids = [(tier, tier._id_of(model)) for tier in tiers]
        first = [(tier, known) for tier, known in ids if known and tier.role != "emergency"]
        rest = [
            (tier, known or (tier._default if tier.models else model))
            for tier, known in ids
            if not known or tier.role == "emergency"
        ]
        return [*first, *rest]

    def _restricted(self, names: Sequence[str]) -> list[ProviderTier]:
        if isinstance(names, str) or not names:
            raise ConfigError(f"tiers={names!r}: give a list of names, such as tiers=[{self.tiers[0].name!r}]")
        known = [tier.name for tier in self.tiers]
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"tiers={list(names)!r}: no tier is called {name!r}.{_near(name, known)} Known: {', '.join(known)}"
                )
        return [tier for tier in self.tiers if tier.name in names]

    @staticmethod
    def _serving(model: str, tiers: Iterable[ProviderTier]) -> _Plan:
        """The tiers that list a model, else those that take any."""
        listed = [(tier, tier._id_of(model)) for tier in tiers if tier._id_of(model)]
        return listed or [(tier, model) for tier in tiers if not tier.models]

    def _names(self) -> list[str]:
        return [name for tier in self.tiers for name in (*tier.models, *tier._ids)]

    def _rungs_left(self, state: _State, rung: int) -> bool:
        tiers = [tier for tier, _ in state.order]
        return any(self._serving(name, tiers) for name in self._ladder[rung:])

    # -- the loop

    def _answer(self, state: _State) -> LLMResponse | _Live:
        """What the loop finds, or its error with the record of the call."""
        try:
            found = self._run(state)
        except RouterError as error:
            error.attempts = tuple(state.attempts)
            if isinstance(error, (ProviderError, AllProvidersFailed)):
                self._tell_failure(state, error)
            raise _bare(error)  # noqa: B904 - it is the same error
        if isinstance(found, LLMResponse) and (state.observed or len(found.attempts) > 1):
            self._tell_answer(found)
        return found

    def _run(self, state: _State) -> LLMResponse | _Live:
        """Ask one tier after the other; start again after a pause while ``wait`` allows; go up the ladder on escalation."""
        plan, at = state.order, 0
        clock, deadline, picky = self._clock, state.deadline, self._picky
        while True:
            if at == len(plan):
                if not self._wait_for_a_tier(state, plan):
                    raise self._failure(state, plan)
                at = 0
            tier, model = plan[at]
            at += 1
            if deadline <= clock():
                raise self._out_of_time(state, plan[at - 1 :])
            if picky and (unable := self._unable(state, tier)):
                self._skip(state, tier, model, UnsupportedRequest(unable))
                continue
            ticket = tier.breaker._try_admit() if tier.role != "emergency" else tier.breaker._force_admit()
            if ticket is None:
                self._pass_over(state, tier, model)
                continue
            response = self._ask(state, tier, model, ticket, plan[at:])
            if response is None:
                continue
            if isinstance(response, _Live):
                return response
            why = self._refused(response)
            if why is None:
                return self._finished(state, tier, response)
            plan, at = self._next_after_refusal(state, tier, model, response, why, plan, at)

    def _ask(
        self, state: _State, tier: ProviderTier, model: str | None, ticket: Ticket | None, later: _Plan
    ) -> LLMResponse | _Live | None:
        """Ask one tier, again if its error says so. None if the next tier is to be asked; raises what the caller must see."""
        again, patience = tier.retries, True
        response: LLMResponse | _Live | None = None
        while True:
            if ticket is None:
                self._pass_over(state, tier, model)
                return None
            if tier._slots is not None:
                if not self._take_slot(state, tier, later, ticket):
                    self._skip(state, tier, model, CircuitOpen(f"{tier.name} is busy"))
                    return None
                if ticket._era not in (tier.breaker._record.era, _NO_ERA):  # it changed while this call waited for its place
                    ticket = tier.breaker._force_admit() if tier.role == "emergency" else tier.breaker._try_admit()
                    if ticket is None:
                        tier._slots.put(None)
                        continue
            start = self._clock()
            try:
                if start >= state.deadline:  # a slow store, a full tier or a listener took the time that was left
                    ticket.neutral()
                    self._skip(state, tier, model, CircuitOpen("no time left to ask it"))
                    return None
                response = self._request(state, tier, model, later, start)
            except BaseException as failure:
                pause = self._failed(state, tier, model, ticket, failure, start, again > 0, patience)
                limited = isinstance(failure, RateLimited)
            else:
                if isinstance(response, _Live):
                    ticket._renew_after_trial()
                    response.tier, response.model, response.ticket, response.start = tier, model, ticket, start
                    return response
                ticket.success()
                self._record(state, tier, model, None, response, self._clock() - start)
                return response
            finally:
                if tier._slots is not None and not isinstance(response, _Live):
                    tier._slots.put(None)
            if pause is None:
                if later and state.deadline > self._clock():
                    self._told(state, "failover", tier, model, {"to": later[0][0].name}, logging.INFO)
                return None
            again, patience = (again, False) if limited else (again - 1, patience)
            self._told(state, "retry", tier, model, {"pause": pause})
            self._sleep(pause)
            ticket = tier.breaker._try_admit() if tier.breaker.is_closed else None

    def _request(
        self, state: _State, tier: ProviderTier, model: str | None, later: _Plan, start: float
    ) -> LLMResponse | _Live:
        """One request to one provider, and the check that it is an answer, or the beginning of one."""
        options = {**tier.params, **state.kwargs} if tier.params else state.kwargs
        if None in options.values():
            options = {name: value for name, value in options.items() if value is not None}
        left = state.deadline - start
        timeout = left if tier.timeout is None else min(left, tier.timeout)
        if tier._speaks_http:
            options = {**options, **self._silence(state, tier, options, later, left)}
            if state.observed:
                options["on_resend"] = lambda data: self._told(state, "resend", tier, model, data)
        messages = state.messages if tier._passes_carry else state.bare_messages()
        if not state.plain and not self._is_top(model, tier) and not _wants_json(options.get("response_format")):
            messages = _instructed(messages, self._instruction)
        if state.observed:
            self._told(state, "attempt", tier, model, {"timeout": timeout})
        if state.streaming:
            opened = tier._open(messages, tools=state.tools, model=model, timeout=timeout, **options)
            response = self._first_delta(opened)
            if isinstance(response, _Live):
                return response
        else:
            response = tier.provider.chat(messages, tools=state.tools, model=model, timeout=timeout, **options)
        if not isinstance(response, LLMResponse):
            raise self._wrong_type(tier, response)
        return response if response.content and not response.content.isspace() else _checked_answer(response)

    @staticmethod
    def _wrong_type(tier: ProviderTier, response: object) -> ConfigError:
        return ConfigError(f"tier {tier.name!r}: {type(tier.provider).__name__} returned {type(response).__name__}:"
                           " return an LLMResponse, or raise a ProviderError")  # fmt: skip

    def _first_delta(self, stream: Generator[str, None, LLMResponse]) -> LLMResponse | _Live:
        """Read on while the text is blank or may still be the marker: then the whole answer, else the live stream."""
        held = ""
        try:
            while True:
                delta = next(stream)
                held += delta
                if not held or held.isspace():
                    continue
                if ">" not in delta and "<think>" in held[:16] and "</think>" not in held:
                    continue  # inside a think block that this delta does not end: it may be long
                if not self._ladder or not _undecided(held, self._core):
                    return _Live(stream, held)
        except StopIteration as end:
            response: LLMResponse = end.value
            return response
        except StreamInterrupted as error:  # of a nested chain: its reader, this chain, has shown nothing
            cause = error.__cause__ or error
            if isinstance(cause, RouterError):
                cause.attempts = error.attempts
            raise cause from None

    def _later_ready(self, state: _State, tier: ProviderTier, later: _Plan) -> bool:
        """Whether another tier that comes after this one would take the request now."""
        return any(
            (other.role == "emergency" or other.breaker._would_admit()) and self._unable(state, other) is None
            for other, _ in later
            if other is not tier
        )

    def _silence(
        self, state: _State, tier: ProviderTier, options: Mapping[str, Any],
        later: _Plan, left: float,
    ) -> dict[str, float]:  # fmt: skip
        """The limits on silence for one request (class docstring, Silence)."""
        provider: Any = tier.provider
        ready = self._later_ready(state, tier, later)
        relaxed = not ready or state.escalating or state.model is not None or "reasoning_effort" in options
        limits = {}
        for name in ("first_token_timeout", "stall_timeout"):
            limit = _number(options.get(name, getattr(provider, name)), name) * (_PATIENCE if relaxed else 1.0)
            limits[name] = min(limit, left / 2) if ready else limit
        return limits

    def _failed(
        self, state: _State, tier: ProviderTier, model: str | None, ticket: Ticket, error: BaseException, start: float,
        again: bool, patience: bool,
    ) -> float | None:  # fmt: skip
        """Settle and record a failed request. Seconds to pause before the same tier is asked again, None for the next."""
        if isinstance(error, UnknownModel) and isinstance(tier.provider, FailoverChain):
            error = ModelNotFound(str(error))  # the nested chain's view: another tier may serve it
        if _passes_through(error):
            ticket.neutral()
            raise error
        assert isinstance(error, Exception)
        pause = self._pause(state, error, ticket, self._clock(), again, patience)
        self._judge(state, tier, model, ticket, error, start, pause)
        if self._action(error) == "raise":
            raise error
        state.errors.append(_Failure(tier, _bare(error), True))
        return pause if tier.breaker.is_closed else None

    def _judge(
        self, state: _State, tier: ProviderTier, model: str | None, ticket: Ticket, error: Exception, start: float,
        pause: float | None = None,
    ) -> None:  # fmt: skip
        """Settle a failed request by the policy of its error, and record it. ``pause``: the same tier will be asked again."""
        now = self._clock()
        outcome, seconds = _verdict(error)
        cause = error
        while isinstance(cause, StreamInterrupted) and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__  # of a nested chain
        if isinstance(cause, (ProviderTimeout, DeadlineExceeded)):
            silent = isinstance(cause, ProviderTimeout) and cause.code in ("first_token_timeout", "stall_timeout")
            if now >= state.deadline - 0.005 and not silent:
                outcome = "neutral"  # it was our own time that was over
        if isinstance(error, RateLimited) and pause is not None:
            outcome = "neutral"
        elif isinstance(error, ServerError) and pause is None and (error.retry_after or 0.0) > self.max_retry_after:
            outcome, seconds = "park", min(error.retry_after or 0.0, _MAX_PARK)
        text = _error_text(error)
        if not isinstance(error, RouterError) and _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s: %s", tier.name, _place(error))
        tier.breaker._settle(ticket, outcome, seconds, text, _is_local(error))
        if isinstance(error, ProviderError):
            error.provider, error.model = tier.name, error.model or model or ""
        if isinstance(error, RouterError) and error.attempts and isinstance(tier.provider, FailoverChain):
            self._join(state, tier, error.attempts, None)
            tier._count(text, now - start)
        else:
            self._record(state, tier, model, error, None, now - start)

    def _pause(
        self, state: _State, error: Exception, ticket: Ticket, now: float, again: bool, patience: bool
    ) -> float | None:
        """Seconds to wait before asking the same tier again; None if it is not to be asked again."""
        hint = getattr(error, "retry_after", None) if isinstance(error, ProviderError) else None
        if isinstance(error, RateLimited):
            waits = error.breaker == "park" and self._overruled(error) is None
            wanted = hint is not None and patience and waits and not ticket.is_trial
            pause = hint
        else:
            wanted = again and self._action(error) == "again"
            pause = _drawn(*_RETRY_PAUSE) if hint is None else hint
        if not wanted or pause is None or pause > self.max_retry_after or now + pause >= state.deadline:
            return None
        return float(pause)

    def _overruled(self, error: Exception) -> str | None:
        """What ``on_error`` says of the nearest class that it names; None if it names none."""
        return next((self._on_error[kind] for kind in type(error).__mro__ if kind in self._on_error), None)

    def _action(self, error: Exception) -> str:
        """again, next or raise: by ``on_error``, else by the class itself."""
        return self._overruled(error) or (error.then if isinstance(error, ProviderError) else "next")

    def _unable(self, state: _State, tier: ProviderTier) -> str | None:
        if state.tools and not tier.supports_tools:
            return f"{tier.name} takes no tools"
        if not tier.supports_images:
            if state.images is None:
                state.images = _has_images(state.messages)
            if state.images:
                return f"{tier.name} takes no images"
        return None

    def _take_slot(self, state: _State, tier: ProviderTier, later: _Plan, ticket: Ticket) -> bool:
        """One of the tier's max_concurrency places; waited for only when no later tier is ready. Without one, no ticket."""
        import queue

        waits = not self._later_ready(state, tier, later)
        left = max(0.0, state.deadline - self._clock())
        try:
            tier._slots.get(waits, min(left, _LONGEST_WAIT))
        except BaseException as error:
            ticket.neutral()
            if isinstance(error, queue.Empty):
                return False
            raise
        return True

    # -- keeping the record

    def _pass_over(self, state: _State, tier: ProviderTier, model: str | None) -> None:
        """Note that a tier's breaker refused. An outage does this at every call, so it costs next to nothing."""
        record, noted = tier.breaker._record, tier._passed_over
        if noted is None or noted[0] is not record or noted[1] != model:
            why = tier.breaker._why(record)
            attempt = Attempt(tier.name, model or "", "skipped", f"CircuitOpen: {why}")
            noted = tier._passed_over = (record, model, attempt, _Failure(tier, record, False))
        state.attempts.append(noted[2])
        state.errors.append(noted[3])
        if state.observed:
            self._told(state, "skip", tier, model, {"reason": noted[2].error})

    def _skip(self, state: _State, tier: ProviderTier, model: str | None, error: RouterError) -> None:
        state.attempts.append(Attempt(tier.name, model or "", "skipped", _error_text(error)))
        state.errors.append(_Failure(tier, error, False))
        self._told(state, "skip", tier, model, {"reason": str(error)})

    def _record(
        self, state: _State, tier: ProviderTier, model: str | None, error: Exception | None, response: LLMResponse | None,
        latency: float,
    ) -> None:  # fmt: skip
        text = None if error is None else _error_text(error)
        tier._count(text, latency)
        if response is None:
            usage, answered, outcome = getattr(error, "usage", None) or _NO_USAGE, model or "", "failed"
        elif response.attempts:
            return self._join(state, tier, response.attempts, response.cost)
        else:
            usage, answered, outcome = response.usage, response.model or model or "", "ok"
        if state.cost is not None and (response is not None or usage.total_tokens):
            price = tier.prices and tier._price((answered, model))
            state.cost = state.cost + _cost(usage, price) if price else None
        status = None if error is None else getattr(error, "status", None)
        state.attempts.append(Attempt(tier.name, model or answered, outcome, text, status, latency, usage))
        return None

    @staticmethod
    def _join(state: _State, tier: ProviderTier, attempts: Iterable[Attempt], cost: float | None) -> None:
        """What a nested chain did becomes part of this call's record."""
        attempts = list(attempts)
        state.attempts += [attempt._replace(tier=f"{tier.name}/{attempt.tier}") for attempt in attempts]
        used = cost is not None or any(attempt.usage.total_tokens for attempt in attempts)
        if used and state.cost is not None:
            state.cost = None if cost is None else state.cost + cost

    def _finished(self, state: _State, tier: ProviderTier, response: LLMResponse) -> LLMResponse:
        """A copy for the caller (the provider may hand the same object to others) with what the chain knows."""
        answer: LLMResponse = object.__new__(type(response))
        answer.__dict__ = response.__dict__.copy()
        answer.provider = tier.name if not response.attempts else f"{tier.name}/{response.provider}"
        answer.attempts = tuple(state.attempts)
        answer.cost = state.cost
        answer.escalation = state.escalation if state.escalation is not None else response.escalation
        answer.latency = self._clock() - state.start
        if not answer.model:
            answer.model = state.attempts[-1].model
        return answer

    # -- streams

    def _deltas(self, state: _State, live: _Live) -> Generator[str, None, LLMResponse]:
        """The rest of a stream whose first text is in hand. However it ends, ticket, slot and connection are given back."""
        clock, deadline, stream, slots = self._clock, state.deadline, live.stream, live.tier._slots
        taken: list[str] = []
        delta, given = live.held, clock()
        try:
            yield ""  # taken by ChatStream at once: closing or losing this generator then runs what stands below
            while True:
                taken.append(delta)
                yield delta
                now = clock()
                live.idle += now - given
                try:
                    if now >= deadline:
                        raise ProviderTimeout("the deadline of the call passed", code="attempt_timeout")
                    delta = next(stream)
                except StopIteration as end:
                    response = end.value
                    break
                except BaseException as error:
                    failure = self._interrupted(state, live, error, "".join(taken))
                    raise failure from failure.__cause__
                given = clock()
        finally:
            if taken:
                live.ticket.success()  # unless it was settled otherwise
            else:
                live.ticket.neutral()
            if slots is not None:
                slots.put(None)
            live.close()  # last: a provider's own generator may raise here
        if not isinstance(response, LLMResponse):
            raise self._wrong_type(live.tier, response)
        self._record(state, live.tier, live.model, None, response, clock() - live.start)
        answer = self._finished(state, live.tier, response)
        if state.observed or len(answer.attempts) > 1:
            self._tell_answer(answer)
        return answer

    def _interrupted(self, state: _State, live: _Live, error: BaseException, partial: str) -> StreamInterrupted:
        """What the reader of a broken stream gets; its ticket takes the verdict of the cause."""
        if _passes_through(error):
            live.ticket.neutral()
            raise error
        assert isinstance(error, Exception)
        limit, used = live.tier.timeout, self._clock() - live.start - live.idle
        if limit is not None and used < limit and getattr(error, "code", None) == "attempt_timeout":
            live.ticket.neutral()  # it would have been in time, had its reader not taken so long
        self._judge(state, live.tier, live.model, live.ticket, error, live.start)
        broken = StreamInterrupted(f"{live.tier.name} broke off: {_error_text(error)}", provider=live.tier.name)
        broken.model = live.model or ""
        if isinstance(error, ProviderError):
            for name in ("model", "status", "code", "retry_after", "request_id"):
                setattr(broken, name, getattr(error, name))
        broken.partial, broken.attempts = partial, tuple(state.attempts)
        broken.__cause__ = _bare(error)
        self._tell_failure(state, broken)
        return broken

    # -- escalation

    def _is_top(self, model: str | None, tier: ProviderTier) -> bool:
        return tier._id_of(self._ladder[-1]) == model if tier.models else model == self._ladder[-1]

    def _refused(self, response: LLMResponse) -> str | None:
        """Why this answer is not for the caller, None if it is."""
        if self._ladder:
            reason = _after_marker(response.content, self._core)
            if reason is not None:
                return reason or "no reason given"
        if self._accept is not None and not self._accept(response):
            return "refused by accept"
        return None

    def _next_after_refusal(
        self, state: _State, tier: ProviderTier, model: str | None, response: LLMResponse, why: str,
        plan: _Plan, at: int,
    ) -> tuple[_Plan, int]:  # fmt: skip
        """Where to go on: the next rung of the ladder, then the tiers after the one that gave up."""
        marked = self._ladder and _after_marker(response.content, self._core) is not None
        label = "gave up" if marked else "refused by accept"
        state.attempts[-1] = state.attempts[-1]._replace(outcome="escalated", error=label)
        state.last = self._finished(state, tier, response)
        if marked:
            state.last.content = why if why != "no reason given" else None
        state.escalation = why
        if not self._ladder:
            return plan, at
        levels = [n for n, name in enumerate(self._ladder) if (tier._id_of(name) if tier.models else name) == model]
        rung = max([state.rung, *(level + 1 for level in levels)])
        tiers = [other for other, _ in state.order]
        stronger = self._serving(self._ladder[rung], tiers) if rung < len(self._ladder) else []
        if not stronger:
            raise self._failure(state, plan)
        state.rung, state.escalating = rung + 1, True
        asked = {other.name for other, _ in stronger}
        place = tiers.index(tier)
        after = [(other, name) for other, name in state.order[place + 1 :] if other.name not in asked]
        self._told(state, "escalation", tier, model, {"to": self._ladder[rung]}, logging.INFO)
        return [*stronger, *after], 0

    # -- waiting and failing

    def _ready_in(self, state: _State, plan: _Plan) -> float | None:
        """Seconds until it makes sense to ask one of these tiers again; None if it never does."""
        hints: list[float] = []
        last = {failure.tier.name: failure.error for failure in state.errors}
        for tier, _ in plan:
            error = last.get(tier.name)
            if isinstance(error, ProviderError) and error.breaker == "neutral":
                continue  # it would say the same again
            left = tier.breaker.retry_after
            if left is None and tier.breaker.is_closed:
                left = getattr(error, "retry_after", None) or _SOON
            if left is not None:
                hints.append(left)
        return min(hints, default=None)

    def _wait_for_a_tier(self, state: _State, plan: _Plan) -> bool:
        """Sleep until the first tier is worth asking again, if ``wait`` and the deadline allow it."""
        if not state.wait or (state.last is not None and not self._ladder):
            return False
        ready = self._ready_in(state, plan)
        if ready is None:
            return False
        if any(tier.breaker.is_closed for tier, _ in plan):  # it failed just now: do not hammer it
            ready *= min(2.0**state.naps, 8.0)
        ready = max(ready, 0.01)
        if ready > state.wait or self._clock() + ready >= state.deadline:
            return False
        state.naps += 1
        state.wait -= ready
        self._emit("wait", "", "", {"seconds": ready})
        _log.info("all tiers failed: waiting %.1f s", ready)
        self._sleep(ready)
        return True

    def _out_of_time(self, state: _State, unasked: _Plan) -> RouterError:
        named = {failure.tier.name for failure in state.errors}
        for tier, model in unasked:
            if tier.name not in named:
                self._skip(state, tier, model, CircuitOpen("no time left to ask it"))
        return self._failure(state, state.order, late=True)

    def _failure(
        self, state: _State, plan: _Plan, late: bool = False
    ) -> RouterError:
        """What the caller gets when nobody answered."""
        late = late or self._clock() >= state.deadline
        errors = [failure.exception for failure in state.errors]
        asked = [failure.error for failure in state.errors if failure.sent]
        if state.last is None and not late:
            only = asked[0] if len({type(error) for error in asked}) == 1 else None
            if isinstance(only, ProviderError) and only.breaker == "neutral":
                return only
            if not asked and all(isinstance(error, UnsupportedRequest) for error in errors):
                return UnsupportedRequest("; ".join(str(error) for error in errors))
        error: AllProvidersFailed
        reasons = "; ".join(f"{attempt.tier}: {attempt.error or attempt.outcome}" for attempt in state.attempts)
        if state.last is not None:
            error = EscalationFailed(f"no stronger answer: {reasons or 'nowhere to escalate to'}")
            error.response = state.last
        elif late:
            error = DeadlineExceeded(f"the deadline passed: {reasons}")
        else:
            error = AllProvidersFailed(f"no tier answered: {reasons}")
        error.errors = tuple(_bare(failure) for failure in errors)
        error.retry_after = self._ready_in(state, plan)
        error.__cause__ = error.errors[0] if error.errors else None
        return error

    # -- telling

    def _tell_failure(self, state: _State, error: RouterError) -> None:
        _log.warning("call failed: %s", _explain(state.attempts, None))
        self._emit("done", "", "", {"outcome": type(error).__name__, "latency": self._clock() - state.start})

    def _tell_answer(self, response: LLMResponse) -> None:
        if len(response.attempts) > 1 and _log.isEnabledFor(logging.INFO):
            _log.info("answered: %s", _explain(response.attempts, response.cost))
        self._emit("done", response.provider, response.model, {
            "outcome": "ok", "latency": response.latency, "cost": response.cost, "attempts": len(response.attempts),
            "prompt_tokens": response.usage.prompt_tokens, "completion_tokens": response.usage.completion_tokens,
        })  # fmt: skip

    def _told(
        self, state: _State, kind: str, tier: ProviderTier, model: str | None, data: dict[str, Any], level: int = logging.DEBUG
    ) -> None:
        if state.observed or level > logging.DEBUG:
            if _log.isEnabledFor(level):
                _log.log(level, "%s %s %s %s", tier.name, kind, model or "", data)
            self._emit(kind, tier.name, model or "", data)

    def _emit(self, kind: str, tier: str, model: str, data: dict[str, Any]) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(Event(kind, tier, model, data, self._clock()))
        except Exception as error:
            if _is_task_limit(error):
                raise
            _log.exception("on_event failed")

    def _breaker_told(self, breaker: CircuitBreaker, data: dict[str, Any]) -> None:
        for tier in self.tiers:
            if tier.breaker is breaker:
                self._emit("breaker", tier.name, "", data)


def _place(error: BaseException) -> str:
    """``KeyError in provider.py, line 12``: of an exception that is not ours, whose text could hold anything."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" in {trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno}" if trace is not None else ""
    return f"{type(error).__name__}{where}"


def _bare(error: BaseException) -> BaseException:
    """Without its traceback, whose frames hold the messages; and so for what it wraps."""
    for item in _causes(error):
        item.__traceback__ = None
    return error


def _wants_json(response_format: Any) -> bool:
    return isinstance(response_format, Mapping) and response_format.get("type") in ("json_object", "json_schema")


def _checked_tiers(tiers: Any) -> tuple[ProviderTier, ...]:
    if isinstance(tiers, (str, bytes, ProviderTier)) or not isinstance(tiers, Iterable):
        raise ConfigError(f"tiers is a {type(tiers).__name__}: give a list of ProviderTier")
    found = tuple(tiers)
    if not found:
        raise ConfigError("tiers is empty: give at least one ProviderTier")
    names: set[str] = set()
    for at, tier in enumerate(found):
        if not isinstance(tier, ProviderTier):
            raise ConfigError(f"tiers[{at}] is a {type(tier).__name__}: give a ProviderTier(name, provider, models)")
        if tier.name in names:
            raise ConfigError(f"tiers[{at}]: the name {tier.name!r} is taken: names of tiers are unique in a chain")
        names.add(tier.name)
    return tuple(sorted(found, key=lambda tier: _ROLE_ORDER.index(tier.role)))


def _checked_policy(on_error: Mapping[type[Exception], str] | None) -> dict[type, str]:
    if on_error is not None and not isinstance(on_error, Mapping):
        raise ConfigError(f"on_error={on_error!r}: give a table, such as {{ContentFiltered: 'next'}}")
    for kind, action in (on_error or {}).items():
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise ConfigError(f"on_error: {kind!r} is no exception class")
        if action not in ("next", "raise"):
            raise ConfigError(f"on_error[{kind.__name__}]={action!r}: give 'next' or 'raise'")
    return dict(on_error or {})


# ==== streams =========================================================================================================


class ChatStream(Generator[str, None, LLMResponse]):
    """A running answer, from ``FailoverChain.stream()``: iterate over its deltas of text.

    ``with chain.stream(...) as stream: for delta in stream: ...`` Closing it early, or dropping it, frees its connection and
    counts as no failure. It may be read in another thread than it was opened in, but by one at a time.
    """

    def __init__(self, deltas: Generator[str, None, LLMResponse]) -> None:
        next(deltas)  # its first item is none: a generator that has started also ends properly when it is lost
        self._deltas = deltas
        self._taken: list[str] = []
        self._response: LLMResponse | None = None

    def __next__(self) -> str:
        try:
            delta = next(self._deltas)
        except StopIteration as end:
            self._response = self._response or end.value
            raise
        self._taken.append(delta)
        return delta

    def send(self, value: None) -> str:
        """The next delta; a stream takes no values."""
        return next(self)

    def throw(self, *error: Any) -> str:
        """Ends the stream, as an exception of its reader; raises it."""
        return self._deltas.throw(*error)

    def close(self) -> None:
        """Give up what has not come yet, and free the connection. Call it in the thread that reads."""
        self._deltas.close()

    @property
    def text(self) -> str:
        """What has been handed out so far."""
        return "".join(self._taken)

    @property
    def response(self) -> LLMResponse:
        """The whole answer, with tool calls, usage, cost and attempts. RouterError before the stream is exhausted."""
        if self._response is None:
            raise RouterError("the stream is not exhausted: read it to its end before asking for .response")
        return self._response

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ChatStream {'exhausted' if self._response else f'{len(self._taken)} deltas so far'}>"


def _whole(response: LLMResponse) -> Generator[str, None, LLMResponse]:
    """An answer that was complete before anything could be shown, as a stream."""
    yield ""
    if response.content:
        yield response.content
    return response


# ==== configuration ===============================================================================
# A chain from a mapping, a TOML file or the environment. Names, variables and addresses come from
# the classes: a new provider needs one row in this table, and nothing else in these two sections.

_PROVIDERS: dict[str, type[_HTTPProvider]] = {
    "lmstudio": LMStudioProvider, "ollama": OllamaProvider, "gemini": GeminiProvider,
    "openai": OpenAIProvider, "anthropic": AnthropicProvider,
}  # fmt: skip
_STORES: dict[str, type] = {"memory": MemoryStore, "sqlite": SQLiteStore, "redis": RedisStore}
#: Arguments that are functions or other objects of Python: a file cannot hold them.
_OBJECTS = frozenset({"accept", "on_event", "on_change", "clock", "sleep", "session"})
#: Arguments and headers that carry a key, and what a URL has of one.
_KEY_NAMES = r"(?i).*(auth|authorization|cookie|key|token|secret|password)"
_KEY_IN_URL = r"(?i)://[^/?#]*@|[?&][^=&]*(key|token|secret|password|sig|signature)="


def _variables(kind: type[_HTTPProvider]) -> list[str]:
    """The environment variables that make a tier. A server on this machine needs its address."""
    keys = kind._key_variables if kind._default_url.startswith("https") else ()
    return [name for name in (*keys, kind._url_variable) if name]


def _tiers_from_env(environ: Mapping[str, str]) -> list[ProviderTier]:
    tiers, missing = [], []
    for name, kind in _PROVIDERS.items():
        if not any(environ.get(variable) for variable in _variables(kind)):
            missing.append(" or ".join(_variables(kind)))
            continue
        key, url = kind._from_environment(environ)
        models = list(filter(None, [environ.get(f"{name.upper()}_MODEL")]))
        tiers.append(ProviderTier(name, kind(key, url or kind._default_url), models))
        _log.info("from_env: %s with %s", name, *models or [f"no {name.upper()}_MODEL"])
    if not tiers:
        raise ConfigError(f"the environment names no provider: set {', '.join(missing)}")
    _log.info("from_env: not set: %s", ", ".join(missing) or "nothing")
    return tiers


def _chain_from_config(kind: type[FailoverChain], config: Any, **overrides: Any) -> FailoverChain:
    in_file = not isinstance(config, Mapping)
    table = _read_toml(config) if in_file else config
    where = f"{config}: " if in_file else ""
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
    places = ((f"{where}[[tier]] {number}", tier) for number, tier in enumerate(tiers, 1))
    settings["tiers"] = [_tier_from(tier, place, in_file) for place, tier in places]
    if "store" in table:
        settings["store"] = _typed(table["store"], _STORES, f"{where}[store]", in_file)
    chain: FailoverChain = _built(kind, {**settings, **overrides}, f"{where}[chain]")
    return chain


def _read_toml(path: Any) -> Any:
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"a {type(path).__name__}: give a mapping, or the path of a TOML file")
    try:
        toml = __import__("tomllib" if sys.version_info >= (3, 11) else "tomli")
        with open(path, "rb") as file:
            return toml.load(file)
    except ImportError:
        raise ConfigError("TOML on Python 3.10: pip install tomli, or give a mapping") from None
    except OSError as error:
        raise ConfigError(f"{path}: the file cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def _settings(table: Any, where: str, in_file: bool) -> dict[str, Any]:
    """A table whose ``…_env`` entries are replaced by what the environment holds."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} is a {type(table).__name__}: give a table")
    found = dict(table)
    headers, named = found.get("headers") or {}, found.pop("headers_env", None) or {}
    if not isinstance(headers, Mapping) or not isinstance(named, Mapping):
        raise ConfigError(f"{where}: headers and headers_env have to be tables")
    for name, value in {**headers, **table}.items() if in_file else ():
        held = name.endswith("url") and _pattern(_KEY_IN_URL).search(str(value))
        if name in _OBJECTS:
            raise ConfigError(f"{where}: {name} is an object: give it in a mapping, not in a file")
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
    """What an environment variable holds. What is no name in capitals may be a key by mistake."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}={name!r}: give the name of an environment variable")
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
    if isinstance(settings.get("breaker"), Mapping):
        place = f"{where} [tier.breaker]"
        breaker = {"name": settings.get("name"), **_settings(settings["breaker"], place, in_file)}
        if isinstance(breaker.get("store"), Mapping):
            breaker["store"] = _typed(breaker["store"], _STORES, f"{place} store", in_file)
        settings["breaker"] = _built(CircuitBreaker, breaker, place)
    tier: ProviderTier = _built(ProviderTier, settings, where)
    return tier


def _typed(table: Any, kinds: Mapping[str, type], where: str, in_file: bool) -> Any:
    """An object of the class that a table's ``type`` names; an object is taken as it is."""
    if not isinstance(table, Mapping) and not in_file:
        return table
    settings = _settings(table, where, in_file)
    name = settings.pop("type", None)
    if not isinstance(name, str) or name not in kinds:
        cure = f"give one of {', '.join(kinds)}.{_near(str(name), kinds)}"
        raise ConfigError(f"{where}: {'no type' if name is None else f'type={name!r}'}: {cure}")
    if "url" in settings:  # RedisStore has one argument for a client and for a URL
        settings["client_or_url"] = settings.pop("url")
    return _built(kinds[name], settings, where)


def _built(kind: type, settings: Mapping[str, Any], where: str) -> Any:
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


# ==== command line ================================================================================
# A command's result goes to standard output, everything else to standard error. What servers say
# is escaped before it is shown, so that it cannot steer the terminal.

_CONFIG_FILE = "copilot-router.toml"
_EXIT_CODES = """\
exit status: 0 answered, 1 every tier failed (or the output was lost),
2 usage or configuration, 124 deadline, 130 interrupted"""
_BEGIN = f"""\
begin with a model on this machine (LM Studio here), or with a key:
  copilot-router chat --provider lmstudio "Say hello."
  OPENAI_API_KEY=... OPENAI_MODEL=... copilot-router chat "Say hello."
then write several tiers down: copilot-router init

without --config, {_CONFIG_FILE} in this directory is used, else the
environment: a tier for each of these, with its model in OPENAI_MODEL and so on"""
#: Control, escape and bidirectional characters, separators of lines, halves of characters.
_UNSHOWN = r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
#: What -v says about the events of a call, by their kind.
_SENTENCES = {
    "attempt": "asking {tier}", "retry": "asking {tier} once more, in {pause:.1f} s",
    "resend": "{tier} does not take {field} as it was sent: sending it corrected",
    "skip": "passing over {tier}: {reason}", "escalation": "{tier} gave up: asking {to}",
    "wait": "no tier is ready: waiting {seconds:.1f} s",
    "breaker": "the breaker of {tier} was {old} and is {new}: {reason}",
}  # fmt: skip


def _escaped(text: str, pattern: str = _UNSHOWN) -> str:
    return _pattern(pattern).sub(lambda found: ascii(found[0])[1:-1], text)


def _is_open(stream: Any, *, terminal: bool = False) -> bool:
    """Whether a standard stream is there (and is a terminal)."""
    return not getattr(stream, "closed", True) and (not terminal or stream.isatty())


class _Screen:
    """What a command shows besides its result; it is the chain's ``on_event``."""

    def __init__(self) -> None:
        self.chain: FailoverChain | None = None
        self.verbose = self.json = False
        self.unfinished = False  #: whether the answer has begun a line and not ended it
        self._said: set[str] = set()
        self.timer = threading.Timer(2.0, self.end_line)  #: tells a person who is being asked

    def __call__(self, event: Event) -> None:
        if "store" in event.data:
            self.say(f"the store of {event.tier}: {event.data['store']}")
        elif self.verbose and event.kind in _SENTENCES:
            self.say(_SENTENCES[event.kind].format(tier=event.tier, **event.data))
        elif event.kind == "attempt" and _is_open(sys.stderr, terminal=True):
            self.timer.cancel()
            self.timer = threading.Timer(2.0, self.say, [f"waiting for {event.tier}"])
            self.timer.daemon = True
            self.timer.start()

    def say(self, text: str) -> None:
        """A sentence on standard error, once, on a line of its own."""
        self.timer.cancel()
        if _is_open(sys.stdout, terminal=True):
            self.end_line()
        if text not in self._said and _is_open(sys.stderr):
            self._said.add(text)
            with contextlib.suppress(OSError):  # a full disk
                print(f"copilot-router: {_escaped(text)}", file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """A piece of the answer. On a terminal it keeps only its line ends and tabs."""
        self.timer.cancel()
        self.unfinished = not text.endswith("\n") if text else self.unfinished
        safe = _is_open(sys.stdout, terminal=True)
        print(_escaped(text, rf"(?![\n\t]){_UNSHOWN}") if safe else text, end="", flush=True)

    def end_line(self) -> None:
        """End the line of the answer if it is unfinished."""
        if self.unfinished:
            self.unfinished = False
            print(flush=True)


def _why(name: str, error: str, chain: FailoverChain) -> str:
    """Why a tier failed, from ``"Class: message"``: with its address and what to look at."""
    provider: Any = next((tier.provider for tier in chain.tiers if tier.name == name), None)
    kind, _, text = error.partition(": ")
    url = getattr(provider, "base_url", "")
    where = f" at {url}" if url not in text else ""
    if kind == "CircuitOpen":
        return text
    if kind == "ProviderUnavailable" and text:
        return f"{text}{where}{': is it running?' if text.startswith('refused') else ''}"
    names = getattr(provider, "_key_variables", ())
    used = [variable for variable in names if os.environ.get(variable)] or names
    named = getattr(provider, "_key_from", None) or "".join(used[:1])
    cure = f": check {named}" if kind == "AuthenticationError" and named else ""
    return f"{kind}{where}{text and ': ' + text}{cure}"


def _steps(attempts: Iterable[Attempt], chain: FailoverChain | None) -> list[str]:
    """A sentence for each tier that did not answer, with the number of its failures."""
    bad = [attempt for attempt in attempts if attempt.outcome != "ok"]
    lines = [f"{at.tier}: {_why(at.tier, at.error or '', chain)}" for at in bad if chain]
    times = {line: lines.count(line) for line in lines}
    return [line + (f" ({number} times)" if number > 1 else "") for line, number in times.items()]


def _filled(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if value not in (None, "", [], {}, 0)}


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
        told = json.dumps({"error": what, "attempts": records, "retry_after": later})
        print(json.dumps(json.loads(told, object_pairs_hook=_filled)), flush=True)
    if isinstance(error, DeadlineExceeded) or isinstance(error.__cause__, DeadlineExceeded):
        return 124
    return 1 if isinstance(error, (AllProvidersFailed, ProviderError)) else 2


def _chain_from(options: Any) -> FailoverChain:
    """The chain that the flags, the configuration or the environment describe."""
    screen, flags = options.screen, vars(options)
    name, url, variable = (flags.get(flag) for flag in ("provider", "base_url", "api_key_env"))
    ladder = flags.get("escalation_model")
    settings = {"on_event": screen, **({"escalation_model": ladder} if ladder else {})}
    if options.config is None and not (name or url) and os.path.exists(_CONFIG_FILE):
        options.config = _CONFIG_FILE
        screen.say(f"using {_CONFIG_FILE}")
    if (name or url) if options.config else (variable and not (name or url)):
        raise ConfigError("give --config, or --provider or --base-url with --api-key-env")
    if name or url:
        key = _variable(variable, "--api-key-env") if variable else None
        provider: Any = _PROVIDERS[name or "openai"](key, url)
        provider._key_from = variable
        models = [model for model in (options.model, ladder) if model]
        tier = ProviderTier(name or "openai", provider, models)
        chain = FailoverChain([tier], **settings)
    elif options.config:
        chain = _chain_from_config(FailoverChain, options.config, **settings)
    else:
        chain = FailoverChain.from_env(**settings)
    screen.chain = chain
    return chain


def _prompt(given: str, screen: _Screen) -> str:
    """The prompt of the command line, joined to what is piped in. A prompt that is given does not
    wait for a terminal or a socket, which might never end."""
    import stat

    alone, piped = given == "-", ""
    try:
        mode = 0 if alone else os.fstat(sys.stdin.fileno()).st_mode
        if alone and _is_open(sys.stdin, terminal=True):
            screen.say("reading the question from standard input; Ctrl-D ends it")
        if alone or stat.S_ISFIFO(mode) or stat.S_ISREG(mode):
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
        tiers = [tier for tier in chain.tiers if tier.name in (asked["tiers"] or (tier.name,))]
        lost = [tier for tier in tiers if getattr(tier.provider, "_wants_model", False)]
        if lost == tiers != [] and not any((options.model, *(tier.models for tier in tiers))):
            name, path = tiers[0].name, options.config
            cure = f"list one in {path}" if path else f"set {name.upper()}_MODEL"
            raise ConfigError(f"{name} has no model: pass --model, or {cure}")
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
        cost = response.cost or 0.0  # with two significant digits, never as 3e-05
        price = f"{cost:.{max(0, 1 - math.floor(math.log10(cost)))}f}" if cost else "0"
        told = "" if response.cost is None else f" for ${price}"
        last = f"{response.provider} answered in {response.latency:.2g} s{told}"
        for line in (*_steps(response.attempts, chain), last):
            screen.say(line)
    return 0


def _tiers_command(options: Any) -> int:
    """status and check: a table with the state in front, in colour on a terminal."""
    checked = options.command == "check"
    with _chain_from(options) as chain:
        found = chain.check(options.timeout) if checked else chain.health()
    bad = sum(tier.last_error is not None for tier in found) if checked else 0
    if options.json:
        print(json.dumps([tier.to_dict() for tier in found]))
        return 1 if bad else 0
    rows = [["STATE", "TIER", "ROLE", "FAILURES", "RETRY IN", "REASON"]]
    for tier in found:
        seen, error = tier.breaker, tier.last_error
        state, reason = seen.state, seen.reason
        if checked:
            state, reason = ("failed", _why(tier.name, error, chain)) if error else ("ok", "")
        left = "" if seen.retry_after is None else f"{math.ceil(seen.retry_after)} s"
        cells = [state, tier.name, tier.role, str(seen.failures), left, reason or ""]
        rows.append([_escaped(cell) or "-" for cell in cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    plain = os.environ.get("NO_COLOR") or not _is_open(sys.stdout, terminal=True)
    colours = {} if plain else {"ok": 32, "closed": 32, "failed": 31, "open": 31, "half_open": 33}
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        if row[0] in colours:
            cells[0] = f"\033[{colours[row[0]]}m{cells[0]}\033[0m"
        print("  ".join(cells).rstrip())
    if not checked:
        _say_whose(options.screen, chain.tiers)
    return 1 if bad else 0


def _say_whose(screen: _Screen, tiers: Iterable[ProviderTier]) -> None:
    alone = ", ".join(tier.name for tier in tiers if tier.breaker._shared is None)
    if alone:
        screen.say(f"{alone}: without a [store] the breakers of other processes are not seen")


def _reset_command(options: Any) -> int:
    with _chain_from(options) as chain:
        tiers = {tier.name: tier for tier in chain.tiers}
        tier = tiers.get(options.tier)
        if tier is None:
            raise ConfigError(f"no tier is called {options.tier!r}.{_near(options.tier, tiers)}")
        old = tier.breaker.state
        tier.breaker.reset()
        _say_whose(options.screen, [tier])
    plain = f"{_escaped(options.tier)}: was {old}, is closed"
    print(json.dumps({"tier": options.tier, "was": old}) if options.json else plain)
    return 0


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


def _tier_text(name: str, kind: type[_HTTPProvider], environ: Mapping[str, str]) -> str:
    """A tier as TOML. It is switched on if the environment has what it needs but for a model."""
    key, url = kind._from_environment(environ)
    model, on = environ.get(f"{name.upper()}_MODEL"), any(map(environ.get, _variables(kind)))
    variable = next(filter(environ.get, kind._key_variables), kind._key_variables[0])
    wants_key = variable in _variables(kind)
    gap = "  # FILL IN the name of a model" if kind._needs_model and not model else ""
    quoted = functools.partial(json.dumps, ensure_ascii=False)  # as TOML wants it
    lines = ["[[tier]]", f'name = "{name}"', f"models = [{quoted(model) if model else ''}]{gap}",
             "# prices = [0.1, 0.5]       # USD per million tokens: prompt, completion",
             "[tier.provider]", f'type = "{name}"']  # fmt: skip
    if key or (wants_key and not url):
        lines.append(f'api_key_env = "{variable}"')
    if _pattern(_KEY_IN_URL).search(url):
        lines.append(f'base_url_env = "{kind._url_variable}"')
    elif url or not wants_key:
        lines.append(f"base_url = {quoted(url or kind._default_url)}")
    return "\n".join(("", *(line if on else f"# {line}" for line in lines), ""))


def _init_command(options: Any) -> int:
    tiers = [_tier_text(name, kind, os.environ) for name, kind in _PROVIDERS.items()]
    if all(text.startswith("\n#") for text in tiers):  # nothing is set: LM Studio needs nothing
        tiers[0] = tiers[0].replace("\n# ", "\n")
    data, made = (_TEMPLATE + "".join(tiers)).encode(), False
    try:
        with open(options.path, "xb") as file:
            made = True
            file.write(data)
    except (OSError, ValueError) as error:
        if made:
            os.unlink(options.path)
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{options.path}: cannot be written ({why}): name another file") from None
    on = _pattern(r'(?m)^name = "(.*)"\n(.*FILL IN)?').findall("".join(tiers))
    gaps = ", ".join(name for name, gap in on if gap)
    told = f"Fill in the models of {gaps}, then try:" if gaps else "Try:"
    flag = "" if options.path == _CONFIG_FILE else f" --config {options.path}"
    text = f"{options.path} is written, with {', '.join(name for name, _ in on)}. {told}"
    print(_escaped(f"{text} copilot-router check{flag}"))
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
    check = command("check", "ping every tier; exits 1 if one fails", _tiers_command, aim)
    check.add_argument("--timeout", type=float, default=5.0, help="for each (default 5)")
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
            screen.timer.cancel()
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

"""The classes of errors: their tree, what follows from each, what they carry, and pickling."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

import copilot_router
from copilot_router import (AllProvidersFailed, Attempt, AuthenticationError, BadRequest,
    CircuitOpen, ConfigError, ContentFiltered, ContextLengthExceeded, DeadlineExceeded,
    EmptyResponse, EscalationFailed, FailoverChain, InvalidResponse, LLMResponse, ModelNotFound,
    Overloaded, ProviderError, ProviderTier, ProviderTimeout, ProviderUnavailable, QuotaExceeded,
    RateLimited, RouterError, ScriptedProvider, ServerError, StreamInterrupted, UnknownModel,
    UnsupportedRequest)

#: Class -> its parent, what the chain does, and what the breaker learns.
TREE: dict[type[ProviderError], tuple[type, str, str]] = {
    ProviderError: (RouterError, "next", "failure"),
    ProviderUnavailable: (ProviderError, "next", "failure"),
    ServerError: (ProviderError, "again", "failure"),
    Overloaded: (ServerError, "again", "failure"),
    ProviderTimeout: (ProviderError, "next", "failure"),
    InvalidResponse: (ProviderError, "next", "failure"),
    EmptyResponse: (InvalidResponse, "next", "failure"),
    RateLimited: (ProviderError, "next", "park"),
    QuotaExceeded: (RateLimited, "next", "park long"),
    AuthenticationError: (ProviderError, "next", "park long"),
    ModelNotFound: (ProviderError, "next", "neutral"),
    ContextLengthExceeded: (ProviderError, "next", "neutral"),
    UnsupportedRequest: (ProviderError, "next", "neutral"),
    BadRequest: (ProviderError, "next", "neutral"),
    ContentFiltered: (ProviderError, "raise", "neutral")}
FIELDS = {"provider": "p", "model": "m", "status": 429, "code": "c", "retry_after": 3.5,
    "request_id": "r"}
each_class = pytest.mark.parametrize("kind", TREE)


@each_class
def test_the_policy_stands_in_the_class(kind: type[ProviderError]) -> None:
    """A custom provider's subclass inherits it, and may read it."""
    parent, then, breaker = TREE[kind]
    assert kind.__bases__[0] is parent
    assert (kind.then, kind.breaker) == (then, breaker)
    assert issubclass(kind, RouterError)


@pytest.mark.parametrize(("kind", "parents"), [
    (StreamInterrupted, (ProviderError,)), (CircuitOpen, (RouterError,)),
    (AllProvidersFailed, (RouterError,)), (UnknownModel, (RouterError,)),
    (DeadlineExceeded, (AllProvidersFailed, TimeoutError)),
    (EscalationFailed, (AllProvidersFailed,)), (ConfigError, (RouterError, ValueError))])
def test_the_other_classes(kind: type, parents: tuple[type, ...]) -> None:
    assert all(issubclass(kind, parent) for parent in parents)
    assert kind.__name__ in copilot_router.__all__


@each_class
def test_a_provider_fills_in_what_it_knows(kind: Any) -> None:
    bare, full = kind(), kind("the message", **FIELDS)
    assert (bare.provider, bare.model, bare.attempts) == ("", "", ())
    assert [getattr(bare, name) for name in ("status", "code", "retry_after", "request_id")] == [
        None] * 4
    assert {name: getattr(full, name) for name in FIELDS} == FIELDS
    assert "the message" in str(full)
    assert StreamInterrupted().partial == ""


@pytest.mark.parametrize("again",
    [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", [*TREE, StreamInterrupted])
def test_errors_pickle_with_all_that_they_carry(kind: Any, again: Any) -> None:
    """Task queues send them to other processes."""
    error = kind("the message", **FIELDS)
    error.attempts = (Attempt("t", "m", "failed", "BadRequest: no"),)
    if kind is StreamInterrupted:
        error.partial = "a part"
    other = again(error)
    assert (type(other), str(other), other.args) == (kind, str(error), error.args)
    assert vars(other) == vars(error)


@pytest.mark.parametrize("script", [ServerError("no"), OSError("no")], ids=["provider", "foreign"])
def test_errors_of_a_chain_pickle(script: Exception) -> None:
    tiers = [ProviderTier(name, ScriptedProvider([script, script]), retries=0) for name in "ab"]
    with pytest.raises(AllProvidersFailed) as caught:
        FailoverChain(tiers).chat("hi")
    other = pickle.loads(pickle.dumps(caught.value))
    assert (str(other), other.explain()) == (str(caught.value), caught.value.explain())
    assert [type(error) for error in other.errors] == [type(script)] * 2
    assert [(one.tier, one.outcome) for one in other.attempts] == [("a", "failed"), ("b", "failed")]
    assert all(error.__traceback__ is None for error in caught.value.errors)


def test_the_answer_of_a_failed_escalation_is_no_part_of_what_is_shown() -> None:
    tiers = [ProviderTier("a", ScriptedProvider(["the amber answer"]), ["m"])]
    with pytest.raises(EscalationFailed) as caught:
        FailoverChain(tiers, accept=lambda response: False).chat("hi")
    other = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(other.response, LLMResponse)
    assert other.response.text == "the amber answer"
    assert "amber" not in f"{other} {other!r} {other.args} {other.explain()}"

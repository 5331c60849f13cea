"""The classes of errors: what they carry, and pickling."""

from __future__ import annotations

import copy
import pickle
from contextlib import closing
from typing import Any

import pytest
from support.fakes import error_of
from support.server import Server

import copilot_router
from copilot_router import (AllProvidersFailed, Attempt, EscalationFailed, FailoverChain,
    OpenAIProvider, ProviderError, ProviderTier, ScriptedProvider, ServerError, StreamInterrupted)

FIELDS = {"provider": "p", "model": "m", "status": 429, "code": "c", "retry_after": 3.5,
    "request_id": "r"}
EVERY = [getattr(copilot_router, name) for name in copilot_router.__all__]
KINDS = [kind for kind in EVERY if isinstance(kind, type) and issubclass(kind, ProviderError)]
each_class = pytest.mark.parametrize("kind", KINDS)


# The tree and what follows from each class stand in docs/errors.md, which test_readme compares.
@each_class
def test_a_provider_fills_in_what_it_knows(kind: Any) -> None:
    full = kind("the message", **FIELDS)
    for bare in (kind(), kind.__new__(kind)):  # as a subclass may leave it
        assert (bare.provider, bare.model) == ("", "")
        assert (bare.status, bare.code, bare.retry_after, bare.request_id) == (None,) * 4
    assert kind().attempts == ()
    assert {name: getattr(full, name) for name in FIELDS} == FIELDS and "the message" in str(full)
    assert StreamInterrupted().partial == ""


@pytest.mark.parametrize("again",
    [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
@each_class
def test_errors_pickle_with_all_that_they_carry(kind: Any, again: Any) -> None:
    """Task queues send them to other processes."""
    error = kind("the message", **FIELDS)
    error.attempts = (Attempt("t", "m", "failed", "BadRequest: no"),)
    if kind is StreamInterrupted:
        error.partial = "a part"
    other = again(error)
    assert (type(other), str(other), other.args) == (kind, str(error), error.args)
    assert vars(other) == vars(error)


LOCAL = type("Local", (Exception,), {})("no")  # no other process finds its class


@pytest.mark.parametrize(("script", "kind"),
    [(ServerError("no"), ServerError), (OSError("no"), OSError), (LOCAL, ProviderError)])
def test_errors_of_a_chain_pickle_and_the_chain_does_not(script: Exception, kind: type) -> None:
    tiers = [ProviderTier(name, ScriptedProvider([script, script]), retries=0) for name in "ab"]
    chain = FailoverChain(tiers)
    failed = error_of(AllProvidersFailed, chain.chat, "hi")
    other = pickle.loads(pickle.dumps(failed))
    assert (str(other), other.explain()) == (str(failed), failed.explain())
    assert (other.retry_after, other.attempts) == (failed.retry_after, failed.attempts)
    assert [type(error) for error in other.errors] == [kind] * 2
    assert [(one.tier, one.outcome) for one in other.attempts] == [("a", "failed"), ("b", "failed")]
    assert all(error.__traceback__ is None for error in failed.errors)
    error_of(TypeError, pickle.dumps, chain, match="cannot be copied")


def test_a_failure_with_a_traceback_of_any_length_is_a_failure() -> None:
    error = ValueError("no")
    def deep(left: int) -> None:
        if left:
            deep(left - 1)
        raise error
    for _ in range(10):  # each one makes it longer
        error_of(ValueError, deep, 200)
    script = ScriptedProvider([error, "fine"])
    tiers = [ProviderTier(name, script) for name in "ab"]
    assert FailoverChain(tiers).chat("hi").text == "fine"


@pytest.mark.parametrize("handled", [ServerError("x"), ConnectionRefusedError(), TimeoutError()])
def test_what_the_caller_is_handling_is_no_part_of_an_error(handled: Exception) -> None:
    def trip(error: Exception) -> None:
        raise error
    with Server(lambda *_: False) as server, closing(OpenAIProvider("", server.url)) as provider:
        try:
            trip(handled)
        except Exception as mine:
            trace = mine.__traceback__
            error = error_of(ServerError, provider.chat, "hi", model="m")
            chain = FailoverChain([ProviderTier("a", provider, ["m"])])
            error_of(AllProvidersFailed, chain.chat, "hi")
            assert "closed before the answer" in str(error) and mine.__traceback__ is trace


def test_the_answer_of_a_failed_escalation_is_no_part_of_what_is_shown() -> None:
    tiers = [ProviderTier("a", ScriptedProvider(["the amber answer"]), ["m"])]
    chain = FailoverChain(tiers, accept=lambda response: False)
    other = pickle.loads(pickle.dumps(error_of(EscalationFailed, chain.chat, "hi")))
    assert other.response.text == "the amber answer"
    assert "amber" not in f"{other} {other!r} {other.args} {other.explain()}"

"""A file of a user, for ``mypy --strict`` beside the wheel: types are real, mistakes are seen.

``assert_type`` refuses Any. Every "type: ignore" marks a mistake that mypy has to find; if it did
not, mypy would report the comment as unused.
"""

from __future__ import annotations

from typing_extensions import assert_type

from copilot_router import (AllProvidersFailed, Attempt, BreakerSnapshot, ChatStream,
    CircuitBreaker, Event, FailoverChain, LLMProvider, LLMResponse, OpenAIProvider, ProviderError,
    ProviderTier, ScriptedProvider, SQLiteStore, Ticket, TierHealth, ToolCall, Usage)


def told(event: Event) -> None:
    assert_type(event.kind, str)
    assert_type(event.time, float)


def build(store: SQLiteStore) -> FailoverChain:
    provider: LLMProvider = OpenAIProvider("a-key", stall_timeout=5.0)
    breaker = CircuitBreaker(3, 15.0, name="cloud", store=store)
    tier = ProviderTier("cloud", provider, ["gpt-6-luna"], breaker=breaker,
        params={"temperature": 0.5})
    assert_type(tier.breaker, CircuitBreaker)
    assert_type(breaker.admit(), Ticket)
    assert_type(breaker.snapshot(), BreakerSnapshot)
    return FailoverChain([tier, ProviderTier("test", ScriptedProvider(["yes"]))], on_event=told,
        timeout=25)


def ask(chain: FailoverChain) -> str:
    try:
        response = chain.chat("Say hello.", timeout=25, temperature=0.5)
    except AllProvidersFailed as error:
        assert_type(error.retry_after, float | None)
        assert_type(error.attempts, tuple[Attempt, ...])
        return error.explain()
    except ProviderError as error:
        assert_type(error.status, int | None)
        return str(error)
    assert_type(response, LLMResponse)
    assert_type(response.text, str)
    assert_type(response.content, str | None)
    assert_type(response.cost, float | None)
    assert_type(response.tool_calls, list[ToolCall])
    assert_type(response.total_usage, Usage)
    assert_type(response.usage.total_tokens, int)
    assert_type(response.attempts, tuple[Attempt, ...])
    return response.explain()


def stream(chain: FailoverChain) -> LLMResponse:
    with chain.stream("Say hello.") as deltas:
        assert_type(deltas, ChatStream)
        for delta in deltas:
            assert_type(delta, str)
    assert_type(deltas.response, LLMResponse)
    return deltas.response


def state(chain: FailoverChain) -> None:
    assert_type(chain.health(), list[TierHealth])
    assert_type(chain.check(timeout=2.0)[0].breaker.state, str)
    assert_type(chain.tiers, tuple[ProviderTier, ...])
    assert_type(FailoverChain.from_config({}), FailoverChain)
    assert_type(FailoverChain.from_env(), FailoverChain)


def mistakes(chain: FailoverChain) -> None:
    chain.chat(3)  # type: ignore[arg-type]
    print(chain.chat("hi").txt)  # type: ignore[attr-defined]
    wrong: int = chain.chat("hi").text  # type: ignore[assignment]
    print(wrong)
    CircuitBreaker()(len)(4)  # type: ignore[arg-type]
    ProviderTier("cloud")  # type: ignore[call-arg]
    FailoverChain([], timeout="soon")  # type: ignore[arg-type]

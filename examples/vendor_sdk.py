"""A custom provider around a vendor's SDK, for example for a sign-in that only the SDK can do.

    python examples/vendor_sdk.py "Why is the sky blue?"

The provider calls the SDK without the SDK's own retries, obeys ``timeout``, and raises the
errors of copilot_router, because the class of an error decides what happens next. It leaves out
the text of the SDK's errors, which may hold messages or keys.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import openai

from copilot_router import (
    AuthenticationError,
    BadRequest,
    FailoverChain,
    LLMProvider,
    LLMResponse,
    LMStudioProvider,
    ModelNotFound,
    ProviderError,
    ProviderTier,
    ProviderTimeout,
    ProviderUnavailable,
    RateLimited,
    ServerError,
    ToolCall,
    Usage,
)

#: The SDK's errors in our words; the first that fits counts.
KINDS: list[tuple[type[Exception], type[ProviderError]]] = [
    (openai.APITimeoutError, ProviderTimeout),
    (openai.APIConnectionError, ProviderUnavailable),
    (openai.RateLimitError, RateLimited),
    (openai.AuthenticationError, AuthenticationError),
    (openai.PermissionDeniedError, AuthenticationError),
    (openai.NotFoundError, ModelNotFound),
    (openai.InternalServerError, ServerError),
    (openai.APIStatusError, BadRequest),
]


class SDKProvider(LLMProvider):
    def __init__(self, client: openai.OpenAI) -> None:
        # The chain has retries of its own, within its deadline.
        self._client = client.with_options(max_retries=0)

    def chat(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> LLMResponse:
        if tools:
            kwargs["tools"] = tools
        try:  # kwargs hold timeout=; the SDK applies it to each read, not to the whole
            answer = self._client.chat.completions.create(model=model, messages=messages, **kwargs)
        except openai.APIError as error:
            raise self._translated(error) from None
        choice, usage = answer.choices[0], answer.usage
        calls = [self._tool_call(call) for call in choice.message.tool_calls or ()]
        return LLMResponse(
            content=choice.message.content,
            tool_calls=calls,
            finish_reason=choice.finish_reason,
            model=answer.model,
            usage=Usage(usage.prompt_tokens, usage.completion_tokens) if usage else Usage(),
        )

    @staticmethod
    def _tool_call(call: Any) -> ToolCall:
        text = call.function.arguments
        try:
            arguments = json.loads(text or "{}")
        except ValueError:
            arguments = None
        return ToolCall(
            call.id, call.function.name, arguments if isinstance(arguments, dict) else None, text
        )

    @staticmethod
    def _translated(error: openai.APIError) -> ProviderError:
        kind = next((ours for theirs, ours in KINDS if isinstance(error, theirs)), ServerError)
        response = getattr(error, "response", None)
        wait = response.headers.get("retry-after", "") if response is not None else ""
        return kind(
            type(error).__name__,
            status=getattr(error, "status_code", None),
            code=error.code,
            retry_after=float(wait) if wait.isdecimal() else None,
        )


def make_chain() -> FailoverChain:
    tiers = [
        ProviderTier("sdk", SDKProvider(openai.OpenAI()), ["gpt-6-luna"]),  # reads OPENAI_API_KEY
        ProviderTier("local", LMStudioProvider(), role="emergency"),
    ]
    return FailoverChain(tiers)


if __name__ == "__main__":
    print(make_chain().chat(sys.argv[1]).text)

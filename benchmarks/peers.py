"""The other libraries, each used as its own documentation shows, with its defaults.

A contender offers up to four calls: ``whole(url)`` and ``stream(url)`` return the text of one
answer over HTTP,
``instant()`` an answer without a network, and ``failover(first, second, seconds)`` one from the
first of two servers that
gives one, with so many seconds for a request. Libraries are imported when first asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import requests
from measure import MESSAGES, Instant, bare_stream, bare_whole, by_hand, instant_chain

from copilot_router import FailoverChain, OpenAIProvider, ProviderTier

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or its import downloads a table of prices

Call = Callable[[], Any]


class Contender(NamedTuple):
    """One library."""

    name: str
    module: str  #: what a program imports
    packages: tuple[str, ...]  #: whose versions are named
    whole: Callable[[str], Call] | None = None
    stream: Callable[[str], Call] | None = None
    instant: Callable[[], Call] | None = None
    failover: Callable[[str, str, float], Call] | None = None


# ---- ours


def _chain(url: str, streaming: bool) -> Call:
    provider = OpenAIProvider("key", url, stream_upstream=streaming)
    chain = FailoverChain([ProviderTier("http", provider, ["m"])])
    return lambda: chain.chat(MESSAGES).text


def _our_instant() -> Call:
    chain = instant_chain()
    return lambda: chain.chat(MESSAGES)


def our_failover(first: str, second: str, seconds: float) -> FailoverChain:
    return FailoverChain([
        ProviderTier("first", OpenAIProvider("key", first, first_token_timeout=seconds), ["m"]),
        ProviderTier("second", OpenAIProvider("key", second), ["m"]),
    ])  # fmt: skip


def _our_failover(first: str, second: str, seconds: float) -> Call:
    chain = our_failover(first, second, seconds)
    return lambda: chain.chat(MESSAGES).text


# ---- requests, alone and with tenacity and pybreaker


def _bare(read: Callable[[requests.Session, str], str]) -> Callable[[str], Call]:
    def made(url: str) -> Call:
        session = requests.Session()
        return lambda: read(session, url)

    return made


def _by_hand_instant() -> Call:
    chat = by_hand([Instant().chat, Instant().chat])
    return lambda: chat(MESSAGES)


def _by_hand_failover(first: str, second: str, seconds: float) -> Call:
    def provider(url: str) -> Callable[..., str]:
        session = requests.Session()

        def ask(messages: Any, tools: Any, model: str, timeout: float) -> str:
            body = {"model": model, "messages": messages}
            response = session.post(f"{url}/chat/completions", json=body, timeout=seconds)
            response.raise_for_status()
            text: str = response.json()["choices"][0]["message"]["content"]
            return text

        return ask

    chat = by_hand([provider(first), provider(second)], requests.RequestException)
    return lambda: chat(MESSAGES)


# ---- the OpenAI SDK


def _client(url: str, **settings: Any) -> Any:
    import openai

    return openai.OpenAI(api_key="key", base_url=url, **settings)


def _sdk_whole(url: str) -> Call:
    create = _client(url).chat.completions.create
    return lambda: create(model="m", messages=MESSAGES).choices[0].message.content


def _sdk_stream(url: str) -> Call:
    create = _client(url).chat.completions.create

    def ask() -> str:
        return "".join(
            [
                event.choices[0].delta.content or ""
                for event in create(model="m", messages=MESSAGES, stream=True)
            ]
        )

    return ask


def _sdk_failover(first: str, second: str, seconds: float) -> Call:
    import openai

    clients = [_client(first, timeout=seconds), _client(second)]

    def ask() -> Any:
        for client in clients:
            try:
                return (
                    client.chat.completions.create(model="m", messages=MESSAGES)
                    .choices[0]
                    .message.content
                )
            except openai.APIError as error:
                failure = error
        raise failure

    return ask


# ---- LiteLLM


def _router(*deployments: dict[str, Any]) -> Any:
    """The first deployment is "m"; the second is its fallback."""
    import litellm

    litellm.suppress_debug_info = True
    names = ["m", "spare"][: len(deployments)]
    models = [
        {
            "model_name": name,
            "litellm_params": {"model": "openai/m", "api_key": "key", **deployment},
        }
        for name, deployment in zip(names, deployments, strict=True)
    ]
    return litellm.Router(
        model_list=models, fallbacks=[{"m": ["spare"]}] if len(names) == 2 else []
    )


def _router_whole(url: str) -> Call:
    router = _router({"api_base": url})
    return lambda: router.completion(model="m", messages=MESSAGES).choices[0].message.content


def _router_stream(url: str) -> Call:
    router = _router({"api_base": url})

    def ask() -> str:
        events = router.completion(model="m", messages=MESSAGES, stream=True)
        return "".join([event.choices[0].delta.content or "" for event in events])

    return ask


def _router_instant() -> Call:
    router = _router({"mock_response": "Hello!"}, {"mock_response": "Hello!"})
    return lambda: router.completion(model="m", messages=MESSAGES)


def _router_failover(first: str, second: str, seconds: float) -> Call:
    router = _router({"api_base": first, "timeout": seconds}, {"api_base": second})
    return lambda: router.completion(model="m", messages=MESSAGES).choices[0].message.content


# ---- pydantic-ai


def _model(url: str, seconds: float | None = None) -> Any:
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    settings: Any = None if seconds is None else {"timeout": seconds}
    return OpenAIChatModel(
        "m", provider=OpenAIProvider(base_url=url, api_key="key"), settings=settings
    )


def _asked(*models: Any) -> Call:
    from pydantic_ai.direct import model_request_sync
    from pydantic_ai.messages import ModelRequest
    from pydantic_ai.models.fallback import FallbackModel

    model, request = FallbackModel(*models), [ModelRequest.user_text_prompt("Say hello.")]
    return lambda: model_request_sync(model, request).parts[0].content  # type: ignore[union-attr]


def _fallback_stream(url: str) -> Call:
    from pydantic_ai.direct import model_request_stream_sync
    from pydantic_ai.messages import ModelRequest
    from pydantic_ai.models.fallback import FallbackModel

    model, request = FallbackModel(_model(url)), [ModelRequest.user_text_prompt("Say hello.")]

    def ask() -> Any:
        with model_request_stream_sync(model, request) as events:
            for _ in events:
                pass
            return events.response.parts[0].content  # type: ignore[union-attr]

    return ask


def _fallback_instant() -> Call:
    from pydantic_ai.messages import ModelResponse, TextPart
    from pydantic_ai.models.function import FunctionModel

    return _asked(
        *[FunctionModel(lambda *_: ModelResponse(parts=[TextPart("Hello!")])) for _ in range(2)]
    )


# ---- LangChain


def _lang(url: str, **settings: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model="m", base_url=url, api_key="key", **settings)  # type: ignore[arg-type]


def _lang_whole(url: str) -> Call:
    model = _lang(url).with_fallbacks([_lang(url)])
    return lambda: model.invoke(MESSAGES).content


def _lang_stream(url: str) -> Call:
    model = _lang(url).with_fallbacks([_lang(url)])
    return lambda: "".join([piece.content for piece in model.stream(MESSAGES)])


def _lang_instant() -> Call:
    from langchain_core.language_models import FakeListChatModel

    model = FakeListChatModel(responses=["Hello!"]).with_fallbacks(
        [FakeListChatModel(responses=["Hello!"])]
    )
    return lambda: model.invoke(MESSAGES)


def _lang_failover(first: str, second: str, seconds: float) -> Call:
    model = _lang(first, timeout=seconds).with_fallbacks([_lang(second)])
    return lambda: model.invoke(MESSAGES).content


OURS = "copilot_router"
BARE = "bare requests"
HAND = "tenacity + pybreaker"

CONTENDERS = (
    Contender(OURS, "copilot_router", (), lambda url: _chain(url, False), lambda url: _chain(url, True), _our_instant,
              _our_failover),
    Contender(BARE, "requests", ("requests", "urllib3"), _bare(bare_whole), _bare(bare_stream)),
    Contender(HAND, "tenacity, pybreaker", ("tenacity", "pybreaker"), None, None, _by_hand_instant, _by_hand_failover),
    Contender("openai SDK", "openai", ("openai",), _sdk_whole, _sdk_stream, None, _sdk_failover),
    Contender("LangChain fallbacks", "langchain_openai", ("langchain-openai", "langchain-core"), _lang_whole, _lang_stream,
              _lang_instant, _lang_failover),
    Contender("pydantic-ai Fallback", "pydantic_ai.direct, pydantic_ai.models.openai", ("pydantic-ai-slim",),
              lambda url: _asked(_model(url)), _fallback_stream, _fallback_instant,
              lambda first, second, seconds: _asked(_model(first, seconds), _model(second))),
    Contender("LiteLLM Router", "litellm", ("litellm",), _router_whole, _router_stream, _router_instant, _router_failover),
)  # fmt: skip

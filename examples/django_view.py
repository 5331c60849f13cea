"""Django: the chain in the settings, a view, an async view, and a check for ``manage.py check``.

    export OPENAI_API_KEY=...
    python examples/django_view.py runserver
    curl -d question='Why is the sky blue?' localhost:8000/ask

The settings are in this file so that it runs alone. In a project they are in settings.py, and
the rest is in views.py and urls.py.
"""

from __future__ import annotations

import asyncio
import functools
import math
import sys
from typing import Any

from django.conf import settings
from django.core import checks
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

from copilot_router import AllProvidersFailed, ConfigError, FailoverChain, LLMResponse

if not settings.configured:
    settings.configure(
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["localhost", "127.0.0.1"],
        LLM={
            "chain": {"timeout": 25.0},
            "tier": [
                {"name": "local", "provider": {"type": "lmstudio"}},
                {
                    "name": "cloud",
                    "models": ["gpt-6-luna"],
                    "provider": {"type": "openai", "api_key_env": "OPENAI_API_KEY"},
                },
            ],
            # "store": {"type": "sqlite", "path": "/var/lib/mysite/breakers.db"},  # for all workers
        },
    )


@functools.cache
def chain() -> FailoverChain:
    """One for each process, made at the first request."""
    return FailoverChain.from_config(settings.LLM)


@checks.register
def llm_settings(**_: Any) -> list[checks.Error]:
    """A mistake in the settings shows when deploying, not at the first question."""
    try:
        FailoverChain.from_config(settings.LLM).close()
    except ConfigError as error:
        return [checks.Error(f"settings.LLM: {error}", id="llm.E001")]
    return []


def answered(response: LLMResponse) -> JsonResponse:
    return JsonResponse({"answer": response.text, "by": response.provider})


def unavailable(error: AllProvidersFailed) -> JsonResponse:
    wait = {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
    return JsonResponse({"error": "no answer at the moment"}, status=503, headers=wait)


@csrf_exempt
def ask(request: HttpRequest) -> JsonResponse:
    try:
        return answered(chain().chat(request.POST["question"]))
    except AllProvidersFailed as error:
        return unavailable(error)


@csrf_exempt
async def ask_async(request: HttpRequest) -> JsonResponse:
    """The one async view of a blocking site: the call gets a thread, the event loop stays free."""
    try:
        return answered(await asyncio.to_thread(chain().chat, request.POST["question"]))
    except AllProvidersFailed as error:
        return unavailable(error)


urlpatterns = [path("ask", ask), path("ask-async", ask_async)]

if __name__ == "__main__":
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)

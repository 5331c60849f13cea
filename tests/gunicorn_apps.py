"""The same small program in Flask and in Django, as gunicorn loads it: one chain, built before the workers are forked."""

from __future__ import annotations

import os
from typing import Any

from copilot_router import FailoverChain, OpenAIProvider, ProviderTier, RedisStore, SQLiteStore

THRESHOLD = 3
RECOVERY = 0.4


def made_chain() -> FailoverChain:
    """From the environment; asked once, so that what a fork hands on is connected and used."""
    kind, where = os.environ["TEST_STORE"].split(" ", 1)
    store: Any = SQLiteStore(where) if kind == "sqlite" else RedisStore(where, "gunicorn")
    key = "sk-test-gunicorn-key-1234567890"
    tiers = [
        ProviderTier("primary", OpenAIProvider(key, os.environ["TEST_PRIMARY"]), ["any"]),
        ProviderTier("secondary", OpenAIProvider(key, os.environ["TEST_SECONDARY"]), ["healthy"]),
    ]
    chain = FailoverChain(tiers, store=store, timeout=30.0, failure_threshold=THRESHOLD, recovery_timeout=RECOVERY)
    chain.chat("asked before the fork")
    return chain


def answer(chain: FailoverChain, prompt: str) -> dict[str, Any]:
    response = chain.chat(prompt)
    return {"text": response.text, "provider": response.provider, "pid": os.getpid()}


def flask_app() -> Any:
    import flask

    app, chain = flask.Flask(__name__), made_chain()

    @app.get("/ask/<prompt>")
    def ask(prompt: str) -> Any:
        return answer(chain, prompt)

    return app


def ask_in_django(request: Any, prompt: str) -> Any:
    from django.http import JsonResponse

    return JsonResponse(answer(_chains[0], prompt))


_chains: list[FailoverChain] = []
urlpatterns: list[Any] = []


def django_app() -> Any:
    import django
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.urls import path

    settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="of a test")
    django.setup(set_prefix=False)
    urlpatterns.append(path("ask/<prompt>", ask_in_django))
    _chains.append(made_chain())
    return get_wsgi_application()

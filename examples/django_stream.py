"""Django: show an answer while it is being written, or answer 503 if no provider can.

    export OPENAI_API_KEY=...
    gunicorn --chdir examples django_stream:application --worker-class gthread --threads 8
    curl -N -d question='Why is the sky blue?' localhost:8000/ask

``stream()`` returns when the first piece of text is there. Until then it goes on to the next
tier, and an error becomes a status of its own. Status 200 is sent only after that. If the
visitor leaves, Django closes the stream.

The settings are in this file so that it runs alone. In a project they are in settings.py, and
the rest is in views.py and urls.py.
"""

from __future__ import annotations

import functools
import math
import os

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

from copilot_router import (
    AllProvidersFailed,
    FailoverChain,
    LMStudioProvider,
    OpenAIProvider,
    ProviderTier,
)

if not settings.configured:
    settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["localhost", "127.0.0.1"])
    django.setup()


@functools.cache
def make_chain() -> FailoverChain:
    """One for each process, made at the first request."""
    return FailoverChain(
        [
            ProviderTier("local", LMStudioProvider()),  # LMSTUDIO_BASE_URL
            ProviderTier("cloud", OpenAIProvider(), [os.environ.get("OPENAI_MODEL", "gpt-6-luna")]),
        ]
    )


@csrf_exempt
def ask(request: HttpRequest) -> HttpResponseBase:
    try:
        stream = make_chain().stream(request.POST["question"], timeout=60)
    except AllProvidersFailed as error:
        wait = (
            {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
        )
        return JsonResponse({"error": "no answer at the moment"}, status=503, headers=wait)
    return StreamingHttpResponse(
        stream, content_type="text/plain; charset=utf-8", headers={"X-Accel-Buffering": "no"}
    )


urlpatterns = [path("ask", ask)]
application = get_wsgi_application()

"""A Celery task that keeps its time limit and is tried again when a provider is ready.

celery -A celery_task worker   # in the folder of this file, with CELERY_BROKER_URL set
python -c 'import celery_task as t; print(t.answer.delay("Why is the sky blue?").get())'
"""

from __future__ import annotations

import functools
import os
from typing import Any

from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from copilot_router import (
    AllProvidersFailed,
    FailoverChain,
    LMStudioProvider,
    OpenAIProvider,
    ProviderTier,
)

app = Celery(
    "celery_task",
    broker=os.environ.get("CELERY_BROKER_URL"),
    backend=os.environ.get("CELERY_RESULT_BACKEND"),
)


@functools.cache
def chain() -> FailoverChain:
    """One for each worker process, made at its first task."""
    return FailoverChain(
        [
            ProviderTier("local", LMStudioProvider()),
            ProviderTier("cloud", OpenAIProvider(), ["gpt-6-luna"]),
        ]
    )


@app.task(bind=True, soft_time_limit=60, time_limit=70, max_retries=5)
def answer(self: Any, question: str) -> dict[str, Any]:
    """The answer as JSON, for the result backend."""
    try:
        return chain().chat(question, timeout=50).to_dict()  # the chain's own deadline comes first
    except AllProvidersFailed as error:
        if error.retry_after is None:
            raise  # waiting will not help
        raise self.retry(exc=error, countdown=error.retry_after) from None
    except SoftTimeLimitExceeded:  # passes through a chain; no breaker counts it
        return {"content": None, "finish_reason": "out of time"}

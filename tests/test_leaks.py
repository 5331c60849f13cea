"""The watch over secrets, which is on during every test, sees what it is for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
HEAD = """
import logging, sys
import pytest
from copilot_router import *
key = "sk-test-" + "planted-key-1"
prompt = "the secret " + "question that was planted"
def chain(*script, **settings):
    return FailoverChain([ProviderTier("a", ScriptedProvider(script), ["m"])], **settings)
def shown_with_locals(messages):
    try:
        OpenAIProvider(key, "http://127.0.0.1:9/v1")._checked_call(messages, None, "m", {})
    except BadRequest:
        logging.getLogger("copilot_router").exception("planted")
"""
PLANTED = {
    "log_record": "logging.getLogger('copilot_router').debug('sent %s', key)",
    "traceback_of_a_log_record": "shown_with_locals([{'role': 'user', 'content': prompt}, 5])",
    "error": "pytest.raises(BadRequest, chain(BadRequest(f'cannot read {prompt}')).chat, 'x')",
    "cause_of_an_error": "pytest.raises(AllProvidersFailed, chain(ServerError(key), ServerError(key)).chat, 'x')",
    "attribute_of_an_error": "pytest.raises(BadRequest, chain(BadRequest('x', code=key)).chat, 'x')",
    "event": "chain('x')._emit('attempt', 'a', key, {})",
    "repr": "chain(LLMResponse('fine', model=prompt)).chat('x')",
    "stdout": "print('the key is', key)",
    "stderr": "print(prompt, file=sys.stderr)",
}
FINE = {
    "an_answer": "assert chain('the secret ' + 'answer').chat(prompt).content",
    "a_stream": "assert list(chain('the secret ' + 'answer').stream(prompt))",
    "a_foreign_error": "pytest.raises(AllProvidersFailed, chain(OSError(key)).chat, prompt)",
    "a_failure": "pytest.raises(ProviderError, OpenAIProvider(key, 'http://127.0.0.1:9').chat, prompt, model='m')",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a session of its own, under the same conftest.py: what it finds must not be found here."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "conftest.py").write_text((HERE / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    tests = [f"def test_{name}():\n    {body}\n" for name, body in (PLANTED | FINE).items()]
    (folder / "test_planted.py").write_text(HEAD + "".join(tests), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider", "-rA", "--tb=short", str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent)))},
        cwd=folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_leak_is_found(outcomes: str, name: str) -> None:
    """Wherever it is."""
    lines = [line for line in outcomes.splitlines() if f"::test_{name} - " in line]
    assert lines
    assert all(line.startswith(("FAILED ", "ERROR ")) and "eaked: " in line for line in lines)


@pytest.mark.parametrize("name", FINE)
def test_what_is_in_its_place_is_no_leak(outcomes: str, name: str) -> None:
    """A prompt, an answer and a key may be given; failures that are told well pass."""
    endings = [line.split()[0] for line in outcomes.splitlines() if f"::test_{name}" in line]
    assert endings == ["PASSED"]

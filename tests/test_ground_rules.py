"""The rules that conftest.py lays down hold: a suite that could reach out, or leak, would prove less."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
CONFTEST = (Path(__file__).parent / "conftest.py").read_text(encoding="utf-8")


def outcome(pytester: pytest.Pytester, body: str, **expected: int) -> str:
    """Run one test file under this conftest.py in a session of its own."""
    pytester.makeconftest(CONFTEST.replace("_GRACE = 5.0", "_GRACE = 0.01"))
    pytester.makepyfile(body)
    result = pytester.runpytest_inprocess("-p", "no:randomly", "-p", "no:cacheprovider")
    result.assert_outcomes(**expected)
    return str(result.stdout)


@pytest.mark.parametrize(
    "body",
    [
        "socket.create_connection(('192.0.2.1', 80), timeout=0.01)",
        "with socket.socket() as one: one.connect_ex(('192.0.2.1', 80))",
        "socket.getaddrinfo('example.org', 80)",
    ],
)
def test_reaching_out_fails_a_test_even_if_the_error_is_swallowed(pytester: pytest.Pytester, body: str) -> None:
    """Connecting or looking up a name beyond loopback is an error of the test, whatever the code does with it."""
    program = f"import socket\ndef test_it():\n    try:\n        {body}\n    except BaseException:\n        pass\n"
    assert "only loopback is allowed" in outcome(pytester, program, passed=1, errors=1)


def test_a_thread_left_behind_fails_a_test(pytester: pytest.Pytester) -> None:
    """The next test would meet it."""
    event = "import threading\nevent = threading.Event()\n"
    leak = "def test_it():\n    threading.Thread(target=event.wait, name='left', daemon=True).start()\n"
    after = "def test_next():\n    event.set()\n"
    assert "the thread left is still running" in outcome(pytester, event + leak + after, passed=2, errors=1)


def test_no_setting_of_the_person_reaches_a_test(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys, addresses and proxies are gone, in either case."""
    for name in ("OPENAI_API_KEY", "https_proxy", "HTTP_PROXY", "LMSTUDIO_BASE_URL", "NO_PROXY"):
        monkeypatch.setenv(name, "http://192.0.2.1:1")
    seen = "import os\ndef test_it():\n    assert not [name for name in os.environ if '192.0.2.1' in os.environ[name]]\n"
    outcome(pytester, seen, passed=1)
    assert os.environ["OPENAI_API_KEY"]  # put back afterwards


def test_loopback_and_names_that_cannot_exist_behave_as_ever() -> None:
    """Servers on loopback work; ``.invalid`` does not resolve, without anybody being asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        assert client.getpeername() == listener.getsockname()
    with pytest.raises(socket.gaierror):
        socket.getaddrinfo("nobody.invalid", 80)

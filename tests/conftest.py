"""No test reaches beyond this machine, and none sees the environment of the person who runs it."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

_real_connect = socket.socket.connect
_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "requests_ca_bundle", "curl_ca_bundle", "netrc")


def _local(address: Any) -> bool:
    return not isinstance(address, tuple) or address[0] in ("localhost", "::1", "") or address[0].startswith("127.")


def _connect(self: socket.socket, address: Any) -> None:
    if not _local(address):
        raise AssertionError(f"a test wants to connect to {address!r}: only loopback is allowed")
    _real_connect(self, address)


@pytest.fixture(autouse=True)
def _sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", _connect)
    for name in list(os.environ):
        if name.lower() in _VARIABLES or name.startswith(("OPENAI_", "LM_", "LMSTUDIO_", "ANTHROPIC_", "GEMINI_", "GOOGLE_")):
            monkeypatch.delenv(name)

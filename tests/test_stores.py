"""Breakers that share their state: in memory, in a SQLite file, in Redis, and in a store of the user's own.

The numbers are those of the scenario list that the breaker was designed against.
"""

from __future__ import annotations

from typing import Any

import pytest
from store_contract import Handles, StoreContract


class TestMemory(StoreContract):
    """In this process."""

    @pytest.fixture
    def handles(self, make_store: Any) -> Handles:
        return lambda: make_store("memory")


class TestSQLite(StoreContract):
    """In a file."""

    @pytest.fixture
    def handles(self, make_store: Any) -> Handles:
        return lambda: make_store("sqlite")


class TestRedis(StoreContract):
    """In a server."""

    @pytest.fixture
    def handles(self, make_store: Any) -> Handles:
        return lambda: make_store("redis", shared_counts=True)

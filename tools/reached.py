"""A plugin of pytest (``-p reached``) for tools/mutate.py: which test reaches what."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

#: Seconds: slower tests are not given to mutants.
SLOW = 8.0


class Notes:
    """Which test reaches which line of the module, and how long it takes."""

    def __init__(self, path: str) -> None:
        import coverage

        self.path = path
        self.times: dict[str, float] = {}
        include = ["*/copilot_router.py"]
        self.cover = coverage.Coverage(data_file=None, include=include, config_file=False)
        self.cover.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.cover.switch_context(item.nodeid)
        start = time.monotonic()
        yield
        self.times.setdefault(item.nodeid, time.monotonic() - start)
        self.cover.switch_context("")
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.times[report.nodeid] = 2 * SLOW  # it cannot tell a mutant from the module

    def pytest_sessionfinish(self) -> None:
        self.cover.stop()
        data = self.cover.get_data()
        (module,) = data.measured_files()
        times = {test: taken for test, taken in self.times.items() if taken < SLOW}
        notes = {"times": times, "lines": data.contexts_by_lineno(module)}
        Path(self.path).write_text(json.dumps(notes))


def pytest_configure(config: pytest.Config) -> None:
    if "MUTATE_NOTES" in os.environ:
        config.pluginmanager.register(Notes(os.environ["MUTATE_NOTES"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "MUTATE_ORDERS" in os.environ:  # only these tests, in this order
        found = {item.nodeid: item for item in items}
        orders = json.loads(Path(os.environ["MUTATE_ORDERS"]).read_text())
        items[:] = [found[name] for name in orders if name in found]

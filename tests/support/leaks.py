"""Whether a key, a prompt or an answer of the tests shows up where nobody should see it.

Watched during every test: all log records at DEBUG with their tracebacks, all events, everything that a chain or a provider
raises (text, repr, arguments, record, and the locals of the library's frames in its traceback), the reprs of answers, chains
and health, and at its end what the test printed.
"""

from __future__ import annotations

import functools
import logging
import re
import traceback
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any

import pytest

import copilot_router
from copilot_router import FailoverChain, RouterError

#: The tests' keys are called sk-test-…-key-…; their prompts and answers are called secret where they matter.
MARKS = re.compile(r"sk-test-\w+-key|\bsecret (?:prompt|question|answer)|the prompt of this test|This is the whole answer to")
#: Attributes that exist to hold what nobody else may see.
PRIVATE = ("partial", "response", "errors")  # errors are looked at one by one


class LeakWatch(logging.Handler):
    """Looks at everything the library says, and remembers where it said too much."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.looked = 0
        self.found: list[str] = []

    def look(self, text: str, where: str) -> None:
        self.looked += 1
        seen = MARKS.search(text)
        if seen:
            start = max(0, seen.start() - 60)
            self.found.append(f"{where}: {text[start : seen.end() + 20]!r}")

    def emit(self, record: logging.LogRecord) -> None:
        self.look(record.getMessage(), "a log record")
        if record.exc_info and record.exc_info[1] is not None:
            self.look_at_frames(record.exc_info[2], "a log record's traceback")

    def look_at_frames(self, trace: TracebackType | None, where: str) -> None:
        """The lines of a traceback, and the locals of those frames that are the library's or what it calls."""
        for frame, _ in traceback.walk_tb(trace):
            name = frame.f_code.co_filename
            if name == copilot_router.__file__ or any(part in name for part in ("/requests/", "/urllib3/", "/http/client")):
                for local, value in list(frame.f_locals.items()):
                    self.look(repr(value), f"{where}, {local} in {frame.f_code.co_name}()")

    def look_at_error(self, error: BaseException, where: str) -> None:
        """All that an error shows, and all that it wraps."""
        seen: list[BaseException] = []
        queue: list[Any] = [error]
        while queue:
            item = queue.pop()
            if not isinstance(item, BaseException) or any(item is known for known in seen):
                continue
            seen.append(item)
            if isinstance(item, RouterError):
                shown = {name: value for name, value in vars(item).items() if name not in PRIVATE}
                self.look(f"{item} {item!r} {item.args} {shown}", f"{type(item).__name__} from {where}")
                if isinstance(item, copilot_router.AllProvidersFailed):
                    self.look(item.explain(), f"explain() of {type(item).__name__}")
                queue += [item.__cause__, item.__context__, *getattr(item, "errors", ())]
            if isinstance(error, RouterError):
                self.look_at_frames(item.__traceback__, f"the traceback of {type(item).__name__} from {where}")

    def look_at_result(self, chain: Any, result: Any) -> None:
        self.look(repr(result), "the repr of an answer")
        if isinstance(chain, FailoverChain):
            self.look(f"{chain!r} {chain.tiers} {chain.health()}", "the repr of a chain")
        if isinstance(result, copilot_router.LLMResponse):
            self.look(result.explain(), "explain() of an answer")

    def wrapped(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, with a look at what it returns and raises."""

        @functools.wraps(method)
        def watched(owner: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                result = method(owner, *args, **kwargs)
            except RouterError as error:
                self.look_at_error(error, method.__qualname__)
                raise
            self.look_at_result(owner, result)
            return self.read(result, method.__qualname__) if type(result).__name__ == "generator" else result

        return watched

    def read(self, stream: Generator[str, None, Any], where: str) -> Generator[str, None, Any]:
        try:
            return (yield from stream)
        except RouterError as error:
            self.look_at_error(error, where)
            raise

    def filter(self, record: logging.LogRecord) -> bool:
        """As a filter of the logger: sees every record, and lets through what the test's own level lets through."""
        self.emit(record)
        return record.levelno >= logging.getLogger("copilot_router").getEffectiveLevel()

    def install(self, patch: pytest.MonkeyPatch, quiet: bool) -> None:
        """Watch until ``patch`` is undone. ``quiet``: leave it to the test how much is logged."""
        logger = logging.getLogger("copilot_router")
        patch.setattr(logger, "filters", [*logger.filters, self])
        if not quiet:
            patch.setattr(logger, "isEnabledFor", lambda level: True)  # and the level stays: nobody else need keep it all
        for kind, names in (
            (FailoverChain, ("chat", "stream", "check")),
            (copilot_router._HTTPProvider, ("chat", "stream", "ping")),
        ):
            for name in names:
                patch.setattr(kind, name, self.wrapped(kind.__dict__[name]))
        tell: Any = FailoverChain._emit

        def emit(chain: Any, kind: str, tier: str, model: str, data: dict[str, Any]) -> None:
            self.look(f"{tier} {model} {data}", f"the event {kind}")
            tell(chain, kind, tier, model, data)

        patch.setattr(FailoverChain, "_emit", emit)

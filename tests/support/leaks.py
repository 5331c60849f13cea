"""Whether a key, a prompt or an answer of the tests shows up where nobody should see it.

Watched during every test: log records at DEBUG with their tracebacks, events, everything that a
chain or a provider raises (text, repr, arguments, attributes, and the locals of the library's
frames in its traceback), the reprs of answers and chains, and at its end what the test printed.
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

#: The tests' keys are called sk-test-…-key-…; prompts and answers are called secret where they
#: matter.
MARKS = re.compile(
    r"(?i)sk-test-\w+-key|\bsecret (?:prompt|question|answer)|the prompt of this test|"
    r"This is the whole answer to")
#: Attributes that exist to hold what nobody else may see; errors are looked at one by one.
PRIVATE = ("partial", "response", "errors")
#: Parts of the names of files whose frames are looked at.
FRAMES = (copilot_router.__file__, "/requests/", "/urllib3/", "/http/client")
PROVIDERS = [name for name in copilot_router.__all__ if name.endswith("Provider")
             and name not in ("LLMProvider", "ScriptedProvider")]


class LeakWatch(logging.Handler):
    """Looks at everything the library says, and remembers where it said too much."""
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[str] = []

    def look(self, text: str, where: str) -> None:
        seen = MARKS.search(text)
        if seen:
            start = max(0, seen.start() - 60)
            self.found.append(f"{where}: {text[start : seen.end() + 20]!r}")

    def emit(self, record: logging.LogRecord) -> None:
        self.look(record.getMessage(), "a log record")
        if record.exc_info and record.exc_info[1] is not None:
            self.look_at_frames(record.exc_info[2], "a log record's traceback")

    def look_at_frames(self, trace: TracebackType | None, where: str) -> None:
        """The locals of those frames that are the library's or what it calls."""
        for frame, _ in traceback.walk_tb(trace):
            if any(part in frame.f_code.co_filename for part in FRAMES):
                for local, value in list(frame.f_locals.items()):
                    self.look(repr(value), f"{where}, {local} in {frame.f_code.co_name}()")

    def look_at_error(self, error: BaseException, where: str, frames: bool = False) -> None:
        """All that an error shows, and all that it wraps."""
        seen: list[BaseException] = []
        queue: list[Any] = [error]
        while queue:
            item = queue.pop()
            if not isinstance(item, BaseException) or any(item is known for known in seen):
                continue
            seen.append(item)
            name = type(item).__name__
            if isinstance(item, RouterError):
                shown = {key: value for key, value in vars(item).items() if key not in PRIVATE}
                self.look(f"{item} {item!r} {item.args} {shown}", f"{name} from {where}")
                if isinstance(item, copilot_router.AllProvidersFailed):
                    self.look(item.explain(), f"explain() of {name}")
            if frames or isinstance(item, RouterError):
                queue += [item.__cause__, item.__context__, *getattr(item, "errors", ())]
            if frames or isinstance(error, RouterError):
                self.look_at_frames(item.__traceback__, f"the traceback of {name} from {where}")

    def look_at_result(self, owner: Any, result: Any) -> None:
        self.look(repr(result), "the repr of an answer")
        if isinstance(owner, FailoverChain):
            self.look(f"{owner!r} {owner.tiers} {owner.health()}", "the repr of a chain")
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
            is_stream = type(result).__name__ == "generator"
            return self.read(result, method.__qualname__) if is_stream else result
        return watched

    def read(self, stream: Generator[str, None, Any], where: str) -> Generator[str, None, Any]:
        try:
            return (yield from stream)
        except RouterError as error:
            self.look_at_error(error, where)
            raise

    def listening(self, made: Callable[..., None]) -> Callable[..., None]:
        """A chain's ``__init__``, with a look at the events that a test listens to."""
        @functools.wraps(made)
        def init(chain: FailoverChain, *args: Any, **kwargs: Any) -> None:
            listener = kwargs.get("on_event")
            if callable(listener):
                def heard(event: Any) -> None:
                    self.look(repr(event), f"the event {event.kind}")
                    listener(event)
                kwargs["on_event"] = heard
            made(chain, *args, **kwargs)
        return init

    def filter(self, record: logging.LogRecord) -> bool:
        """Sees every record, and lets through what the test's own level lets through."""
        self.emit(record)
        return record.levelno >= logging.getLogger("copilot_router").getEffectiveLevel()

    def install(self, patch: pytest.MonkeyPatch, quiet: bool) -> None:
        """Watch until ``patch`` is undone. ``quiet``: leave it to the test how much is logged."""
        logger = logging.getLogger("copilot_router")
        patch.setattr(logger, "filters", [*logger.filters, self])
        if not quiet:
            patch.setattr(logger, "isEnabledFor", lambda level: True)  # the level itself stays
        watched = {(FailoverChain, name) for name in ("chat", "stream", "check")}
        for kind in (getattr(copilot_router, name) for name in PROVIDERS):
            for name in ("chat", "stream", "ping"):
                watched.add((next(base for base in kind.__mro__ if name in vars(base)), name))
        for owner, name in watched:
            patch.setattr(owner, name, self.wrapped(vars(owner)[name]))
        patch.setattr(FailoverChain, "__init__", self.listening(FailoverChain.__init__))

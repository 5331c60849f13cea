"""Mutation testing of copilot_router.py: break one thing at a time, and see that a test notices.

    python tests/mutate.py [--number 200] [--seed 1] [--jobs 2] [--map FILE] [--results FILE] [--write]

Broken are numbers, strings that are not meant for people, comparisons, conditions, arithmetic, results, statements and
arguments taken away or swapped; everywhere, or with --number in a sample, each line of code as likely as the next. Docstrings,
annotations and messages stay.

First the suite runs once and notes which test reaches which line. Then each mutant is given to the tests that reach its line,
of each file those first that reach little else, until one fails. What a module or class says once (a default, a table) is
reached by those tests that reach a function which uses its name, and by those that name it or its class themselves. Tests that
hold a broken text in their own code or id come before all others. A test that takes far longer than it usually does is cut
off; that is counted as a time-out, not as killed. A slow test has to fail twice: a busy machine might be the reason.

Starting pytest would take longer than most mutants live. So a few processes collect all tests once and fork for each mutant;
the child puts the new code into the functions that are already there. Where that does not do, pytest starts anew: what runs
at import, and what cannot be exchanged. Survivors are written to tests/mutants.md, also when Ctrl-C ends the run; a reason
given there is kept as long as the mutant stays the same.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import faulthandler
import gc
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "copilot_router.py"
REPORT = ROOT / "tests" / "mutants.md"
#: Seconds that a test may take under a mutant: so many times its usual time, and as much again for a busy machine.
TIMES, GRACE = 5, 10.0
#: Seconds (usual time) from which a test is slow; where so many quick ones reach a line, only so few slow ones are run.
SLOW, ENOUGH, FEW = 0.7, 15, 5
#: Seconds (usual time) of tests that one mutant is given at the most.
BUDGET = 8.0


# -- as a plugin of pytest (``-p mutate``): note what each test reaches, or run a list of tests


class Notes:
    """Which test reaches which line of the module, and how long it takes."""

    def __init__(self, path: str) -> None:
        import coverage

        self.path = path
        self.times: dict[str, float] = {}
        self.cover = coverage.Coverage(data_file=None, include=["*/copilot_router.py"], config_file=False)
        self.cover.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.cover.switch_context(item.nodeid)
        start = time.monotonic()
        try:
            return (yield)
        finally:
            self.times[item.nodeid] = time.monotonic() - start
            self.cover.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.times[report.nodeid] = -1.0

    def pytest_sessionfinish(self) -> None:
        self.cover.stop()
        data = self.cover.get_data()
        (module,) = data.measured_files()
        times = {test: taken for test, taken in self.times.items() if taken >= 0}
        Path(self.path).write_text(json.dumps({"times": times, "lines": data.contexts_by_lineno(module)}))


class Orders:
    """Only these tests, in this order, each with its limit; the first failure's name goes to a file."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.limits: dict[str, float] = json.loads(self.path.read_text())
        self.late = self.path.with_suffix(".late").open("w")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = {item.nodeid: item for item in items}
        items[:] = [found[name] for name in self.limits if name in found]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        faulthandler.dump_traceback_later(self.limits[item.nodeid], exit=True, file=self.late)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.path.with_suffix(".failed").write_text(report.nodeid)


#: The functions of the module by their place in it.
Functions = dict[tuple[str, ...], list[FunctionType]]


def codes_of(code: CodeType, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], CodeType]]:
    """All code in a module with its place: names from the outside in, each with a number."""
    counts: Counter[str] = Counter()
    for part in code.co_consts:
        if isinstance(part, CodeType):
            counts[part.co_name] += 1
            place = (*path, f"{part.co_name}-{counts[part.co_name]}")
            yield place, part
            yield from codes_of(part, place)


def functions_of(module: ModuleType) -> Functions:
    """Those that are there after the import; functions inside of functions come with those around them."""
    source = Path(module.__file__ or "").read_text()
    places = {code: place for place, code in codes_of(compile(source, "module", "exec"))}
    functions: Functions = defaultdict(list)
    for thing in gc.get_objects():
        if isinstance(thing, FunctionType) and thing.__code__.co_filename == module.__file__:
            functions[places[thing.__code__]].append(thing)
    return functions


def exchange(functions: Functions, module: ModuleType, source: str) -> bool:
    """Give the functions the code of this source. False if that cannot be done."""
    codes = dict(codes_of(compile(source, module.__file__ or "", "exec")))
    try:
        for place, those in functions.items():
            for function in those:
                function.__code__ = codes[place]
    except (KeyError, ValueError):
        return False
    for thing in list(vars(module).values()):
        if hasattr(thing, "cache_clear"):
            thing.cache_clear()
    return True


class Nursery:
    """Collects all tests once. Then, for each order, a child that has the mutant's code and runs the tests that it names.

    An order is a line of JSON: the tests with their limits. The mutant is in the module's file by then. The answer is a line
    as well: killed (and by which test), survived, timed out, or impossible if the code cannot be put into place.
    """

    def __init__(self, descriptors: str) -> None:
        orders, answers = map(int, descriptors.split())
        self.orders, self.answers = os.fdopen(orders), os.fdopen(answers, "w")
        self.late = Path("late").open("w")  # noqa: SIM115 - for as long as the process lives
        self.failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        functions = functions_of(sys.modules["copilot_router"])
        gc.collect()
        gc.freeze()
        print("ready", file=self.answers, flush=True)
        for order in self.orders:
            tests = [(items[name], limit) for name, limit in json.loads(order).items() if name in items]
            print(self.verdict(functions, tests), file=self.answers, flush=True)
        return True

    def verdict(self, functions: Functions, tests: list[tuple[pytest.Item, float]]) -> str:
        said = Path("said")
        said.write_text("timed out")
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                said.write_text(self.run(functions, tests))
            finally:
                os._exit(0)
        limit = time.monotonic() + 60 + sum(limit for _, limit in tests) / 2
        while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < limit:
            time.sleep(0.002)
        kill_group(child)  # and what it has started
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
        return said.read_text()

    def run(self, functions: Functions, tests: list[tuple[pytest.Item, float]]) -> str:
        module = sys.modules["copilot_router"]
        if not exchange(functions, module, Path(module.__file__ or "").read_text()):
            return "impossible"
        for at, (item, limit) in enumerate(tests):
            faulthandler.dump_traceback_later(limit, exit=True, file=self.late)
            following = tests[at + 1][0] if at + 1 < len(tests) else None
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            faulthandler.cancel_dump_traceback_later()
            if self.failed:
                return f"killed {self.failed}"
        return "survived"


def kill_group(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def pytest_configure(config: pytest.Config) -> None:
    for name, plugin in (("MUTATE_NOTES", Notes), ("MUTATE_ORDERS", Orders), ("MUTATE_NURSERY", Nursery)):
        if name in os.environ:
            config.pluginmanager.register(plugin(os.environ[name]))


# -- the mutants


class Mutant(NamedTuple):
    kind: str
    start: int  #: offsets in the source, in bytes
    end: int
    text: str  #: what stands there instead
    line: int
    lines: tuple[int, ...]  #: whose tests see it: those of the smallest statement around it
    name: str  #: of the function or class
    inside: bool  #: of a function's body
    used: str = ""  #: outside of functions: the name that the statement gives a value


COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "*"), ast.Pow: ("**", "*"), ast.BitOr: ("|", "&"), ast.BitAnd: ("&", "|"),
}  # fmt: skip
SWAPS = {"min": "max", "max": "min", "any": "all", "all": "any"}
#: A call whose texts are for people: errors, logs, help, and names that go into messages.
TELLING = re.compile(
    r"(Error|Response|Request|Failed|Filtered|Limited|Unavailable|Timeout|Open|Option|Model|Interrupted)$|"
    r"^(log|warn|warning|info|debug|error|exception|print|add_argument|add_parser|ArgumentParser|command)$|"
    r"^_(number|object|items|functions|conversation|parts|json|joined|transport_error|tell)$"
)

FOR_PEOPLE = ("help", "metavar", "description", "epilog")


class Finder(ast.NodeVisitor):
    """All mutants of a source."""

    def __init__(self, source: str) -> None:
        self.source = source.encode()
        self.offsets = [0]
        for line in self.source.splitlines(keepends=True):
            self.offsets.append(self.offsets[-1] + len(line))
        self.found: list[Mutant] = []
        self.names: list[str] = []
        self.body: tuple[int, ...] = ()  #: lines of the function around
        self.lines: tuple[int, ...] = ()
        self.used = ""
        self.visit(ast.parse(source))

    def start(self, node: ast.AST) -> int:
        return self.offsets[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def end(self, node: ast.AST) -> int:
        return self.offsets[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def code(self, node: ast.AST) -> str:
        return self.source[self.start(node) : self.end(node)].decode()

    def add(self, kind: str, node: ast.AST, text: str, span: tuple[int, int] | None = None) -> None:
        start, end = span or (self.start(node), self.end(node))
        line = self.source.count(b"\n", 0, start) + 1
        self.found.append(Mutant(kind, start, end, text, line, self.lines, ".".join(self.names), bool(self.body), self.used))

    def operator(self, kind: str, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        start, end = self.end(left), self.start(right)
        between = self.source[start:end].decode()
        if between.count(old) == 1 and "#" not in between:
            self.add(kind, left, between.replace(old, new), (start, end))

    # statements

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            before = self.lines, self.used
            last = node.body[0].lineno - 1 if getattr(node, "body", None) else node.end_lineno
            self.lines = tuple(range(node.lineno, max(node.lineno, last or 0) + 1))
            if not self.body:
                targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
                self.used = next((t.id for t in targets if isinstance(t, ast.Name)), "")
            self.statement(node)
            super().generic_visit(node)
            self.lines, self.used = before
        else:
            super().generic_visit(node)

    def statement(self, node: ast.stmt) -> None:
        call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        kept = isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name) and self.body
        if call or kept or isinstance(node, (ast.AugAssign, ast.Delete, ast.Raise, ast.Break, ast.Continue)):
            self.add("statement removed", node, "pass")
        elif isinstance(node, ast.Return) and node.value is not None and self.code(node.value) != "None":
            self.add("result", node.value, "None")
        if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
            old, new = ARITHMETIC[type(node.op)]
            self.operator("arithmetic", node.target, node.value, old + "=", new + "=")
        if isinstance(node, (ast.If, ast.While)):
            self.add("condition", node.test, f"not ({self.code(node.test)})")

    def visit_If(self, node: ast.If) -> None:
        if self.code(node.test) not in ("TYPE_CHECKING", '__name__ == "__main__"'):
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not (isinstance(node.targets[0], ast.Name) and node.targets[0].id in ("__all__", "__version__", "__slots__", "T")):
            self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        node.annotation = ast.Name("_", lineno=node.lineno, end_lineno=node.lineno, col_offset=0, end_col_offset=0)
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names.append(node.name)
        for part in node.body:
            self.visit(part)
        self.names.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if any("abstractmethod" in self.code(mark) for mark in node.decorator_list):
            return
        before = self.body, self.lines, self.used
        self.names.append(node.name)
        lines = tuple(range(node.body[0].lineno, (node.end_lineno or 0) + 1))
        self.body, self.lines, self.used = (), lines, ""  # a default is no part of the body: it is made when the module runs
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        self.body = lines
        for part in node.body:
            self.visit(part)
        self.body, self.lines, self.used = before
        self.names.pop()

    # expressions

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.add("constant", node, str(not value))
        elif isinstance(value, (int, float)):
            self.add("constant", node, str(value * 2 if isinstance(value, float) and value else value + 1))
        elif isinstance(value, str) and self.code(node)[:1] in "\"'r" and not (len(value) > 30 and " " in value):
            quote = self.code(node).index('"' if '"' in self.code(node) else "'") + 1
            if not self.code(node).lstrip("r").startswith(('"""', "'''")):
                self.add("string", node, self.code(node)[:quote] + "XX" + self.code(node)[quote:])

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Its parts have no true positions before Python 3.12."""

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            old, new = COMPARISONS[type(op)]
            self.operator("comparison", left, right, old, new)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.operator("condition", left, right, f" {old} ", f" {new} ")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self.add("condition", node, f"({self.code(node.operand)})")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.add("condition", node.test, f"not ({self.code(node.test)})")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        texts = any(isinstance(side, ast.JoinedStr) or isinstance(getattr(side, "value", None), str)
                    for side in (node.left, node.right))  # fmt: skip
        if type(node.op) in ARITHMETIC and not texts:
            self.operator("arithmetic", node.left, node.right, *ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in ("cast", "TypeVar", "isinstance", "NamedTuple"):
            return
        if name in SWAPS:
            self.add("call", node.func, SWAPS[name])
        plain = [part for part in node.args if not isinstance(part, ast.Starred)]
        if len(plain) == len(node.args) >= 2 and name not in ("min", "max"):
            first, second = plain[:2]
            text = self.code(second) + self.source[self.end(first) : self.start(second)].decode() + self.code(first)
            self.add("arguments swapped", node, text, (self.start(first), self.end(second)))
        for before, word in zip([*node.args, *node.keywords], [*node.args[1:], *node.keywords], strict=False):
            if isinstance(word, ast.keyword) and word.arg and word.arg not in FOR_PEOPLE:
                self.add("argument removed", word, "", (self.end(before), self.end(word)))
        if TELLING.search(name):
            words = [part for part in node.args if isinstance(part, ast.Constant)]
            node.args = [part for part in node.args if part not in words]
            node.keywords = [word for word in node.keywords if word.arg not in FOR_PEOPLE]
        self.generic_visit(node)


def mutants_of(source: str) -> list[Mutant]:
    """Those that are Python, and another program."""
    return [mutant for mutant in Finder(source).found if mutant.text != source.encode()[mutant.start : mutant.end].decode()]


def mutated(source: str, mutant: Mutant) -> str:
    data = source.encode()
    return (data[: mutant.start] + mutant.text.encode() + data[mutant.end :]).decode()


def compiles(source: str, mutant: Mutant) -> bool:
    try:
        compile(mutated(source, mutant), "mutant", "exec")
    except SyntaxError:
        return False
    return True


def all_of(source: str) -> list[Mutant]:
    """In an order that tells early how it will end."""
    found = mutants_of(source)
    return random.Random(0).sample(found, len(found))


def sample(source: str, number: int, seed: int) -> list[Mutant]:
    """Each line as likely as the next."""
    by_line: dict[int, list[Mutant]] = defaultdict(list)
    for mutant in mutants_of(source):
        by_line[mutant.line].append(mutant)
    chance = random.Random(seed)
    drawn = (chance.choice(by_line[line]) for line in chance.sample(sorted(by_line), len(by_line)))
    return list(itertools.islice(drawn, number))


# -- running them


class Suite:
    """The tests, by the lines that they reach."""

    def __init__(self, source: str, notes: dict[str, Any], budget: float) -> None:
        self.source = source.encode()
        self.budget = budget
        self.times: dict[str, float] = notes["times"]
        self.reached = {int(line): set(tests) & set(self.times) for line, tests in notes["lines"].items()}
        self.imports = {int(line) for line, tests in notes["lines"].items() if "" in tests}  #: also run without any test
        self.breadth = Counter(test for tests in self.reached.values() for test in tests)
        self.uses: dict[str, set[int]] = defaultdict(set)
        self.mentions = mentions_of(self.times)
        tree = ast.parse(source)
        inside: set[ast.AST] = set()
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                for part in function.body:
                    inside |= set(ast.walk(part))
                for default in filter(None, (*function.args.defaults, *function.args.kw_defaults)):
                    for name, _ in self.names(default):  # the default of an argument: whoever calls the function
                        self.uses[name] |= set(range(function.body[0].lineno, (function.end_lineno or 0) + 1))
        for node in inside:
            for name, line in self.names(node, deep=False):
                self.uses[name].add(line)
        for _ in range(3):  # one constant may be made of others
            for node in ast.walk(tree):
                if isinstance(node, (ast.Assign, ast.AnnAssign)) and node not in inside and node.value is not None:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    for name, _ in self.names(node.value):
                        for target, _ in (found for part in targets for found in self.names(part)):
                            self.uses[name] |= self.uses[target]

    @staticmethod
    def names(node: ast.AST, deep: bool = True) -> Iterator[tuple[str, int]]:
        for part in ast.walk(node) if deep else [node]:
            name = getattr(part, "id", getattr(part, "attr", None))
            if isinstance(name, str):
                yield name, part.lineno  # type: ignore[attr-defined]

    def of(self, mutant: Mutant) -> list[str]:
        """The tests that could notice it: of each file in turn the most special one that is left, as many as time allows."""
        lines = self.uses[mutant.used] if mutant.used else mutant.lines
        tests = set().union(*(self.reached.get(line, set()) for line in lines))
        named = set() if mutant.inside else self.mentions[mutant.used] | self.mentions[mutant.name.rpartition(".")[2]]
        tests |= named
        text = self.source[mutant.start : mutant.end].decode().strip("r\"'")
        if mutant.kind == "string" and len(text) > 2:
            named = {test for test in tests if text in test} | self.mentions[text] & tests or named
        turns: Counter[str] = Counter()
        ordered: list[tuple[bool, bool, int, int, str]] = []
        for test in sorted(tests, key=lambda test: (test not in named, self.breadth[test], self.times[test], test)):
            file = test.partition("::")[0]
            ordered.append((test not in named, self.times[test] > SLOW / 5, turns[file], self.breadth[test], test))
            turns[file] += 1
        quick = [test for *_, test in sorted(ordered) if self.times[test] < SLOW]
        slow = sorted(tests - set(quick), key=lambda test: self.times[test])
        chosen: list[str] = []
        total = 0.0
        for test in quick + (slow[:FEW] if len(quick) >= ENOUGH else slow):
            total += self.times[test]
            if total > self.budget and chosen:
                break
            chosen.append(test)
        return chosen


def mentions_of(tests: Iterable[str]) -> dict[str, set[str]]:
    """Which tests have a word in their own code."""
    by_function: dict[str, set[str]] = defaultdict(set)
    for test in tests:
        by_function[test.partition("[")[0]].add(test)
    found: dict[str, set[str]] = defaultdict(set)
    for path in {test.partition("::")[0] for test in tests}:
        text = (ROOT / path).read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                for word in set(re.findall(r"\w+", ast.get_source_segment(text, node) or "")):
                    found[word] |= by_function.get(f"{path}::{node.name}", set())
    return found


def copy_of_the_tree(where: Path) -> Path:
    shutil.copytree(ROOT, where, ignore=shutil.ignore_patterns(".venv*", "*.egg-info", ".git", "dist", "build", ".*_cache",
                                                               ".hypothesis", "__pycache__"))  # fmt: skip
    return where


QUIET: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL) | {"start_new_session": True}


def environment(tree: Path, **variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **variables}  # fmt: skip


def command_with(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "mutate", "-p", "no:cacheprovider", *arguments]


def run_tests(tree: Path, arguments: list[str], limit: float, **variables: str) -> int | None:
    """Its exit status, None if it had to be killed. Nothing that it started survives."""
    process = subprocess.Popen(command_with(*arguments), cwd=tree, env=environment(tree, **variables), **QUIET)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        kill_group(process.pid)
        process.wait()


class Tree:
    """A copy of the tree, for one mutant at a time, with a nursery in it that is started when it is first needed."""

    def __init__(self, path: Path, suite: Suite) -> None:
        self.path, self.suite = copy_of_the_tree(path), suite
        self.nursery: subprocess.Popen[bytes] | None = None

    def verdict(self, source: str, mutant: Mutant) -> tuple[str, str]:
        """killed, survived or timed out, and the test that it is owed to, or how many there were."""
        if not compiles(source, mutant):
            return "no Python", ""
        tests = self.suite.of(mutant)
        if not tests:
            return "survived", "no test reaches it"
        (self.path / MODULE.name).write_text(mutated(source, mutant))
        if mutant.used or not mutant.inside:
            return self.sure(tests, self.anew)
        said, detail = self.sure(tests, self.forked)
        if said == "impossible" or (said == "survived" and self.suite.imports & set(mutant.lines)):
            return self.sure(tests, self.anew)
        return said, detail

    def sure(self, tests: list[str], run: Callable[[list[str]], tuple[str, str]]) -> tuple[str, str]:
        said, name = run(tests)
        slow = said == "killed" and self.suite.times.get(name, 0.0) >= SLOW and len(tests) > 1
        if slow and run([name])[0] == "survived":  # it was chance
            return self.sure([test for test in tests if test != name], run)
        return said, name if said == "killed" else f"{len(tests)} tests"

    def limits(self, tests: list[str]) -> str:
        return json.dumps({test: self.suite.times[test] * TIMES + GRACE for test in tests})

    def forked(self, tests: list[str]) -> tuple[str, str]:
        """By a child of the nursery."""
        if self.nursery is None or self.nursery.poll() is not None:
            self.start()
        print(self.limits(tests), file=self.orders, flush=True)
        said = self.answers.readline().strip() or "timed out"
        return ("killed", said.removeprefix("killed ")) if said.startswith("killed ") else (said, "")

    def start(self) -> None:
        theirs, orders = os.pipe()
        answers, mine = os.pipe()
        self.nursery = subprocess.Popen(
            command_with("--basetemp", str(self.path / "tmp"), "--ignore=tests/test_packaging.py"), cwd=self.path,
            env=environment(self.path, MUTATE_NURSERY=f"{theirs} {mine}"), pass_fds=(theirs, mine), **QUIET,
        )  # fmt: skip
        os.close(theirs)
        os.close(mine)
        self.orders, self.answers = os.fdopen(orders, "w"), os.fdopen(answers)
        self.answers.readline()

    def close(self) -> None:
        if self.nursery is not None:
            kill_group(self.nursery.pid)
            self.nursery.wait()
            self.orders.close()
            self.answers.close()

    def anew(self, tests: list[str]) -> tuple[str, str]:
        """By a pytest of its own."""
        orders = self.path / "orders.json"
        failed, late = orders.with_suffix(".failed"), orders.with_suffix(".late")
        failed.unlink(missing_ok=True)
        late.unlink(missing_ok=True)
        orders.write_text(self.limits(tests))
        files = sorted({test.partition("::")[0] for test in tests})
        limit = 60 + sum(self.suite.times[test] for test in tests) * TIMES
        status = run_tests(self.path, ["-x", *files], limit, MUTATE_ORDERS=str(orders))
        if status is None or (late.exists() and late.stat().st_size):
            return "timed out", ""
        if status == 0:
            return "survived", ""
        return "killed", failed.read_text() if failed.exists() else "it cannot be imported"


def notes_of(source: str, path: Path, work: Path) -> dict[str, Any]:
    """Which test reaches which line: from a file, or by running the suite."""
    if not path.exists():
        tree = copy_of_the_tree(work / "notes")
        print("the suite, to see which test reaches which line …", flush=True)
        status = run_tests(tree, ["--ignore=tests/test_packaging.py"], 3600, MUTATE_NOTES=str(path))
        if status not in (0, 1):
            sys.exit(f"the suite could not be run: status {status}")
    return json.loads(path.read_text())  # type: ignore[no-any-return]


# -- telling


def change(source: str, mutant: Mutant) -> str:
    """What distinguishes a mutant, without its line, since that moves."""
    first, last = source.encode().rfind(b"\n", 0, mutant.start) + 1, source.encode().find(b"\n", mutant.end)
    old = source.encode()[first:last].decode().splitlines()
    new = mutated(source, mutant).encode()[first : last + len(mutant.text.encode()) - (mutant.end - mutant.start)].decode()
    lines = list(difflib.unified_diff(old, new.splitlines(), lineterm="", n=0))[3:]
    was, now = (" ⏎ ".join(line[1:].strip() for line in lines if line.startswith(mark)) for mark in "-+")
    return f"`{mutant.name or 'module'}`, {mutant.kind}: `{was}` → `{now}`"


def reasons() -> dict[str, str]:
    """What mutants.md says of each mutant."""
    text = REPORT.read_text() if REPORT.exists() else ""
    return dict(re.findall(r"^- (.*) \(line \d+[^()]*\)\n  (.*)$", text, re.MULTILINE))


UNKNOWN = "No reason given yet."


def report(source: str, results: list[Result], what: str) -> str:
    known = reasons()
    text = [f"# Mutants that no test noticed\n\n{what}\n"]
    for word in ("survived", "timed out"):
        text.append(f"## {word.capitalize()}\n")
        text += [f"- {result.change} (line {result.line}, {result.detail})\n  {known.get(result.change, UNKNOWN)}"
                 for result in sorted(results, key=lambda result: result.line) if result.said == word]  # fmt: skip
        text[-1] += "\n"
    return "\n".join(text)


class Result(NamedTuple):
    change: str
    line: int
    said: str  #: killed, survived or timed out
    detail: str


def main() -> None:
    parser = argparse.ArgumentParser(description="Break the module in one place at a time, and see that a test notices.")
    parser.add_argument("--number", type=int, help="mutants in a sample (all of them)")
    parser.add_argument("--seed", type=int, default=1, help="another number draws another sample (1)")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (2)")
    parser.add_argument("--map", type=Path, help="keep here which test reaches which line, and use it if it is there")
    parser.add_argument("--results", type=Path, help="keep the results here, and go on where a stopped run was")
    parser.add_argument("--again", action="store_true", help="give what survived by --results four times the tests")
    parser.add_argument("--write", action="store_true", help="write the survivors to tests/mutants.md")
    options = parser.parse_args()
    source = MODULE.read_text()
    known: dict[tuple[str, int], Result] = {}
    if options.results and options.results.exists():
        found = (Result(*json.loads(line)) for line in options.results.read_text().splitlines())
        known = {(result.change, result.line): result for result in found}
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        work = Path(name)
        notes = notes_of(source, options.map.resolve() if options.map else work / "map.json", work)
        suite = Suite(source, notes, BUDGET * 4 if options.again else BUDGET)
        chosen = sample(source, options.number, options.seed) if options.number else all_of(source)
        trees: Queue[Tree] = Queue()
        for number in range(options.jobs):
            trees.put(Tree(work / str(number), suite))

        def run(mutant: Mutant) -> Result:
            what = change(source, mutant)
            before = known.get((what, mutant.line))
            if before and not (options.again and before.said == "survived"):
                return before
            tree = trees.get()
            begin = time.monotonic()
            try:
                said, detail = tree.verdict(source, mutant)
            finally:
                trees.put(tree)
            result = Result(what, mutant.line, said, detail)
            print(f"{said:9} {time.monotonic() - begin:4.1f} s  line {mutant.line} {what} ({detail})", flush=True)
            if options.results:
                with options.results.open("a") as file:
                    print(json.dumps(result), file=file)
            return result

        results: list[Result] = []
        try:
            with ThreadPoolExecutor(options.jobs) as pool:
                for result in pool.map(run, chosen):
                    if result.said != "no Python":
                        results.append(result)
        except KeyboardInterrupt:
            print("stopped; this is how far it came")
        while not trees.empty():
            trees.get().close()
    counts = Counter(result.said for result in results)
    share = counts["killed"] / len(results)
    what = (f"{len(results)} mutants of {len(mutants_of(source))} places: {counts['killed']} killed ({share:.1%}), "
            f"{counts['survived']} survived, {counts['timed out']} timed out, which is not counted as killed.")  # fmt: skip
    print(what)
    if options.write:
        REPORT.write_text(report(source, results, what))
    sys.exit(share < 0.9)


if __name__ == "__main__":
    main()

"""Mutation testing of copilot_router.py: break one thing at a time, and see that a test notices.

    python tests/mutate.py [--number 200] [--seed 1] [--jobs 2] [--map FILE] [--write] [--again]

A sample is drawn, each line of code as likely as the next: numbers, strings that are not meant for people, comparisons,
conditions, arithmetic, results, statements and arguments taken away or swapped. Docstrings, annotations and messages stay.
First the suite runs once and notes which test reaches which line. Then each mutant is run, in a copy of the tree, by the tests
that reach its line, the quickest of each file first, until one fails. What a module or class says once (a default, a table) is
reached by those tests that reach a function which uses its name. A test that takes far longer than it usually does is cut off;
that is counted as a time-out, not as killed. A slow test has to fail twice: a busy machine might be the reason.
Survivors are written to tests/mutants.md; a reason given there is kept as long as the mutant stays the same.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import faulthandler
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
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
BUDGET = 60.0


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


def pytest_configure(config: pytest.Config) -> None:
    for name, plugin in (("MUTATE_NOTES", Notes), ("MUTATE_ORDERS", Orders)):
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
        self.found.append(Mutant(kind, start, end, text, line, self.lines, ".".join(self.names), self.used))

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
        self.body = self.lines = tuple(range(node.body[0].lineno, (node.end_lineno or 0) + 1))
        self.used = ""
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
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


def sample(source: str, number: int, seed: int) -> list[Mutant]:
    """Each line as likely as the next."""
    by_line: dict[int, list[Mutant]] = defaultdict(list)
    for mutant in mutants_of(source):
        by_line[mutant.line].append(mutant)
    chance = random.Random(seed)
    chosen: list[Mutant] = []
    for line in chance.sample(sorted(by_line), len(by_line)):
        mutant = chance.choice(by_line[line])
        try:
            compile(mutated(source, mutant), "mutant", "exec")
        except SyntaxError:
            continue
        chosen.append(mutant)
        if len(chosen) == number:
            break
    return chosen


# -- running them


class Suite:
    """The tests, by the lines that they reach."""

    def __init__(self, source: str, notes: dict[str, Any]) -> None:
        self.times: dict[str, float] = notes["times"]
        self.reached = {int(line): set(tests) & set(self.times) for line, tests in notes["lines"].items()}
        self.uses: dict[str, set[int]] = defaultdict(set)
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
        """The tests that could notice it: of each file in turn the quickest that is left, as many as time allows."""
        lines = self.uses[mutant.used] if mutant.used else mutant.lines
        tests = set().union(*(self.reached.get(line, set()) for line in lines))
        turns: Counter[str] = Counter()
        ordered: list[tuple[int, float, str]] = []
        for test in sorted(tests, key=lambda test: self.times[test]):
            file = test.partition("::")[0]
            ordered.append((turns[file], self.times[test], test))
            turns[file] += 1
        quick = [test for _, taken, test in sorted(ordered) if taken < SLOW]
        slow = sorted(tests - set(quick), key=lambda test: self.times[test])
        chosen: list[str] = []
        total = 0.0
        for test in quick + (slow[:FEW] if len(quick) >= ENOUGH else slow):
            total += self.times[test]
            if total > BUDGET and chosen:
                break
            chosen.append(test)
        return chosen


def copy_of_the_tree(where: Path) -> Path:
    shutil.copytree(ROOT, where, ignore=shutil.ignore_patterns(".venv*", "*.egg-info", ".git", "dist", "build", ".*_cache",
                                                               ".hypothesis", "__pycache__"))  # fmt: skip
    return where


def run_tests(tree: Path, arguments: list[str], limit: float, **variables: str) -> int | None:
    """Its exit status, None if it had to be killed. Nothing that it started survives."""
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}",
                   "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **variables}  # fmt: skip
    for stale in (tree / "__pycache__").glob("copilot_router.*"):
        stale.unlink()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "mutate", "-p", "no:cacheprovider", *arguments]
    process = subprocess.Popen(command, cwd=tree, env=environment, start_new_session=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def verdict(tree: Path, suite: Suite, tests: list[str]) -> tuple[str, str]:
    """killed, survived or timed out, and the test that it is owed to."""
    if not tests:
        return "survived", "no test reaches it"
    orders = tree / "orders.json"
    failed, late = orders.with_suffix(".failed"), orders.with_suffix(".late")
    failed.unlink(missing_ok=True)
    late.unlink(missing_ok=True)
    orders.write_text(json.dumps({test: suite.times[test] * TIMES + GRACE for test in tests}))
    files = sorted({test.partition("::")[0] for test in tests})
    limit = 60 + sum(suite.times[test] for test in tests) * TIMES
    status = run_tests(tree, ["-x", *files], limit, MUTATE_ORDERS=str(orders))
    if status is None or (late.exists() and late.stat().st_size):
        return "timed out", ""
    if status == 0:
        return "survived", f"{len(tests)} tests"
    name = failed.read_text() if failed.exists() else ""
    if suite.times.get(name, 0.0) >= SLOW and len(tests) > 1:  # once more, by itself; and if it was chance, the others
        again, _ = verdict(tree, suite, [name])
        if again == "survived":
            return verdict(tree, suite, [test for test in tests if test != name])
    return "killed", name or "it cannot be imported"


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


def difference(source: str, mutant: Mutant) -> str:
    lines = difflib.unified_diff(source.splitlines(), mutated(source, mutant).splitlines(), lineterm="", n=0)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def reasons() -> dict[str, str]:
    """What mutants.md says of each mutant."""
    if not REPORT.exists():
        return {}
    found = re.findall(r"```diff\n(.*?)\n```\n\n(.*?)\n(?=\n#|\Z)", REPORT.read_text(), re.DOTALL)
    return {diff: text.strip() for diff, text in found}


def report(source: str, results: list[tuple[Mutant, str, str]], seed: int) -> str:
    counts = {word: sum(1 for _, said, _ in results if said == word) for word in ("killed", "survived", "timed out")}
    head = ", ".join(f"{count} {word}" for word, count in counts.items())
    known = reasons()
    text = [f"# Mutants that no test noticed\n\nOf {len(results)} mutants (seed {seed}) of {len(source.splitlines())} lines: "
            f"{head}. `make mutate` draws another sample with `SEED=…`.\n"]  # fmt: skip
    for word in ("survived", "timed out"):
        text.append(f"## {word.capitalize()}\n")
        for mutant, said, detail in sorted(results, key=lambda result: result[0].line):
            if said == word:
                diff = difference(source, mutant)
                title = f"Line {mutant.line}, {mutant.name or 'module'}: {mutant.kind}"
                text.append(f"### {title}{f' ({detail})' if detail else ''}\n\n"
                            f"```diff\n{diff}\n```\n\n{known.get(diff, 'No reason given yet.')}\n")  # fmt: skip
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Break the module in one place at a time, and see that a test notices.")
    parser.add_argument("--number", type=int, default=200, help="mutants (200)")
    parser.add_argument("--seed", type=int, default=1, help="another number draws another sample (1)")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (2)")
    parser.add_argument("--map", type=Path, help="keep here which test reaches which line, and use it if it is there")
    parser.add_argument("--again", action="store_true", help="run only those that mutants.md lists; the others were killed")
    parser.add_argument("--write", action="store_true", help="write the survivors to tests/mutants.md")
    options = parser.parse_args()
    source = MODULE.read_text()
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        work = Path(name)
        suite = Suite(source, notes_of(source, options.map.resolve() if options.map else work / "map.json", work))
        chosen = sample(source, options.number, options.seed)
        trees: Queue[Path] = Queue()
        for number in range(options.jobs):
            trees.put(copy_of_the_tree(work / str(number)))

        listed = reasons()

        def run(mutant: Mutant) -> tuple[Mutant, str, str]:
            if options.again and difference(source, mutant) not in listed:
                return mutant, "killed", "before"
            tree = trees.get()
            begin = time.monotonic()
            try:
                (tree / MODULE.name).write_text(mutated(source, mutant))
                said, detail = verdict(tree, suite, suite.of(mutant))
            finally:
                trees.put(tree)
            taken = time.monotonic() - begin
            print(f"{said:9} {taken:4.0f} s  line {mutant.line} {mutant.name}: {mutant.kind} ({detail})", flush=True)
            if said != "killed":
                print(difference(source, mutant), flush=True)
            return mutant, said, detail

        with ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(run, chosen))
    counts = {word: sum(1 for _, said, _ in results if said == word) for word in ("killed", "survived", "timed out")}
    if options.write:
        REPORT.write_text(report(source, results, options.seed))
    print(f"{len(results)} mutants of {len(mutants_of(source))}: " + ", ".join(f"{n} {word}" for word, n in counts.items())
          + f"; {counts['killed'] / len(results):.1%} killed")  # fmt: skip
    sys.exit(counts["killed"] < 0.85 * len(results))


if __name__ == "__main__":
    main()

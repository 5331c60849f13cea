"""Mutation testing of copilot_router.py: break one place at a time, and see if a test notices.

    python tools/mutate.py [--number 300] [--seed 11] [--jobs 2] [--map FILE]

Broken are numbers, short strings, operators, conditions, results, statements and arguments; in a
sample each line is as likely as the next. The suite runs once and notes which test reaches which
line (--map keeps the notes). Each mutant is given to tests that reach its line, or name it, until
one fails. Survivors are printed at the end, with the score. The exit status is 1 below 90 %.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "copilot_router.py"
#: Tests that start processes, measure load, or look at the text of the module.
LEFT_OUT = "packaging layers readme examples examples_stream demo load stress processes gunicorn"
#: Seconds of tests (usual time) that one mutant is given.
BUDGET = 25.0


# -- the mutants


class Mutant(NamedTuple):
    put: Callable[[ast.AST], None]  #: put the new node (or the old one) into the tree
    old: ast.AST
    new: ast.AST
    line: int
    lines: range  #: who reaches one of these reaches the mutant; empty outside of functions
    name: str  #: what a statement outside of functions gives a value
    where: str  #: the function or class


SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
#: A call whose texts are for people: errors, logs, help.
TELLING = re.compile(
    r"(Error|Response|Request|Failed|Filtered|Limited|Unavailable|Timeout|Open|Option|Model"
    r"|Interrupted)$|^(log|warn|warning|info|debug|error|exception|print|add_\w+|ArgumentParser)$"
)
FOR_PEOPLE = ("help", "metavar", "description", "epilog")
#: Calls and statements that stay as they are.
KEPT = ("cast", "TypeVar", "isinstance", "NamedTuple", "__all__", "__version__", "__slots__")


def changed(node: ast.AST, **fields: Any) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def name_of(node: Any) -> str:
    return str(getattr(node, "attr", getattr(node, "id", "")))


def variants(node: Any) -> Iterator[ast.AST]:
    """What may stand instead of a node."""
    if isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, bool):
            yield ast.Constant(not value)
        elif isinstance(value, (int, float)):
            yield ast.Constant(value * 2 if isinstance(value, float) and value else value + 1)
        elif isinstance(value, str) and not (len(value) > 30 and " " in value):
            yield ast.Constant("XX" + value)
    elif isinstance(node, ast.Compare):
        for at, op in enumerate(node.ops):
            yield changed(node, ops=[*node.ops[:at], SWAPS[type(op)](), *node.ops[at + 1 :]])
    elif isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in SWAPS:
        yield changed(node, op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, (ast.IfExp, ast.If, ast.While)):
        yield changed(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Call):
        if name_of(node.func) in NAMES:
            yield changed(node, func=ast.Name(NAMES[name_of(node.func)]))
        elif len(node.args) > 1 and not any(isinstance(one, ast.Starred) for one in node.args):
            yield changed(node, args=[node.args[1], node.args[0], *node.args[2:]])
        for at, word in enumerate(node.keywords):
            if word.arg and word.arg not in FOR_PEOPLE:
                yield changed(node, keywords=node.keywords[:at] + node.keywords[at + 1 :])
    elif isinstance(node, ast.Return) and ast.unparse(node) not in ("return", "return None"):
        yield ast.Return(ast.Constant(None))
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    kept = isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name)
    gone = (ast.AugAssign, ast.Delete, ast.Raise, ast.Break, ast.Continue)
    if call or kept or isinstance(node, gone):
        yield ast.Pass()


class Finder:
    """All mutants of a tree."""

    def __init__(self, tree: ast.Module) -> None:
        self.found: list[Mutant] = []
        self.names: list[str] = []  #: of the functions and classes around
        self.lines = range(0)  #: of the statement, empty outside of functions
        self.inside = False  #: of a function
        self.name = ""
        self.visit(tree)

    def visit(self, node: Any) -> None:
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns", "decorator_list", "type_params"):
                for at, part in enumerate(value if isinstance(value, list) else [value]):
                    if isinstance(part, ast.AST) and not stays(node, part):
                        self.take(node, field, at, part)

    def take(self, node: Any, field: str, at: int, part: Any) -> None:
        before = self.lines, self.inside, self.name, self.names
        if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
            self.names = [*self.names, part.name]
        if isinstance(part, ast.FunctionDef):
            self.lines, self.inside = range(part.body[0].lineno, (part.end_lineno or 0) + 1), True
        elif isinstance(part, ast.stmt) and self.inside:
            last = part.body[0].lineno - 1 if hasattr(part, "body") else part.end_lineno or 0
            self.lines = range(part.lineno, max(part.lineno, last) + 1)
        elif isinstance(part, (ast.Assign, ast.AnnAssign)):
            self.name = name_of(getattr(part, "target", None) or part.targets[0])

        def put(new: ast.AST) -> None:
            if isinstance(getattr(node, field), list):
                getattr(node, field)[at] = new
            else:
                setattr(node, field, new)

        line, where = getattr(part, "lineno", 0), ".".join(self.names)
        for new in variants(part):
            self.found.append(Mutant(put, part, new, line, self.lines, self.name, where))
        self.visit(part)
        self.lines, self.inside, self.name, self.names = before


def stays(node: Any, part: Any) -> bool:
    """Texts for people, docstrings, imports, and what is there for type checkers only."""
    telling = isinstance(node, ast.Call) and TELLING.search(name_of(node.func))
    return bool(
        (telling and (isinstance(part, ast.Constant) or getattr(part, "arg", "") in FOR_PEOPLE))
        or isinstance(part, (ast.JoinedStr, ast.Import, ast.ImportFrom))
        or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
        or (isinstance(part, ast.Call) and name_of(part.func) in KEPT)
        or (isinstance(part, ast.Assign) and name_of(part.targets[0]) in KEPT)
        or (isinstance(part, ast.If) and name_of(part.test) == "TYPE_CHECKING")
        or "abstractmethod" in map(name_of, getattr(part, "decorator_list", ()))
    )


def mutated(tree: ast.Module, mutant: Mutant) -> str:
    mutant.put(mutant.new)
    try:
        return ast.unparse(ast.fix_missing_locations(tree))
    finally:
        mutant.put(mutant.old)


def change(mutant: Mutant) -> str:
    shown = [getattr(node, "test", node) for node in (mutant.old, mutant.new)]
    was, now = (" ".join(ast.unparse(node).split())[:100] for node in shown)
    return f"copilot_router.py:{mutant.line}, {mutant.where or 'module'}: {was} -> {now}"


def drawn(tree: ast.Module, number: int | None, seed: int) -> list[Mutant]:
    """All in random order, or so many: each line as likely as the next."""
    chance, found = random.Random(seed), Finder(tree).found
    if number is None:
        return chance.sample(found, len(found))
    by_line: dict[int, list[Mutant]] = defaultdict(list)
    for mutant in found:
        by_line[mutant.line].append(mutant)
    lines = chance.sample(sorted(by_line), min(number, len(by_line)))
    return [chance.choice(by_line[line]) for line in lines]


# -- the tests for each


class Suite:
    """The tests, by the lines and names that they reach."""

    def __init__(self, tree: ast.Module, notes: dict[str, Any]) -> None:
        self.times: dict[str, float] = notes["times"]
        known = set(self.times)
        self.reached = {int(line): known & set(tests) for line, tests in notes["lines"].items()}
        self.breadth = Counter(test for tests in self.reached.values() for test in tests)
        self.uses: dict[str, set[int]] = defaultdict(set)  #: lines on which a name stands
        self.mentions: dict[str, set[str]] = defaultdict(set)  #: tests with a word in their code
        for part in ast.walk(tree):
            self.uses[name_of(part)].add(getattr(part, "lineno", 0))
        for statement in reversed(tree.body):  # a constant of which others are made
            if isinstance(statement, (ast.Assign, ast.AnnAssign)):
                name, *others = re.findall(r"\w+", ast.unparse(statement))
                for word in others:
                    self.uses[word] |= self.uses[name]
        names: dict[str, set[str]] = defaultdict(set)
        for test in known:
            names[re.sub(r"::.*::", "::", test.partition("[")[0])].add(test)
        for path in {test.partition("::")[0] for test in known}:
            for block in (ROOT / path).read_text(encoding="utf-8").split("\n\n\n"):
                own = (names[f"{path}::{name}"] for name in re.findall(r"def (test_\w+)", block))
                tests = set().union(*own)
                for word in set(re.findall(r"\w+", block)):
                    self.mentions[word] |= tests

    def of(self, mutant: Mutant) -> list[str]:
        """The tests that could notice it: of each file in turn the most special one left."""
        lines = mutant.lines or self.uses[mutant.name]
        found = set().union(*(self.reached.get(line, set()) for line in lines))
        words = {mutant.name} if mutant.lines else {mutant.name, mutant.where}
        if isinstance(mutant.old, ast.Constant) and isinstance(mutant.old.value, str):
            words |= set(re.findall(r"\w{3,}", mutant.old.value))
        named = set().union(*(self.mentions[word] for word in words if word))
        if not mutant.lines:
            found |= named
        chosen, total = [], 0.0
        for test in sorted(found, key=lambda one: (one not in named, self.breadth[one], one)):
            total += self.times[test]
            if total > BUDGET and chosen:
                break
            chosen.append(test)
        return chosen


# -- running them


def copy_of_the_tree(where: Path) -> Path:
    left = shutil.ignore_patterns(".venv*", "*.egg-info", ".git", "dist", ".*_cache", "__pycache__")
    return Path(shutil.copytree(ROOT, where, ignore=left))


def run_pytest(tree: Path, arguments: list[str], limit: float, **variables: str) -> int | None:
    """Its exit status, None if it had to be killed. Nothing that it started survives."""
    path = os.pathsep.join(str(tree / name) for name in ("", "tests", "tools"))
    env = {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **variables}
    plugins = ["-p", "reached", "-p", "no:cacheprovider"]
    command = [sys.executable, "-B", "-m", "pytest", "-q", *plugins, *arguments]
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    quiet |= {"cwd": tree, "env": env, "start_new_session": True}
    process = subprocess.Popen(command, **quiet)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def verdict(tree: Path, suite: Suite, source: str, mutant: Mutant) -> str:
    tests = suite.of(mutant)
    if not tests:
        return "survived"
    (tree / MODULE.name).write_text(source, encoding="utf-8")
    orders = tree / "orders.json"
    orders.write_text(json.dumps(tests))
    files = sorted({test.partition("::")[0] for test in tests})
    limit = 30 + 5 * sum(suite.times[test] for test in tests)
    status = run_pytest(tree, ["-x", *files], limit, MUTATE_ORDERS=str(orders))
    return {0: "survived", None: "timed out"}.get(status, "killed")


def notes_of(path: Path, work: Path) -> dict[str, Any]:
    if not path.exists():
        print("The suite runs, to see which test reaches which line ...", flush=True)
        left = [f"--ignore=tests/test_{name}.py" for name in LEFT_OUT.split()]
        tree = copy_of_the_tree(work / "notes")
        if run_pytest(tree, left, 3600, MUTATE_NOTES=str(path)) not in (0, 1):
            sys.exit("the suite could not be run")
    notes: dict[str, Any] = json.loads(path.read_text())
    return notes


def main() -> None:
    parser = argparse.ArgumentParser(description="Break the module: do the tests notice?")
    parser.add_argument("--number", type=int, help="mutants in a sample (all of them)")
    parser.add_argument("--seed", type=int, default=1, help="another number, another sample (1)")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (2)")
    parser.add_argument("--map", type=Path, help="keep here which test reaches which line")
    options = parser.parse_args()
    tree = ast.parse(MODULE.read_text(encoding="utf-8"))
    mutants = drawn(tree, options.number, options.seed)
    results: list[tuple[int, str, str]] = []
    lock = threading.Lock()

    def worker(place: Path, suite: Suite) -> None:
        while mutants:
            with lock:  # there is one tree, and each mutant stands in it for a moment
                mutant = mutants.pop()
                source = mutated(tree, mutant)
            said = verdict(place, suite, source, mutant)
            results.append((mutant.line, said, change(mutant)))
            print(f"{said:9}  {change(mutant)}", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        kept = options.map.resolve() if options.map else Path(name, "map.json")
        suite = Suite(tree, notes_of(kept, Path(name)))
        places = [copy_of_the_tree(Path(name, str(number))) for number in range(options.jobs)]
        threads = [threading.Thread(target=worker, args=(place, suite)) for place in places]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            mutants.clear()
            print("stopped; this is how far it came")
            for thread in threads:
                thread.join()
    counts = Counter(said for _, said, _ in results)
    print("\nNot noticed:")
    for _, said, told in sorted(result for result in results if result[1] != "killed"):
        print(f"  {told} ({said})")
    print(f"{len(results)} mutants: {counts['killed']} killed"
          f" ({counts['killed'] / max(len(results), 1):.1%}), {counts['survived']} survived,"
          f" {counts['timed out']} timed out")  # fmt: skip
    sys.exit(counts["killed"] < 0.9 * len(results))


if __name__ == "__main__":
    main()

"""The form of the module: sections in order, readable sizes, tests that use public names."""

from __future__ import annotations

import ast
import dis
import importlib
import re
from bisect import bisect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import copilot_router

SOURCE = Path(copilot_router.__file__).read_text(encoding="utf-8")
BANNER = re.compile(r"^# ==== (.+?) =+$", re.MULTILINE)
TESTS = Path(__file__).parent
#: The only file of the tests that may use private names.
PRIVATE = TESTS / "support" / "private.py"


def names_in(code: CodeType) -> Iterator[tuple[str, str, int]]:
    """What the code does with names of the module (annotations are not in the code), and where."""
    starts, line = dict(dis.findlinestarts(code)), 0
    for step in dis.get_instructions(code):
        line = starts.get(step.offset) or line
        if step.opname in ("STORE_NAME", "LOAD_NAME", "LOAD_GLOBAL"):
            yield step.opname, str(step.argval), line
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from (found for found in names_in(inner) if found[0] != "STORE_NAME")


def uses_of_later_sections(source: str) -> list[str]:
    heads = [source.count("\n", 0, found.start()) + 1 for found in BANNER.finditer(source)]
    found = list(names_in(compile(source, "module", "exec", dont_inherit=True)))
    defined = {name: line for step, name, line in reversed(found) if step == "STORE_NAME"}
    return [f"line {line} uses {name} of line {defined[name]}" for step, name, line in found
            if step != "STORE_NAME" and bisect(heads, defined.get(name, 0)) > bisect(heads, line)]


def private_names(text: str) -> list[str]:
    """Private names of the module that a file uses: as attributes, imported, or in a string."""
    aliases = ["copilot_router", *re.findall(r"\bimport copilot_router as (\w+)", text)]
    imports = re.findall(r"\bfrom copilot_router import (\([^)]*\)|[^\n]*)", text)
    used = re.findall(rf"\b(?:{'|'.join(aliases)})\.(_[a-zA-Z]\w*)", text)
    return used + re.findall(r"(?<!\w)_[a-zA-Z]\w*", " ".join(imports))


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.walk(ast.parse(SOURCE)):
        owner = node.name if isinstance(node, ast.ClassDef) else ""
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.FunctionDef):
                yield f"{owner}.{part.name}", part


def test_sections_use_only_what_stands_above_them() -> None:
    assert uses_of_later_sections(SOURCE) == []


def test_a_name_of_the_module_is_given_once() -> None:
    names = [name for step, name, _ in names_in(compile(SOURCE, "module", "exec"))
             if step == "STORE_NAME"]
    assert [name for at, name in enumerate(names) if name in names[:at]] == []


def test_a_use_of_a_later_section_is_found() -> None:
    head = "from __future__ import annotations\n# ==== one ====\n"
    fine = head + "def one(two: later) -> later:\n    return two\n# ==== two ====\nlater = one\n"
    assert uses_of_later_sections(fine) == []
    assert uses_of_later_sections(fine.replace("return two", "return [later for _ in two]"))
    assert uses_of_later_sections(fine.replace("def one(", "class Early(later): ...\ndef one("))


def test_docstring_lists_the_sections_in_file_order() -> None:
    found = re.search(r"Contents:\s+(.+?)(?:\.\s|\n\n)", copilot_router.__doc__ or "", re.DOTALL)
    assert found
    assert [" ".join(name.split()) for name in found[1].split("·")] == BANNER.findall(SOURCE)


def test_constants_are_given_once() -> None:
    """If one hand moves a constant and another changes it, a merge keeps both."""
    names = re.findall(r"(?m)^(\w+)(?:: .+?)? = ", SOURCE)
    assert [name for name in names if names.count(name) > 1] == []


def test_lines_and_bodies_are_short_and_parameters_few() -> None:
    long = [f"line {at}" for at, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 100]
    for name, function in functions():
        body = function.body[1:] if ast.get_docstring(function, clean=False) else function.body
        lines = (function.end_lineno or 0) + 1 - body[0].lineno if body else 0
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        taken = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
        maker = re.fullmatch(r"(_HTTP)?[A-Z]\w*\.__init__", name)
        wide = function.name in ("chat", "stream") or maker
        if lines > 60 or (len(taken) > 6 and not wide):
            long.append(f"{name}, {lines} lines, {len(taken)} parameters")
    assert long == []


def test_tests_use_public_names() -> None:
    module = "copilot_router"  # a variable, so that the lines below are no use of private names
    assert private_names(f"import {module} as cr\ncr._a, {module}._b, x._c") == ["_a", "_b"]
    assert private_names(f"from {module} import (\n    Event,\n    _c,\n)\n") == ["_c"]
    files = [path for path in TESTS.rglob("*.py") if path != PRIVATE]
    used = {str(path.relative_to(TESTS)): private_names(path.read_text("utf-8")) for path in files}
    assert {path: names for path, names in used.items() if names} == {}


def test_tools_import_what_the_tests_have() -> None:
    """They run apart, some of them rarely."""
    for path in (TESTS.parent / "tools").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("support."):
                module = importlib.import_module(str(node.module))
                assert [one.name for one in node.names if not hasattr(module, one.name)] == [], path

"""What is shipped is what was tested: names, versions, types, and one file that works wherever it is copied."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import inspect
import os
import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import copilot_router

ROOT = Path(__file__).resolve().parent.parent
MODULE = Path(copilot_router.__file__)
SOURCE = MODULE.read_text(encoding="utf-8")
INSTALLED = "COPILOT_ROUTER_INSTALLED" in os.environ  # the suite runs against a wheel, from a copy of tests/

VENDORED = """
import sys
sys.path.insert(0, ".")
from copilot_router import FailoverChain, LLMProvider, LLMResponse, OpenAIProvider, ProviderTier

class Mine(LLMProvider):
    def chat(self, messages, tools=None, model=None, **kwargs):
        return LLMResponse(content="vendored")

print(FailoverChain([ProviderTier("mine", Mine())]).chat("hi").text)
assert "requests" not in sys.modules
try:
    OpenAIProvider("a-key")
except ImportError as error:
    print(error)
"""

WATCHED_IMPORT = """
import sys, threading
seen = []
def watch(event, args):
    if event.startswith(("socket.", "subprocess.", "os.putenv", "_thread.start", "sqlite3.")):
        seen.append(event)
    elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        seen.append(f"{event} {args[0]}")
sys.addaudithook(watch)
import copilot_router
print(*sys.modules, sep="\\n")
assert not seen, seen
assert threading.active_count() == 1
"""


def python(
    *arguments: str, cwd: Path | None = None, executable: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the module where this one did, and nothing else unasked."""
    environment = {**os.environ, "PYTHONPATH": str(MODULE.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


def packaging() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def pythons() -> dict[str, str]:
    """Every supported Python that there is on this machine, by its version; this one for its own."""
    found = {f"{sys.version_info.major}.{sys.version_info.minor}": sys.executable}
    for minor in range(10, 14):
        kept = sorted(Path("~/.pyenv/versions").expanduser().glob(f"3.{minor}.*/bin/python3"))
        for candidate in [*map(str, kept), shutil.which(f"python3.{minor}")]:
            if candidate and f"3.{minor}" not in found:
                found[f"3.{minor}"] = candidate
    return found


PYTHONS = pythons()


def test_the_version_is_said_once_and_repeated_truly() -> None:
    """A plain literal that a build can read without importing, the same in the header, the packaging and the metadata."""
    statements = [ast.unparse(node) for node in ast.parse(SOURCE).body if isinstance(node, ast.Assign)]
    assert f"__version__ = {copilot_router.__version__!r}" in statements
    assert SOURCE.startswith(f"# copilot_router {copilot_router.__version__} ")
    assert packaging()["metadata"]["version"] == "attr: copilot_router.__version__"
    if INSTALLED:
        assert importlib.metadata.version("copilot-router") == copilot_router.__version__


def test_python_versions_agree_everywhere() -> None:
    """The oldest Python is the same for the installer, the linter and the type checker."""
    tools = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert packaging()["options"]["python_requires"] == ">=3.10"
    assert 'target-version = "py310"' in tools
    assert 'pythonVersion = "3.10"' in tools


def test_all_names_every_public_class_and_function_once() -> None:
    """``__all__`` is the whole API: nothing in it is missing from the module, nothing public is missing from it."""
    public = {
        name
        for name, value in vars(copilot_router).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == "copilot_router"
    }
    assert len(set(copilot_router.__all__)) == len(copilot_router.__all__)
    assert set(copilot_router.__all__) == public - {"main"}  # main is the command, not the library


def documentable(value: object) -> bool:
    return inspect.isroutine(value) or inspect.isclass(value) or isinstance(value, property)


def test_everything_public_has_a_docstring() -> None:
    """The docstrings are a vendored copy's only manual: no class, method or property of the API goes without."""
    bare = []
    for name in copilot_router.__all__:
        kind = getattr(copilot_router, name)
        members = [(f"{name}.{key}", value) for key, value in vars(kind).items() if not key.startswith("_")]
        bare += [label for label, value in [(name, kind), *members] if documentable(value) and not inspect.getdoc(value)]
    assert bare == []


def test_no_signature_shows_what_the_environment_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """``help()``, a traceback's arguments and a documentation page print defaults: none is an environment with keys."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-signature-key")
    shown = pydoc.plain(pydoc.render_doc(copilot_router))
    assert "from_env" in shown
    assert "sk-test-signature-key" not in shown


@pytest.mark.parametrize("version", PYTHONS)
def test_importing_costs_the_standard_library_only_and_does_nothing(version: str, tmp_path: Path) -> None:
    """No requests, TLS, socket, thread, written file or warning, in a fresh interpreter of every Python."""
    shutil.copy(MODULE, tmp_path / "copilot_router.py")
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    done = python("-W", "error", "-I", "-S", "-B", "-c", path + WATCHED_IMPORT, executable=PYTHONS[version])
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "copilot_router" in loaded
    assert not loaded & {"requests", "urllib3", "ssl", "socket", "http.client", "asyncio", "argparse", "sqlite3"}


def test_importtime_does_not_mention_requests() -> None:
    """The same, as a person would look: ``python -X importtime``."""
    done = python("-X", "importtime", "-c", "import copilot_router")
    assert done.returncode == 0, done.stderr
    assert "copilot_router" in done.stderr
    assert not re.search(r"\|\s+(requests|urllib3)\b", done.stderr)


@pytest.mark.parametrize("version", PYTHONS)
def test_the_one_file_works_alone_where_requests_is_not_installed(version: str, tmp_path: Path) -> None:
    """In an empty directory, without site-packages: a custom provider answers, an HTTP one says what to install."""
    shutil.copy(MODULE, tmp_path / "copilot_router.py")
    done = python("-I", "-S", "-c", VENDORED, cwd=tmp_path, executable=PYTHONS[version])
    assert done.returncode == 0, done.stderr
    answer, complaint = done.stdout.splitlines()
    assert answer == "vendored"
    assert complaint == "HTTP providers need PyPI's requests: pip install requests"


@pytest.mark.parametrize("version", PYTHONS)
def test_the_vendored_file_is_a_program(version: str, tmp_path: Path) -> None:
    """``python copilot_router.py`` is the command line, also alone."""
    shutil.copy(MODULE, tmp_path / "copilot_router.py")
    done = python("-I", "-S", "copilot_router.py", "--version", cwd=tmp_path, executable=PYTHONS[version])
    assert (done.returncode, done.stdout.strip()) == (0, f"copilot-router {copilot_router.__version__}")


def test_what_is_installed_along_and_what_on_request() -> None:
    """requests alone, redis as an extra, and one command."""
    assert packaging()["options"]["install_requires"].split() == ["requests>=2.31"]
    assert packaging()["options.extras_require"]["redis"].split() == ["redis>=5"]
    assert packaging()["options.entry_points"]["console_scripts"].strip() == "copilot-router = copilot_router:main"
    if INSTALLED:
        needed = importlib.metadata.requires("copilot-router") or []
        assert [item for item in needed if "extra" not in item] == ["requests>=2.31"]
        assert any(re.fullmatch(r"redis>=5\s*; extra == ['\"]redis['\"]", item) for item in needed)


@pytest.mark.skipif(not INSTALLED, reason="runs against an installed wheel only")
def test_the_installed_command(tmp_path: Path) -> None:
    """``copilot-router`` stands beside the interpreter and is the command line."""
    command = Path(sys.executable).with_name("copilot-router")
    done = subprocess.run([command, "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, f"copilot-router {copilot_router.__version__}")


def test_the_licence_travels_with_the_file() -> None:
    """The first line names licence and holder, and they are those of LICENSE and of the packaging."""
    first = SOURCE.splitlines()[0]
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "SPDX-License-Identifier: MIT" in first
    assert licence.startswith("MIT License")
    assert packaging()["metadata"]["license"] == "MIT"
    assert packaging()["metadata"]["license_files"] == "LICENSE"
    if INSTALLED:
        (shipped,) = [path for path in importlib.metadata.files("copilot-router") or [] if path.name == "LICENSE"]
        assert shipped.read_text(encoding="utf-8") == licence
    holder = re.search(r"Copyright \(c\) (.+)", licence)
    assert holder
    assert first.endswith(holder.group(0))


def test_the_docstring_lists_the_sections_in_file_order() -> None:
    """The contents at the top are the banners below, so that a search for them shows the outline."""
    contents = re.search(r"Contents: (.+?)\. Search", copilot_router.__doc__ or "", re.DOTALL)
    assert contents
    listed = [" ".join(name.split()) for name in contents.group(1).split("·")]
    assert listed == re.findall(r"^# ==== (.+?) =+$", SOURCE, re.MULTILINE)


def test_nothing_is_left_out_of_coverage() -> None:
    """The figure of 100 % holds for every line: no pragma in the module."""
    assert not re.search(r"pragma:?\s*no", SOURCE)


def test_users_get_the_types() -> None:
    """The stub package that type checkers look for is the module itself."""
    if INSTALLED:
        assert "site-packages" in MODULE.parts
        stub = MODULE.parent / "copilot_router-stubs" / "__init__.pyi"
    else:
        stub = ROOT / "copilot_router-stubs" / "__init__.pyi"
        assert stub.is_symlink()
        assert os.readlink(stub) == os.path.join("..", "copilot_router.py")
    assert stub.read_bytes() == MODULE.read_bytes()


def repository_files() -> list[Path]:
    """What is under version control, or everything where there is no repository (a copy, an unpacked sdist)."""
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        found = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        found = list(ROOT.rglob("*"))
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


@pytest.mark.parametrize("folder", ["work", "root", "home", "Users"])
def test_no_path_of_somebodys_machine_is_in_the_repository(folder: str) -> None:
    """Nothing depends on where it was written."""
    pattern = re.compile(rf"(?<![\w.~$}}/-])/{folder}/\w")
    files = repository_files()
    assert ROOT / "setup.cfg" in files
    found = [str(path) for path in files if pattern.search(path.read_text(encoding="utf-8", errors="replace"))]
    assert found == []

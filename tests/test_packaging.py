"""What is shipped is what was tested: names, versions, types, and a file that works alone."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import importlib.util
import inspect
import os
import pydoc
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import copilot_router

ROOT = Path(__file__).resolve().parent.parent
MODULE = Path(copilot_router.__file__)
SOURCE = MODULE.read_text(encoding="utf-8")
#: The suite runs against an installed wheel, from a copy of tests/.
INSTALLED = "COPILOT_ROUTER_INSTALLED" in os.environ
#: What a build reads.
BUILD = ("copilot_router.py", "README.md", "LICENSE", "setup.py", "setup.cfg", "pyproject.toml")

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
sys.path.insert(0, ".")
sys.addaudithook(watch)
import copilot_router
print(*sys.modules, sep="\\n")
assert not seen, seen
assert threading.active_count() == 1
"""


def python(*arguments: str, cwd: Path, executable: str = sys.executable) -> str:
    """What a fresh interpreter prints; it has to end well."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def packaging() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def pythons() -> dict[str, str]:
    """The supported Pythons of this machine by version; the running one stands for its version."""
    found = {f"{sys.version_info.major}.{sys.version_info.minor}": sys.executable}
    for minor in range(10, 15):
        kept = sorted(Path("~/.pyenv/versions").expanduser().glob(f"3.{minor}.*/bin/python3"))
        for candidate in filter(None, [*map(str, kept), shutil.which(f"python3.{minor}")]):
            if not subprocess.run([candidate, "-V"], capture_output=True).returncode:  # else a shim
                found.setdefault(f"3.{minor}", candidate)
    return found


@pytest.fixture(params=pythons().values(), ids=pythons())
def each_python(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- one file
def test_import_costs_the_standard_library_only_and_does_nothing(each_python: str,
        tmp_path: Path) -> None:
    """No requests, TLS, socket, thread, written file or warning, on every Python that is here."""
    shutil.copy(MODULE, tmp_path)
    printed = python("-W", "error", "-I", "-S", "-B", "-c", WATCHED_IMPORT, cwd=tmp_path,
        executable=each_python)
    costly = "requests urllib3 ssl socket http.client asyncio argparse sqlite3"
    assert "copilot_router" in printed.split() and not set(printed.split()) & set(costly.split())


def test_one_copied_file_works_alone_and_says_what_to_install(each_python: str,
        tmp_path: Path) -> None:
    """Without site-packages a custom provider answers, and the file is a program."""
    shutil.copy(MODULE, tmp_path)
    printed = python("-I", "-S", "-c", VENDORED, cwd=tmp_path, executable=each_python)
    answer, complaint = printed.splitlines()
    assert answer == "vendored" and "pip install requests" in complaint
    command = ("-I", "-S", "copilot_router.py", "--version")
    version = python(*command, cwd=tmp_path, executable=each_python)
    assert version.strip() == f"copilot-router {copilot_router.__version__}"


# -- names and metadata
def test_version_is_a_literal_that_header_and_package_repeat() -> None:
    statements = [ast.unparse(node) for node in ast.parse(SOURCE).body]
    assert f"__version__ = {copilot_router.__version__!r}" in statements
    assert SOURCE.startswith(f"# copilot_router {copilot_router.__version__} ")
    assert packaging()["metadata"]["version"] == "attr: copilot_router.__version__"
    if INSTALLED:
        command = str(Path(sys.executable).with_name("copilot-router"))
        printed = python("--version", cwd=ROOT, executable=command)
        assert printed.strip() == f"copilot-router {copilot_router.__version__}"
        assert importlib.metadata.version("copilot-router") == copilot_router.__version__


def test_all_names_every_public_class_and_function_once() -> None:
    public = {name for name, value in vars(copilot_router).items() if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == "copilot_router"}
    assert len(set(copilot_router.__all__)) == len(copilot_router.__all__)
    assert set(copilot_router.__all__) == public - {"main"}  # main is the command


def test_everything_public_has_a_docstring() -> None:
    members = {name: getattr(copilot_router, name) for name in copilot_router.__all__}
    for name, kind in list(members.items()):
        for key, value in vars(kind).items():
            documentable = inspect.isroutine(value) or isinstance(value, (type, property))
            if documentable and not key.startswith("_"):
                members[f"{name}.{key}"] = value
    assert [name for name, value in members.items() if not inspect.getdoc(value)] == []


def test_no_signature_shows_what_the_environment_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """``help()`` and documentation pages print defaults: none is an environment with keys."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-signature-key")
    shown = pydoc.plain(pydoc.render_doc(copilot_router))
    assert "from_env" in shown and "sk-test-signature-key" not in shown


def test_requests_alone_is_installed_along_and_all_tools_know_the_oldest_python() -> None:
    tools = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert packaging()["options"]["python_requires"] == ">=3.10"
    assert 'target-version = "py310"' in tools and 'pythonVersion = "3.10"' in tools
    assert packaging()["options"]["install_requires"].split() == ["requests>=2.31"]
    assert packaging()["options.extras_require"]["redis"].split() == ["redis>=5"]
    if INSTALLED:
        needed = importlib.metadata.requires("copilot-router") or []
        assert [item for item in needed if "extra" not in item] == ["requests>=2.31"]


def test_first_line_names_licence_and_holder_and_nothing_is_left_out_of_coverage() -> None:
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    holder = re.search(r"Copyright \(c\) (.+)", licence)
    first = SOURCE.splitlines()[0]
    assert licence.startswith("MIT License") and packaging()["metadata"]["license"] == "MIT"
    assert "SPDX-License-Identifier: MIT" in first and holder and first.endswith(holder.group(0))
    assert not re.search(r"pragma:?\s*no", SOURCE)


# -- types for users
@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages directory with the wheel in it, made without asking a package index."""
    if INSTALLED:
        return MODULE.parent
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 71 and not importlib.util.find_spec("wheel"):
        pytest.skip("building a wheel needs setuptools 70.1 or newer")
    folder = tmp_path_factory.mktemp("wheel")
    for name in BUILD:
        shutil.copy(ROOT / name, folder)
    make = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    wheel = folder / python("-W", "ignore", "-c", make, cwd=folder).split()[-1]
    venv.create(folder / "user", symlinks=os.name != "nt")
    (found,) = [path for path in (folder / "user").rglob("site-packages") if path.is_dir()]
    zipfile.ZipFile(wheel).extractall(found)
    return found


def test_wheel_holds_the_module_and_the_same_text_as_its_types(site: Path) -> None:
    """The stub package that type checkers look for is made from the module by the build."""
    assert (site / "copilot_router.py").read_bytes() == MODULE.read_bytes()
    assert (site / "copilot_router-stubs" / "__init__.pyi").read_bytes() == MODULE.read_bytes()


def test_mypy_strict_sees_types_and_mistakes_of_a_users_file(site: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    user = shutil.copy(ROOT / "tests" / "typed_user.py", tmp_path)
    base = next(path for path in site.parents if (path / "pyvenv.cfg").exists())
    interpreter = base / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    python("-m", "mypy", "--strict", "--python-executable", str(interpreter), user, cwd=tmp_path)


# -- the repository
@pytest.mark.parametrize("folder", ["work", "root", "home", "Users"])
def test_no_path_of_somebodys_machine_is_in_the_repository(folder: str) -> None:
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        files = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):  # a copy, or an unpacked sdist
        files = [path for path in ROOT.rglob("*") if "__pycache__" not in path.parts]
    pattern = re.compile(rf"(?<![\w.~$}}/-])/{folder}/\w")
    files = [path for path in files if path.is_file()]
    assert ROOT / "setup.cfg" in files
    assert [str(path) for path in files
        if pattern.search(path.read_text(encoding="utf-8", errors="replace"))] == []

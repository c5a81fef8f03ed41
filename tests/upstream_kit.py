"""A local git repository that stands in for upstream's, and a clone of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from emu_cog.upstream.clone import ensure_clone

STANDIN = Path(__file__).resolve().parent / "standin"


def git(folder: Path, *arguments: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, env=clean, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def make_repository(folder: Path) -> tuple[str, str]:
    """Commit the stand-in to a new repository in `folder`. Returns its URL and the commit."""
    shutil.copytree(STANDIN, folder, ignore=shutil.ignore_patterns("__pycache__"))
    git(folder, "init", "--quiet")
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "-m", "one")
    return f"file://{folder}", git(folder, "rev-parse", "HEAD")


def make_clone(folder: Path) -> Path:
    """A verified clone of the stand-in, under `folder`."""
    url, commit = make_repository(folder / "repository")
    return ensure_clone(folder / "weights", url=url, commit=commit)

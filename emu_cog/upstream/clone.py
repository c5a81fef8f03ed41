"""The pinned clone of upstream's repository: the files that are used, at exactly the pinned commit, or none at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from emu_cog.errors import CheckpointError
from emu_cog.log import log
from emu_cog.settings import UPSTREAM_COMMIT, UPSTREAM_URL

FOLDERS = ("Emu3.5", "Emu3.5-upstream")
"""Where the clone may lie. The second serves where the first holds something else: the base model's weights, say."""
USED = ("src/utils", "src/vision_tokenizer", "src/tokenizer_emu3_ibq", "src/emu3p5/configuration_emu3.py", "configs")
"""What is checked out and verified. Pictures, fonts and patches of other programs stay behind."""
_STAGING = ".upstream-staging"
_LOCK = ".upstream.lock"
_MARK = "emu-cog.pinned"
"""Set in the configuration of clones that this program made: those it may replace."""
_ATTEMPTS = 3
_FIRST_WAIT = 2.0
_OPTIONS = (
    "-c",
    "core.autocrlf=false",  # the files are compared with the commit, byte for byte
    "-c",
    "core.hooksPath=/dev/null",
    "-c",
    "advice.detachedHead=false",
    "-c",
    "http.lowSpeedLimit=1000",  # bytes a second, over the next line's seconds: a stalled server is given up
    "-c",
    "http.lowSpeedTime=30",
)


class _GitError(CheckpointError):
    """A git command failed; the message is what git said."""


def ensure_clone(weights_dir: Path, *, url: str = UPSTREAM_URL, commit: str = UPSTREAM_COMMIT) -> Path:
    """The folder of a verified clone at `commit`, fetched from `url` when there is none in `weights_dir` yet.

    Of two processes that start at once one clones and the other waits. Everything lands in a staging folder
    and is renamed when verified, so a kill leaves nothing that could be taken for a clone. Raises CheckpointError.
    """
    if found := find_clone(weights_dir, commit=commit):
        return found
    weights_dir.mkdir(parents=True, exist_ok=True)
    with _locked(weights_dir / _LOCK):
        if found := find_clone(weights_dir, commit=commit):
            return found  # another process made it meanwhile
        target = _target(weights_dir)
        log.info("cloning %s at %s into %s", url, commit[:12], target)
        staging = weights_dir / _STAGING
        _remove(staging)
        _clone(staging, url, commit)
        verify(staging, commit=commit)
        _remove(target)  # a clone of ours at another commit, or a damaged one
        os.replace(staging, target)
        return target


def find_clone(weights_dir: Path, *, commit: str = UPSTREAM_COMMIT) -> Path | None:
    """The verified clone in `weights_dir`, or None where one must be made; a clone that fails is told in the log."""
    for name in FOLDERS:
        folder = weights_dir / name
        if not (folder / ".git").exists():
            continue
        try:
            verify(folder, commit=commit)
        except CheckpointError as error:
            log.warning("%s", error)
            continue
        return folder
    return None


def verify(folder: Path, *, commit: str = UPSTREAM_COMMIT) -> None:
    """Raise CheckpointError unless `folder` is a clone at exactly `commit` whose used files are all unchanged."""
    head = _git(folder, "rev-parse", "--verify", "HEAD")
    if head != commit:
        raise CheckpointError(f"{folder} is at commit {head}, but {commit} is needed: move it away or check that out")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=all", "--", *USED).splitlines()
    if changed:
        names = ", ".join(line[3:] for line in changed[:3])
        raise CheckpointError(f"{folder} differs from commit {commit[:12]} in {names}: move it away or restore it")


def _target(weights_dir: Path) -> Path:
    """The first folder that is free or holds a clone of ours."""
    for name in FOLDERS:
        folder = weights_dir / name
        if not folder.exists() or _is_ours(folder):
            return folder
    raise CheckpointError(
        f"{' and '.join(str(weights_dir / name) for name in FOLDERS)} are both taken by something that is not the "
        "pinned clone of upstream: move one of them away"
    )


def _is_ours(folder: Path) -> bool:
    try:
        return (folder / ".git").is_dir() and _git(folder, "config", "--get", _MARK) == "true"
    except _GitError:
        return False


def _clone(folder: Path, url: str, commit: str) -> None:
    """One commit, without history; only the blobs of the used files where the server can filter."""
    folder.mkdir(parents=True)
    _run("init", "--quiet", str(folder))
    for key, value in (
        ("remote.origin.url", url),
        ("remote.origin.promisor", "true"),
        ("remote.origin.partialclonefilter", "blob:none"),
        ("extensions.partialClone", "origin"),
        (_MARK, "true"),
    ):
        _git(folder, "config", key, value)
    if url.startswith("file:"):
        # A repository on this machine is asked by a git that we start ourselves, so it may be told to filter:
        # mirrors that lack the big pictures and fonts then serve as well.
        served = "git -c uploadpack.allowFilter=true -c uploadpack.allowAnySHA1InWant=true upload-pack"
        _git(folder, "config", "remote.origin.uploadpack", served)
    _git(folder, "sparse-checkout", "set", "--no-cone", *(f"/{path}" for path in USED))
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _git(folder, "fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", commit)
            _git(folder, "checkout", "--quiet", "--detach", commit)
            return
        except _GitError as error:
            if attempt == _ATTEMPTS or not _worth_retrying(url):
                raise CheckpointError(
                    f"upstream's code could not be cloned from {url} at {commit}: {error}. Check the network, "
                    "name a mirror in EMU_UPSTREAM_URL, or use EMU_BACKEND=native, which needs no clone"
                ) from None
            wait = _FIRST_WAIT * 2 ** (attempt - 1)
            log.warning("cloning failed (%s), attempt %d of %d follows in %g s", error, attempt + 1, _ATTEMPTS, wait)
            time.sleep(wait)


def _worth_retrying(url: str) -> bool:
    return not url.startswith(("file:", "/", "."))


def _git(folder: Path, *arguments: str) -> str:
    """Run git on exactly `folder`'s own repository, never on one that encloses it; its output, stripped."""
    return _run(
        "-c",
        f"safe.directory={folder.resolve()}",  # the weights folder may belong to whoever filled it
        f"--git-dir={folder / '.git'}",
        f"--work-tree={folder}",
        *arguments,
    )


def _run(*arguments: str) -> str:
    # Variables like GIT_DIR, set when this program runs inside a git hook, must not lead to another repository.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k in ("GIT_SSL_CAINFO",)}
    environment |= {"GIT_TERMINAL_PROMPT": "0", "GIT_LFS_SKIP_SMUDGE": "1", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", *_OPTIONS, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except FileNotFoundError:
        raise CheckpointError(
            "EMU_BACKEND=upstream needs git, and there is no git on PATH: install it (apt-get install git), "
            "or use EMU_BACKEND=native"
        ) from None
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if not line.startswith("warning:")]
        raise _GitError("; ".join(said[-3:]) or f"git {arguments[-1]} ended with {done.returncode}")
    return done.stdout.strip()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = filelock.FileLock(path)  # flock: the system frees it when its holder dies
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("another process is cloning upstream's code: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove(folder: Path) -> None:
    if folder.exists():
        log.info("removing %s", folder)
        shutil.rmtree(folder)

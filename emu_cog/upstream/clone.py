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

from emu_cog.errors import CheckpointError, redacted
from emu_cog.log import log
from emu_cog.settings import UPSTREAM_COMMIT, UPSTREAM_URL

FOLDERS = ("Emu3.5", "Emu3.5-upstream")
"""Where the clone may be. The second is for when the first holds something else, such as the base model's weights."""
USED = (
    "src/utils",
    "src/vision_tokenizer",
    "src/tokenizer_emu3_ibq",
    "src/emu3p5/configuration_emu3.py",
    "src/emu3p5/modeling_emu3.py",  # only scripts/compare-upstream runs it, in a Python with an old transformers
    "configs",
)
"""What is checked out and verified; not the pictures, the fonts and the patches of other programs."""
_STAGING = ".upstream-staging"
_LOCK = ".upstream.lock"
_MARK = "emu-cog.pinned"
"""Set in the configuration of clones that this program made: those it may replace."""
_ATTEMPTS = 3
_FIRST_WAIT = 2.0  # seconds, doubled after each failed attempt
_PERMANENT = (
    "Authentication failed",
    "could not read Username",
    "could not read Password",
    "does not appear to be a git repository",
    "not found",
    "not our ref",
    "No space left on device",
    "Permission denied",
)
"""Parts of git's errors that a second attempt would only repeat."""
_BOILERPLATE = ("warning:", "hint:", "Please make sure you have", "and the repository exists")
_OPTIONS = (
    "-c",
    "core.autocrlf=false",  # the files are compared with the commit, byte for byte
    "-c",
    "core.hooksPath=/dev/null",
    "-c",
    "advice.detachedHead=false",
    "-c",
    "http.lowSpeedLimit=1000",  # bytes per second; slower for 30 s (lowSpeedTime) counts as a failed attempt
    "-c",
    "http.lowSpeedTime=30",
)


class _GitError(CheckpointError):
    """A git command failed; the message is git's own, without credentials."""


def ensure_clone(weights_dir: Path, *, url: str = UPSTREAM_URL, commit: str = UPSTREAM_COMMIT) -> Path:
    """The folder of a verified clone at `commit`, fetched from `url` if `weights_dir` holds none yet.

    If two processes start at once, one clones and the other waits. Everything is written to a staging folder that is
    renamed once verified, so a killed process leaves nothing that could pass for a clone. `url` may hold credentials;
    they reach neither the log nor an error. Raises CheckpointError.
    """
    if found := find_clone(weights_dir, commit=commit):
        return found
    url = url.strip()
    try:
        weights_dir.mkdir(parents=True, exist_ok=True)
        with _locked(weights_dir / _LOCK):
            if found := find_clone(weights_dir, commit=commit):
                return found  # another process has made it meanwhile
            target = _target(weights_dir)
            log.info("cloning %s at %s into %s", redacted(url), commit[:12], target)
            staging = weights_dir / _STAGING
            _remove(staging)
            try:
                _clone(staging, url, commit)
                verify(staging, commit=commit)
            except CheckpointError:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            _remove(target)  # a clone of ours at another commit, or a damaged one
            os.replace(staging, target)
            return target
    except OSError as error:
        raise CheckpointError(
            f"upstream's code could not be cloned into {weights_dir} ({error.strerror or error}): make that folder "
            "writable, or set EMU_WEIGHTS_DIR to one that is"
        ) from None


def find_clone(weights_dir: Path, *, commit: str = UPSTREAM_COMMIT) -> Path | None:
    """The verified clone in `weights_dir`, or None. Logs why a clone that is there is not used."""
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
        # git serves a local repository through a process of ours, which may be asked to filter: so a mirror that
        # lacks the big pictures and fonts will do.
        served = "git -c uploadpack.allowFilter=true -c uploadpack.allowAnySHA1InWant=true upload-pack"
        _git(folder, "config", "remote.origin.uploadpack", served)
    _git(folder, "sparse-checkout", "set", "--no-cone", *(f"/{path}" for path in USED))
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _git(folder, "fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", commit)
            _git(folder, "checkout", "--quiet", "--detach", commit)
            break
        except _GitError as error:
            if attempt == _ATTEMPTS or _is_local(url) or any(words in str(error) for words in _PERMANENT):
                raise CheckpointError(
                    f"upstream's code could not be cloned from {redacted(url)} at {commit} ({error}): "
                    f"{_advice(url, str(error))}"
                ) from None
            wait = _FIRST_WAIT * 2 ** (attempt - 1)
            log.warning("cloning failed (%s), attempt %d of %d in %g s", error, attempt + 1, _ATTEMPTS, wait)
            time.sleep(wait)
    if redacted(url) != url:
        _git(folder, "config", "remote.origin.url", redacted(url))  # leave no credentials on the disk


def _is_local(url: str) -> bool:
    return url.startswith(("file:", "/", "."))


def _advice(url: str, cause: str) -> str:
    """What to do after git failed to fetch from `url` because of `cause`."""
    if "No space left on device" in cause:
        return "free some disk space, or set EMU_WEIGHTS_DIR to another folder"
    if url == UPSTREAM_URL:
        return (
            "check the network and its proxy settings, or set EMU_UPSTREAM_URL to a mirror of that repository "
            "(https://... or file:///path)"
        )
    if "not our ref" in cause:
        return (
            "EMU_UPSTREAM_URL names a repository that lacks this commit: update that mirror, or unset EMU_UPSTREAM_URL"
        )
    unset = f"or unset EMU_UPSTREAM_URL to clone from {UPSTREAM_URL}"
    if _is_local(url):
        return f"EMU_UPSTREAM_URL must name a git repository on this machine, as in file:///path: correct it, {unset}"
    return f"check EMU_UPSTREAM_URL and the network, {unset}"


def _git(folder: Path, *arguments: str) -> str:
    """Run git on `folder`'s own repository, never on one that encloses it. Returns its output, stripped."""
    return _run(
        "-c",
        f"safe.directory={folder.resolve()}",  # the weights folder may belong to another user
        f"--git-dir={folder / '.git'}",
        f"--work-tree={folder}",
        *arguments,
    )


def _run(*arguments: str) -> str:
    # Variables such as GIT_DIR, set where this program runs inside a git hook, would select another repository.
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
            "upstream's code is cloned with git, and there is no git on PATH: install it (apt-get install git)"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(_BOILERPLATE)]
        causes = [line for line in lines if line.startswith(("fatal:", "error:", "remote:", "ssh:"))] or lines[-3:]
        message = "; ".join(dict.fromkeys(line.strip().rstrip(".") for line in causes[:4]))
        raise _GitError(redacted(message) or f"git ended with code {done.returncode}")
    return done.stdout.strip()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = filelock.FileLock(path)  # flock: released by the system when its holder dies
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

"""Weights from the Hugging Face hub, at a pinned commit.

`huggingface_hub` is asked what a repository holds and where its cache, its token and its files are. The files
themselves are brought by `fetch`, not by `snapshot_download`, which can't keep three promises made here (seen in
version 2.4): it deletes what had arrived of a file when it fails and never goes on with what a killed process
left; its listing request has no timeout, so a stalled server holds it for ever; and it checks no hashes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from emu_cog.errors import CheckpointError, InputError, redacted
from emu_cog.log import log
from emu_cog.weights.checkpoint import Part, check_part
from emu_cog.weights.fetch import Piece, fetch_all, require_space
from emu_cog.weights.http import FetchError, Patience, Remote, Transient, asked_wait, hopeless, retrying
from emu_cog.weights.manifest import COMMIT, Entry, Pin
from emu_cog.weights.progress import Progress
from emu_cog.weights.staging import Staging

DEFAULT_ENDPOINT = "https://huggingface.co"
_WORKERS = 16
"""Files fetched at once: all 15 shards, since one connection to a CDN seldom fills a fast line."""
_NOT_IN_TOKEN = re.compile(r"[^A-Za-z0-9._~+/=-]")
"""The characters of a bearer token are those of RFC 6750, section 2.1."""
_NOT_IN_URL = re.compile(r"[^!-~]")
_TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True)
class HubFile:
    """One file as the hub lists it. Files in LFS have a `sha256`, small files kept in git have a `git_sha1`."""

    size: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True)
class Listing:
    """What a repository holds at `commit`, of what the part wants."""

    commit: str
    files: Mapping[str, HubFile]


@dataclass(frozen=True)
class Hub:
    """The hub as the environment names it: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the cache's place.

    `environ` is asked rather than the process's environment, which huggingface_hub reads only once, on import.
    """

    environ: Mapping[str, str] = field(repr=False)
    patience: Patience

    @property
    def endpoint(self) -> str:
        return (self.environ.get("HF_ENDPOINT") or "").strip().rstrip("/") or DEFAULT_ENDPOINT

    @property
    def offline(self) -> bool:
        value = self.environ.get("HF_HUB_OFFLINE") or self.environ.get("TRANSFORMERS_OFFLINE") or ""
        return value.upper() in _TRUE

    @cached_property
    def token(self) -> str | None:
        """HF_TOKEN, else what `hf auth login` stored, without surrounding blanks and quotes.

        InputError, which does not quote it, if what remains can't be sent in a header.
        """
        from huggingface_hub import get_token

        name = "HF_TOKEN"
        token = _bare(self.environ.get(name))
        if token is None:
            name, token = "the token that `hf auth login` stored", _bare(get_token())
        if token is not None and (bad := _NOT_IN_TOKEN.search(token)):
            raise InputError(
                f"{name} can't be used: character {bad.start() + 1} of {len(token)} is a blank, a control character or "
                "another that no token has; set it again to the token alone, in one line without quotes"
            )
        return token

    def check(self) -> None:
        """InputError, before anything is asked, for an endpoint or token that no request could be made with."""
        self.check_endpoint()
        _ = self.offline or self.token

    def check_endpoint(self) -> None:
        if not _is_address(self.endpoint):
            shown = self.endpoint if "://" in self.endpoint else f"://{self.endpoint}"
            shown = redacted(shown).removeprefix("://")
            raise InputError(
                f"HF_ENDPOINT={shown!r} is not an address: it must be like {DEFAULT_ENDPOINT}, with http:// or https://"
            )

    def cached(self, part: Part, revision: str) -> Path | None:
        """The folder of a complete snapshot of `revision` in the hub's own cache; no network."""
        self.check_endpoint()  # huggingface_hub parses it as it is imported, and fails there
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        cache = self.environ.get("HF_HUB_CACHE") or (
            f"{home}/hub" if (home := self.environ.get("HF_HOME")) else constants.HF_HUB_CACHE
        )
        try:
            found = snapshot_download(part.repo.name, revision=revision, cache_dir=cache, local_files_only=True)
            check_part(part, Path(found))
        except (LocalEntryNotFoundError, CheckpointError) as error:
            log.debug("hub cache: %s", redacted(str(error), self.environ.get("HF_TOKEN")))
            return None
        return Path(found)

    def listing(self, part: Part, revision: str) -> Listing:
        """Ask the hub what `revision` (commit or branch) is and holds. FetchError says why there is no answer."""
        if self.offline:
            raise FetchError("HF_HUB_OFFLINE is set, so the hub is not asked")
        return retrying(
            lambda: self._ask(part, revision), what=f"{self.endpoint} ({part.repo.name})", patience=self.patience
        )

    def _ask(self, part: Part, revision: str) -> Listing:
        from huggingface_hub import HfApi

        def ask() -> Listing:
            api = HfApi(endpoint=self.endpoint, token=self.token)
            info = api.model_info(part.repo.name, revision=revision, files_metadata=True, timeout=self.patience.stall)
            if info.sha is None or not COMMIT.fullmatch(info.sha):
                raise FetchError(f"the hub names no commit for {part.repo.name} at {revision}")
            files = {}
            for sibling in info.siblings or []:
                if not part.wants(sibling.rfilename):
                    continue
                if sibling.size is None:  # a mirror that lists names only
                    files[sibling.rfilename] = self._head(part, info.sha, sibling.rfilename)
                elif sibling.lfs is not None:
                    files[sibling.rfilename] = HubFile(sibling.lfs.size, sha256=sibling.lfs.sha256)
                else:
                    files[sibling.rfilename] = HubFile(sibling.size, git_sha1=sibling.blob_id)
            return Listing(info.sha, files)

        listing = self._translated(ask, part)
        if missing := part.lacking(listing.files):
            raise FetchError(f"{part.repo.name} at {listing.commit} has no {', '.join(missing)}")
        return listing

    def _head(self, part: Part, commit: str, name: str) -> HubFile:
        """Size and hash of one file from the headers of its address: the ETag is the SHA-256 or git's SHA-1."""
        from huggingface_hub import get_hf_file_metadata

        found = get_hf_file_metadata(self.url(part, commit, name), token=self.token, timeout=self.patience.stall)
        if found.size is None:
            raise FetchError(f"the hub gives no size for {part.repo.name}/{name}")
        etag = found.etag or ""
        return HubFile(found.size, sha256=etag if len(etag) == 64 else None, git_sha1=etag if len(etag) == 40 else None)

    def _translated(self, ask: Callable[[], Listing], part: Part) -> Listing:
        """`ask()` with the client's many errors as FetchError, or Transient where another attempt may help."""
        from huggingface_hub import errors

        name = part.repo.name
        try:
            return ask()
        except (FetchError, Transient, InputError):
            raise
        except errors.OfflineModeIsEnabled:
            raise FetchError("HF_HUB_OFFLINE is set, so the hub is not asked") from None
        except errors.RevisionNotFoundError:
            raise FetchError(f"{name} on {self.endpoint} has no such revision") from None
        except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
            status = error.response.status_code
            raise FetchError(
                f"{self.endpoint} answered {status} for {name}: it does not exist there, or this account may not see "
                f"it ({'HF_TOKEN is not accepted' if self.token else 'set HF_TOKEN if it needs one'})"
            ) from None
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status in (408, 425, 429) or status >= 500:
                asked = asked_wait(error.response.headers, self.patience, self.endpoint)
                raise Transient(f"answered {status}", wait=asked) from None
            raise FetchError(f"{self.endpoint} answered {status} for {name}") from None
        except Exception as error:
            # The client passes on its transport's errors, whose classes differ by its version.
            text = redacted(" ".join(str(error).split()), self.token) or type(error).__name__
            if hopeless(error):
                raise FetchError(f"{self.endpoint} can't be asked for {name} ({text})") from None
            raise Transient(f"no usable answer ({text})") from None

    def url(self, part: Part, commit: str, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(part.repo.name, name, revision=commit, endpoint=self.endpoint)

    def origin(self, part: Part) -> str:
        """What is kept beside the weights about where they came from."""
        return redacted(f"{self.endpoint}/{part.repo.name}")

    def download(
        self,
        staging: Staging,
        pin: Pin,
        *,
        kept_revision: str | None,
        nearby: list[Path],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Complete `staging` from the hub; the commit is `pin`'s, else `kept_revision`, else the branch's now.

        `nearby` are incomplete local folders whose good files are used. Raises FetchError or DiskFullError.
        """
        part = staging.part
        revision = pin.commit or kept_revision or part.repo.revision
        listing = self.listing(part, revision)
        _log_commit(part, revision, listing.commit, pin)
        files = _held_to_pin(part, listing, pin)
        origin = self.origin(part)
        known = {name: Entry(f.size, f.sha256) for name, f in files.items() if f.sha256 is not None}
        staging.begin(origin, listing.commit, {name: entry.sha256 for name, entry in known.items()})
        staging.adopt(nearby, origin, listing.commit, known)
        require_space(staging.folder, sum(f.size for f in files.values()) - staging.present(), part.folder)
        whole = staging.finished()
        token = self.token
        pieces = [
            Piece(
                remote=Remote(url=self.url(part, listing.commit, name), size=file.size, token=token),
                path=staging.folder / name,
                size=file.size,
                sha256=file.sha256,
                git_sha1=file.git_sha1,
            )
            for name, file in files.items()
            if name not in whole
        ]
        total = sum(file.size for file in files.values())
        with Progress(part.folder, total, on_progress=on_progress) as progress:
            progress.found(total - sum(piece.size for piece in pieces))
            fetch_all(
                pieces,
                workers=_WORKERS,
                meter=progress,
                patience=self.patience,
                done=lambda piece, entry: staging.record(piece.path.name, entry),
            )


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and _NOT_IN_URL.search(url) is None


def _bare(value: str | None) -> str | None:
    """Kubernetes secrets end in a newline, and `docker --env-file` keeps the quotes of a .env line."""
    return (value or "").strip().strip("\"'").strip() or None


def _log_commit(part: Part, revision: str, commit: str, pin: Pin) -> None:
    if revision == commit:
        log.info("%s: commit %s", part.repo.name, commit)
        return
    log.info("%s: %s is now commit %s, which is kept beside the weights", part.repo.name, revision, commit)
    if pin.seen and not commit.startswith(pin.seen):
        log.warning("%s has moved on since weights.pins.json was written: it was at %s…", part.repo.name, pin.seen)


def _held_to_pin(part: Part, listing: Listing, pin: Pin) -> dict[str, HubFile]:
    """The listing, with the pinned SHA-256 where it has one. FetchError where the two disagree."""
    if pin.commit != listing.commit:
        return dict(listing.files)
    files = {}
    for name, file in listing.files.items():
        entry = pin.files.get(name)
        if entry is not None and (entry.size != file.size or file.sha256 not in (None, entry.sha256)):
            raise FetchError(
                f"{part.repo.name}/{name} on the hub is not the file of weights.pins.json: {file.size} bytes and "
                f"SHA-256 {file.sha256}, pinned {entry.size} bytes and {entry.sha256}"
            )
        files[name] = HubFile(file.size, sha256=entry.sha256 if entry else file.sha256, git_sha1=file.git_sha1)
    if missing := sorted(set(pin.files) - set(files)):
        raise FetchError(f"{part.repo.name} on the hub lacks {missing[0]}, which weights.pins.json names")
    return files

"""The clone of upstream's code: exactly the pinned commit, complete or absent; importing it leaves nothing behind."""

from __future__ import annotations

import http.server
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from weights_kit import ROOT

from emu_cog.errors import CheckpointError, redacted
from emu_cog.settings import UPSTREAM_COMMIT
from emu_cog.upstream import clone as clones
from emu_cog.upstream.clone import ensure_clone, find_clone, verify
from emu_cog.upstream.imports import import_code
from tests.upstream_kit import git, make_clone, make_repository


@pytest.fixture
def repository(tmp_path: Path) -> tuple[str, str]:
    return make_repository(tmp_path / "repository")


class TestClone:
    def test_the_requested_commit_and_no_other(self, tmp_path: Path, repository: tuple[str, str]) -> None:
        url, commit = repository
        (tmp_path / "repository" / "src" / "utils" / "new.py").write_text("later = True\n")
        git(tmp_path / "repository", "add", "-A")
        git(tmp_path / "repository", "commit", "--quiet", "-m", "two")
        clone = ensure_clone(tmp_path / "w", url=url, commit=commit)
        assert clone == tmp_path / "w" / "Emu3.5"
        assert git(clone, "rev-parse", "HEAD") == commit
        assert (clone / "src/utils/model_utils.py").is_file()
        assert not (clone / "src/utils/new.py").exists()
        assert git(clone, "rev-list", "--count", "HEAD") == "1"  # shallow
        assert not (tmp_path / "w" / ".upstream-staging").exists()

    def test_a_second_start_contacts_no_server(self, tmp_path: Path, repository: tuple[str, str]) -> None:
        url, commit = repository
        first = ensure_clone(tmp_path / "w", url=url, commit=commit)
        assert ensure_clone(tmp_path / "w", url="file:///nowhere", commit=commit) == first

    def test_a_clone_of_another_commit_is_replaced(self, tmp_path: Path, repository: tuple[str, str]) -> None:
        url, commit = repository
        ensure_clone(tmp_path / "w", url=url, commit=commit)
        (tmp_path / "repository" / "src" / "utils" / "new.py").write_text("later = True\n")
        git(tmp_path / "repository", "add", "-A")
        git(tmp_path / "repository", "commit", "--quiet", "-m", "two")
        newer = git(tmp_path / "repository", "rev-parse", "HEAD")
        clone = ensure_clone(tmp_path / "w", url=url, commit=newer)
        assert git(clone, "rev-parse", "HEAD") == newer
        assert (clone / "src/utils/new.py").exists()

    @pytest.mark.parametrize("change", ["altered", "removed", "added"])
    def test_a_changed_file_is_noticed_and_restored(
        self, tmp_path: Path, repository: tuple[str, str], change: str
    ) -> None:
        url, commit = repository
        clone = ensure_clone(tmp_path / "w", url=url, commit=commit)
        file = clone / "src/utils/model_utils.py"
        original = file.read_text()
        if change == "altered":
            file.write_text(original + "evil = True\n")
        elif change == "removed":
            file.unlink()
        else:
            (clone / "src/utils/evil.py").write_text("evil = True\n")
        with pytest.raises(CheckpointError, match="differs from commit"):
            verify(clone, commit=commit)
        assert find_clone(tmp_path / "w", commit=commit) is None
        again = ensure_clone(tmp_path / "w", url=url, commit=commit)
        assert (again / "src/utils/model_utils.py").read_text() == original
        assert not (again / "src/utils/evil.py").exists()

    def test_weights_of_that_name_are_left_alone(self, tmp_path: Path, repository: tuple[str, str]) -> None:
        weights = tmp_path / "w" / "Emu3.5"
        weights.mkdir(parents=True)
        (weights / "config.json").write_text("{}")
        clone = ensure_clone(tmp_path / "w", url=repository[0], commit=repository[1])
        assert clone == tmp_path / "w" / "Emu3.5-upstream"
        assert [p.name for p in weights.iterdir()] == ["config.json"]

    def test_without_git(self, tmp_path: Path, repository: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(CheckpointError, match="there is no git on PATH"):
            ensure_clone(tmp_path / "w", url=repository[0], commit=repository[1])

    def test_a_folder_that_is_a_file(self, tmp_path: Path) -> None:
        """Was a traceback."""
        (tmp_path / "w").write_text("")
        with pytest.raises(CheckpointError, match=r"cloned into .*/w \(File exists\).*set EMU_WEIGHTS_DIR"):
            ensure_clone(tmp_path / "w", url="file:///nonexistent")


class TestErrors:
    """An error must keep git's "fatal:" line and advise what the user can change; the first version kept git's last
    lines, which are always the same."""

    @pytest.mark.parametrize(
        ("url", "cause", "advice"),
        [
            ("file:///nonexistent", "fatal: '/nonexistent' does not appear to be a git repository", "on this machine"),
            ("/nonexistent\n", "fatal: '/nonexistent' does not appear to be a git repository", "on this machine"),
            ("http://127.0.0.1:1/x.git", "fatal: unable to access .*127.0.0.1 port 1", "EMU_UPSTREAM_URL and the netw"),
        ],
    )
    def test_of_a_mirror(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, cause: str, advice: str
    ) -> None:
        monkeypatch.setattr(clones, "_FIRST_WAIT", 0.0)
        with pytest.raises(CheckpointError, match=rf"{cause}.*: .*{advice}.*unset EMU_UPSTREAM_URL") as caught:
            ensure_clone(tmp_path / "w", url=url)
        assert "EMU_BACKEND" not in str(caught.value)  # not every caller has another backend
        assert "access rights" not in str(caught.value)
        assert not (tmp_path / "w" / ".upstream-staging").exists()

    def test_of_the_default_url(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(clones, "_FIRST_WAIT", 0.0)
        monkeypatch.setattr(clones, "UPSTREAM_URL", "http://127.0.0.1:1/x.git")
        with pytest.raises(CheckpointError, match=r"check the network .* set EMU_UPSTREAM_URL to a mirror"):
            ensure_clone(tmp_path / "w", url="http://127.0.0.1:1/x.git")

    def test_a_mirror_without_the_commit(self, tmp_path: Path, repository: tuple[str, str]) -> None:
        with pytest.raises(CheckpointError, match=rf"from .* at {UPSTREAM_COMMIT} .*not our ref.*lacks this commit"):
            ensure_clone(tmp_path / "w", url=repository[0])
        assert find_clone(tmp_path / "w") is None
        assert not (tmp_path / "w" / "Emu3.5").exists()

    def test_what_cannot_succeed_is_not_retried(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with SlowFiles(tmp_path) as server, pytest.raises(CheckpointError, match="fatal: repository .* not found"):
            ensure_clone(tmp_path / "w", url=f"{server.url}/none.git")
        assert "attempt 2" not in caplog.text

    def test_credentials_reach_neither_log_nor_error(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(clones, "_FIRST_WAIT", 0.0)
        with caplog.at_level(logging.DEBUG), pytest.raises(CheckpointError) as caught:
            ensure_clone(tmp_path / "w", url="http://joe:s3cret@127.0.0.1:1/x.git?token=s3cret")
        assert "http://***@127.0.0.1:1/x.git?***" in str(caught.value)
        assert "s3cret" not in caplog.text + str(caught.value)

    def test_credentials_do_not_stay_in_the_clone(
        self, tmp_path: Path, repository: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """git keeps the URL it cloned from in .git/config. Here it maps that URL to the repository on this machine."""
        home, url = tmp_path / "home", "https://joe:s3cret@host.invalid/x.git"
        home.mkdir()
        (home / ".gitconfig").write_text(f'[url "{repository[0]}"]\n\tinsteadOf = {url}\n')
        monkeypatch.setenv("HOME", str(home))
        clone = ensure_clone(tmp_path / "w", url=url, commit=repository[1])
        assert git(clone, "config", "remote.origin.url") == "https://***@host.invalid/x.git"
        assert not [p for p in clone.rglob("*") if p.is_file() and b"s3cret" in p.read_bytes()]

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("https://github.com/baaivision/Emu3.5", "https://github.com/baaivision/Emu3.5"),
            ("unable to access 'https://joe:a@b@host/x/': no", "unable to access 'https://***@host/x/': no"),
            ("https://token@host/x?a=b c", "https://***@host/x?*** c"),
            ("from joe:token@host/x at", "from ***@host/x at"),
            ("git@host:x and file:///home/a@b/x", "git@host:x and file:///home/a@b/x"),
        ],
    )
    def test_redacted(self, text: str, shown: str) -> None:
        assert redacted(text) == shown


_CHILD = """
import logging, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from emu_cog.upstream.clone import ensure_clone
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
print(ensure_clone(Path(sys.argv[2]), url=sys.argv[3], commit=sys.argv[4]))
"""


def start(weights: Path, url: str, commit: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _CHILD, str(ROOT), str(weights), url, commit]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class SlowFiles:
    """Serves a folder over HTTP and waits `pause` seconds before every file but the first two."""

    def __init__(self, folder: Path) -> None:
        slow = self
        self.pause, self.requests = 0.0, 0

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                slow.requests += 1
                time.sleep(slow.pause if slow.requests > 2 else 0.0)
                super().do_GET()

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> SlowFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class TestProcesses:
    @pytest.fixture
    def slow(self, tmp_path: Path, repository: tuple[str, str]) -> Iterator[tuple[SlowFiles, str, str]]:
        bare = tmp_path / "served" / "repository.git"
        git(tmp_path, "clone", "--quiet", "--bare", str(tmp_path / "repository"), str(bare))
        git(bare, "update-server-info")
        with SlowFiles(bare.parent) as server:
            yield server, f"{server.url}/repository.git", repository[1]

    def test_a_killed_process_leaves_nothing_that_passes_for_a_clone(
        self, tmp_path: Path, repository: tuple[str, str], slow: tuple[SlowFiles, str, str]
    ) -> None:
        server, url, commit = slow
        server.pause = 30.0
        child = start(tmp_path / "w", url, commit)
        deadline = time.monotonic() + 120
        while server.requests < 3 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        assert (tmp_path / "w" / ".upstream-staging").is_dir()
        assert find_clone(tmp_path / "w", commit=commit) is None
        clone = ensure_clone(tmp_path / "w", url=repository[0], commit=commit)
        verify(clone, commit=commit)
        assert not (tmp_path / "w" / ".upstream-staging").exists()

    def test_of_two_concurrent_processes_one_clones(self, tmp_path: Path, repository: tuple[str, str]) -> None:
        children = [start(tmp_path / "w", *repository) for _ in range(2)]
        printed = [child.communicate(timeout=120) for child in children]
        assert [child.returncode for child in children] == [0, 0], printed
        assert printed[0][0] == printed[1][0] == f"{tmp_path / 'w' / 'Emu3.5'}\n"
        assert sum("cloning file:" in err for _, err in printed) == 1


class TestImport:
    def test_leaves_nothing_behind(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        clone = make_clone(tmp_path)
        modules, path, builtin_print = dict(sys.modules), list(sys.path), print
        code = import_code(clone, dtype=torch.float32, attention="sdpa")
        assert code.model_utils.build_emu3p5.__module__ == "src.utils.model_utils"
        assert not [name for name in sys.modules if name == "src" or name.startswith("src.")]
        assert not {"omegaconf", "einops"} & (set(sys.modules) - set(modules))
        assert sys.path == path
        assert print is builtin_print
        assert not list(clone.rglob("__pycache__"))
        with caplog.at_level(logging.DEBUG, logger="emu_cog"):
            code.model_utils.print("a line", 1)
        assert "upstream: a line 1" in caplog.text

    def test_another_package_src_is_restored(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The user's program may have imported a package of that name."""
        mine = tmp_path / "mine" / "src"
        mine.mkdir(parents=True)
        (mine / "__init__.py").write_text("owner = 'user'\n")
        monkeypatch.syspath_prepend(str(mine.parent))
        import src  # type: ignore[import-not-found]

        try:
            import_code(make_clone(tmp_path), dtype=torch.float32, attention="sdpa")
            assert sys.modules["src"] is src
            assert src.owner == "user"
        finally:
            del sys.modules["src"]

    def test_a_failing_import_leaves_nothing_behind(self, tmp_path: Path) -> None:
        clone = make_clone(tmp_path)
        (clone / "src/utils/model_utils.py").write_text("import src.emu3p5\nraise RuntimeError('no')\n")
        path = list(sys.path)
        with pytest.raises(RuntimeError, match="no"):
            import_code(clone, dtype=torch.float32, attention="sdpa")
        assert not [name for name in sys.modules if name == "src" or name.startswith("src.")]
        assert sys.path == path

"""Files: their names, what is inside them, where they lie, and what happens when the disk is full."""

from __future__ import annotations

import base64
import errno
import html.parser
import logging
import os
import re
import resource
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emu_cog.errors import InputError
from emu_cog.events import Event, Finished, Picture, Progress, RunStats
from emu_cog.log import log
from emu_cog.outputs import Writer, read_settings
from emu_cog.prompt.segments import Text
from emu_cog.request import Request
from emu_cog.service import Service, output_root
from emu_cog.settings import Settings
from tests.conftest import photo

SETTINGS = {"task": "t2i", "seed": 7, "guidance_scale": 5.0, "width": 200, "height": 150, "model": "abc123"}
PICTURE = Picture(output=0, number=1, image=photo(1), codes=((0,),), settings=SETTINGS)


@pytest.fixture(autouse=True)
def _log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Service sets the package's logger up for its process; undo that after each test."""
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)


def writer(folder: Path, *, interleaved: bool = True, output_format: str = "png", prompt: str = "a fox") -> Writer:
    return Writer(folder, task="story", prompt=prompt, interleaved=interleaved, output_format=output_format, quality=90)


@pytest.mark.parametrize(("output_format", "suffix"), [("png", ".png"), ("jpeg", ".jpg"), ("webp", ".webp")])
def test_pictures_carry_their_settings_and_not_the_prompt(output_format: str, suffix: str, tmp_path: Path) -> None:
    path = writer(tmp_path, interleaved=False, output_format=output_format, prompt="my secret").write(PICTURE)
    assert path is not None
    assert path.suffix == suffix
    with Image.open(path) as image:
        assert image.format == output_format.upper()
        assert read_settings(image) == SETTINGS
        difference = np.abs(np.asarray(image.convert("RGB")).astype(int) - np.asarray(PICTURE.image)).mean()
        assert difference == 0 if output_format == "png" else difference < 4
    assert b"secret" not in path.read_bytes()


def test_quality_matters(tmp_path: Path) -> None:
    sizes = [
        Writer(tmp_path, task="t2i", prompt="", interleaved=False, output_format="jpeg", quality=q).write(PICTURE)
        for q in (20, 95)
    ]
    assert sizes[0].stat().st_size < sizes[1].stat().st_size  # type: ignore[union-attr]


def test_names_are_unique_across_predictions(tmp_path: Path) -> None:
    names = {writer(tmp_path).write(PICTURE) for _ in range(20)}
    assert len(names) == 20


def test_interleaved_delivers_texts_and_pictures_in_order_and_a_page(tmp_path: Path) -> None:
    w = writer(tmp_path, prompt="<b>a fox & co</b>")
    events = [
        Text(0, "global_reasoning", "the plan"),
        Text(0, "text", "First <script>alert(1)</script>."),
        PICTURE,
        Text(0, "image_reasoning", "cut", complete=False),
        Finished(0, "limit"),
    ]
    paths = [w.write(event) for event in events]
    assert [p.suffix if p else None for p in paths] == [None, ".txt", ".png", None, None]
    assert paths[1].read_text() == "First <script>alert(1)</script>.\n"  # type: ignore[union-attr]
    page = w.finish()
    assert page is not None
    text = page.read_text()
    assert "<script>" not in text
    assert "<b>a fox" not in text
    assert text.index("the plan") < text.index("First &lt;") < text.index("data:image/png") < text.index("cut")
    assert "(unfinished)" in text
    assert "max_new_tokens was reached" in text
    embedded = re.search(r'src="data:image/png;base64,([^"]+)"', text)
    assert embedded is not None
    assert base64.b64decode(embedded[1]) == paths[2].read_bytes()  # type: ignore[union-attr]
    assert not re.search(r'(src|href)="(?!data:)', text)  # self-contained
    _assert_well_formed(text)


def _assert_well_formed(text: str) -> None:
    class Checker(html.parser.HTMLParser):
        open_tags: list[str]

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open_tags.pop() == tag

    checker = Checker()
    checker.open_tags = []
    checker.feed(text)
    assert checker.open_tags == []


def test_texts_of_sequences_go_to_the_log_as_they_come(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Hosted pages show text files as bare links. No line of a text may be read as progress."""
    caplog.set_level(logging.INFO, logger="emu_cog")
    assert writer(tmp_path).write(Text(0, "text", "Once.\n 50%|##| 1/2\n")) is not None
    assert [record.getMessage() for record in caplog.records] == ["the model wrote: Once.\n|  50%|##| 1/2"]


def test_the_page_follows_the_direction_of_each_text(tmp_path: Path) -> None:
    w = writer(tmp_path, prompt="\u05e9\u05dc\u05d5\u05dd")
    w.write(Text(0, "text", "\u0645\u0631\u062d\u0628\u0627\nhello"))
    page = w.finish()
    assert page is not None
    text = page.read_text()
    assert '<html lang="en" dir="auto">' in text
    # What has no direction of its own decides for the page, first of all the prompt.
    assert re.search(r"<title dir=\"ltr\">.*<small dir=\"ltr\">story</small><p>\u05e9", text, re.DOTALL)
    assert '<p dir="auto">\u0645\u0631\u062d\u0628\u0627</p><p dir="auto">hello</p>' in text


def test_single_pictures_come_alone_and_text_goes_to_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    w = writer(tmp_path, interleaved=False)
    with caplog.at_level(logging.INFO, logger="emu_cog"):
        assert w.write(Text(0, "text", "a note")) is None
    assert "a note" in caplog.text
    assert w.write(PICTURE) is not None
    assert w.finish() is None
    assert len(list(tmp_path.iterdir())) == 1


def test_a_sequence_without_anything_still_has_a_page(tmp_path: Path) -> None:
    w = writer(tmp_path)
    assert w.write(Finished(0, "eos")) is None
    page = w.finish()
    assert page is not None
    assert "without writing anything" in page.read_text()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_reported_and_leaves_no_half_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    big = replace(PICTURE, image=Image.fromarray(noise))
    with files_of_at_most(10_000), pytest.raises(OSError, match="can't be saved, free some space") as caught:
        writer(tmp_path).write(big)
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_of_a_file_is_no_full_disk(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="can't be saved: ") as caught:
        writer(tmp_path / "file").write(PICTURE)
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)


class Canned:
    """A backend that gives `events` and then fails, if `error` is set."""

    def __init__(self, *events: Event, error: Exception | None = None) -> None:
        self.events, self.error = events, error

    def warm_up(self) -> None: ...

    def stream(self, request: Request, *, on_progress: Callable[[Progress], None] | None = None) -> Iterator[Event]:
        yield from self.events
        if self.error:
            raise self.error


def run(root: Path, *events: Event, error: Exception | None = None, **fields: Any) -> tuple[list[Path], dict[str, Any]]:
    """The files and metrics of one prediction."""
    metrics: dict[str, Any] = {}
    given = {"prompt": "a fox", "output_format": "png", "output_quality": 90} | fields
    service = Service(Canned(*events, error=error), root=root)
    return list(service.run(references={}, record_metric=metrics.__setitem__, **given)), metrics


STATS = RunStats(seed=7, size=(288, 160), pictures=2, tokens=300)


def test_metrics_count_pictures_and_report_a_clipped_ratio(tmp_path: Path) -> None:
    _, metrics = run(tmp_path, STATS)
    assert (metrics["image_output_count"], metrics["width"], metrics["height"]) == (2, 288, 160)
    assert "aspect_ratio_made" not in metrics
    _, metrics = run(tmp_path, replace(STATS, clipped="21:9"))
    assert (metrics["aspect_ratio_requested"], metrics["aspect_ratio_made"]) == ("21:9", "9:5")


def test_what_was_made_before_an_error_is_delivered(tmp_path: Path) -> None:
    backend = Canned(Text(0, "text", "one"), PICTURE, error=RuntimeError("the device is gone"))
    files = Service(backend, root=tmp_path).run(
        references={}, record_metric=lambda *_: None, prompt="x", task="story", output_format="png", output_quality=90
    )
    made = []
    with pytest.raises(RuntimeError, match="the device is gone"):
        made.extend(iter(lambda: next(files), None))
    assert [file.suffix for file in made] == [".txt", ".png"]
    assert made[0].read_text() == "one\n"
    assert Image.open(made[1]).size == PICTURE.image.size


class TestOutputFolder:
    """Outputs lay under one fixed name in the temporary folder: for a second user of the machine every request failed,
    and the sweep followed links."""

    def old(self, path: Path) -> Path:
        os.utime(path, (1, 1), follow_symlinks=False)
        return path

    def test_it_is_one_per_user_and_private(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        root = output_root()
        assert root == tmp_path / f"emu-cog-outputs-{os.getuid()}"
        files, _ = run(root, PICTURE)
        assert stat.S_IMODE(root.stat().st_mode) == stat.S_IMODE(files[0].parent.stat().st_mode) == 0o700
        root.chmod(0o777)
        run(root, PICTURE)
        assert stat.S_IMODE(root.stat().st_mode) == 0o700

    @pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
    def test_something_else_in_its_place_is_refused(self, kind: str, tmp_path: Path) -> None:
        root, victim = tmp_path / "root", tmp_path / "victim"
        (victim / "prediction-x").mkdir(parents=True)
        self.old(victim / "prediction-x")
        if kind == "file":
            root.touch()
        else:
            root.symlink_to(victim if kind == "link" else tmp_path / "nowhere")
        with pytest.raises(InputError, match="it is a symbolic link; remove it|it is not a folder; remove it"):
            run(root, PICTURE)
        assert [path.name for path in victim.iterdir()] == ["prediction-x"]

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
    def test_a_strangers_folder_is_refused(self, tmp_path: Path) -> None:
        root = tmp_path / "root"
        root.mkdir()
        os.chown(root, 12345, 12345)
        with pytest.raises(InputError, match=r"belongs to another user \(uid 12345\); remove it, or set TMPDIR"):
            run(root, PICTURE)
        assert list(root.iterdir()) == []

    def test_the_check_comes_before_the_model_is_loaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        output_root().symlink_to(tmp_path)
        with pytest.raises(InputError, match="symbolic link"):
            Service.from_settings(Settings(checkpoint="/no/such/folder"))

    def test_old_predictions_are_swept_and_nothing_else(self, tmp_path: Path) -> None:
        root, stranger = tmp_path / "root", tmp_path / "stranger"
        for folder in (root / "prediction-old", root / "prediction-new", root / "other", stranger):
            folder.mkdir(parents=True)
            (folder / "file").touch()
        (root / "prediction-old" / "link").symlink_to(stranger)
        (root / "prediction-link").symlink_to(stranger)
        (root / "prediction-file").touch()
        for name in ("prediction-old", "other", "prediction-link", "prediction-file"):
            self.old(root / name)
        self.old(stranger)
        files, _ = run(root, PICTURE)
        left = {path.name for path in root.iterdir()} - {files[0].parent.name}
        assert left == {"prediction-new", "other", "prediction-link", "prediction-file"}
        assert (stranger / "file").exists()

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
    def test_a_strangers_folder_inside_is_not_swept(self, tmp_path: Path) -> None:
        folder = tmp_path / "prediction-old"
        folder.mkdir()
        os.chown(folder, 12345, 12345)
        self.old(folder)
        run(tmp_path, PICTURE)
        assert folder.exists()

    def test_a_disk_without_room_for_a_folder_is_one_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> str:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(tempfile, "mkdtemp", full)
        with pytest.raises(OSError, match="no folder for the results can be made: No space left"):
            run(tmp_path, PICTURE)

    @pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
    def test_a_folder_that_cant_be_written_to_is_one_sentence(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(InputError, match="set TMPDIR"):
            run(tmp_path / "root", PICTURE)

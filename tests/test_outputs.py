"""Files: their names, what is inside them, and what happens when the disk is full."""

from __future__ import annotations

import base64
import errno
import html.parser
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emu_cog.events import Finished, Picture
from emu_cog.outputs import Writer, read_settings
from emu_cog.prompt.segments import Text
from tests.conftest import photo

SETTINGS = {"task": "t2i", "seed": 7, "guidance_scale": 5.0, "width": 200, "height": 150, "model": "abc123"}
PICTURE = Picture(output=0, number=1, image=photo(1), codes=((0,),), settings=SETTINGS)


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


def test_names_are_unique_over_predictions(tmp_path: Path) -> None:
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


def test_a_full_disk_is_told_and_leaves_nothing_half(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    big = Picture(
        output=0,
        number=1,
        image=Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)),
        codes=((0,),),
        settings=SETTINGS,
    )
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(OSError, match="can't be saved, free some space") as caught:
            writer(tmp_path).write(big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert list(tmp_path.iterdir()) == []

"""The miniature's world: renderer, judge and text parser against ground truth."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from scripts.mini import evaluate, reading, verdicts
from scripts.mini.judge import detect
from scripts.mini.render import NO_NOISE, NOISE_SIGMA, Batch, palette_and_atlas, picture, places, render, render_clean
from scripts.mini.spec import Seen, Spec, Wanted, held_out, mismatch
from scripts.mini.tasks import MAKERS, sample
from scripts.mini.tasks.sample import TEXT, Sample, TextPart
from scripts.mini.train.encode import draw_square
from scripts.mini.verdicts import Answer
from scripts.mini.world import COLOURS, SHAPES, SIDES, Scene, Thing
from tests.conftest import ROOT

SQUARE = (12, 12)


def seen(scene: Scene) -> Seen:
    return detect(np.asarray(picture(scene)))


def truth(made: Sample) -> Answer:
    """The correct answer to a sample."""
    parts = [p.text if isinstance(p, TextPart) else np.asarray(picture(p)) for p in made.answer if not _hidden(p)]
    return Answer(parts=parts, ended=True)


def _hidden(part: TextPart | Scene) -> bool:
    return isinstance(part, TextPart) and part.kind != TEXT


def test_rendering_does_not_depend_on_the_batch() -> None:
    rng = Random(1)
    scenes = [s for _ in range(4) for s in sample(rng, "howto", *SQUARE).pictures]
    together = render(Batch.of(scenes))
    for scene, pixels in zip(scenes, together, strict=True):
        assert torch.equal(render(Batch.of([scene]))[0], pixels)


def test_a_thing_is_rendered_only_inside_its_box_in_its_colour() -> None:
    scene = Scene(12, 12, "white", "plain", (Thing("square", "blue", "large", 64, 80),), 3)
    clean = render_clean(Batch.of([scene]))[0].permute(1, 2, 0)
    assert clean[80, 64].tolist() == list(COLOURS["blue"])
    outside = torch.ones(192, 192, dtype=torch.bool)
    outside[80 - 36 : 80 + 36, 64 - 36 : 64 + 36] = False
    assert clean[outside].unique(dim=0).tolist() == [list(COLOURS["white"])]


def test_noise_has_its_sigma_and_depends_on_the_seed() -> None:
    scenes = [Scene(12, 12, "grey", "plain", (), seed) for seed in (1, 2, NO_NOISE)]
    batch = Batch.of(scenes)
    *noise, none = (render(batch).float() - render_clean(batch).float()).numpy()
    noise = np.stack(noise)
    assert not none.any()
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - NOISE_SIGMA) < 0.1
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("task", ["t2i", "x2i", "howto", "story", pytest.param("vla", marks=pytest.mark.slow)])
def test_the_judge_accepts_rendered_pictures(task: str) -> None:
    """Correct for at least 99 %, at sides of 160 to 256 pixels."""
    rng, wrong, count = Random(17), [], 0
    while count < 60:
        made = sample(rng, task, *rng.choice(((12, 12), (10, 14), (16, 10))))
        for scene, spec in zip(made.pictures, made.specs, strict=True):
            count += 1
            if found := mismatch(seen(scene), spec):
                wrong.append((made.question, found))
    assert len(wrong) <= count // 100, wrong


def test_the_judge_identifies_every_shape_colour_and_size() -> None:
    wrong, count = [], 0
    for shape in SHAPES:
        for i, colour in enumerate(COLOURS):
            size = tuple(SIDES)[i % 3]
            thing = Thing(shape, colour, size, 96 + i, 90)
            ground = next(c for c in list(COLOURS)[i + 4 :] + list(COLOURS) if c != colour)
            found = seen(Scene(12, 12, ground, "plain", (thing,), i))
            count += 1
            if [(t.shape, t.colour, t.size) for t in found.things] != [(shape, colour, size)]:
                wrong.append((thing, ground, found.things))
    assert len(wrong) <= count // 100, wrong


def test_the_judge_rejects_altered_pictures() -> None:
    """A wrong colour, shape, background or a missing thing is detected in 99 % of pictures."""
    rng, noticed, count = Random(5), 0, 0
    while count < 80:
        made = sample(rng, "x2i", *SQUARE)
        scene, spec = made.pictures[-1], made.specs[-1]
        if not scene.things:
            continue
        thing, *rest = scene.things
        others = {t.colour for t in scene.things} | {scene.background}
        change = count % 4
        if change == 0:
            new = next(c for c in COLOURS if c not in others)
            altered = scene.with_things(replace(thing, colour=new), *rest)
        elif change == 1:
            new = next(s for s in SHAPES if all(t.shape != s for t in scene.things))
            altered = scene.with_things(replace(thing, shape=new), *rest)
        elif change == 2:
            altered = scene.with_things(*rest)
        else:
            altered = replace(scene, background=next(c for c in COLOURS if c not in others))
            if spec.background is None:
                continue
        count += 1
        noticed += mismatch(seen(altered), spec) is not None
    assert noticed >= count * 0.99


def test_mismatch_names_the_error() -> None:
    scene = Scene(12, 12, "blue", "plain", (Thing("star", "red", "small", 40, 40),), 1)
    assert mismatch(seen(scene), Spec((Wanted("star", "red", "small", region="top left"),))) is None
    assert mismatch(seen(scene), Spec((Wanted("star", "red", "small", region="bottom right"),))) is not None
    assert mismatch(seen(scene), Spec((Wanted("moon", "red"),))) is not None
    assert mismatch(seen(scene), Spec((Wanted("star", "red"), Wanted("star", "red")))) == "1 things, not 2"
    assert mismatch(seen(scene), Spec((Wanted("star"),), background="green")) == "background is blue, not green"


@pytest.mark.parametrize(
    "task", [pytest.param("howto", marks=pytest.mark.slow), pytest.param("story", marks=pytest.mark.slow), "explore"]
)
def test_a_correct_answer_passes_but_not_with_pictures_swapped(task: str) -> None:
    rng, right, refused, count = Random(23), 0, 0, 14
    for _ in range(count):
        made = sample(rng, task, *SQUARE)
        answer = truth(made)
        right += verdicts.JUDGES[task](made, answer) is None
        places = [i for i, part in enumerate(answer.parts) if not isinstance(part, str)]
        parts = list(answer.parts)
        parts[places[0]], parts[places[-1]] = parts[places[-1]], parts[places[0]]
        refused += verdicts.JUDGES[task](made, replace(answer, parts=parts)) is not None
    assert right >= count * 0.99
    assert refused >= count - 1  # two views may be identical


def test_correct_moves_are_counted() -> None:
    rng = Random(4)
    made = next(m for m in (sample(rng, "explore", *SQUARE) for _ in range(99)) if len(m.references) == 1)
    answer, asked = truth(made), len(made.pictures)
    assert verdicts.verdict(made, answer) == verdicts.Verdict(None, None, (asked, asked))
    last = answer.parts[-1]
    assert not isinstance(last, str)
    spoilt = replace(answer, parts=[*answer.parts[:-1], 255 - last])
    assert verdicts.verdict(made, spoilt).moves == (asked - 1, asked)
    assert verdicts.verdict(made, replace(answer, parts=answer.parts[:2])).moves == (1, asked)
    turned = ["The camera moves nowhere.", *answer.parts[1:]]
    assert verdicts.verdict(made, replace(answer, parts=turned)).moves[0] < asked
    assert verdicts.verdict(made, Answer()).moves == (0, asked)


def test_an_incomplete_answer_fails() -> None:
    made = sample(Random(2), "story", *SQUARE)
    answer = truth(made)
    assert verdicts.judge_steps(made, replace(answer, ended=False)) is not None
    assert verdicts.judge_steps(made, replace(answer, parts=answer.parts[1:])) is not None
    assert verdicts.judge_last(made, Answer()) == "no picture"


def test_both_spellings_are_parsed() -> None:
    for text in ("two big grey balls above a tiny fish", "Two large gray balls over a small fish."):
        first, second = reading.mentions(text)
        assert (first.count, first.wanted) == (2, Wanted("circle", "grey", "large"))
        assert second.wanted == Wanted("fish", None, "small")
    assert reading.place("draw a star in the top-left corner") == "top left"
    assert reading.place("in the center") == reading.place("in the middle") == "centre"
    assert reading.ground("on a striped blue background") == ("blue", "striped")
    assert reading.move("Then we go left.") == "left"


@pytest.mark.parametrize("task", list(MAKERS))
def test_held_out_combinations_are_never_trained_on(task: str) -> None:
    rng = Random(3)
    assert not any(held_out(sample(rng, task, *SQUARE).key) for _ in range(30))
    assert all(held_out(made.key) for made in evaluate.held_out_samples(task, 5))


@pytest.mark.parametrize("beyond", [False, True])
def test_the_outside_difference_excludes_the_edit(beyond: bool) -> None:
    """Correct edits differ only by noise outside the edit; a shifted picture differs more."""
    rng, small, large = Random(9), [], []
    for _ in range(25):
        made = sample(rng, "x2i", *SQUARE, beyond=beyond)
        after = np.asarray(picture(made.pictures[-1]))
        difference = verdicts.outside_difference(made, after, (192, 192))
        if difference is not None:
            small.append(difference)
            large.append(verdicts.outside_difference(made, np.roll(after, 24, axis=1), (192, 192)))
    assert max(small) < 6
    assert np.mean(large) > 6


def test_the_compilable_renderer_equals_render() -> None:
    """`render` and the compilable `draw_square` are bit-identical."""
    scenes = [p for i in range(3) for p in sample(Random(i), "story", *SQUARE).pictures]
    batch = Batch.of(scenes)
    head, things = torch.from_numpy(batch.head), torch.from_numpy(batch.things)
    drawn = draw_square(head, things, *palette_and_atlas("cpu"), places(192, 192))
    assert torch.equal(drawn, render(batch))


@pytest.mark.parametrize("readme", ["scripts/mini/README.md", "emu_cog/mini/README.md"])
def test_files_named_in_the_readmes_exist(readme: str) -> None:
    """Regression: the README described `reinforce` after its files had been removed."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    for name in set(re.findall(r"(?<![\w/])(?:scripts|emu_cog)/[\w./-]*\w", text)):
        path = ROOT / name
        assert path.exists(), name
        assert path.is_dir() or path.suffix or os.access(path, os.X_OK), f"{name} is not executable"
    for name in set(re.findall(r"`((?:train/|tasks/)?\w+\.(?:py|json))`", text)):
        assert any((ROOT / folder / name).exists() for folder in ("scripts/mini", "emu_cog/mini/model")), name

"""Paraphrases keep a question's meaning; handwritten questions can be parsed."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import numpy as np
import pytest

from emu_cog.weights.store import MINIATURE
from scripts.mini import evaluate, handwritten
from scripts.mini.frames import ENDS
from scripts.mini.judge import detect
from scripts.mini.phrases import INVERSE, MORE_NOUNS, MORE_RELATIONS, MORE_SIZES, MORE_TEXTURES
from scripts.mini.pool import SQUARE
from scripts.mini.render import picture
from scripts.mini.rewording import Rewording, reworded
from scripts.mini.spec import BELOW, BESIDE, mismatch
from scripts.mini.tasks import sample
from scripts.mini.train.sequences import Mix, chunk, draw
from scripts.mini.words import NOUNS, NUMBERS
from scripts.mini.world import COLOURS

SHAPE = {
    form: shape for table in (NOUNS, MORE_NOUNS) for shape, nouns in table.items() for pair in nouns for form in pair
}
SIZE = {word: size for size, words in MORE_SIZES.items() for word in words}
TEXTURE = {word: name for name, words in MORE_TEXTURES.items() for word in words}
COLOUR = {**{name: name for name in COLOURS}, "gray": "grey"}
COUNT = {**{word: n for n, word in enumerate(NUMBERS[:5])}, **{str(n): n for n in (2, 3, 4)}, "pair": 2, "couple": 2}


def mentions(text: str, words: dict[str, str] | dict[str, int]) -> Counter[str | int]:
    """How often `text` names each value of `words`, longest words matched first."""
    found: Counter[str | int] = Counter()
    text = text.lower()
    for word in sorted(words, key=len, reverse=True):
        text, count = re.subn(rf"\b{re.escape(word)}\b", "#", text)
        found[words[word]] += count
    return +found


@pytest.mark.parametrize("task", ["t2i", "x2i", "howto", "story", "explore", "vla"])
def test_paraphrases_mention_the_same_things(task: str) -> None:
    rng, changed = Random(task), 0
    for _ in range(300):
        made = sample(rng, task, *SQUARE)
        text = reworded(rng, made)
        changed += text.lower() != made.question.lower()
        pronoun = task == "x2i" and re.search(r"\b(?:it|its|one|thing|shape|object)\b", text.lower())
        for table in (SHAPE, SIZE, TEXTURE, COLOUR):
            if task == "x2i" and table is SIZE:
                continue  # "bigger" and "enlarge" are not sizes, "a small" may be
            if pronoun and table in (SHAPE, COLOUR):
                assert mentions(text, table) <= mentions(made.question, table), (made.question, text)
                continue
            assert mentions(text, table) == mentions(made.question, table), (made.question, text)
        if task == "t2i":
            numbers = {n: c for n, c in mentions(text, COUNT).items() if n != 1}
            assert numbers == {n: c for n, c in mentions(made.question, COUNT).items() if n != 1}, (made.question, text)
        assert not re.search(r"\ba [aeiou](?!ne\b)", text.lower()), text
        assert not re.search(r"\ban [^aeiou]", text.lower()), text
        assert "  " not in text
        assert "{" not in text
    assert changed > 250


@pytest.mark.parametrize("relation", [name for name in INVERSE if name != BESIDE])
def test_paraphrases_keep_the_relation_in_any_order(relation: str) -> None:
    forms = set()
    for seed in range(300):
        text, fronted = Rewording(Random(seed)).sided("a red tree", relation, "two blue triangles")
        red, blue = re.search("tree", text), re.search("triangle", text)
        assert red
        assert blue
        if all(re.search(rf"{end}(?! of| side)", text) for end in ENDS[relation]):
            own = text[red.end() :] if red.end() > blue.end() else text[red.end() : blue.start()]
            assert ENDS[relation][0] in own, text
            assert ENDS[relation][1] not in own, text
            forms.add("by ends")
            continue
        begins = text.startswith(tuple(MORE_RELATIONS[relation]))
        aside = "them" in text
        between = text[min(red.start(), blue.start()) : max(red.start(), blue.start())]
        around = text if begins or aside else between
        right, wrong = (
            any(f" {word} " in f" {around} ".lower().replace(",", " ") for word in MORE_RELATIONS[name])
            for name in (relation, INVERSE[relation])
        )
        swapped = blue.start() < red.start() and not begins and not aside
        assert (right, wrong) == (not swapped, swapped), text
        assert fronted or not begins
        forms.add((begins, swapped, aside))
    assert len(forms) == 5


@pytest.mark.slow
def test_beyond_combines_several_requirements() -> None:
    rng = Random(3)
    asked = [draw(rng, Mix({"t2i": 1}, beyond=1.0))[0] for _ in range(60)]
    chained = [made for made in asked if made.specs[-1].relations]
    assert 10 < len(chained) < 35
    assert all(" the " in made.question for made in chained)
    lists = [made for made in asked if made not in chained and not made.specs[-1].wanted[0].region]
    assert 10 < len(lists) < 35
    assert all(3 <= len(made.specs[-1].wanted) <= 5 for made in lists)
    assert max(len({(w.shape, w.colour) for w in made.specs[-1].wanted}) for made in lists) == 3
    for made in asked[:20]:
        assert mismatch(detect(np.asarray(picture(made.pictures[0]))), made.specs[0]) is None, made.question
    twice = 0
    for made in (sample(rng, "x2i", *SQUARE, beyond=True) for _ in range(40)):
        before, after = made.references[0], made.pictures[0]
        assert mismatch(detect(np.asarray(picture(after))), made.specs[0]) is None, made.question
        assert mismatch(detect(np.asarray(picture(before))), made.specs[0]) is not None, made.question
        if len({(t.shape, t.colour) for t in before.things}) < len(before.things):
            continue  # an edit of identical things
        twice += 1
        changes = len(set(before.things) ^ set(after.things)) + (before.background != after.background)
        assert changes >= 2, made.question
        assert re.search(" and |, then ", made.question)
    assert 8 < twice < 32
    assert "explore" in {draw(rng, Mix(beyond=1.0))[0].task for _ in range(99)}


def test_paraphrases_keep_each_position() -> None:
    rng = Random(4)
    for _ in range(60):
        text, _ = Rewording(rng).body(
            "a red star at the top left, a blue fish on the right and a white moon in the centre"
        )
        star, fish, moon = (re.search(word, text) for word in ("star", "fish", "moon"))
        assert star
        assert fish
        assert moon
        assert "left" in text[star.end() : fish.start()], text
        assert "right" in text[fish.end() : moon.start()], text
        assert "centre" in text[moon.end() :], text


def test_paraphrases_keep_relations_to_earlier_things() -> None:
    rng, it = Random(6), 0
    for _ in range(80):
        text, _ = Rewording(rng).body(
            "a red star at the top left, a blue fish below the star and a white moon next to the blue fish"
        )
        below, beside = ("|".join(MORE_RELATIONS[name]) for name in (BELOW, BESIDE))
        star = r"(?P<star>it|the (?:five-pointed )?star)\b"
        fish = rf"fish\b.*? (?:{below}) {star}|(?:{below}) {star}.*? fish\b".replace("P<star>", "P<again>", 1)
        found = re.search(rf"star\b.* left\b.*? (?:{fish})(?P<rest>.*)", text)
        assert found, text
        it += "it" in (found["star"], found["again"])
        assert "moon" in found["rest"], text
        assert re.search(rf"\b(?:{beside}) the blue fish", found["rest"]), text
    assert 10 < it < 60


def test_two_edits_are_paraphrased_separately() -> None:
    rng, order = Random(2), "make the star blue and then remove the red tree"
    for _ in range(60):
        text = Rewording(rng).x2i(order).lower()
        second = re.search(r"tree|red (?:one|thing|shape|object)", text)
        assert second, text
        assert "star" in text[: second.start()], text
        assert "blue" in text[: second.start()], text


def test_paraphrases_are_reproducible_by_seed() -> None:
    made = sample(Random(1), "t2i", *SQUARE)
    assert reworded(Random(5), made) == reworded(Random(5), made)
    assert len({reworded(Random(n), made) for n in range(20)}) > 10


@pytest.mark.skipif(not (MINIATURE / "model").is_dir(), reason="no trained miniature in this package")
def test_wordings_share_their_pictures() -> None:
    job = (3, 40, MINIATURE / "model")
    once, thrice = chunk((*job, Mix({"t2i": 1}))), chunk((*job, Mix({"t2i": 1}, wordings=3)))
    assert len(once.lengths) == 40
    assert 100 < len(thrice.lengths) <= 120  # only one wording without text
    pictures = sum(len(firsts) for _, firsts in thrice.scenes.values())
    assert pictures == 40
    ends = np.cumsum(thrice.lengths)
    lines = [thrice.ids[end - n : end] for end, n in zip(ends, thrice.lengths, strict=True)]
    blanks = [int(line.max()) for line in lines]  # the last of each picture
    assert len(set(blanks)) == 40
    assert max(Counter(blanks).values()) == 3


@pytest.mark.parametrize("sheet", handwritten.SHEETS)
@pytest.mark.parametrize("task", handwritten.TASKS)
def test_handwritten_questions_can_be_parsed(task: str, sheet: str) -> None:
    made = handwritten.samples(task, *SQUARE, sheet=sheet)
    assert len(made) == len({(m.question, m.references) for m in made}) >= 20
    for one in made:
        if task == "x2i" and len(one.pictures[0].things) == len(one.specs[0].wanted):
            assert mismatch(detect(np.asarray(picture(one.pictures[0]))), one.specs[0]) is None, one.question
            assert mismatch(detect(np.asarray(picture(one.references[0]))), one.specs[0]) is not None, one.question


def test_unknown_words_in_a_handwritten_thing_are_rejected() -> None:
    for words in ("small rde star", "small red", "red star @somewhere"):
        with pytest.raises(ValueError, match="no "):
            handwritten.thing(words)


def test_evaluate_offers_other_wordings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    plain = evaluate.worded_samples("grammar", "t2i", 8, 5)
    other = evaluate.worded_samples("reworded", "t2i", 8, 5)
    assert [m.specs for m in plain] == [m.specs for m in other]
    assert sum(a.question != b.question for a, b in zip(plain, other, strict=True)) > 5
    by_hand = evaluate.worded_samples("handwritten", "t2i", 90, 5)
    assert len(by_hand) == 90
    assert by_hand[0].question == by_hand[40].question
    monkeypatch.setattr("sys.argv", ["evaluate", "--words", "handwritten", "--tasks", "t2i", "story"])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "supports --tasks t2i x2i" in capsys.readouterr().err

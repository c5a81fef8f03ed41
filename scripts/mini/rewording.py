"""The same question in other words: what the grammar's sentences mean, as people might put it.

The tasks' makers word their questions by one grammar each; a model that learnt those alone stumbles over "one red star"
or ", blue background". Here a finished question is taken apart and put together anew, its meaning kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from scripts.mini.phrases import (
    CORNERS,
    EDITS,
    HUES,
    IMPERATIVES,
    INVERSE,
    MORE_NOUNS,
    MORE_RELATIONS,
    MORE_SIZES,
    MORE_TEXTURES,
    OPENINGS,
)
from scripts.mini.reading import COLOUR, RELATION, SHAPE, SIZE, TEXTURE, any_of
from scripts.mini.tasks.sample import Sample
from scripts.mini.words import NOUNS, NUMBERS, article

_THING = re.compile(
    rf"^(?P<number>an?|the|two|three|four|[2-4])(?: (?P<size>{any_of(SIZE)}))?(?: (?P<colour>{HUES}))?"
    rf" (?P<noun>{any_of(SHAPE)})$"
)
_OPENING = re.compile(r"^(?:a picture of|an image of|draw|show me|please draw|I want) ", re.IGNORECASE)
_GROUND = re.compile(r" (?:on|against|with) an? (?P<words>[a-z ]+) background$")
_GROUND_TOLD = re.compile(r"\. The background is (?P<words>[a-z ]+)$")
_SIDED = re.compile(rf"^(?P<a>.+?) (?P<relation>{any_of(RELATION)}) (?P<b>.+)$")
_BETWEEN = re.compile(r"^(?P<a>.+) between (?P<b>.+) and (?P<c>.+)$")
_PLACE = re.compile(
    r"^(?P<a>.+) (?P<words>(?:in|at|on) the (?:top|bottom|left|right|cent(?:re|er)|middle)[a-z -]*)$",
)
_POLITE = re.compile(r"^(?:please |can you |edit the picture: )", re.IGNORECASE)


@dataclass(frozen=True)
class Thing:
    """A phrase taken apart. `number` counts; 0 is "the"."""

    number: int
    size: str | None
    colour: str | None
    noun: str

    @classmethod
    def read(cls, phrase: str) -> Thing | None:
        found = _THING.match(phrase)
        if not found:
            return None
        word = found["number"]
        number = {"a": 1, "an": 1, "the": 0}.get(word) if not word.isdigit() else int(word)
        return cls(NUMBERS.index(word) if number is None else number, found["size"], found["colour"], found["noun"])


class Rewording:
    """One way of putting things, kept for a whole question."""

    def __init__(self, rng: Random, *, own_nouns: bool = True) -> None:
        self.rng, self.own_nouns = rng, own_nouns
        self.gray = rng.random() < 0.5
        self.nouns: dict[str, tuple[str, str]] = {}

    # -- 1. phrases ------------------------------------------------------------------------------------------

    def thing(self, phrase: str) -> str:
        """ "one tiny red star" for "a small red star"; what is no such phrase stays as it is."""
        found = Thing.read(phrase)
        return phrase if found is None else self._thing(found)

    def _thing(self, thing: Thing) -> str:
        rng = self.rng
        colour = self.colour(thing.colour)
        size = thing.size and rng.choice(MORE_SIZES[SIZE[thing.size]])
        noun = self.noun(thing.noun, plural=thing.number > 1)
        if size and colour:
            words = rng.choices((f"{size} {colour} {noun}", f"{colour} {size} {noun}", f"{size}, {colour} {noun}"),
                                (10, 1, 1))[0]  # fmt: skip
        elif colour and thing.number and rng.random() < 0.06:
            words = rng.choice((f"{noun} in {colour}", f"{colour}-colored {noun}", f"{colour}-coloured {noun}"))
        else:
            words = " ".join(w for w in (size, colour, noun) if w)
        return f"{self._count(thing.number, words)} {words}"

    def _count(self, number: int, words: str) -> str:
        rng = self.rng
        if number == 0:
            return "the"
        if number == 1:
            return rng.choices((article(words), "one", "a single", "1"), (12, 4, 1, 1))[0]
        if number == 2 and rng.random() < 0.15:
            return rng.choice(("a pair of", "a couple of"))
        return NUMBERS[number] if rng.random() < 0.75 else str(number)

    def colour(self, word: str | None) -> str | None:
        return ("gray" if self.gray else "grey") if word in ("grey", "gray") else word

    def noun(self, noun: str, *, plural: bool) -> str:
        """One word for a shape throughout a question."""
        shape = SHAPE[noun]
        if shape not in self.nouns:
            known = next(pair for pair in NOUNS[shape] if noun in pair)
            more = MORE_NOUNS.get(shape, ()) if self.own_nouns else ()
            self.nouns[shape] = self.rng.choice(more) if more and self.rng.random() < 0.3 else known
        return self.nouns[shape][plural]

    def ground(self, words: str) -> str:
        """ "blue", "striped blue", "blue striped" of "plain blue", "striped and blue" and the like."""
        parts = [w for w in words.split() if w not in ("plain", "and")]
        colour = next(w for w in parts if w in COLOUR)
        pattern = [self.rng.choice(MORE_TEXTURES[TEXTURE[w]]) for w in parts if w in TEXTURE]
        told = [self.colour(colour) or "", *pattern]
        return " ".join(told if self.rng.random() < 0.5 else told[::-1])

    def relation(self, word: str, *, inverse: bool = False) -> str:
        name = RELATION[word]
        return self.rng.choice(MORE_RELATIONS[INVERSE[name] if inverse else name])

    def place(self, words: str) -> str:
        """ "in the upper left corner of the picture" for "at the top left"."""
        rng = self.rng
        for plain, other in CORNERS.items():
            if re.search(rf"{plain}[ -](?:left|right)", words) and rng.random() < 0.35:
                words = words.replace(plain, other)
        if words.startswith("at the") and rng.random() < 0.3:
            words = words.replace("at the", "near the", 1)
        if "corner" not in words and rng.random() < 0.25:
            words += rng.choice((" of the picture", " of the image"))
        return words

    # -- 2. words to a picture -------------------------------------------------------------------------------

    def t2i(self, text: str) -> str:
        ground = None
        for pattern in (_GROUND, _GROUND_TOLD):
            if found := pattern.search(text):
                ground, text = self.ground(found["words"]), text[: found.start()]
        body = _lower(_OPENING.sub("", text))
        many = not body.startswith(("a ", "an "))
        body, fronted = self.body(body)
        opened = body if fronted else self._opened(body, many)
        if ground is None:
            return opened
        an = article(ground)
        is_are = "are" if many else "is"
        if not fronted and self.rng.random() < 0.3:
            return self.rng.choice(
                (
                    f"on {an} {ground} background, {body}",
                    f"on {an} {ground} background: {body}",
                    f"{an} {ground} background with {body}",
                    f"{ground} background, {body}",
                    f"{ground} background with {body}",
                    f"on {an} {ground} background there {is_are} {body}",
                )
            )
        ending = self.rng.choice(
            (
                f" on {an} {ground} background",
                f" on {an} {ground} background",
                f", {ground} background",
                f", {ground} background",
                f", on {an} {ground} background",
                f", with {an} {ground} background",
                f" in front of {an} {ground} background",
                f" on {an} {ground} backdrop",
                f" on {ground}",
                f", background: {ground}",
                f", the background is {ground}",
                f". The background should be {ground}",
                f". {ground[0].upper()}{ground[1:]} background",
            )
        )
        return opened + ending

    def body(self, text: str) -> tuple[str, bool]:
        """What is to be seen, the background left out, and whether that begins with where it is."""
        rng = self.rng
        if found := _BETWEEN.match(text):
            a, b, c = (self.thing(found[name]) for name in "abc")
            return rng.choice(
                (
                    (f"{a} between {b} and {c}", False),
                    (f"{a} in between {b} and {c}", False),
                    (f"{b} and {c} with {a} between them", False),
                    (f"{b} and {c}, and {a} between them", False),
                    (f"between {b} and {c}, {a}", True),
                )
            )
        if found := _PLACE.match(text):
            a, place = self.thing(found["a"]), self.place(found["words"])
            return rng.choice(
                ((f"{a} {place}", False), (f"{a} {place}", False), (f"{a}, {place}", False), (f"{place}, {a}", True))
            )
        if found := _SIDED.match(text):
            return self.sided(found["a"], found["relation"], found["b"])
        things = [self.thing(phrase) for phrase in re.split(r", | and ", text)]
        if len(things) == 1:
            return things[0], False
        last = rng.choice((" and ", ", and ", ", ", " and also ", " plus ") if len(things) > 2 else
                          (" and ", " and ", ", ", " with ", " plus ", " and also "))  # fmt: skip
        return ", ".join(things[:-1]) + last + things[-1], False

    def sided(self, first: str, relation: str, second: str) -> tuple[str, bool]:
        rng = self.rng
        a, b = self.thing(first), self.thing(second)
        over, under = self.relation(relation), self.relation(relation, inverse=True)
        them = "it" if second.startswith(("a ", "an ")) else "them"
        is_are = "is" if first.startswith(("a ", "an ")) else "are"
        if rng.random() < 0.12:
            return f"{over} {b}, {a}", True
        forms = (
            f"{a} {over} {b}",
            f"{b} {under} {a}",
            f"{b} with {a} {over} {them}",
            f"{a} that {is_are} {over} {b}",
            f"{b} and, {over} {them}, {a}",
        )
        return rng.choices(forms, (4, 2, 2, 1, 1))[0], False

    def _opened(self, body: str, many: bool) -> str:
        is_are = "are" if many else "is"
        form = self.rng.choice(
            (
                "{}",
                "{}",
                "{}",
                "{}",
                "a picture of {}",
                "an image of {}",
                "a drawing of {}",
                "an illustration of {}",
                "a simple picture with {}",
                "a scene with {}",
                "draw {}",
                "paint {}",
                "show {}",
                "show me {}",
                "create {}",
                "create an image of {}",
                "generate {}",
                "make a picture of {}",
                "please draw {}",
                "please make an image with {}",
                "can you draw {}",
                "could you paint {}",
                "I want {}",
                "I want to see {}",
                "I would like {}",
                "I'd like a picture of {}",
                f"there {is_are} {{}}",
                f"there {is_are} {{}}",
                "we see {}",
            )
        )
        return form.format(body)

    # -- 3. edits --------------------------------------------------------------------------------------------

    def x2i(self, text: str) -> str:
        order = _lower(_POLITE.sub("", text)).rstrip("?")
        for pattern, forms in EDITS:
            if found := re.match(pattern, order):
                parts = {k: self._part(k, v) for k, v in found.groupdict("").items()}
                parts |= {f"a_{k}": f"{article(v)} {v}" for k, v in parts.items() if v}
                order = self.rng.choice(forms).format(**parts, it="them" if " and " in found[0] else "it")
                break
        plain = order.split(" ")[0] in IMPERATIVES
        form = self.rng.choice(
            ("{}", "{}", "{}", "{}", "please {}", "can you {}", "could you {}", "I want you to {}", "now {}") if plain
            else ("{}", "{}", "in this picture, {}", "now {}")
        )  # fmt: skip
        return form.format(order)

    def _part(self, name: str, words: str) -> str:
        if name in ("what", "new"):
            return self.thing(words)
        if name == "hue":
            return self.colour(words) or ""
        if name == "ground":
            return self.ground(words)
        if name == "where" and (found := re.match(rf" (?P<relation>{any_of(RELATION)}) (?P<b>.+)$", words)):
            return f" {self.relation(found['relation'])} {self.thing(found['b'])}"
        return words

    # -- 4. the other tasks ----------------------------------------------------------------------------------

    def lightly(self, text: str) -> str:
        """Another opening where the question has one that is known here."""
        low = _lower(text)
        for opening, others in OPENINGS:
            if low.startswith(opening):
                return self.rng.choice((opening, *others)) + low[len(opening) :]
        return low


def _lower(text: str) -> str:
    return text if text.startswith(("I ", "I'")) else text[:1].lower() + text[1:]


def reworded(rng: Random, made: Sample) -> str:
    """The sample's question in other words."""
    ends_in = made.question[-1] if made.question[-1] in "?." else ""
    text = made.question.rstrip(".")
    rewording = Rewording(rng, own_nouns=made.task in ("t2i", "x2i"))
    ways: dict[str, Callable[[str], str]] = {"t2i": rewording.t2i, "x2i": rewording.x2i}
    text = " ".join(ways.get(made.task, rewording.lightly)(text).split())
    if text.startswith(("can you", "could you")):
        ends_in = rng.choice(("?", ""))
    elif made.task in ways:
        ends_in = "." if ". " in text or rng.random() < 0.4 else ""
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text.rstrip("?") + ends_in

"""Paraphrases questions without changing their meaning.

The tasks word their questions by one grammar each, and a model trained on it alone misreads "one red star" or ", blue
background". Here a finished question is parsed and worded anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from scripts.mini import asking, frames
from scripts.mini.phrases import (
    CORNERS,
    EDITS,
    ELSE,
    HUES,
    IMPERATIVES,
    INVERSE,
    MORE_NOUNS,
    MORE_RELATIONS,
    MORE_SIZES,
    MORE_TEXTURES,
    PLAINLY,
    POLITE,
)
from scripts.mini.reading import COLOUR, RELATION, SHAPE, SIZE, TEXTURE, any_of
from scripts.mini.tasks.sample import Sample
from scripts.mini.words import NOUNS, NUMBERS, article, unlisted, with_article

_THING = re.compile(
    rf"^(?P<number>an?|the|two|three|four|[2-4])(?: (?P<size>{any_of(SIZE)}))?(?: (?P<colour>{HUES}))?"
    rf" (?P<noun>{any_of(SHAPE)})$"
)
_PLURALS = {more for pairs in NOUNS.values() for one, more in pairs if more != one}
_OPENING = re.compile(r"^(?:a picture of|an image of|draw|show me|please draw|I want) ", re.IGNORECASE)
_GROUND = re.compile(r" (?:on|against|with) an? (?P<words>[a-z ]+) background$")
_GROUND_SENTENCE = re.compile(r"\. The background is (?P<words>[a-z ]+)$")
_SIDED = re.compile(rf"^(?P<a>.+?) (?P<relation>{any_of(RELATION)}) (?P<b>.+)$")
_BETWEEN = re.compile(r"^(?P<a>.+) between (?P<b>.+) and (?P<c>.+)$")
_PLACE = re.compile(
    r"^(?P<a>.+) (?P<words>(?:in|at|on) the (?:top|bottom|left|right|cent(?:re|er)|middle)[a-z -]*)$",
)
_STANDING = re.compile(rf"^(?P<a>.+?) (?P<relation>{any_of(RELATION)}) (?P<b>the .+)$")
_TWO = re.compile(rf"(?: and then |, then | and )(?=(?:{any_of(IMPERATIVES)}) )")
_POLITE = re.compile(r"^(?:please |can you |edit the picture: )", re.IGNORECASE)


@dataclass(frozen=True)
class Thing:
    """A parsed noun phrase; `number` 0 is "the"."""

    number: int
    size: str | None
    colour: str | None
    noun: str

    @classmethod
    def read(cls, phrase: str) -> Thing | None:
        match = _THING.match(phrase)
        if not match:
            return None
        word = match["number"]
        number = {"a": 1, "an": 1, "the": 0}.get(word) if not word.isdigit() else int(word)
        return cls(NUMBERS.index(word) if number is None else number, match["size"], match["colour"], match["noun"])


class Rewording:
    """The random choices of style for one question. `alone`: the picture to edit shows only one thing."""

    def __init__(self, rng: Random, *, own_nouns: bool = True, alone: bool = False) -> None:
        self.rng, self.own_nouns, self.alone = rng, own_nouns, alone
        self.gray = rng.random() < 0.5
        self.terse = rng.random() < 0.15
        self.nouns: dict[str, tuple[str, str]] = {}

    # -- 1. phrases ------------------------------------------------------------------------------------------

    def thing(self, phrase: str) -> str:
        """ "one tiny red star" for "a small red star"; other text is returned unchanged."""
        thing = Thing.read(phrase)
        return phrase if thing is None else self._thing(thing)

    def _thing(self, thing: Thing) -> str:
        rng = self.rng
        colour = self.colour(thing.colour)
        size = thing.size and rng.choice(MORE_SIZES[SIZE[thing.size]])
        several = thing.number > 1 or (thing.number == 0 and thing.noun in _PLURALS)
        noun = self.noun(thing.noun, plural=several)
        after = ""
        if size and colour:
            words = rng.choices((f"{size} {colour} {noun}", f"{colour} {size} {noun}", f"{size}, {colour} {noun}"),
                                (10, 1, 1))[0]  # fmt: skip
        else:
            words = " ".join(w for w in (size, colour, noun) if w)
        if colour and thing.number and rng.random() < 0.09:
            bare = f"{size} {noun}" if size else noun
            words, after = rng.choice(
                (
                    (bare, f" in {colour}"),
                    (bare, f" ({colour})"),
                    (bare, f" which {'are' if thing.number > 1 else 'is'} {colour}"),
                    (f"{colour}-colored {noun}" if not size else f"{size} {colour}-colored {noun}", ""),
                    (f"{colour}-coloured {noun}" if not size else f"{size} {colour}-coloured {noun}", ""),
                )
            )
        if thing.number and self.own_nouns and rng.random() < 0.04:
            words = f"{rng.choice(frames.FILLERS)} {words}"
        return f"{self._count(thing.number, words)} {words}{after}".strip()

    def _count(self, number: int, words: str) -> str:
        rng = self.rng
        if number == 0:
            return "the"
        if number == 1:
            if self.terse:
                return ""
            return rng.choices((article(words), "one", "a single", "1", "just one"), (12, 4, 1, 1, 0.3))[0]
        if number == 2 and rng.random() < 0.15:
            return rng.choice(("a pair of", "a couple of"))
        return NUMBERS[number] if rng.random() < 0.75 else str(number)

    def colour(self, word: str | None) -> str | None:
        return ("gray" if self.gray else "grey") if word in ("grey", "gray") else word

    def noun(self, noun: str, *, plural: bool) -> str:
        """A noun for the shape, the same throughout a question."""
        shape = SHAPE[noun]
        if shape not in self.nouns:
            known = next(pair for pair in NOUNS[shape] if noun in pair)
            more = MORE_NOUNS.get(shape, ()) if self.own_nouns else ()
            self.nouns[shape] = self.rng.choice(more) if more and self.rng.random() < 0.3 else known
        return self.nouns[shape][plural]

    def ground(self, words: str) -> str:
        """ "blue", "striped blue", "blue striped" for "plain blue", "striped and blue" and the like."""
        parts = [w for w in words.split() if w not in ("plain", "and")]
        colour = next(w for w in parts if w in COLOUR)
        pattern = [self.rng.choice(MORE_TEXTURES[TEXTURE[w]]) for w in parts if w in TEXTURE]
        adjectives = [self.colour(colour) or "", *pattern]
        if pattern and self.rng.random() < 0.2:
            return f"{pattern[0]} {adjectives[0]}" if self.rng.random() < 0.5 else f"{adjectives[0]} and {pattern[0]}"
        return " ".join(adjectives if self.rng.random() < 0.5 else adjectives[::-1])

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
        if "side" in words and rng.random() < 0.5:
            words = words.replace("side", "hand side", 1)
        if "corner" not in words and rng.random() < 0.25:
            words += rng.choice((" of the picture", " of the image", " of the frame"))
        elif self.terse or rng.random() < 0.08:
            words = re.sub(r"^(?:in|at|on) the ", "", words)
        return words

    # -- 2. t2i ------------------------------------------------------------------------------------------

    def t2i(self, text: str) -> str:
        body, many, ground, fronted = self.content(_OPENING.sub("", text))
        rng = self.rng
        if ground and not fronted and rng.random() < 0.25:
            sentence = self._framed(rng.choice(frames.GROUND_FIRST), body, many, ground)
        else:
            opened = body if fronted else self._framed(rng.choice(frames.OPENED), body, many)
            sentence = opened + (self._framed(rng.choice(frames.GROUND_LAST), "", many, ground) if ground else "")
        return sentence + rng.choice(frames.ENDED)

    def content(self, text: str) -> tuple[str, bool, str | None, bool]:
        """Paraphrase a picture's content: (text, whether it starts with a plural, background, whether it starts with a
        position)."""
        ground = None
        for pattern in (_GROUND, _GROUND_SENTENCE):
            if match := pattern.search(text):
                ground, text = self.ground(match["words"]), text[: match.start()]
        text = _lower(text)
        body, fronted = self.body(text)
        return body, not text.startswith(("a ", "an ")), ground, fronted

    def _framed(self, frame: str, body: str, many: bool, ground: str | None = None) -> str:
        parts = {"{is_are}": "are" if many else "is", "{.}": _upper(body), "{}": body}
        if ground:
            parts |= {"{a_ground}": with_article(ground), "{ground}": ground, "{Ground}": _upper(ground)}
        return _fill(frame, parts)

    def body(self, text: str) -> tuple[str, bool]:
        """Paraphrase the content without background; also whether it is unsuitable after an opening."""
        rng = self.rng
        phrases = unlisted(text)
        if len(phrases) > 1 and (all(map(_PLACE.match, phrases)) or any(map(_STANDING.match, phrases))):
            return self._joined(self.one_by_one(phrases)), False
        if match := _BETWEEN.match(text):
            parts = {f"{{{name}}}": self.thing(match[name]) for name in "abc"} | {"{is_are}": "is"}
            if rng.random() < 0.15:
                return _fill(rng.choice(frames.BETWEEN_FRONTED), parts), True
            frame = _weighted_choice(rng, frames.BETWEEN)
            return _fill(frame, parts), _is_sentence(frame)
        if match := _PLACE.match(text):
            a, place = self.thing(match["a"]), self.place(match["words"])
            return rng.choice(
                ((f"{a} {place}", False), (f"{a} {place}", False), (f"{a}, {place}", False), (f"{place}, {a}", True),
                 (f"{place} {a}", True), (f"{a} is {place}", True), (f"{a} that is {place}", False))
            )  # fmt: skip
        if match := _SIDED.match(text):
            return self.sided(match["a"], match["relation"], match["b"])
        things = self.one_by_one(phrases)
        return (things[0] if len(things) == 1 else self._joined(things)), False

    def one_by_one(self, phrases: list[str]) -> list[str]:
        """Paraphrase things that may have positions, absolute or relative to an earlier thing."""
        rng, described = self.rng, list[str]()
        head = _PLACE.match(phrases[0])
        known = Thing.read(head["a"] if head else phrases[0])
        plain = True  # "it" can only refer to the first thing
        for phrase in phrases:
            if placed := _PLACE.match(phrase):
                described.append(f"{self.thing(placed['a'])} {self.place(placed['words'])}")
            elif match := _STANDING.match(phrase):
                meant = Thing.read(match["b"])
                plain = plain and bool(meant and known and meant.noun == known.noun)
                anchor = "it" if plain and rng.random() < 0.35 else self.thing(match["b"])
                a, relation = self.thing(match["a"]), self.relation(match["relation"])
                described.append(f"{relation} {anchor} {a}" if rng.random() < 0.08 else f"{a} {relation} {anchor}")
            else:
                described.append(self.thing(phrase))
        return described

    def _joined(self, things: list[str]) -> str:
        links = (" and ", ", and ", ", ", " and also ", " plus ")
        more = () if len(things) > 2 else (" and ", " with ", " together with ")
        last = self.rng.choice((*links, *more, *((". Also ", ". And ") if self.own_nouns else ())))
        return ", ".join(things[:-1]) + last + things[-1]

    def sided(self, first: str, relation: str, second: str) -> tuple[str, bool]:
        rng = self.rng
        over, under = self.relation(relation), self.relation(relation, inverse=True)
        one, other = (words.startswith(("a ", "an ")) for words in (first, second))
        parts = {
            "{a}": self.thing(first),
            "{b}": self.thing(second),
            "{over}": over,
            "{Over}": _upper(over),
            "{under}": under,
            "{them}": "it" if other else "them",
            "{is_are}": "is" if one else "are",
            "{has_have}": "has" if other else "have",
        }
        name = RELATION[relation]
        if rng.random() < 0.1:
            return _fill(rng.choice(frames.FRONTED), parts), True
        if name in frames.ENDS and rng.random() < 0.06:
            here, there = frames.ENDS[name]
            return _fill(rng.choice(frames.BY_ENDS), parts | {"{here}": here, "{there}": there}), False
        frame = _weighted_choice(rng, frames.SIDED)
        return _fill(frame, parts), _is_sentence(frame)

    # -- 3. edits --------------------------------------------------------------------------------------------

    def x2i(self, text: str) -> str:
        orders = _TWO.split(_lower(_POLITE.sub("", text)).rstrip("?"))
        first, *more = [self._order(order) for order in orders]
        form = self.rng.choice(POLITE if first.split(" ")[0] in IMPERATIVES else PLAINLY)
        text = form.format(first)
        for order in more:
            joint = self.rng.choice(
                (" and ", ", and ", ", then ", " and then ", " and also ", ". Then ", ". Also, ", "; ")
            )
            text += joint + order
        return text + self.rng.choice(ELSE)

    def _order(self, order: str) -> str:
        for pattern, forms in EDITS:
            if match := re.match(pattern, order):
                parts = {k: self._part(k, v) for k, v in match.groupdict("").items()}
                parts |= {f"a_{k}": with_article(v) for k, v in parts.items() if v}
                return self.rng.choice(forms).format(**parts, it="them" if " and " in match[0] else "it")
        return order

    def _part(self, name: str, words: str) -> str:
        if name == "what":
            return self._reference(words)
        if name == "new":
            return self.thing(words)
        if name == "hue":
            return self.colour(words) or ""
        if name == "ground":
            return self.ground(words)
        if name == "where" and (match := re.match(rf" (?P<relation>{any_of(RELATION)}) (?P<b>.+)$", words)):
            anchor = "it" if self.alone and self.rng.random() < 0.3 else self.thing(match["b"])
            return f" {self.relation(match['relation'])} {anchor}"
        return words

    def _reference(self, words: str) -> str:
        """A reference to an existing thing: "it" if it is the only one, or its colour, or its name."""
        if self.alone and self.rng.random() < 0.4:
            return "it"
        if self.own_nouns and self.rng.random() < 0.06 and (hue := re.match(rf"the ({HUES}) ", words)):
            return f"the {self.colour(hue[1])} {self.rng.choice(('one', 'thing', 'shape', 'object'))}"
        return self.thing(words)


def _lower(text: str) -> str:
    return text if text.startswith(("I ", "I'")) else text[:1].lower() + text[1:]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _fill(frame: str, parts: Mapping[str, str]) -> str:
    """Fill in all placeholders at once."""
    return re.sub(r"\{[^}]*\}", lambda match: parts[match[0]], frame)


def _is_sentence(frame: str) -> bool:
    """Whether the frame is a full sentence, so that no opening may precede it."""
    return "{a} {is_are}" in frame and ". " not in frame


def _weighted_choice(rng: Random, forms: Sequence[tuple[str, int]]) -> str:
    return rng.choices([form for form, _ in forms], [weight for _, weight in forms])[0]


def reworded(rng: Random, made: Sample) -> str:
    """The sample's question, paraphrased."""
    ends_in = made.question[-1] if made.question[-1] in "?." else ""
    text = made.question.rstrip(".")
    pictures = made.task in ("t2i", "x2i")
    alone = made.task == "x2i" and len(made.references) == 1 and len(made.references[0].things) == 1
    rewording = Rewording(rng, own_nouns=pictures, alone=alone)
    ways: dict[str, Callable[[str], str]] = {
        "t2i": rewording.t2i,
        "x2i": rewording.x2i,
        "howto": partial(asking.howto, rewording),
        "story": partial(asking.story, rewording),
        "explore": partial(asking.explore, rewording),
        "vla": partial(asking.vla, rewording),
    }
    text = " ".join(ways[made.task](text).split()).replace(" ,", ",").replace(" .", ".").replace(" ;", ";")
    if text.startswith(("can ", "could ", "would ", "how ")):
        ends_in = rng.choice(("?", ""))
    elif pictures or "?" in ends_in:
        ends_in = "." if ". " in text or rng.random() < 0.4 else ""
    if rng.random() < 0.5:
        text = _upper(text)
    return text.rstrip("?") + ends_in

"""English phrases about the world by a grammar, in British and American spelling."""

from __future__ import annotations

import re
from random import Random

from scripts.mini.spec import ABOVE, BELOW, BESIDE, LEFT, RIGHT

NOUNS: dict[str, tuple[tuple[str, str], ...]] = {
    "circle": (("circle", "circles"), ("ball", "balls"), ("disc", "discs")),
    "square": (("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"),),
    "star": (("star", "stars"),),
    "heart": (("heart", "hearts"),),
    "cross": (("cross", "crosses"),),
    "moon": (("moon", "moons"), ("crescent", "crescents")),
    "house": (("house", "houses"),),
    "tree": (("tree", "trees"),),
    "fish": (("fish", "fish"),),
}
SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "big", "huge"),
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
RELATION_WORDS = {
    ABOVE: ("above", "over"),
    BELOW: ("below", "under", "beneath"),
    LEFT: ("to the left of", "left of"),
    RIGHT: ("to the right of", "right of"),
    BESIDE: ("next to", "beside"),
}
TEXTURE_WORDS = {"fading": ("fading",), "striped": ("striped",), "checked": ("checked",)}


class Speaker:
    """Phrases of one sample: a random generator with one spelling and one noun per shape."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.american = rng.random() < 0.5
        self._nouns: dict[str, tuple[str, str]] = {}

    def colour(self, name: str) -> str:
        return "gray" if name == "grey" and self.american else name

    def colour_word(self) -> str:
        return "color" if self.american else "colour"

    def centre_word(self) -> str:
        return self.rng.choice(("center" if self.american else "centre", "middle"))

    def noun(self, shape: str, *, plural: bool = False) -> str:
        """The same noun for a shape throughout a sample; the default one at least 60 % of the time."""
        if shape not in self._nouns:
            forms = NOUNS[shape]
            self._nouns[shape] = forms[0] if self.rng.random() < 0.6 else self.rng.choice(forms)
        return self._nouns[shape][plural]

    def size(self, size: str) -> str:
        words = SIZE_WORDS[size]
        return words[0] if self.rng.random() < 0.6 else self.rng.choice(words)

    def a(self, shape: str, colour: str | None = None, size: str | None = None, count: int = 1) -> str:
        """ "a small red star", "two fish"."""
        words = [self.size(size)] if size else []
        words += [self.colour(colour)] if colour else []
        words.append(self.noun(shape, plural=count > 1))
        if count > 1:
            return " ".join([NUMBERS[count] if self.rng.random() < 0.85 else str(count), *words])
        return with_article(" ".join(words))

    def the(self, shape: str, colour: str | None = None, size: str | None = None, count: int = 1) -> str:
        """ "the red star", "the two red stars"."""
        words = [NUMBERS[count]] if count > 1 else []
        words += [self.size(size)] if size else []
        words += [self.colour(colour)] if colour else []
        return " ".join(["the", *words, self.noun(shape, plural=count > 1)])

    def relation(self, name: str) -> str:
        return self.rng.choice(RELATION_WORDS[name])

    def place(self, region: str) -> str:
        """ "in the top left corner", "at the bottom", "in the centre"."""
        if region == "centre":
            return f"in the {self.centre_word()}"
        if " " in region:
            hyphen = self.rng.random() < 0.2
            corner = region.replace(" ", "-") if hyphen else region
            return self.rng.choice((f"in the {corner} corner", f"in the {corner}", f"at the {corner}"))
        if region in ("left", "right"):
            return self.rng.choice((f"on the {region}", f"on the {region} side"))
        return f"at the {region}"

    def ground(self, background: str, texture: str = "plain") -> str:
        """ "yellow background", "striped blue background"."""
        words = [self.colour(background), "background"]
        if texture != "plain":
            words.insert(self.rng.choice((0, 0, 1)), self.rng.choice(TEXTURE_WORDS[texture]))
        elif self.rng.random() < 0.1:
            words.insert(0, "plain")
        return " ".join(words)

    def a_ground(self, background: str, texture: str = "plain") -> str:
        return with_article(self.ground(background, texture))


def article(words: str) -> str:
    """The indefinite article for `words`."""
    return "an" if words[0] in "aeiou" else "a"


def with_article(words: str) -> str:
    """ "an orange fish" for "orange fish"."""
    return f"{article(words)} {words}"


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return text[0].upper() + text[1:] + "."


def listing(phrases: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def unlisted(text: str) -> list[str]:
    """The inverse of `listing`."""
    return re.split(r", | and ", text)

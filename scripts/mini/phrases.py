"""The other words: for things and places, and for whole orders and openings. rewording.py puts them in."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.mini.reading import COLOUR, any_of
from scripts.mini.wish import ABOVE, BELOW, BESIDE, LEFT, RIGHT

MORE_NOUNS: dict[str, tuple[tuple[str, str], ...]] = {
    "circle": (("dot", "dots"), ("disk", "disks")),
    "cross": (("plus sign", "plus signs"),),
    "moon": (("crescent moon", "crescent moons"), ("half moon", "half moons")),
    "house": (("cottage", "cottages"), ("hut", "huts")),
    "star": (("five-pointed star", "five-pointed stars"),),
    "heart": (("heart shape", "heart shapes"),),
    "fish": (("fish", "fishes"),),
}
MORE_SIZES = {
    "small": ("small", "little", "tiny", "mini"),
    "medium": ("medium", "medium-sized", "medium sized", "mid-sized"),
    "large": ("large", "big", "huge", "giant", "enormous"),
}
MORE_TEXTURES = {
    "fading": ("fading", "gradient"),
    "striped": ("striped", "stripy"),
    "checked": ("checked", "checkered", "chequered"),
}
MORE_RELATIONS = {
    ABOVE: ("above", "over", "on top of", "higher than"),
    BELOW: ("below", "under", "beneath", "underneath", "lower than"),
    LEFT: ("to the left of", "left of", "on the left of", "on the left side of"),
    RIGHT: ("to the right of", "right of", "on the right of", "on the right side of"),
    BESIDE: ("next to", "beside", "by", "close to", "near"),
}
INVERSE = {ABOVE: BELOW, BELOW: ABOVE, LEFT: RIGHT, RIGHT: LEFT, BESIDE: BESIDE}
CORNERS = {"top": "upper", "bottom": "lower"}
HUES = any_of(COLOUR)

IMPERATIVES = frozenset(
    ("make", "turn", "paint", "change", "color", "colour", "recolor", "recolour", "replace", "swap", "exchange", "put",
     "enlarge", "shrink", "increase", "decrease", "add", "insert", "include", "draw", "place", "remove", "delete",
     "erase", "take", "get", "move", "shift", "slide", "bring", "set", "give", "use", "copy")
)  # fmt: skip
_WHAT = r"(?P<what>the [a-z -]+?)"
EDITS: Sequence[tuple[str, Sequence[str]]] = (
    (
        rf"(?:make|turn|paint|recolou?r) {_WHAT} (?P<hue>{HUES})$",
        ("make {what} {hue}", "change {what} to {hue}", "{what} should be {hue}", "I want {what} to be {hue}",
         "color {what} {hue}", "colour {what} {hue}", "give {what} {a_hue} color", "turn {what} {hue}"),
    ),
    (
        rf"change the colou?r of {_WHAT} to (?P<hue>{HUES})$",
        ("change {what}'s color to {hue}", "change {what}'s colour to {hue}", "change the color of {what} to {hue}",
         "make {what} {hue} instead", "set the color of {what} to {hue}"),
    ),
    (
        rf"(?:replace|turn|swap) {_WHAT} (?:with|into|for) (?P<new>an? .+)$",
        ("replace {what} with {new}", "replace {what} by {new}", "change {what} into {new}", "change {what} to {new}",
         "put {new} in place of {what}", "{what} should become {new}", "exchange {what} for {new}",
         "turn {what} into {new}", "instead of {what}, draw {new}"),
    ),
    (
        rf"make {_WHAT} (?:larger|bigger)$",
        ("enlarge {what}", "make {what} bigger", "make {what} larger", "increase the size of {what}",
         "{what} should be bigger", "I want {what} to be larger"),
    ),
    (
        rf"make {_WHAT} smaller$",
        ("shrink {what}", "make {what} smaller", "decrease the size of {what}", "{what} should be smaller",
         "I want {what} to be smaller"),
    ),
    (
        r"(?:add|put|draw|place) (?P<new>an? [a-z -]+?)"
        r"(?P<where>(?: (?:in|at|on|above|over|below|under|beneath|to|left|right|next|beside)\b.*)?)$",
        ("add {new}{where}", "insert {new}{where}", "put {new}{where}", "draw {new}{where}", "paint {new}{where}",
         "place {new}{where}", "I want {new}{where}", "there should be {new}{where}"),
    ),
    (
        rf"(?:remove|delete|erase|take) {_WHAT}(?: away)?$",
        ("remove {what}", "delete {what}", "get rid of {what}", "take {what} away", "take away {what}",
         "erase {what}", "remove {what} from the picture", "make {what} disappear", "{what} should disappear",
         "{what} should go"),
    ),
    (
        rf"(?:move|put|shift) {_WHAT}(?P<where> (?:in|at|on|to|above|over|below|under|beneath|left|right|next|beside)\b"
        r"(?!.*\bpicture\b)(?!.*\bimage\b).*)$",
        ("move {what}{where}", "shift {what}{where}", "put {what}{where}", "slide {what}{where}", "bring {what}{where}",
         "{what} should be{where}"),
    ),
    (
        r"(?:change the background to|use) an? (?P<ground>[a-z ]+) background$",
        ("change the background to {ground}", "the background should be {ground}", "I want {a_ground} background",
         "give it {a_ground} background", "make the background {ground}", "set the background to {ground}"),
    ),
    (
        rf"(?:make|turn) the background (?P<ground>[a-z ]*\b(?:{HUES})\b[a-z ]*)$",
        ("make the background {ground}", "the background should be {ground}", "change the background to {ground}",
         "use {a_ground} background", "put it all on {a_ground} background"),
    ),
    (
        rf"(?:put|add|place) {_WHAT} from the (?P<from>[a-z]+) (?P<noun>picture|image) into the (?P<into>[a-z]+)"
        r" (?:picture|image)(?:, (?P<where>.*))?$",
        ("take {what} from the {from} {noun} and put {it} into the {into} {noun} {where}",
         "take {what} from the {from} {noun} and put {it} in the {into} {noun} {where}",
         "copy {what} from the {from} {noun} to the {into} {noun} {where}",
         "put {what} of the {from} {noun} into the {into} {noun} {where}",
         "add {what} from the {from} {noun} to the {into} {noun} {where}"),
    ),
)  # fmt: skip
"""Orders by what they ask for, the first that fits, and other ways to say so."""
OPENINGS: Sequence[tuple[str, Sequence[str]]] = (
    ("how do I draw ", ("how can I draw ", "how would I draw ", "how does one draw ")),
    ("how to draw ", ("tutorial: how to draw ", "how to paint ", "steps to draw ")),
    ("show me step by step how to draw ", ("show me how to draw ", "show step by step how to draw ")),
    ("teach me to draw ", ("teach me how to draw ", "help me draw ", "I want to learn to draw ")),
    ("explain how to draw ", ("tell me how to draw ", "explain step by step how to draw ")),
    ("tell me a story about ", ("make up a story about ", "tell the story of ", "I want a story about ")),
    ("tell a story about ", ("create a story about ", "illustrate a story about ")),
    ("a story about ", ("the story of ", "a picture story about ", "a short story about ")),
    ("write a story about ", ("write a short story about ", "please write a story about ")),
    ("explore ", ("look around ", "let us explore ")),
    ("walk ", ("wander ", "please walk ", "take a walk ")),
    ("go ", ("head ", "please go ", "let us go ")),
    ("move ", ("please move ", "now move ")),
    ("put ", ("please put ", "set ", "can you put ")),
    ("place ", ("please place ", "set ")),
    ("pick up ", ("please pick up ", "take ", "grab ")),
)

"""Synonyms for things and positions, and sentence templates for edits; used by rewording.py."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.mini.reading import COLOUR, any_of
from scripts.mini.spec import ABOVE, BELOW, BESIDE, LEFT, RIGHT

MORE_NOUNS: dict[str, tuple[tuple[str, str], ...]] = {
    "circle": (("dot", "dots"), ("disk", "disks"), ("round ball", "round balls")),
    "square": (("cube", "cubes"), ("block", "blocks")),
    "cross": (("plus sign", "plus signs"),),
    "moon": (("crescent moon", "crescent moons"), ("half moon", "half moons")),
    "house": (("cottage", "cottages"), ("hut", "huts"), ("home", "homes")),
    "tree": (("pine tree", "pine trees"), ("fir tree", "fir trees")),
    "star": (("five-pointed star", "five-pointed stars"),),
    "heart": (("heart shape", "heart shapes"),),
    "fish": (("fish", "fishes"),),
}
MORE_SIZES = {
    "small": ("small", "small", "little", "tiny", "mini", "miniature"),
    "medium": ("medium", "medium-sized", "medium sized", "mid-sized", "middle-sized"),
    "large": ("large", "large", "big", "huge", "giant", "enormous", "massive", "great big"),
}
MORE_TEXTURES = {
    "fading": ("fading", "gradient", "fading", "faded"),
    "striped": ("striped", "stripy"),
    "checked": ("checked", "checkered", "chequered", "checkerboard"),
}
MORE_RELATIONS = {
    ABOVE: ("above", "above", "over", "on top of", "higher than", "directly above", "right above", "somewhere above"),
    BELOW: ("below", "below", "under", "beneath", "underneath", "lower than", "directly below", "right under"),
    LEFT: ("to the left of", "left of", "on the left of", "on the left side of"),
    RIGHT: ("to the right of", "right of", "on the right of", "on the right side of"),
    BESIDE: ("next to", "beside", "by", "close to", "near", "right next to", "alongside"),
}
INVERSE = {ABOVE: BELOW, BELOW: ABOVE, LEFT: RIGHT, RIGHT: LEFT, BESIDE: BESIDE}
CORNERS = {"top": "upper", "bottom": "lower"}
HUES = any_of(COLOUR)

IMPERATIVES = frozenset(
    ("make", "turn", "paint", "change", "color", "colour", "recolor", "recolour", "replace", "swap", "exchange", "put",
     "enlarge", "shrink", "increase", "decrease", "add", "insert", "include", "draw", "place", "remove", "delete",
     "erase", "take", "get", "move", "shift", "slide", "bring", "set", "give", "use", "copy", "scale", "drop", "push",
     "relocate", "convert", "transform", "substitute", "keep", "let", "have", "clear")
)  # fmt: skip
_WHAT = r"(?P<what>the [a-z -]+?)"
EDITS: Sequence[tuple[str, Sequence[str]]] = (
    (
        rf"(?:make|turn|paint|recolou?r) {_WHAT} (?P<hue>{HUES})$",
        ("make {what} {hue}", "change {what} to {hue}", "{what} should be {hue}", "I want {what} to be {hue}",
         "color {what} {hue}", "colour {what} {hue}", "give {what} {a_hue} color", "turn {what} {hue}",
         "paint {what} {hue}", "let {what} be {hue}", "recolor {what} to {hue}", "recolour {what} as {hue}",
         "I'd like {what} in {hue}", "{what} must be {hue}", "{what} in {hue} instead", "make {what} {hue} instead"),
    ),
    (
        rf"change the colou?r of {_WHAT} to (?P<hue>{HUES})$",
        ("change {what}'s color to {hue}", "change {what}'s colour to {hue}", "change the color of {what} to {hue}",
         "make {what} {hue} instead", "set the color of {what} to {hue}",
         "the colour of {what} should be {hue}", "switch {what} to {hue}"),
    ),
    (
        rf"(?:replace|turn|swap) {_WHAT} (?:with|into|for) (?P<new>an? .+)$",
        ("replace {what} with {new}", "replace {what} by {new}", "change {what} into {new}", "change {what} to {new}",
         "put {new} in place of {what}", "{what} should become {new}", "exchange {what} for {new}",
         "turn {what} into {new}", "instead of {what}, draw {new}", "make {what} {new}", "swap {what} with {new}",
         "swap {what} for {new}", "{new} instead of {what}", "I want {new} instead of {what}",
         "transform {what} into {new}", "convert {what} to {new}", "switch {what} for {new}",
         "where {what} is, put {new}", "{what} should be {new}"),
    ),
    (
        rf"make {_WHAT} (?:larger|bigger)$",
        ("enlarge {what}", "make {what} bigger", "make {what} larger", "increase the size of {what}",
         "{what} should be bigger", "I want {what} to be larger", "make {what} a bit bigger", "scale {what} up",
         "scale up {what}", "{what} needs to be bigger", "make {what} grow", "{what} is too small",
         "increase {what} in size"),
    ),
    (
        rf"make {_WHAT} smaller$",
        ("shrink {what}", "make {what} smaller", "decrease the size of {what}", "{what} should be smaller",
         "I want {what} to be smaller", "make {what} a bit smaller", "scale {what} down", "scale down {what}",
         "{what} needs to be smaller", "reduce the size of {what}", "make {what} shrink", "{what} is too big"),
    ),
    (
        r"(?:add|put|draw|place) (?P<new>an? [a-z -]+?)"
        r"(?P<where>(?: (?:in|at|on|above|over|below|under|beneath|to|left|right|next|beside)\b.*)?)$",
        ("add {new}{where}", "insert {new}{where}", "put {new}{where}", "draw {new}{where}", "paint {new}{where}",
         "place {new}{where}", "I want {new}{where}", "there should be {new}{where}", "include {new}{where}",
         "also add {new}{where}", "I'd like {new}{where}", "let there be {new}{where}", "can we have {new}{where}",
         "give me {new}{where}", "show {new}{where}", "{new}{where} is missing", "add in {new}{where}",
         "have {new}{where}"),
    ),
    (
        rf"(?:remove|delete|erase|take) {_WHAT}(?: away)?$",
        ("remove {what}", "delete {what}", "get rid of {what}", "take {what} away", "take away {what}",
         "erase {what}", "remove {what} from the picture", "make {what} disappear", "{what} should disappear",
         "{what} should go", "I don't want {what}", "I do not want {what} in it", "take {what} out", "take out {what}",
         "drop {what}", "lose {what}", "make {what} go away", "clear {what} away", "without {what}",
         "the same picture without {what}", "{what} should not be there", "remove {what} from the image",
         "I don't need {what} anymore", "let {what} vanish"),
    ),
    (
        rf"(?:move|put|shift) {_WHAT}(?P<where> (?:in|at|on|to|above|over|below|under|beneath|left|right|next|beside)\b"
        r"(?!.*\bpicture\b)(?!.*\bimage\b).*)$",
        ("move {what}{where}", "shift {what}{where}", "put {what}{where}", "slide {what}{where}", "bring {what}{where}",
         "{what} should be{where}", "relocate {what}{where}", "I want {what}{where}", "push {what}{where}",
         "place {what}{where}", "move {what} so that it is{where}", "let {what} be{where}", "{what} belongs{where}"),
    ),
    (
        r"(?:change the background to|use) an? (?P<ground>[a-z ]+) background$",
        ("change the background to {ground}", "the background should be {ground}", "I want {a_ground} background",
         "give it {a_ground} background", "make the background {ground}", "set the background to {ground}",
         "replace the background with {a_ground} one", "use {a_ground} background instead", "{ground} background",
         "background: {ground}", "can we have {a_ground} background"),
    ),
    (
        rf"(?:make|turn) the background (?P<ground>[a-z ]*\b(?:{HUES})\b[a-z ]*)$",
        ("make the background {ground}", "the background should be {ground}", "change the background to {ground}",
         "use {a_ground} background", "put it all on {a_ground} background", "let the background be {ground}",
         "make the backdrop {ground}", "switch the background to {ground}", "turn the background {ground}",
         "the background must be {ground}", "I'd like the background to be {ground}"),
    ),
    (
        rf"(?:put|add|place) {_WHAT} from the (?P<from>[a-z]+) (?P<noun>picture|image) into the (?P<into>[a-z]+)"
        r" (?:picture|image)(?:, (?P<where>.*))?$",
        ("take {what} from the {from} {noun} and put {it} into the {into} {noun} {where}",
         "take {what} from the {from} {noun} and put {it} in the {into} {noun} {where}",
         "copy {what} from the {from} {noun} to the {into} {noun} {where}",
         "put {what} of the {from} {noun} into the {into} {noun} {where}",
         "add {what} from the {from} {noun} to the {into} {noun} {where}",
         "place {what} from the {from} {noun} in the {into} {noun} {where}",
         "insert {what} of the {from} {noun} in the {into} {noun} {where}",
         "I want {what} from the {from} {noun} in the {into} {noun} {where}",
         "move {what} from the {from} {noun} over to the {into} {noun} {where}"),
    ),
)  # fmt: skip
"""Patterns for edit instructions (the first match applies), each with equivalent templates."""
ELSE = ("", "", "", "", "", "", ", please", " please", ", and leave the rest", ", keep everything else",
        ", but keep everything else the same", " without changing anything else", ". Keep the rest as it is",
        ", nothing else", ". Thanks", ", thank you")  # fmt: skip
"""Endings of an instruction."""
POLITE = ("{}", "{}", "{}", "{}", "{}", "{}", "please {}", "can you {}", "could you {}", "I want you to {}", "now {}",
          "would you {}", "edit this: {}", "in this picture, {}", "I would like you to {}", "just {}")  # fmt: skip
"""Frames for instructions that start with an imperative."""
PLAINLY = ("{}", "{}", "{}", "{}", "in this picture, {}", "now {}", "edit: {}")
"""Frames for all other instructions."""

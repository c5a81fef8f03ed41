"""Edits of pictures with several identical things."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from scripts.mini.layout import interior, put, put_all
from scripts.mini.spec import Spec, Wanted
from scripts.mini.tasks import x2i
from scripts.mini.tasks.sample import Sample, colour, noise_seed, shape, unchanged
from scripts.mini.words import NUMBERS, Speaker
from scripts.mini.world import Scene, Thing


def more(rng: Random, rows: int, columns: int) -> Sample | None:
    """Two changes at once, or an edit of a picture with several identical things; None if the layout failed."""
    return rng.choice((x2i.twice, alike))(rng, rows, columns)


def alike(rng: Random, rows: int, columns: int) -> Sample | None:
    """A picture with two or three identical things, and an edit of all of them, one of them, or another thing."""
    few = x2i.scene(rng, rows, columns, rng.choice((1, 1, 2)))
    if few is None:
        return None
    kind = Thing(
        shape(rng, *(t.shape for t in few.things)),
        colour(rng, few.background, *(t.colour for t in few.things)),
        rng.choice(("small", "small", "medium")),
        0,
        0,
    )
    equal = put_all(rng, [kind] * rng.choice((2, 2, 3)), few.things, interior(few.width, few.height))
    if equal is None:
        return None
    before, speaker = replace(few, things=(*few.things, *equal)), Speaker(rng)
    operation = rng.choice((*x2i.MAKERS, "recolour all", "remove all", "reshape all", "remove one", "one more"))
    if operation in x2i.MAKERS:
        edit = x2i.MAKERS[operation](rng, speaker, before, True)
        own = speaker.noun(kind.shape)
        if edit is None or own in edit.order or not all(t in edit.after.things for t in equal):
            return None  # ambiguous: any of the identical things could be meant
    else:
        edit = _edit_alike(rng, speaker, before, equal, operation)
    return edit and x2i.sample_of(rng, edit.order, (before,), edit, f"alike {operation}")


def _edit_alike(rng: Random, speaker: Speaker, before: Scene, equal: list[Thing], operation: str) -> x2i.Edit | None:
    kind, count, others = equal[0], len(equal), [t for t in before.things if t not in equal]
    hue = None if rng.random() < 0.5 else kind.colour
    bare = " ".join(w for w in (hue and speaker.colour(hue), speaker.noun(kind.shape, plural=True)) if w)
    them = rng.choice((f"the {bare}", f"the {bare}", f"all {bare}", f"the {NUMBERS[count]} {bare}"))
    if count == 2 and rng.random() < 0.3:
        them = f"both {bare}"
    one, left = Wanted(kind.shape, kind.colour, kind.size), list(equal)
    loose: list[Wanted] | None = None  # set where it is open which of them stay or where one is added
    if operation == "recolour all":
        new = colour(rng, before.background, *(t.colour for t in before.things))
        left = [replace(t, colour=new) for t in equal]
        order = rng.choice(("make {} {}", "turn {} {}", "paint {} {}")).format(them, speaker.colour(new))
    elif operation == "reshape all":
        form = shape(rng, *(t.shape for t in before.things))
        left = [replace(t, shape=form) for t in equal]
        plural = speaker.noun(form, plural=True)
        order = rng.choice(("replace {} with {}", "turn {} into {}", "swap {} for {}")).format(them, plural)
    elif operation == "remove all":
        left = []
        order = rng.choice(("remove {}", "delete {}", "take {} away", "erase {}")).format(them)
    elif operation == "remove one":
        left.remove(rng.choice(equal))
        loose = [one] * len(left)
        order = f"{rng.choice(('remove', 'delete', 'erase'))} one of the {bare}"
    else:
        extra = put(rng, kind, before.things, interior(before.width, before.height))
        if extra is None:
            return None
        left.append(extra)
        loose = [*map(unchanged, equal), one]
        order = f"add {rng.choice(('another', 'one more'))} {speaker.a(kind.shape, hue).split(' ', 1)[1]}"
    after = replace(before, things=(*others, *left), seed=noise_seed(rng))
    wanted = [unchanged(t) for t in left] if loose is None else loose
    spec = Spec((*map(unchanged, others), *wanted), background=before.background, texture=before.texture)
    return x2i.Edit(order, after, spec)

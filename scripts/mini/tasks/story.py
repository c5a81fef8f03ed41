"""A character goes from place to place: a sentence and a picture per scene."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from scripts.mini.layout import interior, put
from scripts.mini.spec import Spec, Wanted
from scripts.mini.tasks.sample import GLOBAL, Sample, TextPart, colour, noise_seed, shape, size
from scripts.mini.words import NUMBERS, Speaker, listing, sentence
from scripts.mini.world import COLOURS, Scene, Thing

MEETINGS = (
    "{hero} comes to {place}",
    "{hero} finds {place}",
    "{hero} visits {place}",
    "{hero} meets {place}",
    "{hero} stands beside {place}",
)
OPENERS = ("first, ", "then ", "next, ", "after that, ", "at last, ")
SKIES = ("the sky is {}", "everything around is {}", "the land is {}")


def make(rng: Random, rows: int, columns: int, *, reasoning: float = 0.25) -> Sample | None:
    """One sample of 3 to 5 scenes, or None if the layout failed."""
    count = rng.choice((3, 3, 4, 4, 5))
    hero = Thing(shape(rng), colour(rng), rng.choice(("small", "medium")), 0, 0)
    kinds = rng.sample([s for s in COLOURS if s != hero.colour], count)
    places = [Thing(shape(rng, hero.shape), hue, size(rng), 0, 0) for hue in kinds]
    speaker = Speaker(rng)
    scenes, specs = [], []
    for place in places:
        ground = colour(rng, hero.colour, place.colour)
        height, width = rows * 16, columns * 16
        there = put(rng, place, (), interior(width, height))
        here = there and put(rng, hero, [there], interior(width, height))
        if not there or not here:
            return None
        scenes.append(Scene(rows, columns, ground, "plain", (there, here), noise_seed(rng)))
        wanted = (Wanted(place.shape, place.colour), Wanted(hero.shape, hero.colour, hero.size))
        specs.append(Spec(wanted, background=ground))

    question, names_places = _question(rng, speaker, hero, places)
    answer: list[TextPart | Scene] = []
    if rng.random() < reasoning or not names_places:
        goals = listing([speaker.a(p.shape, p.colour) for p in places])
        answer.append(TextPart(f"{sentence(speaker.the(hero.shape, hero.colour))[:-1]} will see {goals}.", GLOBAL))
    sky = rng.choice(SKIES)
    for i, (scene, place) in enumerate(zip(scenes, places, strict=True)):
        opener = OPENERS[4 if i == count - 1 else min(i, 3)] if rng.random() < 0.7 else ""
        line = rng.choice(MEETINGS).format(
            hero=speaker.the(hero.shape, hero.colour), place=speaker.a(place.shape, place.colour)
        )
        words = f"{sentence(opener + line)} {sentence(sky.format(speaker.colour(scene.background)))}"
        answer += [TextPart(words), scene]
    references: tuple[Scene, ...] = ()
    if rng.random() < 0.15:  # show the hero as a reference
        alone = put(rng, hero, (), interior(columns * 16, rows * 16))
        assert alone
        references = (Scene(rows, columns, colour(rng, hero.colour), "plain", (alone,), noise_seed(rng)),)
    key = " ".join(["story", hero.colour, hero.shape, *(f"{p.colour} {p.shape}" for p in places[:2])])
    specs = [replace(w) for w in specs]
    return Sample("story", question, references, tuple(answer), tuple(specs), key)


def _question(rng: Random, speaker: Speaker, hero: Thing, places: list[Thing]) -> tuple[str, bool]:
    """The question, and whether it names the places; if not, the answer starts with a plan."""
    who = speaker.a(hero.shape, hero.colour, hero.size if hero.size == "small" or rng.random() < 0.3 else None)
    names_places = rng.random() < 0.75
    opening = rng.choice(
        ("tell a story about {}", "tell me a story about {}", "a story about {}", "write a story about {}")
    )
    text = opening.format(who)
    if names_places:
        goals = listing([speaker.a(p.shape, p.colour) for p in places])
        text += rng.choice((" that visits {}", " that meets {}", " that goes to {}", " who visits {}")).format(goals)
    else:
        text += rng.choice((" in {} scenes", " with {} pictures", " in {} pictures")).format(NUMBERS[len(places)])
    if rng.random() < 0.6:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.4 else ""), names_places

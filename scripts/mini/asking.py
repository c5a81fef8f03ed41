"""Paraphrases for the four interleaved tasks: howto, story, explore and vla."""

from __future__ import annotations

import re
from random import Random
from typing import Protocol

from scripts.mini.reading import RELATION, any_of
from scripts.mini.words import unlisted, with_article


class Voice(Protocol):
    """The methods of `Rewording` used here."""

    rng: Random

    def thing(self, phrase: str) -> str: ...
    def relation(self, word: str, *, inverse: bool = False) -> str: ...
    def content(self, text: str) -> tuple[str, bool, str | None, bool]: ...


_LESSON = re.compile(
    r"^(?:how do I draw|how to draw|show me step by step how to draw|teach me to draw|explain how to draw|draw)"
    r" (?P<goal>.+?)(?: step by step)?\??$",
    re.IGNORECASE,
)
LESSONS = (
    "how can I draw {}",
    "how would I draw {}",
    "how does one draw {}",
    "how do you draw {}",
    "how do I draw {}",
    "how do I paint {}",
    "how to draw {}",
    "how to paint {}",
    "tutorial: {}",
    "a tutorial on how to draw {}",
    "steps to draw {}",
    "draw {} in steps",
    "draw {}, step by step",
    "show me how to draw {}",
    "show me how to paint {} step by step",
    "teach me how to draw {}",
    "teach me to draw {}",
    "help me draw {}",
    "I want to learn how to draw {}",
    "I want to draw {}. How do I do it?",
    "explain how to draw {}",
    "tell me how to draw {}",
    "guide me through drawing {}",
    "a step by step guide to drawing {}",
    "step by step: {}",
    "can you show me how to draw {}",
    "can you teach me to draw {}",
)
_STORY = re.compile(
    r"^(?:tell a story about|tell me a story about|a story about|write a story about) (?P<who>.+?)"
    r"(?: (?:that visits|that meets|that goes to|who visits) (?P<places>.+)"
    r"| (?:in|with) (?P<number>\w+) (?:scenes|pictures))$",
    re.IGNORECASE,
)
STORIES = (
    "tell a story about {}",
    "tell me a story about {}",
    "tell me a short story about {}",
    "a story about {}",
    "a short story about {}",
    "a picture story about {}",
    "story: {}",
    "the story of {}",
    "the adventures of {}",
    "the journey of {}",
    "write a story about {}",
    "write me a story about {}",
    "make up a story about {}",
    "create an illustrated story about {}",
    "illustrate a story about {}",
    "I want a story about {}",
    "please tell a story about {}",
    "can you tell me a story about {}",
    "once upon a time there was {}",
)
MEETS = ("that visits", "who visits", "visiting", "that meets", "who meets", "meeting", "that goes to", "who goes to",
         "that travels to", "travelling to", "traveling to", "who walks to", "that finds", "who sees", "that comes to",
         "on its way to")  # fmt: skip
LONG = ("in {} scenes", "with {} pictures", "in {} pictures", "with {} scenes", "in {} parts", "told in {} pictures")
_WALK = re.compile(
    r"^(?:explore this world: |from here, )?(?:(?:explore|walk through) (?P<land>an? [a-z]+ (?:world|land)) (?:with|of)"
    r" (?P<there>.+?): )?(?:go|move|walk) (?P<path>(?:right|left|up|down)(?:(?:, then |, | and then )"
    r"(?:right|left|up|down))*)(?: through (?P<land2>an? [a-z]+ (?:world|land)) with (?P<there2>.+))?$",
    re.IGNORECASE,
)
PATHS = ("go {}", "move {}", "walk {}", "head {}", "pan {}", "look {}", "please go {}", "let us go {}", "now move {}",
         "first go {}", "travel {}", "step {}", "the camera moves {}", "move the camera {}", "pan the camera {}", "{}",
         "explore: {}", "explore to the {}", "from here, go {}", "continue {}", "wander {}")  # fmt: skip
LINKS = (", then ", ", ", " and then ", " then ", ", and then ", ", after that ", ", next ", " and ", " -> ")
LANDS = (
    "explore {land} with {there}: {path}",
    "explore {land} of {there}: {path}",
    "walk through {land} of {there}: {path}",
    "walk through {land} full of {there}: {path}",
    "in {land} with {there}, {path}",
    "{land} with {there}: {path}",
    "{path} through {land} with {there}",
    "{path} in {land} with {there}",
    "look around {land} of {there}: {path}",
    "{path} across {land} full of {there}",
    "imagine {land} with {there}. {path}",
)
_CARRY = re.compile(
    rf"^(?:put|place|move|pick up) (?P<what>the .+?) (?:and put it )?"
    rf"(?P<relation>{any_of(RELATION)}) (?P<mark>the .+)$",
    re.IGNORECASE,
)
CARRIED = (
    "put {what} {side} {mark}",
    "put {what} {side} {mark}",
    "place {what} {side} {mark}",
    "set {what} {side} {mark}",
    "set {what} down {side} {mark}",
    "move {what} {side} {mark}",
    "move {what} so that it is {side} {mark}",
    "bring {what} to the place {side} {mark}",
    "carry {what} over and put it {side} {mark}",
    "pick up {what} and put it {side} {mark}",
    "pick {what} up and place it {side} {mark}",
    "pick up {what} and set it down {side} {mark}",
    "grab {what} and put it {side} {mark}",
    "grasp {what} and place it {side} {mark}",
    "take {what} and put it {side} {mark}",
    "lift {what} and lay it down {side} {mark}",
    "please put {what} {side} {mark}",
    "can you put {what} {side} {mark}",
    "could you place {what} {side} {mark}",
    "I want {what} {side} {mark}",
    "I want you to put {what} {side} {mark}",
    "{what} should be {side} {mark}",
    "{what} goes {side} {mark}",
    "use the gripper to put {what} {side} {mark}",
    "robot, put {what} {side} {mark}",
    "the robot should put {what} {side} {mark}",
    "the gripper should move {what} {side} {mark}",
)


def howto(voice: Voice, text: str) -> str:
    """Paraphrase a howto question; unparsed text is returned unchanged."""
    match = _LESSON.match(text)
    if not match:
        return text
    body, _, ground, _ = voice.content(match["goal"])
    if ground:
        an = with_article(ground)
        body += voice.rng.choice((" on {} background", " on {} background", " in front of {} background",
                                  " with {} background", ", on {} background")).format(an)  # fmt: skip
    return voice.rng.choice(LESSONS).format(body)


def story(voice: Voice, text: str) -> str:
    """Paraphrase a story question."""
    match, rng = _STORY.match(text), voice.rng
    if not match:
        return text
    who = rng.choice(STORIES).format(voice.thing(match["who"]))
    if match["number"]:
        return f"{who} {rng.choice(LONG).format(match['number'])}"
    places = [voice.thing(place) for place in unlisted(match["places"])]
    link = rng.choice((", ", ", ", ", then ")) if len(places) > 2 else ", "
    last = rng.choice((" and ", " and ", ", and ", " and then ", ", then ", " and finally "))
    return f"{who} {rng.choice(MEETS)} {link.join(places[:-1])}{last}{places[-1]}"


def explore(voice: Voice, text: str) -> str:
    """Paraphrase an explore question."""
    match, rng = _WALK.match(text), voice.rng
    if not match:
        return text
    moves = re.findall(r"right|left|up|down", match["path"])
    link = rng.choice(LINKS)
    path = rng.choice(PATHS).format(link.join(moves))
    land, there = match["land"] or match["land2"], match["there"] or match["there2"]
    if not land:
        return path
    return rng.choice(LANDS).format(land=land, there=there, path=path)


def vla(voice: Voice, text: str) -> str:
    """Paraphrase a vla question."""
    match = _CARRY.match(text)
    if not match:
        return text
    side = voice.relation(match["relation"])
    return voice.rng.choice(CARRIED).format(what=voice.thing(match["what"]), side=side, mark=voice.thing(match["mark"]))

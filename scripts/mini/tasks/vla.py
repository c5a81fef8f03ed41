"""A gripper carries one thing to a place next to another: each action in words, then the frame after it."""

from __future__ import annotations

from random import Random

from scripts.mini.layout import put
from scripts.mini.spec import ABOVE, BELOW, LEFT, RIGHT, Relation, Spec, Wanted, stands
from scripts.mini.tasks.sample import GLOBAL, Sample, TextPart, colour, distinct_things, noise_seed, size, unchanged
from scripts.mini.words import Speaker, sentence
from scripts.mini.world import GRID, GRIPPER, GRIPPER_SIDE, Scene, Thing, touches

TOP = 48
"""Height of the strip at the top reserved for the gripper; things are placed below it."""


def make(rng: Random, rows: int, columns: int, *, reasoning: float = 0.25) -> Sample | None:
    """One sample of three frames, or None if the layout failed. Only the gripper is black."""
    ground = colour(rng, "black")
    width, height = columns * 16, rows * 16
    count = rng.choice((2, 2, 3))
    chosen = distinct_things(rng, count, ground, "black")
    kinds = [
        Thing(t.shape, t.colour, size(rng) if i else rng.choice(("small", "medium")), 0, 0)
        for i, t in enumerate(chosen)
    ]
    others: list[Thing] = []
    for kind in kinds[1:]:
        spot = put(rng, kind, others, (8, TOP, width - 8, height - 8))
        if spot is None:
            return None
        others.append(spot)
    start = put(rng, kinds[0], others, (8, TOP, width - 8, height - 8), gap=16)
    if start is None:
        return None
    goal = others[0]
    relation = rng.choice((LEFT, RIGHT, LEFT, RIGHT, BELOW, ABOVE))
    end = _beside(rng, start, goal, relation, others, width, height)
    if end is None or touches(end.box, start.box, -8) or not stands(relation, [end], [goal]):
        return None

    home = _gripper(rng.randint(4, columns * 2 - 4) * GRID, GRIPPER_SIDE // 2 + 4)
    grasp = _gripper(start.x, start.box[1] - GRIPPER_SIDE // 2 + 4)
    carried = end.at(end.x, GRIPPER_SIDE + 4 + end.side // 2)
    if any(touches(carried.box, o.box, 4) for o in others) or any(touches(grasp.box, o.box, 2) for o in others):
        return None
    lift = _gripper(end.x, carried.box[1] - GRIPPER_SIDE // 2 + 4)
    rest = _gripper(end.x, GRIPPER_SIDE // 2 + 4)
    if touches(rest.box, end.box, 2) or any(touches(home.box, t.box, 2) for t in (*others, start)):
        return None

    def frame(thing: Thing, gripper: Thing) -> Scene:
        return Scene(rows, columns, ground, "plain", (*others, thing, gripper), noise_seed(rng))

    def spec(thing: Wanted, gripper: Wanted, *relations: Relation) -> Spec:
        return Spec((*(unchanged(o) for o in others), thing, gripper), relations, ground)

    speaker = Speaker(rng)
    what, mark = speaker.the(start.shape, start.colour), speaker.the(goal.shape, goal.colour)
    side = speaker.relation(relation)
    arm = rng.choice(("the gripper", "the gripper", "the arm"))
    order = rng.choice(("put {} {} {}", "place {} {} {}", "move {} {} {}", "pick up {} and put it {} {}"))
    question = order.format(what, side, mark)
    if rng.random() < 0.6:
        question = question[0].upper() + question[1:]
    answer: list[TextPart | Scene] = []
    if rng.random() < reasoning:
        answer.append(TextPart(f"{sentence(what)[:-1]} has to be {side} {mark}.", GLOBAL))
    answer += [
        TextPart(sentence(f"{arm} goes down to {what} and grips it")),
        frame(start, grasp),
        TextPart(sentence(f"{arm} lifts {what} and carries it over its new place")),
        frame(carried, lift),
        TextPart(sentence(f"{arm} puts {what} down {side} {mark} and lets go")),
        frame(end, rest),
    ]
    hand, number = Wanted(GRIPPER), len(others)
    specs = (
        spec(unchanged(start), hand),
        spec(Wanted(start.shape, start.colour, start.size), hand),
        spec(Wanted(start.shape, start.colour, start.size), hand, Relation(relation, (number,), (0,))),
    )
    key = " ".join(["vla", start.colour, start.shape, relation, goal.colour, goal.shape])
    first = frame(start, home)
    if rng.random() < 0.2:  # the gripper is not yet in the reference
        first = first.with_things(*others, start)
    return Sample("vla", question, (first,), tuple(answer), specs, key)


def _gripper(x: int, y: int) -> Thing:
    return Thing(GRIPPER, "black", "small", x, y)


def _beside(
    rng: Random, thing: Thing, goal: Thing, relation: str, others: list[Thing], width: int, height: int
) -> Thing | None:
    """The target position of `thing`: directly next to the goal on that side."""
    reach = -(-((thing.side + goal.side) // 2 + 8) // GRID) * GRID
    dx, dy = {LEFT: (-reach, 0), RIGHT: (reach, 0), ABOVE: (0, -reach), BELOW: (0, reach)}[relation]
    end = thing.at(goal.x + dx, goal.y + dy)
    left, top, right, bottom = end.box
    if left < 4 or right > width - 4 or top < TOP or bottom > height - 4:
        return None
    return None if any(touches(end.box, o.box, 4) for o in others) else end

"""Generates the pictures in docs/ and prints the command that reproduces each."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from emu_cog.events import Picture, RunStats
from emu_cog.pipeline import Pipeline
from emu_cog.prompt.segments import Text
from emu_cog.request import Request
from emu_cog.weights.store import MINIATURE, MINIATURES

CELL, GAP, LINE = 192, 12, 16
"""Pixels: side of a picture, space between pictures, height of a text line."""
FONT = 13


@dataclass(frozen=True)
class Demo:
    """One request. `reference` names the demo whose last picture is its input; `strip` names the output file. What
    another `checkpoint` than mini draws is shown below what mini does."""

    name: str
    strip: str
    task: str
    prompt: str
    seed: int
    aspect_ratio: str = "auto"
    reference: str | None = None
    checkpoint: str = "mini"

    def command(self) -> str:
        """The command that gives the same pictures."""
        inputs = [] if self.task == "t2i" else [f"task_type={self.task}"]
        inputs.append(f"prompt={self.prompt}")
        inputs += [] if self.aspect_ratio == "auto" else [f"aspect_ratio={self.aspect_ratio}"]
        inputs += [] if self.reference is None else [f"reference_image=@{self.reference}.0.png"]
        inputs.append(f"seed={self.seed}")
        # Cog appends the suffix given here; none where the output also holds text.
        target = f"{self.name}.png" if self.task in ("t2i", "x2i") else self.name
        where = [] if self.checkpoint == "mini" else [f"EMU_CHECKPOINT={self.checkpoint}"]
        return " ".join([*where, "scripts/predict", *(f"-i {shlex.quote(i)}" for i in inputs), f"-o {target}"])


DEMOS: tuple[Demo, ...] = (
    Demo("stars", "t2i", "t2i", "two small red stars above a blue circle on a yellow background", 2),
    Demo("fish", "t2i", "t2i", "a large orange fish on a blue background", 2),
    Demo("houses", "t2i", "t2i", "three brown houses on a green background", 3),
    Demo("moon", "t2i", "t2i", "on black, one white moon, top right corner", 2),
    Demo("tree", "t2i", "t2i", "a green tree between a red house and a yellow house on a striped grey background", 10),
    Demo("heart", "t2i", "t2i", "A big pink heart with a tiny purple star next to it.", 8),
    Demo("wide", "wide", "t2i", "On a purple background: a yellow moon, and left of it a white house", 7, "16:9"),
    Demo("tall", "wide", "t2i", "a red heart above a blue square on a white background", 3, "9:16"),
    Demo("recolour", "x2i", "x2i", "Paint the heart white.", 1, reference="heart"),
    Demo("add", "x2i", "x2i", "add a small blue fish in the bottom left corner", 1, reference="recolour"),
    Demo("replace", "x2i", "x2i", "swap the fish for a red tree", 1, reference="add"),
    Demo("remove", "x2i", "x2i", "remove the star and make the background green", 1, reference="replace"),
    Demo("howto", "howto", "howto", "How do I draw a brown house, a green tree and a yellow moon on a blue "
         "background?", 1),
    Demo("story", "story", "story", "Tell a story about a small orange fish that visits a red house, a green tree "
         "and a white moon.", 2),
    Demo("explore", "explore", "explore", "explore a green world with red hearts and white stars: go right, down, left",
         3),
    Demo("start", "vla", "t2i", "a red circle next to a blue square on a white background", 2),
    Demo("vla", "vla", "vla", "Put the red ball above the blue box.", 4, reference="start"),
    Demo("flash-stars", "flash", "t2i", "two small red stars above a blue circle on a yellow background", 1,
         checkpoint="mini-flash"),
    Demo("flash-fish", "flash", "t2i", "a large orange fish on a blue background", 1, checkpoint="mini-flash"),
    Demo("flash-houses", "flash", "t2i", "three brown houses on a green background", 1, checkpoint="mini-flash"),
    Demo("flash-heart", "flash", "t2i", "A big pink heart with a tiny purple star next to it.", 1,
         checkpoint="mini-flash"),
)  # fmt: skip


def run(
    pipeline: Pipeline, demo: Demo, given: Image.Image | None = None
) -> tuple[list[tuple[str, Image.Image]], RunStats]:
    """(preceding text, picture) for every picture in the answer, and what it took."""
    request = Request(
        prompt=demo.prompt,
        task=demo.task,
        images=() if given is None else (given,),
        seed=demo.seed,
        aspect_ratio=demo.aspect_ratio,
    )
    shown, words = [], ""
    for event in pipeline.stream(request):
        if isinstance(event, Text) and event.kind == "text":
            words = event.text
        elif isinstance(event, Picture):
            shown.append((words, event.image))
            words = ""
        elif isinstance(event, RunStats):
            stats = event
    return shown, stats


def beside(pipelines: Mapping[str, Pipeline], demos: Sequence[Demo]) -> list[tuple[str, Image.Image]]:
    """What mini draws of `demos`, then what their own checkpoints do, with the seconds from prompt to pixels. Each is
    the faster of two, since the first of a shape is slower."""
    cells = []
    for demo in [*(replace(demo, checkpoint="mini") for demo in demos), *demos]:
        shown, stats = min(
            (run(pipelines[demo.checkpoint], demo) for _ in range(2)), key=lambda result: seconds(result[1])
        )
        words = f"{demo.checkpoint} {seconds(stats):.1f} s, {stats.passes} passes"
        cells.append((words, shown[0][1]))
    return cells


def seconds(stats: RunStats) -> float:
    return stats.prefill_seconds + stats.decode_seconds + stats.vq_seconds


def strip(cells: Sequence[tuple[str, Image.Image]], *, columns: int) -> Image.Image:
    """The pictures in a grid, each above its text."""
    font = ImageFont.load_default(FONT)
    texts = [textwrap.wrap(words, 27) for words, _ in cells]
    under = LINE * max(len(lines) for lines in texts) + (6 if any(texts) else 0)
    width, height = (max(image.size[axis] for _, image in cells) for axis in (0, 1))
    rows = -(-len(cells) // columns)
    page = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + under + GAP) - GAP), "white")
    draw = ImageDraw.Draw(page)
    for i, ((_, image), lines) in enumerate(zip(cells, texts, strict=True)):
        x, y = i % columns * (width + GAP), i // columns * (height + under + GAP)
        page.paste(image, (x + (width - image.width) // 2, y + height - image.height))
        for n, line in enumerate(lines):
            draw.text((x + 2, y + height + 4 + n * LINE), line, "#333333", font=font)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MINIATURE / "model")
    parser.add_argument("--vision", type=Path, default=MINIATURE / "vision")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "docs")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--only", nargs="+", help="pictures to generate, by name")
    args = parser.parse_args()
    pipelines = {"mini": Pipeline.load(args.model, args.vision)}
    made: dict[str, Image.Image] = {}
    strips: dict[str, list[tuple[str, Image.Image]]] = {}
    for demo in DEMOS:
        if args.only and demo.strip not in args.only and demo.name not in {d.reference for d in DEMOS}:
            continue
        if demo.checkpoint != "mini":
            print(demo.command(), flush=True)
            continue
        shown, _ = run(pipelines["mini"], demo, made[demo.reference] if demo.reference else None)
        made[demo.name] = shown[-1][1]
        cells = strips.setdefault(demo.strip, [])
        if demo.reference and not cells:
            cells.append((f"({demo.reference})", made[demo.reference]))
        cells += shown if len(shown) > 1 else [(demo.prompt, shown[0][1])]
        print(demo.command(), flush=True)
    for name in {demo.strip for demo in DEMOS if demo.checkpoint != "mini"}:
        if not args.only or name in args.only:
            demos = [demo for demo in DEMOS if demo.strip == name]
            for key in {demo.checkpoint for demo in demos}:
                pipelines[key] = Pipeline.load(MINIATURE / MINIATURES[key][0], args.vision)
            strips[name] = beside(pipelines, demos)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, cells in strips.items():
        if not args.only or name in args.only:
            columns = {"t2i": 3, "flash": len(cells) // 2}.get(name, min(args.columns + 1, len(cells)))
            strip(cells, columns=columns).save(args.out / f"mini-{name}.png", optimize=True)


if __name__ == "__main__":
    main()

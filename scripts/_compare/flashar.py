"""FlashAR here against the code of the two public repositories that have it, on tiny random checkpoints.

Theirs runs in the Python that --reference-python names, because both pin transformers 4.48.2.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _models import flashar as tiny_flashar
from _models import tiny

from _compare.agreement import Row
from _compare.differences import Checked
from _compare.flashar_native import Picture, run_native
from _compare.other_python import run_other_python
from emu_cog.errors import CheckpointError
from emu_cog.model.loader import load_flash_model
from emu_cog.prompt import prompts, tasks
from emu_cog.prompt.tokenizer import Tokenizer
from emu_cog.prompt.tokens import ROLES

_RUNNER = Path(__file__).with_name("reference_flashar.py")
Arrays = Mapping[str, np.ndarray]

CLONES: Mapping[str, str] = {
    "lxazjk": "flashar/model/modeling_emu_flashar.py",
    "u0": "xr_u0_flashar/model.py",
}
"""Layout to the file by which its repository is recognized."""
COMMITS: Mapping[str, str] = {
    "lxazjk": "2d4a74e868a74c1a8a1d01ce91d7bb9d9bd4eb8a",
    "u0": "777c62007a92a0a848060b4c3889fb8f1b00d74b",
}
"""lxazjk/Emu3.5-FlashAR and XiaomiRobotics/Xiaomi-Robotics-U0, as the golden vectors were made with them."""
KINDS: Mapping[str, str] = {"lxazjk": "flash", "u0": "u0-flash"}
CHECKPOINTS: Mapping[str, Mapping[str, Any]] = {
    # the vertical branch begins below the last layers, and reads a different layer than it has weights like
    "lxazjk": {
        "layout": "lxazjk", "seed": 51, "start": 1, "vertical_layers": 2, "hidden": 32, "layers": 4, "heads": 6,
        "kv_heads": 2, "head_dim": 12, "visual_tokens": 48, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "logit_bias": {},
    },
    "u0": {
        "layout": "u0", "seed": 42, "vertical_layers": 3, "hidden": 32, "layers": 3, "heads": 3, "kv_heads": 1,
        "head_dim": 16, "visual_tokens": 60, "shards": 2, "logit_bias": {},
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One picture of `size` (rows, columns). `task` "benchmark" is t2i with Emu3.5's own unconditional prompt, and
    "swapped" t2i with both prompts exchanged, so that the unconditional one is the longer."""

    task: str
    question: str
    size: tuple[int, int]
    guidance: float
    photos: tuple[tuple[int, int], ...] = ()
    """(rows, columns) of each."""

    @property
    def kind_of_task(self) -> str:
        return "x2i" if self.task == "x2i" else "t2i"


LONG = 'Two red boats on the shore, 3 birds above them, an old "café" behind; 東京 {dusk} and 10*12 m of sand'
CASES: Mapping[str, Mapping[str, Case]] = {
    "lxazjk": {
        "t2i, square": Case(task="t2i", question="a cup", size=(4, 4), guidance=5.0),
        "t2i, wide, the benchmark's prompts": Case(task="benchmark", question=LONG, size=(3, 5), guidance=2.5),
        "t2i, tall, without guidance": Case(task="t2i", question="a tall cup", size=(5, 2), guidance=1.0),
        "t2i, the unconditional prompt longer": Case(task="swapped", question=LONG, size=(2, 4), guidance=2.0),
        "one row": Case(task="t2i", question="a line", size=(1, 3), guidance=3.0),
        "one column": Case(task="t2i", question="a line", size=(3, 1), guidance=3.0),
    },
    "u0": {
        "t2i, square": Case(task="t2i", question=LONG, size=(4, 4), guidance=3.0),
        "x2i, wide": Case(task="x2i", question="make it red", size=(3, 5), guidance=3.0, photos=((3, 5),)),
        "x2i, two photos": Case(task="x2i", question="both", size=(4, 2), guidance=2.0, photos=((4, 2), (2, 3))),
        "x2i, without guidance": Case(task="x2i", question="make it red", size=(3, 3), guidance=1.0, photos=((3, 3),)),
    },
}  # fmt: skip


def layout_of(clone: Path) -> str:
    """Whose repository `clone` is. CheckpointError where it is neither."""
    for layout, file in CLONES.items():
        if (clone / file).is_file():
            return layout
    raise CheckpointError(
        f"--flashar {clone} is a clone neither of lxazjk/Emu3.5-FlashAR nor of XiaomiRobotics/Xiaomi-Robotics-U0: "
        f"it has neither {' nor '.join(CLONES.values())}"
    )


def make_checkpoint(layout: str, folder: Path) -> tiny.TinyFolders:
    """The tiny checkpoint that `layout`'s code is run on."""
    return tiny_flashar.make_flashar(folder, **CHECKPOINTS[layout])


def photo_codes(case: Case, visual_tokens: int) -> list[list[list[int]]]:
    """Codes of the case's photos, by rows."""
    rng = np.random.Generator(np.random.PCG64(len(case.question)))
    return [rng.integers(0, visual_tokens, size).tolist() for size in case.photos]


def ids_of(case: Case, layout: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Our conditional and unconditional prompt, header included: what a FlashAR picture begins with."""
    task = tasks.task_of(case.kind_of_task, KINDS[layout])
    if case.task == "benchmark":
        task = tasks.TABLE["t2i"]
    made = prompts.build(task, case.question, photo_codes(case, tokenizer.ids.visual_count), tokenizer)
    header = tokenizer.ids.header(*case.size)
    streams = [*made.conditional, *header], [*made.unconditional, *header]
    return streams if case.task != "swapped" else streams[::-1]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What their code made: `arrays` as reference_flashar.py documents them, `prompts` the text of both streams."""

    arrays: Arrays
    prompts: Mapping[str, Sequence[str]]
    versions: str


def run_reference(python: Path, clone: Path, checkpoint: Path, tokenizer: Tokenizer) -> Reference:
    """Run the code in `clone` on all its cases, in the interpreter `python`. CheckpointError says why it can't."""
    layout = layout_of(clone)
    runs, texts = {}, {}
    for name, case in CASES[layout].items():
        conditional, unconditional = ids_of(case, layout, tokenizer)
        rows, columns = case.size
        size = {"rows": rows, "columns": columns}
        runs[name] = {"conditional": conditional, "unconditional": unconditional, "guidance": case.guidance, **size}
        if layout == "lxazjk" and not runs[name]["guidance"] <= 1:
            runs.setdefault(ALONE, runs[name] | {"unconditional": None})
        if case.task != "swapped":
            images = [_as_text(codes) for codes in photo_codes(case, tokenizer.ids.visual_count)]
            texts[name] = {"task": case.task, "question": case.question, "images": images, **size}
    given = {"runs": runs, "prompts": texts, "vertical_layers": CHECKPOINTS[layout]["vertical_layers"]}
    with tempfile.TemporaryDirectory(prefix="emu-cog-") as folder:
        source, target = Path(folder) / "in.json", Path(folder) / "out.npz"
        source.write_text(json.dumps(given), encoding="utf-8")
        versions = run_other_python(
            python,
            [_RUNNER, clone, checkpoint.resolve(), source, target],
            what=f"the code of {clone}",
            needs="torch, numpy, safetensors and transformers 4.48.2",
        )
        with np.load(target) as made:
            arrays = dict(made)
    rendered = json.loads(str(arrays.pop("prompts")))
    shown = ", ".join(f"{name} {versions[name]}" for name in ("transformers", "torch", "python"))
    return Reference(arrays=arrays, prompts=rendered, versions=shown)


def _as_text(codes: Sequence[Sequence[int]]) -> str:
    """An image block as their tokenizers write it."""
    rows = "<|extra_200|>".join("".join(f"<|visual token {code:06d}|>" for code in row) for row in codes)
    return f"<|image start|>{len(codes)}*{len(codes[0])}<|image token|>{rows}<|image end|>"


def encode_special(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a rendered prompt, whose special tokens are written out."""
    ids = tokenizer.ids
    special = {written: getattr(ids, role) for role, written in ROLES.items()}
    special |= {f"<|visual token {code:06d}|>": ids.visual + code for code in range(ids.visual_count)}
    pieces = re.split(r"(<\|[^|]*\|>)", text)
    return [token for piece in pieces for token in ([special[piece]] if piece in special else tokenizer.encode(piece))]


ALLOWED: Mapping[str, float] = {"h": 1e-4, "v": 1e-4, "gate": 1e-5, "logits": 1e-3}
"""Largest difference in fp32, where the order of sums differs alone; seen: 4e-6, 5e-6, 8e-7, 4e-5."""
_NAMES = {"h": "final hidden states", "v": "vertical hidden states", "gate": "gates", "logits": "guided logits"}
ALONE = "guidance without an unconditional prompt"
"""The case that shows what generate_flashar.py's --cfg_scale does: it passes no unconditional prompt."""


def compare(clone: Path, python: Path) -> Iterator[Row | Checked]:
    """The rows of the table: the code in `clone` against ours, on the checkpoint made for it."""
    layout = layout_of(clone)
    with tempfile.TemporaryDirectory(prefix="emu-cog-") as folder:
        model_folder = make_checkpoint(layout, Path(folder)).model
        tokenizer = Tokenizer.load(model_folder)
        reference = run_reference(python, clone, model_folder, tokenizer)
        ids = tokenizer.ids
        model = load_flash_model(model_folder, ids, device=torch.device("cpu"), dtype=torch.float32)
    cases = CASES[layout]
    wrong, count = [], 0
    for name, texts in reference.prompts.items():
        ours = ids_of(cases[name], layout, tokenizer)
        wrong += [name] if list(ours) != [encode_special(text, tokenizer) for text in texts] else []
        count += sum(map(len, ours))
    row = _row("prompt ids", count, len(wrong), 0, "; ".join(wrong))
    yield replace(row, note=row.note or f"theirs with {reference.versions}")
    theirs = [_of(reference.arrays, name) for name in cases]
    follow = [arrays["tokens"] for arrays in theirs]
    made = run_native(model, pictures(layout, tokenizer), follow=follow)
    for name, one, other in zip(cases, made, theirs, strict=True):
        yield from compare_picture(name, one, other)
    if layout == "lxazjk":
        script = (clone / "generate_flashar.py").read_text(encoding="utf-8")
        off = "unconditional_text_input_ids" not in script and _guidance_is_off(reference.arrays)
        first = next(iter(cases))
        yield Checked(
            why="defect",
            upstream="generate_flashar.py passes no unconditional prompt: its --cfg_scale does nothing",
            here="guidance is applied",
            seen=off,
            kept=not np.array_equal(made[0]["tokens"], reference.arrays[f"{ALONE}/tokens"])
            and np.array_equal(made[0]["tokens"], reference.arrays[f"{first}/tokens"]),
        )


def compare_picture(name: str, ours: Arrays, theirs: Arrays) -> Iterator[Row]:
    """One row for each of ALLOWED, and one for the tokens."""
    for key, allowed in ALLOWED.items():
        a, b = ours[key], theirs[key]
        alike = a.shape == b.shape and np.array_equal(np.isnan(a), np.isnan(b))
        worst = float(np.nanmax(np.abs(a - b))) if alike else np.inf
        yield _row(f"{_NAMES[key]}: {name}", a.size, worst, allowed, "" if alike else "shapes differ")
    different = np.flatnonzero(ours["tokens"] != theirs["tokens"])
    note = f"first in cell {different[0]}" if len(different) else ""
    yield _row(f"tokens at top-k 1: {name}", len(ours["tokens"]), len(different), 0, note)


def _row(what: str, compared: int, worst: float, allowed: float, note: str) -> Row:
    agrees = worst <= allowed
    return Row(what=what, compared=compared, worst=worst, allowed=allowed, agrees=agrees, note="" if agrees else note)


def _of(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
    """The arrays of one case, without its name."""
    return {key.removeprefix(f"{name}/"): value for key, value in arrays.items() if key.startswith(f"{name}/")}


def _guidance_is_off(arrays: Arrays) -> bool:
    """Whether ALONE, of much guidance, has the logits of one stream."""
    return arrays[f"{ALONE}/h"].shape[0] == 1


def pictures(layout: str, tokenizer: Tokenizer) -> list[Picture]:
    """All cases of `layout`."""
    made = []
    for case in CASES[layout].values():
        conditional, unconditional = ids_of(case, layout, tokenizer)
        made.append(
            Picture(conditional=conditional, unconditional=unconditional, size=case.size, guidance=case.guidance)
        )
    return made

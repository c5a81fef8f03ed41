"""Make the golden vectors again, by running upstream's own code: `python tests/golden/make.py CLONE`.

CLONE is a clone of https://github.com/baaivision/Emu3.5 at the pinned commit (`emu_cog.settings.UPSTREAM_COMMIT`).
Everything runs on a CPU in fp32 with eager attention; `emu_cog/upstream/adapter.py` lists what is not upstream's.
`--out DIR` writes the vectors elsewhere, to compare them with the committed ones.

Each run is made twice: at top-k 1, and with real sampling. The latter takes its samples as this project does, where
upstream calls torch.multinomial: the i-th sampled token by inverting the cumulative distribution at the i-th number of
NumPy's Philox, a code by adding the i-th position's Gumbel noise. So upstream computes every distribution, and our
engine must give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "scripts")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import LogitsProcessor  # noqa: E402

from emu_cog.ops.noise import gumbel_noise  # noqa: E402
from emu_cog.prompt.tokens import TokenIds  # noqa: E402
from emu_cog.upstream import adapter  # noqa: E402
from emu_cog.upstream import clone as clones  # noqa: E402
from tests.golden import inputs  # noqa: E402
from tests.golden.inputs import Run  # noqa: E402


class Listener(LogitsProcessor):
    """Placed after upstream's processor: records each sampled distribution and, given a seed, samples from it."""

    def __init__(self, ids: TokenIds, prompt: int, *, size_known: bool, seed: int | None) -> None:
        self.ids, self.prompt, self.size_known, self.seed = ids, prompt, size_known, seed
        self.numbers = None if seed is None else np.random.Generator(np.random.Philox(seed)).random(100_000)
        self.steps: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probs = scores[0].softmax(dim=-1)
        if not self._is_sampled(input_ids[0, self.prompt :].tolist(), probs):
            return scores
        kept = probs.nonzero()[:, 0]
        self.steps.append((kept.numpy().astype(np.uint32), probs[kept].numpy()))
        if self.numbers is None:
            return scores
        number, visual = len(self.steps) - 1, self.ids.visual
        if float(probs[visual:].sum()) > 0:
            noise = gumbel_noise(torch.tensor([self.seed]), torch.tensor([number]), len(probs) - visual)[0]
            chosen = visual + int((probs[visual:].log() + noise).argmax())
        else:
            mass = probs.double().numpy().cumsum()
            chosen = int(np.searchsorted(mass, self.numbers[number] * mass[-1], side="right"))
        alone = torch.full_like(scores, -torch.inf)
        alone[0, chosen] = 0.0
        return alone

    def _is_sampled(self, made: list[int], probs: torch.Tensor) -> bool:
        """False where upstream's grammar allows one token: EOL, EOI, IMG, "*" and the digits of a known size."""
        ids = self.ids
        opened = max((i for i, t in enumerate(made) if t == ids.boi), default=-1)
        closed = max((i for i, t in enumerate(made) if t == ids.eoi), default=-1)
        if opened <= closed:
            return True  # text
        if float(probs[ids.visual :].sum()) > 0:
            return True
        choosing = not self.size_known and closed < 0 and ids.img not in made[opened:]
        return choosing and float(probs[list(ids.digits)].sum()) > 0


def generate(up: adapter.Upstream, run: Run, *, greedy: bool) -> dict[str, Any]:
    pictures = [inputs.picture(name) for name in inputs.REFERENCES[: run.references]]
    conditional, unconditional = up.prompt(run.task, inputs.QUESTIONS[run.task], pictures, run.area)
    listener = Listener(
        up.ids,
        conditional.shape[1],
        size_known=run.size is not None or run.references > 0,
        seed=None if greedy else run.seed,
    )
    tokens = up.generate(
        conditional,
        unconditional,
        guidance=run.guidance,
        image=inputs.GREEDY if greedy else run.image,
        text=inputs.GREEDY if greedy else run.text,
        size=run.size,
        max_new_tokens=run.limit,
        references=run.references,
        seed=0,
        after=[listener],
    )
    return {"tokens": tokens, "steps": listener.steps, "prompt": (conditional[0], unconditional[0])}


def pack(name: str, up: adapter.Upstream, run: Run) -> dict[str, np.ndarray]:
    """One run as arrays: ids, and the sampled distributions as the kept ids and their probabilities, concatenated."""
    greedy, sampled = (generate(up, run, greedy=g) for g in (True, False))
    blocks = [sum(t == up.ids.eoi for t in made["tokens"]) for made in (greedy, sampled)]
    print(f"{name}: {len(greedy['tokens'])} tokens at top-k 1, {len(sampled['tokens'])} sampled, images {blocks}")
    kept = [ids for ids, _ in sampled["steps"]]
    arrays: dict[str, Sequence[Any] | np.ndarray] = {
        "conditional": sampled["prompt"][0].numpy().astype(np.uint32),
        "unconditional": sampled["prompt"][1].numpy().astype(np.uint32),
        "greedy": np.array(greedy["tokens"], dtype=np.uint32),
        "sampled": np.array(sampled["tokens"], dtype=np.uint32),
        "kept": np.array([len(ids) for ids in kept], dtype=np.uint16),
        "kept_ids": np.concatenate(kept),
        "kept_probs": np.concatenate([probs for _, probs in sampled["steps"]]).astype(np.float32),
    }
    return {f"{name}/{key}": np.asarray(value) for key, value in arrays.items()}


def prompts(up: adapter.Upstream) -> dict[str, list[list[int]]]:
    """Ids of both prompts for every task with 0 to 3 references."""
    made = {}
    for task, question in inputs.QUESTIONS.items():
        for count in range(4):
            pictures = [inputs.picture(name) for name in inputs.REFERENCES[:count]]
            made[f"{task} {count}"] = [ids[0].tolist() for ids in up.prompt(task, question, pictures, 64 * 64)]
    return made


class Sized:
    """A picture's size and `resize`, which is all that `smart_resize` uses."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)

    def resize(self, size: tuple[int, int], _: Any) -> tuple[int, int]:
        return size


def resizes(up: adapter.Upstream) -> list[list[int]]:
    """[width, height, area, new width, new height], without sizes whose side rounds to 0: upstream fails there."""
    rows = []
    for area in inputs.RESIZE_AREAS:
        for size in inputs.RESIZE_SIZES:
            new = up.code.input_utils.smart_resize(Sized(*size), area)
            if min(new):
                rows.append([*size, area, *new])
    return rows


def codes(up: adapter.Upstream) -> dict[str, list[list[int]]]:
    made = {}
    for name in inputs.REFERENCES:
        for area in inputs.CODE_AREAS:
            lines = up.image_string(inputs.picture(name), area).split("<|extra_200|>")
            made[f"{name} {area}"] = [[int(n) for n in re.findall(r"visual token (\d+)", line)] for line in lines]
    return made


def segments(up: adapter.Upstream, tokens: Sequence[int]) -> list[list[Any]]:
    return [[kind, value if isinstance(value, str) else list(value.size)] for kind, value in up.segments(tokens)]


def pixels(up: adapter.Upstream, made: dict[str, list[list[int]]]) -> dict[str, np.ndarray]:
    """Pictures that upstream decodes from some of the codes."""
    decoded = {}
    for name in (f"{reference} {inputs.CODE_AREAS[0]}" for reference in inputs.REFERENCES):
        ((kind, image),) = up.segments(up.ids.image_block(made[name]))
        assert kind == "image"
        decoded[name] = np.asarray(image)
    return decoded


def main() -> None:
    parser = argparse.ArgumentParser(description="Make tests/golden/*.npz and *.json again.")
    parser.add_argument("clone", type=Path, help="a clone of upstream's repository at the pinned commit")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write them (default: here)")
    options = parser.parse_args()
    clone: Path = options.clone.resolve()
    clones.verify(clone)
    options.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    facts: dict[str, Any] = {"prompts": {}, "codes": {}, "segments": {}, "digests": {}}
    arrays: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as temporary:

        def load(name: str, tokenizer: Path | None = None) -> tuple[adapter.Upstream, str]:
            folders = inputs.make(name, Path(temporary) / name, tokenizer=tokenizer)
            up = adapter.load(
                clone,
                folders.model,
                folders.vision,
                device=torch.device("cpu"),
                dtype=torch.float32,
                attention="eager",
            )
            return up, inputs.digest(folders)

        for name in inputs.CHECKPOINTS:
            up, facts["digests"][name] = load(name)
            for run_name, run in inputs.RUNS.items():
                if run.checkpoint == name:
                    arrays |= pack(run_name, up, run)
                    sampled = arrays[f"{run_name}/sampled"].tolist()
                    if up.ids.eos in sampled or run.task in ("t2i", "x2i"):  # ends properly: no cut image
                        facts["segments"][run_name] = segments(up, sampled)
            facts["codes"][name] = codes(up)
            arrays |= {f"pixels {name}/{key}": value for key, value in pixels(up, facts["codes"][name]).items()}
            facts["prompts"][name] = prompts(up)
            if name == "storyteller":
                facts["resizes"] = resizes(up)
                for passage, tokens in inputs.passages(up.ids, up.own_tokenizer).items():
                    facts["segments"][passage] = segments(up, tokens)
        released = clone / "src/tokenizer_emu3_ibq"
        up, facts["digests"]["real"] = load("real", tokenizer=released)
        real_arrays = pack("real", up, inputs.REAL_RUN)
        facts["prompts"]["real"] = prompts(up)
    np.savez_compressed(options.out / "runs.npz", **arrays, **real_arrays)
    text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
    (options.out / "facts.json").write_text(text.replace(',"', ',\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

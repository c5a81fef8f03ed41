"""Post-trains the miniature's language model into a FlashAR one, for t2i and x2i, on data of `encode --flash`.

Recipe: lxazjk/Emu3.5-FlashAR at 2d4a74e, train_flashar.py with configs/train_flashar.default.json: at first only the
vertical branch and the gates learn, then everything, the decoder at a lower rate. Left out: distillation from the plain
model during that first phase. Other than theirs: Muon, a linear decay, and neurons cut off to save space (`--inner`).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu_cog.pipeline import Pipeline
from emu_cog.prompt.tasks import DEFAULTS_FILE
from emu_cog.prompt.tokenizer import RANKS_FILE, VISION_FILE
from emu_cog.weights.store import MINIATURE
from scripts.mini.pool import AREA
from scripts.mini.train.encode import FLASH_LENGTHS, HELD_OUT
from scripts.mini.train.examples import Data, read
from scripts.mini.train.flash_model import FlashModel, begin
from scripts.mini.train.language_model import MATRICES, NAMES, Shape
from scripts.mini.train.muon import Muon
from scripts.mini.train.runs import device_name, fraction, log_record, stop_on_signal
from scripts.mini.train.sequences import FLASH_KIND, tokenizer
from scripts.mini.train.train_language import Gradients, Training, add_options, prepare, read_weights

BACKBONE_RATE = 0.4
"""The decoder's learning rate, relative. Theirs is 0.2, over 50 times as many steps from a much larger model."""
VERTICAL_ONLY = 0.05
"""Fraction of the training in which only the vertical branch and the gates learn: their 1000 of 20,000 steps."""
LIMIT = 30_400_000
"""Maximum size in bytes of the exported folder: emu_cog/mini has 39.54 million, and 70 million in all are allowed."""
DEFAULTS = {
    "kind": FLASH_KIND,
    "aspect_ratio": "1:1",
    "image_area": AREA,
    "guidance_scale": {"t2i": 2.0, "x2i": 1.7},
    "image_temperature": {"t2i": 0.7, "x2i": 0.6},
}
"""How guidance and temperature of t2i were chosen is told in scripts/mini/README.md; x2i has emu-mini's."""


def optimizers(model: FlashModel, rate: float, backbone: float, decay: float) -> list[torch.optim.Optimizer]:
    """`scale` of each group multiplies the learning rate; those that `wait` begin last."""
    decoder = model.decoder
    matrices = [decoder.stack[name] for name in MATRICES]
    rest = [decoder.embed, decoder.norm, *(decoder.stack[name] for name in NAMES if name not in MATRICES)]
    vertical = [
        model.norm,
        model.heads[1],
        *model.gates,
        *(model.stack[name] for name in NAMES if name not in MATRICES),
    ]
    muon: list[Any] = [
        {"params": matrices, "scale": backbone, "waits": True},
        {"params": [model.stack[name] for name in MATRICES], "scale": 1.0, "waits": False},
    ]
    adam: list[Any] = [
        {"params": rest, "scale": backbone, "waits": True},
        {"params": [model.heads[0]], "scale": 1.0, "waits": True},
        {"params": vertical, "scale": 1.0, "waits": False},
    ]
    return [
        Muon(muon, lr=rate, weight_decay=decay),
        torch.optim.AdamW(adam, lr=rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=model.embed.is_cuda),
    ]


@torch.no_grad()
def held_out_loss(model: FlashModel, path: Path, tokens: int) -> dict[str, float]:
    """Mean fused cross entropy of all cells of a shard."""
    sums = torch.zeros(2, device=model.embed.device)
    for length, found in read(path).items():
        for ids, grid in zip(*(x.to(sums.device).split(max(tokens // length, 1)) for x in found), strict=True):
            _, each = model.loss(ids.long(), grid)
            sums += torch.stack([each.sum(), grid[:, 2:].long().prod(1).sum()])
    total, count = sums.tolist()
    return {"picture": total / max(count, 1)}


class FlashTraining(Training[FlashModel]):
    """As Training, with rates by group."""

    def __init__(self, *args: Any, backbone: float, vertical_only: float = VERTICAL_ONLY, **kwargs: Any) -> None:
        self.backbone, self.vertical_only = backbone, vertical_only
        super().__init__(*args, **kwargs)

    def optimizers(self, decay: float) -> list[torch.optim.Optimizer]:
        return optimizers(self.model, self.rate, self.backbone, decay)

    def held_out(self) -> dict[str, float]:
        return held_out_loss(self.model, self.data.folder / HELD_OUT, self.tokens)

    def set_rates(self, now: float, progress: float) -> None:
        for optim in self.optims:
            for group in optim.param_groups:
                group["lr"] = 0.0 if group["waits"] and progress < self.vertical_only else now * group["scale"]


def export(trained: Path, vocabulary: Path, vision: Path, target: Path, defaults: dict[str, object]) -> int:
    """Write a folder that EMU_CHECKPOINT can name to `target`; its size in bytes. It is loaded once to check it.
    SystemExit if it is larger than LIMIT."""
    target.mkdir(parents=True, exist_ok=True)
    for path in (
        trained / "config.json",
        trained / "model.safetensors",
        vocabulary / RANKS_FILE,
        vocabulary / VISION_FILE,
    ):
        shutil.copy(path, target / path.name)
        (target / path.name).chmod(0o644)
    (target / DEFAULTS_FILE).write_text(json.dumps({**DEFAULTS, **defaults}, indent=2) + "\n")
    size = sum(path.stat().st_size for path in target.iterdir())
    Pipeline.load(target, vision, device="cpu")
    if size > LIMIT:
        raise SystemExit(f"{target} has {size} bytes, over the limit of {LIMIT}: use fewer --inner or --vertical")
    return size


def sample(data: Data, count: int) -> tuple[Tensor, Tensor]:
    """Sequences of the most common length, by which neurons are chosen."""
    return max(data.buckets.values(), key=lambda bucket: len(bucket.ids)).draw(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of dataset shards, written by encode --flash")
    parser.add_argument(
        "--plain", type=Path, default=MINIATURE / "model", help="folder of the plain model to begin with"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        help="folder of an earlier result to begin with: of the same --inner and --vertical; all learns at once",
    )
    parser.add_argument("--vision", type=Path, default=MINIATURE / "vision", help="to check the export with")
    parser.add_argument("--export", type=Path, help="folder for the final weights with all that EMU_CHECKPOINT needs")
    parser.add_argument("--wall", type=float, default=math.inf, help="seconds of this run, setup included")
    parser.add_argument(
        "--backbone", type=fraction, default=BACKBONE_RATE, help="the decoder's rate, relative to --rate"
    )
    parser.add_argument("--inner", type=int, default=768, help="neurons kept in each layer")
    parser.add_argument("--vertical", type=int, default=1, help="vertical layers")
    parser.add_argument(
        "--defaults", type=json.loads, default={}, help="the checkpoint's default settings, as in export"
    )
    add_options(parser, steps=1_000_000, rate=2e-3)
    args = parser.parse_args()
    started = time.time()
    device, dtype = prepare(args.seed)

    words, shape = tokenizer(args.plain), Shape.read(args.plain)
    if not 0 < args.inner <= shape.intermediate_size:
        parser.error(f"--inner must be from 1 to {shape.intermediate_size}, the neurons of the plain model")
    model = FlashModel(
        replace(shape, intermediate_size=args.inner),
        visual=words.ids.visual,
        vertical=args.vertical,
        dtype=dtype,
        compiled=args.compile,
    ).to(device)
    gradients = Gradients(model, FLASH_LENGTHS, args.tokens, captured=device.type == "cuda" and not args.eager)
    print(f"steps ready {time.time() - started:.0f}s", flush=True)
    data = Data(args.data, device)
    data.wait(args.wait)
    if args.resume:
        model.load_flash(read_weights(args.resume))
    else:
        begin(model, read_weights(args.plain), shape, sample(data, max(args.tokens // FLASH_LENGTHS[-1], 1)))
    print(f"data {time.time() - started:.0f}s, {data.samples} samples", flush=True)
    training = FlashTraining(
        model,
        gradients,
        data,
        args.out,
        rate=args.rate,
        backbone=args.backbone,
        vertical_only=0.0 if args.resume else VERTICAL_ONLY,
        decay=args.decay,
        tokens=args.tokens,
        visual=words.ids.visual,
        seed=args.seed,
    )
    stop_on_signal(training.stop)
    left = training.state.seconds + args.wall - (time.time() - started)
    record = training.run(steps=args.steps, seconds=max(min(args.seconds, left), 1e-3))
    record |= {
        "seconds": round(time.time() - started, 1),
        "device": device_name(device),
        "seed": args.seed,
        "backbone": args.backbone,
        "resumed": args.resume is not None,
        "vertical": args.vertical,
        "shape": asdict(model.shape),
    }
    if args.export:
        record["bytes"] = export(args.out, args.plain, args.vision, args.export, args.defaults)
    log_record(record, args.out / "train.log")


if __name__ == "__main__":
    main()

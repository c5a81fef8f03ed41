"""Trains the miniature's vision tokenizer: the IBQ network with a codebook of unit vectors.

With unit vectors the largest dot product is also the nearest code, so training can use the usual methods for small
codebooks (cosine distance, moving averages, reset of dead codes), and inference the released format's rule (argmax of
the dot product).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from emu_cog.vision.ibq import IBQ, VisionConfig, load_vision_tokenizer
from scripts.mini.pool import OTHER_SIZES, SQUARE, mapped
from scripts.mini.render import Batch, render, render_clean, resize, with_noise
from scripts.mini.tasks import sample
from scripts.mini.train.runs import device_name
from scripts.mini.train.vision_steps import LENGTH, Codes, TrainingPasses
from scripts.mini.world import Scene

NETWORK = {
    "ddconfig": {
        "ch": 64,
        "out_ch": 3,
        "ch_mult": [1, 1, 2, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
        "in_channels": 3,
        "resolution": 192,
        "z_channels": 32,
        "double_z": False,
    },
    "n_embed": 2048,
    "embed_dim": 32,
}
SCENES_PER_CHUNK = 500
TASKS = ("t2i", "t2i", "x2i", "howto", "story", "explore", "vla")
FINISH = 0.75
"""Fraction of the schedule after which encoder and codebook are frozen and only the decoder is trained."""
WARM_UP = 5
"""Steps before the schedule starts."""
DONE = "train.log"
"""Written last: marks a complete folder."""


def scenes(job: tuple[int, int, int, bool]) -> Batch:
    """SCENES_PER_CHUNK scenes of all tasks; `job` is (seed, rows, columns, held-out combinations)."""
    seed, rows, columns, unseen = job
    rng = Random(seed)
    found: list[Scene] = []
    while len(found) < SCENES_PER_CHUNK:
        made = sample(rng, rng.choice(TASKS), rows, columns, unseen=unseen)
        found += (*made.references, *made.pictures)
    return Batch.of(found[:SCENES_PER_CHUNK])


def batches(
    pools: dict[tuple[int, int], list[Batch]], count: int, rng: Random, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """(noisy, clean) pictures in -1..1, all 192x192; a fifth have other shapes, resized to the square."""
    while True:
        shape = SQUARE if rng.random() < 0.8 else rng.choice([s for s in pools if s != SQUARE] or [SQUARE])
        chunk = rng.choice(pools[shape])
        pick = rng.sample(range(len(chunk.head)), count)
        batch = Batch(*shape, chunk.head[pick], chunk.things[pick])
        clean = render_clean(batch, device)
        noisy, clean = with_noise(clean, batch), clean.to(torch.uint8)
        if shape != SQUARE:
            noisy, clean = (resize(p, SQUARE[0] * 16, SQUARE[1] * 16) for p in (noisy, clean))
        yield noisy.float() / 127.5 - 1, clean.float() / 127.5 - 1


@torch.inference_mode()
def psnr(model: IBQ, chunk: Batch, device: torch.device, count: int = 200) -> tuple[float, int]:
    """(mean PSNR in dB of reconstructed held-out pictures, distinct codes used)."""
    ratios, used = [], set()
    for i in range(0, count, 20):
        batch = Batch(chunk.rows, chunk.columns, chunk.head[i : i + 20], chunk.things[i : i + 20])
        x = render(batch, device)
        codes = model.encode(x.float() / 127.5 - 1)
        used |= set(codes.flatten().tolist())
        y = ((model.decode(codes) + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        error = (x.float() - y.float()).pow(2).mean((1, 2, 3))
        ratios += (10 * torch.log10(255**2 / error)).tolist()
    return sum(ratios) / len(ratios), len(used)


@torch.inference_mode()
def before_and_after(model: IBQ, chunk: Batch, device: torch.device) -> Image.Image:
    """Twelve held-out pictures above their reconstructions."""
    x = render(Batch(chunk.rows, chunk.columns, chunk.head[40:52], chunk.things[40:52]), device)
    y = ((model.decode(model.encode(x.float() / 127.5 - 1)) + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    page = torch.cat([torch.cat(list(t), dim=2) for half in (slice(0, 6), slice(6, 12)) for t in (x[half], y[half])], 1)
    return Image.fromarray(page.permute(1, 2, 0).cpu().numpy())


def save(model: IBQ, codes: Codes, folder: Path) -> None:
    """Write the released tokenizer's files: config.yaml and model.ckpt, weights in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(NETWORK, sort_keys=False))
    state = {k: v.detach().cpu().half().contiguous() for k, v in model.state_dict().items()}
    state["quantize.embedding.weight"] = (LENGTH * codes.book).cpu().half()
    torch.save(state, folder / "model.ckpt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for config.yaml, model.ckpt and the log")
    parser.add_argument("--resume", type=Path, help="folder of the initial vision tokenizer")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="length of the schedule in wall time")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--chunks", type=int, default=100, help=f"dataset size, in chunks of {SCENES_PER_CHUNK} scenes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--network", type=json.loads, default={}, help="non-default ddconfig values, as JSON")
    parser.add_argument("--eager", action="store_true", help="do not use CUDA graphs")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    started = time.time()

    shapes = [SQUARE] * 4 + list(OTHER_SIZES)
    jobs = [(args.seed * 100003 + i, *shapes[i % len(shapes)], False) for i in range(args.chunks)]
    pools: dict[tuple[int, int], list[Batch]] = {}
    for chunk in mapped(scenes, jobs):
        pools.setdefault((chunk.rows, chunk.columns), []).append(chunk)
    held = [next(mapped(scenes, [(7, *shape, True)], processes=1)) for shape in (SQUARE, (10, 14))]

    folder = args.out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    NETWORK["ddconfig"] |= args.network  # type: ignore[operator]
    (folder / "config.yaml").write_text(yaml.safe_dump(NETWORK, sort_keys=False))
    model = IBQ(VisionConfig.read(folder)).to(device)
    codes = Codes(NETWORK["n_embed"], NETWORK["embed_dim"]).to(device)  # type: ignore[arg-type]
    history = ""
    if args.resume:
        earlier = load_vision_tokenizer(args.resume, device=device)
        model.load_state_dict(earlier.state_dict())
        codes.resume(earlier.quantize.embedding.weight)
        history = (args.resume / DONE).read_text()
        print(f"resumed: {psnr(earlier, held[0], device, 40)[0]:.2f} dB")
    print(f"data {time.time() - started:.0f}s", flush=True)
    steps = train(model, codes, batches(pools, args.batch, Random(args.seed), device), folder, args, held[0])

    save(model, codes, folder)
    final = load_vision_tokenizer(folder, device=device)
    quality = {f"psnr_{c.rows}x{c.columns}": psnr(final, c, device) for c in held}
    before_and_after(final, held[0], device).save(folder / "reconstructions.png")
    record = {
        "steps": steps,
        "batch": args.batch,
        "seconds": round(time.time() - started, 1),
        "device": device_name(device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": args.seed,
        **{k: {"db": round(v[0], 2), "codes": v[1]} for k, v in quality.items()},
    }
    (folder / DONE).write_text(history + json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


def train(
    model: IBQ,
    codes: Codes,
    stream: Iterator[tuple[Tensor, Tensor]],
    folder: Path,
    args: argparse.Namespace,
    held: Batch,
) -> int:
    """Train until `args.steps` or `args.seconds`, saving to `folder` on the way; return the number of steps."""
    device = codes.book.device
    passes = TrainingPasses(model, codes, args.batch, device, captured=not args.eager)
    optimizer = torch.optim.AdamW(
        passes.own, lr=args.rate, betas=(0.9, 0.95), weight_decay=1e-4, fused=device.type == "cuda"
    )
    bar = tqdm(range(args.steps), mininterval=5.0)
    schedule_start, collected, saves, n = time.time(), None, 0, 0
    passes.quantise.fill_(1.0 if args.resume else 0.0)
    for n in bar:
        if n == WARM_UP:
            schedule_start = time.time()  # exclude one-time setup from the schedule
        spent = (time.time() - schedule_start) / args.seconds if math.isfinite(args.seconds) else 0.0
        progress = max(n / args.steps, spent)
        if progress >= 1:
            break
        x, target = next(stream)
        warm, finish = bool(args.resume) or (progress > 0.08 and n > 150), progress > FINISH
        if warm and collected is not None:
            codes.initialize(collected)
            passes.quantise.fill_(1.0)
            collected = None
        rate = args.rate * min(1.0, (n + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        passes.refresh()
        squared, flat, chosen = passes.gradients(x, target, finish=finish)
        nn.utils.clip_grad_norm_(passes.own, 1.0)
        optimizer.step()
        if warm and not finish:
            codes.update(flat, chosen, decay=0.98, revive=n % 20 == 0 and progress < 0.6 and not args.resume)
        elif progress > 0.06 and not warm:
            collected = flat.clone() if collected is None else torch.cat([collected, flat])[-40000:]
        if n % 50 == 0:
            bar.set_postfix(psnr=f"{-10 * math.log10(squared.item() / 4 + 1e-9):.2f}")
        if progress >= (saves + 1) / 12:
            saves = int(progress * 12)
            save(model, codes, folder)
            quality, used = psnr(load_vision_tokenizer(folder, device=device), held, device, 40)
            print(
                f"step {n} {time.time() - schedule_start:.0f}s held-out psnr {quality:.2f} dB, {used} codes",
                int((codes.uses > 0.1).sum()),
                flush=True,
            )
    return n


if __name__ == "__main__":
    main()

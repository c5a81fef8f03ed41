"""Exports a trained vision tokenizer, language model and vocabulary as the package's miniature."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from emu_cog.pipeline import Pipeline
from emu_cog.prompt.tasks import DEFAULTS_FILE
from emu_cog.prompt.tokenizer import RANKS_FILE, VISION_FILE
from emu_cog.weights.store import MINIATURE
from scripts.mini.pool import AREA
from scripts.mini.train.language_model import LanguageModel, Shape
from scripts.mini.train.runs import fraction
from scripts.mini.train.train_language import read_weights

LIMIT = 40 * 10**6
"""Maximum total size in bytes."""
DEFAULTS = {
    "kind": "image",
    "aspect_ratio": "1:1",
    "image_area": AREA,
    "guidance_scale": {"t2i": 2.0, "x2i": 1.7, "howto": 2.0, "story": 2.0, "explore": 1.0, "vla": 2.0},
    "image_temperature": {"t2i": 0.7, "x2i": 0.6, "howto": 0.7, "story": 0.9, "explore": 0.3, "vla": 0.7},
}
"""Best of a few settings for the committed weights, chosen on prompts outside the evaluation."""


def copy(vision: Path, vocabulary: Path, language: Path, target: Path, defaults: Mapping[str, object]) -> int:
    """Write `target`/model and `target`/vision; return their size in bytes.

    The files are staged and loaded once for validation before they replace the old ones. SystemExit if a file is
    missing or the size exceeds LIMIT.
    """
    shards = sorted(language.glob("*.safetensors")) or [language / "model.safetensors"]
    sources = {
        "vision": [vision / "config.yaml", vision / "model.ckpt"],
        "model": [
            vocabulary / RANKS_FILE,
            vocabulary / VISION_FILE,
            language / "config.json",
            language / "model.safetensors.index.json",
            *shards,
        ],
    }
    if missing := [str(path) for paths in sources.values() for path in paths if not path.is_file()]:
        raise SystemExit(f"nothing was changed: {', '.join(missing)} missing")
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target, prefix=".export") as folder:
        fresh = Path(folder)
        for name, paths in sources.items():
            (fresh / name).mkdir()
            for path in paths:
                shutil.copy(path, fresh / name / path.name)
                (fresh / name / path.name).chmod(0o644)
        (fresh / "model" / DEFAULTS_FILE).write_text(json.dumps({**DEFAULTS, **defaults}, indent=2) + "\n")
        size = sum(path.stat().st_size for name in sources for path in (fresh / name).iterdir())
        if size > LIMIT:
            raise SystemExit(f"nothing was changed: the miniature has {size} bytes, over the limit of {LIMIT}")
        Pipeline.load(fresh / "model", fresh / "vision")
        for name in sources:
            if (target / name).exists():
                (target / name).rename(fresh / f"old-{name}")
            (fresh / name).rename(target / name)
    return size


def blend(language: Path, other: Path, share: float, out: Path) -> None:
    """Write the average of two checkpoints to `out`, `share` from `other`, an earlier one of the same run: averaging
    reduces overfitting."""
    ours, theirs = read_weights(language), read_weights(other)
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        raise SystemExit(
            f"{other} holds other tensors than {language}: only checkpoints of the same shape can be averaged"
        )
    model = LanguageModel(Shape.read(language), dtype=torch.float32)
    model.load_released({k: (1 - share) * ours[k].float() + share * theirs[k].float() for k in ours})
    model.save(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vision", type=Path, required=True)
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--language", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=MINIATURE)
    parser.add_argument(
        "--defaults",
        type=json.loads,
        default={},
        help='the checkpoint\'s default settings as JSON: {"guidance_scale": {"t2i": 3.0}, "image_temperature": 0.8}',
    )
    parser.add_argument("--blend", type=Path, help="folder of an earlier checkpoint of the same run, to average in")
    parser.add_argument("--blend-share", type=fraction, default=0.2, help="its weight in the average, 0 to 1")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        if args.blend:
            blend(args.language, args.blend, args.blend_share, Path(folder))
        language = Path(folder) if args.blend else args.language
        size = copy(args.vision, args.vocabulary, language, args.out, args.defaults)
    print(json.dumps({"bytes": size}))


if __name__ == "__main__":
    main()

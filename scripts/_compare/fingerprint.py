"""Do two versions of this package make the same files? SHA-256 of all files of 20 fixed requests over all six tasks.

    python scripts/_compare/fingerprint.py                       the fingerprints of this checkout, as JSON lines
    python scripts/_compare/fingerprint.py --against VERSION     a table: same or differs, request by request

VERSION is the folder of another checkout, or a commit of this repository. Both sides run on emu-mini on one CPU thread,
each with its own package and this script's requests. Two requests must be refused; their messages are compared.
Exit code 1: something differs; 2: a version could not be run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PHOTO = ROOT / "docs" / "mini-wide.png"

REQUESTS: list[dict[str, Any]] = [
    {"prompt": "two small red stars above a blue circle on a yellow background", "seed": 2},
    {"prompt": "a large orange fish on a blue background", "seed": 5, "guidance_scale": 1.0},
    {"prompt": "three brown houses on a green background", "seed": 3, "num_outputs": 3},
    {"prompt": "one white moon on a black background", "seed": 4, "aspect_ratio": "16:9"},
    {"prompt": "a red heart above a blue square", "seed": 6, "aspect_ratio": "model"},
    {"prompt": "a red heart", "seed": 7, "aspect_ratio": "custom", "width": 160, "height": 224},
    {"prompt": "a pink heart", "seed": 8, "image_top_p": 0.9, "output_format": "jpeg"},
    {"prompt": "a pink heart", "seed": 8, "image_top_k": 20, "image_temperature": 0.7, "output_format": "webp"},
    {"prompt": "a pink heart", "seed": 9, "resolution": "512", "aspect_ratio": "9:21", "output_quality": 60},
    {"task_type": "x2i", "prompt": "Paint the heart white.", "seed": 1, "photos": 1},
    {"task_type": "x2i", "prompt": "make the background green", "seed": 2, "photos": 2, "num_outputs": 2},
    {"task_type": "x2i", "prompt": "remove the star", "seed": 3, "photos": 1, "aspect_ratio": "1:1"},
    {"task_type": "howto", "prompt": "How do I draw a brown house and a green tree?", "seed": 1},
    {"task_type": "story", "prompt": "Tell a story about a small orange fish that visits a red house.", "seed": 2},
    {"task_type": "story", "prompt": "Tell a story about a fish.", "seed": 3, "max_new_tokens": 512},
    {"task_type": "explore", "prompt": "explore a green world with red hearts: go right, down", "seed": 3},
    {"task_type": "vla", "prompt": "Put the red ball above the blue box.", "seed": 4, "photos": 1},
    {"task_type": "howto", "prompt": "How do I draw a fish?", "seed": 9, "text_temperature": 1.5, "photos": 1},
    {"task_type": "t2i", "prompt": "a fish", "seed": 1, "photos": 1},  # refused: t2i takes no photo
    {"task_type": "x2i", "prompt": "a fish", "seed": 1, "aspect_ratio": "custom", "width": 161, "photos": 1},  # refused
]


def fingerprints(checkout: Path) -> Iterator[dict[str, Any]]:
    """One result per request, made by the package in `checkout`."""
    sys.path.insert(0, str(checkout))
    import torch

    from emu_cog import Settings
    from emu_cog.service import Service

    torch.set_num_threads(1)
    service = Service.from_settings(Settings(checkpoint="mini", device="cpu"))
    for number, request in enumerate(REQUESTS, 1):
        inputs: dict[str, Any] = {"output_format": "png", "output_quality": 95} | request
        photos, task = inputs.pop("photos", 0), inputs.pop("task_type", "t2i")
        metrics: dict[str, Any] = {}
        result: dict[str, Any] = {"request": number, "task": task}
        try:
            files = service.run(
                references={f"reference_image_{i}": PHOTO for i in range(photos)},
                record_metric=metrics.__setitem__,
                task=task,
                **inputs,
            )
            result["files"] = [f"{file.suffix} {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}" for file in files]
            result |= {name: metrics[name] for name in ("seed", "tokens")}
        except ValueError as error:
            result["refused"] = str(error)
        yield result


def compare(against: str) -> int:
    """Print the table of this checkout against another version."""
    with _checkout(against) as other:
        # Both at once: each uses one thread.
        runs = [
            subprocess.Popen(
                [sys.executable, __file__, "--checkout", folder],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
            )
            for folder in (other, ROOT)
        ]
        printed = [run.communicate() for run in runs]
    for run, folder, (_, log) in zip(runs, (against, ROOT), printed, strict=True):
        if run.returncode:
            print(
                f"error: {folder} could not be run: {(log.strip().splitlines() or ['no output'])[-1]}", file=sys.stderr
            )
            return 2
    theirs, ours = ([json.loads(line) for line in lines.splitlines()] for lines, _ in printed)
    print(f"{'request':>7}  {'task':8} {'files':>5}  result")
    differ = 0
    for a, b in zip(theirs, ours, strict=True):
        keys = [key for key in sorted(a | b) if a.get(key) != b.get(key)]
        differ += bool(keys)
        state = "same" if not keys else f"DIFFERS in {', '.join(keys)}"
        note = ", refused" if "refused" in a and not keys else ""
        print(f"{b['request']:7}  {b['task']:8} {len(b.get('files', ())):5}  {state}{note}")
        for key in keys:
            print(f"{'':25}{against}: {a.get(key)}\n{'':25}here: {b.get(key)}")
    print(f"{differ} of {len(ours)} requests differ from {against}" if differ else f"all {len(ours)} as in {against}")
    return 1 if differ else 0


@contextmanager
def _checkout(version: str) -> Iterator[Path]:
    """The folder of `version`: itself, or a temporary worktree of that commit."""
    if Path(version).is_dir():
        yield Path(version).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="emu-cog-") as temporary:
        folder = Path(temporary) / "worktree"
        git = ["git", "-C", str(ROOT), "worktree"]
        done = subprocess.run([*git, "add", "--detach", folder, version], capture_output=True, encoding="utf-8")
        if done.returncode:
            print(f"error: {version} is neither a folder nor a commit: {done.stderr.strip()}", file=sys.stderr)
            sys.exit(2)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="VERSION", help="a folder or a commit to compare this checkout with")
    parser.add_argument("--checkout", metavar="DIR", type=Path, default=ROOT, help="print DIR's fingerprints instead")
    options = parser.parse_args()
    if options.against:
        return compare(options.against)
    for result in fingerprints(options.checkout.resolve()):
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

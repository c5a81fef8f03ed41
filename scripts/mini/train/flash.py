"""Makes the FlashAR miniature in one command, on one GPU: encode, train-flash with its export, evaluate.

Encoding and training start together: while training compiles, the first shards arrive. Each part has its own time limit
and is ended when that is over; training then still saves, and what was exported is evaluated.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from emu_cog.weights.store import MINIATURE

TRAIN = Path(__file__).resolve().parent
GRACE = 20.0
"""Seconds that a part has to end by itself after SIGTERM."""
EXPORT = 20.0
"""Seconds kept for the last checkpoint and the export."""
FALLBACKS = (["--compile"], ["--compile", "--eager"], ["--eager"])
"""Options of train-flash that are tried in turn, should it fail."""
ENCODE = {"--samples": "700000", "--seed": "81", "--many": "0.5", "--beyond": "0.2", "--reworded": "0.6"}
TRY_ENCODE = ENCODE | {"--samples": "64", "--held-out": "8"}
TRY_TRAIN = {"--steps": "4", "--tokens": "1440"}


@dataclass
class Part:
    """A command with its own log in `folder`, to end at `limit`, seconds after the start of everything."""

    name: str
    folder: Path
    limit: float
    began: float
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self, *command: object) -> Part:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self

    def stop(self) -> None:
        """End it, in good time, and then the processes that it has left."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit status; negative where it had to be ended."""
        try:
            self.process.wait(max(self.began + self.limit - time.time(), 0.1))
        except subprocess.TimeoutExpired:
            print(f"{self.name}: ended at its limit of {self.limit:.0f} s", flush=True)
            self.stop()
        lines = (self.folder / f"{self.name}.log").read_text(errors="replace").splitlines()
        print(f"{self.name}: status {self.process.wait()} at {time.time() - self.began:.0f} s", *lines[-3:], sep="\n  ")
        return self.process.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the logs, figures and OUT/flash, the weights"
    )
    parser.add_argument("--work", type=Path, help="folder for the data and the training's state; default OUT/work")
    parser.add_argument("--encode-seconds", type=float, default=120, help="wall time of encoding")
    parser.add_argument("--train-seconds", type=float, default=260, help="training time, at most, without its setup")
    parser.add_argument("--limit", type=float, default=470, help="wall time of everything")
    parser.add_argument("--evaluate-seconds", type=float, default=120, help="wall time kept for the evaluation")
    parser.add_argument("--prompts", type=int, default=400, help="prompts per task of the evaluation")
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="further options of train-flash, last")
    parser.add_argument("--try", dest="small", action="store_true", help="a minute on a CPU: the weights are useless")
    args = parser.parse_args()
    began, work = time.time(), args.work or args.out / "work"
    plain, vision, target = MINIATURE / "model", MINIATURE / "vision", args.out / "flash"
    settings = [x for pair in (TRY_ENCODE if args.small else ENCODE).items() for x in pair]
    small = [x for pair in TRY_TRAIN.items() for x in pair] if args.small else []
    evaluating = args.evaluate_seconds

    encode = Part("encode", args.out, args.encode_seconds + 60, began).start(
        TRAIN / "encode", "--flash", "--vision", vision, "--vocabulary", plain, "--out", work / "data",
        "--seconds", args.encode_seconds, *settings, *([] if args.small else ["--compile"]),
    )  # fmt: skip
    try:
        for further in ([],) if args.small else FALLBACKS:
            left = began + args.limit - evaluating - time.time()
            if left < 2 * EXPORT:
                break
            train = Part("train", args.out, args.limit - evaluating, began).start(
                TRAIN / "train-flash", "--data", work / "data", "--out", work / "train", "--export", target,
                "--wait", 120, "--seconds", args.train_seconds, "--wall", left - EXPORT, *small, *args.train, *further,
            )  # fmt: skip
            try:
                if train.wait() == 0:
                    break
            finally:
                train.stop()
    finally:
        encode.stop()
        encode.wait()
    if not (target / "model.safetensors").is_file():
        raise SystemExit(f"no weights were exported: see {args.out / 'train.log'}")
    evaluate = Part("evaluate", args.out, args.limit, began).start(
        TRAIN.parent / "evaluate", "--model", target, "--vision", vision, "--tasks", "t2i", "x2i",
        "--prompts", 2 if args.small else args.prompts, "--batch", 2 if args.small else 128,
        "--gallery", args.out / "gallery", "--out", args.out / "figures.json",
    )  # fmt: skip
    try:
        status = evaluate.wait()
    finally:
        evaluate.stop()
    size = sum(path.stat().st_size for path in target.iterdir())
    print(json.dumps({"seconds": round(time.time() - began, 1), "bytes": size, "evaluated": status == 0}))


if __name__ == "__main__":
    main()

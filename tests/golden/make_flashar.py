"""Make flashar.npz again, by running the code of the two repositories that have FlashAR:

    python tests/golden/make_flashar.py --reference-python PATH LXAZJK U0

LXAZJK and U0 are clones of lxazjk/Emu3.5-FlashAR and XiaomiRobotics/Xiaomi-Robotics-U0 at the commits of
`_compare.flashar.COMMITS`; PATH is a Python with torch, numpy, safetensors and transformers 4.48.2. `--out FILE` writes
elsewhere, to compare with the committed file.

For each layout the file holds the arrays that scripts/_compare/reference_flashar.py documents, as `layout/case/key`;
`layout/prompts`, the text of both prompts by case (JSON); `layout/digest` of the tiny checkpoint's weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "scripts")]

import numpy as np  # noqa: E402
from _compare import flashar  # noqa: E402

from emu_cog.prompt.tokenizer import Tokenizer  # noqa: E402
from tests.golden import inputs  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Make tests/golden/flashar.npz again.")
    parser.add_argument("clones", nargs=2, type=Path, metavar="CLONE")
    parser.add_argument("--reference-python", required=True, type=Path, metavar="PATH")
    parser.add_argument("--out", type=Path, default=HERE / "flashar.npz")
    options = parser.parse_args()
    made: dict[str, np.ndarray] = {}
    for clone in options.clones:
        layout = flashar.layout_of(clone)
        commit = subprocess.run(
            ["git", "-C", clone, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        if commit != flashar.COMMITS[layout]:
            parser.error(f"{clone} is at {commit}, expected {flashar.COMMITS[layout]}")
        with tempfile.TemporaryDirectory() as folder:
            folders = flashar.make_checkpoint(layout, Path(folder))
            tokenizer = Tokenizer.load(folders.model)
            reference = flashar.run_reference(options.reference_python, clone, folders.model, tokenizer)
            made |= {f"{layout}/{key}": value for key, value in reference.arrays.items()}
            made[f"{layout}/prompts"] = np.array(json.dumps(reference.prompts))
            made[f"{layout}/digest"] = np.array(inputs.digest(folders))
        print(f"{layout}: {', '.join(flashar.CASES[layout])}; {reference.versions}")
    np.savez_compressed(options.out, **made)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

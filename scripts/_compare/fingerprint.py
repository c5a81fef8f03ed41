"""SHA-256 of every file that 20 fixed requests over all six tasks produce on emu-mini, as JSON lines.

    python scripts/_compare/fingerprint.py [CHECKOUT]

With CHECKOUT the package of that checkout is used, so that two commits can be compared: run it for each and diff the
outputs. A refactoring must not change a byte; requests that must be refused count too, with their message.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

PHOTO = Path(__file__).resolve().parents[2] / "docs" / "mini-wide.png"

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


def main(checkout: Path) -> None:
    sys.path.insert(0, str(checkout))
    import torch

    from emu_cog import Settings
    from emu_cog.service import Service

    torch.set_num_threads(1)
    service = Service.from_settings(Settings(checkpoint="mini"))
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
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[2]).resolve())

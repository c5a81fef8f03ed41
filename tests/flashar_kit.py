"""FlashAR checkpoints on the disk and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from emu_cog.model.flashar import FlashModel
from emu_cog.model.headers import shard_files
from emu_cog.model.loader import load_flash_model
from emu_cog.prompt.tokenizer import Tokenizer

CPU = torch.device("cpu")


def load(folder: Path, **kwargs: Any) -> FlashModel:
    return load_flash_model(folder, Tokenizer.load(folder).ids, device=CPU, **{"dtype": torch.float32, **kwargs})


def state_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in shard_files(folder) for name, value in load_file(file).items()}

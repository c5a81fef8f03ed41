"""Loads the dataset shards written by `encode`, grouped by length and shuffled."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scripts.mini.train.encode import SHARDS


@dataclass
class Bucket:
    """All sequences of one padded length, in a shuffled order: (M, T) ids, and (M, T) loss masks or (M, 4) grids."""

    ids: Tensor
    learn: Tensor
    order: Tensor
    place: int = 0

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        if self.place + count > len(self.order):
            self.order = torch.randperm(len(self.ids), device=self.ids.device)
            self.place = 0
        pick = self.order[self.place : self.place + count]
        if len(pick) < count:
            pick = pick.repeat(-(-count // len(pick)))[:count]
        self.place += count
        return self.ids[pick].long(), self.learn[pick]


class Data:
    """The dataset in a folder that `encode` may still be writing; `refresh` loads new shards."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.buckets: dict[int, Bucket] = {}
        self.seen: set[Path] = set()
        self.samples = 0

    def wait(self, seconds: float) -> None:
        """Wait for the first shard; FileNotFoundError after `seconds`."""
        until = time.time() + seconds
        while not self.refresh():
            if time.time() > until:
                raise FileNotFoundError(f"{self.folder} holds no dataset shards: run encode first, or increase --wait")
            time.sleep(0.2)

    def refresh(self) -> bool:
        """Load new shards; whether there were any."""
        new = sorted(set(self.folder.glob(SHARDS)) - self.seen)
        for path in new:
            self.seen.add(path)
            for length, (ids, learn) in read(path).items():
                own = self.buckets.get(length)
                ids, learn = ids.to(self.device), learn.to(self.device)
                if own:
                    ids, learn = torch.cat([own.ids, ids]), torch.cat([own.learn, learn])
                order = torch.randperm(len(ids), device=self.device)
                self.buckets[length] = Bucket(ids, learn, order)
        self.samples = sum(len(b.ids) for b in self.buckets.values())
        return bool(new)

    def weights(self) -> tuple[list[int], NDArray[np.float64]]:
        """The lengths and their sampling probabilities, proportional to tokens."""
        weights = np.array([len(b.ids) * n for n, b in self.buckets.items()], float)
        return list(self.buckets), weights / weights.sum()


def read(path: Path) -> dict[int, tuple[Tensor, Tensor]]:
    """(ids, loss mask) of a shard by length, or of FlashAR sequences (ids, grid)."""
    found = {}
    with np.load(path) as arrays:
        for name in (name for name in arrays.files if name.startswith("ids_")):
            length = name.removeprefix("ids_")
            other = f"learn_{length}" if f"learn_{length}" in arrays else f"grid_{length}"
            found[int(length)] = torch.from_numpy(arrays[name]), torch.from_numpy(arrays[other])
    return found

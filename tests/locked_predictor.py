"""predict.py's Predictor whose requests wait for each other, until `Pipeline.stream` is re-entrant."""

from __future__ import annotations

from emu_cog.service import OneAtATime
from predict import Predictor as RealPredictor


class Predictor(RealPredictor):
    def setup(self) -> None:
        super().setup()
        self.service.pipeline = OneAtATime(self.service.pipeline)

"""Emu3.5 on Cog: words and photos in, pictures out. Cog reads this file without importing it: Inputs are literal.

What the inputs mean is in emu_cog/request.py, the inference in emu_cog/pipeline.py.
"""

import threading
from collections.abc import Iterator
from typing import Optional

import cog
from cog import BasePredictor, Input, Path

from emu_cog import Settings
from emu_cog.service import Service
from emu_cog.serving import stream

TASK_TYPES = ["t2i", "x2i", "howto", "story", "explore", "vla"]
ASPECT_RATIOS = [
    "auto", "model", "1:1", "5:4", "4:5", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21", "custom"
]  # fmt: skip
RESOLUTIONS = ["auto", "512", "720", "1024"]
OUTPUT_FORMATS = ["png", "jpeg", "webp"]


class Predictor(BasePredictor):
    def setup(self) -> None:
        """Load the model that EMU_CHECKPOINT names with the backend that EMU_BACKEND names, and warm it up."""
        self.service = Service.from_settings(Settings.from_env())
        self.service.warm_up()

    @cog.streaming
    @cog.concurrent(max=8)
    async def predict(
        self,
        prompt: str = Input(description="What to make, in words."),
        task_type: str = Input(
            description="t2i: picture from words. x2i: edit or combine photos. The others: an illustrated sequence.",
            choices=TASK_TYPES,
            default="t2i",
        ),
        reference_image: Optional[Path] = Input(
            description="A photo to edit or to start from. Needed by x2i, allowed for all but t2i.",
            accept="image/*",
            default=None,
        ),
        reference_image_2: Optional[Path] = Input(
            description="A second photo; the prompt may call it the second image.", accept="image/*", default=None
        ),
        reference_image_3: Optional[Path] = Input(description="A third photo.", accept="image/*", default=None),
        aspect_ratio: str = Input(
            description="Width:height. auto: the first photo's, else 1:1 for t2i, the model's choice for sequences.",
            choices=ASPECT_RATIOS,
            default="auto",
        ),
        width: Optional[int] = Input(
            description="Width in pixels for aspect_ratio custom: a multiple of 16.", ge=160, le=1584, default=None
        ),
        height: Optional[int] = Input(
            description="Height in pixels for aspect_ratio custom: a multiple of 16.", ge=160, le=1584, default=None
        ),
        resolution: str = Input(
            description="Side of the square with the picture's area. auto: 1024 for t2i and x2i, 720 for sequences.",
            choices=RESOLUTIONS,
            default="auto",
        ),
        num_outputs: int = Input(
            description="How many pictures, with seeds seed, seed + 1 and so on. More than 1 for t2i and x2i only.",
            ge=1,
            le=4,
            default=1,
        ),
        guidance_scale: Optional[float] = Input(
            description="How strongly the prompt pulls. Empty: 5 for t2i, else 3; base model 2 for t2i, x2i, else 3.",
            ge=1.0,
            le=20.0,
            default=None,
        ),
        temperature: Optional[float] = Input(
            description="Randomness of text and picture, where the two temperatures below are empty.",
            ge=0.01,
            le=2.0,
            default=None,
        ),
        text_temperature: Optional[float] = Input(description="Randomness of text.", ge=0.01, le=2.0, default=None),
        text_top_k: Optional[int] = Input(
            description="Keep this many of the likeliest text tokens; 0 keeps all.", ge=0, le=1048576, default=None
        ),
        text_top_p: Optional[float] = Input(
            description="Keep the likeliest text tokens up to this probability.", ge=0.0, le=1.0, default=None
        ),
        image_temperature: Optional[float] = Input(
            description="Randomness of the picture.", ge=0.01, le=2.0, default=None
        ),
        image_top_k: Optional[int] = Input(
            description="Keep this many of the likeliest image tokens; 0 keeps all.", ge=0, le=1048576, default=None
        ),
        image_top_p: Optional[float] = Input(
            description="Keep the likeliest image tokens up to this probability.", ge=0.0, le=1.0, default=None
        ),
        max_new_tokens: Optional[int] = Input(
            description="After this many tokens no new text or picture begins; a begun picture is finished.",
            ge=512,
            le=32768,
            default=None,
        ),
        seed: Optional[int] = Input(
            description="The same seed and settings give the same picture. Empty: a random seed, which the log names.",
            default=None,
        ),
        output_format: str = Input(description="Format of the pictures.", choices=OUTPUT_FORMATS, default="png"),
        output_quality: int = Input(description="Quality of jpeg and webp pictures.", ge=1, le=100, default=95),
    ) -> Iterator[Path]:
        """Pictures, or texts and pictures and, last, a page that shows them together, each as soon as it is made."""
        cancelled = threading.Event()
        files = self.service.run(
            references={
                "reference_image": reference_image,
                "reference_image_2": reference_image_2,
                "reference_image_3": reference_image_3,
            },
            output_format=output_format,
            output_quality=output_quality,
            record_metric=self.record_metric,
            cancelled=cancelled,
            prompt=prompt,
            task=task_type,
            aspect_ratio=aspect_ratio,
            width=width,
            height=height,
            resolution=resolution,
            num_outputs=num_outputs,
            guidance_scale=guidance_scale,
            temperature=temperature,
            text_temperature=text_temperature,
            text_top_k=text_top_k,
            text_top_p=text_top_p,
            image_temperature=image_temperature,
            image_top_k=image_top_k,
            image_top_p=image_top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        return stream(files, cancelled)

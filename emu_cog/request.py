"""What can be requested, and the checks that need no model. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from emu_cog.errors import InputError

if TYPE_CHECKING:
    from PIL import Image


Task = Literal["t2i", "x2i", "howto", "story", "explore", "vla"]
TASKS: tuple[str, ...] = get_args(Task)

PIXELS_PER_TOKEN = 16
"""One visual token covers 16x16 pixels: the vision tokenizer halves four times."""

ASPECT_RATIOS = (
    "auto", "model", "1:1", "5:4", "4:5", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21", "custom"
)  # fmt: skip
RESOLUTIONS = ("auto", "512", "720", "1024")
OUTPUT_FORMATS = ("png", "jpeg", "webp")
MIN_SIDE, MAX_SIDE = 160, 1584
"""Pixels per side of custom sizes: 10 to 99 tokens, the numbers with two digits."""
MAX_OUTPUTS = 4
MAX_REFERENCES = 3
MIN_NEW_TOKENS, MAX_NEW_TOKENS = 512, 32768
MAX_GUIDANCE = 20.0
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """How one kind of token is sampled. `top_k` 0 and `top_p` 1.0 switch that filter off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caller asks for; None and "auto" stand for the task's defaults.

    `images` are PIL images in reading order. `image_area` (pixels) and `size` (token rows, columns) are for library
    callers and override `resolution`, `aspect_ratio`, `width` and `height`. The constructor raises InputError for
    everything that can be checked without the model.
    """

    prompt: str
    task: str = "t2i"
    images: tuple[Image.Image, ...] = ()
    aspect_ratio: str = "auto"
    width: int | None = None
    height: int | None = None
    resolution: str = "auto"
    num_outputs: int = 1
    guidance_scale: float | None = None
    temperature: float | None = None
    text_temperature: float | None = None
    text_top_k: int | None = None
    text_top_p: float | None = None
    image_temperature: float | None = None
    image_top_k: int | None = None
    image_top_p: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    image_area: int | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _one_of("task_type", self.task, TASKS)
        _one_of("aspect_ratio", self.aspect_ratio, ASPECT_RATIOS)
        _one_of("resolution", self.resolution, RESOLUTIONS)
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise InputError("prompt is blank: describe in words what to make")
        self._check_images()
        self._check_size()
        self._check_numbers()

    def _check_images(self) -> None:
        count = len(self.images)
        if self.task == "t2i" and count:
            raise InputError(
                f"task_type t2i makes a picture from words alone, but {count} reference image(s) were given: "
                "leave them out, or use task_type x2i to edit or combine photos"
            )
        if self.task == "x2i" and not count:
            raise InputError(
                f"task_type x2i needs 1 to {MAX_REFERENCES} reference images and none was given: "
                "add reference_image, or use task_type t2i"
            )
        if count > MAX_REFERENCES:
            raise InputError(f"{count} reference images were given, at most {MAX_REFERENCES} are accepted")

    def _check_size(self) -> None:
        sides = (self.width, self.height)
        if self.aspect_ratio == "custom" and None in sides:
            raise InputError(
                f"aspect_ratio custom needs both width and height, given were width={self.width}, height={self.height}"
            )
        if self.aspect_ratio != "custom" and sides != (None, None):
            raise InputError(
                f"width={self.width}, height={self.height} go with aspect_ratio custom only, "
                f"but aspect_ratio is {self.aspect_ratio}: set aspect_ratio to custom, or leave width and height out"
            )
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and (
                isinstance(side, bool) or side % PIXELS_PER_TOKEN or not MIN_SIDE <= side <= MAX_SIDE
            ):
                raise InputError(
                    f"{name}={side} can't be made: it must be a multiple of {PIXELS_PER_TOKEN} "
                    f"from {MIN_SIDE} to {MAX_SIDE}"
                )
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise InputError(f"size={self.size} must be (rows, columns), both at least 1")
        if self.image_area is not None and self.image_area < PIXELS_PER_TOKEN**2:
            raise InputError(f"image_area={self.image_area} must be at least {PIXELS_PER_TOKEN**2} pixels")

    def _check_numbers(self) -> None:
        _in_range("num_outputs", self.num_outputs, 1, MAX_OUTPUTS, whole=True)
        if self.num_outputs > 1 and self.task not in ("t2i", "x2i"):
            raise InputError(
                f"num_outputs={self.num_outputs} is for t2i and x2i: task_type {self.task} writes one sequence a run"
            )
        _in_range("guidance_scale", self.guidance_scale, 1.0, MAX_GUIDANCE)
        for name in ("temperature", "text_temperature", "image_temperature"):
            _in_range(name, getattr(self, name), MIN_TEMPERATURE, MAX_TEMPERATURE)
        for name in ("text_top_k", "image_top_k"):
            _in_range(name, getattr(self, name), 0, 2**20, whole=True)
        for name in ("text_top_p", "image_top_p"):
            _in_range(name, getattr(self, name), 0.0, 1.0)
        _in_range("max_new_tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS, whole=True)
        _in_range("seed", self.seed, 0, MAX_SEED - MAX_OUTPUTS, whole=True)


def _one_of(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise InputError(f"{name}={value!r} is not known, accepted are {', '.join(accepted)}")


def _in_range(name: str, value: float | None, low: float, high: float, *, whole: bool = False) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise InputError(f"{name}={value!r} is out of range: it must be {kind} from {low} to {high}")

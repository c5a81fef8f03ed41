"""The six tasks: their prompt templates and defaults, each with its source in upstream's configs.

Sources: t2i = configs/example_config_t2i.py, x2i = example_config_x2i.py, howto = example_config_visual_guidance.py,
story = example_config_visual_narrative.py. There is no example for explore and vla; they take story's values.
Sizes: of these only t2i's config sets one, so in sequences without photos the model chooses, as upstream lets it.

TABLES holds, by model kind, which tasks a model does and how: weights that others post-trained do fewer, with templates
of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from emu_cog.errors import CheckpointError, InputError
from emu_cog.prompt import geometry
from emu_cog.prompt.tokens import block_length
from emu_cog.request import MAX_NEW_TOKENS, MIN_SIDE, PIXELS_PER_TOKEN, TASKS, Request, Sampling

DEFAULTS_FILE = "defaults.json"

SYSTEM = "You are a helpful assistant"
UNCONDITIONAL = (f"{SYSTEM}. USER: ", " ASSISTANT: ")
"""Text before and after the reference images; without images both spaces stay. Source: `unc_p` in every config."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task's prompt and defaults. `guidance` is by model kind."""

    name: str
    images_first: bool
    interleaved: bool
    aspect_ratio: str
    """Without a photo and with aspect_ratio auto; "model" lets the model choose."""
    guidance: Mapping[str, float]
    image_area: int
    image: Sampling
    text: Sampling
    extra_system: str = ""
    named: bool = True
    """Whether the prompt says which task it is."""
    unconditional: tuple[str, str] = UNCONDITIONAL
    """The unconditional prompt's text before and after the reference images."""
    diagonal: bool = False
    """Whether pictures are decoded by diagonals (FlashAR): of a known size, and without text before them."""
    trained: tuple[int, int] | None = None
    """(rows, columns) of all pictures in the training, if they had one size."""

    def before(self) -> str:
        """The conditional prompt's text up to the question (or the images, where they come first)."""
        return f"{SYSTEM}{f' for {self.name} task' if self.named else ''}.{self.extra_system} USER: "


_PICTURE_TEXT = Sampling(temperature=1.0, top_k=1024, top_p=0.9)
_PICTURE_IMAGE = Sampling(temperature=1.0, top_k=5120, top_p=1.0)
_STORY_IMAGE = Sampling(temperature=1.0, top_k=10240, top_p=1.0)


def _story_like(name: str) -> Task:
    return Task(
        name=name,
        images_first=False,
        interleaved=True,
        aspect_ratio="model",
        guidance={"image": 3.0, "base": 3.0},
        image_area=518400,
        image=_STORY_IMAGE,
        text=_PICTURE_TEXT,
    )


TABLE: Mapping[str, Task] = {
    "t2i": Task(
        name="t2i",
        images_first=False,
        interleaved=False,
        aspect_ratio="1:1",
        guidance={"image": 5.0, "base": 2.0},
        image_area=1048576,
        image=_PICTURE_IMAGE,
        text=_PICTURE_TEXT,
    ),
    "x2i": Task(
        name="x2i",
        images_first=True,
        interleaved=False,
        aspect_ratio="1:1",  # never used: x2i always has a photo
        # Upstream has 3.0 in its runnable x2i example and 5 in a comment of configs/config.py. The example is what
        # upstream runs for edits, and less guidance keeps more of the photo.
        guidance={"image": 3.0, "base": 2.0},
        image_area=1048576,
        image=_PICTURE_IMAGE,
        text=_PICTURE_TEXT,
    ),
    "howto": Task(
        name="howto",
        images_first=False,
        interleaved=True,
        aspect_ratio="model",
        guidance={"image": 3.0, "base": 3.0},
        image_area=518400,
        image=_STORY_IMAGE,
        text=Sampling(temperature=0.7, top_k=200, top_p=0.8),
        extra_system=" Please generate a response with interleaved text and images.",
    ),
    "story": _story_like("story"),
    "explore": _story_like("explore"),
    "vla": _story_like("vla"),
}
assert tuple(TABLE) == TASKS


def _without_question(task: Task, **changes: Any) -> Task:
    """`task` with the conditional prompt of an empty question as its unconditional one."""
    task = replace(task, **changes)
    return replace(task, unconditional=(task.before(), " ASSISTANT: "))


# XiaomiRobotics/Xiaomi-Robotics-U0 at 777c620: templates in xr_u0_ar/task_prompts.py, guidance and sizes in
# configs/tasks/t2i.py and x2i.py, the same for both engines. Its autoregressive example makes every edit 64x64, its
# FlashAR example in the photo's shape (match_reference_shape), which holds here for both. Left out: scene-gen and
# transfer, whose prompts are raw text with several views.
_U0: Mapping[str, Task] = {
    "t2i": _without_question(TABLE["t2i"], guidance={"u0": 3.0, "u0-flash": 3.0}),
    "x2i": _without_question(TABLE["x2i"], guidance={"u0": 3.0, "u0-flash": 3.0}, named=False),
}

# lxazjk/Emu3.5-FlashAR at 2d4a74e: the template and the empty question of tools/generate_geneval_flashar.py; trained on
# 32x32 tokens (flashar/data, `pretok_32`). Guidance 5 is in both of its README's commands, 2.5 the tools' own default;
# image top-k 5120 is configs/benchmark_t2i_flashar.py's.
_FLASH: Mapping[str, Task] = {
    "t2i": _without_question(
        TABLE["t2i"], guidance={"flash": 5.0}, image_area=512 * 512, diagonal=True, trained=(32, 32)
    ),
}

TABLES: Mapping[str, Mapping[str, Task]] = {
    "image": TABLE,
    "base": TABLE,
    "flash": _FLASH,
    "u0": _U0,
    "u0-flash": {name: replace(task, diagonal=True) for name, task in _U0.items()},
}
"""Model kind to the tasks that it does."""


def task_of(name: str, kind: str) -> Task:
    """The task `name` as models of `kind` do it. InputError where they don't."""
    tasks = TABLES[kind]
    if name not in tasks:
        raise InputError(
            f"task_type {name} can't be done by {kind} models, which do {' and '.join(tasks)}: "
            "set EMU_CHECKPOINT to image or base"
        )
    return tasks[name]


PICTURE_TEXT_TOKENS = 1024
"""How much text or reasoning t2i and x2i may write before their picture: upstream's limit of 5120 less the
4096 tokens of a 64x64 image."""


@dataclass(frozen=True, kw_only=True)
class ModelDefaults:
    """A checkpoint's own defaults. `kind` is a key of TABLES; the maps override task by task."""

    kind: str = "image"
    aspect_ratio: Mapping[str, str] = field(default_factory=dict)
    image_area: Mapping[str, int] = field(default_factory=dict)
    guidance_scale: Mapping[str, float] = field(default_factory=dict)
    image_temperature: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, *, kind: str = "image") -> ModelDefaults:
        """Read `folder/defaults.json`; for what it lacks, the defaults of `kind` hold.

        Keys, all optional: `kind` (one of TABLES); `aspect_ratio` (of pictures without a photo: "model" or a preset),
        `image_area` (pixels), `guidance_scale` and `image_temperature`, each one value for all tasks or a map
        from task to value. CheckpointError names a key that is wrong.
        """
        path = folder / DEFAULTS_FILE
        if not path.exists():
            return cls(kind=kind)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is not readable as JSON: {error}") from None
        if not isinstance(data, dict) or set(data) - set(cls.__dataclass_fields__):
            raise CheckpointError(f"{path} must be a map with the keys {', '.join(cls.__dataclass_fields__)}")
        kind = data.get("kind", kind)
        if kind not in TABLES:
            raise CheckpointError(f"{path}: kind is {kind!r}, accepted are {', '.join(TABLES)}")
        numbers = {
            key: _per_task(data.get(key, {}), f"{path}: {key}", "a positive number", _is_positive)
            for key in ("image_area", "guidance_scale", "image_temperature")
        }
        areas = {task: int(value) for task, value in numbers.pop("image_area").items()}
        ratios = _per_task(
            data.get("aspect_ratio", {}),
            f"{path}: aspect_ratio",
            f"model or one of {', '.join(geometry.PRESETS_1024)}",
            lambda value: isinstance(value, str) and (value == "model" or value in geometry.PRESETS_1024),
        )
        return cls(kind=kind, aspect_ratio=ratios, image_area=areas, **numbers)


def _per_task(value: Any, where: str, wanted: str, is_good: Callable[[Any], bool]) -> dict[str, Any]:
    values = value if isinstance(value, dict) else dict.fromkeys(TASKS, value)
    if not all(map(is_good, values.values())) or set(values) - set(TASKS):
        raise CheckpointError(f"{where} must be {wanted}, or a map from task to such values")
    return values


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A Request with every default filled in. `size` is (rows, columns), or None where the model chooses; `clipped` is
    the requested aspect ratio where pictures of this area can't have it.

    `max_new_tokens` None means: as much as the context holds.
    """

    task: Task
    guidance: float
    image_area: int
    size: tuple[int, int] | None
    clipped: str | None
    image: Sampling
    text: Sampling
    max_new_tokens: int | None

    @property
    def block(self) -> int:
        """Tokens of one picture, BOI to EOI; of the smallest the model can choose where it chooses."""
        return block_length(*(self.size or (10, 10)))

    def check_room(self, taken: int, *, references: int, context: int) -> None:
        """InputError where a prompt of `taken` tokens leaves no room in `context` for one picture and its end."""
        if taken + self.block + 1 > context:
            raise InputError(
                f"the prompt with its {references} reference image(s) takes {taken} tokens, a picture {self.block} "
                f"more, but the model's context holds {context}: shorten the prompt, leave out references "
                "or choose a smaller resolution"
            )

    def summary(self) -> str:
        """What was settled, for the log."""
        chosen = f"guidance {self.guidance:g}, size {self.size or 'chosen by the model'}"
        if self.task.trained and self.size != self.task.trained:
            rows, columns = self.task.trained
            width, height = columns * PIXELS_PER_TOKEN, rows * PIXELS_PER_TOKEN
            chosen += f" (these weights were trained on {width}x{height} pixels alone: other sizes may look worse)"
        if self.clipped is None or self.size is None:
            return chosen
        rows, columns = self.size
        return (
            f"{chosen}: aspect_ratio {self.clipped} would have a side under {MIN_SIDE} pixels at this resolution, "
            f"{columns * PIXELS_PER_TOKEN}x{rows * PIXELS_PER_TOKEN} pixels are made instead"
        )

    def settings(self, seed: int, size: tuple[int, int], model: str) -> dict[str, object]:
        """What made a picture of `size` (width, height), for its file: everything but the prompt."""
        return {
            "task": self.task.name,
            "seed": seed,
            "guidance_scale": self.guidance,
            "width": size[0],
            "height": size[1],
            "image_temperature": self.image.temperature,
            "image_top_k": self.image.top_k,
            "image_top_p": self.image.top_p,
            "model": model,
        }


def plan(request: Request, defaults: ModelDefaults | None = None) -> Plan:
    """Fill in what `request` leaves open. Raises InputError for a photo of an impossible shape, and for what models of
    this kind can't do."""
    defaults = defaults or ModelDefaults()
    task = task_of(request.task, defaults.kind)
    area = request.image_area or _area(request.resolution) or defaults.image_area.get(task.name) or task.image_area
    guidance = request.guidance_scale
    if guidance is None:
        guidance = defaults.guidance_scale.get(task.name, task.guidance[defaults.kind])
    image = replace(task.image, temperature=defaults.image_temperature.get(task.name, task.image.temperature))
    max_new_tokens = request.max_new_tokens
    if max_new_tokens is None and not task.interleaved:
        max_new_tokens = PICTURE_TEXT_TOKENS
    size, clipped = _size(request, area, defaults.aspect_ratio.get(task.name, task.aspect_ratio))
    if task.diagonal and size is None:
        raise InputError(
            f"aspect_ratio model can't be used with {defaults.kind} models, which must know the size beforehand: "
            "choose a ratio, or custom with width and height"
        )
    return Plan(
        task=task,
        guidance=guidance,
        image_area=area,
        size=size,
        clipped=clipped,
        image=_sampling(request, "image", image),
        text=_sampling(request, "text", task.text),
        max_new_tokens=max_new_tokens if max_new_tokens is None else min(max_new_tokens, MAX_NEW_TOKENS),
    )


def _area(resolution: str) -> int | None:
    return None if resolution == "auto" else int(resolution) ** 2


def _size(request: Request, area: int, default: str) -> tuple[tuple[int, int] | None, str | None]:
    """(rows, columns) or None where the model chooses, and the aspect ratio that had to be clipped, if any."""
    shapes = [geometry.reference_size(image.size, area) for image in request.images]  # checks every photo's shape
    if request.size is not None:
        return request.size, None
    if request.width is not None and request.height is not None:
        return geometry.custom_size(request.width, request.height), None
    if request.aspect_ratio == "auto" and shapes:
        # Of several photos upstream takes the last one's size, against its own intention (the switch for it,
        # force_same_image_size, is off then, without effect). Prompts speak of editing the first.
        return shapes[0], None
    ratio = default if request.aspect_ratio == "auto" else request.aspect_ratio
    if ratio == "model":
        return None, None
    return geometry.preset_size(ratio, area), ratio if geometry.is_clipped(ratio, area) else None


def _sampling(request: Request, kind: str, default: Sampling) -> Sampling:
    def pick(name: str, fallback: Any) -> Any:
        value = getattr(request, f"{kind}_{name}")
        return fallback if value is None else value

    temperature = default.temperature if request.temperature is None else request.temperature
    return Sampling(
        temperature=float(pick("temperature", temperature)),
        top_k=int(pick("top_k", default.top_k)),
        top_p=float(pick("top_p", default.top_p)),
    )

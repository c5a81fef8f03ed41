"""EMU_BACKEND=upstream: the same requests and events as `Pipeline`, computed by upstream's own functions.

Upstream returns its answer at the end, so all events come then, except progress. What upstream can't do is refused in
one sentence before any model work.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from emu_cog.errors import CheckpointError, InputError
from emu_cog.events import Event, Finished, Picture, Progress, ProgressMeter, RunStats
from emu_cog.log import log
from emu_cog.memory import check_memory_budget
from emu_cog.model.device import check_settings, choose_device, choose_dtype, choose_spread
from emu_cog.prompt import geometry, tasks
from emu_cog.prompt.segments import Kind, Text, parse_image
from emu_cog.prompt.tokens import TokenIds, block_length
from emu_cog.request import Request
from emu_cog.settings import UPSTREAM_COMMIT, Settings
from emu_cog.upstream import adapter
from emu_cog.upstream.clone import ensure_clone
from emu_cog.weights.store import resolve

_KINDS: dict[str, Kind] = {"text": "text", "global_cot": "global_reasoning", "image_cot": "image_reasoning"}
_INSTEAD = "EMU_BACKEND=native can"


def _check_kind(kind: str) -> None:
    """InputError for models that others post-trained: upstream's code has BAAI's templates alone."""
    if kind in tasks.TABLES and kind not in ("image", "base"):
        raise InputError(
            f"EMU_CHECKPOINT={kind} with EMU_BACKEND=upstream: upstream's code has no prompts for it; leave one of the "
            "two out"
        )


class UpstreamPipeline:
    """A model loaded by upstream's code. Not re-entrant: one `stream` at a time."""

    def __init__(self, reference: adapter.Upstream, defaults: tasks.ModelDefaults, *, context: int, revision: str):
        self.upstream, self.defaults = reference, defaults
        self.context, self.revision = context, revision

    @classmethod
    def load(
        cls,
        checkpoint: Path | str,
        vision_tokenizer: Path | str,
        *,
        clone: Path,
        device: str | None = None,
        dtype: str | None = None,
        device_map: str | None = None,
        max_context: int | None = None,
        revision: str | None = None,
        kind: str = "image",
    ) -> UpstreamPipeline:
        """Load two folders in Emu3.5's format with the code in `clone`. Defaults are those of `Pipeline.load`.

        Raises CheckpointError for a folder that is wrong or that upstream's code can't use, and InputError with the
        numbers if there is too little memory.
        """
        folder, vision, target = Path(checkpoint), Path(vision_tokenizer), choose_device(device)
        chosen, spread = choose_dtype(dtype, target), choose_spread(device_map)
        defaults = tasks.ModelDefaults.read(folder, kind=kind)
        _check_kind(defaults.kind)
        check_memory_budget(
            folder, vision, defaults, device=target, dtype=chosen, spread=spread, max_context=max_context
        )
        reference = adapter.load(
            clone, folder, vision, device=target, dtype=chosen, device_map="auto" if spread else None
        )
        context = int(reference.model.config.max_position_embeddings)
        return cls(
            reference,
            defaults,
            context=min(context, max_context or context),
            revision=f"{revision or folder.name}, upstream {UPSTREAM_COMMIT[:7]}",
        )

    @classmethod
    def from_settings(cls, settings: Settings) -> UpstreamPipeline:
        """Clone upstream's code if it is missing, then load the checkpoint that the environment names."""
        if settings.quantize is not None:
            raise InputError(
                f"EMU_QUANTIZE={settings.quantize} with EMU_BACKEND=upstream: upstream's code has no 8-bit weights; "
                f"leave one of the two out; {_INSTEAD}"
            )
        _check_kind(settings.checkpoint)
        check_settings(device=settings.device, dtype=settings.dtype, device_map=settings.device_map, quantize=None)
        try:
            clone = ensure_clone(
                settings.weights_dir.expanduser().absolute(), url=settings.upstream_url, commit=settings.upstream_commit
            )
        except CheckpointError as error:
            raise CheckpointError(f"{error}; or use EMU_BACKEND=native, which needs no clone") from None
        found = resolve(settings)
        return cls.load(
            found.model,
            found.vision_tokenizer,
            clone=clone,
            device=settings.device,
            dtype=settings.dtype,
            device_map=settings.device_map,
            max_context=settings.max_context,
            revision=found.revision,
            kind=found.guidance,
        )

    def warm_up(self) -> None:
        """Nothing: upstream's code compiles and captures nothing."""

    def stream(self, request: Request, *, on_progress: Callable[[Progress], None] | None = None) -> Iterator[Event]:
        """Yield texts and pictures in reading order, after all are made. Raises InputError before any model work."""
        # 1. settle every default and refuse what upstream can't do
        plan = tasks.plan(request, self.defaults)
        self._refuse(request, plan)
        limit = self._limit(request, plan)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        log.info("seed %d, %s", seed, plan.summary())

        # 2. words and photos to ids, ids to more ids
        started = time.perf_counter()
        conditional, unconditional = self.upstream.prompt(
            plan.task.name, request.prompt, request.images, plan.image_area
        )
        vq_seconds = time.perf_counter() - started
        meter = ProgressMeter(
            on_progress, limits=[limit if plan.task.interleaved else None], first_visual=self.upstream.ids.visual
        )
        streamer = _ProgressStreamer(meter, self.upstream.ids)
        made = self.upstream.generate(
            conditional,
            unconditional,
            guidance=plan.guidance,
            image=plan.image,
            text=plan.text,
            size=plan.size,
            max_new_tokens=limit,
            references=len(request.images),
            seed=seed,
            # As in upstream's vLLM path, these tasks end with their picture.
            stop=() if plan.task.interleaved else [self.upstream.ids.eoi],
            streamer=streamer,
        )
        done = time.perf_counter()

        # 3. ids to texts and pictures
        kept, cut = _without_cut_image(made, self.upstream.ids)
        if cut:
            log.warning("upstream's token limit of %d ended inside a picture, which is dropped", limit)
        segments = self.upstream.segments(kept)
        grids = [parse_image(inner, self.upstream.own_tokenizer) for inner in _images(kept, self.upstream.ids)]
        drawn = [value for kind, value in segments if kind == "image"]
        if len(drawn) != len(grids):
            raise RuntimeError(f"upstream's code decoded {len(drawn)} of {len(grids)} pictures")
        vq_seconds += time.perf_counter() - done
        number = 0
        for kind, value in segments:
            if kind != "image":
                yield Text(0, _KINDS[kind], value)
                continue
            settings = plan.settings(seed, value.size, self.revision)
            yield Picture(output=0, number=number + 1, image=value, codes=grids[number], settings=settings)
            number += 1
        yield Finished(0, self._reason(plan, made, len(conditional[0])))
        meter.ended(0)

        # 4. what it cost
        first = streamer.first or done
        yield RunStats(
            seed=seed,
            size=drawn[-1].size if drawn else None,
            clipped=plan.clipped,
            pictures=len(drawn),
            tokens=_sampled(made, self.upstream.ids, size_known=plan.size is not None),
            prefill_seconds=first - started - (vq_seconds if request.images else 0.0),
            decode_seconds=done - first,
            vq_seconds=vq_seconds,
        )
        if not plan.task.interleaved and not drawn:
            raise RuntimeError(
                f"upstream's code wrote {len(made)} tokens without a whole picture, and has no way to ask the model "
                f"for one; {_INSTEAD}"
            )

    def _refuse(self, request: Request, plan: tasks.Plan) -> None:
        if request.num_outputs > 1:
            raise InputError(
                f"num_outputs={request.num_outputs}: upstream's code makes one output a run; ask for 1; {_INSTEAD}"
            )
        forged = [name for name in re.findall(r"<\|[^|]*\|>", request.prompt) if self._is_special(name)]
        if forged:
            raise InputError(
                f"the prompt has {forged[0]} in it, which upstream's code would take for a special token: "
                f"leave it out; {_INSTEAD} take it as text"
            )
        shapes = [geometry.reference_size(image.size, plan.image_area) for image in request.images]
        if shapes and plan.size is None:
            raise InputError(
                "aspect_ratio model with reference images: upstream's code takes a reference's size; "
                f"set aspect_ratio to auto; {_INSTEAD} let the model choose"
            )
        if len(shapes) > 1 and plan.size != shapes[-1]:
            rows, columns = shapes[-1]
            raise InputError(
                f"with {len(shapes)} reference images upstream's code always makes the last one's size, "
                f"{16 * columns}x{16 * rows} pixels here: put the photo that gives the shape last; "
                f"{_INSTEAD} make any size"
            )

    def _is_special(self, name: str) -> bool:
        return name == "<|IMAGE|>" or name in self.upstream.tokenizer.special_tokens

    def _limit(self, request: Request, plan: tasks.Plan) -> int:
        """`max_new_tokens` for upstream, which counts forced tokens as well: the request's, with room for one image."""
        _, template = adapter.templates(self.upstream.code.clone, plan.task.name, with_image=bool(request.images))
        words = len(self.upstream.tokenizer.encode(template.format(question=request.prompt), add_special_tokens=False))
        shapes = [geometry.reference_size(image.size, plan.image_area) for image in request.images]
        taken = words + sum(block_length(*shape) for shape in shapes)
        plan.check_room(taken, references=len(shapes), context=self.context)
        room = self.context - taken
        if plan.max_new_tokens is None:
            return room
        return min(plan.max_new_tokens + block_length(*(plan.size or (99, 99))), room)

    def _reason(self, plan: tasks.Plan, made: Sequence[int], prompt: int) -> str:
        if made and made[-1] == self.upstream.ids.eos:
            return "eos"
        if not plan.task.interleaved and made and made[-1] == self.upstream.ids.eoi:
            return "image"
        return "context" if prompt + len(made) >= self.context else "limit"


def _without_cut_image(made: Sequence[int], ids: TokenIds) -> tuple[list[int], bool]:
    """`made` without a last image that has no end, and whether there was one. Upstream's decoding would also drop the
    text before it."""
    opened = max((i for i, token in enumerate(made) if token == ids.boi), default=-1)
    cut = opened >= 0 and ids.eoi not in made[opened:]
    return list(made[:opened] if cut else made), cut


def _images(made: Sequence[int], ids: TokenIds) -> Iterator[list[int]]:
    """The ids between BOI and EOI, image by image."""
    inner: list[int] | None = None
    for token in made:
        if token == ids.boi:
            inner = []
        elif token == ids.eoi and inner is not None:
            yield inner
            inner = None
        elif inner is not None:
            inner.append(token)


def _sampled(made: Sequence[int], ids: TokenIds, *, size_known: bool) -> int:
    """How many of `made` were sampled: text and visual tokens, and the four digits of a size the model chose."""
    inside, count = False, 0
    for token in made:
        count += token >= ids.visual or (not inside and token != ids.eoi)
        inside = token == ids.boi or (inside and token != ids.eoi)
    return count + (4 if not size_known and ids.img in made else 0)


class _ProgressStreamer(BaseStreamer):
    """Sees upstream's ids as they are sampled and passes them to the meter."""

    def __init__(self, meter: ProgressMeter, ids: TokenIds) -> None:
        self._meter, self._ids = meter, ids
        self.first: float | None = None
        self._prompt_seen = False
        self._header: list[str] | None = None

    def put(self, value: Any) -> None:
        """transformers gives the prompt first, then one id per call."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.first = self.first or time.perf_counter()
        token, ids = int(torch.as_tensor(value).flatten()[0]), self._ids
        self._meter.prompt_read(0)
        if token == ids.boi:
            self._header = []
        elif token == ids.img and self._header is not None:
            rows, columns = (int(n) for n in "".join(self._header).split("*"))
            self._meter.opened(0, (rows, columns))
            self._header = None
        elif self._header is not None:
            self._header.append(str(ids.digits.index(token)) if token in ids.digits else "*")
        self._meter.tokens(0, [token])

    def end(self) -> None:
        """Nothing is held back."""

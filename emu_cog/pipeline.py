"""Loads the model once, then turns each Request into a stream of texts and pictures.

prepare(request)          fills in defaults, encodes photos, builds prompts: what the engine needs
stream(request)           yields the events of one request as they happen
submit(request)           the same without waiting: the request runs beside others, and can be cancelled
stream_batch(requests)    yields the events of several requests, generated side by side
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from emu_cog.engine.diagonals import MAX_CELLS, DiagonalRunner
from emu_cog.engine.engine import Engine, Submission
from emu_cog.engine.runner import CPU_SEQUENCES, MAX_SEQUENCES, ModelRunner
from emu_cog.engine.sequence import Ended, EngineRequest, GenerationConfig, Opened, Prefilled, Stats, Tokens, Trace
from emu_cog.engine.sequence import Event as EngineEvent
from emu_cog.errors import CheckpointError, InputError
from emu_cog.events import Event, Finished, Picture, Progress, ProgressMeter, RunStats
from emu_cog.log import log
from emu_cog.memory import Budget, check_memory_budget
from emu_cog.model import torch_settings
from emu_cog.model.device import check_settings, choose_device, choose_dtype, choose_spread
from emu_cog.model.flashar import FlashModel
from emu_cog.model.loader import load_flash_model, load_language_model
from emu_cog.model.quantize import check_format
from emu_cog.model.qwen3 import LanguageModel
from emu_cog.prompt import geometry, prompts, tasks
from emu_cog.prompt.segments import ImageCodes, Reader
from emu_cog.prompt.tokenizer import Tokenizer
from emu_cog.request import Request
from emu_cog.settings import Settings
from emu_cog.vision.compiled import CompiledDecoder
from emu_cog.vision.ibq import IBQ, load_vision_tokenizer
from emu_cog.vision.images import decode_image, encode_image
from emu_cog.weights.store import resolve

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request ready for the engine: one EngineRequest per output, with seeds `seed`, `seed` + 1 and so on."""

    request: Request
    plan: tasks.Plan
    seed: int
    outputs: tuple[EngineRequest, ...]
    config: GenerationConfig
    vq_seconds: float


class Pipeline:
    """A loaded model. Any thread may call it at any time: requests run side by side as far as memory allows."""

    def __init__(
        self,
        lm: LanguageModel,
        vision: IBQ,
        tokenizer: Tokenizer,
        defaults: tasks.ModelDefaults,
        *,
        budget: Budget,
        revision: str,
        runner: ModelRunner,
        decoding: str = "auto",
    ) -> None:
        self.lm, self.vision, self.tokenizer, self.defaults = lm, vision, tokenizer, defaults
        self.budget, self.revision = budget, revision
        self.runner, self.engine = runner, Engine(runner, decoding=decoding)

    @classmethod
    def load(
        cls,
        checkpoint: Path | str,
        vision_tokenizer: Path | str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        device_map: str | None = None,
        max_context: int | None = None,
        max_outputs: int | None = None,
        quantize: str | None = None,
        decoding: str = "auto",
        compile: bool = True,
        revision: str | None = None,
        kind: str = "image",
        tokenizer_folder: Path | str | None = None,
    ) -> Pipeline:
        """Load a checkpoint folder and a vision tokenizer folder in Emu3.5's format. `kind` is a key of `tasks.TABLES`;
        `tokenizer_folder` holds the text tokenizer's files, if not the checkpoint folder does.

        `device` and `dtype` default to what is there: bfloat16 on CUDA, float32 elsewhere. The vision tokenizer
        always runs in float32. At most `max_outputs` outputs are generated at a time (default: 8 on a CPU, on a GPU
        what memory holds, up to 32), of at most `max_context` tokens each; memory must hold them (default: one
        picture), which is checked before anything is loaded. `quantize` ("fp8", "int8") converts the layers' weights to
        8 bits; `decoding` is one of settings.DECODINGS; `compile` False keeps steps in plain PyTorch and the vision
        decoder uncompiled.

        Raises CheckpointError naming the file, key or shape that is wrong, InputError with the numbers
        where memory is short.
        """
        folder, vision_folder = Path(checkpoint), Path(vision_tokenizer)
        target = choose_device(device)
        weights_dtype = choose_dtype(dtype, target)
        torch_settings.apply(target)
        check_format(quantize, target)
        tokenizer = Tokenizer.load(Path(tokenizer_folder) if tokenizer_folder else folder)
        defaults = tasks.ModelDefaults.read(folder, kind=kind)
        check_spread(defaults.kind, device_map)
        budget = check_memory_budget(
            folder,
            vision_folder,
            defaults,
            device=target,
            dtype=weights_dtype,
            spread=choose_spread(device_map),
            quantize=quantize,
            max_context=max_context,
            max_outputs=max_outputs or 1,
            compile=compile,
        )
        lm: LanguageModel
        if by_diagonals(defaults.kind):
            lm = load_flash_model(folder, tokenizer.ids, device=target, dtype=weights_dtype, quantize=quantize)
        else:
            lm = load_language_model(
                folder, tokenizer.ids, device=target, dtype=weights_dtype, device_map=device_map, quantize=quantize
            )
        lm.context = min(lm.context, budget.tokens(), max_context or lm.context)
        slots = max_outputs or budget.slots(most=MAX_SEQUENCES if target.type == "cuda" else CPU_SEQUENCES)
        slots = min(slots, MAX_SEQUENCES)
        tokens = min(budget.tokens(), slots * lm.context)
        log.info(
            "the cache holds %d tokens: %d picture(s) of %d tokens at once; a sequence may hold %d, prompt and "
            "pictures together",
            tokens,
            min(slots, max(tokens // budget.picture, 1)),
            budget.picture,
            lm.context,
        )
        vision = load_vision_tokenizer(vision_folder, device=target)
        if vision.config.n_embed < tokenizer.ids.visual_count:
            raise CheckpointError(
                f"{vision_folder} has {vision.config.n_embed} codes but {folder} names "
                f"{tokenizer.ids.visual_count} visual tokens: they don't belong together"
            )
        if compile and target.type == "cuda":
            CompiledDecoder(vision)
        runner = DiagonalRunner if isinstance(lm, FlashModel) else ModelRunner
        return cls(
            lm,
            vision,
            tokenizer,
            defaults,
            budget=budget,
            revision=revision or folder.name,
            runner=runner.best(lm, slots=slots, tokens=tokens, compile=compile),
            decoding=decoding,
        )

    @classmethod
    def from_settings(cls, settings: Settings) -> Pipeline:
        """Load the checkpoint that the environment names, after downloading it if it is missing."""
        check_settings(
            device=settings.device, dtype=settings.dtype, device_map=settings.device_map, quantize=settings.quantize
        )
        check_spread(settings.checkpoint, settings.device_map)
        torch_settings.keep_compiled(compile_cache(settings))
        found = resolve(settings)
        return cls.load(
            found.model,
            found.vision_tokenizer,
            device=settings.device,
            dtype=settings.dtype,
            device_map=settings.device_map,
            max_context=settings.max_context,
            max_outputs=settings.max_outputs,
            quantize=settings.quantize,
            decoding=settings.decoding,
            compile=settings.compile,
            revision=found.revision,
            kind=found.guidance,
            tokenizer_folder=found.tokenizer,
        )

    def warm_up(self) -> None:
        """Make the first request as fast as later ones: measures how many tokens a pass pays for, and on a GPU captures
        every step and makes a small picture."""
        several = self.engine.decoding != "sequential"
        if self.lm.device.type != "cuda":
            if several:
                self.engine.call(partial(self.runner.seconds, 1))
            return
        typical = tasks.plan(Request(prompt="-"), self.defaults)
        started = time.perf_counter()
        if isinstance(self.vision.compiled, CompiledDecoder):
            shapes = ("1:1", "16:9", "9:16")
            sizes = [geometry.preset_size(shape, typical.image_area) for shape in shapes]
            self.engine.call(partial(self.vision.compiled.warm_up, sizes))
        compiled = time.perf_counter()
        if self.runner.captured:
            self.engine.call(partial(self.runner.warm_up, several=several))
        captured = time.perf_counter()
        for _ in self.stream(Request(prompt="warm-up", size=(2, 2), seed=0, max_new_tokens=4)):
            pass
        log.info(
            "warmed up: vision decoder %.1f s, steps %.1f s, a small picture %.1f s",
            compiled - started,
            captured - compiled,
            time.perf_counter() - captured,
        )

    def prepare(self, request: Request) -> Prepared:
        """Fill in every default, refuse what can't be done, encode the photos and build the prompts.

        Raises InputError before any model work.
        """
        plan = tasks.plan(request, self.defaults)
        self._check_fits(request, plan)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        log.info("seed %d, %s", seed, plan.summary())
        images, vq_seconds = [], 0.0
        for image in request.images:
            encode = partial(_timed, encode_image, image, plan.image_area, self.vision)
            codes, seconds = self.engine.call(encode)
            images.append(codes)
            vq_seconds += seconds
        prompt = prompts.build(plan.task, request.prompt, images, self.tokenizer)
        # What is drawn by diagonals begins with its header: no text comes before it.
        header = self.tokenizer.ids.header(*plan.size) if plan.task.diagonal and plan.size else ()
        return Prepared(
            request=request,
            plan=plan,
            seed=seed,
            outputs=tuple(
                EngineRequest(
                    conditional=(*prompt.conditional, *header),
                    unconditional=(*prompt.unconditional, *header),
                    seed=seed + i,
                )
                for i in range(request.num_outputs)
            ),
            config=generation_config(plan),
            vq_seconds=vq_seconds,
        )

    def submit(
        self,
        request: Request,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        trace: Trace | None = None,
    ) -> Running:
        """Start a request beside whatever else is running. Iterate the result for its events, once; `cancel` it at any
        time. Raises InputError before any model work."""
        prepared = self.prepare(request)
        return Running(self, prepared, self.engine.submit(prepared.outputs, prepared.config, trace=trace), on_progress)

    def stream(
        self,
        request: Request,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        trace: Trace | None = None,
    ) -> Iterator[Event]:
        """Yield texts and pictures in reading order as they are finished, and the RunStats last. Closing the iterator
        cancels the request.

        Raises InputError before any model work.
        """
        yield from self.submit(request, on_progress=on_progress, trace=trace)

    def stream_batch(self, requests: Sequence[Request]) -> Iterator[tuple[int, Event]]:
        """Generate several requests side by side and yield (index of the request, event), request by request. Each
        request's events are those of `stream`, RunStats last; too few pictures are no error here. Raises InputError for
        any of the requests before any is begun.
        """
        prepared = [self.prepare(request) for request in requests]
        running = [Running(self, one, self.engine.submit(one.outputs, one.config), None) for one in prepared]
        try:
            for index, run in enumerate(running):
                for event in run.events():
                    yield index, event
        finally:
            for run in running:
                run.cancel()

    def _check_fits(self, request: Request, plan: tasks.Plan) -> None:
        """Refuse a prompt that leaves no room for one picture, before photos are encoded."""
        shapes = [geometry.reference_size(image.size, plan.image_area) for image in request.images]
        blank = [[[0] * columns] * rows for rows, columns in shapes]
        prompt = prompts.build(plan.task, request.prompt, blank, self.tokenizer)
        plan.check_room(len(prompt.conditional), references=len(shapes), context=self.lm.context)
        if plan.task.diagonal and plan.size and min(plan.size) > MAX_CELLS:
            raise InputError(
                f"size={plan.size} can't be drawn by diagonals: one side must have at most {MAX_CELLS} tokens"
            )


class Running:
    """A request in the engine: iterate it for its events."""

    def __init__(
        self,
        pipeline: Pipeline,
        prepared: Prepared,
        submission: Submission,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self._pipeline, self._prepared, self._submission = pipeline, prepared, submission
        self._readers = [Reader(pipeline.tokenizer, output=i) for i in range(len(prepared.outputs))]
        self._pictures = [0] * len(prepared.outputs)
        self._stats = RunStats(seed=prepared.seed, clipped=prepared.plan.clipped, vq_seconds=prepared.vq_seconds)
        self._meter = ProgressMeter(
            on_progress,
            limits=[self._limit(output) for output in prepared.outputs],
            first_visual=pipeline.tokenizer.ids.visual,
        )

    def __iter__(self) -> Generator[Event, None, None]:
        """The events, RunStats last; RuntimeError after them where pictures could not be made. A cancelled request has
        no RunStats, and ends without an error."""
        ended = False
        with closing(self.events()) as events:
            for event in events:
                yield event
                ended = isinstance(event, RunStats)
        wanted = len(self._prepared.outputs)
        if ended and not self._prepared.plan.task.interleaved and self._stats.pictures < wanted:
            raise RuntimeError(
                f"{wanted - self._stats.pictures} of {wanted} pictures could not be made: the size the model "
                "chose does not fit its context; set aspect_ratio or a smaller resolution"
            )

    def cancel(self) -> None:
        """Stop generating: what is in progress is given up within a few steps, and whoever iterates gets no more."""
        self._submission.cancel()

    def events(self) -> Generator[Event, None, None]:
        """The events, output by output, RunStats last; leaving early cancels. Outputs end in any order, and a caller
        knows the seed of a picture by its place: what comes before its turn is kept until then."""
        kept: list[list[Event]] = [[] for _ in self._readers]
        ended, turn = set[int](), 0
        with closing(self._submission.events(waiting=self._meter.repeat)) as events:
            for event in events:
                for made in self._read(event):
                    if isinstance(event, Stats) or event.index == turn:
                        yield made
                    else:
                        kept[event.index].append(made)
                self._measure(event)
                if isinstance(event, Ended):
                    ended.add(event.index)
                while turn in ended:
                    turn += 1
                    yield from kept[turn] if turn < len(kept) else ()

    def _read(self, event: EngineEvent) -> Iterator[Event]:
        """The texts and pictures that `event` completes."""
        if isinstance(event, Tokens | Ended):
            reader = self._readers[event.index]
            for segment in reader.feed(event.ids) if isinstance(event, Tokens) else reader.finish():
                yield self._picture(segment) if isinstance(segment, ImageCodes) else segment
        if isinstance(event, Ended):
            yield Finished(event.index, event.reason)
        if isinstance(event, Stats):
            self._stats = replace(
                self._stats,
                tokens=event.sampled,
                passes=event.passes,
                prefill_seconds=event.prefill_seconds,
                decode_seconds=event.decode_seconds,
            )
            yield self._stats

    def _picture(self, segment: ImageCodes) -> Picture:
        pipeline = self._pipeline
        image, seconds = pipeline.engine.call(partial(_timed, decode_image, segment.codes, pipeline.vision))
        self._stats = replace(
            self._stats,
            size=image.size,
            pictures=self._stats.pictures + 1,
            vq_seconds=self._stats.vq_seconds + seconds,
        )
        self._pictures[segment.output] += 1
        seed = self._prepared.seed + segment.output
        return Picture(
            output=segment.output,
            number=self._pictures[segment.output],
            image=image,
            codes=segment.codes,
            settings=self._prepared.plan.settings(seed, image.size, pipeline.revision),
        )

    def _measure(self, event: EngineEvent) -> None:
        if isinstance(event, Prefilled):
            self._meter.prompt_read(event.index)
        elif isinstance(event, Opened):
            self._meter.opened(event.index, event.size)
        elif isinstance(event, Tokens):
            self._meter.tokens(event.index, event.ids, event.ahead)
        elif isinstance(event, Ended):
            self._meter.ended(event.index)

    def _limit(self, output: EngineRequest) -> int | None:
        """The most tokens that a sequence may have; None for a single picture."""
        config = self._prepared.config
        if config.single_image:
            return None
        room = self._pipeline.lm.context - len(output.conditional)
        return min(room, config.max_new_tokens or room)


def by_diagonals(kind: str) -> bool:
    """Whether models of `kind` draw their pictures by diagonals."""
    return any(task.diagonal for task in tasks.TABLES.get(kind, {}).values())


def check_spread(kind: str, device_map: str | None) -> None:
    """InputError where the layers of a model that needs one device are to be spread over several."""
    if by_diagonals(kind) and choose_spread(device_map):
        raise InputError(
            f"EMU_DEVICE_MAP=auto can't be used with {kind} models, whose layers must be on one device: leave it empty"
        )


def compile_cache(settings: Settings) -> Path:
    """The folder for compiled code. Where TORCHINDUCTOR_CACHE_DIR is set, by a user or by a host that keeps that
    folder between containers, Triton's cache goes into it, too: as a subfolder, where inductor itself would put it."""
    if inductor := settings.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(inductor)
    return settings.compile_cache or settings.weights_dir / ".compiled"


def generation_config(plan: tasks.Plan) -> GenerationConfig:
    """The part of a plan that the engine needs."""
    return GenerationConfig(
        cfg_scale=plan.guidance,
        image=plan.image,
        text=plan.text,
        size=plan.size,
        max_new_tokens=0 if plan.task.diagonal else plan.max_new_tokens,
        single_image=not plan.task.interleaved,
    )


def _timed(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
    """What `function` returns, and the seconds that it took."""
    started = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - started

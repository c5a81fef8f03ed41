"""Loads the model once, then turns each Request into a stream of texts and pictures.

prepare(request)          fills in defaults, encodes photos, builds prompts: what the engine needs
stream(request)           yields the events of one request as they happen
stream_batch(requests)    yields the events of several requests, generated side by side
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from emu_cog.engine.engine import Engine
from emu_cog.engine.image_schedule import Trace
from emu_cog.engine.runner import ModelRunner, build
from emu_cog.engine.sequence import Ended, EngineRequest, GenerationConfig, Opened, Stats, Tokens
from emu_cog.errors import CheckpointError
from emu_cog.events import Event, Finished, Picture, Progress, ProgressMeter, RunStats
from emu_cog.log import log
from emu_cog.memory import PROMPT_TOKENS, Budget, check_memory_budget
from emu_cog.model import torch_settings
from emu_cog.model.device import check_settings, choose_device, choose_dtype, choose_spread
from emu_cog.model.loader import load_language_model
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
    """A loaded model. Not re-entrant: one `stream` or `stream_batch` at a time."""

    def __init__(
        self,
        lm: LanguageModel,
        vision: IBQ,
        tokenizer: Tokenizer,
        defaults: tasks.ModelDefaults,
        *,
        budget: Budget,
        revision: str,
        runner: ModelRunner | None = None,
        max_outputs: int = 1,
    ) -> None:
        self.lm, self.vision, self.tokenizer, self.defaults = lm, vision, tokenizer, defaults
        self.budget, self.revision = budget, revision
        self.engine, self.max_outputs = Engine(lm, runner), max_outputs

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
        max_outputs: int = 1,
        quantize: str | None = None,
        compile: bool = True,
        revision: str | None = None,
        kind: str = "image",
    ) -> Pipeline:
        """Load a checkpoint folder and a vision tokenizer folder in Emu3.5's format.

        `device` and `dtype` default to what is there: bfloat16 on CUDA, float32 elsewhere. The vision tokenizer
        always runs in float32. Memory must hold caches of `max_context` tokens (default: one picture) for
        `max_outputs` outputs; that is checked before anything is loaded. `quantize` ("fp8", "int8") converts the
        layers' weights to 8 bits; `compile` False keeps decoding on transformers' modules and the vision decoder
        uncompiled. Raises CheckpointError naming the file, key or shape that is wrong, InputError with the numbers
        where memory is short.
        """
        folder, vision_folder = Path(checkpoint), Path(vision_tokenizer)
        target = choose_device(device)
        weights_dtype = choose_dtype(dtype, target)
        torch_settings.apply(target)
        check_format(quantize, target)
        tokenizer, defaults = Tokenizer.load(folder), tasks.ModelDefaults.read(folder, kind=kind)
        budget = check_memory_budget(
            folder,
            vision_folder,
            defaults,
            device=target,
            dtype=weights_dtype,
            spread=choose_spread(device_map),
            quantize=quantize,
            max_context=max_context,
            max_outputs=max_outputs,
        )
        lm = load_language_model(
            folder, tokenizer.ids, device=target, dtype=weights_dtype, device_map=device_map, quantize=quantize
        )
        lm.context = min(lm.context, budget.tokens(), max_context or lm.context)
        log.info("a sequence may hold %d tokens, prompt and pictures together", lm.context)
        vision = load_vision_tokenizer(vision_folder, device=target)
        if vision.config.n_embed < tokenizer.ids.visual_count:
            raise CheckpointError(
                f"{vision_folder} has {vision.config.n_embed} codes but {folder} names "
                f"{tokenizer.ids.visual_count} visual tokens: they don't belong together"
            )
        if compile and target.type == "cuda":
            CompiledDecoder(vision)
        return cls(
            lm,
            vision,
            tokenizer,
            defaults,
            budget=budget,
            revision=revision or folder.name,
            runner=build(lm, compile=compile),
            max_outputs=max_outputs,
        )

    @classmethod
    def from_settings(cls, settings: Settings) -> Pipeline:
        """Load the checkpoint that the environment names, after downloading it if it is missing."""
        check_settings(
            device=settings.device, dtype=settings.dtype, device_map=settings.device_map, quantize=settings.quantize
        )
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
            compile=settings.compile,
            revision=found.revision,
            kind=found.guidance,
        )

    def warm_up(self) -> None:
        """Make the first request as fast as later ones, by small pictures on a GPU; does nothing on a CPU.

        Captures steps for one output and for as many as EMU_MAX_OUTPUTS guarantees memory for. Other numbers are
        captured by the first request that uses them, in a second or two: most of their kernels are compiled by then.
        """
        if self.lm.device.type != "cuda":
            return
        typical = tasks.plan(Request(prompt="-"), self.defaults)
        if isinstance(self.vision.compiled, CompiledDecoder):
            shapes = ("1:1", "16:9", "9:16")
            self.vision.compiled.warm_up([geometry.preset_size(shape, typical.image_area) for shape in shapes])
        config = generation_config(typical)
        for outputs in sorted({self.max_outputs, 1}, reverse=True):
            started = time.perf_counter()
            # Allocate the cache that a usual picture needs: captured steps hold its address.
            self.engine.cache(rows=2 * outputs, capacity=config.longest(PROMPT_TOKENS, self.lm.context))
            small = Request(prompt="warm-up", size=(2, 2), seed=0, max_new_tokens=4, num_outputs=outputs)
            for _ in self.stream(small):
                pass
            log.info("warmed up %d output(s) in %.1f s", outputs, time.perf_counter() - started)

    @torch.inference_mode()
    def prepare(self, request: Request) -> Prepared:
        """Fill in every default, refuse what can't be done, encode the photos and build the prompts.

        Raises InputError before any model work.
        """
        plan = tasks.plan(request, self.defaults)
        self._check_fits(request, plan)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        log.info("seed %d, %s", seed, plan.summary())
        started = time.perf_counter()
        images = [encode_image(image, plan.image_area, self.vision) for image in request.images]
        vq_seconds = time.perf_counter() - started
        prompt = prompts.build(plan.task, request.prompt, images, self.tokenizer)
        return Prepared(
            request=request,
            plan=plan,
            seed=seed,
            outputs=tuple(
                EngineRequest(conditional=prompt.conditional, unconditional=prompt.unconditional, seed=seed + i)
                for i in range(request.num_outputs)
            ),
            config=generation_config(plan),
            vq_seconds=vq_seconds,
        )

    def stream(
        self,
        request: Request,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        trace: Trace | None = None,
    ) -> Iterator[Event]:
        """Yield texts and pictures in reading order as they are finished, and the RunStats last.

        Raises InputError before any model work.
        """
        for _, event in self._run([self.prepare(request)], on_progress, trace):
            yield event
            if isinstance(event, RunStats):
                stats, wanted = event, request.num_outputs
        if not tasks.TABLE[request.task].interleaved and stats.pictures < wanted:
            raise RuntimeError(
                f"{wanted - stats.pictures} of {wanted} pictures could not be made: the size the model "
                "chose does not fit its context; set aspect_ratio or a smaller resolution"
            )

    def stream_batch(self, requests: Sequence[Request]) -> Iterator[tuple[int, Event]]:
        """Yield (index of the request, event) for several requests, generated side by side where their settings are
        the same and memory allows. Each request's events are those of `stream`, RunStats last; too few pictures are no
        error here. Raises InputError for any of the requests before any model work.
        """
        yield from self._run([self.prepare(request) for request in requests], None, None)

    @torch.inference_mode()
    def _run(
        self, prepared: Sequence[Prepared], on_progress: Callable[[Progress], None] | None, trace: Trace | None
    ) -> Iterator[tuple[int, Event]]:
        """Generate all outputs of all requests, batch by batch."""
        runs = [_Run(self, one) for one in prepared]
        pairs = [(r, output) for r, one in enumerate(prepared) for output in range(len(one.outputs))]
        numbers = {pair: number for number, pair in enumerate(pairs)}
        meter = ProgressMeter(
            on_progress,
            limits=[self._limit(prepared[r], output) for r, output in pairs],
            first_visual=self.tokenizer.ids.visual,
        )
        waiting = [len(one.outputs) for one in prepared]
        for batch in self._batches(prepared):
            config = prepared[batch[0][0]].config
            outputs = [prepared[r].outputs[output] for r, output in batch]
            for event in self.engine.generate(outputs, config, trace=trace):
                for pair in batch:
                    meter.prompt_read(numbers[pair])
                if isinstance(event, Stats):
                    for r in dict.fromkeys(r for r, _ in batch):
                        runs[r].add(event)
                    continue
                r, output = batch[event.index]
                for made in runs[r].read(output, event):
                    yield r, made
                _measure(meter, numbers[r, output], event)
            for r, _ in batch:
                waiting[r] -= 1
                if waiting[r] == 0:
                    yield r, runs[r].stats()

    def _limit(self, prepared: Prepared, output: int) -> int | None:
        """The most tokens that a sequence may have; None for a single picture."""
        if prepared.config.single_image:
            return None
        room = self.lm.context - len(prepared.outputs[output].conditional)
        return min(room, prepared.config.max_new_tokens or room)

    def _batches(self, prepared: Sequence[Prepared]) -> Iterator[list[tuple[int, int]]]:
        """(request, output) pairs to be generated side by side: of one GenerationConfig, as many as memory has room
        for."""
        groups: dict[GenerationConfig, list[tuple[int, int]]] = {}
        for r, one in enumerate(prepared):
            groups.setdefault(one.config, []).extend((r, output) for output in range(len(one.outputs)))
        for config, pairs in groups.items():
            longest = max(len(prepared[r].outputs[output].conditional) for r, output in pairs)
            fitting = max(self.budget.outputs(config.longest(longest, self.lm.context)), 1)
            if fitting < len(pairs):
                log.info("memory holds %d output(s) side by side: the %d are made in turn", fitting, len(pairs))
            yield from (pairs[first : first + fitting] for first in range(0, len(pairs), fitting))

    def _check_fits(self, request: Request, plan: tasks.Plan) -> None:
        """Refuse a prompt that leaves no room for one picture, before photos are encoded."""
        shapes = [geometry.reference_size(image.size, plan.image_area) for image in request.images]
        blank = [[[0] * columns] * rows for rows, columns in shapes]
        prompt = prompts.build(plan.task, request.prompt, blank, self.tokenizer)
        plan.check_room(len(prompt.conditional), references=len(shapes), context=self.lm.context)


class _Run:
    """One request being generated: its readers and its stats so far."""

    def __init__(self, pipeline: Pipeline, prepared: Prepared) -> None:
        self._pipeline, self._prepared = pipeline, prepared
        self._readers = [Reader(pipeline.tokenizer, output=i) for i in range(len(prepared.outputs))]
        self._pictures = [0] * len(prepared.outputs)
        self._stats = RunStats(seed=prepared.seed, clipped=prepared.plan.clipped, vq_seconds=prepared.vq_seconds)

    def read(self, output: int, event: Tokens | Opened | Ended) -> Iterator[Event]:
        """The texts and pictures that `event` of `output` completes."""
        if isinstance(event, Opened):
            return
        reader = self._readers[output]
        for segment in reader.feed(event.ids) if isinstance(event, Tokens) else reader.finish():
            yield self._picture(segment) if isinstance(segment, ImageCodes) else segment
        if isinstance(event, Ended):
            self._stats = replace(self._stats, tokens=self._stats.tokens + event.sampled)
            yield Finished(output, event.reason)

    def _picture(self, segment: ImageCodes) -> Picture:
        started = time.perf_counter()
        image = decode_image(segment.codes, self._pipeline.vision)
        self._stats = replace(
            self._stats,
            size=image.size,
            pictures=self._stats.pictures + 1,
            vq_seconds=self._stats.vq_seconds + time.perf_counter() - started,
        )
        self._pictures[segment.output] += 1
        seed = self._prepared.seed + segment.output
        return Picture(
            output=segment.output,
            number=self._pictures[segment.output],
            image=image,
            codes=segment.codes,
            settings=self._prepared.plan.settings(seed, image.size, self._pipeline.revision),
        )

    def add(self, batch: Stats) -> None:
        """Add the time of a batch that this request was part of."""
        self._stats = replace(
            self._stats,
            prefill_seconds=self._stats.prefill_seconds + batch.prefill_seconds,
            decode_seconds=self._stats.decode_seconds + batch.decode_seconds,
        )

    def stats(self) -> RunStats:
        return self._stats


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
        max_new_tokens=plan.max_new_tokens,
        single_image=not plan.task.interleaved,
    )


def _measure(meter: ProgressMeter, output: int, event: Tokens | Opened | Ended) -> None:
    if isinstance(event, Opened):
        meter.opened(output, event.size)
    elif isinstance(event, Tokens):
        meter.tokens(output, event.ids)
    else:
        meter.ended(output)

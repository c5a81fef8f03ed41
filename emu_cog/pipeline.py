"""Load everything once, then turn each Request into a stream of texts and pictures."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from emu_cog import geometry, pictures, prompts, tasks, torch_settings
from emu_cog.config import CheckpointError, Request, Settings, log
from emu_cog.engine import Engine
from emu_cog.image_loop import Trace
from emu_cog.jobs import Ended, Job, Opened, Rules, Stats, Tokens
from emu_cog.lm import LanguageModel
from emu_cog.loading import load_language_model
from emu_cog.memory import Budget
from emu_cog.outputs import Finished, Picture
from emu_cog.quantize import check_format
from emu_cog.resources import PROMPT_TOKENS, choose_device, choose_dtype, choose_spread, reckon_memory
from emu_cog.segments import ImageCodes, Reader, Text
from emu_cog.steps import Steps, build
from emu_cog.tokenizer import Tokenizer
from emu_cog.tokens import TokenIds
from emu_cog.vision import IBQ, load_vision_tokenizer
from emu_cog.vision_compiled import CompiledDecoder
from emu_cog.weights import resolve

Event = Text | Picture | Finished


@dataclass(frozen=True)
class Progress:
    """How far the current pictures are: `row` of `rows` done in picture `number` (counted from 1 an output)."""

    number: int
    row: int
    rows: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """What a run cost, in wall seconds. `tokens` are sampled ones; `size` is the last picture's (width, height)."""

    seed: int
    size: tuple[int, int] | None
    pictures: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float
    vq_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0


class Pipeline:
    """A loaded model. `stream` serves one request at a time; `stats` tells of the last one."""

    def __init__(
        self,
        lm: LanguageModel,
        vision: IBQ,
        tokenizer: Tokenizer,
        defaults: tasks.ModelDefaults,
        *,
        budget: Budget,
        revision: str,
        steps: Steps | None = None,
        max_outputs: int = 1,
    ) -> None:
        self.lm, self.vision, self.tokenizer, self.defaults = lm, vision, tokenizer, defaults
        self.budget, self.revision = budget, revision
        self.engine, self.max_outputs = Engine(lm, steps), max_outputs
        self.stats: RunStats | None = None

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
        `max_outputs` outputs; that is reckoned before anything is loaded. `quantize` ("fp8", "int8") takes the
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
        budget = reckon_memory(
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
            steps=build(lm, compile=compile),
            max_outputs=max_outputs,
        )

    @classmethod
    def from_settings(cls, settings: Settings) -> Pipeline:
        """Load the checkpoint that the environment names, brought here first where it is missing."""
        torch_settings.keep_compiled(settings.compile_cache or settings.weights_dir / ".compiled")
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
        """Make the first request as fast as the next: small pictures on a GPU, nothing on a CPU.

        One output, and as many as EMU_MAX_OUTPUTS promises room for. Other numbers are recorded with their first
        request, in a second or two: kernels that differ are few by then.
        """
        if self.lm.device.type != "cuda":
            return
        typical = tasks.plan(Request(prompt="-"), self.defaults)
        if isinstance(self.vision.compiled, CompiledDecoder):
            shapes = ("1:1", "16:9", "9:16")
            self.vision.compiled.warm_up([geometry.preset_size(shape, typical.image_area) for shape in shapes])
        rules = rules_of(typical)
        for outputs in sorted({self.max_outputs, 1}, reverse=True):
            started = time.perf_counter()
            # The cache that a usual picture will ask for: recorded steps hold its address.
            self.engine.cache(rows=2 * outputs, capacity=rules.longest(PROMPT_TOKENS, self.lm.context))
            small = Request(prompt="warm-up", size=(2, 2), seed=0, max_new_tokens=4, num_outputs=outputs)
            for _ in self.stream(small):
                pass
            log.info("warmed up %d output(s) in %.1f s", outputs, time.perf_counter() - started)

    @torch.inference_mode()
    def stream(
        self,
        request: Request,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        trace: Trace | None = None,
    ) -> Iterator[Event]:
        """Yield texts and pictures in reading order as they are finished. Raises InputError before any model work."""
        # 1. settle every default and refuse what can't be done
        plan = tasks.plan(request, self.defaults)
        self._check_fits(request, plan)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        log.info("seed %d, guidance %g, size %s", seed, plan.guidance, plan.size or "chosen by the model")

        # 2. words and photos to ids
        started = time.perf_counter()
        images = [pictures.encode(image, plan.image_area, self.vision) for image in request.images]
        vq_seconds = time.perf_counter() - started
        prompt = prompts.build(plan.task, request.prompt, images, self.tokenizer)
        jobs = [
            Job(conditional=prompt.conditional, unconditional=prompt.unconditional, seed=seed + i)
            for i in range(request.num_outputs)
        ]
        rules = rules_of(plan)

        # 3. ids to texts and pictures
        readers = [Reader(self.tokenizer, output=i) for i in range(len(jobs))]
        progress = _ProgressTeller(on_progress, len(jobs), self.tokenizer.ids)
        made, size = 0, None
        cost = Stats()
        for event in self._generate(jobs, rules, trace, cost):
            progress.see(event)
            reader = readers[event.job]
            segments = reader.feed(event.ids) if isinstance(event, Tokens) else iter(())
            for segment in reader.finish() if isinstance(event, Ended) else segments:
                if not isinstance(segment, ImageCodes):
                    yield segment
                    continue
                started = time.perf_counter()
                image = pictures.decode(segment.codes, self.vision)
                vq_seconds += time.perf_counter() - started
                made, size = made + 1, image.size
                yield Picture(
                    output=event.job,
                    number=progress.number[event.job],
                    image=image,
                    codes=segment.codes,
                    settings=plan.settings(seed + event.job, image.size, self.revision),
                )
            if isinstance(event, Ended):
                yield Finished(event.job, event.reason)

        # 4. what it cost
        self.stats = RunStats(
            seed=seed,
            size=size,
            pictures=made,
            tokens=cost.sampled,
            prefill_seconds=cost.prefill_seconds,
            decode_seconds=cost.decode_seconds,
            vq_seconds=vq_seconds,
        )
        if not plan.task.interleaved and made < request.num_outputs:
            raise RuntimeError(
                f"{request.num_outputs - made} of {request.num_outputs} pictures could not be made: the size the model "
                "chose does not fit its context; set aspect_ratio or a smaller resolution"
            )

    def _generate(
        self, jobs: Sequence[Job], rules: Rules, trace: Trace | None, cost: Stats
    ) -> Iterator[Tokens | Opened | Ended]:
        """The engine's events for all `jobs`, in as many batches as the caches need memory for; adds up `cost`."""
        tokens = rules.longest(max(len(job.conditional) for job in jobs), self.lm.context)
        side_by_side = max(self.budget.outputs(tokens), 1)
        if side_by_side < len(jobs):
            log.info("memory holds %d output(s) side by side: the %d are made in turn", side_by_side, len(jobs))
        for first in range(0, len(jobs), side_by_side):
            for event in self.engine.generate(jobs[first : first + side_by_side], rules, trace=trace):
                yield replace(event, job=event.job + first)
            cost.add(self.engine.stats)

    def _check_fits(self, request: Request, plan: tasks.Plan) -> None:
        """Refuse a prompt that leaves no room for one picture, before anything is computed."""
        shapes = [geometry.reference_size(image.size, plan.image_area) for image in request.images]
        blank = [[[0] * columns] * rows for rows, columns in shapes]
        prompt = prompts.build(plan.task, request.prompt, blank, self.tokenizer)
        plan.check_room(len(prompt.conditional), references=len(shapes), context=self.lm.context)


def rules_of(plan: tasks.Plan) -> Rules:
    """What the engine must know of a plan."""
    return Rules(
        guidance=plan.guidance,
        image=plan.image,
        text=plan.text,
        size=plan.size,
        max_new_tokens=plan.max_new_tokens,
        single_image=not plan.task.interleaved,
    )


class _ProgressTeller:
    """Turns engine events into Progress. Outputs step together, so one of them, the lead, speaks for all."""

    def __init__(self, tell: Callable[[Progress], None] | None, outputs: int, ids: TokenIds) -> None:
        self._tell, self._row_ends = tell, (ids.eol, ids.eoi)
        self.number = [0] * outputs
        self._lead: int | None = None
        self._rows, self._row, self._tokens = 0, 0, 0

    def see(self, event: Tokens | Opened | Ended) -> None:
        if isinstance(event, Opened):
            self.number[event.job] += 1
            if self._lead is None:
                self._lead, self._rows, self._row, self._tokens = event.job, event.size[0], 0, 0
                self._report()
        elif isinstance(event, Tokens) and event.job == self._lead and event.ids[-1] in self._row_ends:
            self._row += 1
            self._tokens += len(event.ids) - 1
            self._report()
            if self._row == self._rows:
                self._lead = None

    def _report(self) -> None:
        if self._tell and self._lead is not None:
            self._tell(Progress(self.number[self._lead], self._row, self._rows, self._tokens))

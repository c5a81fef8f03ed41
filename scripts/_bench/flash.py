"""Pictures drawn by diagonals, at a released model's shape with FlashAR's layers and heads, random weights."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch

from _bench import flash_rival, machine, models
from _bench.decoding import GUIDANCE, IMAGE, PROMPT, WORKSPACE, Bench, image_only, prompt
from _bench.report import Row
from emu_cog.engine.diagonals import DiagonalRunner
from emu_cog.engine.engine import Engine
from emu_cog.engine.sequence import EngineRequest, Stats, Tokens
from emu_cog.errors import InputError
from emu_cog.memory import GIB
from emu_cog.model.kv_cache import KVCache
from emu_cog.model.quantize import check_format
from emu_cog.ops.interface import PAGE
from emu_cog.prompt.tokens import TokenIds, block_length
from emu_cog.vision.compiled import CompiledDecoder
from emu_cog.vision.ibq import IBQ
from emu_cog.vision.images import decode_image

LARGE, SMALL = (64, 64), (8, 8)
PICTURES = (1, 4)
FORMS = (None, "fp8", "int8")
REPEATS = 2


def measure(bench: Bench, dtype: torch.dtype, *, large: bool, clone: Path | None = None) -> None:
    """Seconds from prompt to codes, of one picture and of several side by side, with weights in `dtype` and in 8 bits;
    of one also to pixels, and by the code in `clone`, on the same tensors in `dtype`."""
    rival, vision = None, models.vision_tokenizer(models.VISION_SIZES["full" if large else "tiny"], device=bench.device)
    if bench.compile and bench.device.type == "cuda":
        CompiledDecoder(vision)
    for form in FORMS:
        machine.free_bytes(bench.device)
        rival = _measure(bench, dtype, form, vision, large=large, clone=clone, rival=rival)


def _measure(
    bench: Bench,
    dtype: torch.dtype,
    form: str | None,
    vision: IBQ,
    *,
    large: bool,
    clone: Path | None,
    rival: flash_rival.Rival | None,
) -> flash_rival.Rival | None:
    """Weights in `dtype` or `form`. Returns what ours is compared with."""
    name, size = form or str(dtype).removeprefix("torch."), LARGE if large else SMALL
    try:
        check_format(form, bench.device)
    except InputError as error:
        bench.report.not_measured(f"flash, {name}", str(error))
        return rival
    lm = models.flash_model(bench.size, device=bench.device, dtype=dtype, quantize=form)
    if clone and form is None:  # first: the engine's cache takes what memory is left
        drawn, warm_up = (prompts(lm.ids, of) for of in (size, flash_rival.WARM_UP))
        rival = flash_rival.measure(
            bench, lm, clone, drawn, size, warm_up=warm_up, guidance=GUIDANCE, top_k=IMAGE.top_k
        )
        machine.free_bytes(bench.device)
    longest = PROMPT + block_length(*size) + PAGE
    per_token = 2 * KVCache.bytes_per_token(lm.config, dtype) * len(lm.devices) / len(lm.weights.layers)
    room = int((0.95 * machine.free_bytes(bench.device) - WORKSPACE) // (longest * per_token))
    if room < 1:
        bench.report.not_measured(f"flash, {name}", "memory holds no picture beside the weights")
        return rival
    slots = min(max(PICTURES), room)
    lm.context = min(lm.context, longest)
    runner = DiagonalRunner.best(lm, slots=slots, tokens=slots * longest, compile=bench.compile)
    _pictures(bench, runner, vision, name, size, rival)
    if bench.device.type == "cuda":
        used = torch.cuda.memory_allocated(bench.device) / GIB
        what = f"flash, {name}: memory with a cache for {slots} pictures"
        bench.report.add(Row(part="flash", what=what, value=used, unit="GiB"))
    return rival


def _pictures(
    bench: Bench,
    runner: DiagonalRunner,
    vision: IBQ,
    name: str,
    size: tuple[int, int],
    rival: flash_rival.Rival | None,
) -> None:
    """A row for each number of pictures; one is also compared with `rival`."""
    engine, alone = Engine(runner), 0.0
    if runner.captured:
        engine.call(runner.warm_up)
    _seconds(engine, (2, 2), 1)
    for pictures in PICTURES:
        what = f"flash, {name}: {pictures} picture{'s' * (pictures > 1)} of {size[0]} x {size[1]}, prompt to codes"
        if pictures > runner.slots:
            bench.report.not_measured(what, "it does not fit the cache")
            continue
        seconds, stats = min((_seconds(engine, size, pictures) for _ in range(REPEATS)), key=lambda timed: timed[0])
        alone = alone or seconds
        floor = stats.passes * runner.lm.flash.bytes_read / bench.bandwidth
        against = f"{seconds / alone:.2f} x one picture" if pictures > 1 else f"{seconds / floor:.2f} x reading weights"
        if rival and pictures == 1:
            against = f"{rival.seconds / seconds:.2f} x as fast as {rival.name}; {against}"
        per_pass = 1e3 * stats.decode_seconds / stats.passes
        note = f"{stats.passes} steps of {per_pass:.2f} ms, prompts {1e3 * stats.prefill_seconds:.0f} ms"
        if not runner.captured:
            note += ", in plain PyTorch"
        bench.report.add(Row(part="flash", what=what, value=seconds, unit="s", against=against, note=note))
        if pictures == 1:
            _to_pixels(engine, vision, size)  # the decoder is compiled, and cuDNN finds its plans
            whole, decode = min(_to_pixels(engine, vision, size) for _ in range(REPEATS))
            what, note = what.replace("codes", "pixels"), f"{1e3 * decode:.0f} ms of it the VQ decode"
            bench.report.add(Row(part="flash", what=what, value=whole, unit="s", note=note))
    engine.close()


def _to_pixels(engine: Engine, vision: IBQ, size: tuple[int, int]) -> tuple[float, float]:
    """Seconds of one picture from prompt to pixels on the host, and of its decode alone."""
    conditional, unconditional = prompts(engine.ids, size)
    started = time.perf_counter()
    request = EngineRequest(conditional=conditional, unconditional=unconditional, seed=0)
    tokens = [
        token
        for event in engine.generate([request], image_only(size))
        if isinstance(event, Tokens)
        for token in event.ids
    ]
    codes = [(token - engine.ids.visual) % vision.config.n_embed for token in tokens if token >= engine.ids.visual]
    drawn = time.perf_counter()
    grid = torch.tensor(codes).view(size).tolist()
    engine.call(partial(decode_image, grid, vision))
    ended = time.perf_counter()
    return ended - started, ended - drawn


def _seconds(engine: Engine, size: tuple[int, int], pictures: int) -> tuple[float, Stats]:
    """Of that many outputs of one request."""
    conditional, unconditional = prompts(engine.ids, size)
    requests = [EngineRequest(conditional=conditional, unconditional=unconditional, seed=i) for i in range(pictures)]
    started = time.perf_counter()
    (*_, stats) = engine.generate(requests, image_only(size))
    assert isinstance(stats, Stats)
    return time.perf_counter() - started, stats


def prompts(ids: TokenIds, size: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Conditional and unconditional, header included."""
    header = ids.header(*size)
    return (*prompt(ids, PROMPT, 1), *header), (*prompt(ids, PROMPT // 2, 2), *header)

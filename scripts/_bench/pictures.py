"""The vision tokenizer: decoding uncompiled and compiled over aspect ratios, encoding, pixels compared."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from _bench import machine
from _bench.report import Report, Row
from emu_cog.vision.compiled import CompiledDecoder
from emu_cog.vision.ibq import IBQ

SIZES = ((64, 64), (47, 85), (85, 47), (55, 73), (32, 32))
"""Rows and columns: 1:1, 16:9, 9:16 and 4:3 at 1024x1024 pixels' area, and 512x512."""
SMALL_SIZES = ((16, 16), (11, 21), (21, 11))


def graphs() -> int:
    """Graphs compiled in this process so far."""
    return int(counters["stats"].get("unique_graphs", 0))


def pixels(values: Tensor) -> Tensor:
    """As emu_cog.pictures.decode rounds them."""
    return ((values.float() + 1.0) * 127.5).clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def decode(report: Report, vision: IBQ, sizes: tuple[tuple[int, int], ...], *, compile: bool = True) -> None:
    """Each size uncompiled, then all compiled; how many graphs were added after the first size."""
    generator = torch.Generator(vision.device).manual_seed(1)
    top = vision.config.n_embed
    codes = {s: torch.randint(0, top, (1, *s), device=vision.device, generator=generator) for s in sizes}
    eager, expected = {}, {}
    for size in sizes:
        eager[size] = machine.seconds_of(partial(vision.decode, codes[size]), vision.device, repeats=3)
        report.add(_row(size, "uncompiled", eager[size]))
    for size in sizes[:2]:
        expected[size] = pixels(vision.decode(codes[size])).cpu()
    if not compile:
        report.not_measured("VQ decode, compiled", "EMU_COMPILE=0")
        return
    before = graphs()
    started = time.perf_counter()
    compiled = CompiledDecoder(vision)
    compiled.warm_up(sizes[:1])
    report.add(
        Row(
            part="vq",
            what="VQ decoder's compilation",
            value=time.perf_counter() - started,
            unit="s",
            note=f"{graphs() - before} graphs, caches as found",
        )
    )
    if not compiled.active:
        report.not_measured("VQ decode, compiled", "compiling failed, see the log")
        return
    before = graphs()
    for size in sizes:
        seconds = machine.seconds_of(partial(vision.decode, codes[size]), vision.device, repeats=3)
        report.add(_row(size, "compiled", seconds, against=f"{eager[size] / seconds:.2f} x as fast as uncompiled"))
    report.add(Row(part="vq", what="recompilations by aspect ratio", value=graphs() - before, unit="graphs"))
    for size, wanted in expected.items():
        apart = (pixels(vision.decode(codes[size])).cpu().int() - wanted.int()).abs()
        equal = f"{100 * float((apart == 0).float().mean()):.2f}% of the values equal"
        report.add(
            Row(
                part="vq",
                what=f"pixels compiled against uncompiled, {16 * size[1]}x{16 * size[0]}",
                value=int(apart.max()),
                unit="of 255 at most",
                note=equal,
            )
        )


def _row(size: tuple[int, int], how: str, seconds: float, against: str = "") -> Row:
    what = f"VQ decode, {how}, {16 * size[1]}x{16 * size[0]}"
    return Row(part="vq", what=what, value=1e3 * seconds, unit="ms", against=against)


@torch.inference_mode()
def encode(report: Report, vision: IBQ, sizes: tuple[tuple[int, int], ...]) -> None:
    """A reference picture to codes."""
    for rows, columns in sizes:
        picture = torch.rand((1, 3, 16 * rows, 16 * columns), device=vision.device) * 2 - 1
        seconds = machine.seconds_of(partial(vision.encode, picture), vision.device, repeats=3)
        what = f"VQ encode, {16 * columns}x{16 * rows}"
        report.add(Row(part="vq", what=what, value=1e3 * seconds, unit="ms"))

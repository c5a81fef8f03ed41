"""Configurations of the kernels: defaults from the shapes, and for the linear ones the fastest on this device.

No configuration changes the order of a sum: `splits` follows from the weight and the kind of card. So a picture is the
same bit for bit after every start on one device, alone or in any company, however many of its tokens a pass draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from emu_cog.ops.interface import MAX_ROWS, ModelWeights, Weight, ceil_div

ROWS = (16, 32, 64, 128)
"""Tokens of a pass, rounded up, that the linear kernels are compiled for; more are several tiles of up to the
last, which is MAX_ROWS. On an H200 all gave the same bits for the released model's weights in bf16, fp8 and int8,
whatever the configuration, and so did up to 512 tokens."""
BESIDE = {48: 16, 80: 16, 96: 32}
"""Further numbers of rows where passes have more than MAX_ROWS tokens: of so many rows, as many are the second, smaller
block of a tile, so that less is multiplied than for 128. On an H200 the four products of a layer of the 34 B model take
261, 272, 281 and 290 us with 64, 80, 96 and 128 rows, in fp8 143, 151, 154 and 165. `linear8_kernel` has none."""
WORDS, MANY_ROWS_WORDS = 64, 32
"""Words of four 8-bit weights that a program reads of each row at a time, where passes have up to MAX_ROWS tokens, and
where they may have more: one number for all passes of a model, since the order of a sum depends on it. On an H200 a
step of the 34 B model in int8 takes 10.5 and 11.0 ms with 2 rows, 13.0 and 13.2 with 32, 17.4 and 16.5 with 64, and
its products alone with 128 about 40 and 21 ms."""
EIGHT_BIT = {
    16: [(128, 4, 8), (64, 6, 4), (128, 4, 4), (64, 4, 4)],
    32: [(64, 4, 4), (128, 3, 4), (128, 4, 4), (128, 4, 8)],
    64: [(64, 3, 4), (64, 4, 4), (128, 3, 8), (128, 4, 8), (128, 3, 4), (256, 3, 8)],
    128: [(64, 2, 4), (64, 3, 4), (128, 3, 8), (256, 3, 8)],
}
"""Outputs, stages and warps tried with MANY_ROWS_WORDS, by rows: each was the fastest for one of the released model's
weights on an H200, or close to it."""
NARROW = {
    16: [(64, 6, 4), (128, 4, 4), (128, 4, 8)],
    32: [(64, 4, 4), (128, 4, 4), (128, 4, 8)],
    48: [(64, 4, 4), (64, 6, 4), (128, 4, 8)],
    64: [(64, 4, 4), (64, 6, 4), (128, 3, 8), (128, 4, 8)],
    80: [(64, 4, 4), (128, 3, 8), (128, 4, 8)],
    96: [(64, 4, 4), (128, 3, 8), (128, 4, 8)],
    128: [(64, 3, 4), (128, 3, 4), (128, 4, 8), (256, 4, 8)],
}
"""The same where inputs are fp8, too."""
TMA = {
    16: [(64, 128, 4, 4), (64, 128, 6, 4)],
    32: [(64, 128, 4, 4), (64, 64, 4, 4)],
    48: [(64, 128, 4, 4), (64, 64, 4, 4), (64, 64, 6, 4), (128, 64, 4, 4)],
    64: [(64, 128, 4, 4), (128, 64, 4, 8), (64, 64, 6, 4), (128, 64, 4, 4)],
    80: [(64, 64, 4, 4), (64, 64, 6, 4), (128, 64, 4, 4), (128, 64, 3, 4)],
    96: [(64, 64, 4, 4), (128, 64, 4, 4), (128, 64, 3, 4)],
    128: [(128, 64, 3, 4), (128, 64, 4, 8), (256, 64, 4, 8)],
}
"""Outputs, inputs, stages and warps tried where the card's copy engine loads the tiles of 16-bit weights: with even
splits the products of the 34 B model took 15.3, 16.6, 18.2 ms with 16, 64, 128 rows on an H200, and 49.3 with 512,
where threads that load them took 15.5, 16.9, 19.0 and 55.9."""
NARROW_TMA = {
    16: [(64, 256, 4, 4), (64, 128, 6, 4), (128, 128, 4, 4)],
    32: [(64, 256, 4, 4), (64, 128, 6, 4), (128, 128, 4, 4)],
    48: [(64, 128, 4, 4), (64, 128, 6, 4), (128, 128, 4, 4)],
    64: [(64, 128, 4, 4), (64, 128, 6, 4), (128, 128, 4, 4), (128, 128, 4, 8)],
    80: [(64, 128, 4, 4), (64, 128, 6, 4), (128, 128, 4, 4), (128, 128, 3, 4)],
    96: [(64, 128, 4, 4), (128, 128, 4, 4), (128, 128, 4, 8), (128, 128, 3, 4)],
    128: [(128, 128, 3, 4), (128, 128, 4, 8), (256, 128, 4, 8)],
}
"""The same where weights and inputs are fp8."""
SPLIT_BYTES = 10 * 1024
"""Of a row's inputs, where the copy engine loads the tiles, a program reads at most as much, if it may share the sum
with others: the sum is divided by 3, or a multiple. Then tiles of 128 or 256 outputs fill an H200 about once: products
with 256 rows took 38, 53, 107 us for o, qkv, down in bf16 instead of 53, 62, 116 with the even splits of other
cards."""
CHUNK = 256
"""Inputs: where such splits begin and end, a multiple of what any tile reads at a time."""
FEW_WINDOWS = 4
"""Tiles of windows, for each head of keys, up to which attention has deep_stages: 2 and 4 gained, 8 and 32 lost."""
TIMED_LAYERS = 16
"""Layers whose weights one timing reads: together far more than any cache holds."""
DEFAULT_SHARED = 99 * 1024
"""Bytes of shared memory per program where the device reports none: the least since compute capability 8.0. Source:
CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"."""


class KernelBuildError(RuntimeError):
    """A kernel can't be compiled for this GPU, or not loaded by it."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What configurations depend on: `shared` memory per program in bytes; `hopper`, whether it has programmatic
    dependent launch and a copy engine for tiles (TMA), as all since Hopper; `wgmma`, whether it has Hopper's own matrix
    instructions."""

    name: str
    shared: int = DEFAULT_SHARED
    hopper: bool = False
    wgmma: bool = False

    @classmethod
    def of(cls, device: torch.device) -> Card:
        """The card of a CUDA device; for any other the defaults."""
        if device.type != "cuda":
            return cls(name=str(device))
        properties = torch.cuda.get_device_properties(device)
        return cls(
            name=f"{properties.name} (sm_{properties.major}{properties.minor})",
            shared=getattr(properties, "shared_memory_per_block_optin", DEFAULT_SHARED),
            hopper=properties.major >= 9,
            wgmma=properties.major == 9,
        )


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """How a linear kernel is tiled; `splits` divides the sum over K. Where `linear8_kernel` reads the weight, K counts
    words of four."""

    block_n: int
    block_k: int
    stages: int
    warps: int = 4
    splits: int = 1
    tma: bool = False
    """Whether the card's copy engine loads the tiles (`linear_kernel`)."""


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Configurations of all kernels. `linear` by one of ROWS or BESIDE and the weight's kind; `pdl` see
    kernels/layers.py."""

    linear: Mapping[tuple[int, int, int, int], LinearConfig]
    key_splits: int = 8
    key_block: int = 64
    key_stages: int = 2
    open_queries: int = 64
    """Rows of an attention program for diagonals, at most: cells times the heads that share keys."""
    deep_stages: int = 2
    """As key_stages, for diagonals and for windows of few programs (FEW_WINDOWS): there each waits for its keys. With 5
    instead of 2 two streams of 2300 tokens took 11.2 instead of 12.9 us a layer on an H200, with windows of 8 tokens
    14.9 instead of 19.6; but 64 streams 111 instead of 97."""
    open_splits: int = 8
    """A power of two: attention programs of a stream's diagonal for each head of keys, tiles of its cells times parts
    of the keys. 64 cells of two streams with 300, 2300, 4300 keys take 19, 38, 58 us a layer on an H200, 16 cells with
    2300 and 4300 keys 16 and 21; in programs of 64 rows and four parts it was 22, 46, 71, 21 and 33."""
    pdl: bool = False

    def sizes(self, weight: Weight) -> list[int]:
        """The numbers of rows that products with `weight` are compiled for."""
        at = kind(weight)
        return sorted(rows for rows, *own in self.linear if tuple(own) == at)

    def rows(self, m: int, weight: Weight) -> int:
        """Rows of the tiles in which `m` rows are multiplied: as few tiles as there can be, as small as suffices."""
        sizes = self.sizes(weight) or list(ROWS)
        each = ceil_div(m, ceil_div(m, sizes[-1]))
        return next(rows for rows in sizes if rows >= each)

    def of(self, m: int, weight: Weight) -> LinearConfig:
        """The configuration for `m` rows."""
        return self.linear[self.rows(m, weight), *kind(weight)]


def tile(rows: int) -> tuple[int, int]:
    """Rows of a tile's two blocks."""
    beside = BESIDE.get(rows, 0)
    return rows - beside, beside


def default_config(w: ModelWeights, card: Card, most_rows: int = MAX_ROWS) -> KernelConfig:
    """The configuration that autotuning starts from, for passes of up to `most_rows` tokens.

    Measured on an H100 over the released model's shapes, 2 to 16 tokens and 26 configurations each: tiles of 64
    outputs by 128 inputs were within 2% of the best everywhere, and so were eight splits of each sequence's keys.
    """
    layer = w.layers[0]
    unsplit = [Weight(w.visual_head), Weight(w.text_head)]
    linear = {
        (rows, *kind(weight)): _default_linear(
            weight,
            card.shared,
            rows,
            words=WORDS if most_rows <= MAX_ROWS else MANY_ROWS_WORDS,
            tma=card.hopper,
            swiglu=weight is layer.gate_up,
            unsplit=any(weight is head for head in unsplit),
        )
        for weight in (layer.qkv, layer.o, layer.gate_up, layer.down, *unsplit)
        for rows in (*ROWS, *(BESIDE if most_rows > MAX_ROWS and not weight.in_words else ()))
    }
    half = w.embed.dtype.itemsize == 2
    # Five stages of programs with 128 rows take 197 KB with Triton 3.4, 131 with 3.6.
    deep = half and card.shared >= 200 * 1024 and w.shape.head_dim <= 128
    return KernelConfig(
        linear=linear,
        key_block=64 if half else 32,
        deep_stages=5 if deep else KernelConfig.key_stages,
        open_queries=128 if card.wgmma and deep else 64,
        pdl=card.hopper,
    )


def autotune(
    config: KernelConfig,
    w: ModelWeights,
    seconds: Callable[[Sequence[Weight], LinearConfig, int, bool], float],
    card: Card,
) -> tuple[KernelConfig, list[str]]:
    """`config` with the fastest of `candidates` for each kind of weight and number of rows; and lines for the log.

    `seconds(weights, config, rows, swiglu)` times the products of some weights of one shape. A configuration for which
    it raises KernelBuildError is skipped; KernelBuildError with the last reason where that leaves none.
    """
    kinds = {
        name: [getattr(layer, name) for layer in w.layers[:TIMED_LAYERS]] for name in ("qkv", "o", "gate_up", "down")
    }
    linear, found = dict(config.linear), []
    for name, weights in (kinds | {"head": [Weight(w.visual_head)]}).items():
        n, k, _ = at = kind(weights[0])
        notes = []
        for rows in config.sizes(weights[0]):
            timings, last = {}, None
            for candidate in candidates(config.linear[rows, *at], rows, narrow=weights[0].narrow):
                try:
                    timings[candidate] = seconds(weights, candidate, rows, name == "gate_up")
                except KernelBuildError as error:
                    last = error
                # In fp32 the kernels take minutes to compile and serve nobody but tests: the first is good enough.
                if timings and w.embed.dtype.itemsize == 4:
                    break
            if not timings:
                raise KernelBuildError(
                    f"no configuration of the {name} product ({n}x{k}) can be built on {card.name}: {last}"
                ) from last
            best = min(timings, key=lambda candidate: timings[candidate])
            linear[rows, *at] = best
            pace = sum(weight.data.nbytes for weight in weights) / timings[best] / 1e12
            notes.append(f"{best.block_n}x{best.block_k}, {best.stages} stages, {best.warps} warps: {pace:.2f} TB/s")
        found.append(f"{name} " + " | ".join(notes))
    return replace(config, linear=linear), found


def candidates(default: LinearConfig, rows: int, *, narrow: bool = False) -> list[LinearConfig]:
    """`default` first, and others that sum in the same order.

    None has fewer than 64 outputs: there Triton leaves Hopper's own matrix instructions for older ones, which may
    round differently. Half of `block_k`, or twice, gives the same bits: the instructions add 16 numbers of 16 bits, or
    32 of 8, at a time either way.
    """
    half = replace(default, block_k=default.block_k // 2)
    if default.tma:
        sizes = [
            (replace(default, block_k=k), n, stages, warps)
            for n, k, stages, warps in (NARROW_TMA if narrow else TMA)[rows]
        ]
        if narrow and default.splits == 1:  # others are divided where only the copy engine needs no mask
            sizes += [(replace(default, tma=False), *size) for size in NARROW[rows]]
    elif narrow or default.block_k == MANY_ROWS_WORDS:
        sizes = [(default, *size) for size in (NARROW if narrow else EIGHT_BIT)[rows]]
    elif rows <= 32 or default.block_k < 128:
        sizes = [(default, 64, 2, 4), (default, 64, 4, 4), (default, 128, 3, 8)]
        if rows == ROWS[0]:
            sizes += [(default, 64, 3, 4), (default, 64, 6, 4), (default, 128, 2, 8), (default, 128, 4, 8)]
    else:  # where the inputs weigh as much as the weights
        sizes = [(default, 64, 4, 4), (half, 64, 6, 4), (half, 128, 4, 4), (half, 128, 4, 8), (half, 256, 3, 8)]
        if rows == ROWS[-1]:
            sizes += [(half, 128, 3, 4), (half, 256, 4, 8)]
    others = [replace(base, block_n=n, stages=stages, warps=warps) for base, n, stages, warps in sizes]
    return [default, *(config for config in others if config != default)]


def window_queries(width: int, *, head_dim: int, key_block: int) -> int:
    """Rows of the attention programs, of two warps each, for windows of `width` tokens: few where few are needed.

    A token's bits must not depend on it. They don't where both warps divide the keys between them: then each row is
    computed in the same way, whatever the others. Triton divides the rows instead where there are many for the size of
    the products (tests/test_kernels_compile.py looks at what it does); in fp32, which serves tests, it does something
    else again. Hopper's own instructions need 64 rows and four warps: with two stages of either 64 streams of 2300
    tokens took 159 us a layer with those and 97 us with 16 rows, 16 streams 45 and 32, two 11.7 and 12.9, two with
    windows of 8, 16 and 32 tokens 13.9, 17.3, 29 and 19.6, 23.3, 36 us.
    """
    alike = {64: 32, 128: 64}  # by head_dim; with 256 64 rows would take 104 KB, more than some cards have
    most = alike.get(head_dim, 16) if key_block >= 64 else 16
    return min(most, 16 if width <= 2 else 32 if width <= 16 else 64)


def open_queries(width: int, *, group: int, most: int) -> int:
    """Rows of the attention programs, of a warp for each 16, for diagonals of `width` cells: 64, or 128 where there are
    as many, which read every key half as often. Hopper's own instructions give the same bits in both."""
    return min(most, 64 if width * group <= 64 else 128)


def kind(weight: Weight) -> tuple[int, int, int]:
    """N, K and the bytes of a number."""
    return weight.data.shape[0], weight.data.shape[1], weight.data.dtype.itemsize


def _default_linear(
    weight: Weight,
    shared: int,
    rows: int,
    *,
    words: int,
    tma: bool,
    swiglu: bool = False,
    unsplit: bool = False,
) -> LinearConfig:
    """`unsplit` and `swiglu` sum over all of K in one program. Else, where the copy engine loads the tiles (`tma`), the
    sum is divided as SPLIT_BYTES says; on other cards about 400 programs share the work, three per multiprocessor.
    `shared` is the shared memory per program in bytes."""
    n, k, itemsize = kind(weight)
    in_words = weight.in_words
    # Rows that the copy engine reads begin at multiples of 16 bytes.
    tma = tma and not in_words and itemsize <= 2 and k * itemsize % 16 == 0
    k, block = (k // 4, words) if in_words else (k, 128)
    thirds = 3 * ceil_div(k * itemsize, 3 * SPLIT_BYTES)
    if unsplit or swiglu:
        splits = 1
    elif tma and k >= 8 * block * thirds:
        splits = thirds
    else:  # of equal length and of at least eight blocks: then no load needs a mask
        wanted = round(400 / (n / 64))
        fitting = [s for s in range(1, wanted + 1) if k % (s * block) == 0 and k >= 8 * s * block]
        splits = max(fitting, default=1)
    itemsize = 4 if in_words else itemsize
    inputs = rows * (1 if weight.narrow else max(itemsize * 2, 4))
    stage = block * (64 * itemsize * (2 if swiglu else 1) + inputs)
    stages = min(6 if splits == 1 else 4, shared // stage)
    return LinearConfig(block_n=64, block_k=block, stages=max(stages, 1), splits=splits, tma=tma)

"""From logits to the next token in six small kernels: ops/sampling.py without a sort and without synchronizing.

The k-th largest of 131072 scores is found digit by digit: four passes over the ordered bits, eight at a time, each
counting how many scores share the digits found so far. That is exact, ties at the threshold included, and k is read
from the device, so that another top-k needs no new capture. Rows 2i and 2i + 1 of the logits belong to image i, whose
parameters are those of slot slots[i]. Each kernel runs as (images, blocks of BLOCK scores); the last one as (images,).
"""

from __future__ import annotations

import triton
import triton.language as tl

from emu_cog.ops.kernels.layers import _begin

BINS = tl.constexpr(256)


@triton.jit
def _ordered(x):
    """fp32 to int32 with the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _digit(key, PASS: tl.constexpr):
    """Digit PASS of an ordered key, most significant first; the sign bit flipped so that digits order like keys."""
    if PASS == 0:
        return (key >> 24) + 128
    return (key >> (24 - 8 * PASS)) & 255


@triton.jit
def _select(counts_ptr, k):
    """The largest digit at or above which at least k scores lie, and how much of k is left for its own bin."""
    bins = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + bins)
    reached = tl.cumsum(counts, axis=0, reverse=True) >= k
    digit = tl.max(tl.where(reached, bins, 0), axis=0)
    return digit, k - tl.sum(tl.where(bins > digit, counts, 0), axis=0)


@triton.jit
def _prefix(counts_ptr, k, PASSES: tl.constexpr):
    """The first PASSES digits of the k-th largest key, as the key's upper bits, and what is left of k."""
    prefix = 0
    for p in tl.static_range(PASSES):
        digit, k = _select(counts_ptr + p * BINS, k)
        prefix = prefix * 256 + digit - (128 if p == 0 else 0)
    return prefix, k


@triton.jit
def guide_kernel(
    logits_ptr,  # (2 images, V) fp32
    slots_ptr,  # (images,) int64
    cfg_scale_ptr,
    temperature_ptr,  # (slots,) fp32
    scores_ptr,  # (images, V) fp32
    counts_ptr,  # (images, 4, BINS) int32, zeros on entry
    top_ptr,  # (images,) int32, the smallest int on entry
    V,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Apply guidance and temperature, count the first digit and find the largest score."""
    _begin(PDL)
    image = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < V
    slot = tl.load(slots_ptr + image)
    scale, temperature = tl.load(cfg_scale_ptr + slot), tl.load(temperature_ptr + slot)
    c = tl.load(logits_ptr + 2 * image * V + i, mask=live, other=0.0)
    u = tl.load(logits_ptr + (2 * image + 1) * V + i, mask=live, other=0.0)
    # As torch.lerp does it: exact at both ends.
    scores = tl.where(scale < 0.5, u + scale * (c - u), c - (c - u) * (1.0 - scale)) / temperature
    tl.store(scores_ptr + image * V + i, scores, mask=live)
    key = _ordered(scores)
    tl.atomic_max(top_ptr + image, tl.max(tl.where(live, key, -2147483648), axis=0))
    _count(counts_ptr + image * 4 * BINS, _digit(key, 0), live)


@triton.jit
def _count(counts_ptr, digits, live):
    bins = tl.arange(0, BINS)
    counts = tl.histogram(digits, BINS, mask=live)
    tl.atomic_add(counts_ptr + bins, counts, mask=counts > 0)


@triton.jit
def count_kernel(
    scores_ptr, counts_ptr, slots_ptr, k_ptr, V, PASS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Count digit PASS (1..3) of the scores that share the digits before it with the k-th largest."""
    _begin(PDL)
    image = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < V
    counts_ptr += image * 4 * BINS
    prefix, _ = _prefix(counts_ptr, tl.load(k_ptr + tl.load(slots_ptr + image)), PASS)
    key = _ordered(tl.load(scores_ptr + image * V + i, mask=live, other=0.0))
    same = live & ((key >> (32 - 8 * PASS)) == prefix)
    if tl.sum(same.to(tl.int32), axis=0) > 0:
        _count(counts_ptr + PASS * BINS, _digit(key, PASS), same)


@triton.jit
def _mass(scores_ptr, top, threshold, i, live):
    """exp(score - largest) where the score is kept, fp64, else 0."""
    scores = tl.load(scores_ptr + i, mask=live, other=0.0)
    kept = live & (_ordered(scores) >= threshold)
    largest = tl.where(top < 0, top ^ 0x7FFFFFFF, top).to(tl.float32, bitcast=True)
    return tl.where(kept, tl.exp(scores - largest), 0.0).to(tl.float64)


@triton.jit
def mass_kernel(
    scores_ptr,
    counts_ptr,
    top_ptr,
    slots_ptr,
    k_ptr,
    threshold_ptr,  # (images,) int32, written
    mass_ptr,  # (images, blocks) fp64, written
    V,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The k-th largest key, and each block's share of the distribution, unnormalized."""
    _begin(PDL)
    image, block = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    threshold, _ = _prefix(counts_ptr + image * 4 * BINS, tl.load(k_ptr + tl.load(slots_ptr + image)), 4)
    mass = _mass(scores_ptr + image * V, tl.load(top_ptr + image), threshold, i, i < V)
    tl.store(mass_ptr + image * tl.num_programs(1) + block, tl.sum(mass, axis=0))
    if block == 0:
        tl.store(threshold_ptr + image, threshold)


@triton.jit
def sample_kernel(
    scores_ptr,
    counts_ptr,
    top_ptr,
    threshold_ptr,
    mass_ptr,
    slots_ptr,  # (images,) int64
    chosen_ptr,  # (images,) int64: codes sampled otherwise, -1 for those to be sampled here
    uniform_ptr,  # (slots, steps) fp64
    columns_ptr,
    total_ptr,
    step_ptr,  # (slots,) int64
    token_ptr,
    position_ptr,  # (2 slots,) int64
    out_ptr,  # (slots, steps) int64
    steps,
    visual,
    eol,
    eoi,
    V,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sample where the running sum passes uniform * total, insert the grammar's tokens, advance the counters."""
    _begin(PDL)
    image = tl.program_id(0)
    slot = tl.load(slots_ptr + image)
    step, columns, length = tl.load(step_ptr + slot), tl.load(columns_ptr + slot), tl.load(total_ptr + slot)
    place = step % (columns + 1)
    number = tl.minimum(step // (columns + 1) * columns + place, steps - 1)
    b = tl.arange(0, BLOCKS)
    masses = tl.load(mass_ptr + image * blocks + b, mask=b < blocks, other=0.0)
    sums = tl.cumsum(masses, axis=0)
    target = tl.load(uniform_ptr + slot * steps + number) * tl.sum(masses, axis=0)
    last = tl.max(tl.where(masses > 0, b, 0), axis=0)
    block = tl.minimum(tl.min(tl.where((sums > target) & (masses > 0), b, BLOCKS), axis=0), last)
    before = tl.sum(tl.where(b < block, masses, 0.0), axis=0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    top, threshold = tl.load(top_ptr + image), tl.load(threshold_ptr + image)
    mass = _mass(scores_ptr + image * V, top, threshold, i, i < V)
    inner = before + tl.cumsum(mass, axis=0)
    likeliest_end = tl.max(tl.where(mass > 0, i, 0), axis=0)
    sampled = tl.minimum(tl.min(tl.where((inner > target) & (mass > 0), i, 2147483647), axis=0), likeliest_end)
    chosen = tl.load(chosen_ptr + image)
    token = tl.where(chosen < 0, sampled.to(tl.int64), chosen) + visual
    token = tl.where(place == columns, eol, token)
    token = tl.where(step == length - 1, eoi, token)
    if step < length:  # a branch: Triton's interpreter takes no scalar as the mask of a block
        tl.store(out_ptr + slot * steps + step, token)
        pair = 2 * slot + tl.arange(0, 2)
        tl.store(token_ptr + pair, token)
        tl.store(position_ptr + pair, tl.load(position_ptr + pair) + 1)
        tl.store(step_ptr + slot, step + 1)
    # Reset for the next step: nothing reads these after this kernel.
    bins = tl.arange(0, 1024)
    tl.store(counts_ptr + image * 1024 + bins, tl.zeros((1024,), tl.int32))
    tl.store(top_ptr + image, -2147483648)

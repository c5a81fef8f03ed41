"""From logits to the next token in six small kernels: what sampling.py says, without a sort and without the host.

The k-th largest of 131072 scores is found digit by digit: four passes over the ordered bits, eight at a time, each
counting how many scores share the digits found so far. That is exact, ties at the threshold included, and k is
read from the device, so that another top-k needs no other graph. A lane is one picture: rows 2i and 2i + 1 of the
logits. Each kernel runs as (lanes, blocks of BLOCK scores); the last one as (lanes,).
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
    """Digit PASS of an ordered key, most significant first; the sign bit turned so that digits order like keys."""
    if PASS == 0:
        return (key >> 24) + 128
    return (key >> (24 - 8 * PASS)) & 255


@triton.jit
def _select(counts_ptr, k):
    """The largest digit at or above which at least k scores lie, and how many of k are left for its own bin."""
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
    logits_ptr,  # (2 lanes, V) fp32
    knobs_ptr,  # (2,) fp32: guidance, temperature
    scores_ptr,  # (lanes, V) fp32
    counts_ptr,  # (lanes, 4, BINS) int32, zero before
    top_ptr,  # (lanes,) int32, the least int before
    V,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Guidance and temperature; counts the first digit and finds the largest score."""
    _begin(PDL)
    lane = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < V
    scale, temperature = tl.load(knobs_ptr), tl.load(knobs_ptr + 1)
    c = tl.load(logits_ptr + 2 * lane * V + i, mask=live, other=0.0)
    u = tl.load(logits_ptr + (2 * lane + 1) * V + i, mask=live, other=0.0)
    # As torch.lerp does it: exact at both ends.
    scores = tl.where(scale < 0.5, u + scale * (c - u), c - (c - u) * (1.0 - scale)) / temperature
    tl.store(scores_ptr + lane * V + i, scores, mask=live)
    key = _ordered(scores)
    tl.atomic_max(top_ptr + lane, tl.max(tl.where(live, key, -2147483648), axis=0))
    _count(counts_ptr + lane * 4 * BINS, _digit(key, 0), live)


@triton.jit
def _count(counts_ptr, digits, live):
    bins = tl.arange(0, BINS)
    counts = tl.histogram(digits, BINS, mask=live)
    tl.atomic_add(counts_ptr + bins, counts, mask=counts > 0)


@triton.jit
def count_kernel(scores_ptr, counts_ptr, k_ptr, V, PASS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Count digit PASS (1..3) of the scores that share the digits before it with the k-th largest."""
    _begin(PDL)
    lane = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < V
    counts_ptr += lane * 4 * BINS
    prefix, _ = _prefix(counts_ptr, tl.load(k_ptr), PASS)
    key = _ordered(tl.load(scores_ptr + lane * V + i, mask=live, other=0.0))
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
    k_ptr,
    threshold_ptr,  # (lanes,) int32, written
    mass_ptr,  # (lanes, blocks) fp64, written
    V,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The k-th largest key, and each block's share of the distribution (not divided by the whole)."""
    _begin(PDL)
    lane, block = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    threshold, _ = _prefix(counts_ptr + lane * 4 * BINS, tl.load(k_ptr), 4)
    mass = _mass(scores_ptr + lane * V, tl.load(top_ptr + lane), threshold, i, i < V)
    tl.store(mass_ptr + lane * tl.num_programs(1) + block, tl.sum(mass, axis=0))
    if block == 0:
        tl.store(threshold_ptr + lane, threshold)


@triton.jit
def choose_kernel(
    scores_ptr,
    counts_ptr,
    top_ptr,
    threshold_ptr,
    mass_ptr,
    uniform_ptr,  # (steps, lanes) fp64
    forced_ptr,  # (steps, lanes) int64, -1 where a token is drawn
    advance_ptr,  # (steps, 2 lanes) int64
    step_ptr,  # (lanes,) int64
    token_ptr,  # (2 lanes,) int64
    position_ptr,  # (2 lanes,) int64
    out_ptr,  # (steps, lanes) int64
    visual,
    V,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Draw by the running sum at uniform * whole, put forced tokens in place, move the counters on."""
    _begin(PDL)
    lane, lanes = tl.program_id(0), tl.num_programs(0)
    step = tl.load(step_ptr + lane)
    b = tl.arange(0, BLOCKS)
    masses = tl.load(mass_ptr + lane * blocks + b, mask=b < blocks, other=0.0)
    sums = tl.cumsum(masses, axis=0)
    target = tl.load(uniform_ptr + step * lanes + lane) * tl.sum(masses, axis=0)
    last = tl.max(tl.where(masses > 0, b, 0), axis=0)
    block = tl.minimum(tl.min(tl.where((sums > target) & (masses > 0), b, BLOCKS), axis=0), last)
    before = tl.sum(tl.where(b < block, masses, 0.0), axis=0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    top, threshold = tl.load(top_ptr + lane), tl.load(threshold_ptr + lane)
    mass = _mass(scores_ptr + lane * V, top, threshold, i, i < V)
    inner = before + tl.cumsum(mass, axis=0)
    likeliest_end = tl.max(tl.where(mass > 0, i, 0), axis=0)
    drawn = tl.minimum(tl.min(tl.where((inner > target) & (mass > 0), i, 2147483647), axis=0), likeliest_end)
    forced = tl.load(forced_ptr + step * lanes + lane)
    token = tl.where(forced < 0, drawn.to(tl.int64) + visual, forced)
    tl.store(out_ptr + step * lanes + lane, token)
    stream = tl.arange(0, 2)
    tl.store(token_ptr + 2 * lane + stream, token)
    position = tl.load(position_ptr + 2 * lane + stream)
    tl.store(position_ptr + 2 * lane + stream, position + tl.load(advance_ptr + step * 2 * lanes + 2 * lane + stream))
    tl.store(step_ptr + lane, step + 1)
    # Clean for the next step: nobody reads these after this kernel.
    bins = tl.arange(0, 1024)
    tl.store(counts_ptr + lane * 1024 + bins, tl.zeros((1024,), tl.int32))
    tl.store(top_ptr + lane, -2147483648)

"""From logits to the next tokens in six small kernels: ops/sampling.py without a sort and without synchronizing.

The k-th largest of 131072 scores is found digit by digit: four passes over the ordered bits, eight at a time, each
counting how many scores share the digits found so far. That is exact, ties at the threshold included, and k is read
from the device, so that another top-k needs no new capture. Row i * width + j of the scores is for token j of image i,
whose parameters are those of slot slots[i]. Each kernel runs as (rows, blocks of BLOCK scores); the last one as
(images,).
"""

from __future__ import annotations

import triton
import triton.language as tl

from emu_cog.ops.kernels.grid import _place
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
def _prefix(counts_ptr, found_ptr, k_ptr, PASSES: tl.constexpr):
    """The first PASSES digits of the k-th largest key, as the key's upper bits, and what is left of k: one digit more
    than the kernel before has found (its entry of (4, 2) int32)."""
    if PASSES == 1:
        digit, k = _select(counts_ptr, tl.load(k_ptr))
        prefix = digit - 128  # a signed number's first bits
    else:
        prefix, k = tl.load(found_ptr + 2 * PASSES - 4), tl.load(found_ptr + 2 * PASSES - 3)
        digit, k = _select(counts_ptr + (PASSES - 1) * BINS, k)
        prefix = prefix * 256 + digit
    return prefix, k


@triton.jit
def guide_kernel(
    logits_ptr,  # (images, 2, width, V) fp32
    slots_ptr,  # (images,) int64
    cfg_scale_ptr,
    temperature_ptr,  # (slots,) fp32
    scores_ptr,  # (rows, V) fp32
    counts_ptr,  # (rows, 4, BINS) int32, zeros on entry
    width,
    V,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Apply guidance and temperature, and count the first digit."""
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    image = row // width
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < V
    slot = tl.load(slots_ptr + image)
    scale, temperature = tl.load(cfg_scale_ptr + slot), tl.load(temperature_ptr + slot)
    at = logits_ptr + (image * width + row) * V + i
    c = tl.load(at, mask=live, other=0.0)
    u = tl.load(at + width * V, mask=live, other=0.0)
    # As ops/sampling.py's `guide`: exact at both ends.
    scores = tl.where(scale < 0.5, u + scale * (c - u), c - (c - u) * (1.0 - scale)) / temperature
    tl.store(scores_ptr + row * V + i, scores, mask=live)
    _count(counts_ptr + row * 4 * BINS, _digit(_ordered(scores), 0), live)


@triton.jit
def _count(counts_ptr, digits, live):
    bins = tl.arange(0, BINS)
    counts = tl.histogram(digits, BINS, mask=live)
    tl.atomic_add(counts_ptr + bins, counts, mask=counts > 0)


@triton.jit
def count_kernel(
    scores_ptr,
    counts_ptr,
    found_ptr,  # (rows, 4, 2) int32: what `_prefix` has found in each pass
    slots_ptr,
    k_ptr,
    width,
    V,
    PASS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Count digit PASS (1..3) of the scores that share the digits before it with the k-th largest."""
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < V
    counts_ptr += row * 4 * BINS
    found_ptr += row * 8
    prefix, k = _prefix(counts_ptr, found_ptr, k_ptr + tl.load(slots_ptr + row // width), PASS)
    if tl.program_id(1) == 0:
        tl.store(found_ptr + 2 * PASS - 2, prefix)
        tl.store(found_ptr + 2 * PASS - 1, k)
    key = _ordered(tl.load(scores_ptr + row * V + i, mask=live, other=0.0))
    same = live & ((key >> (32 - 8 * PASS)) == prefix)
    if tl.sum(same.to(tl.int32), axis=0) > 0:
        _count(counts_ptr + PASS * BINS, _digit(key, PASS), same)


@triton.jit
def _gumbel(bits):
    """uint32 to fp32, as ops/noise.py: -log(-log(1 - u)), the inner logarithm exact for the smallest u, too."""
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    rest = 1.0 - u
    # log1p(-u) by Kahan's correction: what rounding took from `rest` cancels in the quotient.
    inner = tl.where(rest == 1.0, u, -tl.log(rest) * (u / tl.where(rest == 1.0, 1.0, 1.0 - rest)))
    return -tl.log(inner)


@triton.jit
def pick_kernel(
    scores_ptr,  # (rows, V) fp32
    counts_ptr,
    found_ptr,
    slots_ptr,
    k_ptr,
    seed_ptr,
    sampled_ptr,
    columns_ptr,
    step_ptr,  # (slots,) int64
    rows_ptr,  # the same with DIAGONAL
    best_ptr,  # (rows,) int64, the smallest int on entry: the largest noisy score's key, then 2^31 - 1 - its code
    width,
    V,
    DIAGONAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add noise to the scores that top-k keeps, and find the largest. Of equal ones the first. The noise's number is
    that of the token: of the picture's next ones, or with DIAGONAL of the cells of its next diagonal."""
    _begin(PDL)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + row // width)
    i = block * BLOCK + tl.arange(0, BLOCK)
    scores = tl.load(scores_ptr + row * V + i, mask=i < V, other=float("-inf"))
    threshold, _ = _prefix(counts_ptr + row * 4 * BINS, found_ptr + row * 8, k_ptr + slot, 4)
    kept = (i < V) & (_ordered(scores) >= threshold)
    if tl.max(kept.to(tl.int32), axis=0) > 0:
        columns, step = tl.load(columns_ptr + slot), tl.load(step_ptr + slot)
        if DIAGONAL:
            _live, token, _left, _above, _count = _place(step, tl.load(rows_ptr + slot), columns, row % width)
        else:
            place = step + row % width
            token = place // (columns + 1) * columns + place % (columns + 1)
        number = tl.load(sampled_ptr + slot) + token
        counter = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        zero = counter * 0
        a, b, c, d = tl.philox(tl.load(seed_ptr + slot), counter, zero + number.to(tl.int32), zero, zero)
        noise = _gumbel(tl.interleave(tl.interleave(a, c), tl.interleave(b, d)))
        key = _ordered(tl.where(kept, scores + noise, float("-inf"))).to(tl.int64)
        tl.atomic_max(best_ptr + row, tl.max((key << 32) + (2147483647 - i), axis=0))


@triton.jit
def accept_kernel(
    slots_ptr,  # (images,) int64
    best_ptr,  # (images * WIDTH,) int64
    counts_ptr,  # (images * WIDTH, 4, BINS) int32
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
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """`accept` of ops/reference.py. Program (image)."""
    _begin(PDL)
    image = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + image)
    step, columns, total = tl.load(step_ptr + slot), tl.load(columns_ptr + slot), tl.load(total_ptr + slot)
    j = tl.arange(0, WIDTH)
    best_ptr += image * WIDTH
    out_ptr += slot * steps
    tokens = _forced(step + j, _code(tl.load(best_ptr + j)) + visual, columns, total, eol, eoi)
    before = tl.maximum(j - 1, 0)  # the draft that token j followed, and what it should have been
    draft = tl.load(out_ptr + step + before, mask=step + before < total, other=0)
    should = _forced(step + before, _code(tl.load(best_ptr + before)) + visual, columns, total, eol, eoi)
    wrong = (j > 0) & (draft != should)
    accepted = tl.min(tl.where(wrong, j, WIDTH), axis=0).to(tl.int64)
    accepted = tl.maximum(tl.minimum(accepted, total - step), 0)
    last = tl.sum(tl.where(j == accepted - 1, tokens, 0), axis=0)
    if WIDTH > 1:  # drafts for the places after these: the last code
        end = tl.sum(tl.where(j == WIDTH - 1, tokens, 0), axis=0)
        guess = tl.where(end >= visual, end, tl.sum(tl.where(j == WIDTH - 2, tokens, 0), axis=0))
        place = step + WIDTH + j
        guess = _forced(place, tl.zeros_like(place) + guess, columns, total, eol, eoi)
        tl.debug_barrier()  # the drafts have been read
        tl.store(out_ptr + place, guess, mask=place < total)
    tl.store(out_ptr + step + j, tokens, mask=step + j < total)
    if accepted > 0:  # a branch: Triton's interpreter takes no scalar as the mask of a block
        pair = 2 * slot + tl.arange(0, 2)
        tl.store(token_ptr + pair, last)
        tl.store(position_ptr + pair, tl.load(position_ptr + pair) + accepted)
        tl.store(step_ptr + slot, step + accepted)
    # Reset for the next step: nothing reads these after this kernel.
    tl.debug_barrier()
    tl.store(best_ptr + j, tl.full((WIDTH,), -9223372036854775808, tl.int64))
    bins = tl.arange(0, 1024)
    for row in range(WIDTH):
        tl.store(counts_ptr + (image * WIDTH + row) * 1024 + bins, tl.zeros((1024,), tl.int32))


@triton.jit
def _code(best):
    """The code in what `pick_kernel` has found."""
    return 2147483647 - (best & 4294967295)


@triton.jit
def _forced(place, token, columns, total, eol, eoi):
    """The grammar's token where it forces one."""
    token = tl.where(place % (columns + 1) == columns, eol, token)
    return tl.where(place == total - 1, eoi, token)

"""The decode step's kernels, in Triton: up to 128 tokens through weights that are read once, at memory bandwidth.

What justifies them: on an H200 the 34 B model's products in bf16 take 15.4, 15.7, 16.1 and 17.8 ms with 2, 16, 32 and
64 rows, `F.linear` 17.1, 16.9, 17.2 and 17.5; with fp8 inputs 8.8, 9.2, 9.8 and 11.5 ms with 16, 32, 64 and 128 rows,
`torch._scaled_mm` 12.0, 11.9, 11.6 and 11.9 (ours with the 0.7 ms that rounding the inputs takes). And no row's bits
depended on the number of rows, which PyTorch does not promise. In bf16 with 128, 256 and 512 rows (19.5, 33, 57 ms;
`F.linear` 17.6, 25, 44) those bits are the only reason.

Only ModelRunner's fast path imports this file; under TRITON_INTERPRET=1 the kernels also run on a CPU, for tests. Every
kernel begins with `_begin`: under programmatic dependent launch (`PDL`, Hopper and later) a kernel starts while its
predecessor still runs, and waits there before it touches anything that the predecessor wrote.
"""

from __future__ import annotations

import triton
import triton.language as tl

from emu_cog.ops import interface


@triton.jit
def _begin(PDL: tl.constexpr):
    if PDL:  # as assembly: Triton 3.4's gdc_wait does not compile
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.u32 $0, 0;",
            "=r",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


INPUT_SCALE = tl.constexpr(interface.INPUT_SCALE)


@triton.jit
def _scaled(x):
    """fp32 to what an 8-bit product reads: divided by INPUT_SCALE, clamped to fp16's range."""
    return tl.minimum(tl.maximum(x / INPUT_SCALE, -65504.0), 65504.0)


@triton.jit
def linear_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K); with SWIGLU (2N, K), the gate's rows first
    x_scale_ptr,  # (M,) fp32, with NARROW
    scale_ptr,  # (N,) or (2N,) fp32, with NARROW
    out_ptr,  # (M, N) of KIND; without SWIGLU partials (splits, M, N) fp32
    M,
    N,
    K,
    chunk,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SWIGLU: tl.constexpr,
    EVEN: tl.constexpr,
    NARROW: tl.constexpr,
    KIND: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """x @ w.T on tensor cores, computed as (w x^T)^T. KIND is the model's dtype; with NARROW x and w are fp8, which
    only Triton's interpreter (ASM False) widens before it multiplies. Of such sums Hopper keeps fewer bits than fp32:
    over 5120 to 25600 random numbers they are off by up to 0.5 % of the largest.

    Program (i, s): block i // tiles of the outputs and tile i % tiles of ROWS rows, so that tiles that read the same
    weights run at the same time; split s, `chunk` long, of the sum over K.
    """
    tiles = tl.cdiv(M, ROWS)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, K)
    m = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    live = n < N
    w_at = w_ptr + n[:, None] * K + k[None, :]
    x_at = x_ptr + m[None, :] * K + k[:, None]
    _begin(PDL)
    acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
    acc_up = tl.zeros((BLOCK_N, ROWS), tl.float32)
    for at in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if EVEN:
            w = tl.load(w_at + at, eviction_policy="evict_first")
            x = tl.load(x_at + at, mask=m[None, :] < M, other=0.0)
        else:
            inside = at + k < end
            w = tl.load(w_at + at, mask=live[:, None] & inside[None, :], other=0.0)
            x = tl.load(x_at + at, mask=(m[None, :] < M) & inside[:, None], other=0.0)
        if NARROW and not ASM:
            w, x = w.to(tl.float16), x.to(tl.float16)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if SWIGLU:
            if EVEN:
                up = tl.load(w_at + N * K + at, eviction_policy="evict_first")
            else:
                up = tl.load(w_at + N * K + at, mask=live[:, None] & inside[None, :], other=0.0)
            if NARROW and not ASM:
                up = up.to(tl.float16)
            acc_up = tl.dot(up, x, acc_up, input_precision="ieee")
    if NARROW:
        x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[None, :]
        acc *= tl.load(scale_ptr + n, mask=live, other=0.0)[:, None] * x_scale
        if SWIGLU:
            acc_up *= tl.load(scale_ptr + N + n, mask=live, other=0.0)[:, None] * x_scale
    if SWIGLU:
        acc = _swiglu(acc, acc_up, KIND)
    out_at = out_ptr + tl.program_id(1) * M * N + m[None, :] * N + n[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(m[None, :] < M) & live[:, None])


@triton.jit
def narrow_kernel(
    x_ptr,  # (M, K)
    out_ptr,  # (M, K) fp8
    scale_ptr,  # (M,) fp32
    K,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """`interface.narrowed`. One program per row. Triton's interpreter (ASM False) does not round to fp8 by itself."""
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * K + i, mask=i < K, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), SMALLEST) / LARGEST
    tl.store(scale_ptr + row, scale)
    x = tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST)
    if not ASM:
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(power, 0.015625) / 8  # of three bits behind the first; the least exponent is -6
        x = (x / step + 12582912.0 - 12582912.0) * step
    tl.store(out_ptr + row * K + i, x.to(out_ptr.dtype.element_ty), mask=i < K)


@triton.jit
def _swiglu(gate, up, kind: tl.constexpr):
    """silu(gate) * up, rounded where separate layers would round."""
    gate = gate.to(kind).to(tl.float32)
    act = (gate * tl.sigmoid(gate)).to(kind).to(tl.float32)
    return act * up.to(kind).to(tl.float32)


@triton.jit
def swiglu_kernel(
    product_ptr,  # (M, 2N), the gate's half first
    out_ptr,  # (M, N)
    N,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """silu(gate) * up of a product with many tokens. Program (token, block)."""
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(product_ptr + row * 2 * N + i, mask=i < N, other=0.0).to(tl.float32)
    up = tl.load(product_ptr + row * 2 * N + N + i, mask=i < N, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * N + i, _swiglu(gate, up, kind).to(kind), mask=i < N)


@triton.jit
def add_norm_kernel(
    product_ptr,  # (splits, M, H)
    residual_ptr,  # (M, H), read and written
    weight_ptr,  # (H,)
    out_ptr,  # (M, H); with INTERLEAVED as an 8-bit product reads it
    H,
    eps,
    M,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sum the product's splits, add them to the residual stream, and write its RMSNorm. One program per token."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    live = i < H
    kind = residual_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + i, mask=live, other=0.0).to(tl.float32)
    _begin(PDL)
    x = tl.load(residual_ptr + row * H + i, mask=live, other=0.0).to(tl.float32)
    if SPLITS > 0:
        total = tl.zeros((BLOCK,), tl.float32)
        for s in tl.static_range(SPLITS):  # unrolled, so that no load waits for the one before
            total += tl.load(product_ptr + (s * M + row).to(tl.int64) * H + i, mask=live, other=0.0).to(tl.float32)
        x = (x + total.to(kind).to(tl.float32)).to(kind).to(tl.float32)
        tl.store(residual_ptr + row * H + i, x.to(kind), mask=live)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / H + eps)
    y = ((x * scale).to(kind).to(tl.float32) * weight).to(kind)
    if INTERLEAVED:
        i = (i % 4) * (H // 4) + i // 4
        y = _scaled(y.to(tl.float32))
    tl.store(out_ptr + row * H + i, y.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _page(tables_ptr, stream, position, table_stride, PAGE: tl.constexpr):
    """The page that holds a stream's position."""
    return tl.load(tables_ptr + stream * table_stride + position // PAGE).to(tl.int64)


@triton.jit
def rope_store_kernel(
    product_ptr,  # (splits, M, (heads + 2 kv) * D): queries, keys, values
    q_weight_ptr,
    k_weight_ptr,  # (D,)
    rope_ptr,  # (2, M, D): cosines and sines, each one's halves equal
    position_ptr,
    stream_ptr,  # (M,) int64
    tables_ptr,  # (streams, pages) int32
    q_ptr,  # (M, heads, D)
    k_ptr,
    v_ptr,  # (kv, pages, PAGE, D)
    table_stride,
    head_stride,
    eps,
    M,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norm and rotate queries and keys, store keys and values in the cache. Program (token, BLOCK heads)."""
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    HALF: tl.constexpr = D // 2
    i = tl.arange(0, HALF)[None, :]
    kind = q_ptr.dtype.element_ty
    live = head < HEADS + 2 * KV
    query, value = head < HEADS, live & (head >= HEADS + KV)
    low = tl.zeros((BLOCK, HALF), tl.float32)
    high = tl.zeros((BLOCK, HALF), tl.float32)
    for s in tl.static_range(SPLITS):
        at = product_ptr + ((s * M + row) * (HEADS + 2 * KV) + head) * D + i
        low += tl.load(at, mask=live, other=0.0).to(tl.float32)
        high += tl.load(at + HALF, mask=live, other=0.0).to(tl.float32)
    low, high = low.to(kind).to(tl.float32), high.to(kind).to(tl.float32)
    scale = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / D + eps)[:, None]
    w_low = tl.where(query, tl.load(q_weight_ptr + i), tl.load(k_weight_ptr + i)).to(tl.float32)
    w_high = tl.where(query, tl.load(q_weight_ptr + HALF + i), tl.load(k_weight_ptr + HALF + i)).to(tl.float32)
    n_low = ((low * scale).to(kind).to(tl.float32) * w_low).to(kind).to(tl.float32)
    n_high = ((high * scale).to(kind).to(tl.float32) * w_high).to(kind).to(tl.float32)
    cos = tl.load(rope_ptr + row * D + i).to(tl.float32)
    sin = tl.load(rope_ptr + (M + row) * D + i).to(tl.float32)
    r_low, r_high = (n_low * cos - n_high * sin).to(kind), (n_high * cos + n_low * sin).to(kind)
    out = q_ptr + (row * HEADS + head) * D + i
    tl.store(out, r_low, mask=query)
    tl.store(out + HALF, r_high, mask=query)
    position = tl.load(position_ptr + row)
    page = _page(tables_ptr, tl.load(stream_ptr + row), position, table_stride, PAGE)
    cell = (page * PAGE + position % PAGE) * D + i
    key = live & (head >= HEADS) & (head < HEADS + KV)
    out = k_ptr + (head - HEADS).to(tl.int64) * head_stride + cell
    tl.store(out, r_low, mask=key)
    tl.store(out + HALF, r_high, mask=key)
    out = v_ptr + (head - HEADS - KV).to(tl.int64) * head_stride + cell
    tl.store(out, low.to(kind), mask=value)
    tl.store(out + HALF, high.to(kind), mask=value)


@triton.jit
def attend_kernel(
    q_ptr,  # (M, KV * GROUP, D)
    k_ptr,
    v_ptr,  # (KV, pages, PAGE, D)
    position_ptr,  # (M,) int64: the last key that is read
    stream_ptr,  # (M,) int64
    tables_ptr,  # (streams, pages) int32
    acc_ptr,  # (M, KV * GROUP, SPLITS, D) fp32
    log_ptr,  # (M, KV * GROUP, SPLITS) fp32: log2 of the sum, -inf for a split with no keys
    table_stride,
    head_stride,
    scale,  # 1 / sqrt(D) * log2(e)
    width,
    KV: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attention of up to TOKENS tokens of a window of `width` over a split of their stream's keys, for the GROUP heads
    that share keys: QUERIES rows of one shape whatever the width, so that each token is computed as if alone. BLOCK
    divides PAGE.

    The keys of a token are divided into SPLITS equal parts by their own number alone, in steps of SPLITS * BLOCK keys.
    Where that number grows by a step within the tokens, programs of their own take those behind: program (tokens, kv
    head, split, and SPLITS + split for those behind).
    """
    _begin(PDL)
    tiles = tl.cdiv(width, TOKENS)
    tile, head = tl.program_id(0) % tiles, tl.program_id(1)
    split, behind = tl.program_id(2) % SPLITS, tl.program_id(2) // SPLITS
    first = tl.program_id(0) // tiles * width + tile * TOKENS
    query, d, t = tl.arange(0, QUERIES), tl.arange(0, D), tl.arange(0, BLOCK)
    token = query // GROUP
    row = first + token
    live = (token < TOKENS) & (token + tile * TOKENS < width)
    shortest = (tl.load(position_ptr + first) + 1).to(tl.int32)
    # Padding within a window has no keys of its own: it reads those of the first.
    length = tl.maximum((tl.load(position_ptr + row, mask=live, other=0) + 1).to(tl.int32), shortest)
    steps = tl.cdiv(shortest, SPLITS * BLOCK) + behind
    live = live & (tl.cdiv(length, SPLITS * BLOCK) == steps)
    part = steps * BLOCK
    begin = split * part
    end = tl.minimum(begin + part, tl.max(tl.where(live, length, 0), axis=0))
    if (behind == 0) | (end > 0):
        heads = (row * KV + head) * GROUP + query % GROUP
        q = tl.load(q_ptr + heads[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
        base = head.to(tl.int64) * head_stride
        stream = tl.load(stream_ptr + first)
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, D), tl.float32)
        for at in tl.range(begin, end, BLOCK, num_stages=STAGES):
            page = _page(tables_ptr, stream, at, table_stride, PAGE)
            cells = base + (page * PAGE + at % PAGE + t)[:, None] * D + d[None, :]
            inside = at + t < end
            k = tl.load(k_ptr + cells, mask=inside[:, None], other=0.0)
            v = tl.load(v_ptr + cells, mask=inside[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where((at + t)[None, :] < length[:, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(scores - finite[:, None])
            fade = tl.exp2(top - finite)
            total = total * fade + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            top = new_top
        cell = heads * SPLITS + split
        some = total > 0
        total = tl.where(some, total, 1.0)
        tl.store(log_ptr + cell, tl.where(some, top + tl.log2(total), float("-inf")), mask=live)
        tl.store(acc_ptr + cell[:, None] * D + d[None, :], acc / total[:, None], mask=live[:, None])


@triton.jit
def combine_kernel(
    acc_ptr,
    log_ptr,
    out_ptr,  # (M, HEADS * D); with INTERLEAVED as an 8-bit product reads it
    HEADS: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
    KIND: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The weighted mean over the splits: (M, HEADS, SPLITS, D) to (M, HEADS * D), rounded to KIND.
    Program (batch row, head)."""
    _begin(PDL)
    row, head = tl.program_id(0), tl.program_id(1)
    cell = row * HEADS + head
    s, d = tl.arange(0, PADDED), tl.arange(0, D)
    logs = tl.load(log_ptr + cell * SPLITS + s, mask=s < SPLITS, other=float("-inf"))
    weight = tl.exp2(logs - tl.max(logs, axis=0))
    acc = tl.load(acc_ptr + (cell * SPLITS + s)[:, None] * D + d[None, :], mask=s[:, None] < SPLITS, other=0.0)
    out = (tl.sum(acc * weight[:, None], axis=0) / tl.sum(weight, axis=0)).to(KIND)
    at = head * D + d
    if INTERLEAVED:
        at = (at % 4) * (HEADS * D // 4) + at // 4
        out = _scaled(out.to(tl.float32))
    tl.store(out_ptr + row * (HEADS * D) + at, out.to(out_ptr.dtype.element_ty))

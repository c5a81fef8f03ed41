"""The decode step's kernels, in Triton: up to 128 tokens through weights that are read once, at memory bandwidth.

What justifies them: on an H200 the 34 B model's products in bf16 take 15.1, 16.4, 18.3 ms with 16, 64, 128 rows,
`F.linear` 16.0, 16.9 and 17.3; with fp8 inputs 8.2, 8.3, 8.9, 10.5 ms with 16, 32, 64 and 128 rows, `torch._scaled_mm`
11.9, 11.9, 11.6 and 11.7, both without rounding the inputs. And no row's bits depended on the number of rows, which
PyTorch does not promise. In bf16 with 128 rows and more (256: 27, 512: 47 ms; `F.linear` 24 and 42) those bits are the
only reason: a tile's inputs come from the L2 cache for every block of outputs, and Triton can't share them between
programs.

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
SCALE_BYTES = tl.constexpr(interface.SCALE_BYTES)


@triton.jit
def _scaled(x):
    """fp32 to what an 8-bit product reads: divided by INPUT_SCALE, clamped to fp16's range."""
    return tl.minimum(tl.maximum(x / INPUT_SCALE, -65504.0), 65504.0)


@triton.jit
def linear_kernel(
    x_ptr,  # (M, K)
    beside_ptr,  # the same, with BESIDE
    w_ptr,  # (N, K); with SWIGLU (2N, K), the gate's rows first
    x_scale_ptr,  # fp32, x_stride bytes apart, with NARROW
    scale_ptr,  # (N,) or (2N,) fp32, with NARROW
    out_ptr,  # (M, N) of KIND; without SWIGLU partials (splits, M, N) fp32
    M,
    N,
    K,
    chunk,
    x_stride,  # numbers, which with NARROW are bytes
    ROWS: tl.constexpr,
    BESIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SWIGLU: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    NARROW: tl.constexpr,
    KIND: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """x @ w.T on tensor cores, computed as (w x^T)^T. KIND is the model's dtype; with NARROW x and w are fp8, which
    only Triton's interpreter (ASM False) widens before it multiplies. Of such sums Hopper keeps fewer bits than fp32:
    over 5120 to 25600 random numbers they are off by up to 0.5 % of the largest. With TMA x_ptr, beside_ptr and w_ptr
    are tensor descriptors of blocks (ROWS, BLOCK_K), (BESIDE, BLOCK_K) and (BLOCK_N, BLOCK_K), zero beyond the ends.

    Program (i, s): block i // tiles of the outputs and tile i % tiles of ROWS + BESIDE rows, so that tiles that read
    the same weights run at the same time; split s, `chunk` long, of the sum over K. ROWS and BESIDE are powers of two.
    """
    tiles = tl.cdiv(M, ROWS + BESIDE)
    first_n = tl.program_id(0) // tiles * BLOCK_N
    first_m = tl.program_id(0) % tiles * (ROWS + BESIDE)
    n, m, k = first_n + tl.arange(0, BLOCK_N), first_m + tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, K)
    live = n < N
    _begin(PDL)
    acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
    acc_up = tl.zeros((BLOCK_N, ROWS), tl.float32)
    if BESIDE > 0:
        m_beside = first_m + ROWS + tl.arange(0, BESIDE)
        beside = tl.zeros((BLOCK_N, BESIDE), tl.float32)
        beside_up = tl.zeros((BLOCK_N, BESIDE), tl.float32)
    for at in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        w = _weights(w_ptr, first_n, at, n, k, end, N, K, EVEN, TMA)
        x = _inputs(x_ptr, first_m, at, m, k, end, M, x_stride, EVEN, TMA)
        if NARROW and not ASM:
            w, x = w.to(tl.float16), x.to(tl.float16)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if BESIDE > 0:
            y = _inputs(beside_ptr, first_m + ROWS, at, m_beside, k, end, M, x_stride, EVEN, TMA)
            if NARROW and not ASM:
                y = y.to(tl.float16)
            beside = tl.dot(w, y, beside, input_precision="ieee")
        if SWIGLU:
            up = _weights(w_ptr, N + first_n, at, N + n, k, end, 2 * N, K, EVEN, TMA)
            if NARROW and not ASM:
                up = up.to(tl.float16)
            acc_up = tl.dot(up, x, acc_up, input_precision="ieee")
            if BESIDE > 0:
                beside_up = tl.dot(up, y, beside_up, input_precision="ieee")
    out_ptr += tl.program_id(1) * M * N
    _store_product(acc, acc_up, m, n, live, x_scale_ptr, scale_ptr, out_ptr, M, N, x_stride, SWIGLU, NARROW, KIND)
    if BESIDE > 0:
        _store_product(
            beside, beside_up, m_beside, n, live, x_scale_ptr, scale_ptr, out_ptr, M, N, x_stride, SWIGLU, NARROW, KIND
        )


@triton.jit
def _weights(w_ptr, first, at, n, k, end, most, K, EVEN: tl.constexpr, TMA: tl.constexpr):
    """Rows `n`, which begin at `first`, and columns `at + k`."""
    if TMA:
        w = w_ptr.load([first, at])
    elif EVEN:
        w = tl.load(w_ptr + n[:, None] * K + k[None, :] + at, eviction_policy="evict_first")
    else:
        inside = (n < most)[:, None] & (at + k < end)[None, :]
        w = tl.load(w_ptr + n[:, None] * K + k[None, :] + at, mask=inside, other=0.0)
    return w


@triton.jit
def _inputs(x_ptr, first, at, m, k, end, M, x_stride, EVEN: tl.constexpr, TMA: tl.constexpr):
    """Rows `m`, which begin at `first`, and columns `at + k`, transposed."""
    if TMA:
        x = tl.trans(x_ptr.load([first, at]))
    else:
        inside = (m < M)[None, :]
        if not EVEN:
            inside = inside & (at + k < end)[:, None]
        x = tl.load(x_ptr + m[None, :] * x_stride + k[:, None] + at, mask=inside, other=0.0)
    return x


@triton.jit
def _store_product(
    acc,
    acc_up,
    m,
    n,
    live,
    x_scale_ptr,
    scale_ptr,
    out_ptr,
    M,
    N,
    x_stride,
    SWIGLU: tl.constexpr,
    NARROW: tl.constexpr,
    KIND: tl.constexpr,
):
    """Store sums (BLOCK_N, rows) of the outputs `n` and the rows `m`."""
    if NARROW:
        x_scale = tl.load(x_scale_ptr + m * (x_stride // 4), mask=m < M, other=0.0)[None, :]
        acc *= tl.load(scale_ptr + n, mask=live, other=0.0)[:, None] * x_scale
        if SWIGLU:
            acc_up *= tl.load(scale_ptr + N + n, mask=live, other=0.0)[:, None] * x_scale
    if SWIGLU:
        acc = _swiglu(acc, acc_up, KIND)
    out_at = out_ptr + m[None, :] * N + n[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(m[None, :] < M) & live[:, None])


@triton.jit
def _store_narrow(x, out_ptr, row, i, K, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, ASM: tl.constexpr):
    """`interface.narrowed` of one row x (fp32, zero from K on): K numbers of fp8, then the row's scale in fp32; rows
    are K + interface.SCALE_BYTES apart. Triton's interpreter (ASM False) does not round to fp8 by itself."""
    out = out_ptr + row * (K + SCALE_BYTES)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), SMALLEST) / LARGEST
    tl.store((out + K).to(tl.pointer_type(tl.float32), bitcast=True), scale)
    x = tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST)
    if not ASM:
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(power, 0.015625) / 8  # of three bits behind the first; the least exponent is -6
        x = (x / step + 12582912.0 - 12582912.0) * step
    tl.store(out + i, x.to(out_ptr.dtype.element_ty), mask=i < K)


@triton.jit
def narrow_kernel(
    x_ptr,  # (M, K)
    out_ptr,  # see _store_narrow
    K,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Round to fp8. One program per row."""
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * K + i, mask=i < K, other=0.0).to(tl.float32)
    _store_narrow(x, out_ptr, row, i, K, SMALLEST, LARGEST, ASM)


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
    out_ptr,  # (M, H); with INTERLEAVED as an 8-bit product reads it, with NARROW as _store_narrow writes it
    H,
    eps,
    M,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NARROW: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    ASM: tl.constexpr,
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
    if NARROW:
        _store_narrow(y.to(tl.float32), out_ptr, row.to(tl.int64), i, H, SMALLEST, LARGEST, ASM)
    else:
        if INTERLEAVED:
            i = (i % 4) * (H // 4) + i // 4
            y = _scaled(y.to(tl.float32))
        tl.store(out_ptr + row * H + i, y.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _page(tables_ptr, stream, position, table_stride, PAGE: tl.constexpr):
    """The page that holds a stream's position."""
    return tl.load(tables_ptr + stream * table_stride + position // PAGE).to(tl.int64)


@triton.jit
def _keys(at_ptr, cell, at, end, D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """BLOCK keys or values of a head, from `cell` of its cache on, as (BLOCK, D); zeros from position `end` on if
    MASKED."""
    t, d = tl.arange(0, BLOCK), tl.arange(0, D)
    cells = (cell + t)[:, None] * D + d[None, :]
    return tl.load(at_ptr + cells, mask=(at + t < end)[:, None], other=0.0) if MASKED else tl.load(at_ptr + cells)


@triton.jit
def _read_keys(q, k, v, at, length, scale, top, total, acc, MASKED: tl.constexpr):
    """Let the queries read a block of keys: the largest score, the weights' sum and the weighted sum, updated."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(at[None, :] < length[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    finite = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    p = tl.exp2(scores * scale - finite[:, None])  # one instruction before exp2
    fade = tl.exp2(top - finite)
    total = total * fade + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return new_top, total, acc


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
    position_ptr,  # (M,) int64
    last_ptr,  # (M,) int64: the last key that a token reads: itself, with OPEN the last of its window
    stream_ptr,  # (M,) int64
    tables_ptr,  # (streams, pages) int32
    acc_ptr,  # (M, KV * GROUP, SPLITS, D) fp32, written where log_ptr is finite
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
    OPEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attention of up to TOKENS tokens of a window of `width` over a part of their stream's keys, for the GROUP heads
    that share keys: QUERIES rows, each computed as if alone. BLOCK divides PAGE.

    The keys of a token are divided into equal parts by its own number alone, in steps of BLOCK keys a part. Without
    OPEN there are SPLITS parts; where the number grows by a step within the tokens, programs of their own take those
    behind: program (window and tile of tokens, kv head, split, and SPLITS + split for those behind).

    With OPEN all tokens of a window read the same keys. A window has SPLITS programs for each head, which its own
    tokens divide: where they are more tiles, there are fewer parts. Program (window, kv head, tile and split).
    """
    _begin(PDL)
    query, d, t = tl.arange(0, QUERIES), tl.arange(0, D), tl.arange(0, BLOCK)
    head = tl.program_id(1)
    if OPEN:
        window = tl.program_id(0) * width
        last = tl.load(last_ptr + window)
        count = (last - tl.load(position_ptr + window) + 1).to(tl.int32)
        tiles = 1
        while tiles * TOKENS < count:
            tiles *= 2
        parts = tl.maximum(SPLITS // tiles, 1)
        tile, split = tl.program_id(2) // parts, tl.program_id(2) % parts
        first = window + tile * TOKENS
        token = query // GROUP
        row = first + token
        live = (token < TOKENS) & (token + tile * TOKENS < count)
        shortest = (last + 1).to(tl.int32)
        length = tl.where(live, shortest, 0)
        steps = tl.cdiv(shortest, parts * BLOCK)
        part = steps * BLOCK
        begin = split * part
        end = tl.where(tile * TOKENS < count, tl.minimum(begin + part, shortest), 0)
        some_live = end > 0
    else:
        tiles = tl.cdiv(width, TOKENS)
        tile = tl.program_id(0) % tiles
        split, behind = tl.program_id(2) % SPLITS, tl.program_id(2) // SPLITS
        parts = SPLITS
        first = tl.program_id(0) // tiles * width + tile * TOKENS
        token = query // GROUP
        row = first + token
        live = (token < TOKENS) & (token + tile * TOKENS < width)
        shortest = (tl.load(last_ptr + first) + 1).to(tl.int32)
        # Padding within a window has no keys of its own: it reads those of the first.
        length = tl.maximum((tl.load(last_ptr + row, mask=live, other=0) + 1).to(tl.int32), shortest)
        steps = tl.cdiv(shortest, SPLITS * BLOCK) + behind
        live = live & (tl.cdiv(length, SPLITS * BLOCK) == steps)
        part = steps * BLOCK
        begin = split * part
        end = tl.minimum(begin + part, tl.max(tl.where(live, length, 0), axis=0))
        some_live = (behind == 0) | (end > 0)
    if some_live:
        heads = (row * KV + head) * GROUP + query % GROUP
        q = tl.load(q_ptr + heads[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
        stream = tl.load(stream_ptr + first)
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, D), tl.float32)
        k_ptr += head.to(tl.int64) * head_stride
        v_ptr += head.to(tl.int64) * head_stride
        masked = begin
        if OPEN:  # keys that all queries read: without masks 54 us of a layer become 49
            masked += tl.maximum(end - begin, 0) // BLOCK * BLOCK
            for at in tl.range(begin, masked, BLOCK, num_stages=STAGES):
                cell = _page(tables_ptr, stream, at, table_stride, PAGE) * PAGE + at % PAGE
                k = _keys(k_ptr, cell, at, end, D, BLOCK, False)
                v = _keys(v_ptr, cell, at, end, D, BLOCK, False)
                top, total, acc = _read_keys(q, k, v, at + t, length, scale, top, total, acc, False)
        for at in tl.range(masked, end, BLOCK, num_stages=1 if OPEN else STAGES):
            cell = _page(tables_ptr, stream, at, table_stride, PAGE) * PAGE + at % PAGE
            k = _keys(k_ptr, cell, at, end, D, BLOCK, True)
            v = _keys(v_ptr, cell, at, end, D, BLOCK, True)
            top, total, acc = _read_keys(q, k, v, at + t, length, scale, top, total, acc, True)
        cell = heads * SPLITS + split
        some = total > 0
        total = tl.where(some, total, 1.0)
        tl.store(log_ptr + cell, tl.where(some, top + tl.log2(total), float("-inf")), mask=live)
        tl.store(acc_ptr + cell[:, None] * D + d[None, :], acc / total[:, None], mask=(live & some)[:, None])
        if OPEN and split == 0:
            unused = tl.arange(0, SPLITS)[None, :]
            none = tl.full((QUERIES, SPLITS), float("-inf"), tl.float32)
            tl.store(log_ptr + heads[:, None] * SPLITS + unused, none, mask=live[:, None] & (unused >= parts))


@triton.jit
def _computed(last_ptr, row, width, count, OPEN: tl.constexpr):
    """How many of `count` numbers of a row `attend_kernel` has written: with OPEN none of padding, whose `last` is 0,
    but for the first row of a window."""
    if OPEN:
        count = tl.where((row % width == 0) | (tl.load(last_ptr + row) > 0), count, 0)
    return count


@triton.jit
def combine_kernel(
    acc_ptr,
    log_ptr,
    last_ptr,
    out_ptr,  # (M, HEADS * D); with INTERLEAVED as an 8-bit product reads it
    width,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OPEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """The weighted mean over the splits: (M, HEADS, SPLITS, D) to (M, HEADS * D), rounded to KIND; zeros for what
    was not computed. Program (batch row, BLOCK numbers of it)."""
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < _computed(last_ptr, row, width, HEADS * D, OPEN)
    cell = (row * HEADS + i // D) * SPLITS
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for s in tl.static_range(SPLITS):  # unrolled, so that no load waits for the one before
        top = tl.maximum(top, tl.load(log_ptr + cell + s, mask=live, other=float("-inf")))
    total = tl.zeros((BLOCK,), tl.float32)
    out = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLITS):
        log = tl.load(log_ptr + cell + s, mask=live, other=float("-inf"))
        used = log > float("-inf")
        weight = tl.where(used, tl.exp2(log - top), 0.0)
        out += weight * tl.load(acc_ptr + (cell + s) * D + i % D, mask=used, other=0.0)
        total += weight
    out = (out / tl.where(total > 0, total, 1.0)).to(KIND)
    at = i
    if INTERLEAVED:
        at = (i % 4) * (HEADS * D // 4) + i // 4
        out = _scaled(out.to(tl.float32))
    tl.store(out_ptr + row * (HEADS * D) + at, out.to(out_ptr.dtype.element_ty), mask=i < HEADS * D)

"""The linear kernel for 8-bit weights: four weights per 32-bit word, unpacked in registers for the tensor cores.

Loading and converting every weight by itself would read memory at half its bandwidth. So weights are loaded as words
along K; byte i of word j belongs to input 4j + i. Each of the four bytes forms a matrix of its own, multiplied with the
inputs that belong to it. Those are interleaved: a row's inputs 4j first, then its inputs 4j + 1, and so on. The
preceding kernels write their results in that layout, as fp16 divided by INPUT_SCALE: fp8 and int8 convert to fp16 in
one or two instructions, and values up to a million still fit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from emu_cog.ops.kernels.layers import INPUT_SCALE, _begin, _scaled, _swiglu


@triton.jit
def _unpack(words, FP8: tl.constexpr, ASM: tl.constexpr):
    """(N, K) int32 to four (N, K) fp16, the lowest byte first. ASM False computes the same for Triton's interpreter."""
    if ASM:
        if FP8:
            return tl.inline_asm_elementwise(
                """{
                .reg .b16 lo, hi; .reg .b32 a, b;
                mov.b32 {lo, hi}, $4;
                cvt.rn.f16x2.e4m3x2 a, lo;
                cvt.rn.f16x2.e4m3x2 b, hi;
                mov.b32 {$0, $1}, a;
                mov.b32 {$2, $3}, b;
                }""",
                "=h,=h,=h,=h,r",
                [words],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=1,
            )
        else:
            # A byte b + 128 under the upper half 0x64 is the fp16 number 1024 + b + 128: subtract 1152.
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 u, a, b, c;
                mov.b32 c, 0x64806480;
                xor.b32 u, $4, 0x80808080;
                prmt.b32 a, u, 0x64646464, 0x4140;
                prmt.b32 b, u, 0x64646464, 0x4342;
                sub.f16x2 a, a, c;
                sub.f16x2 b, b, c;
                mov.b32 {$0, $1}, a;
                mov.b32 {$2, $3}, b;
                }""",
                "=h,=h,=h,=h,r",
                [words],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=1,
            )
    else:
        return _byte(words, 0, FP8), _byte(words, 1, FP8), _byte(words, 2, FP8), _byte(words, 3, FP8)


@triton.jit
def _byte(words, i: tl.constexpr, FP8: tl.constexpr):
    byte = ((words >> (8 * i)) & 255).to(tl.uint8)
    if FP8:
        return byte.to(tl.float8e4nv, bitcast=True).to(tl.float32).to(tl.float16)
    return byte.to(tl.int8, bitcast=True).to(tl.float16)


@triton.jit
def linear8_kernel(
    x_ptr,  # (M, 4, W) fp16: interleaved and scaled
    w_ptr,  # (N, W) int32; with SWIGLU (2N, W), the gate's rows first
    scale_ptr,  # (N,) or (2N,) fp32
    out_ptr,  # partials (splits, M, N) fp32; with SWIGLU (M, N) fp16, interleaved and scaled
    M,
    N,
    W,
    chunk,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SWIGLU: tl.constexpr,
    FP8: tl.constexpr,
    KIND: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """`layers.linear_kernel` with everything along K counted in words. KIND is the model's dtype."""
    tiles = tl.cdiv(M, ROWS)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, W)
    m = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK_K)
    live = n < N
    w_at = w_ptr + n[:, None] * W + j[None, :]
    x_at = x_ptr + m[None, :] * (4 * W) + j[:, None]
    _begin(PDL)
    acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
    acc_up = tl.zeros((BLOCK_N, ROWS), tl.float32)
    for at in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        inside = at + j < end
        if EVEN:
            some = m[None, :] < M
            w = tl.load(w_at + at, eviction_policy="evict_first")
        else:
            some = (m[None, :] < M) & inside[:, None]
            w = tl.load(w_at + at, mask=live[:, None] & inside[None, :], other=0)
        x0 = tl.load(x_at + at, mask=some, other=0.0)
        x1 = tl.load(x_at + W + at, mask=some, other=0.0)
        x2 = tl.load(x_at + 2 * W + at, mask=some, other=0.0)
        x3 = tl.load(x_at + 3 * W + at, mask=some, other=0.0)
        w0, w1, w2, w3 = _unpack(w, FP8, ASM)
        acc = tl.dot(w0, x0, acc)
        acc = tl.dot(w1, x1, acc)
        acc = tl.dot(w2, x2, acc)
        acc = tl.dot(w3, x3, acc)
        if SWIGLU:
            if EVEN:
                w = tl.load(w_at + N * W + at, eviction_policy="evict_first")
            else:
                w = tl.load(w_at + N * W + at, mask=live[:, None] & inside[None, :], other=0)
            w0, w1, w2, w3 = _unpack(w, FP8, ASM)
            acc_up = tl.dot(w0, x0, acc_up)
            acc_up = tl.dot(w1, x1, acc_up)
            acc_up = tl.dot(w2, x2, acc_up)
            acc_up = tl.dot(w3, x3, acc_up)
    acc *= tl.load(scale_ptr + n, mask=live, other=0.0)[:, None] * INPUT_SCALE
    cell = n
    if SWIGLU:
        acc_up *= tl.load(scale_ptr + N + n, mask=live, other=0.0)[:, None] * INPUT_SCALE
        acc = _swiglu(acc, acc_up, KIND)
        cell = (n % 4) * (N // 4) + n // 4
        acc = _scaled(acc)
    out_at = out_ptr + tl.program_id(1) * M * N + m[None, :] * N + cell[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(m[None, :] < M) & live[:, None])

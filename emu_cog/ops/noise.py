"""Gumbel noise as data: a number for every (seed, position, code), the same in any company, pass and order.

The largest of `log p + noise` over the codes is an exact sample of p (the Gumbel-max trick), and a function of p and
the noise alone. So a picture is its seed, however many tokens a pass draws. Two slightly different p mostly give the
same code, unlike numbers that invert a cumulative distribution: drafts from an unfinished context are often right.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 2**32 - 1
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
"""Philox-4x32-10. Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011; `triton.language.philox`
and cuRAND compute the same."""
ROUNDS = 10


def random_bits(seed: Tensor, position: Tensor, codes: int) -> Tensor:
    """Philox words of (n,) int64 seeds and positions: (n, codes) int64 in [0, 2^32).

    The key is the seed; the counter is (code // 4, position, 0, 0), its word code % 4. Integers throughout: the same
    on every device.
    """
    counters = torch.arange(-(-codes // 4), device=seed.device).expand(len(seed), -1)
    even = torch.stack([counters, torch.zeros_like(counters)])
    odd = torch.stack([(position[:, None] & MASK).expand_as(counters), torch.zeros_like(counters)])
    key = torch.stack([seed & MASK, (seed >> 32) & MASK])[:, :, None]
    multipliers, increments = (
        torch.tensor(two, device=seed.device)[:, None, None] for two in (MULTIPLIERS, INCREMENTS)
    )
    for _ in range(ROUNDS):
        product = even * multipliers  # 64 bits, the sign one of them
        even = ((product >> 32) & MASK).flip(0) ^ odd ^ key
        odd = (product & MASK).flip(0)
        key = (key + increments) & MASK
    return torch.stack([even[0], odd[0], even[1], odd[1]], dim=-1).flatten(1)[:, :codes]


def gumbel(bits: Tensor) -> Tensor:
    """Random 32-bit integers to standard Gumbel noise, fp32.

    The largest values, which decide a sample, come from the smallest integers, where fp32 is finest.
    """
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def gumbel_noise(seed: Tensor, position: Tensor, codes: int) -> Tensor:
    """(n, codes) fp32 for (n,) int64 seeds and positions. Logarithms are taken row by row: a vectorized loop may end in
    other instructions than it began with, and no number may depend on the rows beside it."""
    return torch.stack([gumbel(row) for row in random_bits(seed, position, codes)])

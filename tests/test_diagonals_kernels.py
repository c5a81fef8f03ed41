"""A diagonal through Triton's kernels against plain torch: on a GPU, or else under Triton's interpreter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from _models.flashar import make_flashar
from torch.nn import functional as F

from emu_cog.engine.diagonals import DiagonalRunner
from emu_cog.engine.runner import Step
from emu_cog.model.flashar import FlashModel
from emu_cog.model.loader import load_flash_model
from emu_cog.model.quantize import quantized
from emu_cog.ops.autotune import Card, KernelConfig, default_config
from emu_cog.ops.interface import MAX_ROWS, PAGE, Batch, DiagonalState, Gates, Ops, SlotState, Weight
from emu_cog.ops.reference import TorchOps
from emu_cog.prompt.tokenizer import Tokenizer
from tests.decoder_kit import IDS
from tests.test_diagonals_captured import LastOps, sequence
from tests.test_kernels import DEVICE, anywhere, pytestmark  # noqa: F401 - a fixture and the marks of this file


def kernels(lm: FlashModel, **changes: object) -> Ops:
    from emu_cog.ops.triton_ops import TritonOps

    rows = DiagonalRunner.pass_rows
    return TritonOps(replace(default_config(lm.weights, Card.of(DEVICE), rows), **changes), lm.dtype, rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], FlashModel]:
    """`model(form)`: one layer and a vertical one beside it."""
    shape = {"layers": 1, "vertical_layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 64}
    folder = make_flashar(tmp_path_factory.mktemp("flash"), layout="u0", logit_bias={}, **shape).model
    ids = Tokenizer.load(folder).ids

    def make(form: str | None) -> FlashModel:
        return load_flash_model(folder, ids, device=DEVICE, dtype=torch.float32, quantize=form)

    return make


@torch.inference_mode()
def states(lm: FlashModel, ops: Ops, slots: list[int], *, width: int, steps: int = 3) -> list[torch.Tensor]:
    """What steps of two pictures leave behind: their cells, and by picture and step h and v."""
    lm.ops = ops
    runner = DiagonalRunner(lm, slots=3, tokens=3 * 4096)
    pictures = [sequence(runner, slot, (3, 3 + slot), top_k=9) for slot in range(2)]
    found = []
    for _ in range(steps):
        runner._device_step(torch.tensor(slots, device=DEVICE), Step(width=width))
        for s in pictures:
            s.move(1)
            count = s.doing.cells(s.made - 1)  # type: ignore[union-attr]
            found += [x[2 * s.slot : 2 * s.slot + 2, :count].clone() for x in (runner.grid.h, runner.grid.v)]
    return [runner.state.out[:2, :12], *found]


def test_two_diagonals_are_the_references(model: Callable[[str | None], FlashModel]) -> None:
    """Keys in several parts, and room for more cells than there are."""
    agree(model(None), 1e-5, [1], width=2, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "tolerance"), [(None, 1e-5), ("int8", 3e-3), ("fp8", 3e-3)])
def test_diagonals_are_the_references(
    form: str | None, tolerance: float, model: Callable[[str | None], FlashModel]
) -> None:
    """Two pictures and padding. 8-bit products take fp16; of fp8 weights also their inputs are fp8."""
    steps = 3
    if form == "fp8" and DEVICE.type == "cuda":  # tensor cores keep fewer bits of such sums
        tolerance, steps = 2e-2, 1
    agree(model(form), tolerance, [0, 1, 3], width=4, steps=steps)


def agree(lm: FlashModel, tolerance: float, slots: list[int], *, width: int, steps: int = 3) -> None:
    slow = states(lm, LastOps(), slots, width=width, steps=steps)
    fast = states(lm, kernels(lm, open_splits=2, open_queries=16), slots, width=width, steps=steps)
    assert torch.equal(slow[0], fast[0])
    assert (slow[0] > 0).sum() == sum(slot < 3 for slot in slots) * steps * (steps + 1) // 2
    for a, b in zip(slow[1:], fast[1:], strict=True):
        assert float((a - b).abs().max() / a.abs().max()) <= tolerance


@pytest.mark.slow
def test_no_cell_depends_on_the_room_of_its_pass(model: Callable[[str | None], FlashModel]) -> None:
    """To the last bit, whatever the padding and the pictures beside it, in one tile of rows or in two."""
    lm = model(None)
    ops = kernels(lm, open_splits=2, open_queries=16)
    small, large = states(lm, ops, [0, 1], width=4), states(lm, ops, [1, 3, 0, 3], width=20)
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))


@pytest.mark.slow
def test_more_rows_than_a_tile_has(model: Callable[[str | None], FlashModel]) -> None:
    """They were multiplied by PyTorch, whose sums depend on their number."""
    agree(model(None), 1e-5, [0, 1], width=MAX_ROWS // 4 + 1, steps=2)


@torch.inference_mode()
def test_a_diagonals_attention_depends_on_no_room_and_no_company() -> None:
    """To the last bit: up to three tiles of eight cells, their keys in two to eight parts, beside other diagonals."""
    from emu_cog.ops.triton_ops import TritonOps

    torch.manual_seed(3)
    counts, keys_before, dim = [1, 3, 8, 20], [70, 0, 300, 131], 16
    config = KernelConfig(linear={}, key_block=32, open_queries=16, open_splits=8)
    ops, into = TritonOps(config, torch.float32), Weight(torch.empty(1, 4 * dim))
    cache = torch.randn((2, 2, 40, PAGE, dim), device=DEVICE)
    tables = (1 + torch.randperm(39, device=DEVICE)[:32]).int().view(4, 8)
    queries = [torch.randn((count, 4, dim), device=DEVICE) for count in counts]

    def attended(drawn: list[int], width: int) -> list[torch.Tensor]:
        q, positions, last = torch.zeros((len(drawn), width, 4, dim), device=DEVICE), [], []
        for row, i in enumerate(drawn):
            q[row, : counts[i]] = queries[i]
            padding = [0] * (width - counts[i])
            positions += [keys_before[i] + n for n in range(counts[i])] + padding
            last += [keys_before[i] + counts[i] - 1] * counts[i] + padding
        at, until = torch.tensor(positions, device=DEVICE), torch.tensor(last, device=DEVICE)
        streams = torch.tensor(drawn, device=DEVICE).repeat_interleave(width)
        batch = Batch(tokens=at, positions=at, streams=streams, tables=tables, width=width, last=until)
        out = ops.attend(q.flatten(0, 1), *cache, batch, into).view(len(drawn), width, -1)
        assert out.isfinite().all()
        return [out[row, : counts[i]] for row, i in enumerate(drawn)]

    for i, count in enumerate(counts):
        alone = attended([i], count)[0]
        keys, values = (x[:, tables[i].long()].flatten(1, 2)[:, : keys_before[i] + count] for x in cache)
        expected = F.scaled_dot_product_attention(
            queries[i].transpose(0, 1), keys.repeat_interleave(2, 0), values.repeat_interleave(2, 0)
        )
        torch.testing.assert_close(alone, expected.transpose(0, 1).flatten(1), atol=1e-5, rtol=1e-4)
        assert torch.equal(attended([3, i], 24)[1], alone)
        assert torch.equal(attended([i, 2], 33 if count > 8 else 8)[0], alone)


@pytest.mark.gpu
@torch.inference_mode()
def test_prompts_multiply_in_fp8() -> None:
    """As `Weight.product` does in wider numbers, with more rows than the kernels take."""
    from emu_cog.ops.triton_ops import TritonOps

    x, weight = (torch.randn(count, 640, device=DEVICE, dtype=torch.bfloat16) for count in (700, 256))
    own = Weight(*quantized(weight, "fp8"), narrow=True)
    found = TritonOps(KernelConfig(linear={}), torch.bfloat16, 512).linear(x, own)
    torch.testing.assert_close(found, own.product(x), atol=0.3, rtol=2e-2)


@torch.inference_mode()
def test_around_a_pass_the_kernels_do_what_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures at any diagonal, a complete one, one of one row and padding; and the gates' product has one shape: with
    more than 128 rows its sums depended on the pictures beside."""
    from emu_cog.ops.triton_ops import TritonOps

    torch.manual_seed(4)
    hidden, vocabulary, width = 48, 600, 12
    state = SlotState.empty(5, pages=4, steps=600, vocabulary=vocabulary, device=DEVICE)
    state.scores = torch.zeros((6 * width, vocabulary), device=DEVICE)
    ours = (state.step, state.columns, state.total, state.seed, state.sampled, state.position)
    for own, values in zip(
        ours,
        (
            [0, 5, 11, 29, 2, 0],
            [24, 9, 24, 7, 6, 1],
            [47, 20, 47, 29, 6, 0],
            [7, 8, 9, 10, 11, 0],
            [0, 600, 0, 3, 0, 0],
            [70, 11, 20, 30, 5, 5, 64, 1, 9, 8, 0, 0],
        ),
        strict=True,
    ):
        own.copy_(torch.tensor(values))
    state.top_k.fill_(9)
    state.top_k[2] = vocabulary
    grid = DiagonalState.empty(state, cells=30, hidden=hidden, dtype=torch.float32)
    grid.rows.copy_(torch.tensor([24, 12, 24, 23, 1, 1]))
    gates = Gates(
        pair_in=torch.randn((64, 2 * hidden), device=DEVICE) / 10,
        pair_out=torch.randn((1, 64), device=DEVICE) / 10,
        pair_bias=torch.randn(1, device=DEVICE),
        corner=torch.randn((1, hidden), device=DEVICE) / 10,
        corner_bias=torch.randn(1, device=DEVICE),
    )
    for kept in (grid.h, grid.v):
        kept.copy_(torch.randn(kept.shape, device=DEVICE))
    slots = torch.tensor([1, 0, 2, 5, 3, 4], device=DEVICE)
    logits = torch.randn((len(slots) * 2 * width, vocabulary), device=DEVICE)
    h, v = torch.randn((2, len(logits), hidden), device=DEVICE)
    rows: list[int] = []
    product = torch.mm

    def counted(x: torch.Tensor, y: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return product(x, y, out=out)

    found = []
    for ops in (TorchOps(), TritonOps(KernelConfig(linear={}), torch.float32)):
        own, mine = copy.deepcopy(state), copy.deepcopy(grid)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "mm", counted)
            inputs = ops.head_input(gates, own, mine, slots, width)
            alone = ops.head_input(gates, own, mine, slots[1:2], width)
        batches = ops.sample_cells(logits, own, mine, slots, IDS, width=width, nucleus=False)
        ops.keep(own, mine, slots, h, v)
        found.append((inputs, alone, batches, own, mine))
    (slow, _, expected, one, kept), (fast, alone, batches, other, too) = found
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    assert torch.equal(alone, fast[2 * width : 4 * width])
    assert rows == [MAX_ROWS] * 3
    for a, b in zip(expected, batches, strict=True):
        for name in ("tokens", "positions", "streams", "rotary", "last", "tables"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(one.out[:5], other.out[:5])
    assert (one.out[:5] > 0).sum(dim=1).tolist() == [1, 6, 12, 0, 1]
    assert torch.equal(one.step, other.step)
    assert one.step.tolist() == [1, 6, 12, 29, 3, 0]
    assert torch.equal(kept.h, too.h)
    assert torch.equal(kept.v, too.v)
    again = ops.sample_cells(logits, copy.deepcopy(state), grid, slots, IDS, width=width, nucleus=False)
    assert torch.equal(again[0].tokens, batches[0].tokens)  # what was counted has been reset


@pytest.mark.slow
@pytest.mark.usefixtures("anywhere")
def test_all_kernels_are_built_during_setup(
    model: Callable[[str | None], FlashModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emu_cog.engine.prefill.SIZES", (16,))  # the interpreter is slow
    lm = model("int8")
    runner = DiagonalRunner.best(lm, slots=2, tokens=2 * 4096, compile=True)
    assert runner.captured
    assert not isinstance(lm.ops, LastOps)
    assert not runner.state.step.any()

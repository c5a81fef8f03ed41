"""A small decoder with random weights, and passes over a cache whose pages lie in no order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from emu_cog.engine.runner import ModelRunner
from emu_cog.engine.sequence import SequenceState
from emu_cog.model.kv_cache import PAGE, KVCache
from emu_cog.model.qwen3 import LanguageModel, destinations, empty_weights
from emu_cog.ops.interface import Batch, Span, Weight
from emu_cog.ops.reference import TorchOps
from emu_cog.prompt.tokens import ROLES, TokenIds

_ROLES: Any = {role: at for at, role in enumerate(ROLES)}
IDS = TokenIds(**_ROLES, digits=tuple(range(20, 30)), star=30, visual=100, visual_count=100)


def random_model(
    dtype: torch.dtype = torch.float32, *, device: str = "cpu", form: str | None = None, **config: Any
) -> tuple[LanguageModel, Qwen3ForCausalLM]:
    """Two layers, six query heads over two for keys, norms that differ from one; and transformers' own, in fp32 on the
    CPU."""
    shape = Qwen3Config(
        **{
            "vocab_size": IDS.vocab_size,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            **config,
        }
    )
    torch.manual_seed(0)
    plain = Qwen3ForCausalLM(shape).eval()
    for name, weight in plain.named_parameters():
        weight.data = 1 + 0.3 * torch.randn_like(weight) if "norm" in name else 3 * weight.data
    weights = empty_weights(shape, IDS, dtype=dtype, place=lambda key: torch.device(device), quantize=form)
    state = plain.state_dict()
    for key, fill in destinations(shape, weights, form):
        fill(state[key].to(dtype))
    return LanguageModel(shape, weights, IDS), plain


def paged(lm: LanguageModel, spans: Sequence[tuple[int, int]], *, padding: int = 0) -> tuple[Batch, KVCache]:
    """`count` random tokens from position `start` of each stream, given as (start, count), then `padding` rows; and a
    cache full of noise. The same numbers on every device."""
    generator = torch.Generator().manual_seed(1)
    needed = [-(-(start + count) // PAGE) for start, count in spans]
    cache = KVCache(lm.config, pages=1 + sum(needed), dtype=lm.dtype, devices=lm.devices)
    for buffer in (*cache.keys, *cache.values):
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    order = (1 + torch.randperm(sum(needed), generator=generator)).int()
    tables = torch.zeros((len(spans) + 1, max(needed)), dtype=torch.int32)
    for table, pages in zip(tables, order.split(needed), strict=False):
        table[: len(pages)] = pages
    counts = torch.tensor([count for _, count in spans] + [padding])
    batch = Batch(
        tokens=torch.randint(0, IDS.vocab_size, (int(counts.sum()),), generator=generator),
        positions=torch.cat(
            [torch.arange(start, start + count) for start, count in spans] + [counts.new_zeros(padding)]
        ),
        streams=torch.arange(len(spans) + 1).repeat_interleave(counts),
        tables=tables,
        spans=tuple(Span(stream, start, count) for stream, (start, count) in enumerate(spans)),
    )
    return batch.to(lm.device), cache


def run_uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that would be captured as CUDA graphs are run instead, at each replay."""

    def record(self: ModelRunner, work: Callable[[], None], name: str) -> Callable[[], None]:
        return work

    monkeypatch.setattr(ModelRunner, "_record", record)


def logged_steps(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A log that gets "step" for each step, and "n later" where tokens are shown n steps after they were read."""
    log: list[str] = []
    step, read = runner.step, runner.read

    def counted(sequences: Sequence[SequenceState], width: int = 1) -> torch.Tensor:
        log.append("step")
        return step(sequences, width)

    def later(begun: Sequence[tuple[SequenceState, int]]) -> Callable[[], list[tuple[int, ...]]]:
        rows, at = read(begun), log.count("step")

        def shown() -> list[tuple[int, ...]]:
            log.append(f"{log.count('step') - at} later")
            return rows()

        return shown

    monkeypatch.setattr(runner, "step", counted)
    monkeypatch.setattr(runner, "read", later)
    return log


def tokenwise(batch: Batch) -> Batch:
    """The batch with a span for each token, read from the device."""
    pairs = zip(batch.streams.tolist(), batch.positions.tolist(), strict=True)
    return replace(batch, spans=tuple(Span(stream, position, 1) for stream, position in pairs))


class TokenwiseOps(TorchOps):
    """TorchOps that read spans from the device, as kernels do: each token for itself."""

    def attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, into: Weight
    ) -> torch.Tensor:
        return super().attend(q, keys, values, tokenwise(batch), into)

"""The memory estimate that is logged before anything is loaded, and what follows from it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from _models import tiny
from transformers import Qwen3Config

from emu_cog.errors import InputError
from emu_cog.memory import GIB, Budget
from emu_cog.model.kv_cache import PAGE, KVCache
from emu_cog.pipeline import Pipeline
from emu_cog.settings import Settings

Checkpoints = Callable[[str], tiny.TinyFolders]


def a100(**changes: float) -> Budget:
    """The released model in bf16 on an A100 80 GB: 34.1 B parameters, 455 M of vision tokenizer in fp32."""
    figures = {"available": 79 * GIB, "weights": 34.1e9 * 2, "vision": 455e6 * 4, "workspace": 5.5 * GIB}
    return Budget(device="cuda:0", per_token=2 * 256 * 1024, **(figures | changes))


def test_a_cached_token_takes_what_the_facts_say() -> None:
    config = Qwen3Config(num_hidden_layers=64, num_key_value_heads=8, head_dim=128, num_attention_heads=64)
    assert KVCache.bytes_per_token(config, torch.bfloat16) == 256 * 1024
    cache = KVCache(
        Qwen3Config(num_hidden_layers=2, num_key_value_heads=3, head_dim=4, num_attention_heads=3),
        pages=5,
        dtype=torch.float32,
        devices=[torch.device("cpu")] * 2,
    )
    held = sum(buffer.numel() * 4 for buffer in (*cache.keys, *cache.values))
    assert held == 5 * PAGE * KVCache.bytes_per_token(
        Qwen3Config(num_hidden_layers=2, num_key_value_heads=3, head_dim=4, num_attention_heads=3), torch.float32
    )


def test_one_picture_fits_an_a100_and_the_full_context_does_not() -> None:
    budget = a100()
    budget.check(6000, 1)
    with pytest.raises(
        InputError, match=r"63\.52.*16\.00 \(1 output\(s\) of 32768 tokens\).*of 79\.00 on cuda:0.*EMU_QUANTIZE"
    ):
        budget.check(32768, 1)
    assert a100(weights=34.1e9).outputs(32768) == 2  # 8-bit weights make room for the whole context
    assert budget.tokens(2) == budget.tokens(1) // 2


def test_a_model_larger_than_the_device_is_refused_with_the_numbers() -> None:
    with pytest.raises(InputError, match=r"not enough memory: weights 63\.52 GiB.*of 24\.00 on cuda:0"):
        a100(available=24 * GIB).check(6000, 1)
    assert a100(available=24 * GIB).tokens() == 0


def test_the_estimate_is_logged_before_loading(make_checkpoint: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    folders = make_checkpoint("picture")
    with caplog.at_level(logging.INFO, logger="emu_cog"):
        Pipeline.load(folders.model, folders.vision, device="cpu", max_context=2000, max_outputs=3)
    assert "(3 output(s) of 2000 tokens)" in caplog.text
    assert "3 picture(s) of 1653 tokens at once; a sequence may hold 2000, prompt and pictures" in caplog.text
    with pytest.raises(InputError, match="not enough memory"):
        Pipeline.load(folders.model, folders.vision, device="cpu", max_context=10**10)


def test_as_many_pictures_run_at_once_as_fit() -> None:
    budget = a100(picture=6000)
    assert budget.outputs(6000) == 2
    assert [budget.slots(most=most) for most in (1, 2, 32)] == [1, 2, 2]
    assert a100(picture=6000, weights=34.1e9).slots(most=32) == 13
    assert a100(picture=6000, available=70 * GIB).slots(most=32) == 1, "a tight one still begins"


@pytest.mark.parametrize(("max_outputs", "slots"), [(None, 8), (3, 3), (100, 32)])
def test_slots_of_the_runner(max_outputs: int | None, slots: int, make_checkpoint: Checkpoints) -> None:
    """Eight outputs are a pass of a CPU; 32 of the kernels."""
    folders = make_checkpoint("picture")
    pipeline = Pipeline.load(folders.model, folders.vision, device="cpu", max_outputs=max_outputs, max_context=500)
    assert pipeline.runner.slots == slots
    assert pipeline.runner.tokens == slots * 500
    assert pipeline.budget.picture == 500


@pytest.mark.parametrize("value", ["0", "-5", "many", "1.5"])
def test_nonsense_settings_are_refused(value: str) -> None:
    with pytest.raises(InputError, match=f"EMU_MAX_CONTEXT='{value}'"):
        Settings.from_env({"EMU_MAX_CONTEXT": value})


def test_settings_come_from_the_environment() -> None:
    settings = Settings.from_env({"EMU_CHECKPOINT": "image", "EMU_MAX_OUTPUTS": "2", "EMU_DTYPE": "", "HF_TOKEN": "x"})
    assert (settings.checkpoint, settings.max_outputs, settings.dtype) == ("image", 2, None)
    assert settings.environ["HF_TOKEN"] == "x"
    assert "HF_TOKEN" not in repr(settings)

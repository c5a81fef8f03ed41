"""Several image tokens a pass: the noise, the drafts, and the same answer as with one token a pass."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from _models.tiny import TinyFolders
from scipy import stats

from emu_cog.engine.engine import Engine
from emu_cog.engine.runner import ModelRunner
from emu_cog.engine.sequence import Draw, SequenceState, Stats
from emu_cog.engine.window import FIRST_CHANCE, Acceptance, best_width, expected_tokens
from emu_cog.errors import InputError
from emu_cog.ops.interface import SlotState
from emu_cog.ops.noise import INCREMENTS, MASK, MULTIPLIERS, gumbel, gumbel_noise, random_bits
from emu_cog.ops.reference import accept
from emu_cog.ops.sampling import keep_top_k, keep_top_p
from emu_cog.pipeline import Pipeline
from emu_cog.request import Request
from emu_cog.settings import Settings
from tests.conftest import photo
from tests.decoder_kit import IDS, random_model
from tests.test_engine import CASES, answers, prepare

Pipelines = Callable[[str], Pipeline]

# -- the noise --------------------------------------------------------------------------------------------------------


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox-4x32-10 in whole numbers, as the paper writes it."""
    (a, b), (x0, x1, x2, x3), (k0, k1) = MULTIPLIERS, counter, key
    for _ in range(10):
        x0, x1, x2, x3 = (b * x2 >> 32) ^ x1 ^ k0, b * x2 & MASK, (a * x0 >> 32) ^ x3 ^ k1, a * x0 & MASK
        k0, k1 = (k0 + INCREMENTS[0]) & MASK, (k1 + INCREMENTS[1]) & MASK
    return x0, x1, x2, x3


KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
"""Source: kat_vectors of the authors' library Random123."""


def test_the_bits_are_philox() -> None:
    for counter, key, words in KNOWN:
        assert philox(counter, key) == words
    seeds, positions = [0, 1, 2**32 + 5, 2**63 - 1], [0, 7, 4159, 2**20]
    bits = random_bits(torch.tensor(seeds), torch.tensor(positions), 10)
    for row, seed, position in zip(bits.tolist(), seeds, positions, strict=True):
        words = [philox((i, position, 0, 0), (seed & MASK, seed >> 32)) for i in range(3)]
        assert row == [word for four in words for word in four][:10]


def test_the_noise_of_the_smallest_and_the_largest_number_is_finite() -> None:
    """And the largest noise, which decides samples, is exact: 1 - u would be 1 for the smallest numbers."""
    bits = torch.tensor([0, 1, 2**31, MASK])
    exact = -np.log(-np.log1p(-np.minimum((bits.numpy() + 0.5) / 2.0**32, 1 - 2.0**-24)))
    np.testing.assert_allclose(gumbel(bits).numpy(), exact, rtol=2e-6)
    assert gumbel(bits).isfinite().all()


def test_no_noise_depends_on_the_rows_beside_it() -> None:
    seeds, positions = torch.arange(7), 3 * torch.arange(7)
    together = gumbel_noise(seeds, positions, 1001)
    for i in range(7):
        assert torch.equal(gumbel_noise(seeds[i : i + 1], positions[i : i + 1], 1001)[0], together[i])


@pytest.mark.parametrize("by", ["position", "seed"])
def test_samples_follow_the_filtered_distribution(by: str) -> None:
    """100,000 samples of consecutive positions of a seed, or of consecutive seeds: chi-square."""
    count, codes = 100_000, 64
    scores = 1.5 * torch.randn(1, codes, generator=torch.Generator().manual_seed(1))
    kept = keep_top_p(keep_top_k(scores, 40), 0.97)
    probs = kept.softmax(-1)[0].double()
    assert 10 < int((probs > 0).sum()) < 40
    numbers, other = torch.arange(count), torch.full((count,), 5)
    seeds, positions = (other, numbers) if by == "position" else (numbers, other)
    bits = random_bits(seeds, positions, codes)
    found = torch.bincount((kept + gumbel(bits)).argmax(-1), minlength=codes).double()
    assert found[probs == 0].sum() == 0
    expected = count * probs[probs > 0]
    chi_square = float(((found[probs > 0] - expected) ** 2 / expected).sum())
    assert chi_square < stats.chi2.ppf(0.9999, len(expected) - 1)


# -- drafts -----------------------------------------------------------------------------------------------------------


def picture(*, drafts: list[int], columns: int, total: int) -> SlotState:
    state = SlotState.empty(1, pages=1, steps=20, vocabulary=IDS.visual_count, device=torch.device("cpu"))
    state.columns[0], state.total[0] = columns, total
    state.out[0, : len(drafts)] = torch.tensor(drafts)
    return state


def codes(*numbers: int) -> torch.Tensor:
    return torch.tensor([numbers])


def test_tokens_are_kept_up_to_the_first_that_a_wrong_draft_led_to() -> None:
    v = IDS.visual
    state = picture(drafts=[v + 1, v + 2, IDS.eol, v + 9], columns=2, total=6)
    accept(state, torch.tensor([0]), codes(1, 2, 77, 3), IDS)
    # The drafts 1 and 2 were right, and EOL, which the grammar forces; 9 was not, so what came after it is lost.
    assert state.step[0] == 4
    assert state.token[:2].tolist() == [v + 3, v + 3]
    assert state.position[:2].tolist() == [4, 4]
    assert state.out[0, :6].tolist() == [v + 1, v + 2, IDS.eol, v + 3, v + 3, IDS.eoi]
    tokens, positions, streams = state.fed(torch.tensor([0]), 4)
    assert tokens[0].tolist() == [[v + 3, v + 3, IDS.eoi, 0]] * 2
    assert positions[0].tolist() == [[4, 5, 0, 0]] * 2  # EOI ends the picture: nothing follows it
    assert streams[0].tolist() == [[0, 0, 2, 2], [1, 1, 2, 2]]
    accept(state, torch.tensor([0]), codes(3, 8, 8, 8), IDS)
    assert state.step[0] == 6
    assert state.token[0] == IDS.eoi


def test_a_wrong_first_draft_costs_nothing() -> None:
    v = IDS.visual
    state = picture(drafts=[v + 1, v + 2, v + 3], columns=9, total=10)
    accept(state, torch.tensor([0]), codes(5, 6, 7), IDS)
    assert state.step[0] == 1
    assert state.out[0, :6].tolist() == [
        v + 5,
        v + 6,
        v + 7,
        v + 7,
        v + 7,
        v + 7,
    ]  # drafts, and for new places the last


def test_expected_tokens_and_their_chance() -> None:
    assert expected_tokens(0.0, 8) == 1
    assert expected_tokens(1.0, 8) == 8
    assert expected_tokens(0.5, 3) == 1.75
    seen = Acceptance()
    assert seen.chance == FIRST_CHANCE
    for _ in range(300):
        seen.add(2, passes=1, width=8)  # half of the drafts
    assert seen.chance == pytest.approx(0.5, abs=0.01)
    for _ in range(300):
        seen.add(8, passes=1, width=8)
    assert seen.chance > 0.99
    seen.add(1, passes=1, width=1)  # tests no draft
    assert seen.chance > 0.99


def test_the_width_follows_cost_and_chance() -> None:
    flat, steep = {1: 1.0, 8: 1.05, 32: 1.2}, {1: 1.0, 8: 4.0, 32: 16.0}
    assert best_width(flat, [0.9]) == 32
    assert best_width(flat, [0.6]) == 8
    assert best_width(flat, [0.01]) == 1
    assert best_width(steep, [0.7]) == 1
    assert best_width(flat, [0.9, 0.1]) == 32


# -- whole answers ----------------------------------------------------------------------------------------------------


def any_width(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Another width at each pass, up to twice what the engine takes."""
    rng = random.Random(seed)

    def width(self: Engine, sequences: list[SequenceState]) -> int:
        drawing = sum(isinstance(s.doing, Draw) for s in sequences)
        return rng.choice([w for w in (1, 2, 3, 4, 7, 8, 16) if w * drawing <= 64]) if drawing else 1

    monkeypatch.setattr(Engine, "_width", width)


@pytest.mark.parametrize("name", CASES)
def test_any_widths_give_the_same_answer(name: str, pipelines: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    model, request = CASES[name]
    pipeline = pipelines(model)
    output, config = prepare(pipeline, request)
    monkeypatch.setattr(pipeline.engine, "decoding", "sequential")
    expected = list(pipeline.engine.generate([output], config))
    any_width(monkeypatch, seed=1)
    found = list(pipeline.engine.generate([output], config))
    assert answers(found) == answers(expected)
    one, several = (next(e for e in events if isinstance(e, Stats)) for events in (expected, found))
    assert one.sampled == several.sampled
    assert several.passes <= one.passes
    made = sum(token >= pipeline.lm.ids.visual for token in answers(expected)[0])
    assert one.passes >= made or not made


@pytest.mark.slow
def test_200_requests_at_any_widths(pipelines: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tasks, sizes and filters, five at a time in any company."""
    rng = random.Random(4)
    requests = []
    for i in range(200):
        task = rng.choice(("t2i", "x2i", "howto", "story", "explore", "vla"))
        model = "picture" if task in ("t2i", "x2i") else "storyteller"
        photos = tuple(photo(rng.randint(1, 9), 64, 64) for _ in range(rng.randint(*REFERENCES[task])))
        request = Request(
            prompt=f"a boat {i}",
            task=task,
            images=photos,
            image_area=48 * 48,
            size=(rng.randint(1, 9), rng.randint(1, 9)),
            seed=i,
            guidance_scale=rng.choice((1.0, 2.0, 5.0)),
            image_top_k=rng.choice((0, 1, 9, 50)),
            image_top_p=rng.choice((None, None, 0.7)),
            image_temperature=rng.choice((0.5, 1.0, 1.3)),
            max_new_tokens=60,
        )
        requests.append((model, request))
    engines = {model: pipelines(model).engine for model in ("picture", "storyteller")}
    for engine in engines.values():
        monkeypatch.setattr(engine, "decoding", "sequential")
    prepared = [(engines[model], *prepare(pipelines(model), request)) for model, request in requests]
    expected = [answers(list(engine.generate([output], config))) for engine, output, config in prepared]
    any_width(monkeypatch, seed=2)
    for at in range(0, 200, 5):
        running = [engine.submit([output], config) for engine, output, config in prepared[at : at + 5]]
        assert [answers(list(one.events())) for one in running] == expected[at : at + 5], at


REFERENCES = {"t2i": (0, 0), "x2i": (1, 3), "howto": (0, 1), "story": (0, 1), "explore": (0, 1), "vla": (0, 1)}


def test_auto_takes_widths_that_were_measured(pipelines: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = pipelines("picture").runner
    monkeypatch.setattr(runner, "_seconds", {})
    before = copy.deepcopy(runner.state)
    seconds = runner.seconds(1)
    assert seconds.keys() <= set(runner.widths(1))
    assert min(seconds.values()) > 0
    assert runner.widths(1)[0] == 1
    for sequences in (1, 2, 5, 8):
        assert runner.widths(sequences)[-1] * sequences <= 32
        assert runner.seconds(sequences).keys() == set(runner.widths(sequences))  # one a pass among them
    for name in ("token", "position", "step", "out"):  # measuring has moved nothing
        assert torch.equal(getattr(runner.state, name), getattr(before, name)), name


@pytest.mark.parametrize(("form", "most"), [(None, 64), ("int8", 32)])
def test_8_bit_kernels_get_narrower_passes(form: str | None, most: int) -> None:
    runner = ModelRunner(random_model(form=form)[0], slots=4, tokens=600)
    runner.captured = True
    assert [runner.widths(n)[-1] for n in (1, 2, 3, 4)] == [most, most // 2, most // 4, most // 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "form"), [("bfloat16", None), ("float16", None), ("float32", "int8"), ("bfloat16", "fp8")]
)
def test_any_widths_give_the_same_answer_in_other_formats(
    dtype: str, form: str | None, make_checkpoint: Callable[[str], TinyFolders], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = make_checkpoint("picture")
    pipeline = Pipeline.load(
        folders.model, folders.vision, device="cpu", dtype=dtype, quantize=form, decoding="sequential"
    )
    requests = [
        Request(
            prompt=f"a boat {i}", size=(3 + i % 5, 4 + i % 3), seed=i, guidance_scale=1.0 + i % 4, image_top_k=9 * i
        )
        for i in range(12)
    ]
    prepared = [prepare(pipeline, request) for request in requests]
    expected = [answers(list(pipeline.engine.generate([output], config))) for output, config in prepared]
    any_width(monkeypatch, seed=3)
    running = [pipeline.engine.submit([output], config) for output, config in prepared]
    assert [answers(list(one.events())) for one in running] == expected


@pytest.mark.parametrize("value", ["auto", "sequential", "parallel"])
def test_the_environment_chooses_the_decoding(value: str) -> None:
    assert Settings.from_env({"EMU_DECODING": value}).decoding == value
    assert Settings.from_env({}).decoding == "auto"


def test_another_decoding_is_refused() -> None:
    with pytest.raises(InputError, match="EMU_DECODING='fast' must be auto, sequential or parallel"):
        Settings.from_env({"EMU_DECODING": "fast"})


def test_parallel_takes_fewer_passes_for_the_same_picture(
    pipelines: Pipelines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told apart by the metric: forced tokens alone save some with random weights."""
    pipeline = pipelines("picture")
    found = {}
    for decoding in ("sequential", "parallel"):
        monkeypatch.setattr(pipeline.engine, "decoding", decoding)
        events = list(pipeline.stream(replace(CASES["t2i, plain"][1])))
        found[decoding] = (events[0].codes if hasattr(events[0], "codes") else None, events[-1].passes)
    assert found["sequential"][0] == found["parallel"][0]
    assert found["parallel"][1] < found["sequential"][1] == 3 * 5

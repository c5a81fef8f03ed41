"""The miniature's training: token sequences as in inference, the training model, resuming, and export."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from emu_cog.model.kv_cache import PAGE
from emu_cog.model.loader import load_language_model
from emu_cog.model.qwen3 import Chunk
from emu_cog.prompt.prompts import build
from emu_cog.prompt.segments import ImageCodes, Reader
from emu_cog.prompt.tasks import TABLE, UNCONDITIONAL
from emu_cog.prompt.tokenizer import Tokenizer
from emu_cog.weights.store import MINIATURE
from scripts.mini.render import Batch
from scripts.mini.tasks import MAKERS, sample
from scripts.mini.tasks.sample import TextPart
from scripts.mini.train import encode, export, fused, vocabulary
from scripts.mini.train.examples import Data
from scripts.mini.train.language_model import LanguageModel, Shape
from scripts.mini.train.muon import orthogonal
from scripts.mini.train.sequences import BLANK, SHARES, Mix, chunk, draw, sequence
from scripts.mini.train.train_language import Gradients, Training, rate_at, read_weights

CODES = 2048
SIZE = (12, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer files trained on few sentences."""
    path = tmp_path_factory.mktemp("vocabulary")
    tokens = vocabulary.ranks(vocabulary.corpus(60, 3), 400)
    vocabulary.write(path, tokens, CODES)
    return path


@pytest.fixture(scope="module")
def words(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def grids(count: int, first: int) -> list[list[list[int]]]:
    """The blanks of `count` pictures, numbered from `first`."""
    rows, columns = SIZE
    return [
        [[BLANK + first + (n * rows + r) * columns + c for c in range(columns)] for r in range(rows)]
        for n in range(count)
    ]


@pytest.mark.parametrize("task", list(MAKERS))
def test_a_training_sequence_is_the_inference_prompt_and_a_readable_answer(task: str, words: Tokenizer) -> None:
    rng, ids = Random(4), words.ids
    for _ in range(6):
        made = sample(rng, task, *SIZE)
        line, learn = sequence(made, words, SIZE, 100, with_text=True)
        given, drawn = len(made.references), len(made.pictures)
        every = grids(given + drawn, 100)
        prompt = build(TABLE[task], made.question, every[:given], words).conditional
        assert tuple(line[: len(prompt)]) == prompt
        assert not any(learn[: len(prompt)])
        assert all(learn[len(prompt) :])
        assert line[-1] == ids.eos

        # the reader returns texts and pictures in order; blanks are mapped to valid codes first
        answer = [i if i < ids.visual else ids.visual + (i - ids.visual) % CODES for i in line[len(prompt) :]]
        reader = Reader(words, output=0)
        segments = [*reader.feed(answer), *reader.finish()]
        expected = iter(every[given:])
        for part, segment in zip(made.answer, segments, strict=True):
            if isinstance(part, TextPart):
                assert (segment.text, segment.kind) == (part.text, part.kind)
            else:
                assert isinstance(segment, ImageCodes)
                assert [list(row) for row in segment.codes] == [[c % CODES for c in row] for row in next(expected)]


@pytest.mark.parametrize("task", list(MAKERS))
def test_an_unconditional_sequence_is_its_prompt_and_image_blocks(task: str, words: Tokenizer) -> None:
    rng, ids = Random(6), words.ids
    for _ in range(4):
        made = sample(rng, task, *SIZE)
        line, learn = sequence(made, words, SIZE, 0, with_text=False)
        given, drawn = len(made.references), len(made.pictures)
        every = grids(given + drawn, 0)
        prompt = build(TABLE[task], made.question, every[:given], words).unconditional
        blocks = [i for grid in every[given:] for i in ids.image_block(grid)]
        assert line == [*prompt, *blocks]
        assert all(i >= ids.visual for i, marked in zip(line, learn, strict=True) if marked)
        assert sum(learn) == drawn * SIZE[0] * SIZE[1]
        if not given:
            assert words.decode(prompt[1:-1]) == "".join(UNCONDITIONAL)


def test_chunks_are_reproducible_by_seed_and_contain_all_tasks(folder: Path) -> None:
    one, two, other = (chunk((seed, 60, folder, Mix())) for seed in (5, 5, 6))
    assert one.ids.tolist() == two.ids.tolist()
    assert one.ids.tolist() != other.ids.tolist()
    assert sum(one.lengths) == len(one.ids) == len(one.learn)
    visual = Tokenizer.load(folder).ids.visual
    assert int((one.ids >= visual + BLANK).sum()) == one.blanks
    assert sum(len(batch.head) for batch, _ in one.scenes.values()) > 60


def test_shares_select_the_tasks(folder: Path) -> None:
    only = encode.shares('{"explore": 2, "vla": 0}')
    rng = Random(3)
    assert {draw(rng, Mix(only))[0].task for _ in range(20)} == {"explore"}
    assert {draw(rng, Mix())[0].task for _ in range(200)} == set(SHARES)


def test_many_raises_the_fraction_of_hard_t2i_samples() -> None:
    def things(many: float) -> list[int]:
        rng = Random(3)
        return [len(draw(rng, Mix({"t2i": 1}, many))[0].specs[-1].wanted) for _ in range(150)]

    assert min(things(1.0)) >= 3
    shares = [sum(count >= 3 for count in things(many)) / 150 for many in (0.0, 0.5)]
    assert 0.2 < shares[0] < 0.55
    assert shares[0] + 0.15 < shares[1] < 0.95


@pytest.mark.parametrize("text", ['{"fly": 1}', '{"t2i": -1}', '{"t2i": 0.5}', '{"t2i": true}', "{}", "[1]"])
def test_invalid_shares_are_rejected(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="t2i, x2i, howto, story, explore, vla"):
        encode.shares(text)


class _Numbered:
    """Fake vision tokenizer: a picture's codes count up from its noise seed."""

    def codes(self, batch: Batch, final: tuple[int, int], reencoded: bool) -> np.ndarray:
        cells = np.arange(final[0] * final[1])
        return (batch.head[:, 2:3].astype(np.int64) + cells) % CODES


def test_every_blank_is_filled_from_its_own_picture(folder: Path) -> None:
    """Sequences rebuilt one by one from the same seed equal those of the chunk."""
    count, seed, words = 25, 8, Tokenizer.load(folder)
    visual = words.ids.visual
    part = chunk((seed, count, folder, Mix()))
    ids = encode.fill(part, _Numbered(), visual)  # type: ignore[arg-type]
    assert ids.max() < visual + CODES

    rng, begin = Random(seed), 0
    for length in part.lengths:
        made, final, with_text, _ = draw(rng, Mix())
        line, learn = sequence(made, words, final, 0, with_text=with_text)
        cells = final[0] * final[1]
        scenes = [*made.references, *made.pictures]
        expected = []
        for i in line:
            blank = i - visual - BLANK
            expected.append(i if blank < 0 else visual + (scenes[blank // cells].seed + blank % cells) % CODES)
        assert ids[begin : begin + length].tolist() == expected
        assert part.learn[begin : begin + length].tolist() == learn
        begin += length


def test_shards_are_written_atomically_and_later_ones_are_loaded(tmp_path: Path) -> None:
    def rows(value: int, count: int) -> encode.Rows:
        line, mask = np.full(150, value, np.int32), np.ones(150, np.uint8)
        return {180: [(line, mask)] * count, 210: [(np.full(200, value, np.int32), np.ones(200, np.uint8))]}

    data = Data(tmp_path, torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="run encode first"):
        data.wait(0.0)
    encode.write(tmp_path / encode.shard_name(1, 0), rows(1, 3), pad=7)
    assert sorted(p.name for p in tmp_path.iterdir()) == [encode.shard_name(1, 0)]
    data.wait(0.0)
    assert (data.samples, not data.refresh()) == (4, True)
    encode.write(tmp_path / encode.shard_name(12345, 0), rows(2, 2), pad=7)
    assert data.refresh()
    assert data.samples == 7
    ids, learn = data.buckets[180].draw(5)
    assert sorted(ids[:, 0].tolist()) == [1, 1, 1, 2, 2]
    assert ids[:, 150:].unique().tolist() == [7]
    assert learn.sum(1).tolist() == [150] * 5
    lengths, weights = data.weights()
    assert dict(zip(lengths, weights, strict=True)) == pytest.approx({180: 900 / 1320, 210: 420 / 1320})
    assert [encode.complete_shards(tmp_path, seed) for seed in (1, 12345, 3)] == [1, 1, 0]


def test_the_training_model_gives_the_logits_of_the_exported_one(words: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = Shape(
        vocab_size=words.ids.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16
    )
    model = LanguageModel(shape, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.1 * torch.randn_like(p)).bfloat16())  # no identity layers, and values exact in bf16
    model.save(tmp_path, shard_bytes=200_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1

    loaded = load_language_model(tmp_path, words.ids, device=torch.device("cpu"), dtype=torch.float32, device_map=None)
    tokens = torch.randint(0, words.ids.vocab_size, (2, 37))
    cache = loaded.new_cache(2 * PAGE)
    hidden = loaded.feed(cache, [Chunk(row, 0, cache.take(1)) for row in tokens.tolist()])
    x = model.hidden(tokens)
    logits = torch.nn.functional.linear(_normed(x, model), model.head).view(2 * 37, -1)
    visual = words.ids.visual
    torch.testing.assert_close(loaded.text_logits(hidden), logits[..., :visual], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(loaded.visual_logits(hidden), logits[..., visual:], atol=2e-4, rtol=2e-4)


def _normed(x: torch.Tensor, model: LanguageModel) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * model.norm


def test_released_state_round_trips(words: Tokenizer) -> None:
    shape = Shape(vocab_size=words.ids.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    one, two = (LanguageModel(shape, dtype=torch.float32) for _ in range(2))
    two.load_released(one.released_state())
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a.bfloat16().float(), b), name


def test_unmasked_tokens_do_not_contribute_to_the_loss() -> None:
    shape = Shape(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=16)
    torch.manual_seed(1)
    model = LanguageModel(shape, dtype=torch.float32)
    tokens = torch.randint(0, 50, (2, 9))
    learn = torch.zeros(2, 9, dtype=torch.uint8)
    learn[:, 4:7] = 1
    loss, each = model.loss(tokens, learn)
    # token t is predicted from t - 1: the mask shifts one position to the left
    assert (each != 0).sum(1).tolist() == [3, 3]
    assert each[:, 3:6].bool().all()
    assert loss.item() == pytest.approx(each[:, 3:6].mean().item(), rel=1e-5)


@pytest.mark.slow
def test_encode_resumes_after_existing_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "SAMPLES_PER_CHUNK", 2)
    monkeypatch.setattr(encode, "HELD_OUT_SAMPLES", 2)
    monkeypatch.setattr(encode.Encoder, "BATCH", 8)
    monkeypatch.setattr(encode.Encoder, "SMALL_BATCH", 4)
    arguments = ["encode", "--vision", str(MINIATURE / "vision"), "--vocabulary", str(folder), "--out", str(tmp_path)]

    def run(samples: int) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", [*arguments, "--samples", str(samples), "--seed", "7"])
        encode.main()
        return json.loads((tmp_path / encode.LOG).read_text().splitlines()[-1])

    assert run(8)["parts"] == 2
    first, second = (tmp_path / encode.shard_name(7, n) for n in range(2))
    whole, before = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()  # as if interrupted there
    assert run(8)["samples"] == 8
    assert second.read_bytes() == whole
    assert first.stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="holds all 2 shards of seed 7"):
        run(8)


SMALL = Shape(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32,
)  # fmt: skip


def training(folder: Path, *, seed: int = 1) -> Training:
    """A small training on sequences that count up, which are learned quickly."""
    data_folder = folder / "data"
    if not data_folder.exists():
        data_folder.mkdir()
        for name, first in ((encode.HELD_OUT, 5), (encode.shard_name(1, 0), 0)):
            ids = (first + np.arange(64)[:, None] + np.arange(96)) % 280
            np.savez(data_folder / name, ids_96=ids.astype(np.int16), learn_96=np.ones_like(ids, np.uint8))
    torch.manual_seed(seed)
    model = LanguageModel(SMALL, dtype=torch.float32)
    data = Data(data_folder, torch.device("cpu"))
    assert data.refresh()
    return Training(
        model, Gradients(model, [96], 768, captured=False), data, folder / "out", rate=3e-3, decay=0.05, tokens=768,
        visual=200, seed=seed,
    )  # fmt: skip


def test_a_stopped_training_resumes_from_its_state(tmp_path: Path) -> None:
    first = training(tmp_path)
    take = first.gradients

    def eight(ids: torch.Tensor, learn: torch.Tensor) -> torch.Tensor:
        if first.state.steps == 7:
            first.stop()  # as SIGTERM does
        return take(ids, learn)

    first.gradients = eight  # type: ignore[assignment]
    told = first.run(steps=30, seconds=1000)
    assert (told["finished"], told["steps"]) == (False, 8)
    weights = {name: value.clone() for name, value in first.model.state_dict().items()}

    again = training(tmp_path, seed=2)  # another seed: its own initialization must be replaced
    assert again.state.steps == 8
    assert again.state.seconds == pytest.approx(first.state.seconds)
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())
    momenta = [list(o.state_dict()["state"].values()) for o in (first.optims[0], again.optims[0])]
    assert momenta[0]
    torch.testing.assert_close(momenta[0], momenta[1])
    told = again.run(steps=30, seconds=1000)
    assert (told["finished"], told["steps"]) == (True, 30)
    assert training(tmp_path).run(steps=30, seconds=1000)["steps"] == 30, "a finished training has nothing to do"


def test_the_best_weights_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = training(tmp_path)
    losses = iter([2.0, 1.0, 1.5])
    monkeypatch.setattr(
        "scripts.mini.train.train_language.held_out_loss", lambda *_: {"picture": next(losses), "other": 0.0}
    )
    for step in range(3):
        with torch.no_grad():
            made.model.embed.fill_(step)
        made.save()
    assert made.state.best == 1.0
    kept = read_weights(tmp_path / "out")["model.embed_tokens.weight"]
    assert (kept == 1).all(), "the second was the best"
    assert (training(tmp_path).model.embed == 2).all(), "the training itself goes on from the last"
    assert [path.name for path in (tmp_path / "out").glob("*.unfinished")] == []


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    assert rate_at(0.0, 0, 3.0) == pytest.approx(0.02)
    assert rate_at(0.1, 149, 3.0) == rate_at(0.3, 1000, 3.0) == 3.0
    assert rate_at(0.65, 2000, 3.0) == pytest.approx(1.5)
    assert rate_at(1.0, 3000, 3.0) == 0.0


def test_the_muon_update_is_nearly_orthogonal() -> None:
    torch.manual_seed(2)
    for shape in ((3, 24, 64), (3, 64, 24)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.4


@pytest.mark.skipif(not (MINIATURE / "model").is_dir(), reason="this package holds no trained miniature")
def test_export_over_the_size_limit_keeps_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = tmp_path / "model/config.json"
    held.parent.mkdir()
    held.write_text("{}")
    sources = (MINIATURE / "vision", MINIATURE / "model", MINIATURE / "model")
    monkeypatch.setattr(export, "LIMIT", 10**6)
    with pytest.raises(SystemExit, match="nothing was changed: .* over the limit of 1000000"):
        export.copy(*sources, tmp_path, {})
    assert list(tmp_path.rglob("*")) == [held.parent, held]
    monkeypatch.undo()
    assert export.copy(*sources, tmp_path, {}) == sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())


def test_export_changes_nothing_if_a_file_is_missing(tmp_path: Path) -> None:
    held = tmp_path / "mini/model/config.json"
    held.parent.mkdir(parents=True)
    held.write_text("{}")
    (tmp_path / "language").mkdir()
    with pytest.raises(
        SystemExit, match=r"nothing was changed: .*model\.ckpt.*model\.safetensors\.index\.json.* missing"
    ):
        export.copy(tmp_path / "vision", tmp_path / "words", tmp_path / "language", tmp_path / "mini", {})
    assert [p.name for p in (tmp_path / "mini").rglob("*")] == ["model", "config.json"]
    assert held.read_text() == "{}"


@pytest.mark.gpu
def test_the_fused_norm_equals_the_reference() -> None:
    torch.manual_seed(3)
    for channels, height, width in ((64, 20, 12), (128, 7, 9)):
        norm = torch.nn.GroupNorm(32, channels, eps=1e-6).cuda()
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        x = (torch.randn(3, channels, height, width, device="cuda") * 2 + 1).to(memory_format=torch.channels_last)
        found = []
        for work in (fused.norm_silu, fused.plain_norm_silu):
            norm.zero_grad()
            given = x.clone().requires_grad_()
            out = work(given, norm)
            (out * torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape)).sum().backward()
            found.append((out.detach(), given.grad, norm.weight.grad.clone(), norm.bias.grad.clone()))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_export_averages_with_an_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command interpolates the weights, here by a quarter."""
    shape = Shape(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    for name, value in (("late", 1.0), ("early", 3.0)):
        made = LanguageModel(shape, dtype=torch.float32)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.fill_(value)
        made.save(tmp_path / name)
    seen = {}

    def copy(vision: Path, vocabulary: Path, language: Path, *_: Any) -> int:
        seen.update(read_weights(language))
        assert json.loads((language / "config.json").read_text())["hidden_size"] == 32
        return 1

    monkeypatch.setattr(export, "copy", copy)
    arguments = ["export", "--vision", "v", "--vocabulary", "w", "--language", str(tmp_path / "late"), "--out", "o"]
    monkeypatch.setattr("sys.argv", [*arguments, "--blend", str(tmp_path / "early"), "--blend-share", "0.25"])
    export.main()
    assert seen
    assert all((value == 1.5).all() for value in seen.values())

    LanguageModel(replace(shape, hidden_size=16), dtype=torch.float32).save(tmp_path / "early")
    with pytest.raises(SystemExit, match="other tensors"):
        export.main()

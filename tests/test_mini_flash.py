"""FlashAR post-training of the miniature: its sequences, its forward against the decoder's, and a short training."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from _compare import flashar_native
from _compare.flashar_native import run_native

from emu_cog.events import Picture
from emu_cog.model.loader import load_flash_model
from emu_cog.ops.sampling import guide
from emu_cog.pipeline import Pipeline
from emu_cog.prompt.tokenizer import Tokenizer
from emu_cog.request import Request
from emu_cog.settings import Settings
from emu_cog.weights import store
from emu_cog.weights.store import MINIATURE
from scripts.mini.render import Batch
from scripts.mini.train import encode, train_flash, vocabulary
from scripts.mini.train.examples import Data, read
from scripts.mini.train.flash_model import FlashModel, Layout, begin
from scripts.mini.train.language_model import LanguageModel, Shape
from scripts.mini.train.sequences import BLANK, FLASH_SHARES, Chunk, Mix, chunk, draw, flash_sequence
from scripts.mini.train.train_flash import FlashTraining, optimizers
from scripts.mini.train.train_language import Gradients, read_weights
from tests.conftest import ROOT

CODES = 2048
CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer files trained on few sentences."""
    path = tmp_path_factory.mktemp("vocabulary")
    vocabulary.write(path, vocabulary.ranks(vocabulary.corpus(60, 3), 400), CODES)
    return path


@pytest.fixture(scope="module")
def words(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def random_model(words: Tokenizer, *, layers: int, vertical: int) -> FlashModel:
    """No layer is the identity, no gate one half; all values are exact in bf16."""
    torch.manual_seed(layers)
    shape = Shape(vocab_size=words.ids.vocab_size, num_hidden_layers=layers, **SIZES)
    model = FlashModel(shape, visual=words.ids.visual, vertical=vertical, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.1 * torch.randn_like(p)).bfloat16())
    return model


# -- 1. the forward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "vertical"), [(2, 1), (3, 2), (2, 2)])
def test_the_training_forward_gives_the_logits_of_the_decoding(
    layers: int, vertical: int, words: Tokenizer, tmp_path: Path
) -> None:
    """Both streams of pictures of different shapes in one padded batch, against a pass a diagonal."""
    model = random_model(words, layers=layers, vertical=vertical)
    model.save(tmp_path)
    loaded = load_flash_model(tmp_path, words.ids, device=CPU, dtype=torch.float32)
    rng, ids = np.random.default_rng(0), words.ids
    length, wanted, codes, rows, grids = 160, [], [], [], []
    for size, text in (((7, 10), 31), ((5, 3), 9), ((1, 6), 12), ((6, 1), 4)):
        prompts = [[*rng.integers(0, 300, n).tolist(), *ids.header(*size)] for n in (text, 3)]
        codes.append(rng.integers(0, CODES, math.prod(size)))
        wanted.append(flashar_native.Picture(conditional=prompts[0], unconditional=prompts[1], size=size, guidance=2.0))
        for prompt in prompts:
            line = [*prompt, *(ids.visual + codes[-1]).tolist()]
            rows.append(line + [ids.pad] * (length - len(line)))
            grids.append((len(prompt), len(prompts[0]), *size))
    with torch.no_grad():
        logits = model.logits(torch.tensor(rows), torch.tensor(grids, dtype=torch.int16))
    for i, drawn in enumerate(run_native(loaded, wanted, follow=codes)):
        first, second = (logits[2 * i + s, (n := grids[2 * i + s][0]) : n + len(codes[i])] for s in (0, 1))
        guided = guide(first, second, 2.0).numpy()
        np.testing.assert_allclose(guided, drawn["logits"], atol=5e-4, rtol=5e-4)


def test_a_cell_sees_the_prompt_and_no_later_diagonal() -> None:
    layout = Layout.of(torch.tensor([[3, 5, 2, 3]]), 12)
    seen, image = (mask[0, 0].int().tolist() for mask in layout.masks())
    assert [row[:9] for row in seen[:3]] == [[1] + 8 * [0], [1, 1] + 7 * [0], [1, 1, 1] + 6 * [0]]
    # the prompt, (0, 0) to (0, 2), (1, 0) to (1, 2), padding
    assert seen[4] == [1, 1, 1, *(1, 1, 0), *(1, 0, 0), 0, 0, 0]  # of (0, 1)
    assert seen[6] == seen[4]  # (1, 0), of the same diagonal
    assert seen[8] == [1] * 9 + [0] * 3
    assert image[4] == [0, 0, 0, *seen[4][3:]]
    assert layout.position[0, :9].tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10], "after the longer stream's prompt"
    assert all(any(row) for row in seen), "no softmax without a key"


# -- 2. data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", FLASH_SHARES)
@pytest.mark.parametrize("with_text", [True, False])
def test_a_sequence_is_the_prompt_of_the_engine_and_the_cells(task: str, with_text: bool, words: Tokenizer) -> None:
    made, size, _, _ = draw(Random(4), Mix({task: 1}))
    line, (prompt, longest, rows, columns) = flash_sequence(made, words, size, 7, with_text=with_text)
    assert (rows, columns) == size
    cells = [words.ids.visual + BLANK + 7 + i for i in range(len(made.references) * rows * columns, 10**4)]
    assert line[prompt:] == cells[: rows * columns]
    header = words.ids.header(rows, columns)
    assert tuple(line[prompt - len(header) : prompt]) == header
    system = words.encode(f"You are a helpful assistant{' for t2i task' if task == 't2i' else ''}.")  # as U0 has it
    assert line[1 : len(system)] == system[:-1]
    other, grid = flash_sequence(made, words, size, 7, with_text=not with_text)
    assert longest == max(prompt, grid[0]) == grid[1]
    assert (len(line) < len(other)) == (not with_text)


def shard(folder: Path, name: str, count: int, first: int) -> None:
    """4x4 pictures that count up, after prompts of 4 or 5 tokens of a vocabulary of 120."""
    rows: encode.Rows = {}
    for i in range(count):
        prompt = 4 + i % 2
        line = np.array([*range(1, 1 + prompt), *(60 + (first + i + np.arange(16)) % 50)], np.int32)
        rows.setdefault(32, []).append((line, np.array([prompt, 5, 4, 4], np.int16)))
    encode.write(folder / name, rows, 0)


def test_shards_hold_grids(tmp_path: Path) -> None:
    shard(tmp_path, encode.HELD_OUT, 3, 0)
    ids, grid = read(tmp_path / encode.HELD_OUT)[32]
    assert (ids.shape, grid.tolist()) == ((3, 32), [[4, 5, 4, 4], [5, 5, 4, 4], [4, 5, 4, 4]])


def test_a_chunk_of_flash_sequences_fits_the_lengths(folder: Path) -> None:
    part: Chunk = chunk((5, 12, folder, Mix(FLASH_SHARES, many=0.5, reworded=0.5, flash=True)))
    assert part.grids.shape == (12, 4)
    assert all(isinstance(batch, Batch) for batch, _ in part.scenes.values())
    ends = part.grids[:, 0] + part.grids[:, 2] * part.grids[:, 3]
    assert ends.tolist() == part.lengths.tolist()
    assert int(part.learn.sum()) == int((part.grids[:, 2] * part.grids[:, 3]).sum())
    assert max(part.lengths) <= encode.FLASH_LENGTHS[-1]


# -- 3. training -------------------------------------------------------------------------------------------

SMALL = Shape(vocab_size=120, num_hidden_layers=2, **SIZES)


def training(folder: Path, *, inner: int = 64) -> FlashTraining:
    data_folder = folder / "data"
    if not data_folder.exists():
        data_folder.mkdir()
        shard(data_folder, encode.HELD_OUT, 8, 3)
        shard(data_folder, encode.shard_name(1, 0), 50, 0)
    torch.manual_seed(1)
    plain, data = LanguageModel(SMALL, dtype=torch.float32), Data(data_folder, CPU)
    assert data.refresh()
    shape = replace(SMALL, intermediate_size=inner)
    model = FlashModel(shape, visual=60, vertical=1, dtype=torch.float32)
    begin(model, plain.released_state(), SMALL, train_flash.sample(data, 8))
    return FlashTraining(
        model, Gradients(model, [32], 512, captured=False), data, folder / "out", rate=1e-2, backbone=0.4, decay=0.0,
        tokens=512, visual=60, seed=1,
    )  # fmt: skip


def test_a_few_steps_reduce_the_loss_and_the_training_resumes(tmp_path: Path) -> None:
    first = training(tmp_path)
    before = first.held_out()["picture"]
    record = first.run(steps=40, seconds=1000)
    assert record["held_out_loss"]["picture"] < 0.7 * before
    again = training(tmp_path)
    assert (again.state.steps, again.state.best) == (40, first.state.best)
    own = again.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in first.model.state_dict().items())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"training.pt", "config.json", "model.safetensors"}


def test_only_the_vertical_branch_learns_at_first(tmp_path: Path) -> None:
    made = training(tmp_path)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    ids, grid = made.data.buckets[32].draw(16)
    for _ in range(2):
        made.step(ids, grid, 0.0)
    changed = {name for name, value in made.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith(("stack.", "norm", "heads.1", "gates.")) for name in changed)
    made.step(ids, grid, 0.5)
    assert not torch.equal(made.model.embed, before["decoder.embed"])
    groups = [(g["scale"], g["lr"]) for o in made.optims for g in o.param_groups]
    assert groups[0][1] == pytest.approx(0.4 * groups[1][1])


def test_a_saved_model_is_what_a_further_training_begins_with(tmp_path: Path) -> None:
    first, second = training(tmp_path).model, training(tmp_path).model
    with torch.no_grad():
        for p in first.parameters():
            p.copy_(torch.randn_like(p).bfloat16())
    first.save(tmp_path)
    second.load_flash(read_weights(tmp_path))
    trained = {name for name, p in first.named_parameters() if p.requires_grad}
    own = second.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in first.state_dict().items() if name in trained)


def test_every_weight_but_the_plain_head_is_trained(words: Tokenizer) -> None:
    model = random_model(words, layers=2, vertical=1)
    held = {id(p) for o in optimizers(model, 1e-3, 0.4, 0.0) for g in o.param_groups for p in g["params"]}
    assert [name for name, p in model.named_parameters() if id(p) not in held] == ["decoder.head"]


def test_neurons_that_do_nothing_are_cut_off_first(tmp_path: Path) -> None:
    made = training(tmp_path, inner=96)
    with torch.no_grad():
        made.model.decoder.stack["down"].normal_()
        made.model.decoder.stack["down"][:, :, ::3] = 0.0
    ids, grid = made.data.buckets[32].draw(4)
    narrow = FlashModel(
        Shape(vocab_size=120, num_hidden_layers=2, **SIZES | {"intermediate_size": 64}), visual=60, vertical=1,
        dtype=torch.float32,
    )  # fmt: skip
    with torch.no_grad():
        for p in made.model.parameters():
            p.copy_(p.bfloat16())
    narrow.load_decoder(made.model.narrowed(64, ids, grid))
    made.model.load_decoder(made.model.decoder.released_state())
    with torch.no_grad():
        for ours, theirs in zip(narrow.gates, made.model.gates, strict=True):
            ours.copy_(theirs)
        torch.testing.assert_close(narrow.loss(ids, grid)[1], made.model.loss(ids, grid)[1], atol=1e-4, rtol=1e-4)


# -- 4. the exported folder --------------------------------------------------------------------------------


def test_the_exported_folder_draws_pictures(
    words: Tokenizer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model(words, layers=2, vertical=1).save(tmp_path / "trained")
    target = tmp_path / "flash"
    size = train_flash.export(tmp_path / "trained", folder, MINIATURE / "vision", target, {"image_temperature": 0.5})
    assert size == sum(path.stat().st_size for path in target.iterdir())
    assert json.loads((target / "defaults.json").read_text())["image_temperature"] == 0.5
    assert store._kind(target) == "u0-flash"
    pipeline = Pipeline.load(target, MINIATURE / "vision")
    events = list(pipeline.stream(Request(prompt="a red circle", task="t2i", seed=1)))
    assert [event.image.size for event in events if isinstance(event, Picture)] == [(192, 192)]
    monkeypatch.setattr(store, "MINIATURE", tmp_path)
    monkeypatch.setattr(store, "MINIATURES", {"mini-flash": ("flash", "u0-flash")})  # once its weights are there
    found = store.resolve(Settings(checkpoint="mini-flash", vision_tokenizer=str(MINIATURE / "vision")))
    assert (found.model, found.kind, found.tokenizer) == (target, "u0-flash", None)
    monkeypatch.setattr(train_flash, "LIMIT", 1000)
    with pytest.raises(SystemExit, match="over the limit of 1000: use fewer"):
        train_flash.export(tmp_path / "trained", folder, MINIATURE / "vision", target, {})


def test_the_real_sizes_fit_what_may_be_committed(words: Tokenizer) -> None:
    """70 million bytes in all, with emu-mini."""
    model = FlashModel(Shape(intermediate_size=768), visual=Shape.vocab_size - CODES, vertical=1, dtype=torch.float32)
    size = sum(value.nbytes for value in model.flash_state().values()) + 60_000
    committed = sum(p.stat().st_size for name in ("model", "vision") for p in (MINIATURE / name).iterdir())
    assert size <= train_flash.LIMIT
    assert committed + train_flash.LIMIT <= 70 * 10**6


@pytest.mark.slow
def test_one_command_goes_from_encoding_to_evaluation(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/mini/train/flash", "--try", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["evaluated"], done.stdout
    assert last["bytes"] <= train_flash.LIMIT
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {task: figures[task]["prompts"] for task in ("t2i", "x2i")} == {"t2i": 2, "x2i": 2}

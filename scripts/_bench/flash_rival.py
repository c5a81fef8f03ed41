"""A picture by the public FlashAR code, lxazjk's or U0's, on our model's tensors: what ours is compared with."""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from _compare.flashar import layout_of
from torch import Tensor

from _bench import machine
from _bench.decoding import Bench
from _bench.reference import parameters
from _bench.report import Row
from _bench.sizes import Size
from emu_cog.errors import CheckpointError, InputError
from emu_cog.model.flashar import FlashModel

CLASSES = {
    "lxazjk": (
        "src.emu3p5.configuration_emu3.Emu3Config",
        "src.emu3p5.modeling_emu3.Emu3Model",
        "flashar.model.modeling_emu_flashar.Emuflashar",
    ),
    "u0": (
        "xr_u0_ar.configuration_unis.UNISConfig",
        "xr_u0_ar.modeling_unis.UNISModel",
        "xr_u0_flashar.model.UNISFlashAR",
    ),
}
"""Their configuration, decoder and FlashAR model, by layout."""
NAMES = {"lxazjk": "lxazjk's code", "u0": "U0's code"}
ROLES_OF_THEIRS = ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof")
ATTENTION = "eager"
"""Both repositories' default for FlashAR; their cached steps pass a 4-D mask, which they refuse with any other."""
WARM_UP = (4, 4)
REPEATS, PATIENCE = 2, 30.0
"""The best of so many pictures is reported, as of ours; one that takes more seconds is not drawn again."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """`name`: whose code it is and in which dtype. `seconds`: what it took."""

    name: str
    seconds: float


def checked(clone: Path) -> str:
    """Whose repository `clone` is. InputError where it is neither."""
    try:
        return layout_of(clone)
    except CheckpointError as error:
        raise InputError(str(error)) from None


@contextmanager
def importable(clone: Path) -> Iterator[None]:
    """Inside, the clone's packages can be imported; afterwards none of them is left, and the clone is as it was."""
    before, writes = set(sys.modules), sys.dont_write_bytecode
    folder = str(clone.resolve())
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    try:
        # transformers 5 no longer has this function. They call it once, to prepare for torch.fx.
        with mock.patch("transformers.utils.import_utils.is_torch_fx_available", create=True, return_value=False):
            yield
    finally:
        sys.path.remove(folder)
        sys.dont_write_bytecode = writes
        roots = {name.partition(".")[0] for names in CLASSES.values() for name in names}
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in roots:
                del sys.modules[name]


def on_the_same_weights(lm: FlashModel, size: Size, clone: Path) -> Any:
    """Their model, its parameters views of `lm`'s. Only the two heads are new: the visual rows are copied from ours,
    which lie side by side, and the text rows are zero, since their logits are masked."""
    flash, ids = lm.flash, lm.ids
    fields = {name: value for name, value in size.config().items() if name != "model_type"}
    with importable(clone), torch.device("meta"):
        configuration, decoder, model = (
            getattr(importlib.import_module(module), name)
            for module, _, name in (path.rpartition(".") for path in CLASSES[checked(clone)])
        )
        # What transformers 4.48 answers for a cache without a limit, and 5 no longer has a method for.
        for helper in ("_get_usable_cache_length", "_get_cache_usable_length"):
            setattr(sys.modules[decoder.__module__], helper, lambda cache, _, layer=0: cache.get_seq_length(layer))
        special = {f"{role}_token_id": getattr(ids, role) for role in ROLES_OF_THEIRS}
        config = configuration(**fields, **special)
        config.rope_scaling = None  # as they left it; transformers 5 derives one from rope_theta
        config._attn_implementation = ATTENTION
        theirs = model(
            pretrained_backbone=decoder(config),
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            mask_token_id=ids.pad,
            visual_token_offset=ids.visual,
            use_vertical_block=True,
            vertical_layers=len(flash.vertical),
            vertical_start_layer=flash.start,
        )
    views = _views(lm)
    theirs.load_state_dict(views | _heads(lm), strict=True, assign=True)
    layers = [*theirs.backbone.layers, *theirs.vertical_block]
    layers[0].self_attn._init_rope()  # outside of "meta"
    rotary = layers[0].self_attn.rotary_emb.to(device=lm.device, dtype=lm.dtype)
    for layer in layers:
        layer.self_attn.rotary_emb = rotary
    held = {view.untyped_storage().data_ptr() for view in views.values()}
    new = [name for name, value in theirs.named_parameters() if value.untyped_storage().data_ptr() not in held]
    if new != ["horizontal_head.weight", "vertical_head.weight"] or any(value.is_meta for value in theirs.buffers()):
        raise RuntimeError(f"their model does not share our weights: {new[:5]}")
    return theirs.eval().requires_grad_(False)


def _views(lm: FlashModel) -> dict[str, Tensor]:
    """Every key of theirs but the heads', as views of our merged weights."""
    flash, decoder = lm.flash, lm.flash.decoder
    found = {
        f"backbone.{name.removeprefix('model.')}": value
        for name, value in parameters(decoder, lm.config).items()
        if name != "lm_head.weight"
    }
    found |= {
        name.replace("model.layers.", "vertical_block."): value
        for name, value in parameters(replace(decoder, layers=flash.vertical), lm.config).items()
        if name.startswith("model.layers.")
    }
    return found | {
        "vertical_norm.weight": flash.vertical_norm,
        "hv_gate_mlp.0.weight": flash.gates.pair_in,
        "hv_gate_mlp.2.weight": flash.gates.pair_out,
        "hv_gate_mlp.2.bias": flash.gates.pair_bias,
        "hv_gate_corner.weight": flash.gates.corner,
        "hv_gate_corner.bias": flash.gates.corner_bias,
    }


def _heads(lm: FlashModel) -> dict[str, Tensor]:
    heads = {}
    for name, ours in zip(("horizontal_head", "vertical_head"), lm.flash.decoder.head.chunk(2, dim=1), strict=True):
        full = torch.zeros(lm.ids.vocab_size, lm.config.hidden_size, dtype=lm.dtype, device=lm.device)
        full[lm.ids.visual :] = ours
        heads[f"{name}.weight"] = full
    return heads


def draw(
    theirs: Any, prompts: tuple[Sequence[int], Sequence[int]], size: tuple[int, int], *, guidance: float, top_k: int
) -> list[int]:
    """Codes of one picture of `size` (rows, columns), row by row, after both prompts, header included."""
    weight = theirs.horizontal_head.weight
    conditional, unconditional = (torch.tensor([ids], device=weight.device) for ids in prompts)
    grid = theirs.generate(
        height=size[0],
        width=size[1],
        device=weight.device,
        text_input_ids=conditional,
        unconditional_text_input_ids=unconditional,
        cfg_scale=guidance,
        top_k=top_k,
    )
    codes: list[int] = (grid.flatten() - theirs.visual_token_offset).tolist()
    return codes


class _Passes:
    """Counts their passes over diagonals, and prints every sixteenth on stderr."""

    def __init__(self, theirs: Any) -> None:
        self.count, self.began = 0, time.perf_counter()
        self._step = theirs._append_backbone_kv_step
        theirs._append_backbone_kv_step = self

    def __call__(self, **given: Any) -> Any:
        self.count += 1
        if self.count % 16 == 0:
            print(f"    their pass {self.count}, {time.perf_counter() - self.began:.1f} s", file=sys.stderr, flush=True)
        return self._step(**given)


def measure(
    bench: Bench,
    lm: FlashModel,
    clone: Path,
    prompts: tuple[Sequence[int], Sequence[int]],
    size: tuple[int, int],
    *,
    warm_up: tuple[Sequence[int], Sequence[int]],
    guidance: float,
    top_k: int,
) -> Rival | None:
    """A row with the seconds from `prompts` to the codes of one picture of `size`, after one of WARM_UP. None, and no
    row, where it fails."""
    dtype = str(lm.dtype).removeprefix("torch.")
    whose = NAMES[checked(clone)]
    what = f"flash, {dtype}: 1 picture of {size[0]} x {size[1]} by {whose}, prompt to codes"
    warnings.simplefilter("ignore", FutureWarning)  # transformers', of names that their code uses
    try:
        theirs = on_the_same_weights(lm, bench.size, clone)
        draw(theirs, warm_up, WARM_UP, guidance=guidance, top_k=top_k)
        passes, taken = _Passes(theirs), []
        for _ in range(REPEATS):
            machine.wait(bench.device)
            passes.count, passes.began = 0, time.perf_counter()
            draw(theirs, prompts, size, guidance=guidance, top_k=top_k)
            taken.append(time.perf_counter() - passes.began)
            if taken[-1] > PATIENCE:
                break
    except Exception as error:  # ours is still worth measuring
        first = " ".join(str(error).split())[:200]
        bench.report.not_measured(what, f"it failed: {type(error).__name__}: {first}")
        return None
    seconds = min(taken)
    per_pass = 1e3 * seconds / passes.count
    note = (
        f"{passes.count} passes of {per_pass:.0f} ms, the best of {len(taken)}; our tensors, their {ATTENTION} "
        f"attention, transformers {transformers.__version__}"
    )
    bench.report.add(Row(part="flash", what=what, value=seconds, unit="s", note=note))
    return Rival(name=f"{whose}, {dtype}", seconds=seconds)

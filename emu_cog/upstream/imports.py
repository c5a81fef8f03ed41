"""Imports upstream's package `src` without leaving anything behind; reads its templates and defaults."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from transformers import Qwen3ForCausalLM

from emu_cog.errors import CheckpointError
from emu_cog.log import log
from emu_cog.model.loader import read_config

_MODULES = ("model_utils", "generation_utils", "input_utils", "logits_processor")
_IMPORT_LOCK = threading.Lock()
# Task -> the example config whose `build_unc_and_template` upstream uses for it; config.py names all six tasks.
_TEMPLATES = {
    "t2i": "example_config_t2i.py",
    "x2i": "example_config_x2i.py",
    "howto": "example_config_visual_guidance.py",
    "story": "example_config_visual_narrative.py",
    "explore": "config.py",
    "vla": "config.py",
}


@dataclass(frozen=True)
class Code:
    """Upstream's modules, imported for one vocabulary. None of them stays in `sys.modules`."""

    clone: Path
    model_utils: ModuleType
    generation_utils: ModuleType
    input_utils: ModuleType
    logits_processor: ModuleType


def import_code(clone: Path, *, dtype: torch.dtype, attention: str) -> Code:
    """Import the clone's package `src` again, with a stand-in for `src.emu3p5`. `sys.path` is not changed."""
    with _IMPORT_LOCK, _src_from(clone, _stand_in(dtype, attention)):
        modules = {name: importlib.import_module(f"src.utils.{name}") for name in _MODULES}
        for name, module in sys.modules.items():
            if name.startswith("src."):
                module.__dict__["print"] = _log_print  # upstream prints; here that goes to the log
    return Code(clone, **modules)


def _log_print(*values: object, **_: object) -> None:
    log.debug("upstream: %s", " ".join(map(str, values)))


@contextmanager
def _src_from(clone: Path, emu3p5: ModuleType) -> Iterator[None]:
    """Inside, `src` is the clone's package; afterwards `sys.modules` is as before."""

    def is_src(name: str) -> bool:
        return name == "src" or name.startswith("src.")

    package = ModuleType("src")
    package.__path__ = [str(clone / "src")]
    temporary = {"src": package, "src.emu3p5": emu3p5}
    temporary |= {m.__name__: m for m in _missing_dependencies() if importlib.util.find_spec(m.__name__) is None}
    before = {name: module for name, module in sys.modules.items() if is_src(name)}
    writes = sys.dont_write_bytecode
    for name in before:
        del sys.modules[name]
    sys.modules.update(temporary)
    sys.dont_write_bytecode = True  # the clone must stay as it was checked out
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes
        for name in [name for name in sys.modules if is_src(name) or name in temporary]:
            del sys.modules[name]
        sys.modules.update(before)


def _missing_dependencies() -> tuple[ModuleType, ...]:
    def load(path: str) -> Any:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))

    def unused(*_: object, **__: object) -> Any:
        raise NotImplementedError("einops is not installed; the IBQ tokenizer is not expected to use it")

    omegaconf, einops = ModuleType("omegaconf"), ModuleType("einops")
    omegaconf.__dict__["OmegaConf"] = type("OmegaConf", (), {"load": staticmethod(load)})
    einops.__dict__.update(rearrange=unused, reduce=unused)
    return omegaconf, einops


def _stand_in(dtype: torch.dtype, attention: str) -> ModuleType:
    """The module `src.emu3p5`: Emu3Config and Emu3ForCausalLM on transformers' Qwen3."""

    class Emu3Config:
        @classmethod
        def from_pretrained(cls, folder: str, **_: Any) -> Any:
            return read_config(Path(folder))

    class Emu3ForCausalLM(Qwen3ForCausalLM):
        @classmethod
        def from_pretrained(cls, folder: Any, *_: Any, **wanted: Any) -> Any:  # type: ignore[override]
            chosen: dict[str, Any] = {
                "config": wanted["config"],
                "device_map": wanted["device_map"],
                "dtype": dtype,
                "attn_implementation": attention,
                "output_loading_info": True,
            }
            loaded: Any = super().from_pretrained(folder, **chosen)
            model, report = loaded
            if wrong := {key: sorted(names)[:3] for key, names in report.items() if names}:
                raise CheckpointError(f"{folder} does not fit the model: {wrong}")
            return model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.float()  # as upstream's class does
            return out

    module = ModuleType("src.emu3p5")
    module.__dict__.update(Emu3Config=Emu3Config, Emu3ForCausalLM=Emu3ForCausalLM)
    return module


def config_defaults(clone: Path) -> dict[str, Any]:
    """Upstream's Emu3Config defaults for fields that config.json leaves out, read from the source of its file."""
    tree = ast.parse((clone / "src/emu3p5/configuration_emu3.py").read_text(encoding="utf-8"))
    init = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    names = [a.arg for a in init.args.args][-len(init.args.defaults) :]
    literal = {n: d for n, d in zip(names, init.args.defaults, strict=True) if not isinstance(d, ast.BinOp)}
    return {name: ast.literal_eval(default) for name, default in literal.items()}


def templates(clone: Path, task: str, *, with_image: bool) -> tuple[str, str]:
    """(unconditional, conditional) prompt of `task`, from the one function of upstream's config file that makes them.

    The rest of the file is not run: it would replace Python's `print` and open a log file.
    """
    path = clone / "configs" / _TEMPLATES[task]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body: list[ast.stmt] = [
        n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "build_unc_and_template"
    ]
    scope: dict[str, Any] = {}
    exec(compile(ast.Module(body=body, type_ignores=[]), str(path), "exec"), scope)
    unconditional, template = scope["build_unc_and_template"](task, with_image)
    return unconditional, template

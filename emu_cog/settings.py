"""The environment variables EMU_* as one frozen dataclass."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emu_cog.errors import InputError

UPSTREAM_URL = "https://github.com/baaivision/Emu3.5"

UPSTREAM_COMMIT = "8fcf1da48f9c5252fe0a0b8dc842e07b6efcd745"

PINS_FILE = Path(__file__).resolve().parent.parent / "weights.pins.json"
"""Commits, sizes and SHA-256 of the repositories above, as far as known."""

DECODINGS = ("auto", "sequential", "parallel")
"""Image tokens of a pass: as many as pay, one, or several even where that pays less. The pictures are the same."""


def _whole(env: Mapping[str, str], name: str) -> int | None:
    value = env.get(name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"{name}={value!r} must be a whole number from 1")
    return int(value)


def _one_of(env: Mapping[str, str], name: str, accepted: Sequence[str]) -> str:
    """The variable, or the first of `accepted`."""
    value = env.get(name, accepted[0])
    if value not in accepted:
        raise InputError(f"{name}={value!r} must be {', '.join(accepted[:-1])} or {accepted[-1]}")
    return value


def _switch(env: Mapping[str, str], name: str) -> bool:
    """On unless the variable is 0."""
    value = env.get(name, "1")
    if value not in ("0", "1"):
        raise InputError(f"{name}={value!r} must be 0 or 1")
    return value == "1"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the environment sets. Each field is EMU_<FIELD>, but for `upstream_commit`, which is fixed; the README's
    table explains them."""

    checkpoint: str = "mini"
    vision_tokenizer: str | None = None
    device: str | None = None
    dtype: str | None = None
    weights_dir: Path = Path("checkpoints")
    weights_source: str | None = None
    weights_pins: Path = PINS_FILE
    backend: str = "native"
    upstream_url: str = UPSTREAM_URL
    upstream_commit: str = UPSTREAM_COMMIT
    device_map: str | None = None
    max_context: int | None = None
    max_outputs: int | None = None
    quantize: str | None = None
    decoding: str = "auto"
    compile: bool = True
    compile_cache: Path | None = None
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read EMU_* from `environ` (default: the process's). An empty value counts as not set."""
        env = {k: v for k, v in (os.environ if environ is None else environ).items() if v != ""}

        def get(name: str) -> str | None:
            return env.get(f"EMU_{name}")

        return cls(
            checkpoint=get("CHECKPOINT") or "mini",
            vision_tokenizer=get("VISION_TOKENIZER"),
            device=get("DEVICE"),
            dtype=get("DTYPE"),
            weights_dir=Path(get("WEIGHTS_DIR") or "checkpoints"),
            weights_source=get("WEIGHTS_SOURCE"),
            weights_pins=Path(get("WEIGHTS_PINS") or PINS_FILE),
            backend=get("BACKEND") or "native",
            upstream_url=get("UPSTREAM_URL") or UPSTREAM_URL,
            device_map=get("DEVICE_MAP"),
            max_context=_whole(env, "EMU_MAX_CONTEXT"),
            max_outputs=_whole(env, "EMU_MAX_OUTPUTS"),
            quantize=get("QUANTIZE"),
            decoding=_one_of(env, "EMU_DECODING", DECODINGS),
            compile=_switch(env, "EMU_COMPILE"),
            compile_cache=Path(cache) if (cache := get("COMPILE_CACHE")) else None,
            environ=env,
        )

"""Upstream's own code at the pinned commit, unmodified, on current transformers: the reference for this package.

What is not upstream's here, and why:
- `src.emu3p5` is a stand-in, because upstream's model file does not import on transformers 5. Emu3.5 is Qwen3 layer by
  layer, so transformers' Qwen3 replaces it (scripts/compare-upstream can compare the two). dtype and attention depend
  on the machine; upstream's `build_emu3p5` fixes bfloat16 and flash-attention 2.
- `omegaconf` and `einops`, if not installed, are replaced while upstream's files are imported: its vision tokenizer
  reads one YAML file with the former and does not use the latter.
- Token ids are constants upstream; they are set to the checkpoint's, so that smaller vocabularies can be compared.
- The tokenizer is loaded with `trust_remote_code`. The trusted code is the pinned clone's own file on this disk, never
  one that comes with weights. No other place does so.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from emu_cog.errors import CheckpointError
from emu_cog.log import log
from emu_cog.prompt.tokenizer import RANKS_FILE, VISION_FILE, Tokenizer
from emu_cog.prompt.tokens import ROLES, TokenIds
from emu_cog.request import Sampling
from emu_cog.upstream.imports import Code, import_code, templates

__all__ = ["Config", "Upstream", "load", "templates"]

# The ids in upstream's size grammar: mask[:, 16:25], mask[:, 9], mask[:, 15:25].
_DIGITS, _STAR = tuple(range(15, 25)), 9


def adopt_vocabulary(code: Code, ids: TokenIds) -> None:
    """Set the constant ids of upstream's logits processor to those of the checkpoint."""
    if ids.digits != _DIGITS or ids.star != _STAR:
        raise CheckpointError(
            f"the ids of the digits ({_DIGITS[0]} to {_DIGITS[-1]}) and of '*' ({_STAR}) are constants in upstream's "
            f"code, but this checkpoint's are {ids.digits} and {ids.star}: it can only be used with EMU_BACKEND=native"
        )
    for name in ("BOS", "EOS", "IMG", "BOI", "EOI", "EOL", "EOF"):
        setattr(code.logits_processor, name, getattr(ids, name.lower()))
    code.logits_processor.BOV = ids.visual  # type: ignore[attr-defined]


@contextmanager
def _tokenizer_folder(code: Code, model: Path, ids: TokenIds) -> Iterator[Path]:
    """A temporary folder with upstream's tokenizer code and the checkpoint's vocabulary."""
    source = code.clone / "src/tokenizer_emu3_ibq"
    with tempfile.TemporaryDirectory(prefix="emu-cog-") as temporary:
        folder = Path(temporary) / "emu3_tokenizer"
        folder.mkdir()
        shutil.copy(source / "tokenizer_config.json", folder)
        for name in (RANKS_FILE, VISION_FILE):
            (folder / name).symlink_to((model / name).resolve())
        text = (source / "tokenization_emu3.py").read_text(encoding="utf-8")
        text, found = re.subn(r"^SPECIAL_START_ID = \d+$", f"SPECIAL_START_ID = {ids.pad}", text, flags=re.MULTILINE)
        assert found == 1, "the pinned commit has this line"
        (folder / "tokenization_emu3.py").write_text(text, encoding="utf-8")
        path = list(sys.path)
        try:
            yield folder
        finally:
            sys.path[:] = path  # transformers adds the folder with its copies of such code


@dataclass(frozen=True, kw_only=True)
class Config:
    """What upstream's functions read from a config module, under upstream's names. `image_area` is in pixels."""

    special_token_ids: Mapping[str, Any]
    sampling_params: Mapping[str, Any] = field(default_factory=dict)
    classifier_free_guidance: float = 1.0
    target_height: int | None = None
    target_width: int | None = None
    image_area: int = 1048576
    unconditional_type: str = "no_text"
    streaming: bool = False


class _Wrapped:
    """The model for upstream's `generate`, with logits processors around upstream's own and a streamer."""

    def __init__(
        self, model: Any, before: Sequence[LogitsProcessor], after: Sequence[LogitsProcessor], streamer: Any
    ) -> None:
        self._model, self._before, self._after, self._streamer = model, before, after, streamer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def generate(self, input_ids: Tensor, config: Any, logits_processor: list[Any]) -> Tensor:
        logits_processor[:0] = self._before
        logits_processor.extend(self._after)
        out: Tensor = self._model.generate(
            input_ids,
            config,
            logits_processor=logits_processor,
            streamer=self._streamer,
        )
        return out


class _Decoder:
    """The vision tokenizer for upstream's `decode_image`, which always asks for 256 channels: here they are the
    codebook's own width, 256 in the released one."""

    def __init__(self, vq: Any) -> None:
        self._vq = vq

    def parameters(self) -> Any:
        return self._vq.parameters()

    def decode_code(self, codes: Tensor, shape: tuple[int, int, int, int]) -> Any:
        return self._vq.decode_code(codes, shape=(*shape[:3], self._vq.quantize.e_dim))


class Upstream:
    """Upstream's functions over one loaded checkpoint."""

    def __init__(self, code: Code, tokenizer: Tokenizer, model: Any, upstream_tokenizer: Any, vq: Any) -> None:
        self.code, self.model, self.tokenizer, self.vq = code, model, upstream_tokenizer, vq
        self.own_tokenizer, self.ids = tokenizer, tokenizer.ids
        self._role_ids = {role.upper(): upstream_tokenizer.encode(text)[0] for role, text in ROLES.items()}

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @torch.no_grad()
    def prompt(self, task: str, question: str, images: Sequence[Image.Image], area: int) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional ids, each (1, L) int64. The steps are those of `inference` in inference.py."""
        unconditional, template = templates(self.code.clone, task, with_image=bool(images))
        conditional = template.format(question=question)
        blocks = "".join(self.image_string(image, area) for image in images)
        if blocks:
            conditional, unconditional = (s.replace("<|IMAGE|>", blocks) for s in (conditional, unconditional))
        ids = [self.tokenizer.encode(s, return_tensors="pt", add_special_tokens=False) for s in (conditional, unconditional)]  # fmt: skip  # noqa: E501
        return ids[0].to(self.device), ids[1].to(self.device)

    def image_string(self, image: Image.Image, area: int) -> str:
        """A reference as upstream writes it into a prompt, `BOI h*w IMG ... EOI` in the tokens' written form."""
        config = Config(special_token_ids=self._role_ids, image_area=area)
        text: str = self.code.input_utils.build_image(image, config, self.tokenizer, self.vq)
        return text

    def generate(
        self,
        conditional: Tensor,
        unconditional: Tensor,
        *,
        guidance: float,
        image: Sampling,
        text: Sampling,
        size: tuple[int, int] | None,
        max_new_tokens: int,
        references: int,
        seed: int,
        stop: Sequence[int] = (),
        before: Sequence[LogitsProcessor] = (),
        after: Sequence[LogitsProcessor] = (),
        streamer: BaseStreamer | None = None,
    ) -> list[int]:
        """The ids that upstream's `generate` adds to the prompt, at most `max_new_tokens`, EOS or `stop` included.

        The processors `before` and `after` run around upstream's own: to observe it, or to force a token.
        """
        rows, columns = size or (None, None)
        config = Config(
            special_token_ids=self._role_ids | {"EOS": [self.ids.eos, *stop]},
            sampling_params=_sampling_params(image, text, max_new_tokens),
            classifier_free_guidance=guidance,
            target_height=rows,
            target_width=columns,
        )
        wrapped = _Wrapped(self.model, before, after, streamer)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            made = next(
                self.code.generation_utils.generate(
                    config,
                    wrapped,
                    self.tokenizer,
                    conditional,
                    unconditional,
                    None,
                    references <= 1,  # force_same_image_size, as inference.py sets it
                )
            )
        return [int(i) for i in made]

    def segments(self, ids: Sequence[int]) -> list[tuple[str, Any]]:
        """("text" | "global_cot" | "image_cot", str) and ("image", PIL image), by upstream's `multimodal_decode`."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        found: list[tuple[str, Any]] = self.code.generation_utils.multimodal_decode(
            text, self.tokenizer, _Decoder(self.vq)
        )
        return found


def _sampling_params(image: Sampling, text: Sampling, max_new_tokens: int) -> dict[str, Any]:
    """`sampling_params` in the form of upstream's configs, whose general top-k keeps every visual token."""
    kinds = {"text": text, "image": image}
    params: dict[str, Any] = {
        f"{kind}_{name}": getattr(sampling, name)
        for kind, sampling in kinds.items()
        for name in ("top_k", "top_p", "temperature")
    }
    return params | {
        "use_cache": True,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
        "num_beams": 1,
        "max_new_tokens": max_new_tokens,
        "guidance_scale": 1.0,
        "use_differential_sampling": True,
        "do_sample": True,
    }


def load(
    clone: Path,
    model: Path,
    vision: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None = None,
    device_map: str | None = None,
) -> Upstream:
    """Build a checkpoint's model, tokenizer and vision tokenizer with upstream's `build_emu3p5`.

    `attention` is the name transformers has for it; the default is "flash_attention_2" if that can run, else "sdpa".
    `device_map` "auto" spreads the layers over several devices.
    Raises CheckpointError for a vocabulary that does not fit upstream's constants.
    """
    tokenizer = Tokenizer.load(model)
    if attention is None:
        flash = device.type == "cuda" and dtype != torch.float32 and importlib.util.find_spec("flash_attn") is not None
        attention = "flash_attention_2" if flash else "sdpa"
    log.info("upstream's code runs in %s with %s attention (its own choice: bfloat16, flash_attention_2)", dtype, attention)  # fmt: skip  # noqa: E501
    code = import_code(clone, dtype=dtype, attention=attention)
    adopt_vocabulary(code, tokenizer.ids)
    with _tokenizer_folder(code, model, tokenizer.ids) as folder:
        built = code.model_utils.build_emu3p5(
            str(model), str(folder), str(vision), vq_type="ibq", model_device=device_map or device, vq_device=device
        )
    return Upstream(code, tokenizer, *built)

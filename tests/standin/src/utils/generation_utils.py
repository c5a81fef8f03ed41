"""Ids out of prompts, texts and pictures out of ids."""

import re

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig

from . import logits_processor


def generate(cfg, model, tokenizer, input_ids, unconditional_ids, full_unconditional_ids, force_same_image_size):
    grammar = logits_processor.Grammar(cfg, unconditional_ids, model, tokenizer, force_same_image_size)
    ends = {"pad_token_id": cfg.special_token_ids["PAD"], "eos_token_id": cfg.special_token_ids["EOS"]}
    own = ("text_", "image_", "use_differential")
    known = {name: value for name, value in cfg.sampling_params.items() if not name.startswith(own)}
    made = model.generate(input_ids, GenerationConfig(**known, **ends), logits_processor=[grammar])
    yield made[0, input_ids.shape[1] :].cpu().numpy()


def multimodal_decode(outputs, tokenizer, vision_tokenizer):
    for end in (tokenizer.ess_token, tokenizer.eos_token):
        outputs = outputs.replace(end, "")
    pairs = {
        "global_cot": (tokenizer.bog_token, tokenizer.eog_token),
        "image_cot": (tokenizer.boc_token, tokenizer.eoc_token),
        "image": (tokenizer.boi_token, tokenizer.eoi_token),
    }
    found = []
    pattern = "|".join(f"{re.escape(a)}.*?{re.escape(b)}" for a, b in pairs.values())
    for piece in re.split(f"({pattern})", outputs, flags=re.DOTALL):
        kind = next((k for k, (a, b) in pairs.items() if piece.startswith(a) and piece.endswith(b)), "text")
        if kind == "image":
            if (image := decode_image(piece, tokenizer, vision_tokenizer)) is not None:
                found.append((kind, image))
        elif kind != "text":
            found.append((kind, piece.removeprefix(pairs[kind][0]).removesuffix(pairs[kind][1])))
        elif piece.strip() and tokenizer.boi_token not in piece:
            found.append((kind, piece))
    return found


def decode_image(text, tokenizer, vision_tokenizer):
    rows = [re.findall(r"<\|visual token (\d+)\|>", row) for row in text.split(tokenizer.eol_token)]
    if len({len(row) for row in rows}) != 1:
        return None
    codes = torch.tensor([[int(code) for code in row] for row in rows])[None]
    pixels = vision_tokenizer.decode_code(codes, (*codes.shape, 256))[0].permute(1, 2, 0).float()
    return Image.fromarray(((pixels + 1) * 127.5).clamp(0, 255).cpu().numpy().astype(np.uint8))

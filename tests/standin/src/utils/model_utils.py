"""Builds the three parts of a checkpoint."""

import importlib.util

from ..emu3p5 import Emu3Config, Emu3ForCausalLM
from ..vision_tokenizer import build_vision_tokenizer

NAMES = {"bos": 203, "eos": 204, "eol": 200, "eof": 201, "tms": 202, "bss": 100, "ess": 101}
NAMES |= {"bog": 60, "eog": 61, "boc": 50, "eoc": 51}


def build_emu3p5(model_path, tokenizer_path, vq_path, vq_type, model_device, vq_device):
    print(model_device)
    config = Emu3Config.from_pretrained(model_path, trust_remote_code=True)
    model = Emu3ForCausalLM.from_pretrained(
        model_path, config=config, device_map=model_device, attn_implementation="flash_attention_2"
    ).eval()
    spec = importlib.util.spec_from_file_location("standin_tokenizer", f"{tokenizer_path}/tokenization_emu3.py")
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    tokenizer = code.Emu3Tokenizer(tokenizer_path)
    for name, number in NAMES.items():
        setattr(tokenizer, f"{name}_token", f"<|extra_{number}|>")
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.img_token, tokenizer.boi_token, tokenizer.eoi_token = (
        "<|image token|>",
        "<|image start|>",
        "<|image end|>",
    )
    return model, tokenizer, build_vision_tokenizer(vq_type, vq_path, device=vq_device)

from transformers import Qwen3Config, Qwen3ForCausalLM

from .configuration_emu3 import Emu3Config

SCALE = 1.0


class Emu3ForCausalLM(Qwen3ForCausalLM):
    @classmethod
    def from_pretrained(cls, folder, *, config, torch_dtype, **kwargs):
        assert isinstance(config, Emu3Config)
        return super().from_pretrained(folder, config=Qwen3Config.from_pretrained(folder), dtype=torch_dtype, **kwargs)

    def forward(self, **kwargs):
        out = super().forward(**kwargs)
        out.logits = SCALE * out.logits.float()
        return out

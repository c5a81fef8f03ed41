"""Pictures and prompts of a FlashAR repository's own code, for given prompts.

    PYTHON reference_flashar.py CLONE CHECKPOINT IN.json OUT.npz

CLONE is lxazjk/Emu3.5-FlashAR or XiaomiRobotics/Xiaomi-Robotics-U0; their code is run where it lies. Runs in a Python
of its own (torch, numpy, safetensors and the transformers version that both pin, 4.48.2) and imports nothing of this
project. fp32 on the CPU, eager attention, top-k 1.

IN: {"runs": {name: {conditional, unconditional (ids or null), rows, columns, guidance}},
     "prompts": {name: {task, question, images (text of each), rows, columns}}}
OUT, for every run, streams in the order conditional, unconditional:
    `name/h`, `name/v`  (streams, 1 + cells, hidden): of the prompt's last token, then of the cells row by row
    `name/gate`         (streams, rows, columns): the horizontal head's share; NaN where there is no gate
    `name/logits`       (cells, visual tokens): what was sampled from, guidance included
    `name/tokens`       (cells,): codes
and `prompts`, JSON: {name: [conditional, unconditional]} as text.
The last line printed is JSON: versions, the layout, and the layer at which the vertical branch begins.
"""

import ast
import importlib
import importlib.util
import json
import platform
import re
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers


def stub(*names):
    """Modules that their files import and that nothing here uses, where they are not installed."""
    missing = [name for name in names if importlib.util.find_spec(name.split(".")[0]) is None]
    sys.modules.update({name: mock.MagicMock(__spec__=None, __path__=[]) for name in missing})


def load_lxazjk(checkpoint):
    """As generate_flashar.py does, but that the state holds the decoder: Emu3.5-Image itself is not needed."""
    from flashar.model import Emuflashar, modeling_emu_flashar
    from src.emu3p5 import Emu3Config, Emu3ForCausalLM

    checkpoints = by_path("flashar_checkpoint_utils", "src/utils/flashar_checkpoint_utils.py")
    state = checkpoints.safe_torch_load(str(checkpoint))
    metadata = checkpoints.load_flashar_metadata(str(checkpoint))
    config = Emu3Config(**metadata["backbone_config"])
    config._attn_implementation = "eager"
    model = Emuflashar(
        pretrained_backbone=Emu3ForCausalLM(config).model,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        pad_token_id=-100,
        mask_token_id=config.pad_token_id,
        visual_token_offset=int(config.eoi_token_id) + 1,
        use_vertical_block=metadata["use_vertical_block"],
        vertical_layers=metadata["vertical_layers"],
        vertical_start_layer=metadata["vertical_start_layer"],
    )
    assert checkpoints.infer_vertical_from_state(state) == (True, metadata["vertical_layers"])
    model.load_state_dict(state, strict=True)
    return model.eval(), modeling_emu_flashar


def load_u0(checkpoint, vertical_layers):
    """As xr_u0_flashar/eager_cli.py does."""
    from xr_u0_ar.configuration_unis import UNISConfig
    from xr_u0_flashar import eager_cli
    from xr_u0_flashar import model as module

    path = eager_cli.discover_flashar_state(str(checkpoint))
    assert eager_cli.is_integrated_flashar_state(path)
    config = UNISConfig.from_pretrained(str(checkpoint))
    config._attn_implementation = "eager"
    model = module.UNISFlashAR(
        pretrained_backbone=eager_cli.build_empty_backbone(config, torch.float32).model,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        pad_token_id=-100,
        mask_token_id=config.pad_token_id,
        visual_token_offset=int(config.eoi_token_id) + 1,
        use_vertical_block=True,
        vertical_layers=vertical_layers,
        vertical_start_layer=int(config.num_hidden_layers) - vertical_layers,
    )
    model.load_state_dict(eager_cli.load_state(path), strict=True)
    return model.eval(), module


def by_path(name, path):
    """A module of the clone by its file: its package's __init__ imports more."""
    spec = importlib.util.spec_from_file_location(name, CLONE / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorder:
    """Stands between `generate` and the steps it is made of, and keeps what passes."""

    def __init__(self, model, module):
        self.model, self.module = model, module

    @torch.no_grad()
    def run(self, given):
        model, rows, columns = self.model, given["rows"], given["columns"]
        cells, streams = rows * columns, 1 if given["unconditional"] is None or given["guidance"] <= 1 else 2
        order = [1, 0] if streams == 2 else [0]  # theirs: unconditional first
        h = np.zeros((streams, 1 + cells, model.hidden_size), np.float32)
        v = np.zeros_like(h)
        gate = np.full((streams, rows, columns), np.nan, np.float32)
        logits, now = [None] * cells, {}

        prefill, backbone, vertical = (
            getattr(model, name)
            for name in ("_prefill_generation_prefix", "_append_backbone_kv_step", "_append_vertical_kv_step")
        )
        pair, corner, compute = model._hv_gate_from_pair, model._hv_gate_corner, model._compute_step_logits_from_prev
        draw = self.module._sample_logits

        def on_prefill(*args):
            out = prefill(*args)
            h[:, 0], v[:, 0] = out[0][order, 0], out[1][order, 0]
            return out

        def on_compute(**kwargs):
            now["cells"] = kwargs["step_positions"].tolist()
            return compute(**kwargs)

        def on_pair(*args, **kwargs):
            out = pair(*args, **kwargs)
            inner = [cell for cell in now["cells"] if cell // columns and cell % columns]
            for at, cell in enumerate(inner):
                gate[:, cell // columns, cell % columns] = out[order, at, 0]
            return out

        def on_corner(*args, **kwargs):
            out = corner(*args, **kwargs)
            gate[:, 0, 0] = out[order, 0, 0]
            return out

        def on_draw(scores, **kwargs):
            for at, cell in enumerate(now["cells"]):
                logits[cell] = scores[0, at, model.visual_token_offset :].clone().numpy()
            return draw(scores, **kwargs)

        def on_backbone(**kwargs):
            out = backbone(**kwargs)
            h[:, [1 + cell for cell in now["cells"]]] = out[0][order]
            return out

        def on_vertical(**kwargs):
            out = vertical(**kwargs)
            v[:, [1 + cell for cell in now["cells"]]] = out[0][order]
            return out

        with mock.patch.multiple(
            model,
            _prefill_generation_prefix=on_prefill, _compute_step_logits_from_prev=on_compute,
            _append_backbone_kv_step=on_backbone, _append_vertical_kv_step=on_vertical,
            _hv_gate_from_pair=on_pair, _hv_gate_corner=on_corner,
        ), mock.patch.object(self.module, "_sample_logits", on_draw):  # fmt: skip
            unconditional = given["unconditional"]
            grid = model.generate(
                height=rows,
                width=columns,
                device=torch.device("cpu"),
                text_input_ids=torch.tensor([given["conditional"]]),
                unconditional_text_input_ids=None if unconditional is None else torch.tensor([unconditional]),
                cfg_scale=given["guidance"],
                temperature=1.0,
                top_k=1,
                top_p=1.0,
            )
        tokens = grid.flatten().numpy() - model.visual_token_offset
        return {"h": h, "v": v, "gate": gate, "logits": np.stack(logits), "tokens": tokens.astype(np.int64)}


class Letters:
    """A tokenizer whose tokens are special tokens and single letters: what it encodes can be written back."""

    boi_token, img_token = "<|image start|>", "<|image token|>"

    def __init__(self):
        self.known = {}

    def encode(self, text, add_special_tokens=False):
        return [self.known.setdefault(piece, len(self.known)) for piece in re.findall(r"<\|[^|]*\|>|.", text, re.S)]

    def decode(self, ids):
        letters = {number: piece for piece, number in self.known.items()}
        return "".join(letters[number] for number in ids)


def lxazjk_prompts(given):
    """The evaluation's prompts; for the task "benchmark" its own unconditional one."""
    tool = by_path("generate_geneval_flashar", "tools/generate_geneval_flashar.py")
    with mock.patch.object(sys, "argv", ["-"]):
        template = tool.parse_args().text_template
    letters, size = Letters(), (given["rows"], given["columns"], torch.device("cpu"))
    texts = [
        letters.decode(tool.make_prefix(letters, question, template, *size)[0].tolist())
        for question in (given["question"], "")
    ]
    if given["task"] == "benchmark":
        tree = ast.parse((CLONE / "configs/benchmark_t2i_flashar.py").read_text(encoding="utf-8"))
        body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "build_unc_and_template"]
        scope = {}
        exec(compile(ast.Module(body=body, type_ignores=[]), "benchmark_t2i_flashar.py", "exec"), scope)
        unconditional, template = scope["build_unc_and_template"]("t2i", False)
        anchor = letters.decode(tool.build_image_prefix_tokens(letters, given["rows"], given["columns"]))
        texts = [template.format(question=given["question"]) + anchor, unconditional + anchor]
    return texts


def u0_prompts(given):
    """The templates of the task's config, rendered by its inference script. The photos are given as text."""
    script = by_path("inference_flashar", "scripts/inference_flashar.py")
    tasks = importlib.import_module(f"configs.tasks.{given['task']}")
    cfg = types.SimpleNamespace(**tasks.task_config("flashar"))
    images = given["images"]
    case = {"id": "-", "prompt": given["question"], "reference_image": ["-"] * len(given["images"]) or None}
    image_tokens = importlib.import_module("xr_u0_ar.image_tokens")
    depth = importlib.import_module("xr_u0_ar.depth_preprocess")
    with (
        mock.patch.object(image_tokens, "build_image", side_effect=images),
        mock.patch.object(depth, "open_reference_image"),
    ):
        size = {"height": given["rows"], "width": given["columns"]}
        return list(script.render_case(cfg, case, tokenizer=None, vision_tokenizer=None, **size))


def main(checkpoint, source, target):
    sys.dont_write_bytecode = True  # the clone must stay as it was checked out
    sys.path.insert(0, str(CLONE))
    stub("PIL", "PIL.Image", "omegaconf", "einops", "tqdm")
    given = json.loads(source.read_text(encoding="utf-8"))
    if (CLONE / "flashar/model/modeling_emu_flashar.py").exists():
        layout, render = "lxazjk", lxazjk_prompts
        model, module = load_lxazjk(checkpoint)
    else:
        layout, render = "u0", u0_prompts
        model, module = load_u0(checkpoint, given["vertical_layers"])
    recorder, made = Recorder(model, module), {}
    for name, run in given["runs"].items():
        made |= {f"{name}/{key}": value for key, value in recorder.run(run).items()}
    texts = {name: render(prompt) for name, prompt in given["prompts"].items()}
    np.savez(target, **made, prompts=np.array(json.dumps(texts)))
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({**versions, "python": platform.python_version(), "layout": layout,
                      "start": model.vertical_start_layer}))  # fmt: skip


if __name__ == "__main__":
    CLONE = Path(sys.argv[1]).resolve()
    main(*map(Path, sys.argv[2:5]))

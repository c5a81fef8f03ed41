"""Logits of upstream's own model file, `src/emu3p5/modeling_emu3.py`, for given ids.

    PYTHON reference_logits.py CLONE CHECKPOINT IN.npz OUT.npz DTYPE DEVICE

Runs in a Python of its own (torch, numpy and the transformers version that upstream pins, 4.48.2) and imports nothing
of this project. IN holds for each sequence i `i/prompt` and `i/steps`, (n,) int64: the prompt is run in one pass, then
each step in a pass of one token over the cache, as upstream generates. OUT holds `i/logits`, (positions, vocabulary)
fp32: the last KEPT positions of the prompt, then every step. Attention is eager: upstream's SDPA class leaves out the
norms of queries and keys.
"""

import importlib
import json
import platform
import sys
import types
from pathlib import Path

import numpy as np
import torch
import transformers

KEPT = 32


@torch.no_grad()
def main(clone: Path, checkpoint: Path, source: Path, target: Path, dtype: str, device: str) -> None:
    sys.dont_write_bytecode = True  # the clone must stay as it was checked out
    package = types.ModuleType("emu3p5")  # not upstream's __init__.py, which the clone need not hold
    package.__path__ = [str(clone / "src" / "emu3p5")]
    sys.modules["emu3p5"] = package
    config = importlib.import_module("emu3p5.configuration_emu3").Emu3Config.from_pretrained(checkpoint)
    model, report = importlib.import_module("emu3p5.modeling_emu3").Emu3ForCausalLM.from_pretrained(
        checkpoint,
        config=config,
        torch_dtype=getattr(torch, dtype),
        attn_implementation="eager",
        output_loading_info=True,
    )
    wrong = {key: sorted(names)[:3] for key, names in report.items() if names}
    if wrong:
        sys.exit(f"error: {checkpoint} does not fit upstream's model file: {wrong}")
    model = model.eval().to(device)
    made = {}
    with np.load(source) as given:
        for name in sorted({key.split("/")[0] for key in given}):
            made[f"{name}/logits"] = run(model, given[f"{name}/prompt"], given[f"{name}/steps"]).cpu().numpy()
    np.savez(target, **made)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({**versions, "python": platform.python_version()}))


def run(model, prompt, steps):  # type: ignore[no-untyped-def]  # the reference Python may be too old for annotations
    device = next(model.parameters()).device
    out = model(input_ids=torch.from_numpy(prompt)[None].to(device), use_cache=True)
    logits = [out.logits[0, -KEPT:].float()]
    for token in steps.tolist():
        fed = torch.tensor([[token]], device=device)
        out = model(input_ids=fed, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0].float())
    return torch.cat(logits)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]), *sys.argv[5:7])

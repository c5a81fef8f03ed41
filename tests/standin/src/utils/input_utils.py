"""A photo to the written form of its codes."""

import numpy as np
import torch


def build_image(image, cfg, tokenizer, vq_model):
    width, height = image.size
    high = int((cfg.image_area / (width / height)) ** 0.5)
    wide = int(high * (width / height))
    high, wide = (high + 8) // 16, (wide + 8) // 16
    image = image.resize((16 * wide, 16 * high), 3)
    parameter = next(iter(vq_model.parameters()))
    pixels = torch.tensor(np.array(image) / 127.5 - 1.0).to(parameter.device, parameter.dtype).permute(2, 0, 1)
    codes = vq_model.encode(pixels[None])[2][-1].view(high, wide)
    rows = ["".join(f"<|visual token {code:06d}|>" for code in row) for row in codes.tolist()]
    body = tokenizer.eol_token.join(rows)
    return f"{tokenizer.boi_token}{high}*{wide}{tokenizer.img_token}{body}{tokenizer.eoi_token}"

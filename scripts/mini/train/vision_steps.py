"""One training step of the vision tokenizer: codebook moving averages, loss, forward and backward pass."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emu_cog.vision.ibq import IBQ
from scripts.mini.pool import SQUARE
from scripts.mini.train.fused import fuse

LENGTH = 32**0.5
"""Length of every code in the decoder's input, for components of about unit size."""


class Codes(nn.Module):
    """The codebook during training: moving averages of the unit vectors assigned to each code."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.register_buffer("book", F.normalize(torch.randn(count, width), dim=1))
        self.register_buffer("uses", torch.ones(count))
        self.register_buffer("sums", self.book.clone())

    @torch.no_grad()
    def resume(self, embedding: Tensor) -> None:
        """Load a saved codebook."""
        self.book.copy_(F.normalize(embedding.float(), dim=1))
        self.sums.copy_(self.book)

    @torch.no_grad()
    def initialize(self, z: Tensor) -> None:
        """Spherical k-means over (N, width) unit vectors, with spread-out initialization: most patches are plain
        background, which would otherwise take most codes."""
        count = len(self.book)
        self.book[:] = z[torch.randint(len(z), (count,), device=z.device)]
        filled = count // 32
        while filled < count:
            more = min(count // 16, count - filled)
            self.book[filled : filled + more] = z[self._sample_distant(z, self.book[:filled], more)]
            filled += more
        for _ in range(10):
            codes = (z @ self.book.t()).argmax(1)
            sums = torch.zeros_like(self.book).index_add_(0, codes, z)
            used = torch.bincount(codes, minlength=count) > 0
            self.book[used] = F.normalize(sums[used], dim=1)
        self.sums.copy_(self.book)
        self.uses.fill_(1.0)

    @staticmethod
    def _sample_distant(z: Tensor, book: Tensor, count: int) -> Tensor:
        """Indices of `count` rows of z, sampled in proportion to the squared distance from the nearest code."""
        distance = (2 - 2 * (z @ book.t()).amax(1)).clamp(min=1e-6)
        return torch.multinomial(distance, count, replacement=True)

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor, *, decay: float, revive: bool) -> None:
        """Move each code towards its assigned vectors; with `revive`, rarely used codes are reset."""
        count = len(self.book)
        self.uses.lerp_(torch.bincount(codes, minlength=count).float(), 1 - decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, codes, z), 1 - decay)
        self.book.copy_(F.normalize(torch.where(self.uses[:, None] > 1e-4, self.sums, self.book), dim=1))
        if revive:
            dead = self.uses < 0.03 * len(z) / count
            fresh = z[self._sample_distant(z, self.book, count)]
            self.book.copy_(torch.where(dead[:, None], fresh, self.book))
            self.sums.copy_(torch.where(dead[:, None], fresh, self.sums))
            self.uses.copy_(torch.where(dead, torch.ones_like(self.uses), self.uses))


def step(
    model: IBQ, codes: Codes, x: Tensor, target: Tensor, quantise: Tensor, *, finish: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, squared error, unit features (N, width), codes (N,)) of one batch; `quantise` is 0 or 1.

    With `finish` only the decoder is trained.
    """
    with torch.set_grad_enabled(not finish):
        z = F.normalize(model.features(x).float(), dim=1)  # (N, width, h, w)
    flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    with torch.no_grad():
        chosen = (flat @ codes.book.t()).argmax(1)
        near = codes.book[chosen].view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
    distance = (z - near).pow(2).sum(1).mean()
    passed = near if finish else z + quantise * (near - z).detach()
    y = model.decoder(model.post_quant_conv((LENGTH * passed).to(x.dtype))).float()
    error = (y - target).abs()
    squared = error.pow(2).mean()
    loss = error.mean() + 8 * squared + 0.25 * quantise * distance
    return loss, squared, flat.detach(), chosen


class TrainingPasses:
    """The model that computes the passes: on a GPU a fused bf16 copy of the optimizer's fp32 weights.

    Pure bf16, as autocast would run the norms in fp32 and move twice the bytes at full resolution. The passes with and
    without `finish` are captured as CUDA graphs and replayed.
    """

    def __init__(self, model: IBQ, codes: Codes, batch: int, device: torch.device, *, captured: bool) -> None:
        self.codes, self.separate = codes, device.type == "cuda"
        self.quantise = torch.zeros((), device=device)
        if self.separate:
            model.to(memory_format=torch.channels_last)
        self.model = fuse(copy.deepcopy(model).bfloat16()) if self.separate else model
        names = [name for name, _ in model.named_parameters() if not name.startswith("quantize")]
        self.in_decoder = [name.startswith(("decoder", "post_quant")) for name in names]
        self.own, self.copies = (
            [p for name, p in m.named_parameters() if not name.startswith("quantize")] for m in (model, self.model)
        )
        shape = (batch, 3, SQUARE[0] * 16, SQUARE[1] * 16)
        dtype = torch.bfloat16 if self.separate else torch.float32
        self.x = torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
        self.target = torch.zeros(shape, device=device)
        if self.separate:
            for p in self.copies:
                p.grad = torch.zeros_like(p)
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor, Tensor]]] = {}
        if captured and self.separate:
            self._capture()

    def _capture(self) -> None:
        pool = torch.cuda.graph_pool_handle()
        for finish in (False, True):
            side_stream = torch.cuda.Stream()
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):  # warm-up passes for one-time setup
                for _ in range(2):
                    self._pass(finish)
            torch.cuda.current_stream().wait_stream(side_stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                found = self._pass(finish)
            self.graphs[finish] = graph, found

    def _pass(self, finish: bool) -> tuple[Tensor, Tensor, Tensor]:
        grads = [p.grad for p in self.copies if p.grad is not None]
        if grads:
            torch._foreach_zero_(grads)
        loss, squared, flat, chosen = step(self.model, self.codes, self.x, self.target, self.quantise, finish=finish)
        loss.backward()
        return squared.detach(), flat, chosen

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the optimizer's weights into the bf16 copy."""
        if self.separate:
            torch._foreach_copy_(self.copies, self.own)

    def gradients(self, x: Tensor, target: Tensor, *, finish: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Compute gradients in the fp32 weights; return (squared error, unit features, codes), valid until the next
        call."""
        self.x.copy_(x)
        self.target.copy_(target)
        if self.graphs:
            graph, found = self.graphs[finish]
            graph.replay()
        else:
            found = self._pass(finish)
        if self.separate:
            pairs = [
                (own, c.grad)
                for own, c, in_decoder in zip(self.own, self.copies, self.in_decoder, strict=True)
                if in_decoder or not finish
            ]
            for own in self.own:
                own.grad = None
            for own, _ in pairs:
                own.grad = torch.empty_like(own)
            torch._foreach_copy_([own.grad for own, _ in pairs], [grad for _, grad in pairs])
        elif finish:
            for own, in_decoder in zip(self.own, self.in_decoder, strict=True):
                own.grad = own.grad if in_decoder else None
        return found

"""The compiled vision decoder: the eager one's pixels, one graph for all sizes, and a fallback that is logged; and how
many maps are alive in both."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emu_cog.settings import Settings
from emu_cog.vision.compiled import CompiledDecoder
from emu_cog.vision.ibq import IBQ, VisionConfig

SIZES = [(10, 10), (12, 14), (14, 12), (20, 11), (11, 23)]


def network(levels: int = 3) -> IBQ:
    """A small decoder with attention in its lowest level. One code covers 2**(levels-1) pixels a side."""
    config = VisionConfig(
        ch=32,
        out_ch=3,
        ch_mult=(1,) * levels,
        num_res_blocks=1,
        attn_resolutions=(32 // 2 ** (levels - 1),),
        in_channels=3,
        resolution=32,
        z_channels=32,
        double_z=False,
        n_embed=64,
        embed_dim=32,
    )
    torch.manual_seed(0)
    return IBQ(config).eval().requires_grad_(False)


def codes(rows: int, columns: int) -> Tensor:
    return torch.randint(0, 64, (1, rows, columns), generator=torch.Generator().manual_seed(rows * columns))


@torch.inference_mode()
def test_a_new_aspect_ratio_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hosted peer's decoder was recompiled for every size: 55 s and 38 s for the first two on a CPU.

    The backend compiles nothing, but the graphs and the compiled branch of the norm are the real ones.
    """
    # PyTorch uses oneDNN's convolutions for large tensors only, which would add graphs for small pictures on a CPU.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    vision = network()
    expected = [vision.decode(codes(*size)) for size in SIZES]
    counter = CompileCounterWithBackend("aot_eager")
    CompiledDecoder(vision, backend=counter).warm_up(SIZES[:1])
    graphs = counter.frame_count
    # All eight blocks have one width and share a graph; the tail is the other. Each is traced twice, because PyTorch
    # finds out during tracing that the norm's epsilon can be a constant.
    assert graphs <= 4
    for size, pixels in zip(SIZES, expected, strict=True):
        assert torch.allclose(vision.decode(codes(*size)), pixels, atol=1e-5)
    assert counter.frame_count == graphs


@pytest.mark.slow  # half a minute of C++ compilation; the graphs are checked above
@torch.inference_mode()
def test_inductor_makes_the_same_pixels() -> None:
    vision = network(levels=1)
    expected = [vision.decode(codes(*size)) for size in SIZES[-2:]]
    compiled = CompiledDecoder(vision)
    for size, pixels in zip(SIZES[-2:], expected, strict=True):
        assert torch.allclose(vision.decode(codes(*size)), pixels, atol=1e-5)
    assert compiled.active


@torch.inference_mode()
def test_a_failing_compiler_is_logged_once_and_the_eager_decoder_serves(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no C compiler here")

    vision = network()
    expected = vision.decode(codes(10, 10))
    compiled = CompiledDecoder(vision, backend=broken)
    with caplog.at_level(logging.WARNING, logger="emu_cog"):
        compiled.warm_up([(10, 10)])
        assert torch.equal(vision.decode(codes(10, 10)), expected)
    assert not compiled.active
    (message,) = [record.getMessage() for record in caplog.records]
    assert "runs uncompiled" in message
    assert "no C compiler here" in message


@torch.inference_mode()
def test_convolutions_in_fp16_make_the_same_picture() -> None:
    """As near as TF32, which has as many bits; the norms' sums and the residual stream stay in fp32."""
    vision = network()
    expected = vision.decode(codes(10, 12))
    CompiledDecoder(vision, half=True, backend="eager")
    found = vision.decode(codes(10, 12))
    assert found.dtype == torch.float32
    assert 0 < float((found - expected).abs().max() / expected.abs().max()) < 5e-3


@torch.inference_mode()
def test_what_fp16_can_not_hold_is_decoded_again(caplog: pytest.LogCaptureFixture) -> None:
    vision = network()
    vision.decoder.up[1].block[0].conv1.weight.mul_(1e6)  # type: ignore[index,union-attr]
    expected = vision.decode(codes(10, 10))
    compiled = CompiledDecoder(vision, half=True, backend="eager")
    with caplog.at_level(logging.WARNING, logger="emu_cog"):
        for _ in range(2):
            assert torch.allclose(vision.decode(codes(10, 10)), expected, atol=1e-5)
    assert compiled.active
    (message,) = [record.getMessage() for record in caplog.records]
    assert "too large for fp16" in message


def test_warm_up_logs_its_seconds(caplog: pytest.LogCaptureFixture) -> None:
    vision = network()
    compiled = CompiledDecoder(vision, backend="eager")
    with caplog.at_level(logging.INFO, logger="emu_cog"):
        compiled.warm_up(SIZES[:2])
    assert [record.getMessage().rsplit(":", 1)[0] for record in caplog.records] == [
        "setup: vision decoder, compiled, 10x10 tokens",
        "setup: vision decoder, 12x14 tokens",
    ]


@pytest.mark.parametrize(("value", "meaning"), [("0", False), ("1", True), ("", True)])
def test_emu_compile_is_a_switch(value: str, meaning: bool) -> None:
    assert Settings.from_env({"EMU_COMPILE": value}).compile is meaning


def test_emu_compile_takes_nothing_else() -> None:
    with pytest.raises(ValueError, match="EMU_COMPILE='yes' must be 0 or 1"):
        Settings.from_env({"EMU_COMPILE": "yes"})


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made in this context and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            if storage._cdata not in self._alive:
                self._alive[storage._cdata] = weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


@pytest.mark.parametrize("direction", ["decode", "features"])
@torch.inference_mode()
def test_a_pass_holds_three_maps(direction: str) -> None:
    """A residual block's input and both ends of a convolution. It was five when decoding: also what entered the level,
    and the first convolution's output during the second."""
    vision, grid = network(), codes(16, 16)
    pixels = vision.decode(grid)
    with LiveBytes() as live:
        again = vision.decode(grid) if direction == "decode" else vision.features(pixels)
    largest = 32 * pixels[0, 0].nbytes
    assert 3 <= live.peak / largest < 3.2
    if direction == "decode":
        assert torch.equal(again, pixels)


@torch.inference_mode()
def test_no_map_outlives_the_compiled_block_that_reads_it() -> None:
    """The input of a level of compiled blocks was alive until the level's end: 1 of 4 GiB, at 1024x1024 pixels."""
    maps: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
    alive = []

    def backend(graph: GraphModule, _: Any) -> Any:
        def run(*inputs: Any) -> Any:
            maps.update({id(x): x for x in inputs if isinstance(x, Tensor) and x.dim() == 4 and len(x) == 1})
            alive.append(len(maps))
            return graph(*inputs)

        return run

    vision = network()
    CompiledDecoder(vision, backend=backend)
    vision.decode(codes(10, 10))
    assert alive[2:] == [1] * 7  # after the small maps of the middle: two blocks in each of three levels, and the tail

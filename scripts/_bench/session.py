"""One run of the bench: make the model, measure the parts by importance, print each figure as it is measured."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from _bench import (
    arrivals,
    company,
    decoding,
    flash,
    flash_rival,
    loading,
    machine,
    miniature,
    models,
    pictures,
    quality,
    reference,
    soak,
)
from _bench.decoding import Bench
from _bench.report import Part, Report, Row, run_parts
from _bench.sizes import SIZES, choose
from emu_cog.engine.engine import Engine
from emu_cog.memory import GIB
from emu_cog.model import torch_settings
from emu_cog.model.device import choose_device, choose_dtype
from emu_cog.model.qwen3 import LanguageModel
from emu_cog.settings import Settings

PARTS = (
    "step",
    "many",
    "windows",
    "upstream",
    "images",
    "sync",
    "vq",
    "context",
    "prefill",
    "agreement",
    "eager",
    "fp8",
    "int8",
    "mini",
    "company",
    "loading",
)
"""The order of the run: by importance, but 8-bit weights after everything that needs the full ones. On 80 GB the full
weights have no room beside what 8-bit weights leave allocated."""
ON_REQUEST = ("many-fp8", "many-int8", "windows-fp8", "windows-int8", "flash", "arrivals", "soak")
"""Parts that run only where --only names them."""
WITHOUT_MODEL = {"vq", "mini", "company", "loading", "flash", "arrivals", "soak"}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The command line. `deadline` on time.monotonic's clock; an empty `only` means all of PARTS. `requests` and
    `shape`: see the parts soak and arrivals. `flashar`: the clone whose code the part flash measures as well."""

    size: str | None
    device: str | None
    dtype: str | None
    only: tuple[str, ...]
    profile: str | None
    clone: str | None
    folder: Path | None
    json: Path | None
    deadline: float
    requests: int = 500
    shape: str = "mini"
    concurrency: int = 8
    flashar: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What suits a device: contexts in tokens, the part of an image that is timed, tokens that upstream makes, numbers
    of pictures at once."""

    short: int
    contexts: list[int]
    columns: int
    rows: int
    upstream_tokens: int
    pictures: tuple[int, ...]


GPU = Pace(
    short=512, contexts=[2048, 8192, 16384], columns=64, rows=5, upstream_tokens=24, pictures=(1, 2, 4, 8, 16, 32)
)
CPU = Pace(short=128, contexts=[1024], columns=12, rows=4, upstream_tokens=12, pictures=(1, 2, 4, 8))


def run(wanted: Wanted, settings: Settings, *, started: float) -> None:
    """Measure and report. InputError for a device or dtype that is not there, or a clone that is none."""
    if wanted.flashar:
        flash_rival.checked(wanted.flashar)
    device = choose_device(wanted.device or settings.device)
    dtype = choose_dtype(wanted.dtype or settings.dtype, device)
    torch_settings.apply(device)
    torch_settings.keep_compiled(settings.compile_cache or settings.weights_dir / ".compiled")
    name = wanted.size or choose(machine.free_bytes(device), item=dtype.itemsize, cpu=device.type == "cpu")
    facts = machine.describe(device) | {"model": name, "dtype": str(dtype).removeprefix("torch.")}
    report = Report(facts)
    report.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    bandwidth = machine.copy_bandwidth(device)
    report.add(Row(part="copy", what="copy bandwidth", value=bandwidth / 1e9, unit="GB/s", note="bytes read + written"))
    began = time.perf_counter()
    needed = not wanted.only or not set(wanted.only) <= WITHOUT_MODEL
    made = name if needed else "tiny"
    lm = models.language_model(SIZES[made], device=device, dtype=dtype)
    machine.wait(device)
    report.print(f"  made {SIZES[made].parameters / 1e9:.2f} B random weights in {time.perf_counter() - began:.1f} s")
    pace = GPU if device.type == "cuda" and name != "tiny" else CPU
    bench = Bench(
        report=report,
        lm=lm,
        size=SIZES[name],
        item=dtype.itemsize,
        bandwidth=bandwidth,
        columns=pace.columns,
        rows=pace.rows,
        compile=settings.compile,
        pictures=max(pace.pictures),
    )
    try:
        _Session(bench, pace, wanted, settings).run()
    finally:  # also when it is stopped
        report.add(Row(part="memory", what="most memory in use", value=machine.peak_gib(device), unit="GiB"))
        report.finish(time.monotonic() - started)
        if wanted.json:
            wanted.json.write_text(report.json(time.monotonic() - started) + "\n", encoding="utf-8")


@dataclass
class _Session:
    """The parts, and what later ones need from earlier ones: step seconds by number of images, the native engine."""

    bench: Bench
    pace: Pace
    wanted: Wanted
    settings: Settings
    steps: dict[int, float] = field(default_factory=dict)
    engine: Engine | None = None
    exact: list[Tensor] | None = None
    full: bool = True

    def run(self) -> None:
        work: dict[str, tuple[Callable[[], None], float]] = {
            "step": (self.step, 0),
            "many": (self.many, 30),
            "windows": (self.windows, 30),
            "windows-fp8": (lambda: self.windows_small("fp8"), 60),
            "windows-int8": (lambda: self.windows_small("int8"), 60),
            "many-fp8": (lambda: self.many_small("fp8"), 60),
            "many-int8": (lambda: self.many_small("int8"), 60),
            "upstream": (self.upstream, 30),
            "images": (self.images, 20),
            "sync": (self.sync, 15),
            "vq": (self.vq, 30),
            "eager": (self.eager, 15),
            "prefill": (self.prefill, 15),
            "context": (self.context, 25),
            "agreement": (self.agreement, 15),
            "mini": (self.mini, 60 if self.pace is GPU else 150),
            "fp8": (lambda: self.small("fp8"), 30),
            "int8": (lambda: self.small("int8"), 30),
            "company": (self.company, 60),
            "loading": (self.loading, 40),
            "flash": (self.flash, 180 if self.wanted.flashar else 90),
            "arrivals": (self.arrivals, 60),
            "soak": (self.soak, 60),
        }
        # On a device the seconds are for the large models; a CPU's small ones and the tiny one need less.
        share = 1.0 if self.pace is GPU else 0.3
        order = [name for name in PARTS if not self.wanted.only or name in self.wanted.only]
        order += [name for name in ON_REQUEST if name in self.wanted.only]
        parts = [Part(name=name, run=work[name][0], seconds=share * work[name][1]) for name in order]
        if self.wanted.profile:
            parts.insert(1, Part(name="profile", run=self.profile))
        run_parts(parts, self.bench.report, deadline=self.wanted.deadline)

    def native(self) -> Engine:
        """The engine as Pipeline builds it, made at its first use; the seconds are reported."""
        self._full_weights()
        if self.engine is None:
            self.engine = self._engine()
        return self.engine

    def _engine(self) -> Engine:
        bench = self.bench
        began = time.perf_counter()
        engine = decoding.engine_for(bench)
        machine.wait(bench.device)
        built = time.perf_counter()
        self._setup("cache, kernels autotuned and built", built - began)
        if engine.runner.captured:
            engine.call(engine.runner.warm_up)
            self._setup("steps captured for every number of pictures", time.perf_counter() - built)
        return engine

    def _setup(self, what: str, seconds: float) -> None:
        self.bench.report.add(Row(part="setup", what=f"setup: {what}", value=seconds, unit="s"))

    # -- the parts ---------------------------------------------------------------------------------------------

    def step(self) -> None:
        engine, short = self.native(), self.pace.short
        timed = decoding.time_image(self.bench, engine, context=short, images=1)
        self.steps[1] = timed.step
        decoding.add_step(self.bench, f"step, 1 image, {short} tokens", timed, 1, "step")
        self._device_memory("weights and one image")

    def _device_memory(self, what: str) -> None:
        if self.bench.device.type == "cuda":
            used = torch.cuda.memory_allocated(self.bench.device) / GIB
            self.bench.report.add(Row(part="memory", what=f"memory, {what}", value=used, unit="GiB"))

    def images(self) -> None:
        self.steps |= decoding.along_images(self.bench, self.native(), [4, 8, 2], context=self.pace.short)
        decoding.scaling(self.bench, self.steps)

    def context(self) -> None:
        decoding.along_contexts(self.bench, self.native(), self.pace.contexts)

    def upstream(self) -> None:
        report = self.bench.report
        clone = reference.clone_folder(self.wanted.clone, self.settings.weights_dir)
        if clone is None:
            report.not_measured("upstream", "no clone of it here: name one with --clone, or set EMU_UPSTREAM_URL")
            return
        self._full_weights()
        native = self.steps[1] * (self.bench.columns + 1) / self.bench.columns if 1 in self.steps else None
        reference.compare(self.bench, clone, context=self.pace.short, tokens=self.pace.upstream_tokens, native=native)

    def eager(self) -> None:
        """Steps in plain PyTorch, as with EMU_COMPILE=0."""
        if not self.native().runner.captured:
            self.bench.report.not_measured("eager", "it is what was measured above: nothing is captured here")
            return
        lm = self.bench.lm
        plain = replace(self.bench, lm=LanguageModel(lm.config, lm.weights, lm.ids), compile=False)
        engine = decoding.engine_for(plain, tokens=2048)
        timed = decoding.time_image(plain, engine, context=self.pace.short, images=1)
        what = f"step in plain PyTorch (EMU_COMPILE=0), 1 image, {self.pace.short} tokens"
        decoding.add_step(plain, what, timed, 1, "eager")

    def many(self) -> None:
        decoding.many(self.bench, self.native(), self.pace.pictures, self.bench.streams, part="many")

    def many_small(self, form: str) -> None:
        small, engine = self._in_8_bits(form)
        decoding.many(small, engine, self.pace.pictures, small.streams, part=f"many-{form}")

    def windows(self) -> None:
        decoding.windows(self.bench, self.native(), self.bench.streams, part="windows")

    def windows_small(self, form: str) -> None:
        small, engine = self._in_8_bits(form)
        decoding.windows(small, engine, small.streams, part=f"windows-{form}")

    def _in_8_bits(self, form: str) -> tuple[Bench, Engine]:
        quality.check_format(form, self.bench.device)
        return self._small_weights(form), self._engine()

    def sync(self) -> None:
        decoding.synchronisations(self.bench, self.native())

    def prefill(self) -> None:
        references = (1, 3) if self.pace is GPU else (1,) if self.bench.size.context > 8192 else ()
        decoding.prefill(self.bench, self.native(), references)

    def profile(self) -> None:
        decoding.write_trace(self.bench, self.native(), str(self.wanted.profile))

    def vq(self) -> None:
        full = self.pace is GPU
        vision = models.vision_tokenizer(models.VISION_SIZES["full" if full else "tiny"], device=self.bench.device)
        sizes = pictures.SIZES if full else pictures.SMALL_SIZES
        pictures.encode(self.bench.report, vision, sizes[:2])
        pictures.decode(self.bench.report, vision, sizes, compile=self.bench.compile)

    def agreement(self) -> None:
        """Captured steps against plain torch: the same sums in another order."""
        runner = self.native().runner
        if not runner.captured:
            self.bench.report.not_measured("agreement", "nothing is captured here: steps run in plain PyTorch")
            return
        quality.agreement(self.bench, self._exact(), runner, "captured steps against plain PyTorch")

    def mini(self) -> None:
        """The same on the trained miniature, and what 8 bits cost there."""
        miniature.measure(self.bench.report, self.bench.device, compile=self.bench.compile)

    def company(self) -> None:
        company.measure(self.bench.report, self.bench.device, compile=self.bench.compile)

    def soak(self) -> None:
        soak.measure(self.bench.report, self.bench.device, compile=self.bench.compile, requests=self.wanted.requests)

    def flash(self) -> None:
        """FlashAR's own weights take the place of the model's."""
        bench, device, dtype = self.bench, self.bench.device, self.bench.lm.dtype
        self.engine, self.full = None, False
        bench.lm = models.language_model(SIZES["tiny"], device=device, dtype=dtype)
        flash.measure(bench, dtype, large=self.pace is GPU, clone=self.wanted.flashar)

    def arrivals(self) -> None:
        arrivals.measure(
            self.bench.report, self.bench.device, shape=self.wanted.shape, concurrency=self.wanted.concurrency
        )

    def small(self, form: str) -> None:
        """8-bit weights. The full ones are freed before, and made again from their seed afterwards."""
        quality.check_format(form, self.bench.device)
        self._full_weights()
        if 1 not in self.steps:
            self.step()  # what 8 bits are compared with
        exact = self._exact()
        small = self._small_weights(form)
        quality.eight_bits(small, form, self._engine(), exact, short=self.pace.short, step=self.steps.get(1))

    def _small_weights(self, form: str) -> Bench:
        """Free the model, and make the same one in 8 bits: two would not fit. `self.bench` holds it, too."""
        self._make(form)
        return replace(self.bench, item=1.0)

    def _full_weights(self) -> None:
        """After 8-bit weights, make the full ones again."""
        if not self.full:
            self._make(None)

    def _make(self, form: str | None) -> None:
        bench, device, dtype = self.bench, self.bench.device, self.bench.lm.dtype
        self.engine, self.full = None, form is None
        del bench.lm
        machine.free_bytes(device)
        bench.lm = models.language_model(bench.size, device=device, dtype=dtype, quantize=form)

    def _exact(self) -> list[Tensor]:
        if self.exact is None:
            self.exact = quality.exact_scores(self.bench)
            machine.free_bytes(self.bench.device)
        return self.exact

    def loading(self) -> None:
        """Last, since it frees the model: a smaller one is written and read, two bytes per number."""
        device, full = self.bench.device, self.pace is GPU
        self.engine, self.full = None, False
        del self.bench.lm
        machine.free_bytes(device)
        with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
            loading.measure(
                self.bench.report,
                SIZES["8b"] if full else self.bench.size,
                device=device,
                folder=self.wanted.folder or Path(temporary),
                limit=6e9 if full else 2.5e9,
            )

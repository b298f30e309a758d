"""What is timed: layers, filters, clipping, whole steps, inference; each with its check against float64."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.bench.timing import Work, captured
from anybatch.dispatch import backend, compiled_helpers
from anybatch.measure import saved_bytes
from anybatch.methods.adaptive_gradient_clipping import adaptive_clip_grad_
from anybatch.methods.filters import StandardizedFilter, reuse_filters
from anybatch.methods.stochastic_depth import StochasticDepth
from anybatch.models import create_model, model_entry
from anybatch.models.blocks import Pieces
from anybatch.schemes import scheme as parse_scheme
from anybatch.suggest import unknown

PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SEED = 0


@dataclass(frozen=True)
class Checked:
    """How far a result is from float64's, relative to that, and how far it may be."""

    error: float
    allowed: float
    what: str = "output"

    @property
    def refusal(self) -> str | None:
        """Why it is not timed, or None; NaN is above any bound."""
        if self.error <= self.allowed:
            return None
        return f"the {self.what} errs by {self.error:.3g} relative to float64's, {self.allowed:.3g} is allowed"


@dataclass
class Variant:
    """One way to do a cell's work, ready to run."""

    work: Work
    check: Callable[[], Checked] | None = None
    """None for what is not ours and for what another variant of the same code has checked."""
    saved: Callable[[], int] | None = None
    """Bytes kept for backward."""
    images: int | None = None
    """In one run."""
    resources: ExitStack = field(default_factory=ExitStack)


@dataclass
class Cell:
    """Work of one kind and size, and the ways to do it; `build` makes each when its turn comes."""

    case: str
    facts: dict[str, Any]
    build: dict[tuple[str, str], Callable[[], Variant]]
    """By variant and mode. In each mode the first is the baseline; without one, that of mode ``eager`` is."""
    values: dict[str, Callable[[], float]] = field(default_factory=dict)
    """In place of variants: numbers that are no times."""
    peaks: bool = False
    """Whether the most memory of a run is told too."""


@dataclass(frozen=True)
class Net:
    """How a network is timed: its images, what it is compared with, and the schemes and batch sizes of default."""

    name: str
    size: int
    classes: int = 1000
    options: tuple[tuple[str, Any], ...] = ()
    baseline: str = ""
    """The network that has BatchNorm; by default the same."""
    schemes: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = (2,)

    def build(self, spec: str, *, baseline: bool = False) -> nn.Module:
        """With BatchNorm, or as the scheme says; the same weights every time."""
        torch.manual_seed(SEED)
        name = self.baseline or self.name if baseline else self.name
        return create_model(name, spec, num_classes=self.classes, **dict(self.options))


_NETS = (
    Net(
        "resnet18",
        32,
        10,
        (("stem", "cifar"),),
        schemes=("kn(p=0)", "kn", "gn", "ws+gn", "none"),
        batch_sizes=(2, 8, 32),
    ),
    Net("resnet50", 224, schemes=("kn(p=0)", "kn", "gn", "ws+gn", "none"), batch_sizes=(2, 8)),
    Net("knresnet18", 224, baseline="resnet18"),
    Net("nf_resnet50", 224, baseline="resnet50"),
    Net("nfnet_f0", 192),
)
NETS = {net.name: net for net in _NETS}


@dataclass(frozen=True)
class Settings:
    """What is timed and how; `settings` fills in what is left open."""

    cases: tuple[str, ...]
    schemes: tuple[str, ...] | None
    models: tuple[str, ...] | None
    batch_sizes: tuple[int, ...] | None
    device: torch.device
    precision: str
    channels_last: bool | None
    modes: tuple[str, ...]
    repeats: int
    least: float
    threads: int
    quick: bool

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def formats(self, *, layers: bool) -> list[str]:
        """Both for layers on the CPU, else the one in which convolutions are fastest, unless told."""
        if self.channels_last is not None:
            return ["channels_last" if self.channels_last else "contiguous"]
        return ["contiguous", "channels_last"] if layers and not self.gpu else ["channels_last"]

    def sizes(self, default: Sequence[int]) -> Sequence[int]:
        """Batch sizes."""
        return self.batch_sizes or ((2,) if self.quick else (2, 8, 32, 128) if self.gpu else default)

    def nets(self) -> list[Net]:
        """The networks of steps and inference."""
        names = self.models or (("resnet8",) if self.quick else tuple(NETS))
        nets = []
        for name in names:
            entry = model_entry(name)
            net = NETS.get(name) or Net(name, entry.train_size, 10 if entry.size <= 64 else 1000)
            own = ("kn(p=0)", "gn:auto") if self.quick else net.schemes or (entry.scheme, f"{entry.scheme}+agc")
            if not self.quick and not net.schemes and "nf" not in entry.scheme:
                own = (entry.scheme,)
            net = replace(net, schemes=self.schemes or own, batch_sizes=tuple(self.sizes(net.batch_sizes)))
            nets.append(replace(net, size=16, options=()) if self.quick and net.size <= 32 else net)
        return nets

    def autocast(self) -> AbstractContextManager[Any]:
        """What a forward pass runs in."""
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)

    def images(self, batch_size: int, channels: int, size: int, layout: str, dtype: torch.dtype) -> Tensor:
        """Values of standard deviation 1 and mean 1/2, the same every time."""
        generator = torch.Generator().manual_seed(SEED + 1)
        x = torch.randn(batch_size, channels, size, size, generator=generator) + 0.5
        return x.to(self.device, dtype).contiguous(memory_format=FORMATS[layout])

    def placed(self, module: nn.Module, layout: str) -> nn.Module:
        """On the device and in the memory format."""
        return module.to(self.device).to(memory_format=FORMATS[layout])  # pyright: ignore[reportCallIssue] (torch's stub lacks it)


def settings(
    *,
    cases: Sequence[str] = (),
    schemes: Sequence[str] = (),
    models: Sequence[str] = (),
    batch_sizes: Sequence[int] = (),
    device: str | None = None,
    precision: str | None = None,
    channels_last: bool | None = None,
    compile: bool = False,
    repeats: int | None = None,
    threads: int = 1,
    quick: bool = False,
) -> Settings:
    """`Settings` with defaults for the device.

    Args:
        cases: Of `CASES`, or ``"layers"`` for all that are no whole networks; all by default.
        schemes: For blocks, norms, steps and inference; by default those of the target table.
        models: Networks of steps and inference.
        batch_sizes: By default 2 and 8 (for small images 32 too), on a GPU 2 to 128.
        device: ``"cpu"`` or ``"cuda"``; a GPU where there is one.
        precision: ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"``; bfloat16 on a GPU, else float32.
        channels_last: One memory format for all; by default both for layers on the CPU, else channels_last.
        compile: Time everything compiled by ``torch.compile`` as well.
        repeats: Rounds; 9, and 2 if ``quick``.
        threads: Of the CPU. One is timed by processor time, more by the wall's.
        quick: Tiny shapes, to see that everything works; such times mean nothing.

    Raises:
        ValueError: If a name is unknown (the nearest are named), a number is below 1, or there is no such device.
    """
    chosen: list[str] = []
    for case in cases or CASES:
        if case != "layers" and case not in CASES:
            raise unknown("case", case, [*CASES, "layers"])
        chosen += LAYERS if case == "layers" else [case]
    for name in models:
        model_entry(name)
    for name, number in [("batch_sizes", min(batch_sizes, default=1)), ("repeats", repeats or 1), ("threads", threads)]:
        if number < 1 or (name == "repeats" and repeats == 0):
            raise ValueError(f"{name} must be 1 or more, got {number if number < 1 else repeats}")
    gpu = torch.cuda.is_available()
    if device is not None and device.partition(":")[0] not in (("cpu", "cuda") if gpu else ("cpu",)):
        raise ValueError(f"device={device!r} is none that can be timed here; take cpu{' or cuda' if gpu else ''}")
    where = torch.device(device or ("cuda" if gpu else "cpu"))
    precision = precision or ("bf16-mixed" if where.type == "cuda" else "32-true")
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    return Settings(
        cases=tuple(dict.fromkeys(chosen)),
        schemes=tuple(parse_scheme(spec).name for spec in schemes) or None,
        models=tuple(models) or None,
        batch_sizes=tuple(batch_sizes) or None,
        device=where,
        precision=precision,
        channels_last=channels_last,
        modes=("eager", "graph" if where.type == "cuda" else "helpers", *(["compiled"] if compile else [])),
        repeats=repeats or (2 if quick else 9),
        least=0.0 if quick else 0.05,
        threads=threads,
        quick=quick,
    )


def cells(chosen: Settings) -> Iterator[Cell]:
    """All that is to be timed, case after case."""
    for case in chosen.cases:
        yield from CASES[case](chosen)


# Errors


def _distance(got: Tensor, exact: Tensor) -> float:
    return torch.linalg.vector_norm(got.detach().double().cpu() - exact.double().cpu()).item()


def compared(
    got: Sequence[Tensor], naive: Sequence[Tensor], exact: Sequence[Tensor], names: Sequence[str], times: float = 2
) -> Checked:
    """The worst of several tensors: allowed is so many times the reference's own error, and 16 roundings of float32.

    Relative to a tensor's norm, or to a thousandth of the largest of them: sums that cancel have errors of that size.
    """
    worst: tuple[float, Checked] | None = None
    least = max((torch.linalg.vector_norm(truth.double()).item() for truth in exact), default=0.0) / 1000
    for one, other, truth, name in zip(got, naive, exact, names, strict=True):
        size = max(torch.linalg.vector_norm(truth.double()).item(), least) or 1.0
        error = _distance(one, truth) / size
        allowed = times * _distance(other, truth) / size + 16 * torch.finfo(torch.float32).eps
        excess = error / allowed if error == error else float("inf")
        if worst is None or excess > worst[0]:
            worst = excess, Checked(error, allowed, name)
    if worst is None:
        raise ValueError("nothing to compare")
    return worst[1]


def _without_randomness(model: nn.Module) -> nn.Module:
    """The same module, that draws nothing."""
    for module in model.modules():
        if isinstance(module, (nn.modules.dropout._DropoutNd, StochasticDepth)):
            module.eval()
        elif isinstance(getattr(module, "p", None), float):
            setattr(module, "p", 0.0)  # noqa: B010 (a plain attribute, which torch's stub does not know)
    return model


def _runner(module: nn.Module, mode: str) -> Callable[..., Any]:
    """How the module is called in a mode."""
    if mode == "compiled":
        return torch.compile(module)
    if mode != "helpers":
        return module

    def call(*args: Any) -> Any:
        with compiled_helpers():
            return module(*args)

    return call


def _graphed(run: Callable[[], object], mode: str) -> Callable[[], object]:
    return captured(run) if mode == "graph" else run


# Blocks and norms


SHAPES = (
    (64, 64, 56, 3),
    (64, 64, 56, 1),
    (64, 256, 56, 1),
    (256, 64, 56, 1),
    (128, 128, 28, 3),
    (512, 128, 28, 1),
    (256, 256, 14, 3),
    (1024, 256, 14, 1),
    (256, 1024, 14, 1),
    (512, 512, 7, 3),
    (512, 2048, 7, 1),
)
"""Channels in and out, map size and kernel of ResNet-50's convolutions at 224 pixels."""
MAPS = ((64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
"""Channels and size of the maps behind them."""


def _block(spec: str, channels: int, out: int, kernel: int) -> nn.Module:
    pieces = Pieces(parse_scheme(spec))
    conv = pieces.conv(channels, out, kernel)
    return nn.Sequential(conv, *pieces.norm_act(out, behind=conv))


def _norm(spec: str, channels: int) -> nn.Module:
    return nn.Sequential(*Pieces(parse_scheme(spec)).norm_act(channels))


def _conv_cells(chosen: Settings) -> Iterator[Cell]:
    shapes = ((32, 32, 6, 3), (64, 32, 6, 1)) if chosen.quick else SHAPES
    for batch_size in chosen.sizes((2, 8)):
        for layout in chosen.formats(layers=True):
            for channels, out, size, kernel in shapes:
                yield _layer_cell(
                    "conv",
                    chosen,
                    {"shape": f"{channels}-{out} {kernel}x{kernel} at {size}"},
                    partial(_block, channels=channels, out=out, kernel=kernel),
                    chosen.schemes or ("kn(p=0)", "kn"),
                    (batch_size, channels, size, layout),
                )


def _norm_cells(chosen: Settings) -> Iterator[Cell]:
    maps = ((32, 6),) if chosen.quick else MAPS
    for batch_size in chosen.sizes((2, 8)):
        for layout in chosen.formats(layers=True):
            for channels, size in maps:
                given = chosen.schemes or ("gn", "ln", "bcn", "pn", f"lcn(window={max(3, size // 2 | 1)})")
                parsed = [parse_scheme(spec) for spec in given]
                specs = [one.name for one in parsed if one.norm is not None or one.norm_act is not None]
                if specs:
                    about = {"shape": f"{channels} at {size}"}
                    place = (batch_size, channels, size, layout)
                    yield _layer_cell("norm", chosen, about, partial(_norm, channels=channels), specs, place)


def _layer_cell(
    case: str,
    chosen: Settings,
    about: dict[str, Any],
    make: Callable[[str], nn.Module],
    specs: Sequence[str],
    place: tuple[int, int, int, str],
) -> Cell:
    batch_size, channels, size, layout = place
    x = partial(chosen.images, batch_size, channels, size, layout, PRECISIONS[chosen.precision])
    facts = {**about, "batch_size": batch_size, "memory_format": layout}
    build: dict[tuple[str, str], Callable[[], Variant]] = {}
    for mode in chosen.modes:
        for spec in dict.fromkeys(("bn", *specs)):
            if (spec, mode) != ("bn", "helpers"):
                build[spec, mode] = partial(_layer_variant, chosen, make, spec, mode, x, layout)
    return Cell(case, facts, build)


def _layer_variant(
    chosen: Settings, make: Callable[[str], nn.Module], spec: str, mode: str, images: Callable[[], Tensor], layout: str
) -> Variant:
    torch.manual_seed(SEED)
    module = make(spec)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1:  # scales and shifts that start at 1 and 0 would hide mistakes
                p += 0.1 * torch.randn(p.shape)
    module = chosen.placed(module, layout)
    x = images().requires_grad_()
    inputs = [x, *module.parameters()]
    with torch.no_grad(), chosen.autocast():
        y = copy.deepcopy(module)(x)
    generator = torch.Generator().manual_seed(SEED + 2)
    gradient = torch.randn(y.shape, generator=generator).to(y).contiguous(memory_format=FORMATS[layout])
    call = _runner(module, mode)

    def forward() -> Tensor:
        with chosen.autocast():
            return call(x)

    def run() -> None:
        torch.autograd.grad(forward(), inputs, gradient)

    def check() -> Checked:
        start = _without_randomness(copy.deepcopy(module)) if mode == "compiled" else module

        def passed(one: Callable[[Tensor], Tensor], parameters: list[Tensor], value: Tensor) -> list[Tensor]:
            torch.manual_seed(SEED + 3)
            given = value.detach().requires_grad_()
            out = one(given)
            return [out.detach(), *torch.autograd.grad(out, [given, *parameters], gradient.to(out.dtype))]

        exact_one, naive_one, got_one = (copy.deepcopy(start) for _ in range(3))
        exact_one = exact_one.double()
        with backend("reference"):
            exact = passed(exact_one, list(exact_one.parameters()), x.detach().double())
            with chosen.autocast():
                naive = passed(naive_one, list(naive_one.parameters()), x)
        with chosen.autocast():
            got = passed(_runner(got_one, mode), list(got_one.parameters()), x)
        names = ["output", "gradient of x", *(f"gradient of {name}" for name, _ in module.named_parameters())]
        return compared(got, naive, exact, names)

    ours = spec != "bn" and mode != "graph"
    saved = None if mode == "graph" else partial(saved_bytes, module, forward)
    return Variant(Work(_graphed(run, mode)), check if ours else None, saved, x.shape[0])


# Filters


def _standardize_published(w: Tensor) -> Tensor:
    w = w - w.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
    return w / (w.reshape(w.size(0), -1).std(1).view(-1, 1, 1, 1) + 1e-5)


def _standardize_timm(w: Tensor) -> Tensor:
    return F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(w)


def _ws_cells(chosen: Settings) -> Iterator[Cell]:
    net = Net("resnet8", 16, 10) if chosen.quick else Net("resnet50", 224)
    for layout in chosen.formats(layers=True):

        def step(layout: str = layout) -> Variant:
            made = _step_variant(chosen, net, "bn", "eager", 2, layout, baseline=True, optimizer=False)
            return Variant(made.work)

        build: dict[tuple[str, str], Callable[[], Variant]] = {("a step with bn", "eager"): step}
        norm = "gn:auto" if chosen.quick else "gn"
        for name, spec in (("ws", f"ws+{norm}"), ("sws", "nf")):
            build[name, "eager"] = partial(_ws_variant, chosen, net, spec, layout)
            if "helpers" in chosen.modes:
                build[name, "helpers"] = partial(_ws_variant, chosen, net, spec, layout, helpers=True)
        build["ws, in evaluation", "eager"] = partial(_ws_variant, chosen, net, f"ws+{norm}", layout, training=False)
        for name, how in (("as published", _standardize_published), ("as timm", _standardize_timm)):
            build[name, "eager"] = partial(_ws_variant, chosen, net, f"ws+{norm}", layout, how=how)
        about = {"model": net.name, "size": net.size, "batch_size": 2, "memory_format": layout}
        yield Cell("weight_standardize", about, build)


def _ws_variant(
    chosen: Settings,
    net: Net,
    spec: str,
    layout: str,
    *,
    training: bool = True,
    helpers: bool = False,
    how: Callable[[Tensor], Tensor] | None = None,
) -> Variant:
    model = chosen.placed(net.build(spec), layout).train(training)
    layers = [module for module in model.modules() if isinstance(module, StandardizedFilter)]
    weights = [layer.weight for layer in layers]
    gradients = [torch.randn_like(w) for w in weights]

    def forward() -> list[Tensor]:
        return [layer.standardized() for layer in layers] if how is None else [how(w) for w in weights]

    def run() -> None:
        with compiled_helpers(helpers):
            torch.autograd.grad(forward(), weights, gradients)

    def evaluate() -> None:
        with torch.no_grad():
            forward()

    def check() -> Checked:
        with compiled_helpers(helpers):
            made = forward()
            got = [*made, *torch.autograd.grad(made, weights, gradients)]

        def passed(dtype: torch.dtype) -> list[Tensor]:
            wide = [copy.deepcopy(layer).to(dtype) for layer in layers]
            with backend("reference"):
                out = [layer.standardized() for layer in wide]
            given = [g.to(dtype) for g in gradients]
            return [*(y.detach() for y in out), *torch.autograd.grad(out, [layer.weight for layer in wide], given)]

        names = [f"{what}filter {i}" for what in ("", "gradient of ") for i in range(len(layers))]
        return compared(got, passed(torch.float32), passed(torch.float64), names)

    saved = partial(saved_bytes, model, forward)
    if training:
        return Variant(Work(run), check if how is None else None, saved)
    kept = ExitStack()
    kept.enter_context(reuse_filters(model))
    return Variant(Work(evaluate), resources=kept)


def _loop_clip(parameters: list[Tensor], clip_factor: float = 0.01, eps: float = 1e-3) -> None:
    """As in the release and in timm: each tensor by itself, whether a unit of it is clipped or not."""
    for p in parameters:
        if p.grad is None:
            continue
        dim = tuple(range(1, p.dim())) if p.dim() > 1 else None
        weights, gradients = (torch.linalg.vector_norm(t, 2, dim, keepdim=p.dim() > 1) for t in (p.detach(), p.grad))
        most = weights.clamp_(min=eps).mul_(clip_factor)
        clipped = p.grad * (most / gradients.clamp(min=1e-6))
        p.grad.copy_(torch.where(gradients < most, p.grad, clipped))


def _agc_cells(chosen: Settings) -> Iterator[Cell]:
    nets = [Net("resnet8", 16, 10)] if chosen.quick else [Net("resnet50", 224), Net("nfnet_f0", 192)]
    for net in nets:
        for units, size in (("few", 1e-4), ("all", 10.0)):
            build: dict[tuple[str, str], Callable[[], Variant]] = {}
            if importlib.util.find_spec("timm") is not None:
                build["timm", "eager"] = partial(_agc_variant, chosen, net, size, "timm")
            build["loop", "eager"] = partial(_agc_variant, chosen, net, size, "loop")
            build["agc", "eager"] = partial(_agc_variant, chosen, net, size, "agc")
            facts = {"model": net.name, "clipped": units, "memory_format": chosen.formats(layers=False)[0]}
            yield Cell("agc", facts, build)


def _agc_variant(chosen: Settings, net: Net, size: float, whose: str) -> Variant:
    spec = "bn" if net.name.startswith("resnet") else model_entry(net.name).scheme
    model = chosen.placed(net.build(spec), chosen.formats(layers=False)[0])
    # Only what has several dimensions larger than 1, and vectors: of (C, 1, 1, 1) timm clips each entry by itself.
    parameters: list[Tensor] = list(model.parameters())
    torch.manual_seed(SEED)
    starts = []
    for p in parameters:
        with torch.no_grad():
            p.copy_(torch.where(p == 0, torch.full_like(p, 0.01), p))
        starts.append(torch.randn_like(p) * p.detach().abs().mean() * size)
        p.grad = starts[-1].clone()

    def restore() -> None:
        for p, start in zip(parameters, starts, strict=True):
            if p.grad is not None:
                p.grad.copy_(start)

    def check() -> Checked:
        restore()
        clip()
        got = [p.grad.clone() for p in parameters if p.grad is not None]

        def passed(dtype: torch.dtype) -> list[Tensor]:
            made = []
            for p, start in zip(parameters, starts, strict=True):
                q = p.detach().to(dtype)
                q.grad = start.to(dtype)
                _loop_clip([q])
                made.append(q.grad)
            return made

        return compared(got, passed(torch.float32), passed(torch.float64), [f"gradient {i}" for i in range(len(got))])

    if whose == "timm":
        from timm.utils.agc import adaptive_clip_grad  # pyright: ignore[reportMissingImports] (optional)

        clip: Callable[[], object] = partial(adaptive_clip_grad, parameters, 0.01, 1e-3)
    else:
        clip = partial(adaptive_clip_grad_ if whose == "agc" else _loop_clip, parameters, 0.01, 1e-3)

    def quiet() -> None:
        with torch.no_grad():
            clip()

    return Variant(Work(quiet, before=restore), check if whose == "agc" else None)


# Whole networks


def _net_check(chosen: Settings, model: nn.Module, mode: str, x: Tensor) -> Checked:
    """Outputs alone: gradients of a whole random network move by a hundredth where its input moves by a rounding."""
    start = _without_randomness(copy.deepcopy(model))
    x = x[:2]
    exact_one = copy.deepcopy(start).double()
    with torch.no_grad(), backend("reference"):
        exact = exact_one(x.double())
        del exact_one
        with chosen.autocast():
            naive = copy.deepcopy(start)(x)
    with torch.no_grad(), chosen.autocast():
        got = _runner(start, mode)(x)
    return compared([got], [naive], [exact], ["output"], times=4)


def _step_cells(chosen: Settings) -> Iterator[Cell]:
    for net in chosen.nets():
        for layout in chosen.formats(layers=False):
            for batch_size in net.batch_sizes:
                about = {"model": net.name, "size": net.size, "batch_size": batch_size, "memory_format": layout}
                yield Cell("step", about, _net_builds(_step_variant, chosen, net, batch_size, layout), peaks=True)


def _net_builds(
    build: Callable[..., Variant], chosen: Settings, net: Net, batch_size: int, layout: str
) -> dict[tuple[str, str], Callable[[], Variant]]:
    made: dict[tuple[str, str], Callable[[], Variant]] = {}
    for mode in chosen.modes:
        if mode != "helpers":
            made["bn", mode] = partial(build, chosen, net, "bn", mode, batch_size, layout, baseline=True)
        for spec in net.schemes:
            if spec != "bn" or net.baseline:
                name = f"{net.name} {spec}" if spec == "bn" else spec
                made[name, mode] = partial(build, chosen, net, spec, mode, batch_size, layout)
    return made


def _step_variant(
    chosen: Settings,
    net: Net,
    spec: str,
    mode: str,
    batch_size: int,
    layout: str,
    *,
    baseline: bool = False,
    optimizer: bool = True,
) -> Variant:
    model = chosen.placed(net.build(spec, baseline=baseline), layout)
    x = chosen.images(batch_size, 3, net.size, layout, torch.float32)
    labels = torch.arange(batch_size, device=chosen.device) % net.classes
    clip = parse_scheme(spec).clip
    clips = None if clip is None else clip(model)
    # A rate of 0 is the same work, and weights that stay keep times and values alike.
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    call = _runner(model, mode)

    def forward() -> Tensor:
        with chosen.autocast():
            return F.cross_entropy(call(x).float(), labels)

    def run() -> None:
        sgd.zero_grad(set_to_none=True)
        forward().backward()
        if clips is not None:
            clips()
        if optimizer:
            sgd.step()

    check = None if baseline or mode == "graph" else partial(_net_check, chosen, model, mode, x)
    saved = None if mode == "graph" else partial(saved_bytes, model, forward)
    return Variant(Work(_graphed(run, mode)), check, saved, batch_size)


def _inference_cells(chosen: Settings) -> Iterator[Cell]:
    for net in chosen.nets():
        if chosen.schemes is None:  # clipping leaves evaluation as it is
            net = replace(net, schemes=tuple(spec for spec in net.schemes if parse_scheme(spec).clip is None))
        for layout in chosen.formats(layers=False):
            for batch_size in net.batch_sizes:
                about = {"model": net.name, "size": net.size, "batch_size": batch_size, "memory_format": layout}
                yield Cell("inference", about, _net_builds(_inference_variant, chosen, net, batch_size, layout))


def _inference_variant(
    chosen: Settings, net: Net, spec: str, mode: str, batch_size: int, layout: str, *, baseline: bool = False
) -> Variant:
    model = chosen.placed(net.build(spec, baseline=baseline), layout).eval()
    x = chosen.images(batch_size, 3, net.size, layout, torch.float32)
    kept = ExitStack()
    kept.enter_context(reuse_filters(model))
    call = _runner(model, mode)

    def run() -> None:
        with torch.no_grad(), chosen.autocast():
            call(x)

    check = None if baseline or mode == "graph" else partial(_net_check, chosen, model, mode, x)
    return Variant(Work(_graphed(run, mode)), check, images=batch_size, resources=kept)


# Accuracy


def _accuracy_cells(chosen: Settings) -> Iterator[Cell]:
    channels, size = (32, 6) if chosen.quick else (64, 14)
    for mode in ("eager", "helpers") if "helpers" in chosen.modes else ("eager",):
        for mean in (1e3, 1e4):
            values = {
                "kn": partial(_scale_error_of_kn, chosen, channels, size, mean, mode),
                "gn": partial(_scale_error_of_gn, chosen, channels, size, mean, mode),
            }
            about = {"what": "1/std, float32", "mean": mean, "mode": mode}
            yield Cell("accuracy", about, {}, values)
        values = {"kn": partial(_bfloat16_error, chosen, channels, size, 10.0, mode)}
        yield Cell("accuracy", {"what": "output, bfloat16", "mean": 10.0, "mode": mode}, {}, values)


def _both(chosen: Settings, module: nn.Module, x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        got = _runner(module, mode)(x).double()
        with backend("reference"):
            return got, copy.deepcopy(module).double()(x.double())


def _scale_error_of_kn(chosen: Settings, channels: int, size: int, mean: float, mode: str) -> float:
    """Filters that subtract neighboring channels at one pixel leave the convolution exact and 1/std to err."""
    conv = Pieces(parse_scheme("kn(p=0)")).conv(channels, channels, 3, bias=False).to(chosen.device)
    weight: Any = conv.weight
    with torch.no_grad():
        weight.zero_()
        for o in range(channels):
            weight[o, o, 1, 1], weight[o, (o + 1) % channels, 1, 1] = 1.0, -1.0
    x = chosen.images(2, channels, size, "contiguous", torch.float32) + mean
    got, exact = (y[..., 1:-1, 1:-1] for y in _both(chosen, conv, x, mode))
    return ((got * exact).sum(1) / exact.square().sum(1) - 1).abs().max().item()


def _scale_error_of_gn(chosen: Settings, channels: int, size: int, mean: float, mode: str) -> float:
    """Within a group the exact values have mean 0, so that along them only 1/std errs."""
    norm = Pieces(parse_scheme("gn:auto")).norm(channels).to(chosen.device)
    x = chosen.images(2, channels, size, "contiguous", torch.float32) + mean
    got, exact = (y.reshape(2, 32, -1) for y in _both(chosen, norm, x, mode))
    return ((got * exact).sum(2) / exact.square().sum(2) - 1).abs().max().item()


def _bfloat16_error(chosen: Settings, channels: int, size: int, mean: float, mode: str) -> float:
    torch.manual_seed(SEED)
    conv = Pieces(parse_scheme("kn(p=0)")).conv(channels, channels, 3).to(chosen.device, torch.bfloat16)
    x = chosen.images(2, channels, size, "channels_last", torch.float32) + mean
    got, exact = _both(chosen, conv, x.bfloat16(), mode)
    return (torch.linalg.vector_norm(got - exact) / torch.linalg.vector_norm(exact)).item()


CASES: dict[str, Callable[[Settings], Iterator[Cell]]] = {
    "conv": _conv_cells,
    "norm": _norm_cells,
    "weight_standardize": _ws_cells,
    "agc": _agc_cells,
    "accuracy": _accuracy_cells,
    "step": _step_cells,
    "inference": _inference_cells,
}
"""``conv``: convolution, norm and ReLU; ``norm``: norm and ReLU; filters of a whole network; clipping of its gradients;
errors at large means; whole training steps; whole networks in evaluation."""
LAYERS = ["conv", "norm", "weight_standardize", "agc", "accuracy"]

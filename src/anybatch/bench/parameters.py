"""Work on all parameters of a network: standardizing its filters, clipping its gradients."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.bench.cell import Cell, Checked, Variant, compared
from anybatch.bench.choice import SEED, Net, Settings
from anybatch.bench.networks import step_variant
from anybatch.bench.timing import Work
from anybatch.dispatch import backend, compiled_helpers
from anybatch.measure import saved_bytes
from anybatch.methods.adaptive_gradient_clipping import adaptive_clip_grad_
from anybatch.methods.filters import StandardizedFilter, reuse_filters, standardize_together
from anybatch.models import model_entry


def _standardize_published(w: Tensor) -> Tensor:
    w = w - w.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
    return w / (w.reshape(w.size(0), -1).std(1).view(-1, 1, 1, 1) + 1e-5)


def _standardize_timm(w: Tensor) -> Tensor:
    return F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(w)


def standardization_cells(chosen: Settings) -> Iterator[Cell]:
    net = Net("resnet8", 16, 10) if chosen.quick else Net("resnet50", 224)
    for layout in chosen.formats(layers=True):

        def step(layout: str = layout) -> Variant:
            made = step_variant(chosen, net, "bn", "eager", 2, layout, baseline=True, optimizer=False)
            return Variant(made.work)

        build: dict[tuple[str, str], Callable[[], Variant]] = {("a step with bn", "eager"): step}
        norm = "gn:auto" if chosen.quick else "gn"
        for name, spec in (("ws", f"ws+{norm}"), ("sws", "nf")):
            build[name, "eager"] = partial(_ws_variant, chosen, net, spec, layout)
            if chosen.helpers:
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
        return standardize_together(layers) if how is None else [how(w) for w in weights]

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


def clipping_cells(chosen: Settings) -> Iterator[Cell]:
    nets = [(Net("resnet8", 16, 10), "bn")]
    if not chosen.quick:
        nets = [(Net("resnet50", 224), "bn"), (Net("nfnet_f0", 192), model_entry("nfnet_f0").scheme)]
    for net, spec in nets:
        for units, size in (("few", 1e-4), ("all", 10.0)):
            build: dict[tuple[str, str], Callable[[], Variant]] = {}
            if importlib.util.find_spec("timm") is not None:
                build["timm", "eager"] = partial(_agc_variant, chosen, net, spec, size, "timm")
            build["loop", "eager"] = partial(_agc_variant, chosen, net, spec, size, "loop")
            build["agc", "eager"] = partial(_agc_variant, chosen, net, spec, size, "agc")
            facts = {"model": net.name, "clipped": units, "memory_format": chosen.formats(layers=False)[0]}
            yield Cell("agc", facts, build)


def _agc_variant(chosen: Settings, net: Net, spec: str, size: float, whose: str) -> Variant:
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

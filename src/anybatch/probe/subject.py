"""How probes run a model: inputs on its device, modes without chance, outputs as tensors, one loss for any output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.methods.parameters import bare
from anybatch.probe.unchanged import unchanged
from anybatch.suggest import one_line

Mode = Literal["training", "evaluation"]
Loss = Callable[[Any, Tensor | None], Tensor]
"""Of what a model gives and the labels of its samples (None where there are none): a mean over the samples."""
SEED = 20260112
_PROPOSALS = 64
_DETECTION = "torchvision.models.detection"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and the samples that it is probed with."""

    model: nn.Module
    x: Tensor
    """(N, *), on the model's device, with its dtype if it is floating point."""
    labels: Tensor | None
    detector: bool
    """Whether it takes a list of images and, in training, boxes, as torchvision's detectors do."""

    def run(self, x: Tensor) -> Any:
        """What the model gives for samples; a `ValueError` tells what it raised."""
        given: Any = list(x) if self.detector else x
        try:
            return self.model(given)
        except Exception as error:  # of the model's own code
            why = one_line(error, 300)
            mode = "training" if self.model.training else "evaluation"
            raise ValueError(
                f"the model fails on x of shape {tuple(x.shape)} and {x.dtype} in {mode}: {type(error).__name__}: {why}"
            ) from error

    def set_mode(self, mode: Mode) -> None:
        """Training or evaluation of all modules but those of a detector that would ask for boxes."""
        self.model.train(mode == "training")
        if self.detector:
            for module in self.model.modules():
                if type(module).__module__.startswith(_DETECTION):
                    module.training = False


@contextmanager
def probing(
    model: nn.Module, x: Any, labels: Tensor | None = None, *, least: int = 1, whole: bool = False
) -> Iterator[Subject]:
    """A model, ready to be probed and unchanged afterwards; autograd is on.

    Args:
        model: Any model that takes one tensor, or one of torchvision's detectors.
        x: (N, *), or a list of N tensors of one shape.
        labels: (N, *), whole numbers, or None.
        least: How many samples are needed.
        whole: Whether a detector is run as a whole, and not its backbone, whose outputs are tensors.

    Raises:
        ValueError: If the samples are too few, differ in shape, or do not go with the labels.
        TypeError: If ``model`` or ``x`` is something else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = bare(model)
    x = _stacked(x)
    if len(x) < least:
        raise ValueError(f"x holds {len(x)} samples, and this probe needs {least} or more")
    if x.is_floating_point() and not x.isfinite().all():
        raise ValueError("x holds values that are not finite")
    if labels is not None and len(labels) != len(x):
        raise ValueError(f"labels must be one for each of the {len(x)} samples of x, got {len(labels)}")
    tensor = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), None)
    if tensor is not None:
        x = x.to(tensor.device, tensor.dtype if x.is_floating_point() else x.dtype)
    labels = None if labels is None else labels.to(x.device)
    detector = is_detector(model)
    with unchanged(model), torch.enable_grad():
        if detector and whole:
            inner: Any = model.transform  # which would resize to 800 pixels
            inner.min_size, inner.max_size = (min(x.shape[-2:]),), max(x.shape[-2:])
            if hasattr(model, "rpn"):  # whose thousand proposals an image would take most of the time
                for limit in ("_pre_nms_top_n", "_post_nms_top_n"):
                    setattr(model.rpn, limit, {"training": _PROPOSALS, "testing": _PROPOSALS})
        elif detector:
            model, detector = model.get_submodule("backbone"), False
        if not any(p.requires_grad for p in model.parameters()):
            for p in model.parameters():
                p.requires_grad_(p.is_floating_point())
        yield Subject(model, x, labels, detector)


def is_detector(model: nn.Module) -> bool:
    """Whether it is one of torchvision's detectors, or derives from one."""
    return any(c.__module__.startswith(_DETECTION) for c in type(model).__mro__) and hasattr(model, "backbone")


def _stacked(x: Any) -> Tensor:
    if isinstance(x, (list, tuple)) and x and all(isinstance(item, Tensor) for item in x):
        shapes = sorted({tuple(item.shape) for item in x})
        if len(shapes) > 1:
            raise ValueError(
                f"the samples of x differ in shape: {shapes[0]} and {shapes[1]}; give samples of one shape"
            )
        return torch.stack(list(x))
    if not isinstance(x, Tensor):
        raise TypeError(
            f"x must be a tensor (N, *) or a list of tensors of one shape, got {type(x).__name__}; put a model that "
            f"takes something else into a module whose forward takes one tensor"
        )
    if x.dim() < 2:
        raise ValueError(f"x must be (N, *), got shape {tuple(x.shape)}")
    return x


@contextmanager
def seeing(model: nn.Module, names: Sequence[str], see: Callable[..., Any], *, before: Any = None) -> Iterator[None]:
    """Within this context ``see(name, module, args, output)`` is called behind each of these modules.

    ``before(name, module, args)``, if given, is called in front of each.
    """
    handles = []
    try:
        for name in names:
            module = model.get_submodule(name)
            if before is not None:
                handles.append(module.register_forward_pre_hook(_pre(before, name)))
            handles.append(module.register_forward_hook(_post(see, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pre(before: Callable[..., Any], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        before(name, module, args)

    return hook


def _post(see: Callable[..., Any], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        see(name, module, args, output)

    return hook


@torch.no_grad()
def still(subject: Subject, x: Tensor) -> list[str]:
    """Leave the model in training, but layers that draw random numbers, such as dropout, in evaluation.

    Which these are is seen by running ``x``.

    Returns:
        Blocks that draw in code of their own, where other layers stand inside, and which are left as they are.
    """
    subject.set_mode("training")
    model = subject.model
    stack: list[list[Any]] = []
    drawn: dict[str, bool] = {}

    def before(name: str, module: nn.Module, args: Any) -> None:
        stack.append([_random_state(x), False])

    def see(name: str, module: nn.Module, args: Any, output: Any) -> None:
        state, inside = stack.pop()
        draws = not torch.equal(state, _random_state(x))
        if draws and not inside:
            drawn[name] = True
        if draws and stack:
            stack[-1][1] = True

    with seeing(model, [name for name, _ in model.named_modules()], see, before=before):
        subject.run(x)
    left = []
    for name in drawn:
        module = model.get_submodule(name)
        if any(True for _ in module.children()):
            left.append(name)
        else:
            module.training = False
    return left


def _random_state(x: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()


def tensors_in(output: Any) -> list[Tensor]:
    """The floating point tensors of what a model gives, however it holds them."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for item in output.values() for t in tensors_in(item)]
    if isinstance(output, (list, tuple)):
        return [t for item in output for t in tensors_in(item)]
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [t for f in dataclasses.fields(output) for t in tensors_in(getattr(output, f.name))]
    return []


def loss_of(subject: Subject, output: Any, labels: Tensor | None, given: Loss | None) -> Tensor:
    """A mean over the samples: the loss given, else cross-entropy with labels, else the distance to a random target.

    That is half the mean square of each output's distance to one target, the same for all samples.
    """
    if given is not None:
        value = given(output, labels)
        if not isinstance(value, Tensor) or value.dim():
            raise ValueError("loss must return a tensor without dimensions, the mean over the samples")
        return value
    outputs = [t for t in tensors_in(output) if t.requires_grad]
    if not outputs:
        raise ValueError(
            f"the model's output, a {type(output).__name__}, holds no floating point tensor with a gradient; give "
            f"loss=, a function of output and labels"
        )
    if labels is not None and labels.dim() == outputs[0].dim() - 1 and not labels.is_floating_point():
        return F.cross_entropy(outputs[0], labels)
    return sum((((t - _target(t)) ** 2).mean() / 2 for t in outputs), outputs[0].new_zeros(()))


def _target(t: Tensor) -> Tensor:
    made = torch.randn(t.shape[1:], generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    return made.to(t.device, t.dtype)

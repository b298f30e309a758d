"""Sharpness-aware minimization: a step by the gradient at the worst place nearby."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anybatch.methods.optimizer_around import OptimizerAround
from anybatch.scheme import check_positive


class SAM(OptimizerAround):
    """Sharpness-aware minimization around any torch optimizer.

    With weights w and gradient g: ``e = rho * g / (|g| + 1e-12)``, one Euclidean norm over all parameters; the gradient
    at ``w + e`` then moves w by the other optimizer. ``adaptive`` measures distance in units of the weights:
    ``e = rho * w² * g / (|w * g| + 1e-12)``. A step costs two evaluations::

        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)


        def closure():
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()
            return loss


        optimizer.step(closure)

    or, by hand, ``backward``, `first_step`, ``zero_grad``, ``backward``, `second_step`.

    Both gradients are to be of the same images. To accumulate, take a closure that goes over all portions: portion by
    portion, the ascent would follow other images than the step. Under DDP both gradients are averaged over processes;
    the paper lets each process ascend by its own. Gradients must be unscaled in both, so `GradScaler`, which takes no
    closure, needs the form by hand and ``unscale_``. Whatever is random (dropout) is drawn anew in the second
    evaluation, and BatchNorm's running averages take in both, unless its layers' momentum is 0 in the second.

    The state dict is the other optimizer's.

    Args:
        optimizer: Does the steps.
        rho: Radius in which the worst place is sought, above 0; 0.05 in most published recipes.
        adaptive: Whether to measure it in units of the weights; rho is then larger, 0.5 to 2.

    Attributes:
        perturbed: Whether the weights now stand at ``w + e``.

    Raises:
        ValueError: If ``rho`` is not above 0; in `step`, without a closure; in `first_step`, if no parameter has a
            gradient or it is called twice; in `second_step`, if no `first_step` preceded.

    Source:
        Foret et al. 2020, "Sharpness-Aware Minimization for Efficiently Improving Generalization", arXiv:2010.01412,
        algorithm 1, eq. 2 with p = 2; adaptive: Kwon et al. 2021, "ASAM", arXiv:2102.11600, eq. 3.
    """

    def __init__(self, optimizer: Optimizer, rho: float = 0.05, *, adaptive: bool = False) -> None:
        check_positive("rho", rho)
        super().__init__(optimizer, rho=rho, adaptive=adaptive)

    rho: float
    adaptive: bool

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._origin: list[tuple[Tensor, Tensor]] = []

    @property
    def perturbed(self) -> bool:
        return bool(self._origin)

    @torch.no_grad()
    def first_step(self) -> None:
        """Move the weights to the worst place nearby, by the gradients that they have."""
        if self._origin:
            raise ValueError("first_step() was called twice; the second evaluation ends in second_step()")
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not moved:
            raise ValueError("no parameter has a gradient; call first_step() after backward()")
        ascent = [p.square().mul_(p.grad) if self.adaptive else p.grad for p in moved]
        across = [p * p.grad for p in moved] if self.adaptive else ascent
        norm = torch.nn.utils.get_total_norm(across)
        self._origin = [(p, p.clone()) for p in moved]
        for p, e in zip(moved, ascent, strict=True):
            p.add_(e * (self.rho / (norm.to(p.device) + 1e-12)).to(p.dtype))

    @torch.no_grad()
    def second_step(self) -> None:
        """Move the weights back, exactly, and step by the gradients that they have now."""
        if not self._origin:
            raise ValueError("second_step() comes after first_step() and a second backward()")
        self._return()
        self.optimizer.step()

    def _return(self) -> None:
        for p, before in self._origin:
            p.copy_(before)
        self._origin = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step.

        Args:
            closure: Computes the loss and its gradient; called twice.

        Returns:
            What its first call returned: the loss at the weights.
        """
        if closure is None:
            raise ValueError(
                "SAM evaluates the loss twice a step: give step() a closure that computes loss and gradients, or call "
                "first_step() and second_step() yourself"
            )
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        self.zero_grad()
        try:
            with torch.enable_grad():
                closure()
        except BaseException:
            with torch.no_grad():
                self._return()
            raise
        self.second_step()
        return loss

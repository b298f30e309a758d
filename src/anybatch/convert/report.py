"""What a conversion did, in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from anybatch.suggest import listed


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_batchnorm` did, by the names of layers."""

    to: str
    """The scheme."""
    replaced: dict[str, str] = field(default_factory=dict)
    """What stands in the place of each BatchNorm that is gone."""
    left: dict[str, str] = field(default_factory=dict)
    """Why each other BatchNorm stayed."""
    convolutions: dict[str, str] = field(default_factory=dict)
    """What became of each convolution that changed."""
    convolutions_left: dict[str, str] = field(default_factory=dict)
    """Why each other convolution stayed plain, where the scheme has one of its own."""
    branches: dict[str, str] = field(default_factory=dict)
    """How each residual branch is scaled, by the layer that does it; by the sum where none does, and why."""
    groups: dict[str, int] = field(default_factory=dict)
    """The number of groups of each new norm that has groups."""
    residuals: dict[str, float] = field(default_factory=dict)
    """The share of the old output's variance that calibration left unexplained, by new layer."""
    offsets: tuple[str, ...] = ()
    """New norms in front of which calibration added constants; see `anybatch.convert.offsets`."""
    heads: tuple[str, ...] = ()
    """Layers behind the last norm that calibration changed."""
    drift: float | None = None
    """Norm of the output's change over the output's, on the calibration images; None without."""
    new_parameters: tuple[str, ...] = ()
    """Parameters and buffers that the old network has not."""
    advice: tuple[str, ...] = ()
    """What to do next."""

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for json."""
        return asdict(self)

    def __str__(self) -> str:
        told = [f"{len(self.replaced)} norms replaced by {self.to}, {len(self.left)} left"]
        if self.convolutions:
            told.append(f"{len(self.convolutions)} convolutions changed, {len(self.convolutions_left)} left plain")
        told += [f"{name} left: {why}" for name, why in self.left.items()]
        told += [f"{name} plain: {why}" for name, why in self.convolutions_left.items()]
        told += [f"{name} scales its branch: {what}" for name, what in self.branches.items()]
        if self.offsets:
            told.append(f"constants in front of {len(self.offsets)} of the norms")
        if self.heads:
            told.append(f"fitted anew behind the norms: {listed(list(self.heads))}")
        if self.drift is not None:
            told.append(f"the output changed by {self.drift:.2%} of its norm on the calibration images")
        if self.new_parameters:
            told.append(f"new: {listed(list(self.new_parameters))}")
        return "\n".join([*told, *self.advice])


def advice(*, calibrated: bool, exact: bool, normalizer_free: bool, drift: float | None, left: int) -> tuple[str, ...]:
    """What to do with a network that was just converted."""
    told: list[str] = []
    if exact:
        told.append("the function is the old one; fine-tune at the learning rate that the old network takes")
    elif not calibrated:
        told.append(
            "the new norms compute something else than the old ones until they are calibrated: give calibrate= "
            "(--data) a few hundred images, which need no labels"
        )
    else:
        told.append(
            "fine-tune with a tenth of the learning rate of training from scratch, scaled to the batch size, and warm "
            "it up over the first tenth of the steps"
        )
    if normalizer_free:
        told.append(
            "nothing normalizes any more: clip gradients, by anybatch.optim.attach_agc(optimizer, model), which also "
            "stands larger rates"
        )
    if drift is not None and drift > 0.3:
        told.append("the output changed by much: match it at your batch size before fine-tuning, by distill=200")
    if left:
        told.append(f"{left} BatchNorm layers are left, which still need large batches, or freeze_batchnorm(model)")
    return tuple(told)

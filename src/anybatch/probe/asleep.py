"""Residual branches whose learnable number is 0, as SkipInit starts them: what is measured is of shortcuts alone."""

from __future__ import annotations

from torch import Tensor, nn

from anybatch.methods.residual import Join
from anybatch.probe.result import Finding, many


def asleep(model: nn.Module) -> list[Finding]:
    """A note where branches give nothing yet, so that what was found may change with the first steps."""
    owns = [getattr(module, "gain", None) for module in model.modules() if isinstance(module, Join)]
    gains = [own.item() for own in owns if isinstance(own, Tensor)]
    count = gains.count(0)
    if not count:
        return []
    text = (
        f"{count} of {many(len(gains), 'branch', 'branches')} have gain 0, as SkipInit starts them, and give nothing "
        "yet: what is told here is of the shortcuts."
    )
    return [Finding("note", text, "probe again after some training, or the signal with signal_propagation(gain=1).")]

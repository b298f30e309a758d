"""An optimizer around another one."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class OptimizerAround(Optimizer):
    """An optimizer whose groups, state and state dict are those of another, around which it is put.

    Learning rate schedulers and checkpoints see the other one through it; hooks of its own it keeps apart.

    Args:
        optimizer: The other one.
        kept: Attributes, which copies and pickles take along.
    """

    optimizer: Optimizer

    def __init__(self, optimizer: Optimizer, **kept: Any) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
        # Not torch's constructor, which would take the parameters for new ones.
        self.__setstate__({"optimizer": optimizer, **kept})
        self._kept = ("optimizer", *kept)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*self._kept, "_kept")}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__} around {self.optimizer!r}"

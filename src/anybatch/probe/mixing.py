"""Which layers of a model mix samples in one mode: each is run again with all samples but the first exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.probe.layers import is_row_by_row, layers
from anybatch.probe.subject import SEED, Mode, Subject, seeing, tensors_in


class Watch:
    """One mode: which layers and blocks mix the first samples."""

    def __init__(self, subject: Subject, mode: Mode, samples: int = 2) -> None:
        self.subject, self.x = subject, subject.x[:samples]
        self.mode: Mode = mode
        self.kinds = dict(layers(subject.model))
        self.mixing: dict[str, bool | None] = {}
        """By layer, in the order of calls; None where its rows are not the samples."""
        self._taken: dict[str, tuple[Any, ...]] = {}
        self._buffers: dict[str, list[Tensor]] = {}
        self._calls: list[tuple[str, list[float], list[float]]] = []
        self._inside = False
        self._place = 0

    def run(self) -> bool:
        """Whether the model mixes samples in this mode."""
        x, again = self.x, _exchanged(self.x, 1)
        watched = [name for name, module in self.kinds.items() if not is_row_by_row(module)]
        one = self._pass(x, watched, self._replay, self._note)
        mixes = differ(one, self._pass(again))
        if not mixes:  # nor may the last one change with those in front of it
            self._place = len(x) - 1
            again = _exchanged(x.flip(0), 1).flip(0)
            mixes = differ(self._pass(x), self._pass(again))
        if mixes and not any(self.mixing.values()):
            blocks = [name for name, _ in self.subject.model.named_modules()]
            calls = []
            for given in (x, again):
                self._calls = []
                self._pass(given, blocks, self._trace)
                calls.append(self._calls)
            self._blame_blocks(*calls)
        return mixes

    def _pass(self, x: Tensor, names: Sequence[str] = (), see: Any = None, before: Any = None) -> list[Tensor]:
        """One sample's output, of a model in the state and the random state that every pass starts from."""
        subject = self.subject
        kept = [(b, b.clone()) for b in subject.model.buffers()]
        subject.set_mode(self.mode)
        torch.manual_seed(SEED)
        with seeing(subject.model, names, see, before=before):
            output = subject.run(x)
        for b, value in kept:
            b.copy_(value)
        return _of_one(output, len(x), self._place, subject.detector)

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._buffers[name] = [b.clone() for b in module.buffers()]
        self._taken[name] = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)  # some overwrite it

    def _replay(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        args, n = self._taken.pop(name), len(self.x)
        tensors = [a for a in args if isinstance(a, Tensor) and a.dim() > 1]
        rows = len(tensors[0]) if tensors else 0
        if not rows or rows % n or any(len(t) != rows for t in tensors):
            self.mixing.setdefault(name, None)
            return
        if self._inside or self.mixing.get(name):
            return
        self._inside = True
        after, state = [b.clone() for b in module.buffers()], torch.get_rng_state()
        given = [args, tuple(_exchanged(a, rows // n) if isinstance(a, Tensor) and a.dim() > 1 else a for a in args)]
        found = []
        for arguments in given:
            for b, value in zip(module.buffers(), self._buffers[name], strict=True):
                b.copy_(value)
            torch.manual_seed(SEED)
            copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
            found.append([t[: rows // n] for t in tensors_in(module.forward(*copies)) if len(t) == rows])
        for b, value in zip(module.buffers(), after, strict=True):
            b.copy_(value)
        torch.set_rng_state(state)
        self.mixing[name] = differ(*found)
        self._inside = False

    def _trace(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        n = len(self.x)
        taken, given = (
            _of_one(held, n, self._place, detector)
            for held, detector in ((args, False), (output, self.subject.detector))
        )
        self._calls.append((name, _fingerprint(taken), _fingerprint(given)))

    def _blame_blocks(self, calls: list[Any], again: list[Any]) -> None:
        """Blocks that mix in code of their own: same input, another output, and none inside that does so."""
        both = zip(calls, again, strict=True)
        mixing = [one[0] for one, other in both if one[1] and one[1] == other[1] and one[2] != other[2]]
        for name in mixing:
            inner = f"{name}." if name else ""
            if not any(other != name and other.startswith(inner) for other in mixing):
                self.mixing[name] = True


def _exchanged(x: Tensor, keep: int) -> Tensor:
    """With all rows but the first ones replaced by others of another size and mean."""
    rest = x[keep:].flip(0)
    if x.is_floating_point():
        spread = rest.float().std().nan_to_num().to(x.dtype) if rest.numel() > 1 else 1
        rest = 2 * rest.flip(-1) + (spread if spread > 0 else 1)
    elif x.dtype != torch.bool:
        rest = rest.flip(-1)
        rest = (
            rest.clone().index_fill_(1, torch.tensor([0], device=x.device), 0) if torch.equal(rest, x[keep:]) else rest
        )
    return torch.cat([x[:keep], rest])


def _of_one(output: Any, n: int, place: int, detector: bool) -> list[Tensor]:
    """What belongs to the sample at this place."""
    if detector and isinstance(output, list) and len(output) == n:
        return tensors_in(output[place])
    every = [t for t in tensors_in(output) if t.dim() and len(t) and len(t) % n == 0]
    return [t[place * len(t) // n : (place + 1) * len(t) // n] for t in every]


def differ(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether any differs by more than its dtype rounds."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return True
    for a, b in zip(one, other, strict=True):
        if torch.equal(a, b):
            continue
        apart = ~((a == b) | (a.isnan() & b.isnan()))
        if apart.any():
            size = a[a.isfinite()].abs().max() if a.isfinite().any() else a.new_ones(())
            if not bool(((a - b)[apart].abs() <= 8 * torch.finfo(a.dtype).eps * size).all()):
                return True
    return False


def _fingerprint(tensors: list[Tensor]) -> list[float]:
    wide = [t.double() for t in tensors]
    return [float(v) for t in wide for v in (t.sum(), t.square().sum(), t.abs().amax() if t.numel() else t.sum())]

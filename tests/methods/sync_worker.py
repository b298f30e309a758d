"""Batches divided between two processes: each rank writes what its layers gave for its part.

Called by `test_batch_norm.py` as ``sync_worker.py RANK FOLDER``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anybatch.layers import BatchChannelNorm2d, SyncBatchNorm
from helpers import one_of_two_ranks

CHANNELS = 6


@dataclass(frozen=True)
class Sharing:
    """A layer that is given batches of samples, of which the first rank takes the first few."""

    make: Callable[..., nn.Module]
    first: tuple[int, ...]
    total: tuple[int, ...]
    positions: tuple[int, int] = (5, 7)
    mean: float = 3.0
    dtype: torch.dtype = torch.float64

    def layer(self) -> nn.Module:
        torch.manual_seed(0)
        layer = self.make(CHANNELS)
        for p in layer.parameters():
            nn.init.normal_(p, 1.0)
        return layer.to(self.dtype)

    def run(self, rank: int | None) -> dict[str, Tensor]:
        """Outputs, gradients and buffers of all batches in turn, of a rank's part or of the whole."""
        layer, found = self.layer(), {}
        for step, (first, total) in enumerate(zip(self.first, self.total, strict=True)):
            generator = torch.Generator().manual_seed(step)
            x, g = torch.randn(2, total, CHANNELS, *self.positions, generator=generator, dtype=torch.float64)
            x = x * torch.arange(1.0, total + 1).reshape(-1, 1, 1, 1) + self.mean
            part = slice(None) if rank is None else slice(first) if rank == 0 else slice(first, None)
            x, g = (t[part].to(self.dtype) for t in (x, g))
            y = layer(x.requires_grad_())
            y.backward(g)
            found |= {f"output {step}": y.detach(), f"gradient {step}": x.grad}
        found |= {f"sum of {name}": p.grad for name, p in layer.named_parameters()}
        return found | {f"buffer {name}": b for name, b in layer.named_buffers()}


_SYNC = partial(SyncBatchNorm, momentum=0.2)
_BCN = partial(BatchChannelNorm2d, num_groups=3)
SHARINGS = {
    "sync": Sharing(_SYNC, (1, 1), (2, 2)),
    "sync-unequal": Sharing(_SYNC, (3, 1), (5, 4)),
    "sync-none_on_one_rank": Sharing(_SYNC, (2, 0), (2, 3)),
    "sync-one_value_on_each_rank": Sharing(_SYNC, (1,), (2,), positions=(1, 1)),
    "sync-plain_average": Sharing(partial(SyncBatchNorm, momentum=None), (1, 2), (2, 5)),
    "sync-no_affine": Sharing(partial(SyncBatchNorm, affine=False, track_running_stats=False), (1,), (3,)),
    "sync-mean_1000": Sharing(_SYNC, (1,), (2,), mean=1000, dtype=torch.float32),
    "sync-bfloat16": Sharing(_SYNC, (1,), (2,), dtype=torch.bfloat16),
    "bcn": Sharing(_BCN, (1, 1, 1), (2, 2, 2)),
    "bcn-unequal": Sharing(_BCN, (3, 1, 0), (5, 4, 2)),
    "bcn-rate": Sharing(partial(_BCN, rate=0.1, warm_start=False), (1, 2), (2, 5)),
    "bcn-batch": Sharing(partial(_BCN, statistics="batch"), (1, 2), (2, 5)),
}


def main(rank: int, folder: Path) -> None:
    with one_of_two_ranks(rank, folder):
        found = {name: sharing.run(rank) for name, sharing in SHARINGS.items()}
        alone = [dist.new_group([r]) for r in range(2)][rank]
        found["sync-groups of one"] = Sharing(partial(_SYNC, process_group=alone), (1,), (3,)).run(rank)
        torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

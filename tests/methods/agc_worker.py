"""One rank of two: clips the sharded gradients of `Sharded`; rank 0 writes them whole.

Called by `test_adaptive_gradient_clipping.py` as ``agc_worker.py RANK FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from anybatch.optim import adaptive_clip_grad_
from helpers import one_of_two_ranks
from methods.test_adaptive_gradient_clipping import Sharded, filled


def main(rank: int, folder: Path) -> None:
    with one_of_two_ranks(rank, folder):
        model = filled(Sharded())
        whole = {name: p.grad for name, p in model.named_parameters()}
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model, mesh=mesh)
        for name, p in model.named_parameters():
            p.grad = distribute_tensor(whole[name], mesh, p.placements)
        adaptive_clip_grad_(model)
        found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        if rank == 0:
            torch.save(found, folder / "gradients.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

"""One rank of two: trains each scheme for one step on one image under DDP; rank 0 writes the averaged gradients.

Called by `test_schemes.py` as ``ddp_worker.py RANK FOLDER``.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from contract.cases import SCHEMES, images


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=90))
    labels = torch.tensor([0, 3])
    found = {}
    for case in SCHEMES:
        model = case.network(torch.float64)
        x = images(2, dtype=torch.float64)[rank : rank + 1]
        parallel = DistributedDataParallel(model)  # named, since it must outlive the backward pass
        F.cross_entropy(parallel(x), labels[rank : rank + 1]).backward()
        found[case.scheme] = {name: p.grad for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

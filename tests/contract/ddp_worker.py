"""One rank of two: trains each scheme for one step on one image under DDP; rank 0 writes the averaged gradients.

Called by `test_schemes.py` as ``ddp_worker.py RANK FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from contract.cases import SCHEMES, images
from helpers import one_of_two_ranks


def main(rank: int, folder: Path) -> None:
    with one_of_two_ranks(rank, folder):
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


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

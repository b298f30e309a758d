"""The cases by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from anybatch.bench.cell import Cell
from anybatch.bench.choice import Settings
from anybatch.bench.layers import accuracy_cells, conv_cells, grouped_cells, norm_cells, recompute_cells
from anybatch.bench.networks import inference_cells, step_cells
from anybatch.bench.parameters import clipping_cells, standardization_cells

_CELLS: dict[str, Callable[[Settings], Iterator[Cell]]] = {
    "conv": conv_cells,
    "grouped": grouped_cells,
    "norm": norm_cells,
    "recompute": recompute_cells,
    "weight_standardize": standardization_cells,
    "agc": clipping_cells,
    "accuracy": accuracy_cells,
    "step": step_cells,
    "inference": inference_cells,
}


def cells(chosen: Settings) -> Iterator[Cell]:
    """All that is to be timed, case after case."""
    for case in chosen.cases:
        yield from _CELLS[case](chosen)

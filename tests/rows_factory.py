"""Rows as a study would leave them, without training anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anybatch.recipe import Recipe
from anybatch.rows import Row


def make_row(
    scheme: str,
    batch_size: int,
    seed: int,
    error: float | None,
    *,
    message: str | None = None,
    val_images: int = 1000,
    classes: Sequence[str] = tuple("0123456789"),
    purpose: str = "run",
    speed: float = 1000.0,
    changes: Mapping[str, Any] | None = None,
) -> Row:
    """A run that ended with this error (0 to 1), or failed where there is none."""
    cell = {"model.scheme": scheme, "data.batch_size": batch_size, "train.seed": seed}
    recipe = Recipe().replace({**cell, **(changes or {})})
    ends = 0.9 if error is None else error
    epochs = 2 if error is None else 8
    return {
        "format": 1,
        "id": recipe.id,
        "purpose": purpose,
        "status": "failed" if error is None else "ok",
        "message": (message or "the loss is not a number") if error is None else None,
        "recipe": recipe.model_dump(mode="json"),
        "versions": {"anybatch": "0.1.0", "torch": "2.11.0"},
        "device": "cpu",
        "threads": 1,
        "seed": seed,
        "data": {
            "name": "digits",
            "train_images": 500,
            "val_images": val_images,
            "classes": list(classes),
            "note": "Each image's contrast is multiplied by e^u, u uniform in ±1.5.",
        },
        "peak_lr": recipe.peak_lr,
        "parameters": 77850,
        "multiply_adds": 1_234_567,
        "curve": [
            {
                "epoch": epoch,
                "samples": 500 * epoch,
                "train_loss": 2.0 / epoch,
                "val_loss": 2.0 / epoch,
                "error": float(min(1.0, ends + (0.9 - ends) * np.exp(-0.9 * epoch) if epoch < epochs else ends)),
            }
            for epoch in range(1, epochs + 1)
        ],
        "error": error,
        "images_per_second": None if error is None else speed,
        "peak_memory": None if error is None else 2**20 * (4 + batch_size),
        "memory_measure": "bytes of tensors that torch's allocator held",
        "seconds": 4.0,
        "started": "2026-01-01T00:00:00+00:00",
    }


def make_rows(errors: Mapping[str, Mapping[int, Sequence[float | None]]], **options: Any) -> list[Row]:
    """Rows of a study from scheme -> batch size -> error of each seed."""
    return [
        make_row(scheme, batch, seed, error, **options)
        for scheme, cells in errors.items()
        for batch, found in cells.items()
        for seed, error in enumerate(found)
    ]

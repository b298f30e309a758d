"""The table of cases, gathered from ``rows``: one file a method, with its `OPS`, `LAYERS` and `SCHEMES`.

A method joins the contract tests by a file there.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from contract import rows
from contract.kinds import HALVES as HALVES
from contract.kinds import LayerCase, OpCase, SchemeCase
from contract.kinds import images as images
from contract.kinds import last_format as last_format

_FILES = [importlib.import_module(f"contract.rows.{file.name}") for file in pkgutil.iter_modules(rows.__path__)]


def _gathered(table: str) -> list[Any]:
    return [row for file in _FILES for row in getattr(file, table, [])]


OPS: list[OpCase] = _gathered("OPS")
MIXED_OPS: list[OpCase] = _gathered("MIXED_OPS")
"""As autocast calls them: activations in half precision, parameters in float32."""
LAYERS: list[LayerCase] = _gathered("LAYERS")
DROPPING: list[SchemeCase] = [case for case in _gathered("SCHEMES") if case.drops]
"""They draw random numbers in training, so that only their evaluation can be compared."""
SCHEMES: list[SchemeCase] = [case for case in _gathered("SCHEMES") if not case.drops]
BATCH_FREE = [case for case in SCHEMES if case.claims_batch_independence]
BATCH_BOUND = [case for case in SCHEMES if not case.claims_batch_independence]

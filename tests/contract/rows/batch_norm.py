"""Rows of batch normalization, and of no normalization."""

from __future__ import annotations

from contract.kinds import SchemeCase

SCHEMES: list[SchemeCase] = [SchemeCase("bn", one_position=False), SchemeCase("none")]

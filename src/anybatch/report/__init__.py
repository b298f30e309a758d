"""Figures, tables and a verdict, computed from rows or from what probes found; nothing here knows of studies or models.

`summarize` reduces rows to numbers and sentences, `figure` draws them, `write` leaves a folder for people and programs.
The intervals are explained in `statistics`, and what may be claimed from them in `verdict`.
"""

from anybatch.report.figures import figure
from anybatch.report.page import write
from anybatch.report.summary import Cell, Difference, Summary, Trial, summarize

__all__ = ["Cell", "Difference", "Summary", "Trial", "figure", "summarize", "write"]

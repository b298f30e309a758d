"""What a model does with a batch, and how healthy its signal is. Every probe leaves the model as it was."""

from anybatch.probe.batch_dependence import BatchDependence as BatchDependence
from anybatch.probe.batch_dependence import batch_dependence as batch_dependence
from anybatch.probe.elimination_singularities import EliminationSingularities as EliminationSingularities
from anybatch.probe.elimination_singularities import elimination_singularities as elimination_singularities
from anybatch.probe.result import Finding as Finding
from anybatch.probe.result import Result as Result
from anybatch.probe.result import Table as Table
from anybatch.probe.signal_propagation import SignalPropagation as SignalPropagation
from anybatch.probe.signal_propagation import signal_propagation as signal_propagation
from anybatch.probe.smoothness import Smoothness as Smoothness
from anybatch.probe.smoothness import smoothness as smoothness
from anybatch.probe.split_invariance import SplitInvariance as SplitInvariance
from anybatch.probe.split_invariance import split_invariance as split_invariance
from anybatch.probe.tile_consistency import TileConsistency as TileConsistency
from anybatch.probe.tile_consistency import tile_consistency as tile_consistency
from anybatch.probe.unchanged import unchanged as unchanged

"""What a model does with a batch, and how healthy its signal is. Every probe leaves the model as it was."""

from anybatch.probe.batch_dependence import BatchDependence as BatchDependence
from anybatch.probe.batch_dependence import batch_dependence as batch_dependence
from anybatch.probe.result import Finding as Finding
from anybatch.probe.result import Result as Result
from anybatch.probe.split_invariance import SplitInvariance as SplitInvariance
from anybatch.probe.split_invariance import split_invariance as split_invariance
from anybatch.probe.unchanged import unchanged as unchanged

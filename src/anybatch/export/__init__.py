"""Networks as files that run without their code: ``torch.export`` and ONNX, with a card of what they are."""

from anybatch.export.card import Card as Card
from anybatch.export.program import CheckError as CheckError
from anybatch.export.program import Exported as Exported
from anybatch.export.program import export as export
from anybatch.export.runtime import open_onnx as open_onnx

"""What is done to the BatchNorm of a finished network."""

from anybatch.convert.conversion import convert_batchnorm as convert_batchnorm
from anybatch.convert.fold import FoldReport as FoldReport
from anybatch.convert.fold import fold as fold
from anybatch.convert.report import ConversionReport as ConversionReport
from anybatch.convert.statistics import freeze_batchnorm as freeze_batchnorm
from anybatch.convert.statistics import precise_batchnorm as precise_batchnorm
from anybatch.convert.statistics import unfreeze_batchnorm as unfreeze_batchnorm

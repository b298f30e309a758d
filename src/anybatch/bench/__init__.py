"""Speed and memory beside BatchNorm's, on this machine. Needs torch alone; `figure` needs matplotlib.

``timing`` times variants of the same work side by side, ``cases`` says what they are and checks each against float64,
``runner`` makes rows of them, ``targets`` holds the bars that rows are measured by, ``tables`` tells them.
"""

from anybatch.bench.cases import CASES as CASES
from anybatch.bench.cases import Settings as Settings
from anybatch.bench.cases import settings as settings
from anybatch.bench.runner import Row as Row
from anybatch.bench.runner import read as read
from anybatch.bench.runner import run as run
from anybatch.bench.targets import TARGETS as TARGETS
from anybatch.bench.targets import Judged as Judged
from anybatch.bench.targets import judged as judged

"""Speed and memory beside BatchNorm's, on this machine. Needs torch alone; `figure` needs matplotlib.

``choice`` says what is timed; ``layers``, ``parameters`` and ``networks`` make it, each piece of work a ``cell`` with
its check against float64; ``timing`` times variants of the same work side by side; ``runner`` makes rows of them;
``targets`` holds the bars that rows are measured by, and ``tables`` tells them.
"""

from anybatch.bench.choice import CASES as CASES
from anybatch.bench.choice import Settings as Settings
from anybatch.bench.choice import settings as settings
from anybatch.bench.runner import Row as Row
from anybatch.bench.runner import read as read
from anybatch.bench.runner import run as run
from anybatch.bench.targets import TARGETS as TARGETS
from anybatch.bench.targets import Judged as Judged
from anybatch.bench.targets import judged as judged

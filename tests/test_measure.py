"""What a process is told about its memory."""

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource
import torch
from anybatch.measure import settle_allocator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        x = torch.ones(10 << 20)  # 40 MiB, more than glibc keeps by itself
        for _ in range(3):
            x = x + 1
        del x
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults()
before = faults()
assert settle_allocator()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no glibc to be told")
def test_a_settled_process_fetches_no_memory_again() -> None:
    told = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True).stdout
    before, after = map(int, told.split())
    assert after < 100 < before

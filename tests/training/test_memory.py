"""Memory that was freed goes back to the system."""

import subprocess
import sys

import pytest

CODE = """
import psutil
from visualrwkv.training.memory import share_one_heap, trim_memory
share_one_heap()
blocks = [bytearray(100_000) for _ in range(2_000)]  # 200 MB in pieces below the size that gets pages of its own
for block in blocks: block[::4096] = bytes(len(block[::4096]))
last = bytearray(100_000)  # keeps the top of the heap in use
full = psutil.Process().memory_info().rss
del blocks, block
trim_memory()
print(full - psutil.Process().memory_info().rss)
"""

AGAIN = """
import resource
from visualrwkv.training.memory import keep_freed_memory
keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(64 << 20)
    block[::4096] = bytes(len(block[::4096]))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del block
print(faults)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_is_kept_costs_no_page_fault_again():
    faults = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, check=True).stdout
    assert int(faults) < 1000  # of 16,384 pages


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_goes_back():
    freed = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    assert int(freed) > 150e6

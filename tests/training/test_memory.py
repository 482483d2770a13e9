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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_goes_back():
    freed = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    assert int(freed) > 150e6

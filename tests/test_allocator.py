"""What a process frees is there for what it asks for next; measured in one that starts, for it holds for all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# A block of 64 MiB, written to, freed and taken again three times; how many pages the kernel had to bring.
FAULTS = """
import ctypes, json, resource, runpy, sys
allocator = runpy.run_path(sys.argv[1])
kept = allocator["keep_freed_memory"]() if sys.argv[2] == "kept" else None
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def fault():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    libc.memset(block, 1, 64 << 20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps({"kept": kept, "faults": [fault() for _ in range(3)]}))
"""
FILE = Path(__file__).parents[1] / "ssm_lm" / "allocator.py"


def measure(how: str) -> dict:
    words = [sys.executable, "-S", "-c", FAULTS, str(FILE), how]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_what_is_freed_is_kept():
    as_it_is, kept = measure("as it is"), measure("kept")
    assert kept["kept"] is True
    assert min(as_it_is["faults"]) > 20 * max(kept["faults"][1:])  # huge pages make them fewer, but not none

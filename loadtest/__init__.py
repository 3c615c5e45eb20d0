"""Benchmarks and load tests: `python -m loadtest.NAME`."""

import os
import sys

# the allocator settings of deploy/Dockerfile, so that benchmarks measure what the images run
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "268435456",
}

_is_program = any(word.startswith("loadtest") for word in sys.orig_argv[1:4])
# glibc reads these variables only when a process starts
if _is_program and "MALLOC_ARENA_MAX" not in os.environ:
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})

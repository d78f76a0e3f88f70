"""Memory of large tensors on the CPU: the process keeps it, in huge pages, instead of asking for it in every step.

What torch frees glibc gives back to the kernel, and the next tensor gets it again a page of 4 KiB at a time, zeroed:
up to a tenth of a training step. `exo_megatron/__init__.py` asks torch for huge pages, which it decides at its first
allocation. THP_MEM_ALLOC_ENABLE=0 in the environment turns both off.
"""

from __future__ import annotations

import ctypes
import os

# glibc's malloc.h. Values are C ints.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT, _KEPT_AT_THE_END = 2**30, 2**31 - 1


def keep_memory() -> None:
    """Let glibc keep blocks of up to 1 GiB that are freed. No effect with another C library."""
    if os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_AT_THE_END)

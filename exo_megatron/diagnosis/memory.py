"""Peak memory that a piece of work allocates, beyond what was there before."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """Measure the peak of the bytes in tensors allocated by `work` and not yet freed.

    On the CPU torch's allocator is watched through its profiler, which does not see buffers inside
    of a kernel that bypass it (a few hundred KiB); on CUDA the caching allocator's own count is
    read.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as profiler:
        work()
    results = profiler.profiler
    if results is None or results.kineto_results is None:
        raise RuntimeError("the profiler recorded nothing")
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak

"""exo-megatron: efficient exact optimization (EXO, arXiv 2402.00856) of language models on megatron-core."""

import os

__version__ = "0.1.0"

# Huge pages for large tensors on the CPU, whose memory torch asks of the kernel anew each time: a page of 4 KiB at a
# time takes up to a tenth of a training step. torch reads this at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

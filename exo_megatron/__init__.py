"""exo-megatron: efficient exact optimization (EXO, arXiv 2402.00856) of language models on megatron-core."""

import os

__version__ = "0.1.0"

# See parallel/cpu_memory.py. Here, because torch reads it at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

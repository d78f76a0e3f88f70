"""What holds for every test: one thread per process, and no launcher around the test run itself."""

from __future__ import annotations

import os

# Before torch is imported anywhere. The tests start several processes on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

# pytest may itself run inside a Slurm job or under a launcher; the code under test must not take that for its own.
for _name in list(os.environ):
    if _name.startswith(("SLURM_", "OMPI_", "PMI_", "PMIX_")) or _name in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
        del os.environ[_name]

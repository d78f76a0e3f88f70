"""Measure what a checkpoint of training costs each rank.

    python tools/bench_checkpoint.py [--ranks 2] [--help]

The same as `python -m tools.bench checkpoint`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.bench.checkpoint import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

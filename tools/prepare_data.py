#!/usr/bin/env python
"""Tokenise the data of a stage ahead of time, and print what their lengths mean for it.

    python tools/prepare_data.py align --config align.yaml [key=value ...]
    mpirun -n 8 python tools/prepare_data.py align --config align.yaml

All processes work together, and the bytes that they write do not depend on their number. A run that was
killed goes on where it was. Same as `exo-megatron prepare`. Exit code: 0 done, 2 wrong input.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exo_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))

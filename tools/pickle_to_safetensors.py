#!/usr/bin/env python
"""HF checkpoint with pickled weights (pytorch_model*.bin) -> the same checkpoint with safetensors.

Works for every model: no code of the checkpoint or of the model is run, and a pickle that asks for any is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exo_megatron.cli.pickles import convert_pickles


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the arguments say and give the exit code: 0 done, 2 wrong input, 1 any other failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="directory with config.json and pytorch_model*.bin")
    parser.add_argument("--output", type=Path, required=True, help="directory to be made, or empty")
    arguments = parser.parse_args(argv)
    return convert_pickles(arguments.hf, arguments.output)


if __name__ == "__main__":
    sys.exit(main())

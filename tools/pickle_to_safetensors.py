#!/usr/bin/env python
"""Convert an HF checkpoint with pickled weights (pytorch_model*.bin) to one with safetensors.

Works for every model: no code of the checkpoint or of the model is run, and a pickle that asks for
any is refused. Same as `exo-megatron pickles`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exo_megatron.cli.main import run_command, run_program
from exo_megatron.config.stages import PicklesConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the arguments say and return the exit code: 0 done, 2 wrong input, 1 any other
    failure.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="directory with config.json and pytorch_model*.bin")
    parser.add_argument("--output", type=Path, required=True, help="directory to be made, or empty")
    arguments = parser.parse_args(argv)
    return run_program(lambda: run_command(PicklesConfig(hf=arguments.hf, output=arguments.output)))


if __name__ == "__main__":
    sys.exit(main())

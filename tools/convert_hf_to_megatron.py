#!/usr/bin/env python
"""Convert an HF checkpoint to a distributed checkpoint that can be loaded at any tensor- and
pipeline-parallel size.

One process, or several under torchrun, srun or mpirun, which divide the tensors. Same as
`exo-megatron import`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exo_megatron.cli.main import run_program
from exo_megatron.config.stages import ImportConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the arguments say and return the exit code: 0 done, 2 wrong input, 1 any other
    failure.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="directory of the HF checkpoint (safetensors)")
    parser.add_argument("--output", type=Path, required=True, help="directory to be made, or empty")
    parser.add_argument("--dtype", choices=("keep", "fp32", "bf16"), default="keep", help="type of the stored weights")
    parser.add_argument("--verify", action="store_true", help="compare with the source; a difference is an error")
    arguments = parser.parse_args(argv)
    config = ImportConfig(hf=arguments.hf, output=arguments.output, dtype=arguments.dtype, verify=arguments.verify)

    def work() -> int:
        from exo_megatron.stages.run import run_conversion

        return run_conversion(config)

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())

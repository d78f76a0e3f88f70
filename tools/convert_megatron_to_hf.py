#!/usr/bin/env python
"""Convert a distributed checkpoint, or the newest step of a training stage's output, to HF
(safetensors).

One process, or several under torchrun, srun or mpirun, which divide the files. Same as
`exo-megatron export`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exo_megatron.cli.main import run_program
from exo_megatron.config.sections import ModelConfig
from exo_megatron.config.stages import ExportConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the arguments say and return the exit code: 0 done, 2 wrong input, 1 any other
    failure.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint, or output of a training stage")
    parser.add_argument("--output", type=Path, required=True, help="directory to be made, or empty")
    parser.add_argument("--dtype", choices=("keep", "fp32", "bf16"), default="keep", help="type of the HF weights")
    parser.add_argument("--verify", action="store_true", help="compare with the source; a difference is an error")
    arguments = parser.parse_args(argv)
    model = ModelConfig(checkpoint=arguments.checkpoint)
    config = ExportConfig(model=model, output=arguments.output, dtype=arguments.dtype, verify=arguments.verify)

    def work() -> int:
        from exo_megatron.stages.run import run_conversion

        return run_conversion(config)

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())

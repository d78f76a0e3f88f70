#!/usr/bin/env python
"""Compare an HF checkpoint with a distributed checkpoint that was converted from it or exported to
it.

Compared are the description of the model, every tensor bit for bit, and the logits in fp32 at the
given topology. One process, or as many as the model is cut into (or a multiple) under torchrun,
srun or mpirun. Exit code: 0 all agrees, 1 something differs (or logits could not be compared for
want of memory or of a transformers that knows the model), 2 wrong input. Same as `exo-megatron
verify`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exo_megatron.cli.main import run_command, run_program
from exo_megatron.config.sections import ParallelConfig
from exo_megatron.config.stages import VerifyConfig

TOLERANCE = VerifyConfig.model_fields["tolerance"].default


def main(argv: Sequence[str] | None = None) -> int:
    """Compare as the arguments say, print the table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="directory of the HF checkpoint (safetensors)")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint, or output of a training stage")
    parser.add_argument("--tensor", type=_size, default=1, help="tensor-parallel size")
    parser.add_argument("--pipeline", type=_size, default=1, help="pipeline-parallel size")
    parser.add_argument("--expert", type=_size, default=1, help="expert-parallel size")
    parser.add_argument("--prompts", type=Path, help="JSONL ({prompt, completions}) or a prompt in every line")
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        help=f"of logits, times the largest |logit| if that is above 1 (default {TOLERANCE:g})",
    )
    parser.add_argument(
        "--made",
        choices=("import", "export"),
        help="which side was made from the other (default: export for a checkpoint of training, else import)",
    )
    parser.add_argument("--tensors-only", action="store_true", help="do not run the models")
    arguments = parser.parse_args(argv)
    for option in ("prompts", "tolerance"):
        if arguments.tensors_only and getattr(arguments, option) is not None:
            parser.error(f"argument --{option}: not allowed with argument --tensors-only, which runs no models")
    config = VerifyConfig(
        hf=arguments.hf,
        checkpoint=arguments.checkpoint,
        parallel=ParallelConfig(tensor=arguments.tensor, pipeline=arguments.pipeline, expert=arguments.expert),
        tolerance=TOLERANCE if arguments.tolerance is None else arguments.tolerance,
        prompts=arguments.prompts,
        tensors_only=arguments.tensors_only,
        made=arguments.made,
    )
    return run_program(lambda: run_command(config))


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; expected a positive whole number")
    return int(text)


def _tolerance(text: str) -> float:
    try:
        tolerance = float(text)
    except ValueError:
        tolerance = math.nan
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a tolerance; expected a positive number, such as 1e-4")
    return tolerance


if __name__ == "__main__":
    sys.exit(main())

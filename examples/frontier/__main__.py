"""When EXO beats DPO:  python -m frontier --output DIR [--data FILE] [--small] [--stages DIR]

Leaves in DIR: summary.json (end points), findings.json, report.html and its pictures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from exo_megatron.errors import ExoError
from frontier.report import write_report
from frontier.stages import read_stage_runs
from frontier.work import FULL, SMALL, do_all, prepare


def main() -> int:
    """Do all that is not done yet in --output, and write the report. Exit code 2 for data that cannot be used."""
    parser = argparse.ArgumentParser(description="EXO against DPO at equal KL")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, help='JSONL of {"text", "label"}; default: the quickstart\'s grammar')
    parser.add_argument("--small", action="store_true", help="a small version, for a look")
    parser.add_argument("--stages", type=Path, help="output of the workflow of stages, to be reported too")
    arguments = parser.parse_args()
    try:
        reviews = prepare(arguments.output, arguments.data)
        results = do_all(arguments.output, SMALL if arguments.small else FULL)
        staged = None if arguments.stages is None else read_stage_runs(arguments.stages)
        print(write_report(arguments.output, reviews.source, results, staged))
    except ExoError as error:
        print(f"frontier: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

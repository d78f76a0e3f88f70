"""Run benchmarks and print their tables.

    python -m tools.bench                      the names
    python -m tools.bench steps                one benchmark (or several names)
    python -m tools.bench steps --quick        a small version of it, as CI runs it
    python -m tools.bench steps --quick --compare docs/benchmarks/cpu-2-cores-quick.json
    python -m tools.bench predict --lengths hh --k 8 --model 7b    the formula for your own data and model
    python -m tools.bench start pairs --hh FILE --tokenizer DIRECTORY     what the size of the data costs a start
    python -m tools.bench start candidates --tokenizer DIRECTORY
    python -m tools.bench checkpoint           what a checkpoint of training costs each rank

The sides of a comparison run in turn in one process; the ratios are the result. Both sides' results
(gradients if there are any) are compared first: if they differ, no times are printed and the exit
code is 1. Peers (TRL, transformers) are installed by `pip install -e '.[bench]'`. Benchmarks run on
a CUDA device if there is one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from exo_megatron.errors import ExoError
from tools.bench.compare import better, compare, read_committed
from tools.bench.options import Options
from tools.bench.sides import Different
from tools.bench.table import Record, Table

BENCHMARKS = {
    "steps": "training step against an HF model and TRL, and what each idea is worth, K=2 to 32",
    "sharing": "prompt sharing on and off, against the formula",
    "logprobs": "log-probs: ours, naive, megatron-core's cross entropy; time and memory, forward and backward",
    "attention": "two-pass merge, separate sequences, dense mask",
    "oversized": "a group split into parts against the same group in one micro-batch",
    "balance": "makespan of the 1F1B schedule over length distributions, random and balanced",
    "growth": "time and memory against K, prompt length, vocabulary and number of groups, with pictures",
    "rollout": "candidates a second: ours, HF generate, and the floor of our own matrix products",
    "peak": "share of the machine's own matrix-multiply peak that a training step reaches",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks that the arguments name, and return 0, or 1 if the sides of one do not
    agree or a figure is worse than the committed one.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if given[:1] == ["predict"]:
            from tools.bench import predict  # it loads large packages, as benchmarks do

            return predict.main(given[1:])
        if given[:1] == ["start"]:
            from tools.bench import start

            return start.main(given[1:])
        if given[:1] == ["checkpoint"]:
            from tools.bench import checkpoint

            return checkpoint.main(given[1:])
        return _benchmark(given)
    except ExoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _benchmark(argv: Sequence[str]) -> int:
    names = "\n".join(f"  {name:<12} {what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=f"{__doc__}\nbenchmarks:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="which ones (default: list them)")
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it works, not to quote")
    parser.add_argument("--rounds", type=_count, help="how often each side is timed (default: 5, --quick 2)")
    parser.add_argument("--threads", type=_count, default=1, help="of a process on the CPU (default: 1)")
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"), help="where pictures go")
    parser.add_argument("--json", type=Path, help="write the tables to this file, too")
    parser.add_argument("--compare", type=Path, help="fail if a figure is worse than in this file, which --json wrote")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    if not arguments.names:
        print(names)
        return 0
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of processes that a benchmark starts
    options = Options(arguments.quick, arguments.rounds or (2 if arguments.quick else 5), arguments.pictures)
    committed = read_committed(arguments.compare, arguments.names) if arguments.compare is not None else {}
    tables = {name: run(name, options) for name in arguments.names}
    compared = [(name, table, committed[name]) for name, table in tables.items() if table and name in committed]
    held = [holds(*each, options) for each in compared]
    if arguments.json is not None:
        figures = {name: table.as_json() for name, table in tables.items() if table is not None}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(None in tables.values() or not all(held))


def run(name: str, options: Options) -> Table | None:
    """Print and return a benchmark's table; None, and a line on stderr, if its sides do not
    agree.
    """
    try:
        table = load(name)(options)
    except Different as difference:
        print(f"{name}: the sides do not compute the same: {difference}", file=sys.stderr)
        return None
    print(table.markdown(), end="\n\n", flush=True)
    return table


def holds(name: str, table: Table, committed: Sequence[Record], options: Options) -> bool:
    """Tell whether a benchmark's figures are as good as the committed ones; what is worse goes to
    stderr.

    Times that are too slow are measured a second time, and the better ratio counts, because other
    programs disturb a run.
    """
    findings = compare(table.records, committed)
    if any(finding.fails and finding.is_time for finding in findings):
        again = run(name, options)
        records = table.records if again is None else better(table.records, again.records)
        findings = compare(records, committed)
    for finding in findings:
        print(f"{name}: {'error' if finding.fails else 'warning'}: {finding.message}", file=sys.stderr)
    return not any(finding.fails for finding in findings)


def load(name: str) -> Callable[[Options], Table]:
    """Return `run` of the module of a benchmark, which is imported only then, because it loads
    large packages.
    """
    run: Callable[[Options], Table] = importlib.import_module(f"tools.bench.{name.replace('-', '_')}").run
    return run


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; expected a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

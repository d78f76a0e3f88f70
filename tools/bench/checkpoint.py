"""What a checkpoint of training costs each rank: how long a step waits, bytes written and read, memory.

    python -m tools.bench checkpoint [--ranks 2] [--hidden 1024] [--layers 4] [--vocab 16384] [--slow 20]
    python tools/bench_checkpoint.py         the same

Data-parallel ranks train a random Llama and save it, as `align` does, by a thread that takes --slow
seconds longer than it has to; steps go on meanwhile. Then each rank loads the checkpoint into
another model. Compared in the same run: the blocking part of the save with a plain copy of the
rank's share, steps during the save with steps before it, bytes read by all ranks with those of the
checkpoint, the largest private memory (USS) that loading adds with the rank's share of the optimizer's
state. Bytes are what the kernel counts of a process's reads and writes (/proc/self/io).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import LlamaForCausalLM

from exo_megatron.utils.tables import render_table
from tools.bench.models import Shape, words

MIB = 2**20


def main(argv: Sequence[str]) -> int:
    """Measure as the arguments say, print the table, and return 0; 1 if what was loaded is not what was saved."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default in (("ranks", 2), ("hidden", 1024), ("layers", 4), ("vocab", 16384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--slow", type=float, default=20.0, help="seconds by which the writer is slowed")
    arguments = parser.parse_args(argv)
    shape = Shape(arguments.hidden, arguments.layers, arguments.vocab)
    with tempfile.TemporaryDirectory(prefix="exo-bench-checkpoint-") as name:
        folder = Path(name)
        LlamaForCausalLM(shape.config()).save_pretrained(folder / "hf")
        words(shape.vocab).save_pretrained(folder / "hf")
        _launch(1, ["exo_megatron", "import", f"hf={folder / 'hf'}", f"output={folder / 'model'}"])
        _launch(arguments.ranks, ["tools.bench.checkpoint_rank", str(folder), str(arguments.slow)])
        ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(arguments.ranks)]
        stored = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    cells = [_cells(rank, figures) for rank, figures in enumerate(ranks)]
    print(f"{shape}; {arguments.ranks} ranks; a checkpoint of {stored / MIB:.0f} MiB\n")
    print(render_table(HEAD, cells, width=120))
    read = sum(figures["read"] for figures in ranks)
    print(f"\nread by all ranks / checkpoint: {read / stored:.2f}")
    return int(not all(figures["equal"] for figures in ranks))


HEAD = (
    "rank",
    "share MiB",
    "plain copy s",
    "blocked s",
    "ratio",
    "step s",
    "while saving",
    "ratio",
    "written MiB",
    "read MiB",
    "peak MiB of loading",
)


def _cells(rank: int, figures: dict[str, object]) -> tuple[str, ...]:
    def median(name: str) -> float:
        values = figures[name]
        assert isinstance(values, list)
        return float(statistics.median(values))

    def mib(name: str) -> str:
        value = figures[name]
        assert isinstance(value, int)
        return f"{value / MIB:.0f}"

    copy, blocked, before, during = (median(name) for name in ("copy", "blocked", "before", "during"))
    return (
        str(rank),
        mib("share"),
        f"{copy:.3f}",
        f"{blocked:.3f}",
        f"{blocked / copy:.2f}",
        f"{before:.3f}",
        f"{during:.3f}",
        f"{during / before:.3f}",
        mib("written"),
        mib("read"),
        mib("peak"),
    )


def _launch(ranks: int, module: Sequence[str]) -> None:
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, "-m", *module], check=True, env=environment, stdout=sys.stderr)

"""What the size of the data costs the start of `align`: CPU seconds, time to the first step, memory.

    python -m tools.bench start pairs --hh ../shared/data/hh_rlhf/harmless-part1.jsonl.gz \\
        --tokenizer ../shared/data/tokenizers/gpt2
    python -m tools.bench start candidates --tokenizer ../shared/data/tokenizers/gpt2

pairs: --count dialogues (default 160,000), those of --hh repeated with another number in the first
turn and in both answers, so that no text occurs twice. candidates: --count prompts (default 49,000)
of 50 tokens, with 8 candidates of 128 random tokens each. Each of two sizes, 400 records and all,
is started twice with an empty cache before the first time, on --ranks processes, for one step of a
tiny random Llama. CPU seconds are those of all processes. Memory is the largest private memory (USS)
of a rank, sampled ten times a second.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from exo_megatron.utils.files import write_jsonl
from exo_megatron.utils.tables import render_table

FEW = 400
COUNTS = {"pairs": 160_000, "candidates": 49_000}
PROMPT, K, LENGTH = 50, 8, 128
END = "<|endoftext|>"
ANSWER = "\n\nAssistant:"


def main(argv: Sequence[str]) -> int:
    """Measure as the arguments say, print the table, and return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=list(COUNTS))
    parser.add_argument("--tokenizer", type=Path, required=True, help="GPT-2's vocab.json and merges.txt")
    parser.add_argument("--hh", type=Path, help="JSONL (.gz) of chosen and rejected dialogues")
    parser.add_argument("--count", type=int, help="records of the large run")
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args(argv)
    if arguments.data == "pairs" and arguments.hh is None:
        parser.error("pairs are made of the dialogues of --hh")
    count = arguments.count or COUNTS[arguments.data]
    with tempfile.TemporaryDirectory(prefix="exo-bench-start-") as folder:
        site = Site(Path(folder), arguments.ranks)
        site.make_model(arguments.tokenizer)
        starts = []
        for size in (FEW, count):
            data = site.folder / f"{size}.jsonl"
            write_jsonl(data, _pairs(arguments.hh, size) if arguments.data == "pairs" else _candidates(size))
            starts += [(f"{size:,}", which, site.start(data, arguments.data)) for which in ("first", "second")]
    cells = [
        (size, which, f"{each.cpu:.1f}", f"{each.first_step:.1f}", f"{each.private_mib:.0f}")
        for size, which, each in starts
    ]
    print(render_table(("records", "start", "CPU s", "s to the first step", "private MiB of a rank"), cells, width=100))
    return 0


@dataclass(frozen=True)
class Start:
    """One start of `align`: CPU seconds of all processes, seconds to the first step, memory of the largest rank."""

    cpu: float
    first_step: float
    private_mib: float


@dataclass(frozen=True)
class Site:
    """The folder in which a measurement is made, and its number of ranks."""

    folder: Path
    ranks: int

    def make_model(self, tokenizer: Path) -> None:
        """Make a tiny random Llama with GPT-2's tokenizer, and import it."""
        backend = Tokenizer(BPE.from_file(str(tokenizer / "vocab.json"), str(tokenizer / "merges.txt")))
        backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
        config = LlamaConfig(
            vocab_size=len(fast),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=4096,
            eos_token_id=fast.eos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(self.folder / "hf")
        fast.save_pretrained(self.folder / "hf")
        self._run(["import", f"hf={self.folder / 'hf'}", f"output={self.folder / 'model'}"], ranks=1)

    def start(self, data: Path, kind: str) -> Start:
        """Align for one step, and measure from the launcher's start on."""
        output = self.folder / "out"
        shutil.rmtree(output, ignore_errors=True)
        settings = {
            "output": output,
            "model.checkpoint": self.folder / "model",
            "reference_logprobs": "live",
            "data.path": data,
            "data.max_prompt_tokens": 4000,
            "data.max_completion_tokens": 4000,
            "data.on_invalid": "skip",  # a few dialogues of HH part at no turn
            "loss.kind": "exo_pref" if kind == "pairs" else "exo_rw",
            "batch.groups": 4,
            "batch.max_steps": 1,
            "compute.precision": "fp32",
            "log.tensorboard": "false",
        }
        return self._run(["align", *(f"{key}={value}" for key, value in settings.items())], self.ranks, output)

    def _run(self, words: Sequence[str], ranks: int, output: Path | None = None) -> Start:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        environment = {**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
        began, first, memory = time.monotonic(), 0.0, 0
        with open(self.folder / "log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*launcher, "-m", "exo_megatron", *words], stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if not first and output is not None and (output / "metrics.jsonl").exists():
                    first = time.monotonic() - began
                if pid:
                    break
                memory = max(memory, _private(process.pid))
                time.sleep(0.1)
        if status:
            raise RuntimeError((self.folder / "log").read_text(encoding="utf-8")[-2000:])
        return Start(usage.ru_utime + usage.ru_stime, first, memory / 2**20)


def _private(launcher: int) -> int:
    """Return the private memory of the launcher's largest child."""
    found = [0]
    for child in psutil.Process(launcher).children():
        try:
            found.append(child.memory_full_info().uss)
        except psutil.Error:
            continue
    return max(found)


def _pairs(dialogues: Path, count: int) -> Iterator[dict[str, str]]:
    content = dialogues.read_bytes()
    lines = (gzip.decompress(content) if dialogues.suffix == ".gz" else content).splitlines()
    records = [json.loads(line) for line in lines]
    for n in range(count):
        record = records[n % len(records)]
        yield {name: _varied(record[name], n, name[0]) for name in ("chosen", "rejected")}


def _varied(dialogue: str, n: int, letter: str) -> str:
    head, _, answer = dialogue.rpartition(ANSWER)
    return head.replace("\n\nHuman:", f"\n\nHuman: ({n})", 1) + f"{ANSWER} {letter}{n}." + answer


def _candidates(count: int) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for n in range(count):
        ids = random.integers(0, 50_000, size=(K, LENGTH)).tolist()
        yield {
            "id": str(n),
            "prompt": f"prompt {n}",
            "prompt_ids": random.integers(0, 50_000, size=PROMPT).tolist(),
            "candidates": [{"text": "of no use here", "token_ids": each, "finished": False} for each in ids],
            "rewards": random.standard_normal(K).tolist(),
        }

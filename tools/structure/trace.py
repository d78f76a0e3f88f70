"""Trace of the files that a one-process `align` enters before its first loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import CodeType, FrameType

LOSS = "exo_loss"
STEP = "train_step"
_FUNCTION = 0x1
"""CO_OPTIMIZED: set for functions, not for the bodies of modules and classes, which run when
they are imported.
"""


def trace_align(root: Path) -> dict[str, list[str]]:
    """Trace `align` of the checkout `root` on a tiny model, in a process of its own.

    Returns:
        The files of the package whose functions were called before the first loss, in order, with
            repetitions: "run" from the start of the program, "step" from the start of the optimizer
            step.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        for part in ("import", "align"):
            command = [sys.executable, __file__, part, str(root), folder]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{part} failed:\n{done.stdout}{done.stderr}")
        traced: dict[str, list[str]] = json.loads((Path(folder) / "trace.json").read_text(encoding="utf-8"))
    return traced


def write_inputs(folder: Path) -> None:
    """Write an HF checkpoint of a tiny random Llama, and eight prompts with two rewarded
    candidates each.
    """
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 100)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "hf")
    records = (
        {"prompt": f"w{n} w5 w6", "completions": [f"w{n + 10} w7", "w8 w9 w10"], "rewards": [1.0, 0.0]}
        for n in range(10, 18)
    )
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "data.jsonl").write_text(text, encoding="utf-8")


class _Trace:
    """A profile function that records the files of the package until the loss is called."""

    def __init__(self, package: Path, output: Path) -> None:
        self._prefix = f"{package}{os.sep}"
        self._output = output
        self._entered: list[str] = []
        self._step = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code: CodeType = frame.f_code
        if event != "call" or not code.co_flags & _FUNCTION or not code.co_filename.startswith(self._prefix):
            return
        self._entered.append(code.co_filename.removeprefix(self._prefix))
        if code.co_name == STEP:
            self._step = len(self._entered)
        if code.co_name == LOSS:
            sys.setprofile(None)
            entered = {"run": self._entered, "step": self._entered[self._step :]}
            self._output.write_text(json.dumps(entered), encoding="utf-8")


def _run(part: str, root: Path, folder: Path) -> int:
    sys.path.insert(0, str(root))
    from exo_megatron.cli.main import main

    if part == "import":
        write_inputs(folder)
        return main(["import", f"hf={folder}/hf", f"output={folder}/base"])
    settings = [
        f"model.checkpoint={folder}/base",
        f"data.path={folder}/data.jsonl",
        f"output={folder}/exo",
        "compute.precision=fp32",
        "batch.max_steps=1",
    ]
    sys.setprofile(_Trace(root / "exo_megatron", folder / "trace.json"))
    return main(["align", *settings])


if __name__ == "__main__":
    sys.exit(_run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))

"""Puts the results where they are easy to find and says in a few lines what happened.

    python -m quickstart.finish --output DIR

Leaves DIR/summary.json, DIR/report.html and DIR/frontier.png, and tries the exported model in DIR/hf.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from exo_megatron.evaluation.summary import summarize_evaluation
from exo_megatron.utils.files import read_jsonl, write_json

SHOWN_PROMPTS = 3
NEW_TOKENS = 48

Summary = Mapping[str, Mapping[str, float]]


def main() -> None:
    """Finish the run in --output."""
    parser = argparse.ArgumentParser(description="results of the quickstart")
    parser.add_argument("--output", type=Path, required=True)
    output: Path = parser.parse_args().output
    summary = summarize_evaluation(output / "evaluate" / "evaluation.json", reference_name="sft")
    write_json(output / "summary.json", summary)
    for name in ("report.html", "frontier.png"):
        shutil.copyfile(output / "evaluate" / name, output / name)
    records = read_jsonl(output / "inputs" / "test_prompts.jsonl")
    prompts = [record["prompt"] for (_, record), _ in zip(records, range(SHOWN_PROMPTS), strict=False)]
    print(f"\n{describe(summary)}\n\nThe exported model, loaded with transformers, goes on from unseen prompts:")
    for prompt, text in zip(prompts, continue_prompts(output / "hf", prompts), strict=True):
        print(f"  {prompt} ...{text.removeprefix(prompt)}")
    print(f"\nreport      {output / 'report.html'}\npicture     {output / 'frontier.png'}")
    print(f"numbers     {output / 'summary.json'}\nHF model    {output / 'hf'}")


def describe(summary: Summary) -> str:
    """The summary as a table, and what EXO and DPO gained over SFT in words."""
    lines = [f"{'policy':<8}{'mean oracle reward':>20}{'KL to SFT (nats)':>20}"]
    for name, each in summary.items():
        reward = f"{each['reward']:.3f} ± {each['reward_stderr']:.3f}"
        lines.append(f"{name:<8}{reward:>20}{each['kl']:>20.3f}")
    sft = summary["sft"]
    gains = (f"{name.upper()} {gain(each, sft)}" for name, each in summary.items() if name != "sft")
    return "\n".join([*lines, f"Over SFT, on {sft['prompts']} unseen prompts: {', '.join(gains)}."])


def gain(policy: Mapping[str, float], sft: Mapping[str, float]) -> str:
    """The difference of rewards, and how many of its standard errors it is."""
    difference = policy["reward"] - sft["reward"]
    error = math.hypot(policy["reward_stderr"], sft["reward_stderr"])
    return f"{difference:+.2f} ({difference / error:.0f} standard errors)"


def continue_prompts(model_path: Path, prompts: Sequence[str]) -> list[str]:
    """Whole texts, drawn by transformers from an HF checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(model_path), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(str(model_path), local_files_only=True, dtype=torch.float32)
    torch.manual_seed(0)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        drawn = model.generate(
            **ids,
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=0.8,
            top_k=0,
            pad_token_id=model.config.eos_token_id,
        )
        texts.append(tokenizer.decode(drawn[0], skip_special_tokens=True))
    return texts


if __name__ == "__main__":
    main()

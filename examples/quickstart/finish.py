"""Puts the results where they are easy to find and says in a few lines what happened.

    python -m quickstart.finish --output DIR

Leaves DIR/summary.json, DIR/report.html and DIR/frontier.png, and tries the exported model in DIR/hf.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from exo_megatron.evaluation.equal_kl import COVERAGE, Bounded, lead_of, lead_over, spans
from exo_megatron.evaluation.estimates import REFERENCE_NAME, PromptMeans
from exo_megatron.evaluation.prompt_means import read_prompt_means
from exo_megatron.evaluation.summary import summarize_evaluation
from exo_megatron.utils.files import read_jsonl, write_json

SHOWN_PROMPTS = 3
NEW_TOKENS = 48

Summary = Mapping[str, Mapping[str, float]]
Checkpoints = Mapping[int | None, PromptMeans]
Means = Mapping[str, Checkpoints]


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
    sentences = "\n".join(compare(read_prompt_means(output / "evaluate" / "prompts.jsonl")))
    print(f"\n{describe(summary)}\n{sentences}\n")
    print("The exported model, loaded with transformers, goes on from unseen prompts:")
    for prompt, text in zip(prompts, continue_prompts(output / "hf", prompts), strict=True):
        print(f"  {prompt} ...{text.removeprefix(prompt)}")
    print(f"\nreport      {output / 'report.html'}\npicture     {output / 'frontier.png'}")
    print(f"numbers     {output / 'summary.json'}\nHF model    {output / 'hf'}")


def describe(summary: Summary) -> str:
    """The summary as a table."""
    lines = [f"{'policy':<8}{'mean oracle reward':>20}{'KL to SFT (nats)':>20}"]
    for name, each in summary.items():
        reward, kl = (f"{each[key]:.3f} ± {each[f'{key}_stderr']:.3f}" for key in ("reward", "kl"))
        lines.append(f"{name:<8}{reward:>20}{kl:>20}")
    return "\n".join(lines)


def compare(means: Means) -> list[str]:
    """What EXO and DPO gained, in words that the intervals bear out. means: by name and step."""
    exo, dpo, sft = means["exo"], means["dpo"], last(means[REFERENCE_NAME])
    step = last_step(exo)
    gains = (f"{name} {show(lead_of(last(each), sft)[0])}" for name, each in (("EXO", exo), ("DPO", dpo)))
    reward, kl = lead_of(last(exo), last(dpo))
    return [
        f"Gain of reward over SFT: {', '.join(gains)}.",
        f"At equal steps ({step}), EXO minus DPO: reward {show(reward)}, KL {show(kl)}.",
        at_equal_kl(exo, dpo),
        f"In brackets: {COVERAGE} % intervals by bootstrap over the {len(sft.rewards)} unseen prompts, for these two "
        "runs; another seed may fall otherwise.",
        "A curve of checkpoints favours the loss that goes slower, which at a given KL is nearer to the end of its "
        "training: examples/frontier compares ends of runs.",
    ]


def at_equal_kl(exo: Checkpoints, dpo: Checkpoints) -> str:
    """EXO's reward minus DPO's at the KL of the last checkpoint that is nearer to SFT.

    The other method's reward there is interpolated between its checkpoints.
    """
    nearer, other = sorted((exo, dpo), key=lambda method: float(last(method).kls.mean()))
    level = float(last(nearer).kls.mean())
    curve = list(other.values())
    if not spans(curve, level):
        return "At equal KL: nothing to say, since one method's first checkpoint is beyond the other's last."
    lead = lead_over(curve, last(nearer))
    lead = lead if other is exo else -lead
    verdict = {1: "EXO's reward is higher", 0: "no difference can be told", -1: "DPO's reward is higher"}[lead.sign]
    whose = "DPO" if nearer is dpo else "EXO"
    return f"At equal KL ({level:.2f} nats, {whose}'s last), {verdict}: EXO minus DPO {show(lead)}."


def last_step(method: Checkpoints) -> int | None:
    """The step of the last checkpoint; None for a converted model."""
    return max(method, key=lambda step: step or 0)


def last(method: Checkpoints) -> PromptMeans:
    """The last checkpoint."""
    return method[last_step(method)]


def show(value: Bounded) -> str:
    """An estimate with its interval."""
    return f"{value.value:+.2f} [{value.low:+.2f}, {value.high:+.2f}]"


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
        texts.append(str(tokenizer.decode(drawn[0], skip_special_tokens=True)))
    return texts


if __name__ == "__main__":
    main()

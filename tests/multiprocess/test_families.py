"""Every model family, converted, against Hugging Face (ChatGLM2: its published architecture): outputs and the way back.

Outputs are logits at every position of a candidate and log-probs, or a reward model's scores, at every topology; the
reference runs each prompt + candidate as a sequence of its own. `PARITY_REPORT=1 pytest -s` prints how far from the
tolerance the agreement is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.multiprocess.align_case import reward_groups
from tests.multiprocess.family_checks import Generated, Outputs, Refused
from tests.multiprocess.harness import Check, Outcome, run_checks
from tests.reference.chatglm2 import BUFFER, load_chatglm2, save_chatglm2, tiny_chatglm2
from tests.reference.tiny_models import CLASSIFIERS, LANGUAGE_MODELS, MODELS, sequence_logits

TOLERANCE = 1e-4
SAME = 1e-5
TEMPERATURE = 0.7
PADDED_VOCABULARY = 128
HERE = "tests.multiprocess.family_checks"
CHATGLM2 = {"chatglm": torch.float32, "chatglm-fp16": torch.float16}
BARE_GPT2 = "gpt2-bare"  # the names of the published checkpoint
NAMES = [*MODELS, *CHATGLM2, BARE_GPT2]
MOE = [name for name in LANGUAGE_MODELS if name.startswith(("mixtral", "qwen3_moe"))]
# Those whose attention, positions or feed-forward block the KV cache must treat in their own way.
GENERATED = (
    "gpt2",
    "gpt_neox",
    "llama-tied-llama3",
    "mistral-window",
    "qwen2-window",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3-window",
    "phi3-longrope",
    "glm4",
    "chatglm",
    "mixtral",
    "qwen3_moe",
)
SAMPLING = {"candidates": 3, "temperature": TEMPERATURE, "max_new_tokens": 20, "max_active_candidates": 5}

SequenceOutputs = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class Place:
    """A model at a topology."""

    model: str
    parallel: dict[str, Any] = field(default_factory=dict)

    @property
    def topology(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.parallel.items()) or "alone"

    @property
    def name(self) -> str:
        return f"{self.model} {self.topology}"

    @property
    def world_size(self) -> int:
        tensor, pipeline, expert = (self.parallel.get(key, 1) for key in ("tensor", "pipeline", "expert"))
        return int(max(tensor, expert) * pipeline)


PLACES = [
    *(Place(name) for name in NAMES),
    *(Place(name, {"tensor": 2}) for name in NAMES if name != "llama-one-kv-head"),
    *(Place(name, {"pipeline": 2}) for name in NAMES),
    *(
        Place(name, {"tensor": 2, "sequence": False})
        for name in ("gpt2", "gpt_neox", "llama", "qwen2", "gemma3_text", "glm4", "gemma2-1-labels")
    ),
    *(Place(name, {"expert": 2}) for name in MOE),
    *(Place(name, {"tensor": 2, "expert": 2}) for name in MOE),
    Place("mixtral-1-labels", {"expert": 2}),
    Place("mixtral", {"tensor": 2, "expert": 4}),
    Place("qwen3_moe", {"expert": 2, "pipeline": 2}),
    Place("llama-all-heads-linear", {"tensor": 4}),  # of 90 words, padded to 128, the last of four shards has none
    Place("llama-one-kv-head", {"pipeline": 4}),
    Place("gpt2", {"tensor": 2, "pipeline": 2}),
    Place("llama", {"tensor": 2, "pipeline": 2}),
    Place("gemma3_text", {"tensor": 2, "pipeline": 2}),
]

# A prompt of one token and a long candidate cover every position of a sequence; the others are ragged groups.
LONG = (3, *range(4, 90, 2))


@cache
def groups() -> tuple[list[Sequence[int]], list[Sequence[Sequence[int]]]]:
    """Ids below 90: every model has them."""
    ragged = [group for group in reward_groups(seed=5) if len(group.candidates) > 2][:3]
    prompts: list[Sequence[int]] = [LONG[:1], *([i % 90 for i in group.prompt] for group in ragged)]
    candidates: list[Sequence[Sequence[int]]] = [[LONG[1:]]]
    candidates += [[[i % 90 for i in y] for y in group.candidates] for group in ragged]
    return prompts, candidates


PROMPTS_TO_CONTINUE = [LONG[:31], *groups()[0]]


def reference(name: str) -> SequenceOutputs:
    """fp32 logits [S, V] of a sequence, or a classifier's scores [labels] at its end; bf16 weights in fp32."""
    if name in CHATGLM2:
        return tiny_chatglm2(seed=21, dtype=CHATGLM2[name]).sequence_logits
    model = MODELS["gpt2" if name == BARE_GPT2 else name].model().float()
    return lambda ids: sequence_logits(model, ids)


@dataclass(frozen=True)
class Expected:
    """[N, V] logits that predict each candidate's tokens and log-probs [N] of the tokens; or scores [C, labels]."""

    logits: Tensor
    logprobs: Tensor | None


@cache
def expected(name: str) -> Expected:
    """From a sequence of its own for every candidate."""
    sequence_outputs, scores = reference(name), name in CLASSIFIERS
    outputs, tokens = [], []
    for prompt, candidates in zip(*groups(), strict=True):
        for candidate in candidates:
            whole = sequence_outputs([*prompt, *candidate])
            outputs.append(whole[None] if scores else whole[len(prompt) - 1 : -1])
            tokens.extend(candidate)
    logits = torch.cat(outputs)
    if scores:
        return Expected(logits, None)
    logprobs = torch.log_softmax(logits / TEMPERATURE, dim=-1)
    return Expected(logits, logprobs.gather(-1, torch.tensor(tokens)[:, None])[:, 0])


def save_model(name: str, directory: Path) -> None:
    if name in CHATGLM2:
        save_chatglm2(tiny_chatglm2(seed=21, dtype=CHATGLM2[name]), directory)
    elif name == BARE_GPT2:
        save_bare_gpt2(directory)
    else:
        MODELS[name].save(directory)


def save_bare_gpt2(directory: Path) -> None:
    """As OpenAI's weights are published: names without the model's prefix, and the causal mask among the tensors."""
    path = MODELS["gpt2"].save(directory) / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    mask = torch.ones(256, 256).tril().view(1, 1, 256, 256)
    save_file(tensors | {f"h.{layer}.attn.bias": mask.clone() for layer in range(4)}, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("families")
    for name in NAMES:
        save_model(name, directory / f"hf-{name}")
    return directory


@pytest.fixture(scope="module")
def outcomes(root: Path) -> Iterator[dict[str, Outcome]]:
    """Import and generate with one process, outputs at every place, export with two."""
    result: dict[str, Outcome] = {}
    for size in (1, 2, 4):
        result |= run_checks(size, checks_of(size, root), root / "workers")
    yield result
    if "PARITY_REPORT" in os.environ:
        print_margins(result)


def checks_of(size: int, root: Path) -> list[Check]:
    checks = []
    if size == 1:
        for name in NAMES:
            arguments = {"hf": root / f"hf-{name}", "output": root / name}
            checks.append(Check(f"import {name}", f"{HERE}:import_checkpoint", arguments))
        drawing = {"prompts": PROMPTS_TO_CONTINUE, "sampling": SAMPLING, "seed": 3}
        models = {"checkpoints": [root / name for name in GENERATED]}
        checks.append(Check("generate", f"{HERE}:generate_and_score", models | drawing))
    prompts, candidates = groups()
    given = {"prompts": prompts, "candidates": candidates, "temperature": TEMPERATURE}
    for topology in dict.fromkeys(place.topology for place in PLACES if place.world_size == size):
        places = [place for place in PLACES if place.topology == topology]
        where = {"checkpoints": [root / place.model for place in places], "parallel": places[0].parallel}
        checks.append(Check(topology, f"{HERE}:outputs_of_models", where | given))
    if size == 2:
        for name in NAMES:
            arguments = {"checkpoint": root / name, "output": root / f"exported-{name}"}
            checks.append(Check(f"export {name}", f"{HERE}:export_checkpoint", arguments))
    return checks


def place_name(place: Place) -> str:
    return place.name


def done(values: Sequence[Any]) -> list[Any]:
    """What ranks returned; fails where our code refused to do it."""
    for value in values:
        assert not isinstance(value, Refused), value.message
    return list(values)


def of_place(place: Place, outcomes: dict[str, Outcome]) -> list[Outputs | Refused | None]:
    return [values[place.model] for values in outcomes[place.topology].values()]


def differences(values: Sequence[Outputs | Refused | None], name: str) -> Iterator[float]:
    """Largest difference of every complete set of outputs: one per data-parallel rank."""
    results: list[Outputs] = [part for part in done(values) if part is not None]
    wanted = expected(name)
    words = wanted.logits.shape[-1]
    for data_rank in {part.data_rank for part in results}:
        parts = sorted((p for p in results if p.data_rank == data_rank), key=lambda part: part.tensor_rank)
        if wanted.logprobs is None:
            for part in parts:
                assert part.logits.shape == wanted.logits.shape
                yield (part.logits - wanted.logits).abs().max().item()
            continue
        logits = torch.cat([part.logits for part in parts], dim=-1)
        assert logits.shape == (wanted.logits.shape[0], PADDED_VOCABULARY)
        yield (logits[:, :words] - wanted.logits).abs().max().item()
        for part in parts:
            assert part.logprobs is not None
            yield (part.logprobs - wanted.logprobs).abs().max().item()


@pytest.mark.parametrize("place", PLACES, ids=place_name)
def test_outputs(place: Place, outcomes: dict[str, Outcome]) -> None:
    """Models are computed in fp32, also that of a bf16 checkpoint (whose weights fp32 holds exactly)."""
    assert max(differences(of_place(place, outcomes), place.model)) < TOLERANCE


@pytest.mark.parametrize("name", GENERATED)
def test_decoding_agrees_with_scoring_and_the_reference(name: str, outcomes: dict[str, Outcome]) -> None:
    """Log-probs from the KV cache, of a packed micro-batch, and of single sequences of the reference."""
    for candidate, wanted in generated(name, outcomes["generate"].values()[0][name]):
        assert candidate.logprob == pytest.approx(wanted, abs=TOLERANCE)
        assert candidate.scored == pytest.approx(wanted, abs=TOLERANCE)


def generated(name: str, drawn: list[list[Generated]] | Refused) -> Iterator[tuple[Generated, float]]:
    """Every candidate, and the log-prob that the reference gives it."""
    (groups_drawn,) = done([drawn])
    sequence_outputs = reference(name)
    lengths = []
    for prompt, candidates in zip(PROMPTS_TO_CONTINUE, groups_drawn, strict=True):
        for candidate in candidates:
            logits = sequence_outputs([*prompt, *candidate.token_ids])[len(prompt) - 1 : -1]
            logprobs = torch.log_softmax(logits.double() / TEMPERATURE, dim=-1)
            lengths.append(len(candidate.token_ids))
            yield candidate, logprobs.gather(-1, torch.tensor(candidate.token_ids)[:, None]).sum().item()
    assert sorted(lengths)[len(lengths) // 2] > 10  # longer than the windows


def tensors_in(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_bit_for_bit(name: str, root: Path, outcomes: dict[str, Outcome]) -> None:
    done(outcomes[f"import {name}"].values())
    done(outcomes[f"export {name}"].values())
    before, after = tensors_in(root / f"hf-{name}"), tensors_in(root / f"exported-{name}")
    if name in CHATGLM2:
        del before[BUFFER]
    if name == BARE_GPT2:
        before = tensors_in(root / "hf-gpt2")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor), key


@pytest.mark.parametrize("name", NAMES)
def test_export_loads_again(name: str, root: Path, outcomes: dict[str, Outcome]) -> None:
    """Config and weights belong together: read from the exported directory alone, the model gives the same outputs.

    Not always bit for bit: where a file's tensors come to lie in memory decides how the CPU adds.
    """
    done(outcomes[f"export {name}"].values())
    directory = root / f"exported-{name}"
    before, after = (json.loads((path / "config.json").read_text()) for path in (root / f"hf-{name}", directory))
    assert after == before
    if name in CHATGLM2:
        again = load_chatglm2(directory).sequence_logits(LONG)
    else:
        auto = AutoModelForSequenceClassification if name in CLASSIFIERS else AutoModelForCausalLM
        model = auto.from_pretrained(directory, attn_implementation="eager", dtype="float32", trust_remote_code=False)
        again = sequence_logits(model.eval(), LONG)
    assert (again - reference(name)(LONG)).abs().max() < SAME


def print_margins(outcomes: dict[str, Outcome]) -> None:
    """Largest difference per model: of outputs over its topologies, and of generated log-probs."""
    for name in NAMES:
        found = [of_place(p, outcomes) for p in PLACES if p.model == name and outcomes[p.topology].failure is None]
        found = [values for values in found if not any(isinstance(value, Refused) for value in values)]
        worst = max((max(differences(values, name)) for values in found), default=float("nan"))
        line = f"{name}: outputs {worst:.1e} at {len(found)} topologies"
        if name in GENERATED and outcomes["generate"].failure is None:
            drawn = outcomes["generate"].values()[0][name]
            if not isinstance(drawn, Refused):
                off = max(max(abs(c.logprob - wanted), abs(c.scored - wanted)) for c, wanted in generated(name, drawn))
                line += f", generated {off:.1e}"
        print(line)

"""The same random model on both sides: an HF Llama, and its import by our own code."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from exo_megatron.checkpoint.directory import tokenizer_path
from exo_megatron.checkpoint.load import load_model
from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.config.stages import ImportConfig
from exo_megatron.conversion.importing import hf_spec
from exo_megatron.data.groups import Group
from exo_megatron.diagnosis.small_models import draw_groups
from exo_megatron.diagnosis.work import Lengths, ModelSize, llama_size
from exo_megatron.execution.policy import Policy
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.runtime import Runtime, distributed_runtime
from exo_megatron.parallel.topology import Topology, model_parallel
from exo_megatron.stages.import_hf import run_import
from exo_megatron.training.optimizer import Trainee

SPECIAL = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    layers: int
    vocab: int
    head_dim: int = 64

    @property
    def ffn(self) -> int:
        """8/3 of the hidden size, up to a multiple of 64."""
        return -(-8 * self.hidden // (3 * 64)) * 64

    @property
    def size(self) -> ModelSize:
        """What the FLOPs of the model depend on."""
        sizes = {"hidden": self.hidden, "layers": self.layers, "ffn": self.ffn, "kv": self.hidden, "vocab": self.vocab}
        return llama_size(str(self), **sizes)

    def config(self) -> LlamaConfig:
        """Return the HF config: as many key/value heads as query heads, embeddings and output
        layer untied.
        """
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // self.head_dim,
            num_key_value_heads=self.hidden // self.head_dim,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=None,
        )

    def __str__(self) -> str:
        return f"Llama with H={self.hidden}, {self.layers} layers, V={self.vocab}"


@dataclass(frozen=True)
class Matched:
    """The two sides.

    `load()` gives another copy of our policy, for a live reference or another start.
    """

    hf: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    checkpoint: Path
    spec: ModelSpec
    topology: Topology
    compute: ComputeConfig

    def load(self) -> Policy:
        """Load our policy with the weights of `hf`."""
        return Policy(load_model(self.checkpoint, self.topology, self.compute), self.topology, self.compute)


@contextlib.contextmanager
def world() -> Iterator[Runtime]:
    """Join a world of this process alone, for all models of a benchmark.

    It is left in any case at the end.
    """
    try:
        with distributed_runtime() as runtime:
            yield runtime
    except BaseException:
        if dist.is_initialized():
            dist.destroy_process_group()
        raise


@contextlib.contextmanager
def matched_models(shape: Shape, runtime: Runtime, compute: ComputeConfig) -> Iterator[Matched]:
    """Make a random HF model and import it, in a temporary directory."""
    torch.manual_seed(0)
    dtype = torch.float32 if compute.precision == "fp32" else torch.bfloat16
    hf = LlamaForCausalLM._from_config(shape.config(), dtype=dtype)
    tokenizer = words(shape.vocab)
    with (
        tempfile.TemporaryDirectory(prefix="exo-bench-") as place,
        model_parallel(runtime, ParallelConfig(), seed=0) as topology,
    ):
        source, checkpoint = Path(place) / "hf", Path(place) / "checkpoint"
        hf.save_pretrained(source)
        tokenizer.save_pretrained(source)
        with contextlib.redirect_stdout(sys.stderr):
            run_import(ImportConfig(hf=source, output=checkpoint), runtime)
        hf.to(runtime.device)
        yield Matched(hf, tokenizer, checkpoint, hf_spec(source)[1], topology, compute)


def words(vocab: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose every id is a word."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL)} | {f"w{i}": i for i in range(len(SPECIAL), vocab)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def random_groups(lengths: Sequence[Lengths], vocab: int, *, seed: int = 0) -> list[Group]:
    """Make groups of these lengths with random tokens, and normal rewards that decrease from
    candidate to candidate.
    """
    groups = draw_groups(lengths, vocab, first_token=len(SPECIAL), seed=seed)
    return [replace(group, rewards=tuple(sorted(group.rewards or (), reverse=True))) for group in groups]


def hf_gradients(trainee: Trainee, matched: Matched) -> dict[str, Tensor]:
    """Copy the gradient in megatron-core's fp32 buffers, under HF's names.

    The model is whole in this process.
    """
    family, spec = hf_spec(tokenizer_path(matched.checkpoint))
    own = {name: vars(parameter)["main_grad"] for name, parameter in trainee.policy.model.named_parameters()}
    gradients: dict[str, Tensor] = {}
    for rule in family.tensors(spec):
        for entry in rule.entries():
            name = rule.key
            if entry.index:
                name = name.replace("decoder.layers.", f"decoder.layers.{entry.index[0]}.")
            gradients |= zip(entry.sources, (part.clone() for part in rule.transform.split(own[name])), strict=True)
    return gradients

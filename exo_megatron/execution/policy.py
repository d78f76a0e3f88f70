"""A policy as a checkpoint on disk, and as a loaded model with everything that belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from exo_megatron.checkpoint.directory import (
    read_fingerprint,
    read_spec,
    resolve_checkpoint,
    skipped_steps,
    tokenizer_path,
)
from exo_megatron.checkpoint.load import load_model
from exo_megatron.config.sections import ComputeConfig, DataConfig, ModelConfig, ParallelConfig
from exo_megatron.data.tokenizer import Tokenizer, load_tokenizer, read_generation_stops
from exo_megatron.errors import CheckpointError
from exo_megatron.logprobs.softmax import VocabShard, plan_tiles
from exo_megatron.logprobs.vocab_parallel import sharded_logprobs
from exo_megatron.models.policy import PolicyModel, check_topology
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.topology import Topology


class PredictedTokens(Protocol):
    """N tokens that M hidden states predict. A GroupLayout is an example."""

    @property
    def token_predictor(self) -> Tensor:
        """Index of the hidden state that predicts each token, [N] int64, non-decreasing.

        Each of 0..M-1 occurs in it.
        """
        ...

    @property
    def token_target(self) -> Tensor:
        """Ids of the tokens, [N] int64."""
        ...


@dataclass(frozen=True)
class PolicyCheckpoint:
    """A policy on disk, with the data that are read before any model is built."""

    path: Path
    fingerprint: str
    spec: ModelSpec

    @property
    def hf_files(self) -> Path:
        """Directory of the files that travel with the model: tokenizer, HF configuration."""
        return tokenizer_path(self.path)


@dataclass(frozen=True)
class Policy:
    """A loaded policy on this rank.

    Attributes:
        model: this rank's pipeline stage and tensor shard.
        topology: this rank's place and groups.
        compute: precision, and how much is computed at once.
        fingerprint: of the checkpoint.
        tokenizer: None where the model is only trained or scored.
    """

    model: PolicyModel
    topology: Topology
    compute: ComputeConfig
    fingerprint: str = ""
    tokenizer: Tokenizer | None = None

    @property
    def spec(self) -> ModelSpec:
        """Architecture of the whole model."""
        return self.model.spec

    @property
    def text_tokenizer(self) -> Tokenizer:
        """Tokenizer of a policy that draws text.

        Raises ValueError if the policy was loaded without one.
        """
        if self.tokenizer is None:
            raise ValueError("a policy that draws text must be loaded with its tokenizer")
        return self.tokenizer

    def token_logprobs(self, hidden: Tensor, tokens: PredictedTokens, *, temperature: float, calls: int = 1) -> Tensor:
        """Compute the log-probs of candidate tokens, in their order; differentiable.

        Collective over the tensor group: one all-gather of 2 M + N floats. On the last pipeline
        stage only.

        Args:
            hidden: [M, H], output of the last pipeline stage for a layout, or some of its entries.
            tokens: N tokens that these M hidden states predict.
            temperature: logits are divided by it.
            calls: number of calls before one backward pass, which share the memory.

        Returns:
            [N] fp32, in nats. Logits are kept for the backward pass within
            compute.logits_memory_mib.
        """
        topology, weight = self.topology, self.model.output_weight()
        shard = VocabShard(topology.tensor_group, topology.tensor_rank, topology.tensor_size, self.spec.vocab_size)
        memory = self.compute.logits_memory_mib / calls
        return sharded_logprobs(
            hidden,
            weight,
            tokens.token_predictor,
            tokens.token_target,
            shard,
            temperature=temperature,
            tiling=plan_tiles(hidden.shape[0], shard.valid(weight.shape[0]), weight, memory_mib=memory),
            softcap=self.spec.logit_softcap,
        )


def find_policy(path: Path, parallel: ParallelConfig, tell: Callable[[str], object]) -> PolicyCheckpoint:
    """Find the policy that a user means by a path (see `resolve_checkpoint`).

    `tell` gets a line about each newer step there that is damaged.

    Raises CheckpointError if there is none or it is a reward model, TopologyError if it cannot be
    cut as `parallel` says.
    """
    checkpoint = resolve_checkpoint(path)
    for line in skipped_steps(path):
        tell(line)
    fingerprint = read_fingerprint(checkpoint)
    spec = read_spec(checkpoint)
    if spec.labels is not None:
        raise CheckpointError(
            str(checkpoint),
            f"is a reward model with {spec.labels} output{'s' if spec.labels > 1 else ''}",
            expected="a language model",
            fix="give the checkpoint of a policy; rewards of HF reward models come from the stage score",
        )
    check_topology(spec, parallel)
    return PolicyCheckpoint(checkpoint, fingerprint, spec)


def find_policy_and_reference(
    model: ModelConfig, reference: ModelConfig | None, parallel: ParallelConfig, tell: Callable[[str], object]
) -> tuple[PolicyCheckpoint, PolicyCheckpoint]:
    """Find the policy to be trained, and its reference: the same checkpoint where none is given.

    Raises as `find_policy` does, and CheckpointError if their vocabularies differ.
    """
    paths = dict.fromkeys((model.checkpoint, (reference or model).checkpoint))
    found = [find_policy(path, parallel, tell) for path in paths]
    source, other = found[0], found[-1]
    if other.spec.vocab_size != source.spec.vocab_size:
        raise CheckpointError(
            f"reference.checkpoint {other.path}",
            f"has a vocabulary of {other.spec.vocab_size}",
            expected=f"{source.spec.vocab_size}, as the policy's",
            fix="take a reference with the policy's tokenizer",
        )
    return source, other


def find_tokenizer(source: PolicyCheckpoint, data: DataConfig) -> Tokenizer:
    """Load the checkpoint's own tokenizer, or that of `data`, with the chat template of `data`.

    The checkpoint's stop tokens end candidates in either case. Raises DataError if the tokenizer is
    too large for the model.
    """
    tokenizer = load_tokenizer(
        data.tokenizer or source.hf_files, chat_template=data.chat_template, template_kwargs=data.template_kwargs
    )
    return tokenizer.stopping_at(read_generation_stops(source.hf_files)).fitted_to(source.spec.vocab_size)


def load_policy(
    source: PolicyCheckpoint, topology: Topology, compute: ComputeConfig, tokenizer: Tokenizer | None = None
) -> Policy:
    """Load the model of a checkpoint at this topology, in compute.precision.

    Collective over the world. Raises CheckpointError if a file is damaged, or if the tensors are
    not those of the checkpoint's model.json.
    """
    model = load_model(source.path, topology, compute)
    return Policy(model, topology, compute, source.fingerprint, tokenizer)

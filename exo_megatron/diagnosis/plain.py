"""A decoder and its EXO step written down in plain torch on the CPU, to compare the models with.

It shares no code with the models: every candidate is a sequence of its own behind its prompt, the
scores are a matrix, and autograd does the rest. In fp64 it is what a step should compute; in bf16
it shows how far plain arithmetic of that precision is from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, silu

from exo_megatron.config.sections import LossConfig
from exo_megatron.data.groups import Group
from exo_megatron.models.spec import ModelSpec

NamedTensors = dict[str, Tensor]
"""NamedTensors by their names in an HF checkpoint."""


@dataclass(frozen=True)
class PlainModel:
    """A Llama or Mixtral: RMSNorm, rotary positions, grouped heads, SwiGLU or a mixture of it.

    tensors: by HF name, on the CPU, all of one dtype.
    """

    spec: ModelSpec
    tensors: Mapping[str, Tensor]

    def logprobs(self, ids: Sequence[int], *, first: int, temperature: float = 1.0) -> Tensor:
        """Compute log softmax(logits / temperature) of the tokens from number `first` on.

        Returns [len(ids) - first + 1, V], at least fp32: the last line is of the token after ids.
        """
        hidden = embedding(torch.tensor(ids), self.tensors["model.embed_tokens.weight"])
        for layer in range(self.spec.layers):
            name = f"model.layers.{layer}."
            hidden = hidden + self._attention(self._norm(hidden, f"{name}input_layernorm"), f"{name}self_attn.")
            normed = self._norm(hidden, f"{name}post_attention_layernorm")
            hidden = hidden + (self._dense(normed, name) if self.spec.experts is None else self._experts(normed, name))
        logits = linear(self._norm(hidden[first - 1 :], "model.norm"), self.tensors["lm_head.weight"])
        return torch.log_softmax(_wide(logits) / temperature, dim=-1)

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        wide = _wide(hidden)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.spec.norm_epsilon)
        return (wide * scale).to(hidden.dtype) * self.tensors[f"{name}.weight"]

    def _attention(self, hidden: Tensor, name: str) -> Tensor:
        shape = (hidden.shape[0], -1, self.spec.head_dim)
        query, key, value = (linear(hidden, self.tensors[f"{name}{each}_proj.weight"]).view(shape) for each in "qkv")
        query, key = self._rotate(query), self._rotate(key)
        shared = self.spec.heads // self.spec.kv_heads
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        scores = _wide(torch.einsum("qhd,khd->hqk", query, key)) * self.spec.head_dim**-0.5
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = torch.softmax(scores.masked_fill(later, float("-inf")), dim=-1).to(value.dtype)
        attended = torch.einsum("hqk,khd->qhd", weights, value).flatten(1)
        return linear(attended, self.tensors[f"{name}o_proj.weight"])

    def _rotate(self, heads: Tensor) -> Tensor:
        """Rotate elements i and i + d/2 of [S, heads, d] by position / base^(2i/d)."""
        if self.spec.rotary is None:
            raise ValueError(f"{self.spec.family} has no rotary positions")
        half = self.spec.head_dim // 2
        wide = torch.float64 if heads.dtype == torch.float64 else torch.float32
        powers = torch.arange(half, dtype=torch.float64) / half
        angles = torch.arange(heads.shape[0], dtype=torch.float64)[:, None] / self.spec.rotary.base**powers
        cosine, sine = angles.cos().to(wide)[:, None], angles.sin().to(wide)[:, None]
        left, right = heads.to(wide).split(half, dim=-1)
        return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1).to(heads.dtype)

    def _dense(self, hidden: Tensor, layer: str) -> Tensor:
        weights = (self.tensors[f"{layer}mlp.{each}_proj.weight"] for each in ("gate", "up", "down"))
        return _swiglu(hidden, *weights)

    def _experts(self, hidden: Tensor, layer: str) -> Tensor:
        """Sum up the chosen experts of every token, weighted by their share of the chosen probabilities."""
        if self.spec.experts is None:
            raise ValueError(f"{self.spec.family} has no experts")
        router = self.tensors[f"{layer}block_sparse_moe.gate.weight"]
        probabilities = torch.softmax(linear(_wide(hidden), _wide(router)), dim=-1)
        shares, chosen = probabilities.topk(self.spec.experts.per_token, dim=-1)
        shares = shares / shares.sum(-1, keepdim=True)
        total = torch.zeros_like(hidden)
        for number in range(self.spec.experts.count):
            name = f"{layer}block_sparse_moe.experts.{number}."
            gate, up, down = (self.tensors[f"{name}{each}.weight"] for each in ("w1", "w3", "w2"))
            token, place = (chosen == number).nonzero(as_tuple=True)
            share = shares[token, place].unsqueeze(-1).to(hidden.dtype)
            total = total.index_add(0, token, share * _swiglu(hidden[token], gate, up, down))
        return total


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _swiglu(hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return linear(silu(linear(hidden, gate)) * linear(hidden, up), down)


def plain_logprobs(model: PlainModel, group: Group, *, temperature: float) -> Tensor:
    """Compute log pi(y_k|x) of a group's candidates, [K] fp64, each in a pass of its own."""
    sums = []
    for candidate in group.candidates:
        lines = model.logprobs((*group.prompt, *candidate), first=len(group.prompt), temperature=temperature)
        sums.append(lines[:-1].gather(1, torch.tensor(candidate)[:, None]).double().sum())
    return torch.stack(sums)


def plain_losses(model: PlainModel, groups: Sequence[Group], loss: LossConfig) -> Tensor:
    """Compute KL(p_theta || p_r) of every group (Eq. 13 to 15 of the paper), [G] fp64."""
    losses = []
    for group in groups:
        logps = plain_logprobs(model, group, temperature=loss.temperature)
        reference, rewards = (
            torch.tensor(values, dtype=torch.float64) for values in (group.reference_logprobs, group.rewards)
        )
        log_p = torch.log_softmax(loss.beta_pi * (logps - reference), dim=0)
        log_target = torch.log_softmax(rewards / loss.beta_r, dim=0)
        losses.append((log_p.exp() * (log_p - log_target)).sum())
    return torch.stack(losses)


@dataclass(frozen=True)
class PlainStep:
    """One step: losses [G] of the groups, gradients of their mean, and the weights after Adam."""

    losses: Tensor
    gradients: NamedTensors
    grad_norm: float
    weights: NamedTensors


@dataclass(frozen=True)
class FirstAdam:
    """Adam's first step, whose bias-corrected moments are the gradient itself, with clipping."""

    lr: float
    eps: float
    clip_grad: float

    def updated(self, weight: Tensor, gradient: Tensor, norm: float) -> Tensor:
        """Compute the weight after the step, in fp64 and rounded to the type of the weight."""
        clipped = gradient.double() * min(1.0, self.clip_grad / (norm + 1e-6))
        return (weight.double() - self.lr * clipped / (clipped.abs() + self.eps)).to(weight.dtype)


def plain_step(model: PlainModel, groups: Sequence[Group], loss: LossConfig, adam: FirstAdam) -> PlainStep:
    """Run one step. The model's tensors stay as they are."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in model.tensors.items()}
    losses = plain_losses(PlainModel(model.spec, leaves), groups, loss)
    found = torch.autograd.grad(losses.mean(), list(leaves.values()))
    gradients = dict(zip(leaves, found, strict=True))
    norm = float(torch.stack([gradient.double().square().sum() for gradient in found]).sum().sqrt())
    weights = {name: adam.updated(model.tensors[name], gradient, norm) for name, gradient in gradients.items()}
    return PlainStep(losses.detach(), gradients, norm, weights)

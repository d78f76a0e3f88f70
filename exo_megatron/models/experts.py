"""Mixtures of experts: router, experts, and the block that they make.

Dense models do not use this module. Every token is routed by itself and no token is dropped, so a
token's output depends neither on the others of its micro-batch nor on how micro-batches and experts
are spread over ranks. There is no load-balancing loss: alignment trains on the objective alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from exo_megatron.config.sections import ParallelConfig
from exo_megatron.errors import ConfigError, TopologyError
from exo_megatron.models.expert_exchange import Exchange, ExpertShare, combine, spread
from exo_megatron.models.main_grad import buffer_of, gradient_for_autograd
from exo_megatron.models.numerics import add_product_
from exo_megatron.models.spec import Experts
from exo_megatron.parallel.topology import Topology, check_expert_cut


def check_experts(family: str, experts: Experts, parallel: ParallelConfig) -> None:
    """Raise TopologyError if experts cannot be cut this way, ConfigError if they cannot run."""
    tensor, expert = parallel.tensor, parallel.expert
    _check_routing(family, experts)
    check_expert_cut(parallel)
    if experts.count % expert:
        raise TopologyError(
            "parallel.expert",
            f"{expert} does not divide the model's {experts.count} experts",
            expected=f"a divisor of {experts.count}",
            fix="change parallel.expert",
        )
    cuts = parallel.expert_tensor
    if experts.ffn_hidden_size % cuts:
        raise TopologyError(
            "parallel.tensor",
            f"{tensor} with parallel.expert {expert} cuts each expert {cuts} ways, which does not divide "
            f"its {experts.ffn_hidden_size} units",
            expected=f"a cut that divides {experts.ffn_hidden_size}",
            fix="lower parallel.tensor or raise parallel.expert",
        )
    if tensor > 1 and not parallel.sequence:
        raise TopologyError(
            "parallel.sequence",
            "false, but every tensor-parallel rank must send tokens of its own to the experts",
            expected="true with parallel.tensor > 1 and a mixture of experts",
            fix="remove parallel.sequence",
        )


def expert_settings(experts: Experts, topology: Topology) -> dict[str, object]:
    """Return the keys of TransformerConfig that belong to the experts."""
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        "moe_router_score_function": "softmax",
        # Softmax over the chosen logits alone is softmax over all of them, divided by the sum of
        # the chosen ones.
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": topology.expert_size,
        "expert_tensor_parallel_size": topology.parallel.expert_tensor,
    }


class ExpertBlock(MegatronModule):
    """The feed-forward block of a layer: router, way to the experts, experts, way back.

    It stands for megatron-core's MoELayer with SequentialMLP and has its checkpoints. Of its own it
    has: the host waits for the device once in a pass instead of three times; grouped products;
    gradients and sums that are added in the same order in every run; tensor ranks that share the
    experts exchange tokens, not a copy for each expert of a token.
    """

    def __init__(self, config: TransformerConfig, *, activation: ModuleSpec, **kwargs: Any) -> None:
        """Take the arguments with which megatron-core builds it, and the spec of the activation."""
        super().__init__(config=config)
        self.router = Router(config)
        self.experts = LocalExperts(config, activation)
        self.exchange = Exchange(self.experts.total, parallel_state.get_expert_model_parallel_group())
        self.cutters = parallel_state.get_expert_tensor_parallel_group()

    def forward(self, hidden: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Compute [S, 1, H] (S / t under sequence parallelism) -> the same, and no bias.

        Collectives: those of `Exchange` over the expert group; over the group that cuts experts a
        gather of the tokens and of their routes, and a reduce-scatter of the results.
        """
        weights, choices = self.router(hidden.squeeze(1))
        tokens = hidden.squeeze(1)
        cut = self.cutters.size() > 1
        if cut:
            tokens, weights, choices = (
                gather_from_sequence_parallel_region(each, group=self.cutters) for each in (tokens, weights, choices)
            )
        routes = self.exchange.routes(choices)
        sent, sent_weights = spread(tokens, routes), routes.order_of(weights.reshape(-1))
        received, share = self.exchange.forth(sent, sent_weights, routes)
        output = combine(self.exchange.back(self.experts(received, share), routes), routes)
        if cut:
            output = reduce_scatter_to_sequence_parallel_region(output, group=self.cutters)
        return output.unsqueeze(1), None


class Router(MegatronModule):
    """Router with logits and probabilities in fp32."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        device = torch.cuda.current_device()
        shape = (config.num_moe_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(*shape, dtype=config.params_dtype, device=device))
        # Each tensor-parallel rank routes its own tokens: megatron-core adds their gradients.
        vars(self.weight)["sequence_parallel"] = config.sequence_parallel
        self.per_token = config.moe_router_topk
        self.normalized = not config.moe_router_pre_softmax

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts for [N, H] -> weights [N, k] fp32, experts [N, k] int64."""
        logits = functional.linear(hidden.float(), self.weight.float())
        if self.normalized:
            # Softmax over the chosen logits alone is softmax over all, divided by the sum of the chosen.
            chosen, experts = logits.topk(self.per_token, dim=-1)
            return chosen.softmax(dim=-1), experts
        weights, experts = logits.softmax(dim=-1).topk(self.per_token, dim=-1)
        return weights, experts


class LocalExperts(MegatronModule):
    """This rank's experts, or its parts of them, as one weight for each of the two linears.

    In checkpoints every expert has its own part of `experts.linear_fc1.weight` [E, 2F, H] (gate and
    up) and `experts.linear_fc2.weight` [E, H, F].

    Attributes:
        fc1: [experts of this rank, 2F / c, H], c the number of ranks that cut an expert.
        fc2: [experts of this rank, H, F / c].
    """

    def __init__(self, config: TransformerConfig, activation: ModuleSpec) -> None:
        super().__init__(config=config)
        self.total = config.num_moe_experts
        self.count = self.total // config.expert_model_parallel_size
        self.activation = build_module(activation, config=config)
        hidden, units = config.hidden_size, config.moe_ffn_hidden_size // config.expert_tensor_parallel_size
        wide = 2 * units if config.gated_linear_unit else units
        self.fc1 = _expert_weight(config, self.count, wide, hidden, cut=1)
        self.fc2 = _expert_weight(config, self.count, hidden, units, cut=2)

    def forward(self, tokens: Tensor, share: ExpertShare) -> Tensor:
        """Apply the experts to their tokens and weight the results.

        Args:
            tokens: [N, H], expert after expert.
            share: how many tokens each expert has, and their weights.

        Returns:
            [N, H] in the dtype of the tokens, on every rank that shares an expert its part of the
            sum.
        """
        product: Callable[..., Tensor] = _ExpertProducts.apply
        activated = self.activation(product(tokens, self.fc1, share))
        weighted = (activated * share.weights.unsqueeze(-1)).to(activated.dtype)
        return product(weighted, self.fc2, share)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return megatron-core's sharded tensors of the two weights, see the class."""
        gates = 2 if self.config.gated_linear_unit else 1
        return {
            f"{prefix}fc1": self._sharded(f"{prefix}experts.linear_fc1.weight", self.fc1, 0, gates, sharded_offsets),
            f"{prefix}fc2": self._sharded(f"{prefix}experts.linear_fc2.weight", self.fc2, 1, 1, sharded_offsets),
        }

    def _sharded(
        self, key: str, weight: Tensor, axis: int, parts: int, offsets: tuple[Any, ...]
    ) -> ShardedTensorFactory:
        """Describe [experts, O, I]: every expert, and each of the `parts` on its `axis`, is a tensor of its own."""
        first = parallel_state.get_expert_model_parallel_rank() * self.count
        cutter, cuts = parallel_state.get_expert_tensor_parallel_rank(), self.config.expert_tensor_parallel_size
        stacked = len(offsets) + 1

        @torch.no_grad()
        def build(key: str, whole: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    tensor,
                    *offsets,
                    (len(offsets), first + expert, self.total),
                    (stacked + axis, part * cuts + cutter, parts * cuts),
                    replica_id=replica_id,
                    prepend_axis_num=stacked,
                )
                for expert in range(self.count)
                for part, tensor in enumerate(whole[expert].chunk(parts, dim=axis))
            ]

        @torch.no_grad()
        def merge(tensors: list[Tensor]) -> Tensor:
            return torch.stack([torch.cat(tensors[at : at + parts], axis) for at in range(0, len(tensors), parts)])

        replica = (0, 0, parallel_state.get_expert_data_parallel_rank())
        return ShardedTensorFactory(key, weight, build, merge, replica)


def _expert_weight(config: TransformerConfig, *shape: int, cut: int) -> nn.Parameter:
    """Make a weight, uninitialised, that is another one on every rank of the tensor group.

    Marked so, or its gradient on tensor ranks above 0 would be left out of the gradient norm. Each
    of these ranks has another expert or another part of one.
    """
    device = torch.cuda.current_device()
    weight = nn.Parameter(torch.empty(*shape, dtype=config.params_dtype, device=device))
    set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=cut, stride=1)
    vars(weight)["allreduce"] = config.expert_model_parallel_size == 1
    return weight


class _ExpertProducts(torch.autograd.Function):
    """Products of each expert's tokens [n_e, I] with its weight [O, I]; [N, I] -> [N, O]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, share: ExpertShare) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        ctx.share = share
        return _products(tokens, weight.transpose(1, 2), share)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        tokens, weight = ctx.saved_tensors
        share: ExpertShare = ctx.share
        gradient = grads[0].contiguous()
        of_tokens = _products(gradient, weight, share)
        pairs = zip(gradient.split(share.counts), tokens.split(share.counts), strict=True)
        buffer = buffer_of(weight)
        if buffer is None:
            return of_tokens, torch.stack([left.t() @ right for left, right in pairs]), None
        for total, (left, right) in zip(buffer, pairs, strict=True):
            if len(left):
                add_product_(total, left.t(), right)
        return of_tokens, gradient_for_autograd(weight), None


def _products(tokens: Tensor, matrices: Tensor, share: ExpertShare) -> Tensor:
    """Multiply the tokens [N, I] of each expert by its matrix of [experts, I, O]."""
    if len(tokens) and _has_grouped_kernel(tokens, matrices):
        return torch._grouped_mm(tokens, matrices, offs=share.ends)
    return torch.cat([part @ matrix for part, matrix in zip(tokens.split(share.counts), matrices, strict=True)])


def _has_grouped_kernel(tokens: Tensor, matrices: Tensor) -> bool:
    """Tell whether torch has one kernel for all experts: on other devices its operator is a slower loop.

    It takes bf16 on Hopper and Blackwell, rows of a multiple of 16 bytes.
    """
    return (
        tokens.is_cuda
        and tokens.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(tokens.device)[0] in (9, 10)
        and matrices.shape[1] % 8 == matrices.shape[2] % 8 == 0
    )


def _check_routing(family: str, experts: Experts) -> None:
    if experts.per_token == 1 and experts.normalized:
        raise ConfigError(
            f"model ({family})",
            "uses one expert per token with a weight normalised to 1, through which the router cannot learn",
            expected="more experts per token, or weights that are not normalised",
            fix="check num_experts_per_tok and norm_topk_prob in the model's config.json",
        )

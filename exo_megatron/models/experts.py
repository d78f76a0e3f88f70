"""Mixtures of experts: the configuration of megatron-core's MoELayer, router and experts.

Dense models do not use this module. Every token is routed by itself and no token is dropped, so a
token's output depends neither on the others of its micro-batch nor on how micro-batches and experts
are spread over ranks. There is no load-balancing loss: alignment trains on the objective alone.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn
from torch.nn import functional

from exo_megatron.config.sections import ParallelConfig
from exo_megatron.errors import ConfigError, TopologyError
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
        "moe_expert_capacity_factor": None,
        "moe_grouped_gemm": False,
        "expert_model_parallel_size": topology.expert_size,
        "expert_tensor_parallel_size": topology.parallel.expert_tensor,
    }


class LocalExperts(SequentialMLP):
    """This rank's experts: products one expert after another, what is between them for all at once.

    The latter on CUDA, where it saves launches. On the CPU megatron-core's way, one expert after
    another, is 4% faster: it does not join the results of the first products. Grouped products are
    not used, because they keep their weights under other checkpoint keys and shapes.
    """

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Apply the experts to their tokens [N, H], which lie expert after expert, and weight the results.

        Args:
            permuted_local_hidden_states: [N, H].
            tokens_per_expert: [experts of this rank] integers, on the host.
            permuted_probs: [N] fp32, the router's weights.

        Returns:
            [N, H] in the dtype of the tokens, on every rank that shares an expert its part of the
            sum, and no bias.
        """
        if permuted_local_hidden_states.is_cuda:
            return self.together(permuted_local_hidden_states, tokens_per_expert.tolist(), permuted_probs), None
        result: tuple[Tensor, None] = super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        return result

    def together(self, tokens: Tensor, counts: list[int], weights: Tensor) -> Tensor:
        """Compute `forward` on any device with the activations of all experts at once."""
        hidden = _products([expert.linear_fc1 for expert in self.local_experts], tokens, counts)
        activated = self.local_experts[0].activation_func(hidden)
        weighted = (activated * weights.unsqueeze(-1)).to(activated.dtype)
        return _products([expert.linear_fc2 for expert in self.local_experts], weighted, counts)


def _products(linears: list[nn.Module], tokens: Tensor, counts: list[int]) -> Tensor:
    """Apply each linear to its share of the tokens."""
    return torch.cat([linear(part)[0] for linear, part in zip(linears, tokens.split(counts), strict=True)])


class Router(TopKRouter):
    """megatron-core's router with logits and probabilities in fp32.

    The fp32 mode of megatron-core 0.16 needs Transformer Engine.
    """

    def gating(self, input: Tensor) -> Tensor:
        """Compute router logits for TopKRouter, [S, 1, H] -> [S, 1, E] fp32."""
        return functional.linear(input.float(), self.weight.float())


def mark_experts_sharded(policy: nn.Module) -> None:
    """Mark every expert's weights as different on every rank of the tensor group.

    An unmarked weight counts as replicated over the tensor group, and its gradient on tensor ranks
    above 0 would be left out of the gradient norm. Each of these ranks has another expert or
    another part of one.
    """
    for module in policy.modules():
        if isinstance(module, SequentialMLP):
            for parameter in module.parameters():
                vars(parameter)["tensor_model_parallel"] = True


def _check_routing(family: str, experts: Experts) -> None:
    if experts.per_token == 1 and experts.normalized:
        raise ConfigError(
            f"model ({family})",
            "uses one expert per token with a weight normalised to 1, through which the router cannot learn",
            expected="more experts per token, or weights that are not normalised",
            fix="check num_experts_per_tok and norm_topk_prob in the model's config.json",
        )

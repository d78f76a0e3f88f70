"""Data parallelism, Adam (megatron-core's distributed optimizer) and the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from exo_megatron.config.sections import ComputeConfig, OptimizerConfig
from exo_megatron.execution.policy import Policy
from exo_megatron.models.main_grad import add_gradients_in_place
from exo_megatron.models.policy import DTYPES
from exo_megatron.training.gradients import finalize_gradients
from exo_megatron.training.state_shards import shards_of


@dataclass(frozen=True)
class Trainee:
    """A policy under training.

    Attributes:
        policy: the policy.
        model: its data-parallel wrapper.
        optimizer: this rank's part of the optimizer.
        weight_decay: of the parameters that have it.
        clip_grad: largest norm of the gradients; None for no clipping.
        accumulators: autograd nodes that run the wrapper's hooks when a gradient is complete.
    """

    policy: Policy
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    weight_decay: float
    clip_grad: float | None
    accumulators: tuple[object, ...]

    @property
    def uses_torch_adam(self) -> bool:
        """True if Adam is torch's, because neither Transformer Engine nor apex is installed."""
        return all(isinstance(part.optimizer, torch.optim.Adam) for part in _parts(self.optimizer))

    @property
    def bytes_to_save(self) -> int:
        """Bytes of a checkpoint, counted by the first data rank: weights, and 12 bytes of Adam per parameter."""
        if self.policy.topology.data_rank != 0:
            return 0
        return sum(each.numel() * (each.element_size() + 12) for each in self.policy.model.parameters())

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of every parameter group, and weight decay where marked."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.weight_decay * group["wd_mult"]

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """Return weights and optimizer state as megatron-core sharded tensors, views of them.

        Every rank of the data group has other ones, see state_shards.py. To be loaded there are no
        weights among them: `load_state` makes them from the optimizer's fp32 copies. The state of
        all parts of the optimizer is in one form, so that it can be loaded with other parts: with
        parallel.expert 1 the experts belong to the part of all weights, else to one of their own.
        """
        parts = _parts(self.optimizer)
        if loading:
            for part in parts:
                self._allocate(part)
        shards = shards_of(parts, self.policy.model.sharded_state_dict(), weights=not loading)
        return {"optimizer": {**parts[0].state_dict(), "param_state": shards}}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take up the filled `sharded_state(loading=True)`: number of steps, and weights from the fp32 copies.

        One all-gather of weights over the data group.
        """
        # As an integer, which fused Adams require; torch's Adam, whose checkpoint this may be,
        # stores a float. All other values of a group are configuration, which the caller compares,
        # and are set again before every step.
        step = int(state["optimizer"]["optimizer"]["param_groups"][0]["step"])
        for part in _parts(self.optimizer):
            if self.uses_torch_adam:
                for moments in part.optimizer.state.values():
                    moments["step"].fill_(step)
            else:
                for group in part.optimizer.param_groups:
                    group["step"] = step
            part._copy_main_params_to_model_params()
        self.model.start_param_sync(force_sync=True)

    def _allocate(self, part: DistributedOptimizer) -> None:
        """Make the optimizer's state, which it makes in its first step, to load into.

        megatron-core does so itself for the fused Adams of Transformer Engine and apex only.
        """
        if not self.uses_torch_adam:
            part.load_state_dict(part.state_dict())
            return
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    part.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0, device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def make_trainee(policy: Policy, config: OptimizerConfig) -> Trainee:
    """Wrap a loaded policy for training.

    Gradients accumulate in fp32 and are reduced as sums over the data-parallel group
    (reduce-scatter): the division by the global count happens once, in finalize_gradients. Biases
    and norms have no weight decay.
    """
    module = policy.model
    settings = _megatron_config(config, policy.compute)
    module.train()
    on_cuda = policy.topology.device.type == "cuda"
    model = DistributedDataParallel(
        module.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=on_cuda
        ),
        module,
    )
    accumulators = _take_accumulators(model)
    _keep_padding_between_buckets(model)
    optimizer = get_megatron_optimizer(settings, [model])
    _fuse_torch_adam(optimizer)
    for part in _parts(optimizer):
        part.__class__ = _ShardedAdam
    add_gradients_in_place(module)
    # No grad_scale_func: fp32 and bf16 scale by 1, and it would make the model refer to the optimizer,
    # whose fp32 shards refer by their autograd graph to the model's hooks (see _take_accumulators).
    module.config.finalize_model_grads_func = partial(finalize_gradients, topology=policy.topology)
    module.config.no_sync_func = model.no_sync
    return Trainee(policy, model, optimizer, config.weight_decay, config.clip_grad or None, accumulators)


def _take_accumulators(model: DistributedDataParallel) -> tuple[object, ...]:
    """Take the autograd nodes with megatron-core's hooks out of the wrapper's hands.

    A hook refers to the wrapper. If the wrapper owned the nodes, the two would keep each other, the
    weights, the optimizer state and the process groups for ever: Python's collector does not see
    references of autograd. A workflow would then hold the models of all its stages at once.
    """
    accumulators = tuple(model.grad_accs)
    model.grad_accs.clear()
    return accumulators


def _keep_padding_between_buckets(model: DistributedDataParallel) -> None:
    """Make megatron-core gather optimizer state with the padding between gradient buckets.

    Without this it leaves the padding out, but takes every parameter from its place with the
    padding: parameters behind the first bucket would be stored shifted (Megatron-LM, pull request
    5077). There are several buckets with overlapped reduction, and with tied embeddings on several
    pipeline stages. Files hold no padding either way. Call it before the optimizer is made.
    """
    for buffer in (*model.buffers, *model.expert_parallel_buffers):
        for bucket in buffer.buckets[:-1]:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = sum(bucket.numel_unpadded for bucket in buffer.buckets)


def _parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """List the distributed optimizers of which megatron-core's chained optimizer consists."""
    return list(optimizer.chained_optimizers)


class _ShardedAdam(DistributedOptimizer):
    """megatron-core's, which copies all updated weights to the model in one call, not one after another."""

    def _copy_main_params_to_model_params(self) -> None:
        if self.is_stub_optimizer:  # no parameter on this rank
            return
        targets, sources = [], []
        for mains, models in (
            (self.shard_fp32_from_float16_groups, self.model_float16_groups),
            (self.shard_fp32_groups, self.model_fp32_groups),
        ):
            for source, parameter in zip(chain(*mains), chain(*models), strict=True):
                within = self._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
                buffer, _, bucket = self.model_param_gbuf_map[parameter]
                weights = self.buffers[buffer].buckets[bucket].param_data
                targets.append(weights.view(-1)[within.start : within.end])
                sources.append(source)
        if sources:
            torch._foreach_copy_(targets, sources)


def _fuse_torch_adam(optimizer: MegatronOptimizer) -> None:
    """Make torch's Adam update a parameter with one kernel instead of a dozen passes."""
    for part in _parts(optimizer):
        if isinstance(part.optimizer, torch.optim.Adam):
            for group in part.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False


def _megatron_config(config: OptimizerConfig, compute: ComputeConfig) -> MegatronOptimizerConfig:
    dtype = DTYPES[compute.precision]
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.lr * config.min_lr_ratio,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        clip_grad=0.0,  # not by megatron-core: training/gradients.py
    )


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Compute the learning rate of optimizer step `step` (0-based) of `total_steps`.

    It rises linearly over `warmup_steps` (the first step already has a rate above 0), then falls to
    lr * min_lr_ratio, which it would reach at step `total_steps`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)

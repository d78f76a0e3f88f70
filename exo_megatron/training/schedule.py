"""megatron-core's 1F1B schedule over micro-batches whose lengths every pipeline stage knows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from exo_megatron.training.optimizer import Trainee

_Shape = list[int]
ForwardStep = Callable[..., tuple[Tensor, Any]]
"""forward_step_func of megatron-core: (iterator of items, model) -> output, loss function."""


def run_schedule(
    trainee: Trainee, forward_step: ForwardStep, items: Sequence[Any], lengths: Sequence[int], *, backward: bool = True
) -> None:
    """Pass micro-batches through the pipeline, forward and if asked backward.

    Point to point over the pipeline group: hidden states [S, 1, H] ([S / t, 1, H] under sequence
    parallelism), and their gradients. With `backward` and the model's finalize_model_grads_func, its
    collectives.

    Args:
        trainee: the policy under training.
        forward_step: computes one item.
        items: what forward_step takes from its iterator, one each.
        lengths: S of each, equal on all ranks of the pipeline.
        backward: whether to compute gradients.
    """
    communicator = _KnownShapes(trainee, lengths)
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(items),
        model=[trainee.model],
        num_microbatches=len(items),
        seq_length=1,  # not read: micro-batches differ in length (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=not backward,
        p2p_communicator=communicator,
        pg_collection=_process_groups(),
    )


def _process_groups() -> ProcessGroupCollection:
    """Collect the groups that the schedule takes by default, but not beside a communicator."""
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return groups


class _KnownShapes(P2PCommunicator):
    """megatron-core's transfers, without sending ahead what every stage knows.

    megatron-core would send every shape to the host of the next stage, which waits for it and
    twice for the device. Forward and backward come in the order of the micro-batches.
    """

    def __init__(self, trainee: Trainee, lengths: Sequence[int]) -> None:
        topology, config = trainee.policy.topology, trainee.policy.model.config
        super().__init__(topology.pipeline_group, config)
        shapes = [[length // topology.token_multiple, 1, config.hidden_size] for length in lengths]
        self._from_previous, self._from_next, self._to_previous, self._to_next = (deque(shapes) for _ in range(4))

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[_Shape, _Shape]:
        """Return the shapes of what arrives from the stages before and after; see P2PCommunicator."""
        for sent, known in ((tensor_send_next, self._to_next), (tensor_send_prev, self._to_previous)):
            if sent is not None and list(sent.shape) != (shape := known.popleft()):
                raise RuntimeError(f"this pipeline stage sends {list(sent.shape)}, the other one expects {shape}")
        previous = self._from_previous.popleft() if recv_prev else [0, 0, 0]
        return previous, self._from_next.popleft() if recv_next else [0, 0, 0]

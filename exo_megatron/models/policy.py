"""The policy: megatron-core's GPTModel on rows of candidate groups, ending in hidden states instead of logits."""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from exo_megatron.models.decode import DecodeLayout
from exo_megatron.models.layout import GroupLayout
from exo_megatron.models.rotary import inverse_frequencies, rotary_angles
from exo_megatron.models.spec import ModelSpec

Layout = GroupLayout | DecodeLayout

# megatron-core 0.19 warns on every construction that GPTModel is in maintenance; both supported versions have it.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)


class PolicyModel(GPTModel):
    """One pipeline stage of the model. `packed_seq_params` carries the layout; rotary angles follow its positions.

    The last stage returns hidden states, complete on every tensor-parallel rank, whose backward sums the partial
    gradients of the ranks: under sequence parallelism gather forward, reduce-scatter backward; without it identity
    forward, all-reduce backward. What follows (a vocabulary-parallel projection) must therefore return each rank's
    own partial gradient and not reduce it again.
    """

    def __init__(
        self,
        config: TransformerConfig,
        block: TransformerBlockSubmodules,
        spec: ModelSpec,
        *,
        is_first_stage: bool,
        is_last_stage: bool,
    ) -> None:
        """Uninitialised parameters on this process's device: weights always come from a checkpoint."""
        super().__init__(
            config=config,
            transformer_layer_spec=block,
            vocab_size=spec.padded_vocab_size,
            max_sequence_length=spec.max_positions,
            pre_process=is_first_stage,
            post_process=is_last_stage,
            share_embeddings_and_output_weights=spec.tied_embeddings,
            position_embedding_type="none",
        )
        self.rotary_frequencies = inverse_frequencies(spec, torch.device(torch.cuda.current_device()))

    def output_weight(self) -> Tensor:
        """This rank's vocabulary shard of the output projection [Vp/t, H]; the last stage only."""
        weight: Tensor
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        return weight

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """megatron-core's sharded tensors of this stage, without `_extra_state` (pickled fp8 state: empty)."""
        state: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.endswith("._extra_state")}

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *args: Any,
        packed_seq_params: Layout,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor, None, None, None, None]:
        """Embed on the first stage; angles by the layout's positions on every stage."""
        hidden = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        angles = rotary_angles(packed_seq_params.position_ids, self.rotary_frequencies)
        return hidden, angles, None, None, None, None

    def _postprocess(self, hidden_states: Tensor, *args: Any, packed_seq_params: Layout, **kwargs: Any) -> Tensor:
        """Other stages: hidden states as they are. Last: [M, H] of the predicting rows; [S, 1, H] to decode."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.pg_collection.tp)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=self.pg_collection.tp)
        if isinstance(packed_seq_params, GroupLayout):
            return hidden_states[packed_seq_params.predict_rows, 0]
        return hidden_states

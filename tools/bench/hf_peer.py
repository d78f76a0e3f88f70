"""EXO on an HF model, written down straight from the paper's formulas.

Every candidate is a sequence of its own with the prompt repeated; the model gives the logits of all
positions, all are divided by tau, log_softmax runs over all of them, and the values of the
candidate tokens are gathered and summed. The reference runs the same way without gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from exo_megatron.config.sections import LossConfig
from exo_megatron.data.groups import Group
from tools.bench.models import Matched
from tools.bench.peer import Batching
from tools.bench.work import chunks

SETTINGS = (Batching(1), Batching(2), Batching(4), Batching(8), Batching(8, by_length=True))


class StraightforwardLoss:
    """The loss `exo_rw` or `exo_pref` by transformers and autograd. See Peer.

    A batch is so many sequences in one forward pass, padded to the longest. The graphs of a group's
    batches are kept until its loss is there, so a batch may be smaller than a group.
    """

    name = "HF"
    unit = "sequence"
    settings = SETTINGS

    def __init__(self, matched: Matched, loss: LossConfig) -> None:
        self.model = copy.deepcopy(matched.hf).train()
        self.reference = copy.deepcopy(matched.hf).eval()
        self.loss = loss

    def units(self, groups: Sequence[Group]) -> int:
        """See Peer."""
        return sum(len(group.candidates) for group in groups)

    def backward(self, groups: Sequence[Group], batching: Batching) -> None:
        """See Peer."""
        for taken in self._taken(groups, batching):
            (self._losses(taken, batching).sum() / len(groups)).backward()

    def batches(self, groups: Sequence[Group], batching: Batching) -> list[list[int]]:
        """See Peer."""
        return [
            [len(ids) for _, ids, _ in batch]
            for taken in self._taken(groups, batching)
            for batch in chunks(_texts(taken, batching), batching.size)
        ]

    def _taken(self, groups: Sequence[Group], batching: Batching) -> list[list[Group]]:
        """Split into whole groups with the same number of candidates, as many as fill a batch."""
        in_order = sorted(groups, key=lambda group: -group.num_tokens) if batching.by_length else list(groups)
        return chunks(in_order, max(1, batching.size // len(groups[0].candidates)))

    def _losses(self, groups: Sequence[Group], batching: Batching) -> Tensor:
        logps = self._logps(self.model, groups, batching)
        if groups[0].reference_logprobs is None:
            with torch.no_grad():
                reference = self._logps(self.reference, groups, batching)
        else:
            reference = logps.new_tensor([group.reference_logprobs for group in groups])
        log_p_theta = torch.log_softmax(self.loss.beta_pi * (logps - reference), dim=-1)  # Eq. 13
        log_p_r = _log_target(groups, self.loss).to(logps)
        return (log_p_theta.exp() * (log_p_theta - log_p_r)).sum(dim=-1)  # Eq. 15

    def _logps(self, model: LlamaForCausalLM, groups: Sequence[Group], batching: Batching) -> Tensor:
        """Compute log pi(y_k|x) at temperature tau, [groups, K]."""
        texts = _texts(groups, batching)
        parts = [sequence_logprobs(model, batch, self.loss.temperature) for batch in chunks(texts, batching.size)]
        found, places = torch.cat(parts), torch.tensor([place for place, _, _ in texts], device=model.device)
        return torch.empty_like(found).index_copy(0, places, found).view(len(groups), -1)


def _log_target(groups: Sequence[Group], loss: LossConfig) -> Tensor:
    """Compute log p_r: of rewards (Eq. 14), or of a pair with label smoothing (Eq. 18)."""
    if loss.kind == "exo_rw":
        return torch.log_softmax(torch.tensor([group.rewards for group in groups]) / loss.beta_r, dim=-1)
    smoothing = loss.label_smoothing
    return torch.tensor([[1 - smoothing, smoothing]]).log().expand(len(groups), 2)


Text = tuple[int, list[int], int]
"""Number of a candidate among those of the groups, its ids with its prompt, and its length."""


def _texts(groups: Sequence[Group], batching: Batching) -> list[Text]:
    """List the texts of all candidates, in the order in which they go through the model."""
    candidates = [(group.prompt, candidate) for group in groups for candidate in group.candidates]
    texts = [(place, [*prompt, *candidate], len(candidate)) for place, (prompt, candidate) in enumerate(candidates)]
    return sorted(texts, key=lambda text: -len(text[1])) if batching.by_length else texts


def sequence_logprobs(model: LlamaForCausalLM, texts: Sequence[Text], temperature: float) -> Tensor:
    """Compute log pi(y|x) at temperature tau of each text, [n], in one padded forward pass."""
    longest = max(len(ids) for _, ids, _ in texts)
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids, _ in texts], device=model.device)
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for _, ids, _ in texts])
    of_candidate = torch.tensor([[0] * (len(ids) - r) + [1] * r + [0] * (longest - len(ids)) for _, ids, r in texts])
    padded = None if bool(attention_mask.all()) else attention_mask.to(model.device)
    logits = model(input_ids=input_ids, attention_mask=padded, use_cache=False).logits
    logps = torch.log_softmax(logits[:, :-1].float() / temperature, dim=-1)
    picked = logps.gather(-1, input_ids[:, 1:, None])[..., 0]
    return (picked * of_candidate[:, 1:].to(model.device)).sum(dim=-1)

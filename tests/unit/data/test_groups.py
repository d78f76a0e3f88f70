"""The digest of groups sees all that a run trains on."""

from __future__ import annotations

from dataclasses import replace

from exo_megatron.data.groups import Group, data_digest
from exo_megatron.data.loss_fields import TOKEN_LOGPROBS

GROUP = Group("a", (3, 4), ((5, 2), (6, 7, 2)), rewards=(0.5, -0.5))
OTHER = Group("b", (3,), ((8, 2), (9, 2)), rewards=(1.0, 2.0))
PER_TOKEN = [((-1.0, -2.0), (-3.0, -1.0, -1.0)), ((-1.0, -2.0), (-3.0, -1.0, -2.0))]


def test_data_digest_sees_every_field_and_the_order() -> None:
    digest = data_digest([GROUP, OTHER])
    assert digest == data_digest([replace(GROUP), replace(OTHER)])
    changed = [
        [OTHER, GROUP],
        [GROUP],
        [replace(GROUP, id="c"), OTHER],
        [replace(GROUP, prompt=(3, 5)), OTHER],
        [replace(GROUP, candidates=((5, 2), (6, 8, 2))), OTHER],
        [replace(GROUP, candidates=((5, 2, 6), (7, 2))), OTHER],
        [replace(GROUP, rewards=(0.5, -0.25)), OTHER],
        [replace(GROUP, rewards=None), OTHER],
        [replace(GROUP, log_weights=(0.0, 0.5)), OTHER],
        [replace(GROUP, log_weights=(0.5, 0.0)), OTHER],
        *([replace(GROUP, **{name: values}), OTHER] for name in TOKEN_LOGPROBS for values in PER_TOKEN),
    ]
    assert len({digest, *(data_digest(groups) for groups in changed)}) == 1 + len(changed)


def test_reference_logprobs_are_not_part_of_the_data() -> None:
    """They follow from data and reference; a resumed run may read them from a file."""
    assert data_digest([replace(GROUP, reference_logprobs=(-1.0, -2.0))]) == data_digest([GROUP])

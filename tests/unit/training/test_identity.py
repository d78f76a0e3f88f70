"""Two runs are the same work exactly if nothing that decides the result differs."""

from __future__ import annotations

from dataclasses import replace

from exo_megatron.config.sections import BatchConfig, LossConfig, OptimizerConfig
from exo_megatron.data.groups import Group
from exo_megatron.training.identity import data_digest, run_identity

GROUP = Group("a", (3, 4), ((5, 2), (6, 7, 2)), rewards=(0.5, -0.5))
OTHER = Group("b", (3,), ((8, 2), (9, 2)), rewards=(1.0, 2.0))


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
    ]
    assert len({digest, *(data_digest(groups) for groups in changed)}) == 1 + len(changed)


def test_reference_logprobs_are_not_part_of_the_data() -> None:
    """They follow from data and reference; a resumed run may read them from a file."""
    assert data_digest([replace(GROUP, reference_logprobs=(-1.0, -2.0))]) == data_digest([GROUP])


def test_run_identity_sees_weights_seed_and_settings() -> None:
    loss, optimizer, batch = LossConfig(), OptimizerConfig(), BatchConfig()
    identity = run_identity(data_digest([GROUP]), "weights", 0, "fp32", loss, optimizer, batch)
    assert identity == run_identity(
        data_digest([GROUP]), "weights", 0, "fp32", LossConfig(), OptimizerConfig(), BatchConfig()
    )
    others = [
        run_identity(data_digest([GROUP]), "weights", 0, "bf16", loss, optimizer, batch),
        run_identity(data_digest([OTHER]), "weights", 0, "fp32", loss, optimizer, batch),
        run_identity(data_digest([GROUP]), "others", 0, "fp32", loss, optimizer, batch),
        run_identity(data_digest([GROUP]), "weights", 1, "fp32", loss, optimizer, batch),
        run_identity(data_digest([GROUP]), "weights", 0, "fp32", LossConfig(beta_pi=0.25), optimizer, batch),
        run_identity(data_digest([GROUP]), "weights", 0, "fp32", loss, OptimizerConfig(lr=2e-6), batch),
        run_identity(data_digest([GROUP]), "weights", 0, "fp32", loss, optimizer, BatchConfig(groups=8)),
    ]
    assert len({identity, *others}) == 1 + len(others)

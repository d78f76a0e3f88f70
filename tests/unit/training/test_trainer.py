"""Two runs are the same work exactly if nothing that decides the result differs."""

from __future__ import annotations

from exo_megatron.config.sections import BatchConfig, LossConfig, OptimizerConfig
from exo_megatron.data.groups import Group, data_digest
from exo_megatron.training.trainer import run_identity

GROUP = Group("a", (3, 4), ((5, 2), (6, 7, 2)), rewards=(0.5, -0.5))
OTHER = Group("b", (3,), ((8, 2), (9, 2)), rewards=(1.0, 2.0))


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

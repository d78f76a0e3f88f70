"""Efficient exact optimization (EXO, arXiv 2402.00856) of language models on megatron-core.

The names of `__all__` are the Python API, described in docs/api.md. Each is imported when it is
first used, so that `import exo_megatron` and a command that only reads a configuration load no
torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exo_megatron.config.sections import LossConfig as LossConfig
    from exo_megatron.config.stages import AlignConfig as AlignConfig
    from exo_megatron.config.stages import EvaluateConfig as EvaluateConfig
    from exo_megatron.config.stages import ExportConfig as ExportConfig
    from exo_megatron.config.stages import ImportConfig as ImportConfig
    from exo_megatron.config.stages import RolloutConfig as RolloutConfig
    from exo_megatron.config.stages import ScoreConfig as ScoreConfig
    from exo_megatron.config.stages import SftConfig as SftConfig
    from exo_megatron.data.groups import Group as Group
    from exo_megatron.losses.objective import LossInputs as LossInputs
    from exo_megatron.losses.objective import Objective as Objective
    from exo_megatron.losses.objective import RaggedGroups as RaggedGroups
    from exo_megatron.losses.objective import TokenLogps as TokenLogps
    from exo_megatron.losses.objective import group_objective as group_objective
    from exo_megatron.losses.objective import loss_spec as loss_spec
    from exo_megatron.losses.paper import dpo_loss as dpo_loss
    from exo_megatron.losses.paper import dpo_pref_loss as dpo_pref_loss
    from exo_megatron.losses.paper import exo_loss as exo_loss
    from exo_megatron.losses.paper import ipo_pref_loss as ipo_pref_loss
    from exo_megatron.losses.paper import policy_log_probs as policy_log_probs
    from exo_megatron.losses.paper import preference_log_target as preference_log_target
    from exo_megatron.losses.paper import reward_log_target as reward_log_target
    from exo_megatron.losses.paper import sft_loss_sum as sft_loss_sum
    from exo_megatron.rewards.source import Completion as Completion
    from exo_megatron.rewards.source import RewardSource as RewardSource

__version__ = "0.1.0"

_MODULES = {
    "AlignConfig": "config.stages",
    "Completion": "rewards.source",
    "EvaluateConfig": "config.stages",
    "ExportConfig": "config.stages",
    "Group": "data.groups",
    "ImportConfig": "config.stages",
    "LossConfig": "config.sections",
    "LossInputs": "losses.objective",
    "Objective": "losses.objective",
    "RaggedGroups": "losses.objective",
    "RewardSource": "rewards.source",
    "RolloutConfig": "config.stages",
    "ScoreConfig": "config.stages",
    "SftConfig": "config.stages",
    "TokenLogps": "losses.objective",
    "dpo_loss": "losses.paper",
    "dpo_pref_loss": "losses.paper",
    "exo_loss": "losses.paper",
    "group_objective": "losses.objective",
    "ipo_pref_loss": "losses.paper",
    "loss_spec": "losses.objective",
    "policy_log_probs": "losses.paper",
    "preference_log_target": "losses.paper",
    "reward_log_target": "losses.paper",
    "sft_loss_sum": "losses.paper",
}
__all__ = ["__version__", *_MODULES]

# See parallel/cpu_backend.py. Here, because torch reads it at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> Any:
    """Import a name of the API from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """List the names of the API."""
    return sorted(__all__)

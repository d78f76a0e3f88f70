"""The table of losses: all that configuration, help, data and objective know of a kind of loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Compares = Literal["rewards", "preference"]


@dataclass(frozen=True)
class LossSpec:
    """An entry of the table: the source of a loss, and the values that it is computed from.

    Attributes:
        equation: its place in the paper (arXiv 2402.00856), or another source.
        compares: "rewards" for all candidates of a group with their rewards, or "preference" for a
            pair of a chosen and a rejected candidate.
        keys: keys of the section `loss` that it uses besides COMMON_KEYS. Another key would have no
            effect, so setting it is an error.
        log_weights: it weighs candidates by the importance weights of a behaviour policy.
        several_rejected: of a loss that compares a preference, it takes more than one rejected
            candidate in a group.
        token_logps: it needs the log-probs of single tokens of the policy, the reference and the
            behaviour policy. Groups that exceed a micro-batch are then an error.
    """

    equation: str
    compares: Compares
    keys: tuple[str, ...]
    log_weights: bool = False
    token_logps: bool = False
    several_rejected: bool = False


LOSSES = {
    "exo_rw": LossSpec("Eq. 15", "rewards", ("beta_pi", "beta_r")),
    "exo_pref": LossSpec("Eq. 18", "preference", ("beta_pi", "label_smoothing"), several_rejected=True),
    "dpo_rw": LossSpec("Eq. 19", "rewards", ("beta_pi", "beta_r")),
    "dpo_pref": LossSpec("Eq. 7", "preference", ("beta_pi",), several_rejected=True),
    "ipo_pref": LossSpec("arXiv 2310.12036, Eq. 17", "preference", ("beta_pi",)),
}
"""The table by kind. losses/objective.py checks at import that it has a function for each kind."""

FUNCTION = "function"
"""The kind of a loss from outside the package, which brings its own entry."""

FUNCTION_KEYS = ("function", "beta_pi", "beta_r", "label_smoothing")
COMMON_KEYS = ("kind", "temperature", "nll_weight")
"""Keys of `loss` that every kind uses."""


def kinds_comparing(compares: Compares) -> str:
    """List the kinds that compare rewards or pairs, for messages."""
    *others, last = [kind for kind, spec in LOSSES.items() if spec.compares == compares]
    return f"{', '.join(others)} or {last}" if others else last

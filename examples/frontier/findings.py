"""What the end points say: who is ahead at equal KL, by how many standard errors, and what K does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exo_megatron.evaluation.equal_kl import Bounded, lead_at_kl, lead_over, read_curve, reward_at_kl, spans
from exo_megatron.evaluation.estimates import PromptMeans
from frontier.sweep import Run

Runs = Mapping[Run, PromptMeans]


@dataclass(frozen=True)
class Setting:
    """What the two methods are compared in."""

    policy: str
    rank: int | None
    K: int

    def __str__(self) -> str:
        rank = "" if self.rank is None else f", rank {self.rank}"
        return f"{self.policy}{rank}, K = {self.K}"


@dataclass(frozen=True)
class Lead:
    """EXO against DPO at the KL of one end point of DPO, each with the best of its learning rates there.

    Attributes:
        run: DPO's run.
        kl: its KL.
        lead: EXO's reward at that KL minus DPO's; None if no curve of EXO reaches it.
    """

    run: Run
    kl: float
    lead: Bounded | None

    @property
    def errors(self) -> float | None:
        """The lead in standard errors."""
        return None if self.lead is None else self.lead.value / self.lead.stderr


@dataclass(frozen=True)
class AtKl:
    """The reward of one method at a KL, and how much more or less it is than at the K before."""

    setting: Setting
    seed: int
    method: str
    reward: Bounded
    change: Bounded | None


def setting_of(run: Run) -> Setting:
    """The setting of a run."""
    return Setting(run.policy, run.rank, run.K)


def settings_of(runs: Runs) -> list[Setting]:
    """All settings, in order."""
    return list(dict.fromkeys(setting_of(run) for run in runs))


def curves(runs: Runs, reference: PromptMeans, setting: Setting, method: str, seed: int) -> list[list[PromptMeans]]:
    """The curve of a method for each of its learning rates: from pi_sft over the end points of its beta_r."""
    mine = {
        run: means
        for run, means in runs.items()
        if setting_of(run) == setting and run.method == method and run.seed == seed
    }
    rates = dict.fromkeys(run.lr for run in mine)
    return [[reference, *(means for run, means in mine.items() if run.lr == rate)] for rate in rates]


def find_leads(runs: Runs, references: Mapping[str, PromptMeans]) -> list[Lead]:
    """Compare at the KL of every end point of DPO."""
    found = []
    for run, means in runs.items():
        if run.method == "dpo_rw":
            kl = float(means.kls.mean())
            exo, dpo = (
                _best_at(curves(runs, references[run.policy], setting_of(run), method, run.seed), kl)
                for method in ("exo_rw", "dpo_rw")
            )
            found.append(Lead(run, kl, None if exo is None or dpo is None else _lead(exo, dpo, means, kl)))
    return found


def _lead(exo: Sequence[PromptMeans], dpo: Sequence[PromptMeans], means: PromptMeans, kl: float) -> Bounded:
    """EXO's lead over DPO's curve at `kl`, where nothing is interpolated for DPO if its end point is on it."""
    return lead_over(exo, means) if any(each is means for each in dpo) else lead_at_kl(exo, dpo, kl)


def effect_of_K(runs: Runs, references: Mapping[str, PromptMeans], *, kl: float) -> list[AtKl]:
    """The reward at one KL for every K, and its change from one K to the next."""
    found: list[AtKl] = []
    keys = dict.fromkeys((run.policy, run.rank, run.method, run.seed) for run in runs)
    for policy, rank, method, seed in keys:
        before: list[PromptMeans] | None = None
        for K in sorted({run.K for run in runs if (run.policy, run.rank) == (policy, rank)}):
            setting = Setting(policy, rank, K)
            best = _best_at(curves(runs, references[policy], setting, method, seed), kl)
            if best is not None:
                change = None if before is None else lead_at_kl(best, before, kl)
                found.append(AtKl(setting, seed, method, reward_at_kl(best, kl), change))
            before = best
    return found


def _best_at(found: Sequence[list[PromptMeans]], kl: float) -> list[PromptMeans] | None:
    reaching = [curve for curve in found if spans(curve, kl)]
    return max(reaching, key=lambda curve: read_curve(curve, kl), default=None)


def describe(leads: Sequence[Lead], *, from_kl: float) -> list[str]:
    """One sentence per setting, computed from the intervals of its leads at KL `from_kl` or more."""
    lines = []
    for setting in dict.fromkeys(setting_of(lead.run) for lead in leads):
        mine = [lead for lead in leads if setting_of(lead.run) == setting and lead.kl >= from_kl]
        bounded = [lead.lead for lead in mine if lead.lead is not None]
        if not bounded:
            lines.append(f"{setting}: no end point of DPO at KL {from_kl:g} or more that EXO reaches too.")
            continue
        ahead, behind = (sum(lead.sign == sign for lead in bounded) for sign in (1, -1))
        values = [lead.value for lead in bounded]
        errors = [lead.value / lead.stderr for lead in bounded]
        lines.append(
            f"{setting}: at {len(bounded)} end points of DPO with KL >= {from_kl:g} over all seeds, EXO is above at "
            f"{ahead} and below at {behind}; its lead is {min(values):+.2f} to {max(values):+.2f} "
            f"({min(errors):+.1f} to {max(errors):+.1f} standard errors)."
        )
    return lines

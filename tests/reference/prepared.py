"""Groups and prompts as a stage gets them, of those written down in a test."""

from __future__ import annotations

from collections.abc import Sequence

from exo_megatron.data.groups import Group, data_digest
from exo_megatron.data.prepared import (
    GroupTable,
    Prepared,
    PreparedGroups,
    PromptTable,
    groups_table,
    prompts_digest,
    prompts_table,
)
from exo_megatron.data.prompts import Prompt


def prepared(groups: Sequence[Group]) -> PreparedGroups:
    """Put groups into one table."""
    return PreparedGroups(Prepared([groups_table([("", group) for group in groups])], GroupTable, data_digest(groups)))


def prepared_prompts(prompts: Sequence[Prompt]) -> Prepared[Prompt]:
    """Put prompts into one table."""
    table = prompts_table([("", prompt) for prompt in prompts])
    return Prepared([table], PromptTable, prompts_digest([table]))

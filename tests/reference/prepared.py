"""Groups as a stage gets them, of groups written down in a test."""

from __future__ import annotations

from collections.abc import Sequence

from exo_megatron.data.groups import Group, data_digest
from exo_megatron.data.prepared import Prepared, PreparedGroups, groups_table, open_groups


def prepared(groups: Sequence[Group]) -> PreparedGroups:
    """Put groups into one table."""
    return PreparedGroups(Prepared([groups_table([("", group) for group in groups])], open_groups, data_digest(groups)))

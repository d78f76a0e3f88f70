"""Tables as plain text."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence

GAP = 2
"""Blank columns between two cells."""

NARROWEST = 8
"""Columns below which a cell is not folded; the table is then wider than asked for."""

UNLIMITED = 1_000_000


def render_table(
    header: Sequence[str], lines: Sequence[Sequence[str]], *, width: int | None = None, indent: int = 0
) -> str:
    """Lay out lines of cells in columns, with a line of dashes below the header, if there is one.

    There is no frame and no colour.

    Args:
        header: names of the columns; empty for no header.
        lines: cells of each line.
        width: columns of the page; a cell that does not fit continues on the next line. None means
            as wide as the cells are, for files and pipes.
        indent: blanks before every line.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    columns = max(map(len, [header, *lines]))
    table = Table(box=None, show_header=False, padding=(0, GAP, 0, 0), pad_edge=False)
    for _ in range(columns):
        table.add_column(overflow="fold")
    if header:
        table.add_row(*map(Text, header))
        table.add_row(*(Rule(characters="-") for _ in header))
    for line in lines:
        table.add_row(*map(Text, line))
    columns_wide = UNLIMITED if width is None else max(width, indent + columns * (NARROWEST + GAP))
    console = Console(file=io.StringIO(), width=columns_wide, color_system=None, force_jupyter=False)
    with console.capture() as printed:
        console.print(Padding(table, (0, 0, 0, indent), expand=False))
    return "\n".join(line.rstrip() for line in printed.get().splitlines())


def stdout_width() -> int | None:
    """Return the columns of standard output's terminal; None if it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None

from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter

import pytest

from exo_megatron.utils.tables import render_table, stdout_width

HEADER = ("check", "compared", "largest difference")
LINES = [
    ("tensors", "21 tensors", "0"),
    ("logits", "128 positions at tensor 2, pipeline 1", "2.5e-06 (logits up to 4.21)"),
]


def test_columns_are_as_wide_as_their_cells():
    assert render_table(HEADER, LINES).splitlines() == [
        "check    compared                               largest difference",
        "-------  -------------------------------------  ---------------------------",
        "tensors  21 tensors                             0",
        "logits   128 positions at tensor 2, pipeline 1  2.5e-06 (logits up to 4.21)",
    ]


def test_long_cells_go_on_below_themselves():
    assert render_table(HEADER, LINES, width=50).splitlines() == [
        "check    compared             largest difference",
        "-------  -------------------  --------------------",
        "tensors  21 tensors           0",
        "logits   128 positions at     2.5e-06 (logits up",
        "         tensor 2, pipeline   to 4.21)",
        "         1",
    ]


@pytest.mark.parametrize("indent", [0, 2])
def test_nothing_is_cut_at_any_width(indent):
    cells = [*LINES, ("NVIDIA apex" + 9 * " ", "missing", "not installed\n-> https://github.com/NVIDIA/" + 60 * "x")]
    wanted = Counter("".join("".join([*HEADER, *map("".join, cells)]).split()))
    for width in range(1, 120):
        text = render_table(HEADER, cells, width=width, indent=indent)
        body = "\n".join(line for line in text.splitlines() if line.strip("- "))
        assert Counter("".join(body.split())) == wanted, width
        assert max(map(len, text.splitlines())) <= max(width, indent + 30)


def test_without_a_header_and_indented():
    text = render_table((), [("torch", "ok", "2.8"), ("apex", "missing", "not installed\n-> get it")], indent=2)
    assert text.splitlines() == [
        "  torch  ok       2.8",
        "  apex   missing  not installed",
        "                  -> get it",
    ]


def test_cells_stand_as_they_are(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    (line,) = render_table((), [("[red]a[/red]", ":smile:", "None 1.5 'x'")]).splitlines()
    assert line == "[red]a[/red]  :smile:  None 1.5 'x'"


def test_no_lines():
    assert render_table((), []) == ""
    assert render_table(("a", "b"), []) == "a  b\n-  -"


@pytest.mark.parametrize(("terminal", "width"), [(True, 47), (False, None)])
def test_width_of_standard_output(monkeypatch, terminal, width):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "47")
    assert stdout_width() == width


def test_rich_is_loaded_with_the_first_table():
    program = "import sys, exo_megatron.utils.tables; print(sorted({'rich', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"

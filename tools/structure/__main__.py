"""Count obstacles for a newcomer: files on the way to the loss, words with two meanings,
docstrings.

    python -m tools.structure [--root CHECKOUT] [--json FILE] [--details]

Counts in any checkout (default: this one), so that two commits can be compared. Parts that have to
be run use that checkout's code in this Python: `import` and one step of `align` of a tiny random
Llama.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tools.structure import text
from tools.structure.trace import trace_align
from tools.structure.walk import climbs

COUNTS = {
    "climbs of run_align:config": climbs,
    "function-level imports in cli/": text.function_level_imports,
    'identifiers with the word "row"': text.rows,
    "public names defined twice": text.defined_twice,
    "docstrings of functions that begin without a verb": text.without_a_verb,
    "docstrings of modules, classes and properties that are bare phrases": text.bare_phrases,
    "files in import circles": text.import_circles,
    "test functions": text.test_functions,
}


def main() -> int:
    """Print the counts of a checkout, and write them to a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2], help="checkout to count in")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    parser.add_argument("--details", action="store_true", help="list what is counted")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    found = {name: list(count(root)) for name, count in COUNTS.items()}
    traced = trace_align(root)
    counts = {
        "files entered before the first loss of `align`": len(set(traced["run"])),
        "files entered by a step before its loss": len(set(traced["step"])),
        "changes of file in that step": sum(a != b for a, b in zip(traced["step"], traced["step"][1:], strict=False)),
        **{name: len(items) for name, items in found.items()},
        "lines of the longest file": text.longest_file(root),
        "lines of the longest function": text.longest_function(root),
    }
    if arguments.details:
        for name, items in {**{name: list(dict.fromkeys(files)) for name, files in traced.items()}, **found}.items():
            print(f"--- {name}", *items, sep="\n")
    for name, number in counts.items():
        print(f"{number:6}  {name}")
    if arguments.json:
        arguments.json.write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

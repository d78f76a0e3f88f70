from __future__ import annotations

import sys
from pathlib import Path

# As examples/frontier/run.sh does with PYTHONPATH.
sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

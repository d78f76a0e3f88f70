"""`python -m exo_megatron` is the command `exo-megatron`, for launchers that start Python."""

from __future__ import annotations

import sys

from exo_megatron.cli.main import main

# megatron-core's checkpoint writer spawns helper processes, which import this module again under another name.
if __name__ == "__main__":
    sys.exit(main())

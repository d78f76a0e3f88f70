"""One command that checks correctness and speed on this machine's devices: `doctor --gpu`."""

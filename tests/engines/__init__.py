"""Real engines on a CPU: their environments, tiny checkpoints, and the harness that loads them."""

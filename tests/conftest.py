"""Settings of the whole suite, made before jax is imported."""

import os

# Interpreted kernels park one CPU thread per warpgroup; with fewer threads than warpgroups they would deadlock.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("PJRT_NPROC", "16")
# No test logs to a server.
os.environ.setdefault("WANDB_MODE", "disabled")

"""Settings of the whole suite, made before jax is imported."""

import os

# Interpreted kernels park one CPU thread per warpgroup; with fewer threads than warpgroups they would deadlock.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("PJRT_NPROC", "16")
# The suite asks for few floating-point surprises and no network.
os.environ.setdefault("WANDB_MODE", "disabled")

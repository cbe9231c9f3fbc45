"""Settings of the whole suite, made before jax is imported."""

import os

import pytest

GPU = os.path.exists("/dev/nvidiactl")
# Interpreted kernels park a CPU thread per warpgroup; with fewer threads than warpgroups they deadlock.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("PJRT_NPROC", "16")
# Lets kernels be compiled ahead of time where the CUDA plugin is installed without CUDA's libraries.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
# No test logs to a server.
os.environ.setdefault("WANDB_MODE", "disabled")
# Half of the suite's time is LLVM's; unoptimised code computes the same. (On a GPU it would slow kernels.)
if not GPU:
    flag = "--xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))

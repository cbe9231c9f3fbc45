"""Settings of the whole suite, made before jax is imported."""

import os
import tempfile

import pytest

from tests.flags import FAST

GPU = os.path.exists("/dev/nvidiactl")
# Interpreted kernels park a CPU thread per warpgroup; with fewer threads than warpgroups they deadlock.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("PJRT_NPROC", "16")
# Lets kernels be compiled ahead of time where the CUDA plugin is installed without CUDA's libraries.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
# No test logs to a server.
os.environ.setdefault("WANDB_MODE", "disabled")
# Most of the suite's time is XLA's, and quickly compiled code computes the same. (On a GPU it slows kernels.)
if not GPU:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST}".strip()
# Many tests train the same tiny models: workers and child processes compile each once, and inherit this.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The glob of a module's own text files."""
    from tests import tiny

    return tiny.write_text(tmp_path_factory.mktemp("text"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))

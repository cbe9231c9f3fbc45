"""XLA's flags for programs that are compiled once and run a few times; a process with eight devices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# The older code generator takes a third of the newer one's time. jax 0.12 lacks it and ignores the option.
# A program is not cut into parts to be compiled side by side: the suite's processes keep every core busy.
FAST = (
    "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_parallel_codegen_split_count=1"
)


def on_eight_devices(module: str, *arguments: object) -> Any:
    """What ``python -m module`` prints last, JSON, where a CPU stands for eight devices."""
    flags = f"--xla_force_host_platform_device_count=8 {FAST}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])

"""Stands in for `launch.worker` in tests of the queue: the same files, no JAX, a hundred steps a second.

A run whose seed is 13 fails at its fifth step, one of seed 66 is killed there, one of seed 77 between its
last line and its last checkpoint; FIXED=1 mends them.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hybridlm.run import seal


def die_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


threading.Thread(target=die_with_parent, daemon=True).start()
for folder in [Path(name) for name in sys.argv[1:] if not name.startswith("--")]:
    train = json.loads((folder / "point.json").read_text())["train"]
    (folder / "error.txt").unlink(missing_ok=True)
    path = folder / "metrics.jsonl"
    start = len(path.read_text().splitlines()) if path.exists() else 0
    start = min(start, train["steps"] - 1)  # its last checkpoint is its only one
    if path.exists():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:start]))
    with (folder / "starts.txt").open("a") as starts:
        starts.write(f"{os.getpid()} {start}\n")
    with path.open("a", buffering=1) as file:
        for step in range(start + 1, train["steps"] + 1):
            time.sleep(0.01)
            if step == 5 and not os.environ.get("FIXED"):
                if train["seed"] == 13:
                    (folder / "error.txt").write_text("several lines\nRunError: loss is nan\n")
                    print(f"Traceback in {Path.home()}/x.py", flush=True)
                    sys.exit(1)
                if train["seed"] == 66:
                    print(f"{Path.home()}/libtpu.so: not there\nout of memory", flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
            line = {
                "step": step,
                "loss": 4.0 - step / 100,
                "tokens_per_second": 100.0,
                "val_loss": 1.0,
                "val_accuracy": 0.5,
            }
            file.write(json.dumps(line) + "\n")
    if train["seed"] == 77 and not os.environ.get("FIXED"):
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoint = folder / "checkpoints" / str(train["steps"])
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "array").write_text("weights")
    seal.write(checkpoint)

"""Peak memory of an import and an export, beside the sizes of the checkpoint, a shard and a layer.

    python benchmarks/convert_memory.py --layers=24 --d_model=1024

Writes a random Qwen3 checkpoint in float32 to a temporary folder, and runs each command in a process of its
own that is sampled from outside: anonymous memory (RssAnon) is what the command holds; file pages can be
dropped at any time. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hybridlm import model
from hybridlm.convert import families, tensors
from hybridlm.convert.fields import Fields

SHARD = 200 * 10**6


def write_checkpoint(folder: Path, layers: int, d_model: int) -> dict[str, tensors.Planned]:
    values = {
        "model_type": "qwen3", "hidden_size": d_model, "intermediate_size": 3 * d_model, "vocab_size": 32_000,
        "num_hidden_layers": layers, "num_attention_heads": d_model // 64,
        "num_key_value_heads": d_model // 64, "head_dim": 64,
    }  # fmt: skip
    family = families.FAMILIES["qwen3"]
    definition = model.build(family.read(Fields(values)).config())
    shapes = families.plan(definition, family, values).shapes
    planned = tensors.shards([(name, "F32", shape) for name, shape in shapes.items()], SHARD)
    rng = np.random.default_rng(0)
    tensors.write(folder, planned, lambda name: rng.standard_normal(shapes[name], np.float32))
    (folder / "config.json").write_text(json.dumps(values))
    return planned


def peak(*command: str) -> tuple[int, float]:
    """(bytes of anonymous memory at most, seconds) of a converter command."""
    began, highest = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "hybridlm.convert", *command], stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        sizes = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
        highest = max([highest, *(1024 * size for size in sizes)])
        time.sleep(0.01)
    assert process.wait() == 0, command
    return highest, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--d_model", type=int, default=1024)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        theirs, run, again, tiny = (Path(scratch) / name for name in ("theirs", "run", "again", "tiny"))
        theirs.mkdir()
        tiny.mkdir()
        planned = write_checkpoint(theirs, given.layers, given.d_model)
        write_checkpoint(tiny, 1, 64)
        layer = sum(one.nbytes for name, one in planned.items() if ".layers.0." in name)
        base, _ = peak("import", f"--hf={tiny}", f"--workdir={scratch}/tinyrun")
        show = lambda what, size: print(f"{what:28} {size / 1e6:8.0f} MB")
        show("checkpoint", sum(one.nbytes for one in planned.values()))
        show("shard, at most", SHARD)
        show("largest tensor", max(one.nbytes for one in planned.values()))
        show("layer", layer)
        show("import of a tiny model, peak", base)
        for what, command in (
            ("import", ("import", f"--hf={theirs}", f"--workdir={run}")),
            ("export", ("export", f"--workdir={run}", f"--hf={again}")),
        ):
            size, seconds = peak(*command)
            show(f"{what}, peak in {seconds:.0f} s", size)


if __name__ == "__main__":
    main()

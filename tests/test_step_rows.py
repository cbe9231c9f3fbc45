"""Measurements in processes of their own, and the rows that docs/step.md has."""

import itertools
import json

import pytest

from benchmarks import gpu_profile, jobs, step_rows
from hybridlm import config as configs
from hybridlm import fit, model

SCRIPT = """
import json, os, sys, time
from benchmarks import jobs
jobs.wait()
began = time.time()
time.sleep(0.2)
print(json.dumps({"began": began, "ended": time.time(), "cache": os.environ["JAX_COMPILATION_CACHE_DIR"]}))
"""


@pytest.mark.once
def test_jobs_are_timed_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "LOCK", tmp_path / "lock")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    commands = {name: ["-c", SCRIPT] for name in "abc"} | {"bad": ["-c", "import sys; sys.exit(3)"]}
    found = jobs.run(commands, 4, (False, True))
    assert list(found) == [*"abc", "bad"] and found.pop("bad") == {"error": "ended: 3"}
    spans = sorted((row["began"], row["ended"]) for row in found.values())
    assert all(one[1] <= later[0] for one, later in itertools.pairwise(spans))
    assert len({row["cache"] for row in found.values()}) == 1
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(one["name"] for one in said) == ["a", "b", "bad", "c"]


@pytest.mark.parametrize("name", step_rows.ROWS)
def test_rows_are_configs(name):
    config = step_rows.resolved(name, {"train.xla_triton": "none"})
    definition = model.build(config)
    assert len(definition.layers) == 24 and config.train.xla_triton == "none"
    tokens = config.train.batch_size * config.train.seq_len
    assert tokens == (65536 if "jla" in name or "65536" in name else 32768)
    assert definition.model.remat in ("auto", *fit.UNROLLED)
    if name.startswith("jla"):  # heads of 128, as many as the width holds
        assert vars(config.mixers["gdn" if "gdn" in name else "kda"]).items() >= {
            ("num_heads", 16), ("head_dim", 128)
        }  # fmt: skip
    assert configs.resolve(config) == config


def test_groups_add_up():
    rows = [
        ("nvjet_gemm", 2, 3.0),
        ("loop_fusion", 1, 2.0),
        ("nvjet_gemm_b", 1, 1.0),
        ("delta_output", 1, 4.0),
    ]
    assert gpu_profile.groups(rows) == {
        "matrix products": 4.0, "element-wise and reductions": 2.0, "recurrence": 4.0
    }  # fmt: skip
    assert gpu_profile.table(rows).splitlines()[0] == "    10.00 ms on the GPU"

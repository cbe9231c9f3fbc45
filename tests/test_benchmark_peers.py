"""What benchmarks/kernels.py and first_call.py are asked and what they draw: no kernels, no GPU."""

import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))  # as Python does with a script
    return importlib.import_module


@pytest.mark.once
def test_rows_of_training(script):
    """Float32 log-decays in documents that no chunk divides: bytes of them, names, dtypes, who refuses."""
    kernels, peers = script("kernels"), script("peers")
    rows = [index for index, shape in enumerate(kernels.SHAPES) if shape.decay == "float32"]
    assert rows == [len(kernels.SHAPES) - 2, len(kernels.SHAPES) - 1]  # older numbers keep their shapes
    shapes = [kernels.SHAPES[index] for index in rows]
    assert [shape.gates for shape in shapes] == ["slow", "steep"] and shapes[0].document % 64
    assert all(kernels.TAKES[index] == ("kda", "gla") for index in rows)
    assert str(shapes[0]) == "8 4096 16 128 slow float32 decays documents of 517"
    gates = np.array([3e12, 3e12]) / 1e3 * (np.array(kernels.floor_ms("gla", shapes[0])))
    gates -= np.array([3e12, 3e12]) / 1e3 * kernels.floor_ms("gla", shapes[0]._replace(decay="bfloat16"))
    np.testing.assert_allclose(
        gates, 2 * 8 * 4096 * 16 * 128 * np.array([1, 3]), rtol=1e-6
    )  # in; in, in, out
    x = peers.Jax("ours").draw("kda", shapes[0]._replace(batch=1, tokens=1040, heads=1, value_heads=1))
    assert (x["g"].dtype, x["k"].dtype, x["beta"].dtype) == ("float32", "bfloat16", "bfloat16")
    assert np.bincount(np.asarray(x["segment_ids"][0])).tolist() == [517, 517, 6]
    with pytest.raises(ValueError, match="ours only"):
        peers.Jax("jla").draw("kda", shapes[0]._replace(batch=1))


@pytest.mark.once
@pytest.mark.parametrize("op", ["kda", "gated_deltanet", "deltanet"])
def test_cases(script, op):
    """Errors are looked at where gates are steep and where all keys are one."""
    peers = script("peers")
    inputs = {case: peers.exact_inputs(op, case) for case in peers.CASES}
    assert list(inputs) == ["plain", "hard", "steep", "equal"]
    equal = inputs["equal"]["k"]
    assert (equal == equal[:, :1]).all() and not (inputs["steep"]["k"] == equal).all()
    assert [x["beta"].max() > 1 for x in inputs.values()] == [False, True, False, True]
    if op != "deltanet":
        mean = {case: x["g"].mean() for case, x in inputs.items()}
        assert mean["hard"] < mean["plain"] < mean["equal"] < 0 and abs(mean["steep"] + 2.5) < 0.1
        assert all(x["g"].dtype == np.float32 for x in inputs.values())
        assert op != "kda" or min(x["g"].min() for x in inputs.values()) >= -5


@pytest.mark.once
def test_first_call(script, capsys):
    first, peers = script("first_call"), script("peers")
    args = first.parsed(["--peers=ours,xla", "--shape=4"])
    assert (args.op, args.peers, args.shape, args.runs) == ("kda", ["ours", "xla"], "4", 2)
    with pytest.raises(SystemExit):
        first.parsed(["--peers=ours,nobody"])
    assert "unknown: nobody; known: ours, triton, xla, jla" in capsys.readouterr().err
    row = first.measure("xla", "gla", peers.square(1, 64, 1, 8))
    assert row["all"] == pytest.approx(sum(row[stage] for stage in first.STAGES), rel=1e-6)
    lines = first.table([{"peer": "xla"} | row]).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and lines[-1].startswith("| xla | ")

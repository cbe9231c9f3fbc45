"""benchmarks.scaling on simulated devices, and a run of 8 devices that goes on with fewer."""

import jax
import numpy as np
import pytest

from benchmarks import scaling
from tests.flags import on_eight_devices
from tests.scaling_runs import SAVED, STEPS


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    return on_eight_devices("tests.scaling_runs", tmp_path_factory.mktemp("scaling"))


@pytest.mark.slow
def test_every_mesh_computes_what_one_device_does(eight):
    one, *others = eight["rows"]
    assert (one["mesh"], one["devices"], one["of_linear"]) == ("one", 1, 1.0) and one["communication"] == 0
    assert [row["mesh"] for row in others] == ["fsdp+tensor", "fsdp+context"]
    for row in others:
        assert row["loss_difference"] < 1e-5 and 0 < row["communication"] < 1
        assert row["of_linear"] == pytest.approx(row["tokens_per_second"] / (4 * one["tokens_per_second"]))
        assert 0 < row["planned_gib"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["2", "1"])
def test_a_run_of_eight_devices_goes_on_with_fewer(eight, devices):
    whole, resumed = eight["losses"]["8"], eight["losses"][devices]
    assert len(whole) == STEPS and resumed[:SAVED] == whole[:SAVED]
    np.testing.assert_allclose(resumed, whole, rtol=1e-5)
    assert whole[-1] < whole[0]


@pytest.mark.parametrize(
    ("mesh", "devices", "wanted"),
    [("data", 8, (8, 1, 1, 1)), ("fsdp+tensor", 8, (1, 4, 2, 1)), ("fsdp+context", 2, (1, 1, 1, 2))],
)
def test_sizes(mesh, devices, wanted):
    assert tuple(scaling.sizes(mesh, devices).values()) == wanted
    assert scaling.sizes("fsdp+tensor", 3) is None


def test_time_is_counted_once():
    assert scaling.covered([(3, 5), (0, 2), (1, 2.5), (4, 4.5)]) == 4.5 and scaling.covered([]) == 0


def test_what_does_not_fit_is_a_row():
    def fail():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")

    row = {"mesh": "data", "devices": 2} | scaling.attempt(fail)
    assert "| data | 2 | RESOURCE_EXHAUSTED: Out of memory |" in scaling.table([row])

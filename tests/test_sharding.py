import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hybridlm import config as configs
from hybridlm import model, schema, sharding
from hybridlm.errors import ConfigError
from tests.flags import on_eight_devices

MESH = {"data": 2, "fsdp": 4, "tensor": 2}


def test_spec_follows_the_rules():
    assert sharding.spec(("embed", "heads"), (8, 6), MESH) == PartitionSpec(("fsdp",), ("tensor",))
    stacked = sharding.spec((None, None, "mlp", "embed"), (3, 2, 4, 8), MESH)
    assert stacked == PartitionSpec(None, None, ("tensor",), ("fsdp",))
    assert sharding.spec(("batch", None, None), (8, 5, 5), MESH) == PartitionSpec(
        ("data", "fsdp"), None, None
    )
    assert sharding.spec(("taps", "heads"), (4, 8), MESH) == PartitionSpec(None, ("tensor",))


def test_a_mesh_axis_is_used_once():
    assert sharding.spec(("embed", "embed"), (8, 8), MESH) == PartitionSpec(("fsdp",), None)
    assert sharding.spec(("batch", "embed"), (8, 8), MESH) == PartitionSpec(("data", "fsdp"), None)


def test_what_does_not_divide_stays_whole_and_is_said_once(caplog):
    with caplog.at_level(logging.WARNING, "hybridlm"):
        for _ in range(2):
            assert sharding.spec(("vocab", "embed"), (257, 8), MESH, "head") == PartitionSpec(None, ("fsdp",))
    assert [record.getMessage() for record in caplog.records] == [
        "head: axis 'vocab' of 257 is not divisible by 2 (('tensor',)); it stays whole"
    ]


@pytest.mark.once
def test_every_axis_of_every_mixer_has_a_rule():
    config = configs.default()
    config.model.update(pattern=" ".join(config.mixers), d_model=1024)
    config.data = configs.data("text", path="python-stdlib:")
    metadata = model.metadata(model.build(configs.resolve(config)))
    metas = jax.tree.leaves(metadata, is_leaf=lambda leaf: isinstance(leaf, model.Meta))
    assert {axis for meta in metas for axis in meta.axes} - {None} <= sharding.RULES.keys()


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (6, 1, 1)), ((1, -1, 2), (1, 3, 2)), ((3, 2, 1), (3, 2, 1)), ((1, 1, 1), (1, 1, 1))],
)
def test_mesh_sizes(sizes, shape):
    devices = jax.devices() * 6  # one device six times over: only the sizes are looked at
    mesh = sharding.make_mesh(schema.Mesh(*sizes), devices)
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    ("sizes", "field"), [((-1, 4, 1), "mesh.data"), ((2, 4, 1), "mesh = "), ((1, 7, -1), "mesh.tensor")]
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, field):
    with pytest.raises(ConfigError, match=field):
        sharding.make_mesh(schema.Mesh(*sizes), jax.devices() * 6)


def test_everything_is_inert_without_a_mesh():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, ("batch", None)) is x
    fn = lambda *args: args
    assert sharding.per_shard(fn, (("batch", None), None), (("batch", None), None))(x, None) == (x, None)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """What mesh_runs.py found on 8 simulated devices."""
    return on_eight_devices("tests.mesh_runs", tmp_path_factory.mktemp("eight"))


def test_every_mesh_gives_the_curve_of_one_device(eight):
    one = np.array(eight["losses"]["(1, 1, 1)"])
    assert one[-1, 0] < one[0, 0]
    assert len(eight["losses"]) == 3
    for mesh, losses in eight["losses"].items():
        np.testing.assert_allclose(losses, one, rtol=2e-5, err_msg=mesh)


def test_a_student_and_its_teacher_learn_on_a_mesh_what_they_do_on_one_device(eight):
    """Every term of the objective; the teacher's parameters are cut as a model's are."""
    one, other = eight["distilled"].values()
    assert one["losses"][-1][0] < one["losses"][0][0] and one["sums"].keys() > {
        "kl_loss_sum",
        "weights_loss_sum",
    }
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=2e-5)
    np.testing.assert_allclose([*other["sums"].values()], [*one["sums"].values()], rtol=2e-5)
    assert [one["embedding"], other["embedding"]] == eight["embedding_shards"][::2]


def test_a_checkpoint_of_one_mesh_restores_on_another(eight):
    assert eight["restored"] == [True, True]


def test_parameters_and_moments_are_really_cut(eight):
    assert eight["embedding_shards"] == [[260, 16], [260, 4], [130, 4]]
    assert eight["moments_alike"] == [[True, True]] * 3


@pytest.mark.parametrize(("sizes", "shard"), [("8,4", [2, 2]), ("8,3", [2, 3]), ("1,4", [1, 2])])
def test_per_shard_is_the_function_itself(eight, sizes, shard):
    assert eight["shards"][sizes] == shard
    assert eight["errors"][sizes] < 1e-5


def test_products_in_8_bits_have_one_scale_over_all_devices(eight):
    assert eight["scaled product"] < 1e-5


@pytest.mark.parametrize("axis", ["heads", "None"])
def test_kernels_gradients_are_added_up_over_devices_in_float32(eight, axis):
    """Each device's part of the sum leaves its product unrounded."""
    assert eight["product"][axis]["dots"]["16x8"] == "f32"
    assert eight["product"][axis]["error"] < 2**-7


def test_the_loss_gathers_the_head_once(eight):
    """In chunks and in blocks of ids: the same as on one device, the head's collectives not in the loops."""
    for found in eight["loss"]:
        assert found["error"] < 5e-6
        assert (found["all-gather outside"], found["reduce-scatter outside"]) == (1, 1)
        assert (found["all-gather inside"], found["reduce-scatter inside"]) == (0, 0)


def test_what_is_left_of_the_devices_has_an_axis():
    assert schema.Mesh(-1, 2, 2).over(8) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert schema.Mesh(-1, 8, 1).over(1) == {"data": 1, "fsdp": 8, "tensor": 1}

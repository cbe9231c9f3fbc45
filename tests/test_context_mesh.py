"""Sequences cut over devices (`mesh.context`) against whole ones, on simulated devices."""

import re

import jax
import numpy as np
import pytest

from hybridlm import ahead, cost
from hybridlm import config as configs
from hybridlm.errors import ConfigError
from tests import tiny
from tests.flags import on_eight_devices


@pytest.fixture(scope="module")
def eight():
    parts = ["errors", "steps", "resumed", "facts", "whole", "decoding"]
    return on_eight_devices("tests.context_runs", *parts)


@pytest.mark.slow
def test_every_part_is_that_of_one_device_with_its_gradients(eight):
    assert len(eight["errors"]) == 19
    assert max(eight["errors"].values()) < 1e-4, eight["errors"]


@pytest.mark.slow
def test_a_stack_trains_as_on_one_device(eight):
    """Packed rows over borders, accumulation, remat, scan, fsdp, tensor; from another mesh's parameters."""
    one, *others = eight["steps"].values()
    assert one[1]["loss"] < one[0]["loss"]
    for found in others:
        for a, b in zip(one, found, strict=True):
            np.testing.assert_allclose([b["loss"], b["accuracy"]], [a["loss"], a["accuracy"]], rtol=2e-6)
            np.testing.assert_allclose(
                b["grad_norm"], a["grad_norm"], rtol=1e-4
            )  # Adam divides rounding, too
            for name, norms in a["norms"].items():
                np.testing.assert_allclose(b["norms"][name], norms, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_checkpoint_goes_on_over_any_number_of_pieces(eight):
    """Of context 2, then 4, then 1; the losses of one device."""
    found = eight["resumed"]
    assert found["whole"][-1] < found["whole"][0]
    np.testing.assert_allclose(found["resumed"], found["whole"], rtol=2e-6)


@pytest.mark.slow
def test_a_cache_is_cut_and_decodes_as_a_whole_one(eight):
    """Packed rows and single prompts, read in chunks; keys, values and latents, shared ones, windows."""
    one, *others = eight["decoding"].values()
    assert np.std(one["logits"]) > 1e-2
    assert one["long"]
    for found in others:
        np.testing.assert_allclose(found["logits"], one["logits"], atol=1e-5)
        assert found["tokens"] == one["tokens"]
        assert found["long"] == []  # no device has a whole one


@pytest.mark.slow
def test_imbalance_of_attention(eight):
    facts, steps = eight["facts"], eight["steps"]
    assert facts["one document"] == pytest.approx(1, abs=1e-3)
    assert facts["window"] == pytest.approx(1, rel=1e-3)
    assert facts["a quarter"] == pytest.approx(3, rel=1e-2)
    assert "attention_imbalance" not in steps["one"][0]
    assert steps["fsdp 2, tensor 2, context 2"][0]["attention_imbalance"] > 1


@pytest.mark.slow
def test_no_device_has_a_whole_row(eight):
    """Neither keys and values nor logits."""
    assert eight["whole"] == []


@pytest.mark.slow
def test_bytes_sent(eight):
    """Five times an all-gather of 8 x 16 float32 over four devices."""
    assert eight["facts"]["sent"] == {"all-gather": 5 * 8 * 64 * 4 * 3 / 4}


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        (
            "((bf16[8,32]{1,0}), bf16[32,32]{1,0}) all-gather-start(%x), replica_groups=mesh['a'=4] {'a'}",
            1536,
        ),
        ("(bf16[8,32], bf16[32,32]) all-gather-start(%x), replica_groups={{0,1,2,3}}", 1536),
        ("(f32[64], f32[16]) reduce-scatter-start(%x), replica_groups={{0,1,2,3}}", 192),
        (
            "((f32[32], f32[8]), (f32[8], f32[2])) reduce-scatter-start(%x, %y), replica_groups=[2,4]<=[8]",
            120,
        ),
        ("((bf16[64]), bf16[64]) all-reduce-start(%x), replica_groups=mesh['a'=2,'b'=4] {'a'}", 128),
        ("bf16[64]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 224),
    ],
)
def test_bytes_of_a_collective_in_the_forms_that_xla_has_written_it(line, sent):
    """Of S bytes over n devices (n-1)/n S, an all-reduce twice that."""
    assert ahead.sent(f"ENTRY %main (x: f32[1]) -> f32[1] {{\n  %one = {line}\n}}") == {
        re.search("all-gather|all-reduce|reduce-scatter", line)[0]: sent
    }


@pytest.mark.parametrize(
    ("groups", "devices", "seconds"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]], 1 / 9),
        ("source_target_pairs={{0,1},{7,8}}", [[0, 1], [7, 8]], 1),  # one of them over the network
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]], 1 / 9),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]], 1 / 9),
        ("replica_groups=mesh['a'=1,'b'=8] {'b':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]], 1 / 9),
        ("replica_groups=mesh['a'=2,'b'=8] {'a','b'}", [list(range(16))], 1 / 8),  # eight cards a host
        ("replica_groups=mesh['a'=2,'b'=8] {'a'}", [[i, i + 8] for i in range(8)], 1),
    ],
)
def test_who_exchanges_and_what_the_links_take(groups, devices, seconds):
    """50 GB, over NVLink at 450 GB/s in a host of eight and over a card of 50 GB/s a GPU between hosts."""
    found = ahead._groups(f"%x = f32[8] all-gather(%y), {groups}, use_global_device_ids=true")
    assert found.tolist() == devices
    assert ahead._seconds(50e9, found) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"mesh.context": "3"}, "train.seq_len = .*multiple of 2 \\* mesh.context = 6"),
        ({"mesh.context": "0"}, "mesh.context = 0: must be at least 1"),
        ({"mesh.context": "-1"}, "only one mesh axis"),
    ],
)
def test_what_cannot_be_cut_is_refused(overrides, problem):
    with pytest.raises(ConfigError, match=problem):
        configs.resolve(configs.load("configs/quickstart.py", overrides))


@pytest.mark.parametrize("devices", ["h100", "h100:0", "h100:12", "a100:8", "h100:8 "])
def test_devices_that_cannot_be_compiled_for(devices):
    with pytest.raises(ConfigError, match="--devices"):
        ahead.parse(devices)


def test_a_step_with_a_teacher_is_what_is_compiled(tmp_path, monkeypatch):
    """Traced for a device that is there: its inputs are the state, the batch and the teacher's parameters."""
    text, teacher = tiny.write_text(tmp_path), tmp_path / "teacher"
    attention = configs.resolve(tiny.config(text, model__pattern="full*2"))
    (teacher / "checkpoints").mkdir(parents=True)
    (teacher / "config.json").write_text(configs.to_json(attention))
    student = tiny.config(text)
    student.objective = configs.objective("distil", teacher=str(teacher))
    monkeypatch.setattr(ahead, "absent", lambda devices: jax.devices()[:1])
    monkeypatch.setattr(ahead, "_compiled", lambda traced, most: traced)
    _, traced = ahead.compiled_step(configs.resolve(student), "h100:1")
    (_, _, taught), _ = traced.in_avals
    assert sum(leaf.size for leaf in jax.tree.leaves(taught)) == cost.parameters(attention)

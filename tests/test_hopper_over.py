"""The Hopper kernels on pieces of a row on two devices, which take turns here, against the whole row."""

import dataclasses
import functools

import hopper_aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

if hopper_aot.NO_KERNELS:
    pytest.skip(hopper_aot.NO_KERNELS, allow_module_level=True)

import test_hopper_backward as heads
import test_hopper_channel_backward as channels

from pallas_kernels.linear_attention import hopper, xla
from pallas_kernels.linear_attention.hopper.backward import gradients
from pallas_kernels.linear_attention.hopper.channel import channel_forward
from pallas_kernels.linear_attention.hopper.forward import forward_pass
from pallas_kernels.linear_attention.hopper.inputs import prepare
from pallas_kernels.linear_attention.hopper.table import Choice
from pallas_kernels.linear_attention.op import normalize
from pallas_kernels.linear_attention.pieces import summarize

AXIS = "context"


class Gathers:
    """`lax.all_gather` of two devices that run one after the other: what the other sent the last time."""

    def __init__(self, monkeypatch):
        self.device, self.calls, self.sent = 0, 0, {}
        monkeypatch.setattr(lax, "all_gather", self.gather)
        index = lax.axis_index  # the kernels' own
        monkeypatch.setattr(lax, "axis_index", lambda axis: self.device if axis == AXIS else index(axis))

    def turn(self, device):
        self.device, self.calls = device, 0

    def gather(self, x, axis):
        assert axis == AXIS
        self.sent[self.device, self.calls] = x
        both = [self.sent.get((device, self.calls), jnp.zeros_like(x)) for device in range(2)]
        self.calls += 1
        return jnp.stack(both)


def by_head(call, do, pieces):
    inputs, choice = prepare(call), Choice(64, pieces)
    out, saved = forward_pass(inputs, final=False, keep=True, choice=choice)
    return out.o, gradients(inputs, saved, do, None, choice)


def by_channel(call, do, pieces):
    inputs = prepare(call)
    out, saved = channel_forward(inputs, final=False, keep=True, choice=Choice(64, pieces))
    return out.o, gradients(inputs, saved, do, None, Choice(64))


CASES = {  # the run, its cases and their options, tokens, pieces of a device, whether the second one goes on
    "delta": (by_head, heads, dict(decay=0.1), 128, 1, True),
    "delta, a document at the border": (by_head, heads, dict(decay=0.1), 128, 1, False),
    "delta, pieces": (by_head, heads, dict(decay=0.1), 256, 2, True),
    "additive, pieces": (by_head, heads, dict(decay=0.1, delta=False, l2norm=False), 256, 2, True),
    "channel, delta": (by_channel, channels, dict(decay=0.1), 128, 1, True),
    "channel, additive": (by_channel, channels, dict(decay=0.1, delta=False, l2norm=False), 128, 1, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_devices_are_one(name, monkeypatch):
    run, cases, options, tokens, pieces, continues = CASES[name]
    call, do, d_state = cases.make_case(tokens=tokens, **options)
    call = dataclasses.replace(call, initial_state=jnp.zeros_like(call.initial_state))
    ids = np.ones((1, tokens), np.int32) if call.segment_ids is None else np.array(call.segment_ids)
    if not continues:
        ids[:, tokens // 2 :] += 1
    call = dataclasses.replace(call, segment_ids=jnp.asarray(ids - ids[:, :1]))
    expected = cases.expect(call, do, jnp.zeros_like(d_state))
    gathers, half = Gathers(monkeypatch), tokens // 2
    found = {}
    for turn in range(4):
        device = turn % 2
        at = lambda x, device=device: None if x is None else x[:, device * half : (device + 1) * half]
        piece = dataclasses.replace(
            call, **{n: at(getattr(call, n)) for n in ("q", "k", "v", "log_decay", "beta")},
            segment_ids=at(call.segment_ids) - at(call.segment_ids)[:, :1], initial_state=None,
            output_final_state=False, interpret=True, axis=AXIS,
            continues=jnp.asarray([[True], [bool(ids[0, half - 1] == ids[0, half])]]),
        )  # fmt: skip
        gathers.turn(device)
        found[device] = run(piece, at(do), pieces)
    error = cases.relative_error
    join = lambda a, b: np.concatenate([np.asarray(x, np.float64)[:, :half] for x in (a, b)], axis=1)
    assert error(join(found[0][0], found[1][0]), expected[0]) < 6e-3
    for field in ("q", "k", "v", "log_decay", "beta"):
        parts = [getattr(found[device][1], field) for device in range(2)]
        if parts[0] is not None:
            assert error(join(*parts), wanted(expected, field)) < 2e-2, field


def wanted(expected, field):
    return expected[2][{"log_decay": "g"}.get(field, field)]


@pytest.mark.slow
def test_wide_heads_are_summarised_by_the_kernels():
    """K = 256 has no pieces of its own: what a device does to the state is the kernels' final state."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    g, beta = (jnp.asarray(rng.uniform(*ends, (1, 64, 1)), jnp.float32) for ends in ((-0.1, 0), (0, 1)))
    ends = [jnp.asarray(rng.normal(size=(1, 1, 256, dim)), jnp.float32) for dim in (256, 64)]

    def summary(final_state, k, v, g, beta):
        call = normalize(k, k, v, log_decay=g, beta=beta, qk_l2norm=True, interpret=True)
        return tuple(summarize(call, final_state))

    def of(final_state, *arrays):
        found, pull = jax.vjp(functools.partial(summary, final_state), *arrays)
        return [*found, *pull(tuple(ends))]

    arrays = draw(1, 64, 1, 256), draw(1, 64, 1, 64), g, beta
    expected = of(xla.final_state, *(x.astype(jnp.float32) for x in arrays))
    for got, wanted_ in zip(of(hopper.final_state, *arrays), expected, strict=True):
        assert heads.relative_error(got, wanted_) < 1e-2

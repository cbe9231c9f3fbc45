"""What the kernels read: padded to whole chunks, the numbers per token laid out by XLA."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.call import Call, alike
from pallas_kernels.linear_attention.triton.tiles import BF16, F32, C, masks
from pallas_kernels.padding import pad_time, round_up

LEAST_DECAY = -104.0  # exp is 0 in float32; a larger step would drown the others in a chunk's sums


class Spec(NamedTuple):
    """What is static. channel: a decay per key channel; delta: the delta rule; sizes: by axis (`arrays`)."""

    channel: bool
    delta: bool
    scale: float
    l2norm: bool
    interpret: bool
    group: int
    sizes: dict[str, int]


class Inputs(NamedTuple):
    """T is a multiple of C.

    q, k: [B, T, H, K].  v: [B, T, HV, V].  steps: None or log-decays [B, T, HV, K] (per channel only).
    rows: by name, [B, HV, T] float32: `beta` (delta); with a decay per head `sum`, the log-decays added up
    from the chunk's start, `enter` and `leave`, the decay from the chunk's start and to its end.
    documents: None, or by name `id` [B, T] int32; `enter`, `leave` [B, T], 1 where a token is of the document
    that enters or leaves its chunk, else 0; `carry` [B, T/C], whether that is one document.
    masks: of `tiles.masks`, bf16 (per channel only).
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    steps: jax.Array | None
    rows: dict[str, jax.Array]
    documents: dict[str, jax.Array] | None
    masks: jax.Array | None = None


def spec(call: Call) -> Spec:
    delta = call.beta is not None
    (batch, length, heads, value_dim), key_dim = call.v.shape, call.q.shape[3]
    length = round_up(length, C)
    sizes = dict(B=batch, T=length, H=heads, N=length // C, C=C, K=key_dim, V=value_dim)
    return Spec(call.per_channel, delta, call.scale, call.qk_l2norm, call.interpret, call.group, sizes)


def prepare(call: Call) -> Inputs:
    """Tokens that pad change nothing: k = v = 0, no decay, the last document's."""
    length = round_up(call.q.shape[1], C)
    rows: dict[str, jax.Array] = {}
    if call.beta is not None:
        rows["beta"] = _head_major(call.beta, length)
    steps = None
    if call.log_decay is not None and call.per_channel:
        steps = pad_time(call.log_decay, length)
    documents = None if call.segment_ids is None else _documents(pad_time(call.segment_ids, length, "edge"))
    if steps is None and call.log_decay is not None:
        steps_BHT = jnp.maximum(_head_major(call.log_decay, length), LEAST_DECAY)
        chunks = steps_BHT.reshape(*steps_BHT.shape[:2], -1, C)
        sums = jnp.cumsum(chunks, axis=-1)
        after = sums[..., -1:] - sums
        rows |= {"sum": sums, "enter": jnp.exp(sums), "leave": jnp.exp(after)}
        rows = {name: x.reshape(*x.shape[:2], -1) for name, x in rows.items()}
    between = None if steps is None else jnp.asarray(masks(), BF16)
    q, k, v = (pad_time(x, length) for x in (call.q, call.k, call.v))
    return alike(Inputs(q, k, v, steps, rows, documents, between))


def _documents(id_BT: jax.Array) -> dict[str, jax.Array]:
    chunks = id_BT.reshape(id_BT.shape[0], -1, C)
    last = chunks[..., -1]
    entering = jnp.concatenate([id_BT[:, :1], last[:, :-1]], axis=1)
    per_token = lambda which: (chunks == which[..., None]).astype(F32).reshape(id_BT.shape)
    return {
        "id": id_BT,
        "enter": per_token(entering),
        "leave": per_token(last),
        "carry": (entering == last).astype(F32),
    }


def _head_major(x_BTH: jax.Array, length: int) -> jax.Array:
    return jnp.swapaxes(pad_time(x_BTH.astype(F32), length), 1, 2)


def unprepare(call: Call, d: Any, dstate: jax.Array) -> Call:
    """The gradients of the arguments from `backward.Gradients` and that of the initial state."""
    length, heads = call.q.shape[1:3]

    def keys(x_BTHK: jax.Array) -> jax.Array:
        x = x_BTHK[:, :length]
        return x.reshape(*x.shape[:2], heads, -1, x.shape[3]).astype(F32).sum(3) if call.group > 1 else x

    rows = lambda x_BHT: jnp.swapaxes(x_BHT, 1, 2)[:, :length]
    if call.log_decay is None:
        steps = None
    else:
        if d.steps is not None:
            steps = d.steps[:, :length]
        else:
            chunks = d.sum.reshape(*d.sum.shape[:2], -1, C)
            steps = rows(jnp.flip(jnp.cumsum(jnp.flip(chunks, -1), -1), -1).reshape(d.sum.shape))
        steps = jnp.where(call.log_decay <= LEAST_DECAY, 0.0, steps)
    return call.like(
        q=keys(d.q), k=keys(d.k), v=d.v[:, :length], log_decay=steps,
        beta=None if d.beta is None else rows(d.beta), initial_state=dstate,
    )  # fmt: skip

"""Problems for the tests of pallas_kernels, random and golden, and how far two answers are apart."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import linear_attention

GOLDEN = pathlib.Path(__file__).parent / "golden" / "ops"
DECAYS = ("none", "head", "channel")
UPDATES = ("additive", "delta")
B, H, HV, K, V = 2, 2, 4, 16, 24


def random_problem(seed, length, decay, update, kind, dtype=jnp.float32):
    """Inputs, exactly representable in ``dtype``, as float64 NumPy arrays; ``segment_ids`` is int32.

    kind: "mild" decays near 0; "mixed" draws every decay from 0 to -120; "strong" decays by -20 a token;
    "repeated" has one key for all tokens of a document. Some rows of q and k are all zero.
    """
    rng = np.random.default_rng(seed)
    x = {name: rng.normal(size=(B, length, H, K)) for name in ("q", "k")}
    x["v"] = rng.normal(size=(B, length, HV, V))
    x["initial_state"] = rng.normal(size=(B, HV, K, V))
    # Documents of 1 token and more, with few ids: neighbours differ, others may be equal.
    changes = rng.random((B, length)) < (0.2 if kind == "mixed" else 0.01)
    x["segment_ids"] = (np.cumsum(changes, axis=1) % 3).astype(np.int32)
    if kind == "repeated":
        x["k"] = np.broadcast_to(x["k"][:, :1], x["k"].shape).copy()
    for name in ("q", "k"):
        x[name][:, rng.integers(length)] = 0
    if decay != "none":
        shape = (B, length, HV) if decay == "head" else (B, length, HV, K)
        x["log_decay"] = {
            "mild": lambda: -0.1 * rng.exponential(size=shape),
            "mixed": lambda: rng.choice([0, 0, -1e-4, -0.05, -0.7, -3, -20, -40, -120], size=shape),
            "strong": lambda: np.full(shape, -20.0),
            "repeated": lambda: -1e-2 * rng.exponential(size=shape),
        }[kind]()
    if update == "delta":
        shape = (B, length, HV)
        x["beta"] = np.where(
            rng.random(shape) < 0.5, rng.uniform(0, 2, shape), rng.choice([0, 1, 2], size=shape)
        )
    round_trip = lambda a: a if a.dtype == np.int32 else np.asarray(jnp.asarray(a, dtype), np.float64)
    return {name: round_trip(a) for name, a in x.items()}


def golden_cases(*patterns):
    """(name, meta, inputs, expected) of the golden files; inputs keep their names q k v g beta h0 do dht."""
    for path in sorted(p for pattern in patterns for p in GOLDEN.glob(f"{pattern}.npz")):
        arrays = dict(np.load(path))
        meta = json.loads(str(arrays.pop("meta")))
        expected = {name: a for name, a in arrays.items() if a.dtype == np.float64}
        yield (
            f"{path.parent.name}/{path.stem}",
            meta,
            {n: a for n, a in arrays.items() if n not in expected},
            expected,
        )


def run(backend, qk_l2norm=False):
    """Jitted (inputs, cotangents of o and of the final state) -> all values and gradients by name."""

    def loss(floats, segment_ids, o_bar, state_bar):
        o, state = linear_attention(
            **floats, segment_ids=segment_ids, qk_l2norm=qk_l2norm, output_final_state=True, backend=backend
        )
        weighted = jnp.sum(o.astype(state.dtype) * o_bar) + jnp.sum(state * state_bar)
        return weighted, {"o": o, "final_state": state}

    def values_and_gradients(inputs, o_bar, state_bar):
        floats = {name: a for name, a in inputs.items() if name != "segment_ids"}
        grad = jax.grad(loss, has_aux=True)
        gradients, values = grad(floats, inputs.get("segment_ids"), o_bar, state_bar)
        return values | {f"d{name}": a for name, a in gradients.items()}

    return jax.jit(values_and_gradients)


def cast(inputs, dtype):
    """Arrays of ``dtype``; the initial state is never below float32."""
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    types = {"segment_ids": jnp.int32, "initial_state": wide}
    return {name: jnp.asarray(a, types.get(name, dtype)) for name, a in inputs.items()}


def relative_errors(got, want):
    """Norm of the difference over the norm of ``want``, by name."""
    assert got.keys() == want.keys()
    flat = {name: (np.float64(got[name]).ravel(), np.float64(want[name]).ravel()) for name in want}
    return {name: np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30) for name, (a, b) in flat.items()}

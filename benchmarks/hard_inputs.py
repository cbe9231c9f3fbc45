"""Errors of the kernels and of XLA against the float64 token loop, on inputs that are hard for chunks.

    python -m benchmarks.hard_inputs [--tokens 512] [--backends pallas,xla] [--key_dim 64] [--cases beta]

bf16 q, k, v, one head of K x 64, q and k normalised. A row of the table is an input and a backend: the
relative errors of o, the final state and each gradient (of fixed random gradients of o and of the state).
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import linear_attention

# name: decay (None, "head" or "channel"), gate, beta, keys ("random", "equal", "run" of 64 equal, a cosine)
CASES: dict[str, tuple[str | None, float, float, str | float]] = {
    "plain": ("head", -0.1, 0.5, "random"),
    "equal keys, beta 1.5": (None, 0.0, 1.5, "equal"),
    "equal keys, beta 1.9": (None, 0.0, 1.9, "equal"),
    "equal keys, beta 2": (None, 0.0, 2.0, "equal"),
    "a run of equal keys, beta 1.9": (None, 0.0, 1.9, "run"),
    "cosine 0.95, beta 1.9": (None, 0.0, 1.9, 0.95),
    "equal keys, beta 1.9, channels": ("channel", -1e-3, 1.9, "equal"),
    "one gate of -1e7": ("head", -1e7, 0.5, "random"),
    "one gate of -inf": ("head", -np.inf, 0.5, "random"),
    "one gate of -inf, channels": ("channel", -np.inf, 0.5, "random"),
    "steep gates, channels": ("channel", -5.0, 0.5, "random"),
}


def draw(case: str, tokens: int, key_dim: int = 64) -> dict[str, np.ndarray]:
    """Arguments, and gradients "o_bar" and "state_bar", as float32 that bf16 holds exactly where it must."""
    decay, gate, beta, keys = CASES[case]
    rng = np.random.default_rng(0)
    q, k, v, o_bar = (rng.normal(size=(1, tokens, 1, dim)) for dim in (key_dim, key_dim, 64, 64))
    if keys == "equal":
        k[:] = k[:, :1]
    elif keys == "run":
        k[:, 100:164] = k[:, 100:101]
    elif not isinstance(keys, str):
        k = keys**0.5 * k[:, :1] + (1 - keys) ** 0.5 * k
    rounded = {"q": q, "k": k, "v": v, "o_bar": o_bar}
    x = {n: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for n, a in rounded.items()}
    if decay is not None:
        shape = (1, tokens, 1) if decay == "head" else (1, tokens, 1, key_dim)
        x["log_decay"] = np.float32(rng.uniform(-0.1, 0, shape) if gate < -5 else np.full(shape, gate))
        if gate == -5:
            x["log_decay"] = np.float32(gate / (1 + np.exp(rng.normal(size=shape))))
        elif gate < -5:
            x["log_decay"][:, 20] = gate
    x["beta"] = np.full((1, tokens, 1), beta, np.float32)
    x["state_bar"] = np.float32(rng.normal(size=(1, 1, key_dim, 64)))
    return x


def results(x: dict[str, np.ndarray], backend: str, dtype: Any) -> dict[str, np.ndarray]:
    """o, the final state and the gradients, by name; ``dtype`` of q, k and v."""
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    arrays = {n: jnp.asarray(a, dtype if n in ("q", "k", "v", "o_bar") else wide) for n, a in x.items()}
    bars = arrays.pop("o_bar"), arrays.pop("state_bar")

    @jax.jit
    def run(arrays: dict[str, jax.Array], bars: tuple) -> dict[str, jax.Array]:
        attend = lambda a: linear_attention(**a, qk_l2norm=True, output_final_state=True, backend=backend)
        (o, state), pull = jax.vjp(attend, arrays)
        return {"o": o, "state": state} | {f"d{n}": d for n, d in pull(bars)[0].items()}

    return {n: np.asarray(a, np.float64) for n, a in run(arrays, bars).items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--backends", default="pallas,xla")
    parser.add_argument("--key_dim", type=int, default=64)
    parser.add_argument(
        "--cases", default="", help="only those whose names contain one of these, with commas"
    )
    args = parser.parse_args()
    names = ("o", "state", "dq", "dk", "dv", "dlog_decay", "dbeta")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.tokens} tokens, K = {args.key_dim}")
    print("| input | backend | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 2))
    for case in CASES:
        if not any(part in case for part in args.cases.split(",")):
            continue
        x = draw(case, args.tokens, args.key_dim)
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            want = results(x, "reference", jnp.float64)
        for backend in args.backends.split(","):
            got = results(x, backend, jnp.bfloat16)
            norm = np.linalg.norm
            errors = {n: norm(got[n] - want[n]) / max(norm(want[n]), 1e-30) for n in want}
            cells = (f"{errors[n]:.1e}" if n in errors else "" for n in names)
            print(f"| {case} | {backend} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

"""The peers of benchmarks/kernels.py: the same ops on the same inputs by ours, jla and fla, and in float64.

Peers are imported where they are used: a process holds one of them, and any may be missing.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gpu_profile
import numpy as np

OPS = ("kda", "gated_deltanet", "deltanet", "gla", "simple_gla")
CASES = {"plain": "usual", "hard": "usual", "steep": "steep", "equal": "slow"}  # gates of the inputs by name


class Shape(NamedTuple):
    """One problem.

    gates: of `log_decay`.  document: tokens in each, 0: one a row.  decay: the dtype of one per channel.
    """

    batch: int
    tokens: int
    heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    gates: str = "usual"
    document: int = 0
    decay: str = "bfloat16"

    def __str__(self) -> str:
        heads = str(self.heads) + f" ({self.value_heads})" * (self.value_heads != self.heads)
        dims = str(self.key_dim) + f" {self.value_dim}" * (self.value_dim != self.key_dim)
        rest = [self.gates] * (self.gates != "usual") + [f"{self.decay} decays"] * (self.decay != "bfloat16")
        rest += [f"documents of {self.document}"] * bool(self.document)
        return " ".join([str(self.batch), str(self.tokens), heads, dims, *rest])


def square(
    batch: int,
    tokens: int,
    heads: int,
    dim: int,
    gates: str = "usual",
    document: int = 0,
    decay: str = "bfloat16",
) -> Shape:
    return Shape(batch, tokens, heads, heads, dim, dim, gates, document, decay)


ACCURACY_SHAPE = square(1, 1024, 2, 128)


def channel(op: str) -> bool:
    return op in ("kda", "gla")


def delta(op: str) -> bool:
    return op in ("kda", "gated_deltanet", "deltanet")


def shapes_of(op: str, shape: Shape) -> dict[str, tuple[int, ...]]:
    tokens, numbers = (shape.batch, shape.tokens), (shape.batch, shape.tokens, shape.value_heads)
    keys, values = (*tokens, shape.heads, shape.key_dim), (*numbers, shape.value_dim)
    gates = {"g": (*numbers, shape.key_dim) if channel(op) else numbers, "beta": numbers}
    wanted = ("g",) * (op != "deltanet") + ("beta",) * delta(op)
    return {"q": keys, "k": keys, "v": values, "do": values} | {name: gates[name] for name in wanted}


def log_decay(x: Any, numpy: Any, op: str, gates: str) -> Any:
    """Of normal numbers x: logsigmoid(x), per channel at least -5; slow -exp(x - 3), steep -5 sigmoid(x).

    numpy: the module of x's array type, jax.numpy or torch.
    """
    if gates == "slow":
        return -numpy.exp(x - 3)
    if gates == "steep":
        return -5 / (1 + numpy.exp(-x))
    steps = -numpy.log1p(numpy.exp(-x))
    return numpy.clip(steps, -5, None) if channel(op) else steps


def exact_inputs(op: str, case: str) -> dict[str, np.ndarray]:
    """float32 numpy of ACCURACY_SHAPE: q, k, v, do, and g, beta where the op has them."""
    rng = np.random.default_rng(0)
    x: dict[str, Any] = {
        n: rng.standard_normal(s, np.float32) for n, s in shapes_of(op, ACCURACY_SHAPE).items()
    }
    if "g" in x:
        x["g"] = log_decay(x["g"], np, op, CASES[case])
        if case == "hard":
            x["g"][:, ::8] -= 5 if channel(op) else 20
        if channel(op):
            x["g"] = np.maximum(x["g"], -5)
    if case == "equal":
        x["k"][:] = x["k"][:, :1]
    if "beta" in x:
        x["beta"] = (1 + (case in ("hard", "equal"))) / (1 + np.exp(-x["beta"]))
    if not delta(op):
        x["k"] *= ACCURACY_SHAPE.key_dim**-0.5
    return x


def median_ms(run: Callable[[], Any], wait: Callable[[Any], Any], groups: int = 5) -> float:
    def group(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = run()
        wait(out)
        return (time.perf_counter() - start) / calls * 1e3

    group(3)
    calls = int(np.clip(10 / group(3), 5, 200))
    return sorted(group(calls) for _ in range(groups))[groups // 2]


def by_kernel(
    profiled: Callable[..., list[tuple[str, int, float]]], run: Callable[[], Any]
) -> dict[str, float]:
    """Milliseconds a call that each kernel takes on the device; profiled: of `gpu_profile`."""
    return {name: ms / 10 for name, _, ms in profiled(functools.partial(gpu_profile.again, 10, run))}


class Jax:
    """Ours, as the dispatcher chooses or by a backend's name, or jla, as functions of a dict of arrays."""

    def __init__(self, peer: str):
        import jax
        import jax.numpy as jnp

        self.jax, self.jnp, self.peer = jax, jnp, peer

    def dtype(self, name: str, ndim: int, decay: str = "bfloat16") -> Any:
        """bf16, but for a decay per head, or per channel where ``decay`` is another."""
        return self.jnp.dtype(("float32" if ndim == 3 else decay) if name == "g" else "bfloat16")

    def draw(self, op: str, shape: Shape) -> dict[str, Any]:
        jax, jnp = self.jax, self.jnp
        keys = iter(jax.random.split(jax.random.key(0), 6))
        x = {name: jax.random.normal(next(keys), s) for name, s in shapes_of(op, shape).items()}
        if "g" in x:
            x["g"] = log_decay(x["g"], jnp, op, shape.gates)
        if "beta" in x:
            x["beta"] = jax.nn.sigmoid(x["beta"])
        x = {name: value.astype(self.dtype(name, value.ndim, shape.decay)) for name, value in x.items()}
        if shape.document:
            if self.peer == "jla":
                raise ValueError("packed rows: ours only")
            ids = jnp.arange(shape.tokens, dtype=jnp.int32) // shape.document
            x["segment_ids"] = jnp.broadcast_to(ids, (shape.batch, shape.tokens))
        return x

    def attend(self, op: str, x: dict[str, Any], final: bool) -> tuple[Any, Any]:
        gates: dict[str, Any] = {name: x[name] for name in ("g", "beta") if name in x}
        if self.peer == "jla":
            from jla import ops

            options: dict[str, Any] = {"output_final_state": final}
            if delta(op):
                options["use_qk_l2norm"] = True
            return ops.linear_attention(op, x["q"], x["k"], x["v"], **gates, **options)
        from pallas_kernels import linear_attention

        gates = {"log_decay": gates.get("g"), "beta": gates.get("beta"), "segment_ids": x.get("segment_ids")}
        backend = "auto" if self.peer == "ours" else self.peer
        return linear_attention(
            x["q"], x["k"], x["v"], **gates, qk_l2norm=delta(op), output_final_state=final, backend=backend
        )

    def forward(self, op: str) -> Callable[[dict[str, Any]], Any]:
        return lambda x: self.attend(op, x, False)[0]

    def both(self, op: str) -> Callable[[dict[str, Any]], Any]:
        def run(x: dict[str, Any]) -> Any:
            fixed = {name: x[name] for name in ("segment_ids",) if name in x}
            leaves = {name: x[name] for name in x if name != "do" and name not in fixed}
            o, vjp = self.jax.vjp(lambda leaves: self.attend(op, leaves | fixed, False)[0], leaves)
            return o, vjp(x["do"].astype(o.dtype))[0]

        return run

    def path(self, op: str, shape: Shape) -> str:
        """ours (kernels), ours (xla), or the peer's name."""
        if self.peer != "ours":
            return self.peer
        from pallas_kernels import explain

        x = self.jax.eval_shape(lambda: self.draw(op, shape))
        (choice,) = explain(lambda x: self.attend(op, x, False), x)
        return "ours (xla)" if choice.backend == "xla" else "ours (kernels)"

    def time(self, op: str, shape: Shape, alone: Callable, profile: bool) -> dict[str, Any]:
        jax = self.jax
        row: dict[str, Any] = {"peer": self.path(op, shape)}
        struct = jax.eval_shape(lambda: self.draw(op, shape))
        functions = {"fwd": jax.jit(self.forward(op)), "fwd_bwd": jax.jit(self.both(op))}
        for name, function in functions.items():  # the jitted function then runs what was compiled here
            start = time.perf_counter()
            memory = function.lower(struct).compile().memory_analysis()
            row |= {f"{name}_first_s": time.perf_counter() - start}
            row |= {f"{name}_temp_MiB": memory.temp_size_in_bytes / 2**20}
        draw = jax.jit(functools.partial(self.draw, op, shape))
        draw.lower().compile()
        with alone():
            x = draw()
            for name, function in functions.items():
                run = functools.partial(function, x)
                row[f"{name}_ms"] = median_ms(run, jax.block_until_ready)
                if profile:
                    row[f"{name}_kernels"] = by_kernel(gpu_profile.kernels, run)
        return row

    def results(self, op: str, alone: Callable) -> dict[str, list[dict[str, np.ndarray]]]:
        """By case, of two runs."""
        cast = lambda name, value: self.jnp.asarray(value, self.dtype(name, value.ndim))
        inputs = {c: {n: cast(n, v) for n, v in exact_inputs(op, c).items()} for c in CASES}

        @self.jax.jit
        def run(x: dict[str, Any]) -> dict[str, Any]:
            state = self.attend(op, {n: x[n] for n in x if n != "do"}, True)[1]
            o, grads = self.both(op)(x)
            return {"o": o, "state": state} | {f"d{n}": d for n, d in grads.items()}

        run.lower(inputs["plain"]).compile()
        exact = lambda results: {n: np.asarray(v, np.float64) for n, v in results.items()}
        with alone():
            return {case: [exact(run(x)) for _ in range(2)] for case, x in inputs.items()}


class Fla:
    """flash-linear-attention: PyTorch and Triton; its first call of an op may autotune for minutes."""

    name = "fla"
    cases: tuple[str, ...] = tuple(CASES)

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.tune_quickly()

    def tune_quickly(self) -> None:
        """Triton's autotuner measures a configuration for 25 ms, after 5, and not for 100 after 25."""
        from triton import testing

        testing.do_bench = functools.partial(testing.do_bench, warmup=5, rep=25)

    def leaves(self, x: dict[str, Any]) -> dict[str, Any]:
        keep = lambda name, value: value if name == "g" and value.ndim == 3 else value.bfloat16()
        return {name: keep(name, value).requires_grad_(name != "do") for name, value in x.items()}

    def draw(self, op: str, shape: Shape) -> dict[str, Any]:
        torch = self.torch
        if shape.document or shape.decay != "bfloat16":
            raise ValueError("whole rows and bf16 decays only")
        x = {name: torch.randn(*s, device="cuda") for name, s in shapes_of(op, shape).items()}
        if "g" in x:
            x["g"] = log_decay(x["g"], torch, op, shape.gates)
        if "beta" in x:
            x["beta"] = x["beta"].sigmoid()
        return self.leaves(x)

    def attend(self, op: str, x: dict[str, Any], final: bool) -> Any:
        if op == "kda":
            from fla.ops.kda import chunk_kda as fn
        elif op == "gated_deltanet":
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule as fn
        elif op == "deltanet":
            from fla.ops.delta_rule import chunk_delta_rule as fn
        elif op == "gla":
            from fla.ops.gla import chunk_gla as fn
        else:
            from fla.ops.simple_gla import chunk_simple_gla as fn
        options: dict[str, Any] = {"use_qk_l2norm_in_kernel": True} if delta(op) else {}
        if op == "kda":  # the faster of its two ways, for decays of at least -5 a token
            options["safe_gate"] = True
        return fn(**{n: x[n] for n in x if n != "do"}, **options, output_final_state=final)

    def both(self, op: str, x: dict[str, Any], final: bool = False) -> Any:
        for value in x.values():
            value.grad = None
        o, state = self.attend(op, x, final)
        o.backward(x["do"])
        return o, state

    def time(self, op: str, shape: Shape, alone: Callable, profile: bool) -> dict[str, Any]:
        """The first call compiles (and Triton tunes)."""
        synchronize = self.torch.cuda.synchronize
        row: dict[str, Any] = {"peer": self.name}
        with alone():
            x = self.draw(op, shape)
            runs = {"fwd": lambda: self.attend(op, x, False)[0], "fwd_bwd": lambda: self.both(op, x)}
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                synchronize()
                row[f"{name}_first_s"] = time.perf_counter() - start
                before = self.torch.cuda.memory_allocated()
                self.torch.cuda.reset_peak_memory_stats()
                out = run()
                peak = self.torch.cuda.max_memory_allocated()
                row[f"{name}_temp_MiB"] = (peak - max(before, self.torch.cuda.memory_allocated())) / 2**20
                del out
                row[f"{name}_ms"] = median_ms(run, lambda _: synchronize())
                if profile:
                    row[f"{name}_kernels"] = by_kernel(gpu_profile.torch_kernels, run)
        return row

    def results(self, op: str, alone: Callable) -> dict[str, list[dict[str, np.ndarray]]]:
        with alone():
            return {case: [self.result(op, case) for _ in range(2)] for case in self.cases}

    def result(self, op: str, case: str) -> dict[str, np.ndarray]:
        x = self.leaves({n: self.torch.tensor(v).cuda() for n, v in exact_inputs(op, case).items()})
        o, state = self.both(op, x, final=True)
        got = {"o": o, "state": state} | {f"d{n}": x[n].grad for n in x if n != "do"}
        return {n: v.detach().double().cpu().numpy() for n, v in got.items()}


class FlaUnchecked(Fla):
    """Gated ops' gradients too on Hopper with Triton 3.4 to 3.7.0, which FLA refuses there: wrong results
    with these versions (its issue 640). Look at the errors before the times.

    No setting of FLA lifts that check (with tilelang it takes another kernel): its module's flag is set.
    """

    name = "fla (unchecked)"

    def __init__(self) -> None:
        super().__init__()
        from fla.ops.common import chunk_o

        chunk_o.TRITON_ABOVE_3_7_1 = True  # of this module's uses the check is the only one


def truth(op: str) -> dict[str, dict[str, np.ndarray]]:
    """By case: output, final state and gradients in float64, token by token, on the CPU."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import linear_attention

    def forward(x: dict[str, Any]) -> Any:
        return linear_attention(
            x["q"], x["k"], x["v"], log_decay=x.get("g"), beta=x.get("beta"), qk_l2norm=delta(op),
            output_final_state=True, backend="reference",
        )  # fmt: skip

    @jax.jit
    def run(x: dict[str, Any], do: Any) -> dict[str, Any]:
        (o, state), vjp = jax.vjp(forward, x)
        (grads,) = vjp((do, jnp.zeros_like(state)))
        return {"o": o, "state": state} | {f"d{n}": d for n, d in grads.items()}

    dtype = Jax("ours").dtype
    out = {}
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        for case in CASES:
            rounded = {n: jnp.asarray(v, dtype(n, v.ndim)) for n, v in exact_inputs(op, case).items()}
            x = {n: v.astype(jnp.float64) for n, v in rounded.items()}
            do = x.pop("do")
            out[case] = {name: np.asarray(value) for name, value in run(x, do).items()}
    return out

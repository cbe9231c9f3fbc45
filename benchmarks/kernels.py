"""Our kernels, jax-linear-attention and flash-linear-attention on one GPU: time, memory, accuracy.

    python benchmarks/kernels.py [--ops gated_deltanet,gla] [--shapes 0,1] [--peers ours,jla,fla] [--jobs 8]

Every peer runs in a process of its own, one after the other: q, k, v bf16, normal; log-decay
logsigmoid(normal) per head, max(logsigmoid(normal), -5) per key channel; beta sigmoid(normal); q, k
normalised in the op by the delta family. JSON lines first, a table last. A peer that is not installed or
refuses is a row too.

Times are medians of 5 groups of calls around block_until_ready. The floor counts each input read and each
output written once at 3.0 TB/s: q, k, v, o (and the channel decay) forward; q, k, v, dO, dq, dk, dv besides
(and the channel decay and its gradient) backward. First-call seconds (trace, lower, compile) are honest
only with --jobs 1. Accuracy is the relative RMS error against a float64 token loop on the same bf16 inputs,
B1 T1024 H2 D128; "same bits" compares two runs.
"""

import argparse
import contextlib
import fcntl
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

SHAPES = [(8, 4096, 16, 128), (2, 16384, 16, 128), (1, 65536, 8, 128), (4, 2048, 16, 128), (8, 4096, 16, 64)]
OPS = ("kda", "gated_deltanet", "deltanet", "gla", "simple_gla")
PEERS = ("ours", "jla", "fla")
ACCURACY_SHAPE = (1, 1024, 2, 128)
BYTES_PER_SECOND = 3.0e12
GRADIENTS = ("q", "k", "v", "g", "beta")


def channel(op: str) -> bool:
    return op in ("kda", "gla")


def delta(op: str) -> bool:
    return op in ("kda", "gated_deltanet", "deltanet")


def floor_ms(op: str, shape: tuple[int, ...]) -> tuple[float, ...]:
    """Forward, forward and backward."""
    B, T, H, D = shape
    tensor = 2 * B * T * H * D
    forward, backward = 4 + channel(op), 7 + 2 * channel(op)
    return tuple(n * tensor / BYTES_PER_SECOND * 1e3 for n in (forward, forward + backward))


def make_inputs(op: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """float32 numpy: q, k, v, do, and g, beta where the op has them."""
    B, T, H, D = shape
    rng = np.random.default_rng(0)
    normal = lambda *s: rng.standard_normal(s, np.float32)
    x = {name: normal(B, T, H, D) for name in ("q", "k", "v", "do")}
    log_sigmoid = lambda x: -np.logaddexp(0, -x)
    if channel(op):
        x["g"] = np.maximum(log_sigmoid(normal(B, T, H, D)), -5)
    elif op != "deltanet":
        x["g"] = log_sigmoid(normal(B, T, H))
    if delta(op):
        x["beta"] = 1 / (1 + np.exp(-normal(B, T, H)))
    return x


def median_ms(run: Callable[[], Any], wait: Callable[[Any], Any], calls: int = 10, groups: int = 5) -> float:
    for _ in range(3):
        wait(run())
    times = []
    for _ in range(groups):
        start = time.perf_counter()
        for _ in range(calls):
            out = run()
        wait(out)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return sorted(times)[groups // 2]


def relative_error(got: Any, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


class Jax:
    """Ours or jla, as functions of a dict of arrays."""

    def __init__(self, peer: str):
        import jax
        import jax.numpy as jnp

        self.jax, self.jnp, self.peer = jax, jnp, peer

    def round(self, x: dict[str, Any]) -> dict[str, Any]:
        """bf16, but for a decay per head."""
        jnp = self.jnp
        dtype = lambda name, x: jnp.float32 if name == "g" and x.ndim == 3 else jnp.bfloat16
        return {name: jnp.asarray(value, dtype(name, value)) for name, value in x.items()}

    def inputs(self, op: str, shape: tuple[int, ...]) -> dict[str, Any]:
        """As `make_inputs`, made on the device."""
        jax, jnp = self.jax, self.jnp
        B, T, H, D = shape
        keys = iter(jax.random.split(jax.random.key(0), 6))
        normal = lambda *s: jax.random.normal(next(keys), s)
        x = {name: normal(B, T, H, D) for name in ("q", "k", "v", "do")}
        if channel(op):
            x["g"] = jnp.maximum(jax.nn.log_sigmoid(normal(B, T, H, D)), -5)
        elif op != "deltanet":
            x["g"] = jax.nn.log_sigmoid(normal(B, T, H))
        if delta(op):
            x["beta"] = jax.nn.sigmoid(normal(B, T, H))
        return self.round(x)

    def forward(self, op: str) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
        def ours(x: dict[str, Any]) -> tuple[Any, Any]:
            from pallas_kernels import linear_attention

            gates = {"log_decay": x.get("g"), "beta": x.get("beta")}
            return linear_attention(
                x["q"], x["k"], x["v"], **gates, qk_l2norm=delta(op), output_final_state=True
            )

        def jla(x: dict[str, Any]) -> tuple[Any, Any]:
            from jla import ops

            options = {"use_qk_l2norm": True} if delta(op) else {}
            gates = {name: x[name] for name in ("g", "beta") if name in x}
            return ops.linear_attention(op, x["q"], x["k"], x["v"], **gates, **options)

        return ours if self.peer == "ours" else jla

    def both(self, op: str) -> Callable[[dict[str, Any]], Any]:
        def run(x: dict[str, Any]) -> Any:
            leaves = {name: x[name] for name in x if name != "do"}
            o, vjp, _ = self.jax.vjp(self.forward(op), leaves, has_aux=True)
            return o, vjp(x["do"].astype(o.dtype))[0]

        return run

    def path(self, op: str) -> str:
        """ours (kernels), ours (xla) or jla."""
        if self.peer == "jla":
            return "jla"
        from pallas_kernels import hopper
        from pallas_kernels.call import Call

        x = self.jax.eval_shape(lambda: self.inputs(op, (1, 64, 1, 64)))
        call = Call(x["q"], x["k"], x["v"], x.get("g"), x.get("beta"), None, None, scale=1.0)
        return "ours (xla)" if hopper.supports(call) else "ours (kernels)"

    def prepare(self, function: Callable[[dict[str, Any]], Any], x: Any) -> tuple[Any, float, int | None]:
        """(function to time, seconds to compile, MiB of temporaries)."""
        start = time.perf_counter()
        if (
            self.peer == "jla"
        ):  # its compiled objects ran many times slower than its jitted functions at some shapes
            run = self.jax.jit(function)
            self.jax.block_until_ready(run(x))
            return run, time.perf_counter() - start, None
        run = self.jax.jit(function).lower(x).compile()
        return run, time.perf_counter() - start, run.memory_analysis().temp_size_in_bytes >> 20

    def work(
        self, op: str, shapes: list[tuple[int, ...]], truth: dict, jobs: int, alone: Any
    ) -> Iterator[dict]:
        """One row an accuracy check, one a shape; compiles first, then measures while `alone` is held."""
        jax = self.jax
        exact = self.round(make_inputs(op, ACCURACY_SHAPE))
        draw = lambda shape: jax.jit(functools.partial(self.inputs, op, shape))()
        output = lambda x: self.forward(op)(x)[0]
        everything = lambda x: (self.forward(op)({n: x[n] for n in x if n != "do"}), self.both(op)(x)[1])
        with ThreadPoolExecutor(jobs) as pool:
            checked = pool.submit(self.prepare, everything, exact)
            timed = [
                [pool.submit(self.prepare, f, draw(shape)) for f in (output, self.both(op))]
                for shape in shapes
            ]
            for future in [checked, *itertools.chain(*timed)]:
                future.exception()
        with alone:
            row: dict[str, Any] = {"peer": self.path(op), "op": op, "errors": {}}
            try:
                run = checked.result()[0]
                first, second = run(exact), run(exact)
                (o, state), grads = first
                got = {"o": o, "state": state} | {f"d{n}": grads[n] for n in grads}
                same = jax.tree.map(lambda a, b: bool((a == b).all()), first, second)
                row["same_bits"] = all(jax.tree.leaves(same))
                row["errors"] = {n: relative_error(v, truth[n]) for n, v in got.items() if v is not None}
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error)[:150]}"
            yield row
            for shape, futures in zip(shapes, timed, strict=True):
                row = {"peer": self.path(op), "op": op, "shape": shape}
                try:
                    x = draw(shape)
                    for name, future in zip(("fwd", "fwd_bwd"), futures, strict=True):
                        run, row[f"{name}_first_s"], row[f"{name}_temp_MiB"] = future.result()
                        row[f"{name}_ms"] = median_ms(functools.partial(run, x), jax.block_until_ready)
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {str(error)[:150]}"
                yield row


class Fla:
    """flash-linear-attention: PyTorch and Triton; its first call of an op may autotune for minutes."""

    def __init__(self) -> None:
        import torch

        self.torch = torch

    def draw(self, name: str, op: str, shape: tuple[int, ...]) -> Any:
        torch = self.torch
        normal = lambda *s: torch.randn(*s, device="cuda")
        if name == "beta":
            return normal(*shape[:3]).sigmoid() if delta(op) else None
        if name == "g" and not channel(op):
            return None if op == "deltanet" else torch.nn.functional.logsigmoid(normal(*shape[:3]))
        if name == "g":
            return torch.nn.functional.logsigmoid(normal(*shape)).clamp_min(-5)
        return normal(*shape)

    def leaves(self, op: str, shape: tuple[int, ...]) -> dict[str, Any]:
        torch = self.torch
        if shape == ACCURACY_SHAPE:
            x = {name: torch.tensor(value, device="cuda") for name, value in make_inputs(op, shape).items()}
        else:
            x = {name: self.draw(name, op, shape) for name in ("q", "k", "v", "do", "g", "beta")}
            x = {name: value for name, value in x.items() if value is not None}
        keep = lambda name, value: value if name == "g" and value.ndim == 3 else value.bfloat16()
        return {name: keep(name, value).requires_grad_(name != "do") for name, value in x.items()}

    def function(self, op: str) -> Callable[[dict[str, Any]], Any]:
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
        options = {"use_qk_l2norm_in_kernel": True} if delta(op) else {}
        return lambda x: fn(**{n: x[n] for n in x if n != "do"}, **options, output_final_state=True)

    def both(self, op: str, x: dict[str, Any]) -> Any:
        for value in x.values():
            value.grad = None
        o, state = self.function(op)(x)
        o.backward(x["do"])
        return o, state

    def work(
        self, op: str, shapes: list[tuple[int, ...]], truth: dict, jobs: int, alone: Any
    ) -> Iterator[dict]:
        """As `Jax.work`; Triton compiles at the first call."""
        cuda = self.torch.cuda
        with alone:
            yield self.accuracy(op, truth)
            for shape in shapes:
                row: dict[str, Any] = {"peer": "fla", "op": op, "shape": shape}
                try:
                    x = self.leaves(op, shape)
                    runs = {
                        "fwd": functools.partial(self.function(op), x),
                        "fwd_bwd": functools.partial(self.both, op, x),
                    }
                    for name, run in runs.items():
                        start = time.perf_counter()
                        run()
                        cuda.synchronize()
                        row[f"{name}_first_s"] = time.perf_counter() - start
                        row[f"{name}_ms"] = median_ms(run, lambda _: cuda.synchronize())
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {str(error)[:150]}"
                yield row

    def accuracy(self, op: str, truth: dict[str, np.ndarray]) -> dict[str, Any]:
        row: dict[str, Any] = {"peer": "fla", "op": op, "errors": {}}
        results = []
        try:
            for _ in range(2):
                x = self.leaves(op, ACCURACY_SHAPE)
                o, state = self.both(op, x)
                got = {"o": o, "state": state} | {f"d{n}": x[n].grad for n in x if n != "do"}
                results.append({n: v.detach().double().cpu().numpy() for n, v in got.items()})
        except Exception as error:
            return row | {"error": f"{type(error).__name__}: {str(error)[:150]}"}
        row["same_bits"] = all((results[0][n] == results[1][n]).all() for n in results[0])
        row["errors"] = {n: relative_error(v, truth[n]) for n, v in results[0].items()}
        return row


def save_truth(op: str, path: pathlib.Path) -> None:
    """Output, final state and gradients in float64, token by token, of the bf16 inputs."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import linear_attention

    with jax.enable_x64(True):
        x = {n: v.astype(jnp.float64) for n, v in Jax("ours").round(make_inputs(op, ACCURACY_SHAPE)).items()}
        do = x.pop("do")

        def forward(x: dict[str, Any]) -> Any:
            return linear_attention(
                x["q"], x["k"], x["v"], log_decay=x.get("g"), beta=x.get("beta"), qk_l2norm=delta(op),
                output_final_state=True, backend="reference",
            )  # fmt: skip

        (o, state), vjp = jax.vjp(forward, x)
        (grads,) = vjp((do, jnp.zeros_like(state)))
        np.savez(path / f"{op}.npz", o=o, state=state, **{f"d{n}": grads[n] for n in grads})


@contextlib.contextmanager
def lock(path: pathlib.Path) -> Iterator[None]:
    """One worker measures at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def work(role: str, op: str, args: argparse.Namespace) -> None:
    path = pathlib.Path(args.truth)
    if role == "truth":
        if not (path / f"{op}.npz").exists():
            save_truth(op, path)
        return
    peer = Fla() if role == "fla" else Jax(role)
    truth = dict(np.load(path / f"{op}.npz"))
    for row in peer.work(op, [SHAPES[i] for i in args.shapes], truth, args.jobs, lock(path / "lock")):
        print(json.dumps(row), flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: times with ratios to jla and per cent of the floor, then errors."""
    jla = {(r["op"], tuple(r["shape"])): r for r in rows if r["peer"] == "jla" and "fwd_bwd_ms" in r}
    lines = [
        "| op, B T H D | path | fwd ms | of jla | % of floor | fwd+bwd ms | of jla | % of floor | temp MiB "
        "| first s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "shape" not in r:
            continue
        cells = [f"{r['op']} {' '.join(map(str, r['shape']))}", r["peer"]]
        if "error" in r:
            lines.append("| " + " | ".join([*cells, r["error"].replace("|", "/"), *[""] * 7]) + " |")
            continue
        base = jla.get((r["op"], tuple(r["shape"])))
        for name, floor in zip(("fwd", "fwd_bwd"), floor_ms(r["op"], r["shape"]), strict=True):
            ms = r[f"{name}_ms"]
            cells += [
                f"{ms:.3f}",
                f"{ms / base[f'{name}_ms']:.2f}" if base else "",
                f"{100 * floor / ms:.0f}",
            ]
        cells += [str(r.get("fwd_bwd_temp_MiB") or ""), f"{r['fwd_bwd_first_s']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    names = ("o", "state", *(f"d{n}" for n in GRADIENTS))
    lines += ["", f"| op | path | {' | '.join(names)} | same bits |", "|---" * (len(names) + 3) + "|"]
    for r in rows:
        if "errors" in r:
            cells = [f"{r['errors'][n]:.1e}" if n in r["errors"] else "" for n in names]
            last = str(r.get("same_bits", r.get("error", "")))
            lines.append("| " + " | ".join([r["op"], r["peer"], *cells, last]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", type=lambda s: s.split(","), default=list(OPS))
    parser.add_argument("--shapes", type=lambda s: [int(i) for i in s.split(",")], default=range(len(SHAPES)))
    parser.add_argument("--peers", type=lambda s: s.split(","), default=list(PEERS))
    parser.add_argument(
        "--jobs", type=int, default=1, help="compile so many at once, all peers and ops together"
    )
    parser.add_argument("--truth", help="folder that keeps the float64 results for the next run")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        work(args.role, args.ops[0], args)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        args.truth = args.truth or folder
        pathlib.Path(args.truth).mkdir(exist_ok=True)
        for roles in (["truth"], args.peers):
            start = functools.partial(start_worker, args)
            with ThreadPoolExecutor(len(roles) * len(args.ops) if args.jobs > 1 else 1) as pool:
                for result in pool.map(
                    start, [role for role in roles for _ in args.ops], args.ops * len(roles)
                ):
                    rows += result
    print(table(rows))


def start_worker(args: argparse.Namespace, role: str, op: str) -> list[dict[str, Any]]:
    root = pathlib.Path(__file__).resolve().parent.parent
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    if role == "truth":
        environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, __file__, "--role", role, "--truth", args.truth, "--ops", op]
    command += ["--shapes", ",".join(map(str, args.shapes)), "--jobs", str(args.jobs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        print(f"{role} {op}: exit status {done.returncode}", flush=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    main()

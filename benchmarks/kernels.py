"""Our kernels, jax-linear-attention and flash-linear-attention on one GPU: time, memory, accuracy.

    python benchmarks/kernels.py [--ops gated_deltanet,gla] [--shapes 0,1] [--peers ours,jla] [--out FOLDER]
    python benchmarks/kernels.py --peers fla --ops deltanet --shapes 0 --fla_seconds 300

One process a peer, op and shape: they compile --jobs at a time and then, nothing else running, take turns on
the GPU. q, k, v bf16, normal; log-decay logsigmoid(normal) per head, max(logsigmoid(normal), -5) per key
channel; beta sigmoid(normal); q, k normalised in the op by the delta family; no final state. A peer that is
not installed or refuses is a row too. FLA autotunes for minutes at the first call of an op, hence its bound.

Times are medians of 5 groups of calls, a group of at least 10 ms, around block_until_ready. The floor counts
each input read and each output written once at 3.0 TB/s: q, k, v, o (and the channel decay) forward; q, k, v,
dO, dq, dk, dv besides (and the channel decay and its gradient) backward. First-call seconds (trace, lower,
compile) are honest only with --jobs 1. Accuracy is the relative RMS error against a float64 token loop on
the same bf16 inputs, B1 T1024 H2 D128: "plain" is distributed as above, "hard" has a decay of -20 (-5 per
channel) at every eighth token and beta up to 2. "same bits" compares two runs.
Prints JSON rows and tables in Markdown; --out also writes them to kernels.json and kernels.md. --profile 3
adds the milliseconds of every kernel on the device at shape 3, so small that its calls wait for the host.
"""

import argparse
import contextlib
import fcntl
import functools
import glob
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

SHAPES = [(8, 4096, 16, 128), (2, 16384, 16, 128), (1, 65536, 8, 128), (4, 2048, 16, 128), (8, 4096, 16, 64)]
OPS = ("kda", "gated_deltanet", "deltanet", "gla", "simple_gla")
PEERS = ("ours", "jla", "fla")
CASES = ("plain", "hard")
ACCURACY_SHAPE = (1, 1024, 2, 128)
BYTES_PER_SECOND = 3.0e12
RESULTS = ("o", "state", "dq", "dk", "dv", "dg", "dbeta")


def channel(op: str) -> bool:
    return op in ("kda", "gla")


def delta(op: str) -> bool:
    return op in ("kda", "gated_deltanet", "deltanet")


def floor_ms(op: str, shape: list[int]) -> tuple[float, ...]:
    """Forward, forward and backward."""
    B, T, H, D = shape
    tensor = 2 * B * T * H * D
    forward, backward = 4 + channel(op), 7 + 2 * channel(op)
    return tuple(n * tensor / BYTES_PER_SECOND * 1e3 for n in (forward, forward + backward))


def shapes_of(op: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    gates = {"g": shape if channel(op) else shape[:3], "beta": shape[:3]}
    wanted = ("g",) * (op != "deltanet") + ("beta",) * delta(op)
    return dict.fromkeys(("q", "k", "v", "do"), shape) | {name: gates[name] for name in wanted}


def exact_inputs(op: str, case: str) -> dict[str, np.ndarray]:
    """float32 numpy of ACCURACY_SHAPE: q, k, v, do, and g, beta where the op has them."""
    rng = np.random.default_rng(0)
    x: dict[str, Any] = {
        n: rng.standard_normal(s, np.float32) for n, s in shapes_of(op, ACCURACY_SHAPE).items()
    }
    if "g" in x:
        x["g"] = -np.logaddexp(0, -x["g"])
        if case == "hard":
            x["g"][:, ::8] -= 5 if channel(op) else 20
        if channel(op):
            x["g"] = np.maximum(x["g"], -5)
    if "beta" in x:
        x["beta"] = (1 + (case == "hard")) / (1 + np.exp(-x["beta"]))
    if not delta(op):
        x["k"] *= ACCURACY_SHAPE[3] ** -0.5
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


def relative_error(got: Any, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


class Jax:
    """Ours or jla, as functions of a dict of arrays."""

    def __init__(self, peer: str):
        import jax
        import jax.numpy as jnp

        self.jax, self.jnp, self.peer = jax, jnp, peer

    def dtype(self, name: str, ndim: int) -> Any:
        """bf16, but for a decay per head."""
        return self.jnp.float32 if name == "g" and ndim == 3 else self.jnp.bfloat16

    def draw(self, op: str, shape: tuple[int, ...]) -> dict[str, Any]:
        jax, jnp = self.jax, self.jnp
        keys = iter(jax.random.split(jax.random.key(0), 6))
        x = {name: jax.random.normal(next(keys), s) for name, s in shapes_of(op, shape).items()}
        if "g" in x:
            x["g"] = jax.nn.log_sigmoid(x["g"])
            x["g"] = jnp.maximum(x["g"], -5) if channel(op) else x["g"]
        if "beta" in x:
            x["beta"] = jax.nn.sigmoid(x["beta"])
        return {name: value.astype(self.dtype(name, value.ndim)) for name, value in x.items()}

    def attend(self, op: str, x: dict[str, Any], final: bool) -> tuple[Any, Any]:
        gates: dict[str, Any] = {name: x[name] for name in ("g", "beta") if name in x}
        if self.peer == "jla":
            from jla import ops

            options: dict[str, Any] = {"output_final_state": final}
            if delta(op):
                options["use_qk_l2norm"] = True
            return ops.linear_attention(op, x["q"], x["k"], x["v"], **gates, **options)
        from pallas_kernels import linear_attention

        gates = {"log_decay": gates.get("g"), "beta": gates.get("beta")}
        return linear_attention(
            x["q"], x["k"], x["v"], **gates, qk_l2norm=delta(op), output_final_state=final
        )

    def forward(self, op: str) -> Callable[[dict[str, Any]], Any]:
        return lambda x: self.attend(op, x, False)[0]

    def both(self, op: str) -> Callable[[dict[str, Any]], Any]:
        def run(x: dict[str, Any]) -> Any:
            leaves = {name: x[name] for name in x if name != "do"}
            o, vjp = self.jax.vjp(lambda leaves: self.attend(op, leaves, False)[0], leaves)
            return o, vjp(x["do"].astype(o.dtype))[0]

        return run

    def path(self, op: str, shape: tuple[int, ...]) -> str:
        """ours (kernels), ours (xla) or jla."""
        if self.peer == "jla":
            return "jla"
        from pallas_kernels import hopper
        from pallas_kernels.call import Call

        x = self.jax.eval_shape(lambda: self.draw(op, shape))
        call = Call(x["q"], x["k"], x["v"], x.get("g"), x.get("beta"), None, None, scale=1.0)
        return "ours (xla)" if hopper.supports(call) else "ours (kernels)"

    def time(self, op: str, shape: tuple[int, ...], alone: Callable, profile: bool) -> dict[str, Any]:
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
                    row[f"{name}_kernels"] = self.kernels(run)
        return row

    def kernels(self, run: Callable[[], Any], calls: int = 10) -> dict[str, float]:
        """Milliseconds a call that each kernel takes on the device."""
        jax = self.jax
        total: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(calls):
                    out = run()
                jax.block_until_ready(out)
            (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
            planes = jax.profiler.ProfileData.from_file(path).planes
            lines = [line for plane in planes if "GPU" in plane.name for line in plane.lines]
            for event in (event for line in lines if "Stream" in line.name for event in line.events):
                total[event.name] = total.get(event.name, 0.0) + event.duration_ns / 1e6 / calls
        return total

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

    def __init__(self) -> None:
        import torch

        self.torch = torch

    def leaves(self, x: dict[str, Any]) -> dict[str, Any]:
        keep = lambda name, value: value if name == "g" and value.ndim == 3 else value.bfloat16()
        return {name: keep(name, value).requires_grad_(name != "do") for name, value in x.items()}

    def draw(self, op: str, shape: tuple[int, ...]) -> dict[str, Any]:
        torch = self.torch
        x = {name: torch.randn(*s, device="cuda") for name, s in shapes_of(op, shape).items()}
        if "g" in x:
            x["g"] = torch.nn.functional.logsigmoid(x["g"])
            x["g"] = x["g"].clamp_min(-5) if channel(op) else x["g"]
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

    def time(self, op: str, shape: tuple[int, ...], alone: Callable, profile: bool) -> dict[str, Any]:
        """Triton compiles and tunes at the first call."""
        synchronize = self.torch.cuda.synchronize
        row: dict[str, Any] = {"peer": "fla"}
        with alone():
            x = self.draw(op, shape)
            runs = {
                "fwd": lambda: self.attend(op, x, False)[0],
                "fwd_bwd": lambda: self.both(op, x),
            }
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
        return row

    def results(self, op: str, alone: Callable) -> dict[str, list[dict[str, np.ndarray]]]:
        with alone():
            return {case: [self.result(op, case) for _ in range(2)] for case in CASES}

    def result(self, op: str, case: str) -> dict[str, np.ndarray]:
        x = self.leaves({n: self.torch.tensor(v).cuda() for n, v in exact_inputs(op, case).items()})
        o, state = self.both(op, x, final=True)
        got = {"o": o, "state": state} | {f"d{n}": x[n].grad for n in x if n != "do"}
        return {n: v.detach().double().cpu().numpy() for n, v in got.items()}


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


def work(role: str, op: str, what: str, lock: str, profile: bool, seconds: float) -> None:
    """Prints rows: accuracy by case (`what` = "accuracy"), or times at the shape of number `what`."""
    # One that compiles for ever must not hold up the rest.
    stop = threading.Timer(seconds, os._exit, [1])
    stop.daemon = True
    stop.start()
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # while it compiles; whoever measures waits for all of these

        @contextlib.contextmanager
        def alone() -> Iterator[None]:
            stop.cancel()
            fcntl.flock(file, fcntl.LOCK_UN)
            fcntl.flock(file, fcntl.LOCK_EX)
            time.sleep(0.2)  # whoever measured before may still be leaving the GPU
            yield

        row = heading(role, op, what)
        rows = [row]
        try:
            peer = Fla() if role == "fla" else Jax(role)
            if what == "accuracy":
                path = role if role != "ours" else Jax(role).path(op, ACCURACY_SHAPE)
                want, rows = truth(op), []
                for case, (first, second) in peer.results(op, alone).items():
                    same = all(np.array_equal(first[n], second[n]) for n in first)
                    errors = {n: relative_error(first[n], want[case][n]) for n in want[case]}
                    rows += [{"peer": path, "op": op, "case": case, "same_bits": same, "errors": errors}]
            else:
                row |= peer.time(op, SHAPES[int(what)], alone, profile)
        except Exception as error:
            rows = [row | {"error": f"{type(error).__name__}: {str(error)[:150]}"}]
        for row in rows:
            print(json.dumps(row), flush=True)


def heading(peer: str, op: str, what: str) -> dict[str, Any]:
    return {"peer": peer, "op": op} | ({"case": what} if what == "accuracy" else {"shape": SHAPES[int(what)]})


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: times with ratios to jla and per cent of the floor, then errors."""
    jla = {(r["op"], *r["shape"]): r for r in rows if r["peer"] == "jla" and "fwd_bwd_ms" in r}
    lines = [
        "| op, B T H D | path | fwd ms | of jla | % of floor | fwd+bwd ms | of jla | % of floor | temp MiB "
        "| of jla | first s | kernels ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "shape" not in r:
            continue
        cells = [f"{r['op']} {' '.join(map(str, r['shape']))}", r["peer"]]
        if "error" in r:
            lines.append("| " + " | ".join([*cells, r["error"].replace("|", "/"), *[""] * 9]) + " |")
            continue
        base = jla.get((r["op"], *r["shape"]))
        of = lambda name, r=r, base=base: f"{r[name] / base[name]:.2f}" if base and base[name] else ""
        for name, floor in zip(("fwd", "fwd_bwd"), floor_ms(r["op"], r["shape"]), strict=True):
            ms = r[f"{name}_ms"]
            cells += [f"{ms:.3f}", of(f"{name}_ms"), f"{100 * floor / ms:.0f}"]
        first = f"{r['fwd_first_s']:.0f}, {r['fwd_bwd_first_s']:.0f}"
        cells += [f"{r['fwd_bwd_temp_MiB']:.0f}", of("fwd_bwd_temp_MiB"), first]
        cells += [", ".join(f"{sum(r[n].values()):.3f}" for n in r if n.endswith("_kernels"))]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"| op, case | path | {' | '.join(RESULTS)} | same bits |", "|---" * 10 + "|"]
    for r in rows:
        if "case" in r:
            errors = r.get("errors", {})
            cells = [f"{errors[n]:.1e}" if n in errors else "" for n in RESULTS]
            last = str(r.get("same_bits", r.get("error", "")))
            lines.append("| " + " | ".join([f"{r['op']}, {r['case']}", r["peer"], *cells, last]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = lambda s: s.split(",")
    parser.add_argument("--ops", type=names, default=OPS)
    parser.add_argument("--shapes", type=lambda s: [int(i) for i in s.split(",")], default=range(len(SHAPES)))
    parser.add_argument("--peers", type=names, default=("ours", "jla"))
    parser.add_argument("--no_accuracy", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile at a time")
    parser.add_argument(
        "--compile_seconds", type=float, default=600, help="time allowed before a row is given up"
    )
    parser.add_argument("--fla_seconds", type=float, default=300, help="time allowed for an op of FLA")
    parser.add_argument("--profile", type=names, default=(), help="shapes whose kernels are timed one by one")
    parser.add_argument("--out", type=pathlib.Path, help="folder for kernels.json and kernels.md")
    parser.add_argument("--role", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        role, op, what, lock = args.role
        work(role, op, what, lock, bool(args.profile), args.compile_seconds)
        return
    rows: list[dict[str, Any]] = []
    tasks = [(peer, op, str(i)) for op in args.ops for i in args.shapes for peer in args.peers]
    if not args.no_accuracy:
        tasks += [(peer, op, "accuracy") for op in args.ops for peer in args.peers]
    with tempfile.TemporaryDirectory() as folder:
        start = functools.partial(start_worker, args, f"{folder}/lock")
        together = [task for task in tasks if task[0] != "fla"]
        groups = [together[i : i + args.jobs] for i in range(0, len(together), args.jobs)]
        groups += [[task] for task in tasks if task[0] == "fla"]
        for group in groups:
            with ThreadPoolExecutor(len(group)) as pool:
                rows += itertools.chain(*pool.map(start, group))
    text = tables(rows)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "kernels.json").write_text(json.dumps(rows, indent=1))
        (args.out / "kernels.md").write_text(text + "\n")


def start_worker(args: argparse.Namespace, lock: str, task: tuple[str, str, str]) -> list[dict[str, Any]]:
    root = pathlib.Path(__file__).resolve().parent.parent
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false", TF_CPP_MIN_LOG_LEVEL="2")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    peer, _, what = task
    if peer == "fla":
        environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, __file__, "--role", *task, lock, *["--profile", what] * (what in args.profile)]
    command += ["--compile_seconds", str(args.compile_seconds)]
    limit = args.fla_seconds if peer == "fla" else None
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=environment, check=False, timeout=limit
        )
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        rows = rows or [heading(*task) | {"error": f"exit status {done.returncode}"}]
    except subprocess.TimeoutExpired:
        rows = [heading(*task) | {"error": f"not done after {limit:.0f} s"}]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


if __name__ == "__main__":
    main()

"""Our kernels, jax-linear-attention, flash-linear-attention and NVIDIA's on one GPU: time, memory, accuracy.

    python benchmarks/kernels.py [--ops gated_deltanet,gla] [--shapes 0,1] [--peers ours,jla] [--out FOLDER]
    python benchmarks/kernels.py --peers fla --ops deltanet --shapes 0 --fla_seconds 300
    python benchmarks/kernels.py --shapes more --jobs 16
    python benchmarks/kernels.py --peers ours,nvidia --ops kda --shapes more --profile more --jobs 16

Shapes 0 to 4 take every op; "more" are those of models and of other authors' tables, each for the ops that it
belongs to: wide and grouped heads, few heads, 131,072 tokens, packed rows, slow gates (-exp(normal - 3), what
initialisers give) and steep ones (-5 sigmoid(normal)); the last two what training gives a decay per channel:
float32, with documents of 517 tokens. "squares" are 0 to 4, "all" is everything.

One process a peer, op and shape: they compile --jobs at a time and then, nothing else running, take turns on
the GPU. q, k, v bf16, normal; log-decay logsigmoid(normal) per head, max(logsigmoid(normal), -5) per key
channel; beta sigmoid(normal); q, k normalised in the op by the delta family; no final state. A peer that is
not installed or refuses is a row too. FLA autotunes for minutes at the first call of an op, hence its bound;
peer_fla.py compiles before, and fla_unchecked runs what FLA refuses (peers.FlaUnchecked).
NVIDIA's takes q, k normalised before and float32 gates (peer_nvidia.py); its host calls cost more than its
kernels do, so compare the column of kernels (--profile).

Times are medians of 5 groups of calls, a group of at least 10 ms, around block_until_ready. The floor counts
each input read and each output written once at 3.0 TB/s: q, k, v, o (and the channel decay) forward; q, k, v,
dO, dq, dk, dv besides (and the channel decay and its gradient) backward. First-call seconds (trace, lower,
compile) are honest only with --jobs 1. Accuracy is the relative RMS error against a float64 token loop on
the same bf16 inputs, B1 T1024 H2 D128: "plain" is distributed as above, "hard" has a decay of -20 (-5 per
channel) at every eighth token and beta up to 2, "steep" has steep gates, "equal" slow ones, one key for all
tokens and beta up to 2. "same bits" compares two runs.
Prints JSON rows and tables in Markdown; --out also writes them to kernels.json and kernels.md. --profile 3
adds the milliseconds of every kernel on the device at shape 3, so small that its calls wait for the host.
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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from peer_nvidia import Nvidia
from peers import ACCURACY_SHAPE, OPS, Fla, FlaUnchecked, Jax, Shape, channel, square, truth

SQUARES = [(8, 4096, 16, 128), (2, 16384, 16, 128), (1, 65536, 8, 128), (4, 2048, 16, 128), (8, 4096, 16, 64)]
MORE = [  # ops, shape
    ("kda", square(8, 4096, 16, 128, "slow")),
    ("kda", square(8, 4096, 16, 128, "steep")),
    ("kda", square(1, 8192, 32, 128, "slow")),
    ("kda", square(1, 8192, 32, 128, "steep")),
    ("kda", square(1, 2048, 12, 128, "slow")),
    ("kda", square(1, 2048, 12, 128, "steep")),
    ("kda", square(1, 65536, 8, 128, "steep")),
    ("kda gated_deltanet", square(32, 1024, 8, 128, "slow")),
    ("kda gated_deltanet", square(1, 131072, 16, 128, "slow")),
    ("kda gated_deltanet", square(8, 4096, 16, 128, "slow", document=517)),
    ("gated_deltanet", Shape(4, 8192, 16, 32, 128, 128, "slow")),
    ("gated_deltanet", square(1, 32768, 32, 128, "slow")),
    ("gated_deltanet", Shape(4, 8192, 8, 8, 128, 128, "slow")),
    ("kda gated_deltanet simple_gla", Shape(4, 8192, 8, 8, 128, 256, "slow")),
    ("gla", Shape(4, 8192, 4, 4, 128, 256, "slow")),
    ("gated_deltanet simple_gla gla", Shape(4, 8192, 4, 4, 256, 512, "slow")),
    ("gated_deltanet", Shape(4, 8192, 4, 4, 256, 512, "slow", document=517)),
    ("simple_gla", square(4, 8192, 24, 64, "slow")),
    ("kda", square(1, 65536, 8, 128, "slow")),
    ("gla gated_deltanet", square(1, 65536, 8, 128, "steep")),
    ("kda", square(1, 131072, 16, 128, "steep")),
    ("kda gla", square(8, 4096, 16, 128, "slow", document=517, decay="float32")),  # what training gives them
    ("kda gla", square(8, 4096, 16, 128, "steep", document=517, decay="float32")),
]
SHAPES = [square(*shape) for shape in SQUARES] + [shape for _, shape in MORE]
TAKES = [OPS] * len(SQUARES) + [tuple(ops.split()) for ops, _ in MORE]  # ops by shape
INDICES = [str(index) for index in range(len(SHAPES))]
NAMED = {"squares": INDICES[: len(SQUARES)], "more": INDICES[len(SQUARES) :], "all": INDICES}
PEERS = ("ours", "triton", "xla", "jla", "fla", "fla_unchecked", "nvidia")
TORCH: dict[str, type[Fla]] = {"fla": Fla, "fla_unchecked": FlaUnchecked, "nvidia": Nvidia}
TUNES = ("fla", "fla_unchecked")  # minutes, each in a process alone
BYTES_PER_SECOND = 3.0e12
RESULTS = ("o", "state", "dq", "dk", "dv", "dg", "dbeta")


def floor_ms(op: str, shape: Shape) -> tuple[float, float]:
    """Forward, forward and backward."""
    tokens = 2 * shape.batch * shape.tokens
    keys, values = tokens * shape.heads * shape.key_dim, tokens * shape.value_heads * shape.value_dim
    decays = channel(op) * tokens * shape.value_heads * shape.key_dim * (1 + (shape.decay == "float32"))
    forward, backward = 2 * keys + 2 * values + decays, 4 * keys + 3 * values + 2 * decays
    return forward / BYTES_PER_SECOND * 1e3, (forward + backward) / BYTES_PER_SECOND * 1e3


def relative_error(got: Any, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


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
            peer = TORCH[role]() if role in TORCH else Jax(role)
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
        "| op, B T H (HV) K V | path | fwd ms | of jla | % of floor | fwd+bwd ms | of jla | % of floor "
        "| temp MiB | of jla | first s | kernels ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "shape" not in r:
            continue
        shape = Shape(*r["shape"])
        cells = [f"{r['op']} {shape}", r["peer"]]
        if "error" in r:
            lines.append("| " + " | ".join([*cells, r["error"].replace("|", "/"), *[""] * 9]) + " |")
            continue
        base = jla.get((r["op"], *r["shape"]))
        of = lambda name, r=r, base=base: f"{r[name] / base[name]:.2f}" if base and base[name] else ""
        for name, floor in zip(("fwd", "fwd_bwd"), floor_ms(r["op"], shape), strict=True):
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


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: a comma-separated list of ``known`` names."""

    def parse(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return text.split(",")

    return parse


def main() -> int:
    """Exit code: 1 if a process ended without a word."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = lambda text: some_of(INDICES)(",".join(NAMED.get(text, [text])))
    parser.add_argument("--ops", type=some_of(OPS), default=OPS)
    parser.add_argument("--shapes", type=shapes, default=NAMED["squares"])
    parser.add_argument("--peers", type=some_of(PEERS), default=("ours", "jla"))
    parser.add_argument("--no_accuracy", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile at a time")
    parser.add_argument(
        "--compile_seconds", type=float, default=600, help="time allowed before a row is given up"
    )
    parser.add_argument("--fla_seconds", type=float, default=300, help="time allowed for an op of FLA")
    parser.add_argument(
        "--profile", type=shapes, default=(), help="shapes whose kernels are timed one by one"
    )
    parser.add_argument("--out", type=pathlib.Path, help="folder for kernels.json and kernels.md")
    parser.add_argument("--role", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        role, op, what, lock = args.role
        work(role, op, what, lock, bool(args.profile), args.compile_seconds)
        return 0
    rows: list[dict[str, Any]] = []
    taken = [(op, i) for op in args.ops for i in args.shapes if op in TAKES[int(i)]]
    tasks = [(peer, op, i) for op, i in taken for peer in args.peers]
    if not args.no_accuracy:
        tasks += [(peer, op, "accuracy") for op in args.ops for peer in args.peers]
    with tempfile.TemporaryDirectory() as folder:
        start = functools.partial(start_worker, args, f"{folder}/lock")
        together = [task for task in tasks if task[0] not in TUNES]
        groups = [together[i : i + args.jobs] for i in range(0, len(together), args.jobs)]
        groups += [[task] for task in tasks if task[0] in TUNES]
        for group in groups:
            with ThreadPoolExecutor(len(group)) as pool:
                rows += itertools.chain(*pool.map(start, group))
    text = tables(rows)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "kernels.json").write_text(json.dumps(rows, indent=1))
        (args.out / "kernels.md").write_text(text + "\n")
    return int(any("unfinished" in row for row in rows))


def start_worker(args: argparse.Namespace, lock: str, task: tuple[str, str, str]) -> list[dict[str, Any]]:
    root = pathlib.Path(__file__).resolve().parent.parent
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false", TF_CPP_MIN_LOG_LEVEL="2")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    peer, _, what = task
    if peer in TORCH:
        environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, __file__, "--role", *task, lock, *["--profile", what] * (what in args.profile)]
    command += ["--compile_seconds", str(args.compile_seconds)]
    limit = args.fla_seconds if peer in TUNES else None
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=environment, check=False, timeout=limit
        )
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        rows = rows or [heading(*task) | {"error": f"exit status {done.returncode}", "unfinished": True}]
    except subprocess.TimeoutExpired:
        rows = [heading(*task) | {"error": f"not done after {limit:.0f} s", "unfinished": True}]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())

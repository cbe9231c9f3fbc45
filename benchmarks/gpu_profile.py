"""Where the GPU time of a program goes, by kernel: what `benchmarks.train_step --profile` prints."""

import collections
import functools
import glob
import re
import tempfile
from collections.abc import Callable
from typing import Any

GROUPS = (  # the first pattern that a kernel's name holds says what it is
    ("recurrence", r"scan|chunk|channel|delta_|additive_"),
    ("attention", r"cudnn|flash|fmha|sdpa"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|wgmma|xmma|dot"),
    ("copies", r"memcpy|memset|copy|transpose"),
    ("element-wise and reductions", r""),
)


def kernels(run: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """(kernel's name, launches, milliseconds in all) of what ``run`` makes the first GPU do, longest first.

    ``run`` must return what it computes: the trace ends when that is ready.
    """
    import jax
    from jax.profiler import ProfileData

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        path = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)[0]
        plane = ProfileData.from_file(path).find_plane_with_name("/device:GPU:0")
        if plane is None:
            raise ValueError("the trace has no /device:GPU:0: profiles need a GPU")
        spent: dict[str, list[float]] = collections.defaultdict(list)
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    spent[event.name].append(event.duration_ns / 1e6)
    return sorted(((name, len(ms), sum(ms)) for name, ms in spent.items()), key=lambda row: -row[2])


def torch_kernels(run: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """As `kernels`, of what PyTorch launches."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    rows = [(one.key, one.count, one.self_device_time_total / 1e3) for one in profile.key_averages()]
    return sorted((row for row in rows if row[2]), key=lambda row: -row[2])


def microseconds(calls: int, run: Callable[[], Any]) -> float:
    """On the device, a call: the mean of ``calls`` after a first one."""
    import jax

    jax.block_until_ready(run())
    rows = kernels(functools.partial(again, calls, run))
    return sum(ms for _, _, ms in rows) / calls * 1e3


def again(calls: int, run: Callable[[], Any]) -> Any:
    """What the last of ``calls`` calls returns; what the others do is not kept."""
    for _ in range(calls):
        last = run()
    return last


def groups(rows: list[tuple[str, int, float]]) -> dict[str, float]:
    """Milliseconds by group of kernels."""
    found: dict[str, float] = collections.defaultdict(float)
    for name, _, ms in rows:
        found[next(group for group, pattern in GROUPS if re.search(pattern, name.lower()))] += ms
    return dict(found)


def table(rows: list[tuple[str, int, float]], top: int = 25) -> str:
    """The groups' shares, then the ``top`` kernels."""
    total = sum(ms for _, _, ms in rows)
    lines = [f"{total:9.2f} ms on the GPU"]
    lines += [
        f"{ms:9.2f} {ms / total:6.1%}  {group}"
        for group, ms in sorted(groups(rows).items(), key=lambda g: -g[1])
    ]
    lines += [f"{ms:9.2f} {ms / total:6.1%}  {count:5d} x {name[:90]}" for name, count, ms in rows[:top]]
    return "\n".join(lines)

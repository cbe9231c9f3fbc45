"""The measurements and tests of the docs that need a GPU, in order of worth, for `benchmarks.acceptance`.

Seconds are guesses, for a host of 16 cores and four processes a card. Not here is what needs a trained run,
data or another checkout (docs/eval.md, docs/linearise.md, docs/step.md).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Job(NamedTuple):
    """command: behind `python`, in the root of this repository.  {jobs}: processes.  {output}: a folder.

    timed: has a card alone.  shows: issues and page.  after: a job that ends before, where both are to run.
    environment: beside what there is; {output} as in the command.
    """

    name: str
    command: str
    seconds: float
    timed: bool
    shows: str
    after: str = ""
    environment: Mapping[str, str] = {}


KERNELS, SCAN, OTHER = "17: docs/kernels.md", "17: docs/kernels_scan.md", "17, 23: docs/kernels_other.md"
PORTABLE = "23: docs/kernels_portable.md"
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}  # as docs/step.md says
TESTS = {  # those that were cut find their programs the next time
    "JAX_COMPILATION_CACHE_DIR": "{output}/programs_tests",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
PROGRAMS = MEMORY | {"JAX_COMPILATION_CACHE_DIR": "{output}/programs"}


def tests(name: str, seconds: float, *patterns: str) -> Job:
    found = {str(path.relative_to(ROOT)) for one in patterns for path in ROOT.glob(f"tests/test_{one}.py")}
    command = "-m pytest -v -m gpu -n {jobs} --dist worksteal -p no:cacheprovider --durations=12"
    command = " ".join([command, *sorted(found)])
    return Job(f"tests_{name}", command, seconds, False, "17, 23: CONTRIBUTING.md", "", TESTS)


def kernels(name: str, seconds: float, options: str, shows: str = KERNELS, **more: Any) -> Job:
    command = f"benchmarks/kernels.py {options} --jobs {{jobs}} --out {{output}}/kernels_{name}"
    return Job(f"kernels_{name}", command, seconds, True, shows, **more)


def step(name: str, config: str, backends: str, shows: str) -> list[Job]:
    """A train step: compiled ahead, then timed."""
    command = f"-m benchmarks.train_step --config=configs/hybrid.py:{config} --batch_size=8 --seq_len=4096"
    command, ahead = f"{command} --backends={backends}", f"compile_{name}"
    return [
        Job(ahead, f"{command} --steps=0", 60, False, shows, "", PROGRAMS),
        Job(f"step_{name}", f"{command} --profile", 45, True, shows, ahead, PROGRAMS),
    ]


def step_rows(name: str, rows: str, seconds: float) -> Job:
    """Rows of docs/step.md, which it compiles itself; one that was cut finds its programs the next time."""
    command = f"-m benchmarks.step_rows --rows={rows} --jobs={{jobs}}"
    return Job(f"rows_{name}", command, seconds, True, "19: docs/step.md", "", PROGRAMS)


def first_step(name: str, seconds: float) -> Job:
    command, shows = f"-m benchmarks.step_rows --first={name}-kda", "19: docs/first_step.md"
    return Job(f"first_step_{name}", command, seconds, True, shows, "", MEMORY)


def hard(dim: int, seconds: float, more: str = "") -> Job:
    command = f"-m benchmarks.hard_inputs --tokens 4096 --key_dim {dim} {more}".rstrip()
    return Job(f"hard_{dim}", command, seconds, False, SCAN)


def op(name: str, seconds: float) -> Job:
    command = f"-m benchmarks.ops {name} --backends=triton,hopper,xla"
    return Job(f"ops_{name}", command, seconds, True, OTHER)


def fla(op: str) -> list[Job]:
    """Beside flash-linear-attention, whose kernels are compiled ahead, of an op at two shapes."""
    ahead, triton = f"compile_fla_{op}", {"TRITON_CACHE_DIR": "{output}/triton"}
    command = f"benchmarks/peer_fla.py --ops {op} --shapes 0,3 --accuracy {op} --slices {{jobs}}"
    options = f"--peers fla_unchecked,triton,ours --ops {op} --shapes 0,3"
    return [
        Job(ahead, f"{command} --seconds 400", 250, False, PORTABLE, "", triton),
        kernels(f"fla_{op}", 150, options, PORTABLE, after=ahead, environment=triton),
    ]


JOBS = [
    tests("heads", 150, "hopper_forward", "hopper_backward", "hopper_w*"),
    kernels("kda", 150, "--peers ours,jla,nvidia --ops kda --profile squares"),
    tests("channels", 150, "hopper_channel*", "hopper_one_pass*"),
    Job("first_call", "benchmarks/first_call.py --runs 2", 60, True, "17, 23: docs/kernels.md"),
    *step("1.3b_gdn", "1.3b,gdn,3:1", "auto", "17: docs/step.md"),
    *step("1.3b_retnet", "1.3b,retnet,3:1", "auto", "17: docs/step.md"),
    tests("portable", 100, "triton", "elementwise_kernels", "step_kernels", "short_conv"),
    tests("attention", 60, "softmax_attention", "attention_part", "token_cache"),
    kernels("portable", 300, "--peers triton,ours,xla --shapes 0,3", PORTABLE),
    *step("portable", "340m,kda,3:1", "triton+cudnn+xla,cudnn+xla", PORTABLE),
    kernels("kda_more", 320, "--peers ours,jla,nvidia --ops kda --shapes more --profile more --no_accuracy"),
    kernels("gated_deltanet", 220, "--ops gated_deltanet --shapes all --profile all"),
    kernels("gla", 160, "--ops gla --shapes all --profile all"),
    kernels("deltanet", 100, "--ops deltanet --shapes all --profile all"),
    kernels("simple_gla", 140, "--ops simple_gla --shapes all --profile all"),
    hard(128, 240),
    hard(64, 240),
    hard(256, 150, '--cases "plain,beta 1.5,beta 2,a run,1e7,cosine"'),  # what kernels take
    op("elementwise", 100),
    op("short_conv", 60),
    step_rows("340m", "340m-kda,340m-full,340m-65536", 120),
    step_rows("1.3b", "1.3b-kda,1.3b-full,1.3b-gdn", 150),
    step_rows("jla", "jla-gdn,jla-kda,jla-gdn-dots,jla-kda-dots", 200),
    first_step("340m", 200),
    first_step("1.3b", 260),
    *(job for op in ("kda", "gated_deltanet", "deltanet", "gla", "simple_gla") for job in fla(op)),
]

"""A training step of flash-linear-attention's own model beside ours: one architecture, one optimiser.

    python benchmarks/peer_fla_step.py [--configs 340m,deltanet,pure 340m,gdn,pure] [--rounds=2] [--compile] \
        [--slices=6] [--profile] [--batch_size=8] [--seq_len=4096] [--config.section.field=value ...]

FLA's model is made from the config.json that an export of ours would have, so both have the same parameters,
to the number (`340m,deltanet,pure` is flame's delta_net_340M). It trains as flame does, on one GPU: bf16
parameters and gradients, float32 masters in a fused AdamW, a clipped norm, no activation checkpoints; with
each of its two losses, of logits and of hidden states; with --compile each layer by torch.compile besides,
as flame's option does. Ours is `train_step.py`. Both read a step's loss when the next is queued.

FLA compiles and times every configuration of every kernel at its first step. So before anything is timed
--slices processes a config compile a slice of them each (peer_fla.py), with one layer, while ours fills its
compilation cache; 0 leaves that out. Then the timed processes take turns, alone on the GPU. Where FLA refuses
this Triton (Gated DeltaNet's gradients on Hopper with 3.4 to 3.7.0, its issue 640) the refusal is a row, and
what it refuses is timed under that name. Prints a JSON line a row, then a table; with --profile the GPU time
of one step of FLA's by kernel.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import train_step

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATHS = {"logits": {"fuse_linear_cross_entropy": False}, "linear": {"fuse_linear_cross_entropy": True}}
SHAPE = ("batch_size", "seq_len")
Row = dict[str, Any]


def resolved(spec: str, fields: dict[str, str]) -> Any:
    """Our config of an argument of configs/hybrid.py, or of a file."""
    from hybridlm import config as configs

    spec = spec if ".py" in spec else f"{ROOT}/configs/hybrid.py:{spec}"
    return configs.resolve(configs.load(spec, fields | {"mesh.data": "1", "mesh.fsdp": "1"}))


def described(config: Any) -> tuple[str, dict[str, Any], int]:
    """(FLA's model_type, fields of its config.json, parameters of ours); ConfigError: FLA has no such."""
    from hybridlm import model
    from hybridlm.convert import families

    definition = model.build(config)
    model_type, values = families.written(definition)
    return model_type, values, sum(math.prod(one.shape) for one in model.shapes(definition).values())


def network(model_type: str, values: dict[str, Any]) -> Any:
    """FLA's model, initialised in float32, on the GPU if there is one."""
    import fla.models  # noqa: F401  (transformers then knows its model types)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: value for name, value in values.items() if name not in ("model_type", "architectures")}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).train()


class Step:
    """An update of a PyTorch model in mixed precision: bf16 copies of float32 masters, gradients in bf16.

    optimizer: the section of our config, of which learning rate, betas, eps, decay and clipping are taken.
    """

    def __init__(self, model: Any, optimizer: Any):
        import torch

        self.torch, self.model, self.clip = torch, model, optimizer.clip_norm
        self.masters = [one.detach().clone() for one in model.parameters()]
        self.adam = torch.optim.AdamW(
            self.masters, lr=optimizer.learning_rate, betas=(optimizer.b1, optimizer.b2), eps=optimizer.eps,
            weight_decay=optimizer.weight_decay, fused=True,
        )  # fmt: skip
        for master in self.masters:
            master.grad = torch.empty_like(master)
        model.bfloat16()
        self.parameters = list(model.parameters())

    def __call__(self, tokens: Any) -> Any:
        """Takes a step on tokens [B, T]; its loss, still on the device."""
        loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        with self.torch.no_grad():
            grads = [one.grad for one in self.masters], [one.grad for one in self.parameters]
            self.torch._foreach_copy_(*grads)
            self.model.zero_grad()
            if self.clip:
                self.torch.nn.utils.clip_grad_norm_(self.masters, self.clip, foreach=True)
            self.adam.step()
            self.torch._foreach_copy_(self.parameters, self.masters)
        return loss.detach()


def timed(step: Step, tokens: Any, steps: int) -> Row:
    """As `train_step.measure`; first_step_s is the first step alone, with what it compiles and tunes."""
    cuda = step.torch.cuda
    if cuda.is_available():
        cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    losses, seconds = [float(step(tokens))], []
    first = time.perf_counter() - start
    behind = step(tokens)
    losses.append(float(behind))  # the queue is empty: the next interval is one step and its launch
    behind, start = step(tokens), time.perf_counter()
    for _ in range(steps):
        queued = step(tokens)
        losses.append(float(behind))
        behind, now = queued, time.perf_counter()
        seconds.append(now - start)
        start = now
    losses.append(float(behind))
    peak = cuda.max_memory_allocated() if cuda.is_available() else float("nan")
    return {
        "step_s": median(seconds),
        "spread_s": max(seconds) - min(seconds),
        "tokens_per_second": tokens.numel() / median(seconds),
        "first_step_s": first,
        "peak_gib": peak / 2**30,
        "loss": losses[-1],
        "losses": losses,
    }


def attempts(spec: str, args: argparse.Namespace, fields: dict[str, str]) -> Iterator[Row]:
    """Rows of FLA's model: a loss a row, then compiled; what it refuses, and what it then does unchecked."""
    import gpu_profile
    import peers
    import torch

    from hybridlm import cost

    config = resolved(spec, fields)
    model_type, values, parameters = described(config)
    model = network(model_type, values)
    theirs = sum(one.numel() for one in model.parameters())
    if theirs != parameters:
        raise ValueError(f"{spec}: {theirs} parameters of FLA's {model_type}, {parameters} of ours")
    step, said = Step(model, config.optimizer), {"config": spec, "parameters": theirs}
    batch = train_step.random_batch(args.batch_size, args.seq_len, config.model.vocab_size)
    tokens = torch.tensor(batch["tokens"], device=step.masters[0].device).long()
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    flops = cost.train_flops_per_token(config) / (cost.peak_flops(kind) or float("nan"))
    peer = peers.Fla()
    wanted = [(loss, way) for way in ("eager", "compiled")[: 1 + args.compile] for loss in PATHS]
    while wanted:
        loss, way = wanted.pop(0)
        if way == "compiled" and not hasattr(model.model.layers[0], "_orig_mod"):
            model.model.layers = torch.nn.ModuleList(torch.compile(one) for one in model.model.layers)
        vars(model.config).update(PATHS[loss])
        said["code"] = f"{peer.name}, {way}, {loss}"
        try:
            row = timed(step, tokens, args.steps)
        except RuntimeError as error:
            yield said | {"error": str(error).splitlines()[0]}
            model.zero_grad()
            if "Triton" in str(error) and not isinstance(peer, peers.FlaUnchecked):
                peer = peers.FlaUnchecked()
                wanted.insert(0, (loss, way))
            continue
        yield said | row | {"mfu": flops * row["tokens_per_second"]}
        if args.profile:
            print(gpu_profile.table(gpu_profile.torch_kernels(functools.partial(step, tokens))), flush=True)


def fill(spec: str, number: int, args: argparse.Namespace, fields: dict[str, str]) -> None:
    """Compiles a slice of the configurations of every kernel of one layer, at the shapes that are timed."""
    import peers
    import torch
    from peer_fla import compile_slice

    compile_slice(number, args.slices)
    peers.FlaUnchecked()
    config = resolved(spec, fields)
    model_type, values, _ = described(config)
    model = network(model_type, values | {"num_hidden_layers": 1, "vocab_size": 256})
    tokens = torch.zeros((args.batch_size, args.seq_len), dtype=torch.long, device=model.device)
    step = Step(model, config.optimizer)
    for settings in PATHS.values():
        vars(model.config).update(settings)
        step(tokens)


def warm(args: argparse.Namespace, caches: dict[str, str]) -> None:
    """Every program of the timed processes into its cache, side by side."""
    fills = [("--fill", spec, str(number)) for spec in args.configs for number in range(args.slices)]
    envs = {"--fill": {"FLA_CACHE_RESULTS": "0", "JAX_PLATFORMS": "cpu"}}
    running, start = [], time.monotonic()
    for task in [*(("--build", spec) for spec in args.configs), *fills]:
        env = os.environ | envs.get(task[0], {"JAX_COMPILATION_CACHE_DIR": caches[task[1]]})
        running.append((task, subprocess.Popen([sys.executable, *sys.argv, *task], env=env)))
    for task, process in running:
        try:
            status: Any = process.wait(max(0.1, args.seconds - (time.monotonic() - start)))
        except subprocess.TimeoutExpired:
            process.kill()
            status = "killed"
        print(f"{' '.join(task)}: status {status}, {time.monotonic() - start:.0f} s", flush=True)


def ours(spec: str, args: argparse.Namespace, rest: list[str], cache: str) -> list[Row]:
    """The row of `train_step.py`."""
    file = spec if ".py" in spec else f"configs/hybrid.py:{spec}"
    given = [f"--{name}={getattr(args, name)}" for name in SHAPE]
    options = [f"--config={file}", "--backends=auto", f"--steps={args.steps}", *given, *rest]
    said = {"config": spec, "code": "ours"}
    try:
        row = train_step.in_tree(ROOT, options, cache) | said
    except subprocess.CalledProcessError as error:
        row = said | {"error": f"ended with {error.returncode}"}
    print(json.dumps(row), flush=True)
    return [row]


def theirs(spec: str) -> list[Row]:
    """The rows of FLA's in a process of its own, as far as it gets."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}  # ours only describes the model there
    command = [sys.executable, *sys.argv, "--one", spec]
    rows = []
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("{"):
                rows.append(json.loads(line))
            print(line, end="", flush=True)
    if process.returncode:
        rows.append({"config": spec, "code": "fla", "error": f"ended with {process.returncode}"})
    return rows


def table(rows: list[Row]) -> str:
    heads = "config", "code", "tokens/s, median (least to most)", "MFU", "first step", "memory", "last loss"
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for config, code in dict.fromkeys((row["config"], row["code"]) for row in rows):
        same = [row for row in rows if (row["config"], row["code"]) == (config, code)]
        measured = [row for row in same if "error" not in row]
        if not measured:
            cells = [same[0]["error"], *[""] * (len(heads) - 3)]
        else:
            speeds = [row["tokens_per_second"] for row in measured]
            cells = [f"{median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})"]
            cells += [f"{median(row['mfu'] for row in measured):.1%}", f"{measured[0]['first_step_s']:.1f} s"]
            cells += [f"{max(row['peak_gib'] for row in measured):.1f} GiB", f"{measured[0]['loss']:.4f}"]
        lines.append("| " + " | ".join([config, code, *cells]) + " |")
    return "\n".join(lines)


def parsed() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", default=["340m,deltanet,pure"])
    parser.add_argument("--slices", type=int, default=6, help="a config's processes that compile before")
    parser.add_argument("--seconds", type=float, default=220, help="time allowed for that")
    parser.add_argument("--rounds", type=int, default=2, help="of FLA's and ours; balanced where even")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--fill", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--build", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if wrong := [word for word in rest if not (word.startswith("--config.") and "=" in word)]:
        parser.error(f"unknown: {' '.join(wrong)}; a field of the config is --config.section.field=value")
    return args, rest


def main() -> None:
    args, rest = parsed()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is beside ours at first
    fields = dict(word.removeprefix("--config.").split("=", 1) for word in rest)
    fields |= {f"train.{name}": str(getattr(args, name)) for name in SHAPE}
    if args.fill:
        fill(args.fill[0], int(args.fill[1]), args, fields)
        return
    if args.build:
        config = resolved(args.build, fields)
        batch = train_step.random_batch(args.batch_size, args.seq_len, config.model.vocab_size)
        train_step.measure(config, batch, args.steps, ready=sys.exit)
    if args.one:
        for row in attempts(args.one, args, fields):
            print(json.dumps(row), flush=True)
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        caches = {spec: f"{folder}/{number}" for number, spec in enumerate(args.configs)}
        if args.slices:
            warm(args, caches)
        for turn in range(args.rounds):
            for spec in args.configs:
                mine = functools.partial(ours, spec, args, rest, caches[spec])
                for run in (functools.partial(theirs, spec), mine)[:: 1 if turn % 2 == 0 else -1]:
                    rows += run()
    print(table(rows))


if __name__ == "__main__":
    main()

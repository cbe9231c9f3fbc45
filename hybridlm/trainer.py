"""Training: the stages of one run, or of several that differ in seed and learning rate only.

Several are `Member`s of one loop, under `jax.vmap`; a member that fails leaves the others alone.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
from jax.sharding import Mesh

from hybridlm import config as configs
from hybridlm import cost, optimizer, sharding, stages
from hybridlm.config import Config
from hybridlm.data import baselines
from hybridlm.errors import ConfigError, RunError
from hybridlm.loop import Loop
from hybridlm.member import Evaluate, Member, Metrics
from hybridlm.run import cli, interrupt, logbook, picture, private, processes, programs, show
from pallas_kernels import auto_means

log = logging.getLogger("hybridlm")


def train(
    config: Config, workdir: str | Path, resume: str = "auto", evaluate: Evaluate | None = None
) -> Metrics:
    """Trains what ``config`` describes and returns the last line of metrics.jsonl.

    workdir: gets config.json, layers.json, metrics.jsonl, events.jsonl, loss.png, checkpoints/.
    resume: auto, must or never; see `checkpoint.choose`.
    evaluate: measures the model beside each validation; its metrics join those of the step.
    Raises ConfigError before anything is compiled, RunError when the run cannot go on, and Stopped when it
    was asked to leave (`interrupt.Stop`) and has saved a checkpoint.
    """
    [member] = together([config], [Path(workdir)], resume, [evaluate])
    if member.failed:
        raise RunError(member.failed)
    if processes.first():
        tell(member)
    return member.metrics


def alike(config: Config) -> str:
    """Equal for configs whose runs can be trained together."""
    return repr(config.replace(train__seed=0, optimizer__learning_rate=0.0))


def together(
    resolved: Sequence[Config],
    workdirs: Sequence[Path],
    resume: str = "auto",
    evaluates: Sequence[Evaluate | None] | None = None,
) -> list[Member]:
    """Trains configs that are `alike`, one in each workdir, in one program; what became of each.

    With several, tokens_per_second in the metrics is that of all together, and ``packed`` their number.
    """
    config = resolved[0]
    programs.enable(config.train.compilation_cache)
    workdirs = [workdir.absolute() for workdir in workdirs]
    if processes.first():
        say_unwarmed(config)  # of all members: only seed and rate differ
    with (
        interrupt.Stop(config.train.max_minutes) as stop,
        cli.stored(workdirs[0], "Checkpoints saved before are intact."),
    ):
        mesh = sharding.make_mesh(config.mesh)
        if len(resolved) > 1 and "context" in mesh.shape:
            problem = "runs that are trained together do not cut sequences"
            raise ConfigError("mesh.context", mesh.shape["context"], problem, "Set mesh.context=1.")

        def joined(part: Sequence[tuple[int, Config]]) -> list[Member]:
            begin, first = part[0]
            configs.check_batch(first.train, mesh.shape)
            rows = sharding.batch_rows(mesh, first.train.batch_size)
            given = zip(part, resolved, workdirs, evaluates or [None] * len(workdirs), strict=True)
            return [Member(one, at, evaluate, rows, whole, begin) for (_, one), whole, at, evaluate in given]

        parts = zip(*(stages.split(one, configs.resolve) for one in resolved), strict=True)
        for members in list(map(joined, parts)):  # a later stage is refused before the first
            again = members[0].stage_begin and resume == "never"
            stage(members, mesh, stop, "auto" if again else resume)
            if any(member.failed for member in members):
                break
        for member in members if processes.first() else ():
            if not member.failed:
                draw(member)
    return members


def say_unwarmed(config: Config) -> None:
    """Warns of a run, or a stage, that ends before the learning rate is at its peak."""
    for begin, one in stages.split(config, configs.resolve):
        if why := optimizer.unwarmed(one.optimizer, one.train.steps - begin):
            log.warning("%s: %s", "the run" if one is config else f"the stage after step {begin}", why)


def stage(members: Sequence[Member], mesh: Mesh, stop: interrupt.Stop, resume: str) -> None:
    """Trains one stage of the members, or what there is of them without stages."""
    for member in members:
        processes.same(member.identity())
    with ExitStack() as stack:
        for member in members:
            member.open(stack, resume)
        stack.enter_context(jax.set_mesh(mesh))
        if len(members) > 1:
            stack.enter_context(auto_means("xla"))  # the kernels have no rule for a batch of runs
        Loop(members, mesh, stop).train(resume)


@logbook.harmless("drawing loss.png")
def draw(member: Member) -> None:
    """loss.png, which no trained step may depend on."""
    records = logbook.read(member.workdir / "metrics.jsonl")
    size = f"{cost.parameters(member.config):,} parameters"
    title = f"{member.workdir.name}: {member.config.model.pattern}, {size}"
    last = next((r for r in reversed(records) if r.get("val_bpb")), None)
    nats = last["val_loss"] / last["val_bpb"] if last else 0.0  # of a token, for each bit of a byte
    levels = {name: nats * bits for name, bits in references(member).items()} if last else {}
    picture.plot(records, member.workdir / "loss.png", title, levels)


def references(member: Member) -> dict[str, float]:
    """Bits per byte of the held-out text without a model; nothing where tokens stand for no bytes."""
    text = member.val_data.held_out_bytes(member.config.eval.batches)
    if not text:
        return {}
    return {
        "gzip -9": baselines.gzip_bits_per_byte(text),
        "order-0 entropy": baselines.order0_bits_per_byte(text),
    }


@logbook.harmless("the summary")
def tell(member: Member) -> None:
    """Prints what the run came to: held-out loss beside references, a sample, paths."""
    config, metrics, say = member.config, member.metrics, show.line
    text = member.val_data.held_out_bytes(config.eval.batches)
    if "val_loss" in metrics:
        say(f"held-out loss: {metrics['val_loss']:.4f} nats per token")
    if text and "val_bpb" in metrics:
        say(f"held-out bits per byte, on the same {len(text):,} bytes:")
        say(f"  this model       {metrics['val_bpb']:.3f}")
        for name, bits in references(member).items():
            say(f"  {name:<16} {bits:.3f}")
    if "sample" in metrics:
        say(f"sample:\n{metrics['sample']}")
    say("written:")
    for name in ("metrics.jsonl", "loss.png", "config.json", "layers.json", "checkpoints"):
        say(private.hide(f"  {member.workdir / name}"))

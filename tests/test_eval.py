"""A run measured from its workdir: scores of the subject, the file of results, the command line."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import eval.__main__ as command
from eval import in_loop, report, runner, statistics, subject, tasks
from eval.haystack import load as haystack
from hybridlm import config as configs
from hybridlm import data
from hybridlm import model as lm
from hybridlm.errors import ConfigError, RunError
from hybridlm.rows import single_document
from hybridlm.run import checkpoint
from tests import tiny


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of tiny.config with fresh parameters as its checkpoint at step 3."""
    folder = tmp_path_factory.mktemp("run")
    config = configs.resolve(tiny.config(tiny.write_text(folder), train__seq_len=64))
    definition = lm.build(config)
    params = jax.jit(lambda key: lm.init(definition, key))(jax.random.key(0))
    params = lm.unstack(definition, params)
    sharper = lambda name, x: 4 * x if name.startswith("layers.") and x.ndim > 1 else x  # than at birth
    params = {name: sharper(name, x) for name, x in params.items()}
    (folder / "config.json").write_text(configs.to_json(config))
    with checkpoint.Checkpoints(folder / "checkpoints") as saves:
        saves.save(3, {"params": params}, {"step": 3, "format": checkpoint.FORMAT})
    return folder


@pytest.fixture(scope="module")
def loaded(workdir):
    return subject.load(workdir)


def test_wilson_interval():
    """Against the roots of (p - mean)^2 = z^2 p (1 - p) / n, its definition."""
    for scores in ([1, 0, 1, 1], [0] * 30, [1] * 30, [0.5, 1, 0.25]):
        got = statistics.accuracy(scores)
        n, z2 = len(scores), statistics.Z**2
        roots = sorted(np.roots([1 + z2 / n, -(2 * got.mean + z2 / n), got.mean**2]).real)
        assert (got.low, got.high) == pytest.approx(roots, abs=1e-6)
        assert got.mean == pytest.approx(np.mean(scores)) and got.samples == n
    assert math.isnan(statistics.accuracy([]).mean)


def test_log_likelihoods_equal_a_direct_forward(loaded):
    rng = np.random.default_rng(0)
    lengths = [(1, 1), (5, 3), (70, 2), (2, 90), (9, 1), (4, 4)]
    pairs = [(rng.integers(256, size=a).tolist(), rng.integers(256, size=b).tolist()) for a, b in lengths]
    programs = subject._token_scores._cache_size()
    done = []
    got = loaded.log_likelihoods(pairs, done.append)
    assert subject._token_scores._cache_size() - programs <= 2 and sum(done) == len(pairs)
    forward = jax.jit(lambda p, t: lm.logits(loaded.definition, p, t, single_document(*t.shape)))
    for (context, continuation), (value, greedy) in zip(pairs, got, strict=True):
        whole = np.zeros((1, 96), np.int32)
        whole[0, : len(context) + len(continuation)] = context + continuation
        logits = np.asarray(forward(loaded.params, whole))[0, len(context) - 1 :][: len(continuation)]
        log_probs = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(continuation)), continuation]
        assert value == pytest.approx(log_probs.sum(), rel=1e-5)
        assert greedy == (logits.argmax(axis=1).tolist() == continuation)


def test_greedy_continuations_are_greedy(loaded):
    prompts = [loaded.encode("gate"), loaded.encode("state of decay, a chunk")]
    texts = dataclasses.replace(loaded, batch_tokens=1).complete(prompts, max_new_tokens=5)
    assert texts == loaded.complete(prompts, max_new_tokens=5)  # alone and together, in order
    pairs = [(p, loaded.text_tokenizer.encode(t)) for p, t in zip(prompts, texts, strict=True)]
    if all("\N{REPLACEMENT CHARACTER}" not in text for text in texts):
        assert [greedy for _, greedy in loaded.log_likelihoods(pairs)] == [True, True]


class Chosen:
    """A task that is already measured, but for counting how often it is run."""

    name, source, about, lengths, text, runs = "chosen", "here", "nothing", (8, 16), True, 0

    def chance(self, subject, setting):
        return 0.25

    def run(self, subject, setting, progress):
        self.runs += 1
        if setting.length == 32:
            raise ConfigError("--lengths", 32, "is not to be")
        return np.array([1.0, 0.0, 1.0, 1.0][: setting.samples])


def plan(**fields):
    return runner.Plan(**{"lengths": (), "samples": 4, "seed": 0, "haystack": haystack()} | fields)


def test_results_are_kept_and_measured_again_only_if_they_differ(loaded, tmp_path):
    task, path = Chosen(), tmp_path / "eval.json"
    keep = lambda results: runner.write(path, results, {"step": 3})
    first = runner.measure(loaded, [task], plan(), runner.read(path), done=keep)
    assert task.runs == 2 and first == runner.read(path)
    assert first["chosen@8"]["accuracy"] == 0.75 and first["chosen@8"]["samples"] == 4
    assert first["chosen@8"]["chance"] == 0.25 and list(first) == ["chosen@8", "chosen@16"]
    again = runner.measure(loaded, [task], plan(), runner.read(path), done=keep)
    assert task.runs == 2 and again == first
    runner.measure(loaded, [task], plan(seed=1, lengths=(16,)), runner.read(path), done=keep)
    assert task.runs == 3 and list(runner.read(path)) == ["chosen@8", "chosen@16"]
    path.write_text("{")
    with pytest.raises(RunError, match="not a file of results"):
        runner.read(path)


def test_what_cannot_be_measured_is_left_out_by_name(loaded, caplog):
    both = [Chosen(), tasks.TASKS["S5"]]
    results = runner.measure(loaded, both, plan(lengths=(8, 32)))
    assert "chosen@32 left out" in caplog.text and "chosen@8" in results
    with pytest.raises(ConfigError):
        runner.measure(loaded, both[:1], plan(lengths=(32,)))
    mute = dataclasses.replace(loaded, tokenizer=None)
    with pytest.raises(ConfigError, match="stand for no text"):
        runner.measure(mute, [tasks.TASKS["passkey"]], plan())


@pytest.mark.parametrize("name", [task.name for task in tasks.labelled.TASKS])
def test_labels_are_as_many_as_the_chance_says(loaded, name):
    """1 / chance answers occur and no more, and a subject that is always right scores 1 on each sample."""
    task, length = tasks.TASKS[name], tasks.TASKS[name].lengths[0]
    vocab = 260 if length < 260 else 2048
    setting = plan().settings(task)[0]._replace(length=length, samples=64)
    config = task.data_config(loaded.config.data, 256)
    examples = data.build(config, split="val", batch_size=256, seq_len=length, seed=0, vocab_size=vocab)
    targets = examples.batch(0)["targets"]
    labels = targets[targets >= 0]
    resized = dataclasses.replace(loaded.definition.model, vocab_size=vocab)
    sized = dataclasses.replace(loaded, definition=dataclasses.replace(loaded.definition, model=resized))
    possible = round(1 / task.chance(sized, setting))
    assert len(np.unique(labels)) <= possible
    if len(labels) > 20 * possible:
        assert len(np.unique(labels)) == possible

    class Guesser:
        config, definition, tokenizer = sized.config, sized.definition, None
        rows_per_batch = staticmethod(lambda length: 7)
        token_scores = staticmethod(lambda batch: (None, batch["targets"] >= 0))  # always right

    done = []
    assert task.run(Guesser, setting, done.append).tolist() == [1.0] * 64 and sum(done) == 64


def test_command_line(workdir, capsys):
    run = lambda *flags: command.main([f"--workdir={workdir}", *flags])
    assert run("--tasks=passkey,induction", "--lengths=512", "--samples=3") == 0
    shown = capsys.readouterr().out
    assert "passkey" in shown and "induction" in shown and "95% interval" in shown
    stored = json.loads((workdir / "eval.json").read_text())
    assert stored["step"] == 3 and set(stored["results"]) == {"passkey@512", "induction@512"}
    assert stored["results"]["induction@512"]["chance"] == pytest.approx(1 / 259)
    assert (workdir / "eval.png").read_bytes().startswith(b"\x89PNG")
    before = (workdir / "eval.json").stat().st_mtime_ns
    assert run("--tasks=passkey", "--lengths=512", "--samples=3") == 0
    assert (workdir / "eval.json").stat().st_mtime_ns == before  # nothing was measured again
    capsys.readouterr()
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    lines = [line.split() for line in listed.splitlines()]
    assert [line[0] for line in lines] == list(tasks.TASKS)
    assert all(
        " ".join(line).endswith(task.source) for line, task in zip(lines, tasks.TASKS.values(), strict=True)
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite=recal"], "Did you mean 'recall'"),
        (["--tasks=passkeys"], "Did you mean 'passkey'"),
        ([], "no task is chosen"),
        (["--tasks=passkey", "--lengths=1k"], "whole numbers"),
        (["--tasks=passkey", "--samples=0"], "at least 1"),
        (["--tasks=passkey", "--haystack=none.txt"], "cannot be read"),
        (["--tasks=passkey", "--workdir=none"], "no config.json"),
        (["--tasks=passkey", "--step=7"], "checkpoints at steps 3"),
    ],
)
def test_bad_input(workdir, capsys, flags, message):
    assert command.main([f"--workdir={workdir}", *flags]) == 2
    assert message in capsys.readouterr().err


def test_in_the_loop(loaded):
    wanted = lambda **fields: configs.resolve(
        tiny.config("python-stdlib:", **{f"eval__{k}": v for k, v in fields.items()})
    )
    assert in_loop.build(wanted()) is None
    with pytest.raises(ConfigError, match=r"eval\.tasks"):
        in_loop.build(wanted(tasks=("parrity",)))
    evaluate = in_loop.build(wanted(tasks=("parity",), task_lengths=(16, 32), task_samples=8))
    metrics = evaluate(loaded.definition, loaded.params, loaded.tokenizer, 1)
    assert set(metrics) == {"eval/parity@16", "eval/parity@32"}
    assert all(0 <= value <= 1 for value in metrics.values())


def test_picture_of_many_tasks(tmp_path):
    results = {
        f"{name}@{length}": {"task": name, "length": length, "accuracy": 0.5, "low": 0.4, "high": 0.6,
                             "chance": chance, "samples": 10}
        for name, chance in (("a", 0.1), ("b", None), ("c", 0.5), ("d", 0.0), ("e", 0.2))
        for length in (64, 1024)
    }  # fmt: skip
    report.plot(results, "run", Path(tmp_path / "x.png"))
    assert (tmp_path / "x.png").stat().st_size > 10_000

"""A run measured from its workdir: scores of the subject, the file of results, the command line."""

import dataclasses
import errno
import io
import json
import math
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib import image
from rich.console import Console

import eval.__main__ as command
from eval import harness, in_loop, paired, report, runner, statistics, subject, tasks
from eval.haystack import load as haystack
from hybridlm import config as configs
from hybridlm import init_from, weights
from hybridlm import model as lm
from hybridlm.data import tokenizer as tokenizers
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


def test_parameters_that_are_not_finite_are_said(workdir, tmp_path, caplog):
    """Of a run that diverged: texts and scores would come all the same. No run starts from them."""
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    definition = weights.load(workdir).definition
    params = lm.unstack(definition, weights.load(workdir).params)
    assert not caplog.text
    name = "layers.0.mixer.q_proj.kernel"
    params[name] = params[name].at[3, 1].set(np.nan)
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as saves:
        saves.save(4, {"params": params}, {"step": 4, "format": checkpoint.FORMAT})
    subject.load(tmp_path)
    assert f"at step 4: 1 of {len(params)} parameters are not finite, {name} among them" in caplog.text
    with init_from.source(tmp_path) as other, pytest.raises(ConfigError, match=rf"init_from = '{name}'"):
        init_from.load(other, definition, weights.load(workdir).params)


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

    def chance(self, config):
        return 0.25

    def run(self, subject, setting, progress):
        self.runs += 1
        if setting.length == 32:
            raise ConfigError("--lengths", 32, "is not to be")
        return np.array([1.0, 0.0, 1.0, 1.0][: setting.samples])


def plan(lengths=(), **fields):
    one = {"length": 0, "samples": 4, "seed": 0, "haystack": haystack()}
    return runner.Plan(lengths, tasks.Setting(**one | fields))


def test_results_are_kept_and_measured_again_only_if_they_differ(loaded, tmp_path):
    task, path = Chosen(), tmp_path / "eval.json"
    keep = lambda own: runner.kept(tmp_path, loaded, own, {"step": 3})
    assert len(loaded.checkpoint) == 16  # of the seal: the step alone would not tell a run trained anew
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


@pytest.mark.parametrize("change", [{"checkpoint": "another"}, {"step": 9}])
def test_results_of_another_checkpoint_are_put_aside(loaded, tmp_path, caplog, change):
    """Also of the same step, trained anew; they are taken up again with the checkpoint that they are of."""
    path, other = tmp_path / "eval.json", dataclasses.replace(loaded, **change)
    keep = lambda results: runner.write(path, results, {"step": 3})
    first = runner.measure(loaded, [Chosen()], plan(), done=keep)
    assert runner.taken_up(tmp_path, loaded) == first and not caplog.text
    assert runner.taken_up(tmp_path, other) == {} and "results of another checkpoint (step 3)" in caplog.text
    assert not path.exists() and runner.read(tmp_path / "eval-3.json") == first
    second = runner.measure(other, [Chosen()], plan(lengths=(8,)), done=keep)
    assert second["chosen@8"]["identity"] != first["chosen@8"]["identity"]
    assert runner.taken_up(tmp_path, other) == second
    if "step" in change:
        assert runner.taken_up(tmp_path, loaded) == first and runner.taken_up(tmp_path, other) == second
    assert paired.unlike(second["chosen@8"], first["chosen@8"]) == ""  # two runs need not be of one step


def test_two_evaluations_at_once_lose_nothing(loaded, tmp_path, caplog):
    """Each began before the other wrote: of one checkpoint, and of two."""
    task = Chosen()
    [one, two] = ({n: r} for n, r in runner.measure(loaded, [task], plan()).items())
    other = dataclasses.replace(loaded, step=9)
    third = runner.measure(other, [task], plan(lengths=(8,)))
    for of, results in ((loaded, one), (other, third), (loaded, two)):
        runner.kept(tmp_path, of, results, {"step": of.step})
    assert runner.read(tmp_path / "eval.json") == one | two
    assert runner.read(tmp_path / "eval-9.json") == third


def test_an_evaluation_does_not_put_back_what_it_read(loaded, tmp_path):
    """Another one measures more samples of chosen@8 while this one, which began before, measures @16."""
    keep = lambda own: runner.kept(tmp_path, loaded, own, {"step": 3})
    measure = lambda *args, known: runner.measure(loaded, [Chosen()], plan(*args), known, done=keep)
    runner.measure(loaded, [Chosen()], plan((8,), samples=2), done=keep)
    known = runner.taken_up(tmp_path, loaded)
    measure((8,), known=known)
    measure((16,), known=known)
    found = runner.read(tmp_path / "eval.json")
    assert {name: one["samples"] for name, one in found.items()} == {"chosen@8": 4, "chosen@16": 4}


def test_what_cannot_be_measured_is_left_out_by_name(loaded, caplog):
    both = [Chosen(), tasks.TASKS["S5"]]
    results = runner.measure(loaded, both, plan(lengths=(8, 32)))
    assert "chosen@32 left out" in caplog.text and "chosen@8" in results
    with pytest.raises(ConfigError):
        runner.measure(loaded, both[:1], plan(lengths=(32,)))
    mute = dataclasses.replace(loaded, tokenizer=None)
    with pytest.raises(ConfigError, match="stand for no text"):
        runner.measure(mute, [tasks.TASKS["passkey"]], plan())


def test_command_line(workdir, capsys, monkeypatch):
    run = lambda *flags: command.main([f"--workdir={workdir}", *flags])
    assert run("--tasks=passkey,induction", "--lengths=512", "--samples=3") == 0
    shown = capsys.readouterr().out
    assert "passkey" in shown and "induction" in shown and "95% interval" in shown and "kB" in shown
    stored = json.loads((workdir / "eval.json").read_text())
    assert stored["step"] == 3 and set(stored["results"]) == {"passkey@512", "induction@512"}
    assert stored["results"]["induction@512"]["chance"] == pytest.approx(1 / 259)
    run_of = weights.load(workdir)
    model = lm.merge(run_of.definition, run_of.params)
    kept = jax.eval_shape(lambda: model.init_cache(1, 512))  # what is really allocated
    assert stored["results"]["passkey@512"]["kept_bytes"] == sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept) if leaf.ndim
    )
    assert (workdir / "eval.png").read_bytes().startswith(b"\x89PNG")
    before = (workdir / "eval.json").stat().st_mtime_ns
    assert run("--tasks=passkey", "--lengths=512", "--samples=3") == 0
    assert (workdir / "eval.json").stat().st_mtime_ns == before  # nothing was measured again
    drawn: list[str] = []
    (workdir / "eval.json").unlink()
    monkeypatch.setattr(command.report, "table", lambda shown, title: runner.write(
        workdir / "eval.json", stored["results"], {"step": 3}  # as another evaluation may meanwhile
    ))  # fmt: skip
    monkeypatch.setattr(command.report, "plot", lambda results, title, path: drawn.extend(results))
    assert run("--tasks=passkey", "--lengths=512", "--samples=3") == 0
    assert set(drawn) == set(stored["results"])
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
        (["--tasks=induction", "--seed=-1"], "at least 0"),
        (["--tasks=passkey", "--haystack=none.txt"], "cannot be read"),
        (["--tasks=passkey", "--workdir=none"], "no config.json"),
        (["--tasks=passkey", "--data_dir=x"], "--data_dir = 'x': is read by none of these tasks"),
        (["--tasks=passkey", "--step=7"], "no checkpoint at step 7: there are checkpoints at steps 3"),
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


def test_a_task_that_fails_in_the_loop_costs_no_other_its_numbers(loaded, monkeypatch, caplog):
    """It is said once; if nothing is left the run gets the error to write down."""

    class Failing(Chosen):
        name = "failing"

        def run(self, subject, setting, progress):
            raise ZeroDivisionError("of its own")

    config = lambda *names: configs.resolve(tiny.config("python-stdlib:", eval__tasks=names))
    known = {"failing": Failing(), "chosen": Chosen()}
    monkeypatch.setattr(in_loop.tasks, "choose", lambda suite, names: [known[name] for name in names])
    evaluate = in_loop.build(config("failing", "chosen"))
    for step in (1, 2):
        metrics = evaluate(loaded.definition, loaded.params, loaded.tokenizer, step)
        assert metrics == {"eval/chosen@16": 0.75}
    assert caplog.text.count("failing@16 left out: of its own") == 1
    with pytest.raises(ZeroDivisionError):
        in_loop.build(config("failing"))(loaded.definition, loaded.params, loaded.tokenizer, 1)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(workdir, capsys, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runner.untrusted, "write_bytes", full)
    monkeypatch.setattr(runner, "measure", lambda *args, **fields: pytest.fail("measured"))
    before = sorted(path.name for path in workdir.iterdir())
    assert command.main([f"--workdir={workdir}", "--tasks=S3"]) == 2
    shown = capsys.readouterr().err
    assert "cannot be written to (No space left on device)" in shown and shown.count("\n") == 1
    assert sorted(path.name for path in workdir.iterdir()) == before


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "eval.json"
    runner.write(path, {}, {"step": 1})
    before = path.read_bytes()

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match=r"eval\.json: cannot be written \(No space left on device\)"):
        runner.write(path, {}, {"step": 2})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    ["[]", '{"results": []}', '{"results": {"a@1": {"task": 1}}}', "[" * 5000, '{"results": {"a@1": null}}'],
)
def test_damaged_results(tmp_path, content):
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(RunError, match="not a file of results"):
        runner.read(tmp_path / "eval.json")


def test_the_tokenizer_beside_the_weights_is_the_one(workdir, tmp_path):
    """Beside them first, then an import's own, then the data's; ids that the model has not are refused."""
    vocabulary = {character: index for index, character in enumerate("abcdefgh")}
    written = lambda extra: json.dumps(
        {"version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None,
         "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": {"type": "ByteFallback"},
         "model": {"type": "WordLevel", "vocab": vocabulary | extra, "unk_token": "a"}}
    )  # fmt: skip
    config = configs.of_run(workdir)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text(written({"import": 9}))
    found = lambda config: weights.tokenizer(tmp_path, config).fingerprint
    imported = tokenizers.load(str(tmp_path / "hf" / "tokenizer.json")).fingerprint
    assert found(config) == imported
    assert found(config.replace(init_from="elsewhere")) == "bytes"  # trained from one, on data of its own
    (tmp_path / "tokenizer.json").write_text(written({"own": 9}))
    assert found(config) not in (imported, "bytes")
    (tmp_path / "tokenizer.json").write_text(written({"far": 300}))
    with pytest.raises(ConfigError, match="ids, the model 260"):
        found(config)


def test_names_from_outside_are_text(tmp_path):
    results = {"a@8": {"task": "$_{x$[/b]", "length": 8, "accuracy": 0.5, "low": 0.4, "high": 0.6,
                       "chance": None, "samples": 3}}  # fmt: skip
    shown = Console(width=120, record=True, file=io.StringIO())
    shown.print(report.table(results, "run [/b] \x1b[31m $_{x$"))
    text = shown.export_text()
    assert "[/b]" in text and "\x1b" not in text.replace("\\x1b", "")
    report.plot(results, "run [/b] $_{x$", tmp_path / "x.png")


def test_the_bar_over_all_knows_the_end():
    bars = command.progress(Console(file=io.StringIO()))
    todo = [(Chosen(), setting) for setting in plan().settings(Chosen())]
    watch = command.watcher(bars, todo)
    assert bars.tasks[0].total == 4 * (8 + 16)
    watch("chosen@8", 4)(3)  # the last sample is missing
    assert bars.tasks[0].completed == 24
    watch("chosen@16", 4)(4)
    assert bars.tasks[0].finished and [task.description for task in bars.tasks] == ["all", "chosen@16"]


def test_help_of_the_harness_needs_no_extra(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "eval.harnessed", raising=False)
    monkeypatch.delattr("eval.harnessed", raising=False)
    with pytest.raises(SystemExit, match="0"):
        harness.main(["--help"])
    assert "--include_path" in capsys.readouterr().out
    assert harness.main(["--workdir=x", "--tasks=y"]) == 2
    said = capsys.readouterr().err
    assert "needs the package lm_eval" in said and "pip install" in said and said.count("\n") == 1


def test_what_the_harness_reports_becomes_json():
    given = {"acc": float("nan"), 3: (1, float("inf")), "n": np.float32(0.5), "f": len}
    plain = harness.plain(given)
    assert plain["acc"] is None and plain["3"] == [1, None]
    json.dumps(plain, allow_nan=False)


def test_picture_of_many_tasks(tmp_path):
    results = {
        f"{name}@{length}": {"task": name, "length": length, "accuracy": 0.5, "low": 0.4, "high": 0.6,
                             "chance": chance, "samples": 10}
        for name, chance in (("a", 0.1), ("b", None), ("c", 0.5), ("d", 0.0), ("e", 0.2))
        for length in (64, 1024)
    }  # fmt: skip
    report.plot(results, "run", Path(tmp_path / "x.png"))
    pixels = image.imread(tmp_path / "x.png")[..., :3]
    panels = [np.array_split(row, 4, axis=1) for row in np.array_split(pixels, 2)]
    drawn = [[bool((np.ptp(panel, axis=2) > 0.2).sum() > 100) for panel in row] for row in panels]
    assert drawn == [[True] * 4, [True, False, False, False]]  # lines, in colour

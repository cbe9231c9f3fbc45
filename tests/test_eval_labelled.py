"""Tasks on labels: how many answers there are, which samples a seed draws, and which results are kept."""

import dataclasses
import json
import types

import numpy as np
import pytest

from eval import runner, tasks
from eval.haystack import load as haystack
from eval.tasks import labelled
from hybridlm import config as configs
from hybridlm import data
from hybridlm import model as lm
from hybridlm.fields import plain
from tests import tiny


@pytest.fixture(scope="module")
def subject():
    """What tasks ask of one before they run it."""
    config = configs.resolve(tiny.config("unread", train__seq_len=64))
    return types.SimpleNamespace(
        config=config, definition=lm.build(config), tokenizer=None, step=3, checkpoint="a"
    )


def asked(length=0, samples=4, seed=0):
    return tasks.Setting(length, samples, seed, haystack())


@pytest.mark.parametrize(
    "name", [task.name for task in tasks.labelled.TASKS if task.settings["kind"] != "labelled_text"]
)
def test_labels_are_as_many_as_the_chance_says(subject, name):
    """1 / chance answers occur and no more, and a subject that is always right scores 1 on each sample."""
    task, length = tasks.TASKS[name], tasks.TASKS[name].lengths[0]
    vocab = 260 if length < 260 else 4200
    setting = asked(length=length, samples=64)
    config = task.data_config(subject.config.data, 256)
    examples = data.build(config, split="val", batch_size=256, seq_len=length, seed=0, vocab_size=vocab)
    targets = examples.batch(0)["targets"]
    labels = targets[targets >= 0]
    resized = dataclasses.replace(subject.config.model, vocab_size=vocab)
    sized = dataclasses.replace(subject.definition, model=resized)
    possible = task.choices(plain(data.settings(config)), vocab)
    constant = task.constant(config) if task.constant else 0
    guess = task.chance(subject.config.replace(model=resized))
    assert guess == max(constant, possible ** -max(1, task.whole))
    assert len(np.unique(labels)) <= possible
    if len(labels) > 20 * possible and not constant:
        assert len(np.unique(labels)) == possible

    class Guesser:
        config, definition, tokenizer = subject.config, sized, None
        rows_per_batch = staticmethod(lambda length: 7)
        token_scores = staticmethod(lambda batch: (None, batch["targets"] >= 0))  # always right

    done = []
    assert task.run(Guesser, setting, done.append).tolist() == [1.0] * 64 and sum(done) == 64


def test_samples_that_share_a_row_are_scored_each(subject, caplog):
    """Of two phonebooks to a row one is answered but for its last digit: half are right, and not none."""
    task = tasks.TASKS["phonebook_4"]

    class Half:
        config, definition = subject.config, subject.definition
        rows_per_batch = staticmethod(lambda length: 3)

        def token_scores(self, batch):
            right = batch["targets"] >= 0
            for row in right:
                row[np.flatnonzero(row)[-1:]] = False
            return None, right

    labelled.say_short.cache_clear()
    scores = task.run(Half(), asked(length=2 * task.lengths[0], samples=8), lambda done: None)
    assert scores.tolist() == [1, 0] * 4
    assert f"its samples have {task.lengths[0]} tokens each" in caplog.text


def test_label_tasks_have_other_samples_with_another_seed(subject):
    """...none of which any seed trains on; without one they are those that training validates on."""
    task = tasks.TASKS["induction"]
    seen = {}

    class Reader:
        config, definition = subject.config, subject.definition
        rows_per_batch = staticmethod(lambda length: 8)

        def token_scores(self, batch):
            seen.setdefault(self.seed, []).append(batch["tokens"])
            return None, batch["targets"] >= 0

    for seed in (0, 1, 2):
        reader = Reader()
        reader.seed = seed
        task.run(reader, asked(seed=seed, length=64), lambda done: None)
    rows = {seed: {row.tobytes() for row in np.concatenate(one)} for seed, one in seen.items()}
    assert len(rows[0] | rows[1] | rows[2]) == 12
    config = task.data_config(subject.config.data, 4)
    made = lambda split, seed: data.build(
        config, split=split, batch_size=4, seq_len=64, seed=seed, vocab_size=260
    )
    sized = subject.definition.vocab_size
    assert sized == 260 and rows[0] == {row.tobytes() for row in made("val", 5).batch(0)["tokens"]}
    for seed in (0, 1, 2):
        trained = {row.tobytes() for row in made("train", seed).batch(0)["tokens"]}
        assert not trained & (rows[0] | rows[1] | rows[2])


def test_results_of_a_seed_that_drew_nothing_are_measured_again(subject):
    """Earlier releases had the samples of seed 0 under every seed: those of 0 stay what they are."""
    task = tasks.TASKS["copy"]
    before = "260 ids, {'kind': 'copying', 'task': 'copy'}"

    def measured(seed):
        plan = runner.Plan((64,), asked(seed=seed))
        identity = {"step": 3, "checkpoint": "a", "samples": 4, "seed": seed, "tokenizer": None}
        identity |= {"haystack": None, "data_dir": "", "examples": before}
        return not runner.missing(subject, [task], plan, {"copy@64": {"identity": identity}})

    assert measured(0) and not measured(7)


def test_byte_text_is_measured_once_for_all_seeds(subject, tmp_path):
    """Its samples are a file's first, so that two seeds are one measurement, and runs are compared."""
    path, task = tmp_path / "texts.jsonl", tasks.TASKS["byte_text"]
    path.write_text("\n".join(json.dumps({"text": f"number {n}", "label": n % 2}) for n in range(99)))
    settings = {"kind": "labelled_text", "path": str(path), "val_examples": 4}
    rows = lambda seed: data.build(
        settings, split="val", batch_size=4, seq_len=64, seed=0, vocab_size=260, held_out=seed
    ).batch(0)["tokens"]
    np.testing.assert_array_equal(rows(0), rows(7))
    of = lambda task, seed: runner.Plan((64,), asked(seed=seed)).settings(task)
    assert of(task, 7) == of(task, 0) and of(tasks.TASKS["copy"], 7) != of(tasks.TASKS["copy"], 0)

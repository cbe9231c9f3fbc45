"""The synthetic tasks against their definitions, each solved by a plain program that reads tokens only."""

import numpy as np
import pytest

from hybridlm import data
from hybridlm.data import KINDS, state_tracking
from hybridlm.data.source import View
from hybridlm.errors import ConfigError

V = 32


def rows_of(kind, n=64, seq_len=48, split="val", seed=0, vocab=V, **fields):
    source = KINDS[kind](**fields).open(View(split, seq_len, seed, vocab))
    batch = source.rows(np.arange(n))
    return batch["tokens"], batch["targets"]


def solve_stack(tokens, stacks):
    held = [[] for _ in range(stacks)]
    for at in range(0, len(tokens) // 3 * 3, 3):
        operation, stack, element = tokens[at : at + 3]
        if operation == 0:
            held[stack - 2].append(element)
        else:
            yield at + 1, held[stack - 2].pop()


def solve_recall(tokens, last_only=False):
    """(index, value) wherever a key comes again; pairs are two tokens wide, noise is no key."""
    value_of = {}
    for at in range(0, len(tokens), 2):
        key = tokens[at]
        if key in value_of:
            yield at, value_of[key]
        if at + 1 < len(tokens) and key < value_low:
            value_of.setdefault(key, tokens[at + 1])


value_low = V // 2


def expect(tokens, targets, solution):
    wanted = np.full(len(tokens), -1)
    for index, value in solution:
        wanted[index] = value
    np.testing.assert_array_equal(targets, wanted)


@pytest.mark.parametrize("reverse", [True, False])
def test_palindrome_and_copy(reverse):
    for tokens, targets in zip(*rows_of("copying", task="palindrome" if reverse else "copy"), strict=True):
        said = tokens[:24]
        assert tokens[24] == V - 1 and said.max() < V - 1
        again = said[::-1] if reverse else said
        np.testing.assert_array_equal(tokens[25:], again[:-1])
        expect(tokens, targets, enumerate(again, start=24))


def test_induction():
    places = []
    for tokens, targets in zip(*rows_of("copying", n=300, task="induction"), strict=True):
        marks = np.flatnonzero(tokens == V - 1)
        assert len(marks) == 2 and marks[1] == len(tokens) - 1
        expect(tokens, targets, [(len(tokens) - 1, tokens[marks[0] + 1])])
        assert targets[-1] != V - 1
        places.append(marks[0])
    assert min(places) == 0 and max(places) == len(tokens) - 3  # anywhere, but not next to the question


def test_stack():
    tokens, targets = rows_of("stack", num_stacks=4, vocab=20)
    for row, target in zip(tokens, targets, strict=True):
        expect(row, target, solve_stack(row, 4))
        assert (row[1::3] >= 2).all() and (row[1::3] < 6).all() and (row[2::3] >= 6).all()
    pops = (tokens[:, 0::3] == 1).mean()
    assert 0.4 < pops < 0.5  # a fair coin, but for empty stacks


@pytest.mark.parametrize("group", state_tracking.GROUPS)
def test_state_tracking(group):
    """Products by applying the permutations one after another to a list of things."""
    permutations = state_tracking.elements(group)
    assert len(permutations) == {"parity": 2, "S3": 6, "S4": 24, "A5": 60, "S5": 120}[group]
    for tokens, targets in zip(*rows_of("state_tracking", n=8, vocab=128, group=group), strict=True):
        state = tuple(range(len(permutations[0])))
        for token, target in zip(tokens, targets, strict=True):
            state = tuple(permutations[token][point] for point in state)
            assert permutations[target] == state
    if group == "parity":
        np.testing.assert_array_equal(targets, np.cumsum(tokens) % 2)


def test_state_tracking_by_swaps():
    """Of S4 the identity and the six exchanges, all of them; the labels still reach the whole group."""
    permutations = state_tracking.elements("S4")
    tokens, targets = rows_of("state_tracking", n=16, vocab=128, group="S4", only_swaps=True)
    moved = {sum(point != place for place, point in enumerate(permutations[t])) for t in np.unique(tokens)}
    assert len(np.unique(tokens)) == 7 and moved == {0, 2}
    table = state_tracking.multiplication("S4")
    np.testing.assert_array_equal(targets[:, 1:], table[targets[:, :-1], tokens[:, 1:]])
    assert len(np.unique(targets)) == 24


def test_tables_are_groups():
    table = state_tracking.multiplication("A5")
    every = np.arange(60)
    assert (table[0] == every).all() and (table[:, 0] == every).all()
    assert (np.sort(table, axis=0) == every[:, None]).all() and (np.sort(table, axis=1) == every).all()
    a, b, c = np.random.default_rng(0).integers(60, size=(3, 500))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert (table != table.T).any()


@pytest.mark.parametrize("task", ["in_context_recall", "noisy_in_context_recall"])
def test_mad_recall(task):
    noise = 16 if task.startswith("noisy") else 0
    global value_low
    value_low = (V - noise) // 2
    tokens, targets = rows_of("mad", task=task)
    for row, target in zip(
        tokens[:, :-1], targets[:, :-1], strict=True
    ):  # an example is a token short of a row
        expect(row, target, solve_recall(row))
        assert target[-1] != -1
    noisy = (tokens[:, 0:-2:2] >= V - noise).mean()
    assert abs(noisy - (0.2 if noise else 0)) < 0.03
    training, next_tokens = rows_of("mad", split="train", task=task)
    np.testing.assert_array_equal(training[:, 1:-1], next_tokens[:, :-2])


def test_mad_fuzzy_recall():
    """Keys are three ids of the first half, values one to three of the second: parsed, then looked up."""
    keys = (V - 1) // 2
    for tokens, targets in zip(*rows_of("mad", seq_len=64, task="fuzzy_in_context_recall"), strict=True):
        row = tokens.tolist()
        start = next(i for i, token in enumerate(row) if token != V - 1)
        value_of, wanted, at = {}, [], start
        while at < len(row):
            key, end = tuple(row[at : at + 3]), at + 3
            assert max(key) < keys and len(set(key)) == 3
            while end < len(row) and row[end] >= keys:
                end += 1
            value = row[at + 3 : end]
            if key in value_of:
                wanted += [(at + 2 + i, v) for i, v in enumerate(value_of[key])]
                assert value == value_of[key][: len(value)]
            assert end == len(row) or 1 <= len(value) <= 3
            value_of.setdefault(key, value)
            at = end
        # The last value's last token is the target of the last input and not an input itself.
        expect(tokens[:-1], targets[:-1], [(i, v) for i, v in wanted if i < len(row) - 1])
        assert targets[-1] >= keys


def test_mad_memorization_keeps_its_map():
    value_of = {}
    for split, seed in (("train", 0), ("train", 7), ("val", 0)):
        for tokens, targets in zip(*rows_of("mad", split=split, seed=seed, task="memorization"), strict=True):
            assert (tokens[1::2] == V - 1).all() and (targets[0::2] == -1).all()
            for key, value in zip(tokens[0::2].tolist(), targets[1::2].tolist(), strict=True):
                assert key < 15 <= value < 30 and value_of.setdefault(key, value) == value
    assert len(set(value_of.values())) == 15


def test_mad_selective_copying():
    tokens, targets = rows_of("mad", task="selective_copying", copied=8)
    for row, target in zip(tokens, targets, strict=True):
        wanted = row[: 48 - 9][row[: 48 - 9] < V - 2]
        assert len(wanted) == 8 and row[-9] == V - 1 and (row[-8:] == V - 2).all()
        expect(row, target, enumerate(wanted, start=40))
        assert row[38] != V - 2  # blanks stand before tokens, as in the authors' generator


def test_rows_are_a_function_of_seed_and_index():
    settings = {"kind": "stack", "num_stacks": 3}
    build = lambda **view: data.build(
        settings, **{"split": "train", "batch_size": 8, "seq_len": 30, "seed": 1, "vocab_size": V} | view
    )
    whole, half = build(), build(rows=np.arange(4, 8))
    np.testing.assert_array_equal(whole.batch(5)["tokens"][4:], half.batch(5)["tokens"])
    assert (build().batch(5)["tokens"] == whole.batch(5)["tokens"]).all()
    assert (build(seed=2).batch(5)["tokens"] != whole.batch(5)["tokens"]).any()
    assert build(seed=2).fingerprint != whole.fingerprint == build().fingerprint
    val = build(split="val")
    assert (val.batch(0)["tokens"] == build(split="val", seed=2).batch(0)["tokens"]).all()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"kind": "copying", "task": "palindrom"}, "data.task"),
        ({"kind": "mad", "task": "compression"}, "data.task"),
        ({"kind": "state_tracking", "group": "S6"}, "data.group"),
        ({"kind": "state_tracking", "group": "A5", "only_swaps": True}, "data.only_swaps"),
        ({"kind": "state_tracking", "group": "S5"}, "data.kind"),  # 120 elements, 32 ids
        ({"kind": "stack"}, "data.kind"),  # 64 stacks, 32 ids
        ({"kind": "stack", "num_stacks": 0}, "data.num_stacks"),
        ({"kind": "mad", "task": "selective_copying", "copied": 30}, "data.task"),
        ({"kind": "copying", "val_examples": 0}, "data.val_examples"),
    ],
)
def test_refusals(settings, field):
    with pytest.raises(ConfigError) as caught:
        data.build(settings, split="train", batch_size=2, seq_len=48, seed=0, vocab_size=V)
    assert caught.value.field == field

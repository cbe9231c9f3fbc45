"""Hypothesis: patterns, plans, packing and data order, each against a plain construction of the same."""

import itertools
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlm import pattern, plan
from hybridlm.data import Dataset
from hybridlm.data.packing import PackedDocuments
from hybridlm.data.source import View
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError
from tests.test_data_packing import as_tuples, documents, naive_rows

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=150)
settings.load_profile("suite")

NAMES = st.sampled_from(["kda", "full", "gdn/moe", "_x1"])


def spelt(items: list) -> tuple[str, list[str]]:
    """(text, layers) of a list of (name or list, count)."""
    texts, layers = [], []
    for item, count in items:
        text, inner = (item, [item]) if isinstance(item, str) else spelt(item)
        text = text if isinstance(item, str) else f"({text})"
        texts.append(text if count is None else f"{text} * {count}")
        layers += inner * (count or 1)
    return "  ".join(texts), layers


COUNT = st.one_of(st.none(), st.integers(1, 3))
ITEMS = st.recursive(
    st.lists(st.tuples(NAMES, COUNT), min_size=1, max_size=4),
    lambda inner: st.lists(st.tuples(st.one_of(NAMES, inner), COUNT), min_size=1, max_size=3),
    max_leaves=8,
)


@given(ITEMS)
def test_a_pattern_means_what_it_was_spelt_from(items):
    text, layers = spelt(items)
    assert pattern.parse(text) == tuple(layers)


@given(st.text("kdaful ()*0123/_%é\n", max_size=20))
def test_any_text_is_a_pattern_or_a_clean_error(text):
    try:
        layers = pattern.parse(text)
    except ConfigError as error:
        assert error.field == "model.pattern" and "\n" in str(error)
    else:
        assert layers and all(name in text for name in layers)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40))
def test_a_plan_holds_every_layer_once_in_order(names):
    planned = plan.plan(names)
    assert planned.items() == tuple(names) and pattern.parse(str(planned)) == tuple(names)
    indices = [index for table in planned.indices() for stack in table for index in stack.flat]
    assert sorted(indices) == list(range(len(names))) and planned.num_layers == len(names)
    runs = sum(len(segment.runs) for segment in planned.segments)
    assert runs <= len(list(itertools.groupby(names)))


LENGTHS = st.lists(st.one_of(st.integers(2, 5), st.integers(2, 60)), min_size=1, max_size=25)


@given(LENGTHS, st.integers(1, 24), st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_holds_every_token_once_and_padding_adds_up(lengths, seq_len, shards, seed):
    packed, texts = documents(lengths, shards, seed)
    source = PackedDocuments(packed, Tokenizer(), View("train", seq_len, seed, 257))
    for epoch in (0, 1):
        batch = source.rows(np.arange(source.num_rows) + epoch * source.num_rows)
        kept = batch["segment_ids"] > 0
        assert kept.sum() == (batch["targets"] >= 0).sum() == sum(lengths) == source.num_tokens
        assert (~kept).sum() == source.num_rows * seq_len - sum(lengths) < seq_len
        assert Counter(batch["tokens"][kept].tolist()) == Counter(np.concatenate(texts).tolist())
        assert (batch["targets"] == Tokenizer.doc_id).sum() == len(lengths)  # every document ends once
        order = np.argsort(source._epoch(epoch).row_order)
        expected = naive_rows(texts, source._epoch(epoch).order_N, seq_len)
        assert np.array_equal(np.array(as_tuples(batch))[order], np.array(expected))


@given(LENGTHS, st.integers(1, 12), st.integers(1, 6), st.integers(0, 9), st.data())
def test_rows_do_not_depend_on_who_reads_them(lengths, seq_len, batch_size, step, data):
    """Any share of the rows, and any order of asking, gives the rows of the whole batch."""
    packed, _ = documents(lengths)
    view = View("train", seq_len, 1, 257)
    whole = Dataset(PackedDocuments(packed, Tokenizer(), view), view, batch_size).batch(step)
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, batch_size - 1), min_size=1))))
    share = Dataset(PackedDocuments(packed, Tokenizer(), view), view, batch_size, rows)
    share.batch(step + 3)
    for name, array in share.batch(step).items():
        np.testing.assert_array_equal(array, whole[name][rows])
    assert len(share.sample_ids(step)) == batch_size

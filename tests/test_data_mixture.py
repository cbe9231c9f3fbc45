import numpy as np
import pytest

from hybridlm.data.mixture import BLOCK, Mixture
from hybridlm.data.source import View, empty_rows
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError


class Numbered:
    """Source whose row i holds (name, i)."""

    checks = ()

    def __init__(self, name, num_rows, tokenizer=None):
        self.name, self.num_rows, self.tokenizer = name, num_rows, tokenizer
        self.vocab_size, self.fingerprint = 10 + name, f"numbered {name} {num_rows}"

    def rows(self, index_B):
        batch = empty_rows(len(index_B), 2)
        batch["tokens"][:, 0], batch["tokens"][:, 1] = self.name, index_B
        return batch

    def describe(self):
        return f"{self.num_rows} rows"


def mixture(weights, split="train", seed=0, sizes=None):
    sources = {f"s{i}": Numbered(i, sizes[i] if sizes else None) for i in range(len(weights))}
    return Mixture(sources, {f"s{i}": weight for i, weight in enumerate(weights)}, View(split, 2, seed, 99))


@pytest.mark.parametrize(
    "weights", [[1.0], [1, 1], [0.7, 0.2, 0.1], [1e6, 2e6, 5e6], [1 / 3, 1 / 3, 1 / 3], [4095, 1]]
)
def test_every_block_holds_the_proportions(weights):
    source = mixture(weights)
    names, places = source.rows(np.arange(3 * BLOCK))["tokens"].T
    for block in names.reshape(3, BLOCK):
        shares = np.bincount(block, minlength=len(weights)) / BLOCK
        assert np.abs(shares - np.array(weights) / sum(weights)).max() < 1 / BLOCK
    for c in range(len(weights)):  # each component is read in its own order, with no row skipped
        assert places[names == c].tolist() == list(range((names == c).sum()))


def test_short_runs_hold_the_proportions_nearly():
    names = mixture([3, 1]).rows(np.arange(400))["tokens"][:, 0]
    assert names.mean() == pytest.approx(0.25, abs=0.09)  # 4 standard deviations
    assert 40 < (np.diff(names) != 0).sum() < 250  # shuffled, not sorted


def test_rows_are_a_function_of_index_and_seed():
    index = np.array([5, 99_999, 0, 4096, 4095, 5])
    whole = mixture([1, 2]).rows(np.arange(100_000))["tokens"]
    assert (mixture([1, 2]).rows(index)["tokens"] == whole[index]).all()
    assert (mixture([1, 2], seed=1).rows(np.arange(100))["tokens"] != whole[:100]).any()


def test_validation_is_one_even_pass_over_all():
    source = mixture([1, 9, 5], "val", sizes=[10, 30, 5])
    assert source.num_rows == 45
    assert source.describe() == "s0 (22.2%): 10 rows; s1 (66.7%): 30 rows; s2 (11.1%): 5 rows"
    assert mixture([1, 9, 0.5], sizes=[10, 30, 5]).describe().startswith("s0 (9.5%): 10 rows; s1 (85.7%)")
    names, places = source.rows(np.arange(45))["tokens"].T
    assert np.bincount(names).tolist() == [10, 30, 5]
    for c in range(3):
        assert places[names == c].tolist() == list(range((names == c).sum()))
    for part in range(5):
        assert np.abs(np.bincount(names[part * 9 : part * 9 + 9], minlength=3) - [2, 6, 1]).max() <= 1


def test_what_a_mixture_takes_from_its_components():
    view = View("train", 2, 0, 99)
    text, other, none = Numbered(0, None, Tokenizer()), Numbered(1, None, Tokenizer()), Numbered(2, None)
    assert Mixture({"a": text, "b": other}, {"a": 1, "b": 1}, view).tokenizer.name == "bytes"
    assert Mixture({"a": text, "b": none}, {"a": 1, "b": 1}, view).tokenizer is None
    assert Mixture({"a": text, "b": none}, {"a": 1, "b": 1}, view).vocab_size == 12
    other.tokenizer.fingerprint = "another"
    with pytest.raises(ConfigError, match="share one tokenizer"):
        Mixture({"a": text, "b": other}, {"a": 1, "b": 1}, view)
    fingerprints = {mixture(w, seed=s).fingerprint for w, s in [([1, 1], 0), ([1, 2], 0), ([1, 1], 1)]}
    assert len(fingerprints) == 3


def test_a_weight_too_small_for_a_block_is_refused():
    with pytest.raises(ConfigError, match="at least 1/4096") as error:
        mixture([1, 1e-6])
    assert error.value.field == "components.s1.weight"

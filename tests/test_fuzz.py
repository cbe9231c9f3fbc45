"""The fuzz run of docs/trust.md in small: few cases of each kind; of configs all resolved, few traced."""

import pytest

from tests import fuzz

CASES = {
    "patterns": 200,
    "inputs": 50,
    "shards": 50,
    "tokenizers": 25,
    "folders": 30,
    "records": 6,
    "sweeps": 30,
}
FEW = ["patterns", "shards", "sweeps"]  # that are quick


@pytest.mark.parametrize(
    "kind", [*FEW, *(pytest.param(kind, marks=pytest.mark.slow) for kind in CASES if kind not in FEW)]
)
def test_damage_is_refused_in_a_line_or_what_it_was(kind):
    outcomes, wrong = fuzz.fuzz(kind, CASES[kind], seed=1)
    assert not wrong, "\n".join(wrong)
    assert sum(outcomes.values()) == CASES[kind] and outcomes["refused"] < CASES[kind]


def test_configs_are_refused_or_resolve():
    outcomes, wrong = fuzz.fuzz("configs", 300, seed=1, trace=0.0)
    assert not wrong, "\n".join(wrong)
    assert outcomes["refused"] > 50 and outcomes["resolved"] > 50


@pytest.mark.slow
def test_configs_that_resolve_can_be_traced():
    outcomes, wrong = fuzz.fuzz("configs", 200, seed=2, trace=0.25, compile=0.15)
    assert not wrong, "\n".join(wrong)
    assert outcomes["traced"] + outcomes["ran"] >= 5

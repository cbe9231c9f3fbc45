"""The fuzz run of docs/trust.md in small: all cases resolved, few traced, fewer compiled."""

import pytest

from tests import fuzz, tiny


@pytest.mark.slow
def test_every_outcome_is_success_or_a_clean_error(tmp_path):
    outcomes, wrong = fuzz.fuzz(tiny.write_text(tmp_path), 2000, seed=1, trace=0.015, compile=0.15)
    assert not wrong, "\n".join(wrong)
    assert sum(outcomes.values()) == 2000 and outcomes["refused"] > 500
    assert outcomes["resolved"] > 300 and outcomes["traced"] + outcomes["ran"] >= 5

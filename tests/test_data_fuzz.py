"""The fuzz run of docs/trust.md for data in small."""

from tests import fuzz_data


def test_damaged_data_are_refused_in_a_line_or_read_as_they_were():
    outcomes, wrong = fuzz_data.fuzz(150, seed=1)
    assert not wrong, "\n".join(wrong)
    assert sum(outcomes.values()) == 150 and 40 < outcomes["refused"] < 140

import numpy as np

from hybridlm.data.source import empty_rows, permutation


def test_permutation_is_one_and_depends_on_all_of_its_entropy():
    seen = {tuple(permutation(50, *entropy)) for entropy in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 1)]}
    assert len(seen) == 6
    assert all(sorted(order) == list(range(50)) for order in seen)
    assert permutation(0, 1).tolist() == []


def test_permutation_stays_what_it_was():
    """A change would reorder the rest of every run that is resumed: the promise is across versions."""
    assert permutation(8, 2, 3).tolist() == [2, 4, 5, 0, 7, 6, 3, 1]


def test_permutation_is_uniform():
    first = np.array([permutation(5, seed)[0] for seed in range(2000)])
    assert (np.abs(np.bincount(first, minlength=5) / 2000 - 0.2) < 0.04).all()  # 4.5 sigma


def test_empty_rows_carry_no_loss():
    batch = empty_rows(2, 3)
    assert {name: (a.shape, a.dtype, a.min(), a.max()) for name, a in batch.items()} == {
        "tokens": ((2, 3), np.int32, 0, 0),
        "targets": ((2, 3), np.int32, -1, -1),
        "segment_ids": ((2, 3), np.int32, 0, 0),
        "positions": ((2, 3), np.int32, 0, 0),
    }

import gzip

import numpy as np
import pytest

from hybridlm.data.baselines import gzip_bits_per_byte, order0_bits_per_byte


def test_order0_is_the_entropy_of_the_bytes():
    assert order0_bits_per_byte(bytes(range(256)) * 3) == pytest.approx(8.0)
    assert order0_bits_per_byte(b"aaaa") == 0.0
    assert order0_bits_per_byte(b"aaab") == pytest.approx(-0.75 * np.log2(0.75) - 0.25 * np.log2(0.25))


def test_gzip_is_the_size_of_a_gzip_file(tmp_path):
    text = b"the same words again " * 50
    with gzip.GzipFile(tmp_path / "a.gz", "wb", compresslevel=9, mtime=1) as file:
        file.write(text)
    # The file carries its name besides.
    assert gzip_bits_per_byte(text) == 8 * ((tmp_path / "a.gz").stat().st_size - len("a") - 1) / len(text)
    assert gzip_bits_per_byte(np.random.default_rng(0).bytes(10_000)) > 8.0

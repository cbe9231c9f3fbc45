import pytest

from hybridlm.data import holdout


def test_holding_out_depends_on_the_key_alone():
    names = [f"dir/{i}.txt" for i in range(20_000)]
    small, large = ({n for n in names if holdout.held_out(n, f)} for f in (0.02, 0.3))
    assert small < large  # a larger fraction keeps what a smaller one held out
    assert len(small) == pytest.approx(400, abs=90) and len(large) == pytest.approx(6000, abs=300)
    assert not any(holdout.held_out(name, 0.0) for name in names)
    # Two machines and two releases must agree on what is held out.
    assert [holdout.held_out(name, 0.5) for name in names[:8]] == [True, *[False] * 3] * 2


@pytest.mark.parametrize("number", [2, 3, 20])
@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 1 - 1e-9])
def test_neither_split_is_left_empty(number, fraction):
    for group in range(200):
        keys = [f"{group}/{i}.txt" for i in range(number)]
        held = holdout.choose(keys, fraction)
        assert any(held) and not all(held)
        plain = [holdout.held_out(key, fraction) for key in keys]
        if any(plain) and not all(plain):
            assert held == plain
        else:
            assert sum(a != b for a, b in zip(held, plain, strict=True)) == 1
        order = list(range(number))[::-1]
        assert holdout.choose([keys[i] for i in order], fraction) == held[::-1]
    assert not any(holdout.choose(keys, 0.0))
    assert holdout.choose(["same", "same"], 0.05) == [True, False]


@pytest.mark.parametrize(
    ("text", "fraction", "held"),
    [
        ("one\ntwo\nthree\nfour\n", 0.3, "four\n"),
        ("one\ntwo\nthree\nfour\n", 0.25, "four\n"),
        ("a" * 100, 0.05, "a" * 5),
        ("☃" * 10, 0.35, "☃☃☃"),  # 10.5 bytes from the end lie inside a character
        ("ab", 0.05, "b"),
        ("aa\n", 0.05, "\n"),
        ("a", 0.05, "a"),
        ("", 0.5, ""),
    ],
)
def test_a_single_text_is_cut_between_lines_or_characters(text, fraction, held):
    content = text.encode()
    at = holdout.cut(content, fraction)
    assert content[at:].decode() == held and content[:at].decode() + held == text

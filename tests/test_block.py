"""One layer: its halves around the stream, against NumPy; what `model.stream_norm` refuses."""

import jax
import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import model
from hybridlm.errors import ConfigError
from hybridlm.mixers import gated_conv
from hybridlm.rows import single_document

QUICKSTART = "configs/quickstart.py"


class Outside(gated_conv.Mixer):
    """A mixer of a user's own, which returns what `returned` makes of the right thing."""

    returned = staticmethod(lambda y, cache: y)  # without the cache: a batch of two comes apart as a pair

    def __call__(self, x, context, cache=None):
        return self.returned(*super().__call__(x, context, cache))

    def step(self, x, context, cache):
        return self.returned(*super().step(x, context, cache))


def definition(mixers: dict | None = None, **fields) -> model.Definition:
    config = configs.default()
    config.mixers = mixers or {"full": configs.mixer("attention", num_heads=2)}
    config.model.update(d_model=16, vocab_size=48, mlp_hidden=32, dtype="float32", **fields)
    config.data = configs.data("text", path="python-stdlib:")
    return model.build(configs.resolve(config))


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize(
    ("stream_norm", "weights"),
    [
        (("full.mixer=2/0.5",), (2, 0.5)),
        (("*=9", "*.mixer=1.5"), (1.5, 1)),
        (("full.mlp=2",), None),
        ((), None),
    ],
)
def test_a_half_norms_the_stream_itself(stream_norm: tuple, weights: tuple | None) -> None:
    """The last pattern that matches counts; a half that none matches is as ever."""
    made = definition(pattern="full/none", stream_norm=stream_norm, residual_multiplier=0.7)
    params = jax.jit(lambda key: model.init(made, key))(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 48, (2, 9))
    _, records = model.merge(made, params).forward(tokens, single_document(2, 9), ("block.*",))
    x, mixed, y = (
        np.asarray(records[f"layers.0.block.{one}"], np.float64) for one in ("input", "mixed", "output")
    )
    want = x + 0.7 * mixed if weights is None else weights[0] * rms(x) + weights[1] * 0.7 * mixed
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


def test_both_halves_of_a_block() -> None:
    """As the first transformers: with *=1 each half's sum is normed before anything sees it."""
    made, plain = (definition(pattern="full", stream_norm=one) for one in (("*=1",), ()))
    params = jax.jit(lambda key: model.init(made, key))(jax.random.key(0))
    tokens, rows = np.random.default_rng(0).integers(0, 48, (1, 9)), single_document(1, 9)
    big = params | {"embedding": params["embedding"] * 1000}
    same = lambda which: np.allclose(
        *(model.logits(which, one, tokens, rows) for one in (params, big)), atol=1e-2
    )
    assert same(made) and not same(plain)  # what enters is normed, so that its size is nothing


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"model.stream_norm": "full.mixer"}, "PATTERN=STREAM/ADDED"),
        ({"model.stream_norm": "*=0"}, "above 0"),
        ({"model.stream_norm": "full.attention=1"}, "no half of a block"),
        ({"model.stream_norm": "*=1", "model.post_norm": "full"}, "model.post_norm"),
    ],
)
def test_what_is_refused(values: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        configs.resolve(configs.load(QUICKSTART, values))
    assert caught.value.field == "model.stream_norm"


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (Outside.returned, "must be (y, cache)"),
        (lambda y, cache: (y, cache, 3), "returned tuple. It must be (y, cache)"),
        (lambda y, cache: (y[..., :1], cache), "made float32[2, 5, 1] of float32[2, 5, 16]"),
        (lambda y, cache: (y[:, 0], cache), "made float32[2, 16] of float32[2, 5, 16]"),
        (lambda y, cache: (y.astype("complex64"), cache), "made complex64[2, 5, 16] of"),
        (lambda y, cache: (y, cache), ""),
    ],
)
def test_what_a_mixer_from_outside_returns(returned, problem, monkeypatch) -> None:
    """Refused while tracing, by the kind's name: most would be broadcast to the stream, or taken apart."""
    monkeypatch.setattr(Outside, "returned", staticmethod(returned))
    mine = {"mine": configs.mixer(f"{__name__}:Outside")}
    made = definition(pattern="mine", mixers=mine)
    run = lambda params, tokens: model.logits(made, params, tokens, single_document(*tokens.shape))
    shapes = jax.ShapeDtypeStruct((2, 5), np.int32)
    if not problem:
        assert jax.eval_shape(run, model.shapes(made), shapes).shape == (2, 5, 48)
        return
    with pytest.raises(ConfigError) as caught:
        jax.eval_shape(run, model.shapes(made), shapes)
    assert caught.value.field == "mixers.mine.kind" and problem in str(caught.value)

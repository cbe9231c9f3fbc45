"""Layers that reuse an earlier layer's keys and values, against float64 NumPy on the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import close

from hybridlm import config as configs
from hybridlm import cost, model, pattern
from hybridlm.errors import ConfigError
from hybridlm.rows import Rows

HEADS, KV_HEADS, DIM, WINDOW, THETA = 4, 2, 8, 5, 100.0


def config(text, **mixers):
    c = configs.default()
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "rope_theta": THETA}
    c.mixers.full.update(qk_norm="head", **sizes)
    c.mixers.swa.update(window=WINDOW, **sizes)
    c.mixers.mla.update(num_heads=2, kv_lora_rank=9, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
    c.mixers.kda.update(num_heads=1, head_dim=8)
    for name, settings in mixers.items():
        c.mixers[name].update(settings)
    c.model.update(pattern=text, d_model=16, vocab_size=48, mlp_hidden=16, dtype="float32")
    c.data.path = "python-stdlib:"
    c.train.seq_len = 12
    return configs.resolve(c)


def rms(x, scale=1.0):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def rotated(x_THK):
    half = DIM // 2
    angle = np.arange(len(x_THK))[:, None, None] * THETA ** (-np.arange(half) / half)
    turn = (x_THK[..., :half] + 1j * x_THK[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turn.real, turn.imag], -1)


def document(params, layers, tokens_T):
    """Final hidden states of one document, layer by layer; (k, v) of layer 0 serve them all."""
    T = len(tokens_T)
    x = params["embedding"][tokens_T]
    for index, name in enumerate(layers):
        p = {n.split(".", 2)[2]: a for n, a in params.items() if n.startswith(f"layers.{index}.")}
        at = lambda side, p=p: p[f"mixer.{side}_proj.kernel"]
        h = rms(x, p["mixer_norm.scale"])
        q = (h @ at("q")).reshape(T, HEADS, DIM)
        q = rotated(rms(q, p["mixer.q_norm.scale"]) if name == "full" else q)
        if index == 0:
            k = rotated(rms((h @ at("k")).reshape(T, KV_HEADS, DIM), p["mixer.k_norm.scale"]))
            k, v = (np.repeat(a, HEADS // KV_HEADS, 1) for a in (k, (h @ at("v")).reshape(T, KV_HEADS, DIM)))
        else:
            assert not {"mixer.k_proj.kernel", "mixer.v_proj.kernel", "mixer.k_norm.scale"} & set(p)
        distance = np.arange(T)[:, None] - np.arange(T)
        seen = (distance >= 0) & ((name == "full") | (distance < WINDOW))
        weights = np.exp(np.where(seen, np.einsum("thk,shk->hts", q, k) * DIM**-0.5, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shk->thk", weights, v).reshape(T, -1) @ at("o")
        h = rms(x, p["mlp_norm.scale"])
        gate = h @ p["mlp.gate.kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p["mlp.up.kernel"])) @ p["mlp.down.kernel"]
    return rms(x, params["final_norm.scale"])


def test_full_and_windowed_layers_on_the_keys_of_the_first():
    """Packed, where each document alone is what is expected."""
    definition = model.build(config("full:a swa@a full@a"))
    lengths = [7, 12, 1]
    rows = Rows(
        jnp.asarray(np.repeat([[1, 2, 3]], lengths, axis=1)),
        jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None]),
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 48, 20)
    params = {
        name: jnp.asarray(0.3 * rng.normal(size=leaf.shape) + (len(leaf.shape) == 3), jnp.float32)
        for name, leaf in model.shapes(definition).items()
    }
    found = jax.jit(lambda p: model.merge(definition, p)(jnp.asarray(tokens[None]), rows)[0])(params)
    flat = {n: np.asarray(a, np.float64) for n, a in model.unstack(definition, params).items()}
    alone = np.split(tokens, np.cumsum(lengths)[:-1])
    expected = np.concatenate([document(flat, ("full", "swa", "full"), one) for one in alone])
    close(found[0], expected, 2e-5)


def test_what_is_reused_is_kept_once():
    """`cost` against the caches themselves."""
    resolved = config("full:a full@a (swa:b swa@b*2 full@a)*2 mla:c/none mla@c/none kda")
    definition = model.build(resolved)
    init = lambda p: model.merge(definition, p).init_cache(1, 12)
    caches = jax.eval_shape(init, model.shapes(definition))
    for spec, row, cache in zip(definition.layers, cost.layers(resolved), caches, strict=True):
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache) if leaf.ndim)
        assert held == row.cache_bytes + row.state_bytes, spec
        assert (held == 0) == bool(spec.reuses)
    names = model.canonical_shapes(definition)
    assert "layers.7.mixer.k_proj.kernel" not in names and "layers.6.mixer.k_proj.kernel" in names


def test_periods_are_traced_once(monkeypatch):
    traced = []
    scan = jax.lax.scan
    monkeypatch.setattr(jax.lax, "scan", lambda *args, **more: traced.append(1) or scan(*args, **more))
    counts = []
    for repeats in (2, 6):
        definition = model.build(config(f"(full:a full@a*2)*{repeats}"))
        assert str(definition.layout) == f"(full:a full@a*2)*{repeats}"
        run = lambda p, tokens, d=definition: model.merge(d, p)(tokens, Rows(tokens, tokens))[0]
        jax.eval_shape(run, model.shapes(definition), jax.ShapeDtypeStruct((1, 8), jnp.int32))
        counts.append(len(traced))
    assert counts[1] == 2 * counts[0] > 0


def outputs_of_scans(jaxpr):
    for equation in jaxpr.eqns:
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):
                yield from outputs_of_scans(inner.jaxpr)
        if equation.primitive.name == "scan":
            yield from (output.aval.shape for output in equation.outvars)


def test_the_backward_pass_keeps_what_is_reused_once():
    """Not once for each layer of a run that reads it: no array [layers, B, T, key heads, head dim]."""
    definition = model.build(config("full:a full@a*6"))
    tokens = jnp.zeros((1, 10), jnp.int32)
    loss = lambda p: model.merge(definition, p)(tokens, Rows(tokens, tokens))[0].sum()
    shapes = list(outputs_of_scans(jax.make_jaxpr(jax.grad(loss))(model.shapes(definition)).jaxpr))
    assert (6, 1, 10, 16) in shapes  # the layers' inputs
    assert (6, 1, 10, KV_HEADS, DIM) not in shapes


@pytest.mark.parametrize(
    ("text", "mixers", "field", "problem"),
    [
        ("full@a full:a", {}, "model.pattern", "layer 0 reuses .* no earlier layer leaves 'a'"),
        ("full:keys full@kays", {}, "model.pattern", "keys"),
        ("swa:a full@a", {}, "mixers.full.window", "1 to 5"),
        ("full:a swa@a", {"swa": {"num_kv_heads": 4}}, "mixers.swa.num_kv_heads", "must be 2"),
        ("full:a swa@a", {"swa": {"rope_theta": 5.0}}, "mixers.swa.rope_theta", "must be 100"),
        ("full:a swa@a", {"swa": {"yarn": (4.0, 8.0)}}, "mixers.swa.yarn", "must be \\(\\)"),
        ("mla:a full@a", {}, "mixers.full.kind", "of kind mla"),
        ("full:a mla@a", {}, "mixers.mla.kind", "of kind attention"),
        ("kda:a full", {}, "mixers.kda.kind", "leave and reuse no keys"),
        ("parallel", {"parallel": {"branches": ("kda", "ful")}}, "mixers.parallel.branches", "'ful'.*'full'"),
        ("parallel:a", {"parallel": {"branches": ("kda", "full")}}, "mixers.parallel.kind", "reuse no keys"),
    ],
)
def test_what_does_not_fit_together_is_refused(text, mixers, field, problem):
    with pytest.raises(ConfigError, match=problem) as error:
        config(text, **mixers)
    assert error.value.field == field


def test_labels_stand_before_the_mlp():
    names = pattern.parse("(full:a/moe kda full@a)*2", {"full", "kda"}, {"moe"})
    assert names == ("full:a/moe", "kda", "full@a") * 2
    assert pattern.split("full:a/moe") == ("full", "moe") and pattern.labels("full:a/moe") == ("a", "")
    assert pattern.labels("full@a") == ("", "a") and pattern.labels("full") == ("", "")
    assert pattern.sources(names) == {2: 0, 5: 3}
    for text, position in (("full:a:b", 6), ("full@ a", 4), ("full/moe:a", 8), ("full:a/mo", 7)):
        with pytest.raises(pattern.PatternError) as error:
            pattern.parse(text, {"full"}, {"moe"})
        assert error.value.position == position, text

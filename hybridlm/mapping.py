"""From softmax attention to another mixer: what each of the new layer's parameters starts as, and why.

    attention of fewer key/value heads    the mean of each group of heads (GQA, arXiv 2305.13245); of more:
                                          repeated
    MLA                                   exact (TransMLA, arXiv 2502.07864, step 1): the latent holds every
                                          value head, the shared channels every key head, a query its group's
    a matrix state of the same heads      q, k, v, o by heads, key and value heads repeated for their queries;
                                          convolutions the identity; gates as `Config.near_attention` says, or
                                          the decay made of keys (Liger, arXiv 2503.01496)
    parallel heads                        each branch by itself

Kernels are [in, out], and heads are what is repeated or averaged, never single rows.

Shape legend: D model width, H query heads, G key/value heads, K head dim.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from hybridlm import mixers
from hybridlm.errors import ConfigError
from hybridlm.linear_mixer import LinearMixer
from hybridlm.mixers import attention, mla, parallel

Read = Callable[[str], np.ndarray | None]  # a parameter of the old mixer by name; None: it has none


class Mapped(NamedTuple):
    """value: float32, of the new parameter's shape.  origin: where it comes from, in words.
    used: names of the old mixer's parameters in it."""

    value: np.ndarray
    origin: str
    used: tuple[str, ...] = ()


class Layer(NamedTuple):
    """read: of the old mixer.  shapes: of the new one's parameters by name.  gates: of a matrix state: "near"
    attention, or its decay of "keys"; ConfigError where it can be of none."""

    d_model: int
    read: Read
    shapes: Mapping[str, tuple]
    gates: str = "near"


def mixer(theirs: mixers.Config, ours: mixers.Config, layer: Layer) -> tuple[dict[str, Mapped], str]:
    """(the parameters of the new mixer that follow from the old one's, why others do not or "").

    theirs, ours: settings of the old and the new mixer.
    """
    if not isinstance(theirs, attention.Config):
        return {}, ""
    if layer.read("k_proj.kernel") is None:
        return {}, "the source's layer reuses the keys and values of an earlier one"
    if isinstance(ours, attention.Config):
        return _grouped(theirs, ours, layer)
    if isinstance(ours, mla.Config):
        return _latent(theirs, ours, layer)
    if isinstance(ours, parallel.Joined):
        return _branches(theirs, ours, layer)
    if issubclass(mixers.load(ours.kind), LinearMixer):
        return _linear(theirs, ours, layer)
    return {}, f"kind {ours.kind!r} has no queries, keys and values"


def _branches(theirs: attention.Config, ours: parallel.Joined, layer: Layer) -> tuple[dict[str, Mapped], str]:
    found: dict[str, Mapped] = {}
    why = []
    for name, part in zip(ours.branches, ours.parts, strict=True):
        start = f"branches.{name}."
        own = {n.removeprefix(start): shape for n, shape in layer.shapes.items() if n.startswith(start)}
        made, problem = mixer(theirs, part, layer._replace(shapes=own))
        if isinstance(part, attention.Config) and not problem:
            same = {n: value for n in own if (value := layer.read(n)) is not None and value.shape == own[n]}
            made = {n: Mapped(value, *_as_it_is(n)) for n, value in same.items()} | made
        found |= {start + n: one for n, one in made.items()}
        why += [f"branch {name}: {problem}"] if problem else []
    return found, "; ".join(why)


def heads(kernel: np.ndarray, dim: int, count: int) -> np.ndarray:
    """``kernel`` [..., n * dim] with ``count`` heads: each repeated, or the mean of neighbours."""
    split = kernel.reshape(*kernel.shape[:-1], -1, dim)
    old = split.shape[-2]
    if count >= old:
        split = np.repeat(split, count // old, axis=-2)
    else:
        split = split.reshape(*kernel.shape[:-1], count, old // count, dim).mean(-2)
    return split.reshape(*kernel.shape[:-1], -1)


def _grouped(theirs: attention.Config, ours: attention.Config, layer: Layer) -> tuple[dict[str, Mapped], str]:
    (num, old), (now, new) = theirs.heads(layer.d_model), ours.heads(layer.d_model)
    if (num, theirs.head_dim) != (now, ours.head_dim):
        return {}, f"needs {_sizes(num, theirs.head_dim)}"
    if old == new:
        return {}, ""
    if max(old, new) % min(old, new):
        return {}, f"num_kv_heads {new} and the source's {old}: one must divide the other"
    how = f"the mean of {old // new} heads" if new < old else f"each head {new // old} times"
    found = {}
    for name in ("k_proj.kernel", "v_proj.kernel", "k_proj.bias", "v_proj.bias"):
        if (value := layer.read(name)) is not None:
            found[name] = Mapped(heads(value, ours.head_dim, new), f"{name}, {how}", (name,))
    return found, ""


def _latent(theirs: attention.Config, ours: mla.Config, layer: Layer) -> tuple[dict[str, Mapped], str]:
    """q'_h has the query of head h in its group's part of the shared channels and zeros elsewhere, times the
    ratio of the two softmax scales; the latent's channels are the values."""
    d_model = layer.d_model
    num, groups = theirs.heads(d_model)
    dim = theirs.head_dim
    width = groups * dim
    rotates = not theirs.rope_theta or (
        (theirs.rope_theta, theirs.yarn) == (ours.rope_theta, ours.yarn)
        and theirs.rotary_fraction == 1
        and ours.rope_groups == groups
    )
    plain = theirs.qk_norm == theirs.output_gate == "none" and not (theirs.qkv_bias or theirs.o_bias)
    if not plain or theirs.window or theirs.forget_gate or theirs.sinks:
        return {}, "attention with qk_norm, output_gate, biases, a window, forget_gate or sinks is no MLA"
    fits = ours.heads(d_model) == num and ours.v_head_dim == dim and ours.qk_rope_head_dim == width
    bare = not ours.latent_norm and not ours.q_lora_rank and ours.output_gate == "none"
    if not (fits and ours.kv_lora_rank >= width and rotates and bare):
        needs = f"num_heads={num}, v_head_dim={dim}, qk_rope_head_dim={width}, kv_lora_rank>={width}, "
        needs += f"q_lora_rank=0, latent_norm=False, rope_groups={groups}, rope_theta={theirs.rope_theta:g}"
        needs += ", output_gate=none" if ours.output_gate != "none" else ""
        needs += f", yarn={theirs.yarn}" if theirs.yarn else ""
        return {}, f"an exact MLA needs {needs}"
    q, k, v, o = (_there(layer.read, f"{name}_proj.kernel") for name in "qkvo")
    nope, rank, group = ours.qk_nope_head_dim, ours.kv_lora_rank, np.arange(num) // (num // groups)
    q_DHK = q.reshape(d_model, num, dim) * (theirs.logit_scale or dim**-0.5) * (nope + width) ** 0.5
    wide = np.zeros((d_model, num, nope + width), np.float32)
    up = np.zeros((rank, num, nope + dim), np.float32)
    up[:, :, :nope] = _small((rank, num, nope))  # unread until W_q is not 0 there, and then it can learn
    for head, g in enumerate(group):
        wide[:, head, nope + g * dim : nope + (g + 1) * dim] = q_DHK[:, head]
        up[g * dim : (g + 1) * dim, head, nope:] = np.eye(dim)
    down = np.concatenate([v, _small((d_model, rank - width)), k], axis=1)
    said = {
        "q_proj.kernel": (wide, "q_proj.kernel in its group's shared channels, the others 0"),
        "kv_a_proj.kernel": (down, "v_proj.kernel as the latent, k_proj.kernel as shared channels"),
        "kv_b_proj.kernel": (up, "values: the identity from each head's group; keys: fresh"),
        "o_proj.kernel": (o, "o_proj.kernel"),
    }
    found = {}
    for name, (value, text) in said.items():
        used = tuple(f"{one}_proj.kernel" for one in "qkvo" if f"{one}_proj.kernel" in text)
        found[name] = Mapped(value.reshape(layer.shapes[name]).astype(np.float32), text, used)
    return found, ""


def _linear(theirs: attention.Config, ours: mixers.Config, layer: Layer) -> tuple[dict[str, Mapped], str]:
    d_model, read, shapes, gates = layer
    num, groups = theirs.heads(d_model)
    dim = theirs.head_dim
    sizes = ours.heads(d_model)  # type: ignore[attr-defined]
    if tuple(sizes) != (num, num, dim, dim):
        return {}, f"needs as many heads as the attention had: {_sizes(num, dim)}, v_head_dim={dim}"
    turned = "" if groups == num else f", each of {groups} heads {num // groups} times"
    found = {}
    for name in "qkv":
        value = heads(_there(read, f"{name}_proj.kernel"), dim, num)
        writes = shapes[f"{name}_proj.kernel"][1] // value.shape[1]
        text = f"{name}_proj.kernel" + (turned if name != "q" else "")
        text += f", for each of {writes} writes" if writes > 1 else ""
        found[f"{name}_proj.kernel"] = Mapped(np.tile(value, (1, writes)), text, (f"{name}_proj.kernel",))
    found["o_proj.kernel"] = Mapped(_there(read, "o_proj.kernel"), *_as_it_is("o_proj.kernel"))
    for name, shape in shapes.items():
        if name.endswith("_conv.kernel"):
            taps = np.zeros(shape, np.float32)
            taps[-1] = 1
            found[name] = Mapped(taps, "the identity")
        elif name.endswith("_conv.bias"):
            found[name] = Mapped(np.zeros(shape, np.float32), "0")
    gate = read("g_proj.kernel")
    if gate is not None and getattr(ours, "output_gate", "") == "sigmoid" and "g_proj.kernel" in shapes:
        found["g_proj.kernel"] = Mapped(gate, *_as_it_is("g_proj.kernel"))
    filled, text = ours.near_attention(), "so that the layer starts near attention"
    if gates == "keys":
        kept = ours.gates_of_keys()
        if kept is None:
            problem = f"kind {ours.kind!r} has no decay that can be made of keys"
            raise ConfigError("init_gates", gates, problem, "Set init_gates=near.")
        found |= _of_keys(kept, found["k_proj.kernel"].value[:, : num * dim], shapes)
        filled, text = kept.filled, "so that the decay is of keys alone"
    for name, number in filled.items():
        found[name] = Mapped(np.full(shapes[name], number, np.float32), f"{number:.3g}, {text}")
    return found, ""


def _of_keys(kept: mixers.KeyGates, k: np.ndarray, shapes: Mapping[str, tuple]) -> dict[str, Mapped]:
    """The logits of a decay: the keys of all heads, ``k`` [D, H * K], pooled to as many as there are."""
    first, *second = kept.matrices
    width, wanted = k.shape[1], shapes[first][1]
    text = "k_proj.kernel" + (f", {width} channels pooled to {wanted}" if wanted != width else "")
    found = {first: Mapped(kept.sign * k @ pool(width, wanted), text, ("k_proj.kernel",))}
    for name in second:
        rank, channels = shapes[name]
        spread = np.zeros((rank, channels), np.float32)
        spread[np.arange(channels) * rank // channels, np.arange(channels)] = 1
        found[name] = Mapped(spread, "each channel's pool of keys")
    return found


def pool(width: int, count: int) -> np.ndarray:
    """[width, count], column i the mean over channels floor(i width / count) to ceil((i + 1) width / count):
    adaptive average pooling."""
    found = np.zeros((width, count), np.float32)
    for i in range(count):
        begin, end = i * width // count, -(-(i + 1) * width // count)
        found[begin:end, i] = 1 / (end - begin)
    return found


def _there(read: Read, name: str) -> np.ndarray:
    value = read(name)
    assert value is not None, name
    return value


def _as_it_is(name: str) -> tuple[str, tuple[str]]:
    return f"{name}, as it is", (name,)


def _sizes(num: int, dim: int) -> str:
    return f"num_heads={num}, head_dim={dim}"


def _small(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)

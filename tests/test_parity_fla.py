"""flash-linear-attention's own models on a GPU against imports of checkpoints that they wrote, and exports
that they read back; names and shapes of their tensors on any device.

Needs an NVIDIA GPU, fla-core and flash-linear-attention 0.6, and the `parity` extra. Where fla is installed,
transformers calls its kernels: keep test_parity.py's environment apart. Run with -s to see the errors.

Three things stand in for what fla's models need besides fla: one Triton configuration per kernel instead of
minutes of autotuning; PyTorch's attention for the flash-attn package; and float32 products in Triton instead
of TF32. The gradients of Gated DeltaNet and KDA are those of fla's recurrence in PyTorch: fla refuses the
former's backward kernel on Hopper with Triton 3.4 to 3.7 (its issue 640), and the latter's takes minutes to
compile for float32. fla's DeltaNet kernels refuse float32 in chunks, so that DeltaNet runs token by token.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import generate, model
from hybridlm.convert import evaluate, families, incoming, outgoing
from hybridlm.convert.family import same_model
from hybridlm.errors import ConfigError
from hybridlm.rows import single_document
from tests import tiny

torch = pytest.importorskip("torch", reason="needs the parity extra: torch")

pytestmark = pytest.mark.parity

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # with TRITON_INTERPRET=1 also without a GPU, slowly
SMALL = dict(
    vocab_size=61, hidden_size=64, num_hidden_layers=2, intermediate_size=40, pad_token_id=0, bos_token_id=1,
    eos_token_id=None,
)  # fmt: skip
WINDOWED = dict(layers=[1], num_heads=4, num_kv_heads=2, window_size=16, rope_theta=5e4)
SPECS = [dict(layers=[0], num_heads=2, qkv_bias=True), dict(layers=[2], num_heads=4, window_size=30)]
DELTA = dict(num_heads=2, head_dim=16)
RECURRENT = dict(attn_mode="fused_recurrent")  # DeltaNet's chunks refuse float32
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "delta_net": ("DeltaNet", dict(num_heads=2, **RECURRENT)),
    "delta_net gated": (
        "DeltaNet", dict(num_heads=4, use_gate=True, allow_neg_eigval=True, expand_v=2.0, **RECURRENT)
    ),
    "gated_deltanet": (
        "GatedDeltaNet", dict(**DELTA, allow_neg_eigval=True, output_gate_activation="sigmoid")
    ),
    "gated_deltanet hybrid": (
        "GatedDeltaNet", dict(**DELTA, num_v_heads=4, use_gate=False, attn=WINDOWED, tie_word_embeddings=True)
    ),
    "kda": ("KDA", dict(**DELTA)),
    "kda hybrid": ("KDA", dict(**DELTA, num_v_heads=4, num_hidden_layers=3, attn=SPECS)),
    "gla": ("GLA", dict(num_heads=2)),
    "comba": ("Comba", dict(**DELTA, num_v_heads=4, correction_factor=0.02)),
    "linear_attn": ("LinearAttention", dict(num_heads=2, feature_map="hedgehog", norm_feature_map=True)),
    "gla conv": ("GLA", dict(num_heads=4, use_short_conv=True, use_output_gate=False, expand_k=1.0)),
    "hgrn": ("HGRN", dict(num_hidden_layers=3)),
    "hgrn conv": ("HGRN", dict(use_short_conv=True, expand_ratio=2, use_lower_bound=False)),
    "hgrn2": ("HGRN2", dict(num_heads=2, expand_ratio=None, num_hidden_layers=3)),
    "retnet": ("RetNet", dict(num_heads=2)),
    "transformer": ("Transformer", dict(num_heads=4, num_kv_heads=2, qk_norm=True)),
    "transformer window": ("Transformer", dict(num_heads=4, window_size=20, qkv_bias=True, rope_theta=5e5)),
}  # fmt: skip


# Values of these are compared with golden checkpoints (tests/golden/models/README.md): in training FLA's Mom
# has convolutions that run on from one memory's tokens into the next one's, and a sort that may shuffle them.
REFUSED = {"MLA": ["window_size"], "RWKV6": ["attn"], "RWKV7": ["attn"], "Mamba2": ["num_heads"]}
SHAPES_ALONE = ["Mom", "Mamba2", "GatedDeltaProduct", "MLA", "RWKV6", "RWKV7"]


def attention(q, k, v, causal: bool = True, window_size: tuple[int, int] = (-1, -1)):
    """flash_attn's function: [B, T, H, D], grouped heads, the last query beside the last key."""
    ago = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[:, None]
    ago = ago - torch.arange(k.shape[1], device=q.device)
    seen = ago >= 0 if window_size[0] < 0 else (ago >= 0) & (ago <= window_size[0])
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    """flash_attn's function of concatenated sequences: [tokens, H, D]."""
    ends = lambda lengths: lengths.tolist()[1:-1]
    parts = [x.tensor_split(ends(at)) for x, at in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))]
    return torch.cat([attention(*(x[None] for x in one), **options)[0] for one in zip(*parts, strict=True)])


@pytest.fixture(scope="module")
def fla():
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    tuner = pytest.importorskip("triton.runtime.autotuner", reason="needs triton").Autotuner
    init = tuner.__init__
    tuner.__init__ = lambda self, fn, names, configs, *args, **options: init(
        self, fn, names, configs[:1], *args, **options
    )
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    from fla import models
    from fla.layers import attn, mla

    mla.flash_attn_func, mla.flash_attn_varlen_func = attention, packed_attention
    attn.flash_attn_func, attn.flash_attn_varlen_func = attention, packed_attention
    return models


OPTIONS: dict[str, list[Any]] = {
    "hidden_ratio": [None, 2, 4], "intermediate_size": [None, 24], "tie_word_embeddings": [False, True],
    "fuse_norm": [True, False], "fuse_swiglu": [True, False], "num_heads": [1, 2, 4],
    "attn": [None, WINDOWED, [dict(layers=[0], num_heads=4), dict(layers=[1], num_heads=2, qkv_bias=True)]],
    "use_short_conv": [True, False], "conv_size": [2, 4], "use_gate": [True, False],
    "use_output_gate": [True, False], "allow_neg_eigval": [True, False], "head_dim": [8, 16],
    "num_v_heads": [None, 4], "expand_v": [1.0, 2.0], "expand_k": [0.5, 1.0], "num_kv_heads": [None, 2],
    "expand_ratio": [None, 1, 2, 16], "use_lower_bound": [True, False], "qkv_bias": [True, False],
    "qk_norm": [True, False], "window_size": [None, 5], "safe_gate": [True], "lower_bound": [-5],
    "single_kv_proj": [True, False], "shared_mem": [True, False],
    "output_gate_activation": ["swish", "silu", "sigmoid"], "num_householder": [1, 3], "n_groups": [1, 2],
    "use_forget_gate": [True, False], "state_size": [8], "conv_kernel": [2, 4], "expand": [1, 2],
    "q_lora_rank": [None, 12], "kv_lora_rank": [24], "norm_first": [True, False], "proj_low_rank_dim": [3],
    "gate_low_rank_dim": [7], "decay_low_rank_dim": [None, 7], "a_low_rank_dim": [None, 5],
}  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cls", [*sorted({cls for cls, _ in CASES.values()}), *SHAPES_ALONE])
def test_names_and_shapes(cls: str, seed: int, fla: Any, tmp_path: Path) -> None:
    """Of random settings, on any device: the checkpoint's tensors are those that the importer expects."""
    rng = np.random.default_rng(seed)
    config_class = getattr(fla, f"{cls}Config")
    known = set(config_class().to_dict()) - ({"qk_norm"} if cls == "DeltaNet" else set())
    settings = {name: values[rng.integers(len(values))] for name, values in OPTIONS.items() if name in known}
    settings = {name: value for name, value in settings.items() if rng.random() < 0.6}
    if cls in ("HGRN", "HGRN2"):
        settings["use_lower_bound"] = settings.get("expand_ratio", 0) == 1  # elsewhere fla has no such shape
    if cls == "HGRN":
        settings["expand_ratio"] = settings.get("expand_ratio") or 1
    if cls == "HGRN2":
        settings["expand_ratio"] = {1: 1, 2: 16, 16: 32}.get(settings.get("expand_ratio"))
    if "num_heads" in known:
        settings.setdefault("num_heads", 4)
    if cls == "Mom":
        settings["use_short_conv"] = True  # else it warns, as an exception
        if settings.get("attn"):
            settings["attn"] = dict(layers=[1], num_heads=4)
    for name in REFUSED.get(cls, []):  # or it must fit the others
        settings.pop(name, None)
    if "lower_bound" in settings or "safe_gate" in settings:
        settings |= {"lower_bound": -5, "safe_gate": True}
    config = config_class(**{**SMALL, "intermediate_size": None, "num_hidden_layers": 3} | settings)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        net = getattr(fla, f"{cls}ForCausalLM")(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    want = {key: tuple(value.shape) for key, value in net.state_dict().items() if key not in tied}
    try:
        source = families.read_config(tmp_path)
    except ConfigError as error:
        assert settings.get("num_kv_heads") and "num_kv_heads" in error.field, settings
        return
    definition = model.build(source.config)
    shapes = families.plan(definition, source.family, source.values).shapes
    renamed = {key if key in shapes else source.family.rename(key): shape for key, shape in want.items()}
    assert shapes == renamed, settings
    written = source.family.write(definition, source.model_type)
    assert not same_model(definition, model.build(source.family.architecture(written).config()))


def fla_model(models: Any, name: str):
    cls, settings = CASES[name]
    torch.manual_seed(len(name))
    config = getattr(models, f"{cls}Config")(**SMALL | settings)
    net = getattr(models, f"{cls}ForCausalLM")(config)
    for key, tensor in net.named_parameters():
        if key.endswith(("A_log", "dt_bias")):
            tensor.data = torch.rand_like(tensor)
        elif tensor.ndim > 1:
            tensor.data = torch.randn_like(tensor) * (0.2 if "lower_bounds" not in key else 1.0)
        else:
            tensor.data = tensor.data + 0.2 * torch.randn_like(tensor)
    return net.to(DEVICE).eval()


def fla_logits(net, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net(torch.tensor(ids, device=DEVICE), use_cache=False).logits.float().cpu().numpy()


def recurrence(q, k, v, g, beta, *, A_log, dt_bias, allow_neg_eigval, lower_bound=None, **options):
    """fla's gates and recurrence in PyTorch, in place of its chunk kernels of KDA and Gated DeltaNet."""
    from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
    from fla.ops.kda.naive import naive_recurrent_kda

    assert options["use_qk_l2norm_in_kernel"] and options["use_gate_in_kernel"]
    assert options["use_beta_sigmoid_in_kernel"]
    unit = lambda x: x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    g = g if g.ndim == 4 else g[..., None]  # one decay for all channels of a head
    bound = () if lower_bound is None else (lower_bound,)
    g = (naive_kda_lowerbound_gate if bound else naive_kda_gate)(g, A_log, dt_bias, *bound)
    beta = beta.float().sigmoid() * (2 if allow_neg_eigval else 1)
    return naive_recurrent_kda(unit(q), unit(k), v, g, beta)


def fla_gradients(net, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Of the mean cross-entropy of the next token."""
    net.train()
    tokens = torch.tensor(ids, device=DEVICE)
    logits = net(tokens, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    net.eval()
    return {name: value.grad.cpu().numpy() for name, value in net.named_parameters()}


def gradients(folder: Path, definition: model.Definition, params: model.Params, ids: np.ndarray) -> dict:
    """The same here, under the names of the checkpoint."""
    targets = np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], -1)], axis=1)
    batch = {"tokens": jnp.asarray(ids), "targets": jnp.asarray(targets)}
    batch |= dict(zip(("segment_ids", "positions"), single_document(*ids.shape), strict=True))
    with jax.default_matmul_precision("highest"):
        loss = lambda params: tiny.loss_fn(definition, params, batch)
        grads, sums = jax.jit(jax.grad(loss, has_aux=True))(params)
    flat = model.unstack(definition, grads)
    source = families.read_config(folder)
    planned = families.plan(definition, source.family, source.values)
    found = {}
    for rule in planned.rules:
        arrays = rule.outward([np.asarray(flat[name]) / sums["tokens"] for name in rule.ours])
        found |= dict(zip(rule.theirs, arrays, strict=True))
    return found


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, fla: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = fla_model(fla, name)
    ids = np.random.default_rng(0).integers(3, SMALL["vocab_size"], (2, 139))
    want = fla_logits(net, ids)  # two chunks of 64 and a ragged one
    net.save_pretrained(tmp_path / "theirs")
    incoming.import_hf(tmp_path / "theirs", tmp_path / "run")
    definition, params = evaluate.load(tmp_path / "run")
    logits = evaluate.logits(definition, params, ids)
    errors = {"logits": error(logits, want)}
    errors["first 50 tokens"] = error(logits[:, :50], fla_logits(net, ids[:, :50]))  # fla: token by token
    print(f"\n{name}: {errors}", flush=True)

    with monkeypatch.context() as patch:
        patch.setattr("fla.layers.gated_deltanet.chunk_gated_delta_rule", recurrence)
        patch.setattr("fla.layers.kda.chunk_kda", recurrence)
        theirs = fla_gradients(net, ids)
    ours = gradients(tmp_path / "theirs", definition, params, ids)
    worst = {key: error(ours[key].reshape(theirs[key].shape), theirs[key]) for key in theirs if key in ours}
    key = max(worst, key=worst.__getitem__)
    errors["worst gradient"] = worst[key]
    print(f"{name}: gradients {worst[key]:.1e} {key}", flush=True)

    outgoing.export_hf(tmp_path / "run", tmp_path / "again", model_type=net.config.model_type)
    kernels = {key: value for key, value in CASES[name][1].items() if key == "attn_mode"}
    back, report = type(net).from_pretrained(tmp_path / "again", **kernels, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    errors["export"] = error(fla_logits(back.to(DEVICE).eval(), ids), want)
    prompt = torch.tensor(ids[:, :20], device=DEVICE)
    tokens = net.generate(prompt, max_new_tokens=8, do_sample=False)[:, 20:].cpu().numpy()
    with jax.default_matmul_precision("highest"):
        got = generate.continuations(definition, params, ids[:, :20].tolist(), max_new_tokens=8)
    print(f"{name}: {errors}, greedy tokens {got} {tokens.tolist()}", flush=True)
    assert errors["logits"] < 1e-4 and errors["first 50 tokens"] < 1e-4 and errors["export"] < 1e-5
    assert errors["worst gradient"] < 1e-3
    np.testing.assert_array_equal(got, tokens)

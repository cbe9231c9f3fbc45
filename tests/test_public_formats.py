"""Which public format says a model of ours, and why there is none. No model is computed."""

import pytest

from hybridlm import config as configs
from hybridlm import model
from hybridlm.convert import families
from hybridlm.convert.family import same_model

DEFAULTS = {
    "configs/quickstart.py": "kda",
    "configs/kimi_linear.py": "kimi_linear",
    "configs/kimi_linear.py:moe": "kimi_linear",
    "configs/mqar.py": "kda",
    "configs/hybrid.py:340m,full": "transformer",
    "configs/hybrid.py:340m,mla": "deepseek_v3",
    "configs/hybrid.py:340m,swa,pure": "transformer",
} | {
    f"configs/hybrid.py:340m,{mixer},{ratio}": model_type
    for mixer, model_type in (
        ("deltanet", "delta_net"), ("gdn", "gated_deltanet"), ("kda", "kda"), ("gla", "gla"),
        ("hgrn", "hgrn"), ("hgrn2", "hgrn2"), ("retnet", "retnet"),
        ("comba", "comba"), ("gdp", "gated_deltaproduct"), ("deltaproduct", "gated_deltaproduct"),
    )
    for ratio in ("pure", "3:1")
} | {f"configs/hybrid.py:340m,kda,{ratio}": "kda" for ratio in ("24:1", "1:1")}  # fmt: skip


@pytest.mark.parametrize("spec", DEFAULTS)
def test_defaults_have_a_public_format(spec: str) -> None:
    config = configs.resolve(configs.load(spec))
    assert families.public_format(config) == (DEFAULTS[spec], "")
    definition = model.build(config)
    values = families.written(definition)[1]
    read = families.FAMILIES[DEFAULTS[spec]].architecture(values).config()
    assert not same_model(model.build(read), definition)


def test_what_has_none_says_so_in_a_line() -> None:
    for spec, said in (
        ("swa,3:1", "one window_size for all layers"),
        ("mamba2,pure", "mlp_kind swiglu, not none"),
        ("rwkv7,pure", "MLPs of kind channel_mix, not swiglu"),
        ("mom,pure", "projections of gates, too"),
        ("loglinear,pure", "of.norm_eps 1e-05, not 1e-06"),
    ):
        found, why = families.public_format(configs.resolve(configs.load(f"configs/hybrid.py:340m,{spec}")))
        assert not found and said in why and len(why) < 300 and "\n" not in why


def test_a_format_without_the_kinds_of_layers_gives_no_reason() -> None:
    """...of its own, such as a head that it has: none has both, whatever else were changed."""
    found, why = families.public_format(
        configs.resolve(configs.load("configs/quickstart.py", {"model.pattern": "full s4d"}))
    )
    assert not found and why.endswith("none has layers of exactly these kinds: attention, s4d, swiglu")


def test_settings_that_compute_nothing_are_not_compared() -> None:
    """...and those that compute something are."""
    config = configs.load("configs/hybrid.py:340m,kda,3:1")
    plain = model.build(configs.resolve(config))
    config.mixers.full.update(norm_eps=0.1, norm_unit_offset=True)
    assert not same_model(plain, model.build(configs.resolve(config)))
    config.mixers.full.update(qk_norm="head")
    assert "qk_norm" in same_model(plain, model.build(configs.resolve(config)))
    config = configs.load("configs/hybrid.py:340m,kda,3:1")
    config.mixers.kda.norm_eps = 1e-5
    assert "norm_eps" in same_model(plain, model.build(configs.resolve(config)))
    config.mixers.kda.update(norm_eps=1e-6, output_gate="none")
    ungated = model.build(configs.resolve(config))
    config.mixers.kda.update(output_gate_bias=False, output_gate_rank=7)
    assert not same_model(ungated, model.build(configs.resolve(config)))


def test_minimax_norms_streams() -> None:
    """...in both halves of every block, with the same weights in all of a kind."""
    fields = {"model.pattern": "lightning/moe*2 full/moe", "mixers.lightning.kind": "lightning",
              "mixers.lightning.norm_eps": "1e-6", "mlps.moe.kind": "moe"}  # fmt: skip
    fields |= {f"mixers.{name}.num_heads": "4" for name in ("full", "lightning")}
    fields |= {f"mixers.{name}.head_dim": "32" for name in ("full", "lightning")}
    told = lambda stream: families.public_format(
        configs.resolve(configs.load("configs/quickstart.py", fields | {"model.stream_norm": stream}))
    )
    assert told("*=1.86/1") == ("minimax", "")
    for stream, said in (
        ("", "halves norm"),
        ("*.mlp=1", "halves norm"),
        ("*=1, full.mlp=2", "layer 0: stream"),
    ):
        found, why = told(stream)
        assert not found and said in why


def test_kimi_linear_with_a_tied_head_is_none():
    """transformers (5.24) ties nothing there: it would read the folder with a head at random."""
    fields = {"model.pattern": "kda*3 mla", "mixers.kda.output_gate_bias": False, "mixers.mla.num_heads": 4}
    fields |= {"mixers.mla.rope_theta": 0, "model.tie_embeddings": False}
    told = lambda **more: families.public_format(
        configs.resolve(
            configs.load("configs/quickstart.py", {n: str(v) for n, v in (fields | more).items()})
        )
    )
    assert told() == ("kimi_linear", "")
    model_type, reason = told(**{"model.tie_embeddings": True})
    assert model_type == "" and "has a head of its own" in reason


def test_yarn_goes_out_in_the_terms_of_a_format() -> None:
    """Where all channels turn, DeepSeek's scale of logits is the paper's."""
    fields = {"model.pattern": "full", "mixers.full.qk_norm": "head", "mixers.full.rope_theta": "1e4"}
    made = lambda **more: configs.resolve(
        configs.load("configs/quickstart.py", fields | {f"mixers.full.{n}": v for n, v in more.items()})
    )
    assert families.public_format(made(yarn="4, 4096")) == ("qwen3", "")
    values = families.written(model.build(made(yarn="4, 4096")))[1]
    assert values["rope_parameters"]["factor"] == 4 and "mscale" not in values["rope_parameters"]
    assert values["max_position_embeddings"] == 16384
    for more, said in (
        (
            {"rotary_fraction": "0.5", "yarn": ""},
            "rotary_fraction 0.5, not 1.0",
        ),  # transformers knows all or none
        ({"yarn": "4, 4096, 32, 1, 0.7"}, "MSCALE, MSCALE_ALL, which must be 1, 0"),
    ):
        found, why = families.public_format(made(**more))
        assert not found and said in why

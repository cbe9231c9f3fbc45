"""Every shipped config against its golden text.

After a change that is meant, write the texts anew and look at the diff:

    HYBRIDLM_WRITE_GOLDEN=1 python -m pytest -q tests/test_configs.py
"""

import io
import itertools
import os
from pathlib import Path

import pytest
from rich.console import Console

from configs import hybrid, synthetic
from hybridlm import config as configs
from hybridlm import cost, data, model, report
from hybridlm.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden" / "configs"
SHIPPED = {
    "quickstart": "configs/quickstart.py",
    "hybrid": "configs/hybrid.py:340m,kda,3:1",
    "kimi_linear": "configs/kimi_linear.py",
    "kimi_linear_moe": "configs/kimi_linear.py:moe",
    "mqar": "configs/mqar.py",
    "synthetic": "configs/synthetic.py",
}


def check(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("HYBRIDLM_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), "regenerate the golden texts if this change is meant (see above)"


def listed(indices: list[int]) -> str:
    return " ".join(map(str, indices)) or "none"


@pytest.mark.parametrize("name", SHIPPED)
def test_resolved(name: str) -> None:
    config = configs.resolve(configs.load(SHIPPED[name]))
    facts = f"# parameters: {cost.parameters(config)}\n# full attention: {listed(cost.full_layers(config))}\n"
    check(name, facts + configs.to_yaml(config))


@pytest.mark.parametrize("task", synthetic.TASKS)
def test_synthetic_tasks(task: str) -> None:
    """Every task resolves, and its data fit its model."""
    config = configs.resolve(configs.load(f"configs/synthetic.py:{task},deltanet full"))
    sizes = {"batch_size": 2, "seq_len": config.train.seq_len, "vocab_size": config.model.vocab_size}
    batch = data.build(config.data, split="train", seed=0, **sizes).batch(0)
    assert (batch["targets"] >= 0).any(axis=1).all() and batch["tokens"].max() < config.model.vocab_size


def test_unknown_synthetic_task() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'palindrome'"):
        configs.load("configs/synthetic.py:palindrom,kda")


def grid() -> list[str]:
    attention = [f"{size},{full}" for size, full in itertools.product(hybrid.SIZES, hybrid.FULL)]
    mixers = itertools.product(hybrid.SIZES, hybrid.MIXERS, ["pure", "3:1"])
    ratios = itertools.product(hybrid.SIZES, ["kda"], hybrid.RATIOS)  # they are the same for every mixer
    return attention + list(dict.fromkeys(",".join(arg) for arg in [*mixers, *ratios]))


@pytest.mark.slow
def test_hybrid_grid() -> None:
    """Each size, mixer and ratio has the transformer's parameters within 2% and full layers as documented."""
    lines = []
    transformer = {size: cost.parameters(resolved_hybrid(f"{size},full")) for size in hybrid.SIZES}
    for arg in grid():
        config = resolved_hybrid(arg)
        summary = cost.summary(config)
        size, _, *ratio = arg.split(",")
        assert summary["parameters"] == pytest.approx(transformer[size], rel=0.02), arg
        assert summary["num_layers"] == 24
        if ratio:
            assert summary["full_layers"] == list(hybrid.RATIOS[ratio[0]])
        lines.append(
            f"{arg:20} {summary['parameters']:>11} mlp {config.model.mlp_hidden:4}"
            f" state {summary['state_bytes']:>9} full {listed(summary['full_layers'])}\n"
        )
    check("hybrid_grid", "".join(lines))


def resolved_hybrid(arg: str) -> configs.FrozenConfigDict:
    return configs.resolve(hybrid.get_config(arg))


def test_transformers_to_match() -> None:
    for size in hybrid.SIZES:
        assert cost.parameters(resolved_hybrid(f"{size},full")) == hybrid.TRANSFORMER[size]


@pytest.mark.parametrize(("name", "most"), [("quickstart", 1), ("hybrid", 2)])
def test_a_dry_run_defines_the_model_at_most_twice(name, most, monkeypatch) -> None:
    """Once as it is trained; hybrid.py also before its MLPs' width is known."""
    made, init = [], model.Definition.__init__

    def counted(self, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    model.build.cache_clear()
    monkeypatch.setattr(model.Definition, "__init__", counted)
    config = configs.resolve(configs.load(SHIPPED[name]))
    report.dry_run(config, Console(file=io.StringIO()))
    assert len(made) == most


def test_grid_is_what_was_promised() -> None:
    assert {"pure", "24:1", "12:1", "6:1", "3:1", "1:1"} <= set(hybrid.RATIOS)
    for r in (6, 3, 1):
        config = resolved_hybrid(f"340m,kda,{r}:1")
        assert cost.full_layers(config) == list(range(r, 24, r + 1))


@pytest.mark.parametrize(
    ("arg", "problem"),
    [
        ("340m", "mixer '' is none of deltanet, gdn, kda"),
        ("350m,kda,3:1", "size '350m' is none of 340m, 1.3b"),
        ("340m,kd,3:1", "mixer 'kd' is none of"),
        ("340m,kda", "ratio '' is none of pure, 24:1"),
        ("340m,kda,4:1", "ratio '4:1' is none of"),
        ("340m,full,3:1", "SIZE,full"),
        ("340m,kda,3:1,last", "must be SIZE,MIXER,RATIO"),
    ],
)
def test_hybrid_refuses(arg: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load(f"configs/hybrid.py:{arg}")
    assert problem in str(caught.value)


def test_names_of_kinds_work_too() -> None:
    assert resolved_hybrid("340m,gated_delta_net,6:1") == resolved_hybrid("340m,gdn,6:1")
    assert resolved_hybrid("1.3b,attention") == resolved_hybrid("1.3b,full")


@pytest.mark.slow
def test_any_standard_mixer_runs_in_the_small_configs() -> None:
    for path, name in itertools.product(("configs/quickstart.py", "configs/mqar.py"), configs.STANDARD):
        config = configs.resolve(configs.load(path, {"model.pattern": f"{name}*2"}))
        assert cost.parameters(config) < 1e7, (path, name)

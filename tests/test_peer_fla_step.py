"""The step of FLA's models: that they are flame's and as large as ours, and how a step is taken."""

import argparse
import importlib
import math
from pathlib import Path

import numpy as np
import pytest

from hybridlm.errors import ConfigError


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))  # as Python does with a script
    return importlib.import_module("peer_fla_step")


def by_hand(values: dict, keys: int, inner: int, heads: int, gates: int) -> int:
    """Parameters of a stack of delta-rule layers with short convolutions, an output norm and SwiGLU."""
    width, hidden = values["hidden_size"], values["intermediate_size"]
    mixer = 2 * width * keys + (2 + (gates > 1)) * width * inner + gates * width * heads
    mixer += values["conv_size"] * (2 * keys + inner) + inner // heads + 2 * heads * (gates > 1)
    layer = mixer + 3 * width * hidden + 2 * width
    return values["num_hidden_layers"] * layer + 2 * values["vocab_size"] * width + width


def test_models(script):
    """DeltaNet's fields are those of flame's configs/delta_net_340M.json (hidden_ratio 4 is 8/3 in 256s)."""
    kind, values, parameters = script.described(script.resolved("340m,deltanet,pure", {}))
    flame = {
        "hidden_size": 1024, "num_heads": 8, "num_hidden_layers": 24, "expand_k": 1, "expand_v": 1,
        "conv_size": 4, "use_gate": False, "use_short_conv": True, "tie_word_embeddings": False,
        "norm_eps": 1e-6, "hidden_act": "swish", "intermediate_size": math.ceil(1024 * 8 / 3 / 256) * 256,
    }  # fmt: skip
    assert kind == "delta_net" and {name: values[name] for name in flame} == flame
    assert parameters == by_hand(values, 1024, 1024, 8, 1)
    kind, values, parameters = script.described(script.resolved("340m,gdn,pure", {}))
    assert kind == "gated_deltanet" and parameters == by_hand(values, 768, 1536, 3, 2)
    with pytest.raises(ConfigError, match="public format"):
        script.described(script.resolved("340m,loglinear,pure", {}))


def test_arguments(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--steps=3", "--config.model.num_layers=2", "--configs", "a", "b"])
    args, rest = script.parsed()
    assert (args.steps, args.configs, rest) == (3, ["a", "b"], ["--config.model.num_layers=2"])
    monkeypatch.setattr("sys.argv", ["x", "--slice_s=3"])
    with pytest.raises(SystemExit):
        script.parsed()
    assert "unknown: --slice_s=3" in capsys.readouterr().err


def test_table(script):
    row = {"config": "c", "mfu": 0.25, "first_step_s": 1.0, "peak_gib": 2.0, "loss": 3.0}
    rows = [row | {"code": "ours", "tokens_per_second": speed} for speed in (100.0, 300.0)]
    lines = script.table([{"config": "c", "code": "fla", "error": "refused"}, *rows]).splitlines()[2:]
    assert lines[0].startswith("| c | fla | refused |") and "200 (100 to 300) | 25.0%" in lines[1]
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parity
def test_step(script):
    """Against AdamW by hand in float64 on a linear model, of gradients that bf16 holds."""
    torch = pytest.importorskip("torch", reason="needs the parity extra: torch")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.3]))

        def forward(self, input_ids, labels, use_cache):
            return argparse.Namespace(loss=(self.weight * input_ids).sum())

    settings = {"learning_rate": 0.1, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    step = script.Step(Model(), argparse.Namespace(clip_norm=2.5, **settings))
    w, m, v = np.array([1.0, -2.0, 0.3]), np.zeros(3), np.zeros(3)
    for count, x in enumerate(([3.0, 4.0, 0.0], [0.5, 0.25, -1.0]), 1):
        bf16 = torch.tensor(w).bfloat16()
        loss = step(torch.tensor(x))
        np.testing.assert_allclose(loss, (bf16 * torch.tensor(x)).sum(), rtol=1e-6)
        g = np.array(x) * min(1, 2.5 / np.linalg.norm(x))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - 0.1 * (m / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.95**count)) + 1e-8) + 0.1 * w)
        np.testing.assert_allclose(step.masters[0].detach(), w, rtol=1e-5)
        assert step.parameters[0].dtype == torch.bfloat16
        np.testing.assert_allclose(
            step.parameters[0].float().detach(), torch.tensor(w).bfloat16().float(), rtol=1e-2
        )

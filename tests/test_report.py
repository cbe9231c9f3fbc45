"""What is shown of a config."""

import io
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console

import train
from hybridlm import config as configs
from hybridlm import idle, member, report, stages

QUICKSTART = "configs/quickstart.py"


def test_dry_run_prints_everything_and_writes_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    workdir = tmp_path / "run"
    arguments = ["--dry_run", f"--workdir={workdir}", "--config.model.pattern=(gdn*3 full)*2"]
    assert (
        train.main(
            [
                f"--config={QUICKSTART}",
                *arguments,
                "--config.mixers.gla.num_heads=2",
                "--config.mlps.moe.top_k=1",
                "--config.train.steps=10",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert not workdir.exists()
    for part in (
        "pattern: (gdn*3 full)*2",  # the resolved config
        "gated_delta_net",  # the layer table
        "parameters",
        "decode state per sequence",
        "KV cache per sequence",
        "training FLOPs per token",
        "memory per device, estimate",
        "full attention: 2 of 8 layers (counted from 0): 3, 7",
    ):
        assert part in shown
    assert "mixers.gla.num_heads has no effect: no layer of model.pattern names that mixer" in caplog.text
    assert "mlps.moe.top_k has no effect: no layer of model.pattern names that MLP" in caplog.text
    told = "the run: optimizer.warmup_steps = 40 are more than its 10 steps: the learning rate ends at "
    assert told in caplog.text


def test_overrides_that_no_stage_heeds_are_said() -> None:
    parts: dict[str, object] = {
        "order": ("a", "b"),
        "a": {"train": {"steps": 2}},
        "b": {"train": {"steps": 3, "seq_len": 16}},
    }
    parts["c"] = {"train": {"steps": 1}}
    values = configs.load(QUICKSTART)
    values.stages = ConfigDict(parts)
    config = configs.resolve(values)
    assert config.train.steps == 5
    tokens = 2 * config.train.batch_size * config.train.seq_len + 3 * config.train.batch_size * 16
    assert stages.tokens(stages.parts(config, configs.resolve)) == tokens == 4288
    each = [config.train.batch_size * config.train.seq_len] * 2 + [config.train.batch_size * 16] * 3
    parts_ = stages.parts(config, configs.resolve)
    assert [stages.tokens(parts_, step) for step in range(6)] == [sum(each[:step]) for step in range(6)]
    assert report.facts(config, {"data": 1, "fsdp": 1, "tensor": 1})["tokens"].startswith(
        "4.29 k in 5 steps, "
    )
    assert idle.override(config, "train.steps") == "every stage has its own"
    assert idle.override(config, "stages.c.train.steps") == "the stage is not in stages.order"
    for heeded in ("train.seq_len", "train.batch_size", "stages.order", "stages.a.train.steps", "init_from"):
        assert idle.override(config, heeded) == ""


def test_layer_table_shows_the_settings_of_a_name_once() -> None:
    overrides = {"model.pattern": "wide kda*3 wide", "mixers.wide.kind": "kda", "mixers.wide.num_heads": "2"}
    config = configs.resolve(configs.load(QUICKSTART, overrides))
    console = Console(width=100, file=io.StringIO())
    console.print(report.layer_table(config))
    shown = console.file.getvalue()
    assert "5 layers: wide kda*3 wide" in shown
    assert shown.count("num_heads=2") == shown.count("head_dim=64") == 1
    names = [line.split()[1] for line in shown.splitlines() if "kB" in line]
    assert names == ["wide", "kda", "kda", "kda", "wide"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (12_345, "B", "12.3 kB"),
        (2.5e18, "FLOP", "2.5 EFLOP"),
        (7, "", "7"),
    ],
)
def test_quantity(value: float, unit: str, text: str) -> None:
    assert report.quantity(value, unit) == text


def test_how_often_each_part_of_a_mixture_is_read(tmp_path) -> None:
    """Against the rows themselves: a part of one short text is read over and over, an endless task is not."""
    (tmp_path / "a.txt").write_bytes(b"ab" * 100)
    given = configs.load(
        QUICKSTART, {"model.vocab_size": "300", "train.steps": "2048", "train.batch_size": "4"}
    )
    given.train.seq_len = 32
    parts = {"text": configs.data("text", path=f"{tmp_path}/a.txt", weight=3.0), "task": configs.data("mqar")}
    given.data = configs.data("mixture", components=parts)
    config = configs.resolve(given)
    dataset = member.build_data(config, "train")
    origins = [origin.partition(":")[0] for origin in dataset.source.ids(np.arange(4 * 2048))]
    often = (
        origins.count("text")
        / dict(zip(dataset.source.names, dataset.source.sources, strict=True))["text"].num_rows
    )
    assert report.amount(config, dataset).endswith(f"262 k tokens, text {often:.3g} epochs")

"""Sweep files to points: which runs there are, what they are called, and what bad sweeps get."""

import math
from pathlib import Path

import pytest

from hybridlm import config as configs
from hybridlm import cost
from hybridlm.errors import ConfigError
from launch import grid, plan, sweep
from launch.grid import Sweep, axis, zipped

MQAR = "configs/mqar.py"
SMALL = {"model.num_layers": 4, "model.d_model": 32, "model.vocab_size": 300, "mixers.full.head_dim": 16}


def test_points_in_order_of_the_axes_and_named_by_them():
    axes = [axis("mixer", "gla", "kda"), axis("ratio", "pure", "3:1", "full"), axis("seed", 0, 1)]
    runs = grid.runs(Sweep(MQAR, axes, SMALL))
    assert [run.name for run in runs] == [
        "gla_pure_seed0",
        "gla_pure_seed1",
        "gla_3-1_seed0",
        "gla_3-1_seed1",
        "full_full_seed0",
        "full_full_seed1",
        "kda_pure_seed0",
        "kda_pure_seed1",
        "kda_3-1_seed0",
        "kda_3-1_seed1",
    ]
    by_name = {run.name: run for run in runs}
    assert cost.full_layers(by_name["kda_3-1_seed1"].config) == [3]
    assert cost.full_layers(by_name["full_full_seed0"].config) == [0, 1, 2, 3]
    assert by_name["kda_3-1_seed1"].config.train.seed == 1
    assert by_name["kda_3-1_seed1"].config.mixers["kda"].kind == "kda"


def test_files_are_found_from_elsewhere_or_named_with_where(tmp_path, monkeypatch):
    """configs/ of hybridlm itself from anywhere, as for train.py; else the folder that was looked in."""
    monkeypatch.chdir(tmp_path)
    assert len(grid.runs(grid.load("configs/sweeps/ratio_mqar.py"))) == 6
    for look in (lambda: grid.load("nothing/s.py"), lambda: grid.runs(Sweep("nothing/s.py"))):
        with pytest.raises(ConfigError, match=f"nothing/s.py.* no such file. .*looked for from {tmp_path}"):
            look()


def test_a_point_is_a_command_line_of_train():
    run = grid.runs(
        Sweep(MQAR, [axis("ratio", "1:1"), axis("learning_rate", 1e-4)], {**SMALL, "mixer": "gla"})
    )[0]
    spec, *fields = run.command()
    overrides = dict(field.removeprefix("--config.").split("=", 1) for field in fields)
    assert configs.resolve(configs.load(spec.removeprefix("--config="), overrides)) == run.config
    assert run.config.optimizer.learning_rate == 1e-4


def test_placements_and_extra_points():
    also = [{"mixer": "gla", "ratio": "1:1", "placement": where} for where in ("0,1", "first")]
    runs = grid.runs(Sweep(MQAR, [axis("mixer", "gla"), axis("ratio", "1:1")], SMALL, also=also))
    assert [cost.full_layers(run.config) for run in runs] == [[1, 3], [0, 1], [0, 2]]


def test_parts_of_the_base_zips_labels_and_filters():
    sized = axis("size", small={"model.d_model": 32}, wide={"model.d_model": 64, "train.batch_size": 8})
    both = zipped(axis("mixer", "kda", "gdn"), axis("ratio", "3:1", "6:1"))
    found = Sweep(
        "configs/hybrid.py:340m,{mixer},{ratio}",
        [both, sized],
        keep=lambda p: p["mixer"] != "kda" or p["size"][0] == "small",
    )
    with pytest.raises(ConfigError, match=r"a width of 32 holds.* \(at mixer=kda, ratio=3:1, size=small\)"):
        grid.runs(found)
    heads = {f"mixers.{name}.num_heads": 2 for name in ("kda", "gdn", "full")}
    runs = grid.runs(Sweep(found.base, found.axes, heads, keep=found.keep))
    assert [run.name for run in runs] == ["kda_3-1_small", "gdn_6-1_small", "gdn_6-1_wide"]
    assert runs[2].config.train.batch_size == 8 and runs[2].config.model.d_model == 64


def test_matched_parameters_and_token_budget():
    """Counted from the modules' shapes: within 2% of attention, while mixers alone differ by far more."""
    axes = [axis("mixer", "gla", "hgrn2", "retnet"), axis("ratio", "pure", "1:1", "full")]
    fields = {**SMALL, "model.d_model": 64, "mixers.retnet.v_head_dim": 96}
    matched = plan.facts(grid.runs(Sweep(MQAR, axes, fields, match="parameters", tokens=1e6)))
    sizes = [facts.parameters for facts in matched.values()]
    assert max(sizes) / min(sizes) < 1.04
    assert {facts.tokens for facts in matched.values()} == {62 * 64 * 256}  # the first whole step above 1e6
    loose = [f.parameters for f in plan.facts(grid.runs(Sweep(MQAR, axes, fields))).values()]
    assert max(loose) / min(loose) > 1.1


STAGE = {"stages.order": "a", "stages.a.train.steps": 3}
BAD: list[tuple[str, Sweep, list[str]]] = [
    ("no values", Sweep(MQAR, [axis("ratio")]), ["the grid has an axis without values"]),
    ("nothing kept", Sweep(MQAR, [axis("seed", 0)], keep=lambda p: False), ["keep leaves none"]),
    ("no field", Sweep(MQAR, [axis("mixr", "kda")]), ["axes = 'mixr'", "Did you mean 'mixer'"]),
    (
        "no such field",
        Sweep(MQAR, [axis("train.stepz", 1)]),
        ["train.stepz", "Did you mean 'steps'", "train.stepz=1"],
    ),
    (
        "field twice",
        Sweep(MQAR, [axis("seed", 0), axis("train.seed", 1)]),
        ["'seed', 'train.seed'", "both set train.seed"],
    ),
    (
        "pattern twice",
        Sweep(MQAR, [axis("ratio", "pure"), axis("model.pattern", "kda")]),
        ["both set model.pattern"],
    ),
    ("field for all", Sweep(MQAR, [axis("seed", 0)], {"train.seed": 1}), ["also set for all points"]),
    (
        "no base",
        Sweep("configs/mqr.py", [axis("seed", 0)]),
        ["configs/mqr.py", "Did you mean 'configs/mqar.py'"],
    ),
    (
        "no axis for the base",
        Sweep("configs/hybrid.py:340m,{mixer},3:1", [axis("seed", 0)]),
        ["{mixer}", "no axis"],
    ),
    (
        "no ratio",
        Sweep(MQAR, [axis("ratio", "3to1")], SMALL),
        ["ratio = '3to1'", "such as 3:1", "ratio=3to1"],
    ),
    ("no mixer", Sweep(MQAR, [axis("mixer", "kad")], SMALL), ["no mixer named 'kad'", "Did you mean 'kda'"]),
    ("deeper than the stack", Sweep(MQAR, [axis("ratio", "6:1")], SMALL), ["needs at least 7 layers"]),
    (
        "no places",
        Sweep(MQAR, [axis("placement", "1,x")], {**SMALL, "ratio": "1:1"}),
        ["list of layer indices"],
    ),
    ("steps twice", Sweep(MQAR, [axis("train.steps", 1)], tokens=1e6), ["tokens already decides"]),
    (
        "steps of stages",
        Sweep(MQAR, [axis("seed", 0)], {**SMALL, **STAGE}, tokens=1e6),
        ["tokens = 1000000.0: decides train.steps, which stages add up to"],
    ),
    (
        "an axis that changes nothing",  # a stage has steps of its own
        Sweep(MQAR, [axis("train.steps", 1, 2)], {**SMALL, **STAGE}),
        ["axes = 'steps2': is the same run as steps1"],
    ),
    (
        "unmatchable",
        Sweep(MQAR, [axis("mixer", "kda")], {**SMALL, "mixers.kda.num_heads": 8}, match="parameters"),
        ["cannot bring"],
    ),
]


@pytest.mark.parametrize(("found", "parts"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_sweep(found: Sweep, parts: list[str]):
    with pytest.raises(ConfigError) as caught:
        grid.runs(found)
    for part in parts:
        assert part in str(caught.value)


def test_zip_of_unequal_lengths():
    with pytest.raises(ConfigError, match="must have equally many values, here"):
        zipped(axis("seed", 0, 1), axis("ratio", "pure"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config=configs/sweeps/ratio_mqr.py"], ["Did you mean 'configs/sweeps/ratio_mqar.py'"]),
        (["--config=configs/quickstart.py"], ["defines no function get_sweep", "train.py runs configs"]),
        (["--config=configs/sweeps/ratio_mqar.py", "--config.train.stepz=1"], ["train.stepz", "'steps'"]),
        (["--config=configs/sweeps/ratio_mqar.py", "--dry_run", "--device=H1000"], ["--device", "'H100'"]),
        (["--config=configs/sweeps/ratio_mqar.py", "--launcher=slurm", "--engine", "gpu=8"], ["'gpus'"]),
        (
            ["--config=configs/sweeps/ratio_mqar.py", "--launcher=slurm", "--engine", "gpus=two"],
            ["whole number"],
        ),
        (["--config=configs/sweeps/ratio_mqar.py", "--launcher=xpk"], ["--engine cluster", "must be given"]),
        (["--config=configs/sweeps/ratio_mqar.py", "--no_submit"], ["--no_submit", "local launcher"]),
        (["--config=configs/sweeps/ratio_mqar.py", "--retry", "--launcher=xpk"], ["--retry", "not of xpk"]),
        (["--config=configs/sweeps/ratio_mqar.py", "--device=H100"], ["--device = 'H100'", "--dry_run"]),
        (["--config=configs/sweeps/ratio_mqar.py", "--mfu=0.3"], ["--mfu = 0.3", "--dry_run"]),
    ],
)
def test_bad_command(
    arguments: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.setattr(sweep, "run_local", lambda *args: pytest.fail("trained"))
    workdir = tmp_path / "sweep"
    assert sweep.main([*arguments, f"--workdir={workdir}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    for part in parts:
        assert part in message
    assert not workdir.exists()


def test_a_folder_of_another_sweep_is_refused(tmp_path: Path):
    plan.write(grid.runs(Sweep(MQAR, [axis("seed", 0)], SMALL)), tmp_path, {})
    plan.write(grid.runs(Sweep(MQAR, [axis("seed", 0, 1)], SMALL)), tmp_path, {})  # more points are welcome
    changed = grid.runs(Sweep(MQAR, [axis("seed", 0)], {**SMALL, "train.steps": 7}))
    with pytest.raises(ConfigError, match=r"'seed0' with another config: train.steps: 20000 -> 7"):
        plan.write(changed, tmp_path, {})


def test_a_run_is_called_by_what_a_folder_can_be_called(tmp_path: Path):
    """Values that lead elsewhere, are too long, or hold a home."""
    home = str(Path.home() / "data")
    labels = {"..": 0, "../../x": 1, "/etc": 2, "_": 3, "a\nb": 4, "y" * 300: 5, "$(touch x)": 6, home: 7}
    named = axis("which", **{label: {"train.seed": seed} for label, seed in labels.items()})
    runs = grid.runs(Sweep(MQAR, [named], SMALL))
    names = [run.name for run in runs]
    assert len(set(names)) == len(labels) and names[0] == "run" and names[4] == "a-b"
    for run in runs:
        assert (tmp_path / run.name).parent == tmp_path and len(run.name) < 256
        assert (
            home not in run.point["which"] and str(Path.home()).strip("/").replace("/", "-") not in run.name
        )
    plan.write(runs, tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(names)


def test_a_run_called_like_a_file_of_the_sweep(tmp_path: Path):
    (tmp_path / "lock").write_text("")
    runs = grid.runs(Sweep(MQAR, [axis("size", lock={"train.seed": 1})], SMALL))
    with pytest.raises(ConfigError, match="'lock': a run cannot have this name"):
        plan.write(runs, tmp_path, {})


def test_guessing():
    """MQAR asks for one of the values, half of the ids; text for any id; tasks in the loop for their own."""
    of = lambda spec, **fields: plan.guess(
        configs.resolve(configs.load(spec, {k.replace("__", "."): v for k, v in fields.items()}))
    )
    assert of(MQAR) == {"recall": 1 / 4096, "loss": pytest.approx(math.log(4096))}
    text = of("configs/quickstart.py")
    assert text["recall"] is None and text["loss"] > math.log(200)
    loop = of("configs/quickstart.py", eval__tasks="mqar_8")
    assert loop["recall"] == pytest.approx(2 / round(math.exp(loop["loss"])), rel=0.01)
    parity = of(MQAR, data__kind="state_tracking", data__group="parity")
    assert parity["recall"] == 0.5
    with pytest.raises(ConfigError, match="no such task"):
        of(MQAR, eval__tasks="mqar_9")


@pytest.mark.slow
def test_hours_follow_from_the_device(capsys: pytest.CaptureFixture[str]):
    """53 EFLOP, 20B tokens of a 374M transformer, are 59.5 hours at a quarter of 989 TFLOP/s."""
    assert plan.hours(53e18, "H100", 0.25) == pytest.approx(59.5, rel=1e-2)
    assert (
        sweep.main(["--config=configs/sweeps/ratio_340m.py", "--dry_run", "--device=H100", "--mfu=0.25"]) == 0
    )
    shown = capsys.readouterr().out
    assert "31 runs, 620 G tokens" in shown and "3 of 24: 6, 13, 20" in shown


def test_fields_that_no_run_heeds_are_said(capsys: pytest.CaptureFixture[str]):
    flags = ["--config=configs/sweeps/ratio_mqar.py", "--dry_run"]
    assert sweep.main([*flags, "--config.mixers.gla.num_heads=2", "--config.train.batch_size=8"]) == 0
    shown = capsys.readouterr().out
    assert (
        "mixers.gla.num_heads has no effect in any run: no layer of model.pattern names that mixer" in shown
    )
    assert shown.count("has no effect") == 1
    assert "held-out losses" not in shown


def test_losses_over_unequal_rows_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    axes = "axis('train.batch_size', 4, 8), axis('eval.batches', 6, {})"
    file = tmp_path / "sizes.py"
    code = "from launch.grid import Sweep, axis, zipped\n\n\ndef get_sweep():\n"
    code += "    return Sweep('{}', [zipped({})])\n"
    base = Path("configs/quickstart.py").absolute()
    for batches, said in ((6, True), (3, False)):
        file.write_text(code.format(base, axes.format(batches)))
        assert sweep.main([f"--config={file}", "--dry_run"]) == 0
        assert ("train.batch_size rows, 24 to 48 here" in capsys.readouterr().out) == said

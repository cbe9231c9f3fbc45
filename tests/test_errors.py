"""What bad input gets: one line, the field by its dotted name, what is allowed, exit code 2, nothing written.

The refusals that need a run (data, disk, checkpoints) are tested where they are raised.
"""

from pathlib import Path

import pytest

import train
from hybridlm.errors import nearest

QUICKSTART = "configs/quickstart.py"
CASES: list[tuple[str, list[str], list[str]]] = [
    # what is wrong, arguments after --config=configs/quickstart.py, parts of the message
    (
        "misspelt field",
        ["--config.train.stepz=5"],
        ["train.stepz = '5'", "no such field", "Did you mean 'steps'"],
    ),
    ("misspelt section", ["--config.trian.steps=5"], ["no section 'trian'", "Did you mean 'train'"]),
    ("section for a field", ["--config.model=5"], ["fields here are model.<field>"]),
    ("too deep", ["--config.train.steps.max=5"], ["fields here are train.<field>"]),
    (
        "misspelt setting",
        ["--config.mixers.kda.num_head=4"],
        ["mixers.kda.num_head", "Did you mean 'num_heads'"],
    ),
    ("unknown mixer", ["--config.mixers.kdaa.head_dim=4"], ["there is no mixers.kdaa", "Did you mean 'kda'"]),
    (
        "unknown kind",
        ["--config.mixers.kda.kind=kad"],
        ["mixers.kda.kind = 'kad'", "must be one of attention, "],
    ),
    ("name for no pattern", ["--config.mixers.my-kda.kind=kda"], ["mixers.my-kda", "no pattern can name it"]),
    ("wrong type", ["--config.train.steps=many"], ["train.steps = 'many'", "must be a whole number"]),
    ("fraction of a head", ["--config.mixers.kda.num_heads=2.5"], ["must be a whole number"]),
    ("not a boolean", ["--config.model.scan=maybe"], ["model.scan", "must be True or False"]),
    ("not finite", ["--config.optimizer.learning_rate=nan"], ["learning_rate = 'nan'", "must be"]),
    ("negative steps", ["--config.train.steps=-5"], ["train.steps = '-5'", "must be at least 1"]),
    ("negative steps, apart", ["--config.train.steps", "-5"], ["train.steps = '-5'", "must be at least 1"]),
    ("beyond a limit", ["--config.optimizer.b2=1.5"], ["optimizer.b2", "must be between 0 and 0.999999"]),
    ("unknown choice", ["--config.optimizer.schedule=linear"], ["must be one of cosine, wsd, constant"]),
    (
        "name in the pattern",
        ["--config.model.pattern=kda*3 ful"],
        ["no mixer named 'ful'", "'full'", "\n        ^"],
    ),
    ("open parenthesis", ["--config.model.pattern=(kda*3 full"], ["'(' is never closed", "\n  ^"]),
    ("empty pattern", ["--config.model.pattern="], ["model.pattern", "names no layer"]),
    ("too many layers", ["--config.model.num_layers=99999"], ["model.num_layers = 99999", "0 (the pattern"]),
    ("uneven heads", ["--config.model.d_model=250"], ["mixers.full.num_heads", "250", "64"]),
    (
        "uneven batch",
        ["--config.mesh.fsdp=3"],
        ["train.batch_size = 4", "multiple of", "mesh.fsdp = 1 * 1 * 3"],
    ),
    ("microbatches", ["--config.train.microbatches=3"], ["train.microbatches = 3", "train.batch_size = 4"]),
    ("empty mesh axis", ["--config.mesh.tensor=0"], ["mesh.tensor = 0", "at least 1, or -1"]),
    ("two rests", ["--config.mesh.fsdp=-1"], ["mesh.data = -1", "only one"]),
    ("unknown data", ["--config.data.kind=txt"], ["data.kind = 'txt'", "text, shards, mqar"]),
    ("field of other data", ["--config.data.num_pairs=4"], ["data.num_pairs", "no such field"]),
]


@pytest.mark.parametrize(
    ("overrides", "parts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_bad_field(
    overrides: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused([f"--config={QUICKSTART}", *overrides], parts, tmp_path, capsys)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("configs/quikstart.py", ["no such file", "Did you mean 'configs/quickstart.py'"]),
        ("configs/quickstart.py:small", ["takes no argument"]),
        ("configs/hybrid.py:340m,kda,5:1", ["ratio '5:1' is none of pure, 24:1"]),
        ("configs", ["no such file"]),
        ("README.md", ["README.md", "SyntaxError"]),
    ],
)
def test_bad_config_file(
    spec: str, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused([f"--config={spec}"], parts, tmp_path, capsys)


def refused(
    arguments: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    assert train.main([*arguments, f"--workdir={workdir}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    for part in parts:
        assert part in message
    assert "Traceback" not in message
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "--config"),
        (["--confg=x"], "--config"),
        ([f"--config={QUICKSTART}", "--resume=maybe"], "invalid choice: 'maybe'"),
        ([f"--config={QUICKSTART}", "--worksdir=x"], "unrecognized arguments: --worksdir=x"),
        ([f"--config={QUICKSTART}", "--config.train.steps"], "--config.train.steps needs a value"),
    ],
)
def test_bad_flag(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(arguments)
    assert caught.value.code == 2
    assert part in capsys.readouterr().err


def test_default_workdir() -> None:
    assert train.default_workdir("configs/quickstart.py") == Path("runs/quickstart")
    assert train.default_workdir("configs/hybrid.py:1.3b,kda,3:1") == Path("runs/hybrid-1-3b-kda-3-1")


def test_nearest() -> None:
    assert nearest("stepz", ["steps", "seed"]) == "Did you mean 'steps'?"
    assert nearest("zzz", ["b", "a"]) == "Known: a, b."

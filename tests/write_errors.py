"""Writes docs/errors.md: what bad input gets, by giving it.

    python -m tests.write_errors > docs/errors.md

Runs in a scratch folder; the checkpoint and disk rows train a tiny model first (a tmpfs of 8 MB needs root).
"""

import contextlib
import io
import re
import subprocess
import tempfile
from pathlib import Path

import train
from hybridlm.run.lock import Lock

TINY = [
    "--config=configs/mqar.py", "--config.model.d_model=16", "--config.model.num_layers=1",
    "--config.data.slices=(16, 4), (16, 2)", "--config.train.seq_len=16", "--config.train.batch_size=2",
    "--config.train.steps=2", "--config.eval.batches=1", "--config.log.wandb_mode=disabled",
]  # fmt: skip
QUICK = "--config=configs/quickstart.py"


def message(arguments: list[str]) -> tuple[int, str]:
    """(exit code, what train.py says on standard error)."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = train.main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, err.getvalue().strip()


def cases(scratch: Path) -> list[tuple[str, list[str]]]:
    (scratch / "empty").mkdir()
    (scratch / "empty" / "a.txt").write_text("")
    (scratch / "words.txt").write_text("a few words, far too few for one batch")
    (scratch / "held.txt").write_text("held out " * 1000)
    (scratch / "bad.json").write_text("{")
    workdir = f"--workdir={scratch}/run"
    text = [QUICK, workdir, "--config.data.holdout=0"]

    def corpus(files: str) -> list[str]:
        return [*text, f"--config.data.path={scratch}/{files}", f"--config.data.val_path={scratch}/held.txt"]

    mesh512 = ["--config.mesh.data=512", "--config.train.batch_size=512"]
    tokenizer = f"--config.data.tokenizer={scratch}"
    return [
        ("misspelt field", [QUICK, "--config.train.stepz=5"]),
        ("misspelt section", [QUICK, "--config.trian.steps=5"]),
        ("misspelt setting of a mixer", [QUICK, "--config.mixers.kda.num_head=4"]),
        ("unknown kind of mixer", [QUICK, "--config.mixers.kda.kind=kad"]),
        ("wrong type", [QUICK, "--config.train.steps=many"]),
        ("negative steps", [QUICK, "--config.train.steps=-5"]),
        ("learning rate not a number", [QUICK, "--config.optimizer.learning_rate=nan"]),
        ("unknown choice", [QUICK, "--config.optimizer.schedule=linear"]),
        ("unknown name in the pattern", [QUICK, "--config.model.pattern=kda*3 ful"]),
        ("parenthesis never closed", [QUICK, "--config.model.pattern=(kda*3 full"]),
        ("repetition of nothing", [QUICK, "--config.model.pattern=kda*0 full"]),
        ("heads that do not divide", [QUICK, "--config.model.d_model=250"]),
        ("batch not divisible by the mesh", [QUICK, "--config.mesh.fsdp=3"]),
        ("microbatches to be found, but not what is kept", [QUICK, "--config.train.microbatches=0"]),
        ("microbatches do not divide the batch", [QUICK, "--config.train.microbatches=3"]),
        ("mesh larger than the machine", [QUICK, workdir, *mesh512]),
        ("vocabulary smaller than the tokenizer's", [QUICK, workdir, "--config.model.vocab_size=200"]),
        ("config file that is not there", ["--config=configs/quikstart.py"]),
        ("argument a config does not know", ["--config=configs/hybrid.py:340m,kda,5:1"]),
        ("data path that is not there", corpus("nothing/*.txt")),
        ("data without a token", corpus("empty/*.txt")),
        ("too little data for a batch", corpus("words.txt")),
        ("tokenizer file that is not there", [QUICK, workdir, f"{tokenizer}/none.json"]),
        ("tokenizer file that is damaged", [QUICK, workdir, f"{tokenizer}/bad.json"]),
        ("resume=must without a checkpoint", [*TINY, workdir, "--resume=must"]),
        ("resume=never over a run", [*TINY, f"--workdir={scratch}/done", "--resume=never"]),
        ("resume with another model", [*TINY, f"--workdir={scratch}/done", "--config.model.d_model=32"]),
        ("workdir that another run has", [*TINY, f"--workdir={scratch}/held"]),
        ("processes at no address", [*TINY, workdir, "--distributed=here"]),
        ("no sound checkpoint", [*TINY, f"--workdir={scratch}/broken", "--config.train.steps=4"]),
        ("no room for a checkpoint", [*TINY, f"--workdir={scratch}/disk", "--config.model.d_model=256"]),
    ]  # fmt: skip


def main() -> None:
    print("# What bad input gets\n")
    print(
        "Written by `python -m tests.write_errors > docs/errors.md`. Exit code 2: refused before anything was"
    )
    print("compiled or written; 1: the run could not go on; earlier checkpoints are intact.\n")
    print("| input | exit | message |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        scratch = Path(name)
        rows = cases(scratch)
        for run in ("done", "broken"):
            code, said = message([*TINY, f"--workdir={scratch}/{run}"])
            assert code == 0, said
        for part in (scratch / "broken" / "checkpoints" / "2" / "params").rglob("*"):
            if part.is_file():
                part.write_bytes(b"")
        (scratch / "disk").mkdir()
        disk = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "none", scratch / "disk"], check=False
        )
        try:
            (scratch / "held").mkdir()
            stack.enter_context(Lock(scratch / "held"))
            for what, arguments in rows:
                if what.startswith("no room") and disk.returncode:
                    continue  # no root, no small disk
                code, said = message(arguments)
                said = re.sub(r"process \d+ on [\w-]+", "process 4242 on node1", said)
                lines = said.replace(str(scratch), "...").replace("|", "\\|").splitlines()
                shown = "<br>".join(f"`{line}`" for line in lines if line.strip())
                print(f"| {what} | {code} | {shown} |", flush=True)
        finally:
            if not disk.returncode:
                subprocess.run(["umount", scratch / "disk"], check=True)


if __name__ == "__main__":
    main()

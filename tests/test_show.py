"""Standard output that goes away, is full, or has no letter for what is said: nothing ends by it."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridlm.run.show import Steady

ROOT = Path(__file__).parents[1]
TALK = """
import logging, sys, time
import rich
from rich.logging import RichHandler
from hybridlm.run import cli, private

handler = RichHandler(console=rich.get_console(), show_time=False, show_path=False)
handler.addFilter(private.log_filter)
logging.basicConfig(format="%(message)s", handlers=[handler], force=True)

def body():
    for index in range(300):
        print("é" * 400, "\\udcff", flush=index % 2 == 0)
        rich.get_console().print("→" * 400, markup=False)
        logging.warning("%s \\x1b[31m", "ü" * 400)
        logging.warning("%d", "no number")
    open(sys.argv[1], "w").write("done")

sys.exit(cli.run(body))
"""


@pytest.mark.parametrize("where", ["pipe", "full", "closed"])
@pytest.mark.parametrize("encoding", [pytest.param("ascii", marks=pytest.mark.once), "utf-8"])
def test_a_command_outlives_its_output(tmp_path, where, encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    script = [sys.executable, "-c", TALK, str(tmp_path / "done")]
    if where == "closed":
        script = ["sh", "-c", 'exec "$0" "$@" >&-', *script]
    out = open("/dev/full", "w") if where == "full" else subprocess.PIPE  # noqa: SIM115
    run = subprocess.Popen(script, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.PIPE, text=True)
    if run.stdout:
        run.stdout.read(10)
        run.stdout.close()  # the reader goes away
    assert (run.wait(), run.stderr.read()) == (0, "")
    assert (tmp_path / "done").read_text() == "done"


def test_what_the_encoding_lacks_is_spelt_out():
    raw = io.BytesIO()
    stream = Steady(io.TextIOWrapper(raw, encoding="ascii"))
    assert stream.write("aé\udcff") == 3
    stream.flush()
    assert raw.getvalue() == rb"a\xe9\udcff" and stream.encoding == "ascii"

"""Text that teaches small models of bytes to answer sessions, so that turns tell models apart.

    python -m benchmarks.session_text --output text --documents 20000
    python -m hybridlm.data.prepare --input text/train.jsonl --val_input text/val.jsonl --tokenizer bytes \
        --output data/sessions

A document is a session of `eval.tasks.sessions`, key-value pairs or needles, with its five questions and
right answers behind it, of 1,600 to 2,048 bytes; half are of each kind. None is a session that `python -m
eval` asks: it draws with seed 0 unless told otherwise, and these have seeds from 1,000,000.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from eval import haystack
from eval.tasks import sessions
from eval.tasks.base import Setting
from hybridlm.data.tokenizer import Tokenizer

KINDS = ("kv_turns", "needles_turns")
LENGTHS = range(1600, 2049, 64)  # in turn
FIRST_SEED, EACH = 1_000_000, 50  # documents of one seed


def texts(seed: int, kinds: Sequence[str] = KINDS) -> list[str]:
    """`EACH` documents, of the kind and the length whose turn it is."""
    [task] = [task for task in sessions.TASKS if task.name == kinds[seed % len(kinds)]]
    length = LENGTHS[seed // len(kinds) % len(LENGTHS)]
    setting = Setting(length, EACH, FIRST_SEED + seed, haystack.load())
    return [
        one.context + "".join(question + answer + rest for question, answer, rest in one.turns)
        for one in task.sessions(Tokenizer(), setting)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--documents", type=int, default=20_000, help="to train on (default: %(default)s)")
    flags = parser.parse_args()
    if flags.output.exists():
        parser.error(f"--output {flags.output} exists; give a new folder")
    flags.output.mkdir(parents=True)
    last = -(-flags.documents // EACH)
    parts = {"train.jsonl": range(last), "val.jsonl": range(last, last + max(4, last // 20))}
    with ProcessPoolExecutor() as pool:
        for name, seeds in parts.items():
            with open(flags.output / name, "w") as file:
                for found in pool.map(texts, seeds):
                    file.writelines(json.dumps({"text": text}) + "\n" for text in found)
                print(f"{name}: {len(seeds) * EACH} documents")


if __name__ == "__main__":
    main()

"""Writes text with a run: python -m hybridlm.generate --workdir=runs/x --prompt="Once upon"

The prompt and what follows it go to the terminal as they come, everything else to stderr. A run that was
imported with a chat template takes the prompt as a message (--raw: as the beginning of a text).
"""

import argparse
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from hybridlm import commands, generate, sharding, untrusted, weights
from hybridlm.errors import ConfigError
from hybridlm.fields import Limits, Positive, checked
from hybridlm.generate import chat
from hybridlm.run import cli

EVERY = 4  # tokens between two looks at what was written
LIMITS = {"max_new_tokens": Positive, "n": Positive, "seed": Annotated[int, Limits(0, 2**63 - 1)]}


class Until:
    """Text as it comes, up to the first of the strings ``stop`` that is complete (``done``).

    The beginning of one is held back until it is decided.
    """

    def __init__(self, stop: Sequence[str]):
        self.stop, self.held, self.done = [text for text in stop if text], "", False

    def add(self, text: str, last: bool = False) -> str:
        """What is certain now of the text so far, and was not before. last: nothing follows ``text``."""
        if self.done:
            return ""
        self.held += text
        found = [at for one in self.stop if (at := self.held.find(one)) >= 0]
        lengths = [n for one in self.stop for n in range(1, len(one)) if self.held.endswith(one[:n])]
        self.done = bool(found)
        keep = min(found, default=len(self.held) - (0 if last else max(lengths, default=0)))
        shown, self.held = self.held[:keep], self.held[keep:]
        return shown


class Writer:
    """A loaded run. flags: the command line's."""

    def __init__(self, flags: argparse.Namespace):
        self.flags, workdir = flags, Path(flags.workdir)
        self.how = generate.Sampling(flags.temperature, flags.top_k, flags.top_p)
        self.how.check()
        for name, kind in LIMITS.items():
            checked(f"--{name}", kind, getattr(flags, name))
        config, self.definition, self.params, _ = weights.load(workdir, flags.checkpoint, flags.ema)
        tokens = weights.tokenizer(workdir, config)
        if tokens is None:
            raise ConfigError("--workdir", str(workdir), f"its data ({config.data.kind}) stand for no text")
        self.tokenizer, self.chat = tokens, None if flags.raw else chat.find(workdir, tokens)

    def encode(self, messages: list[chat.Message]) -> list[int]:
        """Of a chat all, of a plain text the last."""
        if self.chat:
            return self.chat.encode(messages)
        return [self.tokenizer.doc_id, *self.tokenizer.encode(messages[-1]["content"])]

    def write(self, prompt: list[int]) -> Iterator[tuple[int, str]]:
        """(row, text that was added to it) as it comes; rows are the ``n`` samples."""
        flags, ends = self.flags, self.tokenizer.ends
        streams = [self.tokenizer.stream(prompt) for _ in range(flags.n)]
        untils = [Until(flags.stop) for _ in range(flags.n)]
        blocks = generate.stream(
            self.definition, self.params, [prompt] * flags.n, max_new_tokens=flags.max_new_tokens,
            sampling=self.how, seed=flags.seed, stops=sorted(ends), every=EVERY,
        )  # fmt: skip
        for block in blocks:
            for row, tokens in enumerate(block.tolist()):
                new = [streams[row].add(token) for token in tokens if token >= 0 and token not in ends]
                yield row, untils[row].add("".join(new))
            if all(until.done for until in untils):
                break
        for row, until in enumerate(untils):
            yield row, until.add(streams[row].end(), last=True)

    def show(self, messages: list[chat.Message]) -> str:
        """Prints the samples that follow ``messages``, the first as it comes, and returns that."""
        typed = "" if self.chat or self.flags.interactive else messages[-1]["content"]
        texts = [typed] * self.flags.n
        parts = self.write(self.encode(messages))
        first = next(parts)  # compiles: what there is to say about that comes before the text
        say(("--- 1\n" if self.flags.n > 1 else "") + typed)
        for row, text in itertools.chain([first], parts):
            texts[row] += text
            say(text if row == 0 else "")
        say("\n" + "".join(f"--- {row}\n{text}\n" for row, text in enumerate(texts[1:], 2)))
        return texts[0]

    def talk(self) -> None:
        """Prompts from the terminal until it ends. A chat goes on, a plain prompt begins a new text."""
        messages: list[chat.Message] = []
        while True:
            try:
                line = input("> ")
            except EOFError:
                return
            if line:
                messages = [*(messages if self.chat else []), message(line)]
                messages.append({"role": "assistant", "content": self.show(messages)})


def say(text: str) -> None:
    print(untrusted.terminal(text, lines=True), end="", flush=True)


def message(prompt: str) -> chat.Message:
    try:
        return {"role": "user", "content": prompt.encode().decode()}
    except UnicodeEncodeError:
        raise ConfigError("--prompt", prompt, "must be UTF-8") from None


def run(flags: argparse.Namespace) -> None:
    if flags.prompt is None and not flags.interactive:
        raise ConfigError("--prompt", "", "must be given, if --interactive is not")
    first = [] if flags.prompt is None else [message(flags.prompt)]
    with sharding.sequences_over(flags.context):
        writer = Writer(flags)
        if first:
            writer.show(first)
        if flags.interactive:
            writer.talk()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=commands.called("python -m hybridlm.generate"), description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="of the run: trained, or imported")
    add("--prompt", metavar="TEXT", help="what to go on with; may be empty")
    add("--interactive", action="store_true", help="asks for prompts until its input ends (Ctrl-D)")
    add("--temperature", type=float, default=0.8, help="0 takes the most probable (default: %(default)s)")
    add("--top_p", type=float, default=1.0, help="of the probability kept (default: %(default)s)")
    add("--top_k", type=int, default=0, help="tokens kept; 0: all (default)")
    add("--max_new_tokens", type=int, default=256, help="default: %(default)s")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be given again")
    add("--seed", type=int, default=0, help="the same one gives the same texts (default: %(default)s)")
    add("-n", type=int, default=1, help="texts (default: %(default)s)")
    add("--checkpoint", "--step", type=int, metavar="STEP", help="default: the newest")
    add("--ema", action="store_true", help="the average of the weights (optimizer.ema)")
    add("--context", type=int, default=1, metavar="N", help="devices that share the cache of a long prompt")
    add("--raw", action="store_true", help="without the chat template, if the run has one")
    flags = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", force=__name__ == "__main__")  # to stderr
    return cli.run(lambda: run(flags))


if __name__ == "__main__":
    sys.exit(main())

"""Pictures of where recall comes from: python -m eval.probes --workdir=runs/x

recall     accuracy against the distance of what is asked for and against the number of pairs stored
states     norm and effective rank of each linear layer's state as the context grows
attention  share of each full-attention layer's weight that lies on the needle when the answer is due

Each is a PNG in the workdir with a reading of one line, and the numbers are in probes.json. A model of text
is asked for numbers hidden in repeated text (RULER's needles), one without text for values of MQAR.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eval import runner, subject
from eval.subject import Subject
from eval.tasks import base, ruler
from hybridlm import commands, cost, data, generate, untrusted
from hybridlm import model as lm
from hybridlm.errors import ConfigError
from hybridlm.rows import Rows, single_document
from hybridlm.run import cli, private

PAIRS = (1, 2, 4, 8, 16)
DEPTHS = 8  # of the heat map, from far to near


class Grid(NamedTuple):
    """accuracy: [pairs, distances], NaN where nothing was measured.  distances: middles of columns."""

    pairs: list[int]
    distances: list[int]
    accuracy: np.ndarray
    samples: int


def recall(tested: Subject, length: int, samples: int, seed: int = 0) -> Grid:
    """samples: of each cell (text), or examples of each number of pairs (MQAR)."""
    if tested.tokenizer is None:
        return _recall_mqar(tested, length, samples)
    cells, asked, distances = [], [], np.zeros((len(PAIRS), DEPTHS))
    for row, pairs in reversed([*enumerate(PAIRS)]):  # so that an error names the length that all need
        for column in range(DEPTHS):
            for index in range(samples):
                rng = random.Random(f"{seed} {pairs} {column} {index}")
                prompt, answer, behind = needles(tested, rng, length, pairs, (column + rng.random()) / DEPTHS)
                asked.append((tested.encode(prompt), tested.text_tokenizer.encode(answer)))
                cells.append((row, column))
                distances[row, column] += behind / samples
    right = np.zeros((len(PAIRS), DEPTHS))
    for cell, (_, greedy) in zip(cells, tested.log_likelihoods(asked), strict=True):
        right[cell] += greedy / samples
    return Grid(list(PAIRS), distances.mean(axis=0).astype(int).tolist(), right, samples)


def needles(
    tested: Subject, rng: random.Random, length: int, pairs: int, depth: float
) -> tuple[str, str, int]:
    """(prompt of about ``length`` tokens, answer, tokens from the asked needle to the end of the prompt)."""
    keys = [ruler.keyword(rng) for _ in range(pairs)]
    values = [ruler.DRAW["numbers"](rng) for _ in keys]
    lines = [ruler.NEEDLE.format(kind="numbers", key=k, value=v) for k, v in zip(keys, values, strict=True)]
    others = [rng.random() for _ in lines[1:]]
    question = f"What is the special magic number for {keys[0]} mentioned in the provided text?"
    question += f" The special magic number for {keys[0]} mentioned in the provided text is"

    def text(size: int) -> list[str]:
        placed = sorted(zip([depth, *others], lines, strict=True))
        filled = [ruler.NOISE] * size
        for place, line in reversed(placed):
            filled.insert(round(place * size), line)
        return [*filled, question]

    count = lambda text: 1 + len(tested.encode(text))
    size = base.largest(lambda size: "\n".join(text(size)), count, length - 16, 1)
    parts = text(size)
    behind = len(tested.encode("\n".join(parts[parts.index(lines[0]) :])))
    return "\n".join(parts), f" {values[0]}", behind


def _recall_mqar(tested: Subject, length: int, samples: int) -> Grid:
    pairs = [n for n in (4, 8, 16, 32, 64, 128, 256) if 4 * n <= length]
    edges = 2 ** np.arange(int(np.log2(length)) + 1)
    right, total = np.zeros((2, len(pairs), len(edges)))
    for row, n in enumerate(pairs):
        held_out = _mqar(tested, n, length, samples)
        for index in range(held_out.num_batches or 0):
            batch = held_out.batch(index)
            correct = tested.token_scores(batch)[1]
            for b, t in zip(*np.nonzero(batch["targets"] >= 0), strict=True):
                column = int(np.log2(t - _asked(batch["tokens"][b], n, t)))
                right[row, column] += correct[b, t]
                total[row, column] += 1
    with np.errstate(invalid="ignore"):
        return Grid(pairs, (edges * 1.5).astype(int).tolist(), right / total, samples)


def _mqar(tested: Subject, pairs: int, length: int, samples: int) -> data.Dataset:
    return data.build(
        {"kind": "mqar", "num_pairs": pairs, "power_a": 1.0, "val_examples": samples},
        split="val", batch_size=min(samples, tested.rows_per_batch(length)), seq_len=length, seed=0,
        vocab_size=tested.definition.vocab_size,
    )  # fmt: skip


def _asked(tokens: np.ndarray, pairs: int, at: int) -> int:
    """Where the key that is asked for at ``at`` stands among the pairs."""
    return int(np.flatnonzero(tokens[: 2 * pairs : 2] == tokens[at])[0]) * 2


def states(tested: Subject, tokens: Sequence[int], lengths: Sequence[int]) -> dict[int, np.ndarray]:
    """layer -> [length, 2]: Frobenius norm and effective rank of its state, mean over heads.

    Effective rank: exp of the entropy of the normalised singular values (Roy & Vetterli 2007). Layers without
    a matrix state are left out.
    """

    @jax.jit
    def caches(params: lm.Params, tokens_1T: jax.Array, rows: Rows) -> list[jax.Array | None]:
        model = lm.merge(tested.definition, params)
        _, cache = model(tokens_1T, rows, model.init_cache(1, tokens_1T.shape[1]))
        assert cache is not None
        matrices = ([x for x in jax.tree.leaves(getattr(one, "state", ())) if x.ndim == 4] for one in cache)
        return [next(iter(found), None) for found in matrices]

    measured: dict[int, list[list[float]]] = {}
    padded = generate.bucket(max(lengths))  # on the left, so that one program does for all lengths
    for length in lengths:
        tokens_1T, rows = generate.left_pad([tokens[:length]], padded)
        for layer, state in enumerate(caches(tested.params, jnp.asarray(tokens_1T), rows)):
            if state is None:
                continue
            singular = np.linalg.svd(np.asarray(state[0], np.float64), compute_uv=False)
            share = singular / np.maximum(singular.sum(axis=-1, keepdims=True), 1e-30)
            entropy = -(share * np.log(np.maximum(share, 1e-30))).sum(axis=-1)
            norm = np.sqrt((singular**2).sum(axis=-1)).mean()
            measured.setdefault(layer, []).append([float(norm), float(np.exp(entropy).mean())])
    return {layer: np.array(values) for layer, values in measured.items()}


def attention_mass(tested: Subject, tokens: Sequence[int], span: tuple[int, int]) -> dict[int, np.ndarray]:
    """full-attention layer -> [heads]: weight that the last token puts on the tokens ``span``."""
    first, last = span

    @jax.jit
    def masses(params: lm.Params, tokens_1T: jax.Array) -> dict[int, jax.Array]:
        model = lm.merge(tested.definition, params)
        wanted = ("q", "k", "scale", "log_forget", "sinks")
        _, taps = model.forward(tokens_1T, single_document(*tokens_1T.shape), wanted)
        found = {}
        for layer in cost.full_layers(tested.config):
            of = next(name for name in taps if name.startswith(f"layers.{layer}.") and name.endswith(".q"))[
                :-1
            ]
            q_HK, k_TGK = taps[f"{of}q"][0, -1], taps[f"{of}k"][0]
            k_THK = jnp.repeat(k_TGK, q_HK.shape[0] // k_TGK.shape[1], axis=1)
            scores = jnp.einsum("hk,thk->ht", q_HK, k_THK, preferred_element_type=jnp.float32)
            scores *= taps[f"{of}scale"]
            if f"{of}log_forget" in taps:
                c_TH = jnp.cumsum(taps[f"{of}log_forget"][0], axis=0)
                scores += (c_TH[-1] - c_TH).T
            if f"{of}sinks" in taps:  # a column more, which is none of the tokens
                scores = jnp.column_stack([scores, taps[f"{of}sinks"]])
            share = jax.nn.softmax(scores, axis=-1)
            found[layer] = share[:, first:last].sum(axis=-1)
        return found

    return {layer: np.asarray(mass) for layer, mass in masses(tested.params, jnp.array([tokens])).items()}


def example(tested: Subject, length: int, seed: int = 0) -> tuple[list[int], tuple[int, int]]:
    """(tokens of one question, where in them its answer stands), for `states` and `attention_mass`."""
    if tested.tokenizer is None:
        pairs = max(1, min(16, length // 8))
        batch = _mqar(tested, pairs, length, 1).batch(0)
        tokens, end = batch["tokens"][0], int(np.flatnonzero(batch["targets"][0] >= 0)[-1])
        key = _asked(tokens, pairs, end)
        return tokens[: end + 1].tolist(), (key, key + 2)
    rng = random.Random(seed)
    prompt, _, behind = needles(tested, rng, length, 1, rng.random())
    tokens = tested.encode(prompt)
    start = len(tokens) - behind + 1
    needle = prompt[prompt.index("One of the special") :].split("\n")[0]
    return tokens, (start, start + len(tested.text_tokenizer.encode(needle)))


# Pictures.


def _figure(width: float, height: float, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # slow to import; a bare Figure draws with Agg

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=8)
    return figure, figure.subplots(1, 2 if width > 7 else 1)


def draw_recall(grid: Grid, path: Path) -> str:
    good = np.argwhere(np.nan_to_num(grid.accuracy, nan=-1.0) >= 0.5)
    reading = "nowhere is as much as half recalled"
    if len(good):
        pairs, distance = grid.pairs[good[:, 0].max()], max(grid.distances[d] for d in good[:, 1])
        reading = f"half or more is recalled up to {pairs} pairs and up to {distance:,} tokens back"
    figure, axes = _figure(6, 3.4, f"recall: {reading} (n={grid.samples})")
    image = axes.imshow(grid.accuracy, vmin=0, vmax=1, aspect="auto", origin="lower", cmap="viridis")
    axes.set_xticks(range(len(grid.distances)), [f"{d:,}" for d in grid.distances], fontsize=7)
    axes.set_yticks(range(len(grid.pairs)), grid.pairs)
    axes.set_xlabel("tokens from what is asked for to the answer")
    axes.set_ylabel("pairs stored")
    figure.colorbar(image, label="accuracy")
    runner.put_figure(path, figure)
    return reading


def draw_states(measured: dict[int, np.ndarray], lengths: Sequence[int], path: Path) -> str:
    last = {layer: values[-1, 1] for layer, values in measured.items()}
    most, least = max(last, key=last.__getitem__), min(last, key=last.__getitem__)
    reading = f"effective rank at {lengths[-1]:,} tokens from {last[least]:.1f} (layer {least})"
    reading += f" to {last[most]:.1f} (layer {most})"
    figure, panels = _figure(8, 3.4, f"states: {reading}")
    for panel, column, name in zip(panels, (0, 1), ("norm", "effective rank"), strict=True):
        for layer, values in measured.items():
            panel.plot(lengths, values[:, column], "o-", markersize=3, linewidth=1, label=f"layer {layer}")
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens")
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=6, ncols=2)
    runner.put_figure(path, figure)
    return reading


def draw_attention(masses: dict[int, np.ndarray], path: Path) -> str:
    best = max(masses, key=lambda layer: masses[layer].max())
    reading = (
        f"layer {best} looks at the needle most, its best head with {masses[best].max():.2f} of its weight"
    )
    figure, axes = _figure(6, 3.0, f"attention: {reading}")
    for x, (_, heads) in enumerate(masses.items()):
        axes.plot([x] * len(heads), heads, "o", markersize=4)
    axes.set_xticks(range(len(masses)), masses)
    axes.set_xlabel("full-attention layer (a dot a head)")
    axes.set_ylabel("weight on the needle")
    axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.3)
    runner.put_figure(path, figure)
    return reading


def run(tested: Subject, folder: Path, *, length: int, samples: int) -> dict[str, str]:
    """Draws every probe that the model has layers for; returns picture -> reading."""
    readings, numbers = {}, {}
    grid = recall(tested, length, samples)
    readings["probe_recall.png"] = draw_recall(grid, folder / "probe_recall.png")
    numbers["recall"] = grid._asdict() | {"accuracy": np.nan_to_num(grid.accuracy, nan=-1).tolist()}
    tokens, span = example(tested, length)
    lengths = [n for n in (16 * 2**i for i in range(20)) if n < len(tokens)] + [len(tokens)]
    if measured := states(tested, tokens, lengths):
        readings["probe_states.png"] = draw_states(measured, lengths, folder / "probe_states.png")
        numbers["states"] = {"lengths": lengths} | {str(k): v.tolist() for k, v in measured.items()}
    if cost.full_layers(tested.config):
        masses = attention_mass(tested, tokens, span)
        readings["probe_attention.png"] = draw_attention(masses, folder / "probe_attention.png")
        numbers["attention"] = {str(k): v.tolist() for k, v in masses.items()}
    path = folder / "probes.json"
    runner.put(path, lambda: untrusted.write_json(path, {"step": tested.step, **numbers}))
    return readings


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=commands.called("python -m eval.probes"), allow_abbrev=False)
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--length", type=int, default=0, help="of the context (default: train.seq_len)")
    parser.add_argument("--samples", type=int, default=16, help="of each cell (default: %(default)s)")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="the average of the weights (optimizer.ema)")
    parser.add_argument("--tokenizer", default="", metavar="FILE", help="default: the run's own")
    flags = parser.parse_args(argv)
    return cli.run(lambda: probe(flags))


def probe(flags: argparse.Namespace) -> None:
    if flags.samples < 1 or flags.length < 0:
        raise ConfigError("--samples, --length", (flags.samples, flags.length), "must be positive")
    tested = subject.load(flags.workdir, flags.step, flags.tokenizer, ema=flags.ema)
    folder = runner.folder(flags.workdir, flags.ema)
    runner.check_writable(folder)
    length = flags.length or tested.config.train.seq_len
    try:
        readings = run(tested, folder, length=length, samples=flags.samples)
    except base.TooShort as error:
        raise ConfigError("--length", length, f"is too short: {error}") from error
    for name, reading in readings.items():
        print(untrusted.terminal(private.hide(f"{folder / name}: {reading}")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

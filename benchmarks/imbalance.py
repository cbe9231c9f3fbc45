"""How uneven attention is over devices that share packed rows, from documents' lengths: docs/long.md's table.

    python -m benchmarks.imbalance [--tokens 131072,1048576] [--devices 2,4,8] [--rows 64]

Documents of 100 to 100,000 tokens, log-uniform, packed as they come, one row for a group of devices. A line
for each number of devices: work of the busiest over the mean, the mean and the worst of all rows, for
contiguous pieces, 2, 4 and 8 blocks a device in zigzag, and 2 with the documents moved (`data.balance`).
"""

import argparse

import numpy as np

from hybridlm.data import balance

SHORTEST, LONGEST = 100, 100_000


def lengths(tokens: int, rows: int) -> list[np.ndarray]:
    """Of the documents in each row; what a row cannot hold goes on in the next."""
    rng, found, left = np.random.default_rng(0), [], 0
    for _ in range(rows):
        row, room = [], tokens
        while room:
            left = left or round(np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST))))
            row.append(min(left, room))
            left, room = left - row[-1], room - row[-1]
        found.append(np.array(row))
    return found


def uneven(length_D: np.ndarray, devices: int, pairs: int) -> float:
    """Of so many pairs of blocks a device, dealt down the devices and up again; 0: contiguous pieces."""
    seen = np.concatenate([np.arange(1, length + 1) for length in length_D])
    if not pairs:
        each = seen.reshape(devices, -1).sum(1)
    else:
        down, up = np.moveaxis(seen.reshape(pairs, 2, devices, -1).sum(-1), 1, 0)
        each = (down + up[:, ::-1]).sum(0)
    return float(each.max() / each.mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="131072,1048576")
    parser.add_argument("--devices", default="2,4,8")
    parser.add_argument("--rows", type=int, default=64)
    flags = parser.parse_args()
    numbers = lambda listed: [int(one) for one in listed.split(",")]
    for tokens in numbers(flags.tokens):
        rows = lengths(tokens, flags.rows)
        for devices in numbers(flags.devices):
            moved = [row[balance.order(row, tokens, devices)] for row in rows]
            cases = {"contiguous": (rows, 0)} | {f"{2 * pairs} blocks": (rows, pairs) for pairs in (1, 2, 4)}
            said = []
            for name, (given, pairs) in (cases | {"moved, 2 blocks": (moved, 1)}).items():
                found = [uneven(row, devices, pairs) for row in given]
                said.append(f"{name} {np.mean(found):.2f} ({max(found):.2f})")
            print(f"{tokens:,} tokens over {devices}: {', '.join(said)}", flush=True)


if __name__ == "__main__":
    main()

"""Time loops that take turns in one process, and give the benchmarks of speed one command line.

Whatever slows the machine slows all loops that take turns, so that a ratio within a round says more than a time.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["command_line", "publish", "quartiles", "take_turns"]


def take_turns(
    loops: Mapping[str, Iterator[Any]],
    advances: Mapping[str, int],
    rounds: int,
    synchronize: Callable[[], None] = lambda: None,
    uncounted: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Return the seconds that one advance of each loop takes, by name with shape (rounds,).

    In each round every loop is advanced ``advances`` times, in an order that changes from round to round. The first
    ``uncounted`` rounds are for allocations, the choice of kernels, and recordings.
    """
    names = list(loops)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(uncounted + rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize()
            start = clock()
            for _ in range(advances[name]):
                next(loops[name])
            synchronize()
            times[name].append((clock() - start) / advances[name])
    return {name: np.array(values[uncounted:]) for name, values in times.items()}


def quartiles(values: Any) -> dict[str, Any]:
    """Return the median and the quartiles, as JSON."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "quartiles": [low, high]}


def command_line(description: str, rounds: int, batch_size: int) -> argparse.ArgumentParser:
    """Return the options that every benchmark of speed has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON")
    return parser


def publish(result: Mapping[str, Any], lines: Sequence[str], out: Path | None) -> None:
    """Print the lines, and write the result."""
    print("\n".join(lines))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

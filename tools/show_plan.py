"""Shows how a window is divided among context-parallel ranks: pieces, positions, who waits, who sends.

python tools/show_plan.py --lengths 5,9,1,40,9 --cp 4
python tools/show_plan.py --data data/corpus --seq-length 8192 --window 3 --cp 8 --plot plan.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from anchor_megatron.config import data_config
from anchor_megatron.layout.describe import describe_plans, draw_plans
from anchor_megatron.layout.modes import MODES, attention_cu_seqlens, positions
from anchor_megatron.layout.placement import PLACEMENTS, place


def main() -> int:
    """Returns the process's exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--lengths", help="lengths of the window's documents in tokens, anchors included: 5,9,1"
    )
    source.add_argument(
        "--data",
        metavar="PREFIX|CONFIG",
        help="a data set, or a run's YAML file, of which one window is shown",
    )
    parser.add_argument("--window", type=int, default=0, help="number of the data's window (%(default)s)")
    parser.add_argument("--seq-length", type=int, help="tokens of the data's windows (data.seq_length)")
    parser.add_argument("--seed", type=int, help="of the run (train.seed)")
    parser.add_argument("--cp", type=int, required=True, help="context-parallel size")
    parser.add_argument("--mode", choices=MODES, default="anchor")
    parser.add_argument("--placement", choices=PLACEMENTS, default="document")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw it")
    given = parser.parse_args()
    try:
        show(given)
    except ValueError as error:
        print(f"show_plan.py: {error}", file=sys.stderr)
        return 2
    return 0


def show(given: argparse.Namespace) -> None:
    """Prints, and where asked for draws, the plans of all ranks."""
    for option, got, least in (("--cp", given.cp, 1), ("--window", given.window, 0)):
        if got < least:
            raise ValueError(f"{option}: got {got}, expected at least {least}")
    cu_seqlens = parse_lengths(given.lengths) if given.lengths else read_window(given)
    tokens = int(cu_seqlens[-1])
    spans = attention_cu_seqlens(given.mode, cu_seqlens, window_length=tokens)
    placement = place(given.placement, spans, context_parallel_size=given.cp, window_length=tokens)
    print(describe_plans(placement, positions(given.mode, cu_seqlens, window_length=tokens)))
    if given.plot:
        draw_plans(placement, given.plot)
        print(f"\ndrawn in {given.plot}")


def parse_lengths(text: str) -> np.ndarray:
    """Document borders of "5,9,1"."""
    try:
        lengths = [int(word) for word in text.split(",")]
    except ValueError:
        lengths = [0]
    if min(lengths) < 1:
        raise ValueError(f"--lengths: got {text!r}, expected whole numbers of at least 1 between commas")
    return np.cumsum([0, *lengths]).astype(np.int64)


def read_window(given: argparse.Namespace) -> np.ndarray:
    """Document borders of one window of a data set, as a run has it."""
    from anchor_megatron.training.loader import open_windows

    fields = {"data.seq_length": given.seq_length, "train.seed": given.seed}
    overrides = [f"{name}={value}" for name, value in fields.items() if value is not None]
    return open_windows(data_config(given.data, overrides))[given.window].cu_seqlens


if __name__ == "__main__":
    sys.exit(main())

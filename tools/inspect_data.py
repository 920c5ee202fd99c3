"""Looks at data: what a window of a run holds, whether a set is whole, how long documents are, how they pack.

    python tools/inspect_data.py data/corpus check
    python tools/inspect_data.py data/corpus statistics --output figures/
    python tools/inspect_data.py run.yaml window 4711 --html window.html
    python tools/inspect_data.py data/corpus packing --windows 200 data.seq_length=65536 data.packing=balanced

What is looked at is a run's configuration, or a data set by its prefix; fields of the configuration may be
given behind either. Windows are those that training reads, by its own code.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from anchor_megatron.config import Config, data_config, data_sets


def main(words: list[str] | None = None) -> int:
    """Exit status: 0, 1 for a data set that is not whole, 2 for what cannot be looked at."""
    parser = _parser()
    given, overrides = parser.parse_known_args(words)  # they may stand before and behind options
    if strange := [word for word in overrides if word.startswith("-") or "=" not in word]:
        parser.error(f"got {' '.join(strange)}, expected an option or section.field=value")
    looks = dict(window=show_window, check=check, statistics=show_statistics, packing=show_packing)
    try:
        return looks[given.look](data_config(given.target, overrides), given)
    except ValueError as error:
        print(f"inspect_data.py: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", metavar="PREFIX|CONFIG", help="a data set's prefix, or a run's YAML file")
    looks = parser.add_subparsers(dest="look", required=True)
    window = looks.add_parser("window", help="a window of a run, decoded as a person reads it")
    window.add_argument("number", type=int, help="its number: step times train.global_batch_size on, from 0")
    window.add_argument("--html", type=Path, metavar="FILE", help="as a page, not on the terminal")
    window.add_argument("--most", type=int, default=200, help="tokens of a run shown; 0: all (%(default)s)")
    window.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    looks.add_parser("check", help="whether files, ids, sources, summary and tokenizer fit each other")
    statistics = looks.add_parser("statistics", help="documents and their lengths, by source")
    statistics.add_argument("--output", type=Path, metavar="FOLDER", help="also as JSON and PNG, into there")
    packing = looks.add_parser("packing", help="documents a window, cut ones, padding, attention area")
    packing.add_argument("--windows", type=int, default=64, help="how many are packed (%(default)s)")
    packing.add_argument("--first", type=int, default=0, help="number of the first (%(default)s)")
    for look in looks.choices.values():
        look.epilog = "section.field=value: of the configuration, as many as needed"
    return parser


def show_window(config: Config, given: argparse.Namespace) -> int:
    """Prints a window, or writes it as a page."""
    from anchor_megatron.data.documents import tokenizer_folder
    from anchor_megatron.data.tokenizer import load_tokenizer
    from anchor_megatron.training.loader import open_windows
    from anchor_megatron.training.window_view import as_html, as_text, read_passages, window_title

    _at_least("window", given.number, 0)
    _at_least("--most", given.most, 0)
    windows = open_windows(config)
    tokenizer = load_tokenizer(tokenizer_folder(windows.corpus.sets[0].prefix))
    window = windows[given.number]
    title = window_title(config, windows, given.number, window)
    passages = read_passages(windows, window, mode=config.data.mode, tokenizer=tokenizer, most=given.most)
    if given.html:
        given.html.write_text(as_html(title, passages), encoding="utf-8")
        print(f"{title}\nwritten to {given.html}")
    else:
        colours = given.color == "always" or (given.color == "auto" and sys.stdout.isatty())
        print(f"{title}\n\n{as_text(passages, colours=colours)}")
    return 0


def check(config: Config, given: argparse.Namespace) -> int:
    """Prints what is wrong with each data set; 1 where anything is."""
    from anchor_megatron.data.check import check_data_set

    problems = []
    for prefix, _ in data_sets(config.data.train):
        problems += check_data_set(prefix, print)
    for problem in problems:
        print(f"inspect_data.py: {problem}", file=sys.stderr)
    return 1 if problems else 0


def show_statistics(config: Config, given: argparse.Namespace) -> int:
    """Prints a table for each data set; writes JSON and PNG where asked for."""
    from anchor_megatron.data.corpus import Corpus
    from anchor_megatron.data.documents import Documents
    from anchor_megatron.data.statistics import corpus_statistics, write_statistics

    for prefix, _ in data_sets(config.data.train):
        if given.output is None:
            found = corpus_statistics(Corpus([Documents(prefix)]))
        else:
            given.output.mkdir(parents=True, exist_ok=True)
            found = write_statistics(prefix, given.output)
        print(f"{prefix}, lengths in tokens, shares of tokens in documents over a length:\n{found}")
    return 0


def show_packing(config: Config, given: argparse.Namespace) -> int:
    """Packs some windows as the run does and prints what they are like."""
    from anchor_megatron.training.loader import open_windows
    from anchor_megatron.training.packing_report import packing_report

    _at_least("--windows", given.windows, 1)
    _at_least("--first", given.first, 0)
    numbers = range(given.first, given.first + given.windows)
    mode, batch = config.data.mode, config.train.global_batch_size
    print(packing_report(open_windows(config), numbers, mode=mode, batch_windows=batch))
    return 0


def _at_least(name: str, got: int, least: int) -> None:
    if got < least:
        raise ValueError(f"{name}: got {got}, expected at least {least}")


if __name__ == "__main__":
    sys.exit(main())

"""Documents to a data set that pretrain_anchor.py reads: PREFIX.bin, .idx, .json and PREFIX_tokenizer/,
PREFIX_sources.npy where documents have sources, PREFIX_statistics.json and .png.

    python tools/preprocess_data.py corpus.jsonl --tokenizer models/llama-3 --output data/corpus --workers 8
    python tools/preprocess_data.py "shards/*.jsonl.zst" --source-key meta.set --tokenizer T --output data/mix
    python tools/preprocess_data.py src/ --suffix .py .md --train-tokenizer 8192 --output data/src

Run again after a kill or a bad line, it goes on behind the files that are done.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Returns the process's exit status."""
    given = vars(_parser().parse_args())
    from anchor_megatron.data.preprocess import Job, preprocess  # here, as workers re-import this file
    from anchor_megatron.data.statistics import write_statistics

    given["suffixes"], given["inputs"] = tuple(given.pop("suffix")), tuple(given["inputs"])
    try:
        summary, tokens_per_second = preprocess(Job(**given))
    except ValueError as error:
        print(f"preprocess_data.py: {error}", file=sys.stderr)
        return 2
    print(
        f"{summary.documents:,} documents ({summary.empty:,} without text left out), {summary.tokens:,} "
        f"tokens, longest {summary.longest:,}, {tokens_per_second:,.0f} tokens/s, "
        f"anchor token {summary.anchor_token}"
    )
    print(write_statistics(given["output"]))
    if summary.skipped:
        print(f"{summary.skipped:,} records skipped: {given['output']}_skipped.json says which and why")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", help=".jsonl, .parquet, .idx or text files (.jsonl and text also .gz, .zst), "
        "folders of them or by datasets.save_to_disk, quoted patterns")  # fmt: skip
    add("--output", required=True, type=Path, metavar="PREFIX", help="prefix of what is written")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=Path, metavar="DIR", help="a Hugging Face tokenizer's folder")
    tokenizer.add_argument(
        "--train-tokenizer", type=int, metavar="N", help="train a byte-level BPE of N entries on the input"
    )
    add("--text-key", default="text", metavar="KEY", help="key or column of a row's text (%(default)s)")
    add("--tokens-key", metavar="KEY", help="rows hold token ids under KEY, document ends under 'source'")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--source-key", metavar="KEY", help="of a row's source, such as meta.set_name")
    source.add_argument("--source-from", choices=("file", "folder"), help="a document's source is its ...")
    add("--suffix", nargs="+", default=[], metavar=".EXT", help="of the files taken from folders (all)")
    add("--anchor-token", metavar="TOKEN", help="leads every document (the tokenizer's BOS, else EOS)")
    add("--append-eod", action="store_true", help="end every document with the tokenizer's EOS")
    add("--max-bytes", type=int, default=256 << 20, help="largest line or text (%(default)s)")
    add("--on-error", choices=("stop", "skip"), default="stop", help="what cannot be used ends the run or is "
        "counted, with reasons in PREFIX_skipped.json (%(default)s)")  # fmt: skip
    add("--workers", type=int, default=1, help="tokenising processes (%(default)s)")
    add("--overwrite", action="store_true", help="replace an existing output, discard an unfinished run's")
    return parser


if __name__ == "__main__":
    sys.exit(main())

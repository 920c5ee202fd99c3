"""Text to a data set that pretrain_anchor.py reads: PREFIX.bin, .idx, .json and PREFIX_tokenizer/.

python tools/preprocess_data.py corpus.jsonl --tokenizer models/llama-3 --output data/corpus --workers 8
python tools/preprocess_data.py src/ --suffix .py .md --train-tokenizer 8192 --output data/src
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Returns the process's exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="+", type=Path, help=".jsonl files, plain-text files, or folders of them"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="PREFIX", help="prefix of what is written"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokenizer", type=Path, metavar="DIR", help="a Hugging Face tokenizer's folder")
    source.add_argument(
        "--train-tokenizer", type=int, metavar="N", help="train a byte-level BPE of N entries on the input"
    )
    parser.add_argument("--json-key", default="text", help="the text's key in a JSONL line (%(default)s)")
    parser.add_argument(
        "--suffix", nargs="+", default=[], metavar=".EXT", help="of the files taken from folders (all)"
    )
    parser.add_argument(
        "--anchor-token", metavar="TOKEN", help="leads every document (the tokenizer's BOS, else EOS)"
    )
    parser.add_argument(
        "--append-eod", action="store_true", help="end every document with the tokenizer's EOS"
    )
    parser.add_argument("--workers", type=int, default=1, help="tokenising processes (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    given = vars(parser.parse_args())
    from anchor_megatron.data.preprocess import Job, preprocess  # here, as workers re-import this file

    given["suffixes"], given["inputs"] = tuple(given.pop("suffix")), tuple(given["inputs"])
    try:
        summary, seconds = preprocess(Job(**given))
    except ValueError as error:
        print(f"preprocess_data.py: {error}", file=sys.stderr)
        return 2
    print(
        f"{summary.documents:,} documents ({summary.empty:,} without text skipped), {summary.tokens:,} "
        f"tokens, longest {summary.longest:,}, {summary.tokens / seconds:,.0f} tokens/s, "
        f"anchor token {summary.anchor_token}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

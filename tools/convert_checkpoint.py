"""Converts checkpoints between Hugging Face and Megatron-Core, in both directions, without a GPU.

    tools/convert_checkpoint.py import --hf DIR --out DIR [--extend 128k] [rotary_base=1e7 ...]
    tools/convert_checkpoint.py export --megatron DIR --out DIR

Memory stays bounded whatever the model's size. The output appears whole or not at all.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from anchor_megatron import cpu

warnings.simplefilter("ignore")  # Megatron-Core's, about packages that a conversion does not use
if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        ""  # --verify compares in fp32, which GPU attention kernels do not take
    )
if not torch.cuda.is_available():
    cpu.install()  # before Megatron-Core looks for a GPU, as it does when it is imported

from anchor_megatron.convert.exporting import export_checkpoint  # noqa: E402
from anchor_megatron.convert.hf_config import EXTENSIONS  # noqa: E402
from anchor_megatron.convert.importing import import_checkpoint  # noqa: E402
from anchor_megatron.convert.verify import BOUND, verify  # noqa: E402


def main(words: list[str] | None = None) -> int:
    """Exit status: 0, 2 for what could not be converted, 1 for a conversion that --verify found wrong."""
    arguments = _parser().parse_args(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # so that what is half done is removed
    progress = Progress()
    try:
        if arguments.direction == "import":
            import_checkpoint(
                arguments.hf,
                arguments.out,
                extension=arguments.extend,
                overrides=arguments.overrides,
                allow_pickle=arguments.allow_pickle,
                check_hashes=arguments.check_hashes,
                say=progress.say,
                progress=progress,
            )
        else:
            export_checkpoint(
                arguments.megatron,
                arguments.out,
                tokenizer=arguments.tokenizer,
                say=progress.say,
                progress=progress,
            )
        progress.close(arguments.out)
        return _verify(arguments) if arguments.verify else 0
    except (ValueError, OSError) as error:
        progress.bar.close()
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 2


class Progress:
    """A bar with bytes a second on a terminal, and one line at the end."""

    def __init__(self) -> None:
        self.bar: Any = tqdm(
            total=0, unit="B", unit_scale=True, unit_divisor=1000, disable=None, mininterval=0.2
        )
        self.begun, self.bytes = time.perf_counter(), 0

    def __call__(self, count: int) -> None:
        """Bytes done; a negative number is the total."""
        if count < 0:
            self.bar.reset(total=-count)
            self.begun = time.perf_counter()
        else:
            self.bytes += count
            self.bar.update(count)

    def say(self, message: str) -> None:
        """Prints a line that does not tear the bar."""
        tqdm.write(message)

    def close(self, out: Path) -> None:
        """Says what was done."""
        self.bar.close()
        seconds = time.perf_counter() - self.begun
        print(f"{out}: {self.bytes / 1e9:.3f} GB in {seconds:.2f} s, {self.bytes / 1e6 / seconds:.0f} MB/s")


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.direction == "import":
        found = verify(arguments.hf, arguments.out, overridden=True, allow_pickle=arguments.allow_pickle)
    else:
        found = verify(arguments.out, arguments.megatron)
    verdict = "within" if found.ok else "BEYOND"
    layers = " (layer by layer)" if found.by_layer else ""
    print(
        f"verify: largest difference of logits {found.difference:.3e} on {found.tokens} random tokens, "
        f"{verdict} {BOUND:g} of the largest logit {found.largest:.3g}{layers}"
    )
    return 0 if found.ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    into = directions.add_parser("import", help="Hugging Face to Megatron-Core")
    into.add_argument("--hf", type=Path, required=True, help="folder of the Hugging Face model")
    into.add_argument(
        "--extend", choices=EXTENSIONS, help="rotary base and longest context of arXiv 2411.13476"
    )
    into.add_argument(
        "--allow-pickle", action="store_true", help="read .bin files where there are no safetensors"
    )
    into.add_argument("--check-hashes", action="store_true",
                      help="compare the files with SHA256SUMS or the downloader's hashes")  # fmt: skip
    into.add_argument("overrides", nargs="*", metavar="field=value",
                      help="rotary_base=..., rope_scaling=..., max_position_embeddings=...")  # fmt: skip
    out_of = directions.add_parser("export", help="Megatron-Core to Hugging Face")
    out_of.add_argument(
        "--megatron", type=Path, required=True, help="a checkpoint, or a folder of them: the newest"
    )
    out_of.add_argument("--tokenizer", type=Path, help="folder of a tokenizer, where the checkpoint has none")
    for direction in (into, out_of):
        direction.add_argument("--out", type=Path, required=True, help="new folder for the result")
        direction.add_argument(
            "--verify", action="store_true", help="rebuild both models and compare their logits"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())

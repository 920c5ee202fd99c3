"""Judges models on long inputs: needles in the manner of RULER, loss by position, loss on short documents.

    tools/evaluate_long.py base=models/llama anchor=runs/anchor-128k --text books/ --lengths 4k 32k 128k \
        --output results/

Checkpoints are training's (any parallel layout) or Hugging Face folders. Under torchrun the ranks share every
context (--tensor of them each layer, the rest its tokens). Writes results.json, results.html and pictures.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import warnings
from pathlib import Path

import torch

from anchor_megatron import cpu

warnings.simplefilter("ignore")  # Megatron-Core's, about packages that reading does not use
if not torch.cuda.is_available():
    cpu.install()  # before Megatron-Core looks for a GPU, as it does when it is imported

import torch.distributed as dist  # noqa: E402

from anchor_megatron.config import ParallelConfig  # noqa: E402
from anchor_megatron.data.tokenizer import (  # noqa: E402
    anchor_token_id,
    batch_encoder,
    encoder_source,
)
from anchor_megatron.evaluation.haystack import Haystack, read_documents  # noqa: E402
from anchor_megatron.evaluation.judge import judge_needles  # noqa: E402
from anchor_megatron.evaluation.needles import TASKS  # noqa: E402
from anchor_megatron.evaluation.opening import Opened, opened  # noqa: E402
from anchor_megatron.evaluation.perplexity import loss_by_position, short_loss  # noqa: E402
from anchor_megatron.evaluation.report import Result, table, write_report  # noqa: E402


def main(words: list[str] | None = None) -> int:
    """Exit status: 0, or 2 for what cannot be judged."""
    given = _parser().parse_args(words)
    try:
        results = []
        for name, path in given.checkpoints:
            result = evaluate(name, path, given)
            results.append(result)
            _say(table([result]))
    except (ValueError, OSError) as error:
        print(f"evaluate_long.py: {error}", file=sys.stderr)
        return 2
    if dist.get_rank() == 0:
        write_report(given.output, results)
        _say(table(results))
        _say(f"see {given.output / 'results.html'}")
    dist.destroy_process_group()
    return 0


def evaluate(name: str, path: Path, given: argparse.Namespace) -> Result:
    """One checkpoint, everything that was asked for."""
    started = time.perf_counter()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    parallel = ParallelConfig(tensor=given.tensor, context=ranks // given.tensor)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with opened(path, parallel=parallel, precision=given.precision, tokenizer=given.tokenizer) as model:
        result = judged(name, model, given)
    gc.collect()
    if torch.cuda.is_available():
        result.figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
    result.figures["seconds"] = time.perf_counter() - started
    return result


def judged(name: str, model: Opened, given: argparse.Namespace) -> Result:
    """Needles, then losses."""
    encode = batch_encoder(
        encoder_source(model.tokenizer, given.tokenizer or Path(model.tokenizer.name_or_path))
    )
    anchor = anchor_token_id(model.tokenizer, given.anchor_token)
    haystack = Haystack(given.text, encode, suffixes=tuple(given.suffix))
    longest = max(given.lengths)
    if haystack.tokens < longest:
        _say(f"{given.text}: got {haystack.tokens} tokens of filler for {longest}: it repeats")
    needles = judge_needles(
        model.reader,
        haystack,
        tasks=given.tasks,
        lengths=given.lengths,
        samples=given.samples,
        depths=given.depths,
        anchor=anchor,
        seed=given.seed,
        decode=model.tokenizer.decode if given.greedy else None,
    )
    result = Result(name, needles, {"haystack_tokens": haystack.tokens})
    if given.documents is not None:
        documents = read_documents(given.documents, encode, suffixes=tuple(given.suffix))
        long_enough = [one for one in documents if one.size >= longest - 1][: given.long_documents]
        if long_enough:
            result.by_position = loss_by_position(
                model.reader, long_enough, length=longest, window=given.window, anchor=anchor
            )
        else:
            _say(f"{given.documents}: no file of {longest} tokens, so no loss by position")
        result.figures["short_loss"] = short_loss(model.reader, documents, window=given.window, anchor=anchor)
    return result


def _tokens(text: str) -> int:
    """A length such as 4096, 32k or 1m."""
    scale = {"k": 1024, "m": 1024**2}.get(text[-1].lower(), 1)
    return int(text[:-1] if scale > 1 else text) * scale


def _checkpoint(text: str) -> tuple[str, Path]:
    name, _, path = text.rpartition("=")
    return name or Path(path).name, Path(path)


def _say(text: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoints", nargs="+", type=_checkpoint, metavar="[NAME=]DIR", help="NAME-1, NAME-2: averaged")
    add("--text", type=Path, required=True, help="folder of filler text for the needles")
    add("--suffix", nargs="+", default=[], help="of the files taken from folders")
    add("--documents", type=Path, help="folder of long documents (a file each) for losses")
    add("--long-documents", type=int, default=8, help="of them read whole (%(default)s)")
    add("--lengths", nargs="+", type=_tokens, default=[4096], help="context lengths: 4096, 32k, 1m")
    add("--window", type=_tokens, default=2048, help="of sliding and short losses (%(default)s)")
    add("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    add("--samples", type=int, default=4, help="of every task, length and depth (%(default)s)")
    add("--depths", type=int, default=5, help="steps of depth of the single needle (%(default)s)")
    add("--greedy", action="store_true", help="also let the model write its answers")
    add("--seed", type=int, default=1)
    add("--tensor", type=int, default=1, help="tensor-parallel size; context takes the other ranks")
    add("--precision", default="bf16" if torch.cuda.is_available() else "fp32", choices=("bf16", "fp32"))
    add("--tokenizer", type=Path, help="folder of a tokenizer, where the checkpoint has none")
    add("--anchor-token", help="token that leads the context, where it is not the tokenizer's BOS or EOS")
    add("--output", type=Path, required=True, help="folder for results.json, results.html and pictures")
    return parser


if __name__ == "__main__":
    sys.exit(main())

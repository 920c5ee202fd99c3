"""A model's context extended from end to end, in a minute or two and without a GPU.

    python examples/extend_small/run.py

A Hugging Face model goes in (a tiny one with random weights, made here), is converted with a larger rotary
base, trained with anchor attention on long documents, judged before and after, and comes out as a Hugging
Face model. At the end transformers scores the exported model on the same question: same choices, same logits.
What a real model takes is in examples/extend_128k; everything here lands in build/extend_small/toy.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anchor_megatron import cpu

warnings.simplefilter("ignore")  # Megatron-Core's, about packages that are not needed here
if not torch.cuda.is_available():
    cpu.install()

import torch.distributed as dist  # noqa: E402

from anchor_megatron.config import ParallelConfig, load_config  # noqa: E402
from anchor_megatron.convert.exporting import export_checkpoint  # noqa: E402
from anchor_megatron.convert.importing import import_checkpoint  # noqa: E402
from anchor_megatron.data.preprocess import Job, preprocess  # noqa: E402
from anchor_megatron.data.tokenizer import batch_encoder, encoder_source  # noqa: E402
from anchor_megatron.evaluation.haystack import Haystack  # noqa: E402
from anchor_megatron.evaluation.judge import judge_needles  # noqa: E402
from anchor_megatron.evaluation.needles import Sample, draw_sample  # noqa: E402
from anchor_megatron.evaluation.opening import Opened, opened  # noqa: E402
from anchor_megatron.evaluation.perplexity import loss_by_position, short_loss  # noqa: E402
from anchor_megatron.evaluation.report import Result, table, write_report  # noqa: E402
from anchor_megatron.training.loop import Run  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SHORT, LONG, VOCABULARY = 256, 1024, 2048
BOUND = 1e-4  # of the logits


def main() -> int:
    """Exit status: 0 where transformers agrees with us on the exported model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "extend_small" / "toy")
    parser.add_argument("--steps", type=int, default=20, help="of the extension (%(default)s)")
    given = parser.parse_args()
    out: Path = given.output
    shutil.rmtree(out, ignore_errors=True)
    text = Path(sysconfig.get_paths()["stdlib"]) / "email"
    preprocess(Job((text,), out / "data", train_tokenizer=VOCABULARY, suffixes=(".py",)))
    make_model(out / "huggingface", out / "data_tokenizer")
    import_checkpoint(
        out / "huggingface", out / "imported", extension="16k", overrides=[f"max_position_embeddings={LONG}"]
    )
    extend(out, given.steps)
    export_checkpoint(out / "run", out / "extended")
    results = []
    for name, folder in (("before", out / "huggingface"), ("extended", out / "run")):
        with opened(folder, parallel=ParallelConfig(), precision="fp32") as model:
            results.append(judged(name, model, text))
            difference, agreed = compare(model, out / "extended", text) if name == "extended" else (0.0, True)
    write_report(out / "results", results)
    print(table(results))
    print(f"transformers: same choices {agreed}, largest difference of logits {difference:.1e}; see {out}")
    dist.destroy_process_group()
    return 0 if agreed and difference <= BOUND else 1


def make_model(folder: Path, tokenizer: Path) -> None:
    """A tiny Llama as Hugging Face keeps it, with the data's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=SHORT,
    )  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)


def extend(out: Path, steps: int) -> None:
    """Trains the imported model at the longer length."""
    words = [
        f"data.train={out / 'data'}", f"data.seq_length={LONG}", "data.mode=anchor", "data.num_workers=0",
        f"train.steps={steps}", "train.precision=fp32", "train.global_batch_size=2", "optimizer.lr=2e-3",
        f"checkpoint.pretrained={out / 'imported'}", f"checkpoint.directory={out / 'run'}", "log.interval=5",
    ]  # fmt: skip
    Run(load_config(out / "imported" / "step_0000000" / "config.yaml", words)).train()


def judged(name: str, model: Opened, text: Path) -> Result:
    """A few needles, and losses, at both lengths."""
    haystack, anchor = _haystack(model, text), int(model.tokenizer.bos_token_id)
    needles = judge_needles(
        model.reader, haystack, tasks=("single", "multi_key"), lengths=(SHORT * 2, LONG), samples=1, depths=3,
        anchor=anchor, seed=0, decode=model.tokenizer.decode,
    )  # fmt: skip
    document = np.array([token for line in haystack.lines for token in line])
    return Result(
        name,
        needles,
        {"short_loss": short_loss(model.reader, [document], window=SHORT, anchor=anchor)},
        loss_by_position(model.reader, [document], length=LONG, window=SHORT, anchor=anchor),
    )


def compare(model: Opened, exported: Path, text: Path) -> tuple[float, bool]:
    """Our model against transformers' on a question: largest difference of logits, and whether the most
    probable tokens are the same.
    """
    from transformers import AutoModelForCausalLM

    anchor = int(model.tokenizer.bos_token_id)
    haystack = _haystack(model, text)
    sample: Sample = draw_sample("single", tokens=LONG, haystack=haystack, seed=3, number=0)
    question, answer = haystack.encode([sample.questions[0].prompt, sample.questions[0].answer])
    reading = model.reader.read([anchor, *sample.context])
    ours = model.reader.answer_logits(reading, [(question, answer)])[0]
    peer: Any = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    tokens = torch.tensor([[anchor, *sample.context, *question, *answer]])
    with torch.no_grad():
        theirs = peer(tokens).logits[0, -len(answer) - 1 : -1]
    ours = ours.float().cpu()
    return (ours - theirs).abs().max().item(), bool((ours.argmax(-1) == theirs.argmax(-1)).all())


def _haystack(model: Opened, text: Path) -> Haystack:
    source = encoder_source(model.tokenizer, Path(model.tokenizer.name_or_path))
    return Haystack(text, batch_encoder(source), suffixes=(".py",))


if __name__ == "__main__":
    sys.exit(main())

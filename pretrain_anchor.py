"""Trains with AnchorAttention under torchrun (one process a rank; a lone process is a run of one rank).

torchrun --nproc-per-node 8 pretrain_anchor.py examples/tiny.yaml parallel.context=8 train.steps=100
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

import torch
import torch.distributed as dist

from anchor_megatron import cpu
from anchor_megatron.config import describe, load_config


def main() -> int:
    """Returns the process's exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="fields:\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="laid over the file")
    parser.add_argument("--check", action="store_true", help="look for leaks between documents, do not train")
    arguments = parser.parse_args()
    if os.environ.get("RANK", "0") == "0":  # as torchrun names the ranks; one of them speaks
        logging.basicConfig(format="%(message)s")
        logging.getLogger("anchor_megatron").setLevel(logging.INFO)
    if not torch.cuda.is_available():
        cpu.install()
    from anchor_megatron.training.loop import Run  # Megatron-Core looks for a GPU as it is imported

    try:
        run = Run(load_config(arguments.config, arguments.overrides))
    except ValueError as error:
        print(f"pretrain_anchor.py: {error}", file=sys.stderr)
        return 2
    passed = True
    if arguments.check:
        passed = run.check()
    else:
        run.train()
    dist.destroy_process_group()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

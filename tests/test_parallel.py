"""One model, one batch, many parallel layouts: the same loss and the same gradient of every parameter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from anchor_megatron.config import Config
from anchor_megatron.data.window import Window
from anchor_megatron.model.builder import build_model
from anchor_megatron.testing.models import random_window, tiny_config
from anchor_megatron.testing.ranks import run_ranks
from anchor_megatron.training.batch import plan_batch
from anchor_megatron.training.loader import cost_model
from anchor_megatron.training.report import global_sums
from anchor_megatron.training.setup import initialize_ranks
from anchor_megatron.training.step import StepResult, Trainee, build_trainee, forward_backward

VOCAB = 90
# the second window's tokens are almost all masked: on some layouts a rank has nothing to predict
LENGTHS = ([9, 2, 31, 1, 21], [1] * 61 + [3], [64], [33, 31])

LAYOUTS = {
    "CP 2": dict(context=2),
    "CP 4": dict(context=4),
    "DP 4": dict(),
    "TP 2": dict(tensor=2),
    "TP 2, sequence": dict(tensor=2, sequence=True),
    "TP 2, sequence, CP 2": dict(tensor=2, context=2, sequence=True),
    "PP 2": dict(pipeline=2),
    "PP 2, CP 2": dict(pipeline=2, context=2),
    "PP 2, TP 2, sequence": dict(pipeline=2, tensor=2, sequence=True),
}


def save_fresh_weights(rank: int, world_size: int, config: Config, folder: str) -> None:
    initialize_ranks(config)
    Path(folder).mkdir(parents=True)
    dist_checkpointing.save({"model": build_model(config).sharded_state_dict()}, folder)


def gradients_on_rank(
    rank: int, world_size: int, config: Config, windows: list[Window], weights: str, out: str
) -> float:
    """Loss of one step; the gradients are saved in `out` as if they were weights, so that any layout reads
    them.
    """
    initialize_ranks(config)
    trainee = build_trainee(config)
    state = dist_checkpointing.load({"model": trainee.gpt.sharded_state_dict()}, weights)
    trainee.gpt.load_state_dict(state["model"])
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    size = config.train.micro_batch_size
    groups = [windows[i : i + size] for i in range(0, len(windows), size)][replica::replicas]
    batches = [
        plan_batch(
            group,
            mode=config.data.mode,
            placement=config.attention.placement,
            exchange=config.attention.exchange,
            ring_rows=config.attention.ring_rows,
            costs=cost_model(config),
            context_parallel_size=config.parallel.context,
            context_parallel_rank=parallel_state.get_context_parallel_rank(),
        )
        for group in groups
    ]
    trainee.model.zero_grad_buffer()
    loss, stats = forward_backward(config, trainee.model, iter(batches))
    sums = global_sums([StepResult(loss, stats)])
    gradients_become_weights(trainee)
    if rank == 0:
        Path(out).mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save({"model": trainee.gpt.sharded_state_dict()}, out)
    return sums["loss"] / sums["loss_tokens"]


def gradients_become_weights(trainee: Trainee) -> None:
    """Each rank holds one reduced shard of every gradient bucket: gathers them and writes them over the
    weights.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for buffer in trainee.model.buffers:
        for bucket in buffer.buckets:
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
    with torch.no_grad():
        for parameter in trainee.gpt.parameters():
            parameter.copy_(parameter.main_grad)


def read_whole(rank: int, world_size: int, config: Config, folder: str) -> dict[str, torch.Tensor]:
    """The whole model saved in `folder`."""
    initialize_ranks(config)
    gpt = build_model(config)
    state = dist_checkpointing.load({"model": gpt.sharded_state_dict()}, folder)
    return {name: value for name, value in state["model"].items() if isinstance(value, torch.Tensor)}


def loss_and_gradients(
    world_size: int, config: Config, weights: str, out: Path
) -> tuple[float, dict[str, torch.Tensor]]:
    windows = [random_window(lengths=lengths, vocab_size=VOCAB, seed=i) for i, lengths in enumerate(LENGTHS)]
    losses = run_ranks(world_size, gradients_on_rank, config, windows, weights, str(out))
    assert len(set(losses)) == 1, f"ranks disagree about the loss: {losses}"
    whole = tiny_config(vocab_size=VOCAB, model=vars(config.model))
    return losses[0], run_ranks(1, read_whole, whole, str(out))[0]


def configuration(parallel: dict[str, Any], **sections: Any) -> Config:
    train = dict(global_batch_size=4, precision="fp32") | sections.pop("train", {})
    return tiny_config(vocab_size=VOCAB, parallel=parallel, train=train, **sections)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float, dict[str, torch.Tensor]]:
    """Weights, and what one rank computes with them."""
    folder = tmp_path_factory.mktemp("reference")
    weights = str(folder / "weights")
    run_ranks(1, save_fresh_weights, configuration({}, model=dict(init_std=0.1)), weights)
    return weights, *loss_and_gradients(1, configuration({}), weights, folder / "gradients")


def assert_equal(
    found: tuple[float, dict[str, torch.Tensor]], reference: tuple[str, float, dict[str, torch.Tensor]]
) -> None:
    _, loss, gradients = reference
    assert found[0] == pytest.approx(loss, rel=1e-6)
    assert found[1].keys() == gradients.keys()
    for name, expected in gradients.items():
        error = (found[1][name] - expected).norm() / expected.norm()
        assert error <= 1e-6, f"{name}: off by {error:.2e} of its norm"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_the_same_gradients(
    layout: str, reference: tuple[str, float, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    config = configuration(LAYOUTS[layout])
    sizes = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    world_size = 4 if layout == "DP 4" else sizes
    assert_equal(loss_and_gradients(world_size, config, reference[0], tmp_path / "gradients"), reference)


@pytest.mark.parametrize(
    "sections",
    [
        dict(train=dict(recompute="selective")),
        dict(train=dict(recompute="full")),
        dict(train=dict(micro_batch_size=2)),
        dict(attention=dict(placement="zigzag")),
        dict(attention=dict(placement="contiguous")),
        dict(attention=dict(placement="contiguous", exchange="ring", ring_rows=8)),
        dict(attention=dict(exchange="ulysses")),
    ],
    ids=str,
)
def test_other_roads_lead_to_the_same_gradients(
    sections: dict[str, Any], reference: tuple[str, float, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    config = configuration(dict(context=2), **sections)
    assert_equal(loss_and_gradients(2, config, reference[0], tmp_path / "gradients"), reference)


@pytest.mark.parametrize(
    ("machine", "ranks_per_node", "two_levels", "head_parts"),
    [
        ({"between_gb_per_s": 1e-4, "latency_us": 0}, 2, True, (1, 1)),
        ({"inside_gb_per_s": 3, "latency_us": 0, "tiles_at_once": 1e-6}, None, False, (1, 2)),
    ],
    ids=["two levels", "heads in parts"],
)
def test_rows_travel_otherwise_to_the_same_gradients(
    machine: dict[str, float],
    ranks_per_node: int | None,
    two_levels: bool,
    head_parts: tuple[int, int],
    reference: tuple[str, float, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    path = tmp_path / "slow_links.json"
    path.write_text(json.dumps({"machine": machine}))
    attention = dict(placement="zigzag", ranks_per_node=ranks_per_node, calibration=str(path))
    config = configuration(dict(context=4), attention=attention)
    window = random_window(lengths=LENGTHS[0], vocab_size=VOCAB, seed=0)
    shape = dict(context_parallel_size=4, context_parallel_rank=0)
    plan = plan_batch(
        [window], mode=config.data.mode, placement="zigzag", costs=cost_model(config), **shape
    ).plan
    assert (plan.relay is not None) == two_levels and plan.head_parts == head_parts
    assert_equal(loss_and_gradients(4, config, reference[0], tmp_path / "gradients"), reference)

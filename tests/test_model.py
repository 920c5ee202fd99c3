"""The whole model: against transformers with the paper's dense mask, in parallel, and for leaks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from anchor_megatron.config import Config
from anchor_megatron.data.interleave import interleaved_slots
from anchor_megatron.data.window import Window
from anchor_megatron.layout.modes import MODES
from anchor_megatron.model.builder import build_model
from anchor_megatron.model.core_attention import PlannedSeqParams
from anchor_megatron.testing.models import ANCHOR, batch_of, random_window, tiny_config
from anchor_megatron.testing.ranks import run_ranks
from anchor_megatron.training.setup import initialize_ranks

VOCAB = 90
LENGTHS = [9, 2, 31, 1, 21]


def build(config: Config, weights: str | None) -> Any:
    """The model on this rank, with the weights of a checkpoint where one is named."""
    initialize_ranks(config)
    gpt = build_model(config)
    if weights is not None:
        state = dist_checkpointing.load({"model": gpt.sharded_state_dict()}, weights)
        gpt.load_state_dict(state["model"])
    return gpt


def logits_on_rank(
    rank: int, world_size: int, config: Config, windows: list[Window], weights: str
) -> tuple[np.ndarray, torch.Tensor]:
    """This rank's tokens and their logits [T, vocabulary]."""
    gpt = build(config, weights)
    batch, token_index = batch_of(
        windows, config, context_parallel_rank=parallel_state.get_context_parallel_rank()
    )
    with torch.no_grad():
        logits = gpt(batch.tokens, batch.positions, None, packed_seq_params=PlannedSeqParams(plan=batch.plan))
        logits = gather_from_tensor_model_parallel_region(logits)
    return token_index, logits[0, :, : config.model.vocab_size]


def save_weights(rank: int, world_size: int, config: Config, folder: str) -> dict[str, torch.Tensor]:
    """Saves a freshly drawn model and returns its weights."""
    gpt = build(config, None)
    Path(folder).mkdir(parents=True)
    dist_checkpointing.save({"model": gpt.sharded_state_dict()}, folder)
    return {name: value for name, value in gpt.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, torch.Tensor]]:
    folder = str(tmp_path_factory.mktemp("weights") / "model")
    # large weights: attention far from uniform, so that a wrong mask or position shows
    config = tiny_config(vocab_size=VOCAB, model=dict(init_std=0.2))
    return folder, run_ranks(1, save_weights, config, folder)[0]


def by_token(per_rank: list[tuple[np.ndarray, torch.Tensor]]) -> torch.Tensor:
    """Rows of all ranks in the order of the micro-batch's tokens; copies of one row overwrite each other."""
    tokens = max(int(token_index.max()) for token_index, _ in per_rank) + 1
    found = torch.full((tokens, per_rank[0][1].shape[1]), float("nan"))
    for token_index, rows in per_rank:
        found[torch.from_numpy(token_index)] = rows
    return found


def all_logits(world_size: int, config: Config, windows: list[Window], folder: str) -> torch.Tensor:
    """Logits of every token of the micro-batch."""
    return by_token(run_ranks(world_size, logits_on_rank, config, windows, folder))


def llama(state: dict[str, torch.Tensor], config: Config) -> Any:
    """transformers' Llama with the Megatron-Core weights `state`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = config.model
    head_dim = model.hidden_size // model.num_attention_heads
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
            rms_norm_eps=model.layernorm_epsilon,
            max_position_embeddings=4096,
            rope_theta=model.rotary_base,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    ).float()
    repeats = model.num_attention_heads // model.num_query_groups
    named = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"][:VOCAB],
        "lm_head.weight": state["output_layer.weight"][:VOCAB],
        "model.norm.weight": state["decoder.final_layernorm.weight"],
    }
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = state[ours + "self_attention.linear_qkv.weight"].view(
            model.num_query_groups, repeats + 2, head_dim, -1
        )
        named[theirs + "self_attn.q_proj.weight"] = qkv[:, :repeats].flatten(0, 2)
        named[theirs + "self_attn.k_proj.weight"] = qkv[:, repeats].flatten(0, 1)
        named[theirs + "self_attn.v_proj.weight"] = qkv[:, repeats + 1].flatten(0, 1)
        named[theirs + "self_attn.o_proj.weight"] = state[ours + "self_attention.linear_proj.weight"]
        gate, up = state[ours + "mlp.linear_fc1.weight"].chunk(2)
        named[theirs + "mlp.gate_proj.weight"], named[theirs + "mlp.up_proj.weight"] = gate, up
        named[theirs + "mlp.down_proj.weight"] = state[ours + "mlp.linear_fc2.weight"]
        named[theirs + "input_layernorm.weight"] = state[ours + "input_layernorm.weight"]
        named[theirs + "post_attention_layernorm.weight"] = state[ours + "pre_mlp_layernorm.weight"]
    peer.load_state_dict(named)
    return peer.eval()


def shared_form_logits(peer: Any, window: Window) -> torch.Tensor:
    """The paper's form: one anchor, a dense mask `k <= q and (same document or k == 0)`; logits of the other
    tokens.
    """
    own = np.ones(window.tokens.size, dtype=bool)
    own[window.cu_seqlens[:-1]] = False
    document = np.repeat(np.arange(window.document_ids.size), np.diff(window.cu_seqlens))
    tokens = torch.from_numpy(np.concatenate([[ANCHOR], window.tokens[own]]))
    belongs = torch.from_numpy(np.concatenate([[-1], document[own]]))
    place = torch.arange(tokens.numel())
    visible = (place[None] <= place[:, None]) & ((belongs[None] == belongs[:, None]) | (place[None] == 0))
    mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))[None, None]
    with torch.no_grad():
        return peer(input_ids=tokens[None], attention_mask=mask, position_ids=place[None]).logits[0, 1:]


@pytest.mark.parametrize(
    "parallel", [dict(), dict(context=2), dict(tensor=2), dict(tensor=2, context=2, sequence=True)]
)
def test_replicated_anchors_equal_the_papers_shared_one(
    weights: tuple[str, dict[str, torch.Tensor]], parallel: dict[str, Any]
) -> None:
    folder, state = weights
    config = tiny_config(vocab_size=VOCAB, parallel=parallel)
    window = random_window(lengths=LENGTHS, vocab_size=VOCAB, seed=3)
    world_size = config.parallel.tensor * config.parallel.context
    found = all_logits(world_size, config, [window], folder)
    own = np.ones(window.tokens.size, dtype=bool)
    own[window.cu_seqlens[:-1]] = False
    expected = shared_form_logits(llama(state, config), window)
    assert expected.std() > 0.5, "the peer's logits are too flat to tell a right mask from a wrong one"
    torch.testing.assert_close(found[own], expected, atol=1e-4, rtol=0)


def interleaved(window: Window) -> Window:
    """The window with its documents cut into chunks of about three tokens, shuffled."""
    is_own = np.ones(window.tokens.size, dtype=bool)
    is_own[window.cu_seqlens[:-1]] = False
    generator = np.random.default_rng(7)
    return replace(
        window,
        slots=interleaved_slots(window.cu_seqlens, is_own, filled=is_own.size, mean=3, generator=generator),
    )


def dense_logits(peer: Any, window: Window, mode: str) -> torch.Tensor:
    """Logits of every row as `mode` defines them on the tokens in the order of their slots: a dense mask from
    documents, explicit positions. In `anchor` one anchor stands in front, and the rows of its copies are nan.
    """
    order = np.argsort(window.slots)
    documents = np.repeat(np.arange(window.document_ids.size), np.diff(window.cu_seqlens))
    if mode == "anchor":
        order = order[~np.isin(order, window.cu_seqlens[:-1])]
        logits = torch.full((window.tokens.size, VOCAB), float("nan"))
        ids, belongs = np.append(ANCHOR, window.tokens[order]), np.append(-1, documents[order])
    else:
        logits = torch.empty(window.tokens.size, VOCAB)
        ids, belongs = window.tokens[order], documents[order] * (mode != "full")
    place = np.arange(ids.size)
    is_visible = (place[None] <= place[:, None]) & ((belongs[None] == belongs[:, None]) | (belongs[None] < 0))
    positions = (order - window.cu_seqlens[documents[order]]) if mode == "document_reset" else place
    mask = torch.zeros(is_visible.shape).masked_fill(~torch.from_numpy(is_visible), float("-inf"))
    with torch.no_grad():
        found = peer(
            input_ids=torch.from_numpy(ids)[None],
            attention_mask=mask[None, None],
            position_ids=torch.from_numpy(positions)[None],
        ).logits[0]
    logits[order] = found[-order.size :]
    return logits


@pytest.mark.parametrize(
    ("mode", "parallel"),
    [*((mode, dict(context=2)) for mode in MODES), ("anchor", dict(tensor=2, context=2, sequence=True))],
)
def test_interleaved_documents_see_what_the_dense_mask_on_their_slots_allows(
    weights: tuple[str, dict[str, torch.Tensor]], mode: str, parallel: dict[str, Any]
) -> None:
    folder, state = weights
    config = tiny_config(vocab_size=VOCAB, parallel=parallel, data=dict(mode=mode))
    window = interleaved(random_window(lengths=LENGTHS, vocab_size=VOCAB, seed=3))
    found = all_logits(config.parallel.tensor * config.parallel.context, config, [window], folder)
    if mode == "full":  # its plan counts tokens in the order of their slots
        found = found[window.slots]
    expected = dense_logits(llama(state, config), window, mode)
    told = ~expected.isnan().any(dim=1)
    assert int(told.sum()) == 64 - (len(LENGTHS) if mode == "anchor" else 0)
    torch.testing.assert_close(found[told], expected[told], atol=1e-4, rtol=0)


def test_modes_differ_as_they_should(weights: tuple[str, dict[str, torch.Tensor]]) -> None:
    """RoPE is relative: in exact arithmetic running and reset positions are one model; others differ."""
    window = random_window(lengths=LENGTHS, vocab_size=VOCAB, seed=3)
    found = {
        mode: all_logits(1, tiny_config(vocab_size=VOCAB, data=dict(mode=mode)), [window], weights[0])
        for mode in MODES
    }
    for one, other in itertools.combinations(MODES, 2):
        difference = (found[one] - found[other]).abs().max().item()
        if {one, other} == {"document", "document_reset"}:
            assert 0 < difference < 1e-4
        else:
            assert difference > 1e-2, f"{one} and {other} computed the same"


def embedding_gradients_on_rank(
    rank: int, world_size: int, config: Config, windows: list[Window], weights: str
) -> tuple[np.ndarray, torch.Tensor]:
    """This rank's tokens and the gradient [T, hidden] of the summed loss at the embedding's output."""
    gpt = build(config, weights)
    batch, token_index = batch_of(
        windows, config, context_parallel_rank=parallel_state.get_context_parallel_rank()
    )
    kept = []
    gpt.embedding.register_forward_hook(
        lambda module, inputs, output: kept.append(output.retain_grad() or output)
    )
    gpt(
        batch.tokens,
        batch.positions,
        None,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        packed_seq_params=PlannedSeqParams(plan=batch.plan),
    ).backward()
    return token_index, kept[0].grad[:, 0]


@pytest.mark.parametrize("mode", ["document", "document_reset", "anchor"])
@pytest.mark.parametrize("context", [1, 2])
def test_no_document_hears_another(
    weights: tuple[str, dict[str, torch.Tensor]], mode: str, context: int
) -> None:
    config = tiny_config(vocab_size=VOCAB, data=dict(mode=mode), parallel=dict(context=context))
    window = random_window(lengths=LENGTHS, vocab_size=VOCAB, seed=4)
    changed = window.tokens.copy()
    disturbed = slice(*window.cu_seqlens[2:4])
    changed[disturbed][1:] = (changed[disturbed][1:] + 7) % (VOCAB - 2) + 2
    other = replace(window, tokens=changed)
    same = torch.ones(window.tokens.size, dtype=torch.bool)
    same[disturbed] = False
    for probe in (logits_on_rank, embedding_gradients_on_rank):
        before, after = (
            by_token(run_ranks(context, probe, config, [one], weights[0])) for one in (window, other)
        )
        assert torch.equal(before[same], after[same]), probe.__name__
        assert not torch.equal(before[~same], after[~same]), probe.__name__

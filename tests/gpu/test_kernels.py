"""GPU kernels and the fused row, loss and rotary passes against fp64, beside the stock kernels' error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from anchor_megatron.attention import rows
from anchor_megatron.attention.choose import choose_kernel
from anchor_megatron.attention.execute import planned_attention
from anchor_megatron.attention.kernels_gpu import GPU_KERNELS
from anchor_megatron.attention.oracle import dense_attention
from anchor_megatron.attention.plan_tensors import PackedArrays, plan_arrays, plan_tensors
from anchor_megatron.layout.modes import visible
from anchor_megatron.layout.placement import place
from anchor_megatron.layout.plan import make_plans
from anchor_megatron.layout.relay import hops, make_relay
from anchor_megatron.model import loss as loss_module
from anchor_megatron.model.rotary import RotaryAngles
from anchor_megatron.testing import peers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

HEADS, GROUPS, HEAD_DIM = 8, 2, 128
SCALE = HEAD_DIM**-0.5
LENGTHS = np.array([1, 2, 300, 129, 1, 515, 64, 12])


def random_rows(tokens: int, heads: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(tokens, heads, HEAD_DIM, device="cuda", dtype=dtype, generator=generator)


def inputs(tokens: int) -> list[torch.Tensor]:
    """q, k, v and the output's gradient in bf16."""
    return [random_rows(tokens, heads, seed) for seed, heads in enumerate((HEADS, GROUPS, GROUPS, HEADS))]


def results(attend, tensors: list[torch.Tensor]) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """Output, dq, dk, dv."""
    *qkv, dout = tensors
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def oracle(tensors: list[torch.Tensor], lengths: np.ndarray) -> list[torch.Tensor]:
    mask = torch.from_numpy(visible(np.concatenate([[0], np.cumsum(lengths)]))).cuda()
    return results(lambda q, k, v: dense_attention(q, k, v, mask, scale=SCALE), [x.double() for x in tensors])


def stock(tensors: list[torch.Tensor], lengths: np.ndarray) -> list[torch.Tensor]:
    """torch's flash attention of one document at a time."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = [x.split(lengths.tolist()) for x in (q, k, v)]
        outs = []
        for document in zip(*parts, strict=True):
            heads_first = (x.transpose(0, 1)[None] for x in document)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
                out = torch.nn.functional.scaled_dot_product_attention(
                    *heads_first, is_causal=True, enable_gqa=True
                )
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return results(attend, tensors)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kernel", [kernel.name for kernel in GPU_KERNELS])
def test_kernels_are_as_exact_as_stock(kernel: str) -> None:
    problem = next(one for one in GPU_KERNELS if one.name == kernel).problem(
        torch.device("cuda"), torch.bfloat16, HEAD_DIM
    )
    if problem:
        pytest.skip(problem)
    tensors = inputs(int(LENGTHS.sum()))
    expected = oracle(tensors, LENGTHS)
    plan, _ = peers.device_plan(LENGTHS, placement="document", ranks=1, rank=0)
    chosen = choose_kernel(kernel, device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=HEAD_DIM)
    assert chosen.name == kernel
    found = results(peers.ours(plan, chosen, HEAD_DIM, None), tensors)
    for name, ours, theirs, exact in zip(
        ("out", "dq", "dk", "dv"), found, stock(tensors, LENGTHS), expected, strict=True
    ):
        assert error(ours, exact) <= 2 * error(theirs, exact), name


@pytest.mark.parametrize("kernel", [kernel.name for kernel in GPU_KERNELS])
@pytest.mark.parametrize("ranks", [2, 4])
def test_waiting_pieces_are_bitwise_the_whole_documents(kernel: str, ranks: int) -> None:
    """Every rank's rows, with the received ones handed over by index: what the exchange would bring."""
    lengths = np.array([37, 2048, 1, 10, 900, 100])
    lengths[-1] += -lengths.sum() % ranks
    chosen = choose_kernel(kernel, device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=HEAD_DIM)
    if chosen.name != kernel:
        pytest.skip("not here")
    q, k, v, _ = inputs(int(lengths.sum()))
    whole, _ = peers.device_plan(lengths, placement="document", ranks=1, rank=0)
    expected = planned_attention(q, k, v, plan=whole, kernel=chosen, scale=SCALE, group=None)
    borders = np.concatenate([[0], np.cumsum(lengths)])
    placed = place("document", borders, context_parallel_size=ranks, window_length=int(borders[-1]))
    plans = make_plans(placed)
    differing = 0
    for rank, plan in enumerate(plans):
        device = plan_tensors(plan, PackedArrays.pack(plan_arrays(plan)).to(torch.device("cuda")))
        mine = torch.from_numpy(plan.token_index).cuda()
        received = torch.cat([plans_rows(plans, source, rank) for source in range(ranks)]).cuda()
        far = torch.stack((k[received], v[received]), dim=1)
        keys, values = rows.gather_keys(k[mine], v[mine], far, device)
        n = plan.local_tokens
        out = torch.empty_like(q[mine])
        if n:
            chosen.forward(
                q[mine][:n], k[mine][:n], v[mine][:n], device.local_segments, scale=SCALE, out_TNH=out[:n]
            )
        if n < out.shape[0]:
            chosen.forward(q[mine][n:], keys, values, device.waiting_segments, scale=SCALE, out_TNH=out[n:])
        differing += int((out != expected[mine]).sum())
        assert error(out, expected[mine].double()) < 1e-2
    if kernel != "transformer_engine":  # cuDNN does not promise it
        assert differing == 0, f"{differing} elements differ"


def plans_rows(plans, source: int, rank: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Tokens that `source` sends to `rank`."""
    plan = plans[source]
    begin = sum(plan.send_counts[:rank])
    return torch.from_numpy(plan.token_index[plan.send_index[begin : begin + plan.send_counts[rank]]])


def test_fused_row_movements_equal_the_plain_ones() -> None:
    """In one level, and in two on nodes of two ranks."""
    lengths = np.array([37, 500, 1, 10, 200, 100])
    borders = np.concatenate([[0], np.cumsum(lengths)])
    placed = place("zigzag", borders, context_parallel_size=4, window_length=int(borders[-1]))
    two_levels = hops(placed, 2)
    for plan in make_plans(placed) + [make_relay(placed, rank, two_levels) for rank in range(4)]:
        packed = PackedArrays.pack(plan_arrays(plan))
        here, there = (plan_tensors(plan, packed.to(torch.device(device))) for device in ("cpu", "cuda"))
        own = plan.token_index.size
        fused = torch.randn(own, GROUPS * 2 + 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        k, v = fused[:, :GROUPS], fused[:, GROUPS : 2 * GROUPS]  # strided, as out of the fused projection
        far = rows_of_both(plan.received_tokens)
        index = torch.randint(own + far.shape[0], (300,)).int()
        leaving = rows_of_both(300)
        plain_leaving = leaving.cpu()
        rows.pack_rows(k, v, far, index.cuda(), out_S2GH=leaving)
        rows.pack_rows(k.cpu(), v.cpu(), far.cpu(), index, out_S2GH=plain_leaving)
        assert torch.equal(leaving.cpu(), plain_leaving)
        for ours, plain in zip(
            rows.gather_keys(k, v, far, there),
            rows.gather_keys(k.cpu(), v.cpu(), far.cpu(), here),
            strict=True,
        ):
            assert torch.equal(ours.cpu(), plain)
        dkeys, dvalues = rows_of_both(plan.key_index.size).unbind(1)
        dkeys, dvalues = dkeys.contiguous(), dvalues.contiguous()
        home = rows_of_both(there.sent_tokens)
        sums, plain_sums = rows_of_both(plan.received_tokens), torch.empty_like(far, device="cpu")
        rows.sum_received(dkeys, dvalues, home, there.gradient_offsets[own:], there, out_R2GH=sums)
        gradients = dkeys.cpu(), dvalues.cpu(), home.cpu()
        rows.sum_received(*gradients, here.gradient_offsets[own:], here, out_R2GH=plain_sums)
        torch.testing.assert_close(sums.cpu(), plain_sums, atol=0.04, rtol=0.01)
        dk, dv = (torch.randn(own, GROUPS, HEAD_DIM, device="cuda").bfloat16() for _ in range(2))
        plain = dk.cpu(), dv.cpu()
        rows.add_home(dk, dv, dkeys, dvalues, home, there)
        rows.add_home(*plain, *gradients, here)
        for ours, theirs in zip((dk, dv), plain, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, atol=0.04, rtol=0.01)


def test_fused_mixing_equals_the_plain_one() -> None:
    """All rows in order, and some of them in none."""
    part = random_rows(300, HEADS, 1)
    keep, new = (torch.rand(300, HEADS, device="cuda").T for _ in range(2))  # strided, as the merge has them
    for index in (None, torch.randperm(500, device="cuda")[:300].int()):
        out = random_rows(300 if index is None else 500, HEADS, 2, torch.float32)
        plain = out.cpu()
        rows.mix_rows(out, part, index, keep_NQ=keep, new_NQ=new)
        there = None if index is None else index.cpu()
        rows.mix_rows(plain, part.cpu(), there, keep_NQ=keep.cpu(), new_NQ=new.cpu())
        torch.testing.assert_close(out.cpu(), plain, atol=1e-6, rtol=1e-6)


def rows_of_both(count: int) -> torch.Tensor:
    """Keys and values, or their gradients, [count, 2, G, H]."""
    return torch.randn(count, 2, GROUPS, HEAD_DIM, device="cuda").bfloat16()


def test_summed_cross_entropy_equals_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone:
        size, rank = staticmethod(lambda: 1), staticmethod(lambda: 0)

    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", 50_000 * 100)
    vocab, padded, tokens, width = 49_990, 50_048, 333, 256
    hidden = torch.randn(tokens, width, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(padded, width, device="cuda") / 8).bfloat16().requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), device="cuda")
    mask = (torch.rand(tokens, device="cuda") > 0.2).float()
    found = loss_module.summed_cross_entropy(hidden, weight, labels, mask, vocab_size=vocab, group=Alone())
    found.backward(torch.tensor(0.5, device="cuda"))
    wide_hidden, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = wide_hidden @ wide_weight[:vocab].t()
    exact = (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * mask).sum()
    exact.backward(torch.tensor(0.5, device="cuda"))
    assert found.item() == pytest.approx(exact.item(), rel=1e-3)
    for ours, theirs in ((hidden, wide_hidden), (weight, wide_weight)):
        assert error(ours.grad, theirs.grad) < 5e-3


@pytest.mark.parametrize("first", [0, 100_000, (1 << 20) - 512])
def test_fused_rotary_is_as_exact_as_rounding_itself(first: int) -> None:
    """TransformerEngine's fused kernel with our angles: within 1.001 of rounding the exact result once."""
    rope = pytest.importorskip("transformer_engine.pytorch.attention.rope")
    positions = torch.arange(first, first + 512, device="cuda")
    frequencies = torch.from_numpy(5e5 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    angles = RotaryAngles(frequencies)(positions)
    x = random_rows(512, HEADS, 7)
    found = rope.apply_rotary_pos_emb(x[:, None], angles, tensor_format="sbhd", fused=True)[:, 0]
    turn = torch.outer(positions.double(), frequencies.cuda())
    cosine, sine = (torch.cat((f(turn), f(turn)), dim=-1)[:, None] for f in (torch.cos, torch.sin))
    wide = x.double()
    exact = (
        wide * cosine + torch.cat((-wide[..., HEAD_DIM // 2 :], wide[..., : HEAD_DIM // 2]), dim=-1) * sine
    )
    rounding = (exact.bfloat16().double() - exact).norm()
    assert (found.double() - exact).norm() <= 1.001 * rounding
    assert math.isfinite(float(rounding)) and rounding > 0


@pytest.mark.parametrize("tokens", [131_072, 524_288])
def test_long_windows_equal_transformer_engine(tokens: int) -> None:
    pytest.importorskip("transformer_engine")
    lengths = np.array([tokens // 4, 1, tokens // 8 - 1, 4096, 129, 0, tokens // 16])
    lengths[5] = tokens - lengths.sum()
    tensors = inputs(tokens)
    plan, _ = peers.device_plan(lengths, placement="document", ranks=1, rank=0)
    chosen = choose_kernel("auto", device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=HEAD_DIM)
    ours = results(peers.ours(plan, chosen, HEAD_DIM, None), tensors)
    shape = dict(heads=HEADS, groups=GROUPS, head_dim=HEAD_DIM)
    theirs = results(peers.transformer_engine_thd(lengths, **shape), tensors)
    for name, one, other in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        assert error(one, other.double()) < 1e-2, name

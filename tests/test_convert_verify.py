"""--verify: whole and layer by layer, and that it notices."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_convert import make_hf, run_tool

from anchor_megatron.convert import verify as verify_module
from anchor_megatron.convert.exporting import export_checkpoint
from anchor_megatron.convert.importing import import_checkpoint
from anchor_megatron.convert.verify import Verified, verify
from anchor_megatron.testing.ranks import run_ranks


def verify_on_rank(rank: int, world_size: int, hf: Path, megatron: Path, whole_bytes: int) -> Verified:
    verify_module.WHOLE_BYTES = whole_bytes
    return verify(hf, megatron, overridden=True)


def quiet(message: str) -> None:
    """Hears what a conversion says."""


@pytest.mark.parametrize("case", ["qwen2 tied", "llama tied, llama3", "phi3"])
def test_layer_by_layer_is_as_close_as_the_whole(case: str, tmp_path: Path) -> None:
    hf = make_hf(case, tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "megatron", say=quiet)
    whole = run_ranks(1, verify_on_rank, hf, tmp_path / "megatron", 10**9)[0]
    layers = run_ranks(1, verify_on_rank, hf, tmp_path / "megatron", 0)[0]
    assert (whole.by_layer, layers.by_layer) == (False, True)
    assert whole.ok and layers.ok and 0 < max(whole.difference, layers.difference) < 1e-5


def test_an_extension_is_verified_with_its_own_rotary_settings(tmp_path: Path) -> None:
    hf = make_hf("llama tied, llama3", tmp_path / "hf")
    words = ["import", "--hf", str(hf), "--out", str(tmp_path / "megatron"), "--extend", "64k", "--verify"]
    status, output = run_ranks(1, run_tool, [[*words, "rotary_base=2e6"]])[0][0]
    assert status == 0 and "verify: largest difference" in output
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", say=quiet)
    assert '"rope_theta": 2000000.0' in (tmp_path / "back" / "config.json").read_text()


@pytest.mark.parametrize("whole_bytes", [10**9, 0])
def test_one_wrong_value_is_noticed(whole_bytes: int, tmp_path: Path) -> None:
    hf = make_hf("llama", tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "megatron", say=quiet)
    state = load_file(hf / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] += 1.0
    save_file(state, hf / "model.safetensors", {"format": "pt"})
    assert not run_ranks(1, verify_on_rank, hf, tmp_path / "megatron", whole_bytes)[0].ok


@pytest.mark.parametrize("value", [float("nan"), 7.0])
def test_the_command_exits_with_one_past_the_bound(value: float, tmp_path: Path) -> None:
    hf = make_hf("llama", tmp_path / "hf")
    state = load_file(hf / "model.safetensors")
    import_checkpoint(hf, tmp_path / "megatron", say=quiet)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", say=quiet)
    state["model.norm.weight"][2] = value
    save_file(state, tmp_path / "back" / "model.safetensors", {"format": "pt"})
    lines = [
        ["export", "--megatron", str(tmp_path / "megatron"), "--out", str(tmp_path / "second"), "--verify"]
    ]
    assert run_ranks(1, run_tool, lines)[0][0][0] == 0
    assert run_ranks(1, damaged_export, lines[0], tmp_path / "back")[0][0] == 1


def damaged_export(rank: int, world_size: int, words: list[str], damaged: Path) -> tuple[int, str]:
    """The command on a disk that spoils what is written: its output is replaced before --verify looks."""
    verify_before = verify_module.verify

    def spoiled(hf: Path, megatron: Path, **rest: bool) -> Verified:
        return verify_before(damaged, megatron, **rest)

    verify_module.verify = spoiled
    try:
        return run_tool(rank, world_size, [[*words[:-2], str(damaged) + "-fresh", "--verify"]])[0]
    finally:
        verify_module.verify = verify_before

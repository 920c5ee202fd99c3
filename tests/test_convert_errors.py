"""Bad input and bad luck: every conversion that cannot be done says why and leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anchor_megatron.convert.exporting import export_checkpoint
from anchor_megatron.convert.importing import STEP, import_checkpoint
from anchor_megatron.convert.rows import TensorRows
from anchor_megatron.convert.safetensors_writer import SafetensorsWriter, TensorInfo

ROOT = Path(__file__).parents[1]
CONFIG: dict[str, Any] = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=50, hidden_size=16,
    intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    rms_norm_eps=1e-5, rope_theta=1e4,
    max_position_embeddings=64, torch_dtype="float32", tie_word_embeddings=False,
)  # fmt: skip
SHAPES = {
    "input_layernorm": (16,), "post_attention_layernorm": (16,), "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16), "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
}  # fmt: skip


def quiet(message: str) -> None:
    """Hears what a conversion says."""


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (50, 16)}
    for layer in range(3):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
    shapes |= {"model.norm.weight": (16,), "lm_head.weight": (50, 16)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save_sharded(folder: Path) -> None:
    """The model in three safetensors files with an index."""
    state = tensors()
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in state.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    writer = SafetensorsWriter(folder, infos, shard_bytes=12_000)
    for name, value in state.items():
        writer.write(name, 0, TensorRows(value), 0, len(value))
    writer.finish()


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    save_sharded(tmp_path / "hf")
    return tmp_path / "hf"


def shards(hf: Path) -> list[Path]:
    return sorted(hf.glob("model-*.safetensors"))


def test_shards_and_index_are_what_the_safetensors_library_and_transformers_read(hf: Path) -> None:
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    assert len(shards(hf)) > 2
    loaded: dict[str, torch.Tensor] = {}
    for path in shards(hf):
        part = load_file(path)
        assert {name for name, file in index["weight_map"].items() if file == path.name} == set(part)
        loaded |= part
    state = tensors()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    assert all(torch.equal(value, state[name]) for name, value in loaded.items()) and len(loaded) == len(
        state
    )


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit_config(hf: Path, **fields: Any) -> None:
    (hf / "config.json").write_text(json.dumps(CONFIG | fields))


def edit_tensors(hf: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """One file instead of the shards, after `change`."""
    for path in [*shards(hf), hf / "model.safetensors.index.json"]:
        path.unlink()
    state = tensors()
    change(state)
    save_file(state, hf / "model.safetensors")


def drop(name: str) -> Callable[[Path], None]:
    """One file without the tensor."""
    return lambda hf: edit_tensors(hf, lambda state: state.pop(name))


def put(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    """One file with the tensor added or replaced."""
    return lambda hf: edit_tensors(hf, lambda state: state.update({name: value}))


def remove_weights(hf: Path) -> None:
    edit_tensors(hf, dict.clear)
    (hf / "model.safetensors").unlink()


SECOND = r"model-00002-of-\d+.safetensors: "
FIRST = r"model-00001-of-\d+.safetensors: "
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda hf: shutil.rmtree(hf), "config.json: expected"),
    "config is no JSON": (lambda hf: (hf / "config.json").write_text("{"), "config.json: expected JSON"),
    "no weights": (remove_weights, "got neither"),
    "a missing shard": (lambda hf: shards(hf)[1].unlink(), SECOND + "expected a shard"),
    "a truncated shard": (lambda hf: truncate(shards(hf)[1]), SECOND + r"got \d+ bytes"),
    "an empty shard": (lambda hf: shards(hf)[0].write_bytes(b""), FIRST + "got 0 bytes"),
    "a shard of noise": (lambda hf: shards(hf)[0].write_bytes(b"\xff" * 99), FIRST),
    "a damaged header": (
        lambda hf: shards(hf)[0].write_bytes(shards(hf)[0].read_bytes().replace(b'"F32"', b'"F99"', 1)),
        "of type F99",
    ),
    "a damaged index": (
        lambda hf: (hf / "model.safetensors.index.json").write_text("{}"),
        "index.json: expected",
    ),
    "swapped shards": (
        lambda hf: shards(hf)[0].write_bytes(shards(hf)[1].read_bytes()),
        "as the index says|in two files",
    ),
    "a missing tensor": (drop("lm_head.weight"), "lm_head.weight"),
    "an unknown tensor": (
        put("model.layers.0.lora.weight", torch.ones(3, 3)),
        "model.layers.0.lora.weight",
    ),
    "a wrong shape": (
        put("model.norm.weight", torch.ones(17)),
        r"model.norm.weight: got shape \(17,\), expected \(16,\)",
    ),
    "another type than the other layers'": (
        put("model.layers.1.mlp.up_proj.weight", torch.ones(24, 16).half()),
        "model.layers.1.mlp.up_proj.weight: got torch.float16, expected torch.float32",
    ),
    "tied weights that differ": (
        lambda hf: edit_config(hf, tie_word_embeddings=True),
        "lm_head.weight: got other values",
    ),
    "another architecture": (lambda hf: edit_config(hf, model_type="gemma2"), "model_type: got 'gemma2'"),
    "another head": (
        lambda hf: edit_config(hf, architectures=["LlamaForSequenceClassification"]),
        "architectures: got",
    ),
    "more layers than tensors": (lambda hf: edit_config(hf, num_hidden_layers=4), "model.layers.3"),
    "fewer layers than tensors": (lambda hf: edit_config(hf, num_hidden_layers=2), "model.layers.2"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_is_written(case: str, hf: Path, tmp_path: Path) -> None:
    damage, message = BAD[case]
    damage(hf)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(hf, tmp_path / "out", say=quiet)
    assert not list(tmp_path.glob("out*"))


def test_a_pickle_is_read_only_when_allowed(hf: Path, tmp_path: Path) -> None:
    state = tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    remove_weights(hf)
    torch.save(state, hf / "pytorch_model.bin")
    with pytest.raises(ValueError, match="--allow-pickle"):
        import_checkpoint(hf, tmp_path / "out", say=quiet)
    said: list[str] = []
    import_checkpoint(hf, tmp_path / "out", allow_pickle=True, say=said.append)
    assert "left out 1 tensors" in said[0] and "inv_freq" in said[0]
    export_checkpoint(tmp_path / "out", tmp_path / "back", say=quiet)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert (
        all(torch.equal(value, state[name]) for name, value in back.items()) and len(back) == len(state) - 1
    )


def test_a_pickle_with_code_in_it_is_refused(hf: Path, tmp_path: Path) -> None:
    remove_weights(hf)
    torch.save({"model.norm.weight": print}, hf / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: torch cannot load it with weights_only"):
        import_checkpoint(hf, tmp_path / "out", allow_pickle=True, say=quiet)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("record", ["sums", "downloader", "cache"])
def test_hashes_are_checked_where_they_are_recorded(record: str, hf: Path, tmp_path: Path) -> None:
    downloads = hf / ".cache" / "huggingface" / "download"
    downloads.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for path in shards(hf):
        if record == "sums":
            with open(hf / "SHA256SUMS", "a") as file:
                file.write(f"{digest(path)}  {path.name}\n")
        elif record == "downloader":
            (downloads / f"{path.name}.metadata").write_text(f"{'0' * 40}\n{digest(path)}\n1.5\n")
        else:
            blob = path.rename(tmp_path / "blobs" / digest(path))
            path.symlink_to(blob)
    import_checkpoint(hf, tmp_path / "good", check_hashes=True, say=quiet)
    with open(shards(hf)[1], "r+b") as file:  # the last byte of a tensor: only a hash can tell
        file.seek(-1, os.SEEK_END)
        file.write(b"\x00")
    with pytest.raises(ValueError, match=r"model-00002-of-\d+.safetensors: got SHA-256"):
        import_checkpoint(hf, tmp_path / "out", check_hashes=True, say=quiet)
    assert not list(tmp_path.glob("out*"))


def test_hashes_that_nobody_recorded_cannot_be_checked(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--check-hashes"):
        import_checkpoint(hf, tmp_path / "out", check_hashes=True, say=quiet)


@pytest.fixture
def megatron(hf: Path, tmp_path: Path) -> Path:
    import_checkpoint(hf, tmp_path / "megatron", say=quiet)
    return tmp_path / "megatron"


def replace_text(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def truncate_last_file(step: Path) -> None:
    path = step / "__0_0.distcp"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda step: shutil.rmtree(step.parent), "expected a checkpoint's folder"),
    "an unfinished one": (lambda step: (step / "metadata.json").unlink(), "a folder of them, got neither"),
    "no metadata": (lambda step: (step / ".metadata").unlink(), "expected a Megatron-Core checkpoint"),
    "damaged metadata": (lambda step: (step / ".metadata").write_bytes(b"nonsense"), ".metadata: refused"),
    "a missing file": (lambda step: (step / "__0_0.distcp").unlink(), "__0_0.distcp: got no such file"),
    "a truncated file": (truncate_last_file, r"__0_0.distcp: got \d+ bytes, expected \d+"),
    "zeros": (
        lambda step: (step / "__0_0.distcp").write_bytes(bytes((step / "__0_0.distcp").stat().st_size)),
        "__0_0.distcp: damaged",
    ),
    "no configuration": (lambda step: (step / "config.yaml").unlink(), "config.yaml: expected"),
    "another model's configuration": (
        lambda step: replace_text(step / "config.yaml", ": 24", ": 32"),
        "ffn_hidden_size|got shape",
    ),
    "another model's source": (
        lambda step: (step / "hf_config.json").write_text(json.dumps(CONFIG | dict(num_key_value_heads=4))),
        "num_query_groups: got 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_named_and_nothing_is_written(case: str, megatron: Path, tmp_path: Path) -> None:
    damage, message = BAD_CHECKPOINTS[case]
    damage(megatron / STEP)
    with pytest.raises(ValueError, match=message):
        export_checkpoint(megatron, tmp_path / "out", say=quiet)
    assert not list(tmp_path.glob("out*"))


def test_the_command_reports_errors_in_one_line(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "tools/convert_checkpoint.py",
        "import",
        "--hf",
        "nowhere",
        "--out",
        str(tmp_path / "x"),
    ]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "convert_checkpoint.py: nowhere/config.json: expected a Hugging Face model's config.json, "
        "got no such file"
    ]

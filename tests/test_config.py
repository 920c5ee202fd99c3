"""Configurations: each mistake ends in one message that names the field; what is written can be read back."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from anchor_megatron.config import (
    Config,
    check_config,
    data_parallel_size,
    data_sets,
    describe,
    load_config,
    model_config,
    save_config,
)
from anchor_megatron.data.arrange import PACKINGS
from anchor_megatron.data.recipe import SAMPLERS
from anchor_megatron.layout.modes import MODES
from anchor_megatron.layout.placement import PLACEMENTS
from anchor_megatron.presets import MODEL_PRESETS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A configuration with all that is required."""
    path = tmp_path / "run.yaml"
    path.write_text("model: {num_layers: 4}\ndata: {train: data/set, seq_length: 512}\n")
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=3", "train.step: Key 'step' not in 'TrainConfig'"),
        ("training.steps=3", "training: Key 'training' not in 'Config'"),
        ("train.steps=many", "train.steps: Value 'many' of type 'str' could not be converted to Integer"),
        ("parallel.sequence=2.5", "parallel.sequence: Value '2.5'"),
        ("data.mode=anchors", "data.mode: got 'anchors', expected one of full, document, document_reset, "),
        ("attention.placement=ring", "attention.placement: got 'ring', expected one of document, zigzag, "),
        ("attention.exchange=mail", "attention.exchange: got 'mail', expected one of sparse"),
        ("optimizer.decay=step", "optimizer.decay: got 'step', expected one of constant, linear, cosine"),
        ("train.precision=fp16", "train.precision: got 'fp16', expected one of bf16, fp32"),
        ("train.recompute=some", "train.recompute: got 'some', expected one of none, selective, full"),
        ("train.steps=0", "train.steps: got 0, expected at least 1"),
        ("model.num_experts=0", "model.num_experts: got 0, expected at least 1"),
        ("data.split=[0.9,0.2,0.0]", "data.split: got .*, expected three shares .* that sum to 1"),
        ("train.eval_interval=5", "train.eval_interval: got 5 without validation documents"),
        ("data.long_weight=0", "data.long_weight: got 0.0, expected a number above 0"),
        ("data.packing=tetris", "data.packing: got 'tetris', expected one of plain, best_fit, balanced"),
        ("data.num_workers=-1", "data.num_workers: got -1, expected at least 0"),
        ("model.preset=gpt-5", "model.preset: got 'gpt-5', expected one of llama-2-13b, "),
        ("model.num_query_groups=3", "model.num_attention_heads: got 4, expected a multiple of .*groups = 3"),
        ("model.hidden_size=66", "model.hidden_size: got 66, expected a multiple of .*heads = 4"),
        ("parallel.tensor=3", "model.num_attention_heads: got 4, expected a multiple of parallel.tensor = 3"),
        ("parallel.pipeline=3", "model.num_layers: got 4, expected a multiple of parallel.pipeline = 3"),
        ("parallel.expert=2", "parallel.expert: got 2 for a model without experts"),
        ("parallel.context=7", r"data.seq_length \* train.micro_batch_size: got 512, expected a multiple of "
                               "parallel.context = 7"),
        ("attention.ranks_per_node=0", "attention.ranks_per_node: got 0, expected at least 1"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_by_its_field(tiny: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(tiny, [override])


@pytest.mark.parametrize("placement", ["zigzag", "contiguous"])
def test_ranks_divide_each_window_where_windows_are_cut_alike(tiny: Path, placement: str) -> None:
    given = ["parallel.context=3", "train.micro_batch_size=3"]
    load_config(tiny, [*given, "attention.placement=document"])  # 3 windows of 512 among 3 ranks
    with pytest.raises(
        ValueError, match="data.seq_length: got 512, expected a multiple of parallel.context = 3"
    ):
        load_config(tiny, [*given, f"attention.placement={placement}"])


def test_sequence_parallelism_divides_a_rank_s_tokens(tiny: Path) -> None:
    given = ["parallel.context=4", "parallel.tensor=4", "data.seq_length=520"]
    load_config(tiny, given)  # 130 tokens a rank
    with pytest.raises(ValueError, match="got 130, expected a multiple of parallel.tensor = 4"):
        load_config(tiny, [*given, "parallel.sequence=true"])


def test_a_missing_data_set_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 3}\n")
    with pytest.raises(ValueError, match="run.yaml: data.train: .*missing"):
        load_config(path)


@pytest.mark.parametrize("text", ["model: [1, 2]\n", "data: {train: a\n", "- train\n"])
def test_what_is_no_configuration_is_refused_by_its_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="run.yaml"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.yaml: expected a YAML file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("override", "world_size", "message"),
    [
        ("parallel.context=2", 3, "number of ranks: got 3, expected a multiple of .*context = 2"),
        ("parallel.tensor=4", 2, "number of ranks: got 2, expected a multiple of .*context = 4"),
        ("train.global_batch_size=3", 2, "train.global_batch_size: got 3, expected a multiple of .* = 2"),
    ],
)
def test_a_world_that_does_not_fit_is_refused(
    tiny: Path, override: str, world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        data_parallel_size(load_config(tiny, [override]), world_size)


def test_experts_must_fit_the_world(tiny: Path) -> None:
    config = load_config(tiny, ["model.num_experts=8", "parallel.expert=4", "train.global_batch_size=12"])
    assert data_parallel_size(config, 4) == 4
    with pytest.raises(ValueError, match="number of ranks: got 6, expected a multiple of .*expert = 4"):
        data_parallel_size(config, 6)


def test_data_parallelism_takes_what_the_others_leave(tiny: Path) -> None:
    overrides = [
        "parallel.context=2",
        "parallel.tensor=2",
        "train.micro_batch_size=2",
        "train.global_batch_size=8",
    ]
    assert data_parallel_size(load_config(tiny, overrides), 16) == 4


def test_every_field_is_described_with_its_default() -> None:
    text, defaults = describe(), Config()
    for section in fields(Config):
        assert f"\n{section.name}: " in "\n" + text
        values = getattr(defaults, section.name)
        for entry in fields(values):
            default = getattr(values, entry.name)
            shown = {"???": "required", "None": "null"}.get(str(default), str(default))
            head = f"  {section.name}.{entry.name} ({shown})\n      "
            assert text.count(head) == 1, f"{section.name}.{entry.name} is not described"
            assert (
                text.split(head)[1].split("\n")[0].endswith((".", ",")) or "\n      " in text.split(head)[1]
            )
    assert max(map(len, text.splitlines())) <= 110


def test_choices_are_those_of_the_code(tiny: Path) -> None:
    for mode in MODES:
        assert load_config(tiny, [f"data.mode={mode}"]).data.mode == mode
    for placement in PLACEMENTS:
        assert load_config(tiny, [f"attention.placement={placement}"]).attention.placement == placement
    for packing in PACKINGS:
        assert load_config(tiny, [f"data.packing={packing}"]).data.packing == packing
    for sampler in SAMPLERS:
        assert load_config(tiny, [f"data.sampler={sampler}"]).data.sampler == sampler


@pytest.mark.parametrize("preset", MODEL_PRESETS)
def test_presets_fill_what_is_left_out(tmp_path: Path, preset: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{preset: {preset}, num_layers: 6}}\ndata: {{train: set}}\n")
    model = load_config(path).model
    assert model.num_layers == 6, "a field beside the preset wins"
    for name, value in MODEL_PRESETS[preset].items():
        assert name == "num_layers" or getattr(model, name) == value
    check_config(load_config(path, ["parallel.tensor=2", "data.seq_length=8192", "parallel.context=8"]))


def test_overrides_win_over_the_file_and_presets(tiny: Path) -> None:
    config = load_config(tiny, ["model.preset=llama-3-8b", "model.hidden_size=8192", "data.seq_length=1024"])
    assert (config.model.hidden_size, config.model.num_layers, config.data.seq_length) == (8192, 4, 1024)
    assert config.model.ffn_hidden_size == 14336


def test_what_is_saved_is_read_back(tiny: Path, tmp_path: Path) -> None:
    config = load_config(tiny, ["model.preset=llama-3.1-8b", "optimizer.lr=3e-5", "log.jsonl=null"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_blend_is_a_list_of_prefixes_and_weights(tiny: Path, tmp_path: Path) -> None:
    config = load_config(tiny, ["data.train=[{prefix: a, weight: 2}, {prefix: b, weight: 0.5}]"])
    assert data_sets(config.data.train) == [("a", 2.0), ("b", 0.5)]
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    for wrong in (
        "3",
        "[]",
        "[a, b]",
        "[{prefix: a}]",
        "[{prefix: a, weight: 0}]",
        "[{prefix: a, weight: x}]",
    ):
        with pytest.raises(ValueError, match="data.train: got "):
            load_config(tiny, [f"data.train={wrong}"])


def test_what_other_fields_make_idle_is_warned_of(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_config(tiny, ["data.interleave=9", "data.end_label=eos", "data.eos_token=3"])
    assert not caplog.messages
    for words in (
        ["data.interleave=9", "data.mode=document_reset"],
        ["data.short_documents=join"],
        ["data.eos_token=3"],
    ):
        caplog.clear()
        load_config(tiny, words)
        [message] = caplog.messages
        assert message.startswith(words[0].split("=")[0])


def test_a_model_from_a_checkpoint_s_dictionary(tiny: Path, tmp_path: Path) -> None:
    config = load_config(tiny, ["model.preset=qwen3-8b"])
    save_config(config, tmp_path / "saved.yaml")
    values = OmegaConf.to_object(OmegaConf.load(tmp_path / "saved.yaml"))["model"]
    assert model_config(values) == config.model
    with pytest.raises(ValueError, match="model.depth"):
        model_config({"depth": 3})


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_load(path: Path) -> None:
    assert load_config(path).data.train.startswith("build/"), "examples write where git does not look"

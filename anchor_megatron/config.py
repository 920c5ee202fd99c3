"""A run's configuration: one dataclass per section, read from YAML, overridden by dotted words, checked on
load.

    config = load_config("examples/tiny.yaml", ["parallel.context=2", "train.steps=3"])

`model.preset: llama-3-8b` fills every model field that the YAML leaves out; fields given beside it win. The
string under a field is its documentation: `describe()` prints it for `pretrain_anchor.py --help`. A key that
does not exist, a value of the wrong type and a combination that cannot run are each a `ValueError` naming the
field, before anything is started.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anchor_megatron.presets import MODEL_PRESETS

__all__ = ["Config", "ModelConfig", "describe", "load_config", "model_config", "save_config"]

MODES = ("full", "document", "document_reset", "anchor")
PLACEMENTS = ("document", "zigzag", "contiguous")
EXCHANGES = ("sparse",)


@dataclass
class ModelConfig:
    """The transformer's shape. `preset` names a published one (see `presets.py`)."""

    preset: str | None = None
    """A named shape, such as llama-3-8b; fields given beside it win."""
    num_layers: int = 2
    """Transformer layers."""
    hidden_size: int = 64
    """Width of the residual stream."""
    ffn_hidden_size: int = 192
    """Width of the gated MLP (of each expert where there are experts)."""
    num_attention_heads: int = 4
    """Query heads."""
    num_query_groups: int = 2
    """Key/value heads (grouped-query attention); num_attention_heads for plain multi-head."""
    kv_channels: int | None = None
    """Size of one head; hidden_size / num_attention_heads where null."""
    vocab_size: int | None = None
    """Entries of the vocabulary; the data set's where null. Padded so that tensor parallelism divides it."""
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this times the tensor-parallel size."""
    rotary_base: float = 10000.0
    """Theta of the rotary embedding. The paper raises it with the context: 1e6, 5e6, 1e7 for 16K, 64K, 128K.
    """
    rope_scaling: dict[str, Any] | None = None
    """Hugging Face's rope_scaling dictionary (rope_type, factor, ...); null for none."""
    max_position_embeddings: int | None = None
    """The longest context the model is meant for; kept for export, data.seq_length where null."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of the RMS norms."""
    add_qkv_bias: bool = False
    """A bias on the query, key and value projections (Qwen 1.5 to 2.5)."""
    qk_layernorm: bool = False
    """An RMS norm on every query and key head (Qwen 3)."""
    tie_embeddings: bool = False
    """The output layer shares the embedding's weight."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    num_experts: int | None = None
    """Experts of a mixture-of-experts MLP; null for a dense one."""
    moe_topk: int = 2
    """Experts a token is sent to."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of the router's load-balancing loss."""
    moe_normalize_topk: bool = True
    """The chosen experts' weights are scaled to sum to one (Mixtral: true; Qwen3-MoE: its norm_topk_prob)."""


@dataclass
class DataConfig:
    """Documents on disk and how they are packed into windows."""

    train: str = "???"
    """Prefix of the training set written by tools/preprocess_data.py (prefix.bin, prefix.idx, prefix.json).
    """
    seq_length: int = 1024
    """Tokens of one window, the documents' anchors included."""
    mode: str = "anchor"
    """Who sees whom, and at which position: full, document, document_reset or anchor."""
    anchor_token: int | None = None
    """Token id that leads every document; the data set's own where null (the tokenizer's BOS, else EOS)."""
    anchor_loss: bool = False
    """Let a document's anchor be trained to predict its first token."""
    num_workers: int = 2
    """Loader processes a rank; they pack windows and plan ahead of the training loop. 0: in the loop itself.
    """


@dataclass
class ParallelConfig:
    """How the ranks are divided. Data parallelism takes what the others leave."""

    tensor: int = 1
    """Tensor-parallel size."""
    pipeline: int = 1
    """Pipeline-parallel size."""
    context: int = 1
    """Context-parallel size: ranks that share each window."""
    expert: int = 1
    """Expert-parallel size (mixture-of-experts models)."""
    sequence: bool = False
    """Sequence parallelism: norms and dropouts are sharded over the tensor-parallel ranks too."""


@dataclass
class AttentionConfig:
    """How the plan is made and executed."""

    placement: str = "document"
    """Which rank holds which tokens: document (balanced, whole documents stay), zigzag or contiguous."""
    exchange: str = "sparse"
    """How keys and values of split documents travel: sparse (one all-to-all of only the needed rows)."""
    kernel: str = "auto"
    """Attention kernel; auto takes the fastest that runs here and says which."""


@dataclass
class OptimizerConfig:
    """AdamW, its schedule, and clipping."""

    lr: float = 2e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    decay: str = "constant"
    """After the warm-up: constant, linear or cosine down to min_lr at train.steps."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms and biases have none."""
    beta1: float = 0.9
    """Adam's first-moment decay."""
    beta2: float = 0.95
    """Adam's second-moment decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 for no clipping."""


@dataclass
class TrainConfig:
    """The loop."""

    steps: int = 100
    """Optimizer steps of the whole run, earlier ones resumed from included."""
    stop_after: int | None = None
    """Stop, with a checkpoint, after this step, though the schedule runs on to train.steps."""
    micro_batch_size: int = 1
    """Windows a model replica attends to at once (each with its own anchor)."""
    global_batch_size: int = 1
    """Windows an optimizer step."""
    precision: str = "bf16"
    """bf16 (weights and gradients' master copies in fp32) or fp32."""
    seed: int = 1234
    """Seed of the weights and of the documents' order."""
    recompute: str = "none"
    """Activations recomputed in the backward pass: none, selective (attention only) or full (every layer)."""
    distributed_timeout_minutes: float = 10.0
    """A collective that takes longer ends the job."""


@dataclass
class CheckpointConfig:
    """Where the run's state is kept."""

    directory: str | None = None
    """Folder of the run's checkpoints; the newest one there is resumed from. null: nothing is saved."""
    save_interval: int = 0
    """Steps between checkpoints; 0: only at the end."""
    pretrained: str | None = None
    """A checkpoint whose weights alone start a run that has none of its own yet."""


@dataclass
class LogConfig:
    """What is reported, and where."""

    interval: int = 1
    """Steps between reports."""
    jsonl: str | None = None
    """File to which every report is appended as one JSON line."""
    tensorboard: str | None = None
    """Folder of TensorBoard events."""
    wandb_project: str | None = None
    """Weights & Biases project (needs the wandb package)."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one rank, for the model-FLOPs utilisation; known GPUs' and, without a GPU, measured
    where null.
    """


@dataclass
class Config:
    """The whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The configuration in the YAML file `path` with dotted `overrides` ("train.steps=3") laid over it.

    Raises ValueError, naming the field, for what is unknown, of the wrong type, missing or cannot run
    together.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"configuration {path}: expected a YAML file, got none there")
    try:
        given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides or [])))
    except Exception as error:  # yaml's scanner and omegaconf each have a family of errors
        raise ValueError(f"configuration {path}: {error}") from error
    return _build(given, str(path))


def model_config(values: dict[str, Any]) -> ModelConfig:
    """A `ModelConfig` from a dictionary (as stored in a checkpoint), presets expanded, unknown keys refused."""
    return _build(OmegaConf.create({"model": values, "data": {"train": "-"}}), "model", check=False).model


def save_config(config: Config, path: str | Path) -> None:
    """Writes `config` as YAML that `load_config` reads back."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def _build(given: Any, source: str, *, check: bool = True) -> Config:
    try:
        preset = OmegaConf.select(given, "model.preset")
        if preset is not None:
            if preset not in MODEL_PRESETS:
                raise ValueError(
                    f"model.preset: got {preset!r}, expected one of {', '.join(sorted(MODEL_PRESETS))}"
                )
            given = OmegaConf.merge({"model": MODEL_PRESETS[preset]}, given)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), given))
    except OmegaConfBaseException as error:
        name = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ValueError(f"configuration {source}: {name}{str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    if check:
        _check(config)
    return config


def _check(config: Config) -> None:
    """Refuses what cannot run, naming the field; what needs the number of ranks is checked by
    `check_world_size`.
    """
    model, data, parallel = config.model, config.data, config.parallel
    choices = {
        "data.mode": (data.mode, MODES),
        "attention.placement": (config.attention.placement, PLACEMENTS),
        "attention.exchange": (config.attention.exchange, EXCHANGES),
        "optimizer.decay": (config.optimizer.decay, ("constant", "linear", "cosine")),
        "train.precision": (config.train.precision, ("bf16", "fp32")),
        "train.recompute": (config.train.recompute, ("none", "selective", "full")),
    }
    for name, (got, expected) in choices.items():
        if got not in expected:
            raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(expected)}")
    positive = {
        f"{section.name}.{entry.name}": getattr(getattr(config, section.name), entry.name)
        for section, names in ((section, _POSITIVE.get(section.name, ())) for section in fields(config))
        for entry in fields(getattr(config, section.name))
        if entry.name in names
    }
    for name, got in positive.items():
        if got is not None and got < 1:
            raise ValueError(f"{name}: got {got}, expected at least 1")
    _divides(
        "model.num_attention_heads",
        model.num_attention_heads,
        "model.num_query_groups",
        model.num_query_groups,
    )
    _divides("model.num_attention_heads", model.num_attention_heads, "parallel.tensor", parallel.tensor)
    if model.kv_channels is None:
        _divides(
            "model.hidden_size", model.hidden_size, "model.num_attention_heads", model.num_attention_heads
        )
    _divides("model.num_layers", model.num_layers, "parallel.pipeline", parallel.pipeline)
    _divides("model.ffn_hidden_size", model.ffn_hidden_size, "parallel.tensor", parallel.tensor)
    window = "data.seq_length"
    if config.attention.placement == "document":
        tokens, window = (
            data.seq_length * config.train.micro_batch_size,
            "data.seq_length * train.micro_batch_size",
        )
    else:
        tokens = data.seq_length
    _divides(window, tokens, "parallel.context", parallel.context)
    if parallel.sequence:
        rows = data.seq_length * config.train.micro_batch_size // parallel.context
        _divides("tokens a context-parallel rank", rows, "parallel.tensor", parallel.tensor)
    if parallel.expert > 1 and model.num_experts is None:
        raise ValueError(f"parallel.expert: got {parallel.expert} for a model without experts, expected 1")
    if model.num_experts is not None:
        _divides("model.num_experts", model.num_experts, "parallel.expert", parallel.expert)


_POSITIVE = {
    "model": ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
              "vocab_size", "make_vocab_size_divisible_by", "num_experts", "moe_topk"),
    "data": ("seq_length",),
    "parallel": ("tensor", "pipeline", "context", "expert"),
    "train": ("steps", "stop_after", "micro_batch_size", "global_batch_size"),
    "log": ("interval",),
}  # fmt: skip


def _divides(name: str, value: int, by: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name}: got {value}, expected a multiple of {by} = {divisor}")


def data_parallel_size(config: Config, world_size: int) -> int:
    """Model replicas among `world_size` ranks; ValueError where the sizes do not fit."""
    parallel = config.parallel
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % ranks:
        raise ValueError(
            f"world size: got {world_size} ranks, expected a multiple of parallel.tensor * parallel.pipeline * "
            f"parallel.context = {ranks}"
        )
    replicas = world_size // ranks
    _divides("train.global_batch_size", config.train.global_batch_size,
             "train.micro_batch_size * data-parallel size", config.train.micro_batch_size * replicas)  # fmt: skip
    return replicas


def describe() -> str:
    """Every field with its type, default and documentation, as text."""
    lines = []
    for section in fields(Config):
        cls = section.default_factory  # type: ignore[misc]
        lines += [f"{section.name}: {inspect.getdoc(cls)}"]
        documentation = _field_documentation(cls)
        defaults = cls()
        for entry in fields(cls):
            default = getattr(defaults, entry.name)
            shown = "required" if default == "???" else "null" if default is None else default
            head = f"  {section.name}.{entry.name} ({shown})"
            lines += [head, textwrap.fill(documentation[entry.name], 110, initial_indent="      ",
                                          subsequent_indent="      ")]  # fmt: skip
    return "\n".join(lines)


def _field_documentation(cls: Any) -> dict[str, str]:
    """The string literal below each field of a dataclass, by field name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for entry, below in zip(body, body[1:], strict=False):
        if isinstance(entry, ast.AnnAssign) and isinstance(below, ast.Expr):
            found[entry.target.id] = " ".join(below.value.value.split())  # type: ignore[union-attr,attr-defined]
    return found

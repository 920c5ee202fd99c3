"""The fields of a run's configuration. The string under a field is its documentation: `--help` prints it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "AttentionConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "TrainConfig",
]


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
    """Theta of the rotary embedding; the paper takes 1e6, 5e6, 1e7 for contexts of 16K, 64K, 128K."""
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

    train: Any = "???"
    """Prefix of the training set that tools/preprocess_data.py wrote (prefix.bin, .idx and .json), or a list
    of {prefix: ..., weight: ...}: data sets blended in every window, at these shares of the tokens."""
    split: list[float] = field(default_factory=lambda: [1.0, 0.0, 0.0])
    """Shares of the documents for training, validation (train.eval_interval) and a test after the last step.
    A document's split is the same in every run."""
    sampler: str = "plain"
    """Which documents an epoch takes: plain (each once) or upsample_long (long ones more often, each source's
    share of the tokens as before)."""
    long_tokens: int = 4096
    """upsample_long: documents of more tokens than this are long."""
    long_weight: float = 5.0
    """upsample_long: how many times as often a long document comes as a shorter one of its source."""
    seq_length: int = 1024
    """Tokens of one window, the documents' anchors included."""
    mode: str = "anchor"
    """Who sees whom, and at which position: full, document, document_reset or anchor."""
    anchor_token: int | None = None
    """Token id that leads every document; the data set's own where null (the tokenizer's BOS, else EOS)."""
    anchor_loss: bool = False
    """Let a document's anchor (its tag's end, where there are tags) be trained to predict its first token."""
    end_label: str = "masked"
    """What a document's last token is trained to predict: masked (nothing; right where documents were stored
    with their end-of-text token) or eos (eos_token, which is a label alone and takes no room)."""
    eos_token: int | None = None
    """Token id of end_label eos; the EOS of the data set's tokenizer where null."""
    domain_tag: bool = False
    """Begin each document, and what follows where a window cut one, with the name of its source behind the
    anchor; nothing is trained on it."""
    interleave: int = 0
    """Cut documents at random places into chunks of this many tokens on average and shuffle the chunks in the
    window; a document's own stay in order, attention stays inside documents. 0: documents stay whole."""
    min_document_tokens: int = 0
    """Documents of fewer tokens are short."""
    short_documents: str = "drop"
    """What becomes of short documents: drop or join (with others of their source, behind one anchor)."""
    max_documents: int | None = None
    """Most documents of a window, joined ones counting as one; the rest is padding. null: as many as fit."""
    packing: str = "plain"
    """How documents fill windows: plain (end to end), best_fit (fewer are cut) or balanced (windows of a
    global batch have near-equal attention areas)."""
    shuffle_windows: bool = True
    """plain: train on an epoch's windows in random order, so that a document of many windows does not fill
    whole batches; false: in the documents' order. The other packings mix their lookahead alone."""
    packing_lookahead: int = 8
    """best_fit, balanced: global batches whose documents are rearranged together."""
    num_workers: int = 2
    """Loader processes a rank, which pack and plan ahead of the training loop; 0: in the loop itself."""


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
    """How keys and values of split documents travel: direct (one all-to-all of only the needed rows), sparse
    (the same, or where the cost model finds it quicker in two steps and some heads after others), ring (as
    sparse in windows where they fit into a round; else in rounds, whose results are merged in fp32) or
    ulysses (not at all: an all-to-all gives each rank whole documents for its share of the query heads).
    """
    ring_rows: int = 16384
    """ring: most rows a rank receives at once. A row is a token's keys and values of one layer, 4 KiB with 8
    heads of 128 in bf16. Those of two rounds and a gathered copy are held at a time; without rounds each
    layer keeps what it received for the backward pass, as sparse does.
    """
    ranks_per_node: int | None = None
    """Neighbouring context-parallel ranks of one node, in which split documents stay; null: all in one. What
    sparse must send to another node crosses to it once, and is handed on there, where that is quicker.
    """
    calibration: str | None = None
    """JSON of `tools/profile_cp.py --measure`, by whose rates documents are placed; null: an H200's."""
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
    fp8: str | None = None
    """FP8 products in the layers' linear maps: hybrid (E4M3 forward, E5M2 backward), e4m3, or null for none.
    Needs TransformerEngine and precision bf16; attention and loss stay in bf16."""
    fp8_recipe: str = "delayed"
    """How FP8 tensors are scaled: delayed (from the steps before), tensorwise (now) or blockwise."""
    eval_interval: int = 0
    """Steps between validation losses over the documents of data.split's second share; 0: none."""
    eval_steps: int = 8
    """Global batches of a validation or test loss; the same windows each time."""
    seed: int = 1234
    """Seed of the weights and of the documents' order."""
    recompute: str = "none"
    """Activations recomputed in the backward pass: none, selective (attention only) or full (every layer)."""
    distributed_timeout_minutes: float = 10.0
    """A collective that takes longer, or a step that does, ends the job, naming the ranks that are behind."""
    max_minutes: float | None = None
    """Stop, with a checkpoint, after the step in which this much time since the start is over."""
    max_bad_steps: int = 3
    """So many steps in a row whose loss or gradient is not finite (each is skipped) end the run."""
    spike_factor: float | None = None
    """A loss over this many times the median of the last spike_window steps' is a spike: the run rewinds to a
    checkpoint and goes on with the global batch behind the spike's, skipping those between. null: none is."""
    spike_window: int = 64
    """Steps whose median loss a spike is judged by; the first so many steps are none."""
    rewind_steps: int = 1
    """A spike rewinds to the newest good checkpoint at least this many steps before it."""
    max_rewinds: int = 3
    """Rewinds of a whole run; a spike after so many ends it."""


@dataclass
class CheckpointConfig:
    """Where the run's state is kept."""

    directory: str | None = None
    """Folder of the run's checkpoints; the newest one there is resumed from. null: nothing is saved."""
    save_interval: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int | None = None
    """Good checkpoints to keep, the newest; older ones are deleted. null: all."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides are kept as well."""
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
    prometheus: str | None = None
    """File that every report replaces, named *.prom, in Prometheus' text format for the node exporter's
    textfile collector (needs the prometheus_client package)."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one rank, for the model-FLOPs utilisation; known GPUs' and, without a GPU, measured
    where null."""
    precision_interval: int = 0
    """Steps between looks at attention: anchor share, largest logit, shift difference (docs/precision.md); 0:
    none."""
    precision_layers: list[int] | None = None
    """Layers looked at, counted from 0; the first, the middle and the last where null."""


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

"""A run's configuration: one dataclass a section, from YAML and dotted overrides, checked on load.

    config = load_config("examples/tiny.yaml", ["parallel.context=2", "train.steps=3"])

`model.preset: llama-3-8b` fills every model field that the YAML leaves out; fields given beside it win. A key
that does not exist, a value of the wrong type and a combination that cannot run are each a `ValueError` that
names the field, before anything is started.
"""

from anchor_megatron.config.checks import check_config, data_parallel_size
from anchor_megatron.config.data_sets import data_sets
from anchor_megatron.config.describe import describe
from anchor_megatron.config.fields import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from anchor_megatron.config.files import data_config, load_config, model_config, read_sections, save_config

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
    "check_config",
    "data_config",
    "data_parallel_size",
    "data_sets",
    "describe",
    "load_config",
    "model_config",
    "read_sections",
    "save_config",
]

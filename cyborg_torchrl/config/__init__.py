"""Configuration: dataclasses have the defaults, YAML files list differences, wrong input ends in one clear line."""

from cyborg_torchrl.config.checks import ConfigError, resolve_device, validate
from cyborg_torchrl.config.composition import (
    DEFAULT_CONFIG,
    choices,
    drop_removed_keys,
    explained,
    flat_options,
    load_config,
    primary_config,
)
from cyborg_torchrl.config.schema import TrainConfig

__all__ = [
    "DEFAULT_CONFIG",
    "ConfigError",
    "TrainConfig",
    "choices",
    "drop_removed_keys",
    "explained",
    "flat_options",
    "load_config",
    "primary_config",
    "resolve_device",
    "validate",
]

"""Configuration: dataclasses own the defaults, YAML lists differences, wrong input ends in one clear line."""

from cyborg_torchrl.config.checks import ConfigError, resolve_device, validate
from cyborg_torchrl.config.composition import DEFAULT_CONFIG, choices, explained, load_config, primary_config
from cyborg_torchrl.config.schema import BACKENDS, TrainConfig

__all__ = [
    "BACKENDS",
    "DEFAULT_CONFIG",
    "ConfigError",
    "TrainConfig",
    "choices",
    "explained",
    "load_config",
    "primary_config",
    "resolve_device",
    "validate",
]

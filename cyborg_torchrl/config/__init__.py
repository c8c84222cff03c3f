"""Configuration: dataclasses have the defaults, YAML files list differences, wrong input ends in one clear line."""

from cyborg_torchrl.config.checks import ConfigError, resolve_device
from cyborg_torchrl.config.composition import DEFAULT_CONFIG, load_config
from cyborg_torchrl.config.schema import TrainConfig

__all__ = ["DEFAULT_CONFIG", "ConfigError", "TrainConfig", "load_config", "resolve_device"]

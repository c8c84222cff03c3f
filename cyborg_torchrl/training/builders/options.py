"""Options of registered builders."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf


def options_in(node: DictConfig) -> dict[str, Any]:
    """The keyword arguments of a registered builder."""
    return {str(key): value for key, value in OmegaConf.to_container(node).items() if key != "name"}

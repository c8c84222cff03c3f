"""Parts of an agent, selected by patterns of their names."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn


def select(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """Return the names that belong to parts: "encoder" selects "encoder" and all names that begin with "encoder.".

    Args:
        names: dotted names, as in a state dict.
        patterns: names of parts, which may contain `*`, `?` and `[...]` as in file names.

    Raises:
        ValueError: if a pattern selects nothing. The message lists the known parts.
    """
    names = list(names)
    selected: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not found:
            raise ValueError(f"there is no part '{pattern}'; known: {', '.join(parts_of(names))}.")
        selected |= found
    return selected


def parts_of(names: Iterable[str]) -> list[str]:
    """Return the first components of dotted names, without repetitions."""
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def freeze(agent: nn.Module, patterns: Iterable[str]) -> None:
    """Exclude the parameters of parts from training.

    Raises:
        ValueError: if a pattern selects no parameter, or no parameter is left.
    """
    parameters = dict(agent.named_parameters())
    for name in select(parameters, patterns):
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError("all parameters are frozen, so there is nothing to train; freeze fewer parts.")

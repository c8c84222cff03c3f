"""What went wrong in composing a configuration, in one line with the nearest right key or value."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from cyborg_torchrl.registry import did_you_mean


def explain(
    error: Exception,
    overrides: Sequence[str],
    choices: Callable[[str], Sequence[str]],
    recompose: Callable[[Sequence[str]], DictConfig],
) -> str:
    """Turns an error of Hydra or OmegaConf into one line.

    Args:
        error: what was raised.
        overrides: what the user gave.
        choices: from the name of a group to the names that it knows.
        recompose: composes a configuration with other overrides, to see which keys there are.
    """
    text = " ".join(str(error).split())
    cause = " ".join(str(error.__cause__ or "").split())
    choice = re.search(r"Could not find '([\w./-]+)/([\w.-]+)'", text)
    if choice:
        group, name = choice.groups()
        listed = re.search(r"Available options in '[^']*': (.*?)(?: Config search path|$)", text)
        return (
            f"unknown {group} '{name}': {did_you_mean(name, choices(group) or (listed[1].split() if listed else ()))}"
        )
    unknown = re.search(r"Could not override '([\w.@]+)'", text) or re.search(r"Key '([\w.]+)' (?:is )?not in", text)
    if unknown:
        keys_given = (override.split("=")[0].lstrip("+~") for override in overrides)
        named = re.search(r"full_key: ([\w.]+)", text)
        full = next((key for key in keys_given if key.endswith(unknown[1])), named[1] if named else unknown[1])
        groups = [override for override in overrides if override.split("=")[0] in ("backbone", "memory", "env")]
        return f"unknown key '{full}': {did_you_mean(full, _sibling_keys(full, recompose(groups)))}"
    bad_value = re.search(r"Error merging override (\S*)", text)
    if bad_value:
        return f"impossible value in '{bad_value[1]}': {cause.split(' full_key:')[0] or 'wrong type'}"
    bad_override = re.search(r"Error parsing override '([^']*)'", text)
    if bad_override or not text.startswith(("In '", "Could not")):
        given = bad_override[1] if bad_override else " ".join(overrides)
        return f"cannot read '{given}': overrides look like key=value ({text})"
    return text


def _sibling_keys(full: str, cfg: DictConfig) -> list[str]:
    """The keys that stand where a mistyped one was given; top-level keys if even its parent does not exist."""
    parent, _, _ = full.rpartition(".")
    nearest = difflib.get_close_matches(parent, [str(key) for key in cfg], n=1)
    node = cfg[nearest[0]] if nearest else cfg
    prefix = f"{nearest[0]}." if nearest else ""
    return [f"{prefix}{key}" for key in node]

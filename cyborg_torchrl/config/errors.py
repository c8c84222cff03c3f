"""Errors of Hydra and OmegaConf as one line, with the nearest correct key or value."""

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
    """Return an error of Hydra or OmegaConf as one line.

    Args:
        error: the error.
        overrides: the user's overrides.
        choices: from the name of a group to its choices.
        recompose: composes a configuration with other overrides, to find out which keys exist.
    """
    text = " ".join(str(error).split())
    choice = re.search(r"Could not find '([\w./-]+)/([\w.-]+)'", text)
    if choice:
        group, name = choice.groups()
        listed = re.search(r"Available options in '[^']*': (.*?)(?: Config search path|$)", text)
        known = choices(group) or (listed[1].split() if listed else ())
        return f"unknown {group} '{name}': {did_you_mean(name, known)}"
    unknown = re.search(r"Could not override '([\w.@]+)'", text) or re.search(r"Key '([\w.]+)' (?:is )?not in", text)
    if unknown:
        key = _full_key(unknown[1], text, overrides)
        groups = [override for override in overrides if override.split("=")[0] in ("backbone", "memory", "env")]
        return f"unknown key '{key}': {did_you_mean(key, _sibling_keys(key, recompose(groups)))}"
    bad_value = re.search(r"Error merging override (\S*)", text)
    if bad_value:
        cause = " ".join(str(error.__cause__ or "").split())
        return f"impossible value in '{bad_value[1]}': {cause.split(' full_key:')[0] or 'wrong type'}"
    bad_override = re.search(r"Error parsing override '([^']*)'", text)
    if bad_override or not text.startswith(("In '", "Could not")):
        override = bad_override[1] if bad_override else " ".join(overrides)
        return f"cannot read '{override}': overrides look like key=value ({text})"
    return text


def _full_key(key: str, text: str, overrides: Sequence[str]) -> str:
    """Return the full form of an unknown key: from the overrides, from the error's text, or the key itself."""
    for override in overrides:
        full = override.split("=")[0].lstrip("+~")
        if full.endswith(key):
            return full
    named = re.search(r"full_key: ([\w.]+)", text)
    return named[1] if named else key


def _sibling_keys(full: str, cfg: DictConfig) -> list[str]:
    """Return the keys next to a mistyped one; the top-level keys if its parent does not exist either."""
    parent, _, _ = full.rpartition(".")
    nearest = difflib.get_close_matches(parent, [str(key) for key in cfg], n=1)
    node = cfg[nearest[0]] if nearest else cfg
    prefix = f"{nearest[0]}." if nearest else ""
    return [f"{prefix}{key}" for key in node]

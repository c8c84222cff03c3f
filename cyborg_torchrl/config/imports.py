"""Modules that register environments and backbones: named in a configuration, imported wherever it is used."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cyborg_torchrl.config.checks import ConfigError

KEY = "imports"
_imported: dict[str, ModuleType] = {}
"""The modules that were imported here, by their names."""


def import_components(targets: Iterable[str]) -> list[ModuleType]:
    """Import modules, so that their environments and backbones are registered. Return them.

    The module's folder becomes part of `sys.path`, as when Python runs a script. So the processes that this one starts
    find the module too.

    Args:
        targets: names of modules, or paths of files that end in .py. A path that no longer exists is ignored if another
            one has the same name: a run's module was moved.

    Raises:
        ConfigError: if one cannot be imported.
    """
    return [_import(target) for target in sorted(targets, key=_is_missing)]


def _import(target: str) -> ModuleType:
    path = Path(target)
    name = path.stem if _is_file(target) else target
    if _is_missing(target) and name not in _imported:
        raise ConfigError(f"there is no file '{target}' to import; if it was moved: --import NEW_PATH.")
    if name not in _imported:
        main: Any = sys.modules["__main__"]
        is_main = _is_file(target) and _is_at(path, main)  # a script that uses a run which imports it
        _imported[name] = main if is_main else _import_from(target, name)
    if _is_file(target) and not _is_missing(target) and not _is_at(path, _imported[name]):
        raise ConfigError(f"cannot import '{target}': another module is called '{name}'; rename the file.")
    return _imported[name]


def _import_from(target: str, name: str) -> ModuleType:
    folder = str(Path(target).resolve().parent) if _is_file(target) else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except Exception as error:  # a module can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"cannot import '{target}' ({reason}); name a module or a .py file.") from error


def as_overrides(targets: Sequence[str]) -> list[str]:
    """Return the override that records modules in a configuration; none without modules."""
    quoted = ", ".join(json.dumps(target, ensure_ascii=False) for target in targets)
    return [f"{KEY}=[{quoted}]"] if targets else []


def split_imports(content: DictConfig | None, overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the modules that a configuration file and overrides name, with whole paths, and the other overrides."""
    contents = [] if content is None else [content]
    others: list[str] = []
    for override in overrides:
        if override.startswith(f"{KEY}="):
            contents.append(OmegaConf.from_dotlist([override]))
        else:
            others.append(override)
    named: list[str] = []
    for each in contents:
        names = each.get(KEY)
        named += [names] if isinstance(names, str) else [str(name) for name in names or ()]
    return list(dict.fromkeys(str(Path(name).resolve()) if _is_file(name) else name for name in named)), others


def _is_file(target: str) -> bool:
    return target.endswith(".py")


def _is_missing(target: str) -> bool:
    return _is_file(target) and not Path(target).is_file()


def _is_at(path: Path, module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path.resolve()

"""Compose configurations: the schema has the defaults, YAML files and overrides change them."""

from __future__ import annotations

import functools
import importlib
import logging
import re
import tempfile
import textwrap
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cyborg_torchrl.config.checks import ConfigError, validate
from cyborg_torchrl.config.imports import as_overrides, import_components, split_imports
from cyborg_torchrl.config.presets import is_memory_task
from cyborg_torchrl.config.schema import GROUPS, NODES, REMOVED_KEYS, SHORT_KEYS, Config, config_class_of
from cyborg_torchrl.registry import did_you_mean, listed, nearest

LOGGER = logging.getLogger(__name__)
DEFAULT_CONFIG = "memory_delayed_cue_recurrent"
LISTING = "cyborg-torchrl train --help"
"""The command that lists all choices and keys."""


def config_dir() -> Path:
    """Return the folder of the shipped YAML files: inside an installed wheel, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def load_config(config: str = DEFAULT_CONFIG, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose and check a configuration.

    The Hydra of the calling program stays as it is.

    Args:
        config: name of a shipped configuration, or path of a YAML file. A file without a `defaults` list only needs the
            keys that it changes. A file with such a list is a complete Hydra configuration, which can use the shipped
            groups.
        overrides: Hydra overrides, such as "backbone=gru" or "env.horizon=200". "id=..." is short for "env.id=...".
            The modules in `imports=[...]` and in the file's `imports` are imported first.

    Raises:
        ConfigError: if it cannot be used; one line with the mistake and a correct value.
    """
    try:
        with primary_config(config, overrides) as primary:
            cfg = _compose(primary.folder, primary.name, primary.overrides)
            OmegaConf.resolve(cfg)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explained(error, config, overrides) from None
    validate(cfg)
    return cfg


class Primary(NamedTuple):
    """The input from which Hydra composes a configuration."""

    folder: Path
    name: str
    """Name of the primary configuration, a file in the folder."""
    overrides: list[str]


@contextmanager
def primary_config(config: str, overrides: Sequence[str]) -> Generator[Primary]:
    """Prepare the input of Hydra for a configuration. It may be a temporary file, which the context removes.

    Raises:
        ConfigError: if there is no such configuration, or it cannot be read.
    """
    folder, name = _locate(config)
    is_shipped = folder == config_dir()
    content = None if is_shipped else _read_file(Path(config))
    imports, overrides = split_imports(content, map(_written_out, overrides))
    import_components(imports)  # before the nodes are stored, so that there are some of its components
    overrides += as_overrides(imports)
    _store_nodes()
    if name == DEFAULT_CONFIG or not is_shipped:
        overrides = [*_default_backbone(content, overrides), *overrides]
    if content is None:
        yield Primary(folder, name, overrides)
        return
    with tempfile.TemporaryDirectory() as scratch:
        complete = _lay_over_default(content, overrides)
        if complete is not None:
            folder, name = Path(scratch), "config"
            OmegaConf.save(complete, folder / "config.yaml")
        yield Primary(folder, name, [*overrides, f"hydra.searchpath=[file://{config_dir()}]"])


def explained(error: Exception, config: str, overrides: Sequence[str]) -> ConfigError:
    """Return an error of Hydra or OmegaConf as a ConfigError: one line, with the nearest correct key or value."""
    overrides = [_written_out(override) for override in overrides]
    text = " ".join(str(error).split())
    choice = re.search(r"Could not find '([\w./-]+)/([\w.-]+)'", text)
    if choice:
        group, name = choice.groups()
        listed = re.search(r"Available options in '[^']*': (.*?)(?: Config search path|$)", text)
        known = choices(group) or (listed[1].split() if listed else ())
        return ConfigError(f"unknown {group} '{name}': {did_you_mean(name, known, LISTING)}")
    unknown = re.search(r"Could not override '([\w.@]+)'", text) or re.search(r"Key '([\w.]+)' (?:is )?not in", text)
    if unknown:
        key = _full_key(unknown[1], text, overrides)
        folder, name = _locate(config)
        groups = [override for override in overrides if override.split("=")[0] in GROUPS]
        cfg = _compose(config_dir(), name if folder == config_dir() else DEFAULT_CONFIG, groups)
        return ConfigError(f"unknown key '{key}': {_key_hint(key, cfg)}")
    bad_value = re.search(r"Error merging override (\S*)", text)
    if bad_value:
        cause = " ".join(str(error.__cause__ or "").split())
        return ConfigError(f"impossible value in '{bad_value[1]}': {cause.split(' full_key:')[0] or 'wrong type'}")
    bad_override = re.search(r"Error parsing override '([^']*)'", text)
    if bad_override or not text.startswith(("In '", "Could not")):
        override = bad_override[1] if bad_override else " ".join(overrides)
        return ConfigError(f"cannot read '{override}': overrides look like key=value ({text})")
    return ConfigError(text)


def _full_key(key: str, text: str, overrides: Sequence[str]) -> str:
    """Return the full form of an unknown key: from the overrides, from the error's text, or the key itself."""
    for override in overrides:
        full = override.split("=")[0].lstrip("+~")
        if full.endswith(key):
            return full
    named = re.search(r"full_key: ([\w.]+)", text)
    return named[1] if named else key


def _key_hint(full: str, cfg: DictConfig) -> str:
    """Return a hint for a mistyped key: a key of its group, or of any group if the group does not exist either."""
    group, _, name = full.rpartition(".")
    groups = [str(key) for key in cfg]
    owner = nearest(group.partition(".")[0], groups) if group else None
    owners = groups if owner is None else [owner]
    options = {str(key): f"{owner}.{key}" for owner in owners for key in cfg[owner]}
    if owner is None:
        options |= {key: key for key in (*groups, *SHORT_KEYS)}
    near = nearest(name, options)
    if near is not None:
        return f"did you mean '{options[near]}'?"
    return listed(groups if owner is None else options.values(), LISTING)


def _written_out(override: str) -> str:
    key, equals, value = override.partition("=")
    return f"{SHORT_KEYS.get(key, key)}{equals}{value}"


def drop_removed_keys(content: DictConfig) -> DictConfig:
    """Replace the options of older versions in the configuration of a run, with a warning in one line."""
    changes: list[str] = []
    for group, key in REMOVED_KEYS:
        options: Any = content.get(group)
        if isinstance(options, DictConfig) and key in options:
            del options[key]
            changes.append(f"{group}.{key} is ignored")
    collector: Any = content.get("collector")
    if isinstance(collector, DictConfig) and collector.get("name") == "overlapped":
        collector.name = "rollout"
        changes.append("collector=rollout replaces collector=overlapped")
    if changes:
        _warn_once(f"a configuration of an older version: {', '.join(changes)}")
    return content


@functools.cache
def _warn_once(message: str) -> None:
    LOGGER.warning(message)


def flat_options(cfg: DictConfig) -> dict[str, Any]:
    """Return all options as one dictionary with dotted keys, such as "train.seed"."""

    def leaves(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
        if not isinstance(node, dict) or (prefix and not node):
            yield prefix, node
            return
        for key, value in node.items():
            yield from leaves(f"{prefix}.{key}" if prefix else str(key), value)

    return dict(leaves("", OmegaConf.to_container(cfg)))


def _read_file(path: Path) -> DictConfig:
    """Return the content of a configuration file.

    Raises:
        ConfigError: if it cannot be read as a mapping.
    """
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"cannot read '{path}': {' '.join(str(error).split())}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"'{path}' must hold keys and values, such as 'train: {{seed: 1}}'.")
    return content


def _lay_over_default(content: DictConfig, overrides: Sequence[str]) -> DictConfig | None:
    """Return the configuration of a file without a `defaults` list; None for a file with such a list."""
    if "defaults" in content:
        return None
    content = drop_removed_keys(content)
    for short, key in SHORT_KEYS.items():
        if isinstance(content.get(short), str):
            OmegaConf.update(content, key, content.pop(short), force_add=True)
    defaults: list[Any] = [DEFAULT_CONFIG]
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.get_key_element() in (*GROUPS, *NODES) and override.get_key_element() in content:
            _yield_to(override, content)
    for group in (*GROUPS, *NODES):
        chosen: Any = content.get(group)
        name = chosen.get("name") if group in GROUPS and isinstance(chosen, DictConfig) else chosen
        if isinstance(name, str):
            defaults.append({f"override /{group}": name})
            if isinstance(chosen, str):
                content.pop(group)
    return OmegaConf.merge({"defaults": [*defaults, "_self_"]}, content)  # pyright: ignore[reportReturnType]


def _default_backbone(content: DictConfig | None, overrides: Sequence[str]) -> list[str]:
    """Return the override that makes `gru` the backbone of a task that is no memory task, if none is chosen."""
    file = content or OmegaConf.create({})
    parsed = {each.get_key_element(): each.value() for each in OverridesParser.create().parse_overrides([*overrides])}
    if "defaults" in file or "backbone" in file or "backbone" in parsed:
        return []
    env: Any = parsed.get("env", file.get("env"))
    name = env.get("name") if isinstance(env, DictConfig) else env
    return ["backbone=gru"] if isinstance(name, str) and not is_memory_task(name) else []


def _yield_to(override: Override, content: DictConfig) -> None:
    """Remove from a file what a choice on the command line replaces, such as `train=none` or `backbone=gru`.

    The choices of `train`, `collector` and `logger` share their options, so a choice replaces only the keys that it
    sets. A block that names another backbone, memory or environment is replaced as a whole.
    """
    group, block = override.get_key_element(), content[override.get_key_element()]
    is_sweep = override.is_sweep_override()
    chosen = list(override.sweep_string_iterator()) if is_sweep else [str(override.value())]
    if not isinstance(block, DictConfig):  # the name of another choice
        content.pop(group)
    elif group in NODES:
        for key in _keys_of(group, chosen):
            if key != "seq_len" or block.get(key) is None:  # that of tbptt is only there because it must have one
                block.pop(key, None)
    elif block.get("name") is not None and chosen != [block.name]:
        lost = ", ".join(str(key) for key in block if key != "name")
        if lost:
            _warn_once(f"{override.input_line} replaces all of '{group}' in the file: {textwrap.shorten(lost, 100)}")
        content.pop(group)


def _keys_of(group: str, chosen: Sequence[str]) -> set[str]:
    """Return the keys that the shipped files of some choices set."""
    files = [config_dir() / group / f"{name}.yaml" for name in chosen]
    return {str(key) for file in files if file.is_file() for key in yaml.safe_load(file.read_text())} - {"defaults"}


def _store_nodes() -> None:
    for package in ("cores", "envs"):  # their import registers the shipped components
        importlib.import_module(f"cyborg_torchrl.{package}")
    store = ConfigStore.instance()
    store.store(name="config_schema", node=Config)
    for group, node in NODES.items():
        store.store(group=group, name=f"{group}_schema", node=node)
    for group in ("train", "logger"):
        store.store(group=group, name="default", node=NODES[group])
    for group, registry in GROUPS.items():
        for name in registry.names():
            try:
                node = config_class_of(name, registry.get(name))
            except Exception as error:  # a broken package must not disable the other components
                LOGGER.warning("%s '%s' cannot be used: %s: %s", group, name, type(error).__name__, error)
                continue
            has_file = (config_dir() / group / f"{name}.yaml").is_file()
            store.store(group=group, name=f"{name}_schema" if has_file else name, node=node)


def _locate(config: str) -> tuple[Path, str]:
    path = Path(config)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"no configuration file '{config}'; shipped: {', '.join(_shipped())}.")
        return path.resolve().parent, path.stem
    if config not in _shipped():
        raise ConfigError(f"no configuration '{config}': {did_you_mean(config, _shipped())}")
    return config_dir(), config


def _shipped() -> list[str]:
    return sorted(path.stem for path in config_dir().glob("*.yaml"))


def choices(group: str) -> list[str]:
    """Return the names that a group knows, such as "backbone"; [] for a group without choices."""
    _store_nodes()
    files = {path.stem for path in (config_dir() / group).glob("*.yaml")}
    nodes = {name.removesuffix(".yaml") for name in ConfigStore.instance().repo.get(group, ())}
    return sorted(name for name in files | nodes if not name.endswith("_schema"))


def _compose(folder: Path, name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose with a Hydra for this call only, and restore the Hydra of the calling program."""
    hydra_of_caller = GlobalHydra.instance().hydra
    version_of_caller = VersionBase.instance().version_base
    job_name = JobRuntime.instance().get("name")  # initialising changes it
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), job_name, version_base="1.3"):
            return compose(name, list(overrides))
    finally:
        GlobalHydra.instance().hydra = hydra_of_caller
        VersionBase.instance().version_base = version_of_caller

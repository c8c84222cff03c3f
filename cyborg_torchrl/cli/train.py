"""Train one agent; Hydra composes its configuration.

    cyborg-torchrl train backbone=gru env.horizon=200
    cyborg-torchrl train --config mine.yaml train.seed=3 resume=auto
    torchrun --nproc-per-node 2 -m cyborg_torchrl train env.num_envs=128     # two processes train together

The last line of stdout is the summary as one JSON object.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import hydra
from hydra.conf import HydraConf, RunDir, SweepDir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import env_override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cyborg_torchrl.config.composition import DEFAULT_CONFIG, choices, explained, load_config, primary_config
from cyborg_torchrl.config.schema import GROUPS, NODES
from cyborg_torchrl.training.command import CommandParser, UsageError, config_parser, run_command

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def main(argv: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    parser = hydra_parser("train", __doc__, argv)
    parser.add_argument("--cfg", choices=("job", "hydra", "all"), help="print the configuration, as Hydra does")
    parser.add_argument("--info", choices=INFO, help="print what Hydra knows, for debugging")
    arguments = parser.parse(argv)
    for override in parse_overrides(arguments.config, arguments.overrides):
        if override.is_sweep_override():
            raise UsageError(f"'{override.input_line}' has several values: cyborg-torchrl sweep runs all of them")
    if arguments.cfg or arguments.info:
        flags = [f"--cfg={arguments.cfg}" if arguments.cfg else f"--info={arguments.info}"]
        run_hydra(lambda cfg: None, arguments.config, arguments.overrides, flags)
        return 0
    return run_command(arguments.config, arguments.overrides, is_print_only=arguments.print_config)


def hydra_parser(command: str, description: str | None, argv: Sequence[str]) -> CommandParser:
    """Return the parser of a Hydra application. Its --help lists all choices and keys."""
    parser = config_parser(description, DEFAULT_CONFIG, prog=f"cyborg-torchrl {command}")
    if "-h" in argv or "--help" in argv:
        parser.epilog = f"{parser.epilog}\n\n{_choices_and_keys()}"
    return parser


def parse_overrides(config: str, overrides: Sequence[str]) -> list[Override]:
    """Return Hydra's reading of overrides.

    Raises:
        ConfigError: if one cannot be read.
    """
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise explained(error, config, overrides) from None


def run_hydra(
    job: Callable[[DictConfig], object],
    config: str,
    overrides: Sequence[str],
    flags: Sequence[str] = (),
    folder: str = ".",
) -> None:
    """Run a function as a Hydra application.

    Args:
        job: called with each composed configuration.
        config: a shipped configuration, or a YAML file.
        overrides: changes to the configuration, or to Hydra's own.
        flags: Hydra's command-line options.
        folder: where a sweep puts its runs.

    Raises:
        ConfigError: if a configuration cannot be composed.
    """
    try:
        with primary_config(config, overrides) as primary, _command_line([*flags, *primary.overrides]):
            _store_hydra_config(folder)
            GlobalHydra.instance().clear()
            hydra.main(config_path=str(primary.folder), config_name=primary.name, version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise explained(error, config, overrides) from None


def _store_hydra_config(folder: str) -> None:
    """Configure Hydra itself: no logs and no folders besides those of runs."""
    node = HydraConf(run=RunDir("."), sweep=SweepDir(folder, "."), output_subdir=None)
    silent = {"hydra_logging": "none", "job_logging": "none"}
    node.defaults = [{group: silent.get(group, option)} for entry in node.defaults for group, option in entry.items()]
    ConfigStore.instance().store(group="hydra", name="config", node=node, provider="cyborg_torchrl")


@contextmanager
def _command_line(arguments: list[str]) -> Generator[None]:
    """Let Hydra read these arguments, and raise its errors instead of printing them."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        with env_override({"HYDRA_FULL_ERROR": "1"}):
            yield
    finally:
        sys.argv = before


def _choices_and_keys() -> str:
    defaults = OmegaConf.to_yaml(load_config())
    groups = {group: ", ".join(choices(group)) for group in (*GROUPS, *NODES)}
    lines = [f"{group}: {names}" for group, names in groups.items() if names]
    return "\n".join(["choices:", *lines, "", "keys and their defaults:", defaults])

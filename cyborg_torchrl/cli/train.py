r"""Trains by Hydra: one run, or with -m a sweep of runs over all combinations of the values given.

python -m cyborg_torchrl.train backbone=gru env.horizon=200
python -m cyborg_torchrl.train -m backbone=gru,lru 'train.seed=range(3)'
python -m cyborg_torchrl.train -m backbone=gru,lru 'train.seed=range(3)' hydra/launcher=joblib hydra.launcher.n_jobs=2

--config takes a shipped configuration or a YAML file, as in the examples. docs/sweeps.md has more.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Generator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import hydra
from hydra.conf import HelpConf, HydraConf, RunDir, SweepDir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.core.utils import env_override
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from cyborg_torchrl.cli import EXIT_INTERRUPTED, report_error, unless_unread
from cyborg_torchrl.config import DEFAULT_CONFIG, ConfigError, explained, load_config, primary_config
from cyborg_torchrl.jobs import EXIT_FAILED, run_job
from cyborg_torchrl.registry import UnavailableError

OWN_CONFIG_FLAGS = ("--config-name", "-cn", "--config-dir", "-cd", "--config-path", "-cp")
GO_ON = "the same command with the folder of the sweep as hydra.sweep.dir goes on with it"
HELP = """${hydra.help.header}

Configuration groups (group=option):

$APP_CONFIG_GROUPS
Everything in the configuration can be overridden (key=value):

$CONFIG
-m, --multirun: run all combinations of what has several values; hydra.sweep.dir=FOLDER: where.
--cfg job: print the configuration and exit. --hydra-help: Hydra's own options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, 1 if a run of a sweep failed, 2 for bad input, 130 if interrupted."""
    return unless_unread(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    try:
        _run(argv)
    except (ConfigError, UnavailableError) as error:
        return report_error(error)
    except BrokenProcessPool:
        print(f"error: a process of the sweep was killed (out of memory?); {GO_ON}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"interrupted: {GO_ON}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as stop:  # of a job, of the sweep's table, or of Hydra's --help
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def _run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=DEFAULT_CONFIG)
    arguments, rest = parser.parse_known_args(argv)
    if any(argument.partition("=")[0] in OWN_CONFIG_FLAGS for argument in rest):
        raise ConfigError("give --config NAME_OR_FILE: a shipped configuration, or a YAML file of yours.")
    overrides = [text for text in rest if text.startswith("~") or ("=" in text and not text.startswith("-"))]
    flags = [text for text in rest if text not in overrides]  # with their values
    is_sweep = "-m" in flags or "--multirun" in flags
    first: list[str] = []
    try:
        first = first_of_each(overrides, is_sweep)
        load_config(arguments.config, first)  # what is wrong for all runs is said once, and before any of them
        with primary_config(arguments.config, overrides) as primary, _command_line([*flags, *primary.overrides]):
            _store_hydra(arguments.config)
            GlobalHydra.instance().clear()
            hydra.main(config_path=str(primary.folder), config_name=primary.name, version_base="1.3")(run_job)()
    except (HydraException, OmegaConfBaseException) as error:
        if "Could not find 'hydra/launcher/joblib'" in str(error):
            raise UnavailableError("hydra/launcher=joblib needs: pip install 'cyborg-torchrl[sweeps]'") from None
        raise explained(error, arguments.config, first or overrides) from None


def first_of_each(overrides: Sequence[str], is_sweep: bool) -> list[str]:
    """The overrides of a sweep's first run; without those of Hydra itself.

    Raises:
        ConfigError: if one has several values, and there is to be one run.
        HydraException: if one cannot be read.
    """
    first: list[str] = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_hydra_override():
            continue
        if override.is_sweep_override() and not is_sweep:
            raise ConfigError(f"'{override.input_line}' has several values: give -m to run all of them.")
        first.extend(_first_of(override))
    return first


def _first_of(override: Override) -> list[str]:
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return []  # its values are known to Hydra's search path alone
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if override.value_type == ValueType.INTERVAL_SWEEP:
        return [f"{override.get_key_element()}={override.value().start}"]  # pyright: ignore
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()][:1]


def _store_hydra(config: str) -> None:
    """Hydra's own part of the configuration: where runs are kept, no logs and folders beside them, our help."""
    sweep = SweepDir("${logger.base_dir}/sweep-${now:%Y%m%d-%H%M%S}", "${cyborg_torchrl_folder:}")
    help_text = HelpConf("cyborg_torchrl.train", header=str(__doc__), footer="", template=HELP)
    node = HydraConf(run=RunDir("."), sweep=sweep, output_subdir=None, help=help_text)
    node.callbacks = {"table": {"_target_": "cyborg_torchrl.jobs.SweepTable", "config": config}}
    silent = {"hydra_logging": "none", "job_logging": "none"}
    node.defaults = [{group: silent.get(group, option)} for entry in node.defaults for group, option in entry.items()]
    ConfigStore.instance().store(group="hydra", name="config", node=node, provider="cyborg_torchrl")


@contextmanager
def _command_line(arguments: list[str]) -> Generator[None]:
    """Hydra reads its arguments from `sys.argv`, and raises what it would print if it is asked to."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        with env_override({"HYDRA_FULL_ERROR": "1"}):
            yield
    finally:
        sys.argv = before


if __name__ == "__main__":
    from cyborg_torchrl import train  # by its name: Hydra's launchers look for what they run in a module

    sys.exit(train.main())

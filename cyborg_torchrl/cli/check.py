"""Verifies recurrent policies: the four tests of the training stack, then every check of `check_recurrent`.

python examples/verify_recurrent_ppo.py --backbone gru
python examples/verify_recurrent_ppo.py --all --json report.json --plot horizon.png
python examples/verify_recurrent_ppo.py --policy my_package.my_module:build     # returns (policy, env)

Exit code: 0 healthy, 1 something is accused, 2 it could not be checked.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cyborg_torchrl.build import build_agent, build_env
from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.diagnostics import Report, check_recurrent, plot_horizon
from cyborg_torchrl.memory_benchmarks.ancestor_tests import HORIZON, TestResult, run_ancestor_tests
from cyborg_torchrl.memory_benchmarks.arguments import picture, writable
from cyborg_torchrl.process import prepare_cpu
from cyborg_torchrl.registry import backbones

EXIT_HEALTHY, EXIT_ACCUSED, EXIT_BAD_INPUT = 0, 1, 2
NUM_ENVS = 8
OnProgress = Callable[[str, float], None]


class UsageError(ValueError):
    """What was asked for cannot be checked; the message is one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Verifies and prints. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    prepare_cpu(1)
    started = time.perf_counter()
    try:
        names = [arguments.policy] if arguments.policy else _backbones(arguments)
        results = {name: _verify(name, arguments, number) for number, name in enumerate(names)}
        if arguments.plot:
            curves = {name: report.horizon for name, (_, report) in results.items() if report.horizon is not None}
            plot_horizon(curves, arguments.plot)
        is_healthy = all(report.is_healthy and all(t.is_passed for t in tests) for tests, report in results.values())
        seconds = round(time.perf_counter() - started, 2)
        if arguments.json:
            entries = {
                name: {"tests": [asdict(test) for test in tests], "report": report.to_dict()}
                for name, (tests, report) in results.items()
            }
            content = {"is_healthy": is_healthy, "seed": arguments.seed, "seconds": seconds, "policies": entries}
            arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    except (UsageError, ConfigError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"{'healthy' if is_healthy else 'ACCUSED'}: {', '.join(results)} ({seconds} s)")
    return EXIT_HEALTHY if is_healthy else EXIT_ACCUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--backbone", default="lru", help="registered backbone, on delayed cue (%(default)s)")
    which.add_argument("--all", action="store_true", help="every registered backbone")
    which.add_argument("--policy", metavar="MODULE:FUNCTION", help="your own: a function that returns (policy, env)")
    parser.add_argument("--json", type=writable, metavar="PATH", help="write everything as one JSON object")
    parser.add_argument("--plot", type=picture, metavar="PATH", help="draw the gradient horizons (.png, .svg)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _backbones(arguments: argparse.Namespace) -> list[str]:
    if arguments.all:
        return list(backbones.names())
    load_config(overrides=[f"backbone={arguments.backbone}"])  # an unknown one ends here, with the nearest known name
    return [arguments.backbone]


def _verify(name: str, arguments: argparse.Namespace, number: int) -> tuple[list[TestResult], Report]:
    """Runs and prints the tests of a backbone and the checks of its policy, or the checks alone of a policy."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    if number:
        console.print()
    tests: list[TestResult] = []
    if not arguments.policy:
        with _progress(name) as on_progress:
            tests = run_ancestor_tests(name, arguments.seed, on_progress)
        for test in tests:
            verdict = "[green]PASS[/]" if test.is_passed else "[bold red]FAIL[/]"
            console.print(f"{verdict}  {name}: {test.name}: {test.detail}", highlight=False)
    torch.manual_seed(arguments.seed)
    policy, env = _load(name) if arguments.policy else _build(name, arguments.seed)
    with _progress(name) as on_progress:
        try:
            report = check_recurrent(policy, env, seed=arguments.seed, on_progress=on_progress)
        except (ValueError, KeyError) as error:
            raise UsageError(f"{name}: {error.args[0] if error.args else error}") from error
    console.print(report.table())
    return tests, report


def _build(backbone: str, seed: int) -> tuple[Any, Any]:
    """An untrained agent and its environment."""
    cfg = load_config(overrides=[f"backbone={backbone}", f"env.horizon={HORIZON}", f"train.seed={seed}"])
    env: Any = build_env(cfg, num_envs=NUM_ENVS)
    agent = build_agent(cfg, env)
    env.append_transform(agent.backbone.make_tensordict_primer())
    return agent, env


def _load(target: str) -> tuple[Any, Any]:
    """Calls MODULE:FUNCTION, found from the working directory too."""
    module_name, _, function_name = target.partition(":")
    if "/" in module_name or module_name.startswith(".") or module_name.endswith(".py"):
        raise UsageError(f"--policy {target}: name a module, not a file, as in my_module:build.")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--policy {target}: {error}; it must name a function, as in my_module:build.") from error
    built = function()
    if not isinstance(built, tuple) or len(built) != 2:  # pyright: ignore[reportUnknownArgumentType]
        raise UsageError(f"--policy {target}: the function must return (policy, env); got {type(built).__name__}.")
    return built  # pyright: ignore[reportUnknownVariableType]


@contextmanager
def _progress(name: str) -> Generator[OnProgress]:
    """A bar on stderr, gone when it is over."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=1.0)
        yield lambda what, share: progress.update(task, description=f"{name}: {what}", completed=share)


if __name__ == "__main__":
    sys.exit(main())

"""Check that a recurrent policy is trained on the states that it acted with.

    cyborg-torchrl check --backbone gru
    cyborg-torchrl check --all --json report.json --plot horizon.png
    cyborg-torchrl check --policy my_package.my_module:build     # a function that returns (policy, env)

A backbone of this package also passes through four tests of the whole training stack.
Exit code: 0 if everything passed, 1 if something failed, 2 if it could not be checked.
"""

from __future__ import annotations

import argparse
import importlib
import json
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

from cyborg_torchrl.checks import Report, check_recurrent, plot_horizon
from cyborg_torchrl.collectors.runtime import prepare_cpu
from cyborg_torchrl.config import load_config
from cyborg_torchrl.memory_benchmarks.end_to_end import HORIZON, TestResult, run_end_to_end
from cyborg_torchrl.registry import backbones
from cyborg_torchrl.training.builders import build_agent, build_env
from cyborg_torchrl.training.command import EXIT_FAILED, CommandParser, UsageError, picture, writable

NUM_ENVS = 8
OnProgress = Callable[[str, float], None]
Result = tuple[list[TestResult], Report]


def main(argv: Sequence[str] | None = None) -> int:
    """Check policies and print the results. Return the exit code."""
    arguments = _parser().parse(argv)
    prepare_cpu(1)
    started = time.perf_counter()
    names = [arguments.policy] if arguments.policy else _backbones(arguments)
    results: dict[str, Result] = {}
    for name in names:
        if results:
            print()
        results[name] = _check(name, arguments)
    has_passed = all(report.has_passed and all(t.is_passed for t in tests) for tests, report in results.values())
    seconds = round(time.perf_counter() - started, 2)
    try:
        _write_files(results, arguments, {"has_passed": has_passed, "seed": arguments.seed, "seconds": seconds})
    except (ImportError, OSError) as error:
        raise UsageError(str(error)) from None
    print(f"{'passed' if has_passed else 'FAILED'}: {', '.join(results)} ({seconds} s)")
    return 0 if has_passed else EXIT_FAILED


def _parser() -> CommandParser:
    parser = CommandParser(prog="cyborg-torchrl check", description=__doc__)
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
    load_config(overrides=[f"backbone={arguments.backbone}"])  # an unknown name fails here, with the nearest one
    return [arguments.backbone]


def _write_files(results: dict[str, Result], arguments: argparse.Namespace, summary: dict[str, Any]) -> None:
    if arguments.plot:
        curves = {name: report.horizon for name, (_, report) in results.items() if report.horizon is not None}
        plot_horizon(curves, arguments.plot)
    if arguments.json:
        entries = {
            name: {"tests": [asdict(test) for test in tests], "report": report.to_dict()}
            for name, (tests, report) in results.items()
        }
        arguments.json.write_text(json.dumps({**summary, "policies": entries}, indent=2) + "\n")


def _check(name: str, arguments: argparse.Namespace) -> Result:
    """Run and print the end-to-end tests of a backbone and the checks of its policy; of a policy the checks alone."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    tests: list[TestResult] = []
    if not arguments.policy:
        with _progress(name) as on_progress:
            tests = run_end_to_end(name, arguments.seed, on_progress)
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
    """Build an untrained agent and its environment."""
    cfg = load_config(overrides=[f"backbone={backbone}", f"env.horizon={HORIZON}", f"train.seed={seed}"])
    env: Any = build_env(cfg, num_envs=NUM_ENVS)
    agent = build_agent(cfg, env)
    env.append_transform(agent.backbone.make_tensordict_primer())
    return agent, env


def _load(target: str) -> tuple[Any, Any]:
    """Call MODULE:FUNCTION; the module may be in the working directory."""
    module_name, _, function_name = target.partition(":")
    if "/" in module_name or module_name.startswith(".") or module_name.endswith(".py"):
        raise UsageError(f"--policy {target}: name a module, not a file, as in my_module:build.")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--policy {target}: {error}; it must name a function, as in my_module:build.") from error
    built = function()
    if not isinstance(built, tuple) or len(built) != 2:
        raise UsageError(f"--policy {target}: the function must return (policy, env); got {type(built).__name__}.")
    return built


@contextmanager
def _progress(name: str) -> Generator[OnProgress]:
    """Show a progress bar on stderr, and remove it at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=1.0)
        yield lambda step, share: progress.update(task, description=f"{name}: {step}", completed=share)

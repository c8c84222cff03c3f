"""Check that a recurrent policy is trained on the states that it acted with.

    cyborg-torchrl check my_module:build
    cyborg-torchrl check runs/my-run --html report.html
    cyborg-torchrl check --library sb3 model.zip
    cyborg-torchrl check --backbone gru --json report.json

`my_module:build` is a function that returns (policy, env), or (policy, observations) where the policy has the plain
functions of `MemoryPolicy`. A model file comes from sb3-contrib's RecurrentPPO.
A backbone of this package also passes through four tests of the whole training stack.
Exit code: 0 if everything passed, 1 if something failed, 2 if it could not be checked.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torchrl.envs import EnvBase

from cyborg_torchrl.checks import Report, check_memory, check_recurrent, plot_horizon
from cyborg_torchrl.checks.page import write_page
from cyborg_torchrl.checks.sb3 import load_sb3
from cyborg_torchrl.collectors.runtime import prepare_cpu
from cyborg_torchrl.memory_benchmarks.end_to_end import EndToEndResult, build_policy, configuration, run_end_to_end
from cyborg_torchrl.registry import backbones
from cyborg_torchrl.training.command import EXIT_FAILED, CommandParser, UsageError, picture, writable
from cyborg_torchrl.training.loading import build_acting_env, load_agent
from cyborg_torchrl.training.progress import progress_bar

NUM_ENVS = 8
LIBRARIES: dict[str, Callable[..., tuple[Any, Any]]] = {"sb3": load_sb3}
"""Loaders of model files by library: they return plain functions and observations."""
Result = tuple[list[EndToEndResult], Report]


def main(argv: Sequence[str] | None = None) -> int:
    """Check policies and print the results. Return the exit code."""
    arguments = _parser().parse(argv)
    target = arguments.target or arguments.policy
    if arguments.target and (arguments.policy or arguments.backbone or arguments.all):
        raise UsageError("name a target, or give one of --policy, --backbone and --all.")
    if arguments.library and not target:
        raise UsageError(f"--library {arguments.library}: name a model file.")
    prepare_cpu(1)
    started = time.perf_counter()
    names = list(backbones.names()) if arguments.all else [target or arguments.backbone or "lru"]
    results: dict[str, Result] = {}
    for name in names:
        if results:
            print()
        results[name] = _check(name, is_backbone=not target, arguments=arguments)
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
    parser.add_argument("target", nargs="?", metavar="TARGET", help="MODULE:FUNCTION, a run's folder, or a model file")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--backbone", help="registered backbone, on delayed cue (lru)")
    which.add_argument("--all", action="store_true", help="every registered backbone")
    which.add_argument("--policy", metavar="MODULE:FUNCTION", help="the same as TARGET")
    parser.add_argument("--library", choices=sorted(LIBRARIES), help="the library that wrote the model file TARGET")
    parser.add_argument("--json", type=writable, metavar="PATH", help="write everything as one JSON object")
    parser.add_argument("--html", type=writable, metavar="PATH", help="write a page with findings and plot")
    parser.add_argument("--plot", type=picture, metavar="PATH", help="draw the gradient horizons (.png, .svg)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _write_files(results: dict[str, Result], arguments: argparse.Namespace, summary: dict[str, Any]) -> None:
    if arguments.plot:
        curves = {name: report.horizon for name, (_, report) in results.items() if report.horizon is not None}
        plot_horizon(curves, arguments.plot)
    if arguments.html:
        write_page({name: report for name, (_, report) in results.items()}, arguments.html)
    if arguments.json:
        entries = {
            name: {"tests": [asdict(test) for test in tests], "report": report.to_dict()}
            for name, (tests, report) in results.items()
        }
        arguments.json.write_text(json.dumps({**summary, "policies": entries}, indent=2) + "\n")


def _check(name: str, *, is_backbone: bool, arguments: argparse.Namespace) -> Result:
    """Run and print the end-to-end tests of a backbone and the checks of its policy; of a policy the checks alone."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    tests: list[EndToEndResult] = []
    with progress_bar(name, 100) as show:

        def on_progress(step: str, share: float) -> None:
            show(round(100 * share), f"{name}: {step}")

        if is_backbone:
            tests = run_end_to_end(name, arguments.seed, on_progress)
        torch.manual_seed(arguments.seed)
        try:
            if is_backbone:
                policy, world = build_policy(configuration(name, arguments.seed), NUM_ENVS)
            else:
                policy, world = _load(name, arguments.library)
            check = check_recurrent if isinstance(world, EnvBase) else check_memory
            report = check(policy, world, seed=arguments.seed, on_progress=on_progress)
        except (ValueError, KeyError, ImportError) as error:
            message = error.args[0] if error.args else error
            raise (error if isinstance(error, UsageError) else UsageError(f"{name}: {message}")) from error
    for test in tests:
        verdict = "[green]PASS[/]" if test.is_passed else "[bold red]FAIL[/]"
        console.print(f"{verdict}  {name}: {test.name}: {test.detail}", highlight=False)
    console.print(report.table())
    return tests, report


def _load(target: str, library: str | None) -> tuple[Any, Any]:
    """Return a policy and its environment or observations, from a model file, a run or a function."""
    if library:
        if not Path(target).is_file():
            raise UsageError(f"{target} is no file: name a model file of {library}.")
        return LIBRARIES[library](target)
    if Path(target).exists() and ":" not in target and not target.endswith(".py"):
        cfg, agent, _ = load_agent(target)
        return agent, build_acting_env(cfg, agent, num_envs=NUM_ENVS, seed=cfg.train.seed)
    return _call(target)


def _call(target: str) -> tuple[Any, Any]:
    """Call MODULE:FUNCTION; the module may be in the working directory, which `main` adds to the path."""
    module_name, _, function_name = target.partition(":")
    if "/" in module_name or module_name.startswith(".") or module_name.endswith(".py"):
        raise UsageError(f"{target}: it is no run, and a module is named without its file, as in my_module:build.")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{target}: {error}; it must name a function, as in my_module:build.") from error
    if not callable(function):
        raise UsageError(f"{target} is no function; give one that returns (policy, env).")
    built = function()
    if not isinstance(built, tuple) or len(built) != 2:
        raise UsageError(f"{target}: the function must return (policy, env); got {type(built).__name__}.")
    return built

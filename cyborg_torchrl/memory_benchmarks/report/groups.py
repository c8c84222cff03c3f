"""Runs that differ in nothing but the seed, and what to call them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cyborg_torchrl.memory_benchmarks.report.runs import Run, number
from cyborg_torchrl.memory_benchmarks.report.statistics import Interval, iqm_interval
from cyborg_torchrl.memory_benchmarks.results import target_of

Flat = Mapping[str, Any]
TASK_KEYS = ("env.horizon", "env.num_envs", "env.workers")
"""Keys of an environment that do not make it another task."""
NAMED = ("env.name", "env.id", "env.horizon", "backbone.name", "train.seed")
"""Keys that a run is named by."""


@dataclass(frozen=True)
class Group:
    """All runs of a backbone on a task at a horizon, whatever state they are in."""

    task: str
    backbone: str
    """Its name, its external memory and mode if any, and what tells it from others of that name."""
    horizon: int | None
    target: float | None
    """Score that counts as solved, as the task has it."""
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
        """The runs that count: one for each seed."""
        return [run for run in self.runs if run.status == "finished"]

    @property
    def seeds(self) -> int:
        """Seeds that were begun."""
        return len({run.seed for run in self.runs})

    @property
    def scores(self) -> list[float]:
        """Final scores of the finished runs."""
        return [run.score for run in self.finished if run.score is not None]

    @cached_property
    def interval(self) -> Interval:
        """Interquartile mean of the scores, of which there must be one."""
        return iqm_interval([[score] for score in self.scores])

    @property
    def measure(self) -> str:
        """What the scores are: "success" or "return"."""
        return "success" if any(run.measure == "success" for run in self.runs) else "return"

    @property
    def place(self) -> str:
        """Task and horizon."""
        return self.task if self.horizon is None else f"{self.task}, horizon {self.horizon:,}"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots in its keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def shown(value: Any) -> str:
    """A value as an override would write it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def differences(configs: Sequence[Flat]) -> list[dict[str, str]]:
    """For each configuration what is another than in most of those that have the key; without names and logging."""
    values: dict[str, list[str]] = defaultdict(list)
    for flat in configs:
        for key in flat:
            if not key.startswith("logger.") and key not in NAMED:
                values[key].append(shown(flat[key]))
    usual = {key: Counter(found).most_common(1)[0][0] for key, found in values.items()}
    return [
        {key: shown(flat[key]) for key in flat if key in usual and shown(flat[key]) != usual[key]} for flat in configs
    ]


def build_groups(runs: Sequence[Run]) -> list[Group]:
    """Groups by configuration, sorted by task, horizon and backbone; runs whose configuration is not known are none's.

    Two groups never have the same task, horizon and backbone: what tells them apart is part of the name.
    """
    members: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.config.get("env", {}).get("name") and run.config.get("backbone", {}).get("name"):
            members[json.dumps(_compared(flatten(run.config)), sort_keys=True, default=str)].append(run)
    gathered = list(members.values())
    flats = [_compared(flatten(group[0].config)) for group in gathered]
    horizons = [_horizon(group) for group in gathered]
    tasks = _names([_title(group) for group in gathered], [_task_part(flat) for flat in flats], [()] * len(flats))
    places = [(task, horizon) for task, horizon in zip(tasks, horizons, strict=True)]
    rest = [{key: value for key, value in flat.items() if key not in _task_part(flat)} for flat in flats]
    names = _names([_backbone(group[0].config) for group in gathered], rest, places)
    groups = [
        Group(
            task, name, horizon, target_of(group[0].config["env"]), tuple(sorted(group, key=lambda run: run.seed or 0))
        )
        for task, name, horizon, group in zip(tasks, names, horizons, gathered, strict=True)
    ]
    return sorted(groups, key=lambda group: (group.task, group.horizon or 0, group.backbone))


def _compared(flat: Flat) -> dict[str, Any]:
    is_logging = {key: key.startswith("logger.") and key != "logger.eval_actions" for key in flat}
    return {key: value for key, value in flat.items() if not is_logging[key] and key != "train.seed"}


def _task_part(flat: Flat) -> dict[str, Any]:
    return {key: value for key, value in flat.items() if key.startswith("env.") and key not in TASK_KEYS}


def _names(bases: Sequence[str], flats: Sequence[Flat], scopes: Sequence[Any]) -> list[str]:
    """The base names, followed by the keys in which some of the same base differ within a scope."""
    telling: dict[str, set[str]] = defaultdict(set)
    for base, scope in set(zip(bases, scopes, strict=True)):
        same = [flat for flat, *its in zip(flats, bases, scopes, strict=True) if its == [base, scope]]
        keys = {key for flat in same for key in flat}
        telling[base] |= {key for key in keys if len({shown(flat.get(key)) for flat in same}) > 1}
    return [
        ", ".join([base, *(f"{_short(key)}={shown(flat.get(key))}" for key in sorted(telling[base]) if key in flat)])
        for base, flat in zip(bases, flats, strict=True)
    ]


def _short(key: str) -> str:
    return key.removeprefix("train.").removeprefix("backbone.").removeprefix("env.")


def _title(group: Sequence[Run]) -> str:
    env = group[0].config["env"]
    known = [run.summary["task"] for run in group if run.summary.get("task")]
    return str(env.get("id") or (known[0] if known else env["name"]))


def _backbone(config: Mapping[str, Any]) -> str:
    memory = config.get("memory", {}).get("name", "none")
    mode = config.get("train", {}).get("recurrent_mode", "episode")
    name = str(config["backbone"]["name"]) + ("" if memory == "none" else f" + {memory}")
    return name if mode == "episode" else f"{name} ({'no memory' if mode == 'none' else mode})"


def _horizon(group: Sequence[Run]) -> int | None:
    told = [run.summary.get("horizon") for run in group] + [group[0].config["env"].get("horizon")]
    known = [value for value in map(number, told) if value is not None]
    return int(known[0]) if known else None

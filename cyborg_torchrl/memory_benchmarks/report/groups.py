"""Groups of runs that differ only in the seed, and their labels."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from cyborg_torchrl.memory_benchmarks.report.runs import Array, Run
from cyborg_torchrl.memory_benchmarks.results import target_of
from cyborg_torchrl.training.stats import Estimate, interquartile_mean

Flat = Mapping[str, Any]
Text = Mapping[str, str]
TASK_KEYS = ("env.horizon", "env.num_envs", "env.workers")
"""Keys of an environment that do not make it another task."""
NAMED = ("env.name", "env.id", "env.horizon", "backbone.name", "train.seed")
"""Keys with columns of their own in the table of runs."""
MAX_KEYS, MAX_VALUE = 3, 20
"""Limits of a label: keys, and characters of a value."""
MAX_POINTS = 80
"""Points of a learning curve."""


class Curve(NamedTuple):
    """A learning curve over the seeds of a group."""

    steps: Array
    """Environment steps, [P]."""
    scores: Estimate
    """[P]."""


@dataclass(frozen=True)
class Group:
    """All runs of a backbone on a task at a horizon, finished or not."""

    task: str
    backbone: str
    """Backbone, external memory and mode, and the settings that differ from other groups of the same backbone."""
    horizon: int | None
    target: float | None
    """The score from which the task counts as solved."""
    runs: tuple[Run, ...]
    missing: list[str]
    """Keys of the configuration that other groups of the same backbone have."""

    @property
    def finished(self) -> list[Run]:
        """The runs that count: one for each seed."""
        return [run for run in self.runs if run.status == "finished"]

    @property
    def num_seeds(self) -> int:
        """Number of seeds that were started."""
        return len({run.seed for run in self.runs})

    @property
    def scores(self) -> list[float]:
        """Final scores of the finished runs."""
        return self.figures(lambda run: run.score)

    @cached_property
    def score(self) -> Estimate:
        """Interquartile mean of the scores. There must be at least one."""
        return interquartile_mean(np.array(self.scores)[:, np.newaxis])

    @cached_property
    def curve(self) -> Curve | None:
        """The learning curve over seeds; None if no run logged an episode."""
        curves = [run.learning for run in self.finished if len(run.learning[0])]
        return learning_curve(curves) if curves else None

    @property
    def steps_to_target(self) -> float | None:
        """Environment steps until training first reached the target: the median seed's. None if most never did."""
        curves = [run.learning for run in self.finished]
        return None if self.target is None else steps_to(self.target, curves)

    @property
    def measure(self) -> str:
        """The kind of the scores: "success" or "return"."""
        return "success" if any(run.measure == "success" for run in self.runs) else "return"

    @property
    def place(self) -> str:
        """Task and horizon."""
        return self.task if self.horizon is None else f"{self.task}, horizon {self.horizon:,}"

    def figures(self, of: Callable[[Run], float | None]) -> list[float]:
        """Return a number of each finished run that has it."""
        values = [of(run) for run in self.finished]
        return [value for value in values if value is not None]


def learning_curve(curves: Sequence[tuple[Array, Array]]) -> Curve:
    """Return the interquartile mean of curves (steps, scores), one per seed, over the steps that all of them cover.

    Scores between the points of a curve are interpolated.
    """
    first = max(steps[0] for steps, _ in curves)
    last = min(steps[-1] for steps, _ in curves)
    num_points = min(MAX_POINTS, max(len(steps) for steps, _ in curves))
    steps = np.linspace(first, last, num_points) if first < last else np.array([last])
    scores = np.stack([np.interp(steps, *curve) for curve in curves])
    return Curve(steps, interquartile_mean(scores[:, np.newaxis]))


def steps_to(target: float, curves: Sequence[tuple[Array, Array]]) -> float | None:
    """Return the steps after which curves (steps, scores) first reach the target: the median. None if most never do."""
    reached = [steps[scores >= target].min(initial=np.inf) for steps, scores in curves]
    middle = median(reached) if reached else np.inf
    return float(middle) if np.isfinite(middle) else None


def by_place(groups: Iterable[Group]) -> dict[str, list[Group]]:
    """Return the groups of each task and horizon."""
    places: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        places[group.place].append(group)
    return places


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping, with dots in its keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def shown(value: Any) -> str:
    """Return a value as an override writes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def differences(configs: Sequence[Flat]) -> list[dict[str, str]]:
    """Return, for each configuration, its values that most others with the same key do not have.

    Names and logging options are left out.
    """
    values: dict[str, Counter[str]] = defaultdict(Counter)
    for flat in configs:
        for key in flat:
            if not key.startswith("logger.") and key not in NAMED:
                values[key][shown(flat[key])] += 1
    usual = {key: counter.most_common(1)[0][0] for key, counter in values.items()}
    return [
        {key: shown(flat[key]) for key in flat if key in usual and shown(flat[key]) != usual[key]} for flat in configs
    ]


def build_groups(runs: Sequence[Run]) -> list[Group]:
    """Group runs by configuration, sorted by task, horizon and backbone. Runs without a configuration are left out.

    Two groups never have the same task, horizon and backbone label.
    """
    members: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.config.get("env", {}).get("name") and run.config.get("backbone", {}).get("name"):
            members[_identity(_settings(run))].append(run)
    grouped = list(members.values())
    task_settings: list[Flat] = []
    other_settings: list[Flat] = []
    for group in grouped:
        flat = _settings(group[0])
        of_task = {key for key in flat if key.startswith("env.") and key not in TASK_KEYS}
        task_settings.append({key: flat[key] for key in flat if key in of_task})
        other_settings.append({key: flat[key] for key in flat if key not in of_task})
    tasks, _ = labels([_task(group) for group in grouped], task_settings, [()] * len(grouped))
    horizons = [_horizon(group) for group in grouped]
    places = list(zip(tasks, horizons, strict=True))
    backbones, missing = labels([_backbone(group[0].config) for group in grouped], other_settings, places)
    groups = []
    for index, group in enumerate(grouped):
        group.sort(key=lambda run: run.seed or 0)
        target = target_of(group[0].config["env"])
        groups.append(Group(tasks[index], backbones[index], horizons[index], target, tuple(group), missing[index]))
    return sorted(groups, key=lambda group: (group.task, group.horizon or 0, group.backbone))


def _settings(run: Run) -> dict[str, Any]:
    """Return the flat configuration without the seed, and without logging options that do not change the score."""
    flat = flatten(run.config)
    ignored = {key for key in flat if key.startswith("logger.")} - {"logger.eval_actions"} | {"train.seed"}
    return {key: flat[key] for key in flat if key not in ignored}


def labels(names: Sequence[str], settings: Sequence[Flat], scopes: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    """Return short labels, and the keys that each lacks although others of the same name and scope have them.

    A label is a name with the keys that have different values, at most `MAX_KEYS`. Runs of another version of this
    package may lack keys, so a missing key is not a value. Labels that are still equal say how many keys are
    missing, or have a number.
    """
    texts = [{key: shown(flat[key]) for key in flat} for flat in settings]
    compared: dict[tuple[str, Any], list[Text]] = defaultdict(list)
    for name, scope, text in zip(names, scopes, texts, strict=True):
        compared[name, scope].append(text)
    differing: dict[str, set[str]] = defaultdict(set)
    partial: dict[str, set[str]] = defaultdict(set)
    for (name, _), others in compared.items():
        for key in {key for text in others for key in text}:
            values = {text[key] for text in others if key in text}
            if len(values) > 1:
                differing[name].add(key)
            elif values != {"null"} and any(key not in text for text in others):
                partial[name].add(key)
    missing = [sorted(partial[name] - text.keys()) for name, text in zip(names, texts, strict=True)]
    result = [_label(name, text, differing[name]) for name, text in zip(names, texts, strict=True)]
    identities = [_identity(flat) for flat in settings]
    counts = [f" (missing keys: {len(keys)})" if keys else "" for keys in missing]
    result = _tell_apart(result, identities, scopes, counts)
    variants: dict[str, list[str]] = defaultdict(list)
    for label, identity in zip(result, identities, strict=True):
        if identity not in variants[label]:
            variants[label].append(identity)
    numbers = [f" ({variants[label].index(identity) + 1})" for label, identity in zip(result, identities, strict=True)]
    return _tell_apart(result, identities, scopes, numbers), missing


def _identity(settings: Flat) -> str:
    """Return the settings as text. A key without a value equals no key, because new options often default to null."""
    return json.dumps(
        {key: settings[key] for key in settings if settings[key] is not None}, sort_keys=True, default=str
    )


def _label(name: str, text: Text, differing: set[str]) -> str:
    keys = sorted(differing & text.keys())
    parts = [name]
    for key in keys[:MAX_KEYS]:
        value = text[key] if len(text[key]) <= MAX_VALUE else f"{text[key][: MAX_VALUE - 1]}…"
        parts.append(f"{_short(key)}={value}")
    return ", ".join([*parts, "..."] if len(keys) > MAX_KEYS else parts)


def _tell_apart(
    equal: Sequence[str], identities: Sequence[str], scopes: Sequence[Any], suffixes: Sequence[str]
) -> list[str]:
    """Return the labels, with a suffix for those that different settings of a scope share."""
    owners: dict[tuple[str, Any], str] = {}
    shared = set()
    for label, identity, scope in zip(equal, identities, scopes, strict=True):
        if owners.setdefault((label, scope), identity) != identity:
            shared.add(label)
    return [label + suffix if label in shared else label for label, suffix in zip(equal, suffixes, strict=True)]


def _short(key: str) -> str:
    return key.removeprefix("train.").removeprefix("backbone.").removeprefix("env.")


def _task(group: Sequence[Run]) -> str:
    env = group[0].config["env"]
    titles = [run.summary["task"] for run in group if run.summary.get("task")]
    return str(env.get("id") or (titles[0] if titles else env["name"]))


def _backbone(config: Mapping[str, Any]) -> str:
    memory = config.get("memory", {}).get("name", "none")
    mode = config.get("train", {}).get("recurrent_mode", "episode")
    name = str(config["backbone"]["name"]) + ("" if memory == "none" else f" + {memory}")
    return name if mode == "episode" else f"{name} ({'no memory' if mode == 'none' else mode})"


def _horizon(group: Sequence[Run]) -> int | None:
    values = [*(run.summary.get("horizon") for run in group), group[0].config["env"].get("horizon")]
    return next((int(value) for value in values if isinstance(value, (int, float))), None)

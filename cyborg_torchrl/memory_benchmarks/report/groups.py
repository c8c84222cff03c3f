"""Groups of runs that differ only in the seed, and their labels."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cyborg_torchrl.memory_benchmarks.published import Published, published_scores
from cyborg_torchrl.memory_benchmarks.report.runs import Array, Run
from cyborg_torchrl.memory_benchmarks.results import target_of
from cyborg_torchrl.training.stats import Estimate, interquartile_mean

Flat = Mapping[str, Any]
Text = Mapping[str, str]
Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
TASK_KEYS = ("env.horizon", "env.num_envs", "env.workers")
"""Keys of an environment that do not make it another task."""
NAMED = ("env.name", "env.id", "env.horizon", "backbone.name", "train.seed")
"""Keys with columns of their own in the table of runs."""
MAX_KEYS, MAX_VALUE = 3, 20
"""Limits of a label: keys, and characters of a value."""
MAX_POINTS = 80
"""Points of a learning curve."""
LEVELS = ("easy", "medium", "hard", "extreme")
"""Levels of tasks, in their order."""


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
        return [run.score for run in self.finished if run.score is not None]

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
    def budget(self) -> int:
        """Environment steps that the finished runs were given."""
        budgets = [run.config.get("train", {}).get("total_timesteps") or run.steps for run in self.finished]
        return max(budgets, default=0)

    @property
    def place(self) -> str:
        """Task and horizon."""
        return self.task if self.horizon is None else f"{self.task}, horizon {self.horizon:,}"

    @cached_property
    def family(self) -> str:
        """The task without its level: "RepeatPrevious" of "popgym-RepeatPreviousHard-v0"."""
        return _family_and_level(self.runs[0].config["env"])[0]

    @cached_property
    def level(self) -> int:
        """Position of the level in `LEVELS`; -1 for a task without levels."""
        return _family_and_level(self.runs[0].config["env"])[1]

    @property
    def published(self) -> Published | None:
        """The published score of this task."""
        return published_scores().get(str(self.runs[0].config["env"].get("id")))

    def figures(self, name: str) -> list[float]:
        """Return a number of the summaries of the finished runs that have it."""
        values = [run.figure(name) for run in self.finished]
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


def group_by(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return the items of each key, in the order of their first appearance."""
    members: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        members[key(item)].append(item)
    return members


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
    """Group runs by configuration, sorted by family, level, task, horizon and backbone.

    Runs without a configuration are left out.

    Two groups never have the same task, horizon and backbone label.
    """
    known = [
        run for run in runs if run.config.get("env", {}).get("name") and run.config.get("backbone", {}).get("name")
    ]
    grouped = list(group_by(known, lambda run: _identity(_settings(run))).values())
    tasks: list[Label] = []
    backbones: list[Label] = []
    for group in grouped:
        settings = _settings(group[0])
        task_keys = [key for key in settings if key.startswith("env.") and key not in TASK_KEYS]
        tasks.append(Label(_task(group), {key: settings.pop(key) for key in task_keys}))
        backbones.append(Label(_backbone(group[0].config), settings))
    write_labels(tasks)
    for group, task, backbone in zip(grouped, tasks, backbones, strict=True):
        backbone.scope = task.text, _horizon(group)
    write_labels(backbones)
    groups = []
    for group, task, backbone in zip(grouped, tasks, backbones, strict=True):
        members = tuple(sorted(group, key=lambda run: run.seed or 0))
        target = target_of(group[0].config["env"])
        groups.append(Group(task.text, backbone.text, _horizon(group), target, members, backbone.missing))
    return sorted(groups, key=lambda group: (group.family, group.level, group.task, group.horizon or 0, group.backbone))


def different_budgets(groups: Sequence[Group]) -> list[str]:
    """Return a sentence for each task and horizon whose groups were trained for different numbers of steps."""
    sentences: list[str] = []
    for place, compared in group_by((group for group in groups if group.finished), lambda group: group.place).items():
        if len({group.budget for group in compared}) > 1:
            budgets = "; ".join(f"{group.backbone}: {group.budget:,} steps" for group in compared)
            sentences.append(f"{place}: {budgets}. Scores after different budgets cannot be compared.")
    return sentences


def _settings(run: Run) -> dict[str, str]:
    """Return the flat configuration without the seed, and without logging options that do not change the score."""
    flat = flatten(run.config)
    ignored = {key for key in flat if key.startswith("logger.")} - {"logger.eval_actions"} | {"train.seed"}
    return {key: shown(flat[key]) for key in flat if key not in ignored}


@dataclass
class Label:
    """A name, and the settings that tell it apart from labels of other settings in the same scope."""

    name: str
    settings: Text
    scope: Hashable = None
    text: str = ""
    missing: list[str] = field(default_factory=list[str])
    """Keys that it lacks although others of the same name and scope have them."""


def write_labels(labels: Sequence[Label]) -> None:
    """Write short texts and missing keys into labels.

    A text is a name with the keys that have different values, at most `MAX_KEYS`. Runs of another version of this
    package may lack keys, so a missing key is not a value. Texts that are still equal say how many keys are missing,
    or have a number.
    """
    differing: dict[str, set[str]] = defaultdict(set)
    partial: dict[str, set[str]] = defaultdict(set)
    for (name, _), others in group_by(labels, lambda label: (label.name, label.scope)).items():
        for key in {key for label in others for key in label.settings}:
            values = {label.settings[key] for label in others if key in label.settings}
            if len(values) > 1:
                differing[name].add(key)
            elif values != {"null"} and any(key not in label.settings for label in others):
                partial[name].add(key)
    for label in labels:
        label.missing = sorted(partial[label.name] - label.settings.keys())
        label.text = _short_text(label, differing[label.name])
    for label in _ambiguous(labels):
        label.text += f" (missing keys: {len(label.missing)})" if label.missing else ""
    for same in group_by(_ambiguous(labels), lambda label: label.text).values():
        identities = list(dict.fromkeys(_identity(label.settings) for label in same))
        for label in same:
            label.text += f" ({identities.index(_identity(label.settings)) + 1})"


def _identity(settings: Text) -> str:
    """Return the settings as text. A key without a value equals no key, because new options often default to null."""
    return json.dumps({key: value for key, value in settings.items() if value != "null"}, sort_keys=True)


def _ambiguous(labels: Sequence[Label]) -> list[Label]:
    """Return the labels whose text is also that of other settings in the same scope."""
    same = group_by(labels, lambda label: (label.text, label.scope))
    shared = {text for (text, _), found in same.items() if len({_identity(label.settings) for label in found}) > 1}
    return [label for label in labels if label.text in shared]


def _short_text(label: Label, differing: set[str]) -> str:
    keys = sorted(differing & label.settings.keys())
    parts = [label.name]
    for key in keys[:MAX_KEYS]:
        value = label.settings[key]
        short_value = value if len(value) <= MAX_VALUE else f"{value[: MAX_VALUE - 1]}…"
        short_key = key.removeprefix("train.").removeprefix("backbone.").removeprefix("env.")
        parts.append(f"{short_key}={short_value}")
    return ", ".join([*parts, "..."] if len(keys) > MAX_KEYS else parts)


def _family_and_level(env: Mapping[str, Any]) -> tuple[str, int]:
    """Return the family, and the position of the level in `LEVELS`, of an environment's configuration."""
    found = re.fullmatch(r"popgym-(\w+)(Easy|Medium|Hard)-v\d+", str(env.get("id")))
    family, level = found.groups() if found else (env.get("id") or env["name"], env.get("level") or "")
    return str(family), LEVELS.index(level.lower()) if level.lower() in LEVELS else -1


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

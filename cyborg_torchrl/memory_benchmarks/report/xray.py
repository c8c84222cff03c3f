"""A look into the memory of one trained agent: the findings of the checker, and one episode step by step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.checks import Report, check_recurrent
from cyborg_torchrl.cores import PMMCore, State
from cyborg_torchrl.cores.pmm import Addressing
from cyborg_torchrl.envs.make import episode_attribute
from cyborg_torchrl.memory_benchmarks.report.runs import ReportError, Run, read_run, run_folders
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.training.loading import build_acting_env, load_agent
from cyborg_torchrl.training.run_evaluation import EVALUATION_SEED_OFFSET

Array = NDArray[np.float32]
MAX_STEPS = 2000
"""Steps of the recorded episode."""
MAX_CHUNK = 256
"""Steps over which the gradient horizon is measured."""
NUM_ENVS = 4
Note = tuple[Addressing, Tensor]
"""Where a step of an external memory read and wrote, and the usage of its slots after the step."""


class Slots(NamedTuple):
    """Read and write weights of an external memory."""

    read: Array
    """Read weights, [T, R, S]. They sum to one over the slots."""
    write: Array
    """[T, S]."""
    usage: Array
    """After the step, [T, S]."""


@dataclass(frozen=True)
class Episode:
    """One episode, step by step."""

    states: dict[str, Array]
    """Each entry of the memory state after each step, [T, *shape]."""
    reward: Array
    """[T]."""
    is_whole: bool
    """Whether the episode ended within `MAX_STEPS`."""
    success: float | None
    slots: list[Slots]
    """One entry per external memory, from the first layer on."""


class XRay(NamedTuple):
    """The look into one agent's memory."""

    run: Run
    report: Report | None
    """None for an agent without memory."""
    episode: Episode | None


def look(runs: Sequence[Run], path: Path | None, on_progress: Callable[[str], None] = lambda _: None) -> XRay | str:
    """Look into the run at the path, or else into the finished run with the best score.

    Args:
        runs: runs to choose from.
        path: a run's folder, among these runs or not.
        on_progress: called with the name of each step.

    Returns:
        The result. If no path was given and the chosen run cannot be used: a sentence that says why.

    Raises:
        ReportError: if the run at the path cannot be used; ConfigError, CheckpointError, UnavailableError: likewise.
    """
    if path is not None:
        return _take(path, on_progress)
    candidates = [run for run in runs if run.status == "finished" and (run.path / "checkpoints" / "last.pt").is_file()]
    if not candidates:
        return "No finished run has a checkpoint to look into."
    best = max(candidates, key=_worth)
    try:
        return _take(best.path, on_progress)
    except ValueError as error:  # a bad checkpoint or configuration, or a missing package
        return f"{best.path} could not be looked into: {error}"


def _worth(run: Run) -> tuple[bool, bool, float, bool, float]:
    """Return the sort key of the run to look into: memory, a success rate, the score, slots, the horizon."""
    has_memory = run.config.get("train", {}).get("recurrent_mode") != "none"
    has_slots = run.config.get("memory", {}).get("name") == "pmm"
    return has_memory, run.measure == "success", run.score or 0.0, has_slots, run.figure("horizon") or 0.0


def _take(path: Path, on_progress: Callable[[str], None]) -> XRay:
    """Load a run's last checkpoint, check the agent and record an episode.

    Raises:
        ReportError: if the path is no run's folder, or the agent cannot be checked.
        CheckpointError: if there is no usable checkpoint.
        ConfigError: if its configuration cannot be used here.
        UnavailableError: if its environment is not installed.
    """
    if run_folders(path)[:1] != [path]:
        raise ReportError(f"--xray: '{path}' is not a run's folder, which holds manifest.json and checkpoints.")
    run = read_run(path)
    cfg, agent, _ = load_agent(path)
    if not agent.backbone.state_keys:
        return XRay(run, None, None)
    try:
        report = check_agent(cfg, agent, on_progress)
    except (KeyError, ValueError) as error:  # its message names the missing part of the policy or environment
        raise ReportError(f"{path} cannot be checked: {error.args[0]}") from None
    on_progress("an episode")
    return XRay(run, report, record_episode(cfg, agent))


def check_agent(cfg: DictConfig, agent: PPOAgent, on_progress: Callable[[str], None]) -> Report:
    """Run every check of `check_recurrent`. The gradient horizon covers an episode, or `MAX_CHUNK` steps of it.

    Raises:
        ConfigError: if the environment cannot be built.
        ValueError: if the policy cannot be checked.
    """
    with closing(_build_env(cfg, agent, NUM_ENVS)) as env:
        chunk = max(4, min(episode_attribute(env, "max_episode_steps") or MAX_CHUNK, MAX_CHUNK))
        return check_recurrent(
            agent,
            env,
            steps=2 * chunk,
            chunk_lengths=(chunk,),
            seed=cfg.train.seed,
            on_progress=lambda name, _: on_progress(name),
        )


@torch.no_grad()
def record_episode(cfg: DictConfig, agent: PPOAgent) -> Episode:
    """Play one episode as the evaluation does.

    Raises:
        ConfigError: if the environment cannot be built.
    """
    is_greedy = cfg.logger.eval_actions == "greedy"
    mode = ExplorationType.DETERMINISTIC if is_greedy else ExplorationType.RANDOM
    with (
        closing(_build_env(cfg, agent, 1)) as env,
        _recorded_slots(agent) as notes,
        set_exploration_type(mode),
        set_recurrent_mode(False),
    ):
        after = env.rollout(MAX_STEPS, agent).get(keys.NEXT)[0]
    success = after.get(keys.SUCCESS, None)
    return Episode(
        {name: after.get(key).float().cpu().numpy() for name, key in agent.backbone.state_keys.items()},
        after.get(keys.REWARD).flatten().float().cpu().numpy(),
        bool(after.get(keys.DONE)[-1]),
        None if success is None or bool(success[-1].isnan()) else float(success[-1]),
        [_slots(layer) for layer in notes],
    )


def _build_env(cfg: DictConfig, agent: PPOAgent, num_envs: int) -> EnvBase:
    return build_acting_env(cfg, agent, num_envs=num_envs, seed=cfg.train.seed + EVALUATION_SEED_OFFSET, workers=0)


@contextmanager
def _recorded_slots(agent: PPOAgent) -> Generator[list[list[Note]]]:
    """Record each step of the agent's external memories: yields a list of notes for each memory."""
    cores = [module for module in agent.modules() if isinstance(module, PMMCore)]
    notes: list[list[Note]] = [[] for _ in cores]
    for core, notes_of_core in zip(cores, notes, strict=True):
        core.step = _recording_step(core, notes_of_core)
    try:
        yield notes
    finally:
        for core in cores:
            del core.step  # the method of its class is visible again


def _recording_step(core: PMMCore, notes: list[Note]) -> Callable[[Tensor, State], tuple[Tensor, State]]:
    step = core.step

    def recording_step(x: Tensor, state: State) -> tuple[Tensor, State]:
        y, following = step(x, state)
        notes.append((core.addressing(x, state), following["usage"]))
        return y, following

    return recording_step


def _slots(notes: list[Note]) -> Slots:
    """Return the notes of the first environment as arrays."""
    parts = [[where.read for where, _ in notes], [where.write for where, _ in notes], [usage for _, usage in notes]]
    return Slots(*(torch.stack([value[0] for value in values]).cpu().numpy() for values in parts))

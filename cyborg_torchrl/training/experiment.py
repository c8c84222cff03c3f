"""One training run from a configuration to a summary."""

from __future__ import annotations

import os
import resource
import signal
import stat
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cyborg_torchrl.collectors.ray_collector import WorkerError
from cyborg_torchrl.config import ConfigError
from cyborg_torchrl.envs.make import episode_attribute
from cyborg_torchrl.envs.signals import TERMINATIONS
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.modules.nan_check import NonFiniteError
from cyborg_torchrl.registry import environments
from cyborg_torchrl.training.builders import Training, build_trainer
from cyborg_torchrl.training.checkpoint import DUMP, save_checkpoint
from cyborg_torchrl.training.distributed import LaunchError, PeerLostError, Ranks, joined_ranks
from cyborg_torchrl.training.evaluation import Evaluation, OnEpisodes, evaluate, ignore_episodes
from cyborg_torchrl.training.loading import build_acting_env
from cyborg_torchrl.training.progress import Progress
from cyborg_torchrl.training.resume import Resumption, find_run, restore_training, training_state
from cyborg_torchrl.training.run import NoDirectory, RunDirectory, default_run_name
from cyborg_torchrl.training.trainer import PPOTrainer


class StoppedError(RuntimeError):
    """A run that could not go on; the message is one line that says why, and what to do."""


EVALUATION_SEED_OFFSET = 1_000_003
"""Evaluation episodes are drawn from another stream than training's."""


def run_experiment(cfg: DictConfig) -> dict[str, Any]:
    """Trains, evaluates and writes everything down.

    Ctrl-C (or SIGTERM, or SIGHUP) ends training, and the summary says that it was cut short; `resume=auto` goes on from
    the last update that was done, with the same figures as if nothing had happened. Before training, while environments
    are built, there is nothing to keep, and it is a KeyboardInterrupt. Where a launcher has started several processes
    they train together; the first of them evaluates and writes.

    Args:
        cfg: a checked configuration, from `load_config`.

    Returns:
        The summary that `summary.json` holds.

    Raises:
        ConfigError: if the parts cannot be built as configured, or the run's folder is taken.
        CheckpointError: if the run to resume cannot be read.
        StoppedError: if the run cannot go on: the disk is full, a number is not finite, workers die over and over.
    """
    try:
        with terminations_as_interrupt(), joined_ranks(cfg.train.device) as ranks:
            return _run(cfg, ranks)
    except LaunchError as error:
        raise ConfigError(str(error)) from None


def _run(cfg: DictConfig, ranks: Ranks) -> dict[str, Any]:
    started = time.perf_counter()
    progress = Progress(is_shown=cfg.logger.progress and ranks.is_first)
    resumption = ranks.broadcast_object(find_run(cfg) if ranks.is_first else None)
    if resumption is not None and is_done(resumption, cfg):
        progress.console.print(f"{resumption.folder} is done already.")
        return {**(resumption.summary or {}), "run_dir": str(resumption.folder)}
    training = build_trainer(cfg, progress.advance, ranks)
    trainer, agent, env = training
    horizon = episode_attribute(env, "horizon")  # now: a closed environment does not tell
    try:
        run, before = _begin(cfg, training, resumption, progress)
    except BaseException:
        trainer.close()
        raise
    is_interrupted = False
    result: Evaluation | None = None
    metrics: dict[str, float] = {}
    steps_before = trainer.num_steps
    try:
        with progress.over(trainer.total_updates, trainer.steps_per_update, trainer.num_updates):
            for metrics in trainer.run():
                seconds = time.perf_counter() - started
                speed = (trainer.num_steps - steps_before) / seconds
                metrics |= {"update": trainer.num_updates, "steps": trainer.num_steps}
                metrics |= {"seconds": before + seconds, "steps_per_second": speed}
                _write_down(run, training, metrics)
                progress.report(metrics)
            if cfg.logger.eval_episodes and ranks.is_first:
                is_greedy = cfg.logger.eval_actions == "greedy"
                episodes = cfg.logger.eval_episodes
                show = progress.over_episodes(episodes)
                result = evaluate_agent(cfg, agent, episodes, is_deterministic=is_greedy, on_episodes=show)
                figures = {"success_rate": result.success_rate, "mean_reward": result.mean_reward}
                with _room_needed(run, trainer):
                    run.log_evaluation({**figures, "episodes": float(result.episodes)}, trainer.num_steps)
    except NonFiniteError as error:
        raise _stopped(run, training, error) from None
    except (KeyboardInterrupt, PeerLostError) as error:
        is_interrupted = True
        _ignore_further_interrupts(ranks)
        if ranks.is_first:
            is_kept = (run.path / "checkpoints" / "last.pt").exists()
            then = "goes on from the last checkpoint" if is_kept else "begins again: there is no checkpoint yet"
            print(f"{str(error) or 'interrupted'}; resume={run.path} {then}", file=sys.stderr)
    except WorkerError as error:
        raise StoppedError(f"{error} resume={run.path} goes on from the last checkpoint") from None
    finally:
        trainer.close()
        run.close()
    summary = {
        "task": environments.title(cfg.env.name, cfg.env),
        "id": cfg.env.get("id"),
        "backbone": cfg.backbone.name,
        "memory": cfg.memory.name,
        "horizon": horizon,
        "recurrent_mode": cfg.train.recurrent_mode,
        "num_envs": cfg.env.get("num_envs"),
        "total_timesteps": trainer.num_steps,
        "seed": cfg.train.seed,
        "success_rate": result.success_rate if result else metrics.get("success_rate"),
        "mean_reward": result.mean_reward if result else metrics.get("mean_reward"),
        "eval_actions": cfg.logger.eval_actions if result else None,
        "eval_episodes": result.episodes if result else 0,
        "train_success_rate": metrics.get("success_rate"),
        "steps_per_second": round(metrics["steps_per_second"], 1) if metrics else None,
        "total_updates": trainer.num_updates,
        "total_seconds": round(before + time.perf_counter() - started, 2),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "is_interrupted": is_interrupted,
        "processes": ranks.size,
        "run_dir": str(run.path),
    }
    with _room_needed(run, trainer):
        run.write_json("summary.json", summary)
    return summary


def is_done(resumption: Resumption, cfg: DictConfig) -> bool:
    """Whether a run has nothing left to do: it ended, and there is no other update in what is asked for."""
    summary = resumption.summary
    if summary is None or summary.get("is_interrupted"):
        return False
    updates = summary["total_updates"]
    return updates > 0 and cfg.train.total_timesteps // (summary["total_timesteps"] // updates) <= updates


def _begin(
    cfg: DictConfig, training: Training, resumption: Resumption | None, progress: Progress
) -> tuple[RunDirectory | NoDirectory, float]:
    """The run's folder, and the seconds that it took before; the trainer where the run goes on."""
    is_first = training.trainer.ranks.is_first
    folder, checkpoint, content, _ = resumption or Resumption(None, None, None, None)
    if content is not None and checkpoint is not None:
        notes = restore_training(training, content, checkpoint, cfg.train.seed)
        done = f"{training.trainer.num_updates} updates, {training.trainer.num_steps:,} steps"
        progress.console.print(f"resuming {checkpoint} ({done})", highlight=False)
        for note in notes if is_first else []:
            print(f"warning: {note}", file=sys.stderr)
    path = folder or Path(cfg.logger.base_dir) / (cfg.logger.run_name or default_run_name(cfg))
    path = training.trainer.ranks.broadcast_object(path)
    if not is_first:
        return NoDirectory(path, cfg), 0.0
    try:
        run = RunDirectory(path, cfg, None if folder is None else training.trainer.num_updates)
    except FileExistsError as error:
        raise ConfigError(f"logger.run_name: {error}") from None
    except OSError as error:
        raise ConfigError(f"logger.base_dir: cannot write to '{path}' ({error.strerror}).") from None
    if content is not None:
        run.checkpoints.best = content.get("best")
    return run, float((content or {}).get("seconds", 0.0))


def _stopped(run: RunDirectory | NoDirectory, training: Training, error: NonFiniteError) -> StoppedError:
    """Leaves a dump of what was not finite. The checkpoints stay as they are: the last is from before it."""
    trainer, agent, _ = training
    update = trainer.num_updates + 1
    content = {
        "config": OmegaConf.to_container(run.cfg),
        "agent": agent.state_dict(),
        "update": update,
        "num_steps": trainer.num_steps,
        "message": str(error),
        **error.record,
    }
    path = run.path / "dumps" / f"update_{update:08d}.pt"
    save_checkpoint(path, content, kind=DUMP)
    last = run.path / "checkpoints" / "last.pt"
    kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint from before"
    return StoppedError(
        f"{error} (update {update}, after {trainer.num_steps:,} steps). What led to it: "
        f"cyborg-torchrl replay {path}; {kept}"
    )


def _write_down(run: RunDirectory | NoDirectory, training: Training, metrics: dict[str, float]) -> None:
    """Logs an update, and writes its checkpoint.

    Raises:
        StoppedError: if there is no room for it.
    """
    trainer, every = training.trainer, run.cfg.logger.checkpoint_every
    is_last = trainer.num_updates == trainer.total_updates
    with _room_needed(run, trainer):
        if trainer.num_updates % every == 0 or is_last:
            content = {**training_state(training), "seconds": metrics["seconds"]}
            score = metrics.get("success_rate", metrics.get("mean_reward"))
            run.save(content, trainer.num_updates, score)
        run.log(metrics)


@contextmanager
def _room_needed(run: RunDirectory | NoDirectory, trainer: PPOTrainer) -> Generator[None]:
    """Writes into a run's folder, and tells of a full disk in one line."""
    try:
        yield
    except OSError as error:
        last = run.path / "checkpoints" / "last.pt"
        kept = f"the last whole checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        raise StoppedError(
            f"cannot write to '{run.path}' ({error.strerror or error}) after update {trainer.num_updates}; {kept}. "
            f"Make room and go on with resume={run.path}"
        ) from None


def evaluate_agent(
    cfg: DictConfig,
    agent: PPOAgent,
    episodes: int,
    *,
    is_deterministic: bool = True,
    on_episodes: OnEpisodes = ignore_episodes,
) -> Evaluation:
    """Evaluates an agent on fresh episodes of its configuration's environment; see `evaluate`.

    Statistics of the environment's transforms are the agent's, and stay as they are.
    """
    num_envs = cfg.env.get("num_envs", 1)
    if "workers" not in cfg.env:  # batched tensors: more side by side cost nothing
        num_envs = min(episodes, max(num_envs, 250))
    env = build_acting_env(cfg, agent, num_envs=num_envs, seed=cfg.train.seed + EVALUATION_SEED_OFFSET)
    try:
        return evaluate(agent, env, episodes, is_deterministic=is_deterministic, on_episodes=on_episodes)
    finally:
        env.close()


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    try:  # Linux: getrusage would begin with what the process had that started this one
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def _ignore_further_interrupts(ranks: Ranks) -> None:
    """A launcher passes on the interrupt that all have got already."""
    if ranks.size > 1 and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *TERMINATIONS):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def terminations_as_interrupt() -> Generator[None]:
    """Ends a run that is told to terminate, or whose terminal is closed, as Ctrl-C would.

    Under nohup a closed terminal changes nothing.
    """

    def interrupt(signum: int, frame: Any) -> None:
        if signum != signal.SIGTERM:
            _leave_terminal()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # the host handles signals
        yield
        return
    heeded = [number for number in TERMINATIONS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _leave_terminal() -> None:
    """What is printed goes nowhere: writing to a terminal that was closed is an error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):  # isatty says no of one that is closed
            os.dup2(nowhere, stream)
    os.close(nowhere)

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (tensordict's and torchrl's annotations are narrower than what they take)
"""One training run from a configuration to a summary."""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from cyborg_torchrl.build import build_env, build_trainer
from cyborg_torchrl.config import ConfigError
from cyborg_torchrl.envs.make import episode_attribute
from cyborg_torchrl.envs.normalization import freeze_statistics
from cyborg_torchrl.evaluation import Evaluation, evaluate
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.progress import Progress
from cyborg_torchrl.registry import environments
from cyborg_torchrl.run_directory import RunDirectory, default_run_name

EVALUATION_SEED_OFFSET = 1_000_003
"""Evaluation episodes are drawn from another stream than training's."""


def run_experiment(cfg: DictConfig) -> dict[str, Any]:
    """Trains, evaluates and writes everything down.

    Ctrl-C (or SIGTERM) ends training; what was learned so far is saved, and the summary says that it was cut short.

    Args:
        cfg: a checked configuration, from `load_config`.

    Returns:
        The summary that `summary.json` holds.

    Raises:
        ConfigError: if the parts cannot be built as configured, or the run's folder is taken.
    """
    started = time.perf_counter()
    progress = Progress(is_shown=cfg.logger.progress)
    trainer, agent, env = build_trainer(cfg, progress.advance)
    horizon = episode_attribute(env, "horizon")  # now: a closed environment does not tell
    path = Path(cfg.logger.base_dir) / (cfg.logger.run_name or default_run_name(cfg))
    try:
        run = RunDirectory(path, cfg)
    except FileExistsError as error:
        raise ConfigError(f"logger.run_name: {error}") from None
    except OSError as error:
        raise ConfigError(f"logger.base_dir: cannot write to '{path}' ({error.strerror}).") from None
    is_interrupted = False
    result: Evaluation | None = None
    metrics: dict[str, float] = {}
    training_seconds = 0.0
    try:
        with _sigterm_as_interrupt(), progress.over(trainer.total_updates, trainer.buffer.num_steps):
            for metrics in trainer.run():
                training_seconds = time.perf_counter() - started
                speed = trainer.num_steps / training_seconds
                metrics |= {"update": trainer.num_updates, "steps": trainer.num_steps}
                metrics |= {"seconds": training_seconds, "steps_per_second": speed}
                run.log(metrics)
                run.save(_content(agent, trainer), metrics.get("success_rate", metrics.get("mean_reward")))
                progress.report(metrics)
            if cfg.logger.eval_episodes:
                is_greedy = cfg.logger.eval_actions == "greedy"
                result = evaluate_agent(cfg, agent, cfg.logger.eval_episodes, is_deterministic=is_greedy)
    except KeyboardInterrupt:
        is_interrupted = True
        run.save(_content(agent, trainer), None)
        print(f"interrupted: what was learned is in {path / 'checkpoints' / 'last.pt'}", file=sys.stderr)
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
        "eval_actions": cfg.logger.eval_actions,
        "eval_episodes": result.episodes if result else 0,
        "train_success_rate": metrics.get("success_rate"),
        "steps_per_second": round(metrics["steps_per_second"], 1) if metrics else None,
        "total_updates": trainer.num_updates,
        "total_seconds": round(time.perf_counter() - started, 2),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "is_interrupted": is_interrupted,
        "run_dir": str(path),
    }
    run.write_json("summary.json", summary)
    return summary


def evaluate_agent(cfg: DictConfig, agent: PPOAgent, episodes: int, *, is_deterministic: bool = True) -> Evaluation:
    """Evaluates an agent on fresh episodes of its configuration's environment.

    Statistics of the environment's transforms are the agent's, and stay as they are.
    """
    num_envs = cfg.env.get("num_envs", 1)
    if "workers" not in cfg.env:  # batched tensors: more side by side cost nothing
        num_envs = min(episodes, max(num_envs, 250))
    env = build_env(cfg, num_envs=num_envs, seed=cfg.train.seed + EVALUATION_SEED_OFFSET)
    freeze_statistics(env, agent.env_statistics)
    if agent.backbone.state_keys:
        env.append_transform(agent.backbone.make_tensordict_primer())
    try:
        return evaluate(agent, env, episodes, is_deterministic=is_deterministic)
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


def _content(agent: PPOAgent, trainer: Any) -> dict[str, Any]:
    return {"agent": agent.state_dict(), "trainer": trainer.state_dict(), "rng": torch.get_rng_state()}


@contextmanager
def _sigterm_as_interrupt() -> Generator[None]:
    """Ends a run that is told to terminate as Ctrl-C would."""

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: the host handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)

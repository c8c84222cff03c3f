"""Evaluations of a run: after training, and between its updates."""

from __future__ import annotations

import time
from contextlib import closing

import numpy as np
import torch
from omegaconf import DictConfig

from cyborg_torchrl.collectors.rng import random_state_kept
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.training.evaluation import Evaluation, OnEpisodes, evaluate
from cyborg_torchrl.training.loading import build_acting_env

EVALUATION_SEED_OFFSET = 1_000_003
"""Difference between the seeds of evaluation and training, so that evaluation has other episodes."""
PREFIX = "eval/"
"""Start of the names of metrics that come from an evaluation."""


def evaluate_agent(
    cfg: DictConfig,
    agent: PPOAgent,
    episodes: int,
    *,
    is_deterministic: bool = True,
    seed: int | None = None,
    on_episodes: OnEpisodes = lambda finished, total: None,
) -> Evaluation:
    """Evaluate an agent on fresh episodes of its configuration's environment; see `evaluate`.

    Statistics of the environment's transforms are the agent's, and do not change.

    Args:
        cfg: the agent's configuration. `logger.eval_max_steps` limits the steps of an episode.
        agent: the agent.
        episodes: smallest number of episodes.
        is_deterministic: take the most likely action; False: sample.
        seed: seed of the episodes; None: one that follows from `train.seed`.
        on_episodes: called after each step.
    """
    num_envs = cfg.env.get("num_envs", 1)
    if "workers" not in cfg.env:  # more environments cost nothing where they are batched tensors
        num_envs = min(episodes, max(num_envs, 250))
    seed = cfg.train.seed + EVALUATION_SEED_OFFSET if seed is None else seed
    options = {"is_deterministic": is_deterministic, "max_steps": cfg.logger.eval_max_steps, "on_episodes": on_episodes}
    with closing(build_acting_env(cfg, agent, num_envs=num_envs, seed=seed)) as env:
        return evaluate(agent, env, episodes, **options)


def is_evaluated(cfg: DictConfig, update: int, total_updates: int) -> bool:
    """Return whether `logger.eval_every` asks for an evaluation after an update: every so many, and after the last."""
    every = cfg.logger.eval_every
    return bool(every) and (update % every == 0 or update == total_updates)


def evaluate_update(cfg: DictConfig, agent: PPOAgent, update: int, on_episodes: OnEpisodes) -> dict[str, float]:
    """Evaluate the agent after an update, without any effect on training. Return metrics called "eval/...".

    The environments are built anew, and their seed follows from the run's seed and the update. So the result does not
    depend on earlier evaluations, and a resumed run has the same ones.
    """
    started = time.perf_counter()
    seed = int(np.random.SeedSequence([cfg.train.seed + EVALUATION_SEED_OFFSET, update]).generate_state(1)[0])
    with random_state_kept():
        torch.manual_seed(seed)  # for sampled actions
        result = evaluate_agent(
            cfg,
            agent,
            cfg.logger.eval_every_episodes,
            is_deterministic=cfg.logger.eval_actions == "greedy",
            seed=seed,
            on_episodes=on_episodes,
        )
    return {**evaluation_metrics(result), f"{PREFIX}seconds": time.perf_counter() - started}


def evaluation_metrics(result: Evaluation) -> dict[str, float]:
    """Return the metrics of an evaluation, called "eval/..."; without success if the task does not report it."""
    metrics = {"mean_reward": result.mean_reward, "episodes": result.episodes, "cut_episodes": result.num_cut}
    if result.success_rate is not None:
        metrics["success_rate"] = result.success_rate
    return {f"{PREFIX}{name}": value for name, value in metrics.items()}


def score_prefix(cfg: DictConfig) -> str:
    """Return the start of the names of the metrics that choose `best.pt` and end training early.

    With `logger.eval_every` they are the evaluation's, which only some updates have. Otherwise they are those of the
    update's own episodes, which no update has in which none ended.
    """
    return PREFIX if cfg.logger.eval_every else ""

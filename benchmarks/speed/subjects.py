"""Subjects of the comparisons: our collectors and trainer, TorchRL's collector, and a raw PyTorch loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchrl.collectors import Collector

from benchmarks.speed.measure import Subject
from cyborg_torchrl.collectors import FusedCollector
from cyborg_torchrl.config import load_config
from cyborg_torchrl.cores import restart
from cyborg_torchrl.envs import DelayedCueEnv
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.training.builders import build_agent, build_env, build_trainer


class Case(NamedTuple):
    """Sizes that all subjects of a comparison share."""

    backbone: str
    num_envs: int
    horizon: int
    width: int = 128
    n_steps: int | None = None
    """Steps of a rollout; None: an episode, horizon + 2."""
    n_epochs: int = 4
    num_minibatches: int = 4
    seq_len: int | None = None
    """Steps of a sequence in truncated BPTT; None: whole episodes."""
    device: str = "cpu"
    """Seed of environments and networks."""

    @property
    def steps(self) -> int:
        """The steps of a rollout."""
        return self.n_steps or self.horizon + 2

    def load(self) -> DictConfig:
        """Load the configuration."""
        mode = [] if self.seq_len is None else ["train=tbptt", f"train.seq_len={self.seq_len}"]
        return load_config(
            overrides=[
                *mode,
                f"env.num_envs={self.num_envs}",
                f"env.horizon={self.horizon}",
                f"backbone={self.backbone}",
                f"backbone.hidden_size={self.width}",
                f"encoder.features={self.width}",
                f"train.n_steps={self.steps}",
                f"train.n_epochs={self.n_epochs}",
                f"train.num_minibatches={self.num_minibatches}",
                f"train.total_timesteps={10**12}",
                f"train.device={self.device}",
            ]
        )


def collection(case: Case) -> list[Subject]:
    """Return our collector (on a GPU also as a graph), TorchRL's with the same policy, and a raw loop."""
    frames = case.num_envs * case.steps
    subjects: list[Subject] = []
    kinds: list[tuple[str, Callable]] = [("ours (FusedCollector)", FusedCollector), ("torchrl Collector", Collector)]
    if torch.device(case.device).type == "cuda":
        kinds.insert(0, ("ours (FusedCollector, cudagraph)", partial(FusedCollector, cudagraph=True)))
    for name, kind in kinds:
        env, agent = _parts(case)
        collector = kind(env, agent, frames_per_batch=frames, total_frames=-1, auto_register_policy_transforms=True)
        subjects.append((name, _next_of(iter(collector), frames)))
    collector = build_trainer(case.load()).trainer.collector
    subjects.append(("ours (states not kept)", _next_of(iter(collector), frames)))
    env, agent = _parts(case)
    subjects.append(("raw PyTorch loop", RawLoop(env.base_env, agent, case.steps)))
    return subjects


def in_processes(case: Case) -> list[Subject]:
    """Return our collector and TorchRL's, on Crafter in two processes with images as observations."""
    frames = case.num_envs * case.steps
    subjects: list[Subject] = []
    for name, collector in (("ours", "rollout"), ("torchrl Collector", "single")):
        options = [f"env.num_envs={case.num_envs}", "env.workers=2", f"collector={collector}", "encoder.features=256"]
        options += [f"backbone={case.backbone}", f"train.n_steps={case.steps}", f"train.total_timesteps={10**12}"]
        cfg = load_config("treechop_ppo_recurrent", [*options, "encoder.convolutions=impala", "train.seq_len=16"])
        subjects.append((name, _next_of(iter(build_trainer(cfg).trainer.collector), frames)))
    return subjects


def training(case: Case, name: str = "ours") -> Subject:
    """Return a subject that collects and updates."""
    trainer = build_trainer(case.load()).trainer
    rollouts = iter(trainer.collector)

    def run() -> int:
        rollout = next(rollouts)
        trainer.update(rollout)
        return case.num_envs * case.steps

    return name, run


def updating(case: Case, name: str = "ours") -> Subject:
    """Return a subject that repeats the update from one rollout."""
    trainer = build_trainer(case.load()).trainer
    rollout = next(iter(trainer.collector))

    def run() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the trainer warns that the policy has changed since the rollout
            trainer.update(rollout)
        return case.num_envs * case.steps

    return name, run


class RawLoop:
    """Raw loop with the same networks and task, without TorchRL, as an expert would write it for this case only.

    It stores only the entries that PPO needs: the first state, and rewards and ends under "next".

    Args:
        task: the environment.
        agent: the networks.
        steps: T, steps of a rollout.
    """

    def __init__(self, task: DelayedCueEnv, agent: PPOAgent, steps: int) -> None:
        self.task, self.steps = task, steps
        self.encoder, self.core, self.fusion = agent.encoder.module, agent.backbone.core, agent.fusion.module
        self.policy, self.value = agent.policy_head.module, agent.value_head.module
        count = task.num_envs
        shown, _ = task.restart()
        device = shown.device
        self.observation, self.state = shown, self.core.initial_state(count)
        self.is_init: Tensor | None = torch.ones(count, dtype=torch.bool, device=device)
        self.observations = shown.new_empty(steps, *shown.shape)
        self.actions = torch.empty(steps, count, dtype=torch.long, device=device)
        self.log_probs, self.values, self.rewards = torch.empty(3, steps, count, device=device).unbind(0)
        self.is_inits, self.ends = torch.zeros(2, steps, count, dtype=torch.bool, device=device).unbind(0)

    @torch.no_grad()
    def __call__(self) -> int:
        """Collect one rollout. Return its steps."""
        initial = self.core.initial_state(self.task.num_envs)
        self.is_inits.zero_()
        for t in range(self.steps):
            if self.is_init is not None:
                self.state = restart(self.state, initial, self.is_init)
                self.is_inits[t] = self.is_init
            features = self.encoder(self.observation)
            memory, self.state = self.core.step(features, self.state)
            joint = self.fusion(features, memory)
            log_probs = torch.log_softmax(self.policy(joint), -1)
            probs = log_probs.exp()
            action = (probs / torch.empty_like(probs).exponential_()).argmax(-1)
            self.observations[t] = self.observation
            self.actions[t] = action
            self.log_probs[t] = log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
            self.values[t] = self.value(joint).squeeze(-1)
            self.observation, _, reward, over = self.task.advance(action)
            self.rewards[t], self.ends[t] = reward.squeeze(-1), over.squeeze(-1)
            self.is_init = over.squeeze(-1) if bool(over.any()) else None
            if self.is_init is not None:
                self.observation, _ = self.task.restart(self.is_init)
        return self.steps * self.task.num_envs


def _parts(case: Case):
    cfg = case.load()
    torch.manual_seed(cfg.train.seed)
    env = build_env(cfg)
    return env, build_agent(cfg, env)


def _next_of(iterator: Iterator, frames: int):
    def run() -> int:
        next(iterator)
        return frames

    return run

"""PufferLib's PuffeRL with its LSTMWrapper: the library's own loop collects the rollouts."""

from __future__ import annotations

import ast
import contextlib
import tempfile
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.honesty.common import NUM_ENVS, STEPS, WIDTH, NoiseEnv, draw
from cyborg_torchrl.checks import DiscreteActorCritic, Recorder, Report, check_memory

with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
    import pufferlib  # it puts a link to its pictures into the working directory
    from pufferlib.models import Default, LSTMWrapper
    from pufferlib.pufferl import PuffeRL

PACKAGE = "pufferlib"
State = tuple[Tensor, Tensor]


class Task(pufferlib.PufferEnv):
    """The noise in the form of the library's own environments: an end comes with the next episode's first step."""

    def __init__(self, seed: int) -> None:
        self.envs = [NoiseEnv(100 * seed + index) for index in range(NUM_ENVS)]
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        self.num_agents = self.agents_per_batch = NUM_ENVS
        self.is_first: list[np.ndarray] = []
        super().__init__()

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, list]:
        """Begin all episodes."""
        self.observations[:] = [env.reset()[0] for env in self.envs]
        self.is_first.append(np.ones(NUM_ENVS, bool))
        return self.observations, []

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list]:
        """Step each environment, and reset those that end."""
        for index, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            observation, reward, terminated, truncated, _ = env.step(action)
            self.observations[index] = env.reset()[0] if terminated or truncated else observation
            self.rewards[index], self.terminals[index], self.truncations[index] = reward, terminated, truncated
        self.is_first.append(self.terminals | self.truncations)
        return self.observations, self.rewards, self.terminals, self.truncations, []

    def close(self) -> None:
        """Do nothing."""


class Policy(DiscreteActorCritic):
    """The functions of the wrapped policy: see `MemoryPolicy`."""

    def initial_state(self, batch: int) -> State:
        """Return zeros."""
        return torch.zeros(batch, WIDTH), torch.zeros(batch, WIDTH)

    def step(self, observation: Tensor, state: State, is_first: Tensor) -> tuple[tuple[Tensor, Tensor], State]:
        """Act as in the library's loop, which does not use the ends of episodes."""
        values: dict[str, Any] = {"done": is_first, "lstm_h": state[0], "lstm_c": state[1]}
        logits, value = self.model.forward_eval(observation, values)
        return (logits, value.flatten()), (values["lstm_h"], values["lstm_c"])

    def sequence(self, observations: Tensor, state: State, is_first: Tensor) -> tuple[Tensor, Tensor]:
        """Run as in the update, which does not use them either."""
        values = {"lstm_h": state[0].unsqueeze(0), "lstm_c": state[1].unsqueeze(0)}
        logits, value = self.model(observations, values)
        return logits.unflatten(0, value.shape), value


class Trainer(PuffeRL):
    """The library's trainer without its dashboard."""

    def print_dashboard(self, *args: Any, **options: Any) -> None:
        """Do nothing."""


def check(seed: int) -> tuple[Report, Report]:
    """Check the policy, and the second rollout of the library's loop, which starts in the middle of episodes."""
    torch.manual_seed(seed)
    task = Task(seed)
    policy = Policy(LSTMWrapper(task, Default(task, WIDTH), WIDTH, WIDTH))
    report = check_memory(policy, draw(seed), seed=seed)
    trainer = Trainer(_options(), task, policy.model)
    for _ in range(2):
        begin = len(task.is_first) - 1
        trainer.evaluate()
    trainer.utilization.stop()  # its thread would keep the process alive
    recorder = Recorder(policy)
    for t in range(STEPS):
        recorder.add(
            trainer.observations[:, t],
            task.is_first[begin + t],
            state=policy.initial_state(NUM_ENVS) if t == 0 else None,  # a rollout begins with zeros; none is stored
            action=trainer.actions[:, t],
            log_prob=trainer.logprobs[:, t],
        )
    return report, recorder.check()


def _options() -> dict[str, Any]:
    """Return the library's default options, with our sizes."""
    parser = ConfigParser()
    parser.read(Path(pufferlib.__file__).parent / "config" / "default.ini")
    options: dict[str, Any] = {}
    for name, text in parser["train"].items():
        try:
            options[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):  # a word, such as auto
            options[name] = text
    options |= {"device": "cpu", "optimizer": "adam", "use_rnn": True, "env": "noise"}
    return options | {"bptt_horizon": STEPS, "minibatch_size": NUM_ENVS * STEPS, "data_dir": tempfile.gettempdir()}

"""RecurrentPPO of sb3-contrib as plain functions, through the methods that it acts and trains with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cyborg_torchrl.checks.nested import Tree, map_leaves

ACTIONS = 3
"""Number of actions whose log-probs are compared."""


class Sb3Policy:
    """The functions of a `sb3_contrib.RecurrentPPO` model: see `MemoryPolicy`.

    Outputs are the log-probs of a few fixed actions [B, K], the entropy [B] and the value [B]. In a sequence they come
    from `evaluate_actions`, which the library's training calls.

    Args:
        model: the model; its parameters are used where they are.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.net = model.policy
        model.action_space.seed(0)
        drawn = torch.as_tensor(np.stack([model.action_space.sample() for _ in range(ACTIONS)]))
        self.actions = torch.arange(min(ACTIONS, model.action_space.n)) if drawn.ndim == 1 else drawn
        self.states = type(model._last_lstm_states)

    def initial_state(self, batch: int) -> Tree:
        """Return zeros, as `RecurrentPPO` does."""
        layers, _, width = self.net.lstm_hidden_state_shape
        pair = (torch.zeros(layers, batch, width), torch.zeros(layers, batch, width))
        return self.states(pair, pair)

    def step(self, observation: Tree, state: Tree, is_first: Tensor) -> tuple[Tree, Tree]:
        """Run `forward`, which the library acts with, and read the distribution."""
        starts = is_first.to(state.pi[0].dtype)
        _, values, _, following = self.net.forward(observation, state, starts, deterministic=True)
        dist, _ = self.net.get_distribution(observation, state.pi, starts)
        log_probs = [dist.log_prob(action.expand(len(starts), *action.shape)) for action in self.actions]
        return (torch.stack(log_probs, -1), dist.entropy(), values.flatten()), following

    def sequence(self, observations: Tree, state: Tree, is_first: Tensor) -> Tree:
        """Run `evaluate_actions` on sequences that are flattened as its buffer flattens them."""
        flat = map_leaves(lambda leaf: leaf.flatten(0, 1), observations)
        starts = is_first.flatten().to(state.pi[0].dtype)
        log_probs, values, entropy = [], None, None
        for action in self.actions:
            actions = action.expand(len(starts), *action.shape)
            values, log_prob, entropy = self.net.evaluate_actions(flat, actions, state, starts)
            log_probs.append(log_prob)
        outputs = (torch.stack(log_probs, -1), entropy, values.flatten())
        return map_leaves(lambda leaf: leaf.unflatten(0, is_first.shape), outputs)

    def value(self, outputs: Tree) -> Tensor:
        """Return the value estimate."""
        return outputs[2]

    def parameters(self) -> Iterable[Tensor]:
        """Return the parameters of the policy."""
        return self.net.parameters()

    def train(self, mode: bool) -> None:
        """Switch the policy as the library does."""
        self.net.set_training_mode(mode)


def load_sb3(path: Path | str, *, num_envs: int = 8, steps: int = 64, seed: int = 0) -> tuple[Sb3Policy, Tree]:
    """Load a model that `RecurrentPPO.save` wrote. Return its functions and observations [num_envs, steps, ...].

    The observations are drawn from the model's observation space, standard normal where it has no bounds.

    Raises:
        ImportError: if sb3-contrib is not installed.
        ValueError: if the file holds no model of `RecurrentPPO`.
    """
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.utils import obs_as_tensor

    try:
        model = RecurrentPPO.load(path, device="cpu")
    except (KeyError, AttributeError, AssertionError) as error:
        raise ValueError(f"{path} holds no RecurrentPPO model: {error}") from error
    space = model.observation_space
    space.seed(seed)
    samples = [[space.sample() for _ in range(steps)] for _ in range(num_envs)]
    first = samples[0][0]
    if isinstance(first, dict):
        stacked = {key: np.array([[step[key] for step in row] for row in samples]) for key in first}
    else:
        stacked = np.array(samples)
    return Sb3Policy(model), obs_as_tensor(stacked, torch.device("cpu"))

"""PFRL, off-policy: an LSTM in its recurrent `DoubleDQN` and `EpisodicReplayBuffer`.

The agent stores the state with each transition. An update samples parts of episodes and runs them from these states.
The outputs are action values.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from pfrl.agents import DoubleDQN
from pfrl.envs import SerialVectorEnv
from pfrl.experiments import train_agent_batch
from pfrl.explorers import ConstantEpsilonGreedy
from pfrl.nn import RecurrentSequential
from pfrl.q_functions import DiscreteActionValueHead
from pfrl.replay_buffers import EpisodicReplayBuffer
from pfrl.utils import recurrent, set_random_seed
from torch import Tensor, nn

from benchmarks.honesty.common import ACTIONS, FEATURES, NUM_ENVS, STEPS, WIDTH, draw
from benchmarks.honesty.pfrl.adapter import OldGymEnv, State, run_packed
from cyborg_torchrl.checks import Recorder, Report, check_memory

PACKAGE = "pfrl"


class Functions:
    """The functions of the model: see `MemoryPolicy`."""

    def __init__(self) -> None:
        layers = nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.LSTM(WIDTH, WIDTH), nn.Linear(WIDTH, ACTIONS)
        self.model = RecurrentSequential(*layers, DiscreteActionValueHead())

    def initial_state(self, batch: int) -> State:
        """Return zeros, which the agent writes where an episode ends."""
        return ((torch.zeros(1, batch, WIDTH), torch.zeros(1, batch, WIDTH)),)

    def step(self, observation: Tensor, state: State, is_first: Tensor) -> tuple[Tensor, State]:
        """Reset where episodes begin, and compute the action values."""
        state = recurrent.mask_recurrent_state_at(state, is_first)
        values, state = recurrent.one_step_forward(self.model, observation, state)
        return values.q_values, state

    def sequence(self, observations: Tensor, state: State, is_first: Tensor) -> Tensor:
        """Run packed parts of episodes, as the update does."""
        values, order = run_packed(self.model, observations, state, is_first)
        return values.q_values[order].unflatten(0, is_first.shape)

    def parameters(self) -> Iterable[Tensor]:
        """Return the parameters of the model."""
        return self.model.parameters()


class RecordedDQN(DoubleDQN):
    """Keeps the action values of each step, what the replay buffer got, and where episodes ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[tuple[Tensor, list[dict[str, Any]], np.ndarray]] = []
        self.stored: list[dict[str, Any]] = []
        append = self.replay_buffer.append
        self.replay_buffer.append = lambda **entry: (self.stored.append(entry), append(**entry))

    def _evaluate_model_and_update_recurrent_states(self, batch_obs: Sequence[Any]) -> Any:
        self.values = super()._evaluate_model_and_update_recurrent_states(batch_obs)
        return self.values

    def batch_observe(self, batch_obs: Any, batch_reward: Any, batch_done: Any, batch_reset: Any) -> None:
        """Store the transitions, and note them."""
        super().batch_observe(batch_obs, batch_reward, batch_done, batch_reset)
        self.steps.append((self.values.q_values, self.stored, np.logical_or(batch_done, batch_reset)))
        self.stored = []


def check(seed: int) -> tuple[Report, Report]:
    """Check the model, and what the library stored between its first and its second update."""
    set_random_seed(seed)
    policy = Functions()
    report = check_memory(policy, draw(seed), seed=seed)
    explorer = ConstantEpsilonGreedy(0.1, lambda: np.random.randint(ACTIONS))  # noqa: NPY002
    sizes = {"replay_start_size": 8, "minibatch_size": 8, "update_interval": NUM_ENVS * STEPS}
    sizes["target_update_interval"] = 100 * NUM_ENVS * STEPS
    agent = RecordedDQN(
        policy.model, torch.optim.Adam(policy.parameters()), EpisodicReplayBuffer(10_000), 0.99, explorer,
        recurrent=True, **sizes,
    )  # fmt: skip
    envs = SerialVectorEnv([OldGymEnv(100 * seed + index) for index in range(NUM_ENVS)])
    with tempfile.TemporaryDirectory() as folder:
        train_agent_batch(agent, envs, (2 * STEPS - 1) * NUM_ENVS, folder)
    recorder = Recorder(policy)
    for (_, _, is_first), (values, stored, _) in zip(agent.steps[STEPS - 1 :], agent.steps[STEPS:], strict=False):
        states = [recurrent.recurrent_state_from_numpy(entry["recurrent_state"], "cpu") for entry in stored]
        observation = np.stack([entry["state"] for entry in stored])
        recorder.add(
            torch.as_tensor(observation), is_first, outputs=values,
            state=recurrent.concatenate_recurrent_states(states),
        )  # fmt: skip
    return report, recorder.check()

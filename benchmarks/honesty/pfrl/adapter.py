"""PFRL: an LSTM in `RecurrentSequential`, its recurrent PPO and `train_agent_batch`.

The agent stores a state with each transition. It computes log-probs and values before each update, not when it acts.
Its sequences are packed, so there is no padding.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from pfrl.agents import PPO
from pfrl.envs import SerialVectorEnv
from pfrl.experiments import train_agent_batch
from pfrl.nn import Branched, RecurrentSequential
from pfrl.policies import SoftmaxCategoricalHead
from pfrl.utils import recurrent, set_random_seed
from torch import Tensor, nn

from benchmarks.honesty.common import ACTIONS, FEATURES, NUM_ENVS, STEPS, WIDTH, NoiseEnv, draw
from cyborg_torchrl.checks import DiscreteActorCritic, Episodes, Recorder, Report, check_memory

PACKAGE = "pfrl"
State = tuple[tuple[Tensor, Tensor]]


class OldGymEnv(NoiseEnv):
    """The interface that PFRL expects, in which `info` holds time-outs."""

    def reset(self) -> np.ndarray:
        """Begin an episode."""
        return super().reset()[0]

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, dict]:
        """Return four values."""
        observation, reward, terminated, truncated, _ = super().step(action)
        return observation, reward, terminated, {"needs_reset": truncated}


class RecordedPPO(PPO):
    """Trains on the first rollout, and keeps the dataset of the second."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[tuple[list[np.ndarray], np.ndarray]] = []

    def batch_observe(self, batch_obs: Any, batch_reward: Any, batch_done: Any, batch_reset: Any) -> None:
        """Note which observations the agent acted on, and where episodes ended."""
        self.steps.append((list(self.batch_last_state), np.logical_or(batch_done, batch_reset)))
        super().batch_observe(batch_obs, batch_reward, batch_done, batch_reset)

    def _update_recurrent(self, dataset: list[list[dict]]) -> None:
        # The dataset holds episodes of all environments, so transitions are found by their observation.
        self.transitions = {id(transition["state"]): transition for episode in dataset for transition in episode}
        if self.n_updates == 0:
            super()._update_recurrent(dataset)


class Functions(DiscreteActorCritic):
    """The functions of the model: see `MemoryPolicy`."""

    def __init__(self) -> None:
        heads = Branched(nn.Sequential(nn.Linear(WIDTH, ACTIONS), SoftmaxCategoricalHead()), nn.Linear(WIDTH, 1))
        super().__init__(RecurrentSequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.LSTM(WIDTH, WIDTH), heads))

    def initial_state(self, batch: int) -> State:
        """Return zeros, which the agent writes where an episode ends."""
        return ((torch.zeros(1, batch, WIDTH), torch.zeros(1, batch, WIDTH)),)

    def step(self, observation: Tensor, state: State, is_first: Tensor) -> tuple[tuple[Tensor, Tensor], State]:
        """Reset where episodes begin, and act."""
        state = recurrent.mask_recurrent_state_at(state, is_first)
        (distribution, value), state = recurrent.one_step_forward(self.model, observation, state)
        return (distribution.logits, value.flatten()), state

    def sequence(self, observations: Tensor, state: State, is_first: Tensor) -> tuple[Tensor, Tensor]:
        """Run packed episodes, as the update does."""
        (distribution, value), order = run_packed(self.model, observations, state, is_first)
        return distribution.logits[order].unflatten(0, is_first.shape), value[order].view(is_first.shape)


def run_packed(model: nn.Module, observations: Tensor, state: State, is_first: Tensor) -> tuple[Any, Tensor]:
    """Run episodes, longest first. Return what the library returns, and the order that undoes its sorting."""
    episodes = Episodes(is_first)
    numbers, rows = (episodes.split(x) for x in (torch.arange(is_first.numel()).view(is_first.shape), observations))
    longest_first = sorted(range(len(rows)), key=lambda episode: -len(rows[episode]))
    states = episodes.states(state, dim=1)
    states = [recurrent.get_recurrent_state_at(states, episode, detach=False) for episode in longest_first]
    packed = [rows[episode] for episode in longest_first], recurrent.concatenate_recurrent_states(states)
    output, _ = recurrent.pack_and_forward(model, *packed)
    order = torch.stack(recurrent.flatten_sequences_time_first([numbers[episode] for episode in longest_first]))
    return output, order.argsort()


def check(seed: int) -> tuple[Report, Report]:
    """Check the model, and the second rollout of the library's own loop."""
    set_random_seed(seed)
    policy = Functions()
    report = check_memory(policy, draw(seed), seed=seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    agent = RecordedPPO(policy.model, optimizer, update_interval=NUM_ENVS * STEPS, epochs=2, recurrent=True)
    envs = SerialVectorEnv([OldGymEnv(100 * seed + index) for index in range(NUM_ENVS)])
    with tempfile.TemporaryDirectory() as folder:
        train_agent_batch(agent, envs, 2 * NUM_ENVS * STEPS, folder)
    recorder = Recorder(policy)
    for (_, is_first), (observations, _) in zip(agent.steps[STEPS - 1 :], agent.steps[STEPS:], strict=False):
        rows = [agent.transitions[id(observation)] for observation in observations]
        column = {key: np.stack([row[key] for row in rows]) for key in rows[0] if "recurrent" not in key}
        column = {key: torch.as_tensor(values) for key, values in column.items()}
        state = recurrent.concatenate_recurrent_states([row["recurrent_state"] for row in rows])
        recorder.add(column["state"], is_first, state=state, action=column["action"], log_prob=column["log_prob"])
        recorder.bootstrap(column["next_state"], column["next_v_pred"], column["nonterminal"])
    return report, recorder.check()

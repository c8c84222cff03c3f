"""The LSTM pattern of CleanRL's `ppo_atari_lstm`, written for vectors from its documentation, since it is no package.

Its documentation describes three points. The update starts from the state at the beginning of the rollout, runs all
steps again in order with a reset wherever an episode began, and splits minibatches by environment.
"""

from __future__ import annotations

import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical

from benchmarks.honesty.common import ACTIONS, FEATURES, NUM_ENVS, STEPS, WIDTH, NoiseEnv, draw
from cyborg_torchrl.checks import DiscreteActorCritic, Recorder, Report, check_memory

PACKAGE, VERSION = "CleanRL pattern", "documentation of ppo_atari_lstm"
State = tuple[Tensor, Tensor]


class Agent(nn.Module):
    """Encoder, LSTM and two heads. Time is the first dimension of the LSTM, as in CleanRL."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU())
        self.lstm = nn.LSTM(WIDTH, WIDTH)
        self.actor, self.critic = nn.Linear(WIDTH, ACTIONS), nn.Linear(WIDTH, 1)

    def features(self, observations: Tensor, state: State, done: Tensor) -> tuple[Tensor, State]:
        """Run steps of B environments that are flattened with time first, [T * B, ...], and reset where done is 1."""
        batch = state[0].shape[1]
        encoded = self.encoder(observations).reshape(-1, batch, WIDTH)
        rows = []
        for hidden, flag in zip(encoded, done.reshape(-1, batch), strict=True):
            keep = (1.0 - flag).view(1, -1, 1)
            out, state = self.lstm(hidden.unsqueeze(0), (keep * state[0], keep * state[1]))
            rows.append(out)
        return torch.cat(rows).flatten(0, 1), state


class Pattern(DiscreteActorCritic):
    """The functions of the agent: see `MemoryPolicy`."""

    model: Agent

    def initial_state(self, batch: int) -> State:
        """Return zeros."""
        return torch.zeros(1, batch, WIDTH), torch.zeros(1, batch, WIDTH)

    def step(self, observation: Tensor, state: State, is_first: Tensor) -> tuple[tuple[Tensor, Tensor], State]:
        """Act, with the flag that the environment gave after the last step."""
        features, state = self.model.features(observation, state, is_first.to(observation.dtype))
        return (self.model.actor(features), self.model.critic(features).flatten()), state

    def sequence(self, observations: Tensor, state: State, is_first: Tensor) -> tuple[Tensor, Tensor]:
        """Run as in the update: all steps in one call, flattened with time first."""
        flat = observations.transpose(0, 1).flatten(0, 1)
        done = is_first.T.flatten().to(observations.dtype)
        features, _ = self.model.features(flat, state, done)
        rows = features.unflatten(0, is_first.T.shape).transpose(0, 1)
        return self.model.actor(rows), self.model.critic(rows).squeeze(-1)


def check(seed: int) -> tuple[Report, Report]:
    """Check the agent, and two rollouts in a row: the second starts in the middle of episodes."""
    torch.manual_seed(seed)
    policy = Pattern(Agent())
    report = check_memory(policy, draw(seed), seed=seed)
    makers = [lambda index=index: NoiseEnv(100 * seed + index) for index in range(NUM_ENVS)]
    envs = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    observation, done = torch.as_tensor(envs.reset()[0]), torch.zeros(NUM_ENVS)
    state = policy.initial_state(NUM_ENVS)
    for _ in range(2):
        recorder, first = Recorder(policy), state
        for t in range(STEPS):
            with torch.no_grad():
                outputs, state = policy.step(observation, state, done)
            action = Categorical(logits=outputs[0]).sample()
            stored = first if t == 0 else None  # the state of the rollout's beginning is all that is stored
            recorder.add(observation, done, state=stored, action=action, log_prob=policy.log_prob(outputs, action))
            following, _, terminated, truncated, _ = envs.step(action.numpy())
            observation = torch.as_tensor(following)
            done = torch.as_tensor(terminated | truncated).float()
        with torch.no_grad():
            outputs, _ = policy.step(observation, state, done)
        recorder.bootstrap(observation, outputs[1], done == 0)
    return report, recorder.check()

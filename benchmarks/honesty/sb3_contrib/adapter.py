"""RecurrentPPO of sb3-contrib: its policy, its rollout buffer, its bootstrapped values and its padded minibatches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.honesty.common import EPISODE_LIMIT, NUM_ENVS, STEPS, WIDTH, NoiseEnv, draw, parameters_after
from cyborg_torchrl.checks import Recorder, Report, check_memory, check_padding
from cyborg_torchrl.checks.sb3 import Sb3Policy

PACKAGE = "sb3-contrib"
GAMMA = 0.9


class _Truncations(BaseCallback):
    """Note the last observations of truncated episodes and the rewards that the environment gave."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[np.ndarray] = []
        self.last: list[dict[int, np.ndarray]] = []

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        truncated = [index for index, info in enumerate(infos) if info.get("TimeLimit.truncated")]
        self.rewards.append(self.locals["rewards"].copy())
        self.last.append({index: infos[index]["terminal_observation"] for index in truncated})
        return True


class _Policy(Sb3Policy):
    """The policy's functions, with the log-probs that the buffer stores."""

    def log_prob(self, outputs: Any, actions: torch.Tensor) -> torch.Tensor:
        """Return log-probs, which the outputs hold for each of the three actions."""
        return outputs[0].gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)


def check(seed: int) -> tuple[Report, Report]:
    """Check the policy, and a rollout of the library's own loop after its first update."""
    torch.manual_seed(seed)
    envs = DummyVecEnv([lambda index=index: NoiseEnv(100 * seed + index) for index in range(NUM_ENVS)])
    sizes = {"n_steps": STEPS, "batch_size": NUM_ENVS * STEPS, "n_epochs": 2, "gamma": GAMMA}
    policy_sizes = {"lstm_hidden_size": WIDTH, "net_arch": [WIDTH]}
    model = RecurrentPPO("MlpLstmPolicy", envs, **sizes, policy_kwargs=policy_sizes, seed=seed, device="cpu")
    policy = _Policy(model)
    report = check_memory(policy, draw(seed), seed=seed)
    model.learn(NUM_ENVS * STEPS)
    return report, _recorded(model, policy)


def _recorded(model: RecurrentPPO, policy: _Policy) -> Report:
    buffer, callback = model.rollout_buffer, _Truncations()
    callback.init_callback(model)
    compute, last = buffer.compute_returns_and_advantage, {}

    def keep(last_values: torch.Tensor, dones: np.ndarray) -> None:
        last.update(values=last_values, dones=dones)
        compute(last_values=last_values, dones=dones)

    buffer.compute_returns_and_advantage = keep
    model.collect_rollouts(model.env, callback, buffer, STEPS)
    recorder = Recorder(policy)
    for t in range(STEPS):
        pair = [(torch.as_tensor(h[t]), torch.as_tensor(c[t])) for h, c in _stored(buffer)]
        recorder.add(
            torch.as_tensor(buffer.observations[t]),
            buffer.episode_starts[t],
            state=policy.states(*pair),
            action=torch.as_tensor(buffer.actions[t]).flatten(),
            log_prob=buffer.log_probs[t],
        )
        if callback.last[t]:
            rows = np.isin(np.arange(NUM_ENVS), list(callback.last[t]))
            observation = np.stack([callback.last[t].get(i, np.zeros(3, np.float32)) for i in range(NUM_ENVS)])
            # The library adds the discounted value of the last observation to the reward.
            value = (buffer.rewards[t] - callback.rewards[t]) / GAMMA
            recorder.bootstrap(torch.as_tensor(observation), value, rows)
    recorder.bootstrap(torch.as_tensor(model._last_obs), last["values"].flatten(), ~last["dones"])
    return recorder.check().with_findings(_padding(model))


def _stored(buffer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    pairs = [(buffer.hidden_states_pi, buffer.cell_states_pi), (buffer.hidden_states_vf, buffer.cell_states_vf)]
    return pairs


def _padding(model: RecurrentPPO) -> Any:
    """Train on one padded minibatch of the buffer, twice with the same numbers and once with other padding."""
    samples = next(iter(model.rollout_buffer.get(None)))
    names = ("observations", "actions", "old_values", "old_log_prob", "advantages", "returns")
    batch = {name: getattr(samples, name) for name in names}
    get, model.n_epochs = model.rollout_buffer.get, 1

    def update(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        model.rollout_buffer.get = lambda size: iter([samples._replace(**batch)])
        return parameters_after([model.policy], model.policy.optimizer, model.train)

    try:
        # The buffer pads these ones with zeros, as it pads all entries.
        steps = model.rollout_buffer.pad_and_flatten(np.ones(NUM_ENVS * STEPS, dtype=np.float32))
        return check_padding(update, batch, steps < 0.5)
    finally:
        model.rollout_buffer.get = get


assert EPISODE_LIMIT < STEPS, "a rollout holds truncated episodes"

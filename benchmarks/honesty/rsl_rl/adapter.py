"""rsl_rl: `RNNModel` actor and critic, its PPO with the rollout storage, and its padded trajectories."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from rsl_rl.algorithms import PPO
from rsl_rl.models import RNNModel
from rsl_rl.storage import RolloutStorage
from tensordict import TensorDict
from torch import Tensor

from benchmarks.honesty.common import ACTIONS, NUM_ENVS, STEPS, WIDTH, NoiseEnv, draw, parameters_after
from cyborg_torchrl.checks import Recorder, Report, check_memory, check_padding

PACKAGE = "rsl-rl-lib"
GAMMA = 0.9
State = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


class Functions:
    """The functions of an actor and a critic: see `MemoryPolicy`."""

    def __init__(self, actor: RNNModel, critic: RNNModel) -> None:
        self.models = (actor, critic)

    def initial_state(self, batch: int) -> State:
        """Return zeros, which the library's `reset` writes."""
        pair = (torch.zeros(1, batch, WIDTH), torch.zeros(1, batch, WIDTH))
        return pair, pair

    def step(self, observation: Tensor, state: State, is_first: Tensor) -> tuple[Any, State]:
        """Reset where episodes begin, as the library does after each step, and act."""
        actor, critic = self.models
        for model, pair in zip(self.models, state, strict=True):
            model.reset(hidden_state=tuple(part.clone() for part in pair))
            model.reset(is_first)
        inputs = TensorDict({"policy": observation}, [len(observation)])
        actor(inputs, stochastic_output=True)
        value = critic(inputs)
        following = tuple(model.get_hidden_state() for model in self.models)
        return (*actor.output_distribution_params, value.squeeze(-1)), following

    def sequence(self, observations: Tensor, state: State, is_first: Tensor) -> Any:
        """Run the batch that the library's storage makes of the steps: trajectories, padded, with stored states."""
        batch_size, length = is_first.shape
        storage = build_storage(batch_size, length)
        storage.observations = TensorDict({"policy": observations.transpose(0, 1)}, [length, batch_size])
        storage.dones[:-1] = is_first[:, 1:].T.unsqueeze(-1).byte()
        keep = (~is_first[:, 0]).view(1, -1, 1)
        saved = [[_at_start(part * keep, length) for part in pair] for pair in state]
        storage.saved_hidden_state_a, storage.saved_hidden_state_c = saved
        shape = (length, batch_size, ACTIONS)
        storage.distribution_params = (torch.zeros(shape), torch.zeros(shape))
        batch = next(storage.recurrent_mini_batch_generator(1, 1))
        actor, critic = self.models
        actor(batch.observations, masks=batch.masks, hidden_state=batch.hidden_states[0], stochastic_output=True)
        value = critic(batch.observations, masks=batch.masks, hidden_state=batch.hidden_states[1])
        # A sequence of one step loses its time dimension in the model.
        outputs = [*actor.output_distribution_params, value]
        mean, std, value = (part.reshape(length, batch_size, -1).transpose(0, 1) for part in outputs)
        return mean, std, value.squeeze(-1)

    def log_prob(self, outputs: Any, actions: Tensor) -> Tensor:
        """Return the log-probs of actions."""
        return torch.distributions.Normal(*outputs[:2]).log_prob(actions).sum(-1)

    def value(self, outputs: Any) -> Tensor:
        """Return the value estimate."""
        return outputs[2]

    def parameters(self) -> Iterable[Tensor]:
        """Return the parameters of both models."""
        return chain.from_iterable(model.parameters() for model in self.models)

    def train(self, mode: bool) -> None:
        """Switch both models."""
        for model in self.models:
            model.train(mode)


def build_storage(num_envs: int, steps: int) -> RolloutStorage:
    """Return an empty storage of the library."""
    sample = TensorDict({"policy": torch.zeros(num_envs, 3)}, [num_envs])
    return RolloutStorage("rl", num_envs, steps, sample, [ACTIONS])


def build_model(output: int, *, is_actor: bool) -> RNNModel:
    """Return an LSTM model of the library."""
    sample, groups = TensorDict({"policy": torch.zeros(NUM_ENVS, 3)}, [NUM_ENVS]), {"policy": ["policy"]}
    distribution = {"class_name": "GaussianDistribution", "init_std": 1.0} if is_actor else None
    sizes = {"hidden_dims": [WIDTH], "rnn_hidden_dim": WIDTH}
    return RNNModel(sample, groups, "policy", output, distribution_cfg=distribution, **sizes)


def _at_start(state: Tensor, length: int) -> Tensor:
    """Return states [T, layers, N, H] as the storage holds them: zero where episodes begin later."""
    return torch.cat([state.unsqueeze(0), torch.zeros(length - 1, *state.shape).to(state)])


def check(seed: int) -> tuple[Report, Report]:
    """Check the models, and the second rollout of the library's PPO."""
    torch.manual_seed(seed)
    policy = Functions(build_model(ACTIONS, is_actor=True), build_model(1, is_actor=False))
    report = check_memory(policy, draw(seed), seed=seed)
    torch.manual_seed(seed)
    policy = Functions(build_model(ACTIONS, is_actor=True), build_model(1, is_actor=False))
    algorithm = PPO(
        *policy.models, build_storage(NUM_ENVS, STEPS), num_learning_epochs=1, num_mini_batches=1, gamma=GAMMA
    )
    makers = [lambda index=index: NoiseEnv(100 * seed + index, is_continuous=True) for index in range(NUM_ENVS)]
    envs = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    observation = _observation(envs.reset()[0])
    observation, *_ = _rollout(algorithm, envs, observation, torch.zeros(NUM_ENVS))
    algorithm.storage.clear()
    state = tuple(model.get_hidden_state() for model in policy.models)
    return report, _recorded(algorithm, policy, envs, observation, state)


def _observation(array: np.ndarray) -> TensorDict:
    return TensorDict({"policy": torch.as_tensor(array)}, [NUM_ENVS])


def _rollout(algorithm: PPO, envs: SyncVectorEnv, observation: TensorDict, done: Tensor) -> tuple[Any, ...]:
    """Act for a rollout as the library's runner does. Return what the steps after it need."""
    flags, bootstraps = [done], []
    for t in range(STEPS):
        with torch.inference_mode(False), torch.no_grad():
            actions = algorithm.act(observation)
        following, rewards, terminated, truncated, infos = envs.step(actions.numpy())
        done = torch.as_tensor(terminated | truncated)
        time_outs = torch.as_tensor(truncated)
        before = torch.as_tensor(rewards).float()
        with torch.no_grad():
            algorithm.process_env_step(_observation(following), before, done, {"time_outs": time_outs.float()})
        if truncated.any():
            last = np.stack([infos["final_obs"][i] if truncated[i] else following[i] for i in range(NUM_ENVS)])
            value = (algorithm.storage.rewards[t].squeeze(-1) - before) / GAMMA
            bootstraps.append((t, torch.as_tensor(last.astype(np.float32)), value, time_outs))
        observation = _observation(following)
        flags.append(done.float())
    with torch.no_grad():
        algorithm.compute_returns(observation)
    return observation, flags, bootstraps


def _recorded(algorithm: PPO, policy: Functions, envs: Any, observation: TensorDict, state: Any) -> Report:
    state = tuple(tuple(part.clone() for part in pair) for pair in state)
    storage, last = algorithm.storage, {}
    critic = algorithm.critic
    observation, flags, bootstraps = _rollout(algorithm, envs, observation, torch.zeros(NUM_ENVS))
    with torch.no_grad():
        hidden = tuple(part.clone() for part in critic.get_hidden_state())
        last["value"] = critic(observation).squeeze(-1)
        critic.reset(hidden_state=hidden)
    recorder = Recorder(policy)
    for t in range(STEPS):
        saved = [[part[t] for part in pair] for pair in (storage.saved_hidden_state_a, storage.saved_hidden_state_c)]
        action, log_prob = storage.actions[t], storage.actions_log_prob[t].squeeze(-1)
        recorder.add(storage.observations["policy"][t], flags[t], state=saved, action=action, log_prob=log_prob)
        for at, final, value, rows in bootstraps:
            if at == t:
                recorder.bootstrap(final, value, rows)
    recorder.bootstrap(observation["policy"], last["value"], flags[-1] == 0)
    return recorder.check().with_findings(_padding(algorithm))


def _padding(algorithm: PPO) -> Any:
    """Train on one padded batch of the storage, and again with other numbers in the padding."""
    storage = algorithm.storage
    batch = next(storage.recurrent_mini_batch_generator(1, 1))
    numbers = {"observations": batch.observations["policy"].transpose(0, 1)}

    def update(numbers: dict[str, Tensor]) -> list[Tensor]:
        def generate(*_: Any) -> Any:
            again = next(RolloutStorage.recurrent_mini_batch_generator(storage, 1, 1))
            again.observations["policy"] = numbers["observations"].transpose(0, 1)
            yield again

        storage.recurrent_mini_batch_generator = generate
        step = storage.step
        models = [algorithm.actor, algorithm.critic]
        result = parameters_after(models, algorithm.optimizer, algorithm.update)
        storage.step = step
        return result

    return check_padding(update, numbers, ~batch.masks.T)

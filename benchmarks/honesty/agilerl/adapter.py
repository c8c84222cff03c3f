"""AgileRL: `RecurrentPPO` with its LSTM encoder, its rollout loop, its buffer and its padded sequences."""

from __future__ import annotations

from itertools import count

import torch
from agilerl.algorithms import RecurrentPPO
from agilerl.rollouts import collect_rollouts_recurrent
from agilerl.utils.utils import make_vect_envs
from torch import Tensor, nn

from benchmarks.honesty.common import NUM_ENVS, STEPS, WIDTH, NoiseEnv, draw, parameters_after
from cyborg_torchrl.checks import (
    DiscreteActorCritic,
    Episodes,
    Finding,
    Recorder,
    Report,
    check_memory,
    check_padding,
)

PACKAGE = "agilerl"
State = dict[str, Tensor]


class Functions(DiscreteActorCritic):
    """The functions of the agent: see `MemoryPolicy`."""

    def __init__(self, agent: RecurrentPPO) -> None:
        super().__init__(nn.ModuleList([agent.actor, agent.critic.head_net]))
        self.agent, self.initial_state = agent, agent.get_initial_hidden_state

    def step(self, observation: Tensor, state: State, is_first: Tensor) -> tuple[tuple[Tensor, Tensor], State]:
        """Reset where episodes begin, and run the function that acting and the update call."""
        state = {name: part * ~is_first.view(1, -1, 1) for name, part in state.items()}
        *_, values, state = self.agent._get_action_and_values(observation, hidden_state=state, sample=False)
        return (self.agent.actor.head_net.dist.logits, values), state

    def sequence(self, observations: Tensor, state: State, is_first: Tensor) -> tuple[Tensor, Tensor]:
        """Run padded episodes, as the update does."""
        episodes = Episodes(is_first)
        padded = episodes.pad(observations)
        begins = torch.zeros(len(padded), dtype=torch.bool)  # their states are zeros already
        outputs, _ = self.step(padded.flatten(0, 1), episodes.states(state, dim=1), begins)
        return tuple(episodes.join(output.unflatten(0, padded.shape[:2])) for output in outputs)


def check(seed: int) -> tuple[Report, Report]:
    """Check the agent, and the second rollout of the library's own loop."""
    torch.manual_seed(seed)
    seeds = count(100 * seed)
    envs = make_vect_envs(num_envs=NUM_ENVS, make_env=lambda: NoiseEnv(next(seeds)), should_async_vector=False)
    spaces = envs.single_observation_space, envs.single_action_space
    sizes = {"num_envs": NUM_ENVS, "learn_step": NUM_ENVS * STEPS, "update_epochs": 2, "gae_lambda": 0}
    network = {"encoder_config": {"hidden_state_size": WIDTH}, "latent_dim": WIDTH}
    agent = RecurrentPPO(*spaces, net_config=network, **sizes)
    policy = Functions(agent)
    report = check_memory(policy, draw(seed), seed=seed)
    _, *last = collect_rollouts_recurrent(agent, envs)
    agent.learn()
    last = dict(zip(("last_obs", "last_done", "last_scores", "last_info"), last, strict=True))
    collect_rollouts_recurrent(agent, envs, **last)
    recorder, data, is_first = Recorder(policy), agent.rollout_buffer.buffer, torch.as_tensor(last["last_done"])
    next_values = (data["returns"] - data["rewards"]) / agent.gamma  # with lambda 0, what the update uses
    for row, values in zip(data, next_values, strict=True):
        state = {name: part.transpose(0, 1) for name, part in row["hidden_states"].items()}
        action = row["actions"].flatten()
        recorder.add(row["observations"], is_first, state=state, action=action, log_prob=row["log_probs"])
        recorder.bootstrap(row["next_observations"], values, values.abs() > 1e-6)
        is_first = row["dones"]
    return report, recorder.check().with_findings(_padding(agent))


def _padding(agent: RecurrentPPO) -> Finding:
    """Train on the padded sequences of the buffer."""
    buffer, networks = agent.rollout_buffer, [agent.actor, agent.critic]
    buffer.prepare_sequence_tensors()
    shape = buffer.num_sequences, buffer.max_sequence_length
    batch = {name: buffer.padded_data[name].unflatten(0, shape) for name in ("observations", "actions")}
    batch["actions"] = batch["actions"].long()  # the buffer holds floats, which the check would disturb
    buffer.prepare_sequence_tensors = lambda device: None  # keep the sequences that `update` writes

    def update(batch: dict[str, Tensor]) -> list[Tensor]:
        buffer.padded_data.update({name: values.flatten(0, 1) for name, values in batch.items()})
        return parameters_after(networks, agent.optimizer.optimizer, agent.learn)

    return check_padding(update, batch, ~buffer.padded_data["pad_mask"].view(shape))

"""skrl: an LSTM model with the functions that its documentation asks for, in its `PPO_RNN` agent and memory."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from skrl.agents.torch.ppo import PPO_RNN
from skrl.memories.torch import RandomMemory
from skrl.models.torch import CategoricalMixin, DeterministicMixin, Model
from torch import Tensor, nn

from benchmarks.honesty.common import ACTIONS, FEATURES, NUM_ENVS, STEPS, WIDTH, NoiseEnv, draw
from cyborg_torchrl.checks import DiscreteActorCritic, Recorder, Report, check_memory

PACKAGE = "skrl"
GAMMA = 0.9
State = list[Tensor]


class Network(nn.Module):
    """An LSTM and a head; in training it restarts after each step at which an episode ended."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(FEATURES, WIDTH), nn.Linear(WIDTH, outputs)

    def run(self, observations: Tensor, state: State, ends: Tensor | None, length: int) -> tuple[Tensor, State]:
        """Run steps that are flattened with the environment first, [B * length, ...]."""
        rows, hidden = [], tuple(state)
        steps = observations.view(-1, length, FEATURES)
        for t in range(length):
            out, hidden = self.lstm(steps[:, t].unsqueeze(0), hidden)
            rows.append(out[0])
            if ends is not None:
                keep = 1.0 - ends.view(-1, length)[:, t].to(out.dtype).view(1, -1, 1)
                hidden = tuple(part * keep for part in hidden)
        return self.head(torch.stack(rows, 1).flatten(0, 1)), list(hidden)


def _specification(num_envs: int, length: int) -> dict[str, Any]:
    return {"rnn": {"sequence_length": length, "sizes": [(1, num_envs, WIDTH)] * 2}}


def _compute(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Compute outputs as skrl calls for them: single steps in acting, sequences in training."""
    state, length = inputs["rnn"], 1
    if "terminated" in inputs:
        length = model.length
        state = [part.reshape(1, -1, length, WIDTH)[:, :, 0].contiguous() for part in state]
    ends = inputs["terminated"] | inputs["truncated"] if "terminated" in inputs else None
    outputs, following = model.net.run(inputs["observations"], state, ends, length)
    return outputs, {"rnn": following}


class Policy(CategoricalMixin, Model):
    """The actor."""

    def __init__(self, *spaces: Any, num_envs: int, length: int) -> None:
        Model.__init__(self, observation_space=spaces[0], action_space=spaces[1], device="cpu")
        CategoricalMixin.__init__(self)
        self.net, self.num_envs, self.length = Network(ACTIONS), num_envs, length

    def get_specification(self) -> dict[str, Any]:
        """Return the sizes of the states."""
        return _specification(self.num_envs, self.length)

    def compute(self, inputs: dict[str, Any], role: str = "") -> tuple[Tensor, dict[str, Any]]:
        """Return logits and the next state."""
        return _compute(self, inputs)


class Value(DeterministicMixin, Model):
    """The critic."""

    def __init__(self, *spaces: Any, num_envs: int, length: int) -> None:
        Model.__init__(self, observation_space=spaces[0], action_space=spaces[1], device="cpu")
        DeterministicMixin.__init__(self)
        self.net, self.num_envs, self.length = Network(1), num_envs, length

    def get_specification(self) -> dict[str, Any]:
        """Return the sizes of the states."""
        return _specification(self.num_envs, self.length)

    def compute(self, inputs: dict[str, Any], role: str = "") -> tuple[Tensor, dict[str, Any]]:
        """Return values and the next state."""
        return _compute(self, inputs)


class Functions(DiscreteActorCritic):
    """The functions of both models: see `MemoryPolicy`."""

    model: nn.ModuleList

    def initial_state(self, batch: int) -> list[State]:
        """Return zeros."""
        return [[torch.zeros(1, batch, WIDTH), torch.zeros(1, batch, WIDTH)] for _ in self.model]

    def step(self, observation: Tensor, state: list[State], is_first: Tensor) -> tuple[Any, list[State]]:
        """Restart where episodes begin, as the agent does after each step, and act."""
        keep = (~is_first).view(1, -1, 1)
        inputs = [{"observations": observation, "rnn": [part * keep for part in pair]} for pair in state]
        (logits, policy), (values, value) = (model.compute(i) for model, i in zip(self.model, inputs, strict=True))
        return (logits, values.flatten()), [policy["rnn"], value["rnn"]]

    def sequence(self, observations: Tensor, state: list[State], is_first: Tensor) -> Any:
        """Run as the agent's update does, with the ends of episodes and the state before each step."""
        batch, length = is_first.shape
        ends = torch.cat([is_first[:, 1:], torch.zeros(batch, 1, dtype=torch.bool)], 1).reshape(-1, 1)
        keep = (~is_first[:, 0]).view(1, -1, 1)
        outputs = []
        for model, pair in zip(self.model, state, strict=True):
            stored = [(part * keep).repeat_interleave(length, 1) for part in pair]
            trained, model.length = model.length, length
            inputs = {"observations": observations.flatten(0, 1), "rnn": stored}
            outputs.append(model.compute({**inputs, "terminated": ends, "truncated": torch.zeros_like(ends)})[0])
            model.length = trained
        return outputs[0].unflatten(0, (batch, length)), outputs[1].view(batch, length)


def check(seed: int) -> tuple[Report, Report]:
    """Check the models, and what the agent stores in its memory in the second rollout."""
    torch.manual_seed(seed)
    box, discrete = NoiseEnv(0).observation_space, gymnasium.spaces.Discrete(ACTIONS)
    policy, value = (kind(box, discrete, num_envs=NUM_ENVS, length=STEPS) for kind in (Policy, Value))
    functions = Functions(nn.ModuleList([policy, value]))
    report = check_memory(functions, draw(seed), seed=seed)
    memory = RandomMemory(memory_size=STEPS, num_envs=NUM_ENVS, device="cpu")
    sizes = {"rollouts": STEPS, "learning_epochs": 1, "mini_batches": 1, "discount_factor": GAMMA}
    agent = PPO_RNN(
        models={"policy": policy, "value": value},
        memory=memory,
        observation_space=box,
        action_space=discrete,
        device="cpu",
        cfg={**sizes, "time_limit_bootstrap": True, "experiment": {"write_interval": 0, "checkpoint_interval": 0}},
    )
    agent.init()
    agent.enable_training_mode(True) if hasattr(agent, "enable_training_mode") else setattr(agent, "training", True)
    agent.update = lambda **_: None  # the parameters stay those that acted
    makers = [lambda index=index: NoiseEnv(100 * seed + index) for index in range(NUM_ENVS)]
    envs = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    observation, first = torch.as_tensor(envs.reset()[0]), np.ones(NUM_ENVS, dtype=bool)
    for rollout in range(2):
        flags = []
        for t in range(STEPS):
            flags.append(first)
            with torch.no_grad():
                actions, _ = agent.act(observation, None, timestep=t, timesteps=STEPS)
                following, rewards, terminated, truncated, _ = envs.step(actions.flatten().numpy())
                ends = {"terminated": terminated, "truncated": truncated}
                agent.record_transition(
                    observations=observation,
                    states=None,
                    actions=actions,
                    rewards=torch.as_tensor(rewards).float().view(-1, 1),
                    next_observations=torch.as_tensor(following),
                    next_states=None,
                    infos={},
                    timestep=t,
                    timesteps=STEPS,
                    **{name: torch.as_tensor(flag).view(-1, 1) for name, flag in ends.items()},
                )
            observation, first = torch.as_tensor(following), terminated | truncated
        if rollout:
            break
    recorder = Recorder(functions)
    stored = {name: memory.get_tensor_by_name(name) for name in ("observations", "actions", "log_prob")}
    for t in range(STEPS):
        names = [[f"rnn_{kind}_{index}" for index in range(2)] for kind in ("policy", "value")]
        state = [[memory.get_tensor_by_name(name)[t].transpose(0, 1) for name in pair] for pair in names]
        action, log_prob = stored["actions"][t].flatten(), stored["log_prob"][t].flatten()
        recorder.add(stored["observations"][t], flags[t], state=state, action=action, log_prob=log_prob)
    with torch.no_grad():
        inputs = {"observations": observation, "rnn": agent._rnn_initial_states["value"]}
        last, _ = value.act(inputs, role="value")
    recorder.bootstrap(observation, last.flatten(), ~first)
    return report, recorder.check()

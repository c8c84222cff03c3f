"""RLlib, new API stack: the default PPO module with an LSTM, and episodes of its `SingleAgentEnvRunner`."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from torch import Tensor

from benchmarks.honesty.common import NUM_ENVS, STEPS, WIDTH, NoiseEnv, draw
from cyborg_torchrl.checks import DiscreteActorCritic, Episodes, Recorder, Report, check_memory
from cyborg_torchrl.checks.nested import Tree, map_leaves

PACKAGE = "ray"
MODEL = DefaultModelConfig(use_lstm=True, lstm_cell_size=WIDTH, fcnet_hiddens=[WIDTH], max_seq_len=64)


class Functions(DiscreteActorCritic):
    """The functions of the module: see `MemoryPolicy`."""

    model: Any

    def initial_state(self, batch: int) -> Tree:
        """Return the module's own initial state, repeated for each environment."""

        def repeat(leaf: Any) -> Tensor:
            return torch.as_tensor(leaf).unsqueeze(0).repeat(batch, 1, 1)

        return map_leaves(repeat, self.model.get_initial_state())

    def step(self, observation: Tensor, state: Tree, is_first: Tensor) -> tuple[Any, Tree]:
        """Act on sequences of one step, with the initial state where an episode begins."""
        state = map_leaves(lambda leaf: leaf * (~is_first).view(-1, 1, 1), state)
        batch = {Columns.OBS: observation.unsqueeze(1), Columns.STATE_IN: state}
        outputs = self.model._forward(batch)  # exploration calls it without gradients
        values = self.model.compute_values(batch)
        return (outputs[Columns.ACTION_DIST_INPUTS][:, 0], values[:, 0]), outputs[Columns.STATE_OUT]

    def sequence(self, observations: Tensor, state: Tree, is_first: Tensor) -> Any:
        """Run the training pass over padded episodes, since the library keeps each episode apart."""
        episodes = Episodes(is_first)
        inputs = {Columns.OBS: episodes.pad(observations), Columns.STATE_IN: episodes.states(state)}
        outputs = self.model.forward_train(inputs)
        values = self.model.compute_values(inputs, outputs.get(Columns.EMBEDDINGS))
        return episodes.join(outputs[Columns.ACTION_DIST_INPUTS]), episodes.join(values)


def check(seed: int) -> tuple[Report, Report]:
    """Check the module, and the episodes that a runner samples with one environment."""
    torch.manual_seed(seed)
    env = NoiseEnv(seed)
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    spec = RLModuleSpec(DefaultPPOTorchRLModule, **spaces, model_config=MODEL)
    report = check_memory(Functions(spec.build()), draw(seed), seed=seed)
    gymnasium.register("honesty/Noise-v0", lambda **_: NoiseEnv(seed))
    config = PPOConfig().environment("honesty/Noise-v0").env_runners(num_env_runners=0, num_envs_per_env_runner=1)
    runner = SingleAgentEnvRunner(config=config.rl_module(model_config=MODEL).debugging(seed=seed))
    policy = Functions(runner.module)
    episodes = runner.sample(num_timesteps=NUM_ENVS * STEPS)
    recorder = Recorder(policy)
    for episode in episodes:
        state = policy.initial_state(1)
        stored = episode.get_extra_model_outputs(Columns.STATE_OUT)
        for t in range(len(episode)):
            recorder.add(
                torch.as_tensor(episode.get_observations(t)).unsqueeze(0),
                [t == 0],
                state=state,
                action=torch.as_tensor(np.array([episode.get_actions(t)])),
                log_prob=np.array([episode.get_extra_model_outputs(Columns.ACTION_LOGP, t)]),
            )
            state = map_leaves(lambda leaf, t=t: torch.as_tensor(leaf[t]).unsqueeze(0), stored)
    return report, recorder.check()

"""OpenRL: recurrent `PPOAgent` with its GRU networks, its training loop and its replay buffer."""

import gymnasium
import torch
from openrl.algorithms.ppo import PPOAlgorithm
from openrl.configs.config import create_config_parser
from openrl.envs.common import make
from openrl.modules.common import PPONet
from openrl.runners.common import PPOAgent

from benchmarks.honesty.common import NUM_ENVS, STEPS, WIDTH, NoiseEnv, draw
from cyborg_torchrl.checks import DiscreteActorCritic, Recorder, check_memory

PACKAGE = "openrl"
OPTIONS = {"use_recurrent_policy": True, "hidden_size": WIDTH, "episode_length": STEPS, "ppo_epoch": 2}
OPTIONS |= {"gae_lambda": 0.0, "use_valuenorm": False}  # so that returns tell the values that the update used


class Functions(DiscreteActorCritic):
    """The functions of the module: see `MemoryPolicy`. The actor and the critic each have a memory."""

    def __init__(self, module):
        super().__init__(torch.nn.ModuleList(module.models.values()))
        self.module, self.head = module, module.models["policy"].act.action_out
        self.head.register_forward_hook(lambda head, _, distribution: setattr(head, "logits", distribution.logits))
        for model in self.model:
            model.tpdv = {"device": "cpu"}  # without its float32

    def initial_state(self, batch):
        """Return zeros, of the actor and of the critic."""
        return torch.zeros(batch, 1, WIDTH), torch.zeros(batch, 1, WIDTH)

    def step(self, observation, state, is_first):
        """Act; the head's hook keeps the logits."""
        mask = (~is_first).to(observation)[:, None]
        values, _, _, *state = self.module.get_actions(observation, observation, *state, mask)
        return (self.head.logits, values[:, 0]), tuple(state)

    def sequence(self, observations, state, is_first):
        """Evaluate rows as in the update, flattened with time first."""
        rows, mask = observations.transpose(0, 1).flatten(0, 1), (~is_first).to(observations).T.reshape(-1, 1)
        values, *_ = self.module.evaluate_actions(rows, rows, *state, torch.zeros_like(mask), mask)
        return tuple(part.unflatten(0, is_first.T.shape).transpose(0, 1) for part in (self.head.logits, values[:, 0]))


class CheckedPPO(PPOAlgorithm):
    """Checks the buffer before each update; the report of the last one stays."""

    def train(self, buffer, turn_on=True):
        """Replay the rows of the buffer, and train."""
        recorder = Recorder(Functions(self.algo_module))
        next_values = (buffer.returns[:-1] - buffer.rewards)[:, :, 0, 0] / buffer.gamma
        for t, values in enumerate(next_values):
            state = buffer.rnn_states[t, :, 0], buffer.rnn_states_critic[t, :, 0]
            step = {"action": buffer.actions[t, :, 0, 0], "log_prob": buffer.action_log_probs[t, :, 0, 0]}
            recorder.add(buffer.policy_obs[t, :, 0], buffer.masks[t, :, 0, 0] == 0, state=state, **step)
            recorder.bootstrap(buffer.policy_obs[t + 1, :, 0], values, abs(values) > 1e-6)
        CheckedPPO.report = recorder.check()
        return super().train(buffer, turn_on)


def check(seed):
    """Check the module, and the second rollout of the library's own loop."""
    seeds = iter(range(100 * seed, 100 * seed + NUM_ENVS))
    gymnasium.register("Noise-v0", lambda **_: NoiseEnv(next(seeds)))
    net = PPONet(make("Noise-v0", env_num=NUM_ENVS), create_config_parser().parse_object({"seed": seed} | OPTIONS))
    report = check_memory(Functions(net.module), draw(seed), seed=seed)
    PPOAgent(net).train(2 * NUM_ENVS * STEPS, train_algo_class=CheckedPPO)
    return report, CheckedPPO.report

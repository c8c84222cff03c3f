"""Sample Factory: its actor-critic with a GRU, its sampling loop, and the batch and the losses of its learner."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import torch
from sample_factory.algo.learning.learner import Learner
from sample_factory.algo.sampling.simplified_sampling_api import SamplingLoop
from sample_factory.algo.utils.env_info import extract_env_info
from sample_factory.algo.utils.make_env import make_env_func_batched
from sample_factory.cfg.arguments import default_cfg
from sample_factory.envs.env_utils import register_env
from sample_factory.utils.attr_dict import AttrDict
from torch import Tensor

from benchmarks.honesty.common import NUM_ENVS, STEPS, WIDTH, NoiseEnv, draw
from cyborg_torchrl.checks import DiscreteActorCritic, Recorder, Report, check_memory

PACKAGE = "sample-factory"
NETWORK = {"rnn_size": WIDTH, "encoder_mlp_layers": [WIDTH], "normalize_input": False, "normalize_returns": False}
SIZES = {"num_workers": 1, "num_envs_per_worker": NUM_ENVS, "worker_num_splits": 1, "rollout": STEPS}
OPTIONS = {"serial_mode": True, "batched_sampling": True, "batch_size": NUM_ENVS * STEPS, "gae_lambda": 0.0}


class Functions(DiscreteActorCritic):
    """The functions of the learner and its model: see `MemoryPolicy`."""

    def __init__(self, learner: Learner) -> None:
        super().__init__(learner.actor_critic)
        self.learner, self.initial_state = learner, lambda batch: torch.zeros(batch, WIDTH)

    def step(self, observation: Tensor, state: Tensor, is_first: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Act. The sampler sets states to zero where an episode ends."""
        out = self.model({"obs": observation}, state * ~is_first[:, None])
        return (out["action_logits"], out["values"].reshape(-1)), out["new_rnn_states"]

    def sequence(self, observations: Tensor, state: Tensor, is_first: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the learner's losses for rows that are put one behind the other."""
        shape, zeros = is_first.shape, torch.zeros(is_first.numel(), 1)
        self.learner.cfg.recurrence = shape[1]
        batch = AttrDict(actions=zeros, action_logits=zeros, valids=zeros[:, 0] == 0)
        batch.update(dict.fromkeys(("log_prob_actions", "advantages", "returns", "values"), zeros[:, 0]))
        batch.normalized_obs, batch.dones_cpu = {"obs": observations.flatten(0, 1)}, is_first.roll(-1, 1).flatten()
        batch.rnn_states = (state * ~is_first[:, :1]).repeat_interleave(shape[1], 0)  # the first of a row is used
        distribution, *_, summaries = self.learner._calculate_losses(batch, num_invalids=0)
        return distribution.raw_logits.unflatten(0, shape), summaries["values"].view(shape)


def check(seed: int) -> tuple[Report, Report]:
    """Check the model, and the second rollout of the library's own loop."""
    register_env("noise", lambda _name, _cfg, config, _mode: NoiseEnv(100 * seed + (config or {}).get("env_id", 0)))
    cfg = default_cfg(env="noise")
    with TemporaryDirectory() as folder:
        vars(cfg).update(NETWORK | SIZES | OPTIONS, device="cpu", seed=seed, train_dir=folder)
        info = extract_env_info(make_env_func_batched(cfg, None), cfg)
        loop = SamplingLoop(cfg, info)
        loop.init()
        learner = Learner(cfg, info, loop.buffer_mgr.policy_versions, 0, loop.param_servers[0])
        loop.start({0: learner.init()})
    rollouts = []

    def keep(rollout: dict, *_buffer: object) -> None:
        rollouts.append(rollout)
        if len(rollouts) == 2:
            loop.stop_sampling()

    loop.set_new_trajectory_callback(keep)
    loop.run()
    policy, (before, data) = Functions(learner), rollouts
    report = check_memory(policy, draw(seed), seed=seed)
    batch, *_ = learner._prepare_batch(data)
    next_values = (batch["returns"] - batch["rewards"]).view(NUM_ENVS, STEPS) / cfg.gamma  # since lambda is 0
    recorder, is_first, observations = Recorder(policy), before["dones"][:, -1], data["obs"]["obs"]
    for t in range(STEPS):
        step, values = data[:, t], next_values[:, t]
        action, log_prob = step["actions"].flatten(), step["log_prob_actions"]
        recorder.add(observations[:, t], is_first, state=step["rnn_states"], action=action, log_prob=log_prob)
        recorder.bootstrap(observations[:, t + 1], values, values.abs() > 1e-6)
        is_first = step["dones"]
    return report, recorder.check()

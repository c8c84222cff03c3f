"""Train with TorchRL's Collector and our agent, buffer and loss in a plain script.

python examples/compose_with_torchrl.py
"""

import torch
from torchrl.collectors import Collector
from torchrl.envs import InitTracker, TransformedEnv

from cyborg_torchrl import (
    Backbone,
    DelayedCueEnv,
    PPOAgent,
    RecurrentClipPPOLoss,
    RecurrentRolloutBuffer,
    add_advantages,
    build_encoder,
)
from cyborg_torchrl.cores import build_lru

torch.manual_seed(0)
torch.set_num_threads(1)
torch.set_flush_denormal(True)

num_envs, horizon = 64, 100
env = TransformedEnv(DelayedCueEnv(num_envs, horizon=horizon, seed=0), InitTracker())
steps = env.max_episode_steps

encoder = build_encoder(env.observation_spec, batch_dims=1, features=64)
backbone = Backbone(build_lru(64, hidden_size=64, max_horizon=horizon))
agent = PPOAgent(encoder, backbone, env.action_spec, batch_dims=1)

# the collector finds the memory state's primer by itself
collector = Collector(
    env,
    agent,
    frames_per_batch=num_envs * steps,
    total_frames=3 * num_envs * steps,
    auto_register_policy_transforms=True,
)
buffer = RecurrentRolloutBuffer(num_envs * steps, seq_len=steps, batch_size=8)
loss = RecurrentClipPPOLoss(
    agent, loss_critic_type="l2", critic_coeff=0.5, entropy_bonus=False, normalize_advantage=True
)
optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3, eps=1e-5)

for rollout in collector:
    success = rollout["next", "success"][rollout["next", "done"]].float().mean()
    add_advantages(rollout, agent.get_value_operator(), gamma=0.999, gae_lambda=0.0)
    buffer.store(rollout)
    ratio_errors = []
    for _ in range(15):
        for batch in buffer:  # sequences [8, steps], each from the memory state that it began with
            losses = loss(batch)
            ratio_errors.append(losses["ratio_error"].item())
            (losses["loss_objective"] + losses["loss_critic"]).backward()
            torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    print(f"success {success:.2f}   ratio error before the first step {ratio_errors[0]:.1e}")

collector.shutdown()

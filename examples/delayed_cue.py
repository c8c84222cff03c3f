"""Train an agent to recall a cue after 1000 blank steps: recurrent PPO, written out.

python examples/delayed_cue.py
python examples/delayed_cue.py backbone=gru env.horizon=200 train.seed=3
python examples/delayed_cue.py train.recurrent_mode=none      # the control without memory: it stays at chance, 0.25

`cyborg-torchrl train` does the same with checkpoints, logs, resuming and a progress bar.
"""

import json
import logging
import sys

import torch

from cyborg_torchrl import ConfigError, add_advantages, evaluate, load_config
from cyborg_torchrl.objectives import masked_standardize
from cyborg_torchrl.training.builders import (
    build_agent,
    build_buffer,
    build_collector,
    build_env,
    build_loss,
    prepare_process,
    rollout_length,
)
from cyborg_torchrl.training.loading import build_acting_env

logging.getLogger("torchrl").setLevel(logging.WARNING)  # it reports each buffer that it creates
try:
    cfg = load_config("memory_delayed_cue_recurrent", overrides=sys.argv[1:])
except ConfigError as error:
    sys.exit(f"error: {error}")
prepare_process(cfg)  # threads, and denormal numbers as zero
torch.manual_seed(cfg.train.seed)  # of parameters and actions

env = build_env(cfg)  # batched: env.num_envs copies of the task
agent = build_agent(cfg, env)  # encoder, memory, policy head and value head
steps = rollout_length(cfg, env)  # of each environment; here one whole episode
buffer = build_buffer(cfg, env, steps)  # rows of consecutive steps, with the memory state before each row
collector = build_collector(cfg, env, agent, steps, buffer)
loss = build_loss(cfg, agent)  # PPO's clipped objective, from the stored states
optimizer = torch.optim.Adam(loss.parameters(), lr=cfg.train.learning_rate, eps=cfg.train.adam_eps)
schedule = torch.optim.lr_scheduler.LinearLR(
    optimizer, 1.0, 0.0, total_iters=cfg.train.total_timesteps // buffer.num_steps
)

for update, rollout in enumerate(collector, start=1):
    data = rollout.steps  # [environments, steps]
    add_advantages(data, agent.get_value_operator(), gamma=cfg.train.gamma, gae_lambda=cfg.train.gae_lambda)
    data["advantage"] = masked_standardize(data["advantage"])
    buffer.store(rollout)
    ratio_errors = []
    for _ in range(cfg.train.n_epochs):
        for batch in buffer:  # sequences [rows, steps]; each step comes once an epoch
            losses = loss(batch)
            ratio_errors.append(losses["ratio_error"].item())
            (losses["loss_objective"] + losses["loss_critic"]).backward()
            torch.nn.utils.clip_grad_norm_(loss.parameters(), cfg.train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    schedule.step()
    reward = data["next", "reward"].sum() / data["next", "done"].sum()
    # Before the first optimiser step the update must see what the agent saw: the error is zero but for rounding.
    print(f"update {update}  mean reward {reward:.2f}  first ratio error {ratio_errors[0]:.1e}", flush=True)
collector.shutdown()

fresh = build_acting_env(cfg, agent, num_envs=250, seed=cfg.train.seed + 1)  # other cues than those of training
result = evaluate(agent, fresh, episodes=cfg.logger.eval_episodes)  # greedy
print(json.dumps({"success_rate": result.success_rate, "total_timesteps": collector.total_frames}))

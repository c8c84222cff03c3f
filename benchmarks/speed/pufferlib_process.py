"""Program that trains PufferLib's PPO with an LSTM on delayed cue; its packages conflict with ours.

`baselines.pufferlib` runs it in a virtual environment with PufferLib and without this package. It takes the sizes as
JSON and prints "ready". For each line that it reads, it trains on one rollout and prints the number of steps.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from importlib.metadata import version

import numpy as np
import torch

ANSWERS = sys.stdout


def make_task(num_envs: int, horizon: int, cues: int = 4):
    """Build delayed cue in NumPy, in the style of PufferLib's native environments, which write into its buffers."""
    import gymnasium
    import pufferlib

    class Task(pufferlib.PufferEnv):
        def __init__(self) -> None:
            self.single_observation_space = gymnasium.spaces.Box(0.0, 1.0, (cues + 2,), np.float32)
            self.single_action_space = gymnasium.spaces.Discrete(cues)
            self.num_agents = self.agents_per_batch = num_envs
            super().__init__()
            # one row for each kind of step: the cues, a blank step, the query
            self._shown = np.eye(cues + 2, dtype=np.float32)
            self._shown[:cues, -2] = 1.0
            self._shown[cues] = 0.0

        def reset(self, seed=None):
            self._random = np.random.default_rng(seed)
            self._time = np.zeros(num_envs, np.int64)
            self._cue = self._random.integers(cues, size=num_envs)
            self._show()
            return self.observations, []

        def step(self, actions):
            is_query = self._time == horizon + 1
            self.rewards[:] = np.where(is_query, np.where(actions == self._cue, 1.0, -1.0), 0.0)
            self.terminals[:] = is_query
            self._time += 1
            if is_query.any():
                self._time[is_query] = 0
                self._cue[is_query] = self._random.integers(cues, size=int(is_query.sum()))
            self._show()
            return self.observations, self.rewards, self.terminals, self.truncations, []

        def _show(self) -> None:
            kind = np.where(self._time == 0, self._cue, cues) + (self._time == horizon + 1)
            np.take(self._shown, kind, 0, out=self.observations)

        def close(self) -> None: ...

    return Task()


def make_trainer(sizes: dict):
    """Build PufferLib's trainer and networks: `models.Default` in its `LSTMWrapper`, Adam, no dashboard."""
    import pufferlib.models
    import pufferlib.pufferl

    task = make_task(sizes["num_envs"], sizes["horizon"])
    width, steps = sizes["width"], sizes["num_envs"] * sizes["steps"]
    policy = pufferlib.models.LSTMWrapper(task, pufferlib.models.Default(task, width), width, width)
    config = {
        "seed": 0, "torch_deterministic": True, "cpu_offload": False, "device": "cpu", "optimizer": "adam",
        "anneal_lr": False, "precision": "float32", "total_timesteps": 10**12, "learning_rate": 2.5e-4, "gamma": 0.99,
        "gae_lambda": 0.95, "update_epochs": sizes["n_epochs"], "clip_coef": 0.2, "vf_coef": 0.5, "vf_clip_coef": 0.2,
        "max_grad_norm": 0.5, "ent_coef": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-5,
        "data_dir": tempfile.gettempdir(), "checkpoint_interval": 10**9, "batch_size": steps,
        "minibatch_size": steps // sizes["num_minibatches"], "max_minibatch_size": steps,
        "bptt_horizon": sizes["seq_len"], "compile": False, "compile_mode": "default", "compile_fullgraph": False,
        "vtrace_rho_clip": 1.0, "vtrace_c_clip": 1.0, "prio_alpha": 0.8, "prio_beta0": 0.2, "use_rnn": True,
        "env": "delayed_cue",
    }  # fmt: skip

    class Trainer(pufferlib.pufferl.PuffeRL):
        def print_dashboard(self, *args, **kwargs) -> None: ...

    return Trainer(config, task, policy)


def main() -> None:
    """Train on one rollout for each line read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=json.loads, help="JSON: num_envs, horizon, steps, width, seq_len, ...")
    sizes = parser.parse_args().sizes
    torch.set_num_threads(sizes["threads"])
    torch.set_flush_denormal(True)
    with contextlib.redirect_stdout(sys.stderr):
        trainer = make_trainer(sizes)
        print(f"ready {version('pufferlib')}", file=ANSWERS, flush=True)
        for _ in sys.stdin:
            before = trainer.global_step
            trainer.evaluate()
            trainer.train()
            print(trainer.global_step - before, file=ANSWERS, flush=True)
        trainer.utilization.stop()  # otherwise a thread would keep running


if __name__ == "__main__":
    main()

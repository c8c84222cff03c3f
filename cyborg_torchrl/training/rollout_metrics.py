"""What happened in a rollout, as numbers."""

from __future__ import annotations

from tensordict import TensorDictBase

from cyborg_torchrl import keys
from cyborg_torchrl.objectives.functional import explained_variance
from cyborg_torchrl.training.distributed import Ranks


def rollout_metrics(rollout: TensorDictBase, ranks: Ranks) -> dict[str, float]:
    """Episodes that ended in all ranks' rollouts: how many, their return, and their success where the task reports it.

    The explained variance is the mean over ranks.
    """
    after = rollout.get(keys.NEXT)
    done = after.get(keys.DONE)
    explained = explained_variance(rollout.get(keys.VALUE), rollout.get(keys.VALUE_TARGET))
    metrics = {
        "episodes": float(ranks.sum(done.sum())),
        "reward_per_step": float(ranks.moments(after.get(keys.REWARD))[1]),
        "explained_variance": float(ranks.mean(explained)),
    }
    for key, name in ((keys.EPISODE_REWARD, "mean_reward"), (keys.SUCCESS, "success_rate")):
        value = after.get(key, None)
        if value is not None and metrics["episodes"]:
            metrics[name] = float(ranks.moments(value[done])[1])
    return metrics

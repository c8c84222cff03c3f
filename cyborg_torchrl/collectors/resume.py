"""State of collectors between two rollouts: that of their environments, and the entries carried to the next step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import BaseCollector, Collector
from torchrl.envs import EnvBase

from cyborg_torchrl.envs.state import environment_state, set_environment_state


def stepper_state(env: EnvBase, carried: TensorDictBase) -> dict[str, Any] | None:
    """Return the state of an environment and its carried entries; None if the environment has no state."""
    state = environment_state(env)
    return None if state is None else {"env": state, "carried": carried.detach().clone().to_dict()}


def restore_stepper(env: EnvBase, state: Mapping[str, Any]) -> tuple[TensorDictBase, int]:
    """Restore a state of `stepper_state`.

    Returns:
        The carried entries, and the number of environments that could not be restored and begin new episodes.

    Raises:
        ValueError: if the state belongs to another environment.
    """
    carried: TensorDictBase = TensorDict(state["carried"], env.batch_size, device=env.device)
    lost = set_environment_state(env, state["env"])
    # Environments that could not be restored begin new episodes; all others continue.
    if lost.any():
        is_reset = lost.to(carried.device).reshape(env.full_done_spec["done"].shape)
        carried = env.reset(carried.set("_reset", is_reset)).exclude("_reset")
    return carried, int(lost.sum())


def collector_state(collector: Any) -> dict[str, Any] | None:
    """Return the state of a collector; None if it has none."""
    # Our collectors return their state themselves; that of TorchRL is assembled below.
    if not isinstance(collector, BaseCollector):
        return collector.state_dict() if hasattr(collector, "state_dict") else None
    if not isinstance(collector, Collector):
        return None
    stepper = stepper_state(collector.env, collector._carrier)
    if stepper is None:
        return None
    pool = collector._traj_pool.state_dict() if collector.track_traj_ids else None
    return {"tracks": [stepper], "frames": collector._frames, "iter": collector._iter, "traj_pool": pool}


def resume_collector(collector: Any, state: Mapping[str, Any]) -> int:
    """Restore a state of `collector_state`, and return how many environments begin new episodes instead.

    Raises:
        ValueError: if the state belongs to another collector.
    """
    if not isinstance(collector, Collector):
        return collector.load_state_dict(state)
    # TorchRL's collector holds the carried entries in a tensordict of fixed tensors, so copy into it.
    carried, lost = restore_stepper(collector.env, state["tracks"][0])
    for key, value in carried.items(True, True):
        collector._carrier.set(key, value)
    if state["traj_pool"] is not None:
        collector._traj_pool.load_state_dict(state["traj_pool"])
    collector._frames, collector._iter = state["frames"], state["iter"]
    return lost

"""TorchRL's collector, at the speed of the policy and the environment."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType

from cyborg_torchrl import keys
from cyborg_torchrl.collectors.cudagraph import GraphedSteps, with_graph
from cyborg_torchrl.collectors.flat_dict import FlatDict, NotFusable, RolloutWriter, flat
from cyborg_torchrl.collectors.fused_env import env_step
from cyborg_torchrl.collectors.fused_policy import FusedPolicy
from cyborg_torchrl.collectors.profiling import recorded
from cyborg_torchrl.collectors.rollout_collector import warn_unread_mask
from cyborg_torchrl.collectors.runtime import rare_garbage_collection
from cyborg_torchrl.envs.gym.gym_wrapper import check_wrapper
from cyborg_torchrl.modules.nan_check import check_finite

LOGGER = logging.getLogger(__name__)
TRAJ_IDS = ("collector", "traj_ids")


class FusedCollector(Collector):
    """A drop-in for `torchrl.collectors.Collector` that steps on tensors.

    Iteration, seeding, weight updates, state_dict and all options are TorchRL's. A rollout uses no tensordict between
    its steps if the environment is one of this package, and the policy consists of TensorDictModules and our
    `Backbone`. It runs the same operations in the same order, in a fraction of the time. With `compiled_step=False`
    batches equal those of `Collector` bit by bit for the same seed.

    Environments of this package are a `MemoryTask` or a batch of gymnasium environments, with our transforms, and
    TorchRL's InitTracker, RewardSum, RewardClipping and TensorDictPrimer.

    Any other environment is stepped by TorchRL between steps of the policy on tensors. Any other policy, or an option
    that excludes both, is left to TorchRL. The reason is logged once.

    Args:
        *args: as for `Collector`.
        auto_register_policy_transforms: add the policy's primers to the environment; on by default here.
        compiled_step: compute the agent's networks by one C++ call a step, if there is one (`compile_step`). Its
            results differ from those of torch in the last digits.
        cudagraph: replay the policy's step as a CUDA graph (`GraphedPolicy`), with the step of a memory task of this
            package (`GraphedTask`). Not TorchRL's `cudagraph_policy`, which changes how tensordicts behave in the whole
            process. None: where that is possible.
        **kwargs: as for `Collector`.

    Raises:
        ValueError: if `cudagraph` is set but the policy is not fused, or is not on a CUDA device.
        WrapperError: if TorchRL's `GymWrapper` gets the environment wrong.
    """

    def __init__(
        self,
        *args: Any,
        auto_register_policy_transforms: bool = True,
        compiled_step: bool = True,
        cudagraph: bool | None = False,
        **kwargs: Any,
    ) -> None:
        self._fused: GraphedSteps | None = None
        self._tensors: FlatDict | None = None
        self.compiled_step, self.cudagraph = compiled_step, cudagraph
        super().__init__(*args, auto_register_policy_transforms=auto_register_policy_transforms, **kwargs)
        check_wrapper(self.env)
        warn_unread_mask(self.env, self.policy)
        self.why_not_fused = self._fuse()
        """Reason why TorchRL steps the environment or collects; "" if it does neither."""
        if cudagraph and self._fused is None:
            raise ValueError(f"cudagraph needs a policy that can be fused; {self.why_not_fused}.")
        if self.why_not_fused:
            part = "the environment is stepped" if self._fused else "collected"
            LOGGER.warning("%s without fusion, as TorchRL does it: %s.", part, self.why_not_fused)

    @torch.no_grad()
    @rare_garbage_collection()
    def rollout(self) -> TensorDictBase:
        """Return a rollout [*N, T], as `Collector` yields it."""
        if self._fused is None or self._should_use_random_frames():
            return super().rollout()
        if self.pre_collect_hook is not None:
            self.pre_collect_hook()
        if self.reset_at_each_iter:
            self._carrier.update(self.env.reset())
            self._start_new_trajectories()
        policy, env = self._fused
        writer = RolloutWriter(self.frames_per_batch, self._tensors)
        carried = flat(self._carrier)
        policy.begin(self.n_env)
        before: FlatDict = {}
        now: list[NestedKey] = []
        may_begin = True  # at the first step the flags are read, later only after a step that ended an episode
        act, step = recorded("policy", policy), recorded("environment", env.step)
        append = recorded("storage", writer.append)
        for _ in range(self.frames_per_batch):
            written = act(carried, may_begin=may_begin)
            after, begins, is_over = step(carried, written)
            if not now:
                now = [key for key in written if key[0] != keys.NEXT]  # without ("next", ...)
            before = {**carried, **{key: written[key] for key in now}}
            append(before.items(), after.items())
            if self.track_traj_ids:
                begins[TRAJ_IDS] = self._next_traj_ids(carried[TRAJ_IDS], is_over)
            carried, may_begin = begins, is_over is not None
        rollout = TensorDict(writer.tensors, self._final_rollout.batch_size, names=self._final_rollout.names)
        # The check names environment and step, so it needs these two dimensions.
        read = getattr(self._orig_policy, "in_keys", ())
        steps = rollout if rollout.ndim == 2 else rollout.reshape(-1, rollout.shape[-1])
        check_finite(steps, [*read, keys.VALUE, keys.ACTION_LOG_PROB, (keys.NEXT, keys.REWARD)])
        policy.check(writer.tensors)
        # TorchRL's collector and checkpoints read the carried entries from this tensordict.
        for key, value in {**before, **carried}.items():
            self._carrier.set(key, value)
        if self.return_same_td:
            self._tensors, self._final_rollout = writer.tensors, rollout
        return self._maybe_set_truncated(rollout)

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yield rollouts as TorchRL does, without its copy of rollouts that share no tensors."""
        if self._fused is None or self.return_same_td or self.replay_buffer is not None:
            yield from super().iterator()
            return
        while self._frames < self.total_frames:
            self._iter += 1
            rollout = self.rollout()
            if rollout is self._final_rollout:  # TorchRL collects random actions into this tensordict
                rollout = rollout.clone()
            self._increment_frames(rollout.numel())
            rollout = self._postproc(rollout)
            if self.post_collect_hook is not None:
                self.post_collect_hook(rollout)
            yield rollout

    def _fuse(self) -> str:
        """Prepare the fused step; return the reason if there is none."""
        # Options of TorchRL's collector that this fast path does not support; the first one that is set is reported.
        reasons = {
            "actions are not sampled": self.exploration_type is not ExplorationType.RANDOM,
            "there are no buffers to collect into (use_buffers)": not self._use_buffers,
            "the replay buffer takes single steps (extend_buffer)": self.replay_buffer is not None
            and not self.extend_buffer,
            "policy, environment and storage lie on several devices": len(self._devices()) > 1,
            "the policy is compiled": self.compiled_policy or self.cudagraphed_policy,
            "there is an interruptor": self.interruptor is not None,
            "observations are stored once (compact_obs)": bool(self._compact_next_keys),
        }
        for reason, holds in reasons.items():
            if holds:
                return reason
        try:
            step, reason = env_step(self.env)
            policy = FusedPolicy(self._orig_policy, compiled_step=self.compiled_step)
            self._fused = with_graph(policy, step, self._devices(), self.cudagraph)
        except NotFusable as error:
            return str(error)
        return reason

    def _devices(self) -> set[torch.device]:
        policy: Any = self._orig_policy
        named = {self.storing_device, self.policy_device, self.env_device, self.env.device} - {None}
        return named | {parameter.device for parameter in policy.parameters()}

    def _next_traj_ids(self, traj_ids: Tensor, is_over: Tensor | None) -> Tensor:
        if is_over is None:
            return traj_ids
        ended = is_over.view(traj_ids.shape).to(traj_ids.device)
        fresh = self._traj_pool.get_traj_and_increment(ended.sum(), device=ended.device)
        return traj_ids.masked_scatter(ended, fresh)

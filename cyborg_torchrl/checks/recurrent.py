"""`check_recurrent`: all checks of a recurrent policy in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torchrl.envs import EnvBase

from cyborg_torchrl import keys
from cyborg_torchrl.checks.report import Report
from cyborg_torchrl.checks.rollout import collect, prepare
from cyborg_torchrl.checks.separate_critic import check_critic
from cyborg_torchrl.checks.suite import REDUCED_TOLERANCE, Options, run_checks
from cyborg_torchrl.checks.tensordict_policy import TensorDictPolicy
from cyborg_torchrl.modules import PPOAgent


def check_recurrent(
    policy: TensorDictModuleBase,
    env: EnvBase | None = None,
    *,
    rollout: TensorDictBase | None = None,
    steps: int = 64,
    chunk_lengths: Sequence[int] = (1, 5, 32),
    seed: int = 0,
    state_keys: Sequence[NestedKey] | None = None,
    is_init_key: NestedKey = keys.IS_INIT,
    tolerance: float | None = None,
    drift_updates: int = 8,
    drift_learning_rate: float = 1e-3,
    on_progress: Callable[[str, float], None] = lambda name, share: None,
) -> Report:
    """Check that training a recurrent policy on sequences uses the memory that the policy acted with.

    The checks run on a copy of the policy, in its present train/eval mode.

    Args:
        policy: any module with `get_dist` that obeys `torchrl.modules.set_recurrent_mode`: a `PPOAgent`, a
            `ProbabilisticActor` over a `GRUModule`, or a policy you wrote.
        env: the environment to collect a rollout from, with `InitTracker` and the policy's primers. It is seeded, and
            can be used afterwards.
        rollout: consecutive steps [N, T] from your collector or buffer, if there is no `env`.
        steps: T, steps of each environment in the collected rollout.
        chunk_lengths: lengths of the chunks in which the rollout is evaluated. The gradient horizon uses the longest.
        seed: seed of the rollout and of all perturbations.
        state_keys: entries of the memory state; None: keys that are read, and written under "next", and those of the
            policy's primers.
        is_init_key: flag of an episode's first step.
        tolerance: largest |log ratio| and relative error that passes. None: 1e-4; 3e-2 under `torch.autocast` and with
            an encoder in reduced precision.
        drift_updates: number of optimiser updates of a copy before the drift of stored states is reported.
        drift_learning_rate: learning rate of those updates.
        on_progress: called with the name of the next check and the share that is done, in [0, 1].

    Raises:
        ValueError: if there is neither an environment nor a rollout, or the policy has no `get_dist` or no state.
        KeyError: if `is_init`, a state or the log-probs are missing; the message says what to add.

    Examples: see `docs/checker.md`.
    """
    if (env is None) == (rollout is None):
        raise ValueError("give an environment to collect from, or a ready rollout=, and not both.")
    options = Options(tuple(chunk_lengths), seed, tolerance, drift_updates, drift_learning_rate)
    tested = TensorDictPolicy(policy, state_keys, is_init_key)
    on_progress("rollout", 0.0)
    rollout = collect(tested, env, steps, seed) if rollout is None else rollout
    if not (isinstance(policy, PPOAgent) and policy.critic):
        return run_checks(tested, prepare(tested, rollout), options, on_progress)
    # Two memories: outputs of one would hide a fault of the other.
    actor = TensorDictPolicy(policy.get_policy_operator(), None, is_init_key)
    actor.name = tested.name
    report = run_checks(actor, prepare(actor, rollout.exclude((keys.NEXT, keys.VALUE))), options, on_progress)
    if actor.has_reduced_precision and tolerance is None:
        options = replace(options, tolerance=REDUCED_TOLERANCE)
    return report.with_findings(*check_critic(policy, rollout, **asdict(options)))

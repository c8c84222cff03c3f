"""Every way through time, over every core: what is trained is what acted, and gradients reach what they promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.data import LazyMemmapStorage, Unbounded
from torchrl.envs import DTypeCastTransform, TensorDictPrimer

from cyborg_torchrl.cores import Core
from cyborg_torchrl.data import EpisodeBuffer, RecurrentRolloutBuffer, Rollout
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.modules.replay import state_after
from cyborg_torchrl.objectives import RecurrentClipPPOLoss, add_advantages

NUM_ENVS, STEPS = 4, 18


class Mode(NamedTuple):
    """How a rollout is cut."""

    seq_len: int
    burn_in: int = 0
    state_stride: int | None = None

    def __str__(self) -> str:
        return f"L{self.seq_len}-K{self.burn_in}-S{self.state_stride}"


MODES = [
    Mode(18),
    Mode(6),
    Mode(1),
    Mode(5),  # does not divide
    Mode(6, 4),
    Mode(3, 7),  # reaches over several chunks
    Mode(6, 30),  # longer than the rollout
    Mode(5, 3),
    Mode(1, 2),
    Mode(3, 0, 6),
    Mode(2, 0, 8),  # does not divide
    Mode(3, 2, 6),
    Mode(2, 5, 8),
]


# what differs between cores shows in these already
SOME_MODES = [Mode(5, 3), Mode(3, 7), Mode(2, 5, 8)]


def build_buffer(mode: Mode, batch_size: int = 7, **options: object) -> RecurrentRolloutBuffer:
    cut = {"burn_in": mode.burn_in, "state_stride": mode.state_stride}
    return RecurrentRolloutBuffer(NUM_ENVS * STEPS, mode.seq_len, batch_size, num_envs=NUM_ENVS, **cut, **options)


@pytest.fixture
def rollout_of(make_env: Callable, collect: Callable) -> Callable[[PPOAgent], TensorDictBase]:
    """A rollout [N, T] with resets, that does not begin where the environments do; in the agent's precision."""

    def run(agent: PPOAgent) -> TensorDictBase:
        env = make_env(NUM_ENVS)
        if next(agent.parameters()).dtype == torch.float64:
            env.append_transform(DTypeCastTransform(torch.float32, torch.float64, in_keys=["observation"]))
        rollout = collect(agent, env, STEPS + 5)[:, 5:].contiguous()
        assert rollout["is_init"][:, 1:].any()
        assert not rollout["is_init"][:, 0].all()
        return add_advantages(rollout, agent.get_value_operator(), gamma=0.99, gae_lambda=0.95)

    return run


def errors(agent: PPOAgent, buffer: RecurrentRolloutBuffer | EpisodeBuffer, steps: int) -> tuple[float, float]:
    """Largest |log ratio| and value error over an epoch, which must cover every step once."""
    loss, worst, trained = RecurrentClipPPOLoss(agent), [0.0, 0.0], 0
    for batch in buffer:
        with torch.no_grad():
            worst[0] = max(worst[0], float(loss(batch.clone())["ratio_error"]))
            cut = loss.after_burn_in(batch)
            states = {name: cut[key][:, 0] for name, key in agent.backbone.state_keys.items()}
            evaluation = agent.evaluate_actions(cut["observation"], cut["action"], states, cut["is_init"])
        mask = cut.get(("collector", "mask"), torch.ones(*cut.shape, 1, dtype=torch.bool)).squeeze(-1)
        value_error = (evaluation.value - cut["state_value"].squeeze(-1)).abs()[mask]
        worst[1] = max(worst[1], float(value_error.max()))
        trained += int(mask.sum())
    assert trained == steps
    return worst[0], worst[1]


def test_every_core_sees_what_the_rollout_saw(
    build_core: Callable[..., Core], make_agent: Callable, rollout_of: Callable
) -> None:
    """In double precision, where an error that is not rounding cannot hide; heads 200 times their usual size."""
    agent = make_agent(build_core(5)).double()
    rollout = rollout_of(agent)
    for mode in SOME_MODES:
        buffer = build_buffer(mode, 32)
        buffer.store(rollout.clone(), agent)
        assert max(errors(agent, buffer, rollout.numel())) <= 1e-9, mode
    buffer = EpisodeBuffer(rollout.numel(), STEPS + 5, 4, num_envs=NUM_ENVS)
    buffer.store(rollout.clone())
    assert max(errors(agent, buffer, rollout.numel())) <= 1e-9


def test_every_core_sees_what_the_rollout_saw_in_single_precision(
    build_core: Callable[..., Core], make_agent: Callable, rollout_of: Callable
) -> None:
    agent = make_agent(build_core(5, hidden_size=32), policy_scale=0.01, value_scale=0.1)
    rollout = rollout_of(agent)
    for mode in (Mode(1), *SOME_MODES[:1]):
        buffer = build_buffer(mode, 72)
        buffer.store(rollout.clone(), agent)
        assert max(errors(agent, buffer, rollout.numel())) <= 1e-6, mode


@pytest.mark.slow
def test_every_core_in_every_mode_in_single_precision(
    build_core: Callable[..., Core], make_agent: Callable, rollout_of: Callable
) -> None:
    agent = make_agent(build_core(5, hidden_size=32), policy_scale=0.01, value_scale=0.1)
    rollout = rollout_of(agent)
    for mode in MODES:
        buffer = build_buffer(mode)
        buffer.store(rollout.clone(), agent)
        assert max(errors(agent, buffer, rollout.numel())) <= 1e-6, mode


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_mode_sees_what_the_rollout_saw(gru_agent: PPOAgent, rollout_of: Callable, mode: Mode) -> None:
    rollout = rollout_of(gru_agent)
    for batch_size in (1, 7, 100):
        buffer = build_buffer(mode, batch_size)
        buffer.store(rollout.clone(), gru_agent)
        assert max(errors(gru_agent, buffer, rollout.numel())) <= 1e-9


@pytest.mark.parametrize("row_length", [STEPS, STEPS + 5, 3 * STEPS])
def test_whole_episodes_see_what_the_rollout_saw(gru_agent: PPOAgent, rollout_of: Callable, row_length: int) -> None:
    rollout = rollout_of(gru_agent)
    buffer = EpisodeBuffer(rollout.numel(), row_length, 2, num_envs=NUM_ENVS)
    buffer.store(rollout.clone())
    assert max(errors(gru_agent, buffer, rollout.numel())) <= 1e-9


@pytest.fixture
def gru_agent(build_gru_case: Callable[..., Core], make_agent: Callable) -> PPOAgent:
    return make_agent(build_gru_case(5)).double()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gradients_are_those_of_each_chunk_alone(gru_agent: PPOAgent, rollout_of: Callable, mode: Mode) -> None:
    """Against the core run step by step: burn-in steps under no_grad, then the chunk, for each by itself."""
    agent = gru_agent
    rollout = rollout_of(agent)
    buffer = build_buffer(mode)
    buffer.store(rollout.clone(), agent)
    loss = RecurrentClipPPOLoss(agent, entropy_bonus=False)
    total = sum(float(1) * chunk_loss(agent, loss, batch) for batch in buffer)
    parameters = [p for p in agent.parameters() if p.requires_grad]
    ours = torch.autograd.grad(total, parameters, allow_unused=True)
    expected = torch.autograd.grad(by_hand(agent, rollout, mode), parameters, allow_unused=True)
    assert sum(other is not None for other in expected) > 5
    for grad, other in zip(ours, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(grad, other, rtol=1e-8, atol=1e-10)


def chunk_loss(agent: PPOAgent, loss: RecurrentClipPPOLoss, batch: TensorDictBase) -> Tensor:
    """Sum of advantage times log-prob over the trained steps, from where the loss begins."""
    cut = loss.after_burn_in(batch)
    states = {name: cut[key][:, 0] for name, key in agent.backbone.state_keys.items()}
    log_prob = agent.evaluate_actions(cut["observation"], cut["action"], states, cut["is_init"]).log_prob
    mask = cut.get(("collector", "mask"), torch.ones(*cut.shape, 1, dtype=torch.bool)).squeeze(-1)
    return (log_prob * cut["advantage"].squeeze(-1))[mask].sum()


def by_hand(agent: PPOAgent, rollout: TensorDictBase, mode: Mode) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for env in range(NUM_ENVS):
        for start in range(0, STEPS, mode.seq_len):
            stop = min(start + mode.seq_len, STEPS)
            begin = max(0, start - mode.burn_in)
            row = rollout[env : env + 1]
            state = {name: row[key][:, begin] for name, key in agent.backbone.state_keys.items()}
            if begin < start:
                with torch.no_grad():
                    replayed = row[:, begin:start]
                    state = agent.evaluate_actions(
                        replayed["observation"], replayed["action"], state, replayed["is_init"]
                    ).state
            chunk = row[:, start:stop]
            log_prob = agent.evaluate_actions(chunk["observation"], chunk["action"], state, chunk["is_init"]).log_prob
            total = total + (log_prob * chunk["advantage"].squeeze(-1)).sum()
    return total


def test_replayed_steps_get_no_gradient(gru_agent: PPOAgent, rollout_of: Callable) -> None:
    rollout = rollout_of(gru_agent)
    buffer = build_buffer(Mode(6, 4))
    buffer.store(rollout, gru_agent)
    loss = RecurrentClipPPOLoss(gru_agent, entropy_bonus=False)
    batch = buffer.sample()
    batch["observation"] = batch["observation"].clone().requires_grad_()
    loss(batch)["loss_objective"].backward()
    grad = batch["observation"].grad.abs().sum(-1)
    is_burn_in, is_trained = batch["collector", "burn_in"].squeeze(-1), batch["collector", "mask"].squeeze(-1)
    assert is_burn_in.any()
    assert (grad[is_burn_in] == 0).all()
    assert (grad[is_trained] > 0).any()


def test_an_episode_that_begins_at_the_border_takes_nothing_from_the_one_before(
    gru_agent: PPOAgent, rollout_of: Callable
) -> None:
    """The border case that TorchRL's BurnInTransform gets wrong: see test_torchrl_traps."""
    rollout = rollout_of(gru_agent)
    rollout["is_init"][:, 6] = True  # the first step of the second chunk
    rollout["is_init"][:, 4:6] = False
    outputs = []
    for shift in (0.0, 5.0):
        moved = rollout.clone()
        moved["observation"][:, :6] += shift
        buffer = build_buffer(Mode(6, 4))
        buffer.store(moved, gru_agent)
        cut = RecurrentClipPPOLoss(gru_agent).after_burn_in(buffer.chunks(torch.tensor([1]), NUM_ENVS))
        states = {name: cut[key][:, 0] for name, key in gru_agent.backbone.state_keys.items()}
        outputs.append(gru_agent.evaluate_actions(cut["observation"], cut["action"], states, cut["is_init"]).log_prob)
    assert torch.equal(outputs[0], outputs[1])


def test_states_between_stored_ones_are_replayed_with_what_acted(gru_agent: PPOAgent, rollout_of: Callable) -> None:
    """After an update too: the copy that was made when the rollout was stored replays, not today's parameters."""
    rollout = rollout_of(gru_agent)
    buffer = build_buffer(Mode(3, 0, 6))
    buffer.store(rollout.clone(), gru_agent)
    with torch.no_grad():
        for parameter in gru_agent.parameters():
            parameter += 0.1
    sequences = buffer.chunks(torch.tensor([1, 3, 4]), NUM_ENVS)
    expected = torch.cat([rollout["memory_state", "hidden"][:, t] for t in (3, 9, 12)])
    is_first = torch.cat([rollout["is_init"][:, t, 0] for t in (3, 9, 12)])
    got = sequences["memory_state", "hidden"][:, 0]
    torch.testing.assert_close(got[~is_first], expected[~is_first], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_states_in_reduced_precision(
    gru_agent: PPOAgent, rollout_of: Callable, dtype: torch.dtype, error: float
) -> None:
    rollout = rollout_of(gru_agent)
    full, half = build_buffer(Mode(6)), build_buffer(Mode(6), state_dtype=dtype)
    for buffer in (full, half):
        buffer.store(rollout.clone(), gru_agent)
    assert half.state_bytes() * 4 == full.state_bytes()  # from float64
    stored, exact = (b.chunks(torch.tensor([0, 2]), NUM_ENVS)["memory_state", "hidden"] for b in (half, full))
    assert stored.dtype == exact.dtype
    assert not torch.equal(stored, exact)
    torch.testing.assert_close(stored, exact, rtol=error, atol=1e-6)


def test_memmap_storage(gru_agent: PPOAgent, rollout_of: Callable, tmp_path) -> None:
    rollout = rollout_of(gru_agent)
    for mode in (Mode(6, 4), Mode(3, 2, 6), Mode(5)):
        rows = NUM_ENVS * -(-STEPS // (mode.state_stride or mode.seq_len))
        buffer = build_buffer(mode, storage=LazyMemmapStorage(rows, scratch_dir=str(tmp_path / str(mode))))
        for _ in range(2):
            buffer.store(rollout.clone(), gru_agent)
            assert max(errors(gru_agent, buffer, rollout.numel())) <= 1e-9


def test_refusals(gru_agent: PPOAgent, rollout_of: Callable) -> None:
    rollout = rollout_of(gru_agent)
    with pytest.raises(ValueError, match="needs the policy that acted"):
        build_buffer(Mode(3, 0, 6)).store(rollout)
    with pytest.raises(ValueError, match="state_stride must be a multiple of seq_len = 4; got 6"):
        build_buffer(Mode(4, 0, 6))
    with pytest.raises(ValueError, match="burn_in must be >= 0"):
        build_buffer(Mode(4, -1))
    kept = Rollout.from_steps(rollout, [("memory_state", "hidden")], [0, 9])
    with pytest.raises(ValueError, match=r"states before the steps \[0, 9\]; needed: \[0, 6, 12\]"):
        build_buffer(Mode(6)).store(kept)
    with pytest.raises(ValueError, match="made for 4 environments; got 8 x 9 steps"):
        build_buffer(Mode(6)).store(rollout.reshape(8, 9))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_torchrls_modules_in_whole_episodes(make_env: Callable, their_policy: Callable, kind: str) -> None:
    """They read the stored state at resets: a row that begins with one must not hold an older episode's."""
    policy = their_policy(kind)
    env = make_env(NUM_ENVS, p_terminated=0.2)
    collector = Collector(
        env, policy.actor, frames_per_batch=NUM_ENVS * STEPS, total_frames=3 * NUM_ENVS * STEPS,
        auto_register_policy_transforms=True,
    )  # fmt: skip
    loss = RecurrentClipPPOLoss(policy.actor, policy.head)
    for rollout in collector:
        add_advantages(rollout, policy.critic, gamma=0.99, gae_lambda=0.95)
        longest = 1 + max(len(run) for row in rollout["is_init"].squeeze(-1).int().tolist()
                          for run in "".join(map(str, row)).split("1"))  # fmt: skip
        buffer = EpisodeBuffer(rollout.numel(), longest, 3, num_envs=NUM_ENVS, state_keys=policy.state_keys)
        buffer.store(rollout.clone())
        for batch in buffer:
            with torch.no_grad():
                assert loss(batch)["ratio_error"] <= 1e-5
    collector.shutdown()


def test_a_policy_that_leaves_resets_to_the_primer(make_env: Callable) -> None:
    """It knows nothing of is_init: in replay too, someone has to empty its state where episodes begin."""
    cell = torch.nn.GRUCell(3, 4)

    def step(observation: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        following = cell(observation.reshape(-1, 3), hidden.reshape(-1, 4)).reshape(hidden.shape)
        return following, following

    policy = TensorDictModule(step, ["observation", "h"], ["f", ("next", "h")])
    env = make_env(NUM_ENVS, p_terminated=0.2)
    env.append_transform(TensorDictPrimer(h=Unbounded((4,)), expand_specs=True, default_value=0.0))
    policy.cell = cell
    with torch.no_grad():
        acting = TensorDictSequential(policy, TensorDictModule(lambda f: f[..., 0].long(), ["f"], ["action"]))
        rollout = env.rollout(STEPS, acting, break_when_any_done=False)
        assert rollout["is_init"][:, 1:].any()
        start = rollout.select("h")[:, 0]
        reached = state_after(acting, rollout[:, :-1], start, ["h"])["h"]
    is_first = rollout["is_init"][:, -1, 0]
    torch.testing.assert_close(reached[~is_first], rollout["h"][:, -1][~is_first], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("seq_len", "stride", "batch"), [(6, 6, 3), (6, 12, 3), (6, 1002, 3), (2, 8, 9)])
def test_a_stride_leaves_the_number_of_minibatches(
    gru_agent: PPOAgent, rollout_of: Callable, seq_len: int, stride: int, batch: int
) -> None:
    """A quarter of the chunks a minibatch is four minibatches; and no row is longer than a rollout."""
    buffer = build_buffer(Mode(seq_len, 0, stride), batch)
    buffer.store(rollout_of(gru_agent), gru_agent)
    assert len(list(buffer)) == 4
    assert buffer.state_stride <= STEPS


def test_figures_are_those_of_trained_steps(gru_agent: PPOAgent, rollout_of: Callable) -> None:
    """What stands in padding changes no figure."""
    rollout = rollout_of(gru_agent)
    buffer = build_buffer(Mode(13), 100)
    buffer.store(rollout, gru_agent)
    batch = buffer.sample()
    batch["action_log_prob"] += 0.3 * torch.randn_like(batch["action_log_prob"])
    loss, results = RecurrentClipPPOLoss(gru_agent), []
    for shift in (0.0, 7.0):
        moved = batch.clone()
        moved["action_log_prob"] += shift * (~moved["collector", "mask"]).squeeze(-1)
        with torch.no_grad():
            results.append(loss(moved))
    for name in ("kl_approx", "clip_fraction", "max_ratio", "mean_ratio", "ratio_error", "loss_objective"):
        torch.testing.assert_close(results[0][name], results[1][name])
    assert results[0]["clip_fraction"] > 0

"""What every registered core must do, whoever wrote it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cyborg_torchrl.cores import Core, InitialState, MemorylessCore, State, restart, unroll

BATCH, STEPS, FEATURES = 4, 14, 3

BuildCore = Callable[..., Core]
StoredState = Callable[[Core, int], State]
RandomResets = Callable[..., Tensor]


def largest_difference(a: State, b: State) -> float:
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs().max().item() for name in a), default=0.0)


def relative_difference(a: State, b: State) -> float:
    """Largest difference, in units of the largest entry of each tensor, or of one."""
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).abs().max() / max(1.0, b[n].abs().max()) for n in a), default=torch.zeros(())).item()


def steps_by_hand(core: Core, x: Tensor, state: State, is_init: Tensor) -> tuple[Tensor, State]:
    """The slow way: row by row, step by step, with the reset written out."""
    rows = []
    for row in range(x.shape[0]):
        state_row = {name: value[row : row + 1] for name, value in state.items()}
        outputs = []
        for t in range(x.shape[1]):
            if is_init[row, t]:
                state_row = core.initial_state(1)
            y, state_row = core.step(x[row : row + 1, t], state_row)
            outputs.append(y)
        rows.append((torch.cat(outputs), state_row))
    last = {name: torch.cat([state_row[name] for _, state_row in rows]) for name in state}
    return torch.stack([y for y, _ in rows]), last


def test_shapes_and_dtypes_are_as_declared(build_core: BuildCore) -> None:
    core = build_core(FEATURES).double()
    initial = core.initial_state(BATCH)
    expected = {name: (BATCH, *shape) for name, shape in core.state_shapes.items()}
    assert {name: tuple(value.shape) for name, value in initial.items()} == expected
    y, state = core.step(torch.randn(BATCH, FEATURES).double(), initial)
    assert y.shape == (BATCH, core.out_features)
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    x, is_init = torch.randn(BATCH, STEPS, FEATURES).double(), torch.zeros(BATCH, STEPS, dtype=torch.bool)
    ys, last = core(x, initial, is_init)
    assert ys.shape == (BATCH, STEPS, core.out_features)
    assert {name: tuple(value.shape) for name, value in last.items()} == expected
    assert {ys.dtype, y.dtype, *(value.dtype for value in (*state.values(), *last.values()))} == {torch.float64}


@pytest.mark.parametrize(
    ("options", "tolerance"), [({"readout": "none"}, 1e-6), ({"readout_groups": 4}, 1e-5)], ids=["bare", "normed"]
)
def test_sequence_equals_steps(
    build_core: BuildCore, stored_state: StoredState, random_resets: RandomResets, options: dict, tolerance: float
) -> None:
    # a norm over time-scales magnifies the rounding of slow channels, which are small: hence two tolerances
    core = build_core(FEATURES, **options)
    x, is_init = torch.randn(BATCH, STEPS, FEATURES), random_resets(BATCH, STEPS)
    is_init[0], is_init[1, 0] = False, True
    state = stored_state(core, BATCH)
    with torch.no_grad():
        y, last = core(x, state, is_init)
        expected, expected_last = steps_by_hand(core, x, state, is_init)
    assert (y - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())
    assert relative_difference(last, expected_last) <= 1e-6


@pytest.mark.parametrize("horizon", [200, 10_000])
def test_sequence_and_steps_are_accurate_from_the_first_step_on(
    build_core: BuildCore, random_resets: RandomResets, horizon: int
) -> None:
    # early in an episode slow channels hold next to nothing, and what they hold must be right to rounding all the same
    core = build_core(FEATURES, max_horizon=horizon, hidden_size=32, readout_groups=4)
    x, is_init = torch.randn(BATCH, STEPS, FEATURES), random_resets(BATCH, STEPS)
    is_init[:, 0] = True
    with torch.no_grad():
        by_sequence = core(x, core.initial_state(BATCH), is_init)[0]
        by_step = unroll(core, x, core.initial_state(BATCH), is_init)[0]
        core = copy.deepcopy(core).double()
        exact = unroll(core, x.double(), core.initial_state(BATCH), is_init)[0]
    assert (by_step - exact).abs().max() <= 2e-5
    assert (by_sequence - exact).abs().max() <= 2e-5
    assert (by_sequence - by_step).abs().max() <= 1e-5


def test_unroll_equals_steps_by_hand(
    build_core: BuildCore, stored_state: StoredState, random_resets: RandomResets
) -> None:
    core = build_core(FEATURES).double()
    x, is_init = torch.randn(BATCH, 6, FEATURES).double(), random_resets(BATCH, 6)
    state = stored_state(core, BATCH)
    y, last = unroll(core, x, state, is_init)
    expected, expected_last = steps_by_hand(core, x, state, is_init)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert largest_difference(last, expected_last) <= 1e-12


def test_splitting_changes_nothing(
    build_core: BuildCore, stored_state: StoredState, random_resets: RandomResets
) -> None:
    core = build_core(FEATURES).double()
    x, is_init = torch.randn(BATCH, STEPS, FEATURES).double(), random_resets(BATCH, STEPS)
    state = stored_state(core, BATCH)
    with torch.no_grad():
        y, last = core(x, state, is_init)
        for split in range(1, STEPS):
            first, carried = core(x[:, :split], state, is_init[:, :split])
            second, end = core(x[:, split:], carried, is_init[:, split:])
            torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=0, atol=1e-12)
            assert largest_difference(end, last) <= 1e-12


def test_nothing_before_a_reset_influences_anything_after(build_core: BuildCore, stored_state: StoredState) -> None:
    core = build_core(FEATURES)
    is_init = torch.zeros(BATCH, STEPS, dtype=torch.bool)
    first_step = torch.tensor([0, 5, 11, STEPS - 1])  # of the second episode, in each row
    is_init[torch.arange(BATCH), first_step] = True
    x = torch.randn(BATCH, STEPS, FEATURES, requires_grad=True)
    state = {name: value.requires_grad_() for name, value in stored_state(core, BATCH).items()}
    trained = [value for name, value in state.items() if name not in core.counters]
    is_after = torch.arange(STEPS) >= first_step.unsqueeze(1)

    y, last = core(x, state, is_init)
    after = (y * is_after.unsqueeze(-1)).square().sum() + sum(value.square().sum() for value in last.values())
    grads = torch.autograd.grad(after, [x, *trained], retain_graph=True)
    assert (grads[0][~is_after] == 0).all()
    assert all((grad == 0).all() for grad in grads[1:])
    assert (grads[0][is_after].abs().sum(-1) > 0).all(), "the check is empty: nothing reaches anything"

    before = (y * ~is_after.unsqueeze(-1)).square().sum()
    grads = torch.autograd.grad(before, [x, *trained])
    assert (grads[0][is_after] == 0).all()
    reaches = torch.stack([grad[1:].abs().flatten(1).sum(1) for grad in grads[1:]]).sum(0)
    assert (reaches > 0).all(), "the stored state must matter until the reset"

    with torch.no_grad():
        other_x = torch.where(is_after.unsqueeze(-1), x, torch.randn_like(x))
        other_state = {name: value + 1 for name, value in state.items()}
        other_y, other_last = core(other_x, other_state, is_init)
    assert torch.equal(other_y[is_after], y[is_after])
    assert all(torch.equal(other_last[name], last[name]) for name in last)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_a_reset_forgets_even_a_broken_state(build_core: BuildCore, garbage: float) -> None:
    core = build_core(FEATURES, readout_groups=4)
    x = torch.randn(BATCH, 6, FEATURES, requires_grad=True)
    is_init = torch.zeros(BATCH, 6, dtype=torch.bool)
    is_init[:, 0] = True
    state = {name: torch.full_like(value, garbage) for name, value in core.initial_state(BATCH).items()}
    y, last = core(x, state, is_init)
    expected, _ = core(x, core.initial_state(BATCH), torch.zeros_like(is_init))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    assert all(value.isfinite().all() for value in last.values())
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()
    stepped, _ = core.step(x[:, 0], restart(state, core.initial_state(BATCH), is_init[:, 0]))
    torch.testing.assert_close(stepped, expected[:, 0], rtol=0, atol=1e-5)


def test_environments_do_not_mix(build_core: BuildCore, stored_state: StoredState, random_resets: RandomResets) -> None:
    core = build_core(FEATURES)
    x, is_init = torch.randn(BATCH, STEPS, FEATURES), random_resets(BATCH, STEPS)
    state = stored_state(core, BATCH)
    with torch.no_grad():
        y, last = core(x, state, is_init)
        for row in range(BATCH):
            one = slice(row, row + 1)
            y_one, last_one = core(x[one], {name: v[one] for name, v in state.items()}, is_init[one])
            torch.testing.assert_close(y_one, y[one], rtol=0, atol=1e-5)
            assert largest_difference(last_one, {name: v[one] for name, v in last.items()}) <= 1e-6
    x.requires_grad_()
    (grad,) = torch.autograd.grad(core(x, state, is_init)[0][1].square().sum(), x)
    assert (grad[[0, 2, 3]] == 0).all()
    assert grad[1].abs().sum() > 0


def test_gradients_equal_the_unrolled(
    build_core: BuildCore, stored_state: StoredState, random_resets: RandomResets
) -> None:
    core = build_core(FEATURES).double()
    x = torch.randn(BATCH, STEPS, FEATURES, dtype=torch.float64, requires_grad=True)
    is_init = random_resets(BATCH, STEPS, 0.1)
    is_init[0], is_init[:, 0] = False, False
    is_init[1, 0], is_init[2, 9] = True, True
    state = {name: value.requires_grad_() for name, value in stored_state(core, BATCH).items()}
    trained = [name for name in state if name not in core.counters]
    named = {"x": x, **{f"state.{name}": state[name] for name in trained}, **dict(core.named_parameters())}

    def gradients(run: Callable[..., tuple[Tensor, State]]) -> dict[str, Tensor]:
        y, last = run(x, state, is_init)
        generator = torch.Generator().manual_seed(1)
        loss = sum((v * torch.randn(v.shape, generator=generator)).sum() for v in (y, *last.values()))
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    ours, reference = gradients(core), gradients(lambda *arguments: unroll(core, *arguments))
    for name, expected in reference.items():
        assert expected.abs().max() > 0, f"no gradient reaches {name}"
        error = (ours[name] - expected).norm() / expected.norm()
        assert error <= 1e-9, f"{name}: relative error {error:.2g}"
    assert all((ours[f"state.{name}"][1] == 0).all() for name in trained), "row 1 begins an episode"
    assert all(ours[f"state.{name}"][0].abs().sum() > 0 for name in trained)


def test_learned_initial_state_gets_its_gradient_at_every_reset(build_core: BuildCore) -> None:
    core = build_core(FEATURES).double()
    initial = core.initial_state(1)
    if not any(value.requires_grad for value in initial.values()):
        assert all((value == 0).all() for name, value in initial.items() if name != "memory")
        pytest.skip("the initial state is fixed")
    x = torch.randn(1, STEPS, FEATURES).double()
    is_init = torch.zeros(1, STEPS, dtype=torch.bool)
    is_init[:, 10] = True
    state = {name: value if name in core.counters else torch.randn_like(value) for name, value in initial.items()}
    learned = [p for module in core.modules() if isinstance(module, InitialState) for p in module.parameters()]
    ours = torch.autograd.grad(core(x, state, is_init)[0].square().sum(), learned)
    part = unroll(core, x[:, 10:], core.initial_state(1), torch.zeros_like(is_init[:, 10:]))[0]
    for grad, expected in zip(ours, torch.autograd.grad(part.square().sum(), learned), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)
        assert grad.abs().sum() > 0


def test_gradient_from_query_to_cue_equals_the_full_unroll(
    build_core: BuildCore, stored_state: StoredState, make_agent: Callable
) -> None:
    horizon = 200
    core = build_core(5, window=horizon + 1)
    agent = make_agent(core).double()
    obs = 0.1 * torch.randn(2, horizon + 2, 3, dtype=torch.float64)
    actions = torch.randint(3, (2, horizon + 2))
    state = stored_state(core, 2)
    is_init = torch.zeros(2, horizon + 2, dtype=torch.bool)
    is_init[1, 0] = True  # one row goes on from a stored state, the other begins an episode

    cue = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    seen = torch.cat([cue.unsqueeze(1), obs[:, 1:]], 1)
    evaluation = agent.evaluate_actions(seen, actions, state, is_init)
    (grad,) = torch.autograd.grad(evaluation.log_prob[:, -1].sum(), cue)

    memory, last = unroll(core, agent.encoder.module(seen), state, is_init)
    logits = agent.policy_head.module(agent.fusion.module(agent.encoder.module(seen), memory))
    reference = logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    (expected,) = torch.autograd.grad(reference[:, -1].sum(), cue)

    torch.testing.assert_close(evaluation.log_prob, reference, rtol=0, atol=1e-10)
    assert largest_difference(evaluation.state, last) <= 1e-10
    assert (expected.abs().sum(-1) > 0).all()
    for row in range(2):
        assert (grad[row] - expected[row]).norm() <= 1e-6 * expected[row].norm()


def test_arguments_are_left_alone(build_core: BuildCore, stored_state: StoredState) -> None:
    core = build_core(FEATURES)
    x, is_init = torch.randn(BATCH, STEPS, FEATURES), torch.zeros(BATCH, STEPS, dtype=torch.bool)
    is_init[:, 3] = True
    state = stored_state(core, BATCH)
    kept = copy.deepcopy((x, is_init, state))
    first = core(x, state, is_init)[0]
    core.step(x[:, 0], state)
    assert torch.equal(core(x, state, is_init)[0], first)
    assert torch.equal(x, kept[0])
    assert torch.equal(is_init, kept[1])
    assert largest_difference(state, kept[2]) == 0.0
    assert set(state) == set(kept[2])


def test_views_are_as_good_as_copies(build_core: BuildCore, stored_state: StoredState) -> None:
    core = build_core(FEATURES).double()
    x = torch.randn(STEPS, FEATURES, BATCH).double().permute(2, 0, 1)
    is_init = torch.zeros(STEPS, 1, dtype=torch.bool).expand(STEPS, BATCH).t()
    state = {name: value[:1].expand_as(value) for name, value in stored_state(core, BATCH).items()}
    y, last = core(x, state, is_init)
    expected, expected_last = core(
        x.contiguous(), {name: value.contiguous() for name, value in state.items()}, is_init.contiguous()
    )
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert largest_difference(last, expected_last) <= 1e-12


def test_one_step_and_one_row(build_core: BuildCore) -> None:
    core = build_core(FEATURES).double()
    x = torch.randn(1, 1, FEATURES).double()
    y, last = core(x, core.initial_state(1), torch.ones(1, 1, dtype=torch.bool))
    expected, expected_last = core.step(x[:, 0], core.initial_state(1))
    torch.testing.assert_close(y[:, 0], expected, rtol=0, atol=1e-12)
    assert largest_difference(last, expected_last) <= 1e-12


def test_copies_are_independent_and_equal(build_core: BuildCore) -> None:
    core = build_core(FEATURES)
    x, is_init = torch.randn(2, 5, FEATURES), torch.zeros(2, 5, dtype=torch.bool)
    y, _ = core(x, core.initial_state(2), is_init)
    for twin in (copy.deepcopy(core), pickle.loads(pickle.dumps(core))):
        assert torch.equal(twin(x, twin.initial_state(2), is_init)[0], y)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(core(x, core.initial_state(2), is_init)[0], y)


def test_memoryless_core_sees_only_the_present(build_core: BuildCore, random_resets: RandomResets) -> None:
    inner = build_core(FEATURES).double()
    core = MemorylessCore(inner)
    assert core.state_shapes == {}
    assert core.initial_state(3) == {}
    assert (core.in_features, core.out_features) == (inner.in_features, inner.out_features)
    x = torch.randn(BATCH, STEPS, FEATURES, dtype=torch.float64, requires_grad=True)
    y, last = core(x, {}, random_resets(BATCH, STEPS))
    assert last == {}
    for t in range(STEPS):
        expected, _ = inner.step(x[:, t], inner.initial_state(BATCH))
        torch.testing.assert_close(y[:, t], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(core.step(x[:, t], {})[0], expected, rtol=0, atol=1e-12)
    assert torch.equal(core(x, {}, torch.zeros(BATCH, STEPS, dtype=torch.bool))[0], y)
    (grad,) = torch.autograd.grad(y[:, 7].square().sum(), x)
    others = [t for t in range(STEPS) if t != 7]
    assert (grad[:, others] == 0).all()
    assert grad[:, 7].abs().sum() > 0

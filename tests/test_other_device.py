"""Networks and environments on another device than the CPU: no tensors of two devices meet.

A stand-in for the device: tensors that say that they are there, and refuse to meet those that are not, as a GPU's do.
What they hold is computed on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from cyborg_torchrl.checks import check_recurrent
from cyborg_torchrl.config import checks, load_config
from cyborg_torchrl.envs.popgym.build import FAMILIES
from cyborg_torchrl.training import builders
from cyborg_torchrl.training.builders import build_agent, build_env
from cyborg_torchrl.training.experiment import run_experiment

AWAY = torch.device("xla:0")
"""Needs no driver to be named."""
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default, aten.set_.source_Tensor)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Away(Tensor):
    """A tensor on the other device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Away:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=held.device,
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:
        return AWAY

    @property
    def is_cpu(self) -> bool:
        return False

    def cpu(self, *_: object, **__: object) -> Tensor:  # torch would return it as it is: it is held on the CPU
        return aten._to_copy.default(self, device=torch.device("cpu"))

    def to(self, *args, **kwargs) -> Tensor:
        try:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        except TypeError:
            other = args[0]
            device, dtype = other.device, other.dtype
        moved = self if device is None or device.type == AWAY.type else self.cpu()
        return moved if dtype is None or dtype == moved.dtype else aten._to_copy.default(moved, dtype=dtype)

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __repr__(self, *_: object, **__: object) -> str:
        return f"Away({self.held!r})"

    def numpy(self, **_: object):
        raise TypeError("can't convert a tensor on another device to numpy")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatched(func, args, kwargs or {})


def dispatched(func, args, kwargs):
    """Computes on the CPU; says where the result is, or refuses."""
    leaves, structure = tree_flatten((args, kwargs))
    wrappers = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, Away)}
    asked = kwargs.get("device")
    is_backward = torch._C._current_graph_task_id() != -1  # torch makes zeros where it believes the tensors to be
    if func in MOVES:
        is_away = asked.type == AWAY.type if asked is not None else isinstance(args[0], Away)
    elif asked is not None:
        is_away = torch.device(asked).type == AWAY.type or is_backward
    else:
        is_away = bool(wrappers)
        needed = tree_flatten((args[0], args[2:]))[0] if func in INDEXED else leaves
        homes = [leaf for leaf in needed if isinstance(leaf, Tensor) and not isinstance(leaf, Away) and leaf.ndim]
        is_mixed = bool(homes) and any(isinstance(leaf, Away) for leaf in needed)
        if is_backward:
            is_away = bool(wrappers)
        elif is_mixed or (func in INDEXED and not isinstance(args[0], Away) and wrappers):
            raise RuntimeError(
                f"{func}: tensors on {AWAY} meet tensors on the CPU of shapes {[h.shape for h in homes]}"
            )
        elif func in INDEXED:
            is_away = isinstance(args[0], Away)
    plain = [leaf.held if isinstance(leaf, Away) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(plain, structure)
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
        if is_away:
            kwargs.pop("pin_memory", None)
    result = func(*args, **kwargs)

    def placed(value):
        if not isinstance(value, Tensor):
            return value
        return wrappers.get(id(value), Away(value) if is_away else value)

    return tree_map(placed, result)


class Factories(TorchDispatchMode):
    """Makes tensors there when they are asked for there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatched(func, args, kwargs or {})


class FromNumbers(TorchFunctionMode):
    """`torch.tensor` and the like, which ask no dispatcher where to put what they were given."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and device is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        if func is torch.Tensor.new_tensor and isinstance(args[0], Away):
            return torch.tensor(args[1], **{"dtype": args[0].dtype, **kwargs}).to(AWAY)
        return func(*args, **kwargs)


class AnyGenerator(torch.Generator):
    """A generator for any device."""

    def __new__(cls, device: object = "cpu") -> AnyGenerator:
        return super().__new__(cls)


@pytest.fixture(autouse=True)
def _other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (checks, builders):
        monkeypatch.setattr(module, "resolve_device", torch.device)
    monkeypatch.setattr(torch, "Generator", AnyGenerator)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with Factories(), FromNumbers():
        yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    here, there = torch.ones(3), torch.ones(3, device=AWAY)
    assert there.device == AWAY
    assert (there + 1).device == AWAY
    assert (there + torch.tensor(2.0)).device == AWAY
    assert torch.equal((there * 2).cpu(), 2 * here)
    assert there.cpu().device.type == here.to(AWAY).cpu().device.type == "cpu"
    assert there[torch.tensor([0, 2])].device == AWAY
    for meet in (lambda: here + there, lambda: torch.where(here > 0, there, there), lambda: torch.cat([here, there])):
        with pytest.raises(RuntimeError, match="meet tensors on the CPU"):
            meet()
    with pytest.raises(RuntimeError, match="meet tensors on the CPU"):
        here[there > 0]


# but `permuted_copy` and transforms: they use what torch makes in C++, where the stand-in's tensors are
# the CPU's (one_hot, uninitialised buffers)
MODES = {
    "episode": ["train.n_steps=7"],
    "tbptt": ["train=tbptt", "train.seq_len=4", "train.n_steps=8"],
    "burn_in": ["train=burn_in", "train.seq_len=4", "train.burn_in=2", "train.n_steps=8"],
    "refreshed": ["train=tbptt", "train.seq_len=4", "train.n_steps=8", "train.refresh_states=true"],
    "stored_there": ["train=tbptt", "train.seq_len=4", "train.n_steps=8", "train.storage=device"],
    "between_states": [
        "train=tbptt", "train.seq_len=4", "train.n_steps=8", "train.state_stride=8", "train.state_dtype=float16",
    ],
    "none": ["train.recurrent_mode=none", "train.n_steps=8"],
    "lstm": ["backbone=lstm", "train.n_steps=7", "train.micro_batch_steps=7"],
    "mamba_gru": ["backbone=mamba_gru", "train=tbptt", "train.seq_len=4", "train.n_steps=8"],
    "pmm": ["memory=pmm", "train.n_steps=7"],
    "fused": ["collector=fused", "train.n_steps=7"],
    "single": ["collector=single", "train.n_steps=7"],
    "processes": ["env=gymnasium", "env.id=CartPole-v1", "env.workers=2", "train.n_steps=7"],
}  # fmt: skip
SMALL = ["env.num_envs=4", "env.horizon=5", "train.n_epochs=1", "train.num_minibatches=2", f"train.device={AWAY}"]
SMALL += ["logger.progress=false", "logger.tensorboard=false", "logger.eval_episodes=8"]


@pytest.mark.parametrize("mode", MODES)
def test_runs(mode: str, tmp_path: Path) -> None:
    own = [f"logger.base_dir={tmp_path}", "logger.run_name=run", "train.total_timesteps=64"]
    groups = [part for part in MODES[mode] if part.startswith(("train=", "env="))]
    small = [part for part in SMALL if "env=gymnasium" not in groups or not part.startswith("env.horizon")]
    overrides = [*groups, *own, *small, *(part for part in MODES[mode] if part not in groups)]
    run_experiment(load_config(overrides=overrides))
    lines = (tmp_path / "run" / "logs" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("ratio_error")
    errors = [float(line.split(",")[column]) for line in lines[1:]]
    assert len(errors) >= 1
    assert max(errors) <= (1e-2 if "train.state_dtype=float16" in overrides else 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_popgym(family: str) -> None:
    """The same episodes as on the CPU, since the stand-in's random numbers are those of the CPU."""
    here, there = (FAMILIES[family](4, seed=0, device=device) for device in ("cpu", AWAY))
    seen = [env.restart() for env in (here, there)]
    for step in range(40):
        for key, value in seen[1].items():
            assert value.device == AWAY
            assert torch.equal(value.cpu().nan_to_num(), seen[0][key].nan_to_num()), key
        action = here.action_spec.rand()
        seen = [env.advance(action.to(env.device)) for env in (here, there)]
        if step == 20:
            state = there.get_state()
            there.set_state(state)
        done = seen[0]["done"].squeeze(-1)
        if done.any():
            seen = [here.restart(done), there.restart(done.to(AWAY))]


@pytest.mark.parametrize(
    "backbone", ["lru", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mamba_gru", "pmm"))]
)
def test_the_checker_finds_nothing(backbone: str) -> None:
    cfg = load_config(overrides=[f"backbone={backbone}", "env.horizon=10", f"train.device={AWAY}"])
    env = build_env(cfg, num_envs=4)
    agent = build_agent(cfg, env)
    env.append_transform(agent.backbone.make_tensordict_primer())
    report = check_recurrent(agent, env)
    assert report.has_passed, report.table()


def test_batches_equal_those_of_torchrls_collector(batches_of_both: Callable) -> None:
    for ours, theirs in batches_of_both(f"train.device={AWAY}"):
        for key in theirs.keys(True, True):
            assert torch.equal(ours[key].cpu(), theirs[key].cpu()), key

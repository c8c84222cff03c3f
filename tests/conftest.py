"""What several test modules share: a small environment, and every registered core in its variants."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import jaxtyping
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import Binary, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import Compose, EnvBase, InitTracker, TransformedEnv
from torchrl.modules import GRUModule, LSTMModule, ProbabilisticActor, ValueOperator

import cyborg_torchrl.cores  # noqa: F401  (registers the shipped cores)
from cyborg_torchrl.collectors import FusedCollector
from cyborg_torchrl.collectors.runtime import prepare_cpu
from cyborg_torchrl.config import load_config
from cyborg_torchrl.cores import Core, InitialState, State, unroll
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.registry import backbones
from cyborg_torchrl.training.builders import build_agent, build_env
from cyborg_torchrl.training.checkpoint import save_checkpoint

try:  # worker processes cannot import this file: its environment travels by value
    import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
except ImportError:
    pass

OBSERVATION_SIZE = 3
NUM_ACTIONS = 3


class CoreCase(NamedTuple):
    """One variant of a registered core."""

    name: str
    is_learned: bool
    num_layers: int
    options: tuple[tuple[str, object], ...] = ()
    """Other options than the defaults."""

    def __str__(self) -> str:
        parts = [self.name, "learned" if self.is_learned else "zero", str(self.num_layers)]
        return "-".join([*parts, *(str(value) for _, value in self.options)])


def core_cases() -> list[CoreCase]:
    """Every registered backbone with zero and learned initial state and one and two layers, where it offers them."""
    cases = []
    for name in backbones.names():
        options = inspect.signature(backbones.get(name)).parameters
        for is_learned in (False, True) if "learn_initial_state" in options else (False,):
            for num_layers in (1, 2) if "num_layers" in options else (1,):
                cases.append(CoreCase(name, is_learned, num_layers))
    short = (("window", 3), ("position", "rotary"), ("gating", "gru"), ("has_clock", True))
    return [
        *cases,
        CoreCase("stack", True, 1, (("layers", ("mlp", "gru", "mlp")),)),
        CoreCase("stack", True, 1, (("layers", ("lru", "attention")),)),
        CoreCase("attention", False, 2, short),
        CoreCase("lru", True, 2, (("is_complex", True),)),
    ]


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers used here, and prepare the process as the commands do."""
    prepare_cpu()
    config.addinivalue_line("markers", "slow: takes seconds; deselect with -m 'not slow'")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `core_case` runs over every variant of every core."""
    if "core_case" in metafunc.fixturenames:
        metafunc.parametrize("core_case", core_cases(), ids=str)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def build_case(case: CoreCase, in_features: int, **options: object) -> Core:
    """Builds a small core; all parameters are moved off their symmetric starting values."""
    builder = backbones.get(case.name)
    known = inspect.signature(builder).parameters
    wanted = {
        "hidden_size": 16,
        "num_layers": case.num_layers,
        "max_horizon": 200,
        "learn_initial_state": case.is_learned,
        **dict(case.options),
        **options,
    }
    core = builder(in_features, **{name: value for name, value in wanted.items() if name in known})
    with torch.no_grad():
        for parameter in core.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for module in core.modules():
            if isinstance(module, InitialState) and module.is_learned:
                for parameter in module.parameters():
                    parameter.normal_()
    if case.is_learned:
        learned = [value for value in core.initial_state(1).values() if value.requires_grad]
        assert learned
        assert all(value.abs().min() > 0 for value in learned)
    return core


@pytest.fixture
def build_core(core_case: CoreCase) -> Callable[..., Core]:
    """Builder of the core of the case, `build(in_features, **options)`."""

    def build(in_features: int = OBSERVATION_SIZE, **options: object) -> Core:
        return build_case(core_case, in_features, **options)

    return build


@pytest.fixture
def build_small_core() -> Callable[[str], Core]:
    """Builder of one layer of a backbone by its name, with a learned initial state where it offers one."""

    def build(name: str, in_features: int = OBSERVATION_SIZE) -> Core:
        has_learned = CoreCase(name, True, 1) in core_cases()
        return build_case(CoreCase(name, has_learned, 1), in_features)

    return build


@pytest.fixture
def build_gru_case() -> Callable[..., Core]:
    """Builder of the fullest variant of one core, where one core is enough."""
    return lambda in_features, **options: build_case(CoreCase("gru", True, 2), in_features, **options)


@pytest.fixture
def stored_state() -> Callable[[Core, int], State]:
    """Maker of a state that a core really reaches, another for each row; detached leaves."""

    @torch.no_grad()
    def make(core: Core, batch: int) -> State:
        like = next(core.parameters())
        x = torch.randn(batch, 7, core.in_features, dtype=like.dtype)
        _, state = unroll(core, x, core.initial_state(batch), torch.zeros(batch, 7, dtype=torch.bool))
        return {name: value.clone() for name, value in state.items()}

    return make


@pytest.fixture
def random_resets() -> Callable[..., Tensor]:
    """Maker of flags [B, T] of which about a quarter are set."""

    def make(batch: int, steps: int, share: float = 0.25) -> Tensor:
        return torch.rand(batch, steps) < share

    return make


class RandomEpisodesEnv(EnvBase):
    """Noise to observe; episodes of random length, some terminated and some truncated, without regard to the action.

    All randomness of environment i comes from a generator of its own.
    """

    def __init__(self, num_envs: int, *, p_terminated: float = 0.1, p_truncated: float = 0.1, seed: int = 0) -> None:
        super().__init__(device="cpu", batch_size=torch.Size([num_envs]))
        self.p_terminated, self.p_truncated = p_terminated, p_truncated
        batch = (num_envs,)
        self.observation_spec = Composite(observation=Unbounded((*batch, OBSERVATION_SIZE)), shape=batch)
        self.action_spec = Categorical(NUM_ACTIONS, shape=batch)
        self.reward_spec = Unbounded((*batch, 1))
        flags = {name: Binary(1, (*batch, 1), dtype=torch.bool) for name in ("done", "terminated", "truncated")}
        self.done_spec = Composite(flags, shape=batch)
        self._set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        first = 0 if seed is None else seed
        self._generators = [torch.Generator().manual_seed(1000 * first + i) for i in range(self.batch_size[0])]

    def _draw(self) -> Tensor:
        return torch.stack([torch.rand(OBSERVATION_SIZE + 2, generator=g) for g in self._generators])

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDict:
        observation = 2 * self._draw()[:, :OBSERVATION_SIZE] - 1
        flags = {name: torch.zeros(*self.batch_size, 1, dtype=torch.bool) for name in self.done_spec.keys()}
        return TensorDict({"observation": observation, **flags}, self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        draw = self._draw()
        terminated = draw[:, -1:] < self.p_terminated
        truncated = draw[:, -2:-1] < self.p_truncated
        observation = 2 * draw[:, :OBSERVATION_SIZE] - 1
        reward = observation.sum(-1, keepdim=True) + tensordict["action"].unsqueeze(-1)
        return TensorDict(
            {
                "observation": observation,
                "reward": reward,
                "terminated": terminated,
                "truncated": truncated,
                "done": terminated | truncated,
            },
            self.batch_size,
        )


def tracked_env(num_envs: int, seed: int = 0, **options: float) -> TransformedEnv:
    """The environment with `is_init`."""
    return TransformedEnv(RandomEpisodesEnv(num_envs, seed=seed, **options), Compose(InitTracker()))


@pytest.fixture
def make_env() -> Callable[..., TransformedEnv]:
    """Maker of environments, `make(num_envs, seed, p_terminated=, p_truncated=)`."""
    return tracked_env


def agent_on(core: Core, action_spec: TensorSpec | None = None, **options: float) -> PPOAgent:
    """An agent for `RandomEpisodesEnv`, whose policy depends clearly on memory."""
    spec = Composite(observation=Unbounded((OBSERVATION_SIZE,)))
    encoder = build_encoder(spec, batch_dims=0, features=core.in_features)
    action_spec = Categorical(NUM_ACTIONS) if action_spec is None else action_spec
    return PPOAgent(encoder, Backbone(core), action_spec, **{"policy_scale": 2.0, "value_scale": 2.0, **options})


@pytest.fixture
def make_agent() -> Callable[..., PPOAgent]:
    """Maker of an agent around a core."""
    return agent_on


@pytest.fixture
def collect() -> Callable[..., TensorDictBase]:
    """Hand-written rollout of a policy: reset, then policy, step and `step_mdp`, stacked to [N, T]."""

    @torch.no_grad()
    def run(policy: PPOAgent, env: TransformedEnv, steps: int) -> TensorDictBase:
        env.append_transform(policy.backbone.make_tensordict_primer())
        tensordict = env.reset()
        rows = []
        for _ in range(steps):
            tensordict, following = env.step_and_maybe_reset(policy(tensordict))
            rows.append(tensordict.clone())
            tensordict = following
        return torch.stack(rows, 1)

    return run


class TheirPolicy(nn.Module):
    """An actor, a critic head and a critic around one of TorchRL's recurrent modules."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.state_keys = ["recurrent_state"] if kind == "gru" else ["state_h", "state_c"]
        embed = TensorDictModule(nn.Linear(3, 8), in_keys=["observation"], out_keys=["embedding"])
        recurrent = (GRUModule if kind == "gru" else LSTMModule)(
            8,
            8,
            2,
            in_keys=["embedding", *self.state_keys],
            out_keys=["memory", *(("next", key) for key in self.state_keys)],
        )
        head = TensorDictModule(nn.Linear(8, 3), in_keys=["memory"], out_keys=["logits"])
        self.actor = ProbabilisticActor(
            TensorDictSequential(embed, recurrent, head),
            in_keys=["logits"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        )
        self.head = ValueOperator(nn.Linear(8, 1), in_keys=["memory"])
        self.critic = TensorDictSequential(embed, recurrent, self.head)


@pytest.fixture
def their_policy() -> Callable[[str], TheirPolicy]:
    """Maker of a policy of TorchRL's own modules, "gru" or "lstm"."""
    return TheirPolicy


def trained(cfg: DictConfig) -> PPOAgent:
    """An agent as if trained: its parameters are off their starting values, and its choices vary."""
    env = build_env(cfg, num_envs=4)
    agent = build_agent(cfg, env)
    env.rollout(60, break_when_any_done=False)  # moves the statistics of transforms
    env.close()
    with torch.no_grad():
        for parameter in agent.parameters():
            is_convolution = parameter.ndim > 2  # of which many follow each other: their gains multiply
            parameter += (0.3 * parameter.std() if is_convolution else 0.05) * torch.randn_like(parameter)
        heads = [module for module in agent.policy_head.modules() if isinstance(module, torch.nn.Linear)]
        for head in heads:
            head.weight.mul_(3.0)
    return agent


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Turns the checker of shapes off: it does not know the sizes that torch traces with."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


WHOLE_RUNS = {
    "collectors",
    "cli",
    "export",
    "learning",
    "memory_benchmarks",
    "benchmarks",
    "test_other_device.py",
}
"""Tests of much that is tested by itself: the checker would take most of their time."""


@pytest.fixture(autouse=True)
def _shapes_are_checked_in_parts(request: pytest.FixtureRequest) -> None:
    if WHOLE_RUNS & set(request.path.relative_to(Path(__file__).parent).parts):
        request.getfixturevalue("unchecked_shapes")


@pytest.fixture
def build_trained() -> Callable[..., tuple[DictConfig, PPOAgent]]:
    """Builder of a configuration and its agent, from overrides."""

    def build(*overrides: str) -> tuple[DictConfig, PPOAgent]:
        cfg = load_config(overrides=list(overrides))
        return cfg, trained(cfg)

    return build


@pytest.fixture
def batches_of_both() -> Callable[..., Iterator[tuple[TensorDictBase, TensorDictBase]]]:
    """Collects with our fused collector and with TorchRL's, from the same seeds: `run(*overrides)` yields two pairs."""

    def run(*overrides: str) -> Iterator[tuple[TensorDictBase, TensorDictBase]]:
        batches = []
        for kind in (FusedCollector, Collector):
            torch.manual_seed(0)
            cfg = load_config(overrides=[*overrides, "env.num_envs=4", "env.horizon=5"])
            env = build_env(cfg)
            agent = build_agent(cfg, env)
            made = kind(env, agent, frames_per_batch=80, total_frames=-1, auto_register_policy_transforms=True)
            made.set_seed(3)
            torch.manual_seed(5)
            batches.append([batch.clone() for batch in islice(iter(made), 2)])
        return zip(*batches, strict=True)

    return run


@pytest.fixture
def save_trained(tmp_path: Path) -> Callable[..., Path]:
    """Builder of a checkpoint, from overrides."""

    def save(*overrides: str) -> Path:
        cfg = load_config(overrides=list(overrides))
        path = tmp_path / "agent.pt"
        save_checkpoint(path, {"config": OmegaConf.to_container(cfg), "agent": trained(cfg).state_dict()})
        return path

    return save


def stub(name: str, **entries: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(entries)
    return module


@contextmanager
def official_package(**stubs: ModuleType) -> Iterator[None]:
    """Lets modules of mamba-ssm be imported where there is no CUDA: its own `__init__` cannot be.

    Stubs stand where they import kernels; nothing of what is used here calls them.
    """
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("mamba-ssm is not installed; `make test` does it")
    package = stub("mamba_ssm", __path__=list(spec.submodule_search_locations))
    stubs = {"mamba_ssm": package, "selective_scan_cuda": stub("selective_scan_cuda"), **stubs}
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name, was in before.items():
            if was is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = was


@pytest.fixture(scope="session")
def mamba_ssm() -> SimpleNamespace:
    """The pure-PyTorch code of the official package."""

    class Hub:
        """Stands for huggingface_hub's mixin."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a kernel was called")

    triton = "mamba_ssm.ops.triton"
    stubs = {
        "huggingface_hub": stub("huggingface_hub", PyTorchModelHubMixin=Hub),
        f"{triton}.selective_state_update": stub("", selective_state_update=None),
        f"{triton}.layer_norm": stub("", RMSNorm=None, layer_norm_fn=None, rms_norm_fn=None, _layer_norm_fwd=refuse),
        f"{triton}.layernorm_gated": stub("", RMSNorm=GatedRMSNorm),
        f"{triton}.ssd_combined": stub("", mamba_chunk_scan_combined=refuse, mamba_split_conv1d_scan_combined=refuse),
    }
    with official_package(**stubs):
        interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        simple = importlib.import_module("mamba_ssm.modules.mamba_simple")
        mamba2 = importlib.import_module("mamba_ssm.modules.mamba2")
        minimal = importlib.import_module("mamba_ssm.modules.ssd_minimal")
    vars(simple).update(selective_scan_fn=interface.selective_scan_ref, selective_state_update=None)
    vars(simple).update(causal_conv1d_fn=None, causal_conv1d_update=None)
    vars(mamba2).update(selective_state_update=None, causal_conv1d_fn=None, causal_conv1d_update=None)
    return SimpleNamespace(
        selective_scan_ref=interface.selective_scan_ref,
        ssd_minimal_discrete=minimal.ssd_minimal_discrete,
        Mamba=simple.Mamba,
        Mamba2=mamba2.Mamba2,
    )


@pytest.fixture
def triton_ssd(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """mamba-ssm's own `mamba_chunk_scan_combined`: its Triton kernels, on a CPU under TRITON_INTERPRET=1."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    one = SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: one)
    tune = triton.autotune  # one configuration each: there is nothing to time
    monkeypatch.setattr(triton, "autotune", lambda configs, **options: tune(configs=configs[:1], **options))
    with official_package():
        return importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined


class GatedRMSNorm(torch.nn.Module):
    """What the official block's Triton norm computes: the norm of the gated input."""

    def __init__(self, size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        gated = x * torch.nn.functional.silu(z)
        return gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps) * self.weight

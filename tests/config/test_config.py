"""Correct configurations are composed; wrong input ends in one clear line."""

from importlib.metadata import EntryPoint

import pytest
from omegaconf import OmegaConf

from cyborg_torchrl import register_backbone
from cyborg_torchrl.config import ConfigError, TrainConfig, load_config
from cyborg_torchrl.config.composition import primary_config
from cyborg_torchrl.cores import LayeredCore, MemorylessCore, build_gru
from cyborg_torchrl.registry import backbones, environments, options_of
from cyborg_torchrl.training.builders import build_agent, build_core, build_env, rollout_length


def test_overrides_swap_parts():
    cfg = load_config(overrides=["backbone=gru", "env.horizon=200", "train.seed=3", "backbone.hidden_size=32"])
    assert cfg.backbone.name == "gru"
    assert cfg.backbone.hidden_size == 32
    assert cfg.env.horizon == 200
    assert cfg.train.seed == 3
    env = build_env(cfg)
    core = build_core(cfg, 64, env)
    assert isinstance(core, LayeredCore)
    assert core.out_features == 32
    # max_horizon: null became the environment's horizon: the slowest unit remembers ten horizons
    assert core.layers[0].bias_hh[32:64].exp().max().item() == pytest.approx(2000, rel=1e-4)


@pytest.mark.parametrize("name", ["lru", "gru", "lstm"])
def test_defaults_of_the_builder_are_the_defaults_of_the_configuration(name):
    cfg = load_config(overrides=[f"backbone={name}"])
    assert {key: cfg.backbone[key] for key in cfg.backbone if key != "name"} == options_of(backbones.get(name))


def test_mode_none_has_no_state():
    cfg = load_config(overrides=["train=none", "env.horizon=3"])
    agent = build_agent(cfg, build_env(cfg))
    assert isinstance(agent.backbone.core, MemorylessCore)
    assert not agent.backbone.state_keys


def test_the_preset_chooses_the_mode():
    from cyborg_torchrl.config import TrainConfig

    assert TrainConfig().recurrent_mode is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("backbone=gruu", "did you mean 'gru'"),
        ("logger.eval_actions=gredy", "unknown logger.eval_actions 'gredy': did you mean 'greedy'"),
        ("env=delaid_cue", "did you mean 'delayed_cue'"),
        ("train=episod", "did you mean 'episode'"),
        ("backbone.hiden_size=3", "did you mean 'backbone.hidden_size'"),
        ("trian.seed=3", "did you mean 'train.seed'"),
        ("+train.sed=3", "did you mean 'seed'"),
        ("train.recurrent_mode=burnin", "did you mean 'burn_in'"),
        ("train.n_epochs=abc", "train.n_epochs=abc"),
        ("train.n_epochs=0", "train.n_epochs must be greater than 0"),
        ("train.gamma=1.5", "[0, 1]"),
        ("train.device=cuda:99", "cuda:99"),
        ("train.device=gpu", "cpu, cuda, cuda:N or auto"),
        ("train.burn_in=4", "train.burn_in belongs to recurrent_mode=burn_in; the mode is 'episode'"),
        ("train.seq_len=6", "recurrent_mode=burn_in or tbptt"),
        ("train.refresh_states=true", "recurrent_mode=burn_in or tbptt"),
        ("train.state_dtype=float8", "did you mean 'float32'"),
        ("train.storage=memap", "did you mean 'memmap'"),
        ("encoder.convolutions=impalla", "unknown encoder.convolutions 'impalla': did you mean 'impala'"),
        ("encoder.discrete=onehot", "unknown encoder.discrete 'onehot': did you mean 'one_hot'"),
        ("encoder.embedding_size=0", "encoder.embedding_size must be greater than 0"),
        ("nonsense", "key=value"),
        ("=3", "key=value"),
    ],
)
def test_bad_overrides(override, expected):
    with pytest.raises(ConfigError) as error:
        load_config(overrides=[override])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=3", r"unknown key 'seed': did you mean 'train.seed'"),
        ("ppo.seed=3", r"unknown key 'ppo.seed': did you mean 'train.seed'"),
        ("init_form=x", r"unknown key 'init_form': did you mean 'init_from'"),
        ("lr=3", r"unknown key 'lr': known: agent, backbone, .*, train, transforms\.$"),
        (
            "backbone.widht=3",
            r"unknown key 'backbone.widht': known: backbone.hidden_size, .*, backbone.readout_groups\.$",
        ),
        ("train.foo_bar=3", r"known: train.adam_eps, .* and [0-9]+ more; all: cyborg-torchrl train --help$"),
        ("backbone=gtrxl", r"unknown backbone 'gtrxl': known: attention, .*, stack\.$"),
        ("train.recurrent_mode=rnn", r"unknown train.recurrent_mode 'rnn': known: burn_in, episode, none, tbptt\.$"),
    ],
)
def test_only_near_names_are_suggested(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[override])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["env.horizon=-1"], "horizon must be >= 0; got -1"),
        (["env.cues=1"], "cues must be >= 2"),
        (["train=tbptt", "train.seq_len=600", "env.num_envs=3"], "only 6 sequences to split"),
        (["env.num_envs=4"], "use 4 or fewer"),
        (["backbone.readout=loud"], "timescale_norm, none"),
        (["backbone.hidden_size=0"], "hidden_size must be >= 1"),
        (["encoder.observation_keys=[sound]"], "no observation ['sound'] in the environment; it has: observation."),
    ],
)
def test_values_that_do_not_fit(overrides, expected):
    cfg = load_config(overrides=overrides)

    def build():
        env = build_env(cfg)
        build_agent(cfg, env)
        rollout_length(cfg, env)

    with pytest.raises(ConfigError) as error:
        build()
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_with_a_defaults_list(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "defaults:\n  - config_schema\n  - env: delayed_cue\n  - backbone: gru\n  - train: burn_in\n  - _self_\n"
        "train:\n  seq_len: 6\n  seed: 5\n"
    )
    cfg = load_config(str(path), ["env.horizon=10"])
    assert (cfg.backbone.name, cfg.train.recurrent_mode, cfg.train.seed) == ("gru", "burn_in", 5)
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(str(tmp_path / "other.yaml"))
    with pytest.raises(ConfigError, match="did you mean 'memory_delayed_cue_recurrent'"):
        load_config("memory_delayed_cue_recurent")


def test_a_registered_backbone_is_configurable_without_yaml():
    @register_backbone("test_config_backbone")
    def build(in_features: int, *, width: int = 8):
        return build_gru(in_features, hidden_size=width)

    cfg = load_config(overrides=["backbone=test_config_backbone", "backbone.width=12"])
    assert build_core(cfg, 4, build_env(cfg)).out_features == 12
    with pytest.raises(ConfigError, match=r"did you mean 'backbone\.width'"):
        load_config(overrides=["backbone=test_config_backbone", "backbone.widht=12"])


def write(tmp_path, text: str) -> str:
    (tmp_path / "mine.yaml").write_text(text)
    return str(tmp_path / "mine.yaml")


def test_a_plain_file_changes_the_default(tmp_path):
    config = write(tmp_path, "env: {horizon: 7}\ntrain: {seed: 5}\nbackbone: gru\n")
    cfg = load_config(config, ["train.seed=6"])
    assert (cfg.env.horizon, cfg.train.seed, cfg.backbone.name) == (7, 6, "gru")
    assert cfg.train.recurrent_mode == "episode"
    assert load_config(config, ["backbone=lstm"]).backbone.name == "lstm"


@pytest.mark.parametrize("backbone", ["lru", "stack", "mamba_gru"])
def test_the_configuration_of_a_run_can_be_used_again(tmp_path, backbone):
    first = load_config(overrides=[f"backbone={backbone}", "memory=pmm", "env.horizon=9", "backbone.hidden_size=32"])
    again = load_config(write(tmp_path, OmegaConf.to_yaml(first)))
    assert again == first
    assert isinstance(OmegaConf.to_object(again.train), TrainConfig)
    assert load_config(write(tmp_path, OmegaConf.to_yaml(first)), ["backbone=gru"]).backbone.hidden_size == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("env: {horizon: [20\n", "cannot read '.*mine.yaml': .*line 1"),
        ("- a\n", "must hold keys and values"),
        ("env: {horizn: 20}\n", "unknown key 'env.horizn': did you mean 'env.horizon'"),
        ("backbone: gruu\n", "unknown backbone 'gruu': did you mean 'gru'"),
    ],
)
def test_a_file_with_mistakes_is_one_clear_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.vf_coef=nan", "train.vf_coef must be a finite number"),
        ("train.learning_rate=inf", "train.learning_rate must be a finite number"),
        ("train.vf_coef=-1", "train.vf_coef must be 0 or more"),
        ("train.clip_range_vf=-1", "train.clip_range_vf must be greater than 0"),
        ("train.adam_eps=-1", "train.adam_eps must be greater than 0"),
        ("train.seed=-1", "train.seed must be 0 or more"),
        ("train.device=meta", "train.device 'meta' is not supported"),
        ("encoder.hidden_sizes=[0]", "encoder.hidden_sizes must be greater than 0"),
        ("~backbone", "'backbone' is missing"),
    ],
)
def test_more_impossible_values(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[override])


def test_a_broken_package_leaves_the_other_backbones_usable(monkeypatch, caplog):
    broken = EntryPoint("broken", "nowhere_at_all:build", "cyborg_torchrl.backbones")
    monkeypatch.setattr(backbones, "_entry_points", lambda: [broken])
    assert load_config(overrides=["backbone=lru"]).backbone.name == "lru"
    assert "backbone 'broken' cannot be used: ModuleNotFoundError: No module named 'nowhere_at_all'" in caplog.text


@pytest.fixture
def dict_environments():
    """Environments with options without a default, and with mappings."""

    def no_default(num_envs: int = 2, *, path: str, device=None, seed=None):
        return path

    def bare(num_envs: int = 2, *, table: dict | None = None, device=None, seed=None):
        return table

    def plain(num_envs: int = 2, *, table: dict = {}, device=None, seed=None):  # noqa: B006
        return table

    builders = {"no_default": no_default, "bare": bare, "plain": plain}
    for name, builder in builders.items():
        environments.register(name)(builder)
    yield
    for name in builders:
        del environments._components[name]


@pytest.mark.usefixtures("dict_environments")
def test_an_option_without_a_default_must_be_given():
    with pytest.raises(ConfigError, match=r"^env.path must be given: env=no_default has no default for it.$"):
        load_config(overrides=["env=no_default"])
    assert load_config(overrides=["env=no_default", "env.path=a"]).env.path == "a"


@pytest.mark.usefixtures("dict_environments")
@pytest.mark.parametrize(("name", "default"), [("bare", None), ("plain", {})])
def test_mappings_are_options(name, default):
    assert load_config(overrides=[f"env={name}"]).env.table == default
    assert load_config(overrides=[f"env={name}", "env.table={a: 1}"]).env.table == {"a": 1}


FILE = "train: {recurrent_mode: burn_in, burn_in: 4, seq_len: 6, seed: 5, n_epochs: 2, total_timesteps: 999}\n"


@pytest.mark.parametrize("override", ["train=none", "train.recurrent_mode=none"])
def test_the_control_differs_in_one_key(tmp_path, override):
    agent, control = load_config(write(tmp_path, FILE)), load_config(str(tmp_path / "mine.yaml"), [override])
    assert {key for key in agent.train if agent.train[key] != control.train[key]} == {"recurrent_mode"}
    assert control.train.recurrent_mode == "none"
    assert all(control[key] == agent[key] for key in control if key != "train")


def test_the_control_of_a_shipped_configuration_and_of_a_run(tmp_path):
    shipped = load_config("treechop_ppo_recurrent", ["train.recurrent_mode=none"])
    assert (shipped.train.recurrent_mode, shipped.train.seq_len) == ("none", 64)
    run = load_config("treechop_ppo_recurrent", ["train.seed=3"])
    control = load_config(write(tmp_path, OmegaConf.to_yaml(run)), ["train=none"])
    assert {key for key in run.train if run.train[key] != control.train[key]} == {"recurrent_mode"}


@pytest.mark.parametrize(
    ("text", "override", "expected"),
    [
        (FILE, "train=tbptt", {"recurrent_mode": "tbptt", "seq_len": 6, "seed": 5}),
        ("train: {recurrent_mode: episode, seq_len: null, seed: 5}\n", "train=tbptt", {"seq_len": 128, "seed": 5}),
        ("train: {seq_len: 6, seed: 5}\n", "train=none,tbptt", None),
    ],
)
def test_a_mode_keeps_the_rest_of_the_files_block(tmp_path, text, override, expected):
    text = text.replace(" burn_in: 4,", "")
    if expected is None:  # several values: for a sweep, whose runs Hydra composes
        with primary_config(write(tmp_path, text), [override]) as primary:
            content = OmegaConf.load(primary.folder / "config.yaml")
        assert content.train == {"seq_len": 6, "seed": 5}
        return
    cfg = load_config(write(tmp_path, text), [override])
    assert {key: cfg.train[key] for key in expected} == expected


def test_other_groups_keep_what_the_file_says_too(tmp_path):
    text = "collector: {name: fused, num_workers: 3}\nlogger: {base_dir: there, progress: true}\n"
    cfg = load_config(write(tmp_path, text), ["collector=multi_sync", "logger=quiet"])
    assert (cfg.collector.name, cfg.collector.num_workers) == ("multi_sync", 3)
    assert (cfg.logger.base_dir, cfg.logger.progress) == ("there", False)


def test_a_block_without_a_name_belongs_to_every_choice(tmp_path):
    config = write(tmp_path, "backbone: {hidden_size: 32}\nenv: {horizon: 7}\n")
    assert load_config(config, ["backbone=gru"]).backbone.hidden_size == 32
    assert load_config(config, ["env=delayed_cue"]).env.horizon == 7
    with pytest.raises(ConfigError, match=r"unknown key 'env.horizon'"):
        load_config(config, ["env=popgym"])


def test_a_block_with_another_name_is_replaced_with_a_warning(tmp_path, caplog):
    config = write(tmp_path, "backbone: {name: lru, hidden_size: 32}\n")
    assert load_config(config, ["backbone=lru"]).backbone.hidden_size == 32
    assert not caplog.text
    assert load_config(config, ["backbone=gru"]).backbone.hidden_size == 64
    assert "backbone=gru replaces all of 'backbone' in the file: hidden_size" in caplog.text

"""Encoders: vectors, categories, grids and images, alone and together."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    NonTensor,
    OneHot,
    TensorSpec,
    Unbounded,
)

from cyborg_torchrl.cores import build_gru
from cyborg_torchrl.modules import Backbone, GridEncoder, MixedEncoder, PixelEncoder, PPOAgent, VectorEncoder
from cyborg_torchrl.modules import build_encoder as build
from cyborg_torchrl.modules.encoders import CategoryEmbedding, OneHotCategories, ScaledVector
from cyborg_torchrl.modules.encoders.autocast import is_emulated
from cyborg_torchrl.modules.encoders.images import image_layout
from cyborg_torchrl.objectives import RecurrentClipPPOLoss

FEATURES = 8


def image_spec(*shape: int, dtype: torch.dtype = torch.uint8) -> Bounded:
    return Bounded(0, 255 if dtype == torch.uint8 else 1, shape, dtype=dtype)


def byte_images(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)


SPECS: dict[str, TensorSpec] = {
    "vector": Unbounded((5,)),
    "number": Unbounded(()),
    "matrix": Unbounded((4, 3)),
    "double": Unbounded((3,), dtype=torch.float64),
    "small_volume": Unbounded((4, 3, 2)),
    "integers": Unbounded((4,), dtype=torch.int64),
    "bounded_integers": Bounded(-2, 5, (4,), dtype=torch.int32),
    "bytes": image_spec(6),
    "category": Categorical(3),
    "categories": Categorical(3, shape=(2, 2)),
    "multi_category": MultiCategorical([2, 3, 4]),
    "binary": Binary(3),
    "switches": Binary(3, dtype=torch.bool),
    "one_hot": OneHot(3),
    "multi_one_hot": MultiOneHot([2, 3]),
    "grid": image_spec(7, 7, 3),
    "grid_of_few": Bounded(0, 10, (5, 6, 2), dtype=torch.int64),
    "image": image_spec(3, 40, 48),
    "image_last": image_spec(40, 48, 3),
    "gray": image_spec(40, 48),
    "frames": image_spec(2, 40, 48, 3),
    "float_image": Bounded(-1.0, 1.0, (3, 36, 36)),
    "small_image": image_spec(28, 28, 1),
}
PICTURES = ("image", "small_image", "image_last", "gray", "frames", "float_image")
BIASED = (*PICTURES, "category", "categories", "multi_category")
"""Those whose zero is a picture or a category like any other."""


@pytest.mark.parametrize("batch", [(), (5,), (5, 2)], ids=str)
@pytest.mark.parametrize("discrete", ["one_hot", "embedding"])
@pytest.mark.parametrize("kind", SPECS)
def test_every_kind_is_read(kind: str, discrete: str, batch: tuple[int, ...]) -> None:
    spec = Composite(observation=SPECS[kind]).expand(batch)
    encoder = build(spec, batch_dims=len(batch), features=FEATURES, discrete=discrete)
    assert (encoder.in_keys, encoder.out_keys) == (["observation"], ["features"])
    step = spec.rand()
    assert encoder(step.clone())["features"].shape == (*batch, FEATURES)
    sequence = spec.rand([7]) if not batch else spec.rand([7]).movedim(0, -1)
    together = encoder(sequence.clone())["features"]
    assert together.shape == (*sequence.batch_size, FEATURES)
    assert together.dtype == torch.float32
    if batch:  # step by step is the same
        one_by_one = torch.stack([encoder(sequence[..., t].clone())["features"] for t in range(7)], -2)
        scale = together.abs().max().clamp_min(1.0)  # integers of any size cancel, and rows are rounded in other orders
        torch.testing.assert_close(together / scale, one_by_one / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in SPECS if kind not in BIASED])
def test_blanks_embed_to_zero(kind: str) -> None:
    spec = Composite(observation=SPECS[kind])
    encoder = build(spec, batch_dims=0, features=FEATURES, hidden_sizes=[6])
    assert (encoder(spec.zero())["features"] == 0).all()
    assert encoder(spec.rand([20]))["features"].abs().max() > 0


def test_vector_encoder_is_linear_and_blank_stays_blank() -> None:
    encoder = VectorEncoder(3, FEATURES)
    x, y = torch.randn(2, 4, 5, 3).unbind(0)
    torch.testing.assert_close(encoder(x + 2 * y), encoder(x) + 2 * encoder(y), rtol=0, atol=1e-5)
    assert (encoder(torch.zeros(4, 3)) == 0).all()
    assert (VectorEncoder(3, FEATURES, [16, 16])(torch.zeros(4, 3)) == 0).all()


def test_vector_encoder_by_hand() -> None:
    encoder = VectorEncoder(5, 2, [4])
    first, second = (layer.weight for layer in encoder.network if isinstance(layer, nn.Linear))
    left, right = torch.randn(6, 2), torch.randn(6, 3)
    hidden = nn.functional.silu(torch.cat([left, right], -1) @ first.T)
    torch.testing.assert_close(encoder(left, right), hidden @ second.T)


def test_one_vector_keeps_its_network_and_names() -> None:
    encoder = build(Composite(observation=Unbounded((5,))), batch_dims=0, features=FEATURES)
    assert isinstance(encoder.module, VectorEncoder)
    assert list(encoder.state_dict()) == ["module.network.0.weight"]
    torch.manual_seed(3)
    again = build(Composite(observation=Unbounded((5,))), batch_dims=0, features=FEATURES)
    torch.manual_seed(3)
    expected = nn.Linear(5, FEATURES, bias=False)
    x = torch.randn(4, 5)
    assert torch.equal(again.module(x), expected(x))


def test_one_hot_is_torchs() -> None:
    spec = Composite(observation=MultiCategorical([2, 3]), other=Categorical(4))
    encoder = build(spec, batch_dims=0, features=FEATURES, observation_keys=["observation", "other"])
    values = spec.rand([50])
    pair, other = values["observation"], values["other"]
    hot = torch.cat([functional.one_hot(pair[:, 0], 2), functional.one_hot(pair[:, 1], 3)], -1)
    hot = torch.cat([hot, functional.one_hot(other, 4)], -1).float()
    assert encoder.module.vector.network[0].weight.shape == (FEATURES, 9)
    torch.testing.assert_close(encoder(values)["features"], hot @ encoder.module.vector.network[0].weight.T)


def test_what_is_no_category_is_blank() -> None:
    assert OneHotCategories([], [3])(torch.tensor([-1, 0, 3])).tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_each_entry_has_its_own_embeddings() -> None:
    reader = CategoryEmbedding([2], [2, 3], 4)
    table = reader.table.weight
    expected = torch.cat([table[1], table[2 + 2]])
    assert torch.equal(reader(torch.tensor([[1, 2]], dtype=torch.uint8)), expected.unsqueeze(0))


def test_integers_are_scaled_by_their_bounds() -> None:
    """Each entry by its own greatest size, and without a shift."""
    spec = Composite(observation=Bounded(torch.tensor([-4, 0, 0]), torch.tensor([2, 10, 0]), (3,), dtype=torch.int64))
    spec = spec.expand(2)
    encoder = build(spec, batch_dims=1, features=FEATURES)
    weight = encoder.module.vector.network[0].weight
    seen = torch.tensor([[-4, 5, 0], [2, 10, 3]])
    expected = torch.tensor([[-1.0, 0.5, 0.0], [0.5, 1.0, 3.0]]) @ weight.T
    torch.testing.assert_close(encoder.module(seen), expected)
    unbounded = build(Composite(observation=Unbounded((3,), dtype=torch.int64)), batch_dims=0, features=FEATURES)
    weight = unbounded.module.vector.network[0].weight
    torch.testing.assert_close(unbounded.module(seen), seen.float() @ weight.T)


def test_grid_by_hand() -> None:
    encoder = GridEncoder((4, 5, 2), FEATURES, num_values=5, embedding_size=4)
    grid = torch.randint(5, (6, 4, 5, 2))
    cells = torch.zeros(6, 4, 4, 5)
    for index in torch.cartesian_prod(*map(torch.arange, grid.shape)).tolist():
        b, row, column, channel = index
        if (value := int(grid[tuple(index)])) != 0:
            cells[b, :, row, column] += encoder.table.weight[5 * channel + value].detach()
    first, second = (layer.weight for layer in encoder.convolutions if isinstance(layer, nn.Conv2d))
    seen = functional.relu(
        functional.conv2d(functional.relu(functional.conv2d(cells, first, padding=1)), second, padding=1)
    )
    torch.testing.assert_close(encoder(grid), seen.flatten(1) @ encoder.project.weight.T)
    assert torch.equal(encoder(grid.byte()), encoder(grid))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 64, 48), (False, 3, 64, 48)),
        ((64, 48, 3), (True, 3, 64, 48)),
        ((210, 160, 12), (True, 12, 210, 160)),
        ((12, 210, 160), (False, 12, 210, 160)),
        ((48, 40, 40), (False, 48, 40, 40)),  # a square tells, though its sides are the smaller ones
        ((40, 40, 48), (True, 48, 40, 40)),
        ((4, 36, 40, 3), (True, 12, 36, 40)),
        ((4, 3, 36, 40), (False, 12, 36, 40)),
        ((36, 40), (False, 1, 36, 40)),
        ((4, 64, 3), (True, 3, 4, 64)),
        ((3, 3, 3), (True, 3, 3, 3)),
    ],
)
def test_which_end_is_channels(shape: tuple[int, ...], expected: tuple) -> None:
    assert image_layout(shape)[1:] == expected


@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (2, 1, 3)])
def test_pixels_keep_their_leading_dimensions(leading: tuple[int, ...]) -> None:
    encoder = PixelEncoder((3, 36, 40), FEATURES, "nature")
    images = byte_images(*leading, 3, 36, 40)
    out = encoder(images)
    assert out.shape == (*leading, FEATURES)
    flat = encoder(images.reshape(-1, 3, 36, 40))
    torch.testing.assert_close(out.reshape(-1, FEATURES), flat)


@pytest.mark.parametrize("convolutions", ["small", "nature", "impala"])
@pytest.mark.parametrize("channels", [1, 3, 4, 12])
def test_channels_first_and_last_are_the_same(channels: int, convolutions: str) -> None:
    first = PixelEncoder((channels, 40, 36), FEATURES, convolutions)
    last = PixelEncoder((40, 36, channels), FEATURES, convolutions)
    last.load_state_dict(first.state_dict())
    images = torch.rand(2, 3, channels, 40, 36)
    torch.testing.assert_close(last(images.movedim(-3, -1)), first(images))


def test_small_by_hand() -> None:
    encoder = PixelEncoder((3, 30, 33), FEATURES, "small")
    x = expected = torch.rand(2, 3, 30, 33)
    for layer in (layer for layer in encoder.convolutions if isinstance(layer, nn.Conv2d)):
        expected = functional.relu(functional.conv2d(expected, layer.weight, layer.bias, stride=2, padding=1))
    assert expected.shape == (2, 32, 4, 5)
    torch.testing.assert_close(encoder(x), expected.flatten(1) @ encoder.project.weight.T)


@pytest.mark.parametrize(
    ("shape", "name"), [((3, 28, 28), "small"), ((48, 100, 1), "small"), ((49, 49), "nature"), ((84, 84, 4), "nature")]
)
def test_the_size_chooses_the_network(shape: tuple[int, ...], name: str) -> None:
    encoder = PixelEncoder(shape, FEATURES)
    assert encoder.name == name
    chosen = PixelEncoder(shape, FEATURES, name)
    chosen.load_state_dict(encoder.state_dict())
    images = byte_images(2, *shape)
    torch.testing.assert_close(encoder(images), chosen(images), rtol=0, atol=0)


def test_frames_of_a_stack_are_channels() -> None:
    shapes = ((6, 32, 40), (2, 3, 32, 40), (2, 32, 40, 3))
    flat, first, last = (PixelEncoder(shape, FEATURES, "impala") for shape in shapes)
    images = byte_images(5, 2, 3, 32, 40)
    for encoder in (first, last):
        encoder.load_state_dict(flat.state_dict())
    expected = flat(images.flatten(1, 2))
    torch.testing.assert_close(first(images), expected)
    torch.testing.assert_close(last(images.movedim(2, -1)), expected)


@pytest.mark.parametrize("convolutions", ["small", "nature", "impala"])
def test_bytes_are_scaled_to_one_and_floats_are_not(convolutions: str) -> None:
    encoder = PixelEncoder((3, 36, 36), FEATURES, convolutions)
    images = byte_images(2, 3, 36, 36)
    torch.testing.assert_close(encoder(images), encoder(images.float() / 255))
    assert encoder.double()(images).dtype == torch.float64


def test_floats_are_scaled_by_their_common_bounds() -> None:
    spec = Composite(observation=Bounded(-1.0, 3.0, (3, 36, 36)))
    encoder = build(spec, batch_dims=0, features=FEATURES)
    plain = PixelEncoder((3, 36, 36), FEATURES)
    plain.load_state_dict(encoder.module.state_dict())
    images = spec.rand([4])["observation"]
    torch.testing.assert_close(encoder.module(images), plain((images + 1) / 4))
    unbounded = build(Composite(observation=Unbounded((3, 36, 36))), batch_dims=0, features=FEATURES)
    unbounded.module.load_state_dict(plain.state_dict())
    torch.testing.assert_close(unbounded.module(images), plain(images))


def test_nature_by_hand() -> None:
    encoder = PixelEncoder((3, 44, 44), FEATURES, "nature")
    x = torch.rand(2, 3, 44, 44)
    expected = x
    convolutions = [layer for layer in encoder.convolutions if isinstance(layer, nn.Conv2d)]
    for layer, stride in zip(convolutions, (4, 2, 1), strict=True):
        expected = nn.functional.relu(nn.functional.conv2d(expected, layer.weight, layer.bias, stride))
    torch.testing.assert_close(encoder(x), expected.flatten(1) @ encoder.project.weight.T)


def test_impala_has_the_papers_parameters() -> None:
    """Five convolutions of 3 x 3 in each of three stages, the first of which widens; then one map of 8 x 8 x 32."""
    stages = [(3, 16), (16, 32), (32, 32)]
    expected = sum(9 * i * o + o + 4 * (9 * o * o + o) for i, o in stages)
    assert expected == 97_600
    encoder = PixelEncoder((64, 64, 3), 64, "impala")
    assert sum(parameter.numel() for parameter in encoder.convolutions.parameters()) == expected
    assert sum(parameter.numel() for parameter in encoder.parameters()) == expected + 8 * 8 * 32 * 64


@pytest.mark.parametrize("size", [(64, 64), (36, 41)])
def test_impala_against_plain_functions(size: tuple[int, int]) -> None:
    encoder = PixelEncoder((3, *size), FEATURES, "impala")
    weights = [parameter for name, parameter in encoder.named_parameters() if not name.startswith("project")]
    pairs = iter(zip(weights[::2], weights[1::2], strict=True))

    def convolve(x: Tensor) -> Tensor:
        return functional.conv2d(x, *next(pairs), padding=1)

    images = x = torch.rand(3, 3, *size)
    for _ in range(3):
        x = functional.max_pool2d(convolve(x), 3, 2, 1)
        for _ in range(2):
            x = x + convolve(functional.relu(convolve(functional.relu(x))))
    expected = functional.relu(x).flatten(1) @ encoder.project.weight.T
    assert next(pairs, None) is None
    torch.testing.assert_close(encoder(images), expected)


@pytest.mark.parametrize("kept", [100, 3], ids=["kept", "computed again"])
@pytest.mark.parametrize("convolutions", ["small", "nature", "impala"])
def test_blocks_change_nothing(convolutions: str, kept: int) -> None:
    """Nor the gradient, of parameters that have been put in for the forward pass alone."""
    encoder = PixelEncoder((36, 36, 3), FEATURES, convolutions).double()
    images = byte_images(2, 5, 36, 36, 3)
    values = {name: value.detach().clone().requires_grad_() for name, value in encoder.named_parameters()}
    results = []
    for encoder.block, encoder.kept in ((100, 100), (3, kept)):
        out = functional_call(encoder, values, (images,))
        results.append([out, *torch.autograd.grad(out.square().sum(), list(values.values()))])
    torch.testing.assert_close(results[0], results[1])
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), results[0][0])


@pytest.mark.parametrize("shape", [(3, 35, 64), (64, 35, 3)])
def test_small_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="'nature' needs images of at least 36 x 36 pixels; got"):
        PixelEncoder(shape, FEATURES, "nature")


@pytest.mark.parametrize("shape", [(64,), (1, 2, 3, 64, 64)])
def test_images_have_three_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="three dimensions"):
        PixelEncoder(shape, FEATURES)


def test_build_reads_observation_or_pixels() -> None:
    vector = Composite(observation=Unbounded((5,)), other=Unbounded((2,)))
    assert build(vector, batch_dims=0).in_keys == ["observation"]
    both = Composite(observation=Unbounded((5,)), pixels=image_spec(3, 64, 64))
    encoder = build(both, batch_dims=0)
    assert encoder.in_keys == ["pixels"]
    assert isinstance(encoder.module, PixelEncoder)
    assert encoder.module(byte_images(2, 3, 64, 64)).shape == (2, 64)


def test_build_reads_all_that_is_no_bookkeeping() -> None:
    flag = Binary(1, dtype=torch.bool)
    spec = Composite(
        {
            "image": image_spec(7, 7, 3),
            "robot": Composite(arm=Unbounded((2,)), success=flag),
            "direction": Categorical(4),
            "memory_state": Composite(hidden=Unbounded((1, 8))),
            **dict.fromkeys(("success", "is_init", "done", "terminated", "truncated"), flag),
            "episode_reward": Unbounded((1,)),
            "step_count": Unbounded((1,), dtype=torch.int64),
        }
    )
    assert build(spec, batch_dims=0).in_keys == ["image", ("robot", "arm"), "direction"]


def test_previous_action_and_reward_are_always_read() -> None:
    spec = Composite(
        observation=Unbounded((3,)), other=Unbounded((2,)), previous_action=OneHot(4), previous_reward=Unbounded((1,))
    )
    previous = ["previous_action", "previous_reward"]
    assert build(spec, batch_dims=0).in_keys == ["observation", *previous]
    encoder = build(spec, batch_dims=0, observation_keys=["other"], features=FEATURES)
    assert encoder.in_keys == ["other", *previous]
    seen = spec.rand([5])
    joined = torch.cat([seen[key].float() for key in encoder.in_keys], -1)
    torch.testing.assert_close(encoder(seen)["features"], joined @ encoder.module.vector.network[0].weight.T)


def test_nested_observations_are_read_as_a_whole_or_in_part() -> None:
    spec = Composite(observation=Composite({"0": Unbounded((2,)), "1": Composite(x=Categorical(3))}))
    whole = [("observation", "0"), ("observation", "1", "x")]
    assert build(spec, batch_dims=0).in_keys == whole
    assert build(spec, batch_dims=0, observation_keys=["observation"]).in_keys == whole
    for key in ("observation.1.x", ("observation", "1", "x"), "observation.1"):
        assert build(spec, batch_dims=0, observation_keys=[key]).in_keys == whole[1:]


def test_build_looks_past_the_batch_dimensions() -> None:
    spec = Composite(observation=Unbounded((7, 5)), pixels=image_spec(7, 48, 40, 3), shape=[7])
    encoder = build(spec, batch_dims=1, observation_keys=["observation"], hidden_sizes=[16])
    assert encoder.module(torch.zeros(7, 5)).shape == (7, 64)
    encoder = build(spec, batch_dims=1)
    assert encoder.module.layout.is_channels_last
    assert encoder.module(byte_images(7, 48, 40, 3)).shape == (7, 64)


def test_build_joins_vectors() -> None:
    spec = Composite(left=Unbounded((2,)), right=Unbounded((3,)))
    encoder = build(spec, batch_dims=0, observation_keys=["right", "left"], features=FEATURES)
    assert encoder.in_keys == ["right", "left"]
    assert encoder.module(torch.zeros(4, 3), torch.zeros(4, 2)).shape == (4, FEATURES)


MANY = Composite(
    camera=image_spec(36, 36, 3),
    map=image_spec(5, 5, 2),
    speed=Unbounded((2,)),
    gear=Categorical(5),
    mode=MultiCategorical([2, 3]),
)


def test_each_observation_is_described() -> None:
    spec = MANY.clone().set("small", image_spec(28, 28)).set("view", image_spec(84, 84, 3)).set("flag", Binary(1))
    assert build(spec.expand(5), batch_dims=1).describe() == (
        "camera [36, 36, 3] as a picture (small convolutions); map [5, 5, 2] as a grid of object numbers; "
        "speed [2] as numbers; gear [] as categories; mode [2] as categories; "
        "small [28, 28] as a picture (small convolutions); view [84, 84, 3] as a picture (nature convolutions); "
        "flag [1] as numbers"
    )
    nested = Composite(robot=Composite(arm=Unbounded((2,)), leg=Unbounded((3,))))
    assert build(nested, batch_dims=0).describe() == "robot.arm [2] as numbers; robot.leg [3] as numbers"


GRIDS = Composite(
    sight=image_spec(7, 7, 3), icon=image_spec(16, 16, 3), thumb=image_spec(12, 12), wide=image_spec(30, 30, 3)
)


@pytest.mark.parametrize(
    ("grids", "kinds"),
    [
        (None, ("grid", "grid", "numbers", "picture")),
        ([], ("numbers", "picture", "picture", "picture")),
        (["sight", "thumb", "wide"], ("grid", "picture", "grid", "grid")),
    ],
    ids=["by size", "none", "by name"],
)
def test_which_bytes_are_grids(grids: list[str] | None, kinds: tuple[str, ...]) -> None:
    """MiniGrid's grids and pictures have the same type and bounds: the size decides, or the option."""
    encoder = build(GRIDS, batch_dims=0, features=FEATURES, grids=grids)
    assert [text.split(" as ")[1].split(" (")[0] for text in encoder.descriptions] == [
        {"grid": "a grid of object numbers", "picture": "a picture"}.get(kind, kind) for kind in kinds
    ]
    classes = {"grid": GridEncoder, "picture": PixelEncoder, "numbers": ScaledVector}
    assert [type(reader) for reader in encoder.module.readers] == [classes[kind] for kind in kinds]
    assert encoder(GRIDS.rand([3]))["features"].shape == (3, FEATURES)


def test_grids_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="grids: 'speed' is no grid of integers from 0 to 255: leave it out"):
        build(MANY, batch_dims=0, grids=["speed"])
    with pytest.raises(ValueError, match=r"no observation \['mapp'\] in the environment; it has: camera, map, speed"):
        build(MANY, batch_dims=0, grids=["mapp"])


def test_parts_are_added() -> None:
    encoder = build(MANY, batch_dims=0, features=FEATURES, convolutions="nature")
    assert isinstance(encoder.module, MixedEncoder)
    seen = MANY.rand([2, 3])
    camera, grid, speed, gear, mode = encoder.module.readers
    vector = encoder.module.vector(speed(seen["speed"]), gear(seen["gear"]), mode(seen["mode"]))
    expected = camera(seen["camera"]) + grid(seen["map"]) + vector
    torch.testing.assert_close(encoder(seen)["features"], expected)


@pytest.mark.parametrize("discrete", ["one_hot", "embedding"])
def test_copies_pickles_and_maps(discrete: str) -> None:
    encoders = [
        build(MANY, batch_dims=0, features=FEATURES, convolutions="nature", discrete=discrete).module for _ in range(2)
    ]
    seen = [MANY.rand([4])[key] for key in MANY.keys()]
    expected = [encoder(*seen) for encoder in encoders]
    for other in (copy.deepcopy(encoders[0]), pickle.loads(pickle.dumps(encoders[0]))):
        assert torch.equal(other(*seen), expected[0])
    parameters, buffers = stack_module_state(encoders)
    out = vmap(lambda p, b: functional_call(encoders[0], (p, b), tuple(seen)))(parameters, buffers)
    torch.testing.assert_close(out, torch.stack(expected))


def test_trains_under_the_loss() -> None:
    """Every parameter of an encoder of many kinds gets a gradient."""
    encoder = build(MANY, batch_dims=0, features=FEATURES, convolutions="nature", discrete="embedding")
    agent = PPOAgent(encoder, Backbone(build_gru(FEATURES, hidden_size=8)), Categorical(3))
    batch = MANY.rand([2, 4])
    flag = torch.zeros(2, 4, 1, dtype=torch.bool)
    batch.update(TensorDict({"is_init": flag, "memory_state": {"hidden": torch.zeros(2, 4, 1, 8)}}, [2, 4]))
    batch.update({"action": torch.randint(3, (2, 4)), "action_log_prob": torch.full((2, 4), -1.1)})
    batch.update({"advantage": torch.randn(2, 4, 1), "value_target": torch.randn(2, 4, 1)})
    batch.update({"state_value": torch.zeros(2, 4, 1)})
    losses = RecurrentClipPPOLoss(agent)(batch)
    (losses["loss_objective"] + losses["loss_critic"]).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_missing_observations_are_named_with_those_that_exist() -> None:
    spec = Composite(left=Unbounded((2,)), right=Composite(eye=Unbounded((3,))), success=Binary(1))
    with pytest.raises(ValueError, match=r"no observation \['middle'\] in the environment; it has: left, right\.eye"):
        build(spec, batch_dims=0, observation_keys=["left", "middle"])
    with pytest.raises(ValueError, match=r"no observation to read in the environment; it has: \(none\)"):
        build(Composite(success=Binary(1)), batch_dims=0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Composite(observation=NonTensor(())), "'observation': it is text or another thing that is no tensor\\.$"),
        (Composite(image=image_spec(7, 7, 3), mission=NonTensor(())), "'mission': it is text .* from: image\\.$"),
        (Composite(observation=Categorical(-1)), r"'observation': it is torch.int64 \[\] \(Categorical\)\.$"),
    ],
    ids=["text", "mission", "endless"],
)
def test_what_cannot_be_read_is_named(spec: Composite, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(spec, batch_dims=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convolutions": "natur"}, "unknown convolutions 'natur': did you mean 'nature'"),
        ({"discrete": "onehot"}, "unknown discrete 'onehot': did you mean 'one_hot'"),
    ],
)
def test_unknown_choices(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Composite(observation=Unbounded((3,))), batch_dims=0, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda() -> None:
    encoder = build(MANY, batch_dims=0, features=FEATURES)
    seen = MANY.rand([4])
    expected = encoder(seen.clone())["features"]
    assert torch.allclose(encoder.cuda()(seen.cuda())["features"].cpu(), expected, atol=1e-3)


def test_autocast_computes_in_reduced_precision_and_returns_float32() -> None:
    spec = Composite(pixels=Bounded(0, 255, (3, 64, 64, 3), dtype=torch.uint8), shape=(3,))
    encoders = []
    for autocast in (None, "bfloat16"):
        torch.manual_seed(0)
        encoders.append(build(spec, batch_dims=1, features=16, convolutions="nature", autocast=autocast))
    whole, reduced = encoders
    shown = spec.rand()
    seen: list[torch.dtype] = []
    for module in reduced.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    expected, features = whole(shown.clone())["features"], reduced(shown.clone())["features"]
    assert set(seen) == {torch.bfloat16}
    assert features.dtype is torch.float32
    error = (features - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.05
    features.square().sum().backward()
    assert {parameter.grad.dtype for parameter in reduced.parameters()} == {torch.float32}


def test_an_unknown_autocast_is_refused() -> None:
    spec = Composite(observation=Unbounded((3, 4)), shape=(3,))
    with pytest.raises(ValueError, match="unknown autocast 'half'; known: bfloat16, float16, or null"):
        build(spec, batch_dims=1, autocast="half")


@pytest.mark.parametrize(
    ("features", "dtype", "device", "expected"),
    [
        ({"avx512_bf16": True, "amx_fp16": False}, "bfloat16", "cpu", False),
        ({"avx512_bf16": True, "amx_fp16": False}, "float16", "cpu", True),
        ({"avx512_bf16": False, "avx2": True, "f16c": True}, "bfloat16", "cpu", True),
        ({"avx512_bf16": False, "avx2": True}, "bfloat16", "cuda", False),
        ({}, None, "cpu", False),
    ],
)
def test_reduced_precision_without_instructions_is_emulated(features, dtype, device, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert is_emulated(dtype, torch.device(device)) is expected

"""Encoders: vectors and images."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, Unbounded

from cyborg_torchrl.modules import PixelEncoder, VectorEncoder, build_encoder

FEATURES = 8


def image_spec(*shape: int, dtype: torch.dtype = torch.uint8) -> Bounded:
    return Bounded(0, 255 if dtype == torch.uint8 else 1, shape, dtype=dtype)


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


@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (2, 1, 3)])
def test_pixels_keep_their_leading_dimensions(leading: tuple[int, ...]) -> None:
    encoder = PixelEncoder((3, 36, 40), FEATURES)
    images = torch.randint(256, (*leading, 3, 36, 40), dtype=torch.uint8)
    out = encoder(images)
    assert out.shape == (*leading, FEATURES)
    flat = encoder(images.reshape(-1, 3, 36, 40))
    torch.testing.assert_close(out.reshape(-1, FEATURES), flat)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_first_and_last_are_the_same(channels: int) -> None:
    first, last = PixelEncoder((channels, 40, 36), FEATURES), PixelEncoder((40, 36, channels), FEATURES)
    last.load_state_dict(first.state_dict())
    images = torch.rand(2, 3, channels, 40, 36)
    torch.testing.assert_close(last(images.movedim(-3, -1)), first(images))


def test_bytes_are_scaled_to_one_and_floats_are_not() -> None:
    encoder = PixelEncoder((3, 36, 36), FEATURES)
    images = torch.randint(256, (2, 3, 36, 36), dtype=torch.uint8)
    torch.testing.assert_close(encoder(images), encoder(images.float() / 255))
    assert encoder.double()(images).dtype == torch.float64


def test_pixel_encoder_by_hand() -> None:
    encoder = PixelEncoder((3, 44, 44), FEATURES)
    x = torch.rand(2, 3, 44, 44)
    expected = x
    convolutions = [layer for layer in encoder.convolutions if isinstance(layer, nn.Conv2d)]
    for layer, stride in zip(convolutions, (4, 2, 1), strict=True):
        expected = nn.functional.relu(nn.functional.conv2d(expected, layer.weight, layer.bias, stride))
    torch.testing.assert_close(encoder(x), expected.flatten(1) @ encoder.project.weight.T)


@pytest.mark.parametrize("shape", [(3, 35, 64), (64, 35, 3)])
def test_small_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 36 x 36 pixels; got"):
        PixelEncoder(shape, FEATURES)


@pytest.mark.parametrize("shape", [(64, 64), (2, 3, 64, 64)])
def test_images_have_three_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="three dimensions"):
        PixelEncoder(shape, FEATURES)


def test_build_reads_observation_or_pixels() -> None:
    vector = Composite(observation=Unbounded((5,)), other=Unbounded((2,)))
    encoder = build_encoder(vector, batch_dims=0, features=FEATURES)
    assert (encoder.in_keys, encoder.out_keys) == (["observation"], ["features"])
    assert isinstance(encoder.module, VectorEncoder)
    both = Composite(observation=Unbounded((5,)), pixels=image_spec(3, 64, 64))
    encoder = build_encoder(both, batch_dims=0)
    assert encoder.in_keys == ["pixels"]
    assert encoder.module(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 64)


def test_build_looks_past_the_batch_dimensions() -> None:
    spec = Composite(observation=Unbounded((7, 5)), pixels=image_spec(7, 48, 40, 3), shape=[7])
    encoder = build_encoder(spec, batch_dims=1, observation_keys=["observation"], hidden_sizes=[16])
    assert encoder.module(torch.zeros(7, 5)).shape == (7, 64)
    encoder = build_encoder(spec, batch_dims=1)
    assert encoder.module.is_channels_last
    assert encoder.module(torch.zeros(7, 48, 40, 3, dtype=torch.uint8)).shape == (7, 64)


def test_an_image_may_be_the_observation() -> None:
    spec = Composite(observation=image_spec(3, 64, 64, dtype=torch.float32))
    assert isinstance(build_encoder(spec, batch_dims=0).module, PixelEncoder)


def test_build_joins_vectors() -> None:
    spec = Composite(left=Unbounded((2,)), right=Unbounded((3,)))
    encoder = build_encoder(spec, batch_dims=0, observation_keys=["right", "left"], features=FEATURES)
    assert encoder.in_keys == ["right", "left"]
    assert encoder.module(torch.zeros(4, 3), torch.zeros(4, 2)).shape == (4, FEATURES)


def test_missing_observations_are_named_with_those_that_exist() -> None:
    spec = Composite(left=Unbounded((2,)), right=Unbounded((3,)))
    with pytest.raises(ValueError, match=r"no observation to read in the environment; it has: left, right"):
        build_encoder(spec, batch_dims=0)
    with pytest.raises(ValueError, match=r"no observation \['middle'\] in the environment; it has: left, right"):
        build_encoder(spec, batch_dims=0, observation_keys=["left", "middle"])


@pytest.mark.parametrize(
    "spec",
    [
        Composite(observation=Categorical(3)),
        Composite(observation=Unbounded((4,), dtype=torch.int64)),
        Composite(observation=Unbounded((4, 4))),
        Composite(observation=Unbounded(())),
    ],
    ids=["category", "integers", "matrix", "scalar"],
)
def test_other_observations_are_refused(spec: Composite) -> None:
    with pytest.raises(ValueError, match="encoders read float vectors, or one image; got observation: torch"):
        build_encoder(spec, batch_dims=0)

"""Pictures: every pixel where it is documented to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyflocality import pictures

CAPTION = pictures.CAPTION_HEIGHT


def byte_images(n, channels=1, height=3, width=4):
    """Distinct 8-bit images and their values in [-1, 1]."""
    generator = torch.Generator().manual_seed(n)
    stored = torch.randint(0, 256, (n, channels, height, width), generator=generator)
    return stored.to(torch.uint8), (stored.double() / 127.5 - 1).float()


def test_bytes_are_the_inverse_of_the_8_bit_convention():
    stored = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(pictures.to_bytes(stored.to(dtype) / 127.5 - 1), stored)


def test_values_outside_are_clipped_for_display_only():
    values = torch.tensor([-80.0, -1.0, 0.0, 1.0, 3.0])
    before = values.clone()
    assert pictures.to_bytes(values).tolist() == [0, 0, 128, 255, 255]
    assert torch.equal(values, before)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pad", [0, 2])
def test_grid_places_every_pixel(channels, pad):
    stored, values = byte_images(5, channels)
    scale, columns, (height, width) = 2, 3, (3, 4)
    picture = pictures.image_grid(values, columns, pad, scale)
    assert picture.mode == ("L" if channels == 1 else "RGB")
    pixels = np.asarray(picture).reshape(picture.height, picture.width, channels)
    assert pixels.shape[:2] == (pad + 2 * (6 + pad), pad + 3 * (8 + pad))
    seen = np.zeros(pixels.shape[:2], bool)
    for index in range(5):
        top = pad + index // columns * (scale * height + pad)
        left = pad + index % columns * (scale * width + pad)
        expected = stored[index].permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
        part = (slice(top, top + scale * height), slice(left, left + scale * width))
        assert (pixels[part] == expected).all()
        seen[part] = True
    # What is not image is paper, the place of the missing sixth image included.
    assert (pixels[~seen] == 255).all()


def test_default_scale_and_columns():
    assert pictures.default_scale(8, 8) == 8
    assert pictures.default_scale(32, 24) == 2
    assert pictures.default_scale(500, 20) == 1
    # Nine images of 8x8: two rows, eight columns, 64 pixels each, 2 around.
    assert pictures.image_grid(torch.zeros(9, 1, 8, 8)).size == (2 + 8 * 66, 2 + 2 * 66)


def test_other_channel_numbers_are_drawn_side_by_side():
    stored, values = byte_images(1, channels=2)
    picture = pictures.image_grid(values, pad=0, scale=1)
    assert picture.mode == "L"
    assert (np.asarray(picture) == torch.cat([*stored[0]], 1).numpy()).all()


def test_captioned_rows_leave_room_for_text_and_hold_the_grids():
    _, first = byte_images(2)
    _, second = byte_images(3)
    picture = pictures.captioned_rows([("first", first), ("second", second)], pad=1, scale=2)
    pixels = np.asarray(picture)
    grids = [np.asarray(pictures.image_grid(row, len(row), 1, 2)) for row in (first, second)]
    height = len(grids[0])
    assert pixels.shape == (2 * (CAPTION + height), grids[1].shape[1])
    assert (pixels[CAPTION : CAPTION + height, : grids[0].shape[1]] == grids[0]).all()
    assert (pixels[-height:] == grids[1]).all()
    for top in (0, CAPTION + height):
        assert pixels[top : top + CAPTION].min() < 128, "the caption is not there"


def test_sample_sheet_shows_each_sample_above_its_neighbour():
    stored, values = byte_images(5)
    near_stored, near = byte_images(5, height=3)
    near_stored, near = near_stored.flip(0), near.flip(0)
    pixels = np.asarray(pictures.sample_sheet(values, near, columns=3))
    scale = pictures.default_scale(3, 4)
    row = CAPTION + 2 + 3 * scale + 2
    for index in range(5):
        left = 2 + index % 3 * (4 * scale + 2)
        for offset, expected in ((0, stored), (1, near_stored)):
            top = (2 * (index // 3) + offset) * row + CAPTION + 2
            found = pixels[top : top + 3 * scale : scale, left : left + 4 * scale : scale]
            assert (found == expected[index, 0].numpy()).all()


def test_sample_sheet_without_neighbours_is_a_grid():
    _, values = byte_images(3)
    assert pictures.sample_sheet(values) == pictures.image_grid(values, 3)


def test_trajectory_shows_first_samples_and_first_and_last_step():
    steps, samples = 23, 4
    x_t = torch.linspace(-1, 1, steps * samples).reshape(steps, samples, 1, 1, 1)
    x_t = x_t.expand(steps, samples, 1, 2, 2)
    x0 = -x_t
    times = torch.arange(steps - 1, -1, -1)
    pixels = np.asarray(pictures.trajectory_strip(x_t, x0, times, samples=2, columns=5))
    scale = pictures.default_scale(2, 2)
    row = CAPTION + 4 + 2 * scale
    assert pixels.shape == (4 * row, 2 + 5 * (2 * scale + 2))
    for sample in range(2):
        for offset, images in ((0, x_t), (1, x0)):
            y = (2 * sample + offset) * row + CAPTION + 2
            assert pixels[y, 2] == pictures.to_bytes(images[0, sample, 0, 0, 0])
            assert pixels[y, -3] == pictures.to_bytes(images[-1, sample, 0, 0, 0])


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((torch.zeros(1, 8, 8),), ValueError, "`images`"),
        ((torch.zeros(0, 1, 8, 8),), ValueError, "`images`"),
        ((torch.zeros(2, 1, 8, 8, dtype=torch.uint8),), TypeError, "`images`"),
        ((np.zeros((2, 1, 8, 8)),), TypeError, "`images`"),
        ((torch.full((1, 1, 2, 2), torch.nan),), ValueError, "`images`"),
        ((torch.zeros(2, 1, 8, 8), 0), ValueError, "`columns`"),
        ((torch.zeros(2, 1, 8, 8), 1, -1), ValueError, "`pad`"),
        ((torch.zeros(2, 1, 8, 8), 1, 1, 1.5), TypeError, "`scale`"),
    ],
)
def test_grid_refuses_wrong_arguments(arguments, error, name):
    with pytest.raises(error, match=name):
        pictures.image_grid(*arguments)


def test_other_pictures_refuse_wrong_arguments():
    images = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="`rows`"):
        pictures.captioned_rows([])
    with pytest.raises(ValueError, match="`nearest`"):
        pictures.sample_sheet(images, images[:1])
    with pytest.raises(ValueError, match="`timesteps`"):
        pictures.trajectory_strip(images[None], images[None], torch.arange(2))


def test_times_of_a_trajectory_are_finite():
    images = torch.zeros(2, 1, 1, 2, 2)
    with pytest.raises(ValueError, match="`timesteps` holds NaN or infinite values"):
        pictures.trajectory_strip(images, images, torch.tensor([1.0, float("inf")]))

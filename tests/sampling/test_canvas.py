"""Masks and margins as a user gives them, and how a drawn part is laid into a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ecar.sampling.canvas import Canvas, Enlarged, Mask, continued

SIDE = (8, 12)
GREY = Image.new("RGB", (12, 8), (90, 90, 90))


def corner(size: tuple[int, int] = (12, 8)) -> np.ndarray:
    drawn = np.zeros(size[::-1], dtype=bool)
    drawn[:3, :4] = True
    return drawn


def test_white_transparent_array_and_box_mean_the_same(tmp_path: Path) -> None:
    white = Image.fromarray(corner().astype(np.uint8) * 255)
    see_through = GREY.convert("RGBA")
    see_through.putalpha(Image.fromarray(255 - corner().astype(np.uint8) * 255))
    white.save(tmp_path / "mask.png")
    opaque = white.convert("RGBA")  # as many programs write black and white
    turned = white.transpose(Image.Transpose.ROTATE_180)
    turned.getexif()[0x0112] = 3
    masks: list[Mask] = [
        white, white.convert("1"), white.convert("P"), see_through, opaque, turned, tmp_path / "mask.png",
        str(tmp_path / "mask.png"), corner(), corner().astype(np.uint8) * 255, (0, 0, 4, 3), [0, 0, 4, 3],
    ]  # fmt: skip
    for mask in masks:
        assert (Canvas.of(GREY, SIDE, mask).drawn == corner()).all(), mask


def test_mask_and_picture_are_scaled_and_cropped_together() -> None:
    """A picture twice as large and too wide: its centre is taken; one pixel of the mask is enough."""
    drawn = np.zeros((16, 40), dtype=bool)
    drawn[0, 8] = True
    canvas = Canvas.of(Image.new("RGB", (40, 16)), SIDE, drawn)
    assert canvas.pixels.shape == (8, 12, 3) and np.argwhere(canvas.drawn).tolist() == [[0, 0]]
    drawn[0, 8], drawn[0, 2] = False, True
    with pytest.raises(ValueError, match="outside the centre of the picture, of which the model sees 12x8"):
        Canvas.of(Image.new("RGB", (40, 16)), SIDE, drawn)


def test_masks_that_cannot_be_used_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for mask, words in (
        (corner((8, 12)), "the mask is 8x12 pixels and the picture 12x8"),
        (Image.new("L", (24, 16), 255), "24x16"),
        (Image.new("L", (12, 8), 0), "the mask is empty"),
        ((0, 0, 13, 2), "box 0,0,13,2 does not lie in the picture of 12x8"),
        ((-1, 0, 3, 2), "does not lie"),
        ((0, 0, 0, 2), "does not lie"),
        ((1, 2, 3), "four numbers"),
        (tmp_path / "text.png", "the mask cannot be read"),
        (tmp_path / "missing.png", "the mask cannot be read"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            Canvas.of(GREY, SIDE, mask)
        assert "\n" not in str(caught.value)


def test_picture_and_margins_fill_the_canvas() -> None:
    white = Image.new("RGB", (6, 8), "white")
    canvas = Canvas.with_margins(white, SIDE, (2, 0, 4, 0), 1)
    assert (~canvas.drawn[:, 2:8]).all() and canvas.drawn[:, :2].all() and canvas.drawn[:, 8:].all()
    assert (canvas.pixels[~canvas.drawn] == 255).all()
    square = Canvas.with_margins(
        Image.new("RGB", (100, 100)), (32, 32), (0, 0, 100, 0), 1
    )  # half as large: above, below
    assert (~square.drawn[8:24, :16]).all() and (~square.drawn).sum() == 16 * 16
    for margins, words in (
        ((0, 0, 0, 0), "not all 0"),
        ((0, -1, 2, 0), "0 or more"),
        ((1, 2, 3), "4 numbers"),
        ((0, 400, 0, 400), "too small"),
    ):
        with pytest.raises(ValueError, match=words):
            Canvas.with_margins(white, SIDE, margins, 2)


def test_what_is_known_stays_exactly_and_goes_on_as_a_smooth_surface() -> None:
    """Of whatever size, also where halves are odd; what was at unknown places has no part in it."""
    for height, width in ((1, 5), (7, 12), (33, 50)):
        values = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
        known = torch.arange(width).expand(height, -1) % width < 2
        surface = continued(values, known)
        assert torch.equal(surface[..., known], values[..., known])
        assert torch.equal(surface, continued(torch.where(known, values, 9.0), known))
        assert surface.min() >= values[..., known].min() and surface.max() <= values[..., known].max()
    assert torch.equal(continued(values, torch.ones(33, 50, dtype=torch.bool)), values)
    both = torch.tensor([[True, False, True]])
    assert continued(torch.tensor([[[[2.0, 9.0, 4.0]]]]), both)[0].flatten().tolist() == pytest.approx([2, 3, 4])


def test_a_surface_between_two_edges_is_near_the_slope_of_a_membrane() -> None:
    """Laplace's equation between 0 and 1 has a straight line as its solution."""
    known = torch.zeros(64, 64, dtype=torch.bool)
    known[:, :16] = known[:, 48:] = True
    values = (torch.arange(64) >= 32).float().expand(1, 1, 64, 64)
    line = ((torch.arange(64) - 15) / 33).clamp(0, 1)
    assert (continued(values, known)[0, 0] - line).abs().max() < 0.1


def test_a_drawn_part_takes_over_the_difference_outside() -> None:
    canvas = Canvas(np.full((8, 12, 3), 100, np.uint8), np.arange(12)[None].repeat(8, 0) >= 4)
    image = np.full((1, 8, 12, 3), 160, np.uint8)
    image[:, 2:4, 6:8] = 220
    laid = canvas.composite(image)
    assert (laid[:, 2:4, 6:8] == 160).all() and (laid == 100).sum() == 3 * (8 * 12 - 4)


def test_what_the_mask_hides_has_no_part_in_the_result() -> None:
    draws = np.random.default_rng(0)
    pixels, image = (draws.integers(0, 256, (8, 12, 3), dtype=np.uint8) for _ in range(2))
    other = pixels.copy()
    other[:3, :4] = 0
    results = [Canvas(some, corner()).composite(image[None]) for some in (pixels, other)]
    assert (results[0] == results[1]).all() and (results[0][0][~corner()] == pixels[~corner()]).all()
    everything = Canvas(pixels, np.ones(SIDE, dtype=bool))
    assert (everything.composite(image[None])[0] == image).all()


@pytest.mark.parametrize("factor", [2, 4])
def test_an_enlarged_picture_keeps_the_mean_of_every_square(factor: int) -> None:
    """Also where nothing but black and white is given, and whatever is drawn."""
    draws = np.random.default_rng(0)
    for pixels in (draws.integers(0, 256, (4, 6, 3)), 255 * draws.integers(0, 2, (4, 6, 3)), np.full((4, 6, 3), 254)):
        enlarged = Enlarged(pixels.astype(np.uint8), factor)
        drawn = draws.integers(0, 256, (3, 4 * factor, 6 * factor, 3), dtype=np.uint8)
        for result in (enlarged.composite(drawn), enlarged.plain()[None]):
            assert result.shape[1:] == drawn.shape[1:]
            means = result.reshape(-1, 4, factor, 6, factor, 3).astype(float).mean((2, 4))
            assert np.abs(means - pixels).max() <= 0.5 + 1e-3
    flat = Enlarged(np.full((4, 6, 3), 77, np.uint8), factor)
    assert (flat.plain() == 77).all() and flat.composite(drawn)[0].std() > 20  # details are what was drawn

"""Editing by closed forms: what is known stays, what is drawn is as if nothing were known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import begins, random_dit, random_model, tiny_config
from ecar.baselines.dit import DiT
from ecar.config import SamplingConfig, StageConfig
from ecar.sampling import loop
from ecar.sampling.edit import Edit, begin_maps, enlarging
from ecar.sampling.known import Known
from ecar.sampling.loop import Rows, advance, sample_latents
from ecar.sampling.noise import StageNoise, draw_noise
from ecar.sampling.pipeline import Pipeline
from ecar.stages import make_plan, noises, pyramid
from ecar.tokenizers import PixelTokenizer

SOLVERS = ("euler", "heun", "ab2")
PLAN = make_plan(tiny_config().stages)
SIDE = PLAN[-1].side
LATENT = torch.randn(1, 3, *SIDE, generator=torch.Generator().manual_seed(5))


def settings(solver: str = "euler", **changes: object) -> SamplingConfig:
    values: dict[str, object] = {"steps": (3, 4, 4), "guidance": (1.0, 1.0, 1.0), "solver": solver}
    return SamplingConfig(**{**values, **changes})  # type: ignore[arg-type]


def an_edit(drawn: np.ndarray, strength: float = 1.0) -> Edit:
    return Edit(PLAN, LATENT, tuple(torch.from_numpy(m).float()[None, None] for m in begin_maps(PLAN, drawn, strength)))


def left_half() -> np.ndarray:
    drawn = np.zeros(SIDE, dtype=bool)
    drawn[:, : SIDE[1] // 2] = True
    return drawn


def sampled(edit: Edit | None, seeds: list[int], config: SamplingConfig, labels: list[int] | None = None) -> Tensor:
    model, noise = random_model(tiny_config()), draw_noise(seeds, PLAN, 3)
    known = () if edit is None else edit.known(noise)
    return sample_latents(model, torch.tensor(labels or [1] * len(seeds)), noise, config, known=known)


def test_strength_orders_all_stages_on_one_axis_by_the_data_that_they_add() -> None:
    assert begins(PLAN, 1.0) == (0.0, 0.0, 0.0)
    lengths = [stage.end - stage.start for stage in PLAN]
    assert begins(PLAN, lengths[2] / sum(lengths)) == (1.0, 1.0, 0.0)
    assert begins(PLAN, (lengths[2] + lengths[1] / 4) / sum(lengths)) == pytest.approx((1.0, 0.75, 0.0))
    assert begins(PLAN, 1e-3)[:2] == (1.0, 1.0) and 0.99 < begins(PLAN, 1e-3)[2] < 1
    assert begins(make_plan(StageConfig(sides=((4, 4),), ends=(1.0,))), 0.3) == pytest.approx((0.7,))


def test_a_position_is_drawn_by_the_share_of_its_pixels() -> None:
    """As much as the whole picture is at that part of the strength; without any pixel, not at all."""
    drawn = np.zeros((2 * SIDE[0], 2 * SIDE[1]), dtype=bool)
    drawn[4:6, 8:9] = True  # half of a position of the last stage, an eighth of one before, a 32nd of the first
    for strength in (1.0, 0.3):
        maps = begin_maps(PLAN, drawn, strength)
        assert [m.shape for m in maps] == [stage.side for stage in PLAN]
        places = zip(range(3), maps, ((0, 1), (1, 2), (2, 4)), (1 / 32, 1 / 8, 1 / 2), strict=True)
        for stage, times, place, share in places:
            assert times[place] == pytest.approx(begins(PLAN, strength * share)[stage])
            assert (np.delete(times.flatten(), np.ravel_multi_index(place, times.shape)) == 1).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_a_position_to_draw_the_latent_comes_back(solver: str) -> None:
    nowhere = an_edit(np.zeros(SIDE, dtype=bool))
    assert torch.equal(sampled(nowhere, [1, 2], settings(solver)), LATENT.expand(2, -1, -1, -1))


@pytest.mark.parametrize("solver", SOLVERS)
def test_everything_drawn_at_strength_one_is_plain_generation_bit_for_bit(solver: str) -> None:
    everywhere, config = an_edit(np.ones(SIDE, dtype=bool)), settings(solver, guidance=(2.0, 1.0, 1.0))
    assert torch.equal(sampled(everywhere, [1, 2], config), sampled(None, [1, 2], config))


@pytest.mark.parametrize("solver", SOLVERS)
def test_known_positions_stay_and_the_others_are_drawn(solver: str) -> None:
    result, drawn = sampled(an_edit(left_half()), [1, 2], settings(solver)), torch.from_numpy(left_half())
    assert torch.equal(result[..., ~drawn], LATENT[..., ~drawn].expand(2, -1, -1))
    assert (result[..., drawn] != LATENT[..., drawn]).all() and (result[0] != result[1])[..., drawn].all()


def test_known_paths_have_the_noise_of_the_seed() -> None:
    """With it, the jump from a known map is the known start of the next stage (Eq. 5 = Eq. 2)."""
    noise = draw_noise([7], PLAN, 3)
    known = an_edit(left_half()).known(noise)
    own, maps = noises(PLAN, [n.fresh for n in noise]), pyramid(LATENT, 3)
    for before, stage, here, n, z in zip([None, *known], PLAN, known, own, maps, strict=False):
        assert torch.allclose(here.end, stage.end * z + (1 - stage.end) * n)
        if before is not None:
            jumped = loop.jump(stage, before.end, noise[stage.index].fresh)
            assert torch.allclose(jumped, here.start, atol=1e-6)
    assert torch.equal(known[2].end, LATENT)


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_of_edits_and_of_plain_generation_share_a_batch_and_stay_what_they_are_alone(solver: str) -> None:
    """As a server joins them: other masks and strengths, and rows of no edit, some of which begin later than others."""
    model, config = random_model(tiny_config()), settings(solver, guidance=(1.5, 1.0, 1.0))
    everything = np.ones(SIDE, dtype=bool)
    corner = np.zeros((2 * SIDE[0], 2 * SIDE[1]), dtype=bool)
    corner[:5, :7] = True  # positions of which a part is drawn
    edits = [an_edit(left_half()), None, an_edit(everything, 0.2), an_edit(left_half(), 0.7), an_edit(everything, 0.03)]
    edits.append(an_edit(corner))
    noise = [draw_noise([seed], PLAN, 3) for seed in range(len(edits))]
    known = [None if edit is None else edit.known(own) for edit, own in zip(edits, noise, strict=True)]
    rows = Rows.start(model, torch.tensor([0, 1, 2, 0, 1, 2]), config)
    for stage in PLAN:
        k = stage.index
        draws = [own[k] for own in noise]
        contexts = [d.context for d in draws if d.context is not None]
        together = StageNoise(torch.cat([d.fresh for d in draws]), torch.cat(contexts) if contexts else None)
        parts = Known.join([None if own is None else own[k] for own in known], [d.fresh for d in draws])
        advance(model, rows, together, config, known=parts)
    assert rows.y is not None
    for row, edit in enumerate(edits):
        alone = sampled(edit, [row], config, [[0, 1, 2, 0, 1, 2][row]])
        assert torch.allclose(alone[0], rows.y[row], atol=1e-5), row
    assert Known.join([None, None], [noise[0][0].fresh] * 2) is None


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_distance_from_the_picture_grows_with_strength(solver: str) -> None:
    everything, seeds = np.ones(SIDE, dtype=bool), list(range(6))
    config = settings(solver, steps=(6, 6, 6))
    far = [
        float((sampled(an_edit(everything, s), seeds, config) - LATENT).square().mean())
        for s in (1e-9, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)
    ]
    assert far[0] < 1e-12 and all(a < b for a, b in pairwise(far)), far


def test_a_small_change_of_strength_is_a_small_change_of_the_picture() -> None:
    """Also where it crosses a step of the solver, or a stage."""
    everything, lengths = np.ones(SIDE, dtype=bool), [stage.end - stage.start for stage in PLAN]
    edge = lengths[2] / sum(lengths)  # where the last stage begins
    for strength in (edge, edge / 4):  # and where a step of four does
        below, above = (sampled(an_edit(everything, strength + d), [3], settings()) for d in (-1e-4, 1e-4))
        assert (below - above).abs().max() < 0.01


def test_what_is_known_costs_no_pass_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped stages cost a pass of the trunk each, and small strengths only the last steps."""
    times: list[tuple[int, float]] = []

    def watched(model: object, rows: object, draws: object, config: object, **more: object) -> object:
        return advance(model, rows, draws, config, on_velocity=lambda s, _x, t, _v: times.append((s.index, t)), **more)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "advance", watched)
    everything = np.ones(SIDE, dtype=bool)
    sampled(an_edit(everything, 0.05), [1], settings("euler"))
    assert times == [(2, 0.75)]
    times.clear()
    sampled(an_edit(everything, 0.05), [1], settings("ab2"))
    assert times == [(2, 0.5), (2, 0.75)]  # it looks one step back


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1))


@pytest.fixture(scope="module")
def cifar10() -> Pipeline:
    return Pipeline.from_pretrained("cifar10", device="cpu")


class TestPipeline:
    """Pictures in, pictures out."""

    @staticmethod
    def picture(width: int, height: int, seed: int = 0) -> Image.Image:
        """Blobs of colours."""
        small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)

    def test_pixels_outside_the_mask_are_the_inputs_bit_for_bit(self, cifar10: Pipeline) -> None:
        picture, box = self.picture(32, 32), (5, 7, 13, 10)
        out = cifar10.edit(picture, label="dog", mask=box, seeds=[0, 1])
        kept = np.ones((32, 32), dtype=bool)
        kept[7:17, 5:18] = False
        for image in out.images:
            before, after = np.asarray(picture), np.asarray(image)
            assert (before[kept] == after[kept]).all() and (before[~kept] != after[~kept]).any()
        assert np.asarray(out.images[0]).tolist() != np.asarray(out.images[1]).tolist()

    def test_at_strength_one_what_the_mask_hides_has_no_part_in_the_result(self, cifar10: Pipeline) -> None:
        """The encoder would see it through the border, and so would a border that blends into it."""
        picture, box = self.picture(32, 32), (8, 8, 16, 16)
        other = picture.copy()
        other.paste((255, 0, 0), (8, 8, 24, 24))
        results = [cifar10.edit(image, label="cat", mask=box).images[0] for image in (picture, other)]
        assert results[0].tobytes() == results[1].tobytes()

    def test_a_picture_is_the_same_alone_and_among_other_seeds(self, pipe: Pipeline) -> None:
        picture = self.picture(12, 8)
        together = pipe.edit(picture, label="dog", mask=(0, 0, 4, 4), seeds=[3, 4, 5], return_stages=True)
        alone = pipe.edit(picture, label="dog", mask=(0, 0, 4, 4), seeds=[4])
        assert np.abs(np.asarray(alone.images[0], int) - np.asarray(together.images[1], int)).max() <= 1
        assert [len(previews) for previews in together.stages] == [3, 3, 3] and together.labels == [1, 1, 1]

    def test_the_smallest_variation_is_the_reconstruction(self, cifar10: Pipeline) -> None:
        picture = self.picture(32, 32)
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        decoded = cifar10.decoder.decode(cifar10.tokenizer.encode(pixels))[0]
        nearest = cifar10.vary(picture, strength=1e-6, label="frog").images[0]
        there = torch.from_numpy(np.asarray(nearest).copy()).permute(2, 0, 1) / 127.5 - 1
        assert (there - decoded).abs().max() < 0.02

    @pytest.mark.parametrize("factor", [2, 4])
    def test_an_enlarged_picture_made_small_again_is_the_input(self, pipe: Pipeline, factor: int) -> None:
        """To half a grey level, and one of rounding; details are drawn by the seed."""
        picture = self.picture(12 // factor, 8 // factor)
        large = pipe.upscale(picture, factor=factor, label="dog", seeds=[0, 1]).images
        for image in large:
            assert image.size == (12, 8)
            squares = np.asarray(image, float).reshape(8 // factor, factor, 12 // factor, factor, 3).mean((1, 3))
            assert np.abs(squares - np.asarray(picture)).max() <= 0.51
        assert large[0].tobytes() != large[1].tobytes()

    def test_enlarging_is_not_guided_unless_asked_for(self, pipe: Pipeline) -> None:
        picture = self.picture(6, 4)
        plain, guided = pipe.settings(guidance=1.0), pipe.settings(guidance=3.0)
        results = [pipe.upscale(picture, label="dog", settings=s).images[0].tobytes() for s in (None, plain, guided)]
        assert results[0] == results[1] != results[2]

    def test_an_enlargement_begins_in_the_middle_of_the_first_finer_stage(self, pipe: Pipeline) -> None:
        for factor, times in ((2, [1, 1, 0.5]), (4, [1, 0.5, 0])):
            edit = enlarging(pipe.model, pipe.tokenizer, self.picture(12, 8), factor)
            assert [set(begin.flatten().tolist()) for begin in edit.begin] == [{time} for time in times]

    def test_margins_surround_the_picture(self, pipe: Pipeline) -> None:
        out = pipe.expand(self.picture(6, 8), left=3, right=3, label=0)
        assert out.images[0].size == (12, 8)
        assert (np.asarray(out.images[0])[:, 3:9] == np.asarray(self.picture(6, 8))).all()

    def test_any_mode_is_read_as_in_training_and_files_too(self, pipe: Pipeline, tmp_path: object) -> None:
        rgb = self.picture(20, 20)
        for image in (rgb, rgb.convert("L"), rgb.convert("RGBA"), rgb.convert("CMYK"), rgb.convert("P")):
            assert pipe.vary(image, strength=0.1, label=0).images[0].size == (12, 8)
        deep = Image.fromarray(np.asarray(rgb.convert("L"), np.uint16) * 257)
        grey, same = (pipe.vary(i, strength=0.1).images[0] for i in (rgb.convert("L"), deep))
        assert grey.tobytes() == same.tobytes()
        file, turned = f"{tmp_path}/turned.jpg", Image.Exif()
        turned[0x0112] = 3  # upside down
        rgb.save(file, exif=turned, quality=100)
        upright = Image.fromarray(np.asarray(Image.open(file))[::-1, ::-1])
        assert pipe.vary(file, strength=0.1).images == pipe.vary(upright, strength=0.1).images

    def test_wrong_input_is_told_in_one_line(self, pipe: Pipeline) -> None:
        picture, half = self.picture(12, 8), (0, 0, 6, 8)
        for edit, words in (
            (lambda: pipe.edit(picture, mask=half, strength=0.0), "strength must be above 0"),
            (lambda: pipe.edit(picture, mask=half, strength=1.5), "at most 1"),
            (lambda: pipe.edit(picture), "a strength below 1"),
            (lambda: pipe.edit(picture, mask=np.ones((8, 12), bool)), "a strength below 1"),
            (lambda: pipe.edit(picture, mask=half, label="dgo"), "did you mean dog"),
            (lambda: pipe.edit(picture, mask=half, seeds=[]), "no images asked for"),
            (lambda: pipe.upscale(picture, factor=3), "2 or 4 times"),
            (lambda: pipe.upscale(self.picture(5, 8)), "too small: 5x8 pixels"),
            (lambda: pipe.edit("/nowhere/at all.png", mask=half), "cannot be read"),
        ):
            with pytest.raises(ValueError, match=words) as caught:
                edit()
            assert "\n" not in str(caught.value)


def test_dit_of_one_stage_is_edited_too() -> None:
    model = random_dit(4)
    assert isinstance(model, DiT)
    pipe = Pipeline(model, PixelTokenizer(factor=1))
    picture = TestPipeline.picture(4, 4)
    before, after = np.asarray(picture), np.asarray(pipe.edit(picture, label=1, mask=(0, 0, 2, 4)).images[0])
    assert (before[:, 2:] == after[:, 2:]).all() and (before[:, :2] != after[:, :2]).any()
    far = [
        np.abs(np.asarray(pipe.vary(picture, label=1, strength=s).images[0], int) - before).mean() for s in (0.1, 0.9)
    ]
    assert far[0] < far[1]
    assert pipe.upscale(TestPipeline.picture(2, 2), label=1).images[0].size == (4, 4)
    with pytest.raises(ValueError, match="draws 2 stages, and this model has 1"):
        pipe.upscale(picture, factor=4)

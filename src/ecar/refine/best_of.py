"""``BestOf``: several samples are drawn for an image, and a critic says which of them to show."""

from __future__ import annotations

import json
import operator
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ecar.config import SamplingConfig, check_acceptance
from ecar.pretrained.adapters import adapter_fingerprint
from ecar.pretrained.folders import critic_file, resolve_model, weights_fingerprint
from ecar.refine.critic import Critic, accepts, choose, load_critic
from ecar.sampling.classes import Label
from ecar.sampling.noise import candidate_seeds, draw_choices
from ecar.sampling.pictures import from_pil
from ecar.sampling.pipeline import Output, Pipeline, StagePreview

MOST_CANDIDATES = 64
_Draw = Callable[[list[int], list[int]], list[Image.Image]]  # class ids and seeds, one per sample


def critic_of(name: str | Path, file: str | Path | None = None) -> Critic:
    """The critic for a model.

    Args:
        name: bundled name, folder or Hub id.
        file: of ``ecar critic``; default: ``critic.safetensors`` in the model's folder.

    Raises:
        ValueError: there is none, or one of other weights.
    """
    path = critic_file(resolve_model(name)) if file is None else Path(file)
    if path is None:
        raise ValueError(f"{name} has no critic to choose among candidates; `ecar critic` makes one")
    critic = load_critic(path)
    if (of := critic.about.get("weights")) != weights_fingerprint(name):
        raise ValueError(f"{path} was made for the model with weights {of}, not for {name}")
    return critic


def identity(pipe: Pipeline, best: BestOf | None) -> dict[str, object]:
    """What decides the images of a pipeline, or of ``best`` around it, and is not in its configuration; for records."""
    return {
        "weights": weights_fingerprint(pipe.name),
        "adapter": None if pipe.adapter is None else adapter_fingerprint(pipe.adapter),
        "candidates": None if best is None else best.candidates,
        "acceptance": None if best is None else best.acceptance,
        "critic": None if best is None else best.critic.fingerprint,
    }


class BestOf:
    """A ``Pipeline`` that draws several candidates for each image and shows the one that a critic chooses.

    Args:
        pipe: draws the candidates.
        critic: of its model, see ``critic_of``.
        candidates: samples for an image, in 1..64; with ``acceptance`` at most. An image costs so many times as much.
        acceptance: share of all samples that the critic accepts, in (0, 1): candidates are drawn one after the other
            until one is accepted. An image then costs about 1 / acceptance times as much.

    Raises:
        ValueError: numbers out of range, or a model with an adapter, whose samples are not those that the critic
            knows.

    Example:
        >>> best = BestOf(Pipeline.from_pretrained("cifar10"), critic_of("cifar10"), candidates=4)
        >>> best(labels=["frog", "ship"], seeds=[0, 1]).drawn
        [4, 4]
    """

    def __init__(self, pipe: Pipeline, critic: Critic, candidates: int = 4, acceptance: float | None = None) -> None:
        if acceptance is not None:
            check_acceptance(acceptance, candidates)
        if not 1 <= operator.index(candidates) <= MOST_CANDIDATES:
            raise ValueError(f"candidates must be in 1..{MOST_CANDIDATES}, got {candidates}")
        if pipe.adapter is not None:
            raise ValueError(f"the critic knows the samples of {pipe.name}, not those with an adapter: leave one out")
        self.pipe, self.critic = pipe, critic.to(pipe.model.device)
        self.candidates, self.acceptance = candidates, acceptance

    def __call__(
        self,
        labels: Sequence[Label] | None = None,
        *,
        seeds: Sequence[int] | None = None,
        settings: SamplingConfig | None = None,
        steps: Sequence[int] | int | None = None,
        guidance: Sequence[float] | float | None = None,
        batch_size: int = 64,
        return_stages: bool = False,
        on_stage: Callable[[StagePreview], None] | None = None,
        progress: bool = False,
    ) -> Output:
        """Generate one image per label; arguments and errors are those of ``Pipeline``.

        ``batch_size`` counts candidates. Stages are those of the chosen ones, which are drawn once more for them.

        Returns:
            Images of which ``chosen`` is the seed that draws each alone, and ``drawn`` the number of its candidates.

        Warns:
            UserWarning: the critic was made for samples of other settings.
        """
        settings = self.pipe.chosen_settings(settings, steps, guidance)
        ids, seeds = self.pipe.asked(labels, seeds)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._compare(settings)
        images, chosen, drawn = list[Image.Image](), list[int](), list[int]()
        stages: list[list[Image.Image]] = [[] for _ in self.pipe.model.plan] if return_stages else []

        def draw(ids: list[int], seeds: list[int]) -> list[Image.Image]:
            return self.pipe(self._labels(ids), seeds=seeds, settings=settings, batch_size=len(ids)).images

        count = batch_size if self.acceptance is not None else max(1, batch_size // self.candidates)
        firsts = range(0, len(ids), count)
        for first in tqdm(firsts, desc="sampling", unit="batch", disable=None if progress else True):
            own, some = ids[first : first + count], seeds[first : first + count]
            found = self._best(draw, own, some) if self.acceptance is None else self._accepted(draw, own, some)
            images += found[0]
            chosen += found[1]
            drawn += found[2]
            if return_stages or on_stage is not None:
                again = self.pipe(
                    self._labels(own), seeds=found[1], settings=settings, batch_size=count, return_stages=return_stages,
                    on_stage=on_stage,
                )  # fmt: skip
                for whole, part in zip(stages, again.stages, strict=False):
                    whole += part
        return Output(images, stages, ids, seeds, settings, chosen, drawn)

    def _labels(self, ids: list[int]) -> list[int | None]:
        """What the pipeline was asked for: the null class has no id there."""
        return [None if label == self.pipe.model.config.null_class else label for label in ids]

    def _compare(self, settings: SamplingConfig) -> None:
        made, now = self.critic.about.get("settings"), json.loads(json.dumps(settings.to_json()))  # lists, as in a file
        if made != now and self.candidates > 1:
            warnings.warn(f"the critic was made for samples with {made}, not {now}", stacklevel=3)

    def _best(self, draw: _Draw, ids: list[int], seeds: list[int]) -> tuple[list[Image.Image], list[int], list[int]]:
        """Of all candidates of each image the chosen one: images, their seeds, and how many were drawn."""
        count = self.candidates
        each = [candidate_seeds(seed, count) for seed in seeds]
        drawn = draw([label for label in ids for _ in range(count)], [seed for row in each for seed in row])
        picks = picks_of(from_pil(drawn), self.critic, ids, seeds)
        images = [drawn[count * number + pick] for number, pick in enumerate(picks)]
        return images, [row[pick] for row, pick in zip(each, picks, strict=True)], [count] * len(ids)

    def _accepted(
        self, draw: _Draw, ids: list[int], seeds: list[int]
    ) -> tuple[list[Image.Image], list[int], list[int]]:
        """The same of the first candidate that the critic accepts; of so many that were all refused, one is chosen."""
        assert self.acceptance is not None
        most, critic, power, labels = self.candidates, self.critic, float(self.critic.about["power"]), torch.tensor(ids)
        each, uniform = [candidate_seeds(seed, most) for seed in seeds], draw_choices(seeds, 2 * most)
        levels, scores = critic.levels(labels, self.acceptance), torch.full((len(ids), most), -torch.inf)
        kept: list[list[Image.Image]] = [[] for _ in ids]  # of each image: those refused, and at last the one accepted
        left = list(range(len(ids)))
        for number in range(most):
            images = draw([ids[i] for i in left], [each[i][number] for i in left])
            scores[left, number] = critic(from_pil(images), labels[left]).cpu()
            good = accepts(scores[left, number], levels[left], uniform[left, most + number], power).tolist()
            for i, image in zip(left, images, strict=True):
                kept[i].append(image)
            left = [i for i, fine in zip(left, good, strict=True) if not fine]
            if not left:
                break
        picks = [len(images) - 1 for images in kept]
        for i, pick in zip(left, choose(scores[left], uniform[left, :most], power).tolist(), strict=True):
            picks[i] = pick
        best = [images[pick] for images, pick in zip(kept, picks, strict=True)]
        return best, [row[pick] for row, pick in zip(each, picks, strict=True)], [len(images) for images in kept]


def picks_of(drawn: Tensor, critic: Critic, ids: list[int], seeds: list[int]) -> list[int]:
    """Which candidate of each of B images is chosen, from 0.

    Args:
        drawn: candidates (B K, 3, H, W) uint8, those of an image together, in the order of their seeds.
        critic: of the model.
        ids: class of each image.
        seeds: its seed.
    """
    candidates = len(drawn) // len(ids)
    labels = torch.tensor(ids).repeat_interleave(candidates)
    scores = critic(drawn, labels).view(len(ids), candidates)
    return choose(scores, draw_choices(seeds, candidates), float(critic.about["power"])).tolist()

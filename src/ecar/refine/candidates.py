"""Several samples for an image, and the critic's choice among them."""

from __future__ import annotations

import json
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecar.config import SamplingConfig, check_acceptance
from ecar.sampling.noise import candidate_seeds, draw_choices
from ecar.sampling.pictures import from_decoded

if TYPE_CHECKING:
    from ecar.refine import Critic

MOST_CANDIDATES = 64


def critic_of(name: str, file: Path | None) -> Critic:
    """The critic in ``file`` for the model ``name``.

    Raises:
        ValueError: there is none, or one of other weights.
    """
    from ecar.pretrained.folders import weights_fingerprint
    from ecar.refine import load_critic

    if file is None:
        raise ValueError(f"{name or 'this model'} has no critic to choose among candidates; `ecar critic` makes one")
    critic = load_critic(file)
    if (of := critic.about.get("weights")) != weights_fingerprint(name):
        raise ValueError(f"{file} was made for the model with weights {of}, not for {name}")
    return critic


def check_candidates(
    candidates: int, acceptance: float | None, settings: SamplingConfig, critic: Callable[[], Critic]
) -> None:
    """Warns where the critic was made for other settings: it then knows other samples.

    Raises:
        ValueError: numbers out of range, a critic that knows no acceptance; or what ``critic`` raises, called where
            there is something to choose.
    """
    if acceptance is not None:
        check_acceptance(acceptance, candidates)
    if not 1 <= operator.index(candidates) <= MOST_CANDIDATES:
        raise ValueError(f"candidates must be in 1..{MOST_CANDIDATES}, got {candidates}")
    if candidates > 1:
        made, now = critic().about.get("settings"), json.loads(json.dumps(settings.to_json()))  # lists, as a file has
        if made != now:
            warnings.warn(f"the critic was made for samples with {made}, not {now}", stacklevel=4)
        if acceptance is not None:
            critic().levels(torch.zeros(1, dtype=torch.int64), acceptance)


@dataclass(frozen=True)
class Chosen:
    """Chosen samples (B, 3, H, W) in [-1, 1], the seed of each, and how many were drawn for it."""

    images: Tensor
    seeds: list[int]
    drawn: list[int]


def best_candidates(
    draw: Callable[[list[int], list[int]], Tensor], critic: Critic, ids: list[int], seeds: list[int], candidates: int
) -> Chosen:
    """Draw several samples for each image and choose one.

    Args:
        draw: class ids and seeds, one per sample -> decoded (N, 3, H, W) in [-1, 1].
        critic: of the model.
        ids: class of each of B images.
        seeds: its seed.
        candidates: samples per image.
    """
    each = [candidate_seeds(seed, candidates) for seed in seeds]
    labels = [label for label in ids for _ in range(candidates)]
    drawn = draw(labels, [seed for row in each for seed in row])
    picks = picks_of(drawn, critic, ids, seeds)
    rows = [candidates * number + pick for number, pick in enumerate(picks)]
    best = [row[pick] for row, pick in zip(each, picks, strict=True)]
    return Chosen(drawn[rows], best, [candidates] * len(ids))


def accepted_candidates(
    draw: Callable[[list[int], list[int]], Tensor],
    critic: Critic,
    ids: list[int],
    seeds: list[int],
    candidates: int,
    acceptance: float,
) -> Chosen:
    """Draw samples for each image, one after the other, until the critic accepts one.

    Args:
        draw, critic, ids, seeds: as of ``best_candidates``.
        candidates: samples for an image at most; of so many that were all refused, one is chosen as there.
        acceptance: share of all samples that is accepted.
    """
    from ecar.refine import accepts, choose

    power, count = float(critic.about["power"]), len(ids)
    each, uniform = [candidate_seeds(seed, candidates) for seed in seeds], draw_choices(seeds, 2 * candidates)
    levels, scores = critic.levels(torch.tensor(ids), acceptance), torch.full((count, candidates), -torch.inf)
    kept: list[list[Tensor]] = [[] for _ in ids]  # of each image: those refused, and at last the one accepted
    left = list(range(count))
    for number in range(candidates):
        images = draw([ids[i] for i in left], [each[i][number] for i in left])
        scores[left, number] = critic(from_decoded(images), torch.tensor([ids[i] for i in left])).cpu()
        good = accepts(scores[left, number], levels[left], uniform[left, candidates + number], power).tolist()
        for i, image in zip(left, images, strict=True):
            kept[i].append(image)
        left = [i for i, fine in zip(left, good, strict=True) if not fine]
        if not left:
            break
    picks = [len(images) - 1 for images in kept]
    for i, pick in zip(left, choose(scores[left], uniform[left, :candidates], power).tolist(), strict=True):
        picks[i] = pick
    best = [each[i][pick] for i, pick in enumerate(picks)]
    return Chosen(torch.stack([kept[i][pick] for i, pick in enumerate(picks)]), best, [len(k) for k in kept])


def picks_of(drawn: Tensor, critic: Critic, ids: list[int], seeds: list[int]) -> list[int]:
    """Which candidate of each of B images is chosen, from 0.

    Args:
        drawn: decoded candidates (B K, 3, H, W) in [-1, 1], those of an image together, in the order of their seeds.
        critic: of the model.
        ids: class of each image.
        seeds: its seed.
    """
    from ecar.refine import choose

    candidates = len(drawn) // len(ids)
    labels = torch.tensor(ids).repeat_interleave(candidates)
    scores = critic(from_decoded(drawn), labels).view(len(ids), candidates)
    return choose(scores, draw_choices(seeds, candidates), float(critic.about["power"])).tolist()

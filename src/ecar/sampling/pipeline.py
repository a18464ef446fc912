"""``Pipeline``: the public way to make images from a model."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self, TypedDict, TypeVar, Unpack

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ecar.config import SamplingConfig
from ecar.devices import resolve_device
from ecar.files.images import Picture, read_image
from ecar.network.model import StageModel
from ecar.sampling.canvas import Mask
from ecar.sampling.classes import Classes, Label
from ecar.sampling.edit import Edit, enlarging, expanding, redrawing, redrawn
from ecar.sampling.loop import StageResult, check_settings, sample_latents
from ecar.sampling.noise import draw_noise
from ecar.sampling.optimize import optimize, padded_count
from ecar.sampling.pictures import to_pil
from ecar.tokenizers import Tokenizer, load_decoder

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Output:
    """What a call returns.

    Attributes:
        images: one PIL image per label.
        stages: per stage, coarse to fine, the previews of all images (smaller where the tokenizer decodes small
            latents). Empty unless asked for with ``return_stages``.
        labels: class ids (the null class where no class was asked for).
        seeds: seed of each image, as asked for.
        settings: steps, guidance and solver that were used.
        chosen: seed that drew each image, alone: its own, or that of the candidate which ``BestOf`` chose.
        drawn: samples that were drawn for each image: 1, or the candidates of ``BestOf``.
    """

    images: list[Image.Image]
    stages: list[list[Image.Image]]
    labels: list[int]
    seeds: list[int]
    settings: SamplingConfig
    chosen: list[int]
    drawn: list[int]


@dataclass(frozen=True)
class StagePreview:
    """Given to ``on_stage`` after each stage: its number from 1, how many there are, and a preview of each image."""

    stage: int
    num_stages: int
    images: list[Image.Image] = field(repr=False)


class Sampler(Protocol):
    """What draws images: a ``Pipeline``, or ``ecar.refine.BestOf`` around one."""

    def __call__(self, *args: Any, **options: Any) -> Output:
        """One image per label; arguments as ``Pipeline`` takes them."""


class EditOptions(TypedDict, total=False):
    """What every edit takes.

    Attributes:
        label: class of what is drawn; None, the default: no class.
        seeds: one per result, default (0,).
        settings: default: ``Pipeline.settings()``.
        return_stages, on_stage: as in ``Pipeline.__call__``.
    """

    label: Label
    seeds: Sequence[int]
    settings: SamplingConfig | None
    return_stages: bool
    on_stage: Callable[[StagePreview], None] | None


class Pipeline:
    """Model and tokenizer together.

    Example:
        >>> pipe = Pipeline.from_pretrained("fashion")
        >>> out = pipe(labels=["Sneaker", "Bag"], seeds=[0, 1])
        >>> out.images[0].size
        (32, 32)
    """

    def __init__(self, model: StageModel, tokenizer: Tokenizer, name: str = "") -> None:
        if model.config.tokenizer and model.config.tokenizer != tokenizer.fingerprint():
            raise ValueError(
                f"the model reads latents of tokenizer {model.config.tokenizer}, not of {tokenizer.fingerprint()}"
            )
        self.model, self.tokenizer, self.name = model.eval(), tokenizer.to(model.device).eval(), name
        self.decoder = self.tokenizer
        self.fixed_shapes = False
        self.adapter: str | None = None
        self._classes = Classes(model.config)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "butterflies",
        *,
        device: str = "auto",
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        cuda_graphs: bool = False,
        adapter: str | Path | None = None,
        decoder: str | Path | None = None,
    ) -> Self:
        """Load a bundled model, a folder or a Hub id.

        Args:
            name: which.
            device: auto, cpu, cuda, ...
            dtype: of weights and activations.
            compile: compile the blocks: worth it for many images of one batch size (the first batch takes a minute).
            cuda_graphs: replay the head's passes instead of launching their kernels, for few images on a GPU.
            adapter: folder of a LoRA adapter of this model (``ecar train --lora-rank``), merged into the weights.
            decoder: decode with another one than the model's tokenizer has: see ``ecar.tokenizers.load_decoder``.

        Raises:
            ValueError: nothing there, or damaged, or no such device; the message says what.
        """
        from ecar.pretrained.folders import load_model, weights_fingerprint

        device = resolve_device(device)
        model, tokenizer = load_model(name)
        if adapter is not None:
            from ecar.pretrained.adapters import apply_adapter

            model = apply_adapter(model, adapter, weights_fingerprint(name))
        pipe = cls(model.to(device, dtype), tokenizer.to(device), str(name))
        pipe.adapter = None if adapter is None else str(adapter)
        if decoder is not None:
            pipe.decoder = load_decoder(decoder, tokenizer).to(device).eval()
        pipe.optimize(compile=compile, cuda_graphs=cuda_graphs)
        return pipe

    def optimize(self, *, compile: bool = False, cuda_graphs: bool = False) -> None:
        """Make this pipeline faster, in place: see ``ecar.sampling.optimize``."""
        optimize(self.model, compile=compile, cuda_graphs=cuda_graphs)
        self.fixed_shapes |= compile or cuda_graphs

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by id; empty for an unlabelled model."""
        return self.model.config.class_names

    def class_id(self, label: Label) -> int:
        """A name, a synonym, an id or None -> class id; ValueError: ``UnknownClass``, ``AmbiguousClass``."""
        return self._classes.id_of(label)

    def class_ids(self, text: str) -> list[int]:
        """Names or ids with commas between them (names may have some too) -> class ids; errors as ``class_id``."""
        return self._classes.ids_of(text)

    def settings(
        self,
        steps: Sequence[int] | int | None = None,
        guidance: Sequence[float] | float | None = None,
        solver: str | None = None,
        guidance_from: Sequence[float] | float | None = None,
    ) -> SamplingConfig:
        """The model's default settings with changes; one number holds for every stage.

        Args:
            steps: solver steps, at least 1.
            guidance: scale in 0..100; 1 is off and costs one pass of the head a step, others two. The last stage has
                most tokens: (2.0, 1.0) guides the first of two stages only.
            solver: euler, heun or ab2.
            guidance_from: time of the stage, in [0, 1), from which guidance acts.

        Warns:
            UserWarning: other steps or another solver than those that the model was distilled for.

        Raises:
            ValueError: wrong number of stages, unknown solver, values out of range, guidance without classes.
        """
        stages = len(self.model.plan)
        base = self.model.config.sampling or SamplingConfig(steps=(8,) * stages, guidance=(1.0,) * stages)
        changes: dict[str, object] = {}
        if steps is not None:
            changes["steps"] = tuple(map(operator.index, _per_stage(steps, stages)))
        if guidance is not None:
            changes["guidance"] = tuple(map(float, _per_stage(guidance, stages)))
        if solver is not None:
            changes["solver"] = solver
        if guidance_from is not None:
            changes["guidance_from"] = tuple(map(float, _per_stage(guidance_from, stages)))
        result = self._checked(replace(base, **changes))  # type: ignore[arg-type]
        if base.fixed_steps and (result.steps, result.solver) != (base.steps, base.solver):
            text = f"this model was distilled for {base.steps} {base.solver} steps; others give worse images"
            warnings.warn(text, stacklevel=2)
        return result

    def _checked(self, settings: SamplingConfig) -> SamplingConfig:
        """The same; ValueError where this model cannot sample by them."""
        check_settings(settings, len(self.model.plan))
        if self.model.config.num_classes == 0 and any(g != 1 for g in settings.guidance):
            raise ValueError("guidance needs classes, and this model was trained without labels")
        return settings

    @torch.no_grad()
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
        """Generate one image per label.

        Args:
            labels: class names, ids or None (no class); None as a whole: as many unconditional images as seeds.
            seeds: one per image; default 0, 1, 2, ... The same seed, label and settings give the same image, alone
                or in any batch.
            settings: how to sample, from ``settings``; default: the model's own.
            steps: in place of ``settings``: the model's own with other solver steps, one number or one per stage.
            guidance: in place of ``settings``: with another guidance scale, one number or one per stage; 1 is off.
            batch_size: samples computed at once.
            return_stages: also decode a preview of each stage.
            on_stage: called with the previews of the first batch onwards, stage by stage.
            progress: show a progress bar where there is a terminal.

        Raises:
            ValueError: unknown class, wrong counts or settings.
        """
        settings = self.chosen_settings(settings, steps, guidance)
        ids, seeds = self.asked(labels, seeds)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        images: list[Image.Image] = []
        stages: list[list[Image.Image]] = [[] for _ in self.model.plan] if return_stages else []
        firsts = range(0, len(ids), batch_size)
        for first in tqdm(firsts, desc="sampling", unit="batch", disable=None if progress else True):
            chunk = slice(first, first + batch_size)
            images += to_pil(self._batch(ids[chunk], seeds[chunk], settings, stages, on_stage))
        return Output(images, stages, ids, seeds, settings, seeds, [1] * len(ids))

    def chosen_settings(
        self,
        settings: SamplingConfig | None,
        steps: Sequence[int] | int | None,
        guidance: Sequence[float] | float | None,
    ) -> SamplingConfig:
        """Checked settings of a call; ValueError for ``settings`` beside ``steps`` or ``guidance``."""
        if settings is None:
            return self.settings(steps, guidance)
        if steps is not None or guidance is not None:
            raise ValueError("settings hold steps and guidance already: give these to Pipeline.settings")
        return self._checked(settings)

    def asked(self, labels: Sequence[Label] | None, seeds: Sequence[int] | None) -> tuple[list[int], list[int]]:
        """Class ids and seeds of a call, one of each per image; ValueError: unknown class, wrong counts."""
        if isinstance(labels, str):
            raise ValueError(f"labels takes a list: [{labels!r}]")
        if labels is None:
            labels = [None] * (len(seeds) if seeds is not None else 1)
        ids = [self.class_id(label) for label in labels]
        seeds = [operator.index(seed) for seed in seeds] if seeds is not None else list(range(len(ids)))
        if len(seeds) != len(ids):
            raise ValueError(f"{len(ids)} labels but {len(seeds)} seeds; give one seed per image")
        if len(ids) == 0:
            raise ValueError("no images asked for: labels and seeds are empty")
        return ids, seeds

    def _batch(
        self,
        ids: list[int],
        seeds: list[int],
        settings: SamplingConfig,
        stages: list[list[Image.Image]],
        on_stage: Callable[[StagePreview], None] | None,
        edit: Edit | None = None,
    ) -> Tensor:
        """Decoded images (B, 3, H, W) in [-1, 1]."""
        model, count = self.model, len(ids)
        if self.fixed_shapes:
            ids, seeds = (part + part[-1:] * (padded_count(count) - count) for part in (ids, seeds))
        noise = draw_noise(seeds, model.plan, model.config.channels)

        def preview(result: StageResult) -> None:
            z = result.data(range(len(result.y)))[:count]  # all rows: compiled code is of one size
            pictures = to_pil(self.decoder.decode(z))
            if stages:
                stages[result.stage.index].extend(pictures)
            if on_stage is not None:
                on_stage(StagePreview(result.stage.index + 1, len(model.plan), pictures))

        wanted = preview if stages or on_stage is not None else None
        known = edit.known(noise) if edit is not None else ()
        latents = sample_latents(model, torch.tensor(ids, device=model.device), noise, settings, wanted, known)
        return self.decoder.decode(latents[:count])

    def edit(
        self,
        image: Picture,
        *,
        mask: Mask | None = None,
        strength: float = 1.0,
        **options: Unpack[EditOptions],
    ) -> Output:
        """Draw a part of a picture anew, or all of it in part. All other pixels stay as they are.

        Args:
            image: of any size and mode, or its file: scaled to cover the model's size, the centre cropped.
            mask: where to draw, see ``ecar.sampling.canvas.Mask``: white or transparent pixels of an image of the
                picture's size, an array, or a box (x, y, width, height).
            strength: in (0, 1], how much is drawn anew: 1 ignores what the mask hides, small values change details.
            options: ``EditOptions``.

        Raises:
            ValueError: unknown class, a picture or mask that cannot be used, or a strength out of range.
        """
        canvas = redrawn(read_image(image), self.model.config.image_side, mask, strength)
        return self._edited(redrawing(self.model, self.tokenizer, canvas, strength), **options)

    def vary(self, image: Picture, *, strength: float = 0.5, **options: Unpack[EditOptions]) -> Output:
        """``edit`` without a mask: variations of a picture; with ``label``, as another class."""
        return self.edit(image, strength=strength, **options)

    def expand(
        self,
        image: Picture,
        *,
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
        **options: Unpack[EditOptions],
    ) -> Output:
        """Draw margins, in pixels of the picture, around it; both together are scaled to the model's size."""
        edit = expanding(self.model, self.tokenizer, read_image(image), (left, top, right, bottom))
        return self._edited(edit, **options)

    def upscale(self, image: Picture, *, factor: int = 2, **options: Unpack[EditOptions]) -> Output:
        """Draw the finer stages of a picture, which is scaled to a 2nd or 4th of the model's size first.

        Reduced again by means of squares, the result is that picture to half a grey level. Default settings: the
        model's own without guidance, which would draw more of the class than the picture has.
        """
        if options.get("settings") is None:
            options["settings"] = self.settings(guidance=1.0)
        return self._edited(enlarging(self.model, self.tokenizer, read_image(image), factor), **options)

    @torch.no_grad()
    def _edited(
        self,
        edit: Edit,
        label: Label = None,
        seeds: Sequence[int] = (0,),
        settings: SamplingConfig | None = None,
        return_stages: bool = False,
        on_stage: Callable[[StagePreview], None] | None = None,
    ) -> Output:
        settings = self.chosen_settings(settings, None, None)
        ids, asked = self.asked([label] * len(seeds), seeds)
        images: list[Image.Image] = []
        stages: list[list[Image.Image]] = [[] for _ in self.model.plan] if return_stages else []
        for first in range(0, len(ids), 64):
            chunk = slice(first, first + 64)
            images += edit.finish(self._batch(ids[chunk], asked[chunk], settings, stages, on_stage, edit))
        return Output(images, [*stages[:-1], images] if stages else [], ids, asked, settings, asked, [1] * len(ids))


def _per_stage(values: Sequence[Number] | Number, stages: int) -> Sequence[Number]:
    """One number stands for every stage."""
    return values if isinstance(values, Sequence) else (values,) * stages

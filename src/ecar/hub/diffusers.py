"""The model as a pipeline of diffusers. The code in a published folder (``published/``) imports it; ecar itself never
runs code from a folder.

Annotations are types here, not text: diffusers 0.35 reads them.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from ecar.sampling.classes import Label
from ecar.sampling.pipeline import Pipeline


class EcarModel(torch.nn.Module):
    """What diffusers loads: ``model/`` of the folder, beside which are the weights. (A module: only these are told the
    type of the weights.)"""

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None) -> Pipeline:
        """The model of ``folder``/.., on the CPU."""
        above = Path(folder).parent
        name = str(above)
        if not (above / "tokenizer" / "config.json").exists() and above.parent.name == "snapshots":
            # From the Hub, diffusers fetches the files that it knows. Ours are fetched at the same commit.
            name = f"{above.parents[1].name.removeprefix('models--').replace('--', '/')}@{above.name}"
        return Pipeline.from_pretrained(name, device="cpu", dtype=torch_dtype or torch.float32)


class EcarPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws what ``Pipeline`` draws. ``to``, ``device`` and ``dtype`` are those of diffusers.

    Example:
        >>> pipe = DiffusionPipeline.from_pretrained("OWNER/NAME", trust_remote_code=True)
        >>> pipe(class_labels=["frog"], seeds=[0]).images[0]
    """

    def __init__(self, model: Pipeline) -> None:
        super().__init__()
        self.ecar = model
        self.register_modules(model=model.model)

    def __call__(
        self,
        class_labels: Sequence[Label] | Label = None,
        *,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: Sequence[int] | int | None = None,
        guidance_scale: Sequence[float] | float | None = None,
    ) -> ImagePipelineOutput:
        """Draw one image per label.

        Args:
            class_labels: names, ids or None (no class), or one of them alone.
            seeds: one per image; default 0, 1, 2, ...
            generator: in place of ``seeds``: the seed of each one counts, not its state. Image i of a single one has
                its seed + i.
            num_inference_steps: solver steps, one number or one per stage; default: the model's own.
            guidance_scale: one number or one per stage; 1 is off. Default: the model's own.

        Raises:
            ValueError: unknown class, wrong counts or settings, ``seeds`` beside ``generator``.
        """
        if isinstance(class_labels, str | int):
            class_labels = [class_labels]
        labels = None if class_labels is None else list(class_labels)
        if generator is not None:
            if seeds is not None:
                raise ValueError("give seeds or a generator, not both")
            if isinstance(generator, torch.Generator):
                seeds = range(generator.initial_seed(), generator.initial_seed() + len(labels or [None]))
            else:
                seeds = [one.initial_seed() for one in generator]
        self.ecar.tokenizer.to(self.ecar.model.device)  # `to` moves what is registered
        out = self.ecar(
            labels, seeds=seeds if seeds is not None or labels else [0], steps=num_inference_steps,
            guidance=guidance_scale,
        )  # fmt: skip
        return ImagePipelineOutput(images=out.images)

    def save_pretrained(self, *_: object, **__: object) -> None:
        """Refused: the folder that it was loaded from is complete."""
        raise ValueError("copy the folder that the model was loaded from, or write one with `ecar push --dry-run`")

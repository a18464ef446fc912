"""What an evaluation compares, and how; the text under a field is its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ecar.data.reading import ReadOptions
from ecar.files.records import output_file


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(ReadOptions):
    """Real images, extractor, classifier and number of samples."""

    data: str
    """Reference: image folder, WebDataset tars, parquet, Hub data set, or an .npz with mu and sigma (ADM)."""
    num: int = 10_000
    """Samples to compare, balanced over the classes; of a larger file of --samples, so many at random."""
    extractor: str = "efficientnet-lite0"
    """efficientnet-lite0 (offline), inception (FID) or dinov2."""
    weights: str | None = None
    """Weights of the extractor: a file, or a folder or Hub id for dinov2; default: its own."""
    split: str = "test"
    """Split of data that have several."""
    reference_num: int | None = None
    """Use only so many reference images (a seeded choice)."""
    classifier: str | None = None
    """Also report classifier accuracy: a .safetensors file, made from --train-data where it does not exist."""
    train_data: str | None = None
    """Real training images: train the classifier, look for copies, give the floor and the reconstructions."""
    classifier_epochs: int = 8
    """Passes over the training images."""
    classifier_flip: bool = False
    """Mirror training images of the classifier."""
    seed: int = 0
    """Seed of image 0; image i uses seed + i."""
    batch_size: int = 250
    """Images computed at once."""
    allow_small: bool = False
    """Accept fewer images than the extractor has features; the record says so."""
    cache: str = "~/.cache/ecar"
    """Folder of reference features, by fingerprint."""

    @property
    def statistics(self) -> bool:
        """Whether the reference is a file of mean and covariance."""
        return self.data.endswith(".npz")

    def check(self) -> None:
        """ValueError for what cannot be, or would change nothing; cheap."""
        if self.batch_size < 1 or self.classifier_epochs < 1:
            raise ValueError("`batch_size` and `classifier_epochs` must be at least 1")
        if not self.statistics:
            output_file(str(Path(self.cache) / "probe.safetensors"), (".safetensors",), "`cache`")
        elif self.reference_num is not None:
            raise ValueError("`reference_num` would change nothing: `data` is a file of statistics; leave it out")
        elif self.train_data is None:
            self.check_unused(self.data, "a file of statistics")
        if self.classifier is not None:
            if not Path(self.classifier).expanduser().exists():
                output_file(self.classifier, (".safetensors",), "`classifier`")
                if self.train_data is None:
                    raise ValueError(f"`classifier` {self.classifier} does not exist: give `train_data` to train it")
            if self.statistics:
                raise ValueError("`classifier` needs a labelled data set as `data`, not statistics")

"""``evaluate``: samples of a model, or given ones, against real images -> one record."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ecar import __version__
from ecar.config import SamplingConfig, same_names
from ecar.devices import resolve_device
from ecar.evaluation.classifier import (
    Classifier,
    classifier_fingerprint,
    load_classifier,
    save_classifier,
    train_classifier,
)
from ecar.evaluation.config import EvaluationConfig
from ecar.evaluation.extractors import Extractor, get_extractor
from ecar.evaluation.judge import Judge, check_classes, check_count, check_labels, measure
from ecar.evaluation.memorisation import copies
from ecar.evaluation.metrics import chosen
from ecar.evaluation.reference import (
    RealImages,
    Reference,
    read_images,
    reference_from_images,
    reference_from_statistics,
)
from ecar.evaluation.samples import Samples, check_folder, choose, make_samples, reconstruct, write_samples
from ecar.files.commit import source_commit
from ecar.files.lock import run_lock
from ecar.sampling.noise import MAX_SEED
from ecar.sampling.pipeline import Pipeline, Sampler


def evaluate(
    subject: Pipeline | Samples,
    config: EvaluationConfig,
    *,
    settings: SamplingConfig | None = None,
    sampler: Sampler | None = None,
    about: dict[str, object] | None = None,
    folder: str | Path = "eval.samples",
    picture: str | Path = "eval.closest.png",
    device: str = "auto",
) -> dict[str, Any]:
    """Judge a model, or samples, against real images.

    All that can be refused is refused before samples are drawn and features computed.

    Args:
        subject: what is judged. A pipeline draws ``config.num`` samples first.
        config: what it is compared with, and how.
        settings: how the pipeline samples; default: the model's own.
        sampler: what draws, where it is not the pipeline alone: ``ecar.refine.BestOf`` around it.
        about: of the pipeline, all that decides its images and is not in its configuration: weights, dtype, critic.
        folder: where samples go. The same call goes on where it was stopped; others are refused.
        picture: of the samples nearest to training images, which is written where there are some.
        device: of the extractor: auto, cpu, cuda, ...

    Returns:
        ``metrics`` (named by extractor and N), ``reference``, ``extractor`` and ``samples`` with their fingerprints;
        of a pipeline ``about``, settings, seed, ``seconds_per_image`` and ``candidates_drawn`` too. JSON types.

    Raises:
        ValueError: wrong values, too few images, other classes on the two sides, other samples in ``folder``.
    """
    extractor = _extractor(config, device)
    pipe, samples = (subject, None) if isinstance(subject, Pipeline) else (None, choose(subject, config.num))
    side = pipe.model.config.image_side if pipe is not None else _side(samples)
    real = _real_images(config, extractor, side)
    train = _train_images(config, real, side)
    classifier = _given_classifier(config, real, pipe, samples)
    drawing = None if pipe is None else _Drawing(pipe, config, settings, sampler, about or {}, Path(folder))
    reference = _reference(config, extractor, real)
    if config.classifier is not None and classifier is None:
        assert train is not None
        classifier = _new_classifier(config, reference, train)
    record: dict[str, Any] = {"ecar": __version__, "commit": source_commit()}
    if drawing is not None:
        samples = drawing.samples()
        record |= drawing.record(samples)
    assert samples is not None
    record |= {
        "samples": {"fingerprint": samples.fingerprint()},
        "reference": {"name": reference.name, "num": reference.count, "fingerprint": reference.fingerprint},
        "extractor": {"name": extractor.name, "fingerprint": extractor.fingerprint},
        "metrics": measure(samples, reference, extractor),
    }
    if classifier is not None:
        record["classifier"] = _judged(config, classifier, reference, samples)
    if train is not None:
        record |= _lines(config, train[0], reference, extractor, pipe)
        record |= copies(samples.images, reference, train[0], extractor, _cache(config), Path(picture))
    return record


def _extractor(config: EvaluationConfig, device: str) -> Extractor:
    """The network whose features are compared; ValueError for numbers that it cannot be asked about."""
    config.check()
    if not 0 <= config.seed <= MAX_SEED - config.num + 1:
        raise ValueError(f"`seed` must be in 0..{MAX_SEED - config.num + 1} with `num` {config.num}")
    extractor = get_extractor(config.extractor, weights=config.weights, device=resolve_device(device))
    check_count(config.num, extractor, config.allow_small)
    if config.reference_num is not None:
        check_count(config.reference_num, extractor, config.allow_small, "`reference_num`")
    return extractor


class _Drawing:
    """Samples of a pipeline in a folder; making it checks that the folder is for these."""

    def __init__(
        self, pipe: Pipeline, config: EvaluationConfig, settings: SamplingConfig | None, sampler: Sampler | None,
        about: dict[str, object], folder: Path,
    ) -> None:  # fmt: skip
        self.pipe, self.config, self.sampler, self.folder = pipe, config, sampler, folder
        self.settings = settings or pipe.settings()
        whose = {"kind": pipe.model.config.kind, "configuration": _configuration(pipe)}
        self.about = {**about, **whose, "device": pipe.model.device.type}
        check_folder(folder, self.about, seed=config.seed, settings=self.settings)

    def samples(self) -> Samples:
        """All of them, those made that are missing; also as one file for other evaluators."""
        config = self.config
        with run_lock(self.folder):  # two commands would both make what is missing
            samples = make_samples(
                self.pipe, config.num, folder=self.folder, seed=config.seed, settings=self.settings,
                record=self.about, batch=config.batch_size, sampler=self.sampler,
            )  # fmt: skip
        write_samples(self.folder / "samples.npz", samples)
        return samples

    def record(self, samples: Samples) -> dict[str, object]:
        """What they are, and what they cost."""
        return self.about | {
            "settings": self.settings.to_json(),
            "seed": self.config.seed,
            "seconds": round(samples.seconds, 2),
            "candidates_drawn": round(samples.drawn, 4),
            "seconds_per_image": round(samples.seconds / self.config.num, 6),
        }


def _configuration(pipe: Pipeline) -> str:
    """SHA-256 (16 hex digits) of what makes images of the weights: configuration, tokenizer and decoder."""
    parts = json.dumps(pipe.model.config.to_json(), sort_keys=True), pipe.tokenizer.fingerprint()
    return hashlib.sha256(" ".join((*parts, pipe.decoder.fingerprint())).encode()).hexdigest()[:16]


def _side(samples: Samples | None) -> tuple[int, int]:
    assert samples is not None
    return samples.images.shape[2], samples.images.shape[3]


def _real_images(config: EvaluationConfig, extractor: Extractor, side: tuple[int, int]) -> RealImages | None:
    """The images of the reference; None where it is a file of statistics."""
    if config.statistics:
        return None
    real = read_images(config.data, config.reading(), *side, config.reference_num)
    check_count(len(real.images), extractor, config.allow_small, f"`data` {config.data}: the number of images")
    return real


def _reference(config: EvaluationConfig, extractor: Extractor, real: RealImages | None) -> Reference:
    if real is None:
        return reference_from_statistics(Path(config.data).expanduser(), extractor)
    return reference_from_images(config.data, *real, extractor, _cache(config))


def _cache(config: EvaluationConfig) -> Path:
    return Path(config.cache).expanduser()


def _train_images(
    config: EvaluationConfig, real: RealImages | None, side: tuple[int, int]
) -> tuple[Tensor, Tensor] | None:
    if config.train_data is None:
        return None
    images, labels, names = read_images(config.train_data, config.reading(split="train"), *side, None)
    if len(images) < 2:
        raise ValueError(f"`train_data` {config.train_data} has {len(images)} image; its floor needs two or more")
    known = real.class_names if real is not None else ()
    if config.classifier is not None and known and not same_names(names, known):
        raise ValueError(f"`train_data` {config.train_data} has classes {names[:5]}, `data` {known[:5]}")
    return images, labels


def _given_classifier(
    config: EvaluationConfig, real: RealImages | None, pipe: Pipeline | None, samples: Samples | None
) -> Classifier | None:
    """The classifier in its file; None where there is none yet. ValueError: it could judge nothing."""
    if config.classifier is None:
        return None
    assert real is not None
    check_labels(config.data, real.class_names, samples)
    if pipe is not None:
        check_classes(pipe.model.config, config.data, real.class_names)
    path = Path(config.classifier).expanduser()
    if not path.exists():
        return None
    classifier, default = load_classifier(path, real.class_names), EvaluationConfig(data=config.data)
    for key in ("epochs", "flip"):
        name = f"classifier_{key}"
        asked, made = getattr(config, name), classifier.made.get(key)
        if asked != getattr(default, name) and key in classifier.made and made != asked:
            raise ValueError(f"`classifier` {path} has {key} {made}: leave `{name}` out, or name another file")
    return classifier


def _new_classifier(config: EvaluationConfig, reference: Reference, train: tuple[Tensor, Tensor]) -> Classifier:
    assert config.classifier is not None
    epochs, flip = config.classifier_epochs, config.classifier_flip
    model = train_classifier(*train, len(reference.class_names), epochs=epochs, flip=flip)
    save_classifier(model, Path(config.classifier).expanduser(), {
        "train_data": config.train_data, "class_names": reference.class_names, "epochs": epochs, "flip": flip
    })  # fmt: skip
    return model


def _judged(
    config: EvaluationConfig, classifier: Classifier, reference: Reference, samples: Samples
) -> dict[str, object]:
    """The classifier's figures, and which classifier it is."""
    return {
        "file": config.classifier,
        "fingerprint": classifier_fingerprint(classifier),
        "made": classifier.made,
        **Judge(classifier, reference)(samples),
    }


def _lines(
    config: EvaluationConfig, train: Tensor, reference: Reference, extractor: Extractor, pipe: Pipeline | None
) -> dict[str, object]:
    """The floor (training images), and what the tokenizer's reconstructions of them score."""
    some = train[chosen(len(train), config.num)]
    record: dict[str, object] = {"floor: training images": measure(Samples(some, None), reference, extractor)}
    if pipe is not None:
        rebuilt = reconstruct(pipe, some)
        record["tokenizer's reconstructions of training images"] = measure(rebuilt, reference, extractor)
    return record

"""``evaluate``: samples of a model, or given ones, against real images -> one record."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

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
from ecar.evaluation.linear import recognised
from ecar.evaluation.making import balanced, check_folder, collect, configuration, draw_samples
from ecar.evaluation.memorisation import copies
from ecar.evaluation.metrics import chosen
from ecar.evaluation.reference import (
    RealImages,
    Reference,
    Statistics,
    kept_features,
    read_images,
    read_statistics,
    reference_from_images,
    reference_from_statistics,
)
from ecar.evaluation.samples import Samples, choose, reconstruct
from ecar.files.commit import source_commit
from ecar.files.lock import run_lock
from ecar.processes.world import World
from ecar.sampling.noise import MAX_SEED
from ecar.sampling.pipeline import Pipeline, Sampler

_ALONE = World()


class _Checked(NamedTuple):
    """What is read, and found to go together, before samples are drawn and features computed."""

    extractor: Extractor
    samples: Samples | None
    real: RealImages | Statistics
    train: tuple[Tensor, Tensor] | None
    classifier: Classifier | None


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
    world: World = _ALONE,
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
        world: processes that draw the samples together; rank 0 does all else.

    Returns:
        ``metrics`` (named by extractor and N), ``reference``, ``extractor`` and ``samples`` with their fingerprints;
        of a pipeline ``about``, settings, seed, ``seconds_per_image`` and ``candidates_drawn`` too. JSON types. On
        ranks other than 0: nothing.

    Raises:
        ValueError: wrong values, too few images, other classes on the two sides, other samples in ``folder``.
    """
    drawing = None
    if isinstance(subject, Pipeline):
        drawing = _Drawing(subject, config, settings, sampler, about or {}, Path(folder), world)
    checked: list[_Checked] = []
    world.from_first(lambda: checked.append(_check(subject, config, drawing, device)))
    samples = None if drawing is None else drawing.samples()
    return {} if world.rank else _judge(config, checked[0], drawing, samples, Path(picture))


def _judge(
    config: EvaluationConfig, checked: _Checked, drawing: _Drawing | None, drawn: Samples | None, picture: Path
) -> dict[str, Any]:
    """The record, of samples that were drawn or given."""
    extractor, given, real, train, classifier = checked
    samples = drawn or given
    assert samples is not None
    reference = _reference(config, extractor, real)
    if config.classifier is not None and classifier is None:
        assert train is not None
        classifier = _new_classifier(config, reference, train)
    record: dict[str, Any] = {"ecar": __version__, "commit": source_commit()}
    record |= {} if drawing is None else drawing.record(samples)
    record |= {
        "samples": {"fingerprint": samples.fingerprint()},
        "reference": {"name": reference.name, "num": reference.count, "fingerprint": reference.fingerprint},
        "extractor": {"name": extractor.name, "fingerprint": extractor.fingerprint},
        "metrics": measure(samples, reference, extractor),
    }
    if classifier is not None:
        record["classifier"] = _judged(config, classifier, reference, samples)
    if train is not None:
        record |= _lines(config, train[0], reference, extractor, None if drawing is None else drawing.pipe)
        known = None if reference.images is None else kept_features(train[0], extractor, _cache(config))[0]
        record |= recognised(samples, reference, known, train[1], extractor)
        record |= copies(samples.images, reference, train[0], known, extractor, picture)
    return record


def _check(subject: Pipeline | Samples, config: EvaluationConfig, drawing: _Drawing | None, device: str) -> _Checked:
    extractor = _extractor(config, device)
    pipe, samples = (subject, None) if isinstance(subject, Pipeline) else (None, choose(subject, config.num))
    side = pipe.model.config.image_side if pipe is not None else _side(samples)
    real = _real(config, extractor, side)
    images = real if isinstance(real, RealImages) else None
    train = _train_images(config, images, side)
    classifier = _given_classifier(config, images, pipe, samples)
    if drawing is not None:
        drawing.check()
    return _Checked(extractor, samples, real, train, classifier)


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
    """Samples of a pipeline in a folder."""

    def __init__(
        self, pipe: Pipeline, config: EvaluationConfig, settings: SamplingConfig | None, sampler: Sampler | None,
        about: dict[str, object], folder: Path, world: World,
    ) -> None:  # fmt: skip
        self.pipe, self.config, self.sampler, self.folder, self.world = pipe, config, sampler, folder, world
        self.settings = settings or pipe.settings()
        whose = {"kind": pipe.model.config.kind, "configuration": configuration(pipe)}
        self.about = {**about, **whose, "device": pipe.model.device.type}

    def check(self) -> None:
        """ValueError where the folder is for others."""
        check_folder(self.folder, self.about, seed=self.config.seed, settings=self.settings)

    def samples(self) -> Samples | None:
        """Those that are missing, made by all; on rank 0 all of them, which other evaluators find in one file."""
        pipe, config = self.pipe, self.config
        with ExitStack() as lock:
            if self.world.rank == 0:  # two commands would both make what is missing
                lock.enter_context(run_lock(self.folder))
            draw_samples(
                pipe, balanced(pipe, config.num), folder=self.folder, seed=config.seed, settings=self.settings,
                record=self.about, batch=config.batch_size, sampler=self.sampler, world=self.world,
            )  # fmt: skip
            if self.world.rank:
                return None
            return collect(self.folder, config.num, labelled=pipe.model.config.num_classes > 0)

    def record(self, samples: Samples) -> dict[str, object]:
        """What they are, and what they cost."""
        return self.about | {
            "settings": self.settings.to_json(),
            "seed": self.config.seed,
            "seconds": round(samples.seconds, 2),
            "candidates_drawn": round(samples.drawn, 4),
            "seconds_per_image": round(samples.seconds / self.config.num, 6),
        }


def _side(samples: Samples | None) -> tuple[int, int]:
    assert samples is not None
    return samples.images.shape[2], samples.images.shape[3]


def _real(config: EvaluationConfig, extractor: Extractor, side: tuple[int, int]) -> RealImages | Statistics:
    """What is compared with: images, or a file of statistics."""
    if config.statistics:
        return read_statistics(Path(config.data).expanduser(), extractor)
    real = read_images(config.data, config.reading(), *side, config.reference_num)
    check_count(len(real.images), extractor, config.allow_small, f"`data` {config.data}: the number of images")
    return real


def _reference(config: EvaluationConfig, extractor: Extractor, real: RealImages | Statistics) -> Reference:
    if isinstance(real, Statistics):
        return reference_from_statistics(real, extractor, _cache(config))
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
    if names and known and not same_names(names, known):
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

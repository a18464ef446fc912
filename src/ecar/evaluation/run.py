"""``evaluate``: samples of a model, or given ones, against real images -> one record."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ecar import __version__
from ecar.config import SamplingConfig, Side, same_names
from ecar.devices import resolve_device
from ecar.evaluation.classifier import (
    Classifier,
    classifier_fingerprint,
    linear_classifier,
    load_classifier,
    save_classifier,
    train_classifier,
)
from ecar.evaluation.config import EvaluationConfig
from ecar.evaluation.extractors import Extractor, get_extractor
from ecar.evaluation.figures import (
    Recognition,
    Seen,
    check_classes,
    check_count,
    check_labels,
    figures,
    look,
    measure,
)
from ecar.evaluation.making import balanced, check_folder, configuration, make_samples
from ecar.evaluation.memorisation import memorisation, pixel_distances
from ecar.evaluation.metrics import chosen
from ecar.evaluation.reference import (
    RealImages,
    Reference,
    kept_features,
    read_images,
    read_statistics,
    reference_from_images,
    with_neighbours,
)
from ecar.evaluation.samples import Samples, choose, reconstruct
from ecar.files.commit import source_commit
from ecar.processes.world import World
from ecar.sampling.noise import MAX_SEED
from ecar.sampling.pipeline import Pipeline, Sampler

_ALONE = World()


class _Inputs(NamedTuple):
    """What is read, and found to go together, before samples are drawn and features computed."""

    extractor: Extractor
    samples: Samples | None
    real: RealImages | Reference
    train: RealImages | None
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
    """Compare a model, or samples, with real images.

    All that can be refused is refused before samples are drawn and features computed.

    Args:
        subject: what is compared. A pipeline draws ``config.num`` samples first.
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
    pipe, folder, inputs = (subject if isinstance(subject, Pipeline) else None), Path(folder), list[_Inputs]()
    how: dict[str, Any] = {}
    if pipe is not None:
        settings = settings or pipe.settings()
        how = {**(about or {}), "kind": pipe.model.config.kind, "configuration": configuration(pipe)}
        how["device"] = pipe.model.device.type

    def check() -> None:
        inputs.append(_inputs(subject, config, device))
        if pipe is not None and settings is not None:
            check_folder(folder, how, seed=config.seed, settings=settings)

    world.from_first(check)
    made = None
    if pipe is not None and settings is not None:
        made = make_samples(
            pipe, balanced(pipe, config.num), folder, seed=config.seed, settings=settings, record=how,
            batch=config.batch_size, sampler=sampler, world=world,
        )  # fmt: skip
        how |= {"settings": settings.to_json(), "seed": config.seed}
    if world.rank:
        return {}
    drawn = None if made is None else made[1]
    return {"ecar": __version__, "commit": source_commit(), **how} | _compared(config, inputs[0], drawn, pipe, picture)


def _inputs(subject: Pipeline | Samples, config: EvaluationConfig, device: str) -> _Inputs:
    """ValueError for numbers that the extractor cannot be asked about, and data that do not go together."""
    config.check()
    if not 0 <= config.seed <= MAX_SEED - config.num + 1:
        raise ValueError(f"`seed` must be in 0..{MAX_SEED - config.num + 1} with `num` {config.num}")
    extractor = get_extractor(config.extractor, weights=config.weights, device=resolve_device(device))
    check_count(config.num, extractor, config.allow_small)
    if config.reference_num is not None:
        check_count(config.reference_num, extractor, config.allow_small, "`reference_num`")
    samples = None if isinstance(subject, Pipeline) else choose(subject, config.num)
    height, width = subject.model.config.image_side if isinstance(subject, Pipeline) else subject.images.shape[2:]
    real: RealImages | Reference
    if config.statistics:
        real = read_statistics(Path(config.data).expanduser(), extractor)
    else:
        real = read_images(config.data, config.reading(), height, width, config.reference_num)
        check_count(len(real.images), extractor, config.allow_small, f"`data` {config.data}: the number of images")
    train = _train_images(config, real, (height, width))
    return _Inputs(extractor, samples, real, train, _given_classifier(config, real, subject))


def _train_images(config: EvaluationConfig, real: RealImages | Reference, side: Side) -> RealImages | None:
    if config.train_data is None:
        return None
    train = read_images(config.train_data, config.reading(split="train"), *side, None)
    if len(train.images) < 2:
        raise ValueError(f"`train_data` {config.train_data} has {len(train.images)} image; its floor needs two or more")
    names, known = train.class_names, real.class_names if isinstance(real, RealImages) else ()
    if names and known and not same_names(names, known):
        raise ValueError(f"`train_data` {config.train_data} has classes {names[:5]}, `data` {known[:5]}")
    return train


def _given_classifier(
    config: EvaluationConfig, real: RealImages | Reference, subject: Pipeline | Samples
) -> Classifier | None:
    """The classifier in its file; None where there is none yet. ValueError: it could recognise nothing."""
    if config.classifier is None:
        return None
    assert isinstance(real, RealImages)
    if isinstance(subject, Pipeline):
        check_labels(config.data, real.class_names)
        check_classes(subject.model.config, config.data, real.class_names)
    else:
        check_labels(config.data, real.class_names, subject)
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


def _compared(
    config: EvaluationConfig, inputs: _Inputs, drawn: Samples | None, pipe: Pipeline | None, picture: str | Path
) -> dict[str, Any]:
    """The part of the record that looks at images; features of the samples are computed once."""
    extractor, given, real, train, classifier = inputs
    samples = drawn or given
    assert samples is not None
    cache = Path(config.cache).expanduser()
    if isinstance(real, Reference):
        reference = with_neighbours(real, extractor, cache)
    else:
        reference = reference_from_images(config.data, *real, extractor, cache)
    seen = look(samples.images, extractor, spatial=reference.spatial is not None)
    record: dict[str, Any] = {} if drawn is None else {
        "seconds": round(drawn.seconds, 2),
        "candidates_drawn": round(drawn.drawn, 4),
        "seconds_per_image": round(drawn.seconds / config.num, 6),
    }  # fmt: skip
    record |= {
        "samples": {"fingerprint": samples.fingerprint()},
        "reference": {"name": reference.name, "num": reference.count, "fingerprint": reference.fingerprint},
        "extractor": {"name": extractor.name, "fingerprint": extractor.fingerprint},
        "metrics": figures(seen, reference, extractor),
    }
    if config.classifier is not None:
        if classifier is None:
            assert train is not None
            classifier = _new_classifier(config, reference, train)
        its = {"fingerprint": classifier_fingerprint(classifier), "made": classifier.made}
        record["classifier"] = {"file": config.classifier, **its, **Recognition(classifier, reference)(samples)}
    if train is None:
        return record
    some = train.images[chosen(len(train.images), config.num)]
    record["floor: training images"] = measure(Samples(some, None), reference, extractor)
    if pipe is not None:
        name = "tokenizer's reconstructions of training images"
        record[name] = measure(reconstruct(pipe, some), reference, extractor)
    record |= pixel_distances(samples.images, reference.images, train.images)
    if reference.images is not None:
        known = kept_features(train.images, extractor, cache)[0]
        record |= _recognised(samples, seen, reference, train, known, extractor.name)
        record |= _copies(samples, seen, reference, train, known, extractor, picture)
    return record


def _new_classifier(config: EvaluationConfig, reference: Reference, train: RealImages) -> Classifier:
    assert config.classifier is not None
    epochs, flip = config.classifier_epochs, config.classifier_flip
    model = train_classifier(train.images, train.labels, len(reference.class_names), epochs=epochs, flip=flip)
    save_classifier(model, Path(config.classifier).expanduser(), {
        "train_data": config.train_data, "class_names": reference.class_names, "epochs": epochs, "flip": flip
    })  # fmt: skip
    return model


def _recognised(
    samples: Samples, seen: Seen, reference: Reference, train: RealImages, known: Tensor, name: str
) -> dict[str, object]:
    """The share of samples, and of the reference, that a linear classifier of the training images' features ``known``
    takes for the class they have. Nothing without two classes, or labels on every side."""
    classes = int(train.labels.max()) + 1
    if samples.labels is None or reference.labels is None or reference.features is None or classes < 2:
        return {}
    classify = linear_classifier(known, train.labels, classes)
    sides = {"samples": (seen.features, samples.labels), "reference": (reference.features, reference.labels)}
    shares = {side: float((classify(x) == labels).double().mean()) for side, (x, labels) in sides.items()}
    name = f"right class, by linear regression on training images ({name})"
    return {name: {side: round(share, 4) for side, share in shares.items()}}


def _copies(
    samples: Samples, seen: Seen, reference: Reference, train: RealImages, known: Tensor, extractor: Extractor,
    picture: str | Path,
) -> dict[str, object]:  # fmt: skip
    """Does the model copy? Its samples beside held-out images; writes ``picture`` of the closest pairs."""
    assert reference.images is not None and reference.features is not None
    held_out, own = (reference.images, reference.features), (train.images, known)
    found, pairs = memorisation((samples.images, seen.features), held_out, own, extractor)
    pairs.save(picture)
    return {f"memorisation ({extractor.name})": found | {"picture": str(picture)}}

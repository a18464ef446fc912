"""``ecar evaluate``: how good a model's samples are, against real images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ecar.cli.options import (
    check_critic,
    check_dtype,
    one_or_all,
    output_file,
    parse,
    source_commit,
    torch_dtype,
    usable_dtype,
)
from ecar.data.reading import ReadOptions

if TYPE_CHECKING:
    import torch

    from ecar import Pipeline
    from ecar.config import SamplingConfig
    from ecar.evaluation.classifier import Classifier
    from ecar.evaluation.extractors import Extractor
    from ecar.evaluation.reference import RealImages, Reference
    from ecar.evaluation.samples import Samples

# What decides the images that a model makes.
_SAMPLING = (
    *("steps", "guidance", "solver", "guidance_from", "seed"),
    *("dtype", "compile", "decoder", "candidates", "acceptance", "critic"),
)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ReadOptions):
    """Judge a model, or a file of samples, against real images."""

    data: str
    """Reference: image folder, WebDataset tars, parquet, Hub data set, or an .npz with mu and sigma (ADM)."""
    model: str | None = None
    """Bundled name, folder or Hub id to sample from."""
    samples: str | None = None
    """Or samples to read: folder of pictures (subfolders are classes), .npy, or .npz with arr_0 and labels (ADM)."""
    out: str = "eval.json"
    """File to write (.json). Samples go to the folder of that name + .samples, from which the command resumes."""
    num: int = 10_000
    """Images to judge, balanced over the classes; of a larger file of --samples, so many at random."""
    extractor: str = "efficientnet-lite0"
    """efficientnet-lite0 (offline), inception (FID) or dinov2."""
    weights: str | None = None
    """Weights of the extractor: a file, or a folder or Hub id for dinov2; default: its own."""
    split: str = "test"
    """Split of a Hub data set or parquet folder to compare with."""
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
    steps: tuple[int, ...] | None = None
    """Solver steps per stage; default: the model's."""
    guidance: tuple[float, ...] | None = None
    """Guidance scale, one number or one per stage; default: the model's."""
    solver: str | None = None
    """euler, heun or ab2; default: the model's."""
    guidance_from: tuple[float, ...] | None = None
    """Time of a stage, in [0, 1), from which guidance acts, one number or one per stage; default: the model's."""
    candidates: int = 1
    """Samples drawn for each image, of which a critic chooses one (ecar critic)."""
    acceptance: float | None = None
    """Share of samples that the critic accepts: --candidates are then the most that are drawn for an image."""
    critic: str | None = None
    """Critic of the model; default: critic.safetensors in its folder."""
    seed: int = 0
    """Seed of image 0; image i uses seed + i."""
    batch_size: int = 250
    """Images computed at once."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, mps."""
    dtype: str = "fp32"
    """fp32 or bf16."""
    compile: bool = False
    """Compile the model before sampling (a minute or more; on CPU it needs g++)."""
    decoder: str | None = None
    """Another decoder: one trained by ecar tokenizer --freeze-encoder; or, of an AutoencoderKL, folder or Hub id of a
    tiny one (diffusers' AutoencoderTiny, such as TAESD)."""
    allow_small: bool = False
    """Accept fewer images than the extractor has features; the record says so."""
    cache: str = "~/.cache/ecar"
    """Folder of reference features, by fingerprint."""


def run(arguments: Sequence[str]) -> None:
    """Parse, check, sample or read, measure, write; prints one JSON object as the last line."""
    options = parse(EvaluateOptions, arguments, "evaluate")
    out = output_file(options.out, (".json",))
    _check(options)
    from ecar import __version__
    from ecar.cost.flops import sampling_flops
    from ecar.devices import resolve_device
    from ecar.evaluation.classifier import classifier_fingerprint
    from ecar.evaluation.evaluate import Judge, check_count, measure
    from ecar.evaluation.extractors import get_extractor
    from ecar.evaluation.memorisation import copies
    from ecar.evaluation.samples import check_folder

    device = resolve_device(options.device)
    options = replace(options, dtype=usable_dtype(options.dtype, device))
    extractor = get_extractor(options.extractor, weights=options.weights, device=device)
    check_count(options.num, extractor, options.allow_small)
    if options.reference_num is not None:
        check_count(options.reference_num, extractor, options.allow_small, "--reference-num")
    record: dict[str, object] = {"ecar": __version__, "commit": source_commit(), "command": asdict(options)}
    pipe = _pipeline(options, device)
    samples = _read(options) if pipe is None else None
    height, width = pipe.model.config.image_side if pipe else _side(samples)
    real = _real_images(options, extractor, height, width)
    train = _train_images(options, real, height, width)
    classifier = _given_classifier(options, real, pipe, samples)
    if pipe is not None:  # the last of what may be refused: from here on there is work to lose
        plain, folder, settings = _plain(options, pipe), out.with_suffix(".samples"), _settings(options, pipe)
        about = _about(options, pipe, parameters=plain.model.num_parameters())
        check_folder(folder, about, seed=options.seed, settings=settings)
    reference = _reference(options, extractor, real)
    if options.classifier is not None and classifier is None:
        assert train is not None
        classifier = _new_classifier(options, reference, train)
    if pipe is not None:
        samples, made = _sample(options, pipe, folder, settings, about)
        record |= made | {"flops_per_image": sampling_flops(plain, settings, samples.drawn)}
    assert samples is not None
    record["samples"] = {"fingerprint": samples.fingerprint(), "file": options.samples}
    record["reference"] = {"name": reference.name, "num": reference.count, "fingerprint": reference.fingerprint}
    record["extractor"] = {"name": extractor.name, "fingerprint": extractor.fingerprint}
    record["metrics"] = measure(samples, reference, extractor)
    if classifier is not None:
        record["classifier"] = {
            "file": options.classifier,
            "fingerprint": classifier_fingerprint(classifier),
            "made": classifier.made,
            **Judge(classifier, reference)(samples),
        }
    if train is not None:
        record |= _lines(options, train[0], reference, extractor, pipe)
        cache, picture = Path(options.cache).expanduser(), out.with_suffix(".closest.png")
        record |= copies(samples.images, reference, train[0], extractor, cache, picture)
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


def _check(options: EvaluateOptions) -> None:
    if (options.model is None) == (options.samples is None):
        raise ValueError("give --model or --samples, one of them")
    if options.samples is not None and (given := _changed(options, _SAMPLING)):
        raise ValueError(f"--samples are judged as they are: {', '.join(given)} would change nothing; leave it out")
    check_dtype(options.dtype)
    check_critic(options.critic, options.candidates, options.acceptance)
    if options.batch_size < 1 or options.classifier_epochs < 1:
        raise ValueError("--batch-size and --classifier-epochs must be at least 1")
    if options.data.endswith(".npz"):
        if options.reference_num is not None:
            raise ValueError("--reference-num would change nothing: --data is a file of statistics; leave it out")
        if options.train_data is None:
            options.check_unused(options.data, "a file of statistics")
    else:
        output_file(str(Path(options.cache) / "probe.safetensors"), (".safetensors",), "--cache")
    if options.classifier is not None:
        if not Path(options.classifier).expanduser().exists():
            output_file(options.classifier, (".safetensors",), "--classifier")
            if options.train_data is None:
                raise ValueError(f"--classifier {options.classifier} does not exist: give --train-data to train it")
        if options.data.endswith(".npz"):
            raise ValueError("--classifier needs a labelled data set as --data, not statistics")
    from ecar.sampling.noise import MAX_SEED

    if not 0 <= options.seed <= MAX_SEED - options.num + 1:
        raise ValueError(f"--seed must be in 0..{MAX_SEED - options.num + 1} with --num {options.num}")


def _changed(options: EvaluateOptions, names: Sequence[str]) -> list[str]:
    """Those of the options that are not at their defaults, as flags."""
    default = EvaluateOptions(data=options.data)
    return [f"--{n.replace('_', '-')}" for n in names if getattr(options, n) != getattr(default, n)]


def _pipeline(options: EvaluateOptions, device: str) -> Pipeline | None:
    """The model's pipeline, its settings checked; None where samples are read."""
    if options.model is None:
        return None
    from ecar import Pipeline

    pipe = Pipeline.from_pretrained(
        options.model, device=device, dtype=torch_dtype(options.dtype), decoder=options.decoder,
        critic=options.critic, compile=options.compile,
    )  # fmt: skip
    pipe.check_candidates(options.candidates, _settings(options, pipe), options.acceptance)
    return pipe


def _settings(options: EvaluateOptions, pipe: Pipeline) -> SamplingConfig:
    steps, guidance = one_or_all(options.steps), one_or_all(options.guidance)
    return pipe.settings(steps, guidance, options.solver, one_or_all(options.guidance_from))


def _read(options: EvaluateOptions) -> Samples:
    from ecar.evaluation.samples import choose, read_samples

    assert options.samples is not None
    return choose(read_samples(Path(options.samples).expanduser()), options.num)


def _side(samples: Samples | None) -> tuple[int, int]:
    assert samples is not None
    return samples.images.shape[2], samples.images.shape[3]


def _about(options: EvaluateOptions, pipe: Pipeline, *, parameters: int) -> dict[str, object]:
    """Beside seed and settings, all that decides what the images are."""
    from ecar.pretrained.folders import weights_fingerprint

    assert options.model is not None
    return {
        "model": options.model,
        "weights": weights_fingerprint(options.model),
        "kind": pipe.model.config.kind,
        "parameters": parameters,
        "configuration": _configuration(pipe),
        "device": pipe.model.device.type,
        "dtype": options.dtype,
        "compile": options.compile,
        "decoder": options.decoder,
        "candidates": options.candidates if options.candidates > 1 else None,
        "acceptance": options.acceptance,
        "critic": _critic(pipe) if options.candidates > 1 else None,
    }


def _critic(pipe: Pipeline) -> str:
    """SHA-256 (16 hex digits) of the critic's file."""
    assert pipe.critic_file is not None
    return hashlib.sha256(pipe.critic_file.expanduser().read_bytes()).hexdigest()[:16]


def _plain(options: EvaluateOptions, pipe: Pipeline) -> Pipeline:
    """``pipe`` as it was before it was compiled: that does as much, but not in weights and kernels that can be
    counted."""
    plain = _pipeline(replace(options, compile=False), "cpu") if options.compile else pipe
    assert plain is not None
    return plain


def _sample(
    options: EvaluateOptions, pipe: Pipeline, folder: Path, settings: SamplingConfig, about: dict[str, object]
) -> tuple[Samples, dict[str, object]]:
    from ecar.evaluation.samples import make_samples, write_samples
    from ecar.files.lock import run_lock
    from ecar.hub import training_record
    from ecar.pretrained.folders import resolve_model

    assert options.model is not None
    with run_lock(folder):  # two commands would both make what is missing
        samples = make_samples(
            pipe, options.num, folder=folder, seed=options.seed, settings=settings, record=about,
            batch=options.batch_size, candidates=options.candidates, acceptance=options.acceptance,
        )  # fmt: skip
    write_samples(folder / "samples.npz", samples)
    about = about | {"settings": settings.to_json(), "seed": options.seed, "seconds": round(samples.seconds, 2)}
    about["ema"] = training_record(resolve_model(options.model)).get("ema")  # whose decay the averaged weights have
    about["candidates_drawn"] = round(samples.drawn, 4)
    about["seconds_per_image"] = round(samples.seconds / options.num, 6)
    return samples, about


def _configuration(pipe: Pipeline) -> str:
    """SHA-256 (16 hex digits) of what makes images of the weights: configuration, tokenizer and decoder."""
    parts = json.dumps(pipe.model.config.to_json(), sort_keys=True), pipe.tokenizer.fingerprint()
    return hashlib.sha256(" ".join((*parts, pipe.decoder.fingerprint())).encode()).hexdigest()[:16]


def _real_images(options: EvaluateOptions, extractor: Extractor, height: int, width: int) -> RealImages | None:
    """The images of --data; None where it is a file of statistics."""
    from ecar.evaluation.evaluate import check_count
    from ecar.evaluation.reference import read_images

    if options.data.endswith(".npz"):
        return None
    real = read_images(options.data, options.reading(), height, width, options.reference_num)
    check_count(len(real.images), extractor, options.allow_small, f"--data {options.data}: the number of images")
    return real


def _reference(options: EvaluateOptions, extractor: Extractor, real: RealImages | None) -> Reference:
    from ecar.evaluation.reference import reference_from_images, reference_from_statistics

    if real is None:
        return reference_from_statistics(Path(options.data).expanduser(), extractor)
    return reference_from_images(options.data, *real, extractor, Path(options.cache).expanduser())


def _train_images(
    options: EvaluateOptions, real: RealImages | None, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if options.train_data is None:
        return None
    from ecar.config import same_names
    from ecar.evaluation.reference import read_images

    images, labels, names = read_images(options.train_data, options.reading(split="train"), height, width, None)
    if len(images) < 2:
        raise ValueError(f"--train-data {options.train_data} has {len(images)} image; its floor needs two or more")
    known = real.class_names if real is not None else ()
    if options.classifier is not None and known and not same_names(names, known):
        raise ValueError(f"--train-data {options.train_data} has classes {names[:5]}, --data {known[:5]}")
    return images, labels


def _given_classifier(
    options: EvaluateOptions, real: RealImages | None, pipe: Pipeline | None, samples: Samples | None
) -> Classifier | None:
    """The classifier in the file of --classifier; None where there is none yet. ValueError: it could judge nothing."""
    if options.classifier is None:
        return None
    from ecar.evaluation.classifier import load_classifier
    from ecar.evaluation.evaluate import check_classes, check_labels

    assert real is not None
    check_labels(options.data, real.class_names, samples)
    if pipe is not None:
        check_classes(pipe.model.config, options.data, real.class_names)
    path = Path(options.classifier).expanduser()
    if not path.exists():
        return None
    classifier = load_classifier(path, real.class_names)
    for flag in _changed(options, ("classifier_epochs", "classifier_flip")):
        key = flag.removeprefix("--classifier-")
        if key in classifier.made and classifier.made[key] != getattr(options, f"classifier_{key}"):
            raise ValueError(
                f"--classifier {path} has {key} {classifier.made[key]}: leave {flag} out, or name another file"
            )
    return classifier


def _new_classifier(
    options: EvaluateOptions, reference: Reference, train: tuple[torch.Tensor, torch.Tensor]
) -> Classifier:
    from ecar.evaluation.classifier import save_classifier, train_classifier

    assert options.classifier is not None
    epochs, flip = options.classifier_epochs, options.classifier_flip
    model = train_classifier(*train, len(reference.class_names), epochs=epochs, flip=flip)
    save_classifier(model, Path(options.classifier).expanduser(), {
        "train_data": options.train_data, "class_names": reference.class_names, "epochs": epochs, "flip": flip
    })  # fmt: skip
    return model


def _lines(
    options: EvaluateOptions, train: torch.Tensor, reference: Reference, extractor: Extractor, pipe: Pipeline | None
) -> dict[str, object]:
    """The floor (training images), and what the tokenizer's reconstructions of them score."""
    from ecar.evaluation.evaluate import measure
    from ecar.evaluation.metrics import chosen
    from ecar.evaluation.samples import Samples, reconstruct

    some = train[chosen(len(train), options.num)]
    record: dict[str, object] = {"floor: training images": measure(Samples(some, None), reference, extractor)}
    if pipe is not None:
        rebuilt = reconstruct(pipe, some)
        record["tokenizer's reconstructions of training images"] = measure(rebuilt, reference, extractor)
    return record

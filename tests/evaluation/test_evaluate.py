"""``ecar evaluate`` as a user runs it, on real digits, and everything that it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_config
from ecar.cli.main import main
from ecar.cli.options import source_commit
from ecar.config import ModelConfig
from ecar.evaluation.classifier import (
    Classifier,
    accuracy,
    classifier_fingerprint,
    load_classifier,
    predict,
    save_classifier,
    train_classifier,
)
from ecar.evaluation.extractors import Dinov2Extractor, EfficientNetExtractor, get_extractor
from ecar.evaluation.figures import check_classes, check_count, check_labels, measure
from ecar.evaluation.making import balanced, collect, draw_samples
from ecar.evaluation.metrics import Gaussian, frechet_distance
from ecar.evaluation.reference import read_images, read_statistics, reference_from_images
from ecar.evaluation.samples import Samples, read_samples, write_samples
from ecar.files import commit
from ecar.files.lock import run_lock
from ecar.pretrained.folders import weights_fingerprint
from ecar.sampling.pipeline import Pipeline
from ecar.training import loop
from ecar.training.config import TrainConfig


@pytest.fixture(scope="module")
def trained(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TrainConfig.of(
        data=str(digits_folder), out=str(tmp_path_factory.mktemp("run")), tokenizer="pixels:2", resolution=(8,),
        preset="16x2x1+1", max_steps=2, batch_size=8,
        dtype="fp32", device="cpu",
    )  # fmt: skip
    return loop.train(config)


def make_samples(pipe: Pipeline, num: int, *, folder: Path, **options: Any) -> Samples:
    draw_samples(pipe, balanced(pipe, num), folder=folder, **options)
    return collect(folder, num, labelled=pipe.model.config.num_classes > 0)


def noise_images(count: int, side: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def test_command_writes_named_figures_with_their_settings_and_resumes(
    trained: Path, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, cache = tmp_path / "eval.json", tmp_path / "cache"
    command = ["evaluate", "--model", str(trained), "--data", str(digits_folder), "--num", "24", "--allow-small"]
    command += ["--out", str(out), "--cache", str(cache), "--batch-size", "9", "--guidance", "1.5", "--device", "cpu"]
    command += ["--classifier", str(tmp_path / "judge.safetensors"), "--train-data", str(digits_folder)]
    assert main([*command, "--classifier-epochs", "2"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first == json.loads(out.read_text())
    assert first["metrics"]["num"] == 24 and first["metrics"]["biased_small_sample"] is True
    assert first["metrics"]["FD-EffNetLite0"] > 0 and first["settings"]["guidance"] == [1.5, 1.5]
    assert first["ema"] == 0.99  # the trainer's default: the folder holds averaged weights
    assert set(first["classifier"]["classifier_accuracy_per_class"]) == {"zero", "one", "seven"}
    assert first["classifier"]["made"] == {
        "train_data": str(digits_folder), "class_names": ["one", "seven", "zero"], "epochs": 2, "flip": False,
    }  # fmt: skip
    assert first["flops_per_image"]["model"] > 0 and first["classifier"]["FD-classifier"] > 0
    nearest = first[
        "nearest training image, mirrored or not (RMS of pixels in [0, 1], of 24)"
    ]  # the reference is the training set
    assert nearest["reference"]["median"] == 0 < nearest["samples"]["min"]
    assert first["memorisation (efficientnet-lite0)"]["share_of_held_out"] == 1  # it is the training set
    assert first["right class, by linear regression on training images (efficientnet-lite0)"]["reference"] > 0.9
    floor, rebuilt = first["floor: training images"], first["tokenizer's reconstructions of training images"]
    assert floor["FD-EffNetLite0"] == pytest.approx(rebuilt["FD-EffNetLite0"], rel=0.05)  # pixels are kept
    with np.load(tmp_path / "eval.samples" / "samples.npz") as file:  # the format of ADM's evaluator
        assert file["arr_0"].shape == (24, 8, 8, 3) and file["arr_0"].dtype == np.uint8
        assert np.bincount(file["labels"]).tolist() == [8, 8, 8]
    (tmp_path / "eval.samples" / "ids_00000009.npz").unlink()
    with run_lock(tmp_path / "eval.samples"):  # another command at work there: both would make the images
        assert main(command) == 2 and "a run is active there" in capsys.readouterr().err
    assert main(command) == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert second["metrics"] == first["metrics"] and second["samples"] == first["samples"]
    assert main([*command, "--seed", "7"]) == 2
    assert "other samples (seed 0 -> 7" in capsys.readouterr().err


def test_accuracy_is_refused_where_class_ids_mean_other_classes(
    trained: Path, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(digits_folder, other)
    (other / "zero").rename(other / "two")  # sorted behind "seven"
    command = ["evaluate", "--model", str(trained), "--data", str(other), "--num", "12", "--allow-small"]
    command += [
        "--classifier",
        str(tmp_path / "judge.safetensors"),
        "--train-data",
        str(other),
        "--cache",
        str(tmp_path),
    ]
    assert main([*command, "--out", str(tmp_path / "eval.json"), "--device", "cpu"]) == 2
    assert "not the same in the same order" in capsys.readouterr().err


def test_samples_file_scores_as_the_model_it_came_from(trained: Path, digits_folder: Path, tmp_path: Path) -> None:
    def evaluate(*source: str) -> dict[str, object]:
        out = tmp_path / f"{source[0][2:]}.json"
        command = ["evaluate", *source, "--data", str(digits_folder), "--num", "12", "--allow-small", "--out", str(out)]
        assert main([*command, "--cache", str(tmp_path), "--device", "cpu"]) == 0
        return json.loads(out.read_text())["metrics"]

    from_model = evaluate("--model", str(trained))
    assert evaluate("--samples", str(tmp_path / "model.samples" / "samples.npz")) == from_model


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--model or --samples"),
        (["--model", "fashion", "--samples", "x.npz"], "one of them"),
        (["--samples", "missing.npz", "--allow-small"], "missing.npz"),
        (["--model", "fashion", "--num", "100"], "mostly bias"),
        (["--model", "fashion", "--extractor", "vgg"], "unknown extractor"),
        (["--model", "fashion", "--classifier", "none.safetensors"], "--train-data"),
        (["--model", "fashion", "--steps", "1,2,3"], "steps"),
        (["--samples", "x.npz", "--guidance", "3", "--decoder", "y"], "leave --guidance, --decoder out"),
        (["--model", "fashion", "--allow-small", "--reference-num", "1"], "--reference-num must be at least 2"),
        (["--model", "fashion", "--seed", "-5", "--allow-small"], "--seed must be in 0.."),
        (["--model", "fashion", "--cache", "/proc/nope/x", "--allow-small"], "--cache"),
        (["--model", "fashion"], "the number of images 120 is no more than the 1280 features"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str], word: str, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--data", str(digits_folder), *arguments]) == 2
    message = capsys.readouterr().err.splitlines()[-1]  # lines before it say what was read
    assert message.startswith("ecar: ") and word in message


def test_a_classifier_without_labels_on_either_side_is_refused_before_it_is_trained(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a traceback from inside the cross entropy, and for samples a refusal after all the work."""
    monkeypatch.setattr("ecar.evaluation.classifier.train_classifier", lambda *_, **__: pytest.fail("trained"))
    np.savez(tmp_path / "samples.npz", arr_0=noise_images(12).permute(0, 2, 3, 1).numpy())
    for data, word in ((digits_folder / "one", "no classes"), (digits_folder, "no labels")):
        command = ["evaluate", "--samples", str(tmp_path / "samples.npz"), "--num", "12", "--allow-small"]
        command += ["--data", str(data), "--train-data", str(data), "--cache", str(tmp_path / "cache")]
        assert main([*command, "--classifier", str(tmp_path / "new.safetensors")]) == 2
        assert word in capsys.readouterr().err


def test_what_can_be_refused_is_refused_before_features_of_the_reference_are_computed(
    trained: Path, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("ecar.evaluation.reference.extract", lambda *_, **__: pytest.fail("features computed"))
    judge, other = tmp_path / "judge.safetensors", tmp_path / "other.samples"
    save_classifier(Classifier(3), judge, {"class_names": ["one", "seven", "zero"], "epochs": 8, "flip": False})
    other.mkdir()
    (other / "samples.json").write_text('{"weights": "x"}')
    (tmp_path / "file.samples").write_text("")
    (tmp_path / "single").mkdir()
    shutil.copy(digits_folder / "one" / "0.png", tmp_path / "single")
    classifier = ["--classifier", str(judge), "--train-data", str(digits_folder)]
    for arguments, word in (
        (["--train-data", str(tmp_path / "nope")], "no such file or folder"),
        (["--train-data", str(tmp_path / "single")], "has 1 image"),
        ([*classifier, "--classifier-epochs", "50"], "has epochs 8: leave --classifier-epochs out"),
        (["--out", str(tmp_path / "other.json")], "holds other samples"),
        (["--out", str(tmp_path / "file.json")], "no folder can be made there"),
    ):
        command = ["evaluate", "--model", str(trained), "--data", str(digits_folder), "--num", "12", "--allow-small"]
        command += ["--cache", str(tmp_path / "cache"), "--device", "cpu", "--out", str(tmp_path / "eval.json")]
        assert main([*command, *arguments]) == 2
        assert word in capsys.readouterr().err


def test_missing_and_doubled_images_are_refused(trained: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(trained, device="cpu")
    make_samples(pipe, 6, seed=0, settings=pipe.settings(1), folder=tmp_path, record={}, batch=3)
    with pytest.raises(ValueError, match="1 of 7 images are missing, the first is 6"):
        collect(tmp_path, 7)
    (tmp_path / "ids_00000009.npz").write_bytes((tmp_path / "ids_00000003.npz").read_bytes())
    with pytest.raises(ValueError, match="image 3 is there twice"):
        collect(tmp_path, 6)


def test_samples_do_not_depend_on_batches(trained: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(trained, device="cpu")
    settings = pipe.settings(2)
    sets = [
        make_samples(pipe, 7, seed=3, settings=settings, folder=tmp_path / str(b), record={}, batch=b) for b in (7, 2)
    ]
    assert (sets[0].images.int() - sets[1].images.int()).abs().max() <= 1  # rounding of the last bit


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "no arr_0"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "float32"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, "expected N x H x W x 3"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(3, np.int64)}, "labels"),
        ({"arr_0": np.array([{"a": 1}], dtype=object)}, "not a readable"),
    ],
)
def test_wrong_samples_files_are_refused(arrays: dict[str, np.ndarray], word: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=word):
        read_samples(tmp_path / "x.npz")


def test_samples_are_read_from_a_folder_of_pictures_and_from_npy_as_from_npz(tmp_path: Path) -> None:
    """A folder was "[Errno 21] Is a directory"."""
    images = noise_images(12)
    arrays = images.permute(0, 2, 3, 1).numpy()
    for i, array in enumerate(arrays):
        (folder := tmp_path / "flat").mkdir(exist_ok=True)
        Image.fromarray(array).save(folder / f"{i}.png")
        (folder := tmp_path / "classes" / ("dog" if i % 2 else "cat")).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"{i}.png")
    np.save(tmp_path / "x.npy", arrays)
    for name in ("flat", "x.npy"):
        found = read_samples(tmp_path / name)
        assert torch.equal(found.images, images) and found.labels is None
    found = read_samples(tmp_path / "classes")
    assert torch.equal(found.images, torch.cat([images[::2], images[1::2]])) and found.labels is not None
    assert found.labels.tolist() == [0] * 6 + [1] * 6 and found.class_names == ("cat", "dog")
    check_labels("data", ("Cat", "dog"), found)
    with pytest.raises(ValueError, match="the folders of the samples are the classes cat, dog"):
        check_labels("data", ("dog", "cat"), found)


def test_labels_of_adm_are_read(tmp_path: Path) -> None:
    """Its sampler writes them as arr_1."""
    arrays = noise_images(3).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "x.npz", arrays, np.array([2, 0, 1]))
    found = read_samples(tmp_path / "x.npz")
    assert found.labels is not None and found.labels.tolist() == [2, 0, 1]
    np.savez(tmp_path / "x.npz", arrays, np.zeros((3, 8)))
    with pytest.raises(ValueError, match="arr_1 are"):
        read_samples(tmp_path / "x.npz")


def test_folders_and_files_of_samples_that_cannot_be_judged_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "sizes").mkdir()
    (tmp_path / "broken").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "sizes" / "0.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "sizes" / "1.png")
    (tmp_path / "broken" / "0.png").write_text("x")
    np.save(tmp_path / "float.npy", np.zeros((2, 8, 8, 3)))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    for name, word in (
        ("empty", "no images found"), ("sizes", "1.png has 9x8 pixels"), ("broken", "compared all together"),
        ("float.npy", "expected N x H x W x 3 uint8"), ("object.npy", "not a readable .npy"),
    ):  # fmt: skip
        command = ["evaluate", "--samples", str(tmp_path / name), "--data", str(tmp_path), "--allow-small"]
        assert main([*command, "--cache", str(tmp_path), "--out", str(tmp_path / "x.json"), "--device", "cpu"]) == 2
        message = capsys.readouterr().err.splitlines()[-1]  # lines before it say what was read
        assert message.startswith("ecar: ") and word in message


def test_samples_survive_writing(tmp_path: Path) -> None:
    samples = Samples(noise_images(5), torch.arange(5))
    write_samples(tmp_path / "x.npz", samples)
    back = read_samples(tmp_path / "x.npz")
    assert torch.equal(back.images, samples.images) and back.labels is not None
    assert back.labels.tolist() == [0, 1, 2, 3, 4]


def test_statistics_file_is_read_and_checked(tmp_path: Path) -> None:
    class Small:
        name, fingerprint, num_features = "inception", "", 3

    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    exact = Gaussian.of(x)
    np.savez(tmp_path / "ref.npz", mu=exact.mean.numpy(), sigma=exact.covariance.numpy())
    reference = read_statistics(tmp_path / "ref.npz", Small())  # type: ignore[arg-type]
    assert frechet_distance(reference.gaussian, exact) == pytest.approx(0, abs=1e-8)
    np.savez(tmp_path / "ref.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ValueError, match="4 features, but inception has 3"):
        read_statistics(tmp_path / "ref.npz", Small())  # type: ignore[arg-type]
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(ValueError, match="sigma"):
        read_statistics(tmp_path / "ref.npz", Small())  # type: ignore[arg-type]


def test_too_few_images_need_saying_so() -> None:
    extractor = get_extractor("efficientnet-lite0")
    with pytest.raises(ValueError, match="allow_small"):
        check_count(1280, extractor, False)
    check_count(1281, extractor, False)
    check_count(2, extractor, True)


def test_extractor_sees_an_image_alone_as_in_a_batch() -> None:
    extractor = EfficientNetExtractor()
    images = noise_images(4, 32)
    together, alone = extractor(images)[0], extractor(images[2:3])[0]
    assert together.shape == (4, 1280)
    assert torch.allclose(together[2], alone[0], atol=0.05 * float(together.std()))


def test_dinov2_folder_is_loaded_and_other_folders_are_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(tmp_path / "dino")
    extractor = get_extractor("dinov2", weights=str(tmp_path / "dino"))
    features, probabilities = extractor(noise_images(3))
    assert features.shape == (3, 16) == (3, extractor.num_features) and probabilities is None
    assert extractor.fingerprint == Dinov2Extractor(str(tmp_path / "dino")).fingerprint
    with pytest.raises(ValueError, match="dinov2 weights"):
        get_extractor("dinov2", weights=str(tmp_path))


def test_classifier_learns_real_digits_and_survives_saving(digits_folder: Path, tmp_path: Path) -> None:
    images, labels, names = read_images(str(digits_folder), "train", 8, 8, None)
    model = train_classifier(images, labels, len(names), epochs=40)
    found, _ = predict(model, images)
    assert accuracy(found, labels, 3)[0] > 0.95
    save_classifier(model, tmp_path / "c.safetensors", {"class_names": list(names)})
    assert torch.equal(predict(load_classifier(tmp_path / "c.safetensors", names), images)[0], found)
    with pytest.raises(ValueError, match="knows 3 classes, the reference has 6"):
        load_classifier(tmp_path / "c.safetensors", names * 2)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a classifier"):
        load_classifier(tmp_path / "x.safetensors", names)


def test_accuracy_counts_each_class_and_names_absent_ones() -> None:
    overall, each = accuracy(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 3)
    assert overall == pytest.approx(2 / 3) and each == [0.5, 1.0, None]


def test_classifier_takes_any_side() -> None:
    assert Classifier(4)(torch.zeros(2, 3, 24, 40)).shape == (2, 4)


def test_samples_that_are_there_are_kept_whatever_the_batch_size(trained: Path, tmp_path: Path) -> None:
    """A resumed evaluation made everything again, or after a smaller --batch-size refused its own files."""
    pipe = Pipeline.from_pretrained(trained, device="cpu")
    options = {"seed": 0, "settings": pipe.settings(1), "folder": tmp_path, "record": {"weights": "a"}}
    make_samples(pipe, 6, batch=4, **options)
    files = {file: file.read_bytes() for file in tmp_path.glob("ids_*.npz")}
    more = make_samples(pipe, 9, batch=2, **options)
    assert all(file.read_bytes() == before for file, before in files.items()) and len(files) == 2
    assert torch.equal(
        more.images[6:], make_samples(pipe, 9, batch=9, **options | {"folder": tmp_path / "x"}).images[6:]
    )
    with pytest.raises(ValueError, match="weights a -> b"):
        make_samples(pipe, 9, batch=2, **options | {"record": {"weights": "b"}})


def test_seconds_are_those_of_the_images_that_are_judged(trained: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(trained, device="cpu")
    options = {"seed": 0, "settings": pipe.settings(1), "folder": tmp_path, "record": {}, "batch": 8}
    whole = make_samples(pipe, 8, **options)
    assert whole.seconds > 0 and make_samples(pipe, 2, **options).seconds == pytest.approx(whole.seconds / 4)


@pytest.mark.parametrize("how", ["empty", "cut", "no ids", "json list", "json cut"])
def test_damaged_files_of_samples_are_one_error_that_names_them(how: str, trained: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(trained, device="cpu")
    options = {"seed": 0, "settings": pipe.settings(1), "folder": tmp_path, "record": {}, "batch": 8}
    make_samples(pipe, 8, **options)
    file = tmp_path / ("samples.json" if "json" in how else "ids_00000000.npz")
    if how == "no ids":
        with np.load(file) as arrays:
            np.savez(file, images=arrays["images"])
    else:
        old = file.read_bytes()
        file.write_bytes({"empty": b"", "cut": old[: len(old) // 2], "json list": b"[]", "json cut": b'{"a": '}[how])
    with pytest.raises(ValueError, match=file.name):
        make_samples(pipe, 8, **options)


def test_any_flipped_byte_of_a_samples_file_is_a_value_error_or_no_harm(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", arr_0=noise_images(2).permute(0, 2, 3, 1).numpy())
    whole = (tmp_path / "x.npz").read_bytes()
    for place in range(0, len(whole), 7):
        (tmp_path / "y.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            read_samples(tmp_path / "y.npz")
        except ValueError as error:
            assert "y.npz" in str(error)


def test_a_changed_configuration_or_tokenizer_makes_other_samples(
    trained: Path, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the weights' file was in the record of the samples: another configuration found the old ones good."""
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    command = ["evaluate", "--model", str(model), "--data", str(digits_folder), "--num", "12", "--allow-small"]
    command += ["--out", str(tmp_path / "e.json"), "--cache", str(tmp_path), "--device", "cpu"]
    assert main(command) == 0
    record = json.loads((tmp_path / "e.json").read_text())
    assert record["weights"] == weights_fingerprint(model) and record["commit"] == source_commit()
    config = json.loads((model / "config.json").read_text())
    config["model"]["velocity_std"] = [2 * value for value in config["model"]["velocity_std"]]
    (model / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(command) == 2
    assert "configuration" in capsys.readouterr().err


def test_reference_features_are_kept_read_again_and_mended(tmp_path: Path) -> None:
    """Read from the cache where they are whole; of another extractor or after damage, computed again."""

    class Counting:
        name, fingerprint, num_features, calls = "efficientnet-lite0", "a", 2, 0

        def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
            self.calls += 1
            return images.float().flatten(1)[:, :2] * self.calls, None

    extractor = Counting()

    def reference() -> torch.Tensor:
        labels = torch.zeros(5, dtype=torch.int64)
        found = reference_from_images("x", noise_images(5), labels, ("a",), extractor, tmp_path)  # type: ignore[arg-type]
        assert found.features is not None
        return found.features

    first = reference()
    assert torch.equal(reference(), first) and extractor.calls == 1
    extractor.fingerprint = "b"
    assert not torch.equal(reference(), first) and extractor.calls == 2
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:20])
    reference()
    assert extractor.calls == 3


@pytest.mark.parametrize(
    ("mu", "sigma", "word"),
    [
        ([0, np.nan, 0], np.eye(3), "not finite"),
        ([0, 0, 0], np.full((3, 3), np.inf), "not finite"),
        ([0, 0, 0], -np.eye(3), "no covariance"),
        ([0, 0, 0], np.triu(np.ones((3, 3))), "no covariance"),
        (["a", "b", "c"], np.eye(3), "real numbers"),
    ],
)
def test_statistics_that_no_images_have_are_refused(
    mu: list[object], sigma: np.ndarray, word: str, tmp_path: Path
) -> None:
    """NaN in sigma was a segmentation fault in LAPACK, after all sampling was done."""

    class Small:
        name, fingerprint, num_features = "inception", "", 3

    np.savez(tmp_path / "ref.npz", mu=np.asarray(mu), sigma=sigma)
    with pytest.raises(ValueError, match=word):
        read_statistics(tmp_path / "ref.npz", Small())  # type: ignore[arg-type]


def test_statistics_as_the_reference_of_a_command(trained: Path, digits_folder: Path, tmp_path: Path) -> None:
    """Big-endian and longdouble numbers too; there are no real features, so no KID."""
    extractor = get_extractor("efficientnet-lite0")
    images, labels, names = read_images(str(digits_folder), "train", 8, 8, None)
    real = reference_from_images("x", images, labels, names, extractor, tmp_path).gaussian
    mu, sigma = real.mean.numpy().astype(">f8"), real.covariance.numpy().astype(np.longdouble)
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    found = {}
    for data in (str(tmp_path / "ref.npz"), str(digits_folder)):
        out = tmp_path / "e.json"
        command = ["evaluate", "--model", str(trained), "--data", data, "--num", "12", "--allow-small"]
        assert main([*command, "--out", str(out), "--cache", str(tmp_path), "--device", "cpu"]) == 0
        found[data] = json.loads(out.read_text())["metrics"]
    given, from_images = found.values()
    assert given["FD-EffNetLite0"] == pytest.approx(from_images["FD-EffNetLite0"], rel=1e-4)
    assert given["against"] == "given statistics" and not any(name.startswith("KID") for name in given)


def test_a_small_reference_is_as_biased_as_few_samples(tmp_path: Path) -> None:
    """Only the samples were counted: 10,000 of them against 50 real images passed without a word."""

    class Four:
        name, fingerprint, num_features = "efficientnet-lite0", "four", 4

        def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
            return images.float().flatten(1)[:, :4], None

    extractor: Any = Four()
    for real, fake, biased in ((4, 9, True), (9, 4, True), (9, 9, False)):
        labels = torch.zeros(real, dtype=torch.int64)
        reference = reference_from_images("x", noise_images(real), labels, ("a",), extractor, tmp_path)
        assert measure(Samples(noise_images(fake), None), reference, extractor)["biased_small_sample"] is biased
    with pytest.raises(ValueError, match="--reference-num 4 is no more than the 4 features"):
        check_count(4, extractor, False, "--reference-num")


def test_class_ids_must_mean_the_same() -> None:
    def real(*names: str) -> tuple[str, tuple[str, ...]]:
        return "real", names

    def model(*names: str, count: int | None = None) -> ModelConfig:
        return tiny_config(class_names=names, num_classes=len(names) if count is None else count)

    check_classes(model("a", "b"), *real("A", "b"))
    check_classes(model("a", "b"), *real("0", "1"))
    check_classes(model("0", "1"), *real("a", "b"))
    check_classes(model(count=2), *real("a", "b"))
    for ours, theirs, word in (
        (model("3", "7"), real("0", "1"), None),  # the reference has bare ids
        (model("3", "7"), real("7", "3"), "same order"),
        (model("a", "b", "c"), real("0", "1"), "3 classes"),
        (model(), real("a", "b"), "no classes"),
    ):
        if word is None:
            check_classes(ours, *theirs)
            continue
        with pytest.raises(ValueError, match=word):
            check_classes(ours, *theirs)


def test_a_judge_of_other_classes_is_refused(tmp_path: Path) -> None:
    made: dict[str, object] = {"class_names": ["cat", "dog"]}
    save_classifier(Classifier(2), tmp_path / "judge.safetensors", made)
    judge = load_classifier(tmp_path / "judge.safetensors", ("cat", "dog"))
    again = load_classifier(tmp_path / "judge.safetensors", ("cat", "dog"))
    assert classifier_fingerprint(judge) == classifier_fingerprint(again) != classifier_fingerprint(Classifier(2))
    with pytest.raises(ValueError, match=r"made for the classes cat, dog"):
        load_classifier(tmp_path / "judge.safetensors", ("bag", "shoe"))


def test_a_classifier_of_few_steps_has_a_schedule(digits_folder: Path) -> None:
    """Exactly five steps ended in a ZeroDivisionError of the scheduler."""
    images, labels, _ = read_images(str(digits_folder), "train", 8, 8, None)
    train_classifier(images, labels, 3, epochs=5)
    with pytest.raises(ValueError, match="8 x 8"):
        train_classifier(images[:, :, :4, :4], labels, 3)


def test_long_images_keep_their_shape_before_the_extractor(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 x 256 was squashed to 128 x 128."""
    extractor, seen = EfficientNetExtractor(), []
    forward = extractor.network.forward
    monkeypatch.setattr(extractor.network, "forward", lambda x: (seen.append(tuple(x.shape[-2:])), forward(x))[1])
    for height, width in ((64, 256), (32, 32), (200, 130)):
        extractor(torch.zeros(1, 3, height, width, dtype=torch.uint8))
    assert seen == [(128, 512), (128, 128), (200, 130)]


@pytest.mark.parametrize("content", [None, b"text", {}])
def test_wrong_weights_of_the_extractor_are_refused(content: bytes | dict[str, object] | None, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / "w.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: not the weights of EfficientNet-Lite0"):
        get_extractor("efficientnet-lite0", weights=str(tmp_path / "w.pth"))


def test_dinov2_of_the_same_weights_and_other_heads_is_another_extractor(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    prints = []
    for heads in (2, 4):
        torch.manual_seed(0)
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, num_attention_heads=heads))
        model.save_pretrained(tmp_path / str(heads))
        prints.append(Dinov2Extractor(str(tmp_path / str(heads))).fingerprint)
    assert prints[0] != prints[1]


def test_broken_reference_images_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(12):
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    images, _, _ = read_images(str(tmp_path), "test", 8, 8, None)
    assert len(images) == 12 and "skipped" in (said := capsys.readouterr().err) and "broken.png" in said


def test_the_commit_is_not_that_of_a_repository_around_an_installed_package(tmp_path: Path) -> None:
    """A .venv inside the user's own checkout: records named the user's commit as ours."""
    package = tmp_path / ".venv" / "ecar"
    package.mkdir(parents=True)
    shutil.copy(commit.__file__, package / "commit.py")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True)
    spec = importlib.util.spec_from_file_location("theirs", package / "commit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.source_commit() is None

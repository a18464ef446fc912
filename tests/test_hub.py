"""Publishing and the Hub's faults, without a network: the folder, the card, the calls, one-line errors."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, errors
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import random_model, tiny_config
from ecar import Pipeline
from ecar.cli.main import main
from ecar.config import CardOptions
from ecar.hub import push, push_folder, training_record, write_folder
from ecar.pretrained import folders as weights
from ecar.pretrained.folders import resolve_model, save_model, weights_fingerprint
from ecar.tokenizers import PixelTokenizer


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What a training run leaves: final/ and a grid of samples."""
    final = tmp_path / "run" / "final"
    save_model(final, random_model(tiny_config()), PixelTokenizer(factor=1))
    training = {
        "ecar": "0.1.0",
        "lr": 1e-3,
        "data": "/home/someone/photos",
        "out": "/home/someone/run",
        "init_from": "/home/someone/base",
        "source": {"name": "/home/someone/base", "weights": "abc"},
        "device": "cpu",
    }
    (final / "training.json").write_text(json.dumps(training))
    return final


def evaluation(folder: Path, path: Path, **changes: Any) -> Path:
    record = {
        "ecar": "0.1.0", "commit": "abc1234", "command": {"data": "/home/someone/test.parquet", "num": 50},
        "weights": weights_fingerprint(folder), "seed": 0,
        "settings": {"steps": [3, 2, 2], "guidance": [1.5, 1.5, 1.0]},
        "extractor": {"name": "efficientnet-lite0"}, "reference": {"name": "/home/someone/test.parquet"},
        "metrics": {"FD-EffNetLite0": 12.5, "num": 50, "against": "100 real", "biased_small_sample": True},
    }  # fmt: skip
    path.write_text(json.dumps({**record, **changes}))
    return path


def test_a_dry_run_writes_a_folder_that_draws_the_same_images(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged, out = evaluation(run_folder, tmp_path / "eval.json"), tmp_path / "out"
    flags = ["--license", "mit", "--datasets", "someone/photos", "--evaluation", judged, "--out", out]
    assert main(["push", str(run_folder), "someone/tiny", "--dry-run", *map(str, flags)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"README.md", "config.json", "model.safetensors", "samples.png", "training.json"} <= set(told["files"])
    ours, theirs = (Pipeline.from_pretrained(f)(labels=["dog"], seeds=[3]).images[0] for f in (run_folder, out))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    text = (out / "README.md").read_text()
    card = ModelCard(text).data
    assert (card.library_name, card.license, card.datasets) == ("ecar", "mit", ["someone/photos"])
    (result,) = card.eval_results
    assert result.metric_value == 12.5 and result.metric_args["guidance"] == [1.5, 1.5, 1.0]
    assert result.metric_args["extractor"] == "efficientnet-lite0" and result.metric_args["num"] == 50
    assert result.metric_args["commit"] == "abc1234" and result.metric_args["command"].endswith("--num 50")
    assert (
        'from_pretrained("someone/tiny")' in text and "mostly bias" in text and "dog" in text and '"lr": 0.001' in text
    )
    assert all("/home/someone" not in file.read_text() for file in (*out.glob("*.json"), out / "README.md"))


def test_a_critic_is_published_with_its_model(run_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(run_folder, source)
    (source / "critic.safetensors").write_bytes(b"chooses")
    write_folder(Pipeline.from_pretrained(source), tmp_path / "out", "a/b", CardOptions(), source)
    assert (tmp_path / "out" / "critic.safetensors").read_bytes() == b"chooses"


def test_a_dry_run_that_fails_leaves_no_folder_in_the_way_of_the_next(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["push", str(run_folder), "someone/tiny", "--dry-run", "--out", str(tmp_path / "out")]
    assert main([*command, "--picture", str(tmp_path / "typo.png")]) == 2 and "typo.png" in capsys.readouterr().err
    other = evaluation(run_folder, tmp_path / "eval.json", weights="0" * 16)
    assert main([*command, "--evaluation", str(other)]) == 2 and "not these" in capsys.readouterr().err
    assert main(command) == 0


def test_pictures_of_one_average_are_not_published_with_another(run_folder: Path, tmp_path: Path) -> None:
    """The run's grids are of ``final``; the card of ``final_ema_0.5`` had them too."""
    other, out = run_folder.parent / "final_ema_0.5", tmp_path / "out"
    shutil.copytree(run_folder, other)
    (run_folder.parent / "samples").mkdir(exist_ok=True)
    Image.new("RGB", (7, 5)).save(run_folder.parent / "samples" / "step_00000009.png")
    for folder, theirs in ((run_folder, True), (other, False)):
        assert main(["push", str(folder), "someone/tiny", "--dry-run", "--out", str(out / folder.name)]) == 0
        with Image.open(out / folder.name / "samples.png") as picture:
            assert (picture.size == (7, 5)) == theirs


def test_relative_paths_of_the_machine_are_not_published_from_wherever(tmp_path: Path) -> None:
    """They were cut only where they existed from the folder that push ran in."""
    source = tmp_path / "final"
    source.mkdir()
    options = {"data": "client/photos", "init_from": "owner/model", "local_paths": ["data"]}
    (source / "training.json").write_text(json.dumps(options))
    assert training_record(source) == {"data": "photos", "init_from": "owner/model"}


def test_an_evaluation_of_other_weights_is_refused(run_folder: Path, tmp_path: Path) -> None:
    judged = evaluation(run_folder, tmp_path / "eval.json", weights="0123456789abcdef")
    pipe = Pipeline.from_pretrained(run_folder)
    with pytest.raises(ValueError, match="of weights 0123456789abcdef, not these"):
        write_folder(pipe, tmp_path / "out", "a/b", CardOptions(evaluation=str(judged)), run_folder)


class FakeApi:
    """HfApi, as far as it is used."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails = fails

    def create_repo(self, repo_id: str, **values: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **values}))

    def upload_folder(self, **values: Any) -> Any:
        if self.fails:
            raise self.fails
        files = sorted(p.name for p in Path(values["folder_path"]).iterdir())
        self.calls.append(("upload_folder", {**values, "files": files}))
        return type("Commit", (), {"commit_url": "https://huggingface.co/a/b/commit/1"})()


def test_push_creates_the_repository_and_uploads_once(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeApi()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: api)
    pipe = Pipeline.from_pretrained(run_folder)
    address = push(pipe, "someone/tiny", CardOptions(license="mit"), private=True)
    assert address.endswith("/commit/1") and [name for name, _ in api.calls] == ["create_repo", "upload_folder"]
    assert api.calls[0][1] == {"repo_id": "someone/tiny", "private": True, "exist_ok": True, "repo_type": "model"}
    model = ["config.json", "model", "model.safetensors", "model_index.json", "pipeline.py"]
    assert api.calls[1][1]["files"] == ["README.md", *model, "samples.png", "tokenizer"]


def test_push_uploads_report_and_recipe_without_places_of_the_machine(run_folder: Path) -> None:
    run = run_folder.parent
    (run / "report.html").write_text("<p>curves</p>")
    options = (
        'allow = 1\n[data]\ndata = "/home/someone/photos"\nflip = true\n[run]\nout = "/home/someone/run"\nseed = 0\n'
    )
    (run / "recipe.toml").write_text(options)
    sent: dict[str, str] = {}

    class Keeps(FakeApi):
        def upload_folder(self, **values: Any) -> Any:
            sent.update({p.name: p.read_text() for p in Path(values["folder_path"]).glob("re*")})

    push(Pipeline.from_pretrained(run_folder), "someone/tiny", source=run_folder, api=Keeps())
    assert sent["report.html"] == "<p>curves</p>"
    assert sent["recipe.toml"] == 'allow = 1\n\n[data]\ndata = "photos"\nflip = true\n\n[run]\nseed = 0\n'


def test_weights_say_whose_they_are_and_remain_the_weights_that_were_judged(run_folder: Path, tmp_path: Path) -> None:
    """Metadata changed the hash by which records name the weights; and several entries, in a new order each time."""
    ours, plain = run_folder / "model.safetensors", tmp_path / "plain" / "model.safetensors"
    plain.parent.mkdir()
    save_file(load_file(ours), plain)  # as before there were metadata
    assert weights_fingerprint(plain.parent) == weights_fingerprint(run_folder)
    assert weights_fingerprint(plain.parent) == hashlib.sha256(plain.read_bytes()).hexdigest()[:16]
    judged = evaluation(run_folder, tmp_path / "eval.json")
    card = CardOptions(license="mit", evaluation=str(judged))
    write_folder(Pipeline.from_pretrained(run_folder), tmp_path / "out", "someone/tiny", card, run_folder)
    assert facts(ours)["license"] == "not stated" and facts(ours)["model"].startswith("ecar, 8x12 pixels, 3 classes")
    tokenizer = f"pixels {PixelTokenizer(factor=1).fingerprint()}"
    assert facts(tmp_path / "out" / "model.safetensors") == {
        "model": "someone/tiny", "tokenizer": tokenizer, "license": "mit",
    }  # fmt: skip
    assert facts(run_folder / "tokenizer" / "tokenizer.safetensors") == {"tokenizer": tokenizer}
    shutil.copyfile(plain, ours)
    assert Pipeline.from_pretrained(run_folder)(labels=["dog"]).images


def facts(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = json.loads(file.metadata()["ecar"])
    return found


def test_an_upload_that_fails_is_one_line_with_a_way_out(run_folder: Path) -> None:
    for error, word in ((ConnectionError("no route"), "cannot be reached"), (PermissionError("403\nForbidden"), "403")):
        with pytest.raises(ValueError, match=word) as raised:
            push_folder(run_folder, "someone/tiny", api=FakeApi(error))
        assert "--dry-run" in str(raised.value) and "\n" not in str(raised.value)


def test_an_optimised_model_is_not_published(run_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(run_folder)
    del pipe.model.head.blocks[0]
    with pytest.raises(ValueError, match="cannot be saved"):
        write_folder(pipe, tmp_path / "out", "a/b", CardOptions())


@pytest.mark.parametrize("name", ["a/..", "a b/c", "a/b/c", "../b", "a/b--c", "justaname"])
def test_an_id_that_cannot_be_one_asks_nobody(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match=r"no Hub id|not found"):
        resolve_model(name)
    with pytest.raises(ValueError, match="no Hub id"):
        push_folder(Path("."), name, api=FakeApi())


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("info nobody/none", ""),
        ("train --data DATA --out OUT --init-from nobody/none", ""),
        ("train --data nobody/none --out OUT", " --repo-type dataset"),
        ("encode --data nobody/none --tokenizer pixels --out OUT", " --repo-type dataset"),
        ("encode --data DATA --tokenizer nobody/none --out OUT", ""),
    ],
)
def test_offline_the_message_has_the_recipe(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    """For models, data sets and tokenizers alike; those of other libraries said that a file was missing there."""
    for module in ("datasets", "diffusers"):
        pytest.importorskip(module)
    words = command.replace("DATA", str(digits_folder)).replace("OUT", str(tmp_path / "out")).split()
    assert main(words) == 2  # HF_HUB_OFFLINE=1 in all tests
    message = capsys.readouterr().err.strip()
    assert f"`hf download OWNER/NAME{kind} --local-dir" in message and len(message.splitlines()) == 1, message


def _response(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "404 Client Error.\nmore lines")
    return error


@pytest.mark.parametrize(
    ("error", "word"),
    [(errors.RepositoryNotFoundError, "no such repository"), (errors.RevisionNotFoundError, "no such revision")],
)
def test_what_the_hub_says_is_told_apart(error: type[Exception], word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, *, revision: str | None, **_: Any) -> str:
        assert (repo, revision) == ("someone/tiny", "v2")
        raise _response(error)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ValueError, match=word) as raised:
        resolve_model("someone/tiny@v2")
    assert "\n" not in str(raised.value)


def test_names_that_leave_the_folder_are_not_downloaded(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hostile repository's file list, what the patterns let through."""
    from huggingface_hub.utils import filter_repo_objects

    names = [
        "config.json",
        "tokenizer/config.json",
        "../../evil.json",
        "a/../../evil.safetensors",
        "/etc/x.json",
        "a.bin",
    ]
    kept: list[str] = []

    def download(_: str, *, allow_patterns: list[str], ignore_patterns: list[str], **__: Any) -> str:
        kept.extend(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(run_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert weights.resolve_model("someone/tiny") == run_folder
    assert kept == ["config.json", "tokenizer/config.json"]


def test_half_a_download_says_what_is_missing(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run_folder, tmp_path / "half", ignore=shutil.ignore_patterns("model.safetensors"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "half"))
    with pytest.raises(ValueError, match="missing weights"):
        Pipeline.from_pretrained("someone/tiny")


def test_what_is_published_draws_what_the_pipeline_draws(tmp_path: Path) -> None:
    """Another decoder was left behind, and a model in bfloat16 could not be written at all."""
    pipe = Pipeline(random_model(tiny_config()).bfloat16(), PixelTokenizer(factor=1))
    pipe.tokenizer.mean.fill_(0.1)  # not exact in bfloat16
    write_folder(pipe, tmp_path / "out", "someone/tiny", CardOptions())
    again = Pipeline.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    ours, theirs = (p(labels=["dog"], seeds=[3]).images[0] for p in (pipe, again))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    pipe.decoder = PixelTokenizer(factor=1)
    with pytest.raises(ValueError, match="another decoder"):
        write_folder(pipe, tmp_path / "other", "someone/tiny", CardOptions())
    assert not (tmp_path / "other").exists()

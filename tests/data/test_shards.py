"""Latent caches: shards, going on after a kill, refusals, samples of distributions."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ecar.cli import encode
from ecar.cli.main import main
from ecar.data import encoding
from ecar.data.latents import LatentTable, encode_source
from ecar.data.shards import damaged_shards, load_latents
from ecar.data.source import load_source
from ecar.files.images import CROP
from ecar.tokenizers import ConvTokenizer, PixelTokenizer, load_tokenizer
from ecar.training.build import load_table
from ecar.training.config import TrainConfig, Training
from ecar.training.draws import draw_batch


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eleven images of two classes; number 4 is broken."""
    folder = tmp_path / "photos"
    random = np.random.default_rng(0)
    for i in range(11):
        path = folder / ("cat" if i < 6 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    (folder / "cat" / "04.png").write_bytes(b"text, not an image")
    return folder


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    """A diffusers AutoencoderKL, tiny and random, factor 2."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4, scaling_factor=0.25,
    ).save_pretrained(tmp_path / "kl")  # fmt: skip
    return tmp_path / "kl"


def resolved(data: str | Path = "unused", **changes: Any) -> Training:
    """Options of a training on images of 16 pixels."""
    return TrainConfig.of(data=str(data), out="unused", resolution=(16,), device="cpu", **changes).resolve()


def arguments(data: Path, out: Path, tokenizer: object = "pixels:4", **more: object) -> list[str]:
    options = {"resolution": 16, "shard_size": 3, "batch_size": 2, "device": "cpu", **more}
    words = ["--data", str(data), "--out", str(out), "--tokenizer", str(tokenizer)]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words


def contents(folder: Path) -> dict[str, str]:
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "lock"]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_shards_hold_latents_of_both_flips_and_labels(photos: Path, tmp_path: Path) -> None:
    encode.run(arguments(photos, tmp_path / "cache", flip=True))
    record = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert [s["images"] for s in record["shards"]] == [3, 2, 3, 2] and record["images"] == 10
    assert [s["rows"] for s in record["shards"]] == [[0, 3], [3, 6], [6, 9], [9, 11]]
    assert len(record["skipped"]) == 1 and "04.png" in record["skipped"][0]
    table, tokenizer = load_latents(str(tmp_path / "cache"))
    assert table.labels.tolist() == [0] * 5 + [1] * 5 and table.class_names == ("cat", "dog") and table.mirrors == 2
    z = table.batch(torch.zeros(10, dtype=torch.int64), torch.arange(10))
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(48), atol=1e-4)  # measured over all images
    assert torch.allclose(z.transpose(0, 1).flatten(1).std(1, correction=0), torch.ones(48), atol=1e-3)
    original = (tokenizer.decode(z[4:5])[0].permute(1, 2, 0).numpy() + 1) * 127.5
    with Image.open(photos / "cat" / "05.png") as image:
        from ecar.files.images import fit

        assert np.abs(original - fit(image, 16, 16)).max() < 0.5
    mirrored = tokenizer.decode(table.batch(torch.tensor([1]), torch.tensor([4])))[0]
    assert torch.allclose(mirrored.flip(-1), tokenizer.decode(z[4:5])[0], atol=2e-3)


class Crash(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("place", range(9))
def test_encoding_crashed_at_any_write_goes_on_to_the_same_bytes(
    photos: Path, tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes: the plan, then a shard and its note four times; cache.json is the tenth. Left: half a temporary file."""
    encode.run(arguments(photos, tmp_path / "whole"))
    real, calls = encoding.write_atomically, []

    def crashes(path: Path, data: bytes) -> None:
        if len(calls) == place + 1:
            path.with_name(f"{path.name}.1.tmp").write_bytes(data[: len(data) // 2])
            raise Crash
        calls.append(path)
        real(path, data)

    monkeypatch.setattr(encoding, "write_atomically", crashes)
    with pytest.raises(Crash):
        encode.run(arguments(photos, tmp_path / "parts"))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"half written.*to go on: ecar encode --data"):
        load_table(resolved(tmp_path / "parts"))
    encode.run(arguments(photos, tmp_path / "parts"))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    encode.run(arguments(photos, tmp_path / "parts"))  # complete: nothing to do
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(150):
        Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    words = {
        name: [sys.executable, "-m", "ecar", "encode", *arguments(tmp_path / "photos", tmp_path / name, resolution=64)]
        for name in ("killed", "whole")
    }
    process = subprocess.Popen(words["killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "shard_00005.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "cache.json").exists()
    for command in words.values():
        subprocess.run(command, check=True, capture_output=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def interrupted(photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crashes(*_: Any) -> None:
        raise Crash

    monkeypatch.setattr(encoding, "_finish", crashes)
    with pytest.raises(Crash):
        encode.run(arguments(photos, out))
    monkeypatch.undo()


def test_going_on_with_other_data_tokenizer_or_crop_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cache"
    interrupted(photos, out, monkeypatch)
    with pytest.raises(ValueError, match="another tokenizer or other options"):
        encode.run(arguments(photos, out, tokenizer="pixels:2"))
    with pytest.raises(ValueError, match="shard_size 3 -> 4"):
        encode.run(arguments(photos, out, shard_size=4))
    monkeypatch.setattr(encoding, "CROP", "another")
    with pytest.raises(ValueError, match="crop cover-bicubic-centre-2 -> another"):
        encode.run(arguments(photos, out))
    monkeypatch.undo()
    shutil.copy(photos / "dog" / "07.png", photos / "dog" / "08.png")
    with pytest.raises(ValueError, match="source data changed since this cache was begun"):
        encode.run(arguments(photos, out))
    (photos / "dog" / "08.png").unlink()
    with pytest.raises(ValueError, match="11 rows then, 10 now"):
        encode.run(arguments(photos, out))


def test_a_damaged_shard_is_named(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "cache"
    interrupted(photos, out, monkeypatch)
    path = out / "shard_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard_00001.safetensors: hash mismatch"):
        encode.run(arguments(photos, out))
    encode.run(arguments(photos, tmp_path / "other"))
    shards = json.loads((tmp_path / "other" / "cache.json").read_text())["shards"]
    assert damaged_shards(tmp_path / "other", shards) == []
    path = tmp_path / "other" / "shard_00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard_00002.safetensors has \d+ bytes, not"):
        load_latents(str(tmp_path / "other"))


def test_some_images_of_a_cache_sorted_by_class_are_of_every_class(photos: Path, tmp_path: Path) -> None:
    encode.run(arguments(photos, tmp_path / "cache"))
    whole, _ = load_latents(str(tmp_path / "cache"))
    some = whole.part(flip=False, images=6)
    assert len(some) == 6 and some.labels.unique().tolist() == whole.labels.unique().tolist()
    same = [
        [int(row) for row in range(len(whole)) if torch.equal(latent, whole.batch(zeros(1), torch.tensor([row]))[0])]
        for latent in some.batch(zeros(6), torch.arange(6))
    ]
    rows = [found[0] for found in same]
    assert rows == sorted(rows) and torch.equal(whole.labels[rows], some.labels)
    memory = LatentTable(
        latents=whole.batch(zeros(len(whole)), torch.arange(len(whole)))[None], labels=whole.labels,
        class_names=whole.class_names, image_side=whole.image_side, tokenizer=whole.tokenizer, skipped=(),
    )  # fmt: skip
    parts = memory.part(flip=False, images=6), some
    assert torch.equal(*(table.batch(zeros(6), torch.arange(6)) for table in parts))


def zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


def test_data_check_finds_flipped_bits_and_missing_shards_of_a_cache(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    encode.run(arguments(photos, out))
    assert main(["data", "check", str(out)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["damaged"] == []
    path = out / "shard_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the same length: opening it shows nothing
    path.write_bytes(data)
    (out / "shard_00001.safetensors").unlink()
    with pytest.raises(SystemExit) as end:
        main(["data", "check", str(out), "--out", str(tmp_path / "report.json")])
    assert end.value.code == 1
    damaged = json.loads((tmp_path / "report.json").read_text())["damaged"]
    (out / "cache.json").write_text("[]")
    assert main(["data", "check", str(out)]) == 2 and "damaged latent cache" in capsys.readouterr().err
    assert damaged == ["shard_00000.safetensors: hash mismatch", "shard_00001.safetensors: No such file or directory"]


def test_a_cache_of_another_crop_is_refused_by_training(photos: Path, tmp_path: Path) -> None:
    encode.run(arguments(photos, tmp_path / "cache"))
    config = resolved(tmp_path / "cache")
    load_table(resolved(tmp_path / "cache", tokenizer="pixels:4"))
    with pytest.raises(ValueError, match="another tokenizer"):
        load_table(resolved(tmp_path / "cache", tokenizer="pixels:2"))
    path = tmp_path / "cache" / "cache.json"
    path.write_text(path.read_text().replace("cover-bicubic-centre-2", "adm-1"))
    with pytest.raises(ValueError, match=r"cropped by 'adm-1'.*run ecar encode again"):
        load_table(config)


def test_half_a_cache_of_another_crop_is_not_gone_on_with(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the pixels by each rule would be a data set that nobody can make again."""
    with monkeypatch.context() as before:
        before.setattr(encoding, "CROP", "adm-1")
        interrupted(photos, tmp_path / "half", before)
    with pytest.raises(ValueError, match="crop adm-1 -> cover-bicubic-centre-2"):
        encode.run(arguments(photos, tmp_path / "half"))


def test_batches_of_shards_are_those_of_the_table_in_memory(photos: Path, tmp_path: Path) -> None:
    """Same order, same values, whatever the size of the shards."""
    torch.manual_seed(0)
    made = ConvTokenizer(factor=2, widths=(4, 8), depth=1)
    made.measure([made.encode_raw(torch.rand(20, 3, 8, 8))])
    made.save(tmp_path / "tokenizer")
    memory = encode_source(load_source(str(photos)), load_tokenizer(tmp_path / "tokenizer"), (16, 16), flip=True)
    common = {"tokenizer": tmp_path / "tokenizer", "flip": True, "batch_size": 250}
    config = resolved(flip=True, batch_size=7)
    encode.run(arguments(photos, tmp_path / "one", **{**common, "shard_size": 100}))
    one, _ = load_latents(str(tmp_path / "one"))
    for step in range(1, 5):
        a, b = (draw_batch(config, table, (), 2, step) for table in (memory, one))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    encode.run(arguments(photos, tmp_path / "small", **{**common, "shard_size": 1}))
    small, _ = load_latents(str(tmp_path / "small"))
    assert len(small.shards) == 10
    for step in range(1, 5):  # encoded one by one: the last bit may differ
        a, b = (draw_batch(config, table, (), 2, step) for table in (one, small))
        assert torch.allclose(a[0], b[0], atol=5e-3) and torch.equal(a[1], b[1])


def test_shards_are_mapped_not_read(tmp_path: Path) -> None:
    """Two hundred megabytes of latents and a few rows of them: the process's own memory stays."""
    folder = tmp_path / "cache"
    tokenizer = PixelTokenizer(factor=1)
    tokenizer.save(folder / "tokenizer")
    shards = []
    for i in range(4):
        save_file({"latents": torch.full((1, 8192, 3, 32, 32), i / 4).half(), "labels": torch.zeros(8192).long()},
                  folder / f"{i}.safetensors")  # fmt: skip
        content = (folder / f"{i}.safetensors").read_bytes()
        hashed = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        shards.append({"file": f"{i}.safetensors", "images": 8192, **hashed})
    record = {
        "image_side": [32, 32], "crop": CROP, "moments": False, "encoder": "", "tokenizer": tokenizer.fingerprint(),
        "skipped": [], "data": {},
        "shift": [0, 0, 0], "scale": [1, 1, 1], "class_names": [], "shards": shards,
    }  # fmt: skip
    (folder / "cache.json").write_text(json.dumps(record))
    code = f"""
import torch
from ecar.data.shards import load_latents
def used(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))
before = used()
table, _ = load_latents({str(folder)!r})
rows = torch.arange(0, len(table), 500)
assert table.batch(torch.zeros_like(rows), rows)[:, 0, 0, 0].unique().tolist() == [0, 0.25, 0.5, 0.75]
print(used() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60_000, done.stdout  # kB; the shards have 200,000


def test_training_draws_samples_of_a_distribution_that_depend_on_seed_and_step_only(
    photos: Path, autoencoder: Path, tmp_path: Path
) -> None:
    encode.run(arguments(photos, tmp_path / "kl-cache", autoencoder))
    encode.run(arguments(photos, tmp_path / "mode", autoencoder, posterior="mode"))
    table, tokenizer = load_latents(str(tmp_path / "kl-cache"))
    mode, _ = load_latents(str(tmp_path / "mode"))
    shard = load_file(tmp_path / "kl-cache" / "shard_00000.safetensors")
    assert shard["logvar"].shape == shard["latents"].shape == (1, 3, 4, 8, 8)
    assert "logvar" not in load_file(tmp_path / "mode" / "shard_00000.safetensors")
    config = resolved(batch_size=4)
    batches = [draw_batch(config, table, (), 2, step)[0] for step in (1, 1, 2)]
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])
    # Moments of many samples are those of the encoder, in the units of the tokenizer.
    with Image.open(photos / "cat" / "02.png") as image:
        from ecar.files.images import fit, to_signed

        pixels = torch.from_numpy(to_signed(fit(image, 16, 16))).permute(2, 0, 1)[None]
    mean, logvar = tokenizer.encode_moments(pixels)
    assert logvar is not None
    zero, row = torch.tensor([0]), torch.tensor([2])
    samples = torch.cat([table.batch(zero, row, seed) for seed in range(800)])
    wanted = torch.exp(0.5 * logvar) / tokenizer.std.view(1, -1, 1, 1)
    assert torch.allclose(samples.mean(0), tokenizer.normalize(mean)[0], atol=0.2)
    assert torch.allclose(samples.std(0), wanted[0], rtol=0.2)
    assert torch.allclose(table.batch(zero, row)[0], tokenizer.normalize(mean)[0], atol=5e-3)
    assert torch.equal(mode.batch(zero, row, 1), mode.batch(zero, row, 2))
    rows = torch.arange(len(table)).repeat(200)
    z = table.batch(torch.zeros_like(rows), rows, 5)
    assert torch.allclose(z.transpose(0, 1).flatten(1).std(1), torch.ones(4), atol=0.03)  # of samples, not of means


def test_bad_images_stop_or_pass_by_policy(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a bad image: .*04.png"):
        encode.run(arguments(photos, tmp_path / "a", bad_images="stop"))
    with pytest.raises(ValueError, match=r"1 bad images of the first 5"):
        encode.run(arguments(photos, tmp_path / "b", max_bad_share=0))
    with pytest.raises(SystemExit, match="2"):
        encode.run(arguments(photos, tmp_path / "c", bad_images="ignore"))
    with pytest.raises(ValueError, match="share of bad images"):
        encode.run(arguments(photos, tmp_path / "c", max_bad_share=2))
    encode.run(arguments(photos, tmp_path / "a"))  # the policy may change on the way
    assert json.loads((tmp_path / "a" / "cache.json").read_text())["images"] == 10


@pytest.mark.slow
def test_photographs_go_from_a_folder_through_an_autoencoder_to_samples(autoencoder: Path, tmp_path: Path) -> None:
    """Encode with both flips, train, sample: the loss falls, and pictures have the size of the photographs."""
    from ecar.sampling.pipeline import Pipeline
    from ecar.training.loop import train

    random = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (3, 4, 3), np.uint8)).resize((40, 30)).save(path)
    words = arguments(tmp_path / "photos", tmp_path / "cache", autoencoder, resolution=32, flip=True, shard_size=5)
    encode.run(words)
    config = TrainConfig.of(
        data=str(tmp_path / "cache"), out=str(tmp_path / "run"), resolution=(32,), flip=True, preset="32x2x1+1",
        max_steps=40, batch_size=8, lr=3e-3,
        device="cpu", dtype="fp32",
    )  # fmt: skip
    final = train(config)
    records = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < 0.9 * losses[0]
    images = Pipeline.from_pretrained(final)(["a", "b"], seeds=[0, 1]).images
    assert [image.size for image in images] == [(32, 32)] * 2

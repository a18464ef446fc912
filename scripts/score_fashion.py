"""Score a class-conditional Fashion-MNIST model: classifier, Frechet distance, nearest neighbours.

    python scripts/score_fashion.py --data data/fashion --model fashion --out docs/results/fashion.json

- classifier: a small convolutional network trained here on the real training images (its accuracy on the real test
  images is printed beside the result); share of class-balanced samples that it assigns to the class asked for.
- FD-EffNetLite0: Frechet distance between EfficientNet-Lite0 features (images enlarged to 128 pixels) of N samples
  and of the N test images, beside the floor (N training images) and the autoencoder's own reconstructions.
- FD-classifier: the same in the classifier's feature space, which no part of the model was trained with.
- nearest neighbours: L2 distance in pixels of samples to the closest training image, beside that of test images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from results import write_result
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ecar import Pipeline
from ecar.cli.options import source_commit
from ecar.data.source import ImageReport, iterate_images, load_source
from ecar.features import EfficientNetLite0


class Classifier(nn.Module):
    """(B, 1, 32, 32) in [-1, 1] -> logits (B, 10); ``features`` gives the 128 numbers before them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128 * 16, 128), nn.ReLU(),
        )  # fmt: skip
        self.out = nn.Linear(128, 10)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images.mean(1, keepdim=True))

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.features(images))


class Extractor(nn.Module):
    """What torchmetrics asks for: uint8 images -> features."""

    def __init__(self, kind: str, classifier: Classifier) -> None:
        super().__init__()
        self.network: nn.Module = EfficientNetLite0() if kind == "effnet" else classifier
        self.kind, self.num_features = kind, 1280 if kind == "effnet" else 128

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 127.5 - 1
        if self.kind == "effnet":
            x = F.interpolate(x, size=(128, 128), mode="bilinear", align_corners=False)
            with torch.autocast("cpu", torch.bfloat16):
                return self.network(x.contiguous(memory_format=torch.channels_last)).float()
        return self.network.features(x)  # type: ignore[operator]


def read(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels."""
    batches = list(
        iterate_images(load_source(str(data / f"{split}.parquet")), 32, 32, batch_size=5000, report=ImageReport())
    )
    images = torch.from_numpy(np.concatenate([b[0] for b in batches])).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(np.concatenate([b[1] for b in batches]))


def signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def train_classifier(images: Tensor, labels: Tensor, epochs: int) -> Classifier:
    torch.manual_seed(1234)
    model = Classifier()
    steps = epochs * len(images) // 256
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (256,))
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(signed(images[rows])).float(), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def load_classifier(path: Path) -> Classifier:
    """The classifier that an earlier run trained."""
    model = Classifier()
    model.load_state_dict(load_file(path))
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> list[float]:
    """Overall, then per class."""
    right = torch.cat([model(signed(part)).argmax(1) for part in images.split(1000)]) == labels
    return [right.float().mean().item()] + [right[labels == c].float().mean().item() for c in range(10)]


@torch.no_grad()
def frechet(extractor: Extractor, real: Tensor, others: dict[str, Tensor]) -> dict[str, float]:
    """Distance of every set to ``real`` (torchmetrics: float64 sums, eigenvalues)."""
    metric = FrechetInceptionDistance(feature=extractor, reset_real_features=False, input_img_size=(3, 32, 32))
    for part in real.split(250):
        metric.update(part, real=True)
    result = {}
    for name, images in others.items():
        for part in images.split(250):
            metric.update(part, real=False)
        result[name] = round(float(metric.compute()), 6)
        metric.reset()
    return result


def nearest(images: Tensor, reference: Tensor) -> Tensor:
    """Root-mean-square pixel distance (values in [0, 1]) to the closest reference image, by matrix products."""
    a, b = (x[:, 0].flatten(1).float() / 255 for x in (images, reference))
    squared = (a**2).sum(1, keepdim=True) + (b**2).sum(1) - 2 * a @ b.T
    return (squared.min(1).values.clamp_min(0) / a.shape[1]).sqrt()


def sample(
    pipe: Pipeline, count: int, guidance: float | None, steps: tuple[int, ...] | None, solver: str | None = None
) -> tuple[Tensor, Tensor, float]:
    """Class-balanced samples (N, 3, 32, 32) uint8, labels, seconds."""
    labels = [i % 10 for i in range(count)]
    start = time.perf_counter()
    output = pipe(labels, seeds=range(count), guidance=guidance, steps=steps, solver=solver, batch_size=250)
    images = torch.from_numpy(np.stack([np.asarray(i) for i in output.images])).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(labels), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder written by scripts/fashion_mnist.py")
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--guidance", type=float, default=None, help="second run with guidance; default: none")
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument(
        "--classifier", type=Path, default=Path("classifier.safetensors"), help="trained once, kept here"
    )
    parser.add_argument("--no-reconstruction", action="store_true")
    parser.add_argument("--skip-fd", action="store_true", help="classifier only")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    test, test_labels = read(args.data, "test")
    train, train_labels = read(args.data, "train")
    if args.classifier.exists():
        classifier = load_classifier(args.classifier)
    else:
        classifier = train_classifier(train, train_labels, epochs=6)
        save_file(classifier.state_dict(), args.classifier)
    pipe = Pipeline.from_pretrained(args.model)
    steps = tuple(args.steps) if args.steps else None
    record: dict[str, object] = {
        "model": args.model,
        "commit": source_commit(),
        "num": args.num,
        "classifier_accuracy_on_real_test": accuracy(classifier, test, test_labels)[0],
    }
    sets: dict[str, Tensor] = {}
    for name, guidance in (("unguided", 1.0), ("guided", args.guidance)):
        if guidance is None:
            continue
        images, labels, seconds = sample(pipe, args.num, guidance, steps)
        scores = accuracy(classifier, images[:1000], labels[:1000])
        distances = nearest(images[:1000], train)
        record[name] = {
            "settings": pipe.settings(steps, guidance).to_json(),
            "seconds": round(seconds, 1),
            "classifier_accuracy_1000": scores[0],
            "classifier_accuracy_per_class": dict(zip(pipe.class_names, scores[1:], strict=True)),
            "nearest_training_image_rms": {"median": float(distances.median()), "min": float(distances.min())},
        }
        sets[name] = images
        print(name, record[name], flush=True)
    real = nearest(test[:1000], train)
    record["nearest_of_test_images_rms"] = {"median": float(real.median()), "min": float(real.min())}
    if not args.skip_fd:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        sets["floor: training images"] = train[order][: args.num]
        if not args.no_reconstruction:
            decoded = [pipe.tokenizer.decode(pipe.tokenizer.encode(signed(p))) for p in train[: args.num].split(500)]
            sets["reconstructions of training images"] = ((torch.cat(decoded) + 1) * 127.5).round().byte()
        for label, kind in (("FD-EffNetLite0", "effnet"), ("FD-classifier", "classifier")):
            record[f"{label} at N={args.num} against test"] = frechet(
                Extractor(kind, classifier), test[: args.num], sets
            )
    write_result(record, args.out)


if __name__ == "__main__":
    main()

"""Classifiers of real images, which say how many samples show the class asked for: a small convolutional network, and a
linear one on features of a frozen network, which takes seconds where the network takes hours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ecar.config import same_names
from ecar.devices import images_at_once, mixed_precision
from ecar.evaluation.extractors import state_fingerprint
from ecar.files.access import check_readable
from ecar.files.tensors import write_tensors

_RIDGE = 0.1  # of the linear classifier, as a share of the images


class Classifier(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> logits (B, K): four residual stages of convolutions, mean over positions.

    Attributes:
        made: how it was trained: data, their classes, epochs, mirrored or not.
    """

    made: dict[str, object]

    def __init__(self, num_classes: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(3, width)]
        for level in range(3):
            channels = width * 2**level
            layers += [_Residual(channels), nn.MaxPool2d(2), _conv(channels, 2 * channels)]
        self.body = nn.Sequential(*layers, _Residual(8 * width))
        self.out = nn.Linear(8 * width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer reads, (B, 8 width)."""
        return self.body(images.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.features(images))


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _conv(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


def train_classifier(
    images: Tensor, labels: Tensor, num_classes: int, *, epochs: int = 8, flip: bool = False, seed: int = 0
) -> Classifier:
    """Train on real images (N, 3, H, W) uint8 with shifts of up to an eighth of the side, mirrored if asked for.

    Raises:
        ValueError: fewer than two images, or a side below 8 pixels.
    """
    if len(images) < 2 or min(images.shape[-2:]) < 8:
        raise ValueError(f"a classifier needs two images of 8 x 8 pixels at least, got {tuple(images.shape)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(num_classes)
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(256, len(images))
    steps = max(6, epochs * len(images) // batch_size)  # the schedule of fewer than six has no second part
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
    count = images_at_once(*images.shape[-2:], most=batch_size)
    for _ in tqdm(range(steps), desc="classifier", disable=None):
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        shift = _draw_shift(images, generator)
        mirrored = flip and bool(torch.rand((), generator=generator) < 0.5)
        optimizer.zero_grad()
        for some in rows.split(count):  # large images: batch norms see a part at a time
            part = _shifted(images[some], shift)
            with mixed_precision("cpu"):
                logits = model(_signed(part.flip(-1) if mirrored else part))
            loss = F.cross_entropy(logits.float(), labels[some], label_smoothing=0.05)
            (loss * (len(some) / batch_size)).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def predict(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class (N,) and features (N, D) of images (N, 3, H, W) uint8."""
    count = images_at_once(*images.shape[-2:], most=500)
    features = torch.cat([model.features(_signed(part)) for part in images.split(count)])
    return model.out(features).argmax(1), features


def accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> tuple[float, list[float | None]]:
    """Share of images that are recognised as the class asked for: overall, and per class (None: no such image)."""
    right = (predicted == labels).double()
    each = [float(right[labels == c].mean()) if bool((labels == c).any()) else None for c in range(num_classes)]
    return float(right.mean()), each


def save_classifier(model: Classifier, path: Path, record: dict[str, object]) -> None:
    """Weights and how they were made, as safetensors."""
    model.made = record
    write_tensors(path, model.state_dict(), {"ecar": json.dumps(record)})


def load_classifier(path: Path, class_names: tuple[str, ...]) -> Classifier:
    """The classifier in a file; its ``made`` says how it was trained.

    Raises:
        ValueError: not such a file, or made for other classes than these.
    """
    check_readable(path)
    try:
        with safe_open(path, "pt") as file:
            made = json.loads((file.metadata() or {})["ecar"])
        known = tuple(made["class_names"])
        state = load_file(path)
        outputs, channels = state["out.weight"].shape
        model = Classifier(outputs, channels // 8)
        model.load_state_dict(state)
        model.made = made
    except Exception as error:
        raise ValueError(f"--classifier {path}: not a classifier of ecar evaluate ({type(error).__name__})") from error
    if outputs != len(class_names):
        raise ValueError(f"--classifier {path}: knows {outputs} classes, the reference has {len(class_names)}")
    if not same_names(known, class_names):
        raise ValueError(
            f"--classifier {path}: was made for the classes {', '.join(known[:5])}, ..., the reference has "
            f"{', '.join(class_names[:5])}, ...; make another, under another name"
        )
    return model.eval()


def classifier_fingerprint(model: Classifier) -> str:
    """SHA-256 (16 hex digits) of the weights: classifiers with the same one say the same."""
    return state_fingerprint(model.state_dict())


def linear_classifier(features: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Features (N, D) -> class ids (N,), by ridge regression of the classes on standardised features."""
    mean, std = features.double().mean(0), features.double().std(0).clamp_min(1e-6)

    def inputs(features: Tensor) -> Tensor:
        return torch.cat([(features.double() - mean) / std, torch.ones(len(features), 1, dtype=torch.float64)], 1)

    x, y = inputs(features), F.one_hot(labels, classes).double()
    ridge = _RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
    return lambda features: (inputs(features) @ weights).argmax(1)


def _draw_shift(images: Tensor, generator: torch.Generator) -> tuple[int, int]:
    """Rows and columns, each in 0 .. a quarter of the smaller side; the middle is no shift."""
    dy, dx = torch.randint(0, 2 * (min(images.shape[-2:]) // 8) + 1, (2,), generator=generator).tolist()
    return dy, dx


def _shifted(images: Tensor, shift: tuple[int, int]) -> Tensor:
    """The images moved by one shift, edges repeated."""
    (height, width), (dy, dx) = images.shape[-2:], shift
    reach = min(height, width) // 8
    padded = F.pad(images.float(), (reach,) * 4, mode="replicate")
    return padded[:, :, dy : dy + height, dx : dx + width]


def _signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1

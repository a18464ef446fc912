"""The linear classifier."""

from __future__ import annotations

import torch

from ecar.evaluation.classifier import linear_classifier


def test_linear_regression_tells_classes_apart_that_lie_apart() -> None:
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (200,), generator=draws)
    features = 5 * torch.eye(3)[labels] + torch.randn(200, 3, generator=draws)
    classify = linear_classifier(features[:100], labels[:100], 3)
    assert (classify(features[100:]) == labels[100:]).double().mean() > 0.95

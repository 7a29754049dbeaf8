"""A small classifier, trained once per data set, whose features stand in for Inception's on small images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from flowanchor.base.files import read_note, write_json, write_tensors
from flowanchor.base.locking import only_one
from flowanchor.base.pixels import from_uint8
from flowanchor.base.rank_zero import rank_zero_info
from flowanchor.data.epoch_sampler import EpochBatchSampler
from flowanchor.data.images import ImageSet
from flowanchor.errors import ConfigError
from flowanchor.metrics.storage import cache_folder

FEATURES = 64
GRID = 4  # spatial size before the features


@dataclass(frozen=True)
class ClassifierSpec:
    """Everything that the trained weights depend on, besides the data."""

    channels: int
    size: int
    num_classes: int
    seed: int = 0
    steps: int = 400
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    version: int = 1  # of the architecture and training below


class SmallClassifier(nn.Module):
    """Convolutions down to a grid of 4 x 4, then `FEATURES` features and the logits.

    `forward`: uint8 [B, C, H, W] -> (features [B, 64], logits [B, num_classes]).
    """

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(spec.channels, 32, stride=1)]
        width, side = 32, spec.size
        while side > 2 * GRID:  # large images: halve first, the cost is in the resolution
            layers.append(_convolution(width, min(2 * width, 64), stride=2))
            width, side = min(2 * width, 64), -(-side // 2)
        layers += [_convolution(width, 64, stride=1), _convolution(64, 64, stride=2)]
        self.convolutions = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(GRID), nn.Flatten())
        self.features = nn.Linear(64 * GRID * GRID, FEATURES)
        self.logits = nn.Linear(FEATURES, spec.num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = functional.relu(self.features(self.convolutions(from_uint8(images))))
        return features, self.logits(features)


def _convolution(channels: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.GroupNorm(8, width), nn.ReLU(inplace=True)
    )


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier in evaluation mode, and what is known about it."""

    model: SmallClassifier
    key: str  # of the cache: a hash of the data's content and of the spec
    heldout_accuracy: float
    path: Path


def cached_classifier(
    train: ImageSet, heldout: ImageSet, spec: ClassifierSpec, cache_dir: str | Path, name: str
) -> TrainedClassifier:
    """The classifier of this data from the cache, trained first where it is not there yet.

    The cache holds `classifier-<key>.safetensors` and a `.json` that says what it is.
    """
    settings = asdict(spec)
    key = hashlib.sha256(json.dumps([settings, train.digest()], sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder(cache_dir) / f"classifier-{key}.safetensors"
    card = _card(path)
    if card is None:
        doing = f"training the classifier of {name} (on the CPU, once)"
        with only_one(path, doing):  # of two evaluations side by side
            card = _card(path)
            if card is None:
                model = train_classifier(train, spec, doing)
                right = accuracy(model, heldout)
                card = {"data": name, "spec": settings, "heldout_accuracy": right, "samples": len(train)}
                _store(model, card, path)
                rank_zero_info(f"It is right about {right:.1%} of held-out images: {path}")
    model = SmallClassifier(spec)
    model.load_state_dict(load_file(path))
    return TrainedClassifier(model.eval().requires_grad_(False), key, card["heldout_accuracy"], path)


def _card(path: Path) -> Any:
    """What is known of the classifier that lies there; None where there is none."""
    return read_note(path.with_suffix(".json")) if path.is_file() else None


def train_classifier(train: ImageSet, spec: ClassifierSpec, description: str = "classifier") -> SmallClassifier:
    """Train on the labelled images with a one-cycle learning rate; the global random state is left as it was."""
    assert train.labels is not None
    labels = torch.as_tensor(train.labels, dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = SmallClassifier(spec).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, spec.learning_rate, total_steps=spec.steps)
    order = EpochBatchSampler(len(train), min(spec.batch_size, len(train)), spec.seed)
    batches = _endless(order)
    with torch.enable_grad():
        for _ in track(range(spec.steps), description=description, transient=True):
            indices = next(batches)
            _, logits = model(train.stack(indices))
            loss = functional.cross_entropy(logits, labels[indices])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: SmallClassifier, images: ImageSet, batch_size: int = 250) -> float:
    """Share of the images whose class is the largest logit."""
    assert images.labels is not None
    labels = torch.as_tensor(images.labels)
    correct = 0
    for start in range(0, len(images), batch_size):
        indices = range(start, min(start + batch_size, len(images)))
        correct += int((model(images.stack(indices))[1].argmax(1) == labels[indices.start : indices.stop]).sum())
    return correct / len(images)


def _endless(order: EpochBatchSampler) -> Iterator[list[int]]:
    epoch = 0
    while True:
        order.set_epoch(epoch)
        yield from order
        epoch += 1


def _store(model: nn.Module, card: dict[str, Any], path: Path) -> None:
    """The weights, then the card that says that they are there; two programs may do so at once."""
    try:
        write_tensors(path, model.state_dict(), shared=True)
        write_json(path.with_suffix(".json"), card, shared=True)
    except OSError as error:
        raise ConfigError(
            f"The metric's classifier cannot be stored in {path.parent} ({error}): add metric.cache_dir=FOLDER with a "
            "folder that can be written to."
        ) from error

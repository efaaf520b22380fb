"""Train the feature extractors that ship in src/robustdiff/metrics/weights/.

    python scripts/train_extractors.py [NAME …] [--output FOLDER]

Each is a classifier of its dataset; accuracy on images it was not trained on is printed and recorded in the
file's metadata. `digits` has no test split: a fifth of it, drawn with the seed, is held out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from robustdiff.data import load_dataset, to_unit
from robustdiff.metrics.extractors.classifier import Classifier

OUTPUT = Path(__file__).parents[1] / "src/robustdiff/metrics/weights"
SEED = 0
BATCH = 128
# widths of the stages and epochs
SETTINGS: dict[str, tuple[list[int], int]] = {
    "digits": ([32, 64], 60),
    "fashion-16": ([32, 64, 64], 10),
    "fashion-mnist": ([32, 64, 64], 8),
}


def load_split(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images uint8 (N, C, H, W) and labels (N,), then those of the test."""
    train = load_dataset(name)
    images, labels = train.__getitems__(range(len(train)))[:2]
    assert labels is not None
    if name == "digits":
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
        images, labels = images[order], labels[order]
        cut = len(labels) * 4 // 5
        return images[:cut], labels[:cut], images[cut:], labels[cut:]
    test = load_dataset(name, split="test")
    test_images, test_labels = test.__getitems__(range(len(test)))[:2]
    assert test_labels is not None
    return images, labels, test_images, test_labels


@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Fraction of images uint8 (N, C, H, W) whose largest logit is at their label."""
    hits = 0
    for start in range(0, len(labels), 1000):
        batch = slice(start, start + 1000)
        hits += int((classifier(to_unit(images[batch])).argmax(1) == labels[batch]).sum())
    return hits / len(labels)


def train(name: str) -> tuple[Classifier, float]:
    """Train one classifier; returns it and its test accuracy."""
    widths, epochs = SETTINGS[name]
    images, labels, test_images, test_labels = load_split(name)
    torch.manual_seed(SEED)
    classifier = Classifier(images.shape[1], images.shape[2], widths, dim=64, num_classes=10)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    start = time.monotonic()
    for epoch in range(epochs):
        order = torch.randperm(len(images))
        for index in order[: len(images) // BATCH * BATCH].view(-1, BATCH):
            loss = criterion(classifier(to_unit(images[index])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        score = accuracy(classifier, test_images, test_labels)
        print(
            f"{name}: epoch {epoch + 1}/{epochs}, accuracy {score:.4f}, {time.monotonic() - start:.0f} s",
            flush=True,
        )
    return classifier, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(SETTINGS)}; by default all")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(SETTINGS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or SETTINGS:
        classifier, score = train(name)
        path = arguments.output / f"{name}.safetensors"
        classifier.save(path, dataset=name, seed=str(SEED), test_accuracy=f"{score:.4f}")
        print(f"{path}: {path.stat().st_size:,} bytes, test accuracy {score:.4f}")


if __name__ == "__main__":
    main()

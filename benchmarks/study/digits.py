"""Digits: scikit-learn's 1797 handwritten digits, for quick tests."""

from collections.abc import Iterator

import torch

from benchmarks.study.data import TEST, Batch, generator
from octav_fx import demo


class Digits:
    """Images [N, 1, 16, 16] with mean 0 and variance 1, labels [N]; a quarter is for testing, of the rest another."""

    def __init__(self, seed: int, batch: int, judged: str = TEST) -> None:
        self.seed, self.size = seed, batch
        # The split is the same for every seed.
        source = demo.digits(0)
        # The demo's are 64 x 64 with three equal channels, scaled up from 8 x 8.
        self.images = source.train_images[:, :1, 2::4, 2::4].contiguous()
        self.test_images = source.test_images[:, :1, 2::4, 2::4].contiguous()
        self.labels, self.test_labels = source.train_labels, source.test_labels
        if judged != TEST:
            first = len(self.images) // 4
            self.images, self.test_images = self.images[first:], self.images[:first]
            self.labels, self.test_labels = self.labels[first:], self.labels[:first]

    def batch(self, step: int) -> Batch:
        """Draw images with replacement."""
        chosen = torch.randint(len(self.images), (self.size,), generator=generator(3, self.seed, step))
        return self.images[chosen], self.labels[chosen]

    def test(self) -> Iterator[Batch]:
        """Return the quarter, in one batch."""
        yield self.test_images, self.test_labels

"""Handwritten digits: the 1,797 images of 8 x 8 pixels that come with scikit-learn, in two halves.

The images are the test set of Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits" (UCI, 1998): counts of
inked pixels, 0 … 16, in the cells of a grid. The network that ships with the package was trained on the first half.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.data.pictures import Pictures
from ddpm_fast.seeding import keyed_generator

CLASSES = 10
INK = 16  # value of the darkest pixel
SPLIT_STREAM = 5


class Digits(NamedTuple):
    """The images, float32 [N, 1, 8, 8] on [-1, 1] with ink +1, and their digits, int64 [N]."""

    images: Tensor
    labels: Tensor


def halves() -> tuple[Digits, Digits]:
    """Return the digits for training, and as many that are held out.

    The split is random but always the same, and takes half of every class.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the digits come with scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / (INK / 2) - 1
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=keyed_generator(SPLIT_STREAM, 0), dtype=torch.int64, device="cpu")
    order = order[labels[order].argsort(stable=True)]  # shuffled within every class
    first, second = order[0::2].sort().values, order[1::2].sort().values
    return Digits(images[first], labels[first]), Digits(images[second], labels[second])


def training() -> Pictures:
    """Return the first half as training data, with labels."""
    images, labels = halves()[0]
    return Pictures(images, "digits", labels=labels, classes=[str(digit) for digit in range(CLASSES)])

"""Measure the quality of a digit model by a classifier, the spread within classes, and the nearest real digits.

    python -m benchmarks.study.digits_quality [MODEL] [--count 500]

The model was trained on one half of the data, the seen half. A support vector machine learns the unseen half. The
accuracy of a model is how often the machine reads the class that was asked for. Distances are root mean squares of
pixels on [-1, 1]. The samples of a model that repeats its training data are always nearer to the seen half than to the
unseen half, which is as large. The samples of a model that does not repeat it are nearer to the seen half only half of
the time. The result is written to benchmarks/results/digits__quality.json.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from sklearn.svm import SVC
from torch import Tensor

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import Row, write_result
from ddpm_fast.data.digits import CLASSES, Digits, halves
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.sample import SampleOptions, sample

if TYPE_CHECKING:
    from typing_extensions import Unpack

GUIDANCES = (None, 1.0, 1.5, 2.0, 4.0)


class Ruler:
    """A measure of digits, made from both halves of the data.

    Attributes:
        seen: The half that the model was trained on.
        unseen: The half that the classifier learns.
        classifier: The support vector machine.
    """

    def __init__(self) -> None:
        self.seen, self.unseen = halves()
        self.classifier = SVC(C=10.0).fit(self.unseen.images.flatten(1), self.unseen.labels)
        self._spread = spread(Digits(*(torch.cat(pair) for pair in zip(self.seen, self.unseen, strict=True))))

    def __call__(self, digits: Digits, labelled: bool = True) -> Row:
        """Measure digits.

        Args:
            digits: The digits.
            labelled: Whether the labels count. Otherwise the labels are those that the classifier reads.
        """
        read = torch.from_numpy(self.classifier.predict(digits.images.flatten(1)))
        labels = digits.labels if labelled else read
        diversity = spread(Digits(digits.images, labels)) / self._spread
        right = read == labels
        return {
            "accuracy": right.double().mean().item() if labelled else None,
            "accuracy_by_class": [right[labels == k].double().mean().item() for k in range(CLASSES)],
            "share_by_class": [(labels == k).double().mean().item() for k in range(CLASSES)],
            "diversity": diversity.mean().item(),
            "diversity_by_class": diversity.tolist(),
            **_compared(nearest(digits.images, self.seen.images), nearest(digits.images, self.unseen.images)),
        }

    def data(self) -> Row:
        """Measure the data: the classifier reads the seen half, and every digit is compared with all others."""
        seen, unseen = self.seen.images, self.unseen.images
        to_seen = torch.cat([nearest(seen, seen, others=True), nearest(unseen, seen)])
        to_unseen = torch.cat([nearest(seen, unseen), nearest(unseen, unseen, others=True)])
        return {**self(self.seen), **_compared(to_seen, to_unseen)}


def spread(digits: Digits) -> Tensor:
    """Return the mean distance between two digits of every class, [CLASSES]; NaN for a class without two digits."""
    side = math.sqrt(digits.images[0].numel())
    classes = [digits.images[digits.labels == k].flatten(1) for k in range(CLASSES)]
    return torch.stack([torch.pdist(images).mean() / side for images in classes])


def nearest(images: Tensor, among: Tensor, others: bool = False) -> Tensor:
    """Return the distance of every image to the nearest image in `among`, [N].

    Args:
        images: The images.
        among: The candidates.
        others: Whether `among` are the same images, so that each is compared with the others only.
    """
    distances = torch.cdist(images.flatten(1), among.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    if others:
        distances.fill_diagonal_(math.inf)
    return distances.min(1).values / math.sqrt(images[0].numel())


def _compared(to_seen: Tensor, to_unseen: Tensor) -> dict[str, float]:
    share = (to_seen < to_unseen).double().mean().item()
    return {
        "to_seen_median": to_seen.median().item(),
        "to_unseen_median": to_unseen.median().item(),
        "to_seen_smallest": to_seen.min().item(),
        "nearer_to_seen": share,
        "nearer_to_seen_error": math.sqrt(share * (1 - share) / len(to_seen)),
    }


def draw_digits(model: str, count: int, guidance: float | None, **options: Unpack[SampleOptions]) -> Digits:
    """Return samples of a model, with the seeds 0 … count - 1 and the classes in turn.

    Args:
        model: The name or the folder of a checkpoint.
        count: The number of samples.
        guidance: The guidance scale. None draws without a class.
        options: More options of `sample`.
    """
    checkpoint = load_checkpoint(model)
    assert checkpoint.classes is not None
    labels, none = torch.arange(count) % CLASSES, torch.full((count,), checkpoint.classes.none or CLASSES)
    keyword = checkpoint.classes.keyword
    all_options: SampleOptions = {
        **options,
        "config": checkpoint.diffusion,
        "model_kwargs": {keyword: none if guidance is None else labels},
        "seeds": 0,
    }
    if guidance is not None and guidance != 1:
        all_options |= {"guidance_scale": guidance, "uncond_kwargs": {keyword: none}}
    return Digits(sample(checkpoint.model, (count, *checkpoint.shape), **all_options), labels)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", nargs="?", default="digits", help="a checkpoint folder (default: the embedded model)")
    parser.add_argument("--count", type=int, default=500, help="samples of each setting (default: %(default)s)")
    given = parser.parse_args()
    ruler = Ruler()
    rows: list[Row] = [{"digits": "data", "guidance": None, "count": len(ruler.seen.labels), **ruler.data()}]
    for guidance in GUIDANCES:
        samples = draw_digits(given.model, given.count, guidance)
        measured = ruler(samples, labelled=guidance is not None)
        rows.append({"digits": "samples", "guidance": guidance, "count": given.count, **measured})
        print({key: value for key, value in rows[-1].items() if not isinstance(value, list)}, flush=True)
    training = load_checkpoint(given.model).about["training"]
    print(write_result("digits__quality", rows, training=training))


if __name__ == "__main__":
    main()

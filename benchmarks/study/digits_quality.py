"""How good is a digit model? An independent classifier, the spread within classes, and the nearest real digits.

    python -m benchmarks.study.digits_quality [MODEL] [--count 500]

The model has seen one half of the data. A support vector machine learns the other half; how often it reads on a sample
what was asked for is its accuracy. Distances are root mean squares of pixels on [-1, 1]. A model that repeats what it
has seen is nearer to the half that it has seen than to the other, which is as large: one that does not is so half of
the time. Writes benchmarks/results/digits__quality.json.
"""

import argparse
import math
from typing import Any

import torch
from sklearn.svm import SVC
from torch import Tensor

from benchmarks.common.results import write_result
from ddpm_fast.data.digits import CLASSES, Digits, halves
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.sample import sample

GUIDANCES = (None, 1.0, 1.5, 2.0, 4.0)


class Ruler:
    """Measures digits; made from both halves of the data.

    Attributes:
        seen, unseen: what the model was trained on, and what not; the classifier learns the latter.
    """

    def __init__(self) -> None:
        self.seen, self.unseen = halves()
        self.classifier = SVC(C=10.0).fit(self.unseen.images.flatten(1), self.unseen.labels)
        self._spread = spread(Digits(*(torch.cat(pair) for pair in zip(self.seen, self.unseen, strict=True))))

    def __call__(self, found: Digits, labelled: bool = True) -> dict[str, Any]:
        """What there is to say of some digits; without labels, those that the classifier reads are taken."""
        read = torch.from_numpy(self.classifier.predict(found.images.flatten(1)))
        labels = found.labels if labelled else read
        kept = spread(Digits(found.images, labels)) / self._spread
        right = read == labels
        return {
            "accuracy": right.double().mean().item() if labelled else None,
            "accuracy_by_class": [right[labels == k].double().mean().item() for k in range(CLASSES)],
            "share_by_class": [(labels == k).double().mean().item() for k in range(CLASSES)],
            "diversity": kept.mean().item(),
            "diversity_by_class": kept.tolist(),
            **_compared(nearest(found.images, self.seen.images), nearest(found.images, self.unseen.images)),
        }

    def data(self) -> dict[str, Any]:
        """The data themselves: the classifier on digits that it does not know, every digit among all others."""
        seen, unseen = self.seen.images, self.unseen.images
        to_seen = torch.cat([nearest(seen, seen, others=True), nearest(unseen, seen)])
        to_unseen = torch.cat([nearest(seen, unseen), nearest(unseen, unseen, others=True)])
        return {**self(self.seen), **_compared(to_seen, to_unseen)}


def spread(found: Digits) -> Tensor:
    """Mean distance between two different digits of every class: [CLASSES], NaN where there are not two."""
    side = math.sqrt(found.images[0].numel())
    classes = [found.images[found.labels == k].flatten(1) for k in range(CLASSES)]
    return torch.stack([torch.pdist(images).mean() / side for images in classes])


def nearest(images: Tensor, among: Tensor, others: bool = False) -> Tensor:
    """Distance of every image to the nearest `among` these, or to the nearest of the others: [N]."""
    apart = torch.cdist(images.flatten(1), among.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    if others:
        apart.fill_diagonal_(math.inf)
    return apart.min(1).values / math.sqrt(images[0].numel())


def _compared(to_seen: Tensor, to_unseen: Tensor) -> dict[str, float]:
    share = (to_seen < to_unseen).double().mean().item()
    return {
        "to_seen_median": to_seen.median().item(),
        "to_unseen_median": to_unseen.median().item(),
        "to_seen_smallest": to_seen.min().item(),
        "nearer_to_seen": share,
        "nearer_to_seen_error": math.sqrt(share * (1 - share) / len(to_seen)),
    }


def draw(model: str, count: int, guidance: float | None, **options: Any) -> Digits:
    """Samples of the model, all steps, seeds 0 … count - 1, the classes in turn; unconditional without guidance."""
    checkpoint = load_checkpoint(model)
    assert checkpoint.classes is not None
    labels, none = torch.arange(count) % CLASSES, torch.full((count,), checkpoint.classes.none or CLASSES)
    keyword = checkpoint.classes.keyword
    if guidance is not None and guidance != 1:
        options |= {"guidance_scale": guidance, "uncond_kwargs": {keyword: none}}
    told = {keyword: none if guidance is None else labels}
    x = sample(
        checkpoint.model, (count, *checkpoint.shape), config=checkpoint.diffusion, model_kwargs=told, seeds=0, **options
    )
    return Digits(x, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="digits", help="a checkpoint folder (default: the embedded model)")
    parser.add_argument("--count", type=int, default=500, help="samples a setting (default: %(default)s)")
    given = parser.parse_args()
    ruler = Ruler()
    rows = [{"digits": "data", "guidance": None, "count": len(ruler.seen.labels), **ruler.data()}]
    for guidance in GUIDANCES:
        found = draw(given.model, given.count, guidance)
        measured = ruler(found, labelled=guidance is not None)
        rows.append({"digits": "samples", "guidance": guidance, "count": given.count, **measured})
        print({key: value for key, value in rows[-1].items() if not isinstance(value, list)}, flush=True)
    training = load_checkpoint(given.model).about["training"]
    print(write_result("digits__quality", rows, training=training))


if __name__ == "__main__":
    main()

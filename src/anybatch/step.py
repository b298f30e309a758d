"""The step and the evaluation, in plain torch; what drives them is another file's business."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.data import Images
from anybatch.methods.filters import reuse_filters


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


def training_loss(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The step: cross-entropy of a batch, averaged over its images.

    Args:
        model: (N, C, H, W) to (N, K).
        x: (N, C, H, W), normalized.
        y: (N,), int64, classes from 0 to K - 1, or (N, K), shares of the classes in images that were mixed.
        label_smoothing: Share of the target that is spread over all classes (Szegedy et al. 2015, arXiv:1512.00567,
            section 7).

    Returns:
        A scalar.
    """
    return F.cross_entropy(model(x), y, label_smoothing=label_smoothing)


def wrong_and_losses(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each image of a batch whether it is classified wrongly (1 or 0) and its cross-entropy, both (N,) float32."""
    logits = model(x).float()
    return (logits.argmax(1) != y).float(), F.cross_entropy(logits, y, reduction="none")


def evaluate(model: nn.Module, images: Images, *, batch_size: int = 256) -> tuple[float, float]:
    """Error (0 to 1) and mean cross-entropy of a model over images, on the model's device, in evaluation mode."""
    device = next(model.parameters()).device
    was_training = model.training
    wrong, loss = 0.0, 0.0
    try:
        model.eval()
        with torch.inference_mode(), reuse_filters(model):
            for start in range(0, len(images), batch_size):
                x, y = images.__getitems__(range(start, min(start + batch_size, len(images))))
                wrong_n, loss_n = wrong_and_losses(model, x.to(device), y.to(device))
                wrong += wrong_n.sum().item()
                loss += loss_n.double().sum().item()
    finally:
        model.train(was_training)
    return wrong / len(images), loss / len(images)

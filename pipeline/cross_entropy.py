"""What the labels themselves ask of the logits, whatever else a network learns from."""

import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The cross-entropy of logits [B,N], the mean over the batch.

    Args:
        labels: class numbers [B]; or float32 [B,N], 1 for each class of an image of a multi-label set. Then
            it is the sum over the classes of each one's own: minus the logarithm of the probability of just
            these labels, as it is for one label. (A mean, timm's default, would be the weaker beside a
            method's loss the more classes there are.)
        smoothing: of the labels: towards 1/N, or in a multi-label set towards 1/2.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    own = BinaryCrossEntropy(smoothing=smoothing, smooth_dense=True, sum_classes=True)
    loss: Tensor = own(logits, labels)
    return loss

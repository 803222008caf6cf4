"""Inception score (Salimans et al. 2016, arXiv 1606.03498)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SPLIT = 5000  # samples, as in the ADM protocol


def inception_score(logits: Iterable[Tensor], split_size: int = SPLIT) -> tuple[float, float]:
    """(mean, standard deviation) over splits of exp(mean KL(p(y|x) || p(y))), p(y) being the mean within the split.

    Args:
        logits: batches (B, classes), in the order of the samples; streamed, in float64.
        split_size: consecutive samples; the last split may have fewer.

    Raises ValueError where there is no sample, or a value is not finite.
    """
    scores: list[float] = []
    held = torch.empty(0)
    for batch in logits:
        if not bool(batch.isfinite().all()):
            raise ValueError("logits hold NaN or infinity.")
        held = torch.cat([held, batch.double()]) if len(held) else batch.double()
        while len(held) >= split_size:
            scores.append(_score(held[:split_size]))
            held = held[split_size:]
    if len(held):
        scores.append(_score(held))
    if not scores:
        raise ValueError("logits: there is no sample to score.")
    found = torch.tensor(scores, dtype=torch.float64)
    return found.mean().item(), found.std(unbiased=False).item()


def _score(logits: Tensor) -> float:
    log_p = logits.log_softmax(dim=1)
    marginal = (torch.logsumexp(log_p, dim=0) - torch.tensor(float(len(logits))).double().log()).to(log_p)
    return (log_p.exp() * (log_p - marginal)).sum(dim=1).mean().exp().item()

"""The training loss, and the loss on the validation triples. Knows no optimizer. B sequences, L tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from capsfusion_ray.training.batches import Batch

# On CPUs the backward pass of torch's fused attention takes far longer than that of plain matrix products.
_ATTENTION = {
    "cpu": [SDPBackend.MATH],
    "cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


class Loss(nn.Module):
    """The language model and its loss as one module, so that data parallelism can wrap both together."""

    def __init__(self, model: Any, smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.smoothing = model, smoothing

    def forward(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the mean cross-entropy of the tokens, weighted by the batch's weights, in nats.

        Tokens of weight 0 are left out. A negative weight makes its token less likely.
        """
        ids_BL, weights_BL = batch.ids_TL.to(device), batch.weights_TL.to(device)[:, 1:]
        scored_N = (weights_BL != 0).flatten().nonzero()[:, 0]
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(_ATTENTION[device.type]):
            hidden_BLD = self.model.base_model(input_ids=ids_BL[:, :-1], use_cache=False).last_hidden_state
            # Logits only for weighted tokens: the output table of a small model is larger than all its layers together.
            logits_NV = self.model.get_output_embeddings()(hidden_BLD.flatten(0, 1).index_select(0, scored_N))
        labels_N = ids_BL[:, 1:].flatten()[scored_N]
        losses_N = F.cross_entropy(logits_NV.float(), labels_N, reduction="none", label_smoothing=self.smoothing)
        weights_N = weights_BL.flatten()[scored_N]
        return (losses_N * weights_N).sum() / weights_N.abs().sum()


@torch.no_grad()
def validation_loss(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> float:
    """Return the mean cross-entropy per token of the fused captions alone, in nats."""
    model.eval()
    loss_of = Loss(model)
    total, n = 0.0, 0.0
    for batch in batches:
        fused = Batch(batch.ids_TL, (batch.weights_TL == 1.0).float())
        count = float(fused.weights_TL.sum())
        total += float(loss_of(fused, device)) * count
        n += count
    return total / n

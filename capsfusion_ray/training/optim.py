"""The optimizers (Muon for the matrices of the layers, AdamW for embeddings and norms), and the average of the weights.

Muon (Keller Jordan, 2024) is SGD with momentum whose update is made orthogonal by a Newton-Schulz iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# The quintic polynomial of Jordan's write-up. It is steepest at 0, so five rounds bring all singular values near 1.
_NS_A, _NS_B, _NS_C, _NS_ROUNDS = 3.4445, -4.7750, 2.0315, 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return approximately U V^T of the matrix's singular value decomposition. bfloat16 is precise enough for it."""
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(_NS_ROUNDS):
        gram = x @ x.T
        x = _NS_A * x + (_NS_B * gram + _NS_C * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """The Muon optimizer. It takes 2-D parameters only."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state: dict[str, Any] = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                velocity = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(velocity, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # This factor keeps the effect on the outputs similar for matrices with different shapes.
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def build_optimizers(
    model: nn.Module, muon_lr: float, adam_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Build Muon (if muon_lr > 0) for 2-D parameters that are not embeddings, and AdamW for all others."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    tables |= {id(p) for p in model.get_output_embeddings().parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in tables] if muon_lr > 0 else []
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    return [Muon(matrices, muon_lr, weight_decay), adam] if matrices else [adam]


class Average:
    """An exponential moving average of the parameters. It is less noisy than the weights of the last step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        # At first the average forgets quickly, so that the random start does not stay in it.
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.values, [p.detach() for p in model.parameters()], 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights and the averaged ones. A second call undoes the first."""
        for mine, p in zip(self.values, model.parameters(), strict=True):
            kept = p.detach().clone()
            p.copy_(mine)
            mine.copy_(kept)

"""The matrix products of a layer on a CPU: x W^T + b in float32 by oneDNN.

torch hands float32 products to MKL, which has no AVX-512 code for processors that are not Intel's and runs at half of what they
can: 110 GFLOP/s a core against 250 on an AMD EPYC (benchmarks/README.md). oneDNN, which torch carries for other types, asks the
processor what it can do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_onednn(x: Tensor, weight_NE: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """As torch.nn.functional.linear; float32 on a CPU, under inference mode."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_NE, bias_N, "none", [], "")
    return y


def has_onednn() -> bool:
    """Whether this torch has that operator, which is its compiler's and not documented, and it computes what it should."""
    x, weight = torch.linspace(-1, 1, 6).view(2, 3), torch.linspace(-2, 1, 12).view(4, 3)
    try:
        with torch.inference_mode():
            return bool(torch.allclose(linear_onednn(x, weight), F.linear(x, weight), atol=1e-5))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False

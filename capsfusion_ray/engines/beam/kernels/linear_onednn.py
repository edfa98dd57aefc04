"""The matrix products of a layer on a CPU: x W^T + b in float32, computed by oneDNN.

torch gives float32 products to MKL, which uses AVX-512 only on Intel's processors. On an AMD EPYC MKL reaches 110 GFLOP/s
per core and oneDNN 250 (benchmarks/README.md). oneDNN asks the processor what it can do. torch contains it for other
types.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_onednn(x: Tensor, weight_NE: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """As torch.nn.functional.linear, for float32 on a CPU in inference mode."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_NE, bias_N, "none", [], "")
    return y


def has_onednn() -> bool:
    """Return whether this torch has the operator and it computes correctly. It is undocumented and part of torch.compile."""
    x, weight = torch.linspace(-1, 1, 6).view(2, 3), torch.linspace(-2, 1, 12).view(4, 3)
    try:
        with torch.inference_mode():
            return bool(torch.allclose(linear_onednn(x, weight), F.linear(x, weight), atol=1e-5))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False

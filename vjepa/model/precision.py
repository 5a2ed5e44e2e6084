"""In which precision the matrix products run: that of autocast where it is on, otherwise that of their weights.

So a network whose matrices are bfloat16 while its norms are float32 computes what the float32 network computes under
autocast, without a cast of any weight.
"""

import torch
from torch import Tensor, nn

from vjepa.kernels._linear import linear


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a matrix product with `weight`."""
    device = weight.device.type
    if weight.dtype == torch.float64:  # autocast leaves it alone
        return weight.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


class Linear(nn.Linear):
    """nn.Linear for x of any floating dtype, computed by the faster of PyTorch's libraries."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.to(product_dtype(self.weight)), self.weight, self.bias)

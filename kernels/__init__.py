"""The operators of V-JEPA, usable alone in anybody's trainer: token sets, tubelets, attention, loss, EMA, optimizer.

Every operator is a ``torch.ops.vjepa.*`` with a fake implementation and autograd. Which implementation serves it is
decided by ``VJEPA_KERNELS`` or :func:`backend`; ``python -m vjepa.kernels`` shows the table. Importing this package
needs torch alone and has no side effect beyond registering the operators.
"""

if __name__ != "vjepa.kernels":
    raise ImportError(
        f"this package is vjepa.kernels, but it was imported as {__name__!r} and would register its operators twice: "
        "use `import vjepa.kernels`"
    )

from ._dispatch import backend
from .attention import varlen_attention
from .ema import EMA, ema_update_
from .gather import apply_masks, gather_tokens, scatter_tokens
from .gradient_norm import gradient_norms
from .loss import masked_l1_loss
from .mlp import mlp
from .norm import add_layer_norm
from .optimizer import AdamWEMA
from .predictor import predictor_tokens
from .tokens import TokenIndices
from .tubelet import tubelet_embed

__all__ = [
    "EMA",
    "AdamWEMA",
    "TokenIndices",
    "add_layer_norm",
    "apply_masks",
    "backend",
    "ema_update_",
    "gather_tokens",
    "gradient_norms",
    "masked_l1_loss",
    "mlp",
    "predictor_tokens",
    "scatter_tokens",
    "tubelet_embed",
    "varlen_attention",
]

"""V-JEPA: latent video prediction. A thin model and a readable training loop over `vjepa.kernels`.

Names resolve on first use (PEP 562), so that `import vjepa.kernels` costs PyTorch and nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vjepa.checkpoint import load_model as load_pretrained
    from vjepa.config import VJEPAConfig
    from vjepa.masks import Masks
    from vjepa.model import VJEPA

    __version__: str

__all__ = ["VJEPA", "Masks", "VJEPAConfig", "__version__", "load_pretrained"]

_EXPORTS = {
    "VJEPA": ("vjepa.model", "VJEPA"),
    "VJEPAConfig": ("vjepa.config", "VJEPAConfig"),
    "Masks": ("vjepa.masks", "Masks"),
    "load_pretrained": ("vjepa.checkpoint", "load_model"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        metadata = import_module("importlib.metadata")
        try:
            value: Any = metadata.version("vjepa")
        except metadata.PackageNotFoundError:  # a source tree or a staged build that was not installed
            value = "unknown"
    elif name in _EXPORTS:
        module, attribute = _EXPORTS[name]
        value = getattr(import_module(module), attribute)
    else:
        raise AttributeError(f"module 'vjepa' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

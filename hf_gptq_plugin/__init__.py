"""GPTQ for Transformers and vLLM: quantize, train and serve one checkpoint.

Importing this package registers its quantizer for `quant_method="gptq"` in Transformers.
"""

from .config import GPTQConfig
from .format.spec import CheckpointError
from .hf.quantizer import register, unregister
from .native import set_activations
from .nn.linear import QuantLinear
from .version import __version__

__all__ = ["CheckpointError", "GPTQConfig", "QuantLinear", "__version__", "register", "set_activations", "unregister"]

register()

"""fastlora: LoRA for Hugging Face models on fused kernels.

model = fastlora.patch(model, r=8, targets=["q_proj", "v_proj"], quantize="int8")
...  # train with anything
fastlora.save(model, "adapter")
fastlora.merge(model)
"""

from .adapter_io import load, save
from .adapters import disabled, print_trainable_parameters, set_adapter, trainable_parameters
from .config import LoraConfig
from .integrations import patch, unload
from .log import configure_from_environment
from .merge import merge, unmerge

__version__ = "0.1.0"
configure_from_environment()

__all__ = [
    "LoraConfig",
    "disabled",
    "load",
    "merge",
    "patch",
    "print_trainable_parameters",
    "save",
    "set_adapter",
    "trainable_parameters",
    "unload",
    "unmerge",
]

"""fastlora: LoRA for Hugging Face models on fused kernels.

model = fastlora.patch(model, r=8, targets=["q_proj", "v_proj"], quantize="int8")
...  # train with anything
fastlora.save(model, "adapter")
fastlora.merge(model)
"""

from .adapter_io import load, save
from .adapters import disabled, print_trainable_parameters, set_adapter, trainable_parameters
from .combine import combine
from .config import LoraConfig
from .log import configure_from_environment
from .merge import merge, unmerge
from .patch import patch, unload
from .prepare import prepare_for_training, undo_prepare
from .recipes import freeze_a, loraplus_groups

__version__ = "0.1.0"
configure_from_environment()

__all__ = [
    "LoraConfig",
    "combine",
    "disabled",
    "freeze_a",
    "load",
    "loraplus_groups",
    "merge",
    "patch",
    "prepare_for_training",
    "print_trainable_parameters",
    "save",
    "set_adapter",
    "trainable_parameters",
    "undo_prepare",
    "unload",
    "unmerge",
]

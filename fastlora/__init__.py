"""fastlora: LoRA for Hugging Face models on fused kernels.

model = fastlora.patch(model, r=8, targets=["q_proj", "v_proj"], quantize="int8")
...  # train with anything
fastlora.save(model, "adapter")
fastlora.merge(model)
"""

from .adapters.combine import combine
from .adapters.files import load, save
from .adapters.hotswap import hotswap
from .adapters.mixed_training import MixedTraining
from .adapters.mixing import mixed
from .adapters.recipes import adapter_groups, freeze_a, loraplus_groups
from .adapters.registry import (
    delete_adapter,
    disabled,
    print_trainable_parameters,
    rename_adapter,
    set_adapter,
    set_scale,
    trainable_parameters,
)
from .checkpoints.merge import merge_checkpoint
from .config import LoraConfig
from .integrations import patch, unload
from .integrations.distributed import shard
from .log import configure_from_environment
from .merge import merge, unmerge
from .prepare import prepare_for_training, undo_prepare

__version__ = "0.1.0"
configure_from_environment()

__all__ = [
    "LoraConfig",
    "MixedTraining",
    "adapter_groups",
    "combine",
    "delete_adapter",
    "disabled",
    "freeze_a",
    "hotswap",
    "load",
    "loraplus_groups",
    "merge",
    "merge_checkpoint",
    "mixed",
    "patch",
    "prepare_for_training",
    "print_trainable_parameters",
    "rename_adapter",
    "save",
    "set_adapter",
    "set_scale",
    "shard",
    "trainable_parameters",
    "undo_prepare",
    "unload",
    "unmerge",
]

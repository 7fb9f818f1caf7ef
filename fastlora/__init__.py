"""fastlora: LoRA for Hugging Face models on fused kernels.

model = fastlora.patch(model, r=8, targets=["q_proj", "v_proj"], quantize="int8")
...  # train with anything
fastlora.save(model, "adapter")
fastlora.merge(model)
"""

from .adapters.combine import combine
from .adapters.files import save
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
from .checkpoints.export import export_checkpoint
from .checkpoints.merge import merge_checkpoint
from .checkpoints.resume import last_checkpoint
from .checkpoints.verify import verify_checkpoint
from .compute import set_compute
from .config import LoraConfig
from .integrations import load, patch, unload
from .integrations.distributed import shard
from .log import configure_from_environment
from .merge import merge, unmerge
from .planning import plan
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
    "export_checkpoint",
    "freeze_a",
    "hotswap",
    "last_checkpoint",
    "load",
    "loraplus_groups",
    "merge",
    "merge_checkpoint",
    "mixed",
    "patch",
    "plan",
    "prepare_for_training",
    "print_trainable_parameters",
    "rename_adapter",
    "save",
    "set_adapter",
    "set_compute",
    "set_scale",
    "shard",
    "trainable_parameters",
    "undo_prepare",
    "unload",
    "unmerge",
    "verify_checkpoint",
]

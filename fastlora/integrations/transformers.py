"""Models of transformers with adapters: what `save_pretrained` writes, and what a Trainer reads back.

`Trainer` and everything built on it save a checkpoint by `model.save_pretrained(folder, state_dict=...)` and resume
from its `model.safetensors` by a `load_state_dict` that does not mind missing names. So a patched model, which is
changed in three places and in none of its methods' code, writes checkpoints of what trains alone:

- `save_pretrained` is `save_checkpoint` below, as an attribute of the instance;
- a hook behind `load_state_dict` knows that the frozen weights are missing on purpose;
- where the output head has an adapter, a hook before the forward refuses losses that would read past it.

`fastlora.unload` takes all three off again.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapters import trained
from ..adapters.files import sync, write_adapters
from ..adapters.registry import adapters, lora_layers
from ..checkpoints.resume import invalidate
from ..layers import LinearLayer, LoraLayer, TokenLayer, is_linear4bit
from ..models.distributed import gathered, in_first_process, is_sharded, keep_shards_alone
from ..models.ends import output_embedding

STATE_FILE = "model.safetensors"
_HOOK = "fastlora_head_hook"
_ADAPTER_NAME = re.compile(r"\.(lora_\w+|token_rows)\.")
_RUNNING_STATISTICS = nn.modules.batchnorm._NormBase  # the one kind of layer whose buffers move in training


def install(model: nn.Module) -> None:
    """Makes a patched model save and resume as described above; any other module than a PreTrainedModel stays."""
    if not isinstance(model, PreTrainedModel):
        return
    uninstall(model)
    # A partial is copied and pickled with the model that it holds; a function made here would keep the first one.
    model.__dict__["save_pretrained"] = functools.partial(save_checkpoint, model)
    model.register_load_state_dict_post_hook(_expect_frozen_weights_missing)
    head = output_embedding(model)
    if isinstance(head, LoraLayer) and not isinstance(head, TokenLayer):  # a token layer's weight has its rows in it
        model.__dict__[_HOOK] = model.register_forward_pre_hook(_refuse_fused_head, with_kwargs=True)


def uninstall(model: nn.Module) -> None:
    """Undoes `install`."""
    if not isinstance(model, PreTrainedModel) or "save_pretrained" not in model.__dict__:
        return
    del model.__dict__["save_pretrained"]
    hooks = model._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _expect_frozen_weights_missing]:
        del hooks[key]
    if _HOOK in model.__dict__:
        model.__dict__.pop(_HOOK).remove()


def save_checkpoint(
    model: Any,
    save_directory: str | PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """`save_pretrained` of a patched model.

    While its adapters run beside the frozen weights, what trains is saved and nothing else:

    - `adapter_model.safetensors` and `adapter_config.json`, as by `fastlora.save`: PEFT reads the folder, and so does
      `AutoModelForCausalLM.from_pretrained(folder)`, which loads the base model that the config names;
    - `model.safetensors` with the same weights under the model's own names and every other parameter that trains,
      from which a Trainer resumes. There is no `config.json`, or the folder would pass for a whole model.

    A model that is merged, or has no adapter left, is saved whole, as transformers saves it, in the dtype it had
    before it was quantised: int8 and 4-bit weights are written dense, with the values that they stand for.

    A model that FSDP2 has sharded has to be saved by every process, unless `state_dict` is what was gathered of it.

    Files are written under temporary names, synced and renamed. A Trainer's checkpoint that was whole counts as
    incomplete for `fastlora.last_checkpoint` until the Trainer has written all of it again.

    Args:
        is_main_process: whether this process writes.
        state_dict: the weights to save, such as those gathered from other processes; None for the model's own.
        options: the other arguments of `PreTrainedModel.save_pretrained`. Adapters are never split into shards.

    Raises:
        ValueError: `state_dict` lacks weights of the adapters; the adapters of a merged model are disabled; or an
            option that adapters cannot be saved with is set.
        OSError: the folder cannot be written.
    """
    layers = lora_layers(model)
    if not adapters(model) or any(layer.merged_adapters for layer in layers.values()):
        whole = _whole_state(model, layers, state_dict)
        type(model).save_pretrained(model, save_directory, is_main_process, whole, **options)
        return
    for name in ("push_to_hub", "variant", "distributed_checkpoint"):
        if options.get(name):
            raise ValueError(
                f"{name}: expected none for a model with adapters, found {options[name]!r}; merge them first, or save "
                "the folder and upload it by model.push_to_hub"
            )
    together = state_dict is None and is_sharded(model)
    if not (together or is_main_process):
        return
    if together:
        keep_shards_alone(model)
    folder, state = Path(save_directory), _trained_state(model, state_dict)
    if together:
        state = gathered(state)

    def write(work: Callable[..., None], *arguments: Any) -> None:
        in_first_process(functools.partial(work, *arguments), together)

    write(invalidate, folder)
    write_adapters(model, folder, together, _reader(model, state))
    write(_write_state, folder, state)


def _trained_state(model: nn.Module, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """What of a state dict adapters consist of, or trains besides, under the model's names."""
    state = model.state_dict() if state_dict is None else state_dict
    # A compiled model's names have the compiler's module in them.
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    names = _trained_names(model)
    if missing := sorted(name for name in names if name not in state):
        found = f"found {len(missing)} of them missing, such as {missing[0]!r}"
        raise ValueError(f"state_dict: expected all {len(names)} tensors that train, {found}")
    return {name: state[name].detach() for name in names}


def _trained_names(model: nn.Module) -> list[str]:
    """The names in the state dict of adapters' tensors, and of all else that moves in training."""
    own = {id(parameter) for layer in lora_layers(model).values() for parameter in _parameters_of(layer)}
    for adapter in adapters(model):
        own |= {id(copy) for copy in trained.copies_in_all_places(model, adapter).values()}
    parameters = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in parameters if parameter.requires_grad or id(parameter) in own]
    for path, module in model.named_modules():
        if isinstance(module, _RUNNING_STATISTICS):
            names += [f"{path}.{name}" for name, _ in module.named_buffers()]
    return names


def _parameters_of(layer: LoraLayer) -> Iterator[nn.Parameter]:
    for attribute in layer.PARTS.values():
        yield from getattr(layer, attribute).values()


def _reader(model: nn.Module, state: dict[str, Tensor]) -> Callable[[nn.Parameter], Tensor]:
    """What gives a parameter's value in a state dict; a copy that is not in place is in none, and has its own."""
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    return lambda parameter: state.get(names.get(id(parameter), ""), parameter).detach()


def _write_state(folder: Path, state: dict[str, Tensor]) -> None:
    temporary = folder / f".{STATE_FILE}.tmp"
    try:
        save_file(_apart(state), temporary, metadata={"format": "pt"})
        sync(temporary)
        os.replace(temporary, folder / STATE_FILE)
        sync(folder)
    except SafetensorError as error:
        raise OSError(f"{folder}: could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values in memory of their own, as safetensors wants them: a parameter may stand in two places."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in state.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return apart


def _whole_state(
    model: nn.Module, layers: dict[str, LoraLayer], state_dict: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """The state dict that a merged model has without its LoRA layers, all of it dense."""
    if any(layer.merged_adapters and not layer.adapters_enabled for layer in layers.values()):
        raise ValueError("model: expected enabled adapters, found a call inside fastlora.disabled(model)")
    state = dict(model.state_dict() if state_dict is None else state_dict)
    for path, layer in layers.items():
        for attribute in (*layer.PARTS.values(), "weight_scale"):
            state = {name: tensor for name, tensor in state.items() if not _is_within(name, f"{path}.{attribute}")}
    for path, module in model.named_modules():
        if is_linear4bit(module) or (isinstance(module, LinearLayer) and module.weight_scale is not None):
            state = {name: tensor for name, tensor in state.items() if not _is_within(name, f"{path}.weight")}
            state[f"{path}.weight"] = _dense_weight(module).cpu()
    return state


def _is_within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _dense_weight(module: Any) -> Tensor:
    if isinstance(module, LinearLayer):
        return module.dense_weight()
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


def _expect_frozen_weights_missing(model: nn.Module, keys: Any) -> None:
    """Behind `load_state_dict`: takes the frozen weights off the missing names where a checkpoint had all the others.

    Raises:
        ValueError: it has weights of adapters that the model has not; they would be left out without a word.
    """
    if foreign := [name for name in keys.unexpected_keys if _ADAPTER_NAME.search(name)]:
        raise ValueError(
            f"state_dict: expected weights of this model's adapters {sorted(adapters(model))}, found {foreign[0]!r} "
            f"and {len(foreign) - 1} more; patch the model with the settings of the run that the checkpoint is from"
        )
    expected, missing = set(_trained_names(model)), set(keys.missing_keys)
    if missing and not missing & expected and missing | expected == set(model.state_dict()):
        keys.missing_keys.clear()


def _refuse_fused_head(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward: raises ValueError where TRL multiplies by the output head's weight instead of calling it."""
    head: Any = output_embedding(model)
    if not kwargs.get("fused_lm_head") or not isinstance(head, LoraLayer):
        return
    if head.running_adapters() or getattr(head, "weight_scale", None) is not None:
        raise ValueError(
            "targets: expected no output head under this trainer, whose loss reads the head's weight and would leave "
            "its adapter untrained; leave the head out of the targets, or train it whole by modules_to_save"
        )

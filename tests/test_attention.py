"""`nn.MultiheadAttention` with adapters, against PEFT's and against the dense weights."""

import copy

import peft
import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from pairs import (
    adapter_of,
    assert_files_go_both_ways,
    assert_is_original,
    assert_same_tensors,
    assert_trains_like,
    bits,
    fill,
    make_pair,
    train,
)  # fmt: skip
from torch import nn
from torch.nn.utils import parametrize

import fastlora
from fastlora.adapters.registry import lora_layers

# PEFT says so of a model without a config.
pytestmark = pytest.mark.filterwarnings("ignore:.*model config.*", "ignore:.*tied.*")

WIDTH, HEADS = 24, 4
SETTINGS = dict(r=3, lora_alpha=6, target_modules=["attention", "head"])


class Block(nn.Module):
    """Attention over a sequence, to itself or to another one, and a linear layer."""

    def __init__(self, dtype=torch.float32, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dtype=dtype, **options)
        self.head = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x, memory=None, **options):
        memory = x if memory is None else memory
        return self.head(torch.tanh(self.attention(x, memory, memory, need_weights=False, **options)[0]))


def run(model, **options):
    """Outputs on a fixed batch, in the dtype of the model."""
    dtype = next(model.parameters()).dtype
    x = torch.randn(7, 2, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)
    return model(x, **options)


def cross(model):
    """Attention to another sequence, whose first key is masked."""
    memory = torch.randn(5, 2, WIDTH, generator=torch.Generator().manual_seed(6)).to(next(model.parameters()).dtype)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 0] = True
    return run(model, memory=memory, key_padding_mask=mask)


VARIANTS = {
    "plain": ({}, run),
    "no-bias": (dict(bias=False), run),
    "batch-first": (dict(batch_first=True), run),
    "bias-kv": (dict(add_bias_kv=True), run),
    "cross-masked": ({}, cross),
    "cross-masked-zero": (dict(add_zero_attn=True), cross),
}


def make(**options):
    torch.manual_seed(0)
    return Block(**options)


def patched(seed=1, **options):
    return fill(fastlora.patch(make(**options), config=fastlora.LoraConfig(**SETTINGS)), seed).eval()


class Sum(nn.Module):
    """`W + s B A` in the place of W."""

    def __init__(self, a, b, scale):
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone()), scale

    def forward(self, w):
        return w + (self.scale * self.b @ self.a).to(w.dtype)


NAMES = {"attention": "attention.in_proj_weight", "attention.base_layer.out_proj": "attention.out_proj.weight",
         "head": "head.weight"}  # fmt: skip


def summed(model, plain, *adapters):
    """`plain`, in eager PyTorch, with the adapters of a patched model in its weights."""
    for adapter in adapters or ("default",):
        parts, scale = adapter_of(model, adapter), model.attention.scaling[adapter]
        for name, path in NAMES.items():
            a, b = (parts[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            owner, _, parameter = path.rpartition(".")
            parametrize.register_parametrization(plain.get_submodule(owner), parameter, Sum(a, b, scale))
    return plain.requires_grad_(False).train(model.training)


def adapter_of_either(model):
    """The adapter's parameters by name, also of a model that `summed` made."""
    if lora_layers(model):
        return adapter_of(model)
    found = {}
    for name, path in NAMES.items():
        owner, _, parameter = path.rpartition(".")
        (term,) = model.get_submodule(owner).parametrizations[parameter]
        found |= {f"base_model.model.{name}.lora_{part}.weight": p for part, p in (("A", term.a), ("B", term.b))}
    return {name: p.requires_grad_() for name, p in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_draws_what_peft_draws(init, dtype):
    ours, theirs = make_pair(lambda: make(dtype=dtype), SETTINGS | dict(init_lora_weights=init))
    assert_same_tensors(*({name: p.data for name, p in adapter_of(model).items()} for model in (ours, theirs)))


@pytest.mark.parametrize(("options", "batch"), VARIANTS.values(), ids=VARIANTS.keys())
def test_trains_like_the_summed_weights(options, batch):
    def make_two(seed):
        ours = patched(seed, **options)
        return ours, summed(ours, make(**options))

    assert_trains_like(make_two, batch, adapter_of_either)


def test_trains_like_the_summed_weights_in_16_bits():
    def make_two(seed):
        ours = patched(seed, dtype=torch.bfloat16)
        return ours, summed(ours, make(dtype=torch.bfloat16))

    assert_trains_like(make_two, run, adapter_of_either)


def test_agrees_with_peft_where_peft_is_right():
    """PEFT adds the output projection's adapter twice (huggingface/peft#3774): so compare where it is zero."""

    def make_two(seed):
        models = [fill(model, seed) for model in make_pair(Block, SETTINGS, seed)]
        for model in models:
            nn.init.zeros_(adapter_of(model)["base_model.model.attention.base_layer.out_proj.lora_B.weight"])
        return models

    assert_trains_like(make_two, run, steps=1)


@pytest.mark.parametrize("adapter", ["default", "other"])
def test_files_go_both_ways(adapter, tmp_path):
    assert_files_go_both_ways(make, SETTINGS, run, tmp_path, adapter)


def test_several_adapters_add_up():
    model = patched()
    fastlora.patch(model, config=fastlora.LoraConfig(**SETTINGS), adapter="second")
    fill(model, 2, "second")
    fastlora.set_adapter(model, ["default", "second"])
    exact = summed(model.double(), make().double(), "default", "second")
    torch.testing.assert_close(run(model), run(exact), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grad", [True, False])
def test_encoder_layers_read_the_adapters(grad):
    """Their fused path takes the weights of the attention without calling it; PEFT's adapters are not in these."""

    def make_encoder():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2).double().eval()

    model, x = make_encoder(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    plain = make_encoder()
    fill(fastlora.patch(model, r=3, targets=["self_attn"]), 1)
    for name, layer in lora_layers(model).items():
        attention = plain.get_submodule(name)
        attention.in_proj_weight.data += layer.lora_B["default"] @ layer.lora_A["default"]
        attention.out_proj.weight.data += layer.lora_B_out["default"] @ layer.lora_A_out["default"]
    torch.compiler.reset()
    with torch.set_grad_enabled(grad):
        y = model(x)
        torch.testing.assert_close(y, plain(x), rtol=1e-12, atol=1e-12)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y)


def test_the_parameters_keep_their_names_and_places():
    before, model = make(), patched()
    names = {name: parameter for name, parameter in model.named_parameters() if "lora_" not in name}
    assert names.keys() == dict(before.named_parameters()).keys()
    assert model.attention._parameters["in_proj_weight"] is names["attention.in_proj_weight"]
    assert not any(parameter.requires_grad for parameter in names.values())
    assert isinstance(model.attention, nn.MultiheadAttention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_is_the_rounded_sum_and_unmerge_exact(dtype):
    model = patched(dtype=dtype)
    before, expected = bits(model), run(model)
    exact = summed(copy.deepcopy(model).double(), make(dtype=dtype).double())
    fastlora.merge(model)
    for path in ("attention.in_proj_weight", "attention.out_proj.weight"):
        owner, _, name = path.rpartition(".")
        merged, total = (getattr(m.get_submodule(owner), name).detach() for m in (model, exact))
        assert_as_accurate_as_eager(merged, total.to(dtype), total, path)
    merged = bits(model)
    with fastlora.disabled(model):
        assert_same_tensors(bits(model), before)
        assert torch.equal(run(model), run(make(dtype=dtype)))
    assert_same_tensors(bits(model), merged)
    fastlora.unmerge(model)
    assert_same_tensors(bits(model), before)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("merged", [False, True])
def test_unload_gives_the_module_back(merged):
    model, original = patched(), make()
    if merged:
        fastlora.merge(model)
    fastlora.unload(model)
    assert_is_original(model, original)


def test_unload_merges():
    model = patched()
    expected = bits(fastlora.merge(copy.deepcopy(model)))
    fastlora.unload(model, merge=True)
    assert_same_tensors(bits(model), {name: tensor for name, tensor in expected.items() if "lora_" not in name})
    assert type(model.attention) is nn.MultiheadAttention


@pytest.mark.parametrize("batch", [run, cross], ids=["self", "cross-masked"])
def test_compiles_without_a_graph_break(batch):
    torch.compiler.reset()
    model = patched().train()
    duplicate = copy.deepcopy(model)
    expected = train(duplicate, adapter_of(duplicate), batch, steps=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = batch_through(compiled, model, batch)
    assert torch.equal(y, expected["outputs"])
    y.square().mean().backward()
    assert_same_tensors({f"gradient of {n}": p.grad for n, p in adapter_of(model).items()},
                        {n: g for n, g in expected.items() if n.startswith("gradient")})  # fmt: skip


def batch_through(compiled, model, batch):
    """The outputs of a compiled model, on the batch for the model that it was made from."""

    class Call:
        parameters = model.parameters

        def __call__(self, x, **options):
            return compiled(x, **options)

    return batch(Call())


def test_a_copy_is_independent():
    model = patched()
    expected, duplicate = run(model), copy.deepcopy(model)
    fill(duplicate, 9)
    assert not torch.equal(run(duplicate), expected)
    assert torch.equal(run(model), expected)
    assert torch.equal(run(fastlora.unload(duplicate).eval()), run(make().eval()))


REFUSED = {
    "dropout": (dict(lora_dropout=0.1), {}, "lora_dropout: expected none at 'attention'"),
    "dora": (dict(use_dora=True), {}, "use_dora: expected none at 'attention'"),
    "bias": (dict(lora_bias=True), {}, "lora_bias: expected none at 'attention'"),
    "other-widths": ({}, dict(kdim=10, vdim=12), "one width for query, key and value, found .* kdim=10 and vdim=12"),
}


@pytest.mark.parametrize(("settings", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_and_leaves_the_model_alone(settings, options, message):
    model = make(**options)
    before, classes = bits(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        fastlora.patch(model, config=fastlora.LoraConfig(**SETTINGS | settings))
    assert_same_tensors(bits(model), before)
    assert [type(m) for m in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_peft_refuses_other_widths_too():
    with pytest.raises(ValueError, match="same embed"):
        peft.get_peft_model(make(kdim=10, vdim=12), peft.LoraConfig(**SETTINGS))


def test_a_file_with_dropout_is_read_frozen_alone(tmp_path):
    """PEFT takes a dropout for the layers beside the attention and ignores it there."""
    config = peft.LoraConfig(**SETTINGS | dict(lora_dropout=0.2))
    theirs = fill(peft.get_peft_model(make(), config), 3).eval()
    theirs.save_pretrained(tmp_path)
    ours = fastlora.load(make(), tmp_path).eval()
    assert_same_tensors(*({name: p.data for name, p in adapter_of(model).items()} for model in (ours, theirs)))
    with pytest.raises(ValueError, match="lora_dropout: expected none at 'attention'"):
        fastlora.load(make(), tmp_path, trainable=True)


def test_the_output_projection_alone_is_no_target():
    """The attention does not call it, so that an adapter there would never run."""
    with pytest.raises(TypeError, match=r"found NonDynamicallyQuantizableLinear at 'attention.out_proj'"):
        fastlora.patch(make(), r=3, targets=["out_proj"])
    model = fastlora.patch(make(), r=3, targets="all-linear")
    assert lora_layers(model).keys() == {"head"}

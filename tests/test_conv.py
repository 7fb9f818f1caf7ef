"""LoRA on convolutions, beside PEFT where PEFT is right."""

import copy

import pytest
import torch
import transformers
from accuracy import assert_as_accurate_as_eager
from pairs import adapter_of, assert_same_tensors, bits, fill
from side_by_side import (
    assert_files_travel,
    assert_merges,
    assert_same_draws,
    assert_trains_as_peft,
    output,
    patched,
    seeded,
    settings,
    step,
    wrapped,
)
from torch import nn

import fastlora
from fastlora.adapters.registry import lora_layers
from fastlora.layers import LinearLayer
from fastlora_kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")


@seeded
def vit():
    config = transformers.ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                    image_size=16, patch_size=4)  # fmt: skip
    return transformers.ViTModel(config, add_pooling_layer=False)


@seeded
def convnext():
    """With depthwise convolutions: as many groups as channels."""
    config = transformers.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=4)
    model = transformers.ConvNextModel(config)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:  # which starts near zero
            nn.init.normal_(parameter)
    return model


@seeded
def whisper():
    config = transformers.WhisperConfig(d_model=24, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32,
                                        num_mel_bins=8, max_source_positions=20, dropout=0.0)  # fmt: skip
    return transformers.models.whisper.modeling_whisper.WhisperEncoder(config)


@seeded
def wav2vec2():
    config = transformers.Wav2Vec2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, activation_dropout=0.0, layerdrop=0.0,
        mask_time_prob=0.0,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def plain(*modules):
    """Convolutions with something smooth between them."""
    return seeded(lambda: nn.Sequential(*(m() for make in modules for m in (make, nn.Tanh))))


one_d = plain(lambda: nn.Conv1d(4, 6, 5, stride=2, padding=2), lambda: nn.Conv1d(6, 3, 1, bias=False))
two_d = plain(lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0)), lambda: nn.Conv2d(6, 3, 1))
three_d = plain(lambda: nn.Conv3d(4, 6, 3, padding="same"), lambda: nn.Conv3d(6, 3, (1, 2, 1), padding="valid"))
grouped = plain(lambda: nn.Conv2d(4, 8, 3, groups=2), lambda: nn.Conv2d(8, 4, 3, groups=4))
without_bias = plain(lambda: nn.Conv1d(4, 6, 3, bias=False))


def inputs(*shape, name="x"):
    return {name: torch.randn(*shape, generator=torch.Generator().manual_seed(1))}


IMAGES = inputs(3, 3, 16, 16, name="pixel_values")
SOUND = inputs(2, 200, name="input_values")
CASES = {
    "vit": (vit, settings("projection", "q_proj"), IMAGES),
    "convnext": (convnext, settings("patch_embeddings", "downsampling_layer.1", "pwconv1"), IMAGES),
    "convnext-depthwise": (convnext, settings("dwconv", r=16), IMAGES),
    "wav2vec2": (wav2vec2, settings("conv", exclude_modules=["pos_conv_embed.conv"]), SOUND),
    "1d": (one_d, settings("0", "2"), inputs(3, 4, 17)),
    "2d": (two_d, settings("0", "2", use_rslora=True), inputs(3, 4, 7, 8)),
    "3d": (three_d, settings("0", "2"), inputs(2, 4, 5, 6, 5)),
    "groups": (grouped, settings("0", "2"), inputs(3, 4, 8, 8)),
    "bias-of-b": (two_d, settings("0", "2", lora_bias=True), inputs(3, 4, 7, 8)),
    "dora-1d": (one_d, settings("0", "2", use_dora=True), inputs(3, 4, 17)),
    "dora-2d": (two_d, settings("0", "2", use_dora=True), inputs(3, 4, 7, 8)),
    "dora-3d": (three_d, settings("0", "2", use_dora=True), inputs(2, 4, 5, 6, 5)),
    "dora-wav2vec2": (wav2vec2, settings("conv", exclude_modules=["pos_conv_embed.conv"], use_dora=True), SOUND),
}  # fmt: skip
GROUPED = ("groups", "convnext-depthwise")
each_case = pytest.mark.parametrize(("make", "config", "batch"), CASES.values(), ids=CASES.keys())


@each_case
def test_trains_as_peft(make, config, batch):
    assert_trains_as_peft(make, config, batch)


@each_case
def test_files_travel(make, config, batch, tmp_path):
    assert_files_travel(make, config, batch, tmp_path, set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("case", ["1d", "2d", "3d", "groups"])
def test_one_seed_draws_the_adapter_of_peft(case, init, dtype):
    make, config, _ = CASES[case]
    assert_same_draws(make, config | dict(init_lora_weights=init, lora_bias=init is True), dtype)


@pytest.mark.parametrize("case", [case for case in CASES if case not in GROUPED])
def test_merges_and_undoes(case):
    assert_merges(*CASES[case])


@pytest.mark.parametrize("dora", [False, True])
def test_whisper(dora):
    """Its encoder reads the stride of its convolutions, which PEFT's wrappers do not have."""
    config = settings("conv1", "conv2", "fc1", use_dora=dora)
    batch = inputs(2, 8, 40, name="input_features")
    with pytest.raises(AttributeError, match="no attribute 'stride'"):
        output(wrapped(whisper, config), batch)
    assert_merges(whisper, config, batch)
    assert all(t.any() for t in step(fill(patched(whisper, config), 3), batch).values())


def convolved(layer, x, dtype):
    """The layer by the formula, one convolution with the moved weight, computed in one dtype."""
    w, a, b, x = (t.detach().to(dtype) for t in (layer.weight, layer.lora_A["default"], layer.lora_B["default"], x))
    moved = w + layer.scaling["default"] * (b.flatten(1) @ a.flatten(1)).view(w.shape)
    if layer.has_magnitude("default"):
        norm = moved.flatten(1).norm(dim=1)
        factor = layer.lora_magnitude["default"].detach().to(dtype).flatten() / norm
        moved = moved * factor.view(-1, *[1] * (w.dim() - 1))
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    return layer._conv_forward(x, moved, bias)


@pytest.mark.parametrize("case", ["1d", "2d", "3d", "dora-2d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_are_as_accurate_as_eager(case, dtype):
    make, config, batch = CASES[case]
    model = fill(patched(make, config, dtype), 3).eval()
    assert {p.dtype for p in adapter_of(model).values()} == {torch.float32}
    layer, x = model[0], batch["x"].to(dtype)
    assert_as_accurate_as_eager(layer(x), convolved(layer, x, dtype), convolved(layer, x, torch.float64), case)
    before = bits(model)
    fastlora.unmerge(fastlora.merge(model))
    assert_same_tensors(bits(model), before)


# What PEFT cannot do


MOVED = {
    "dilation": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=1),
    "circular": lambda: nn.Conv1d(4, 6, 5, padding=2, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", stride=2),
    "same-dilated": lambda: nn.Conv3d(4, 6, 2, padding="same", dilation=2),
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("make", MOVED.values(), ids=MOVED.keys())
def test_a_kernel_moves_as_that_of_the_layer(make, dora):
    """PEFT's A has no dilation, and pads with zeros whatever the layer does."""
    model = fill(patched(plain(make), settings("0", use_dora=dora)), 3).eval()
    layer = model[0]
    x = torch.randn(2, 4, *[7] * layer.DIMENSIONS)
    eager, exact = convolved(layer, x, torch.float32), convolved(layer, x, torch.float64)
    assert_as_accurate_as_eager(layer(x), eager, exact, "unmerged")
    assert_as_accurate_as_eager(layer(x[0]), eager[0], exact[0], "without a batch")
    fastlora.merge(model)
    assert_as_accurate_as_eager(layer(x), eager, exact, "merged")


@pytest.mark.parametrize("case", GROUPED)
def test_groups_are_not_merged(case):
    """What A and B add reads every channel, which no grouped convolution does."""
    make, config, batch = CASES[case]
    model = fill(patched(make, config), 3).eval()
    expected = output(model, batch)
    for call in (fastlora.merge, lambda m: fastlora.unload(m, merge=True)):
        with pytest.raises(ValueError, match=r": expected a convolution without groups to fold an adapter into, found"):
            call(model)
        assert torch.equal(output(model, batch), expected)
    assert_same_tensors(bits(fastlora.unload(model)), bits(make()))


REFUSED = {
    "rank": (grouped, settings("2", r=6), ValueError, "r: expected a multiple of the groups .*, 4 at '2', found 6"),
    "dora-groups": (grouped, settings("0", use_dora=True), ValueError, "without groups, found 2 at '0'"),
    "transposed": (plain(lambda: nn.ConvTranspose1d(4, 6, 3)), settings("0"), TypeError, "found ConvTranspose1d"),
}


@pytest.mark.parametrize(("make", "config", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(make, config, error, message):
    model = make()
    with pytest.raises(error, match=message):
        fastlora.patch(model, config=fastlora.LoraConfig(**config))
    assert [type(module) for module in model] == [type(module) for module in make()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_parametrised_convolution_is_refused():
    """Like that of Wav2Vec2's positions: its weight is computed, so nothing can be folded into it."""
    with pytest.raises(TypeError, match=r"found ParametrizedConv1d at 'encoder.pos_conv_embed.conv'"):
        fastlora.patch(wav2vec2(), targets=["pos_conv_embed.conv"])


# Dropout, several adapters, and how a model with them moves


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_drops_elements_of_the_input(dora):
    config = settings("0", lora_dropout=0.4, use_dora=dora)
    layer = fill(patched(without_bias, config), 3).train()[0]
    x = torch.randn(2, 4, 9)
    torch.manual_seed(9)
    y = layer(x)
    torch.manual_seed(9)
    mask = reference.dropout_mask(torch.randint(2**63 - 1, (1,)), 8, 9, 0.4)
    dropped = x * mask.view(x.shape) / 0.6
    a, b, w = (t.detach() for t in (layer.lora_A["default"], layer.lora_B["default"], layer.weight))
    delta = 2 * (b.flatten(1) @ a.flatten(1)).view(w.shape)
    if dora:
        factor = layer.lora_magnitude["default"].detach().flatten() / (w + delta).flatten(1).norm(dim=1)
        delta = factor[:, None, None] * (w + delta) - w
    torch.testing.assert_close(y, layer._conv_forward(x, w, None) + layer._conv_forward(dropped, delta, None))
    assert torch.equal(layer.eval()(x), layer(x))


def test_a_bias_of_b_where_the_layer_has_none():
    """PEFT cannot merge it."""
    model = fill(patched(without_bias, settings("0", lora_bias=True)), 3).eval()
    x = torch.randn(2, 4, 9)
    expected = model(x)
    fastlora.merge(model)
    torch.testing.assert_close(model(x), expected)
    fastlora.unmerge(model)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(fastlora.unload(model, merge=True)(x), expected)


def test_active_adapters_add_up():
    model = fill(patched(two_d, settings("0")), 3).eval()
    layer, x = model[0], CASES["2d"][2]["x"]
    with fastlora.disabled(model):
        frozen = layer(x)
    first = layer(x) - frozen
    fill(fastlora.patch(model, r=2, targets=["0"], adapter="second"), 4, "second")
    second = layer(x) - frozen
    fastlora.set_adapter(model, ["default", "second"])
    both = layer(x)
    torch.testing.assert_close(both, frozen + first + second)
    fastlora.merge(model)
    torch.testing.assert_close(layer(x), both)


@pytest.mark.parametrize("dora", [False, True])
def test_compiles_without_a_graph_break(dora):
    torch.compiler.reset()
    model = fill(patched(two_d, settings("0", "2", use_dora=dora, lora_dropout=0.2)), 3).train()
    compiled, results = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    for call in (model, compiled):
        torch.manual_seed(1)
        model.zero_grad()
        y = call(CASES["2d"][2]["x"])
        y.square().mean().backward()
        results.append({"output": y.detach()} | {n: p.grad.clone() for n, p in adapter_of(model).items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_checkpointing_changes_no_bit():
    model = fill(patched(vit, settings("projection", "q_proj", lora_dropout=0.3)), 3).train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(7)
        results.append(step(model, IMAGES))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_copies_and_state():
    make, config, batch = CASES["dora-2d"]
    model = fill(patched(make, config), 3).eval()
    twin, fresh = copy.deepcopy(model), patched(make, config).eval()
    fresh.load_state_dict(model.state_dict())
    expected = output(model, batch)
    fastlora.unload(model)
    assert torch.equal(output(twin, batch), expected)
    assert torch.equal(output(fresh, batch), expected)


def test_int8_leaves_convolutions_dense():
    config = fastlora.LoraConfig(**settings("projection", "q_proj"))
    model = fastlora.patch(vit(), config=config, quantize="int8")
    by_kind = {isinstance(layer, LinearLayer): layer.weight.dtype for layer in lora_layers(model).values()}
    assert by_kind == {True: torch.int8, False: torch.float32}


def test_all_linear_selects_no_convolution():
    model = fastlora.patch(whisper(), targets="all-linear")
    assert all(isinstance(layer, LinearLayer) for layer in lora_layers(model).values())

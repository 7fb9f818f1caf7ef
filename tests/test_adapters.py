"""Several adapters on one model: several active, deleted, renamed, scaled, one per row; what trains besides them."""

import copy

import peft
import pytest
import torch
from models import make_batch, make_model
from safetensors.torch import load_file
from torch import nn

import fastlora
from fastlora.adapters.registry import active_adapters, adapters, lora_layers

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn"]}
NAMES = ["a", "b", "c"]


def fill(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def ours(name="llama", dtype=torch.float64, names=NAMES, **settings):
    """A model with adapters of ranks 2, 3, 4, ..."""
    model = make_model(name, dtype)
    for i, adapter in enumerate(names):
        config = fastlora.LoraConfig(r=2 + i, lora_alpha=3, target_modules=TARGETS[name], **settings)
        fastlora.patch(model, config=config, adapter=adapter)
    return fill(model).eval()


def theirs(model, name="llama", names=NAMES, **settings):
    """PEFT's model with the same adapters."""
    wrapped = None
    for i, adapter in enumerate(names):
        config = peft.LoraConfig(r=2 + i, lora_alpha=3, target_modules=TARGETS[name], **settings)
        if wrapped is None:
            wrapped = peft.get_peft_model(make_model(name, torch.float64), config, adapter)
        else:
            wrapped.add_adapter(adapter, config)
    wrapped.double().eval()
    values = dict(wrapped.named_parameters())
    with torch.no_grad():
        for path, layer in lora_layers(model).items():
            for adapter in names:
                for part, parameter in layer.parts(adapter).items():
                    attribute, _, rest = part.partition(".")
                    suffix = f".{rest}" if rest else ".weight" if "magnitude" in attribute else ""
                    values[f"base_model.model.{path}.{attribute}.{adapter}{suffix}"].copy_(parameter)
    return wrapped


def logits(model, **options):
    with torch.no_grad():
        return model(**make_batch(batch=3), **options).logits


def assert_close(found, expected):
    """Equal to the rounding of float64, with room for another order of a few hundred terms."""
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 1e3 * torch.finfo(torch.float64).eps, error


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("settings", [{}, dict(use_rslora=True)], ids=str)
def test_several_active_adapters_add_up_as_in_peft(name, settings):
    model = ours(name, **settings)
    wrapped = theirs(model, name, **settings)
    for chosen in (["a", "c"], ["c", "b", "a"], ["b"]):
        fastlora.set_adapter(model, chosen)
        wrapped.base_model.set_adapter(chosen)
        assert_close(logits(model), logits(wrapped))
        assert active_adapters(model) == tuple(chosen)


@pytest.mark.parametrize("name", TARGETS)
def test_dora_as_in_peft(name):
    model = ours(name, use_dora=True)
    wrapped = theirs(model, name, use_dora=True)
    for adapter in NAMES:
        fastlora.set_adapter(model, adapter)
        wrapped.set_adapter(adapter)
        assert_close(logits(model), logits(wrapped))


def test_several_dora_adapters_add_up():
    """In any order: PEFT scales with one adapter what another has added."""
    model = nn.Sequential(nn.Linear(16, 8, dtype=torch.float64))
    for adapter in ("a", "b"):
        fastlora.patch(model, config=fastlora.LoraConfig(r=2, target_modules=["0"], use_dora=True), adapter=adapter)
    fill(model)
    x = torch.randn(4, 16, dtype=torch.float64)
    alone = []
    for adapter in ("a", "b"):
        fastlora.set_adapter(model, adapter)
        alone.append(model(x))
    with fastlora.disabled(model):
        base = model(x)
    for order in (["a", "b"], ["b", "a"]):
        fastlora.set_adapter(model, order)
        assert_close(model(x), sum(alone) - base)


def test_several_active_adapters_train():
    model = ours()
    wrapped = theirs(model)
    fastlora.set_adapter(model, ["a", "b"])
    wrapped.base_model.set_adapter(["a", "b"])
    for one in (model, wrapped):
        one(**make_batch()).loss.backward()
    expected = {name: parameter.grad for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(found) == len(expected) > 0
    for name, gradient in found.items():
        assert_close(gradient, expected[f"base_model.model.{name}.weight"])


def test_dropout_of_several_adapters_is_independent():
    """With two adapters that are each other's negative, one mask for both would cancel."""
    model = nn.Sequential(nn.Linear(64, 32, dtype=torch.float64))
    for name in ("a", "b"):
        fastlora.patch(model, r=4, targets=["0"], dropout=0.5, adapter=name)
    layer = model[0]
    with torch.no_grad():
        for part, sign in (("lora_A", 1), ("lora_B", -1)):
            values = torch.randn_like(getattr(layer, part)["a"])
            getattr(layer, part)["a"].copy_(values)
            getattr(layer, part)["b"].copy_(sign * values)
    fastlora.set_adapter(model, ["a", "b"])
    x = torch.randn(8, 64, dtype=torch.float64)
    assert_close(model.eval()(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert (model.train()(x) - nn.functional.linear(x, layer.weight, layer.bias)).abs().mean() > 0.1


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("settings", [{}, dict(use_dora=True), dict(lora_bias=True)], ids=str)
def test_several_adapters_merge_as_they_add_up(settings, quantize):
    model = make_model("llama", torch.float64 if quantize is None else torch.float32)
    for adapter in ("a", "b"):
        config = fastlora.LoraConfig(r=3, target_modules=TARGETS["llama"], **settings)
        fastlora.patch(model, config=config, adapter=adapter, quantize=quantize)
    fill(model).eval()
    fastlora.set_adapter(model, ["a", "b"])
    before, frozen = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    fastlora.merge(model)
    merged = logits(model)
    if quantize is None:
        assert_close(merged, before)
    else:
        with fastlora.disabled(model):
            base = logits(model)
        assert (merged - before).norm() < 0.1 * (before - base).norm()  # what the int8 grid leaves of the change
    fastlora.unmerge(model)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters())


def test_merge_chooses_adapters():
    model = ours()
    fastlora.set_adapter(model, ["a", "c"])
    expected = logits(model)
    fastlora.set_adapter(model, "b")
    fastlora.merge(model, ["a", "c"])
    assert_close(logits(model), expected)


def test_delete_frees_and_falls_back():
    model = ours()
    fastlora.set_adapter(model, "c")
    expected = logits(model)
    count = sum(p.numel() for p in model.parameters())
    fastlora.delete_adapter(model, "a")
    assert torch.equal(logits(model), expected)
    assert sum(p.numel() for p in model.parameters()) < count
    assert list(adapters(model)) == ["b", "c"]
    fastlora.delete_adapter(model, "c")
    assert active_adapters(model) == ("b",)
    fastlora.delete_adapter(model, "b")
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    plain = make_model("llama", torch.float64)
    assert torch.equal(logits(model), logits(plain.eval()))


def test_rename_changes_nothing_else(tmp_path):
    model = ours()
    fastlora.set_adapter(model, ["b", "a"])
    expected = logits(model)
    fastlora.rename_adapter(model, "a", "new")
    assert torch.equal(logits(model), expected)
    assert active_adapters(model) == ("b", "new")
    fastlora.save(model, tmp_path)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["b", "c", "new"]


def test_set_scale():
    model = ours()
    fastlora.set_adapter(model, "b")
    with fastlora.disabled(model):
        base = logits(model)
    full = logits(model)
    fastlora.set_scale(model, "b", 0.0)
    assert torch.equal(logits(model), base)
    fastlora.set_scale(model, "b", 1.0)
    assert torch.equal(logits(model), full)


def rows_one_by_one(model, batch, rows):
    """The logits of each row under its own adapter alone."""
    found = []
    for i, adapter in enumerate(rows):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        if adapter is None:
            with fastlora.disabled(model):
                found.append(model(**row).logits)
        else:
            fastlora.set_adapter(model, adapter)
            found.append(model(**row).logits)
    return torch.cat(found)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("settings", [{}, dict(lora_bias=True)], ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_mixed_batch_equals_each_row_alone(name, settings, quantize):
    model = make_model(name, torch.float64)
    for i, adapter in enumerate(NAMES):
        config = fastlora.LoraConfig(r=2 + i, target_modules=TARGETS[name][: 1 + i], **settings)
        fastlora.patch(model, config=config, adapter=adapter, quantize=quantize)
    fill(model).eval()
    rows, batch = ["b", None, "a", "c", "b"], make_batch(batch=5)
    with torch.no_grad():
        expected = rows_one_by_one(model, batch, rows)
        with fastlora.mixed(model, rows):
            assert_close(model(**batch).logits, expected)
        indices = torch.tensor([1, -1, 0, 2, 1])
        with fastlora.mixed(model, indices, NAMES):
            assert_close(model(**batch).logits, expected)


def test_mixed_batch_trains_each_adapter_on_its_rows():
    model, rows, batch = ours(), ["b", None, "a", "b"], make_batch(batch=4)
    alone = copy.deepcopy(model)
    with fastlora.mixed(model, rows):
        model(**batch).logits.square().sum().backward()
    rows_one_by_one(alone, batch, rows).square().sum().backward()
    for (name, found), (_, expected) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        if ".c" in name or ".lora_" not in name:
            assert found.grad is None
        else:
            assert_close(found.grad, expected.grad)


def test_mixed_batch_drops_per_adapter():
    """An adapter without dropout is exact in a batch beside one with it."""
    model = nn.Sequential(nn.Linear(32, 16, dtype=torch.float64))
    for name, p in (("a", 0.0), ("b", 0.5)):
        fastlora.patch(model, r=4, targets=["0"], dropout=p, adapter=name)
    fill(model)
    x = torch.randn(2, 8, 32, dtype=torch.float64)
    with fastlora.mixed(model, ["a", "b"]):
        trained, plain = model.train()(x), model.eval()(x)
    assert_close(trained[0], plain[0])
    assert not torch.allclose(trained[1], plain[1])


def test_mixed_batch_follows_what_is_written_to_its_adapters():
    model, batch = ours(), make_batch(batch=2)
    with torch.no_grad(), fastlora.mixed(model, ["a", "b"]):
        first, again = model(**batch).logits, model(**batch).logits
        for name, parameter in model.named_parameters():
            if ".lora_B.b" in name:
                parameter.zero_()
        changed = model(**batch).logits
    assert torch.equal(first, again)
    assert torch.equal(first[0], changed[0])
    with torch.no_grad(), fastlora.mixed(model, ["a", None]):
        assert_close(changed, model(**batch).logits)


def test_compiled_mixed_batch_serves_other_rows_without_recompiling():
    model = ours(dtype=torch.float32)
    batch = make_batch(batch=3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        with fastlora.mixed(model, torch.tensor([0, 1, 2]), NAMES):
            compiled(**batch)
        for rows in ([2, -1, 0], [1, 1, 1]):
            with fastlora.mixed(model, torch.tensor(rows), NAMES), torch._dynamo.config.patch(error_on_recompile=True):
                found = compiled(**batch).logits
                assert torch.equal(found, model(**batch).logits)


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        (["a", "z"], None, "expected one of .*found 'z'"),
        ([], None, "found none"),
        (torch.tensor([0, 3]), NAMES, "expected indices from -1 to 2"),
        (torch.tensor([0.0]), NAMES, "expected names"),
        (["a"], ["b"], r"expected adapters of \['b'\]"),
    ],
)
def test_mixed_refuses(rows, names, message):
    model = ours()
    with pytest.raises(ValueError, match=message), fastlora.mixed(model, rows, names):
        pass
    logits(model)


def test_mixed_refuses_another_batch_size():
    model = ours()
    with fastlora.mixed(model, ["a", "b"]), pytest.raises(ValueError, match="expected a batch of 2 rows"):
        model(**make_batch(batch=3, tokens=5))
    with pytest.raises(ValueError, match="without DoRA"), fastlora.mixed(ours(use_dora=True), ["a"]):
        pass


REFUSED = {
    "unknown": (lambda m: fastlora.set_adapter(m, ["a", "z"]), "found 'z'"),
    "twice": (lambda m: fastlora.set_adapter(m, ["a", "a"]), "each name once"),
    "delete unknown": (lambda m: fastlora.delete_adapter(m, "z"), "found 'z'"),
    "rename to one that is": (lambda m: fastlora.rename_adapter(m, "a", "b"), "expected a new name"),
    "rename with a dot": (lambda m: fastlora.rename_adapter(m, "a", "x.y"), "without dots"),
    "scale": (lambda m: fastlora.set_scale(m, "a", float("nan")), "finite"),
    "merge unknown": (lambda m: fastlora.merge(m, ["z"]), "found 'z'"),
}


@pytest.mark.parametrize(("action", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(action, message):
    model = ours()
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        action(model)
    assert torch.equal(logits(model), expected)
    assert list(adapters(model)) == NAMES


TRAINED = {
    "bias-all": ("gpt2", dict(bias="all")),
    "bias-lora-only": ("gpt2", dict(bias="lora_only")),
    "head": ("llama", dict(modules_to_save=["lm_head"])),
    "norms": ("llama", dict(modules_to_save=["norm", "input_layernorm"])),
}


@pytest.mark.parametrize(("name", "settings"), TRAINED.values(), ids=TRAINED.keys())
def test_trained_parameters_as_in_peft(name, settings, tmp_path):
    """Trained for some steps, saved by each, loaded by the other."""
    settings = dict(r=2, lora_alpha=3, target_modules=TARGETS[name]) | settings
    torch.manual_seed(0)
    model = fastlora.patch(make_model(name), config=fastlora.LoraConfig(**settings))
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(make_model(name), peft.LoraConfig(**settings))
    for one in (model, wrapped):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            one.eval()(**make_batch()).loss.backward()
            optimizer.step()
    fastlora.save(model, tmp_path / "ours")
    wrapped.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    for key, value in other.items():
        assert torch.allclose(mine[key], value, rtol=1e-3, atol=1e-6), key
    loaded = fastlora.load(make_model(name), tmp_path / "theirs").eval()
    assert torch.allclose(logits(loaded), logits(wrapped), rtol=1e-4, atol=1e-5)
    loaded = peft.PeftModel.from_pretrained(make_model(name), tmp_path / "ours").eval()
    assert torch.allclose(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "settings"), TRAINED.values(), ids=TRAINED.keys())
def test_trained_parameters_come_and_go_with_their_adapter(name, settings):
    plain = make_model(name).eval()
    model = copy.deepcopy(plain)
    for adapter in ("a", "b"):
        fastlora.patch(
            model, config=fastlora.LoraConfig(r=2, target_modules=TARGETS[name], **settings), adapter=adapter
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))  # of b, which is active
    changed = logits(model)
    assert not torch.equal(changed, logits(plain))
    with fastlora.disabled(model):
        assert torch.equal(logits(model), logits(plain))
    fastlora.set_adapter(model, "a")
    fastlora.set_scale(model, "a", 0.0)
    assert torch.equal(logits(model), logits(plain))
    with pytest.raises(ValueError, match="one with trained modules or biases"):
        fastlora.set_adapter(model, ["a", "b"])
    fastlora.set_adapter(model, "b")
    assert torch.equal(logits(model), changed)
    fastlora.unload(model)
    for (_, found), (key, expected) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(found, expected), key
        assert found.requires_grad


def test_unload_keeps_trained_parameters_when_merging():
    model = fastlora.patch(
        make_model("llama"), config=fastlora.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    ).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    expected = logits(model)
    fastlora.unload(model, merge=True)
    assert torch.equal(logits(model), expected)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_modules_to_save_refuses_what_is_not_there():
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"modules_to_save: .* found 'classifier'"):
        fastlora.patch(
            model, config=fastlora.LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"])
        )  # fmt: skip
    assert all(p.requires_grad for p in model.parameters())


def test_64_adapters_take_their_own_memory_and_no_more():
    model = make_model("llama")
    plain = sum(p.nbytes for p in model.parameters())
    for i in range(64):
        fastlora.patch(model, r=2, targets=["q_proj", "v_proj"], adapter=f"a{i}")
    layers = lora_layers(model).values()
    adapters_alone = 64 * sum(4 * 2 * sum(layer.features(layer)) for layer in layers)
    assert sum(p.nbytes for p in model.parameters()) == plain + adapters_alone
    assert len(layers) == 2 * model.config.num_hidden_layers
    rows = [f"a{i}" for i in range(0, 64, 8)]
    batch = make_batch(batch=8)
    fill(model).eval()
    with torch.no_grad(), fastlora.mixed(model, rows):
        mixed = model(**batch).logits
    with torch.no_grad():
        alone = rows_one_by_one(model, batch, rows)
    assert (mixed - alone).abs().max() <= 64 * torch.finfo(torch.float32).eps * alone.abs().max()


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_dora_compiles_as_one_graph(quantize):
    model = make_model("llama")
    config = fastlora.LoraConfig(r=3, target_modules=TARGETS["llama"], use_dora=True)
    fill(fastlora.patch(model, config=config, quantize=quantize)).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(model(**make_batch()).loss, [p for p in model.parameters() if p.requires_grad])
    found = torch.autograd.grad(compiled(**make_batch()).loss, [p for p in model.parameters() if p.requires_grad])
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 64 * torch.finfo(torch.float32).eps * other.abs().max()

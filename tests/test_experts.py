"""Adapters on parameters: fused experts and routers against PEFT's, and what a module reads of them."""

import copy
import itertools

import peft
import pytest
import torch
import transformers
from accuracy import assert_as_accurate_as_eager
from compilers import compiles
from models import VOCABULARY, make_batch, make_model
from pairs import (
    adapter_of,
    assert_files_go_both_ways,
    assert_is_original,
    assert_same_tensors,
    assert_trains_as_peft,
    bits,
    fill,
    make_pair,
    train,
)
from torch import nn

import fastlora
from fastlora.adapters.registry import lora_layers
from fastlora.layers.adapted import AdaptedWeight

# What PEFT says of patterns that match parameters and of what it reads from transformers, and dynamo of transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(The following (rank|alpha)_pattern|.*checkpointing. is deprecated|Dynamo detected a call to a .functools)"
)

_SMALL = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
              num_key_value_heads=2, head_dim=8, num_experts_per_tok=2)  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MODELS = {
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig, dict(num_local_experts=5)),
    "qwen2_moe": (transformers.Qwen2MoeForCausalLM, transformers.Qwen2MoeConfig,
                  dict(num_experts=5, moe_intermediate_size=24, shared_expert_intermediate_size=24)),
    "qwen3_moe": (transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig,
                  dict(num_experts=5, moe_intermediate_size=24)),
    "gpt_oss": (transformers.GptOssForCausalLM, transformers.GptOssConfig, dict(num_local_experts=5)),
    "llama4": (transformers.Llama4ForCausalLM, transformers.Llama4TextConfig,
               dict(num_local_experts=5, num_experts_per_tok=1, intermediate_size_mlp=40)),
}  # fmt: skip
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
CASES = [*itertools.product(["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"], IMPLEMENTATIONS), ("llama4", "eager")]
every_case = pytest.mark.parametrize(("name", "implementation"), CASES)
every_model = pytest.mark.parametrize("name", MODELS)


def make(name, implementation="eager", dtype=torch.float32):
    """A model whose routing and experts matter to the output."""
    model_class, config_class, sizes = MODELS[name]
    model = model_class(config_class(**_SMALL | sizes))
    if name != "llama4":  # its experts are one product over all of them
        model.set_experts_implementation(implementation)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.to(dtype)


def settings(**options):
    return dict(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=EXPERTS) | options


def logits(model):
    return model(input_ids=make_batch(tokens=12, batch=4)["input_ids"]).logits


def patched(name="mixtral", implementation="eager", dtype=torch.float32, seed=1, **options):
    torch.manual_seed(0)
    config = fastlora.LoraConfig(**settings(**options))
    return fill(fastlora.patch(make(name, implementation, dtype), config=config), seed).eval()


def summed(model, name, adapter="default"):
    """The plain model in float64 with `W_e + s B_e A_e` written out, expert by expert."""
    plain = make(name).double()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "lora_" not in key})
    for path, layer in lora_layers(model).items():
        a, b, scale = (tensor.detach().double() for tensor in (*layer.parts(adapter).values(), torch.tensor(2.0)))
        if not path.endswith("gate_up_proj") and not path.endswith("down_proj"):
            plain.get_submodule(path).weight.data += scale * b @ a
            continue
        owner, _, parameter = path.rpartition(".lora_")
        weight = plain.get_submodule(owner).get_parameter(parameter).data
        experts, rank = len(weight), len(a) // len(weight)
        for expert in range(experts):
            added = b[:, torch.arange(rank) * experts + expert] @ a[expert * rank : (expert + 1) * rank]
            weight[expert] += scale * (added.T if name == "gpt_oss" else added)
    return plain.eval()


def frozen_bits(model):
    return {name: tensor for name, tensor in bits(model).items() if "lora_" not in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", [True, False, "gaussian"])
@every_model
def test_draws_what_peft_draws(name, init, dtype):
    ours, theirs = make_pair(lambda: make(name, dtype=dtype), settings(init_lora_weights=init))
    assert_same_tensors(*({key: p.data for key, p in adapter_of(model).items()} for model in (ours, theirs)))


@every_case
def test_trains_as_peft(name, implementation):
    assert_trains_as_peft(lambda: make(name, implementation), settings(), logits, exact_of=exact)


def exact(theirs):
    """PEFT's model in float64; there is a grouped product in other dtypes alone."""
    model = copy.deepcopy(theirs).double()
    if model.config.model_type != "llama4_text":
        model.base_model.model.set_experts_implementation("eager")
    return model


@every_case
def test_an_expert_has_its_rows_and_columns(name, implementation):
    """Against the layout written out, not against PEFT."""
    model = patched(name, implementation)
    torch.testing.assert_close(logits(model).double(), logits(summed(model, name)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [lambda: make_model("llama"), lambda: make("gpt_oss")], ids=["llama", "gpt_oss"])
def test_modules_are_those_of_the_architecture_besides(make):
    """Or none, where it has no default."""
    options = settings(target_modules=None, target_parameters=["o_proj.weight"])
    ours, theirs = make_pair(make, options)
    assert_same_tensors(*({key: p.data for key, p in adapter_of(model).items()} for model in (ours, theirs)))
    assert any("v_proj" in key for key in adapter_of(ours)) == (ours.config.model_type == "llama")


SELECTIONS = {
    "parameters-alone": dict(target_modules=[]),
    "one-of-two": dict(target_parameters=["experts.down_proj"]),
    "whole-name": dict(target_modules=[], target_parameters=["model.layers.1.mlp.experts.gate_up_proj"]),
    "router": dict(target_parameters=["gate.weight", "experts.down_proj"]),
    "linear-weight": dict(target_modules=["q_proj"], target_parameters=["v_proj.weight", "lm_head.weight"]),
    "patterns": dict(rank_pattern={"experts.down_proj": 2}, alpha_pattern={r"layers\.0\..*gate_up_proj": 3}),
    "rslora": dict(use_rslora=True),
}


@pytest.mark.parametrize("options", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_selects_and_scales_as_peft(options):
    assert_trains_as_peft(lambda: make("mixtral"), settings(**options), logits)


def test_scales_are_those_of_the_patterns(tmp_path):
    model = patched(**SELECTIONS["patterns"])
    before = {name: layer.scaling["default"] for name, layer in lora_layers(model).items()}
    assert len(set(before.values())) > 1
    fastlora.set_scale(model, "default", 0.5)
    assert {name: 2 * layer.scaling["default"] for name, layer in lora_layers(model).items()} == before
    fastlora.set_scale(model, "default", 1)
    assert {name: layer.scaling["default"] for name, layer in lora_layers(model).items()} == before


def test_hotswap_keeps_the_scales_of_the_patterns(tmp_path):
    model = patched(alpha_pattern={"gate_up_proj": 3}).eval()
    fastlora.save(model, tmp_path)
    other = fastlora.hotswap(patched(seed=2), tmp_path).eval()  # half the alpha: half of B, which is exact
    with torch.no_grad():
        assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("adapter", ["default", "other"])
@every_model
def test_files_go_both_ways(name, adapter, tmp_path):
    assert_files_go_both_ways(lambda: make(name), settings(rank_pattern={"down_proj": 2}), logits, tmp_path, adapter)


def test_files_have_the_names_of_peft_for_one_of_two_parameters(tmp_path):
    """The last parameter of an adapter is outermost there, whatever other adapters have."""
    model = patched()
    options = settings(target_parameters=["experts.gate_up_proj"], target_modules=[])
    fastlora.patch(model, config=fastlora.LoraConfig(**options), adapter="second")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(make("mixtral"), peft.LoraConfig(**options), adapter_name="second")
    assert adapter_of(model, "second").keys() == adapter_of(theirs, "second").keys()
    fastlora.save(fill(model, 5, "second"), tmp_path)
    torch.manual_seed(0)
    loaded = fastlora.load(make("mixtral"), tmp_path / "second")
    found, saved = (adapter_of(m, adapter) for m, adapter in ((loaded, "default"), (model, "second")))
    assert_same_tensors({key: p.data for key, p in found.items()}, {key: p.data for key, p in saved.items()})


@every_case
def test_known_experts_never_form_the_sum(name, implementation, monkeypatch):
    model = patched(name, implementation).train()
    monkeypatch.setattr(AdaptedWeight, "dense", None)
    logits(model).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter_of(model).values())


def test_autograd_keeps_no_adapted_experts():
    """Of the sizes of all experts it saves the frozen weights alone."""
    model, saved = patched("mixtral", "grouped_mm").train(), []
    frozen = {p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        logits(model)
    experts = [t for t in saved if t.dim() == 3 and len(t) == 5 and t.numel() >= 5 * 32 * 40]
    assert experts
    assert all(t.untyped_storage().data_ptr() in frozen for t in experts)


X, W3, W2 = torch.Size([3, 5, 4]), torch.Size([3, 6, 4]), torch.Size([6, 4])
OPERATIONS = {
    "linear": (W2, X, lambda w, x: torch.nn.functional.linear(x, w)),
    "linear-bias": (W2, X, lambda w, x: torch.nn.functional.linear(x, w, torch.arange(6.0).double())),
    "bmm-left": (W3, X, lambda w, x: torch.bmm(w, x.transpose(1, 2))),
    "bmm-right": (W3, X, lambda w, x: x.bmm(w.transpose(1, -1))),
    "matmul": (W3, X, lambda w, x: x @ w.transpose(-2, -1)),
    "matmul-left": (W3, X, lambda w, x: w @ x.mT),
    "both": (W3, X, lambda w, x: w.transpose(1, 2) @ w),
    "one-expert": (W3, X, lambda w, x: x[1] @ w[1].transpose(0, 1)),
    "some-experts": (W3, X, lambda w, x: torch.bmm(w[torch.tensor([2, 0, 2])], x.mT)),
    "masked-experts": (W3, X, lambda w, x: torch.bmm(w[torch.tensor([True, False, True])], x[:2].mT)),
    "rows": (W2, X, lambda w, x: w[:3] @ x.mT),
    "chunk": (W3, X, lambda w, x: torch.cat([part @ x.mT for part in w.chunk(2, dim=1)], dim=1)),
    "other-transpose": (W3, X, lambda w, x: w.transpose(0, 1).sum(2)),
    "einsum": (W3, X, lambda w, x: torch.einsum("eoi,eti->eto", w, x)),
    "arithmetic": (W3, X, lambda w, x: torch.tanh(w) + w * 2 - (1 - w) / 3 + x.sum() * -w + w**2),
    "iteration": (W3, X, lambda w, x: sum(x[i] @ expert.mT for i, expert in enumerate(w))),
    "sizes": (W3, X, lambda w, x: x.new_tensor([*w.shape, w.size(1), *w.size(), w.dim(), len(w), w.ndim, w.numel()])),
}


@pytest.mark.parametrize(("shape", "x_shape", "operation"), OPERATIONS.values(), ids=OPERATIONS.keys())
def test_an_adapted_weight_is_the_sum(shape, x_shape, operation):
    """In whatever a module does with it."""
    w, x = torch.randn(shape, dtype=torch.float64), torch.randn(x_shape, dtype=torch.float64)
    terms = [
        (torch.randn(*shape[:-1], r, dtype=w.dtype), torch.randn(*shape[:-2], r, shape[-1], dtype=w.dtype), s)
        for r, s in ((2, 0.5), (3, 2.0))
    ]
    total = w + sum(scale * left @ right for left, right, scale in terms)
    actual = operation(AdaptedWeight(w, terms), x)
    torch.testing.assert_close(actual, operation(total, x), rtol=1e-12, atol=1e-12)


class Table(nn.Module):
    """A module that nobody knows, with parameters that it does more with than multiply."""

    def __init__(self, adds_up=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4))
        self.other = nn.Parameter(torch.randn(4, 6))
        self.adds_up = adds_up

    def forward(self, x):
        with torch.no_grad():
            assert self.weight.shape == (3, 6, 4)
            assert isinstance(self.weight, torch.Tensor)
        y = torch.stack([x @ torch.tanh(self.weight[e]).T for e in range(3)]) @ self.other.exp().T
        return (y * self.weight.sum()).sum(0)


def table():
    torch.manual_seed(0)
    return nn.Sequential(Table())


def test_unknown_modules_read_the_sum_once(monkeypatch):
    config = fastlora.LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=["weight", "other"])
    model = fill(fastlora.patch(table(), config=config), 1).double()
    plain, x = table().double(), torch.randn(5, 4, dtype=torch.float64)
    added = {name: [] for name in ("weight", "other")}
    for path, layer in lora_layers(model).items():
        a, b = layer.parts("default").values()
        name = path.rpartition("lora_")[2]
        experts = 3 if name == "weight" else 1
        delta = torch.einsum("ore,eri->eoi", b.view(len(b), -1, experts), a.view(experts, -1, a.shape[1]))
        added[name] = delta if name == "weight" else delta[0]
    with torch.no_grad():
        plain[0].weight += added["weight"]
        plain[0].other += added["other"]
    calls, dense = [], AdaptedWeight.dense
    monkeypatch.setattr(AdaptedWeight, "dense", lambda self: calls.append(1) or dense(self))
    y = model(x)
    assert len(calls) == 3  # weight without and with autograd, other with it
    torch.testing.assert_close(y, plain(x), rtol=1e-9, atol=1e-9)
    y.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter_of(model).values())


def test_others_read_the_sum_as_a_tensor():
    model = patched("mixtral")
    experts = model.model.layers[0].mlp.experts
    frozen, read = experts._parameters["down_proj"], experts.down_proj
    assert type(read) is torch.Tensor
    assert read.requires_grad
    assert not torch.equal(read, frozen)
    with fastlora.disabled(model):
        assert experts.down_proj is frozen
    fastlora.merge(model)
    torch.testing.assert_close(experts.down_proj, read, rtol=1e-6, atol=1e-6)


@every_case
def test_several_adapters_add_up(name, implementation):
    model = patched(name, implementation)
    fastlora.patch(model, config=fastlora.LoraConfig(**settings(rank_pattern={"down_proj": 5})), adapter="second")
    fill(model, 2, "second")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(make(name, implementation), peft.LoraConfig(**settings()))
    theirs.add_adapter("second", peft.LoraConfig(**settings(rank_pattern={"down_proj": 5})))
    for adapter, seed in (("default", 1), ("second", 2)):
        fill(theirs, seed, adapter)
    fastlora.set_adapter(model, ["default", "second"])
    theirs.base_model.set_adapter(["default", "second"])
    assert_as_accurate_as_eager(*(logits(m).detach() for m in (model, theirs.eval(), exact(theirs))), "logits")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_in_16_bits_are_as_accurate_as_peft(name, implementation):
    """The experts alone, since a router may choose others for a last bit."""
    torch.manual_seed(1)
    inputs = torch.randn(400, 32), torch.randint(5, (400, 2)), torch.rand(400, 2)

    def make_two(seed):
        torch.manual_seed(seed)
        models = make_pair(lambda: make(name, implementation, torch.bfloat16), settings(target_modules=[]), seed)
        return [fill(model, seed) for model in models]

    results = []
    for seed in range(3):
        ours, theirs = make_two(seed)
        for model in (ours, theirs, exact(theirs)):
            base = model.base_model.model if isinstance(model, peft.PeftModel) else model
            x, chosen, weights = (t.to(base.dtype) if t.is_floating_point() else t for t in inputs)
            y = base.model.layers[0].mlp.experts(x, chosen, weights)
            y.square().mean().backward()
            gradients = [p.grad for key, p in sorted(adapter_of(model).items()) if ".0." in key]
            results.append((y.detach(), *(g / g.abs().max() for g in gradients)))
    pools = [[torch.cat([t.flatten() for t in r[1:]]) for r in results[kind::3]] for kind in range(3)]
    outputs = [torch.cat([r[0] for r in results[kind::3]]) for kind in range(3)]
    assert_as_accurate_as_eager(*outputs, "output")
    assert_as_accurate_as_eager(*(torch.cat(pool) for pool in pools), "gradients")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_model
def test_merge_is_the_rounded_sum_and_unmerge_exact(name, dtype):
    model = patched(name, dtype=dtype)
    before, expected = frozen_bits(model), logits(model)
    totals = frozen_bits(summed(model, name))
    fastlora.merge(model)
    merged = frozen_bits(model)
    changed = {key for key in before if not torch.equal(merged[key], before[key])}
    assert len(changed) == 6
    for key in changed:
        assert_as_accurate_as_eager(merged[key], totals[key].to(dtype), totals[key], key)
    with fastlora.disabled(model):
        assert_same_tensors(frozen_bits(model), before)
    assert_same_tensors(frozen_bits(model), merged)
    fastlora.unmerge(model)
    assert_same_tensors(frozen_bits(model), before)
    assert torch.equal(logits(model), expected)


def test_a_merge_that_is_not_finite_changes_nothing():
    model = patched()
    before = frozen_bits(model)
    lora_layers(model)["model.layers.1.mlp.experts.lora_down_proj"].lora_B["default"].data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.1\.mlp.*: expected a finite merged down_proj, found inf or nan"):
        fastlora.merge(model)
    assert_same_tensors(frozen_bits(model), before)


@every_model
def test_disabled_is_the_frozen_model(name):
    torch.manual_seed(0)
    expected, model = logits(make(name).eval()), patched(name)
    assert not torch.equal(logits(model), expected)
    with fastlora.disabled(model):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("merged", [False, True])
@every_model
def test_unload_gives_the_modules_back(name, merged):
    model = patched(name)
    fastlora.patch(model, config=fastlora.LoraConfig(**settings()), adapter="second")
    torch.manual_seed(0)
    original = make(name)
    if merged:
        fastlora.merge(model)
    fastlora.unload(model)
    assert_is_original(model, original)


def test_unload_merges():
    model = patched()
    expected = frozen_bits(fastlora.merge(copy.deepcopy(model)))
    assert_same_tensors(bits(fastlora.unload(model, merge=True)), expected)


def test_the_parameters_keep_their_names_and_places():
    model, before = patched(), make("mixtral")
    assert {n: p.shape for n, p in model.named_parameters() if "lora_" not in n} == {
        n: p.shape for n, p in before.named_parameters()
    }
    assert isinstance(model.model.layers[0].mlp.experts, type(before.model.layers[0].mlp.experts))
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    assert not any(tensor.any() for tensor in model.state_dict().values())


def block(model):
    """The first layer's mixture, routing included."""
    layer = model.model.layers[0]
    return layer.mlp if hasattr(layer, "mlp") else layer.feed_forward


def run_block(model, call):
    torch.manual_seed(2)
    y = call(torch.randn(2, 12, 32).to(model.dtype))
    return y[0] if isinstance(y, tuple) else y


def step(model, call=None):
    """The block's outputs and gradients, computed by a compiled form of it if that is given."""
    model.zero_grad()
    y = run_block(model, block(model) if call is None else call)
    y.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in adapter_of(model).items() if p.grad is not None}
    assert len(gradients) == 4
    return {"y": y.detach()} | gradients


def compiled(model):
    torch.compiler.reset()
    return torch.compile(block(model), fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(("name", "implementation"), [case for case in CASES if case[1] != "eager"] + CASES[-1:])
def test_compiles_without_a_graph_break(name, implementation):
    # A compiled grouped product is torch's own in bfloat16 alone.
    dtype = torch.bfloat16 if implementation == "grouped_mm" else torch.float32
    model = patched(name, implementation, dtype).train()
    assert_same_tensors(step(model, compiled(model)), step(model))


def test_compiles_the_grouped_product_of_transformers():
    """Which stands in for torch's in float32."""
    plain = make("mixtral", "grouped_mm").train()
    if not compiles(block(plain), lambda call: run_block(plain, call)):
        pytest.skip("this torch does not compile the backward of transformers' own")
    model = patched("mixtral", "grouped_mm").train()
    double = copy.deepcopy(model).double()
    double.set_experts_implementation("eager")
    actual, eager, truth = step(model, compiled(model)), step(model), step(double)
    for name, value in actual.items():
        assert_as_accurate_as_eager(value, eager[name], truth[name], name)


@pytest.mark.parametrize(("name", "implementation"), [case for case in CASES if case[1] != "eager"] + CASES[-1:])
def test_compiled_experts_never_form_the_sum(name, implementation, monkeypatch):
    model = patched(name, implementation, torch.bfloat16 if implementation == "grouped_mm" else torch.float32).train()
    monkeypatch.setattr(AdaptedWeight, "dense", None)
    step(model, compiled(model))


def test_a_compiled_model_follows_its_adapters():
    model = patched("mixtral", "batched_mm")
    call, seen = compiled(model), []
    scaling = lora_layers(model)["model.layers.0.mlp.experts.lora_down_proj"].scaling

    @torch.no_grad()
    def check():
        seen.append(run_block(model, call))
        assert torch.equal(seen[-1], run_block(model, block(model)))

    check()
    scaling["default"] = 5.0
    check()
    with fastlora.disabled(model):
        check()
    fastlora.merge(model)
    check()
    fastlora.unmerge(model)
    check()
    assert len({y.sum().item() for y in seen[:4]}) == 4
    assert torch.equal(seen[4], seen[1])


def test_compiles_a_whole_model():
    model = patched("mixtral", "batched_mm")
    torch.compiler.reset()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(logits(whole), logits(model))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize(("name", "implementation"), CASES[:3] + CASES[-1:])
def test_checkpointing_changes_no_bit(name, implementation, reentrant):
    model = patched(name, implementation).train()
    expected = train(model, adapter_of(model), logits, steps=1)
    model = patched(name, implementation).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same_tensors(train(model, adapter_of(model), logits, steps=1), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_computes_in_16_bits(implementation):
    """As accurately as for the plain experts with the sum for weights; a router may choose others for a last bit."""
    model = patched("mixtral", implementation).train()
    models = model, summed(model, "mixtral").float(), summed(model, "mixtral")
    models[1].set_experts_implementation(implementation)
    chosen, weights = torch.randint(5, (400, 2)), torch.rand(400, 2)
    x, results = torch.randn(400, 32), []
    for each in models:
        dtype = each.dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            results.append(each.model.layers[0].mlp.experts(x.to(dtype), chosen, weights.to(dtype)))
    results[0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for key, p in adapter_of(model).items() if ".0.mlp." in key)
    assert_as_accurate_as_eager(*(y.detach() for y in results), "output")


def test_a_copy_is_independent():
    model = patched()
    expected, duplicate = logits(model), copy.deepcopy(model)
    assert not torch.equal(logits(fill(duplicate, 9)), expected)
    fastlora.merge(duplicate)
    assert torch.equal(logits(model), expected)


def test_int8_leaves_the_experts_dense():
    torch.manual_seed(0)
    model = fastlora.patch(make("mixtral"), config=fastlora.LoraConfig(**settings()), quantize="int8")
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.int8
    assert model.model.layers[0].mlp.experts._parameters["down_proj"].dtype == torch.float32
    logits(model).sum().backward()


REFUSED = {
    "dropout": (dict(lora_dropout=0.1), ValueError, "lora_dropout: expected none at '.*experts.gate_up_proj'.* 0.1"),
    "dora": (dict(use_dora=True), ValueError, "use_dora: expected none at '.*experts.gate_up_proj'"),
    "bias": (dict(lora_bias=True), ValueError, "lora_bias: expected none at '.*experts.gate_up_proj'"),
    "nothing": (dict(target_parameters=["experts.up_down"]), ValueError, "found none for .'experts.up_down'.; nearest"),
    "one-axis": (dict(target_parameters=["norm.weight"]), ValueError, r"expected 2 or 3 axes, found shape \[32\]"),
    "module-too": (dict(target_parameters=["q_proj.weight"]), ValueError, "found one of '.*q_proj'"),
    "no-module": (dict(target_modules=["q"]), ValueError, "targets: expected names of adaptable layers, found none"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_and_leaves_the_model_alone(options, error, message):
    model = make("mixtral")
    before, classes = bits(model), [type(m) for m in model.modules()]
    with pytest.raises(error, match=message):
        fastlora.patch(model, config=fastlora.LoraConfig(**settings(**options)))
    assert_same_tensors(bits(model), before)
    assert [type(m) for m in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_refuses_what_is_no_weight():
    model = table()
    model[0].weight = nn.Parameter(torch.zeros(3, 6, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"target_parameters: expected one of .*, found torch.uint8 at '0.weight'"):
        fastlora.patch(model, config=fastlora.LoraConfig(target_modules=[], target_parameters=["weight"]))
    with pytest.raises(ValueError, match="expected parameters of submodules, found 'weight' of the model itself"):
        fastlora.patch(Table(), config=fastlora.LoraConfig(target_modules=[], target_parameters=["weight"]))
    with pytest.raises(TypeError, match="target_parameters: expected a list of names or None, found 'weight'"):
        fastlora.LoraConfig(target_parameters="weight")


def test_a_module_takes_one_kind_of_adapter():
    """Its layer's or its parameter's, whichever came first."""
    model = fastlora.patch(make("mixtral"), r=2, targets=["v_proj"])
    config = fastlora.LoraConfig(target_modules=["q_proj"], target_parameters=["v_proj.weight"])
    with pytest.raises(ValueError, match=r"expected modules without adapters of their own, found .*v_proj\.weight"):
        fastlora.patch(model, config=config, adapter="second")
    model = fastlora.patch(make("mixtral"), config=config)
    with pytest.raises(TypeError, match=r"found AdaptedLinear at '.*v_proj'"):
        fastlora.patch(model, r=2, targets=["v_proj"], adapter="second")


def test_a_damaged_file_changes_nothing(tmp_path):
    fastlora.save(patched(), tmp_path)
    model = make("qwen3_moe")
    before = bits(model)
    with pytest.raises(ValueError, match=r"expected .* of shape .* for 'model.layers.0.mlp.experts"):
        fastlora.load(model, tmp_path)
    assert_same_tensors(bits(model), before)


def test_an_adapted_router_is_still_recorded():
    """transformers finds routers by their class."""
    model = patched(target_parameters=["gate.weight"])
    outputs = model(input_ids=make_batch()["input_ids"], output_router_logits=True)
    assert len(outputs.router_logits) == 2
    with fastlora.disabled(model):
        frozen = model(input_ids=make_batch()["input_ids"], output_router_logits=True)
    assert not torch.equal(outputs.router_logits[0], frozen.router_logits[0])


def test_all_linear_takes_no_parameters():
    model = fastlora.patch(make("mixtral"), r=2, targets="all-linear")
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}

"""How adapters start: the numbers of PEFT, bit for bit where both compute the same, and the model's own function."""

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models import make_batch, make_model
from peft_inits import METHODS, MOVED, PEFT_HAS_NO_CONV1D, R, by_fastlora, by_peft, original_weights, starts
from torch import nn

import fastlora
from fastlora.inits import Initial, with_found_ranks
from fastlora.models.targets import pattern_value

pytestmark = pytest.mark.filterwarnings(
    "ignore:(fan_in_fan_out|.*corda.*|.*eva.*|.*[Ff]ull backward hook|.*checkpointing. is)"
)

NAMES = ["llama", "gpt2"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
PATTERNS = dict(rank_pattern={"0.self_attn.q_proj": 2, "down_proj": 6}, alpha_pattern={"v_proj": 3})

# The methods whose every operation is PEFT's, on the models where PEFT has them.
SAME_BITS = [
    (name, method)
    for method in METHODS
    for name in NAMES
    if not method.startswith(("eva", "loftq-8"))
    and not (name == "gpt2" and (method.startswith(PEFT_HAS_NO_CONV1D) or method.endswith("stable")))
]


def assert_same_start(ours, theirs, dtype):
    """Ours stay in float32, where PEFT rounds some to the dtype of the model; the frozen weight is of that dtype."""
    assert ours.keys() == theirs.keys()
    for name, start in theirs.items():
        assert ours[name].a.dtype == ours[name].b.dtype == torch.float32
        assert torch.equal(ours[name].a.to(dtype), start.a.to(dtype)), name
        assert torch.equal(ours[name].b.to(dtype), start.b.to(dtype)), name
        assert ours[name].weight.dtype == dtype
        assert ours[name].scaling == start.scaling


def assert_same_weights(ours, theirs, originals, method):
    for name, start in theirs.items():
        if method.startswith("lora-ga"):  # PEFT multiplies by the scaling after B A, we before, as in all other methods
            exact = originals[name].double() - start.scaling * (start.b.double() @ start.a.double())
            assert_as_accurate_as_eager(ours[name].weight, start.weight, exact, name)
        else:
            assert torch.equal(ours[name].weight, start.weight), name


@DTYPES
@pytest.mark.parametrize(("name", "method"), SAME_BITS)
def test_starts_as_in_peft(name, method, dtype):
    ours, theirs = starts(by_fastlora(name, METHODS[method], dtype)), starts(by_peft(name, METHODS[method], dtype))
    assert_same_start(ours, theirs, dtype)
    assert_same_weights(ours, theirs, original_weights(name, dtype), method)


@pytest.mark.parametrize(
    "method", ["pissa", "pissa_niter_4", "olora", "corda-kpm", "lora-ga-ArB2r-stable", "loftq-4-bits-1"]
)
@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain-scaling", "rslora"])
def test_ranks_and_scalings_of_the_patterns(method, use_rslora):
    settings = METHODS[method] | PATTERNS | dict(use_rslora=use_rslora)
    ours, theirs = starts(by_fastlora("llama", settings)), starts(by_peft("llama", settings))
    assert {len(start.a) for start in ours.values()} == {2, 4, 6}
    assert_same_start(ours, theirs, torch.float32)
    assert_same_weights(ours, theirs, original_weights("llama"), method)


def test_stable_lora_ga_of_a_conv1d_has_the_scale_of_its_outputs():
    """PEFT takes the fourth root of what a Conv1D stores first, its inputs (LoRA-GA, theorem 3.2, has the outputs)."""
    settings = METHODS["lora-ga-ArB2r-stable"]
    ours, theirs = starts(by_fastlora("gpt2", settings)), starts(by_peft("gpt2", settings))
    for name, start in theirs.items():
        N, K = start.weight.shape
        assert N != K
        assert torch.equal(ours[name].a, start.a)
        exact = start.b.double() * (N / K) ** 0.25
        assert_as_accurate_as_eager(ours[name].b, exact.float(), exact, name)


def test_loftq_with_8_bits():
    """PEFT multiplies by a rounded 1 / 127, we by absmax / 127: the last bit of the weight may differ."""
    ours = starts(by_fastlora("llama", METHODS["loftq-8-bits-1"]))
    for name, start in starts(by_peft("llama", METHODS["loftq-8-bits-1"])).items():
        mine, unit = ours[name], torch.finfo(torch.float32).eps
        assert ((mine.weight - start.weight).abs() <= unit * start.weight.abs()).all()
        # What that does to the adapter is no more than it does to the difference that the adapter approximates.
        moved = (mine.weight - start.weight).double().norm()
        products = [s.b.double() @ s.a.double() for s in (mine, start)]
        lacking = [(original_weights("llama")[name].double() - s.weight.double()) for s in (mine, start)]
        missing = [(lack - product).norm() for lack, product in zip(lacking, products, strict=True)]
        assert (missing[0] - missing[1]).abs() <= moved + unit * lacking[1].norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [m for m in METHODS if m.startswith("loftq")])
def test_loftq_makes_up_for_the_quantisation(method, name):
    originals = original_weights(name)
    for module, start in starts(by_fastlora(name, METHODS[method] | dict(lora_alpha=R))).items():
        lost, lacking = (originals[module] - start.weight), originals[module] - start.weight - start.b @ start.a
        assert 0 < lacking.norm() < lost.norm()


@DTYPES
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", MOVED)
def test_weight_and_adapter_are_the_original_weight(method, name, dtype):
    """Up to the rounding of the new weight and of B A, which has R terms and two more roundings."""
    originals = original_weights(name, dtype)
    for module, start in starts(by_fastlora(name, MOVED[method], dtype)).items():
        a, b, weight = start.a.double(), start.b.double(), start.weight.double()
        rounding = torch.finfo(dtype).eps / 2 * weight.abs()
        product = (R + 2) * torch.finfo(torch.float32).eps / 2 * start.scaling * (b.abs() @ a.abs())
        error = (originals[module].double() - weight - start.scaling * b @ a).abs()
        assert (error <= rounding + product).all(), module
        assert not torch.equal(start.weight, originals[module])


@pytest.mark.parametrize(("name", "method"), [(n, m) for n, m in SAME_BITS if not m.startswith("loftq")])
def test_step_0_is_the_model(name, method):
    batch = make_batch()
    exact = make_model(name).double().eval()(**batch).logits
    ours, theirs = (by(name, METHODS[method]).eval()(**batch).logits for by in (by_fastlora, by_peft))
    assert_as_accurate_as_eager(ours, theirs, exact, "logits")


# EVA

EVA = {
    "rho-1": dict(rho=1.0),
    "rho-2": dict(rho=2.0),
    "rho-3-tau": dict(rho=3.0, tau=0.9),
    "all-labels": dict(use_label_mask=False),
    "scalings-stay": dict(adjust_scaling_factors=False),
}


def narrow(model):
    """A GPT-2 whose attention reads little but 4 features, so that all ranks go there."""
    for block in model.transformer.h:
        block.ln_1.weight.data[4:] = 0.01
    return model


def eva_of_both(name, eva, r=R, **options):
    settings = dict(init_lora_weights="eva", eva_config=eva, r=r)
    return [by(name, settings, **options) for by in (by_fastlora, by_peft)]


def assert_same_directions(ours, theirs):
    """As near as float32 can tell: the cosine of the angle is 1 in it, and so is the ratio of the lengths."""
    assert {name: len(start.a) for name, start in ours.items()} == {n: len(start.a) for n, start in theirs.items()}
    for name, start in theirs.items():
        assert ours[name].scaling == start.scaling
        assert not ours[name].b.any()
        distances = (ours[name].a.double() - start.a.double()).square().sum(dim=1)
        assert (distances <= 2 * torch.finfo(torch.float32).eps * start.a.double().square().sum(dim=1)).all(), name


@pytest.mark.parametrize("padded", [False, True], ids=["whole-rows", "padded"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("eva", EVA.values(), ids=EVA.keys())
def test_eva_finds_the_ranks_and_directions_of_peft(eva, name, padded):
    ours, theirs = (starts(model) for model in eva_of_both(name, eva, padded=padded))
    assert sum(len(start.a) for start in ours.values()) == R * len(ours)
    assert name == "gpt2" or eva.get("rho") == 1.0 or {len(start.a) for start in ours.values()} != {R}
    assert_same_directions(ours, theirs)


def test_eva_whitens_as_peft():
    """Where no two layers share inputs, of which PEFT would divide the components once for each."""
    plain, white = (
        starts(by_fastlora("llama", dict(init_lora_weights="eva", eva_config=dict(whiten=w)))) for w in (False, True)
    )
    assert_same_directions(*(starts(model) for model in eva_of_both("gpt2", dict(whiten=True))))
    for name, start in plain.items():
        cosines = torch.cosine_similarity(start.a.double(), white[name].a.double())
        assert (1 - cosines <= torch.finfo(torch.float32).eps).all(), name
        assert not torch.equal(start.a, white[name].a)


def test_eva_takes_the_adapter_off_where_the_rank_is_0():
    model, wrapped = eva_of_both("gpt2", dict(rho=2.0), r=2, change=narrow)
    ours, theirs = starts(model), starts(wrapped)
    assert set(ours) == {f"transformer.h.{block}.attn.c_attn" for block in (0, 1)}
    assert_same_directions(ours, theirs)
    assert set(model.fastlora_adapters["default"].target_modules) == set(wrapped.peft_config["default"].target_modules)


def test_eva_ranks_are_for_whole_names():
    """A pattern for one module must not reach another whose name ends in its name."""
    model = nn.ModuleDict({"q": nn.Linear(48, 8), "inner": nn.ModuleDict({"q": nn.Linear(48, 8)})})
    config = fastlora.LoraConfig(target_modules=["q"], init_lora_weights="eva")
    modules = {"q": model["q"], "inner.q": model["inner"]["q"]}
    initial = {name: Initial(torch.ones(rank, 48), torch.zeros(8, rank)) for name, rank in (("q", 3), ("inner.q", 8))}
    config, modules = with_found_ranks(config, modules, initial)
    assert [pattern_value(config.rank_pattern, name, config.r) for name in modules] == [3, 8]

"""`fastlora env`: what it finds, and that it notices a kernel that is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from fastlora import ops
from fastlora.cli import app
from fastlora.environment import find_environment, self_test
from fastlora_kernels import cpu


def test_every_operator_passes_here():
    checks = self_test()
    assert [check for check in checks if not check.passed] == []
    assert {check.operator for check in checks} == {"forward", "backward", "merge", "quantize", "dropout"}
    assert {check.dtype for check in checks} == {"float32", "bfloat16", "float16", "bool"}
    assert all(check.error > 0 for check in checks if check.operator in ("forward", "backward"))


@pytest.mark.parametrize(
    ("operator", "spoil"),
    [
        ("lora_linear", lambda y, s: (y * 1.01, s)),
        ("lora_linear", lambda y, s: (y, s.fill_(torch.nan))),
        ("lora_linear_backward", lambda d_x, d_a, d_b: (d_x, d_a.neg(), d_b)),
        ("merge_rows", lambda w, scale: (w.roll(1), scale)),
        ("quantize_rows", lambda q, scale: (q, scale * 1.001)),
        ("dropout_mask", None),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the check is on the CPU's kernels")
def test_a_wrong_kernel_is_found(monkeypatch, operator, spoil):
    right = getattr(cpu, operator)
    wrong = (lambda *args: ~right(*args)) if spoil is None else (lambda *args: spoil(*right(*args)))
    monkeypatch.setattr(cpu, operator, wrong)
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 1, result.output
    assert "wrong" in result.output
    assert "failed" in result.output


def test_the_command_prints_what_is_here():
    result = CliRunner().invoke(app, ["env", "--no-test"])
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert f"torch {torch.__version__}" in result.output
    assert f"kernels    cpu float32: {ops.describe(torch.device('cpu'), torch.float32)}" in result.output
    assert "max error" not in result.output


def test_json_has_everything():
    result = CliRunner().invoke(app, ["env", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert sorted(report) == ["checks", "cpu", "fastlora", "gpus", "kernels", "variables", "versions"]
    assert report["versions"]["torch"] == torch.__version__
    assert all(check["passed"] for check in report["checks"])


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setattr("fastlora.environment.facts.PACKAGES", ("no-such-package",))
    assert find_environment().versions["no-such-package"] is None

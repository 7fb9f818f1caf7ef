"""Products of int8 codes with int8 codes (LLM.int8(), Dettmers et al. 2022): x is quantised per token, too."""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX = 127
OUTLIER_THRESHOLD = 6.0  # section 3 of the paper
FEW_TOKENS = 16  # up to here a product takes as long as its weight takes to read, and x stays as it is


def quantize_tokens(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Absmax int8 quantisation per token, outliers left out: `x ~ q * x_scale[:, None] + outliers`.

    An outlier is an element that is not smaller in magnitude than the threshold, and what is no number. With the
    outliers as zeros, `absmax = max |x| per token; q = round(x * ((1 / absmax) * 127)); x_scale = absmax / 127`, each
    step rounded to float32, halves to even. The paper leaves out an outlier's feature for all tokens; here its other
    elements stay in the codes, so that one pass over x is enough.

    Args:
        x: `[M, K]`, any float dtype.
        threshold: above 0; infinity for no outliers among the finite.

    Returns:
        q int8 `[M, K]`, x_scale float32 `[M]`, and outliers `[M, K]` in the dtype of x, zero elsewhere.
    """
    wide = x.float()
    inside = wide.abs() < threshold
    kept = torch.where(inside, wide, 0.0)
    absmax = kept.abs().amax(dim=1) if x.shape[1] else kept.new_zeros(x.shape[0])
    factor = torch.where(absmax > 0, absmax.reciprocal() * INT8_MAX, 0.0)
    q = torch.round(kept * factor[:, None]).to(torch.int8)
    return q, absmax / INT8_MAX, torch.where(inside, 0.0, x)


def int8_product(x: Tensor, w: Tensor, w_scale: Tensor, threshold: float) -> Tensor:
    """`(x_scale * q + outliers) @ (w * w_scale[:, None]).T` with the codes q of `quantize_tokens`.

    The product of the codes is exact; the outliers meet the dequantised weight in the dtype of x.

    Args:
        x: `[M, K]`, any float dtype.
        w, w_scale: int8 `[N, K]` and `[N]`.
        threshold: as in `quantize_tokens`.

    Returns:
        `[M, N]` in the dtype of x.
    """
    q, x_scale, outliers = quantize_tokens(x, threshold)
    wide = torch.promote_types(x.dtype, torch.float32)
    codes = (q.double() @ w.double().T).to(wide)
    product = codes * x_scale.to(wide)[:, None] * w_scale.to(wide)
    return product.to(x.dtype) + outliers @ (w.to(wide) * w_scale.to(wide)[:, None]).to(x.dtype).T

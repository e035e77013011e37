"""One tolerance rule for each dtype: relative Frobenius error against a reference in higher precision."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RELATIVE_ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    reference = reference.detach().double()
    return float((value.detach().double() - reference).norm() / reference.norm().clamp_min(1e-30))


def assert_close(value: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> None:
    assert value.shape == reference.shape
    assert torch.isfinite(value).all()
    error = relative_error(value, reference)
    assert error <= RELATIVE_ERROR[dtype], f"relative error {error:.3g} of {dtype}"

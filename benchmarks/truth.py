"""What a layer's output has to be, in float64, and how far a float32 kernel may be from it."""

from __future__ import annotations

import numpy as np
from cases import Case, MatmulCase
from scipy import sparse

_EPS = float(np.finfo(np.float32).eps)
# Times the number of summands: rounding of any order of summation, and of Winograd's transforms.
_FACTOR = 4.0
# bf16 rounds both factors to 8 bits.
_BF16 = 2.0**-7


class Truth:
    """The float64 result of one case and weight; of a batch, only the first and last image."""

    def __init__(self, case: Case, weight: np.ndarray, x: np.ndarray) -> None:
        self.case = case
        matrix = sparse.csr_array(weight.reshape(len(weight), -1).astype(np.float64))
        self.summands = matrix.shape[1]
        if isinstance(case, MatmulCase):
            columns = [x.astype(np.float64).T]
        else:
            columns = [_columns(case, x[i].astype(np.float64)) for i in self._images()]
        self.wanted = np.stack([matrix @ c for c in columns])
        self.scale = np.stack([abs(matrix) @ abs(c) for c in columns])

    def _images(self) -> list[int]:
        assert not isinstance(self.case, MatmulCase)
        return sorted({0, self.case.batch - 1})

    def error(self, output: np.ndarray, low_precision: bool = False) -> float:
        """Return the largest error as a share of what is allowed; above 1 is wrong."""
        if isinstance(self.case, MatmulCase):
            got = output.T[None]
        else:
            got = output[self._images()].reshape(self.wanted.shape)
        share = _BF16 if low_precision else _FACTOR * self.summands * _EPS
        off = np.abs(got - self.wanted) / (share * self.scale + np.finfo(np.float32).tiny)
        worst = float(off.max(initial=0.0))
        return worst if np.isfinite(worst) else float("inf")

    def check(self, name: str, output: np.ndarray, low_precision: bool = False) -> None:
        """Refuse a wrong output.

        Raises
        ------
        RuntimeError
            When a value is off by more than its bound.
        """
        error = self.error(output, low_precision)
        if error > 1:
            raise RuntimeError(
                f"{self.case.name}: {name} is wrong: {error:.3g} times the error that is allowed"
            )


def _columns(case: Case, image: np.ndarray) -> np.ndarray:
    """Gather the inputs of every output pixel: [ic * kernel * kernel, pixels]."""
    assert not isinstance(case, MatmulCase)
    pad, taps = case.kernel // 2, (case.kernel, case.kernel)
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps, (1, 2))
    windows = windows[:, :: case.stride, :: case.stride]
    return windows.transpose(0, 3, 4, 1, 2).reshape(image.shape[0] * case.kernel**2, -1)

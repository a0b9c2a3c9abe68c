"""Pruned weights that behave like real ones: uneven rows and columns, 3x3 kernels empty as a whole.

    python benchmarks/pruned_weights.py 768 768 0.9 weights.f32            # out, in, sparsity, file
    python benchmarks/pruned_weights.py 256 256 0.9 weights.f32 --kernel 3

The file is raw little-endian float32, row by row.
"""

from __future__ import annotations

import argparse

import numpy as np


def pruned_matrix(
    rows: int,
    cols: int,
    sparsity: float,
    *,
    seed: int = 0,
    row_sigma: float = 0.12,
    col_sigma: float = 0.16,
) -> np.ndarray:
    """Draw Gaussian weights of log-normal row and column scales; zero the smallest ones."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, cols))
    w *= np.exp(row_sigma * rng.standard_normal((rows, 1)))
    w *= np.exp(col_sigma * rng.standard_normal((1, cols)))
    return _threshold(w, sparsity).astype(np.float32)


def pruned_conv(
    out_channels: int,
    in_channels: int,
    kernel: int,
    sparsity: float,
    *,
    seed: int = 0,
    kernel_sigma: float = 0.55,
) -> np.ndarray:
    """Draw OIHW weights whose (out, in) kernels have log-normal scales; zero the smallest ones.

    At 90 %, 60 to 66 % of the 3x3 kernels are empty.
    """
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((out_channels, in_channels, kernel, kernel))
    w *= np.exp(0.15 * rng.standard_normal((out_channels, 1, 1, 1)))
    w *= np.exp(0.15 * rng.standard_normal((1, in_channels, 1, 1)))
    w *= np.exp(kernel_sigma * rng.standard_normal((out_channels, in_channels, 1, 1)))
    return _threshold(w, sparsity).astype(np.float32)


def _threshold(w: np.ndarray, sparsity: float) -> np.ndarray:
    if sparsity > 0:
        w = np.where(np.abs(w) <= np.quantile(np.abs(w), sparsity), 0.0, w)
    return w


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=int)
    parser.add_argument("cols", type=int)
    parser.add_argument("sparsity", type=float)
    parser.add_argument("file")
    parser.add_argument("--kernel", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.kernel > 1:
        weights = pruned_conv(args.rows, args.cols, args.kernel, args.sparsity, seed=args.seed)
        empty = (weights.reshape(args.rows * args.cols, -1) == 0).all(1).mean()
        print(f"empty kernels {empty:.2f}")
    else:
        weights = pruned_matrix(args.rows, args.cols, args.sparsity, seed=args.seed)
    nnz = np.count_nonzero(weights.reshape(args.rows, -1), axis=1)
    print(
        f"density {np.count_nonzero(weights) / weights.size:.3f}  "
        f"row nnz CV {nnz.std() / nnz.mean():.2f}  max/mean {nnz.max() / nnz.mean():.2f}"
    )
    weights.tofile(args.file)


if __name__ == "__main__":
    main()

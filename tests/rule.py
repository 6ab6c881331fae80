"""DESIGN's rule of correctness, as numbers: for helpers.py, and for benchmarks.variants in torch.

Ours may be off by no more than twice what the plain form of the same type is off, plus one unit
roundoff of the largest value and a few of float32's, for orders of sums.
"""

_FLOAT32_UNIT = 2.0**-23
LSE = 1e-5  # of lse, relative and absolute


def allowed(unit: float, plain_error: float, largest: float, inherent: float = 0.0) -> float:
    """The largest error of an array.

    Args:
      unit: machine epsilon of its type.
      plain_error: the largest error of the plain form.
      largest: the largest absolute value of the exact array.
      inherent: comes on top of what is allowed.
    """
    return 2 * plain_error + (unit + 32 * _FLOAT32_UNIT) * largest + inherent

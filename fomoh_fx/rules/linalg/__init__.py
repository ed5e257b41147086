"""Linear algebra, by implicit differentiation of the equation that an output satisfies.

A x = b gives A x_i = b_i - A_i x, and differentiated once more A x_c = b_c - A_c x - sum_ij S_c,ij (A_i x_j + A_j x_i):
the same linear equation with another right-hand side. So each rule has one ``step(part, known)`` that solves the
differentiated equation for one order: ``part`` is the argument's component of that order, and ``known`` is what the
products of tangents contribute, None at first order. A matrix that has to be Hermitian is taken as its Hermitian part.
"""

from fomoh_fx.rules.linalg import (  # noqa: F401  each registers its operators
    determinants,
    distances,
    eigenvalues,
    factorizations,
    functions,
    systems,
)

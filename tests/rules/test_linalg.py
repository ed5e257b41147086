"""Linear algebra rules."""

import pytest
import torch

import fomoh_fx
from fomoh_fx.errors import UnsupportedOpError
from tests.rules.checking import Sample, check

aten = torch.ops.aten
torch.manual_seed(0)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def z(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex128)


def regular(*shape: int, make=r) -> torch.Tensor:
    """Well conditioned, without symmetry."""
    return make(*shape) + 3 * torch.eye(shape[-1], dtype=torch.float64)


def positive(*shape: int, make=r) -> torch.Tensor:
    x = make(*shape)
    return x @ x.mH + torch.eye(shape[-1], dtype=torch.float64)


def triangular(*shape: int, make=r, upper: bool = False) -> torch.Tensor:
    return regular(*shape, make=make).triu() if upper else regular(*shape, make=make).tril()


def singular() -> torch.Tensor:
    return torch.tensor([[1.0, 2, 3], [2, 4, 6], [1, 0, 1]], dtype=torch.float64)


LU, PIVOTS = torch.linalg.lu_factor(regular(3, 3))
A, TAU = torch.geqrf(r(4, 3))

SAMPLES = {
    aten.linalg_inv_ex.default: [Sample((regular(3, 3),)), Sample((regular(2, 3, 3, make=z),), name="complex batch")],
    aten.linalg_inv.default: [Sample((regular(3, 3).T,))],
    aten.inverse.default: [Sample((regular(3, 3),))],
    aten._linalg_solve_ex.default: [
        Sample((regular(3, 3), r(3, 2)), outputs=[0]),
        Sample((regular(3, 3), r(3)), outputs=[0], name="vector"),
        Sample((regular(2, 3, 3), r(2, 3)), outputs=[0], name="batch of vectors"),
        Sample((regular(3, 3), r(2, 3)), {"left": False}, outputs=[0], name="right"),
        Sample((regular(3, 3), r(2, 3, 2)), outputs=[0], name="broadcast matrix"),
        Sample((regular(2, 3, 3), r(3, 2)), outputs=[0], name="broadcast right-hand side"),
        Sample((regular(3, 3), r(3, 2)), active=[0], outputs=[0], name="matrix only"),
        Sample((regular(3, 3), r(3)), active=[1], outputs=[0], name="right-hand side only"),
        Sample((regular(3, 3, make=z), z(3, 2)), outputs=[0], name="complex"),
    ],
    aten.linalg_solve.default: [Sample((regular(3, 3), r(3))), Sample((regular(3, 3), r(2, 3)), {"left": False})],
    aten.linalg_solve_ex.default: [Sample((regular(3, 3), r(3)))],
    aten.linalg_solve_triangular.default: [
        Sample((triangular(3, 3, upper=True), r(3, 2)), {"upper": True}),
        Sample((regular(3, 3), r(2, 3)), {"upper": False, "left": False}, name="other triangle ignored"),
        Sample((regular(3, 3), r(2, 3, 2)), {"upper": True, "unitriangular": True}, name="unit diagonal, broadcast"),
        Sample((triangular(3, 3, make=z), z(3, 1)), {"upper": False}, name="complex"),
    ],
    aten.triangular_solve.default: [
        Sample((r(3, 2), triangular(3, 3, upper=True))),
        Sample((r(3, 2), triangular(3, 3)), {"upper": False, "transpose": True}, name="transposed"),
        Sample((r(3, 2), regular(3, 3)), {"unitriangular": True}, name="unit diagonal"),
    ],
    aten.linalg_cholesky_ex.default: [
        Sample((positive(3, 3),)),
        Sample((positive(3, 3),), {"upper": True}, hermitian=True, name="upper"),
        Sample((positive(2, 3, 3, make=z),), hermitian=True, name="complex batch"),
    ],
    aten.linalg_cholesky.default: [Sample((positive(3, 3),)), Sample((positive(3, 3),), {"upper": True})],
    aten.cholesky_solve.default: [
        Sample((r(3, 2), triangular(3, 3)), truth="difference"),
        Sample((r(3, 2), triangular(3, 3, upper=True), True), truth="difference", name="upper"),
    ],
    aten.cholesky_inverse.default: [
        Sample((triangular(3, 3),), truth="difference"),
        Sample((triangular(3, 3, upper=True), True), truth="difference", name="upper"),
    ],
    aten.linalg_qr.default: [
        Sample((regular(3, 3),)),
        Sample((r(4, 3),), name="tall"),
        Sample((r(2, 3, 4),), name="wide batch"),
        Sample((r(3, 4), "complete"), name="complete"),
        Sample((r(4, 3), "r"), truth="difference", name="r only"),
        Sample((z(4, 3),), name="complex"),
    ],
    aten.linalg_lu_factor_ex.default: [
        Sample((regular(3, 3),)),
        Sample((r(4, 3),), name="tall"),
        Sample((r(2, 3, 4),), name="wide batch"),
    ],
    aten.linalg_lu_factor.default: [Sample((regular(3, 3),))],
    aten.linalg_lu.default: [
        Sample((r(3, 3),), outputs=[1, 2]),
        Sample((r(4, 3),), outputs=[1, 2], name="tall"),
        Sample((r(3, 4),), outputs=[1, 2], name="wide"),
    ],
    aten.lu_unpack.default: [
        Sample((LU, PIVOTS), outputs=[1, 2]),
        Sample((r(4, 3), PIVOTS), outputs=[1, 2], name="tall"),
        Sample((r(3, 4), PIVOTS), outputs=[1, 2], name="wide"),
    ],
    aten.linalg_lu_solve.default: [
        Sample((LU, PIVOTS, r(3, 2))),
        Sample((LU, PIVOTS, r(3, 2)), {"adjoint": True}, name="adjoint"),
        Sample((LU, PIVOTS, r(2, 3)), {"left": False}, name="right"),
        Sample((LU, PIVOTS, r(2, 3)), {"left": False, "adjoint": True}, name="right adjoint"),
    ],
    aten.lu_solve.default: [Sample((r(3, 2), LU, PIVOTS))],
    aten.linalg_householder_product.default: [
        Sample((A, TAU), truth="difference"),
        Sample((r(4, 4), r(2)), truth="difference", name="fewer reflections"),
        Sample((r(3, 2), torch.zeros(2, dtype=torch.float64)), truth="difference", name="zero"),
    ],
    aten.ormqr.default: [
        Sample((A, TAU, r(4, 2)), truth="difference"),
        Sample((A, TAU, r(2, 4), False, True), truth="difference", name="right, transposed"),
    ],
    aten._linalg_eigh.default: [
        Sample((positive(3, 3),), hermitian=True),
        Sample((positive(2, 3, 3), "U"), hermitian=True, name="upper batch"),
        Sample((positive(3, 3), "L", False), hermitian=True, outputs=[0], truth="difference", name="values"),
    ],
    aten.linalg_eig.default: [Sample((r(3, 3),), outputs=[0]), Sample((z(3, 3),), outputs=[0], name="complex")],
    aten.linalg_tensorinv.default: [Sample((regular(4, 4).reshape(2, 2, 4),))],
    aten.linalg_eigvals.default: [Sample((r(3, 3),))],
    aten._linalg_eigvals.default: [Sample((r(3, 3),), truth="difference")],
    aten._linalg_svd.default: [
        Sample((regular(3, 3),)),
        Sample((r(4, 3),), name="tall"),
        Sample((r(2, 2, 3),), name="wide batch"),
        Sample((r(3, 3), True), name="full"),
        Sample((r(3, 4), False, False), outputs=[1], truth="difference", name="values"),
        Sample((r(4, 3), True), outputs=[1, 2], name="full tall"),
    ],
    aten._linalg_slogdet.default: [
        Sample((regular(3, 3),), outputs=[0, 1]),
        Sample((z(2, 3, 3),), outputs=[0, 1], name="complex batch"),
    ],
    aten._linalg_det.default: [
        Sample((r(3, 3),), outputs=[0]),
        Sample((r(2, 4, 4),), outputs=[0], name="batch"),
        Sample((singular(),), outputs=[0], truth="difference", name="singular"),
        Sample((torch.zeros(2, 2, dtype=torch.float64),), outputs=[0], truth="difference", name="zero"),
        Sample((r(1, 1),), outputs=[0], name="one by one"),
        Sample((z(3, 3),), outputs=[0], name="complex"),
    ],
    aten.linalg_matrix_exp.default: [
        Sample((r(3, 3),)),
        Sample((r(2, 3, 3),), name="batch"),
        Sample((torch.zeros(2, 2, dtype=torch.float64),), name="zero"),
        Sample((z(2, 2),), name="complex"),
    ],
    aten.linalg_pinv.atol_rtol_tensor: [Sample((r(4, 3),)), Sample((r(2, 2, 3),), name="wide batch")],
    aten._cdist_forward.default: [
        Sample((r(3, 2), r(4, 2), 2.0, None), truth="difference"),
        Sample((r(2, 3, 2), r(4, 2), 1.0, None), truth="difference", name="p 1, broadcast"),
        Sample((r(3, 2), r(4, 2), float("inf"), None), truth="difference", name="p inf"),
        Sample((r(3, 2), r(4, 2), 3.0, None), truth="difference", name="p 3"),
        Sample((r(3, 2), r(4, 2), 2.0, None), active=[1], truth="difference", name="second only"),
    ],
    aten._pdist_forward.default: [
        Sample((r(4, 2), p), truth="difference", name=f"p {p}") for p in (1.0, 2.0, 3.0, float("inf"))
    ],
    aten._euclidean_dist.default: [Sample((r(3, 2), r(4, 2)), truth="difference")],
}
if hasattr(aten, "cholesky"):  # until torch 2.13
    SAMPLES[aten.cholesky.default] = [Sample((positive(3, 3),)), Sample((positive(3, 3), True))]
CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)])
def test_rule(op, sample, second_order):
    check(op, sample, second_order)


# Whole functions of a matrix, in what does not depend on a choice of phase.


def phases(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x * x.conj()).sum(-1)


def projector(vectors: torch.Tensor) -> torch.Tensor:
    """A weighted sum of the projectors on the columns, that no phase changes."""
    return torch.view_as_real((vectors * torch.arange(1, vectors.shape[-1] + 1)) @ vectors.mH)


def hermitian(x: torch.Tensor) -> torch.Tensor:
    return x @ x.mH


FUNCTIONS = {
    "eigenvectors": (lambda x: phases(torch.linalg.eig(x)[1]), r(3, 3)),
    "complex eigenvectors": (lambda x: phases(torch.linalg.eig(x)[1]), z(3, 3)),
    "Hermitian eigenvectors": (lambda x: projector(torch.linalg.eigh(hermitian(x))[1]), z(3, 3)),
    "Hermitian eigenvalues": (lambda x: torch.linalg.eigvalsh(hermitian(x)), z(3, 3)),
    "complex left vectors": (lambda x: projector(torch.linalg.svd(x, full_matrices=False)[0]), z(4, 3)),
    "complex right vectors": (lambda x: projector(torch.linalg.svd(x, full_matrices=False)[2].mH), z(3, 4)),
    "complex low-rank part": (
        lambda x: torch.view_as_real((lambda u, s, vh: (u[:, :2] * s[:2]) @ vh[:2])(*torch.linalg.svd(x))),
        z(3, 3),
    ),
    "complex singular values": (lambda x: torch.linalg.svdvals(x), z(2, 3, 4)),
    "spectral norm": (lambda x: torch.linalg.matrix_norm(x, 2), r(4, 3)),
    "nuclear norm": (lambda x: torch.linalg.matrix_norm(x, "nuc"), r(4, 3)),
    "condition number": (lambda x: torch.linalg.cond(x), r(3, 3)),
    "logdet": (lambda x: torch.logdet(x), positive(3, 3)),
    "matrix_power": (lambda x: torch.linalg.matrix_power(x, 3), r(3, 3)),
    "negative matrix_power": (lambda x: torch.linalg.matrix_power(x, -2), regular(3, 3)),
    "tensorsolve": (lambda x: torch.linalg.tensorsolve(x.reshape(2, 2, 4), x[:2, :2]), regular(4, 4)),
    "Hermitian pinv": (lambda x: torch.linalg.pinv(hermitian(x), hermitian=True), r(3, 3)),
    "rank-deficient pinv": (lambda x: torch.linalg.pinv(x[:, :2] @ x[:2]), r(4, 4)),
    "cholesky_solve": (lambda x: torch.cholesky_solve(x, torch.linalg.cholesky(hermitian(x))), regular(3, 3)),
    "lu_solve": (lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(x), x[:, :1]), regular(3, 3)),
    "complex lu": (lambda x: torch.view_as_real(torch.linalg.lu(x)[1]), z(3, 3)),
    "complex qr": (lambda x: torch.view_as_real(torch.linalg.qr(x)[1]), z(3, 3)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_of_a_matrix(name):
    function, x = FUNCTIONS[name]
    check(lambda x: function(x), Sample((x,), tolerance=1e-8))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_distance_zero_has_derivative_zero(p):
    """As in reverse mode, where a row of one set is a row of the other."""
    x = r(3, 2)
    vs = (r(2, 3, 2), r(2, 3, 2))
    hd = fomoh_fx.transform(lambda x, w: torch.cdist(x, w, p=p), wrt="inputs")
    out = hd(x, x.clone(), tangents=vs)
    for part in (out.tangent, out.cross):
        assert part.isfinite().all()
        assert (part.diagonal(dim1=-2, dim2=-1) == 0).all()


def test_factors_that_are_not_unique_are_refused():
    x, v = r(4, 3), (r(2, 4, 3),)
    with pytest.raises(UnsupportedOpError, match="reduced"):
        fomoh_fx.transform(lambda x: torch.linalg.qr(x, "complete"), wrt="inputs")(x, tangents=v)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 5)])
@pytest.mark.parametrize("make", [r, z])
def test_whatever_completes_a_basis(make, shape):
    """Exact for what does not depend on the choice of the further vectors, where reverse mode ignores them."""

    def rest(x):
        u, s, vh = torch.linalg.svd(x)
        further = [u[..., s.shape[-1] :], vh[..., s.shape[-1] :, :].mH]
        return sum((w @ w.mH).real.cumsum(-1).sum(-2) for w in further if w.shape[-1])

    check(lambda x: rest(x), Sample((make(*shape),), truth="difference"))


def test_equal_eigenvalues_give_no_finite_vectors():
    """Their derivative does not exist, and no number pretends to be it."""
    hd = fomoh_fx.transform(lambda x: torch.linalg.eigh(x)[1], wrt="inputs")
    v = r(1, 2, 2)
    assert not hd(torch.eye(2, dtype=torch.float64), tangents=(v + v.mT,)).tangent.isfinite().all()


@pytest.mark.parametrize("function", [torch.linalg.inv, torch.linalg.cholesky, torch.linalg.det, torch.linalg.svdvals])
def test_single_precision_stays(function):
    x = positive(3, 3).float()
    out = fomoh_fx.transform(lambda x: function(x), wrt="inputs")(x, tangents=(torch.randn(1, 3, 3),))
    assert out.tangent.dtype == out.cross.dtype == torch.float32


def test_singular_matrices_raise():
    hd = fomoh_fx.transform(lambda x: torch.linalg.inv(x), wrt="inputs")
    hd(regular(3, 3), tangents=(r(1, 3, 3),))
    with pytest.raises(torch.linalg.LinAlgError):
        hd(torch.zeros(3, 3, dtype=torch.float64), tangents=(r(1, 3, 3),))

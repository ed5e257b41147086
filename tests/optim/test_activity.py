"""Gradients guessed from perturbed activities, and the optimizer that follows them."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fomoh_fx
from fomoh_fx.errors import ArgumentError
from fomoh_fx.optim import FoMoHKD
from fomoh_fx.optim.activity import ActivityDirections, _corrected
from fomoh_fx.perturbation import ActivityGradient, Fit

cross_entropy = nn.functional.cross_entropy


class Language(nn.Module):
    """One block over sequences of 6 letters; where causal, letters see those before them only."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.mask = nn.Transformer.generate_square_subsequent_mask(6) if causal else None
        self.letters, self.places = nn.Embedding(5, 8), nn.Parameter(torch.zeros(6, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.letters(x) + self.places, src_mask=self.mask))


def sequence_loss(z: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(z.flatten(0, 1), y.flatten())


def letters(batch: int) -> Tensor:
    return torch.randint(0, 5, (batch, 6))


def problem(kind: str, batch: int = 128):
    """A model, its loss, and a batch."""
    torch.manual_seed(0)
    classes = torch.randint(0, 3, (batch,))
    convolution = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.GELU(), nn.Flatten()]
    return {
        "mlp": (
            nn.Sequential(nn.Linear(7, 20), nn.ReLU(), nn.Linear(20, 3)), cross_entropy, torch.randn(batch, 7), classes
        ),
        "smoothed": (
            nn.Sequential(nn.Linear(7, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)),
            lambda z, y: cross_entropy(z, y, label_smoothing=0.1), torch.randn(batch, 7), classes,
        ),
        "regression": (
            nn.Sequential(nn.Linear(7, 20), nn.SiLU(), nn.Linear(20, 3)), nn.functional.mse_loss,
            torch.randn(batch, 7), torch.randn(batch, 3),
        ),
        "convolution": (
            nn.Sequential(*convolution, nn.Linear(24, 3)), cross_entropy, torch.randn(batch, 1, 10, 10), classes
        ),
        "transformer": (Language(), sequence_loss, letters(batch), letters(batch)),
    }[kind]  # fmt: skip


KINDS = ["mlp", "smoothed", "regression", "convolution", "transformer"]


def signs(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape, like: torch.randint(0, 2, tuple(shape), generator=generator).to(like) * 2 - 1


def guessed(gradient: ActivityGradient, model, x, y, feedback=None, seed: int = 0):
    return gradient((x,), {}, (y,), [n for n, _ in model.named_parameters()], signs(seed), feedback or {})


def true_gradient(model, loss, x, y) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss(model(x), y), parameters), strict=True))


def cosines(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    return {n: float(nn.functional.cosine_similarity(found[n].flatten(), g.flatten(), 0)) for n, g in true.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_unit_vectors_give_the_exact_gradient(kind):
    model, loss, x, y = problem(kind, 16)
    guess = guessed(ActivityGradient(fomoh_fx.transform(model, loss), exact=400), model, x, y)
    torch.testing.assert_close(guess.loss, loss(model(x), y).detach())
    torch.testing.assert_close(guess.gradients, true_gradient(model, loss, x, y), rtol=1e-4, atol=1e-6)
    assert not guess.fits


@pytest.mark.parametrize("kind", KINDS)
def test_random_perturbations_point_along_the_gradient(kind):
    model, loss, x, y = problem(kind, 256)
    gradient = ActivityGradient(fomoh_fx.transform(model, loss), perturbations=64, exact=0)
    found = cosines(guessed(gradient, model, x, y).whole, true_gradient(model, loss, x, y))
    assert min(found.values()) > 0.6, found


@pytest.mark.parametrize(("kind", "last"), [("mlp", "2"), ("convolution", "6"), ("transformer", "head")])
def test_the_last_layer_is_exact(kind, last):
    model, loss, x, y = problem(kind, 16)
    guess = guessed(ActivityGradient(fomoh_fx.transform(model, loss), perturbations=1, exact=0), model, x, y)
    true = true_gradient(model, loss, x, y)
    for name in (f"{last}.weight", f"{last}.bias"):
        torch.testing.assert_close(guess.gradients[name], true[name])


def test_guesses_have_the_gradient_as_their_mean_whatever_the_feedback():
    model, loss, x, y = problem("mlp", 16)
    gradient = ActivityGradient(fomoh_fx.transform(model, loss), perturbations=8, exact=0)
    feedback = {"relu": torch.randn(20, 3)}
    total = [guessed(gradient, model, x, y, feedback, seed).gradients["0.weight"] for seed in range(300)]
    true = true_gradient(model, loss, x, y)["0.weight"]
    mean = torch.stack(total).mean(0)
    assert (mean - true).norm() < 4 * torch.stack(total).std(0).norm() / 300**0.5


@pytest.mark.parametrize("causal", [False, True])
def test_far_parts_complete_the_gradient(causal):
    torch.manual_seed(0)
    model, x, y = Language(causal), letters(24), letters(24)
    gradient = ActivityGradient(fomoh_fx.transform(model, sequence_loss), perturbations=200, exact=0)
    guesses = [guessed(gradient, model, x, y, seed=seed) for seed in range(16)]
    assert {p.places.causal for p in gradient.plan.points if p.places} == {causal}
    true = true_gradient(model, sequence_loss, x, y)
    name = "block.norm1.weight"
    assert name in guesses[0].far and "head.weight" not in guesses[0].far
    whole, near = torch.stack([g.whole[name] for g in guesses]), torch.stack([g.gradients[name] for g in guesses])
    error = 3 * whole.std(0).norm() / len(guesses) ** 0.5
    assert (whole.mean(0) - true[name]).norm() < error < (near.mean(0) - true[name]).norm()
    assert near.std(0).norm() < whole.std(0).norm()


def test_a_column_about_which_a_step_tells_little_changes_little():
    fit = Fit(cross=torch.tensor([[100.0, 1.0]]), gram=torch.diag(torch.tensor([1000.0, 0.01])), noise=10.0)
    torch.testing.assert_close(_corrected(torch.zeros(1, 2), fit), torch.tensor([[100 / 1010, 1 / 10.01]]))


def test_far_parts_are_trusted_as_far_as_they_agree():
    model, loss, _, _ = problem("mlp")
    directions = ActivityDirections(ActivityGradient(fomoh_fx.transform(model, loss)), seed=0)
    torch.manual_seed(0)
    signal = torch.randn(50, 40)
    for name in ("signal", "both", "noise"):
        directions.far[name], directions.agreement[name] = torch.zeros(50, 40), torch.zeros(2)
    for _ in range(200):
        directions.guesses += 1
        directions._average_far("signal", signal)
        directions._average_far("both", signal + 5 * torch.randn(50, 40))
        directions._average_far("noise", torch.randn(50, 40))
    trusted = {name: float(directions._trusted(name)) for name in directions.far}
    assert trusted["signal"] > 0.99 and trusted["noise"] < 0.2
    assert trusted["both"] == pytest.approx(1 / (1 + 25 * 0.02 / 1.98), abs=0.1)


def test_feedback_learns_what_the_output_tells():
    """Behind a linear layer the gradient is linear in the output's: W^T dL/dz. Guesses become almost exact."""
    model, loss, x, y = problem("mlp", 512)
    gradient, feedback = ActivityGradient(fomoh_fx.transform(model, loss), perturbations=2, exact=0), {}
    true = true_gradient(model, loss, x, y)
    first = cosines(guessed(gradient, model, x, y).gradients, true)["0.weight"]
    for seed in range(20):
        guess = guessed(gradient, model, x, y, feedback, seed)
        feedback = {name: _corrected(feedback.get(name, 0), fit) for name, fit in guess.fits.items()}
    last = cosines(guess.gradients, true)["0.weight"]
    assert last > 0.99 > first


def test_dropout_has_one_mask():
    class Dropout(nn.Module):
        def forward(self, x):
            return torch.native_dropout(x, 0.5, True)[0]

    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), Dropout(), nn.Linear(9, 3))
    x, y = torch.randn(6, 7), torch.randint(0, 3, (6,))
    gradient = ActivityGradient(fomoh_fx.transform(model, cross_entropy))
    torch.manual_seed(5)
    guess = guessed(gradient, model, x, y)
    torch.manual_seed(5)
    torch.testing.assert_close(guess.gradients, true_gradient(model, cross_entropy, x, y))


def test_a_step_is_judged_by_the_same_masks_and_changes_buffers_once():
    model = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 3))
    x, y = torch.randn(16, 7), torch.randint(0, 3, (16,))
    opt = FoMoHKD(fomoh_fx.transform(model, cross_entropy), lr=0.0, sampler="activity", seed=0, diagnostics=True)
    for count in (1, 2, 3):
        opt.step(x, targets=(y,))
        assert int(model[1].num_batches_tracked) == count
        torch.testing.assert_close(opt.last_step.after, opt.last_step.loss, rtol=1e-6, atol=0)


def test_interacting_samples_are_reported():
    model = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))
    x, y = torch.randn(64, 7), torch.randint(0, 3, (64,))
    with pytest.warns(UserWarning, match="samples of a batch act on each other's losses"):
        guess = guessed(ActivityGradient(fomoh_fx.transform(model, cross_entropy)), model, x, y)
    found = cosines(guess.gradients, true_gradient(model, cross_entropy, x, y))
    assert found["0.weight"] > 0 and found["1.weight"] > 0.999
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guess = guessed(ActivityGradient(fomoh_fx.transform(model, cross_entropy)), model, x, y)
    torch.testing.assert_close(guess.gradients, true_gradient(model, cross_entropy, x, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_train(dtype):
    """Averages of squares are in float32: in float16 most of them are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    x, y = torch.randn(64, 6).to(dtype), torch.randint(0, 3, (64,))
    optimizer = FoMoHKD(fomoh_fx.transform(model, cross_entropy), sampler="activity", seed=0)
    losses = [optimizer.step(x, targets=(y,)) for _ in range(20)]
    assert optimizer.skipped == 0
    assert losses[-1] < 0.95 * losses[0]
    assert {v.dtype for v in optimizer.directions.squares.values()} == {torch.float32}


def check_exact(model, x):
    """By all unit vectors, against reverse mode."""
    model, x, y = model.double(), x.double(), torch.randint(0, 3, x.shape[:1])
    gradient = ActivityGradient(fomoh_fx.transform(model, cross_entropy), exact=10**6)
    torch.testing.assert_close(guessed(gradient, model, x, y).gradients, true_gradient(model, cross_entropy, x, y))


class _Attends(nn.Module):
    """Attention that has places before samples inside, whose mean over places the loss sees."""

    def __init__(self, mean_first):
        super().__init__()
        self.mean_first = mean_first
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        h = self.first(x)
        h = self.attention(h, h, h, need_weights=False)[0]
        return self.last(h.mean(1)) if self.mean_first else self.last(h).mean(1)


@pytest.mark.parametrize("mean_first", [True, False])
def test_samples_are_told_apart_in_another_layout(mean_first):
    check_exact(_Attends(mean_first), torch.randn(12, 5, 6))


class _Recurrent(nn.Module):
    """Its first step starts from zeros, which no sample decides, and splits what its bias makes of them."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.last = kind(6, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x):
        return self.last(self.layer(x)[0][:, -1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_every_gate_of_a_recurrent_layer_is_served(kind):
    check_exact(_Recurrent(kind), torch.randn(12, 3, 6))


class _ActsElsewhere(nn.Module):
    """Scales by its own weight what the weight makes."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x):
        scale = self.first.weight.norm()
        return self.last(torch.tanh(self.first(x) / scale))


def test_a_part_that_is_left_out_is_said():
    x, y = torch.randn(6, 7), torch.randint(0, 3, (6,))
    with pytest.warns(UserWarning, match=r"leaves out .*: first\.weight \(test_activity\.py:"):
        FoMoHKD(fomoh_fx.transform(_ActsElsewhere(), cross_entropy), sampler="activity").step(x, targets=(y,))


def test_it_has_the_step_before_anyway():
    hd = fomoh_fx.transform(nn.Linear(7, 3), cross_entropy)
    with pytest.raises(ArgumentError, match="^previous_step: "):
        FoMoHKD(hd, sampler="activity", previous_step=True)


def test_an_empty_batch_is_skipped():
    model = nn.Sequential(nn.Linear(7, 3))
    before = copy.deepcopy(model.state_dict())
    optimizer = FoMoHKD(fomoh_fx.transform(model, cross_entropy), sampler="activity")
    with pytest.warns(UserWarning, match="a step was skipped"):
        optimizer.step(torch.randn(0, 7), targets=(torch.randint(0, 3, (0,)),))
    assert optimizer.skipped == 1
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_what_cannot_be_guessed_is_said():
    x, y = torch.randn(6, 7), torch.randint(0, 3, (6,))
    with pytest.raises(ArgumentError, match="^hd: guessing from activities needs the loss"):
        ActivityGradient(fomoh_fx.transform(nn.Linear(7, 3)))
    with pytest.raises(ArgumentError, match="^loss: its last step must be a sum or a mean"):
        model = nn.Linear(7, 3)
        guessed(ActivityGradient(fomoh_fx.transform(model, lambda z, y: z.flatten().norm())), model, x, y)
    with pytest.raises(ArgumentError, match="^perturbations"):
        FoMoHKD(fomoh_fx.transform(nn.Linear(7, 3), cross_entropy), sampler="activity", perturbations=0)
    with pytest.raises(ArgumentError, match="^directions"):
        FoMoHKD(fomoh_fx.transform(nn.Linear(7, 3), cross_entropy), sampler="activity", directions=4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_train(kind):
    model, loss, x, y = problem(kind)
    opt = FoMoHKD(fomoh_fx.transform(model, loss), sampler="activity", seed=0)
    losses = [float(opt.step(x, targets=(y,))) for _ in range(25)]
    assert losses[-1] < 0.9 * losses[0]
    assert max(losses) < 1.2 * losses[0] and opt.skipped == 0


class _Backward(TorchDispatchMode):
    """Fails where a value that is computed would be differentiated by reverse mode."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(out):
            assert not isinstance(value, Tensor) or value.grad_fn is None
        return out


def test_no_autograd_graph_is_built(monkeypatch):
    model, loss, x, y = problem("convolution", 8)
    opt = FoMoHKD(fomoh_fx.transform(model, loss), sampler="activity", seed=0)
    opt.step(x, targets=(y,))

    def refused(*args, **kwargs):
        raise AssertionError("reverse mode")

    for module, name in ((torch.autograd, "grad"), (torch.autograd, "backward"), (torch.func, "vjp")):
        monkeypatch.setattr(module, name, refused)
    with torch.enable_grad(), _Backward():
        value = opt.step(x, targets=(y,))
    assert value.grad_fn is None and not value.requires_grad
    assert all(p.grad is None and p.requires_grad and p.grad_fn is None for p in model.parameters())


def test_state_dict_resumes_bit_for_bit():
    model, loss, x, y = problem("convolution", 16)
    opt = FoMoHKD(fomoh_fx.transform(model, loss), sampler="activity", seed=3)
    for _ in range(3):
        opt.step(x, targets=(y,))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    expected = [float(opt.step(x, targets=(y,))) for _ in range(4)]

    again, _, _, _ = problem("convolution", 16)
    again.load_state_dict(weights)
    resumed = FoMoHKD(fomoh_fx.transform(again, loss), sampler="activity", seed=9)
    resumed.load_state_dict(state)
    assert [float(resumed.step(x, targets=(y,))) for _ in range(4)] == expected
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_frozen_parameters_stay_and_batches_may_change():
    model, loss, x, y = problem("mlp")
    model[0].bias.requires_grad_(False)
    before = model[0].bias.clone()
    opt = FoMoHKD(fomoh_fx.transform(model, loss), sampler="activity", seed=0)
    for count in (128, 128, 50):
        opt.step(x[:count], targets=(y[:count],))
    torch.testing.assert_close(model[0].bias, before, rtol=0, atol=0)
    assert "0.bias" not in opt.directions.averages


def test_a_nan_leaves_everything_as_it_is():
    model, loss, x, y = problem("mlp")
    opt = FoMoHKD(fomoh_fx.transform(model, loss), sampler="activity", seed=0)
    opt.step(x, targets=(y,))
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="a step was skipped"):
        opt.step(torch.full_like(x, torch.nan), targets=(y,))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert opt.skipped == 1
    losses = [float(opt.step(x, targets=(y,))) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_what_decides_a_branch_has_a_graph_of_its_own():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x, kind):
            y = self.inner(x)
            return self.outer(y.tanh() if int(kind) > 0 else y.square())

    model, x, y = Branching(), torch.randn(5, 3), torch.randint(3, (5,))
    gradient = ActivityGradient(fomoh_fx.transform(model, cross_entropy))
    named = dict(model.named_parameters())
    for kind in map(torch.tensor, (1, 0, 1)):
        found = gradient((x, kind), {}, (y,), tuple(named), lambda shape, like: torch.randn(tuple(shape)), {})
        loss = cross_entropy(model(x, kind), y)
        torch.testing.assert_close(found.loss, loss.detach())
        for name, expected in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            torch.testing.assert_close(found.whole[name], expected)
    assert len(gradient._specializations.values) == 2


def test_bfloat16():
    """Of which PyTorch computes the loss in float32."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    opt = FoMoHKD(fomoh_fx.transform(model, nn.functional.mse_loss), sampler="activity", seed=0)
    x = torch.randn(32, 4, dtype=dtype)
    losses = [opt.step(x, targets=(x[:, :2].sin(),)).item() for _ in range(10)]
    assert losses[-1] < losses[0]


def test_another_dtype_after_some_steps():
    """What is remembered follows the parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    opt = FoMoHKD(fomoh_fx.transform(model, nn.functional.cross_entropy), sampler="activity", seed=0)
    losses = [opt.step(x, targets=(y,)) for _ in range(3)]
    model.double()
    losses += [opt.step(x.double(), targets=(y,)) for _ in range(3)]
    assert losses[-1].dtype == torch.float64 and losses[-1] < losses[0]
    assert {v.dtype for v in opt.directions.averages.values()} == {torch.float64}


@pytest.mark.filterwarnings("ignore:no gradient is guessed")
def test_parameters_that_the_loss_does_not_see_stay():
    """With directions that are drawn they move at random."""

    class Unused(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.unused = nn.Parameter(torch.zeros(4))

    model = Unused()
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    hd = fomoh_fx.transform(model, nn.functional.mse_loss)
    for _ in range(3):
        FoMoHKD(hd, sampler="activity").step(x, targets=(y,))
    assert not model.unused.any()
    FoMoHKD(hd).step(x, targets=(y,))
    assert model.unused.any()


class Tempered(nn.Module):
    """Numbers that act on all samples at once, and one that acts on none."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.one, self.other = nn.Linear(4, 3), *(nn.Parameter(torch.tensor(n)) for n in (0.5, 0.3))
        self.how = how

    def forward(self, x):
        y = self.layer(x)
        return y / (self.one * self.other).exp() if self.how == "a factor" else y + self.one * self.other


@pytest.mark.parametrize("how", ["a factor", "a term"])
@pytest.mark.filterwarnings("ignore:no gradient is guessed")
def test_parameters_of_one_number(how):
    torch.manual_seed(0)
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    opt = FoMoHKD(fomoh_fx.transform(Tempered(how), cross_entropy), sampler="activity", seed=0)
    first, *_, last = [float(opt.step(x, targets=(y,))) for _ in range(8)]
    assert last < 0.9 * first


@pytest.mark.filterwarnings("ignore:no gradient is guessed")
@pytest.mark.parametrize("penalty", [False, True])
def test_a_model_that_computes_its_own_loss_is_refused(penalty):
    """The Gauss-Newton plane needs to know where the model ends."""

    class WithLoss(Tempered):
        def forward(self, x):
            return super().forward(x).square().mean() + (self.one * self.one if penalty else 0)

    opt = FoMoHKD(fomoh_fx.transform(WithLoss("a term"), lambda loss: loss), sampler="activity", seed=0)
    with pytest.raises(ArgumentError, match="^curvature: .*let the model return logits"):
        opt.step(torch.randn(8, 4), targets=())

"""What every optimizer of torch.optim promises: groups, schedulers, state, and no harm by a NaN."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fomoh_fx
from fomoh_fx import lower
from fomoh_fx.errors import ArgumentError
from fomoh_fx.optim import FGD, FoMoH, FoMoHBP, FoMoHKD
from fomoh_fx.optim.directions import RandomDirections
from fomoh_fx.specialization import Specialization
from tests.optim.problems import ALL, Quadratic, classifier, flat, next_directions, parameters_of

NEEDS = {FGD: None, FoMoH: "diagonal", FoMoHKD: "plane"}


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace", None])
@pytest.mark.parametrize("optimizer", ALL)
def test_the_second_order_that_fits_is_used(optimizer, second_order):
    hd = fomoh_fx.transform(Quadratic(), second_order=second_order)
    hd.lowering = lowering = lambda module, dynamic: lower.eager(module, dynamic)
    opt = optimizer(hd)
    assert opt.hd.second_order == NEEDS[optimizer]
    assert opt.hd.lowering is lowering
    assert (opt.hd is hd) == (second_order == NEEDS[optimizer])
    assert opt.hd.model is hd.model


@pytest.mark.parametrize("optimizer", ALL)
def test_no_autograd_graph_is_built(optimizer):
    hd, x, targets = classifier()
    seen = []
    call = Specialization.__call__

    def spy(self, tensors, tangents, *rest):
        value = call(self, tensors, tangents, *rest)
        seen.extend([value.primal, value.tangent, value.output, *tangents])
        return value

    opt = optimizer(hd)
    with pytest.MonkeyPatch.context() as patch, torch.enable_grad():
        patch.setattr(Specialization, "__call__", spy)
        loss = opt.step(x.requires_grad_(), targets=targets)
    assert loss.dim() == 0
    assert len(seen) == 7
    for tensor in (loss, *seen):
        assert not tensor.requires_grad and tensor.grad_fn is None
    for p in hd.parameters():
        assert p.requires_grad and p.grad is None and p.grad_fn is None


@pytest.mark.parametrize("optimizer", ALL)
def test_state_dict_resumes_bit_for_bit(optimizer):
    options = {"directions": 3, "lr": 0.1} | ({"previous_step": True} if optimizer is FoMoHKD else {})

    def fresh(seed):
        hd, x, targets = classifier("ggn" if optimizer is FoMoHKD else "hessian")
        opt = optimizer(hd, seed=seed, **options)
        return hd, opt, torch.optim.lr_scheduler.StepLR(opt, 3, 0.5), lambda: opt.step(x, targets=targets)

    hd, opt, scheduler, step = fresh(0)
    for _ in range(4):
        step()
        scheduler.step()
    saved = io.BytesIO()
    torch.save([hd.state_dict(), opt.state_dict(), scheduler.state_dict()], saved)
    losses = []
    for _ in range(5):
        losses.append(step())
        scheduler.step()

    hd2, opt2, scheduler2, step2 = fresh(99)
    saved.seek(0)
    for part, state in zip((hd2, opt2, scheduler2), torch.load(saved), strict=True):
        part.load_state_dict(state)
    for loss in losses:
        assert torch.equal(step2(), loss)
        scheduler2.step()
    assert torch.equal(parameters_of(hd2.model), parameters_of(hd.model))
    assert opt2.param_groups[0]["lr"] == opt.param_groups[0]["lr"]


def test_a_state_dict_is_a_snapshot():
    hd, x, targets = classifier("ggn")
    opt = FoMoHKD(hd, previous_step=True)
    opt.step(x, targets=targets)
    state = opt.state_dict()
    copied = copy.deepcopy(state)
    opt.step(x, targets=targets)
    for name, kept in copied["directions"]["previous_step"].items():
        assert torch.equal(state["directions"]["previous_step"][name], kept)
    assert torch.equal(state["directions"]["generators"]["cpu"], copied["directions"]["generators"]["cpu"])


@pytest.mark.parametrize("optimizer", ALL)
def test_schedulers(optimizer):
    hd = fomoh_fx.transform(Quadratic(), second_order=optimizer.second_order)
    opt, full = optimizer(hd, lr=0.2, seed=0), optimizer(hd, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)

    def change(which):
        before = parameters_of(hd.model)
        which.step()
        return parameters_of(hd.model) - before

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lr in (0.2, 0.1, 0.05):
            assert opt.param_groups[0]["lr"] == pytest.approx(lr)
            start = copy.deepcopy(hd.state_dict())
            full.directions.load_state_dict(opt.directions.state_dict())
            expected = lr * change(full)
            hd.load_state_dict(start)
            torch.testing.assert_close(change(opt), expected)
            scheduler.step()


@pytest.mark.parametrize("optimizer", ALL)
def test_a_groups_rate_scales_its_part_of_the_step(optimizer):
    hd = fomoh_fx.transform(Quadratic(), second_order=optimizer.second_order)
    start = copy.deepcopy(hd.state_dict())

    def changes(groups):
        hd.load_state_dict(start)
        optimizer(hd, lr=0.2, seed=0, params=groups and groups(hd.model)).step()
        return {name: p.detach() - start[name] for name, p in hd.named_parameters()}

    one = changes(None)
    two = changes(lambda m: [{"params": [m.x]}, {"params": m.y, "lr": 0.1}])
    torch.testing.assert_close(two["x"], one["x"])
    torch.testing.assert_close(two["y"], one["y"] / 2)
    named = changes(lambda m: [{"params": m.named_parameters()}])
    assert all(torch.equal(named[name], one[name]) for name in one)


def test_groups_are_named_and_parameters_in_no_group_are_left_alone():
    model = Quadratic()
    opt = FoMoHKD(fomoh_fx.transform(model), params=[model.x], directions=2)
    y = model.y.detach().clone()
    assert opt.param_groups[0]["param_names"] == ["x"]
    assert list(next_directions(opt)) == ["x"]
    opt.step()
    assert torch.equal(model.y, y)
    opt.add_param_group({"params": [model.y], "lr": 0.01})
    opt.step()
    assert not torch.equal(model.y, y)


def test_wrt_decides_what_is_trained():
    model = Quadratic()
    hd = fomoh_fx.transform(model, wrt="y")
    opt = FoMoH(hd)
    assert opt.param_groups[0]["param_names"] == ["y"]
    with pytest.raises(ArgumentError, match="^params: "):
        FoMoH(hd, params=[model.x])


@pytest.mark.parametrize("optimizer", ALL)
def test_frozen_parameters_get_no_tangent(optimizer):
    model = Quadratic()
    opt = optimizer(fomoh_fx.transform(model), lr=0.1, weight_decay=0.5)
    model.x.requires_grad_(False)
    x, y = model.x.clone(), model.y.detach().clone()
    assert list(next_directions(opt)) == ["y"]
    opt.step()
    assert torch.equal(model.x, x)
    assert not torch.equal(model.y, y)
    model.y.requires_grad_(False)
    with pytest.raises(ArgumentError, match="^params: none .* requires_grad"):
        opt.step()
    model.x.requires_grad_(True)
    opt.step()
    assert not torch.equal(model.x, x)


@pytest.mark.parametrize("optimizer", ALL)
def test_weight_decay_is_decoupled(optimizer):
    hd = fomoh_fx.transform(Quadratic(), second_order=optimizer.second_order)
    start = copy.deepcopy(hd.state_dict())

    def after(weight_decay):
        hd.load_state_dict(start)
        optimizer(hd, lr=0.1, weight_decay=weight_decay, seed=0).step()
        return parameters_of(hd.model)

    torch.testing.assert_close(after(0.3) - after(0.0), -0.1 * 0.3 * parameters_of(Quadratic()))


@pytest.mark.parametrize("solver", ["jitter", "saddle_free", lambda g, h: g / 0])
def test_a_step_that_is_not_finite_is_skipped(solver):
    hd, x, targets = classifier("ggn")
    opt = FoMoHKD(hd, solver=solver, previous_step=True, weight_decay=0.1, seed=0)
    bad = x.clone()
    if isinstance(solver, str):
        bad[0, 0] = torch.nan
    before = parameters_of(hd.model)
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(bad, targets=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(bad, targets=targets)
    assert opt.skipped == 2
    assert torch.equal(parameters_of(hd.model), before)
    if isinstance(solver, str):
        opt.step(x, targets=targets)
        assert opt.skipped == 2
        assert not torch.equal(parameters_of(hd.model), before)
        assert parameters_of(hd.model).isfinite().all()
        assert all(v.isfinite().all() for v in next_directions(opt).values())


@pytest.mark.parametrize("optimizer", ALL)
def test_infinities_and_overflow_are_skipped(optimizer):
    model = Quadratic().float()
    model.a, model.b = model.a.float() * 1e38, model.b.float()
    before = parameters_of(model)
    opt = optimizer(fomoh_fx.transform(model), lr=1.0, directions=2)
    with pytest.warns(UserWarning, match="skipped"):
        for _ in range(3):
            opt.step()
    assert opt.skipped == 3
    assert torch.equal(parameters_of(model), before)
    assert opt.state_dict()["skipped"] == 3


def test_the_parameters_keep_their_dtype():
    for dtype in (torch.bfloat16, torch.float32):
        hd, x, targets = classifier("ggn", dtype)
        opt = FoMoHKD(hd, directions=3, lr=0.5, seed=0)
        first = opt.step(x, targets=targets)
        for _ in range(20):
            last = opt.step(x, targets=targets)
        assert last < first
        assert all(p.dtype == dtype for p in hd.parameters())


@pytest.mark.parametrize("optimizer", [*ALL, FoMoHBP])
def test_steps_in_inference_mode_and_out_of_it(optimizer):
    seed = {} if optimizer is FoMoHBP else {"seed": 0}
    ends = []
    for modes in ((False, False, False), (True, False, True)):
        hd, x, targets = classifier()
        opt = optimizer(hd, **seed)
        for mode in modes:
            with torch.inference_mode(mode):
                opt.step(x * 1, targets=targets)
        ends.append(parameters_of(hd.model))
    assert torch.equal(*ends)


def test_a_skipped_step_is_reported_where_it_was_taken():
    opt = FGD(fomoh_fx.transform(Quadratic()), lr=1e308)
    with pytest.warns(UserWarning, match="skipped") as caught:
        for _ in range(3):
            opt.step()
    assert caught[0].filename == __file__


def test_a_tensor_as_rate():
    model = Quadratic()
    rate = torch.tensor(0.1, dtype=torch.float64)
    opt = FGD(fomoh_fx.transform(model), lr=rate, seed=0)
    opt.step()
    other = Quadratic()
    FGD(fomoh_fx.transform(other), lr=0.1, seed=0).step()
    torch.testing.assert_close(parameters_of(model), parameters_of(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "^lr: "),
        ({"lr": float("nan")}, "^lr: "),
        ({"lr": torch.tensor([0.1, 0.2])}, "^lr: "),
        ({"weight_decay": -0.1}, "^weight_decay: "),
        ({"directions": 0}, "^directions: "),
        ({"sampler": "gauss"}, "^sampler: "),
        ({"params": [nn.Parameter(torch.zeros(2))]}, "^params: "),
        ({"params": [{"params": [], "lr": -1.0}]}, "^lr: "),
        ({"params": [{"params": []}]}, "^params: there is none"),
        ({"params": 3}, "^params: expected"),
        ({"params": [nn.Parameter(torch.tensor([1]), requires_grad=False)]}, "^params: .*int64"),
    ],
)
@pytest.mark.parametrize("optimizer", ALL)
def test_bad_arguments_are_named(optimizer, options, message):
    with pytest.raises(ArgumentError, match=message):
        optimizer(fomoh_fx.transform(Quadratic()), **options)


def test_bad_modules_are_named():
    with pytest.raises(ArgumentError, match="^hd: "):
        FGD(Quadratic())
    with pytest.raises(ArgumentError, match="^hd: .*inputs"):
        FGD(fomoh_fx.transform(Quadratic(), wrt="inputs"))
    hd = fomoh_fx.transform(nn.Linear(3, 2))
    with pytest.raises(ArgumentError, match="^hd: .*scalar"):
        FoMoH(hd).step(torch.randn(4, 3))
    with pytest.raises(ArgumentError, match="^eps: "):
        FoMoH(fomoh_fx.transform(Quadratic()), eps=-1.0)
    with pytest.raises(ArgumentError, match="^solver: "):
        FoMoHKD(fomoh_fx.transform(Quadratic()), solver="cg")


@pytest.mark.parametrize("optimizer", ALL)
def test_numbers_of_numpy_are_numbers(optimizer):
    hd = fomoh_fx.transform(Quadratic(), second_order=optimizer.second_order)
    opt = optimizer(hd, lr=np.float32(0.25), directions=np.int64(2), weight_decay=np.float64(0.5), seed=0)
    other = optimizer(fomoh_fx.transform(Quadratic()), lr=0.25, directions=2, weight_decay=0.5, seed=0)
    opt.step()
    other.step()
    assert torch.equal(parameters_of(hd.model), parameters_of(other.hd.model))


def test_what_would_be_ignored_is_refused():
    hd, _, _ = classifier()
    with pytest.raises(ArgumentError, match="^perturbations: .*activity"):
        FoMoHKD(hd, perturbations=7)
    with pytest.raises(ArgumentError, match="^step: .* no closure"):
        FGD(hd).step(lambda: 0.0)


def wrapped(model):
    model[0] = nn.Sequential(model[0])


@pytest.mark.parametrize("sampler", ["normal", "activity"])
@pytest.mark.parametrize(
    "change", [lambda m: prune.l1_unstructured(m[0], "weight", 0.5), wrapped], ids=["prune", "wrap"]
)
def test_parameters_under_another_name_go_on(change, sampler):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    opt = FoMoHKD(fomoh_fx.transform(model, nn.functional.cross_entropy), sampler=sampler, seed=0)
    opt.step(x, targets=(y,))
    change(model)
    before = parameters_of(model)
    opt.step(x, targets=(y,))
    assert (parameters_of(model) != before).any()
    assert sorted(opt.param_groups[0]["param_names"]) == sorted(name for name, _ in model.named_parameters())


def test_unused_and_tied_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.unused = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.second(self.first(x).tanh()).square().mean()

    model = Tied()
    opt = FoMoHKD(fomoh_fx.transform(model), lr=0.1, directions=2, seed=0)
    assert opt.param_groups[0]["param_names"] == ["unused", "first.weight", "first.bias", "second.bias"]
    opt.step(torch.randn(5, 3))
    assert model.second.weight is model.first.weight
    assert flat(next_directions(opt)).shape == (2, 17)


def test_dropout_and_batch_norm_in_train_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    opt = FoMoHKD(fomoh_fx.transform(model, nn.functional.cross_entropy, curvature="ggn"), lr=0.2, directions=4)
    x, y = torch.randn(64, 4), torch.randint(0, 3, (64,))
    losses = [opt.step(x, targets=(y,)) for _ in range(60)]
    assert model[1].num_batches_tracked == 60
    assert torch.stack(losses[-10:]).mean() < torch.stack(losses[:10]).mean()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [fomoh_fx.compile, torch.compile])
def test_compiled_equals_eager(compiled):
    hd, x, targets = classifier()
    other, _, _ = classifier()
    eager, lowered = FoMoHKD(hd, directions=3, seed=0, lr=0.1), FoMoHKD(compiled(other), directions=3, seed=0, lr=0.1)
    for _ in range(3):
        torch.testing.assert_close(eager.step(x, targets=targets), lowered.step(x, targets=targets))
    torch.testing.assert_close(parameters_of(hd.model), parameters_of(other.model))


def test_the_backend_of_torch_compile_is_the_one_that_is_used():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    hd, x, targets = classifier()
    opt = FoMoHKD(torch.compile(hd, backend=backend), seed=0)
    opt.step(x, targets=targets)
    assert graphs and not lower.uses_inductor(opt.hd.lowering)
    for options, expected in (({}, None), ({"mode": "max-autotune-no-cudagraphs"}, True)):
        lowering = FoMoHKD(torch.compile(hd, **options)).hd.lowering
        assert lower.uses_inductor(lowering)
        assert getattr(lowering, "keywords", {}).get("options", {}).get("max_autotune") is expected


def test_a_backend_that_cannot_be_seen_is_refused():
    hd, _, _ = classifier()
    compiled = torch.compile(hd)
    compiled.dynamo_ctx.callback = None
    with pytest.raises(ArgumentError, match="^hd: .*fomoh_fx.compile"):
        FGD(compiled)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ALL)
def test_nothing_waits_for_the_gpu(optimizer):
    hd, x, targets = classifier("hessian", torch.float32)
    hd.to("cuda")
    x, targets = x.cuda(), tuple(t.cuda() for t in targets)
    opt = optimizer(hd, directions=3)
    opt.step(x, targets=targets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            opt.step(x, targets=targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert opt.skipped == 0


@pytest.mark.parametrize("optimizer", ALL)
def test_an_option_that_there_is_not_is_refused(optimizer):
    hd = fomoh_fx.transform(Quadratic())
    for unknown in ({"maximize": True}, {"momentum": 0.9}, {"weightdecay": 1.0}):
        (name,) = unknown
        with pytest.raises(ArgumentError, match=f"^{name}: .* weight_decay"):
            optimizer(hd, **unknown)


@pytest.mark.parametrize("rate", [None, -1.0, float("nan"), float("inf"), "0.1"])
@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_a_rate_that_is_set_between_steps_is_looked_at(option, rate):
    hd, x, targets = classifier()
    opt = FGD(hd, seed=0)
    before = [p.clone() for p in hd.parameters()]
    opt.param_groups[0][option] = rate
    with pytest.raises(ArgumentError, match=f"^{option}: expected a finite number"):
        opt.step(x, targets=targets)
    assert all(map(torch.equal, before, hd.parameters()))


@pytest.mark.parametrize("option", ["diagnostics", "previous_step"])
def test_what_is_neither_true_nor_false_is_refused(option):
    with pytest.raises(ArgumentError, match=f"^{option}: expected True or False, got 'no'"):
        FoMoHKD(fomoh_fx.transform(Quadratic()), **{option: "no"})


def test_options_that_a_group_does_not_have_are_refused():
    model = Quadratic()
    hd = fomoh_fx.transform(model)
    for unknown in ({"eps": 1e-3}, {"largest_rise": None}, {"wieght_decay": 0.1}):
        (name,) = unknown
        with pytest.raises(ArgumentError, match=f"^params: .*{name}.* lr, weight_decay"):
            FoMoH(hd, params=[{"params": model.parameters(), **unknown}])
        opt = FoMoH(hd, params=[model.x])
        with pytest.raises(ArgumentError, match=f"^params: .*{name}"):
            opt.add_param_group({"params": [model.y], **unknown})


def test_what_schedulers_put_into_groups_stays():
    model = Quadratic()
    hd = fomoh_fx.transform(model)
    opt = FoMoH(hd, params=[{"params": model.parameters(), "weight_decay": 0.1}], seed=0)
    torch.optim.lr_scheduler.OneCycleLR(opt, 0.5, total_steps=4, cycle_momentum=False)
    assert {"initial_lr", "max_lr", "min_lr"} <= opt.param_groups[0].keys()
    resumed = FoMoH(hd, seed=1)
    resumed.load_state_dict(opt.state_dict())
    again = FoMoH(hd, params=opt.param_groups)
    assert resumed.param_groups[0].keys() == again.param_groups[0].keys() == opt.param_groups[0].keys()


def test_parameters_that_are_none_are_refused():
    model = nn.Linear(2, 1)
    hd = fomoh_fx.transform(model, nn.functional.mse_loss)
    cases = {"none": [], "no order": set(model.parameters()), "twice": [model.weight, model.weight]}
    for match, params in cases.items():
        with pytest.raises(ArgumentError, match=f"^params: .*{match}"):
            FGD(hd, params=params)


def test_a_tensor_that_took_a_parameters_place_is_noticed():
    """Directions of the one would move the other."""
    model = nn.Linear(2, 1)
    opt = FoMoHKD(fomoh_fx.transform(model, nn.functional.mse_loss), seed=0)
    x, y = torch.randn(8, 2), torch.randn(8, 1)
    opt.step(x, targets=(y,))
    model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
    with pytest.raises(ArgumentError, match="^params: weight .* make a new optimizer"):
        opt.step(x, targets=(y,))


@pytest.mark.parametrize("solver", ["levenberg_marquardt", "trust_region"])
def test_groups_with_rates_of_their_own_predict_nothing(solver):
    """The step leaves the plane, so that the solver's caution stays as it is; with one rate it adapts."""
    torch.manual_seed(0)
    cautions = {}
    for rates in ((0.5, 0.5), (0.0, 0.5)):
        model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
        groups = [{"params": model[0].parameters(), "lr": rates[0]}, {"params": model[2].parameters(), "lr": rates[1]}]
        hd = fomoh_fx.transform(model, nn.functional.mse_loss)
        opt = FoMoHKD(hd, seed=0, solver=solver, diagnostics=True, params=groups)
        before = getattr(opt.solver, opt.solver.caution).clone()
        x = torch.randn(16, 2)
        losses = [opt.step(x, targets=(x.sum(1, keepdim=True),)).item() for _ in range(8)]
        assert losses[-1] < losses[0]
        assert opt.last_step.predicted.isnan() == (rates[0] != rates[1])
        cautions[rates] = (getattr(opt.solver, opt.solver.caution) - before).abs().item()
    assert cautions[0.0, 0.5] == 0 < cautions[0.5, 0.5]


@pytest.mark.parametrize(
    "options", [{}, {"sampler": "activity"}, {"solver": "trust_region", "sampler": "low_rank"}], ids=str
)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(options, copied):
    """A copy has a copy of the model, and steps as the original does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    optimizer = FoMoHKD(fomoh_fx.transform(model, nn.functional.mse_loss), lr=0.1, **options)
    optimizer.step(x, targets=(y,))
    other = copied(optimizer)
    first = [float(optimizer.step(x, targets=(y,))) for _ in range(3)]
    assert [float(other.step(x, targets=(y,))) for _ in range(3)] == first
    for p, q in zip(model.parameters(), other.hd.module.parameters(), strict=True):
        assert p is not q
        assert torch.equal(p, q)
    assert other.param_groups[0]["params"][0] is next(other.hd.module.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_of_one_with_a_scheduler_moves_the_copy(copied):
    """A scheduler wraps the bound method ``step``."""
    model = Quadratic()
    opt = FoMoHKD(fomoh_fx.transform(model), seed=0)
    torch.optim.lr_scheduler.StepLR(opt, 1)
    other, twin = copied((model, opt))
    before = parameters_of(model)
    twin.step()
    assert torch.equal(parameters_of(model), before) and not torch.equal(parameters_of(other), before)
    opt.step()
    assert torch.equal(parameters_of(model), parameters_of(other))


@pytest.mark.parametrize("seed", [1.5, "a", 2**70, True])
def test_seeds_that_are_none(seed):
    model = nn.Linear(3, 1)
    with pytest.raises(ArgumentError, match="^seed: expected a whole number"):
        FoMoHKD(fomoh_fx.transform(model, nn.functional.mse_loss), seed=seed)


@pytest.mark.parametrize("optimizer", ALL)
@pytest.mark.parametrize("copied", [lambda o: o, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_state_is_loaded_again_and_again(optimizer, copied):
    """As when a run goes back to a checkpoint, also into a copy."""
    hd, x, targets = classifier()
    opt = copied(optimizer(hd))
    opt.step(x, targets=targets)
    state = copy.deepcopy(opt.state_dict())
    for _ in range(3):
        opt.step(x, targets=targets)
        opt.load_state_dict(state)
        assert str(opt.state_dict()) == str(state)
    assert all(group.keys() == opt.param_groups[0].keys() for group in opt.param_groups)


@pytest.mark.parametrize("optimizer", ALL)
def test_a_loss_that_depends_on_no_parameter(optimizer):
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model.state_dict())
    opt = optimizer(fomoh_fx.transform(model, lambda y, target: (y.detach() - target).square().mean()))
    assert opt.step(torch.ones(4, 3), targets=(torch.ones(4, 2),)).isfinite()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_states_of_others_are_refused():
    """And leave the optimizer as it was."""

    def made(cls, **options):
        torch.manual_seed(0)
        return cls(fomoh_fx.transform(nn.Sequential(nn.Linear(3, 2)), nn.functional.mse_loss), lr=0.1, **options)

    optimizer = made(FoMoHKD, seed=1)
    before = optimizer.state_dict()
    named = fomoh_fx.transform(nn.ModuleDict({"a": nn.Linear(3, 2)}), nn.functional.mse_loss)
    for state, message in (
        ({}, "no state of an optimizer"),
        (torch.optim.SGD(optimizer.hd.parameters(), 0.1).state_dict(), "no state of an optimizer"),
        (made(FGD).state_dict(), "got FGD"),
        (made(FoMoHKD, sampler="activity").state_dict(), "ActivityDirections"),
        (made(FoMoHKD, solver="trust_region").state_dict(), "solver"),
        (FoMoHKD(named, lr=0.1).state_dict(), "parameters"),
    ):
        with pytest.raises(ArgumentError, match=f"^state_dict: .*{message}"):
            optimizer.load_state_dict(state)
        assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize(
    "left_out", ["length", "directions.seed", "directions.far", "solver.damping", "step_length", "lr"]
)
def test_states_that_are_not_whole_are_refused(left_out):
    """And leave the optimizer as it was."""
    hd, x, targets = classifier()
    opt = FoMoHKD(hd, sampler="activity", seed=0)
    opt.step(x, targets=targets)
    before, state = opt.state_dict(), copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["lr"] = 77.0
    *inside, name = left_out.split(".")
    holder = state["param_groups"][0] if name == "lr" else state[inside[0]] if inside else state
    del holder[name]
    with pytest.raises(ArgumentError, match=f"^state_dict: .*no {left_out}"):
        opt.load_state_dict(state)
    assert str(opt.state_dict()) == str(before)


def test_hooks_see_the_whole_state():
    hd, x, targets = classifier()
    opt, seen = FoMoHKD(hd, seed=0), []
    opt.register_state_dict_post_hook(lambda _, state: seen.extend(state))
    opt.step(x, targets=targets)
    state = opt.state_dict()
    assert seen == list(state) and "directions" in seen

    def translated(_, state):
        (group,) = state["param_groups"]
        names = [name.removeprefix("old.") for name in group["param_names"]]
        return {**state, "param_groups": [{**group, "param_names": names}], "skipped": 5}

    state["param_groups"][0]["param_names"] = [f"old.{name}" for name in state["param_groups"][0]["param_names"]]
    other = FoMoHKD(hd, seed=1)
    with pytest.raises(ArgumentError, match="^state_dict: .*old"):
        other.load_state_dict(state)
    other.register_load_state_dict_pre_hook(translated)
    other.load_state_dict(state)
    assert other.skipped == 5 and other.directions.streams.seed == 0


class Watching(RandomDirections):
    """Directions of a user's own, which look at what steps did though they remember no step."""

    def observe(self, directions, moved):
        self.seen = {name: change.clone() for name, change in moved.items()}


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("options", [{}, {"largest_rise": None}, {"weight_decay": 0.1}], ids=str)
def test_directions_of_ones_own_see_what_a_step_did(options, lowered):
    hd, x, targets = classifier()
    if lowered:
        hd.lowering = lambda module, dynamic: lower.eager(module, dynamic)
    opt = FoMoHKD(hd, seed=0, **options)
    opt.directions = Watching(3, "normal", seed=0)
    before = {name: p.detach().clone() for name, p in hd.module.named_parameters()}
    opt.step(x, targets=targets)
    kept = 1 - 0.1 * options.get("weight_decay", 0)
    for name, p in hd.module.named_parameters():
        torch.testing.assert_close(p.detach(), kept * before[name] + opt.directions.seen[name])
        assert opt.directions.seen[name].any()


@pytest.mark.parametrize("solver", [None, lambda g, h: -torch.linalg.solve(h + torch.eye(3).to(h) @ h, g)])
@pytest.mark.parametrize("sampler", ["normal", "low_rank", "orthogonal"])
def test_autocast_is_for_the_model_alone(sampler, solver):
    """The same change as of a step without it that has these slopes and curvatures."""
    hd, x, targets = classifier(dtype=torch.float32)
    opt = FoMoHKD(hd, lr=0.1, sampler=sampler, solver=solver, seed=0, largest_rise=None, diagnostics=True)
    proposed, propose = {}, opt.directions.propose

    def noted(parameters, batch):
        proposed.update(propose(parameters, batch))
        return proposed

    opt.directions.propose = noted
    before = {name: p.detach().clone() for name, p in hd.module.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        opt.step(x, targets=targets)
    part = opt.last_step.part
    for name, p in hd.module.named_parameters():
        change = torch.tensordot(part, fomoh_fx.low_rank.dense(proposed[name]).double(), 1)
        torch.testing.assert_close((p - before[name]).double(), change, rtol=1e-5, atol=1e-7)

"""Small models of every kind, with torch alone; an entry of PROBLEMS builds one in float64 with a call of it."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.models.checking import Problem

Builder = Callable[[], Problem]
PROBLEMS: dict[str, Builder] = {}


def problem(builder: Builder) -> Builder:
    """Enter the builder under its own name; every build draws the same numbers."""

    def seeded() -> Problem:
        torch.manual_seed(0)
        built = builder()
        built.model.double()
        return built

    PROBLEMS[builder.__name__] = seeded
    return seeded


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- dense and convolutional


@problem
def mlp() -> Problem:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    return Problem(model, (r(4, 5),), loss=F.cross_entropy, targets=(torch.tensor([0, 2, 1, 1]),))


@problem
def logistic_regression() -> Problem:
    return Problem(nn.Linear(6, 4), (r(5, 6),), loss=F.cross_entropy, targets=(torch.tensor([0, 2, 1, 3, 1]),))


class PaperCNN(nn.Module):
    """The CNN of the paper: 5 x 5 kernels 1-20-50, 2 x 2 max-pools, dense 500-10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.dense1, self.dense2 = nn.Linear(50, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        return self.dense2(self.dense1(x.flatten(1)).relu())


@problem
def paper_cnn() -> Problem:
    return Problem(PaperCNN(), (r(2, 1, 16, 16),), loss=F.cross_entropy, targets=(torch.tensor([3, 7]),))


@problem
def residual_mlp_layer_norm() -> Problem:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(self.norm(x))))

    return Problem(nn.Sequential(Block(), Block(), nn.RMSNorm(6)), (r(3, 6),))


@problem
def gated_linear_units() -> Problem:
    class SwiGLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.value, self.out = (nn.Linear(a, b, bias=False) for a, b in ((4, 6), (4, 6), (6, 4)))

        def forward(self, x: Tensor) -> Tensor:
            return F.glu(torch.cat([self.out(F.silu(self.gate(x)) * self.value(x)), x], -1))

    return Problem(SwiGLU(), (r(5, 4),))


def _batch_norm_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 5),
        nn.BatchNorm1d(5), nn.Tanh(),
    )  # fmt: skip


@problem
def batch_norm_train() -> Problem:
    return Problem(_batch_norm_model().train(), (r(6, 2, 4, 4),))


@problem
def batch_norm_eval() -> Problem:
    return Problem(_batch_norm_model().eval(), (r(6, 2, 4, 4),))


@problem
def batch_norm_without_running_statistics() -> Problem:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False, momentum=None))
    return Problem(model, (r(6, 3),))


@problem
def instance_and_local_response_norm() -> Problem:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True), nn.LocalResponseNorm(2), nn.GELU())
    return Problem(model, (r(3, 2, 8),))


class SqueezeExcite(nn.Module):
    """Depthwise separable convolution, then a gate for each channel from its average."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.squeeze, self.excite = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.pointwise(self.depthwise(x)))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))
        return x + y * torch.sigmoid(gate)


@problem
def depthwise_separable_squeeze_excite() -> Problem:
    return Problem(nn.Sequential(SqueezeExcite(4), nn.AvgPool2d(2)), (r(2, 4, 6, 6),))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.GroupNorm(4, 8), nn.Mish())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        b = self.middle(a)
        near = F.interpolate(self.up(b)[..., ::2, ::2], size=a.shape[-2:], mode="nearest")
        smooth = F.interpolate(b[:, :4], scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(torch.cat([a, near, smooth], 1))


@problem
def unet() -> Problem:
    return Problem(UNet(), (r(2, 1, 8, 8),))


@problem
def transposed_convolutions() -> Problem:
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(4, 2, 3, groups=2, dilation=2), nn.Tanh(),
    )  # fmt: skip
    return Problem(model, (r(2, 3, 3, 3),))


@problem
def volumes_and_signals() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.volume = nn.Sequential(nn.Conv3d(1, 2, 2), nn.ELU(), nn.MaxPool3d(2))
            self.signal = nn.Sequential(nn.Conv1d(1, 3, 3, padding="same"), nn.Softplus(), nn.MaxPool1d(2))

        def forward(self, volume: Tensor, signal: Tensor) -> Tensor:
            return self.volume(volume).flatten(1).sum(1) * self.signal(signal).mean((1, 2))

    return Problem(Model(), (r(2, 1, 5, 5, 5), r(2, 1, 8)))


@problem
def dropout() -> Problem:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 6), nn.SELU(), nn.AlphaDropout(0.3))
    return Problem(model.train(), (r(4, 5),))


@problem
def dropout_of_channels() -> Problem:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Dropout2d(0.5), nn.Tanh(), nn.Conv2d(6, 2, 1))
    return Problem(model.train(), (r(3, 2, 5, 5),))


# --- sequences


def _encoder(dropout: float) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


@problem
def transformer_encoder_train() -> Problem:
    return Problem(_encoder(0.0).train(), (r(2, 4, 8),), {"mask": _causal(4)})


@problem
def transformer_encoder_dropout() -> Problem:
    padding = torch.tensor([[False] * 4, [False, False, False, True]])
    return Problem(_encoder(0.2).train(), (r(2, 4, 8),), {"src_key_padding_mask": padding})


@problem
def transformer_encoder_eval() -> Problem:
    return Problem(_encoder(0.2).eval(), (r(2, 4, 8),), {"mask": _causal(4)})


@problem
def transformer() -> Problem:
    model = nn.Transformer(8, 2, 1, 2, 12, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    return Problem(model, (r(2, 4, 8), r(2, 3, 8)), {"tgt_mask": mask, "tgt_is_causal": True})


@problem
def transformer_train() -> Problem:
    model = nn.Transformer(8, 2, 1, 1, 12, dropout=0.1, batch_first=False)
    return Problem(model.train(), (r(4, 2, 8), r(3, 2, 8)))


@problem
def multihead_attention_with_weights() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, kdim=4, vdim=5, add_bias_kv=True, batch_first=True)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return self.attention(q, k, v, need_weights=True, average_attn_weights=False)

    return Problem(Model(), (r(2, 3, 6), r(2, 4, 4), r(2, 4, 5)))


@problem
def lstm() -> Problem:
    return Problem(nn.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True), (r(2, 5, 3),))


@problem
def lstm_with_projection_and_state() -> Problem:
    model = nn.LSTM(3, 4, proj_size=2)
    return Problem(model, (r(5, 2, 3), (r(1, 2, 2), r(1, 2, 4))))


@problem
def gru() -> Problem:
    return Problem(nn.GRU(3, 4, num_layers=2, batch_first=True, bidirectional=True), (r(2, 5, 3),))


@problem
def rnn() -> Problem:
    return Problem(nn.Sequential(nn.Linear(2, 3), nn.RNN(3, 4, nonlinearity="tanh")), (r(4, 2, 2),))


@problem
def recurrent_cells() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru, self.rnn = nn.LSTMCell(3, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 2)

        def forward(self, xs: Tensor) -> Tensor:
            h, c = xs.new_zeros(xs.shape[1], 4), xs.new_zeros(xs.shape[1], 4)
            g, out = h, []
            for x in xs:
                h, c = self.lstm(x, (h, c))
                g = self.gru(h, g)
                out.append(self.rnn(g))
            return torch.stack(out)

    return Problem(Model(), (r(3, 2, 3),))


class TiedLanguageModel(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(tokens).cumsum(1))))


def _next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0, label_smoothing=0.1)


@problem
def tied_language_model() -> Problem:
    tokens = torch.tensor([[1, 4, 4, 2], [8, 3, 0, 0]])
    return Problem(TiedLanguageModel(), (tokens,), loss=_next_token, targets=(tokens,))


@problem
def embedding_with_padding() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.positions = nn.Embedding(7, 4, padding_idx=0), nn.Parameter(torch.randn(5, 4))
            self.out = nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            x = (self.words(tokens) * math.sqrt(4) + self.positions[: tokens.shape[1]]).tanh()
            keep = (tokens != 0).unsqueeze(-1)
            return self.out((x * keep).sum(1) / keep.sum(1))

    return Problem(Model(), (torch.tensor([[1, 2, 0, 0], [3, 3, 6, 0]]),))


@problem
def rotary_attention() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
            angles = torch.outer(torch.arange(4.0), torch.tensor([1.0, 0.1]))
            self.register_buffer("rotation", torch.polar(torch.ones(4, 2), angles).to(torch.complex128))

        def turn(self, x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 2, 2))
            return torch.view_as_real(pairs * self.rotation).flatten(-2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
            return self.out(y.transpose(1, 2).flatten(2))

    return Problem(Model(), (r(2, 4, 8),))


@problem
def relative_bias_attention_by_hand() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, 4, bias=False) for _ in range(3))
            self.bias = nn.Parameter(torch.randn(7))

        def forward(self, x: Tensor) -> Tensor:
            at = torch.arange(x.shape[1])
            scores = torch.einsum("bid,bjd->bij", self.q(x), self.k(x)) / 2 + self.bias[at[:, None] - at[None] + 3]
            scores = scores.masked_fill(at[None] > at[:, None], float("-inf"))
            return torch.einsum("bij,bjd->bid", scores.softmax(-1), self.v(x))

    return Problem(Model(), (r(2, 4, 4),))


# --- graphs, spectra, mixtures, flows


class GraphNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message, self.update, self.out = nn.Linear(6, 5), nn.Linear(8, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, destination = edges
        messages = torch.tanh(self.message(torch.cat([x[source], x[destination]], -1)))
        summed = torch.zeros(x.shape[0], 5, dtype=x.dtype).index_add(0, destination, messages)
        x = F.silu(self.update(torch.cat([x, summed], -1)))
        score = self.out(x)[source]
        index = destination[:, None].expand_as(score)
        top = torch.full((x.shape[0], 2), -10.0, dtype=x.dtype).scatter_reduce(0, index, score, "amax")
        weight = (score - top[destination]).exp()
        total = torch.zeros_like(top).scatter_add(0, index, weight)
        return weight / total[destination]


@problem
def graph_network() -> Problem:
    return Problem(GraphNetwork(), (r(4, 3), torch.tensor([[0, 1, 2, 3, 0], [1, 2, 2, 0, 3]])))


class FourierLayer(nn.Module):
    """A Fourier neural operator's layer: the lowest modes times complex weights, plus a pointwise map."""

    def __init__(self, weight_is_complex: bool) -> None:
        super().__init__()
        weight = torch.randn(3, 3, 4, 2, dtype=torch.float64)
        self.weight = nn.Parameter(torch.view_as_complex(weight) if weight_is_complex else weight)
        self.skip = nn.Conv1d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        modes = torch.fft.rfft(x)[..., :4]
        y = torch.einsum("bim,iom->bom", modes, weight)
        return F.gelu(torch.fft.irfft(y, n=x.shape[-1]) + self.skip(x))


@problem
def fourier_operator() -> Problem:
    return Problem(nn.Sequential(FourierLayer(False), FourierLayer(False)), (r(2, 3, 9),))


@problem
def fourier_operator_complex_parameters() -> Problem:
    return Problem(nn.Sequential(FourierLayer(True), FourierLayer(True)), (r(2, 3, 8),))


@problem
def spectral_magnitude() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            spectrum = torch.fft.fft(x * self.kernel)
            grid = torch.fft.ifft2(torch.fft.fft2(torch.outer(self.kernel, self.kernel)) * spectrum[0])
            return torch.cat([spectrum.abs(), spectrum.angle(), grid.real])

    return Problem(Model(), (r(2, 6),))


@problem
def mixture_of_experts() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 3)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.gate(x)
            best, which = scores.topk(2, -1)
            gates = torch.zeros_like(scores).scatter(-1, which, best.softmax(-1))
            outputs = torch.stack([expert(x) for expert in self.experts], 1)
            balance = (gates > 0).to(x.dtype).mean(0) @ scores.softmax(-1).mean(0)
            return (gates.unsqueeze(-1) * outputs).sum(1), balance

    return Problem(Model(), (r(5, 4),))


@problem
def normalising_flow() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4) + torch.randn(4, 4) / 4)
            self.lower, self.coupling = nn.Parameter(torch.randn(4, 4)), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            scale, shift = self.coupling(x[:, :2]).chunk(2, -1)
            scale = scale.tanh()
            x = torch.cat([x[:, :2], x[:, 2:] * scale.exp() + shift], -1)
            triangular = self.lower.tril(-1) + torch.eye(4, dtype=x.dtype)
            x = torch.linalg.solve_triangular(triangular, (x @ self.weight.T).T, upper=False, unitriangular=True).T
            return -x.square().sum(-1) / 2 + torch.linalg.slogdet(self.weight).logabsdet + scale.sum(-1)

    return Problem(Model(), (r(5, 4),))


@problem
def gaussian_process() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale, self.log_noise = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.tensor(-1.0))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z = x / self.log_scale.exp()
            distances = (z.unsqueeze(0) - z.unsqueeze(1)).square().sum(-1)
            kernel = (-distances / 2).exp() + self.log_noise.exp() * torch.eye(x.shape[0], dtype=x.dtype)
            factor = torch.linalg.cholesky(kernel)
            fit = torch.cholesky_solve(y.unsqueeze(-1), factor).squeeze(-1)
            return y @ fit / 2 + factor.diagonal().log().sum()

    return Problem(Model(), (r(5, 3), r(5)))


@problem
def linear_algebra_layer() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            skew = self.weight - self.weight.T
            orthogonal = torch.linalg.matrix_exp(skew)
            y = torch.linalg.solve(torch.eye(4, dtype=x.dtype) * 3 + skew, x.T).T
            spectral = torch.linalg.eigvalsh(self.weight @ self.weight.T)
            return torch.cat([y @ orthogonal, spectral.expand(1, 4), torch.linalg.inv(self.weight)])

    return Problem(Model(), (r(3, 4),))


@problem
def weight_and_spectral_norm() -> Problem:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3)),
    )  # fmt: skip
    # reverse mode is wrong here: weight_norm's backward takes the norm that it saved as a constant
    return Problem(model.eval(), (r(3, 4),), truth="difference", tolerance=1e-5)


@problem
def fixed_point_iterations() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.zeros(x.shape[0], 4, dtype=x.dtype)
            for _ in range(6):
                z = torch.tanh(self.inner(z) / 2 + self.outer(x))
            return z

    return Problem(Model(), (r(2, 3),))


@problem
def neural_ode() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = nn.Sequential(nn.Linear(3, 6), nn.Softplus(), nn.Linear(6, 2))

        def slope(self, t: float, x: Tensor) -> Tensor:
            return self.field(torch.cat([x, torch.full_like(x[:, :1], t)], -1))

        def forward(self, x: Tensor, steps: int = 3) -> Tensor:
            h = 1 / steps
            for t in torch.arange(steps).mul(h).tolist():
                a = self.slope(t, x)
                b = self.slope(t + h / 2, x + h / 2 * a)
                x = x + h * b
            return x

    return Problem(Model(), (r(3, 2),), {"steps": 2})


@problem
def kernel_regression() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres, self.values = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            weights = torch.softmax(-torch.cdist(x, self.centres), -1)
            return weights @ F.normalize(self.values, dim=-1) + F.cosine_similarity(x[:, :2], self.values[:1]).mean()

    return Problem(Model(), (r(5, 3),), truth="difference", tolerance=1e-5)  # reverse mode lacks cdist's second


# --- derivatives that are stopped, replaced or taken inside the model


class _Round(torch.autograd.Function):
    """A straight-through estimator: rounds forwards, passes the gradient backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Reverse(torch.autograd.Function):
    """Gradient reversal with a strength."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


class _Cube(torch.autograd.Function):
    """A Function whose saved input makes its backward non-linear in the point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x**3 * y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return 3 * x**2 * y * gradient, x**3 * gradient


@problem
def straight_through() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(_Round.apply(self.encode(x) * 3) / 3).tanh()

    return Problem(Model(), (r(4, 3),))


@problem
def gradient_reversal() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.label, self.domain = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.features(x).tanh()
            return self.label(h), self.domain(_Reverse.apply(h, 0.7)).tanh()

    return Problem(Model(), (r(4, 3),))


@problem
def custom_function_of_two_arguments() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return _Cube.apply(self.a(x), self.b(x).sigmoid())

    return Problem(Model(), (r(4, 3),))


@problem
def vector_quantisation() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.codes, self.decode = nn.Linear(3, 4), nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.encode(x)
            nearest = (z.unsqueeze(1) - self.codes.weight).square().sum(-1).argmin(-1)
            q = self.codes(nearest)
            penalty = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
            return self.decode(z + (q - z).detach()).tanh(), penalty

    return Problem(Model(), (r(6, 3),))


@problem
def self_supervision_with_stops() -> Problem:
    class Model(nn.Module):
        """An online and a slowly moving network; variance and covariance terms as in VICReg."""

        def __init__(self) -> None:
            super().__init__()
            self.online, self.slow = nn.Linear(4, 3), nn.Linear(4, 3)
            self.predict = nn.Linear(3, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                target = F.normalize(self.slow(y).tanh(), dim=-1)
            z = self.online(x)
            similarity = (F.normalize(self.predict(z), dim=-1) * target).sum(-1).mean()
            variance = F.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean()
            centred = z - z.mean(0)
            covariance = (centred.T @ centred) / (x.shape[0] - 1)
            off = covariance.flatten()[:-1].view(2, 4)[:, 1:].square().sum()
            scale = z.data.std()
            return -similarity + variance + off / scale

    return Problem(Model(), (r(5, 4), r(5, 4)))


@problem
def moving_average_buffer() -> Problem:
    class Model(nn.Module):
        """Centres its output by an exponential moving average that it updates in place, as DINO does."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.register_buffer("centre", torch.zeros(4))
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            with torch.no_grad():
                self.centre.mul_(0.9).add_(y.mean(0), alpha=0.1)
                self.calls += 1
            return (y - self.centre).log_softmax(-1)

    return Problem(Model(), (r(5, 3),))


@problem
def physics_informed() -> Problem:
    class Model(nn.Module):
        """The residual of a Poisson equation: the Laplacian in the inputs, inside the model."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))

        def forward(self, x: Tensor) -> Tensor:
            def u(point: Tensor) -> Tensor:
                return self.net(point).squeeze(-1)

            laplacian = torch.func.vmap(lambda p: torch.func.hessian(u)(p).diagonal().sum())(x)
            return laplacian + x.sin().prod(-1)

    return Problem(Model(), (r(3, 2),))


@problem
def physics_informed_by_autograd() -> Problem:
    class Model(nn.Module):
        """The slope in the inputs by torch.autograd.grad, inside the model."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            y = self.net(x)
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            return (slope.square().sum(-1) - 1).square()

    return Problem(Model(), (r(3, 2),))


@problem
def laplacian_of_inputs() -> Problem:
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Softplus(), nn.Linear(6, 1))
    return Problem(model, (r(4, 3),), wrt="inputs")


# --- views, mutation, structures, sharing


@problem
def in_place_and_views() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x).tanh_().mul(2)
            y[:, 0] *= 2
            rows = y.view(-1, 3, 2).transpose(1, 2)
            rows[0].mul_(2).add_(rows[1].clone().sin())
            F.leaky_relu_(y.add_(1), 0.1)
            out = torch.zeros(x.shape[0], 8, dtype=x.dtype)
            out[:, 1:7] = y
            out[x[:, 0] > 0, 7] = y[0, 1].clone() ** 2
            out.diagonal().copy_(y.diagonal().clone() ** 3)
            out[:, 2:4].clamp_(-0.5, 0.5)
            y = y * 1.5
            y.fill_(0)
            out += y.sum()
            return out.index_fill(0, torch.tensor([1]), 0.5)

    return Problem(Model(), (r(3, 4),))


@dataclass
class Prediction:
    """An output as a dataclass."""

    logits: Tensor
    extra: dict[str, Any]


pytree.register_dataclass(Prediction)
Pair = namedtuple("Pair", "left right")  # noqa: PYI024  what users' code has


@problem
def structured_output() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, batch: dict[str, Tensor], *, scale: float, shift: Tensor | None = None) -> Prediction:
            h = (self.a(batch["x"]) * scale).sin()
            pair = Pair(self.b(h) + (0 if shift is None else shift), h)
            return Prediction(pair.left, {"pair": pair, "classes": pair.left.argmax(-1), "scale": scale, "none": None})

    return Problem(Model(), ({"x": r(2, 3)},), {"scale": 1.5, "shift": r(2)})


@problem
def variational_autoencoder() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(5, 4), nn.Linear(2, 5)

        def forward(self, x: Tensor, *, noise: Tensor) -> dict[str, Tensor]:
            mean, log_variance = self.encode(x).chunk(2, -1)
            z = mean + noise * (log_variance / 2).exp()
            return {"logits": self.decode(z), "mean": mean, "log_variance": log_variance}

    def elbo(output: dict[str, Tensor], x: Tensor) -> Tensor:
        q = torch.distributions.Normal(output["mean"], (output["log_variance"] / 2).exp())
        prior = torch.distributions.Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean))
        rebuilt = F.binary_cross_entropy_with_logits(output["logits"], x, reduction="none").sum(-1)
        return (rebuilt + torch.distributions.kl_divergence(q, prior).sum(-1)).mean()

    x = torch.rand(3, 5, dtype=torch.float64)
    return Problem(Model(), (x,), {"noise": r(3, 2)}, loss=elbo, targets=(x,))


@problem
def shared_modules() -> Problem:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
            self.same = self.tower

        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return F.triplet_margin_loss(self.tower(a), self.same(b), self.tower(c), margin=5.0, reduction="none")

    return Problem(Siamese(), (r(3, 4), r(3, 4), r(3, 4)))


@problem
def checkpointed() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            from torch.utils.checkpoint import checkpoint

            h = checkpoint(lambda v: self.first(v).tanh(), x, use_reentrant=False)
            return checkpoint(lambda v: self.second(v).sigmoid(), h, use_reentrant=True)

    return Problem(Model(), (r(3, 3),), truth="difference", tolerance=1e-5)


@problem
def unused_parameters() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(7, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).exp()

    return Problem(Model(), (r(3, 3),))


@problem
def parameter_containers() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(nn.Parameter(torch.randn(3, 3)) for _ in range(2))
            self.named = nn.ParameterDict(
                {"scale": nn.Parameter(torch.randn(3)), "scalar": nn.Parameter(torch.randn(()))}
            )
            self.bilinear = nn.Bilinear(3, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = x
            for weight in self.weights:
                y = (y @ weight).sigmoid() * self.named["scale"] + self.named["scalar"]
            return self.bilinear(x, y)

    return Problem(Model(), (r(4, 3),))


@problem
def detection_head() -> Problem:
    class Model(nn.Module):
        """Sorting, clamping, comparisons and where, as losses on boxes have."""

        def __init__(self) -> None:
            super().__init__()
            self.boxes = nn.Linear(4, 4)

        def forward(self, x: Tensor, truth: Tensor) -> Tensor:
            corners = self.boxes(x).sort(-1).values
            low, high = torch.maximum(corners[:, :2], truth[:, :2]), torch.minimum(corners[:, 2:], truth[:, 2:])
            overlap = (high - low).clamp(min=0.05).prod(-1)
            areas = [(c[:, 2:] - c[:, :2]).prod(-1) for c in (corners, truth)]
            ratio = overlap / (areas[0] + areas[1] - overlap)
            smooth = F.smooth_l1_loss(corners, truth, reduction="none").sum(-1) + F.huber_loss(corners, truth)
            return torch.where(ratio > 0.1, 1 - ratio, smooth) + corners.amax(0).logsumexp(0) + corners.median()

    return Problem(Model(), (r(5, 4), r(5, 4).sort(-1).values))

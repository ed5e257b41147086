"""Models of sequences: attention, recurrence, language."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.checking import Problem
from tests.models.registry import problem, r


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


@problem
def gru_language_model() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.gru, self.head = nn.Embedding(9, 4), nn.GRU(4, 5, batch_first=True), nn.Linear(5, 9)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.gru(self.embedding(tokens))[0])

    tokens = torch.tensor([[1, 4, 4, 2], [8, 3, 5, 0]])
    return Problem(Model(), (tokens,), loss=_next_token, targets=(tokens,))


@problem
def attention_pooling() -> Problem:
    class Perceiver(nn.Module):
        """Learned queries read the inputs, then each other; one more query pools them."""

        def __init__(self) -> None:
            super().__init__()
            self.queries, self.pool = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(1, 6))
            self.read = nn.MultiheadAttention(6, 2, kdim=4, vdim=4, batch_first=True)
            self.mix = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            q = self.queries.expand(x.shape[0], -1, -1)
            q = q + self.read(q, x, x, need_weights=False)[0]
            q = q + self.mix(q, q, q, need_weights=False)[0]
            return F.scaled_dot_product_attention(self.pool.expand(x.shape[0], -1, -1), q, q, scale=1.0).squeeze(1)

    return Problem(Perceiver(), (r(2, 5, 4),))


@problem
def linear_attention() -> Problem:
    class Model(nn.Module):
        """Causal attention without softmax, by cumulative sums; and its form with random features."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)
            self.register_buffer("features", torch.randn(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            positive_q, positive_k = F.elu(q) + 1, F.elu(k) + 1
            state = torch.einsum("btd,bte->btde", positive_k, v).cumsum(1)
            total = (positive_q * positive_k.cumsum(1)).sum(-1, keepdim=True)
            causal = torch.einsum("btd,btde->bte", positive_q, state) / total
            phi_q, phi_k = ((a @ self.features - a.square().sum(-1, keepdim=True) / 2).exp() for a in (q, k))
            return causal + phi_q @ (phi_k.transpose(1, 2) @ v) / (phi_q @ phi_k.sum(1).unsqueeze(-1))

    return Problem(Model(), (r(2, 4, 4),))


@problem
def receptance_weighted_key_value() -> Problem:
    class Model(nn.Module):
        """The time mixing of RWKV: a decaying average in exponential weights, with the running maximum of exponents."""

        def __init__(self) -> None:
            super().__init__()
            self.decay, self.first, self.shift = (nn.Parameter(torch.randn(3)) for _ in range(3))
            self.key, self.value, self.receptance, self.out = (nn.Linear(3, 3, bias=False) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            before = F.pad(x, (0, 0, 1, -1))
            mixed = torch.lerp(before, x, self.shift.sigmoid())
            k, v, gate = self.key(mixed), self.value(mixed), self.receptance(mixed).sigmoid()
            decay = -self.decay.exp()
            top, below = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
            largest, out = torch.full_like(k[:, 0], -1e38), []
            for t in range(x.shape[1]):
                scale = torch.maximum(largest, self.first + k[:, t])
                old, new = (largest - scale).exp(), (self.first + k[:, t] - scale).exp()
                out.append((old * top + new * v[:, t]) / (old * below + new))
                scale = torch.maximum(largest + decay, k[:, t])
                old, new = (largest + decay - scale).exp(), (k[:, t] - scale).exp()
                top, below, largest = old * top + new * v[:, t], old * below + new, scale
            return self.out(gate * torch.stack(out, 1))

    return Problem(Model(), (r(2, 4, 3),))


@problem
def retention() -> Problem:
    class Model(nn.Module):
        """A retentive network's parallel form: decay masks for each head, rotations, group normalisation of heads."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.gate, self.out = (nn.Linear(4, 4, bias=False) for _ in range(5))
            self.norm = nn.GroupNorm(2, 4, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            batch, length, _ = x.shape
            q, k, v = (layer(x).view(batch, length, 2, 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
            at = torch.arange(length, dtype=x.dtype)
            turn = torch.stack([at.cos(), at.sin()], -1)
            q, k = (torch.stack([a[..., 0] * turn[:, 0] - a[..., 1] * turn[:, 1],
                                 a[..., 0] * turn[:, 1] + a[..., 1] * turn[:, 0]], -1) for a in (q, k))  # fmt: skip
            gamma = 1 - 2.0 ** (-5 - torch.arange(2, dtype=x.dtype))
            decay = torch.tril(gamma[:, None, None] ** (at[:, None] - at).clamp(min=0))
            y = (q @ k.transpose(-1, -2) * decay @ v).transpose(1, 2).reshape(batch * length, 4)
            return self.out(F.silu(self.gate(x)) * self.norm(y).view_as(x))

    return Problem(Model(), (r(2, 4, 4),))


@problem
def wave_net() -> Problem:
    class Block(nn.Module):
        def __init__(self, dilation: int) -> None:
            super().__init__()
            self.dilation = dilation
            self.filter = nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 6, 2, dilation=dilation))
            self.skip = nn.Conv1d(3, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            filtered, gate = self.filter(F.pad(x, (self.dilation, 0))).chunk(2, 1)
            y = filtered.tanh() * gate.sigmoid()
            return x + y, self.skip(y)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks = nn.Conv1d(1, 3, 1), nn.ModuleList(Block(d) for d in (1, 2))
            self.last = nn.Conv1d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x, total = self.first(x), 0
            for block in self.blocks:
                x, skip = block(x)
                total = total + skip
            return self.last(F.relu(total))

    # reverse mode is wrong here, as in weight_and_spectral_norm
    return Problem(Model(), (r(2, 1, 6),), truth="difference", tolerance=1e-5)


@problem
def tacotron() -> Problem:
    class Model(nn.Module):
        """An encoder, and a decoder with location-sensitive attention that feeds its own frames back."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.encoder = nn.Embedding(6, 4), nn.LSTM(4, 2, batch_first=True, bidirectional=True)
            self.prenet, self.cell, self.frame = nn.Linear(2, 3), nn.LSTMCell(7, 4), nn.Linear(8, 2)
            self.query, self.memory, self.energy = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 1)
            self.location, self.stop = nn.Conv1d(1, 3, 3, padding=1, bias=False), nn.Linear(8, 1)

        def forward(self, text: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
            memory, _ = self.encoder(self.embedding(text))
            keys, padding = self.memory(memory), text == 0
            frame, h = memory.new_zeros(text.shape[0], 2), memory.new_zeros(text.shape[0], 4)
            c, context, seen = h, h, torch.zeros_like(memory[..., 0])
            frames, stops, weights = [], [], []
            for _ in range(steps):
                h, c = self.cell(torch.cat([F.relu(self.prenet(frame)), context], -1), (h, c))
                energies = self.query(h).unsqueeze(1) + keys + self.location(seen.unsqueeze(1)).transpose(1, 2)
                score = self.energy(energies.tanh()).squeeze(-1).masked_fill(padding, -torch.inf)
                weight = score.softmax(-1)
                seen, context = seen + weight, torch.bmm(weight.unsqueeze(1), memory).squeeze(1)
                both = torch.cat([h, context], -1)
                frame = self.frame(both)
                frames, stops, weights = [*frames, frame], [*stops, self.stop(both)], [*weights, weight]
            return torch.stack(frames, 1), torch.cat(stops, 1).sigmoid(), torch.stack(weights, 1)

    return Problem(Model(), (torch.tensor([[1, 2, 3, 5], [4, 2, 0, 0]]), 3))


@problem
def speech_with_alignment_loss() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.gru = nn.Conv1d(3, 4, 3, stride=2, padding=1), nn.GRU(4, 3, bidirectional=True)
            self.head = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(F.gelu(self.convolution(x)).permute(2, 0, 1))[0]).log_softmax(-1)

    def alignment(log_probs: Tensor, labels: Tensor, times: Tensor, lengths: Tensor) -> Tensor:
        return F.ctc_loss(log_probs, labels, times, lengths, zero_infinity=True)

    targets = (torch.tensor([[1, 1, 3], [4, 2, 0]]), torch.tensor([6, 5]), torch.tensor([3, 2]))
    return Problem(  # reverse mode lacks the second derivative of PyTorch's own kernel
        Model(), (r(2, 3, 12),), loss=alignment, targets=targets, truth="difference", tolerance=1e-5
    )


@problem
def conditional_random_field() -> Problem:
    class Model(nn.Module):
        """Minus the log-likelihood of tags: the score of the path less the log-partition by the forward recursion."""

        def __init__(self) -> None:
            super().__init__()
            self.emit, self.transitions = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 4))
            self.start = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
            emitted = self.emit(x)
            chosen = emitted.gather(2, tags.unsqueeze(-1)).squeeze(-1)
            score = self.start[tags[:, 0]] + chosen[:, 0]
            moves = self.transitions[tags[:, :-1], tags[:, 1:]]
            score = score + ((moves + chosen[:, 1:]) * mask[:, 1:]).sum(1)
            a = self.start + emitted[:, 0]
            for t in range(1, x.shape[1]):
                after = torch.logsumexp(a.unsqueeze(2) + self.transitions + emitted[:, t].unsqueeze(1), 1)
                a = torch.where(mask[:, t].unsqueeze(1), after, a)
            return a.logsumexp(1) - score

    tags, mask = torch.tensor([[0, 1, 3, 3], [2, 2, 0, 0]]), torch.tensor([[True] * 4, [True, True, False, False]])
    return Problem(Model(), (r(2, 4, 3), tags, mask))


@problem
def flexible_attention() -> Problem:
    class Model(nn.Module):
        """FlexAttention with a causal block mask and a learned slope of the distance for each head."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.slope = nn.Linear(8, 24), nn.Parameter(torch.randn(2))

        def forward(self, x: Tensor) -> Tensor:
            from torch.nn.attention.flex_attention import flex_attention

            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)

            def biased(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
                return torch.where(
                    row >= column, 3 * torch.tanh(score / 3) - self.slope[head] * (row - column), -torch.inf
                )

            return flex_attention(q, k, v, score_mod=biased).transpose(1, 2).flatten(2)

    # reverse mode does not serve it on a CPU
    return Problem(Model(), (r(2, 4, 8),), truth="difference", tolerance=1e-5)


@problem
def state_space_by_fourier_transform() -> Problem:
    class Model(nn.Module):
        """A diagonal complex state space (S4D): its kernel, then a causal convolution by FFT."""

        def __init__(self) -> None:
            super().__init__()
            self.log_decay, self.frequency = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2, 3))
            self.output, self.log_step = nn.Parameter(torch.randn(2, 3, 2)), nn.Parameter(torch.randn(2) / 10 - 2)

        def forward(self, u: Tensor) -> Tensor:
            length = u.shape[-1]
            a = -self.log_decay.exp() + 1j * self.frequency
            scaled = a * self.log_step.exp().unsqueeze(-1)
            c = torch.view_as_complex(self.output) * (scaled.exp() - 1) / a
            powers = (scaled.unsqueeze(-1) * torch.arange(length)).exp()
            kernel = 2 * torch.einsum("hn,hnl->hl", c, powers).real
            spectrum = torch.fft.rfft(kernel, n=2 * length) * torch.fft.rfft(u, n=2 * length)
            return torch.fft.irfft(spectrum, n=2 * length)[..., :length]

    return Problem(Model(), (r(2, 2, 6),))


@problem
def delta_rule_in_parallel() -> Problem:
    class Model(nn.Module):
        """Fast weights by the delta rule (DeltaNet), over all times at once by a triangular solve."""

        def __init__(self) -> None:
            super().__init__()
            self.project, self.rate = nn.Linear(3, 12), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x).chunk(3, -1)
            k, beta = F.normalize(k, dim=-1), self.rate(x).sigmoid()
            eye = torch.eye(x.shape[1], dtype=x.dtype)
            seen = (beta * (k @ k.mT)).tril(-1) + eye
            written = torch.linalg.solve_triangular(seen, beta * v, upper=False)
            return (q @ k.mT).tril() @ written

    return Problem(Model(), (r(2, 4, 3),))

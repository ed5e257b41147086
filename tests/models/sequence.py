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

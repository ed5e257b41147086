"""Models of images, signals and volumes: convolutions, pooling, boxes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.checking import Problem
from tests.models.registry import problem, r


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
def dropout_of_channels() -> Problem:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Dropout2d(0.5), nn.Tanh(), nn.Conv2d(6, 2, 1))
    return Problem(model.train(), (r(3, 2, 5, 5),))


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


@problem
def mlp_mixer() -> Problem:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LayerNorm(6), nn.LayerNorm(6)
            self.tokens = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
            self.channels = nn.Sequential(nn.Linear(6, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.tokens(self.first(x).transpose(1, 2)).transpose(1, 2)
            return x + self.channels(self.second(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.mixer, self.head = nn.Conv2d(2, 6, 3, stride=3), Mixer(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mixer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

    return Problem(Model(), (r(2, 2, 6, 6),), loss=F.cross_entropy, targets=(torch.tensor([0, 2]),))


@problem
def efficient_net() -> Problem:
    class Block(nn.Module):
        """A mobile inverted bottleneck whose residual branch is dropped for some of the samples."""

        def __init__(self) -> None:
            super().__init__()
            self.expand = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.SiLU())
            self.depthwise = nn.Sequential(
                nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.SiLU()
            )
            self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 2, 1), nn.SiLU(), nn.Conv2d(2, 6, 1))
            self.project = nn.Sequential(nn.Conv2d(6, 3, 1, bias=False), nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.depthwise(self.expand(x))
            y = self.project(y * self.gate(y).sigmoid())
            kept = (torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype) + 0.8).floor()
            return x + y / 0.8 * kept

    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), Block(), nn.AdaptiveMaxPool2d((2, 1)), nn.Flatten())
    return Problem(model.train(), (r(3, 2, 8, 8),))


@problem
def shuffle_net() -> Problem:
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(
                nn.Conv2d(4, 4, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)
            )

        def forward(self, x: Tensor) -> Tensor:
            kept, changed = x.chunk(2, 1)
            y = torch.cat([kept, self.branch(changed)], 1)
            return y.view(y.shape[0], 2, 4, *y.shape[2:]).transpose(1, 2).flatten(1, 2)

    return Problem(nn.Sequential(nn.Conv2d(1, 8, 3), Unit(), Unit(), nn.PixelShuffle(2)), (r(2, 1, 6, 6),))


@problem
def dense_net() -> Problem:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 2, 3, padding=1)) for c in (3, 5, 7)
            )

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.cat([x, layer(x)], 1)
            return x

    model = nn.Sequential(Block(), nn.Conv2d(9, 4, 1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    return Problem(model.train(), (r(3, 3, 4, 4),))


@problem
def inception() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(2, 2, 1)
            self.rows = nn.Sequential(nn.Conv2d(2, 2, (1, 3), padding=(0, 1)), nn.ReLU6(), nn.Conv2d(2, 2, (3, 1)))
            self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), nn.Conv2d(2, 3, 1))
            self.averaged = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Conv2d(2, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            branches = [
                self.one(x),
                F.pad(self.rows(x), (0, 0, 1, 1), mode="reflect"),
                self.pooled(x),
                self.averaged(x),
            ]
            return torch.cat(branches, 1).relu().sum((2, 3))

    return Problem(Model(), (r(2, 2, 5, 5),))


@problem
def spatial_transformer() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.locate, self.classify = nn.Linear(50, 6), nn.Conv2d(2, 2, 3)
            self.scale = nn.Parameter(torch.tensor(0.1))

        def forward(self, x: Tensor) -> Tensor:
            unit = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=x.dtype)
            theta = (unit + self.scale * self.locate(x.flatten(1)).tanh()).view(-1, 2, 3)
            grid = F.affine_grid(theta, list(x.shape), align_corners=False)
            near = F.grid_sample(self.classify(x), grid[:, 1:4, 1:4], padding_mode="border", align_corners=True)
            return F.grid_sample(x, grid, align_corners=False)[..., :3, :3] * near

    return Problem(Model(), (r(2, 2, 5, 5),))


@problem
def deformable_convolution() -> Problem:
    class Model(nn.Module):
        """Bilinear interpolation at learned offsets by gathers, then a 3 x 3 convolution of what was gathered."""

        def __init__(self) -> None:
            super().__init__()
            self.offsets, self.mask = nn.Conv2d(2, 18, 3, padding=1), nn.Conv2d(2, 9, 3, padding=1)
            self.weight = nn.Parameter(torch.randn(3, 2, 9))

        @staticmethod
        def read(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
            height, width = x.shape[-2:]
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
            values = x.flatten(2).gather(2, at.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1))
            return values.unflatten(2, at.shape[1:]) * inside.unsqueeze(1)

        def forward(self, x: Tensor) -> Tensor:
            height, width = x.shape[-2:]
            base = torch.stack(
                torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            ).to(x.dtype)  # fmt: skip
            tap = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).to(x.dtype)
            offsets = self.offsets(x).tanh().unflatten(1, (9, 2))
            row = base[0] + tap[:, 0, None, None] + offsets[:, :, 0]
            column = base[1] + tap[:, 1, None, None] + offsets[:, :, 1]
            top, left = row.floor(), column.floor()
            down, right = (row - top).unsqueeze(1), (column - left).unsqueeze(1)
            values = (
                (1 - down) * (1 - right) * self.read(x, top, left) + (1 - down) * right * self.read(x, top, left + 1)
                + down * (1 - right) * self.read(x, top + 1, left) + down * right * self.read(x, top + 1, left + 1)
            )  # fmt: skip
            return torch.einsum("nckhw,ock,nkhw->nohw", values, self.weight, self.mask(x).sigmoid())

    return Problem(Model(), (r(2, 2, 4, 4),))


@problem
def capsules_with_routing() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.primary, self.weight = nn.Conv2d(1, 8, 3, stride=2), nn.Parameter(torch.randn(1, 8, 3, 3, 4) / 4)

        @staticmethod
        def squash(x: Tensor) -> Tensor:
            square = x.square().sum(-1, keepdim=True)
            return square / (1 + square) * x / (square + 1e-8).sqrt()

        def forward(self, x: Tensor) -> Tensor:
            u = self.squash(self.primary(x).view(x.shape[0], 8, 1, 4, 1).squeeze(-1))
            votes = (self.weight @ u.unsqueeze(-1)).squeeze(-1)
            logits = torch.zeros(votes.shape[:-1], dtype=x.dtype)
            for _ in range(3):
                v = self.squash((logits.softmax(-1).unsqueeze(-1) * votes).sum(1))
                logits = logits + (votes * v.unsqueeze(1)).sum(-1)
            return torch.linalg.vector_norm(v, dim=-1)

    def margin(lengths: Tensor, y: Tensor) -> Tensor:
        present = F.one_hot(y, 3)
        return (present * (0.9 - lengths).relu() ** 2 + 0.5 * (1 - present) * (lengths - 0.1).relu() ** 2).sum(1).mean()

    return Problem(Model(), (r(2, 1, 5, 5),), loss=margin, targets=(torch.tensor([0, 2]),))


@problem
def semantic_segmentation_with_focal_and_dice() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.atrous = nn.ModuleList(nn.Conv2d(2, 3, 3, padding=d, dilation=d) for d in (1, 2))
            self.pooled, self.head, self.slope = nn.Conv2d(2, 3, 1), nn.Conv2d(9, 3, 1), nn.PReLU(9)

        def forward(self, x: Tensor) -> Tensor:
            whole = F.interpolate(self.pooled(F.adaptive_avg_pool2d(x, 1)), x.shape[-2:], mode="bicubic")
            y = self.head(self.slope(torch.cat([*(layer(x) for layer in self.atrous), whole], 1)))
            return F.interpolate(y, scale_factor=1.5, mode="bilinear", align_corners=True)

    def focal_and_dice(logits: Tensor, y: Tensor) -> Tensor:
        cross = F.cross_entropy(logits, y, reduction="none", weight=torch.tensor([1.0, 2.0, 0.5], dtype=logits.dtype))
        focal = ((1 - (-cross).exp()) ** 2 * cross).mean()
        p, truth = logits.softmax(1), F.one_hot(y, 3).movedim(-1, 1)
        dice = 1 - (2 * (p * truth).sum((2, 3)) + 1) / ((p + truth).sum((2, 3)) + 1)
        return focal + dice.mean()

    return Problem(Model(), (r(2, 2, 4, 4),), loss=focal_and_dice, targets=(torch.randint(3, (2, 6, 6)),))


@problem
def set_prediction() -> Problem:
    class Model(nn.Module):
        """Queries decode boxes and classes from an image's features, as in DETR."""

        def __init__(self) -> None:
            super().__init__()
            self.features, self.queries = nn.Conv2d(1, 4, 2, stride=2), nn.Parameter(torch.randn(3, 4))
            self.decoder = nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
            self.classes, self.boxes = nn.Linear(4, 3), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            memory = self.features(x).flatten(2).transpose(1, 2)
            h = self.decoder(self.queries.expand(x.shape[0], -1, -1), memory)
            return self.classes(h), self.boxes(h).sigmoid()

    def corners(box: Tensor) -> Tensor:
        centre, size = box.chunk(2, -1)
        return torch.cat([centre - size / 2, centre + size / 2], -1)

    def area(box: Tensor) -> Tensor:
        return (box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1)

    def generalised_overlap(a: Tensor, b: Tensor) -> Tensor:
        a, b = corners(a), corners(b)
        low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
        inner = (high - low).clamp(min=0).prod(-1)
        union = area(a) + area(b) - inner
        hull = torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1)
        return inner / union - (area(hull) - union) / area(hull)

    def matched(output: tuple[Tensor, Tensor], labels: Tensor, boxes: Tensor) -> Tensor:
        """The best of all assignments of two truths to three queries, by costs without derivative."""
        logits, predicted = output
        assignments = torch.tensor([[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]])
        with torch.no_grad():
            apart = torch.cdist(predicted, boxes, p=1)
            overlap = generalised_overlap(predicted.unsqueeze(2), boxes.unsqueeze(1))
            unlikely = -logits.softmax(-1).gather(2, labels.unsqueeze(1).expand(-1, 3, -1))
            cost = 5 * apart - 2 * overlap + unlikely
            best = assignments[cost[:, assignments, torch.arange(2)].sum(-1).argmin(-1)]
        chosen = predicted.gather(1, best.unsqueeze(-1).expand(-1, -1, 4))
        classes = torch.full((2, 3), 2).scatter(1, best, labels)
        weight = torch.tensor([1.0, 1.0, 0.1], dtype=logits.dtype)
        near = F.l1_loss(chosen, boxes) * 5 + 2 * (1 - generalised_overlap(chosen, boxes)).mean()
        return F.cross_entropy(logits.transpose(1, 2), classes, weight) + near

    targets = (torch.tensor([[0, 1], [1, 1]]), torch.rand(2, 2, 4, dtype=torch.float64) / 2 + 0.25)
    return Problem(Model().train(), (r(2, 1, 4, 4),), loss=matched, targets=targets)

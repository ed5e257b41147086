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

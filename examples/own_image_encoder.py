"""An image tower of one's own: captune train DATA image_encoder=own_image_encoder:make"""

from torch import Tensor, nn

from captune.encoders.image import Features
from captune.preprocess import Preprocess


class SmallConvNet(nn.Module):
    name = "small-conv-net"
    feature_dim = 64
    preprocess = Preprocess(image_size=64, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 7, stride=4), nn.BatchNorm2d(32), nn.GELU())
        self.body = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2), nn.BatchNorm2d(64), nn.GELU())

    def forward(self, pixels: Tensor) -> Features:  # (N, 3, 64, 64), normalised
        maps = self.body(self.stem(pixels))  # (N, 64, 7, 7)
        return Features(pooled=maps.mean((2, 3)), map=maps)

    def description(self) -> dict[str, str]:
        return {"kind": "own", "name": self.name}


make = SmallConvNet

"""Residual networks for small images, in linen: ResNet and wide ResNet."""

import functools

import flax.linen as nn
import jax

_conv = functools.partial(
    nn.Conv,
    use_bias=False,
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
)
_conv3x3 = functools.partial(_conv, kernel_size=(3, 3), padding=1)
_norm = functools.partial(nn.BatchNorm, momentum=0.9)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, activations after the sum (ResNet)."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``(batch, h, w, c)`` to ``(batch, h / stride, w / stride, width)``."""
        norm = functools.partial(_norm, use_running_average=not train)
        y = _conv3x3(self.width, strides=self.stride)(x)
        y = _conv3x3(self.width)(nn.relu(norm()(y)))
        y = norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = _conv(self.width, (1, 1), strides=self.stride, name="shortcut")(x)
            x = norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class WideBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, activations first (wide ResNet)."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``(batch, h, w, c)`` to ``(batch, h / stride, w / stride, width)``."""
        norm = functools.partial(_norm, use_running_average=not train)
        y = nn.relu(norm()(x))
        if x.shape[-1] != self.width or self.stride > 1:
            x = _conv(self.width, (1, 1), strides=self.stride, name="shortcut")(y)
        y = _conv3x3(self.width, strides=self.stride)(y)
        return x + _conv3x3(self.width)(nn.relu(norm()(y)))


class ResNet(nn.Module):
    """A residual network for small images: 3x3 stem, stages of blocks, linear head.

    Attributes:
      block: `BasicBlock` or `WideBlock`.
      stages: Blocks per stage. Every stage after the first halves the image.
      width: Channels of the stem; stage ``i`` has ``width * widen * 2 ** i``.
      widen: Factor of the wide networks.
      classes: Classes to tell apart.
    """

    block: type[nn.Module]
    stages: tuple[int, ...]
    width: int
    widen: int = 1
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map images ``(batch, h, w, c)`` to logits ``(batch, classes)``."""
        preactivated = self.block is WideBlock
        x = _conv3x3(self.width, name="stem")(x)
        if not preactivated:
            x = nn.relu(_norm(use_running_average=not train, name="norm")(x))
        for stage, count in enumerate(self.stages):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"stage{stage}_block{index}"
                width = self.width * self.widen * 2**stage
                x = self.block(width, stride, name=name)(x, train)
        if preactivated:
            x = nn.relu(_norm(use_running_average=not train, name="norm")(x))
        return nn.Dense(self.classes, name="head")(x.mean(axis=(1, 2)))


MODELS = {  # name -> (usual width, constructor from a width)
    "resnet6": (64, functools.partial(ResNet, BasicBlock, (1, 1))),
    "resnet10": (64, functools.partial(ResNet, BasicBlock, (1, 1, 1, 1))),
    "resnet18": (64, functools.partial(ResNet, BasicBlock, (2, 2, 2, 2))),
    "wrn22-2": (16, functools.partial(ResNet, WideBlock, (3, 3, 3), widen=2)),
}

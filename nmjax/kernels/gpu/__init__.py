"""Pallas kernels for GPUs.

- `instructions`: sparse matrix instructions that Mosaic GPU does not have.
- `hopper`, `hopper_decode`, `hopper_weight_only`: 2:4 products on Hopper.
- `fan_in`, `blocks`: constant fan-in and block-sparse products.
- `ampere`, `blackwell`: 2:4 products there, experimental.
- `tiling`: the choice of tiles.
"""

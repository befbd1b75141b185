"""Pallas kernels for GPUs.

- `hopper`, `hopper_decode`, `hopper_weight_only`: 2:4 products on Hopper, of many rows,
  of few, and with weights of 8 bits. All run the kernel in `hopper_kernel`.
- `instructions`, `assembly`: sparse matrix instructions that Mosaic GPU does not have.
- `operands`, `finishing`: what goes into these kernels and what follows the sums.
- `fan_in`, `blocks`: constant fan-in and block-sparse products; `narrow`: those of
  blocks that tensor cores are not made for.
- `chunks`, `gathers`, `lanes`: what products that gather inputs are made of: what goes
  through shared memory when, how it is read, and code of single threads.
- `ampere`, `blackwell`: 2:4 products there, experimental.
- `tiling`: the choice of tiles.
"""

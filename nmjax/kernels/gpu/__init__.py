"""Pallas kernels for GPUs.

- `hopper`, `hopper_decode`, `hopper_weight_only`: 2:4 products on Hopper, of many rows,
  of few, and with weights of 8 bits. All run the kernel in `hopper_kernel`.
- `instructions`, `assembly`: sparse matrix instructions that Mosaic GPU does not have.
- `operands`, `finishing`: what goes into these kernels and what follows the sums.
- `fan_in`, `blocks`: constant fan-in and block-sparse products; `wide`, `narrow`: those
  of blocks that tensor cores are made for, and of others.
- `gathering`: the kernel of products that gather inputs; `chunks`, `gathers`: what goes
  through shared memory when, and how it is read.
- `lanes`, `memory`, `floats`: code of single threads.
- `ampere`, `blackwell`: 2:4 products there, experimental; `mma`: Ampere's instruction.
- `tiles`: sizes of the kernels of Hopper; `tiling`: the choice of them.
"""

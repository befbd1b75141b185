"""Settings every test runs under: strict dtypes and eight CPU devices."""

import jax

# Before the first array: eight virtual devices, so that sharded code is tested on a
# machine with one. The device count cannot change once a backend has started.
jax.config.update("jax_num_cpu_devices", 8)
# int32 + float32 without a word said is an error, not a silent float32.
jax.config.update("jax_numpy_dtype_promotion", "strict")

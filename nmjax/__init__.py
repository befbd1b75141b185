"""Hardware-usable sparse networks in JAX."""

from importlib.metadata import version as _version

__version__ = _version("nmjax")

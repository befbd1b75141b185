"""Packages that only reports and examples need, imported when first used."""

import importlib
from typing import Any


def require(module: str, what: str) -> Any:
    """Import an optional package, or say how to get it.

    Args:
      module: the module to import, for example ``"matplotlib.figure"``.
      what: the function that needs it, for the message.

    Returns:
      The module.

    Raises:
      ImportError: the package is not installed.

    Example:
      >>> from nmjax.reports import optional
      >>> optional.require("json", "this example").__name__
      'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{what} needs {package}, which is not installed: "
            "run `pip install 'nmjax[examples]'`"
        ) from error

"""torch, imported at its first use.

Importing torch takes seconds, and `python recipes/phi4_grpo.py --help` or a mistyped flag needs none of it. The modules
that a recipe imports at its top therefore write `from grpo.lazy import torch` instead of `import torch`, and keep
annotations unevaluated (`from __future__ import annotations`). Everything else imports torch as usual.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
else:

    class _LazyModule(ModuleType):
        """Stands for a module and imports it when an attribute is first asked for."""

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module(self.__name__), name)

    torch = _LazyModule("torch")

__all__ = ["torch"]

"""VisualRWKV: a vision-language model whose language model is an RNN.

The public names are loaded on first use, so that `import visualrwkv` stays as cheap as importing torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "load_model": "visualrwkv.checkpoint",
    "load": "visualrwkv.chat",
    "encode_conversation": "visualrwkv.text.prompt",
}
_MODULES = ("ops", "vision")

__all__ = ["encode_conversation", "load", "load_model", "ops", "vision"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"visualrwkv.{name}")
    raise AttributeError(f"module 'visualrwkv' has no attribute {name!r}; it has {', '.join(__all__)}")

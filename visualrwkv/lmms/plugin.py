"""How lmms-eval finds us: an entry point in its group "lmms_eval.models" names `manifest`.

It is read while lmms-eval is itself being imported; the model's module, which needs it whole, is named and not imported.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers under the name visualrwkv."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="visualrwkv", simple_class_path="visualrwkv.lmms.model.LmmsModel")

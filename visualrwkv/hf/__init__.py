"""The model behind transformers' doors: Auto classes, `generate`, pipelines, and directories that work without this package.

`import visualrwkv.hf` registers the classes; from then on `AutoModelForImageTextToText.from_pretrained(directory)` and
`AutoProcessor.from_pretrained(directory)` open any directory of ours. `export` writes one that needs no import.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from visualrwkv.config import MODEL_TYPE
from visualrwkv.hf.export import export
from visualrwkv.hf.modeling import VisualRWKVConfig, VisualRWKVForConditionalGeneration
from visualrwkv.hf.processing import VisualRWKVImageProcessor, VisualRWKVProcessor, WorldTokenizer

__all__ = [
    "VisualRWKVConfig",
    "VisualRWKVForConditionalGeneration",
    "VisualRWKVImageProcessor",
    "VisualRWKVProcessor",
    "WorldTokenizer",
    "export",
]

AutoConfig.register(MODEL_TYPE, VisualRWKVConfig, exist_ok=True)
for _auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
    _auto.register(VisualRWKVConfig, VisualRWKVForConditionalGeneration, exist_ok=True)
AutoTokenizer.register(VisualRWKVConfig, WorldTokenizer, exist_ok=True)
AutoImageProcessor.register(VisualRWKVConfig, VisualRWKVImageProcessor, exist_ok=True)
AutoProcessor.register(VisualRWKVConfig, VisualRWKVProcessor, exist_ok=True)

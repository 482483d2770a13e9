"""The model's inputs by transformers' classes: tokenizer, image processor, chat template, and the processor that joins them.

I pictures, M image tokens.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AddedToken, BatchFeature, ProcessorMixin, PythonBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.utils import cached_file

from visualrwkv.config import ImagePosition, ModelConfig, vision_config
from visualrwkv.files import CONFIG, read_json
from visualrwkv.hf.modeling import CodeOfExport
from visualrwkv.model import IMAGE_PLACEHOLDER
from visualrwkv.text.prompt import IMAGE_TAG, SHORT_ANSWER
from visualrwkv.text.tokenizer import END, encode, vocabulary
from visualrwkv.vision.processor import make_processor, open_picture

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"
"""What the public directories of RWKV call id 0."""


class WorldTokenizer(CodeOfExport, PythonBackend):
    """The RWKV World tokenizer. A token's string holds each of its bytes as the character of that number."""

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"  # for generation; the network never sees padding

    def __init__(self, **kwargs: Any):
        named = {END: END_OF_TEXT, IMAGE_PLACEHOLDER: IMAGE_TAG}
        kwargs["added_tokens_decoder"] = {i: AddedToken(t, special=True, normalized=False) for i, t in named.items()}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            kwargs[name] = END_OF_TEXT
        self._ids = {token.decode("latin-1"): i for i, token in vocabulary().items()}
        super().__init__(**{"extra_special_tokens": [IMAGE_TAG], "special_tokens_pattern": "none", **kwargs})

    @property
    def vocab_size(self) -> int:
        return IMAGE_PLACEHOLDER + 1

    def __len__(self) -> int:
        return self.vocab_size  # ids without an entry count: they have rows in the embedding

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [vocabulary()[i].decode("latin-1") for i in encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, END)

    def _convert_id_to_token(self, index: int) -> str:
        return vocabulary().get(index, b"").decode("latin-1")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return "".join(tokens).encode("latin-1").decode("utf-8", "replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """No files: the table is pyrwkv-tokenizer's."""
        return ()


class VisualRWKVImageProcessor(CodeOfExport, BaseImageProcessor):
    """What the model's vision encoder reads. vision: the settings of the encoder, as in `config.json`."""

    model_input_names = ["pixel_values"]

    def __init__(self, vision: dict | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.vision = vision

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Pictures that a path names as we open them, with their transparency and depth; others as transformers does."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(one) for one in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, Path)) and os.path.exists(image_url_or_urls):
            return open_picture(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def __call__(self, images: Any, return_tensors: str | None = "pt", **_: Any) -> BatchFeature:  # type: ignore[override]
        """Pictures in any form that transformers takes, nested or not -> pixel_values (I, …)."""
        if self.vision is None:
            raise ValueError("this model has no vision encoder; it answers text only")
        process = make_processor(vision_config(self.vision))
        pictures: list[Any] = list(make_flat_list_of_images(self.fetch_images(images)))  # type: ignore[arg-type]
        pixels = [process(p if isinstance(p, Image.Image) else to_pil_image(p)) for p in pictures]
        return BatchFeature({"pixel_values": torch.stack(pixels)}, tensor_type=return_tensors)


def chat_template(image_position: ImagePosition, name: str) -> str:
    """A model's prompt in Jinja: the same text as `encode_conversation`'s. `image_position` may be given to it as a variable."""
    template = Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8")
    return template.replace("POSITION", repr(image_position)).replace("SHORT_ANSWER", repr(SHORT_ANSWER))


class VisualRWKVProcessor(CodeOfExport, ProcessorMixin):
    """Messages or text with pictures -> the model's inputs; `<image>` in a text becomes M placeholders."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_tokens: int = 1,
        chat_template: str | None = None,
    ):
        self.image_token, self.image_token_id = IMAGE_TAG, IMAGE_PLACEHOLDER
        self.image_tokens = image_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> VisualRWKVProcessor:  # type: ignore[override]
        """From a model's directory, here or on the Hub, or from one that `save_pretrained` wrote."""
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        find: Any = partial(
            cached_file, pretrained_model_name_or_path, _raise_exceptions_for_missing_entries=False, **hub
        )
        config, own = find(CONFIG), find("processor_config.json")
        if config is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        settings = ModelConfig.from_dict(read_json(Path(config)))  # where both are there, these are the model's own
        if own is None:
            words = {k: v for k, v in kwargs.items() if k not in HUB_OPTIONS and not k.startswith(("_", "trust"))}
            return cls.of(settings, **words)
        found = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        found.image_tokens, found.image_processor.vision = settings.image_tokens, settings.to_dict()["vision"]
        return found

    @classmethod
    def of(cls, config: ModelConfig, **settings: Any) -> VisualRWKVProcessor:
        """The processor of a model of that config; settings: the tokenizer's."""
        vision = config.to_dict()["vision"]
        return cls(
            VisualRWKVImageProcessor(vision),
            WorldTokenizer(**settings),
            config.image_tokens,
            chat_template(config.image_position, config.template),
        )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **_: Any) -> str:
        return IMAGE_TAG * self.image_tokens

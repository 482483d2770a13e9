"""VisualRWKV as a model of transformers: the same network and names, with a recurrent state for a cache.

B rows, T tokens a row, C channels, V vocabulary, I pictures, M image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import ModelOutput

from visualrwkv.config import MODEL_TYPE, ModelConfig
from visualrwkv.generate import closes
from visualrwkv.model import IMAGE_PLACEHOLDER, VisualRWKV
from visualrwkv.rwkv.state import State
from visualrwkv.text.tokenizer import END, decode_bytes


class CodeOfExport:
    """For our classes under transformers' eyes: the code that travels with a model is `export`'s, not one class's file."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing."""


class VisualRWKVConfig(CodeOfExport, PreTrainedConfig):
    """The settings of `ModelConfig`, as our `config.json` holds them."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["state"]

    rwkv: dict | None = None
    vision: dict | None = None
    projector: str = ModelConfig.projector
    image_tokens: int = ModelConfig.image_tokens
    scan: str = ModelConfig.scan
    image_position: str = ModelConfig.image_position
    template: str = ModelConfig.template
    tie_word_embeddings: bool = False

    def settings(self) -> ModelConfig:
        """The same as our dataclass; ValueError where a setting is wrong or missing."""
        return ModelConfig.from_dict({f.name: getattr(self, f.name) for f in fields(ModelConfig)})

    @property
    def image_token_id(self) -> int:
        return IMAGE_PLACEHOLDER

    @property
    def vocab_size(self) -> int:
        return self.settings().rwkv.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.settings().rwkv.n_embd

    @property
    def num_hidden_layers(self) -> int:
        return self.settings().rwkv.n_layer


@dataclass
class VisualRWKVOutput(ModelOutput):
    """loss: over the labelled positions; logits (B, T, V); state: all that was read, to go on from."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: State | None = None


class TurnEnds(StoppingCriteria):
    """Ends the rows whose answer is over, also where a blank line comes in two tokens neither of which is id 261."""

    def __init__(self, end_of_turn: int, least: int = 0) -> None:
        self.end_of_turn, self.least = end_of_turn, least
        self.begin: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        """Rows so far (B, T) -> which are over (B,)."""
        self.begin = input_ids.shape[1] - 1 if self.begin is None else self.begin
        if input_ids.shape[1] - self.begin <= self.least:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tails = input_ids[:, max(self.begin, input_ids.shape[1] - 2) :].tolist()
        over = [closes(tail[-1], decode_bytes(tail), self.end_of_turn) for tail in tails]
        return torch.tensor(over, device=input_ids.device)


def answer_settings(end_of_turn: int) -> GenerationConfig:
    """How an answer is generated unless the caller says otherwise: greedy, as `VLM.answer`."""
    return GenerationConfig(
        bos_token_id=END, eos_token_id=[END, end_of_turn], pad_token_id=END, max_new_tokens=256, do_sample=False
    )


class VisualRWKVForConditionalGeneration(CodeOfExport, PreTrainedModel, GenerationMixin):
    """The network of `visualrwkv.model`, its parameters by the same names."""

    config_class = VisualRWKVConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    _is_stateful = True
    _supports_sdpa = True
    network: VisualRWKV

    def __init__(self, config: VisualRWKVConfig):
        super().__init__(config)
        network = VisualRWKV(config.settings())
        self.__dict__["network"] = network  # not a submodule: its parts are, by the names of every file of ours
        self.rwkv, self.vit, self.proj = network.rwkv, network.vit, network.proj
        self.generation_config = answer_settings(network.config.end_of_turn)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: a fresh network is initialised as it is made, and `from_pretrained` refuses what is not whole."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As transformers'; ValueError where a tensor is missing."""
        wanted = kwargs.pop("output_loading_info", False)
        load: Any = super().from_pretrained
        model, info = load(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{pretrained_model_name_or_path} does not fit the model: missing {missing[0]}{more}")
        return (model, info) if wanted else model

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As transformers'; what came from an exported directory takes its code along."""
        super().save_pretrained(save_directory, **kwargs)
        if getattr(self.config, "auto_map", None):
            from visualrwkv.hf.export import write_code

            write_code(Path(save_directory))

    def adjust_generation_fn(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        """A directory without generation settings gets ours, not transformers' twenty tokens."""
        adjust: Any = super().adjust_generation_fn  # type: ignore[misc]
        adjust(generation_config, *args, **kwargs)
        if generation_config is None and self.generation_config.eos_token_id is None:
            self.generation_config = answer_settings(self.network.config.end_of_turn)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.rwkv.emb

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.rwkv.head

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: State | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> VisualRWKVOutput | tuple:
        """Read rows and say what may come next.

        input_ids (B, T): M image placeholders for each picture; pixel_values: the pictures of all rows in order, as the
        image processor makes them; attention_mask (B, T or more): 0 where a row is padded, on either side, which the
        network is not shown; state: where to go on from, B rows; labels (B, T): -100 where nothing is learned;
        use_cache False: no state is returned; logits_to_keep: the last so many positions alone, 0 for all.
        """
        T = input_ids.shape[1]
        if attention_mask is not None and attention_mask.shape[1] < T:
            raise ValueError(f"attention_mask covers {attention_mask.shape[1]} of {T} tokens; it must cover all")
        shown = None if attention_mask is None else attention_mask[:, -T:].bool()
        if shown is None or bool(shown.all()):
            hidden, new = self.network.hidden(input_ids, pixel_values, state)
        else:
            lengths = shown.sum(1)
            if int(lengths.min()) == 0:
                raise ValueError(f"row {int(lengths.argmin())} of the attention mask shows no token")
            bounds = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
            packed, new = self.network.hidden(input_ids[shown][None], pixel_values, state, bounds)
            # where a row is padded stands what its last token gave, so that the row's end says what comes next
            hidden = packed[0][(shown.cumsum(1) - 1).clamp(min=0) + bounds[:-1, None]]
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.rwkv.head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[2], **kwargs)
        output = VisualRWKVOutput(loss, logits, None if use_cache is False else new)
        return output if return_dict is None or return_dict else output.to_tuple()

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Each row `expand_size` times, with its pictures and its state."""
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        if expand_size == 1:
            return expand(expand_size, is_encoder_decoder, input_ids, **kwargs)
        pixels, state = kwargs.pop("pixel_values", None), kwargs.pop("state", None)
        if pixels is not None and input_ids is not None:
            counts = (input_ids == IMAGE_PLACEHOLDER).sum(1) // self.network.config.image_tokens
            rows = pixels.split(counts.tolist())
            pixels = torch.cat([row for row in rows for _ in range(expand_size)])
        if state is not None:
            state = state.select(torch.arange(len(state)).repeat_interleave(expand_size))
        input_ids, kwargs = expand(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, {**kwargs, "pixel_values": pixels, "state": state}

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        get: Any = super()._get_stopping_criteria  # type: ignore[misc]
        criteria = get(generation_config, *args, **kwargs)
        eos, end_of_turn = generation_config.eos_token_id, self.network.config.end_of_turn
        if end_of_turn in (eos if isinstance(eos, list) else [eos]):  # who asks for other ends gets them
            criteria.append(TurnEnds(end_of_turn, generation_config.min_new_tokens or 0))
        return criteria

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("num_beams is above 1, and beams cannot share a state; num_return_sequences can be above 1")

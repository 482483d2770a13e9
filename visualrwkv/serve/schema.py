"""What clients send, as the API names it. Fields that are not ours are let through unread, as long as they ask for nothing."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from visualrwkv.generate import Answer
from visualrwkv.sampling import Sampling
from visualrwkv.serve.errors import bad
from visualrwkv.serve.limits import Limits


class Settings(BaseModel):
    """What both ways to ask have in common. temperature is 0 (greedy) unless given."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None

    def sampling(self) -> Sampling:
        """The settings by our names, which are the same."""
        if isinstance(self.stop, list) and len(self.stop) > 16:
            raise bad(f"stop has {len(self.stop)} texts; 16 are allowed", "stop")
        names = Sampling.__dataclass_fields__
        given = {name: value for name in names if (value := getattr(self, name, None)) not in (None, [])}
        try:
            return Sampling(**given)
        except ValueError as error:
            raise bad(str(error), str(error).partition(" ")[0]) from None

    def refuse(self, **harmless: Any) -> None:
        """An error for what is asked for and cannot be given: settings that are not ours, and not at these values."""
        for name, value in harmless.items():
            given = (self.model_extra or {}).get(name)
            if given not in (None, value, [], {}):
                raise bad(f"{name} is not supported", name)

    def answer(self, asked: int | None, param: str, limits: Limits, end_of_turn: int) -> Answer:
        """An answer yet to grow, of as many tokens as are asked for and allowed."""
        if asked is not None and not 1 <= asked <= limits.max_new_tokens:
            raise bad(f"{param} is {asked}; it must be between 1 and {limits.max_new_tokens}", param)
        return Answer(self.sampling(), asked or min(1024, limits.max_new_tokens), end_of_turn)


class Part(BaseModel):
    """A piece of a message: text, or a picture."""

    type: str
    text: str | None = None
    image_url: str | dict[str, Any] | None = None


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class StreamOptions(BaseModel):
    include_usage: bool = False


class Completion(Settings):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream_options: StreamOptions | None = None


class Respond(Settings):
    """POST /v1/responses."""

    input: str | list[Message] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    store: bool | None = True
    metadata: dict[str, str] | None = None

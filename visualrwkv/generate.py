"""Prefill in one parallel pass, then steps of constant cost: ids and states, no text beyond what stops an answer.

S sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from visualrwkv.model import IMAGE_PLACEHOLDER, Encoded, Images, VisualRWKV
from visualrwkv.ops.token_step import TokenStep, packed_step
from visualrwkv.rwkv.network import RWKV
from visualrwkv.rwkv.state import State
from visualrwkv.text.tokenizer import END, END_OF_TURN, decode_bytes


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 is greedy; top_p keeps the likeliest tokens of that total."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be a number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


def choose_token(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Logits (S, V) -> the next ids (S,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0  # the likeliest always stays
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


@torch.inference_mode()
def prefill(
    model: VisualRWKV,
    prompts: Sequence[Sequence[int]],
    images: Images | None = None,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """Read prompts of any lengths side by side, without padding -> next-token logits (S, V), State of S rows.

    images: all pictures, as pixels or encoded, in the order in which the prompts hold their placeholders.
    """
    lengths = torch.tensor([len(p) for p in prompts])
    if len(lengths) == 0 or int(lengths.min()) == 0:
        raise ValueError("every prompt needs at least one token")
    ids = torch.tensor([[i for p in prompts for i in p]], device=model.device)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    hidden, state = model.hidden(ids, images, state, bounds)
    return model.rwkv.head(hidden[0, bounds[1:].to(hidden.device) - 1]), state


def common_start(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all begin with; it leaves each at least one token of its own."""
    shortest = min(prompts, key=len)
    same = (len({prompt[i] for prompt in prompts}) == 1 for i in range(len(shortest) - 1))
    return list(shortest[: sum(takewhile(bool, same))])


@torch.inference_mode()
def prefill_shared(
    model: VisualRWKV, prompts: Sequence[Sequence[int]], pictures: Sequence[Sequence[int]], encoded: Encoded
) -> tuple[Tensor, State]:
    """`prefill` that reads once what prompts about the same pictures begin with, where all these pictures lie in it.

    pictures: for each prompt, which of the encoded pictures its placeholders stand for, in order.
    """

    def pick(rows: Sequence[int]) -> Encoded:
        return Encoded(encoded.features[[number for row in rows for number in pictures[row]]])

    asked: dict[tuple[int, ...], list[int]] = {}
    for row, seen in enumerate(pictures):
        asked.setdefault(tuple(seen), []).append(row)
    heads: list[tuple[int, list[int]]] = []  # what is read once, with the first of its rows
    shared: list[int] = []
    start: list[int] = []  # the head after which each shared row goes on
    alone: list[int] = []
    for seen, rows in asked.items():
        head = common_start([prompts[row] for row in rows])
        if seen and len(rows) > 1 and head.count(IMAGE_PLACEHOLDER) == prompts[rows[0]].count(IMAGE_PLACEHOLDER):
            start += [len(heads)] * len(rows)
            heads.append((rows[0], head))
            shared += rows
        else:
            alone += rows
    parts = []
    if heads:
        _, state = prefill(model, [head for _, head in heads], pick([row for row, _ in heads]))
        rests = [prompts[row][len(heads[head][1]) :] for row, head in zip(shared, start)]
        parts.append(prefill(model, rests, None, state.select(start)))
    if alone:
        parts.append(prefill(model, [prompts[row] for row in alone], pick(alone)))
    order = [*shared, *alone]
    if len(parts) == 1 and order == sorted(order):
        return parts[0]
    place = torch.tensor(order).argsort().to(model.device)
    return torch.cat([logits for logits, _ in parts])[place], State.cat([state for _, state in parts]).select(place)


@torch.inference_mode()
def step(model: VisualRWKV, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """One token for each sequence: tokens (S,), State of S rows -> logits (S, V), new State. Cost does not grow.

    On the CPU a model in bf16 takes it in one compiled call, with int8 or int4 weights if it was loaded so.
    """
    net = model.rwkv
    if isinstance(net, RWKV) and (packed := packed_step(net, net.step_dtype)) is not None:
        if len(tokens) != len(state):
            raise ValueError(f"the state holds {len(state)} sequences, the input {len(tokens)}")
        if isinstance(packed, TokenStep):
            logits, arrays = packed(net.emb(tokens), (state.att_shift, state.ffn_shift, state.wkv))
            return logits, State(*arrays)
        bounds = torch.arange(len(tokens) + 1, device=tokens.device)
        hidden, state = packed(packed.emb(tokens), bounds, state)
        return packed.head(hidden), state
    hidden, state = model.hidden(tokens[:, None], state=state)
    return model.rwkv.head(hidden[:, 0]), state


def closes(token: int, tail: bytes, end_of_turn: int = END_OF_TURN) -> bool:
    """Whether an answer whose last two tokens say `tail` is over with this token.

    Two newlines need not be id 261: other tokens hold them too ("。\\n" and "\\n", or "\\n\\n "), so the text decides.
    """
    return token in (END, end_of_turn) or (end_of_turn == END_OF_TURN and b"\n\n" in tail)


@torch.inference_mode()
def generate(
    model: VisualRWKV, logits: Tensor, state: State, max_new_tokens: int, sampling: Sampling | None = None
) -> list[list[int]]:
    """Answers to S prefilled prompts, stepped together; a finished one leaves the batch. Without their closing token."""
    sampling, end_of_turn = sampling or Sampling(), model.config.end_of_turn
    generator = _generator(sampling, model.device)
    answers: list[list[int]] = [[] for _ in range(len(state))]
    running = list(range(len(state)))
    for _ in range(max_new_tokens):
        tokens = choose_token(logits, sampling, generator)
        going = []
        for row, token in enumerate(tokens.tolist()):
            answer = answers[running[row]]
            if not closes(token, decode_bytes([*answer[-1:], token]), end_of_turn):
                going.append(row)
            if token not in (END, end_of_turn):
                answer.append(token)
        if not going:
            break
        if len(going) < len(running):
            running = [running[row] for row in going]
            tokens, state = tokens[going], state.select(going)
        logits, state = step(model, tokens, state)
    return answers


def stream(
    model: VisualRWKV, logits: Tensor, state: State, max_new_tokens: int, sampling: Sampling | None = None
) -> Iterator[tuple[int, State]]:
    """One answer as it grows: yields each token with the state before it, the closing token last."""
    sampling, end_of_turn = sampling or Sampling(), model.config.end_of_turn
    generator = _generator(sampling, model.device)
    last: list[int] = []
    for _ in range(max_new_tokens):
        token = int(choose_token(logits, sampling, generator))
        yield token, state
        last = [*last[-1:], token]
        if closes(token, decode_bytes(last), end_of_turn):
            return
        logits, state = step(model, torch.tensor([token], device=model.device), state)


def _generator(sampling: Sampling, device: torch.device) -> torch.Generator | None:
    return None if sampling.seed is None else torch.Generator(device).manual_seed(sampling.seed)

"""Prefill in one parallel pass, then steps of constant cost: ids and states, and the text that an answer ends by.

S sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

import torch
from torch import Tensor

from visualrwkv.model import IMAGE_PLACEHOLDER, Encoded, Images, VisualRWKV, pieces
from visualrwkv.ops.token_step import TokenStep, packed_step
from visualrwkv.rwkv.network import RWKV
from visualrwkv.rwkv.state import State
from visualrwkv.sampling import Sampler, Sampling, choose_tokens
from visualrwkv.text.shown import Shown
from visualrwkv.text.tokenizer import END, END_OF_TURN, decode, decode_bytes, encode


@torch.inference_mode()
def prefill(
    model: VisualRWKV,
    prompts: Sequence[Sequence[int]],
    images: Images | None = None,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """Read prompts of any lengths side by side, without padding -> next-token logits (S, V), State of S rows.

    images: all pictures, as pixels or encoded, in the order in which the prompts hold their placeholders. A lone prompt
    is read in pieces, so that it takes no more memory for being long.
    """
    lengths = torch.tensor([len(p) for p in prompts])
    if len(lengths) == 0 or int(lengths.min()) == 0:
        raise ValueError("every prompt needs at least one token")
    ids = torch.tensor([[i for p in prompts for i in p]], device=model.device)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    if len(prompts) == 1:
        for piece, seen in pieces(ids[0], images, model.config.image_tokens):
            hidden, state = model.hidden(piece[None], seen, state)
        assert state is not None  # there is at least one piece
        return model.rwkv.head(hidden[:, -1]), state
    hidden, state = model.hidden(ids, images, state, bounds)
    return model.rwkv.head(hidden[0, bounds[1:].to(hidden.device) - 1]), state


def common_start(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all begin with; it leaves each at least one token of its own."""
    shortest = min(prompts, key=len)
    same = (len({prompt[i] for prompt in prompts}) == 1 for i in range(len(shortest) - 1))
    return list(shortest[: sum(takewhile(bool, same))])


@torch.inference_mode()
def prefill_shared(
    model: VisualRWKV,
    prompts: Sequence[Sequence[int]],
    pictures: Sequence[Sequence[int]],
    encoded: Encoded,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """`prefill` that reads once what prompts about the same pictures begin with, where all these pictures lie in it.

    pictures: for each prompt, which of the encoded pictures its placeholders stand for, in order; state: where all go on
    from, the same in every row.
    """

    def begin(rows: Sequence[int]) -> State | None:
        return None if state is None else state.select(list(rows))

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
        firsts = [row for row, _ in heads]
        _, after = prefill(model, [head for _, head in heads], pick(firsts), begin(firsts))
        rests = [prompts[row][len(heads[head][1]) :] for row, head in zip(shared, start)]
        parts.append(prefill(model, rests, None, after.select(start)))
    if alone:
        parts.append(prefill(model, [prompts[row] for row in alone], pick(alone), begin(alone)))
    order = [*shared, *alone]
    if len(parts) == 1 and order == sorted(order):
        return parts[0]
    place = torch.tensor(order).argsort().to(model.device)
    return torch.cat([logits for logits, _ in parts])[place], State.cat([part for _, part in parts]).select(place)


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


class Answer:
    """One answer as it grows: its ids without the closing token, its text, and why it ended ("stop" or "length")."""

    def __init__(
        self, sampling: Sampling, max_new_tokens: int, end_of_turn: int = END_OF_TURN, start: State | None = None
    ):
        """start: the state after the prompt, one row, where the conversation shall go on after the answer."""
        self.sampler = Sampler(sampling)
        self.ids: list[int] = []
        self.state = self.start = start
        self.ended: str | None = None if max_new_tokens > 0 else "length"
        self._shown = Shown(sampling.stop)
        self._most, self._end = max_new_tokens, end_of_turn
        self._last = END

    @property
    def text(self) -> str:
        """What may be seen of it so far; all of it once it has ended."""
        return self._shown.text

    def push(self, token: int) -> str:
        """Take the next id -> the text that it lets be seen."""
        piece, self._last = "", token
        if token not in (END, self._end):
            self.ids.append(token)
            piece = self._shown.push(token)
        if self._shown.stopped or closes(token, decode_bytes([*self.ids[-2:-1], token]), self._end):
            self.ended = "stop"
        elif len(self.ids) >= self._most:
            self.ended = "length"
        return piece + self._shown.flush() if self.ended else piece

    def finish(self) -> str:
        """End it here, if it has not ended -> the text that was held back."""
        self.ended = self.ended or "length"
        return self._shown.flush()

    def read(self) -> list[int]:
        """What the state has read of this turn after `close_turns`, as ids."""
        _, ids = self.unread()
        return ids if self._shown.stopped else [*self.ids, *(i for i in ids[-1:] if i == self._end)]

    def unread(self) -> tuple[State | None, list[int]]:
        """A state, and what it must read so that it remembers the turn as it was seen, closed as in training."""
        if self._shown.stopped:  # the stop string was read as well: from the start again
            return self.start, [*encode(f" {self.text}" if self.text else ""), self._end]
        ids = [self._last] if self.ids and self._last not in (END, self._end) else []  # the last was not read yet
        if self._end != END_OF_TURN or not decode(self.ids).endswith("\n\n"):
            ids.append(self._end)
        return self.state, ids


@torch.inference_mode()
def close_turns(model: VisualRWKV, answers: Sequence[Answer]) -> State:
    """What the conversations of these answers remember after them: a State of as many rows."""
    todo = [answer.unread() for answer in answers]
    states = [state for state, _ in todo if state is not None]
    assert len(states) == len(todo), "an answer was begun without its state"
    rows = [row for row, (_, ids) in enumerate(todo) if ids]
    if not rows:
        return State.cat(states)
    _, read = prefill(model, [todo[row][1] for row in rows], None, State.cat([states[row] for row in rows]))
    for at, row in enumerate(rows):
        states[row] = read.select([at])
    return State.cat(states)


class Slots:
    """Answers that grow side by side, one token a step. They join and leave between any two steps, and none changes another."""

    def __init__(self, model: VisualRWKV):
        self.model = model
        self.answers: list[Answer] = []
        self._logits: Tensor | None = None
        self._state: State | None = None

    def __len__(self) -> int:
        return len(self.answers)

    def join(self, answers: Sequence[Answer], logits: Tensor, state: State) -> None:
        """Take in answers to prompts that were read: logits (S, V) and State of S rows, as `prefill` gives them."""
        assert len(answers) == len(logits) == len(state)
        going = [row for row, answer in enumerate(answers) if not answer.ended]
        if not going:
            return
        if len(going) < len(answers):
            answers, logits, state = [answers[row] for row in going], logits[going], state.select(going)
        if self._logits is not None and self._state is not None:
            logits, state = torch.cat([self._logits, logits]), State.cat([self._state, state])
        self.answers = [*self.answers, *answers]
        self._logits, self._state = logits, state

    def leave(self, answer: Answer) -> None:
        """Give up an answer that has not ended; its seat is free at once."""
        if answer in self.answers:
            self._keep([row for row, other in enumerate(self.answers) if other is not answer])

    @torch.inference_mode()
    def step(self) -> list[tuple[Answer, str]]:
        """One more token for each -> the answers with the text that it lets be seen; those that ended have left."""
        if self._logits is None or self._state is None:
            return []
        tokens = choose_tokens(self._logits, [answer.sampler for answer in self.answers])
        pieces = [(answer, answer.push(token)) for answer, token in zip(self.answers, tokens)]
        going = [row for row, (answer, _) in enumerate(pieces) if not answer.ended]
        for row, (answer, _) in enumerate(pieces):
            if answer.ended and answer.start is not None:
                answer.state = self._state.select([row])
        self._keep(going)
        if going:
            tokens = [tokens[row] for row in going]
            self._logits, self._state = step(self.model, torch.tensor(tokens, device=self.model.device), self._state)
        return pieces

    def _keep(self, rows: list[int]) -> None:
        if len(rows) == len(self.answers):
            return
        assert self._logits is not None
        assert self._state is not None
        self.answers = [self.answers[row] for row in rows]
        self._logits, self._state = (self._logits[rows], self._state.select(rows)) if rows else (None, None)


def generate(
    model: VisualRWKV, logits: Tensor, state: State, max_new_tokens: int, sampling: Sampling | None = None
) -> list[list[int]]:
    """Answers to S prefilled prompts, stepped together; a finished one leaves the batch. Without their closing token."""
    return [answer.ids for answer in answer_all(model, logits, state, max_new_tokens, sampling)]


def answer_all(
    model: VisualRWKV, logits: Tensor, state: State, max_new_tokens: int, sampling: Sampling | None = None
) -> list[Answer]:
    """As `generate`, with the answers' texts: each is what it would be alone, by its seed too."""
    answers = [Answer(sampling or Sampling(), max_new_tokens, model.config.end_of_turn) for _ in range(len(state))]
    slots = Slots(model)
    slots.join(answers, logits, state)
    while slots:
        slots.step()
    return answers


def stream(
    model: VisualRWKV, logits: Tensor, state: State, max_new_tokens: int, sampling: Sampling | None = None
) -> Iterator[tuple[int, State]]:
    """One answer as it grows: yields each token with the state before it, the closing token last."""
    sampler, end_of_turn = Sampler(sampling or Sampling()), model.config.end_of_turn
    last: list[int] = []
    for _ in range(max_new_tokens):
        token = sampler.choose(logits[0])
        yield token, state
        last = [*last[-1:], token]
        if closes(token, decode_bytes(last), end_of_turn):
            return
        logits, state = step(model, torch.tensor([token], device=model.device), state)

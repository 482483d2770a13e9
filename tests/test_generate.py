"""From prompts to ids: batches answer as each alone, sampling keeps its word, answers stop where they should."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from visualrwkv.generate import (
    Answer,
    Slots,
    answer_all,
    close_turns,
    common_start,
    generate,
    prefill,
    prefill_shared,
    step,
    stream,
)
from visualrwkv.model import IMAGE_PLACEHOLDER, Encoded, pieces
from visualrwkv.ops import library
from visualrwkv.rwkv.state import State
from visualrwkv.sampling import Sampling
from visualrwkv.text.prompt import encode_conversation
from visualrwkv.text.tokenizer import encode

QUESTIONS = [(1, "What is this?"), (0, "Hello"), (2, "Which of the two pictures is larger, and why?"), (1, "猫吗？")]


class Scripted:
    """Stands in for a model: says its scripts word for word, and fails if it is not told what it said."""

    device = torch.device("cpu")

    def __init__(self, *scripts):
        self.scripts = scripts
        self.rwkv = SimpleNamespace(head=lambda hidden: hidden)
        self.config = SimpleNamespace(end_of_turn=261)

    def logits(self, rows, at):
        said = [self.scripts[row][t] for row, t in zip(rows, at)]
        return F.one_hot(torch.tensor(said), 65536).float()

    def start(self):
        """What a prefill would give; the state's rows hold the script's number and the place in it."""
        rows = torch.arange(len(self.scripts)).view(1, -1, 1).float()
        state = State(rows, torch.zeros_like(rows), torch.zeros(1, len(rows[0]), 1, 1, 1))
        return self.logits(range(len(self.scripts)), [0] * len(self.scripts)), state

    def hidden(self, ids, state):
        rows, at = (t[0, :, 0].int().tolist() for t in (state.att_shift, state.ffn_shift))
        assert ids[:, 0].tolist() == [self.scripts[row][t] for row, t in zip(rows, at)]
        logits = self.logits(rows, [t + 1 for t in at])
        return logits[:, None], State(state.att_shift, state.ffn_shift + 1, state.wkv)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


@pytest.fixture(scope="module")
def prompts():
    turns = [[{"from": "human", "value": "<image>\n" * n + q}, {"from": "gpt", "value": ""}] for n, q in QUESTIONS]
    return [encode_conversation(t, image_tokens=16)[0] for t in turns]


def test_a_template_says_what_ends_an_answer():
    """A blank line is none of WorldRWKV's endings, byte 0x17 none of ours."""
    said = [encode("a")[0], 261, encode("b")[0], 24, encode("c")[0], 0]
    ours, world = Scripted(said), Scripted(said)
    world.config = SimpleNamespace(end_of_turn=24)
    assert generate(ours, *ours.start(), 6) == [said[:1]]
    assert generate(world, *world.start(), 6) == [said[:3]]
    assert [token for token, _ in stream(world, *world.start(), 6)] == said[:4]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(1e-4, 0.9, 1), Sampling(1.0, seed=3), Sampling(repetition_penalty=1.5)]
)
def test_a_ragged_batch_answers_as_each_alone(model, prompts, pixels, sampling):
    images = pixels(4)
    together = generate(model, *prefill(model, prompts, images), 12, sampling)
    parts = images.split([n for n, _ in QUESTIONS])
    alone = [generate(model, *prefill(model, [p], i), 12, sampling)[0] for p, i in zip(prompts, parts)]
    assert together == alone
    assert len({tuple(answer) for answer in alone}) == 4


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("scan", ["uni", "multi"])
def test_what_prompts_share_is_read_once_to_the_same_end(tiny_model, pixels, version, scan):
    """State and logits are those of reading each prompt whole, whatever order the blocks read the picture in."""
    model = tiny_model(scan=scan, version=version)
    texts, pictures = ["What?", "Hello", "Which, a or b?", "What?"], [[1], [], [1], [0]]
    asked = [("<image>\n" * len(seen) + text, seen) for text, seen in zip(texts, pictures)]
    turns = [[{"from": "human", "value": value}, {"from": "gpt", "value": ""}] for value, _ in asked]
    prompts = [encode_conversation(t, image_position="first", image_tokens=16)[0] for t in turns]
    with torch.inference_mode():
        features = model.encode(pixels(2))
    logits, state = prefill_shared(model, prompts, pictures, Encoded(features))
    whole, end = prefill(model, prompts, Encoded(features[[1, 1, 0]]))
    torch.testing.assert_close(logits, whole, rtol=0, atol=2e-5)
    for mine, theirs in zip(vars(state).values(), vars(end).values()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


def test_a_common_start_leaves_each_prompt_a_token():
    assert common_start([[1, 2, 3], [1, 2, 4, 5]]) == [1, 2]
    assert common_start([[1, 2, 3], [1, 2, 3]]) == [1, 2]
    assert common_start([[1], [1, 2]]) == common_start([[1, 2], [2, 2]]) == []


def test_greedy_is_the_argmax_of_the_parallel_forward(model, prompts, pixels):
    answer = generate(model, *prefill(model, prompts[:1], pixels(1)), 10)[0]
    assert len(answer) == 10
    with torch.no_grad():
        logits, _ = model(torch.tensor([[*prompts[0], *answer]]), pixels(1))
    assert logits[0, len(prompts[0]) - 1 : -1].argmax(-1).tolist() == answer


def test_prefill_gives_the_last_logits_of_each(model, prompts, pixels):
    logits, state = prefill(model, prompts, pixels(4))
    assert logits.shape == (4, 65536)
    assert len(state) == 4
    with torch.no_grad():
        alone, _ = model(torch.tensor([prompts[1]]))
    torch.testing.assert_close(logits[1], alone[0, -1], rtol=0, atol=2e-5)
    again, _ = prefill(model, [[7, 8], [9]], state=state.select([1, 1]))
    with torch.no_grad():
        alone, _ = model(torch.tensor([[*prompts[1], 7, 8]]))
    torch.testing.assert_close(again[0], alone[0, -1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("piece", [1, 7, 40])
def test_a_long_prompt_is_read_in_pieces(tiny_model, pixels, monkeypatch, version, piece):
    model = tiny_model(version=version, scan="multi")
    prompt = [5, 6, *[IMAGE_PLACEHOLDER] * 32, 7, *[IMAGE_PLACEHOLDER] * 16, *range(8, 30)]
    with torch.inference_mode():
        encoded = Encoded(model.encode(pixels(3)))
    monkeypatch.setattr("visualrwkv.model.PIECE", 10**6)
    whole, end = prefill(model, [prompt], encoded)
    monkeypatch.setattr("visualrwkv.model.PIECE", piece)
    for images in (pixels(3), list(pixels(3)), encoded):
        logits, state = prefill(model, [prompt], images)
        torch.testing.assert_close(logits, whole, rtol=0, atol=2e-5)
        for mine, theirs in zip(vars(state).values(), vars(end).values()):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        parts = list(pieces(torch.tensor(prompt), images, 16))
        assert torch.cat([ids for ids, _ in parts]).tolist() == prompt
        assert all(len(ids) <= piece + 31 for ids, _ in parts)
        assert all((ids == IMAGE_PLACEHOLDER).sum() == 16 * (0 if seen is None else len(seen)) for ids, seen in parts)
        assert [len(seen) for _, seen in parts if seen is not None] == ([3] if piece == 40 else [1, 1, 1])
    with pytest.raises(ValueError, match="48 image placeholders for 1 pictures"):
        prefill(model, [prompt], pixels(1))


@pytest.mark.parametrize("prompts", [[], [[]], [[5], []]])
def test_empty_prompts(model, prompts):
    with pytest.raises(ValueError, match="every prompt needs at least one token"):
        prefill(model, prompts)


def test_step_equals_prefill(model):
    _, state = prefill(model, [[5, 6], [7]])
    found, _ = step(model, torch.tensor([8, 9]), state)
    wanted, _ = prefill(model, [[5, 6, 8], [7, 9]])
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kernels", ["as here", "none"])
@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.05), ("int8", 0.1), ("int4", 0.4)])
def test_steps_with_small_weights(tiny_model, monkeypatch, dtype, limit, kernels):
    """Close to the module in fp32 with the same weights, with a library and without; prompts are read in bf16."""
    if kernels == "none":
        monkeypatch.setattr(library, "COMPILED", False)
    exact, model = tiny_model(vocab_size=300).bfloat16().float(), tiny_model(vocab_size=300).bfloat16()
    model.rwkv.step_dtype = dtype
    _, state = prefill(exact, [[5, 6, 7], [8], [9, 10]])
    before = state.wkv.clone()
    tokens = torch.tensor([11, 12, 13])
    wanted, after = step(exact, tokens, state)
    found, mine = step(model, tokens, state)
    assert 0 < (found.float() - wanted).norm() < limit * wanted.norm()
    assert (mine.wkv - after.wkv).norm() < limit * after.wkv.norm()
    assert torch.equal(state.wkv, before)
    assert len(generate(model, found, mine, 5)) == 3
    with pytest.raises(ValueError, match="the state holds 3 sequences, the input 1"):
        step(model, torch.tensor([1]), mine)


# Where an answer ends ------------------------------------------------------------------------------------------------

MORE = [40, 41, 42, 43, 44, 45]
ENDS = {
    "261": ([30, 31, 261, *MORE], [30, 31]),
    "0": ([30, 0, *MORE], [30]),
    "at once": ([261, *MORE], []),
    "Chinese": ([10464, 28329, 11, *MORE], [10464, 28329, 11]),
    "two single newlines": ([30, 11, 11, *MORE], [30, 11, 11]),
    "space and newlines": ([30, 3336, *MORE], [30, 3336]),
    "newlines and space": ([30, 3329, *MORE], [30, 3329]),
    "newlines across tokens": ([30, 265, 3327, *MORE], [30, 265, 3327]),
    "never": ([30, 11, 31, 265, 32, 33, 34], [30, 11, 31, 265, 32]),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_answer_ends(name):
    script, wanted = ENDS[name]
    model = Scripted(script)
    assert generate(model, *model.start(), 5) == [wanted]
    streamed = list(stream(model, *model.start(), 5))
    closing = [i for i in script[len(wanted) :][:1] if i in (0, 261)]
    assert [token for token, _ in streamed] == wanted + closing
    assert [int(state.ffn_shift) for _, state in streamed] == list(range(len(streamed))), "the state before each token"


def test_answers_of_a_batch_end_apart():
    model = Scripted(*(script for script, _ in ENDS.values()))
    assert generate(model, *model.start(), 5) == [wanted for _, wanted in ENDS.values()]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_max_new_tokens(model, prompts, pixels, count):
    logits, state = prefill(model, prompts, pixels(4))
    assert [len(a) for a in generate(model, logits, state, count)] == [count] * 4
    assert len(list(stream(model, logits[:1], state.select([0]), count))) == count


# Sampling ------------------------------------------------------------------------------------------------------------


def test_a_seed_repeats(model, prompts, pixels):
    def answers(seed):
        return generate(model, *prefill(model, prompts, pixels(4)), 8, Sampling(temperature=1.0, seed=seed))

    assert answers(5) == answers(5)
    assert answers(5) != answers(6)


def test_no_state_is_changed_by_generating(model, prompts, pixels):
    logits, state = prefill(model, prompts, pixels(4))
    before = state.wkv.clone(), logits.clone()
    generate(model, logits, state, 4, Sampling(temperature=0.7, top_p=0.5, seed=0))
    assert torch.equal(state.wkv, before[0])
    assert torch.equal(logits, before[1])


def test_the_script_is_what_the_tokenizer_says():
    assert encode("好。\n")[-1] == 28329
    assert [encode(t)[0] for t in (" \n\n", "\n\n ", " \n", "\n\n\t")] == [3336, 3329, 265, 3327]


# Slots ---------------------------------------------------------------------------------------------------------------


def grow(slots, steps=1):
    """The texts that some steps let be seen, by answer."""
    seen = {}
    for _ in range(steps):
        for answer, piece in slots.step():
            seen[id(answer)] = seen.get(id(answer), "") + piece
    return seen


@pytest.mark.parametrize("version", [6, 7])
def test_answers_join_and_leave_at_any_step(tiny_model, prompts, pixels, version):
    """Whoever is beside it, an answer is the one that it is alone, and so is what is remembered of it."""
    model = tiny_model(version=version)
    parts = pixels(4).split([n for n, _ in QUESTIONS])
    settings = [Sampling(), Sampling(1.0, seed=4), Sampling(0.8, 0.9, 5, frequency_penalty=0.5), Sampling(1.0, seed=6)]
    lengths = [9, 4, 12, 30]

    def begun(row):
        logits, state = prefill(model, [prompts[row]], parts[row])
        return Answer(settings[row], lengths[row], start=state), logits, state

    alone = []
    for row in range(4):
        answer, logits, state = begun(row)
        slots = Slots(model)
        slots.join([answer], logits, state)
        while slots:
            slots.step()
        alone.append((answer.ids, close_turns(model, [answer])))
    slots, answers = Slots(model), {}
    for row, steps in ((2, 3), (0, 1), (3, 4), (1, 2)):
        answers[row], logits, state = begun(row)
        slots.join([answers[row]], logits, state)
        grow(slots, steps)
    slots.leave(answers[3])
    assert len(slots) == 3
    assert answers[3].ended is None
    while slots:
        slots.step()
    assert [answers[row].ids for row in range(3)] == [ids for ids, _ in alone[:3]]
    assert answers[3].ids == alone[3][0][:6]
    after = close_turns(model, [answers[row] for row in range(3)])
    for row in range(3):
        mine, theirs = after.select([row]), alone[row][1]
        torch.testing.assert_close(vars(mine), vars(theirs), rtol=1e-3, atol=1e-4)


def test_an_answer_of_no_tokens_takes_no_seat(model):
    logits, state = prefill(model, [[5], [6]])
    slots = Slots(model)
    slots.join([Answer(Sampling(), 0), Answer(Sampling(), 2)], logits, state)
    assert len(slots) == 1
    assert slots.step()
    slots.leave(slots.answers[0])
    assert slots.step() == []


def test_a_stop_string_is_neither_seen_nor_remembered(model):
    """It may begin inside a token; the conversation goes on as if the answer had been said without it."""
    said = encode(" one, two") + encode(", three") + MORE
    scripted = Scripted(said)
    logits, state = scripted.start()
    [answer] = answer_all(scripted, logits, state, 20, Sampling(stop=("o, t", "never")))
    assert (answer.text, answer.ended) == ("one, tw", "stop")
    _, start = prefill(model, [[5, 6]])
    answer = Answer(Sampling(stop="o, t"), 20, start=start)
    assert "".join(answer.push(token) for token in said[: len(answer.ids) or 7] if not answer.ended) == "one, tw"
    _, wanted = prefill(model, [[5, 6, *encode(" one, tw"), 261]])
    torch.testing.assert_close(vars(close_turns(model, [answer])), vars(wanted), rtol=1e-3, atol=1e-4)
    assert answer.read() == [*encode(" one, tw"), 261]

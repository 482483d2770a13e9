"""The one network: reading in parallel, step by step, packed and in batches all say the same."""

from dataclasses import replace

import pytest
import torch

from visualrwkv.config import IMAGE_POSITIONS, SCANS
from visualrwkv.rwkv.state import State
from visualrwkv.text.prompt import encode_conversation

CLOSE = {"rtol": 0, "atol": 1e-4}
SHORT = "Answer the question using a single word or phrase."
TALKS = {
    "one picture": [(1, f"What is in the picture?\n{SHORT}", "A small cat on a sofa, asleep.")],
    "three pictures": [(3, "Compare the pictures.", "The first is red, the others are blue.")],
    "several turns": [
        (1, f"What is this?\n{SHORT}", "Cat"),
        (0, "What colour is it?", "It is black and white."),
        (2, "And these?\n小猫吗？", "是的，两只小猫。"),
        (0, "Why?", "They meow."),
    ],
}


def turns_of(talk):
    turns = []
    for pictures, question, answer in talk:
        turns += [{"from": "human", "value": "<image>\n" * pictures + question}, {"from": "gpt", "value": answer}]
    return turns


def encode(talk, position, image_tokens=16):
    return encode_conversation(turns_of(talk), image_position=position, image_tokens=image_tokens)[0]


def text_ids(*lengths):
    """Random ids below 300 of several sequences."""
    return torch.randint(1, 300, (sum(lengths),), generator=torch.Generator().manual_seed(3)).split(lengths)


# Decoding step by step is the parallel forward -----------------------------------------------------------------------


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("position", IMAGE_POSITIONS)
@pytest.mark.parametrize("version", [6, 7])
@torch.no_grad()
def test_decoding_equals_the_parallel_forward(tiny_model, pixels, position, scan, version):
    model = tiny_model(scan=scan, position=position, version=version)
    for name, talk in TALKS.items():
        ids = torch.tensor([encode(talk, position)])
        images = pixels(sum(pictures for pictures, _, _ in talk))
        whole, end = model(ids, images)
        assert whole.shape == (1, ids.shape[1], 65536)

        # turn by turn: a question with its pictures in one piece, then its answer token by token, from the state alone
        logits, state, at, shown = [], None, 0, 0
        for turn, (pictures, question, _) in enumerate(talk):
            opened = len(encode([*talk[:turn], (pictures, question, "")], position))
            closed = len(encode(talk[: turn + 1], position))
            part, state = model(ids[:, at:opened], images[shown : shown + pictures], state)
            logits.append(part)
            for t in range(opened, closed):
                part, state = model(ids[:, t : t + 1], state=state)
                logits.append(part)
            at, shown = closed, shown + pictures
        assert at == ids.shape[1], name
        torch.testing.assert_close(torch.cat(logits, 1), whole, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(vars(state), vars(end), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_text_alone_token_by_token(tiny_model):
    model = tiny_model(vision=None, vocab_size=300)
    ids = text_ids(40)[0][None]
    whole, end = model(ids)
    state, logits = State.zeros(model.config.rwkv), []
    for t in range(40):
        part, state = model(ids[:, t : t + 1], state=state)
        logits.append(part)
    torch.testing.assert_close(torch.cat(logits, 1), whole, **CLOSE)
    torch.testing.assert_close(vars(state), vars(end), rtol=1e-4, atol=1e-4)
    assert whole.std() > 0.5


@torch.no_grad()
def test_later_tokens_change_nothing_before_them(tiny_model, pixels):
    model = tiny_model(vocab_size=300)
    a, b = text_ids(9, 6)
    ids = torch.cat([a, torch.full((16,), 65535), b])
    other = ids.clone()
    other[-3:] -= 1
    images = pixels(1)
    first, changed = model(ids[None], images)[0], model(other[None], images)[0]
    torch.testing.assert_close(changed[:, :-3], first[:, :-3], rtol=0, atol=0)
    assert (changed[:, -3:] - first[:, -3:]).abs().max() > 0.1


@torch.no_grad()
def test_the_picture_is_seen(tiny_model, pixels):
    model = tiny_model(vocab_size=300)
    a, b = text_ids(4, 5)
    ids = torch.cat([a, torch.full((16,), 65535), b])[None]
    first, second = model(ids, pixels(1, seed=0))[0], model(ids, pixels(1, seed=1))[0]
    assert torch.equal(first[:, :4], second[:, :4])
    assert (first[:, -1] - second[:, -1]).abs().max() > 0.1


# Packed rows and batches ---------------------------------------------------------------------------------------------


def assert_same_state(found, wanted):
    """Equal to 1e-5 of a part's length: a product of other sizes is summed in another order."""
    for name, part in vars(wanted).items():
        assert (vars(found)[name] - part).norm() <= 1e-5 * part.norm(), name


@pytest.mark.parametrize("scan", SCANS)
@torch.no_grad()
def test_packed_samples_are_as_if_alone(tiny_model, pixels, scan):
    model = tiny_model(scan=scan, image_tokens=4)
    talks = [*TALKS.values(), [(0, "Hello", "Hi.")], [(1, "Last?", "Yes")]]
    rows = [torch.tensor(encode(talk, "middle", 4)) for talk in talks]
    counts = [sum(pictures for pictures, _, _ in talk) for talk in talks]
    images = pixels(sum(counts))
    bounds = torch.tensor([0, *map(len, rows)]).cumsum(0)
    for dtype in (torch.int64, torch.int32):
        logits, state = model(torch.cat(rows)[None], images, cu_seqlens=bounds.to(dtype))
        parts = zip(rows, images.split(counts), logits[0].split([len(r) for r in rows]))
        for i, (row, pictures, found) in enumerate(parts):
            alone, end = model(row[None], pictures if len(pictures) else None)
            torch.testing.assert_close(found, alone[0], rtol=0, atol=2e-5)
            assert_same_state(state.select([i]), end)


@torch.no_grad()
def test_rows_of_a_batch_are_as_if_alone_also_with_states(tiny_model, pixels):
    model = tiny_model(image_tokens=4, vocab_size=300)
    a, b, c, d = text_ids(5, 4, 3, 6)
    seats = torch.full((4,), 65535)
    ids = torch.stack([torch.cat([a, seats, b]), torch.cat([c, seats, d]), torch.cat([b, seats, a])])
    images = pixels(3)
    first, state = model(ids, images)
    second, last = model(ids.flip(1), list(images.flip(0)), state)
    for i in range(3):
        alone, middle = model(ids[i : i + 1], images[i : i + 1])
        torch.testing.assert_close(first[i], alone[0], rtol=0, atol=2e-5)
        alone, end = model(ids[i : i + 1].flip(1), images[2 - i : 3 - i], middle)
        torch.testing.assert_close(second[i], alone[0], rtol=0, atol=2e-5)
        assert_same_state(last.select([i]), end)


@torch.no_grad()
def test_packed_rows_go_on_from_their_states(tiny_model):
    model = tiny_model(vision=None, vocab_size=300)
    a, b = text_ids(7, 4)
    _, state = model(torch.cat([a, b])[None], cu_seqlens=torch.tensor([0, 7, 11]))
    found, _ = model(torch.cat([b, a])[None], state=state, cu_seqlens=torch.tensor([0, 4, 11]))
    torch.testing.assert_close(found[:, :4], model(torch.cat([a, b])[None])[0][:, 7:], rtol=0, atol=2e-5)
    torch.testing.assert_close(found[:, 4:], model(torch.cat([b, a])[None])[0][:, 4:], rtol=0, atol=2e-5)


# What does not fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seats", "count"), [(15, 1), (16, 0), (16, 2), (0, 1), (32, 1)])
def test_placeholders_and_pictures_must_agree(tiny_model, pixels, seats, count):
    model = tiny_model(vocab_size=300)
    ids = torch.tensor([[5, *[65535] * seats, 6]])
    with pytest.raises(ValueError, match=f"{seats} image placeholders for {count} pictures of 16 image tokens"):
        model(ids, pixels(count) if count else None)


def test_a_frozen_encoder_drops_nothing_while_the_rest_is_trained(tiny_model, pixels):
    vision = replace(tiny_model().config.vision, drop_path=0.9)
    model = tiny_model(vision=vision).requires_grad_(False)
    wanted = model.encode(pixels(3))
    model.train()
    assert model.training
    assert model.rwkv.training
    assert torch.equal(model.encode(pixels(3)), wanted)
    model.vit.requires_grad_(True)
    torch.manual_seed(0)
    assert not torch.allclose(model.train().encode(pixels(3)), wanted, atol=1e-3)


def test_a_language_model_refuses_pictures(tiny_model, pixels):
    with pytest.raises(ValueError, match="no vision encoder"):
        tiny_model(vision=None, vocab_size=300)(torch.tensor([[5, *[65535] * 16, 6]]), pixels(1))


@pytest.mark.parametrize("bounds", [[0, 3, 6], [1, 3, 7], [0, 3, 3, 7], [0, 5, 3, 7], [0, 3, 8], [0], []])
def test_bounds_must_rise_from_zero_to_the_length(tiny_model, bounds):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 7"):
        tiny_model(vision=None, vocab_size=300)(text_ids(7)[0][None], cu_seqlens=torch.tensor(bounds))


def test_bounds_need_one_row(tiny_model):
    with pytest.raises(ValueError, match="one packed row, got a batch of 2"):
        tiny_model(vision=None, vocab_size=300)(torch.ones(2, 7, dtype=torch.int64), cu_seqlens=torch.tensor([0, 7]))


def test_a_state_must_have_the_inputs_rows(tiny_model):
    model = tiny_model(vision=None, vocab_size=300)
    with pytest.raises(ValueError, match="the state holds 2 sequences, the input 1"):
        model(text_ids(7)[0][None], state=State.zeros(model.config.rwkv, 2))

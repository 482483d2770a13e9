"""Pictures and questions to answers: one call, a stream, a batch and a conversation all say the same."""

from itertools import islice

import pytest
import torch

from visualrwkv.chat import VLM, load
from visualrwkv.checkpoint import save_model
from visualrwkv.files import fingerprint
from visualrwkv.generate import generate, prefill, stream
from visualrwkv.model import IMAGE_PLACEHOLDER
from visualrwkv.rwkv.state import State
from visualrwkv.task import load_task, save_task
from visualrwkv.text.prompt import encode_conversation, literal
from visualrwkv.text.tokenizer import decode, encode

SETTINGS = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def vlm(tiny_model):
    return VLM(tiny_model())


@pytest.fixture(scope="module")
def reader(tiny_model):
    return VLM(tiny_model(vision=None))


def asked(text, pictures, position="middle"):
    """The ids of a question, by the prompt's own words."""
    turns = [{"from": "human", "value": "<image>\n" * pictures + text}, {"from": "gpt", "value": ""}]
    return encode_conversation(turns, image_position=position, image_tokens=16)[0]


def pixels_of(vlm, *pictures):
    return torch.stack([vlm.processor(p) for p in pictures]) if pictures else None


def test_worldrwkv_has_turns_of_its_own(tiny_model, picture):
    """Pictures before all, turns closed by byte 0x17, blank lines inside an answer."""
    world = VLM(tiny_model(scan="uni", projector="mlp", position="first", template="world"))
    ids = [65535] * 16 + encode("\x16User: What is it?\x17") + encode("Assistant:")
    assert world.prompt(1, "What is it?") == ids
    assert world.prompt(1, "<image>\nA\n\nB ") == [65535] * 16 + encode("\x16User: A\n\nB\x17") + encode("Assistant:")
    session = world.session(picture(0))
    first = session.ask("What is it?", **SETTINGS)
    assert first == world.answer(picture(0), "What is it?", **SETTINGS)
    with torch.no_grad():
        # the second turn goes on after the first, closed: one row with all of it gives the same logits
        logits, state = prefill(world.model, [ids], pixels_of(world, picture(0)))
        said = generate(world.model, logits, state, **SETTINGS)[0]
        row = [*ids, *said, 24, *world.prompt(0, "Sure?")]
        whole, _ = world.model(torch.tensor([row]), pixels_of(world, picture(0)))
        continued, _ = prefill(world.model, [world.prompt(0, "Sure?")], None, session.state)
    torch.testing.assert_close(continued[0], whole[0, -1], rtol=0, atol=2e-5)


# One question --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [None, "first", "last"])
def test_next_token_logits_are_the_models(vlm, picture, position):
    ids = torch.tensor([asked("What is this?", 1, position or "middle")])
    with torch.no_grad():
        wanted, _ = vlm.model(ids, pixels_of(vlm, picture()))
    found = vlm.next_token_logits(picture(), "What is this?", position)
    assert found.shape == (65536,)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted[0, -1], rtol=0, atol=2e-5)


def test_answer_stream_and_batch_agree(vlm, picture):
    two = [picture(1), picture(2)]
    questions = [(picture(0), "What is this?"), (None, "Hello"), (two, "Which is larger?"), (picture(3), "猫吗？")]
    single = [vlm.answer(image, text, **SETTINGS) for image, text in questions]
    assert vlm.answer_batch(questions, **SETTINGS) == single
    assert ["".join(vlm.stream(image, text, **SETTINGS)).strip() for image, text in questions] == single
    assert [vlm.session(image).ask(text, **SETTINGS) for image, text in questions] == single
    assert len(set(single)) == 4
    with_first = vlm.answer_batch(questions, "first", **SETTINGS)
    assert with_first == [vlm.answer(image, text, "first", **SETTINGS) for image, text in questions]
    assert with_first != single
    prompt = asked("What is this?", 1)
    ids = generate(vlm.model, *prefill(vlm.model, [prompt], pixels_of(vlm, picture(0))), 8)[0]
    assert single[0] == decode(ids).strip()


@pytest.mark.parametrize("position", ["first", "middle", "last"])
def test_questions_about_one_picture_share_it(vlm, picture, position, monkeypatch):
    texts = ["What is this?", "What is that, and why?", "Whose?", "What is this?"]
    alone = [vlm.answer(picture(), text, position, **SETTINGS) for text in texts]
    opened, read = [], []
    process, hidden = vlm.processor, vlm.model.hidden
    monkeypatch.setattr(vlm, "processor", lambda p: opened.append(p) or process(p))
    monkeypatch.setattr(vlm.model, "hidden", lambda ids, *rest, **more: read.append(ids) or hidden(ids, *rest, **more))
    assert vlm.ask_many(picture(), texts, position, **SETTINGS) == alone
    assert len(opened) == 1
    seats = sum(int((ids == IMAGE_PLACEHOLDER).sum()) for ids in read)
    assert seats == 16 * (1 if position == "first" else len(texts))
    assert vlm.sharing(position) == ("state" if position == "first" else "features")
    assert vlm.ask_many(picture(), []) == []


def test_sharing_among_other_questions_changes_no_answer(vlm, picture, tmp_path):
    a, b = tmp_path / "a.png", picture(2)
    picture(1).save(a)
    asked = [(a, "What?"), (None, "Hello"), ([a, b], "Which?"), (str(a), "Why?"), (b, "What?"), ([a, b], "Whose?")]
    alone = [vlm.answer(image, text, "first", **SETTINGS) for image, text in asked]
    assert vlm.answer_batch(asked, "first", **SETTINGS) == alone
    assert len(set(alone)) == len(asked)


def test_sampling_reaches_the_answer(vlm, picture):
    settings = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 8}
    a, b, c = (vlm.answer(picture(), "What?", seed=seed, **settings) for seed in (1, 1, 2))
    assert a == b != c
    with pytest.raises(ValueError, match="warmth is no sampling setting; there are temperature, top_p, seed, top_k"):
        vlm.answer(picture(), "What?", warmth=3)


def test_pictures_in_every_form(vlm, picture, tmp_path):
    picture(1).save(tmp_path / "a.png")
    wanted = vlm.answer(picture(1), "What?", **SETTINGS)
    data = (tmp_path / "a.png").read_bytes()
    for form in (tmp_path / "a.png", str(tmp_path / "a.png"), data, [picture(1)], (data,)):
        assert vlm.answer(form, "What?", **SETTINGS) == wanted
    assert vlm.answer(picture(2), "What?", **SETTINGS) != wanted


def test_tags_in_the_text_say_where_pictures_are(vlm, picture):
    pictures = [picture(1), picture(2)]
    plain = vlm.next_token_logits(pictures, "Compare")
    torch.testing.assert_close(vlm.next_token_logits(pictures, "<image>\n<image>\nCompare"), plain, rtol=0, atol=0)


def test_a_tag_that_stands_for_no_picture_is_text(vlm, picture):
    """It is read letter by letter, and no picture takes its place."""
    assert vlm.prompt(0, "<image> What?") == encode("User: <image> What?\n\n") + encode("Assistant:")
    slots = [IMAGE_PLACEHOLDER] * 16
    ids = (
        encode("User: Is <image> a tag?\n")
        + slots
        + encode("\n")
        + slots
        + encode("\nIs <image> a tag?\n\n")
        + encode("Assistant:")
    )
    assert vlm.prompt(2, "Is <image> a tag?") == ids
    assert vlm.prompt(1, literal("Is <image> a tag?")).count(IMAGE_PLACEHOLDER) == 16
    assert vlm.session(picture()).ask("Is <image> <image> a tag?", **SETTINGS)


def test_a_language_model_answers_text_and_refuses_pictures(reader, picture):
    assert reader.answer(None, "Hello", **SETTINGS) == reader.answer([], "Hello", **SETTINGS) != ""
    for call in (reader.answer, reader.next_token_logits):
        with pytest.raises(ValueError, match="no vision encoder; it answers text only"):
            call(picture(), "What is this?")
    with pytest.raises(ValueError, match="no vision encoder"):
        reader.answer_batch([(None, "a"), (picture(), "b")])


def test_load_opens_model_and_processor(vlm, picture, tmp_path):
    save_model(vlm.model, tmp_path)
    found = load(tmp_path)
    torch.testing.assert_close(
        found.next_token_logits(picture(), "What?"), vlm.next_token_logits(picture(), "What?"), rtol=0, atol=1e-5
    )


def test_a_stream_never_breaks_a_character(vlm, monkeypatch):
    words = [*[b + 1 for b in " \n 🦊好".encode()], 261]

    def scripted(model, logits, state, max_new_tokens, options):
        yield from ((word, state) for word in words)

    monkeypatch.setattr("visualrwkv.chat.stream", scripted)
    assert list(vlm.stream(None, "Hello")) == ["🦊", "好"]


# A conversation ------------------------------------------------------------------------------------------------------


def test_the_state_is_that_of_reading_the_whole_conversation(vlm, picture):
    session = vlm.session(picture(0))
    turns = [("What is this?", ()), ("Why?", ()), ("And these?", (picture(1), picture(2))), ("Sure?", ())]
    ids, shown = [], [picture(0)]
    for i, (text, new) in enumerate(turns):
        before = session.state
        pictures = [picture(0)] if i == 0 else list(new)
        shown += new
        prompt = asked(text, len(pictures))
        said = [t for t, _ in stream(vlm.model, *prefill(vlm.model, [prompt], pixels_of(vlm, *pictures), before), 5)]
        assert session.ask(text, new, max_new_tokens=5) == decode(said).strip()
        ids += prompt + said + ([] if said[-1] == 261 else [261])
        with torch.no_grad():
            _, whole = vlm.model(torch.tensor([ids]), pixels_of(vlm, *shown))
        torch.testing.assert_close(vars(session.state), vars(whole), rtol=1e-3, atol=1e-4)
    assert [text for text, _ in session.turns] == [text for text, _ in turns]
    assert all(answer for _, answer in session.turns)
    found, _ = prefill(vlm.model, [asked("So?", 0)], state=session.state)
    with torch.no_grad():
        logits, _ = vlm.model(torch.tensor([[*ids, *asked("So?", 0)]]), pixels_of(vlm, *shown))
    torch.testing.assert_close(found[0], logits[0, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ([6831, 261], [6831, 261]),  # as in training
        ([6831, 0], [6831, 261]),  # an end of text closes the turn no less
        ([6831], [6831, 261]),  # cut at max_new_tokens
        ([10464, 28329, 11], [10464, 28329, 11]),  # "好。\n\n" closes itself
        ([], [261]),
    ],
)
def test_the_state_reads_how_the_turn_ended(reader, monkeypatch, said, read):
    def scripted(model, logits, state, max_new_tokens, options):
        for token in said:
            yield token, state
            if token not in (0, 261):
                _, state = prefill(model, [[token]], state=state)

    monkeypatch.setattr("visualrwkv.chat.stream", scripted)
    session = reader.session()
    session.ask("Hello")
    _, wanted = prefill(reader.model, [[*asked("Hello", 0), *read]])
    torch.testing.assert_close(vars(session.state), vars(wanted), rtol=1e-3, atol=1e-4)


def test_undo(vlm, picture):
    session = vlm.session(picture(0))
    with pytest.raises(ValueError, match="no turn to undo"):
        session.undo()
    first = session.ask("What?", **SETTINGS)
    state, second = session.state, session.ask("Why?", **SETTINGS)
    session.undo()
    assert session.turns == (("What?", first),)
    torch.testing.assert_close(vars(session.state), vars(state), rtol=0, atol=0)
    assert session.ask("Why?", **SETTINGS) == second
    session.undo()
    session.undo()
    assert session.turns == ()
    assert session.state is None
    assert session.ask("What?", **SETTINGS) == first, "the picture waits for its question again"


def test_forks_are_independent(vlm, picture):
    session = vlm.session(picture(0))
    session.ask("What?", **SETTINGS)
    fork = session.fork()
    kept = {k: v.clone() for k, v in vars(session.state).items()}
    answer = fork.ask("Is it red?", picture(1), **SETTINGS)
    torch.testing.assert_close(vars(session.state), kept, rtol=0, atol=0)
    assert len(session.turns) == 1
    assert session.ask("Is it red?", picture(1), **SETTINGS) == answer
    fork.undo()
    fork.undo()
    assert fork.turns == ()
    assert len(session.turns) == 2


def test_a_turn_that_fails_or_is_broken_off_leaves_no_trace(vlm, picture, tmp_path):
    session = vlm.session(picture(0))
    with pytest.raises(FileNotFoundError):
        session.ask("What?", tmp_path / "nothing.png")
    assert list(islice(session.stream("What?", **SETTINGS), 1)) != []
    assert session.turns == ()
    assert session.state is None
    assert session.ask("What?", **SETTINGS) == vlm.answer(picture(0), "What?", **SETTINGS)


def test_the_prompt_is_the_protocols(vlm):
    assert encode("User: Hello\n\n") + encode("Assistant:") == vlm.prompt(0, "Hello")
    assert vlm.prompt(1, "What?") == asked("What?", 1)


# A task --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def task(vlm, tmp_path):
    """A task's file for the tiny model, strong enough to be heard."""
    config = vlm.model.config.rwkv
    wkv = torch.randn(State.zeros(config).wkv[:, 0].shape, generator=torch.Generator().manual_seed(0))
    save_task(tmp_path / "task.safetensors", 3 * wkv, config, fingerprint(vlm.model.rwkv))
    return tmp_path / "task.safetensors"


@pytest.fixture
def tasked(vlm, task):
    """The tiny model with its task in use."""
    other = VLM(vlm.model)
    other.use(task)
    return other


def test_every_way_to_ask_starts_from_the_task(vlm, tasked, task, picture, tmp_path):
    questions = [(picture(0), "What is this?"), (None, "Hello"), ([picture(1), picture(2)], "Which is larger?")]
    single = [tasked.answer(image, text, **SETTINGS) for image, text in questions]
    assert tasked.answer_batch(questions, **SETTINGS) == single
    assert ["".join(tasked.stream(image, text, **SETTINGS)).strip() for image, text in questions] == single
    assert [tasked.session(image).ask(text, **SETTINGS) for image, text in questions] == single
    assert single != [vlm.answer(image, text, **SETTINGS) for image, text in questions]
    with torch.no_grad():
        start = load_task(task, vlm.model.rwkv)
        logits, _ = vlm.model(torch.tensor([asked("What is this?", 1)]), pixels_of(vlm, picture(0)), start)
    found = tasked.next_token_logits(picture(0), "What is this?")
    torch.testing.assert_close(found, logits[0, -1], rtol=0, atol=2e-5)
    save_model(vlm.model, tmp_path / "model")
    opened = load(tmp_path / "model", task=task)
    assert opened.answer(*questions[0], **SETTINGS) == single[0]


def test_tasks_are_swapped_for_later_sessions_alone(vlm, tasked, task, picture):
    plain, with_task = (v.answer(picture(0), "What?", **SETTINGS) for v in (vlm, tasked))
    assert plain != with_task
    early = tasked.session(picture(0))
    tasked.use(None)
    late = tasked.session(picture(0))
    tasked.use(task)
    assert (early.ask("What?", **SETTINGS), late.ask("What?", **SETTINGS)) == (with_task, plain)
    early.undo()
    assert early.ask("What?", **SETTINGS) == with_task
    fork = early.fork()
    fork.undo()
    assert fork.ask("What?", **SETTINGS) == with_task
    with pytest.raises(FileNotFoundError):
        tasked.use("nothing.safetensors")
    assert tasked.answer(picture(0), "What?", **SETTINGS) == with_task, "a failure leaves all as it was"

"""The model as transformers runs it says what ours says."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    TextIteratorStreamer,
    pipeline,
)

from visualrwkv.chat import VLM, load
from visualrwkv.checkpoint import load_model, save_model
from visualrwkv.hf import VisualRWKVConfig, VisualRWKVForConditionalGeneration
from visualrwkv.hf.modeling import TurnEnds, VisualRWKVOutput
from visualrwkv.text.tokenizer import encode

MORE = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def questions(picture):
    return [
        ([picture(0)], "What is this?"),
        ([], "Hello"),
        ([picture(1), picture(2)], "Which is larger?"),
        ([picture(3)], "猫吗？"),
    ]


def said(processor, inputs, outputs):
    """The answers in what `generate` gave."""
    begin = inputs["input_ids"].shape[1]
    return [text.strip() for text in processor.batch_decode(outputs[:, begin:], skip_special_tokens=True)]


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_read(model, vlm, processor, asked, questions, side):
    processor.tokenizer.padding_side = side
    try:
        inputs = asked(*questions)
    finally:
        processor.tokenizer.padding_side = "left"
    assert not bool(inputs["attention_mask"].all())
    with torch.no_grad():
        logits = model(**inputs).logits
    for row, (pictures, text) in enumerate(questions):
        last = int(inputs["attention_mask"][row].nonzero()[-1])
        torch.testing.assert_close(logits[row, last], vlm.next_token_logits(pictures, text), rtol=0, atol=2e-5)


def test_reading_goes_on_from_a_state(model, asked, questions):
    inputs = asked(questions[0])
    with torch.no_grad():
        whole = model(**inputs)
        ids = inputs["input_ids"]
        first = model(ids[:, :-3], inputs["pixel_values"])
        rest = model(ids[:, -3:], state=first.state, logits_to_keep=1)
    torch.testing.assert_close(rest.logits, whole.logits[:, -1:], rtol=0, atol=2e-5)
    torch.testing.assert_close(rest.state.wkv, whole.state.wkv, rtol=0, atol=2e-5)
    assert model(ids[:, :3], use_cache=False).state is None
    assert [x.shape[-1] for x in model(ids[:, :3], return_dict=False, use_cache=False)] == [65536]


def test_loss_is_that_of_the_labelled_positions(model, asked, questions):
    inputs = asked(*questions[:2])
    labels = inputs["input_ids"].where(inputs["attention_mask"].bool(), -100)
    labels[labels == 65535] = -100
    with torch.no_grad():
        out = model(**inputs, labels=labels)
    scored = labels[:, 1:] != -100
    logs = out.logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(out.loss, -logs[scored].mean())


def test_gradients_reach_every_part(place, asked, questions):
    model = AutoModelForImageTextToText.from_pretrained(place).train()
    inputs = asked(questions[0])
    model(**inputs, labels=inputs["input_ids"].where(inputs["input_ids"] != 65535, -100)).loss.backward()
    for part in (model.rwkv, model.vit, model.proj):
        assert all(p.grad is not None and bool(p.grad.any()) for p in part.parameters() if p.requires_grad)


def test_a_row_without_a_token(model):
    with pytest.raises(ValueError, match="row 1 of the attention mask shows no token"):
        model(torch.ones(2, 3, dtype=torch.long), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))


# Generating ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_answers_as_we_do(model, vlm, processor, asked, questions, side):
    wanted = [vlm.answer(pictures, text, **MORE) for pictures, text in questions]
    processor.tokenizer.padding_side = side
    try:
        together = asked(*questions)
    finally:
        processor.tokenizer.padding_side = "left"
    assert said(processor, together, model.generate(**together, **MORE)) == wanted
    alone = [asked(question) for question in questions]
    assert [said(processor, one, model.generate(**one, **MORE))[0] for one in alone] == wanted
    assert len(set(wanted)) == len(wanted)


def test_without_the_state_as_its_cache_it_reads_all_again_and_says_the_same(model, asked, questions):
    inputs = asked(questions[2])
    assert torch.equal(model.generate(**inputs, **MORE), model.generate(**inputs, **MORE, use_cache=False))


def test_generation_goes_on_from_a_state(model, vlm, processor, asked, questions):
    session = vlm.session(questions[0][0])
    session.ask(questions[0][1], **MORE)
    state = session.state
    inputs = asked(([], "And now?"))
    found = said(processor, inputs, model.generate(**inputs, state=state, **MORE))
    assert found == [session.ask("And now?", **MORE)]


def test_a_streamer_gives_the_answer(model, vlm, processor, asked, questions):
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**asked(questions[0]), **MORE, streamer=streamer)
    assert "".join(streamer).strip() == vlm.answer(*questions[0], **MORE)


def test_several_answers_each_see_their_own_pictures(model, asked, questions):
    inputs = asked(questions[2], questions[0])
    torch.manual_seed(0)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3, top_k=1)  # top_k 1: greedy
    greedy = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(out, greedy.repeat_interleave(3, 0))


def scripted(model, monkeypatch, rows):
    """Let the model say these ids whatever it reads."""
    said = iter(zip(*rows))

    def forward(input_ids, **_):
        logits = torch.nn.functional.one_hot(torch.tensor(next(said)), 65536).float()[:, None]
        return VisualRWKVOutput(None, logits, None)

    monkeypatch.setattr(model, "forward", forward)


def test_a_row_that_is_over_waits_for_the_others(place, monkeypatch, asked, questions):
    """A plain directory gives our settings, so that a closed row is filled up."""
    model = AutoModelForImageTextToText.from_pretrained(place)
    assert model.generation_config.max_new_tokens == 256
    newline, a, b = encode("\n")[0], encode("a")[0], encode("b")[0]
    inputs = asked(questions[1], questions[1])
    begin = inputs["input_ids"].shape[1]
    scripted(model, monkeypatch, [[261, a, a, a], [a, newline, newline, b]])
    assert model.generate(**inputs)[:, begin:].tolist() == [[261, 0, 0], [a, newline, newline]]
    scripted(model, monkeypatch, [[newline, newline, newline, a, 0], [a, a, a, a, 0]])
    out = model.generate(**inputs, min_new_tokens=3)[:, begin:].tolist()
    assert out == [[newline, newline, newline, a, 0], [a, a, a, a, 0]]
    scripted(model, monkeypatch, [[newline, newline, a, 0], [a, a, a, 0]])
    out = model.generate(**inputs, eos_token_id=0)[:, begin:].tolist()
    assert out == [[newline, newline, a, 0], [a, a, a, 0]]


def test_beams_are_refused(model, asked, questions):
    with pytest.raises(ValueError, match="num_beams is above 1"):
        model.generate(**asked(questions[1]), num_beams=2)


def test_a_blank_line_in_two_tokens_ends_an_answer():
    begin = encode("Assistant:")
    full, newline = encode("。\n"), encode("\n")
    ends = TurnEnds(261)
    rows = torch.tensor([[*begin, full[0]], [*begin, encode("a")[0]]])
    assert len(full) == 1
    assert ends(rows, None).tolist() == [False, False]
    assert ends(torch.cat((rows, torch.tensor([newline, newline])), 1), None).tolist() == [True, False]
    assert TurnEnds(261)(torch.tensor([[*newline, *newline]]), None).tolist() == [False]  # the first is the prompt's


def test_a_pipeline(place, vlm, picture):
    ask = pipeline("image-text-to-text", model=str(place))
    content = [{"type": "image", "image": picture(0)}, {"type": "text", "text": "What is this?"}]
    (found,) = ask(text=[{"role": "user", "content": content}], max_new_tokens=8, return_full_text=False)
    assert found["generated_text"].strip() == vlm.answer(picture(0), "What is this?", **MORE)


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [6, 7])
def test_there_and_back_is_bit_exact(tiny_model, tmp_path, version):
    ours = tiny_model(version=version, scan="multi", image_tokens=4, position="first", projector="linear")
    save_model(ours, tmp_path / "a", dtype="bfloat16")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "a")
    assert theirs.dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path / "b")
    again = load_model(tmp_path / "b", dtype="bfloat16")
    assert again.config == ours.config
    wanted = load_model(tmp_path / "a", dtype="bfloat16").state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in again.state_dict().items())
    third = VisualRWKVForConditionalGeneration.from_pretrained(tmp_path / "b")
    assert all(torch.equal(x, wanted[name]) for name, x in third.state_dict().items())


def test_settings_that_transformers_adds_do_not_matter(tiny_model, tmp_path):
    save_model(tiny_model(), tmp_path / "a")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "a")
    theirs.config.use_cache, theirs.config.bos_token_id = False, 0
    theirs.save_pretrained(tmp_path / "b")
    assert load(tmp_path / "b").model.config == load(tmp_path / "a").model.config
    assert AutoProcessor.from_pretrained(tmp_path / "b", padding_side="right").tokenizer.padding_side == "right"


def test_a_missing_tensor_is_refused(tiny_model, tmp_path):
    save_model(tiny_model(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["rwkv.ln_out.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing rwkv\.ln_out\.weight"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_a_clip_encoder_keeps_its_positions(tiny_model, tmp_path, picture):
    from visualrwkv.config import ViTConfig

    save_model(tiny_model(vision=ViTConfig(2, 32, 2, 64, 32, 8), image_tokens=17), tmp_path)
    ours = load(tmp_path)
    theirs = VLM(AutoModelForImageTextToText.from_pretrained(tmp_path).network)
    assert torch.equal(theirs.next_token_logits(picture(), "What?"), ours.next_token_logits(picture(), "What?"))


def test_a_language_model_alone(tiny_model, tmp_path):
    save_model(tiny_model(vision=None), tmp_path)
    model, processor = AutoModelForCausalLM.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert said(processor, inputs, model.generate(**inputs, **MORE)) == [load(tmp_path).answer(None, "Hello", **MORE)]


def test_the_config_names_a_wrong_setting():
    with pytest.raises(ValueError, match="scan is 'diagonal'"):
        VisualRWKVForConditionalGeneration(VisualRWKVConfig(rwkv={"n_layer": 1, "n_embd": 64}, scan="diagonal"))

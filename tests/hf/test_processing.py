"""transformers' inputs are ours: the same text, the same ids, the same pixels."""

import itertools

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from visualrwkv.hf import VisualRWKVProcessor
from visualrwkv.text.prompt import SHORT_ANSWER, encode_conversation
from visualrwkv.text.tokenizer import decode, encode

TEXTS = [
    "What is this?",
    f"How many?\n{SHORT_ANSWER}",
    " \n A list:\n\n \t\n- one\n  - two \n",
    "猫吗？\r\n\r\n。",
    "A tag <image> that someone typed",
    "",
]


def turns(messages):
    """transformers' messages as LLaVA's turns."""
    said = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        text = "\n".join(part["text"].replace("<image>", "\n") for part in content if part["type"] == "text")
        tags = "<image>\n" * sum(part["type"] == "image" for part in content)
        said.append({"from": {"user": "human", "assistant": "gpt"}[message["role"]], "value": tags + text})
    return said


def with_pictures(text, *pictures):
    return {
        "role": "user",
        "content": [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": text}],
    }


@pytest.mark.parametrize("position", ["first", "middle", "last"])
@pytest.mark.parametrize(("text", "count"), list(itertools.product(TEXTS, [0, 1, 2])))
def test_a_question_has_the_ids_of_our_prompt(processor, picture, position, text, count):
    chat = [with_pictures(text, *(picture(i) for i in range(count)))]
    given = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, image_position=position
    )
    answer = {"from": "gpt", "value": ""}
    wanted, _ = encode_conversation([*turns(chat), answer], image_position=position, image_tokens=16)
    assert given["input_ids"].tolist() == [wanted]
    assert bool(given["attention_mask"].all())
    assert ("pixel_values" in given) == (count > 0)


def test_a_conversation_has_the_ids_of_our_prompt(processor, picture):
    chat = [
        with_pictures("What is it?", picture(0)),
        {"role": "assistant", "content": "A cat.\n\nReally."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": [{"type": "text", "text": "对。"}]},
        with_pictures("And these?", picture(1), picture(2)),
    ]
    given = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    wanted, _ = encode_conversation([*turns(chat), {"from": "gpt", "value": ""}], image_tokens=16)
    assert given["input_ids"] == [wanted]
    whole = processor.apply_chat_template(chat[:2], tokenize=True, return_dict=True)
    assert whole["input_ids"] == [encode_conversation(turns(chat[:2]), image_tokens=16)[0]]


def test_an_answer_can_be_begun(processor):
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good"}]
    assert processor.apply_chat_template(chat, continue_final_message=True) == "User: Hello\n\nAssistant: Good"


def test_another_role_is_refused(processor):
    with pytest.raises(Exception, match="a message is from system; allowed are user, assistant"):
        processor.apply_chat_template([{"role": "system", "content": "Be kind."}])


def test_pixels_are_our_processors(processor, vlm, picture):
    given = processor(images=[[picture(0)], [picture(1), picture(2)]], text=["<image>", "<image><image>"], padding=True)
    wanted = torch.stack([vlm.processor(picture(i)) for i in range(3)])
    assert torch.equal(torch.as_tensor(given["pixel_values"]), wanted)


def test_files_are_opened_as_ours(processor, vlm, picture, tmp_path):
    """Transparency is laid over white, 16-bit grey keeps its range."""
    import numpy as np

    rgba = picture().convert("RGBA")
    rgba.putalpha(100)
    rgba.save(tmp_path / "clear.png")
    Image.fromarray((np.arange(40 * 32).reshape(32, 40) * 50).astype(np.uint16)).save(tmp_path / "deep.png")
    for name in ("clear.png", "deep.png"):
        path = str(tmp_path / name)
        wanted = vlm.processor(path)[None]
        assert torch.equal(processor(images=path, text="<image>", return_tensors="pt")["pixel_values"], wanted)
        chat = [with_pictures("What?", path)]
        found = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(found["pixel_values"], wanted)


def test_what_a_template_does_not_know_is_refused(processor):
    with pytest.raises(Exception, match="image_position is top; allowed are first, middle, last"):
        processor.apply_chat_template([{"role": "user", "content": "Hi"}], image_position="top")
    with pytest.raises(Exception, match="of type video; allowed are text, image"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "url": "x"}]}])


def test_pictures_as_arrays_and_files(processor, vlm, picture, tmp_path):
    picture().save(tmp_path / "a.png")
    wanted = vlm.processor(picture())[None]
    import numpy as np

    for form in (
        np.asarray(picture()),
        torch.from_numpy(np.array(picture())).permute(2, 0, 1),
        str(tmp_path / "a.png"),
    ):
        assert torch.equal(processor(images=form, text="<image>", return_tensors="pt")["pixel_values"], wanted)


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("text", TEXTS[:4])
def test_worldrwkvs_template(processor, picture, count, text):
    from visualrwkv.hf.processing import chat_template

    chat = [
        with_pictures(text, *(picture(i) for i in range(count))),
        {"role": "assistant", "content": "A cat.\n\nReally."},
        {"role": "user", "content": "Sure?"},
    ]
    options = {"chat_template": chat_template("first", "world"), "tokenize": True, "return_dict": True}
    given = processor.apply_chat_template(chat, add_generation_prompt=True, **options)
    answer = {"from": "gpt", "value": ""}
    assert given["input_ids"] == [encode_conversation([*turns(chat), answer], "world", image_tokens=16)[0]]


# The tokenizer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(place):
    return AutoTokenizer.from_pretrained(place)


@pytest.mark.parametrize("text", [*TEXTS, "User: a\n\n\nAssistant:", "🙂🙃 naïve\tcafé", "\x00\x7f"])
def test_ids_are_the_world_tokenizers(tokenizer, text):
    pieces = text.split("<image>")
    wanted = encode(pieces[0]) + [i for piece in pieces[1:] for i in [65535, *encode(piece)]]
    assert tokenizer(text)["input_ids"] == wanted
    assert tokenizer.decode(wanted) == text


def test_every_id_decodes_as_ours(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 65536
    for ids in ([i] for i in range(1, 65535)):
        assert tokenizer.decode(ids) == decode(ids)


def test_half_a_character_and_special_ids(tokenizer):
    ids = encode("猫")[:1] if len(encode("猫")) > 1 else encode("🙃")[:-1]
    assert tokenizer.decode([*encode("good "), *ids]).startswith("good ")
    assert tokenizer.decode([0, *encode("a"), 65535, 0], skip_special_tokens=True) == "a"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.padding_side == "left"


# Files ---------------------------------------------------------------------------------------------------------------


def test_saved_and_opened_again(processor, picture, tmp_path):
    processor.save_pretrained(tmp_path)
    again = VisualRWKVProcessor.from_pretrained(tmp_path)
    given = {"images": picture(), "text": "User: <image>\n\nAssistant:", "return_tensors": "pt"}
    first, second = processor(**given), again(**given)
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert again.chat_template == processor.chat_template
    assert AutoTokenizer.from_pretrained(tmp_path)("猫")["input_ids"] == encode("猫")
    alone = AutoImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(alone(picture(), return_tensors="pt")["pixel_values"], first["pixel_values"])

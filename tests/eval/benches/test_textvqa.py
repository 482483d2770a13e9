"""`textvqa`: rows by LLaVA's picture ids or our question ids, OCR tokens in the prompt, m4c's accuracy."""

import json

import pytest
from benches import textvqa

SA = "\nAnswer the question using a single word or phrase."
QUESTIONS = [("p", "What is Written?", 11), ("p", "which city?", 12), ("q", "what is written?", 13)]


@pytest.fixture
def data(tmp_path):
    records = [
        {"image_id": image, "question": text, "question_id": number, "answers": ["Stop!"] * 5 + ["go"] * 2 + ["no"] * 3}
        for image, text, number in QUESTIONS
    ]
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": records}))
    return tmp_path


def llava(image, text, ocr="A, b"):
    return f"{text}\nReference OCR token: {ocr}{SA}", image


def test_rows_are_found_by_id_or_by_picture_and_prompt(data):
    prompt, image = llava("p", "Which city?")
    rows = [{"question_id": "11", "text": "stop"}, {"question_id": image, "prompt": prompt, "text": "Go."}]
    assert textvqa.score(data, "val", rows) == {"accuracy": pytest.approx(100 * (1 + 0.6) / 2), "samples": 2}
    assert textvqa.per_question(data, "val", rows) == {"11": 1.0, "12": pytest.approx(0.6)}


def test_the_mean_is_over_the_answers_that_there_are(data, capsys):
    rows = [{"question_id": 11, "text": "stop"}, {"question_id": 11, "text": "x"}]
    assert textvqa.score(data, "val", rows) == {"accuracy": 50.0, "samples": 2}
    assert "2 of 3 questions have no answer and 1 answers are to a question that has another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("What?\nReference OCR token: A" + SA, "what?"),
        ("What?\nReference OCR token: " + SA, "what?"),
        ("Reference OCR token: A\nWhat?" + SA, "what?"),
        ("What?" + SA, "what?"),
        ("OCR tokens: A. Question: What\nNow? Short answer:", "what\nnow?"),
        ("User: <image>\nWhat?\nReference OCR token: A" + SA + "\n\nAssistant:", "what?"),
    ],
)
def test_the_question_is_told_from_the_prompt(prompt, question):
    assert textvqa.asked_in(prompt) == question


def test_what_the_official_code_stops_at_is_refused(data):
    with pytest.raises(ValueError, match="no question can be told"):
        textvqa.score(data, "val", [{"question_id": "p", "prompt": "What\nis\nthis?\nAnswer", "text": "a"}])
    with pytest.raises(ValueError, match="1 of 1 answers are to no question of this split"):
        textvqa.score(data, "val", [{"question_id": "z", "prompt": "What?" + SA, "text": "a"}])
    content = json.loads((data / "TextVQA_0.5.1_val.json").read_text())
    content["data"][0]["answers"].pop()
    (data / "TextVQA_0.5.1_val.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="question 11 has 9 answers, not 10"):
        textvqa.score(data, "val", [{"question_id": 11, "text": "a"}])


def test_prompts_with_and_without_ocr_tokens(data):
    assert textvqa.settings(data, "val") == {"ocr": False}
    first, *_ = textvqa.load(data, "val")
    assert (first.id, first.text) == ("11", "What is written?" + SA)
    assert first.pictures == (data / "train_images/p.jpg",)
    tokens = {"data": [{"image_id": "p", "ocr_tokens": ["STOP", "12"]}, {"image_id": "q", "ocr_tokens": []}]}
    (data / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text(json.dumps(tokens))
    assert textvqa.settings(data, "val") == {"ocr": True}
    assert [q.text.split("\n")[1] for q in textvqa.load(data, "val")] == [
        "Reference OCR token: STOP, 12",
        "Reference OCR token: STOP, 12",
        "Reference OCR token: ",
    ]


def test_llavas_file_gets_the_official_ids(data):
    rows = [(*llava(image, text.capitalize()), f"{image}.jpg") for image, text, _ in reversed(QUESTIONS)]
    lines = [{"question_id": name, "image": image, "text": text} for text, name, image in rows]
    (data / "llava_textvqa_val_v051_ocr.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    questions = textvqa.load(data, "val")
    assert [(q.id, q.text) for q in questions] == [
        (str(number), text) for (_, _, number), (text, _, _) in zip(reversed(QUESTIONS), rows)
    ]
    answered = [{"question_id": q.id, "prompt": q.text, "text": "stop"} for q in questions]
    assert textvqa.score(data, "val", answered) == {"accuracy": 100.0, "samples": 3}
    file = textvqa.submit(data, "val", answered, data)
    assert json.loads(file.read_text())[0] == {"question_id": 13, "answer": "stop"}


def test_the_test_split_is_for_the_server(tmp_path):
    record = {"image_id": "p", "question": "What?", "question_id": 1}
    (tmp_path / "TextVQA_0.5.1_test.json").write_text(json.dumps({"data": [record]}))
    assert textvqa.load(tmp_path, "test")[0].pictures[0].parent.name == "test_images"
    with pytest.raises(ValueError, match="challenge 874"):
        textvqa.score(tmp_path, "test", [{"question_id": 1, "text": "a"}])

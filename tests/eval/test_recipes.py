"""Every data set on the Hub, in small, with the columns that it is published with: the official files, the questions, a perfect score."""

import json
from pathlib import Path

import pytest
from PIL import Image

datasets = pytest.importorskip("datasets")

import hub as table  # noqa: E402
import plan  # noqa: E402

TEXT, WORDS, PICTURE = datasets.Value("string"), datasets.Sequence(datasets.Value("string")), datasets.Image()
INT, SMALL, BOOL = datasets.Value("int64"), datasets.Value("int16"), datasets.Value("bool")
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def texts(names, **others):
    return dict.fromkeys(names.split(), TEXT) | others


PAIR = {"objectId": TEXT, "value": TEXT}
SCIENCE = texts(
    "question hint task grade subject topic category skill lecture solution",
    image=PICTURE, choices=WORDS, answer=datasets.Value("int8"),
)  # fmt: skip
MMBENCH = texts("question hint answer A B C D category source L2-category comment split", index=INT, image=PICTURE)
FEATURES = {
    "vqav2": texts(
        "question_type multiple_choice_answer answer_type question",
        answers=[{"answer": TEXT, "answer_confidence": TEXT, "answer_id": INT}], image_id=INT, question_id=INT, image=PICTURE,
    ),
    "textvqa": texts(
        "image_id question flickr_original_url flickr_300k_url set_name",
        question_id=datasets.Value("int32"), question_tokens=WORDS, image=PICTURE, image_width=datasets.Value("int32"),
        image_height=datasets.Value("int32"), answers=WORDS, image_classes=WORDS, ocr_tokens=WORDS,
    ),
    "vizwiz": texts("question_id question category", image=PICTURE, answers=WORDS),
    "scienceqa": SCIENCE,
    "pope": texts("id question_id question answer image_source category", image=PICTURE),
    "mme": texts("question_id question answer category", image=PICTURE),
    "mmbench": MMBENCH,
    "mmbench_cn": MMBENCH,
    "seed": texts(
        "answer choice_a choice_b choice_c choice_d data_type question question_id",
        data_id=WORDS, question_type_id=SMALL, image=datasets.Sequence(PICTURE),
    ),
    "mm_vet": texts("question_id question answer image_source capability", image=PICTURE),
    "llava_bench": texts("question_id question category image_id gpt_answer caption", image=PICTURE),
    "mmmu": texts("id question options explanation img_type answer topic_difficulty question_type subfield")
    | {f"image_{number}": PICTURE for number in range(1, 8)},
    "ai2d": texts("question answer", options=WORDS, image=PICTURE),
    "chartqa": texts("type question answer", image=PICTURE),
    "docvqa": texts(
        "questionId question ucsf_document_id ucsf_document_page_no data_split",
        question_types=WORDS, image=PICTURE, docId=INT, answers=WORDS,
    ),
    "infographicvqa": texts("questionId question image_url ocr data_split", answers=WORDS, answer_type=WORDS, image=PICTURE)
    | {"operation/reasoning": WORDS},
    "ocrbench": texts("dataset question question_type", answer=WORDS, image=PICTURE),
}  # fmt: skip
GQA = texts(
    "id imageId question answer fullAnswer entailed equivalent semanticStr",
    isBalanced=BOOL,
    groups=texts("global local"),
    types=texts("structural semantic detailed"),
    annotations=datasets.Sequence({"question": PAIR, "answer": PAIR, "fullAnswer": PAIR}),
    semantic=[{"operation": TEXT, "argument": TEXT, "dependencies": datasets.Sequence(datasets.Value("int32"))}],
)
ROWS = {  # two questions about one picture, then one about another; of some benches what they need more
    "vqav2": [
        {
            "image_id": at // 2, "question_id": at, "question": f"Is it {at}?", "question_type": "is it", "answer_type": "yes/no",
            "multiple_choice_answer": "yes",
            "answers": [{"answer": "yes", "answer_confidence": "maybe", "answer_id": n} for n in range(1, 11)],
        }
        for at in range(3)
    ],
    "textvqa": [
        {"image_id": f"ab{at // 2}", "question_id": at, "question": "what BRAND?", "answers": ["dakota"] * 10, "ocr_tokens": ["DAKOTA"]}
        for at in range(3)
    ],
    "vizwiz": [
        {"question_id": f"VizWiz_val_0000000{at}", "question": "WHAT is it?", "answers": ["tea"] * 10, "category": "other"}
        for at in range(3)
    ],
    "scienceqa": [
        {
            "question": "Which?", "choices": ["Maine", "Texas"], "answer": 1, "hint": "Look.", "grade": "grade2",
            "subject": "social science",
        }
        for at in range(3)
    ],
    "pope": [
        {"id": str(n), "question_id": str(at + 1), "question": "Is there a cat?", "answer": "yes" if at else "no",
         "image_source": f"COCO_val2014_{at // 2}", "category": kind}
        for n, kind in enumerate(("adversarial", "popular", "random")) for at in range(3)
    ],
    "mme": [
        {"question_id": f"{kind}/{name}.jpg", "category": kind, "question": f"Is it {word}?  Please answer yes or no.",
         "answer": "Yes" if word == "red" else "No"}
        for kind in ("existence", "posters") for name in ("b", "a") for word in ("red", "blue")
    ],
    "mmbench": [
        {"index": index, "question": "Which?", "hint": "nan", "A": a, "B": b, "answer": right, "category": "scene",
         "L2-category": "coarse_perception", "split": "dev", "comment": "a\tb\nc"}
        for index, a, b, right in ((7, "cat", "dog", "A"), (1_000_007, "dog", "cat", "B"), (8, "tea", "milk", "B"))
    ],
    "seed": [
        {"answer": "B", **{f"choice_{c}": c * 2 for c in "abcd"}, "data_id": [f"1_{at // 2}"], "data_type": "image",
         "question": "How many?", "question_id": str(at), "question_type_id": 5}
        for at in range(3)
    ] + [
        {"answer": "C", **{f"choice_{c}": c * 2 for c in "abcd"}, "data_id": ["v1/0.png", "v1/1.png", "v1/2.png"],
         "data_type": "video", "question": "And then?", "question_id": "v9", "question_type_id": 10}
    ],
    "mm_vet": [
        {"question_id": f"v1_{at}", "question": "What is x?", "answer": "-1<AND>-5", "image_source": "web", "capability": "ocr,math"}
        for at in range(3)
    ],
    "llava_bench": [
        {"question_id": str(at), "question": "Why?", "category": "conv", "image_id": f"00{at // 2}.jpg", "gpt_answer": "So."}
        for at in range(3)
    ],
    "mmmu": [
        {"id": f"validation_Art_{at}", "question": "See <image 1>?", "options": "['red', 'blue']", "answer": "B",
         "question_type": "multiple-choice"}
        for at in range(2)
    ] + [
        {"id": "validation_Math_1", "question": "How many?", "options": "[]", "answer": "7", "question_type": "open"}
    ],
    "ai2d": [{"question": "Which?", "options": ["egg", "larva"], "answer": "1"} for at in range(3)],
    "chartqa": [
        {"type": f"{part}_test", "question": "How many?", "answer": "14"} for part in ("human", "human", "augmented")
    ],
    "docvqa": [
        {"questionId": str(at), "question": "Who?", "question_types": ["form"], "docId": 5, "ucsf_document_id": f"x{at // 2}",
         "ucsf_document_page_no": "4", "answers": ["0.28"], "data_split": "val"}
        for at in range(3)
    ],
    "infographicvqa": [
        {"questionId": str(at), "question": "Who?", "answers": ["0.28"], "answer_type": ["single span"],
         "operation/reasoning": ["counting"], "data_split": "val"}
        for at in range(3)
    ],
    "ocrbench": [
        {"dataset": "HME100k", "question": "What?", "question_type": "Handwriting Recognition", "answer": ["x ^ 2"]}
        for at in range(3)
    ],
}  # fmt: skip
ROWS["mmbench_cn"] = ROWS["mmbench"]
PERFECT = {  # the first question, right answers in the order of the questions, and where the score says that they are
    "vqav2": ("0", "Is it 0?" + SHORT, ["yes"] * 3, ("overall",), 100),
    "gqa": ("q0", "Is it overcast?" + SHORT, ["No."] * 3, ("accuracy",), 100),
    "textvqa": ("0", "What brand?" + SHORT, ["Dakota"] * 3, ("accuracy",), 100),
    "vizwiz": (
        "0",
        "What is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT,
        ["tea"] * 3, ("overall",), 100,
    ),
    "scienceqa": ("test-0", "Context: Look.\nWhich?\nA. Maine\nB. Texas" + LETTER, ["B"] * 3, ("img_accuracy",), 100),
    "pope": ("1", "Is there a cat?" + SHORT, ["No", "Yes", "Yes"] * 3, ("mean_f1",), 1),
    "mme": ("existence/a.jpg#1", "Is it red?" + SHORT, ["Yes", "No"] * 4, ("posters",), 200),
    "mmbench": ("7", "Which?\nA. cat\nB. dog" + LETTER, ["A", "B", "B"], ("circular", "Overall"), 1),
    "mmbench_cn": ("7", "Which?\nA. cat\nB. dog\n请直接回答选项字母。", ["A", "B", "B"], ("circular", "Overall"), 1),
    "seed": ("0", "How many?\nA. aa\nB. bb\nC. cc\nD. dd" + LETTER, ["B", "B", "B", "C"], ("Total accuracy",), 100),
    "mm_vet": ("v1_0", "What is x?", ["-1"] * 3, (), None),
    "llava_bench": ("0", "Why?", ["So."] * 3, (), None),
    "mmmu": ("validation_Art_0", "See <image 1>?\n(A) red\n(B) blue\n" + LETTER, ["B", "B", "7"], ("overall",), 1),
    "ai2d": ("0", "Which?\nA. egg\nB. larva" + LETTER, ["B"] * 3, ("accuracy",), 100),
    "chartqa": ("human/0", "How many?\nAnswer the question with a single word.", ["14"] * 3, ("mean_of_splits",), 100),
    "docvqa": ("0", "Who?" + SHORT, ["0.28"] * 3, ("anls",), 100),
    "infographicvqa": ("0", "Who?" + SHORT, ["0.28"] * 3, ("anls",), 100),
    "ocrbench": ("0", "What?" + SHORT, ["it is x^2"] * 3, ("sum_correct",), 3),
}  # fmt: skip


@pytest.fixture
def tables(column):
    """tables(stem, split): what the Hub holds of a bench; the first two rows share a picture, or what must."""

    def make(stem, split):
        red, blue, green = column("red"), column("blue", "PNG"), column("green")
        parts = table.RECIPES[stem].parts[split]
        if stem == "gqa":
            kinds = {"structural": "verify", "semantic": "global", "detailed": "weatherVerifyC"}
            questions = [
                {
                    "id": f"q{at}", "imageId": f"n{at // 2}", "question": "Is it overcast?", "answer": "no", "isBalanced": True,
                    "groups": {"global": "weather", "local": "01-x"}, "types": kinds, "entailed": "['q1', 'q2']", "equivalent": "[]",
                    "semantic": [{"operation": "select", "argument": "sky", "dependencies": []}], "fullAnswer": "No.",
                    "annotations": {"question": [], "answer": [], "fullAnswer": []},
                }
                for at in range(3)
            ]  # fmt: skip
            pictures = [{"id": "n0", "image": red}, {"id": "n1", "image": blue}]
            return {parts[0]: (GQA, questions), parts[1]: ({"id": TEXT, "image": PICTURE}, pictures)}
        image = {"seed": "image", "mmmu": "image_1"}.get(stem, "image")
        rows = []
        for at, row in enumerate(ROWS[stem]):
            cell = blue if at == 2 else red
            if stem == "seed":
                cell = [red, green, blue] if row["data_type"] == "video" else [cell]
            if stem == "mme":
                cell = column("blue", "PNG") if "posters" in row["question_id"] else red
            rows.append(row | {image: None if stem == "scienceqa" and at == 2 else cell})
        return {parts[0]: (FEATURES[stem], rows)}

    return make


def test_every_bench_is_here_or_elsewhere():
    benches = {file.stem for file in (Path(__file__).parents[2] / "eval/benches").glob("*.py")}
    assert table.RECIPES.keys() | table.ELSEWHERE.keys() == benches
    assert not table.RECIPES.keys() & table.ELSEWHERE.keys()
    assert table.RECIPES.keys() == PERFECT.keys()


@pytest.mark.parametrize("stem", PERFECT)
def test_rows_become_the_questions_and_a_perfect_score(stem, tables, hub, here, cache, tmp_path):
    recipe = table.RECIPES[stem]
    split = next(iter(recipe.parts))
    loaded = hub(recipe.repository, tables(stem, split))
    name, text, answers, path, perfect = PERFECT[stem]
    name_of = stem.replace("_", "-")
    (bench,) = plan.planned(name_of, None, None)
    assert tuple(loaded) == recipe.parts[split]
    assert bench.data == cache / stem / split
    assert bench.code.splits(bench.data) == [split]
    questions = bench.code.load(bench.data, split)
    assert (questions[0].id, questions[0].text) == (name, text)
    assert len(questions) == len(answers) == len({question.id for question in questions})
    for question in questions:
        for picture in question.pictures:
            assert isinstance(picture, bytes) or Image.open(picture).size == (8, 8), question.id
    assert all(question.pictures for question in questions[:2])
    if stem not in ("scienceqa", "vizwiz", "mm_vet", "mmmu"):  # there a picture has the name of its question
        assert questions[0].pictures == questions[1].pictures
        assert len({question.pictures for question in questions}) == (
            3 if stem == "seed" else 4 if stem == "mme" else 2
        )
    rows = [
        {"question_id": q.id, "prompt": q.text, "text": text, **q.fields}
        for q, text in zip(questions, answers, strict=True)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--bench", name_of, "--predictions", tmp_path / "a.jsonl", "--out", tmp_path]
    if perfect is None:
        with pytest.raises(ValueError, match="by GPT-4"):
            here(*arguments)
    else:
        score = here(*arguments)[name_of]
        for part in path:
            score = score[part]
        assert score == perfect
        settings = json.loads((tmp_path / "result.json").read_text())["settings"][name_of]
        assert (settings["repository"], settings["revision"]) == (recipe.repository, "5ca1ab1e")
        assert settings["data"] == str(bench.data)
    assert len(loaded) == len(recipe.parts[split])  # fetched once


def test_of_a_video_the_middle_frame_is_shown(tables, hub):
    hub("lmms-lab/SEED-Bench", tables("seed", "all"))
    (bench,) = plan.planned("seed", None, None)
    (picture,) = bench.code.load(bench.data, "all")[3].pictures
    red, green, blue = Image.open(picture).convert("RGB").getpixel((4, 4))
    assert green > 100 > max(red, blue)


@pytest.mark.parametrize(
    ("stem", "split", "columns"),
    [
        ("vqav2", "test-dev2015", {"answers": None, "answer_type": None}),
        ("textvqa", "test", {"answers": [""] * 10}),
        ("vizwiz", "test", {"answers": [], "category": ""}),
        ("mmbench", "test_en", {"answer": "nan"}),
        ("mmmu", "test", {"answer": "?"}),
        ("docvqa", "test", {"answers": None}),
        ("infographicvqa", "test", {"answers": []}),
    ],
)
def test_a_split_without_public_answers_says_so(stem, split, columns, tables, hub, here, tmp_path):
    ((part, (features, rows)),) = tables(stem, split).items()
    hub(table.RECIPES[stem].repository, {part: (features, [row | columns for row in rows])})
    (bench,) = plan.planned(stem, None, split)
    rows = [{"question_id": q.id, "text": "x"} for q in bench.code.load(bench.data, split)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"not public|no public answers|has no answers"):
        here("--bench", stem, "--split", split, "--predictions", tmp_path / "a.jsonl")

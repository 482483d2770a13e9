"""Steps from a stream: every record once an epoch, the same on any number of ranks, gone on with anywhere."""

from pathlib import Path

import pytest
import torch

from visualrwkv.training.data import load_batches
from visualrwkv.training.stream import Streamed, StreamPlan, Window
from visualrwkv.training.tables import TableRecords

datasets = pytest.importorskip("datasets")
from tests.training import streamed_set  # noqa: E402

COUNT, BUDGET = sum(streamed_set.FILES), 160


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, picture):
    return streamed_set.write(tmp_path_factory.mktemp("stream") / "set", picture)


@pytest.fixture(scope="module")
def torn(tmp_path_factory, picture):
    return streamed_set.write(tmp_path_factory.mktemp("torn") / "set", picture, streamed_set.BROKEN)


@pytest.fixture(scope="module")
def config(tiny_model):
    return tiny_model(image_tokens=4, vocab_size=300).config


def read(folder, config, bad="error", seed=0):
    return Streamed(folder, folder, config, longest=BUDGET, bad=bad, seed=seed)


def names(rows):
    """The records of a batch, by what they call themselves."""
    return [row["id"] for row in rows.records.values()]


def steps(data, count, world=1, accumulate=1, look_ahead=8, place=None, rank=0):
    return list(StreamPlan(data, BUDGET, world, accumulate, look_ahead).shares(rank, 0, count, place))


@pytest.mark.parametrize("look_ahead", [1, 2, 8, 1000])
def test_every_record_comes_once_an_epoch_within_the_budget(folder, config, look_ahead):
    data = read(folder, config)
    window = Window(data, look_ahead, None)
    orders, late = [], 0
    for epoch in range(3):
        seen, lengths = [], []
        while len(seen) < COUNT:
            batch = window.batch(BUDGET)
            late += bool(window.waiting) and next(iter(batch)) > min(window.waiting)
            seen += [row["id"] for row in batch.values()]
            lengths.append(sum(len(data.look(i, row)) for i, row in batch.items()))
        assert sorted(seen) == list(range(COUNT))
        assert window.epoch == epoch
        assert max(lengths) <= BUDGET
        orders.append(seen)
    assert len(set(map(tuple, orders))) > 1, "the files change places"
    assert (late > 0) == (look_ahead >= 8), "a batch need not begin with the oldest"
    if look_ahead == 1:
        ends = {0, *(sum(streamed_set.FILES[: n + 1]) for n in range(len(streamed_set.FILES)))}
        assert all(b == a + 1 or b in ends for a, b in zip(orders[0], orders[0][1:])), "they keep their order"


def test_the_order_is_given_by_the_seed(folder, config):
    def order(seed):
        return [names(rows) for share in steps(read(folder, config, seed=seed), 8) for rows in share.batches]

    assert order(0) == order(0)
    assert order(0) != order(1)


def told(share):
    """A step's records, what was left out, and which records wait after it."""
    (rows,) = share.batches
    return list(rows.records.items()), rows.skipped, [rows.place[k] for k in ("epoch", "next", "waiting")]


@pytest.mark.parametrize("every", [1, 64])
@pytest.mark.parametrize("look_ahead", [1, 8, 1000])
def test_a_run_goes_on_at_any_step(torn, config, look_ahead, every, monkeypatch):
    """With the same records, and with none of those that are left out told again."""
    monkeypatch.setattr("visualrwkv.training.stream.EVERY", every)
    whole = steps(read(torn, config, "skip"), 16, look_ahead=look_ahead)  # more than two epochs
    wanted = [told(share) for share in whole]
    assert sum(len(skipped) for _, skipped, _ in wanted) > len(streamed_set.BROKEN)
    for done in range(1, 16):
        place = whole[done - 1].batches[-1].place
        rest = steps(read(torn, config, "skip"), 16 - done, look_ahead=look_ahead, place=place)
        assert [told(share) for share in rest] == wanted[done:]


def test_what_is_read_again_is_bounded(folder, config, monkeypatch):
    monkeypatch.setattr("visualrwkv.training.stream.EVERY", 1)
    for share in steps(read(folder, config), 30, look_ahead=4):
        place = share.batches[-1].place
        assert place["first"] == min(place["waiting"], default=place["next"])
        assert len(place["waiting"]) < 4


@pytest.mark.parametrize(("world", "accumulate"), [(1, 3), (2, 1), (2, 2)])
def test_ranks_share_the_plan_of_one(folder, config, world, accumulate):
    size = world * accumulate
    single = [names(share.batches[0]) for share in steps(read(folder, config), 6 * size)]
    ranks = [steps(read(folder, config), 6, world, accumulate, rank=rank) for rank in range(world)]
    for step in range(6):
        group = [names(rows) for shares in ranks for rows in shares[step].batches]
        assert sorted(group) == sorted(single[step * size : (step + 1) * size])
        assert len({str(shares[step].batches[-1].place) for shares in ranks}) == 1
        assert {shares[step].samples for shares in ranks} == {sum(map(len, group))}


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_the_same_records_at_hand(folder, config, workers):
    data = read(folder, config)
    batches = list(
        load_batches(data, StreamPlan(data, BUDGET, look_ahead=8, ahead=workers > 0).shares(0, 0, 8), workers)
    )
    assert [batch.records for batch in batches] == [tuple(s.batches[0].records) for s in steps(read(folder, config), 8)]
    table, seen = TableRecords(folder, folder), 0
    for share, batch in zip(steps(read(folder, config), 8), batches):
        (rows,) = share.batches
        ids = names(rows)
        shown = [table.picture(i, "image", None) for i in ids if i % 5]
        seen += len(shown)
        if shown:
            torch.testing.assert_close(batch.images, torch.stack([data.processor(p) for p in shown]), rtol=0, atol=0)
        else:
            assert batch.images is None
        assert batch.samples == len(ids)
        assert batch.place == rows.place
    assert seen


def test_pictures_in_lists_and_in_files(tmp_path, picture, config):
    """Of a record with two pictures one by one, and of one that holds only a file's name."""
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "lists").mkdir()
    (tmp_path / "names").mkdir()
    turns = [{"role": "user", "content": "Compare."}, {"role": "assistant", "content": "They differ."}]
    shown = datasets.Features(
        {"images": [datasets.Image()], "messages": [dict.fromkeys(("role", "content"), datasets.Value("string"))]}
    )
    both = datasets.Dataset.from_list([{"images": [picture(0), picture(1)], "messages": turns}], features=shown)
    both.to_parquet(str(tmp_path / "lists/0.parquet"))
    datasets.Dataset.from_list([{"image": "2.png", "messages": turns}]).to_parquet(str(tmp_path / "names/0.parquet"))
    for name, numbers in (("lists", (0, 1)), ("names", (2,))):
        data = Streamed(tmp_path / name, tmp_path, config)
        (batch,) = load_batches(data, StreamPlan(data, BUDGET).shares(0, 0, 1), 0)
        wanted = torch.stack([data.processor(tmp_path / f"{i}.png") for i in numbers])
        torch.testing.assert_close(batch.images, wanted, rtol=0, atol=0)


def test_a_bad_record_stops_or_is_left_out_and_told_once(torn, config):
    data = read(torn, config)
    share = steps(data, 12)[-1]
    (error,) = share.batches
    assert isinstance(error, ValueError)
    assert f"{torn}, row " in str(error)
    assert "has no answer to learn from" in str(error)
    assert str(error).count("(id ") == 1
    assert isinstance(data[error], ValueError)

    ranks = [steps(read(torn, config, "skip"), 6, 2, rank=rank, look_ahead=4) for rank in range(2)]
    told = [words for share in ranks[0] for rows in share.batches for words in rows.skipped]
    assert len(told) == len(set(told)) >= len(streamed_set.BROKEN)
    assert not any(rows.skipped for share in ranks[1] for rows in share.batches)
    seen = [i for shares in ranks for share in shares for rows in share.batches for i in names(rows)]
    assert set(range(COUNT)) - set(seen) >= set(streamed_set.BROKEN)


def test_a_stream_is_looked_at_before_the_first_step(folder, torn, config, tmp_path):
    data = read(folder, config)
    data.prepare()
    assert data.opening.startswith("a stream of 3 files, the first 26 records of ")
    with pytest.raises(ValueError, match="has no answer to learn from"):
        read(torn, config).prepare()
    other = read(torn, config, "skip")
    other.prepare()
    assert other.digest() != data.digest()
    data.keep(tmp_path / "stream.json")
    assert read(folder, config).kept(tmp_path / "stream.json")
    assert not other.kept(tmp_path / "stream.json")


def test_a_set_with_nothing_to_learn_is_refused(tmp_path, picture, config):
    silent = streamed_set.write(tmp_path / "set", picture, tuple(range(COUNT)))
    with pytest.raises(ValueError, match=r"no record to learn from among its first 26; the first: .*has no answer"):
        read(silent, config, "skip").prepare()
    (error,) = steps(read(silent, config, "skip"), 1)[0].batches
    assert "has no record to learn from in a whole epoch" in str(error)


def test_a_stream_that_breaks_off_is_one_sentence(tmp_path, picture, config):
    broken = streamed_set.write(tmp_path / "set", picture)
    data = read(broken, config)
    for file in broken.iterdir():
        file.write_bytes(b"PAR1" + file.read_bytes()[300:])
    (error,) = steps(data, 12)[-1].batches
    assert isinstance(error, ConnectionError)
    assert str(error).startswith(f"{broken}: the stream breaks off after ")
    assert "\n" not in str(error)


@pytest.mark.parametrize("saved", ["set", "dict"])
def test_what_save_to_disk_wrote_is_streamed(folder, config, tmp_path, saved):
    whole = datasets.load_dataset("parquet", data_files=[str(f) for f in sorted(folder.iterdir())], split="train")
    (whole if saved == "set" else datasets.DatasetDict(train=whole)).save_to_disk(tmp_path / "saved")
    data = read(tmp_path / "saved", config)
    seen = {name for share in steps(data, 12) for rows in share.batches for name in names(rows)}
    assert seen == set(range(COUNT))


def test_what_cannot_be_streamed_is_one_sentence(tmp_path, config):
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(ValueError, match=r"data\.json is no Hugging Face data set.*leave --streaming out"):
        read(tmp_path / "data.json", config)
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match="holds no parquet or arrow file"):
        read(tmp_path / "set", config)
    datasets.Dataset.from_list([{"text": "hello"}]).to_parquet(str(tmp_path / "set/0.parquet"))
    with pytest.raises(ValueError, match="has the columns text; one of them must be conversations"):
        read(tmp_path / "set", config)


def test_a_name_on_the_hub_is_streamed(folder, config, tmp_path, monkeypatch):
    """What the library gives for a name, from files here in the Hub's place; the commit is what tells whether it has changed."""
    real = datasets.load_dataset_builder
    files = [str(file) for file in sorted(folder.iterdir())]

    def fetch(name):
        if name != "owner/talks":
            raise ConnectionError("no network")
        builder = real("parquet", data_files=files)
        builder.hash = "a commit"
        return builder

    monkeypatch.chdir(tmp_path)
    here = read(folder, config)
    monkeypatch.setattr(datasets, "load_dataset_builder", fetch)
    data = read(Path("owner/talks"), config)
    assert "a commit" in data.source.mark()
    assert [names(rows) for share in steps(data, 8) for rows in share.batches] == [
        names(rows) for share in steps(here, 8) for rows in share.batches
    ]
    with pytest.raises(FileNotFoundError, match=r"owner/none: .*the Hub gave no data set \(no network\)"):
        read(Path("owner/none"), config)

"""The loss: a packed row is its samples, each alone, in value and in every gradient."""

import copy
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from visualrwkv.text.prompt import IGNORE, encode_conversation
from visualrwkv.training import loss as room
from visualrwkv.training.data import Batch
from visualrwkv.training.loss import distinct_rows, packed_loss, sample_weights, shift_labels
from visualrwkv.training.objective import Objective
from visualrwkv.training.recipes import Recipe

TALKS = [
    (1, ["What is this?", "A cat.", "Why?", "It meows, and it has four paws."]),
    (0, ["Hello", "Hi"]),
    (2, ["Compare", "The first is red.\nThe second is blue."]),
    (0, ["One?", "1", "Two?", "2", "Three?", "3"]),
]


def sample(pictures, values, seed):
    turns = [{"from": "gpt" if i % 2 else "human", "value": v} for i, v in enumerate(values)]
    turns[0]["value"] = "<image>\n" * pictures + turns[0]["value"]
    ids, labels = encode_conversation(turns, image_tokens=4)
    images = torch.randn(pictures, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(ids), torch.tensor(labels), images


SAMPLES = [sample(*talk, seed) for seed, talk in enumerate(TALKS)]


def pack(*samples):
    ids, labels, images = (torch.cat(parts) for parts in zip(*samples))
    bounds = torch.tensor([0, *(len(s[0]) for s in samples)]).cumsum(0)
    names = tuple(map(str, range(len(images))))
    return Batch(ids, labels, bounds, images if names else None, names, names)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(scan="multi", image_tokens=4).train()


def loss_and_gradients(model, batch, bf16=False):
    """The summed loss, and the gradient of every parameter of encoder, projector and language model."""
    model.requires_grad_(True).zero_grad()
    loss = Objective(model, Recipe(bf16=bf16))(batch)
    loss.backward()
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}
    return loss.item(), grads


def assert_close(found, wanted, limit):
    """Loss and every gradient within `limit`, relative, of each tensor's norm."""
    assert abs(found[0] - wanted[0]) <= limit * abs(wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name, want in wanted[1].items():
        assert (found[1][name] - want).norm() <= limit * want.norm(), name


def total(parts):
    losses, grads = zip(*parts)
    return sum(losses), {k: sum(g[k] for g in grads) for k in grads[0]}


@pytest.fixture(scope="module")
def alone(model):
    return [loss_and_gradients(model, pack(s)) for s in SAMPLES]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0), (1, 3), (0, 0, 1)])
def test_a_packed_row_is_its_samples(model, alone, order):
    """In the precision that is trained in; summing in another order leaves 2e-5 in the smallest gradients."""
    found, wanted = loss_and_gradients(model, pack(*(SAMPLES[i] for i in order))), total([alone[i] for i in order])
    assert_close(found, wanted, limit=5e-5)
    off = torch.cat([(found[1][name] - want).flatten() for name, want in wanted[1].items()])
    every = torch.cat([want.flatten() for want in wanted[1].values()])
    assert off.norm() <= 1e-5 * every.norm(), "the whole gradient"


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 1)])
def test_a_packed_row_is_its_samples_in_double_precision(model, order):
    double = deepcopy(model).double()
    found = loss_and_gradients(double, pack(*(SAMPLES[i] for i in order)))
    wanted = total([loss_and_gradients(double, pack(SAMPLES[i])) for i in order])
    assert_close(found, wanted, limit=1e-6)
    if 0 in order:
        assert all(grad.norm() > 0 for grad in wanted[1].values()), "every parameter is reached"


def test_each_sample_weighs_the_same(model, alone):
    """Against plain cross-entropy on all logits, each sample's mean over its own labels."""
    batch = pack(*SAMPLES)
    model.requires_grad_(True).zero_grad()
    logits, _ = model(batch.ids[None], batch.images, cu_seqlens=batch.cu_seqlens)
    lengths = batch.cu_seqlens.diff().tolist()
    loss = sum(
        F.cross_entropy(part[:-1], labels[1:], ignore_index=IGNORE)
        for part, labels in zip(logits[0].split(lengths), batch.labels.split(lengths))
    )
    loss.backward()
    plain = loss.item(), {k: p.grad.clone() for k, p in model.named_parameters()}
    assert_close(loss_and_gradients(model, batch), plain, limit=5e-5)
    assert plain[0] == pytest.approx(sum(one for one, _ in alone), rel=1e-5)


@pytest.mark.parametrize(("rows", "tile"), [(1, 1), (5, 2), (7, 7), (8, 64), (1024, 3)])
def test_tiles_do_not_show(monkeypatch, rows, tile):
    g = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 16, generator=g, requires_grad=True) for n in (40, 90))
    labels = torch.randint(90, (40,), generator=g)
    labels[::3] = IGNORE
    bounds = torch.tensor([0, 13, 14, 40])
    results = []
    for sizes in ((1024, 64), (rows, tile)):
        monkeypatch.setattr(room, "ROWS", sizes[0])
        monkeypatch.setattr(room, "TILE", sizes[1])
        loss = packed_loss(hidden, head, labels, bounds)
        results.append((loss, *torch.autograd.grad(3 * loss, (hidden, head))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
    targets = shift_labels(labels, bounds)
    each = F.cross_entropy(hidden @ head.T, targets, reduction="none", ignore_index=IGNORE)
    plain = (each * sample_weights(targets, bounds)).sum()
    torch.testing.assert_close(results[1][0], plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(results[1][1:], torch.autograd.grad(3 * plain, (hidden, head)), rtol=1e-5, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_changes_none(model):
    batch = pack(SAMPLES[0])
    _, wanted = loss_and_gradients(model, batch)
    model.zero_grad()
    model.rwkv.head.requires_grad_(False)
    Objective(model, Recipe())(batch).backward()
    assert model.rwkv.head.weight.grad is None
    torch.testing.assert_close(model.proj.gate.weight.grad, wanted["proj.gate.weight"])


def test_bf16_is_close(model, alone):
    loss, grads = loss_and_gradients(model, pack(*SAMPLES), bf16=True)
    wanted = total(alone)
    assert loss == pytest.approx(wanted[0], rel=0.02)
    for name in ("rwkv.head.weight", "rwkv.emb.weight", "rwkv.blocks.0.att.key.weight", "proj.o_proj.weight"):
        assert F.cosine_similarity(grads[name].flatten(), wanted[1][name].flatten(), 0) > 0.98, name
        assert grads[name].dtype == torch.float32


def test_equal_rows_of_the_head_may_be_read_as_one():
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(40, 16, generator=g), torch.randn(1, 16, generator=g).repeat(90, 1)
    head[[3, 50, 88]] = torch.randn(3, 16, generator=g)
    answers = {3, 7, 60}
    rows = distinct_rows(head, answers)
    assert rows.tolist() == [3, 7, 50, 60, 88, 0]
    labels = torch.tensor(sorted(answers))[torch.randint(3, (40,), generator=g)]
    labels[::4] = IGNORE
    few, bounds = head[rows].requires_grad_(), torch.tensor([0, 13, 40])
    hidden.requires_grad_(), head.requires_grad_()
    loss = packed_loss(hidden, head, labels, bounds)
    d_hidden, d_head = torch.autograd.grad(2 * loss, (hidden, head))
    assert d_head[1].abs().max() > 1e-4, "rows that are no answer are pushed away, too"
    loss_of_few = packed_loss(hidden, few, labels, bounds, rows, alike=85)
    torch.testing.assert_close(loss_of_few, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(2 * loss_of_few, (hidden, few)), (d_hidden, d_head[rows]))
    assert distinct_rows(torch.randn(90, 16), answers) is None


def test_a_few_trained_rows_stand_for_the_whole_head(model):
    """One step on the few rows, spread, is one step on all of them."""
    model, batch = copy.deepcopy(model), pack(*SAMPLES)
    model.zero_grad()
    head = model.rwkv.head.weight
    with torch.no_grad():
        head.copy_(head[0].expand_as(head).clone())
        head[5] += 1
    answers = set(batch.labels.tolist()) - {IGNORE}
    whole = copy.deepcopy(model)
    for net, rows in ((model, distinct_rows(head, answers)), (whole, None)):
        objective = Objective(net, Recipe(), rows)
        optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
        objective(batch).backward()
        optimizer.step()
        objective.spread()
    assert len(distinct_rows(head, answers)) < 40
    for (name, few), (_, all_) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert (few - all_).norm() <= 1e-5 * all_.norm(), name


def test_the_words_that_occur_stand_for_the_whole_embedding(model):
    batch = pack(sample(0, ["Red?", "no", "Blue?", "yes"], 0), sample(0, ["Two?", "2"], 0))
    words = torch.tensor(sorted(set(batch.ids.tolist())))
    nets = copy.deepcopy(model), copy.deepcopy(model)
    for net, given in zip(nets, (words, None), strict=True):
        net.zero_grad()
        objective = Objective(net, Recipe(), None, given)
        optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
        objective(batch).backward()
        optimizer.step()
        objective.spread()
    moved = (nets[0].rwkv.emb.weight != model.rwkv.emb.weight).any(1).nonzero()[:, 0]
    assert set(moved.tolist()) <= set(words.tolist())
    assert len(moved) > 3
    for (name, few), (_, all_) in zip(nets[0].named_parameters(), nets[1].named_parameters(), strict=True):
        assert (few - all_).norm() <= 1e-5 * all_.norm(), name


def test_labels_move_one_place_and_never_across_samples():
    labels = torch.tensor([7, 1, 2, 8, 3, 9])
    assert shift_labels(labels, torch.tensor([0, 3, 4, 6])).tolist() == [1, 2, IGNORE, IGNORE, 9, IGNORE]


def test_weights_of_a_sample_sum_to_one():
    targets = torch.tensor([5, IGNORE, 5, 5, IGNORE, IGNORE, 5])
    found = sample_weights(targets, torch.tensor([0, 4, 6, 7]))
    torch.testing.assert_close(found, torch.tensor([1 / 3, 0, 1 / 3, 1 / 3, 0, 0, 1]))


def test_nothing_to_learn_is_no_loss():
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    loss = packed_loss(hidden, head, torch.full((4,), IGNORE), torch.tensor([0, 4]))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not head.grad.any()


@pytest.mark.parametrize("alone", [True, False])
def test_l2wrap_is_the_references(alone):
    """RWKV-LM's L2Wrap on full logits of equally long samples, in double precision."""
    generator = torch.Generator().manual_seed(0)
    B, T, C, V = (1, 150, 8, 30) if alone else (3, 70, 8, 30)
    hidden = torch.randn(B, T, C, generator=generator, dtype=torch.float64)
    head = torch.randn(V, C, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[:, : T // 2] = IGNORE

    h, W = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    logits = h @ W.T
    means = [F.cross_entropy(logits[b, :-1], labels[b, 1:], ignore_index=IGNORE) for b in range(B)]
    largest, entry = logits.detach().max(-1, keepdim=True)
    extra = torch.zeros_like(logits).scatter_(-1, entry, largest * 1e-4 / (B * T))
    torch.autograd.backward([torch.stack(means).mean(), logits], [torch.ones((), dtype=torch.float64), extra])

    flat, rows = hidden.flatten(0, 1).clone().requires_grad_(), head.clone().requires_grad_()
    bounds = torch.arange(0, B * T + 1, T)
    loss = packed_loss(flat, rows, labels.flatten(), bounds, l2wrap=True) / B
    loss.backward()
    assert loss.item() == pytest.approx(torch.stack(means).mean().item(), rel=1e-6)
    plain = torch.autograd.grad(packed_loss(flat, rows, labels.flatten(), bounds) / B, (flat, rows))
    for found, wanted, without in (
        (flat.grad.view(B, T, C), h.grad, plain[0].view(B, T, C)),
        (rows.grad, W.grad, plain[1]),
    ):
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()
        assert (found - without).norm() > 1e-5 * wanted.norm(), "it changes something"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("frozen", ["", "hidden", "head"])
def test_a_large_head_is_taken_in_blocks(monkeypatch, dtype, frozen):
    monkeypatch.setattr(room, "BLOCK", 7)
    monkeypatch.setattr(room, "SMALL", 10)
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 8, generator=generator, dtype=dtype) for n in (40, 30))
    labels = torch.randint(30, (40,), generator=generator)
    labels[:5] = IGNORE
    bounds = torch.tensor([0, 13, 40])

    def gradients(loss_of):
        h, W = (t.clone().requires_grad_(name != frozen) for name, t in (("hidden", hidden), ("head", head)))
        loss = loss_of(h, W)
        (3 * loss).backward()
        return loss.detach(), h.grad, W.grad

    def plain(h, W):
        targets = shift_labels(labels, bounds)
        losses = F.cross_entropy(h @ W.T, targets, ignore_index=IGNORE, reduction="none")
        return (losses * sample_weights(targets, bounds)).sum()

    found, wanted = gradients(lambda h, W: packed_loss(h, W, labels, bounds)), gradients(plain)
    for a, b in zip(found, wanted):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= (1e-6 if dtype == torch.float32 else 2e-7) * b.norm()

"""Each setting does what it says, on a distribution of four tokens."""

import pytest
import torch

from visualrwkv.sampling import Sampler, Sampling, choose_tokens

LOGITS = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()


def draw(count=3000, **settings):
    sampler = Sampler(Sampling(**{"temperature": 1.0, "seed": 0} | settings))
    return torch.bincount(torch.tensor([sampler.choose(LOGITS) for _ in range(count)]), minlength=4) / count


def kept(*tokens):
    wanted = torch.zeros(4)
    wanted[list(tokens)] = LOGITS.exp()[list(tokens)]
    return wanted / wanted.sum()


def near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.03)


def test_temperature():
    near(draw(), LOGITS.exp())
    near(draw(temperature=2.0), torch.softmax(LOGITS / 2, 0))
    assert draw(10, temperature=0.0).tolist() == [0, 1, 0, 0]
    assert draw(10, temperature=1e-30).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.45}, [1]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.9}, [0, 1, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"min_p": 0.2}, [0, 1, 3]),
        ({"min_p": 0.5}, [1, 3]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),  # of what top_k left: 0.53, 0.84
        ({"min_p": 0.2, "top_p": 0.8}, [1, 3]),
    ],
)
def test_who_may_be_drawn(settings, tokens):
    near(draw(**settings), kept(*tokens))


def test_a_large_vocabulary_keeps_the_same_tokens():
    """The nucleus, by its definition: the fewest of the likeliest that add up to top_p."""
    logits = 2 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    probs, order = torch.softmax(logits, 0).sort(descending=True)
    nucleus = set(order[: int((probs.cumsum(0) < 0.7).sum()) + 1].tolist())
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.7, seed=0))
    drawn = {sampler.choose(logits) for _ in range(1000)}
    assert drawn <= nucleus
    assert len(drawn) > 30


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, [1, 1, 1, 1]),
        ({"presence_penalty": 1.0}, [1, 3, 1, 1]),
        ({"frequency_penalty": 1.0}, [1, 3, 1, 0]),
        ({"repetition_penalty": 2.0}, [1, 3, 1, 1]),
        ({"presence_penalty": -1.0}, [1, 1, 1, 1]),
    ],
)
def test_penalties(settings, said):
    """Logits -1.9, -0.69, -3, -1.2: the second token is said first, and its logit falls below the fourth's."""
    sampler = Sampler(Sampling(**settings))
    assert [sampler.choose(LOGITS) for _ in range(4)] == said


def test_a_penalty_divides_what_is_above_zero():
    sampler = Sampler(Sampling(repetition_penalty=2.0))
    logits = torch.tensor([1.5, 2.0])
    assert [sampler.choose(logits) for _ in range(2)] == [1, 0]
    assert logits.tolist() == [1.5, 2.0]


def test_neighbours_and_their_order_change_nothing():
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    settings = [Sampling(1.0, seed=1), Sampling(), Sampling(2.0, 0.9, 2, frequency_penalty=1.0)]
    samplers = [Sampler(s) for s in settings]
    together = [choose_tokens(logits, samplers) for _ in range(5)]
    for row, s in enumerate(settings):
        sampler = Sampler(s)
        assert [sampler.choose(logits[row]) for _ in range(5)] == [tokens[row] for tokens in together]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; it must be a whole number"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be a number above 0"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"stop": ("a", "")}, "at least one character"),
        ({"seed": 2**70}, "a whole number of 64 bits"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**settings)

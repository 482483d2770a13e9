"""Memory that is used again, and never while somebody can still see it."""

from visualrwkv.ops.arena import Arena


def test_memory_is_used_again_when_the_last_view_is_gone():
    arena = Arena()
    a = arena.take(4, 1000)
    place = a.data_ptr()
    view = a[2:, ::2].fill_(7)
    del a
    other = arena.take(4, 1000).fill_(1)
    assert other.data_ptr() != place
    assert bool((view == 7).all())
    del view
    again = arena.take(2, 2000)
    assert again.data_ptr() == place
    assert again.shape == (2, 2000)
    assert bool((other == 1).all())


def test_an_arena_may_go_first():
    arena = Arena()
    a = arena.take(1000).fill_(3)
    del arena
    assert bool((a == 3).all())

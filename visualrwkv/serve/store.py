"""States that conversations may go on from, by the id of their last response."""

from __future__ import annotations

from collections import OrderedDict

from visualrwkv.rwkv.state import State


class Store:
    """At most so many states; the one longest unused goes first. A state has the same size however long the conversation."""

    def __init__(self, most: int):
        self._most = most
        self._states: OrderedDict[str, State] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def put(self, name: str, state: State) -> None:
        """Keep one."""
        self._states[name] = state
        while len(self._states) > self._most:
            self._states.popitem(last=False)

    def get(self, name: str) -> State | None:
        """The state of that name, or None where there is none or it had to go."""
        if name in self._states:
            self._states.move_to_end(name)
        return self._states.get(name)

    def remove(self, name: str) -> bool:
        """Forget one; whether there was one."""
        return self._states.pop(name, None) is not None

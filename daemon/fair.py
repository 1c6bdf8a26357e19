"""Whose turn it is: a queue in which nobody waits for the end of somebody else's crowd."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque

from weighbridge.daemon.layout import Group

_Batch = tuple[int, deque[Group]]


class FairQueue:
    """Groups that are due, in turns over their models. Of every three turns one goes to the model that came last, one
    to the model that has waited longest for its next turn, one to the model that came first.

    Within a model every other turn begins at what came last, by batches: one listing's groups keep their order. So a
    good one is met after a few turns, however many came before it, and what came first is never put off for ever.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._fresh: OrderedDict[str, deque[_Batch]] = OrderedDict()
        """Models that have had no turn since they came."""
        self._rotation: OrderedDict[str, deque[_Batch]] = OrderedDict()
        self._counts = Counter[str]()
        self._size, self._turn, self._batch = 0, 0, 0

    def __len__(self) -> int:
        """Also counts what was put twice."""
        return self._size

    def put(self, group: Group, batch: int | None = None) -> Group | None:
        """Queue it, behind its `batch` (None: it is one by itself). Return what had to go, where the queue is full."""
        if batch is None:
            self._batch -= 1
            batch = self._batch
        queue = self._rotation.get(group.model) or self._fresh.setdefault(group.model, deque())
        if not queue or queue[-1][0] != batch:
            queue.append((batch, deque()))
        queue[-1][1].append(group)
        self._size += 1
        self._counts[group.model] += 1
        return self._evicted(group.model) if self._size > self._capacity else None

    def take(self) -> Group | None:
        """Whose turn it is; None where nobody waits."""
        if not self._size:
            return None
        self._turn += 1
        fresh, last = bool(self._fresh), self._turn % 3 == 0
        if not fresh or (self._turn % 3 == 1 and self._rotation):
            model, queue = self._rotation.popitem(last=False)
        else:
            model, queue = self._fresh.popitem(last=last)
        group = self._pop(queue, newest=self._turn % 2 == 0)
        if queue:
            self._rotation[model] = queue
        return group

    def _pop(self, queue: deque[_Batch], *, newest: bool) -> Group:
        end = -1 if newest else 0
        group = queue[end][1].popleft()
        if not queue[end][1]:
            del queue[end]
        self._size -= 1
        self._counts[group.model] -= 1
        if not self._counts[group.model]:
            del self._counts[group.model]
        return group

    def _evicted(self, model: str) -> Group:
        """The oldest of whoever has more than a fair share: the newcomer's model, else the model that came first."""
        queues = self._rotation if model in self._rotation else self._fresh
        share = self._capacity // (len(self._fresh) + len(self._rotation))
        if self._counts[model] <= max(1, share):
            queues = self._rotation or self._fresh
            model = next(iter(queues))
        group = self._pop(queues[model], newest=False)
        if not queues[model]:
            del queues[model]
        return group

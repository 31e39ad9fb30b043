"""Which sample goes into which slot next: host-side bookkeeping, no arrays."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Placement:
    """What begins now.

    Attributes:
      samples: slot -> (request, sample).
      prompts: (place, request) of the prompts that have to be read first.
    """

    samples: dict[int, tuple[int, int]]
    prompts: list[tuple[int, int]]


class Queue:
    """Samples still to be begun, and which request's prompt stands in which place.

    Place p serves slots p * G to (p + 1) * G. Its prompt can only change while all of them are
    free.

    Args:
      wanted: samples of each request.
      places: prompts that can be stored, P.
      slots_per_place: G.
    """

    def __init__(self, wanted: Sequence[int], places: int, slots_per_place: int):
        self._wanted, self._per_place = list(wanted), slots_per_place
        self._next = [0] * len(wanted)  # the first sample of each request that has not begun
        self._stored: list[int | None] = [None] * places

    def left(self) -> int:
        """Samples that have not begun."""
        return sum(self._wanted) - sum(self._next)

    def place(self, busy: Sequence[bool], at_least: int) -> Placement:
        """Fills free slots; nothing if fewer than `at_least` could be and others still decode.

        A slot first goes on with the prompt that is stored for it. A place with nothing left to do
        takes the next request, or helps the one with most samples left.
        """
        G, begun = self._per_place, list(self._next)
        samples: dict[int, tuple[int, int]] = {}
        prompts: list[tuple[int, int]] = []
        idle = []
        for place, request in enumerate(self._stored):
            free = [slot for slot in range(place * G, (place + 1) * G) if not busy[slot]]
            if request is not None and begun[request] < self._wanted[request]:
                self._fill(samples, begun, free, request)
            elif len(free) == G:
                idle.append(place)
        for place in idle:
            left = [wanted - done for wanted, done in zip(self._wanted, begun, strict=True)]
            if not any(left):
                break
            fresh = [r for r, done in enumerate(begun) if not done and left[r]]
            request = fresh[0] if fresh else left.index(max(left))
            prompts.append((place, request))
            self._fill(samples, begun, range(place * G, (place + 1) * G), request)
        if len(samples) < at_least and any(busy):
            return Placement({}, [])
        self._next = begun
        for place, request in prompts:
            self._stored[place] = request
        return Placement(samples, prompts)

    def _fill(
        self,
        samples: dict[int, tuple[int, int]],
        begun: list[int],
        free: Sequence[int],
        request: int,
    ) -> None:
        for slot in free[: self._wanted[request] - begun[request]]:
            samples[slot] = request, begun[request]
            begun[request] += 1

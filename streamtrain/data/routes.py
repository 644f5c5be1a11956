"""Which arrays are read, and into which columns their rows go.

Its law: an array that several columns are made of in one way (as inputs and as targets of an autoencoder) is read and
decoded once for all of them, and each has rows of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamtrain.data.feed import Feed
from streamtrain.data.survey import Place

Route = tuple[Feed, Sequence[Place]]


def routes_of(feeds: Sequence[Feed], places: Sequence[Place]) -> list[Route]:
    """The arrays of one store, each with the places of its rows. `places`: of each of the feeds; more are let be."""
    routes: list[tuple[Feed, list[Place]]] = []
    for feed, place in zip(feeds, places, strict=False):
        same = next((others for other, others in routes if _alike(feed, other)), None)
        if same is None:
            routes.append((feed, [place]))
        else:
            same.append(place)
    return list(routes)


def _alike(one: Feed, other: Feed) -> bool:
    """Whether both hand over the same rows."""
    if not type(one) is type(other) is Feed:  # of others, each has its own way of putting rows together
        return False
    read = one.reader is other.reader and one.cache is other.cache and one.site == other.site
    return read and one.change is other.change and one.checked == other.checked

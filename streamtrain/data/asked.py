"""What a stream was asked for: its arguments, checked. Frozen; its law: what can change is not in here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from streamtrain.data.choosing import Choice
from streamtrain.data.framing import Framing
from streamtrain.data.opening import IO
from streamtrain.data.options import Crew
from streamtrain.data.order import Shuffle
from streamtrain.data.ranks import Ranks
from streamtrain.data.scanning import RaggedWish
from streamtrain.data.skipping import OnBadChunk
from streamtrain.data.splits import SplitBy
from streamtrain.data.stores import Named
from streamtrain.data.transform import Transform
from streamtrain.data.trust import Verify
from streamtrain.data.values import Wishes
from streamtrain.errors import EnvironmentProblem

Names = tuple[tuple[str, ...], bool]
"""Names of arrays, and whether they were given as a list."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The arguments of one stream, by the names that its constructor has for them."""

    named: Sequence[Named]
    """The stores as they were named."""
    name: str
    """What messages call them."""
    inputs: Names | None
    """None where the store is one array."""
    targets: Names | None
    batch_size: int
    shuffle: Shuffle
    seed: int
    drop_last: bool
    ranks: Ranks
    shuffle_blocks: int | None
    split: Sequence[float] | None
    split_by: SplitBy
    split_seed: int
    choice: Choice
    framing: Framing
    ragged: RaggedWish
    stack: bool
    wishes: Wishes
    """dtype, decode_cf and normalize."""
    transform: Transform | None
    crew: Crew
    payload: bytes | None
    """The transform for processes."""
    cache_transform: bool | None
    cache_bytes: int | None
    """None for as many as are worth it."""
    io: IO
    threads: int
    prefetch: int | None
    read_timeout: float
    retries: int
    verify: Verify
    on_bad_chunk: OnBadChunk
    max_skipped: float
    output: Literal["torch", "numpy"]

    @property
    def used(self) -> list[str]:
        """Names of the arrays that make up a batch; none where the only array has no name."""
        return [*(self.inputs[0] if self.inputs else ()), *(self.targets[0] if self.targets else ())]

    @property
    def num_targets(self) -> int:
        return len(self.targets[0]) if self.targets is not None else 0

    def fields(self, arrays: Iterable[str]) -> list[str]:
        """The array of each part of a batch: inputs, then targets; `arrays` where no inputs are named."""
        inputs = tuple(arrays) if self.inputs is None else self.inputs[0]
        lengths = self.ragged.lengths_of(self.used)
        return [*inputs, *lengths, *(self.targets[0] if self.targets is not None else ())]

    def hung(self) -> EnvironmentProblem:
        """The error of metadata that do not come."""
        return EnvironmentProblem(
            f"the metadata of {self.name} were not read within {self.read_timeout:g} s",
            hint="check the storage, or raise read_timeout",
        )

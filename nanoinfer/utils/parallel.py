"""TP: which rank of how many this process is, as a value handed to the layers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanoinfer.errors import ModelLoadError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class TP:
    """Tensor parallelism (Megatron-LM, Shoeybi et al., 2019): rank `rank` of `size`; the default is alone."""

    rank: int = 0
    size: int = 1
    group: "ProcessGroup | None" = None  # None: the default group

    def split(self, n: int, what: str) -> int:
        """This rank's share of n. Raises ModelLoadError where the shares would not be equal."""
        if n % self.size:
            raise ModelLoadError(f"{n} {what} cannot be split over {self.size} ranks: not a multiple")
        return n // self.size

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(x, group=self.group)
        return x


ALONE = TP()

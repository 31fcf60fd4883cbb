"""Linear layers, whole or as one rank's part (Megatron-LM, Shoeybi et al., 2019): columns first, then rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanoinfer import ops
from nanoinfer.layers.layer import Layer, Source, empty_parameter
from nanoinfer.utils.parallel import TP


class Linear(Layer):
    """x [T, in] @ weight.T + bias -> [T, out]. weight [out, in], bias [out]: this rank's part of each."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, device: torch.device, dtype: torch.dtype, tp: TP
    ) -> None:
        super().__init__()
        self.tp = tp
        self.weight = empty_parameter(out_features, in_features, device=device, dtype=dtype)
        self.bias = empty_parameter(out_features, device=device, dtype=dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class ColumnLinear(Linear):
    """Each rank computes a part of the outputs. in_features, out_features: of the whole layer."""

    shard_dim = 0

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, device: torch.device, dtype: torch.dtype, tp: TP
    ) -> None:
        out_here = tp.split(out_features, "output features")
        super().__init__(in_features, out_here, bias=bias, device=device, dtype=dtype, tp=tp)


class MergedColumnLinear(ColumnLinear):
    """Several ColumnLinear with one input, computed as one: each part's outputs on this rank, side by side.

    parts: the name in the checkpoint, as a sibling of this module, and the whole number of outputs of each.
    """

    def __init__(
        self, in_features: int, parts: dict[str, int], *, bias: bool, device: torch.device, dtype: torch.dtype, tp: TP
    ) -> None:
        parts_here = {name: tp.split(size, f"outputs of {name}") for name, size in parts.items()}
        super().__init__(in_features, sum(parts.values()), bias=bias, device=device, dtype=dtype, tp=tp)
        self.parts = parts_here

    def sources(self, path: str) -> Iterator[Source]:
        parent = path.rpartition(".")[0]
        for name, parameter in self.named_parameters(recurse=False):
            views = parameter.split_with_sizes(list(self.parts.values()))
            for part, view in zip(self.parts, views, strict=True):
                yield Source(f"{parent}.{part}.{name}", view, self.shard_dim_of(parameter), self.mean)


class GatedLinear(MergedColumnLinear):
    """silu(gate) * up (SwiGLU, Shazeer, 2020): two ColumnLinears of one input, without biases. [T, in] -> [T, out].

    gate, up: their names in the checkpoint, as siblings of this module.
    """

    def __init__(
        self, in_features: int, out_features: int, gate: str, up: str, *, device: torch.device, dtype: torch.dtype,
        tp: TP,
    ) -> None:  # fmt: skip
        parts = {gate: out_features, up: out_features}
        super().__init__(in_features, parts, bias=False, device=device, dtype=dtype, tp=tp)

    def forward(self, x: Tensor) -> Tensor:
        return ops.gated_linear(x, self.weight)


class RowLinear(Linear):
    """Each rank has a part of the inputs; the outputs are summed over the ranks."""

    shard_dim = 1

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, device: torch.device, dtype: torch.dtype, tp: TP
    ) -> None:
        in_here = tp.split(in_features, "input features")
        super().__init__(in_here, out_features, bias=bias, device=device, dtype=dtype, tp=tp)

    def forward(self, x: Tensor) -> Tensor:
        # One rank alone adds the bias: every rank's would be summed.
        return self.tp.all_reduce(ops.linear(x, self.weight, self.bias if self.tp.rank == 0 else None))

"""Every CUDA kernel on small shapes, for NVIDIA's compute-sanitizer, and its results against the definition.

    compute-sanitizer --tool memcheck --kernel-name kns=nanoinfer python tests/sanitize.py [GROUP ...]

and the same with racecheck and synccheck, and with initcheck, which has to see torch's kernels as well, without
--kernel-name. Groups, all unless named: ops, attention, linear, logprobs. A run
whose kernels did nothing would be clean as well: hence the comparison.
"""

import os
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor is an allocation of its own, so overruns are seen

import torch
from op_helpers import assert_error
from test_attention import make_case
from test_tall_gated_linear import CUTS as GATED_CUTS
from test_thin_linear import make

from nanoinfer import check, ops, reference

HALVES = (torch.bfloat16, torch.float16)
# Decodes with and without splits, drafts, prompts, the rest of a prompt, nothing: of so many tokens in so many.
CHUNKS = [(1, 5), (1, 1100), (3, 40), (20, 20), (70, 150), (0, 0)]
LAYOUTS = [(6, 2, 32), (14, 2, 64), (9, 1, 64), (4, 2, 96), (6, 2, 128), (18, 2, 128), (4, 2, 256)]
PLAIN_CUTS = [(40, 1, 1, 1), (48, 2, 4, 2), (64, 3, 3, 1), (96, 1, 8, 1)]
TILE_GATED_CUTS = [(80, 1, 1, 2), (144, 2, 1, 1), (160, 3, 1, 1)]


def all_ops() -> int:
    """As `python -m nanoinfer check`, in every dtype."""
    count = 0
    for name in check.EXAMPLES:
        dtypes = (torch.float32,) if name in check.FLOAT32_OPS else (torch.float32, *HALVES)
        for dtype in dtypes:
            wrong = check.mismatch(name, "cuda", dtype)
            assert wrong is None, f"{name} in {dtype}: {wrong}"
            count += 1
    return count


def attention() -> int:
    cases = [(layout, dtype) for layout in LAYOUTS for dtype in HALVES] + [((4, 2, 64), torch.float32)]
    for layout, dtype in cases:
        case = make_case(CHUNKS, layout, dtype, "cuda")
        assert_error(case.attend(), case.defined(dtype), case.defined(torch.float64))
    return len(cases)


def linear() -> int:
    """Sizes that fill their tiles and ones that do not."""
    count = 0
    for dtype in HALVES:
        for rows in (1, 16):
            x, weight, bias = make(rows, 200, 136, dtype, "cuda")
            assert_error(ops.thin_linear(x, weight, bias), reference.thin_linear(x, weight, bias, False),
                         reference.thin_linear(x.double(), weight.double(), bias.double(), False))  # fmt: skip
            assert_error(ops.thin_gated_linear(x, weight), reference.thin_gated_linear(x, weight),
                         reference.thin_gated_linear(x.double(), weight.double()))  # fmt: skip
            count += 2
        for gated, cut in [(False, cut) for cut in PLAIN_CUTS] + [(True, cut) for cut in TILE_GATED_CUTS]:
            x, weight, bias = make(70, 208, 600, dtype, "cuda")
            bias = None if gated else bias
            got, plain = (tile(x, weight, bias, gated, *cut) for tile in (ops.tile_linear, reference.tile_linear))
            x, weight, bias = (None if tensor is None else tensor.double() for tensor in (x, weight, bias))
            assert_error(got, plain, reference.tile_linear(x, weight, bias, gated, *cut))
            count += 1
        for cut in GATED_CUTS:
            x, weight, _ = make(300, 2 * 264, 200, dtype, "cuda")
            assert_error(ops.tall_gated_linear(x, weight, *cut), reference.tall_gated_linear(x, weight, *cut),
                         reference.tall_gated_linear(x.double(), weight.double(), *cut))  # fmt: skip
            count += 1
    return count


def logprobs() -> int:
    """One slice of a row and several, rows named and not, some ids wanted and none."""
    count = 0
    for vocab, wanted in ((50, 5), (9001, 5), (20_000, 32), (20_000, 0)):
        logits = torch.randn(7, vocab + 13).cuda()
        tokens = torch.arange(7, dtype=torch.int32).cuda()
        for rows in (None, torch.tensor([6, 0, 3, 3, 1, 2, 5], dtype=torch.int32).cuda()):
            got, expected = (tell(logits, rows, tokens, vocab, wanted)
                             for tell in (ops.tell_logprobs, reference.tell_logprobs))  # fmt: skip
            places = [0, *range(1, 3 + 2 * wanted, 2)]  # rank and ids; between them are rounded numbers
            assert torch.equal(got[:, places], expected[:, places]), (vocab, wanted)
            count += 1
    return count


GROUPS = {"ops": all_ops, "attention": attention, "linear": linear, "logprobs": logprobs}


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("sanitize.py is for a machine with a CUDA device: there is none here")
    torch.manual_seed(0)
    for name in sys.argv[1:] or GROUPS:
        print(f"{name}: {GROUPS[name]()} cases ok", flush=True)


if __name__ == "__main__":
    main()

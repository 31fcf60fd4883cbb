"""Every CUDA kernel on small shapes, for NVIDIA's compute-sanitizer, which sees what right results do not show.

    compute-sanitizer --tool memcheck --kernel-name kns=nanoinfer python tests/sanitize.py [GROUP ...]

and the same with racecheck (threads that do not wait for each other), synccheck (barriers that not all threads reach)
and initcheck (memory read before it is written). Groups, all unless named: attention, long, thin, tile, gated,
sampling, small; a process for each may run at the same time. Their cases are in kernel_cases.py. Results are compared
with the definition all the same, and a wrong one makes the exit status 1: kernels that did nothing would please every
tool. `--device cpu` makes the same calls there, on plain torch where an op is for GPUs alone, to try all this without a
GPU.

Each tensor is an allocation of its own, of just its size, so that overruns are seen; its numbers are made on the CPU
and copied. So none of torch's kernels writes what ours read, and --kernel-name may leave torch's out with any tool.

On a Hopper every kernel runs, in every dtype and size that it is compiled for, but one: prefill_kernel with heads of 64
and 128, in whose place that GPU has hopper_kernel and shares_kernel. A build without these,
TORCH_CUDA_ARCH_LIST=8.0+PTX, takes it in the groups attention and long.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":  # who imports this keeps torch's cache
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from kernel_cases import GROUPS, Case, cases_of
from torch import Tensor

from nanoinfer import ops, reference
from nanoinfer.check import FLOAT32_OPS

# What an error may be, in eps: results in half precision are rounded a few times, in float32 every addition is.
SLACK = {torch.float32: 64, torch.bfloat16: 4, torch.float16: 4}
EXACT = FLOAT32_OPS - {"tell_logprobs"}  # every operation is defined


def call(module: Any, case: Case, place: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What the op of `module` writes, on the CPU: the result, and the arguments that its schema says it changes."""
    arguments = {k: place(v) if isinstance(v, Tensor) else v for k, v in case.arguments.items()}
    result = getattr(module, case.op)(**arguments)
    schema = getattr(torch.ops.nanoinfer, case.op).default._schema
    written = {a.name: arguments[a.name].cpu() for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    if case.op == "paged_attention":  # tokens that belong to no chunk are not written
        result = result[: int(arguments["q_starts"][-1])]
    if case.op == "tell_logprobs":
        return told_apart(result.cpu())
    return written if result is None else {**written, "the result": result.cpu()}


def told_apart(told: Tensor) -> dict[str, Tensor]:
    """What `tell_logprobs` tells, by its kind: where log probabilities are NaN (here 1), ranks and ids may be any."""
    logprobs = told.view(torch.float32)[:, 2::2]
    unknown = logprobs.isnan()
    return {
        "ranks": told[:, 0].masked_fill(unknown[:, 0], -1), "ids": told[:, 1::2].masked_fill(unknown, -1),
        "log probabilities": logprobs.nan_to_num(1.0),
    }  # fmt: skip


def distance(got: Tensor, truth: Tensor, exact: bool) -> float:
    """The largest error, in what is allowed for the number itself and for the usual one in its row."""
    if exact or not truth.is_floating_point():
        return 0.0 if torch.equal(got, truth) else torch.inf
    truth = truth.double()
    usual = truth.square().mean(-1, keepdim=True).sqrt()
    allowed = SLACK[got.dtype] * torch.finfo(got.dtype).eps * (truth.abs() + usual)
    return float(((got.double() - truth).abs() / allowed).max()) if got.shape == truth.shape else torch.inf


def check(case: Case, device: str) -> bool:
    """Runs a case and prints a line on it: the largest error, as a part of what is allowed. Whether it is right."""
    same = case.op in FLOAT32_OPS
    truth = call(reference, case, lambda t: t.clone() if same or not t.is_floating_point() else t.double())
    begin = time.perf_counter()
    got = call(ops, case, lambda t: t.to(device, copy=True))
    seconds = time.perf_counter() - begin
    errors = {name: distance(got[name], truth[name], case.op in EXACT) for name in truth}
    wrong = [name for name, error in errors.items() if not error <= 1]  # NaN is wrong as well
    verdict = f"WRONG: {', '.join(wrong)}" if wrong else "ok"
    print(f"{case.op:<17} {case.label:<48} {max(errors.values()):4.2f} {seconds:6.2f} s  {verdict}", flush=True)
    return not wrong


def refuse_without_kernels(device: str) -> None:
    """Plain torch in place of a kernel would pass, and prove nothing."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("sanitize.py: there is no CUDA device; --device cpu makes the same calls on the CPU")
    if missing := ops.missing_kernels(device.upper()):
        sys.exit(f"sanitize.py: nanoinfer is built without kernels for {device} of {', '.join(missing)}")
    if device == "cuda" and not torch.ops.nanoinfer.has_tiles(torch.empty(0, device=device)):
        print("no kernels for Hopper, as it is another GPU or not built for it: others do their work")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run every kernel on small shapes, for compute-sanitizer.")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"all if none is given: {', '.join(GROUPS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    refuse_without_kernels(options.device)
    torch.set_num_threads(1)  # definitions are computed on the CPU, in many processes at once
    right = [check(case, options.device) for name in options.groups or GROUPS for case in cases_of(name)]
    if not all(right):
        sys.exit(f"{right.count(False)} of {len(right)} cases WRONG")
    print(f"{len(right)} cases ok")


if __name__ == "__main__":
    main()

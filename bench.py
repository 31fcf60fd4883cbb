"""Measure nanoinfer, beside other engines and beside what the hardware can do.

    python bench.py throughput                          # 256 requests of 100-1024 tokens in and out, the demo model
    python bench.py throughput --model Qwen/Qwen2.5-0.5B-Instruct --engine nanoinfer,hf,vllm,sglang
    python bench.py throughput --sampling '{"top_k": 50, "logprobs": 5}'   # with these options for every request
    python bench.py latency --config qwen2-0.5b --batch 1 8 32 --context 128 1024 --plot latency.png
    python bench.py startup --model ./my-model --engine nanoinfer,hf
    python bench.py ops --shapes qwen2-7b
    python bench.py attention --shapes qwen2-0.5b qwen2-7b      # attention alone: decode, prompts, chunks of prompts
    python bench.py mixed --config qwen2-0.5b --batch 32 256    # decodes and a prompt's chunk in one step, and apart
    python bench.py profile --config qwen2-0.5b --batch 1 256 --plot step.png   # a decode step, kernel by kernel

Prints the hardware, a table, and as the last line one JSON object with all figures. `--config` needs no download: a
real model's shape with random weights. Of several engines each runs in a process of its own.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial

import torch

from nanoinfer.bench import attention, latency, mixed, ops, plot, plot_profile, profile, report, startup, throughput
from nanoinfer.bench.compare import Measured, Row, measure_engines
from nanoinfer.bench.cost import ModelCost
from nanoinfer.bench.engines import ENGINES, TAKE_SAMPLING
from nanoinfer.bench.machine import measure_limits
from nanoinfer.bench.target import SHAPES, Target, open_target
from nanoinfer.bench.workload import random_workload

OPTIONS = ("max_num_seqs", "max_model_len", "max_num_batched_tokens", "block_size", "enforce_eager",
           "enable_prefix_caching")  # fmt: skip


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    # Options are replaced by their names where each engine runs in a process of its own, so no name is shortened.
    add_command = partial(commands.add_parser, allow_abbrev=False)
    machine, model = _machine_options(), _model_options()
    engines = _engine_options(model)
    command = add_command("throughput", parents=[machine, engines], help="tokens/s of a mixed workload")
    command.add_argument("--num-requests", type=_positive, default=256)
    command.add_argument(
        "--input-len", type=_positive, nargs=2, metavar=("MIN", "MAX"), default=[100, 1024], help="tokens of a prompt"
    )
    command.add_argument(
        "--output-len", type=_positive, nargs=2, metavar=("MIN", "MAX"), default=[100, 1024], help="tokens to generate"
    )
    command.add_argument("--temperature", type=float, default=0.6)
    command.add_argument(
        "--sampling", type=_json_object, default={}, metavar="JSON",
        help="further options of SamplingParams for all requests, such as '{\"top_k\": 50, \"logprobs\": 5}'",
    )  # fmt: skip
    command = add_command("latency", parents=[machine, engines], help="decode and prefill of equal requests")
    command.add_argument("--batch", type=_positive, nargs="+", default=[1, 8, 32])
    command.add_argument("--context", type=_positive, nargs="+", default=[128], help="prompt tokens of each request")
    command.add_argument("--output-len", type=_positive, default=32, help="at least 2")
    command.add_argument("--repeats", type=_positive, default=3, help="the median counts")
    command = add_command("startup", parents=[machine, engines], help="seconds to the first token")
    command.add_argument("--runs", type=_positive, default=3, help="of each engine, each in a fresh process")
    command = add_command("ops", parents=[machine], help="each op alone")
    command.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen2-0.5b"])
    command.add_argument("--batch", type=_positive, nargs="+", default=[1, 8], help="of the decode steps")
    command.add_argument("--context", type=_positive, default=1024, help="of decode steps; length of the prefill")
    command.add_argument("--repeats", type=_positive, default=10, help="the median counts")
    command = add_command("attention", parents=[machine], help="attention alone, in a chain of layers")
    command.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen2-0.5b"])
    command.add_argument("--repeats", type=_positive, default=10, help="the median counts")
    command = add_command("mixed", parents=[machine, model], help="decodes and a prompt's chunk in one step")
    command.add_argument("--batch", type=_positive, nargs="+", default=[32], help="decodes")
    command.add_argument("--context", type=_positive, default=512, help="prompt tokens of each decoding request")
    command.add_argument("--chunk", type=_positive, default=2048, help="tokens of the prompt in each step")
    command = add_command("profile", parents=[machine, model], help="a decode step on a GPU, kernel by kernel")
    command.add_argument("--batch", type=_positive, nargs="+", default=[1, 256])
    command.add_argument("--context", type=_positive, default=128, help="prompt tokens of each request")
    args = parser.parse_args(argv)
    args.engine = getattr(args, "engine", None) or ["nanoinfer"]
    if args.command == "latency" and args.output_len < 2:
        parser.error("--output-len must be at least 2: a decode step follows the prefill's token")
    if args.command == "throughput" and args.sampling and (others := set(args.engine) - set(TAKE_SAMPLING)):
        parser.error(f"--sampling is for {' and '.join(TAKE_SAMPLING)}, not for {', '.join(sorted(others))}")
    for name in ("input_len", "output_len") if args.command == "throughput" else ():
        low, high = getattr(args, name)
        if low > high:
            parser.error(f"--{name.replace('_', '-')}: MIN is {low}, MAX is {high}")
    return args


def _machine_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto")
    options.add_argument("--seed", type=int, default=0, help="of the requests")
    options.add_argument("--plot", metavar="FILE.png", help="draw the result (needs matplotlib)")
    return options


def _model_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    model = options.add_mutually_exclusive_group()
    model.add_argument("--model", help="a folder, or a name on the Hugging Face hub; default: the bundled demo model")
    model.add_argument("--config", choices=SHAPES, help="a Qwen2.5 model's shape with random weights")
    return options


def _engine_options(model: argparse.ArgumentParser) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, parents=[model])
    options.add_argument("--engine", type=_engines, action="extend", metavar="NAME", help=", ".join(ENGINES))
    passed = options.add_argument_group(
        "engine options", "each engine's own default unless given; hf has only --max-num-seqs, its batch size (64)"
    )
    for name in ("--max-num-seqs", "--max-model-len", "--max-num-batched-tokens", "--block-size"):
        passed.add_argument(name, type=_positive)
    passed.add_argument("--enforce-eager", action="store_true", default=None)
    passed.add_argument(
        "--no-prefix-caching", dest="enable_prefix_caching", action="store_false", default=None,
        help="always so for latency; for the others it makes no difference, random prompts share no prefix",
    )  # fmt: skip
    return options


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


def _engines(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in ENGINES]:
        raise argparse.ArgumentTypeError(f"unknown engine {unknown[0]!r}; there are {', '.join(ENGINES)}")
    return names


def run_throughput(args: argparse.Namespace, command: Sequence[str]) -> None:
    with _target(args) as target:
        config = target.model_config()
        workload = random_workload(
            args.num_requests, args.input_len, args.output_len, vocab_size=config.vocab_size,
            temperature=args.temperature, seed=args.seed, sampling=args.sampling,
        )  # fmt: skip
        measured = measure_engines(
            args.engine, target, command, throughput.Throughput,
            lambda name: [throughput.measure(name, target, _options(args), workload, config.vocab_size)],
        )  # fmt: skip
        cost = ModelCost.of(config, target.torch_dtype())
    best = workload.num_output_tokens / cost.workload_seconds(workload, measured.limits)
    what = (f"{args.num_requests} requests, {workload.num_prompt_tokens:,} prompt and "
            f"{workload.num_output_tokens:,} output tokens, temperature {args.temperature}"
            + "".join(f", {name} {value}" for name, value in args.sampling.items()))  # fmt: skip
    title = _show(target, what, measured, cost, throughput.table(measured.rows, best))
    if args.plot:
        plot.plot_throughput(args.plot, title, measured.rows, best)
    _print_json(args, target, what, measured, cost, limit={"output_tokens_per_s": best})


def run_latency(args: argparse.Namespace, command: Sequence[str]) -> None:
    sweep = latency.Sweep(args.batch, args.context, args.output_len, args.repeats, args.seed)
    # The largest batch runs at once, in Hugging Face's generate too.
    options = {"max_num_seqs": max(args.batch)} | _options(args) | {"enable_prefix_caching": False}
    with _target(args) as target:
        config = target.model_config()
        measured = measure_engines(
            args.engine, target, command, latency.Latency,
            lambda name: latency.measure(name, target, options, sweep, config.vocab_size),
        )  # fmt: skip
        cost = ModelCost.of(config, target.torch_dtype())
    floors = latency.floors(sweep, cost, measured.limits)
    what = f"{args.output_len} output tokens, greedy"
    title = _show(target, what, measured, cost, latency.table(measured.rows, floors))
    if args.plot:
        plot.plot_latency(args.plot, title, measured.rows, floors)
    _print_json(args, target, what, measured, cost, limit=[asdict(floor) for floor in floors])


def run_startup(args: argparse.Namespace, command: Sequence[str]) -> None:
    with _target(args) as target:
        measured = measure_engines(
            args.engine, target, command, startup.Startup,
            lambda name: startup.measure(name, target, _options(args), args.runs),
        )  # fmt: skip
        cost = ModelCost.of(target.model_config(), target.torch_dtype())
    what = f"a fresh process, {'random weights' if target.dummy else 'weights from disk'}, 1 token; {args.runs} runs"
    title = _show(target, what, measured, cost, startup.table(measured.rows))
    if args.plot:
        plot.plot_startup(args.plot, title, measured.rows)
    _print_json(args, target, what, measured, cost)


def run_ops(args: argparse.Namespace, command: Sequence[str]) -> None:
    steps = {f"decode {batch}": (batch, 1) for batch in args.batch} | {"prefill": (1, args.context)}

    def measure(device: torch.device, dtype: torch.dtype) -> list[ops.OpTime]:
        rows = []
        for name, (batch, length) in steps.items():
            step = ops.make_step(batch, length, args.context, device)
            for shape in args.shapes:
                rows += ops.measure(shape, step, name, device, dtype, args.repeats)
        return rows

    _run_op_times(args, f"{args.context} tokens of context", measure)


def run_attention(args: argparse.Namespace, command: Sequence[str]) -> None:
    def measure(device: torch.device, dtype: torch.dtype) -> list[ops.OpTime]:
        return [row for shape in args.shapes for row in attention.measure(shape, device, dtype, args.repeats)]

    _run_op_times(args, "a layer in a chain of layers", measure)


def _run_op_times(
    args: argparse.Namespace, what: str, measure: Callable[[torch.device, torch.dtype], list[ops.OpTime]]
) -> None:
    with open_target(None, args.shapes[0], args.device, args.dtype) as target:
        device, dtype = torch.device(target.device), target.torch_dtype()
    limits = measure_limits(target.device, dtype)
    rows = measure(device, dtype)
    limits = limits.best(measure_limits(target.device, dtype))  # shares are of the best seen before and after
    what = f"{target.dtype}, {what}"
    lines = [report.hardware(target.device), what, report.describe(limits, target.dtype)]
    print("\n".join(lines), report.table(ops.table(rows, limits)), sep="\n\n", end="\n\n")
    if args.plot:
        plot.plot_ops(args.plot, "\n".join(lines), rows, limits)
    print(json.dumps({
        "command": args.command, "hardware": lines[0], "workload": what, "dtype": target.dtype,
        "machine": asdict(limits),
        "results": [asdict(row) | {"share_of_limit": row.share_of(limits)} for row in rows],
    }))  # fmt: skip


def run_mixed(args: argparse.Namespace, command: Sequence[str]) -> None:
    with _target(args) as target:
        rows = [mixed.measure(target, batch, args.context, args.chunk) for batch in args.batch]
    title = f"{report.hardware(target.device)}\n{target.name}, {target.dtype}"
    print(title, report.table(mixed.table(rows)), sep="\n\n", end="\n\n")
    print(json.dumps({"command": "mixed", "hardware": report.hardware(target.device), "model": target.name,
                      "dtype": target.dtype, "results": [asdict(row) for row in rows]}))  # fmt: skip


def run_profile(args: argparse.Namespace, command: Sequence[str]) -> None:
    with _target(args) as target:
        profiles = [profile.measure(target, {}, batch, args.context) for batch in args.batch]
    title = f"{report.hardware(target.device)}\n{target.name}, {target.dtype}, a decode step"
    print(title, report.table(profile.table(profiles)), sep="\n\n", end="\n\n")
    if args.plot:
        plot_profile.plot_profile(args.plot, title, profiles)
    results = [
        {"batch": p.batch, "context": p.context, "step_us": p.plain_us, "profiled_us": p.step_us, "us": p.costs()}
        for p in profiles
    ]
    print(json.dumps({"command": "profile", "hardware": report.hardware(target.device), "model": target.name,
                      "dtype": target.dtype, "results": results}))  # fmt: skip


def _target(args: argparse.Namespace) -> AbstractContextManager[Target]:
    return open_target(args.model, args.config, args.device, args.dtype)


def _options(args: argparse.Namespace) -> dict[str, object]:
    """The engine options that were given, by nanoinfer's names."""
    return {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}


def _show(target: Target, what: str, measured: Measured[Row], cost: ModelCost, rows: list[list[str]]) -> str:
    """Print what was measured, and return its head, for a figure's title."""
    head = "\n".join([
        report.hardware(target.device),
        f"{target.name}, {target.dtype}, {cost.total_bytes / 1e6:,.0f} MB of weights; {what}",
        report.describe(measured.limits, target.dtype),
    ])  # fmt: skip
    print(head, report.table(rows), sep="\n\n", end="\n\n")
    return head


def _print_json(
    args: argparse.Namespace, target: Target, what: str, measured: Measured[Row], cost: ModelCost, limit: object = None
) -> None:
    print(json.dumps({
        "command": args.command, "hardware": report.hardware(target.device), "workload": what,
        "model": target.name, "dtype": target.dtype, "weight_bytes": cost.total_bytes,
        "machine": asdict(measured.limits), "limit": limit, "results": [asdict(row) for row in measured.rows],
        "skipped": measured.skipped, "failed": measured.failed,
    }))  # fmt: skip


RUN = {"throughput": run_throughput, "latency": run_latency, "startup": run_startup, "ops": run_ops,
       "attention": run_attention, "mixed": run_mixed, "profile": run_profile}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nanoinfer").setLevel(logging.INFO)
    if args.plot:
        plot.check_matplotlib()
    RUN[args.command](args, [__file__, *argv])


if __name__ == "__main__":
    main()

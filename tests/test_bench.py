"""bench.py: the workload it claims, the same requests for every engine, figures that follow from what was timed."""

import importlib.util
import json
import sys
from itertools import cycle
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fake_engines import FakeSGLang, FakeVLLM
from helpers import save_checkpoint

import nanoinfer.ops
from nanoinfer import LLM, SamplingParams
from nanoinfer.bench import compare, engines, latency, machine, ops, plot, target
from nanoinfer.bench.cost import ModelCost
from nanoinfer.bench.engines import ENGINES
from nanoinfer.bench.machine import Limits
from nanoinfer.bench.target import Target, open_target
from nanoinfer.bench.throughput import Throughput
from nanoinfer.bench.workload import Workload, equal_workload, random_workload

ROOT = Path(__file__).parent.parent
VOCAB = 199


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = load_script("bench")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_checkpoint(path)
    return path


@pytest.fixture
def quick(monkeypatch) -> None:
    """Measure the machine's limits with little work."""
    monkeypatch.setitem(machine.READ_BYTES, "cpu", 2**20)
    monkeypatch.setitem(machine.MATMUL_SIZE, "cpu", 64)


def tiny_target(folder: Path) -> Target:
    return Target("tiny", str(folder), False, "cpu", "float32")


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_default_workload_is_nano_vllms() -> None:
    """Figures are comparable with published ones only for the same requests: their totals are known exactly."""
    args = bench.parse(["throughput"])
    workload = random_workload(
        args.num_requests, args.input_len, args.output_len, vocab_size=151_936, temperature=0.6, seed=args.seed
    )
    assert (workload.num_prompt_tokens, workload.num_output_tokens) == (142_827, 133_966)
    assert max(workload.output_lens) == 1024
    assert max(p + o for p, o in zip(map(len, workload.prompts), workload.output_lens, strict=True)) == 2011


def test_a_small_vocabulary_folds_the_ids_and_keeps_the_lengths() -> None:
    """The demo model's 4096 ids must not change how many tokens are measured."""
    large, small = (random_workload(9, (5, 50), (5, 50), vocab_size=v, temperature=0.6, seed=3) for v in (151_936, 64))
    assert [[i % 64 for i in prompt] for prompt in large.prompts] == small.prompts
    assert large.output_lens == small.output_lens


@pytest.mark.parametrize(
    ("shape", "batch1_ms", "ideal"),
    [("qwen2-0.5b", 0.232, 213_500), ("qwen2-1.5b", 0.726, 75_800), ("qwen2-7b", 3.33, 21_060)],
)
def test_costs_agree_with_a_derivation_by_hand(shape: str, batch1_ms: float, ideal: float) -> None:
    """The limits of an H200, worked out on paper: batch-1 steps at 4.25 TB/s, the workload at 4.8 TB/s, 989 TFLOP/s."""
    with open_target(None, shape, "cpu", "auto") as made:
        cost = ModelCost.of(made.model_config(), made.torch_dtype())
    workload = random_workload(256, (100, 1024), (100, 1024), vocab_size=151_936, temperature=0.6, seed=0)
    assert 1e3 * cost.decode_seconds(1, 1, Limits(4250, 793)) == pytest.approx(batch1_ms, rel=0.005)
    best = workload.num_output_tokens / cost.workload_seconds(workload, Limits(4800, 989))
    assert best == pytest.approx(ideal, rel=0.001)


def test_costs_count_every_weight_once(tmp_path: Path) -> None:
    """Bytes are those of Hugging Face's model; a step reads all of them but an embedding that is not lm_head too."""
    for tied in (True, False):
        model = save_checkpoint(tmp_path / str(tied), tie_word_embeddings=tied)
        cost = ModelCost.of(tiny_target(tmp_path / str(tied)).model_config(), torch.float32)
        assert cost.total_bytes == sum(parameter.numel() for parameter in model.parameters()) * 4
        embedding = 0 if tied else model.get_input_embeddings().weight.numel() * 4
        assert cost.step_bytes == cost.total_bytes - embedding


def test_workload_seconds_sums_the_steps(folder: Path) -> None:
    """With free arithmetic the time is that of the bytes: the weights once a step, each context once."""
    cost = ModelCost.of(tiny_target(folder).model_config(), torch.float32)
    seconds = cost.workload_seconds(Workload([[0] * 5, [0] * 9], [3, 2], 0.0), Limits(1e-9, 1e30))
    assert seconds == pytest.approx(3 * cost.step_bytes + cost.kv_bytes * (6 + 10 + 7))


def test_throughput_reports_what_it_ran(folder: Path, quick, capsys) -> None:
    """Lengths come from the options; the last line is JSON with every figure."""
    bench.main([
        "throughput", "--model", str(folder), "--num-requests", "5", "--input-len", "3", "9", "--output-len", "2", "6",
        "--device", "cpu", "--max-num-seqs", "4",
    ])  # fmt: skip
    report = last_line(capsys)
    (row,) = report["results"]
    workload = random_workload(5, (3, 9), (2, 6), vocab_size=VOCAB, temperature=0.6, seed=0)
    assert row["output_tokens_per_s"] * row["seconds"] == pytest.approx(workload.num_output_tokens)
    total = workload.num_prompt_tokens + workload.num_output_tokens
    assert row["total_tokens_per_s"] * row["seconds"] == pytest.approx(total)
    assert row["requests_per_s"] * row["seconds"] == pytest.approx(5)
    assert row["engine"] == "nanoinfer" and row["peak_rss_bytes"] > 2**20
    assert report["limit"]["output_tokens_per_s"] > 0 and report["machine"]["read_gb_per_s"] > 0
    assert report["skipped"] == report["failed"] == []


def test_sampling_options_reach_every_request(folder: Path, quick, capsys, monkeypatch) -> None:
    """As SamplingParams has them, in the warm-up as well; the report says so."""
    made, generate = [], LLM.generate

    def recorded(llm: LLM, prompts: object, params: list[SamplingParams], **options: object) -> object:
        made.extend(params)
        return generate(llm, prompts, params, **options)

    monkeypatch.setattr(LLM, "generate", recorded)
    sampling = {"top_k": 5, "logprobs": 2, "presence_penalty": 0.5}
    bench.main([
        "throughput", "--model", str(folder), "--num-requests", "5", "--input-len", "3", "9", "--output-len", "2", "6",
        "--device", "cpu", "--sampling", json.dumps(sampling),
    ])  # fmt: skip
    assert len(made) == 8 + 5
    assert all((each.top_k, each.logprobs, each.presence_penalty) == (5, 2, 0.5) for each in made)
    assert "top_k 5, logprobs 2" in last_line(capsys)["workload"]


def test_latency_reports_every_point_beside_its_floor(folder: Path, quick, capsys) -> None:
    """One row for each batch size and context."""
    bench.main([
        "latency", "--model", str(folder), "--batch", "1", "3", "--context", "4", "20", "--output-len", "3",
        "--repeats", "1", "--device", "cpu",
    ])  # fmt: skip
    report = last_line(capsys)
    points = [(1, 4), (3, 4), (1, 20), (3, 20)]
    for rows in (report["results"], report["limit"]):
        assert [(row["batch"], row["context"]) for row in rows] == points
    assert all(row["prefill_tokens_per_s"] > 0 for row in report["results"])
    assert all(floor["decode_ms"] > 0 for floor in report["limit"])


def test_latency_separates_decode_from_prefill(monkeypatch) -> None:
    """With a prefill of 2 s and steps of 0.25 s, that is what must come out."""
    durations = cycle([2.0, 2.0 + 7 * 0.25])
    monkeypatch.setattr(latency, "timed", lambda call, device: next(durations))
    monkeypatch.setattr(latency, "run", lambda engine, workload: None)
    sweep = latency.Sweep([4], [10], output_len=8, repeats=3, seed=0)
    row = latency._measure_point("hf", SimpleNamespace(version="1"), "cpu", 4, 10, sweep, VOCAB)
    assert (row.prefill_ms, row.decode_ms) == (2000.0, 250.0)
    assert (row.prefill_tokens_per_s, row.decode_tokens_per_s) == (20.0, 16.0)


def test_startup_times_a_fresh_process(folder: Path, quick, capsys) -> None:
    """The phases are those of one process, from its start to its first token, and nothing between is lost."""
    bench.main(["startup", "--model", str(folder), "--runs", "1", "--device", "cpu", "--block-size", "8"])
    (row,) = last_line(capsys)["results"]
    phases = [row[name] for name in plot.PHASES]
    assert all(seconds > 0 for seconds in phases)
    assert sum(phases) == pytest.approx(row["total_s"])
    assert row["import_s"] > 0.2, "torch was imported before the clock for imports started"


@pytest.fixture
def tiny_ops(quick, monkeypatch) -> None:
    monkeypatch.setitem(target.SHAPES, "tiny", (128, 96, 2, 4, 2, 211, True))
    monkeypatch.setattr(ops, "flush_bytes", lambda device: 2**16)


def test_ops_measures_every_op(tiny_ops, capsys) -> None:
    """An op without a case would be an op whose slowness nobody sees."""
    bench.main(["ops", "--shapes", "tiny", "--batch", "1", "20", "--context", "40", "--repeats", "2", "--dtype",
                "bfloat16", "--device", "cpu"])  # fmt: skip
    report = last_line(capsys)
    rows, read, flops = report["results"], report["machine"]["read_gb_per_s"], report["machine"]["tflop_per_s"]
    for_gpus = {"thin_gated_linear", "thin_qkv", "tile_linear", "tall_gated_linear"}
    assert {row["op"].split()[0] for row in rows} == nanoinfer.ops.SCHEMAS.keys() - for_gpus | {"linear"}
    assert {row["step"] for row in rows} == {"decode 1", "decode 20", "prefill"}
    assert all(row["microseconds"] > 0 for row in rows)
    assert ("decode 1", "thin_linear gate_up, silu") in {(row["step"], row["op"]) for row in rows}
    (down,) = (row for row in rows if (row["step"], row["op"]) == ("decode 1", "thin_linear down"))
    assert down["gb_per_s"] * down["microseconds"] == pytest.approx((96 * 128 + 96 + 128) * 2 / 1e3)
    assert down["tflop_per_s"] * down["microseconds"] == pytest.approx(2 * 96 * 128 / 1e6)
    assert down["share_of_limit"] == pytest.approx(max(down["gb_per_s"] / read, down["tflop_per_s"] / flops))


def test_ops_name_what_a_wide_product_takes(monkeypatch) -> None:
    """Of float sums thin_linear, where for others the table says that it ends at fewer rows."""
    monkeypatch.setattr(nanoinfer.ops, "_has_tiles", lambda device: True)
    monkeypatch.setitem(nanoinfer.ops.THIN_UP_TO, (211, 128, False), 8)
    x, weight = torch.ones(9, 128).bfloat16(), torch.ones(211, 128).bfloat16()
    assert [ops._product(x, weight, gated=False, wide=wide) for wide in (True, False)] == ["thin_linear", "linear"]


@pytest.mark.parametrize(("rows", "length"), [(3, 1), (1, 40)])
def test_ops_run_on_a_true_step(tiny_ops, rows: int, length: int) -> None:
    """The step is one that the engine could send: full tables, the right positions, rows that sample."""
    step = ops.make_step(rows, length, 40, torch.device("cpu"))
    assert step.batch.positions.tolist() == list(range(40 - length, 40)) * rows
    assert step.batch.kv_lens.tolist() == [40] * rows
    used = step.batch.block_tables[:rows].flatten().tolist()
    assert sorted(used) == list(range(len(used)))
    assert all(slot >= 0 for slot in step.batch.slots.tolist())
    for case in ops.cases("tiny", step, torch.device("cpu"), torch.float32):
        result = case.call()
        assert result is None or bool(torch.isfinite(result).all()), case.op


def test_engines_agree_on_the_tokens(folder: Path) -> None:
    """Hugging Face in padded batches and nanoinfer must serve the same requests: greedy, they answer the same."""
    workload = random_workload(5, (3, 30), (2, 9), vocab_size=VOCAB, temperature=0.0, seed=1)
    results = []
    for name in ("nanoinfer", "hf"):
        engine = ENGINES[name](tiny_target(folder), {"max_num_seqs": 2})
        results.append(engine.generate(workload))
        engines.run(engine, workload)
        engine.close()
    assert results[0] == results[1]
    assert [len(tokens) for tokens in results[0]] == workload.output_lens


def test_random_weights_serve_both_engines(tmp_path: Path) -> None:
    """--config needs config.json alone; engines of random weights still give every token asked for."""
    values = target.config_json("qwen2-0.5b", "float32") | {"num_hidden_layers": 1, "vocab_size": 128}
    values |= {"intermediate_size": 128, "max_position_embeddings": 256, "eos_token_id": list(range(0, 128, 2))}
    (tmp_path / "config.json").write_text(json.dumps(values))
    dummy = Target("random", str(tmp_path), True, "cpu", "float32")
    for name in ("nanoinfer", "hf"):
        engine = ENGINES[name](dummy, {})
        workload = random_workload(3, (3, 9), (4, 9), vocab_size=128, temperature=0.6, seed=0)
        assert [len(tokens) for tokens in engine.generate(workload)] == workload.output_lens
        engine.close()


@pytest.mark.parametrize("fake", [FakeVLLM, FakeSGLang])
def test_other_engines_get_the_same_requests(folder: Path, quick, monkeypatch, capsys, fake: type) -> None:
    """A comparison is one of the same token ids, lengths and temperature, through the whole command."""
    module = fake()
    name = module.__name__
    monkeypatch.setitem(sys.modules, name, module)
    bench.main(["throughput", "--model", str(folder), "--engine", name, "--num-requests", "4", "--input-len", "3", "9",
                "--output-len", "2", "6", "--device", "cpu", "--max-num-seqs", "3"])  # fmt: skip
    workload = random_workload(4, (3, 9), (2, 6), vocab_size=VOCAB, temperature=0.6, seed=0)
    assert module.seen == [(ids, n, 0.6) for ids, n in zip(workload.prompts, workload.output_lens, strict=True)]
    assert last_line(capsys)["results"][0]["version"] == "9.9"


def test_options_reach_other_engines_by_their_names(folder: Path, monkeypatch) -> None:
    """A limit that only one engine heard of would compare two things."""
    given = {"max_num_seqs": 3, "max_model_len": 99, "max_num_batched_tokens": 64, "block_size": 8,
             "enforce_eager": True, "enable_prefix_caching": False}  # fmt: skip
    for module in (FakeVLLM(), FakeSGLang()):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        engine = ENGINES[module.__name__](tiny_target(folder), given)
        if module.__name__ == "vllm":
            assert given.items() <= module.options.items()
            assert (module.options["model"], module.options["load_format"]) == (str(folder), "auto")
        else:
            renamed = {"max_running_requests": 3, "context_length": 99, "chunked_prefill_size": 64, "page_size": 8,
                       "disable_cuda_graph": True, "disable_radix_cache": True}  # fmt: skip
            assert renamed.items() <= module.options.items()
            assert (module.options["model_path"], module.options["load_format"]) == (str(folder), "auto")
        engine.close()
    assert sys.modules["sglang"].stopped


def test_a_run_of_another_length_is_refused() -> None:
    """An engine that stopped early would look fast."""
    engine = SimpleNamespace(generate=lambda workload: [[1] * 3, [1] * 2])
    with pytest.raises(RuntimeError, match="request 1 got 2 tokens instead of 3"):
        engines.run(engine, equal_workload(2, 4, 3, vocab_size=VOCAB, seed=0))


CHILD = """
import json, sys
assert sys.argv[1:4] == ["throughput", "--seed", "7"] and "--plot" not in sys.argv and "nanoinfer,hf" not in sys.argv
engine = sys.argv[sys.argv.index("--engine") + 1]
assert engine != "hf", "hf is to fail here"
row = dict(engine=engine, version="1", seconds=1.0, requests_per_s=1.0, total_tokens_per_s=1.0,
           output_tokens_per_s=1.0, peak_rss_bytes=1, peak_cuda_bytes=None)
speeds = {"nanoinfer": (10.0, 0.5), "vllm": (8.0, 0.7)}[engine]
print("a table")
print(json.dumps({"results": [row], "machine": dict(read_gb_per_s=speeds[0], tflop_per_s=speeds[1])}))
print("a worker ends")
"""


def test_several_engines_run_in_their_own_processes(tmp_path: Path, monkeypatch, capfd) -> None:
    """Each engine alone with the same arguments; the best limits count; one that fails is named and costs no other."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setattr(compare, "is_installed", lambda name: name != "sglang")
    command = [str(script), "throughput", "--seed", "7", "--plot", "x.png", "--engine", "nanoinfer,hf"]
    wanted = ["nanoinfer", "hf", "vllm", "sglang", "hf"]
    measured = compare.measure_engines(wanted, tiny_target(tmp_path), command, Throughput, lambda name: [])
    assert [row.engine for row in measured.rows] == ["nanoinfer", "vllm"]
    assert measured.limits == Limits(10.0, 0.7)
    assert (measured.skipped, measured.failed) == (["sglang"], ["hf"])
    errors = capfd.readouterr().err
    assert "sglang is not installed: skipped" in errors and "hf is to fail here" in errors
    assert errors.index("nanoinfer: [{'engine'") < errors.index("measuring hf")  # nothing is lost if a later one hangs


def test_nothing_to_measure_is_an_error(monkeypatch, folder: Path) -> None:
    """Not an empty table."""
    monkeypatch.setattr(compare, "is_installed", lambda name: False)
    with pytest.raises(SystemExit, match="no engine could be measured"):
        bench.main(["throughput", "--model", str(folder), "--engine", "vllm"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["throughput", "--engine", "vlm"], "unknown engine 'vlm'"),
        (["latency", "--output-len", "1"], "at least 2"),
        (["latency", "--batch", "0"], "at least 1, got 0"),
        (["throughput", "--input-len", "9", "3"], "MIN is 9, MAX is 3"),
        (["ops", "--shapes", "gpt2"], "invalid choice"),
        (["throughput", "--sampling", "top_k=5"], "must be JSON"),
        (["throughput", "--sampling", "[5]"], "must be a JSON object, got [5]"),
        (["throughput", "--sampling", '{"top_k": 5}', "--engine", "hf,vllm"], "--sampling is for nanoinfer and vllm"),
        (["throughput", "--eng", "nanoinfer,hf"], "unrecognized arguments: --eng"),  # each child would start its own
    ],
)
def test_wrong_arguments_are_refused(argv: list[str], message: str, capsys) -> None:
    """Before anything is loaded, with the reason."""
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["throughput", "latency", "ops"])
def test_plots_are_drawn(command: str, folder: Path, tiny_ops, tmp_path: Path) -> None:
    """--plot writes a figure of a size one can read."""
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    few = {
        "throughput": [
            "--model",
            str(folder),
            "--num-requests",
            "2",
            "--input-len",
            "3",
            "9",
            "--output-len",
            "2",
            "6",
        ],
        "latency": ["--model", str(folder), "--batch", "1", "--context", "4", "--output-len", "2", "--repeats", "1"],
        "ops": ["--shapes", "tiny", "--batch", "1", "--context", "16", "--repeats", "1", "--dtype", "float32"],
    }
    bench.main([command, *few[command], "--device", "cpu", "--plot", str(tmp_path / "figure.png")])
    height, width, _ = imread(tmp_path / "figure.png").shape
    assert height > 250 and width > 600


def test_a_startup_plot_is_drawn(tmp_path: Path) -> None:
    """The phases of two engines, without starting them."""
    pytest.importorskip("matplotlib")
    from nanoinfer.bench.startup import Startup

    rows = [Startup(name, "1", 0.1, 1.0, 0.5, 0.2, 1.8) for name in ("nanoinfer", "hf")]
    plot.plot_startup(str(tmp_path / "figure.png"), "title", rows)
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_missing_matplotlib_is_said_first(monkeypatch) -> None:
    """Before an hour of measuring."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"pip install 'nanoinfer\[plot\]'"):
        bench.main(["throughput", "--plot", "figure.png", "--model", "/nowhere"])


def test_a_failed_request_says_why(folder: Path, monkeypatch) -> None:
    """The engine's own reason, not only that tokens are missing."""
    engine = ENGINES["nanoinfer"](tiny_target(folder), {})

    def broken(batch, kv):
        raise RuntimeError("the model is broken")

    monkeypatch.setattr(engine.llm.llm_engine.runner, "model", broken)
    with pytest.raises(RuntimeError, match=r"2 of 2 requests failed: .*the model is broken"):
        engines.run(engine, equal_workload(2, 4, 3, vocab_size=VOCAB, seed=0))
    engine.close()

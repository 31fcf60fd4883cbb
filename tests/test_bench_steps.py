"""bench.py attention and mixed: what is timed is what the table says, and the figures follow from it."""

import json
from contextlib import closing
from itertools import cycle
from pathlib import Path

import pytest
import torch
from helpers import save_checkpoint
from test_bench import bench

from nanoinfer.bench import attention, machine, mixed, target
from nanoinfer.bench.decoding import begin_to_decode, open_engine
from nanoinfer.bench.target import Target


@pytest.fixture
def tiny(monkeypatch) -> None:
    monkeypatch.setitem(machine.READ_BYTES, "cpu", 2**20)
    monkeypatch.setitem(machine.MATMUL_SIZE, "cpu", 64)
    monkeypatch.setitem(target.SHAPES, "tiny", (128, 96, 2, 4, 2, 211, True))
    monkeypatch.setattr(attention, "CHAIN_BYTES", 1.0)
    cases = {"decode": attention._decodes(40, 7), "last 20 of 50": attention.Chunks([20], [50])}
    monkeypatch.setattr(attention, "CASES", cases)


def test_attention_counts_what_every_case_moves_and_computes(tiny, capsys) -> None:
    """K, V, queries and results once; four operations for each query head, its numbers, and a key it sees."""
    bench.main(["attention", "--shapes", "tiny", "--repeats", "2", "--dtype", "float32", "--device", "cpu"])
    rows = {row["step"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["results"]}
    kept = 2 * 2 * 32 * 4  # K and V of a position, bytes
    moved = {"decode": 47 * kept + 2 * 2 * 128 * 4, "last 20 of 50": 50 * kept + 2 * 20 * 128 * 4}
    seen = {"decode": 47, "last 20 of 50": sum(range(31, 51))}
    for case, row in rows.items():
        assert row["gb_per_s"] * row["microseconds"] == pytest.approx(moved[case] / 1e3)
        assert row["tflop_per_s"] * row["microseconds"] == pytest.approx(4 * 128 * seen[case] / 1e6)
    assert rows.keys() == moved.keys()


def test_attention_is_timed_by_the_layer(tiny, monkeypatch) -> None:
    """However many chains of layers are timed at once: here each layer takes 3 us by the clock."""
    calls = []
    monkeypatch.setattr(attention.ops, "paged_attention", lambda *args, **options: calls.append(1))
    for replays in (1, 5):
        monkeypatch.setitem(attention.REPLAYS, "cpu", replays)

        def clock(call, device) -> float:
            calls.clear()
            call()
            return 3e-6 * len(calls)

        monkeypatch.setattr(attention, "timed", clock)
        for time in attention.measure("tiny", torch.device("cpu"), torch.float32, 2):
            assert time.microseconds == pytest.approx(3)
            assert len(calls) == replays * attention.CHAIN_LAYERS[0]


def test_tables_of_attention_are_an_engines() -> None:
    """Every sequence has blocks of its own for all of its positions, in a table as wide as an engine's."""
    chunks = attention.Chunks([1, 3], [17, 40])
    (q_starts, kv_lens, rows, block_tables), count = attention._tables(chunks, torch.device("cpu"))
    assert (q_starts.tolist(), kv_lens.tolist(), rows.tolist(), count) == ([0, 1, 4], [17, 40], [0, 1], 5)
    assert sorted(block_tables[0, :2].tolist() + block_tables[1, :3].tolist()) == list(range(5))
    assert block_tables.shape == (3, attention.TABLE_WIDTH)


def test_every_case_of_attention_is_one_of_an_engine() -> None:
    """Chunks are no longer than their sequences, and mixed lengths are spread over the range that they name."""
    for chunks in attention.CASES.values():
        assert all(0 < q <= kv for q, kv in zip(chunks.q_lens, chunks.kv_lens, strict=True))
    lengths = attention.CASES["decode 64 x 128 to 16k"].kv_lens
    assert min(lengths) < 256 and max(lengths) > 12_000 and len(set(lengths)) > 50


def test_requests_decode_after_a_run_of_all_of_them(tmp_path: Path) -> None:
    """Which warms up what is timed then: as many steps, of the same shapes."""
    save_checkpoint(tmp_path)
    with closing(open_engine(Target("tiny", str(tmp_path), False, "cpu", "float32"), {"max_num_seqs": 3})) as engine:
        launch, sizes = engine.runner.launch, []
        engine.runner.launch = lambda step: sizes.append((step.ends - step.starts).tolist()) or launch(step)
        begin_to_decode(engine, 3, 5, 4)
        begun = [len(seq.output_tokens) for seq in engine.sequences]
        while engine.has_unfinished_requests():
            engine.step()
    run = [[5, 5, 5]] + [[1, 1, 1]] * 3
    assert sizes == run + run and begun == [1, 1, 1]


def test_mixed_steps_are_what_they_say(tmp_path: Path, monkeypatch) -> None:
    """Steps of decodes alone, of decodes and a chunk, of a chunk alone: seen where they are timed."""
    save_checkpoint(tmp_path)
    seen, durations = [], cycle([0.8, 2.4, 1.6])

    def timed(call, device: str) -> float:
        engine = call.__closure__[0].cell_contents
        launch, sizes = engine.runner.launch, []
        engine.runner.launch = lambda step: sizes.append((step.ends - step.starts).tolist()) or launch(step)
        call()
        engine.runner.launch = launch
        seen.append(sizes)
        return next(durations)

    monkeypatch.setattr(mixed, "timed", timed)
    row = mixed.measure(Target("tiny", str(tmp_path), False, "cpu", "float32"), batch=2, context=5, chunk=8)
    assert seen == [[[1, 1]] * mixed.STEPS, [[1, 1, 8]] * mixed.STEPS, [[8]] * mixed.STEPS]
    assert (row.decode_ms, row.mixed_ms, row.prefill_ms) == pytest.approx((100, 300, 200))
    assert mixed.table([row])[1][-1] == "100%"


def test_mixed_reports_every_batch(tmp_path: Path, capsys) -> None:
    save_checkpoint(tmp_path)
    bench.main(["mixed", "--model", str(tmp_path), "--device", "cpu", "--batch", "1", "3", "--context", "4",
                "--chunk", "6"])  # fmt: skip
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [(row["batch"], row["context"], row["chunk"]) for row in results] == [(1, 4, 6), (3, 4, 6)]
    assert all(min(row["decode_ms"], row["prefill_ms"], row["mixed_ms"]) > 0 for row in results)

"""The loader: every tensor of a checkpoint ends where it belongs, and whatever is wrong with one is named."""

import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers import edit_json, save_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoinfer.config import ModelConfig
from nanoinfer.errors import ModelLoadError
from nanoinfer.models import CausalLM
from nanoinfer.utils.hub import resolve_model
from nanoinfer.utils.loader import load_model, sources
from nanoinfer.utils.parallel import TP
from nanoinfer.utils.staging import pieces, staged_copy

Q = "model.layers.0.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"


def load(path: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> CausalLM:
    config = ModelConfig.from_dir(path)
    return load_model(path, config, device=torch.device(device), dtype=dtype, max_length=16, **options)


def edit(path: Path, change: Callable[[dict[str, Tensor]], object], name: str = "model.safetensors") -> None:
    """Rewrite a file of tensors after `change`."""
    tensors = {key: tensor.clone() for key, tensor in load_file(path / name).items()}
    change(tensors)
    save_file(tensors, path / name)


def shard(path: Path) -> None:
    """Replace the single file by two and an index."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name].clone() for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random untied checkpoint in one file."""
    save_checkpoint(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(folder: Path) -> Path:
    shard(folder)
    return folder


@pytest.mark.parametrize("sharding", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_every_tensor(folder: Path, sharding: bool, size: int) -> None:
    """The ranks' parts, put together, are the checkpoint's tensors bit by bit: all of them, from one file or two."""
    stored = load_file(folder / "model.safetensors")
    if sharding:
        shard(folder)
    ranks = [sources(load(folder, tp=TP(rank, size))) for rank in range(size)]
    assert {source.name for source in ranks[0]} == set(stored)
    for parts in zip(*ranks, strict=True):
        shard_dim = parts[0].shard_dim
        whole = parts[0].target if shard_dim is None else torch.cat([part.target for part in parts], dim=shard_dim)
        assert torch.equal(whole, stored[parts[0].name]), parts[0].name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slot_bytes", [100, 2**12, 2**24])
@pytest.mark.parametrize("size", [1, 2])
def test_staged(folder: Path, stored: torch.dtype, slot_bytes: int, size: int) -> None:
    """Through pinned slots, smaller than a row or larger than a tensor, come the weights that a plain copy brings."""
    edit(folder, lambda tensors: tensors.update({k: t.to(stored) for k, t in tensors.items()}))
    shard(folder)
    copy = staged_copy(torch.device("cuda"), slot_bytes)
    for rank in range(size):
        options = {"dtype": torch.bfloat16, "tp": TP(rank, size)}
        staged = sources(load(folder, device="cuda", copy=copy, **options))
        plain = sources(load(folder, **options))
        assert all(torch.equal(a.target.cpu(), b.target) for a, b in zip(staged, plain, strict=True))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of what is mapped")
def test_one_file_is_mapped_at_a_time(sharded: Path) -> None:
    """The host's memory holds one shard, not the checkpoint, while copying; and none afterwards."""

    def mapped() -> set[str]:
        return set(re.findall(rf"{sharded}/.*", Path("/proc/self/maps").read_text()))

    seen: list[set[str]] = []

    def copy(target: Tensor, source: Tensor) -> None:
        seen.append(mapped())
        target.copy_(source)

    load(sharded, copy=copy)
    assert set.union(*seen) == {str(file) for file in sharded.glob("*.safetensors")}
    assert max(map(len, seen)) == 1
    assert not mapped()


@pytest.mark.parametrize("shape", [(1,), (7,), (300,), (5, 33), (3, 129), (2, 3, 50)])
@pytest.mark.parametrize("max_bytes", [4, 100, 128, 10_000])
def test_pieces(shape: tuple[int, ...], max_bytes: int) -> None:
    """Pieces fit their slot and are the whole tensor, each element once; the source may be wider or strided."""
    source = torch.arange(2 * math.prod(shape), dtype=torch.float64).view(*shape, 2)[..., 1]
    target = torch.zeros(shape)
    for there, here in pieces(target, source, max_bytes):
        assert there.nbytes <= max_bytes
        there += here
    assert torch.equal(target, source.float())


def test_axes(folder: Path) -> None:
    """Which tensors ranks cut, and along which axis."""
    axes = {source.name.removeprefix("model.layers.0."): source.shard_dim for source in sources(load(folder))}
    columns = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert all(axes[f"{name}.weight"] == 0 for name in columns)
    assert all(axes[f"{name}.bias"] == 0 for name in columns[:3])
    assert axes["self_attn.o_proj.weight"] == axes["mlp.down_proj.weight"] == 1
    whole = ["input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight", EMBED, "lm_head.weight"]
    assert all(axes[name] is None for name in whole)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casts(folder: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    """Weights of any of the three types run in any of the three."""
    edit(folder, lambda tensors: tensors.update({k: t.to(stored) for k, t in tensors.items()}))
    expected = load_file(folder / "model.safetensors")
    for source in sources(load(folder, dtype=dtype)):
        assert torch.equal(source.target, expected[source.name].to(dtype))


def test_tied(tmp_path: Path) -> None:
    """A tied model may store its head as well, if it is the embedding; one that differs is refused."""
    save_checkpoint(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBED].clone()}))
    shard(tmp_path)  # the head's file comes before the embedding's
    assert torch.equal(load(tmp_path).lm_head.weight, model.lm_head.weight)
    first = "model-00001-of-00002.safetensors"
    edit(tmp_path, lambda tensors: tensors["lm_head.weight"][7, 7].add_(0.5), first)
    with pytest.raises(ModelLoadError, match=r"lm_head.weight differs from the tensor that config.json ties it to"):
        load(tmp_path)


def test_old_frequencies_are_ignored(folder: Path) -> None:
    """Old checkpoints carry RoPE's frequencies, which say nothing new."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    edit(folder, lambda tensors: tensors.update(extra))
    load(folder)


REFUSED: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
    (lambda t: t.pop(Q), f"{Q} is missing"),
    (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    (lambda t: t.update(extra=torch.zeros(2)), "extra has no place in the model"),
    (lambda t: t.update({Q: t[Q][:64].clone()}), rf"{Q} is \[64, 128\], expected \[128, 128\]"),
    (lambda t: t.update({Q: t[Q][:1].clone()}), rf"{Q} is \[1, 128\], expected \[128, 128\]"),
    (lambda t: t.update({Q: t[Q][0].clone()}), rf"{Q} is \[128\], expected \[128, 128\]"),
    (lambda t: t.update({Q: t[Q][None].clone()}), rf"{Q} is \[1, 128, 128\], expected"),
    (lambda t: t.update({Q: t[Q].int()}), f"{Q} is I32, expected one of BF16, F16, F32"),
    (lambda t: t.update({Q: t[Q].double()}), f"{Q} is F64, expected one of"),
    (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), f"{Q} is F8_E4M3, expected one of"),
    (lambda t: t[Q][5, 5].fill_(torch.nan), f"{Q} is not finite in torch.float32"),
    (lambda t: t[EMBED][198, 127].fill_(-torch.inf), f"{EMBED} is not finite"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refused_tensor(folder: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    """A tensor that is missing, left over, of another shape (one that would broadcast too) or type, or not finite."""
    edit(folder, change)
    with pytest.raises(ModelLoadError, match=message):
        load(folder)


def test_overflowing_cast(folder: Path) -> None:
    """A number too large for the type that the model runs in is found, not turned to infinity."""
    edit(folder, lambda tensors: tensors[Q][0, 0].fill_(1e5))
    load(folder)
    with pytest.raises(ModelLoadError, match=f"{Q} is not finite in torch.float16"):
        load(folder, dtype=torch.float16)


def test_all_problems_are_listed(folder: Path) -> None:
    """One error names the first ten problems and counts the rest."""
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers" in name])
    with pytest.raises(ModelLoadError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.count("is missing") == 10
    assert "and 14 more" in message


def test_nothing_is_allocated_first(folder: Path) -> None:
    """A checkpoint that does not fit is refused before memory is taken for the model."""
    edit_json(folder / "config.json", vocab_size=2**23, hidden_size=2**17, head_dim=64)
    with pytest.raises(ModelLoadError, match=r"embed_tokens.weight is \[199, 128\], expected \[8388608, 131072\]"):
        load(folder)


def test_index_against_files(sharded: Path) -> None:
    """An index that names another file, or misses a tensor, or names one that is not there, is refused."""
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    in_first = next(name for name, file in weight_map.items() if file == first)
    for changed, message in (
        (weight_map | {in_first: second}, f"{in_first} is in {first}, but .* has it in {second}"),
        ({k: v for k, v in weight_map.items() if k != in_first}, f"{in_first} is in {first}, but .* has it nowhere"),
        (weight_map | {"ghost": first}, f"ghost is not in {first}, where .* has it"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ModelLoadError, match=message):
            load(sharded)


def test_doubled_tensor(sharded: Path) -> None:
    """The same name in two files is refused: which of the two is meant is not known."""
    name, tensor = next(iter(load_file(sharded / "model-00001-of-00002.safetensors").items()))
    edit(sharded, lambda tensors: tensors.update({name: tensor + 1}), "model-00002-of-00002.safetensors")
    with pytest.raises(ModelLoadError, match=f"{name} is in model-00001-of-00002.safetensors and in model-00002"):
        load(sharded)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "..", "a/b.safetensors", "x.bin", "", 3, None])
def test_index_naming_other_files(sharded: Path, file: Any) -> None:
    """An index cannot point out of its folder, nor at files that are not safetensors."""
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(ModelLoadError, match=r"w is .*, expected the name of a .safetensors file in the same folder"):
        load(sharded)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_broken_index(sharded: Path, content: str) -> None:
    """An index that is no index is named."""
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"model.safetensors.index.json"):
        load(sharded)


def test_missing_shard(sharded: Path) -> None:
    """A file that the index names and the folder lacks is named."""
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"model-00002-of-00002.safetensors is missing"):
        load(sharded)


@pytest.mark.parametrize("tenth", range(10))
def test_truncated(folder: Path, tenth: int) -> None:
    """A file cut anywhere, in its header or its data, is refused before it is read."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * tenth // 10])
    with pytest.raises(ModelLoadError, match=r"model.safetensors is truncated or not safetensors"):
        load(folder)


def header(values: Any, length: int | None = None) -> bytes:
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "content",
    [
        b"\0" * 64,
        b"not safetensors at all",
        header({}, 2**63),
        header({}, 2**64 - 1),
        header({Q: {"dtype": "F32", "shape": [128, 128], "data_offsets": [0, 4]}}) + b"\0" * 4,
        header({Q: {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}) + b"\0" * 4,
        header({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}) + b"\0" * 4,
        header({Q: {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}) + b"\0" * 4,
        header({Q: {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}) + b"\0" * 4,
    ],
)
def test_corrupt_header(folder: Path, content: bytes) -> None:
    """Headers with impossible lengths, overlapping or inverted offsets, or unknown types are refused."""
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model.safetensors is truncated or not safetensors"):
        load(folder)


def test_only_pickled_weights(folder: Path) -> None:
    """Other formats are named and not opened: a pickle would run code."""
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"has no weights, expected model.safetensors"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelLoadError, match=r"has pytorch_model.bin, expected model.safetensors"):
        load(folder)


def test_links_are_followed(folder: Path) -> None:
    """The hub's cache is made of links to files elsewhere."""
    before = load(folder).state_dict()
    (folder / "elsewhere").mkdir()
    (folder / "model.safetensors").rename(folder / "elsewhere" / "blob")
    (folder / "model.safetensors").symlink_to(folder / "elsewhere" / "blob")
    after = load(folder).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_dummy(tmp_path: Path) -> None:
    """Random weights need config.json alone, follow from the seed, and are the same for any number of ranks."""
    save_checkpoint(tmp_path, vocab_size=9001)
    (tmp_path / "model.safetensors").unlink()
    one = {s.name: s for s in sources(load(tmp_path, load_format="dummy", seed=3))}
    other = {s.name: s.target for s in sources(load(tmp_path, load_format="dummy", seed=4))}
    ranks = [
        {s.name: s.target for s in sources(load(tmp_path, load_format="dummy", seed=3, tp=TP(r, 2)))} for r in (0, 1)
    ]
    for name, source in one.items():
        assert abs(source.target.mean() - int("norm" in name)) < 0.02
        assert 0.015 < source.target.std() < 0.025
        assert not torch.equal(source.target, other[name])
        parts = [rank[name] for rank in ranks]
        assert torch.equal(source.target, parts[0] if source.shard_dim is None else torch.cat(parts, source.shard_dim))
    assert one[EMBED].target.unique(dim=0).shape[0] == 9001
    assert not torch.equal(one["model.norm.weight"].target, one["model.layers.0.input_layernorm.weight"].target)


def test_options(folder: Path) -> None:
    """Unknown load formats and architectures are refused with what is known."""
    with pytest.raises(ModelLoadError, match="load_format is 'pt', expected one of auto, safetensors, dummy"):
        load(folder, load_format="pt")
    edit_json(folder / "config.json", architectures=["LlamaForCausalLM"])
    with pytest.raises(ModelLoadError, match="'LlamaForCausalLM' is not supported; supported: Qwen2ForCausalLM"):
        load(folder)


def test_resolve_local(tmp_path: Path) -> None:
    """A folder is itself; what can only be a path is never looked for on the hub."""
    assert resolve_model(tmp_path) == resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(ModelLoadError, match="is a file, expected a model folder"):
        resolve_model(tmp_path / "file")
    for name in (str(tmp_path / "no"), "./no/model", "../model", "~/no-such-model", "a/b/c"):
        with pytest.raises(ModelLoadError, match="there is no folder"):
            resolve_model(name)


def test_resolve_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name goes to the hub with its revision, for JSON, text and safetensors only; weights can be left out."""
    calls = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("org/model", "v1", cache_dir=tmp_path) == tmp_path
    assert resolve_model("model", weights=False) == tmp_path
    (name, options), (_, without) = calls
    assert (name, options["revision"], options["cache_dir"]) == ("org/model", "v1", tmp_path)
    assert options["allow_patterns"] == ["*.json", "*.txt", "*.jinja", "*.safetensors"]
    assert "*.safetensors" not in without["allow_patterns"]


def test_resolve_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, a name that the cache has resolves to it, and one that it lacks is a clear error."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match=r"no folder 'org/model', and the Hugging Face Hub .* at revision 'v1'"):
        resolve_model("org/model", "v1", cache_dir=tmp_path)
    snapshot = tmp_path / "models--org--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--org--model" / "refs"
    refs.mkdir()
    (refs / "v1").write_text("abc")
    assert resolve_model("org/model", "v1", cache_dir=tmp_path) == snapshot

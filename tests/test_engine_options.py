"""What the engine itself is told: wrong options are refused before anything is loaded."""

import pytest
from helpers import save_checkpoint

from nanoinfer import LLM, InvalidRequest
from nanoinfer.engine_config import EngineConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [({"trust_remote_code": True}, "trust_remote_code must be one of False, got True"),
     ({"tensor_parallel_size": 2}, "tensor_parallel_size must be one of 1, got 2"),
     ({"quantization": "awq"}, "quantization"), ({"dtype": "int8"}, "dtype"), ({"device": "tpu"}, "device"),
     ({"block_size": 24}, "block_size must be a power of two, got 24"), ({"block_size": 0}, "block_size"),
     ({"max_num_seqs": 0}, "max_num_seqs"), ({"max_num_batched_tokens": 0}, "max_num_batched_tokens"),
     ({"gpu_memory_utilization": 0}, "gpu_memory_utilization"), ({"gpu_memory_utilization": 1.5}, "1.5"),
     ({"max_model_len": 1}, "max_model_len"), ({"seed": 2**63}, "seed"), ({"load_format": "pt"}, "load_format"),
     ({"enforce_eager": 1}, "enforce_eager"), ({"enable_prefix_caching": "yes"}, "enable_prefix_caching"),
     ({"max_model_len": 257}, "max_model_len = 257 is longer than the model's 256 positions"),
     ({"num_gpu_blocks_override": 3}, "the KV pool holds 48 tokens: pass max_model_len=48"),
     ({"kv_cache_memory_bytes": 2**50}, "too little memory: kv_cache_memory_bytes = 1125899906842624 gives"),
     ({"kv_cache_memory_bytes": 1}, "too little memory: kv_cache_memory_bytes = 1 gives a KV pool of 0 blocks"),
     ({"num_gpu_blocks_override": 2**31 - 1}, "too little memory: num_gpu_blocks_override = 2147483647 gives"),
     ({"num_gpu_blocks_override": 9, "kv_cache_memory_bytes": 9}, "both size the KV pool: pass one"),
     ({"num_gpu_blocks_override": 1, "block_size": 1, "max_model_len": -1}, "holds 1 token, a request needs 2"),
     ({"tokenizer": 7}, "tokenizer must be a string or None, got 7"), ({"revision": ""}, "revision must be a string")],
    ids=str,
)  # fmt: skip
def test_engine_options(tmp_path_factory: pytest.TempPathFactory, options: dict[str, object], message: str) -> None:
    """Engine options are refused before weights are loaded, with value and limit."""
    folder = tmp_path_factory.getbasetemp() / "engine_options"
    if not folder.exists():
        save_checkpoint(folder)
        for weights in folder.glob("*.safetensors"):
            weights.unlink()  # whoever gets as far as the weights fails in another way
    with pytest.raises(InvalidRequest, match=message):
        LLM(folder, **{"device": "cpu", "skip_tokenizer_init": True} | options)


def test_vllms_ways_to_say_default() -> None:
    """None, "auto" and a command line's own defaults ask for nothing."""
    config = EngineConfig.from_options("m", seed=None, max_num_seqs=None, max_model_len="auto", disable_log_stats=False)
    assert (config.seed, config.max_num_seqs, config.max_model_len) == (0, 256, -1)


@pytest.mark.parametrize("model", [None, "", 3, b"m"], ids=repr)
def test_a_model_is_named(model: object) -> None:
    """An empty name would mean the folder one happens to be in; None, a model of that name on the hub."""
    with pytest.raises(InvalidRequest, match=f"^model must be a folder, or a name .*, got {model!r}$"):
        LLM(model)  # type: ignore[arg-type]

"""From EngineConfig to parts that fit each other: model, KV pool, tokenizer, limits. Refusals come before loading."""

import gc
import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanoinfer.config import ModelConfig
from nanoinfer.engine.cuda_graph import make_runner, measure_step_bytes
from nanoinfer.engine.model_runner import GIB, CacheShape, DeviceTraits, ModelRunner, device_traits
from nanoinfer.engine.requests import Limits
from nanoinfer.engine_config import EngineConfig
from nanoinfer.errors import InvalidRequest
from nanoinfer.models import MODELS, CausalLM
from nanoinfer.utils.hub import resolve_model
from nanoinfer.utils.loader import load_model
from nanoinfer.utils.parallel import TP
from nanoinfer.utils.staging import staged_copy
from nanoinfer.utils.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("nanoinfer")

DEFAULT_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine is made of."""

    model_config: ModelConfig
    tokenizer: Tokenizer | None
    folder: Path  # of the tokenizer's files
    runner: ModelRunner
    traits: DeviceTraits
    cache: CacheShape
    limits: Limits
    max_num_batched_tokens: int


def start(config: EngineConfig, num_rows: int) -> Parts:
    """Load a model and size its KV pool. num_rows: rows of the table of requests."""
    # What exists by now, torch's modules above all, stays: the garbage collector need not walk through it again and
    # again. Its full rounds took 20 to 45 ms each, a tenth of the time of 256 requests on a GPU.
    gc.collect()
    gc.freeze()
    path = resolve_model(config.model, config.revision, weights=config.load_format != "dummy")
    model_config = ModelConfig.from_dir(path, MODELS)
    device, dtype = config.resolve_device(), config.resolve_dtype(model_config.dtype)
    folder = resolve_model(config.tokenizer, weights=False) if config.tokenizer else path
    tokenizer = None if config.skip_tokenizer_init else load_tokenizer(folder)
    traits = device_traits(device, dtype, config.gpu_memory_utilization)
    weights = _weight_bytes(model_config, dtype, config.fixed_max_model_len or model_config.max_length)
    cache = _plan_cache(config, model_config, dtype, traits, weights)
    limits = _plan_limits(config, model_config, cache)
    model = _load(config, model_config, path, device, dtype, limits.max_model_len, traits)
    max_tokens = config.max_num_batched_tokens or traits.max_num_batched_tokens
    make = partial(
        make_runner, model, enforce_eager=config.enforce_eager, num_rows=num_rows,
        vocab_size=min(model_config.vocab_size, tokenizer.size if tokenizer else 2**31),
        max_chunks=min(config.max_num_seqs, max_tokens), max_tokens=max_tokens, device=device,
    )  # fmt: skip
    if traits.asynchronous:  # what a step takes beside the weights is only known once one has run
        blocks_per_row = -(-limits.max_model_len // cache.block_size)
        probe = make(replace(cache, num_blocks=1), blocks_per_row=blocks_per_row)
        step_bytes = measure_step_bytes(probe, max_tokens, limits.max_model_len)
        probe.close()
        cache = _plan_cache(config, model_config, dtype, traits, weights + step_bytes)
        limits = _plan_limits(config, model_config, cache)
    _log_pool(cache)
    runner = make(cache, blocks_per_row=-(-limits.max_model_len // cache.block_size))
    runner.warm_up()
    model_config = replace(model_config, max_model_len=limits.max_model_len)
    return Parts(model_config, tokenizer, folder, runner, traits, cache, limits, max_tokens)


def _load(
    config: EngineConfig,
    model_config: ModelConfig,
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    max_length: int,
    traits: DeviceTraits,
) -> CausalLM:
    began = time.perf_counter()
    model = load_model(
        path, model_config, device=device, dtype=dtype, tp=TP(), max_length=max_length,
        load_format=config.load_format, seed=config.seed,
        copy=staged_copy(device) if traits.asynchronous else Tensor.copy_,
    )  # fmt: skip
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    logger.info("loaded %s: %.2f GiB of %s in %.1f s", path, weights / GIB, dtype, time.perf_counter() - began)
    return model


def _weight_bytes(config: ModelConfig, dtype: torch.dtype, max_length: int) -> int:
    """Bytes of the parameters and of the table of cosines and sines, in float32, for max_length positions."""
    model = MODELS[config.architecture](config, device=torch.device("meta"), dtype=dtype, max_length=1)
    rope_bytes = max_length * config.head_dim * torch.float32.itemsize
    return sum(p.numel() * p.element_size() for p in model.parameters()) + rope_bytes


def _plan_cache(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, traits: DeviceTraits, taken: int
) -> CacheShape:
    """The KV pool: as asked, else a share of what weights and steps, `taken` bytes together, leave."""
    block_size = config.block_size or DEFAULT_BLOCK_SIZE
    if block_size % traits.block_multiple:
        raise InvalidRequest(f"block_size must be a multiple of {traits.block_multiple} here, got {block_size}")
    one_block = CacheShape(model.num_layers, 1, model.num_kv_heads, block_size, model.head_dim, dtype)
    # Beyond twice what all running requests can fill at their longest, a pool only takes time to set up.
    longest = config.fixed_max_model_len or model.max_length
    useful_blocks = 2 * config.max_num_seqs * -(-longest // block_size)
    num_blocks = _num_blocks(config, traits, taken, one_block.block_bytes, useful_blocks)
    return replace(one_block, num_blocks=min(num_blocks, (2**31 - 1) // block_size))  # slots are int32


def _num_blocks(config: EngineConfig, traits: DeviceTraits, taken: int, block_bytes: int, useful_blocks: int) -> int:
    free = traits.free_bytes - taken
    if (asked := config.num_gpu_blocks_override) is not None:
        num_blocks, option = asked, f"num_gpu_blocks_override = {asked}"
    elif (asked := config.kv_cache_memory_bytes) is not None:
        num_blocks, option = asked // block_bytes, f"kv_cache_memory_bytes = {asked}"
    else:
        pool_bytes, option = min(traits.max_pool_bytes, int(free * traits.pool_share)), traits.pool_source
        num_blocks = min(pool_bytes // block_bytes, useful_blocks)
    if num_blocks < 1 or num_blocks * block_bytes > free:
        raise InvalidRequest(
            f"too little memory: {option} gives a KV pool of {max(num_blocks, 0)} blocks of {block_bytes} bytes; it "
            f"needs at least 1, and at most {max(free, 0) // block_bytes} fit: of {traits.free_bytes / GIB:.2f} GiB "
            f"available, weights and steps take {taken / GIB:.2f}"
        )
    return num_blocks


def _log_pool(cache: CacheShape) -> None:
    tokens, size = cache.num_blocks * cache.block_size, cache.num_blocks * cache.block_bytes
    logger.info("KV pool: %d tokens in %d blocks, %.2f GiB", tokens, cache.num_blocks, size / GIB)


def _plan_limits(config: EngineConfig, model: ModelConfig, cache: CacheShape) -> Limits:
    """max_model_len: as asked, else the model's; refused where the pool could not hold one such request."""
    pool_tokens = cache.num_blocks * cache.block_size
    asked = config.fixed_max_model_len
    if asked is not None and asked > model.max_length:
        raise InvalidRequest(f"max_model_len = {asked} is longer than the model's {model.max_length} positions")
    length = min(model.max_length, pool_tokens) if config.max_model_len == -1 else asked or model.max_length
    if length < 2:
        raise InvalidRequest(f"the KV pool holds {pool_tokens} token, a request needs 2: one to read, one to write")
    if length > pool_tokens:
        raise InvalidRequest(
            f"max_model_len = {length}, but the KV pool holds {pool_tokens} tokens: pass max_model_len={pool_tokens} "
            "(or -1 for what fits), or raise kv_cache_memory_bytes or num_gpu_blocks_override"
        )
    return Limits(model.vocab_size, length, pool_tokens, config.max_logprobs)

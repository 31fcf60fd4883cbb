"""ModelConfig: what config.json means, in the spellings of transformers 4 and 5, and what is refused."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_checkpoint
from transformers import Qwen2Config

from nanoinfer import LLM
from nanoinfer.config import GenerationDefaults, ModelConfig
from nanoinfer.errors import ModelLoadError

# Qwen2.5-0.5B-Instruct's, as transformers 4 wrote it.
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
GENERATION = {
    "bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "transformers_version": "4.37.0",
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def write(path: Path, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A model folder: QWEN with changes; a change to None removes the key."""
    values = {key: value for key, value in (QWEN | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_qwen(tmp_path: Path) -> None:
    """Each field of a published model is read."""
    config = ModelConfig.from_dir(write(tmp_path, GENERATION), ["Qwen2ForCausalLM"])
    assert (config.architecture, config.vocab_size, config.dtype) == ("Qwen2ForCausalLM", 151936, torch.bfloat16)
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (896, 4864, 24)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (14, 2, 64)
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.windows) == (1e-6, True, (0,) * 24)
    assert (config.rope.type, config.rope.theta, config.max_length) == ("default", 1e6, 32768)
    assert config.eos_token_ids == (151645, 151643)
    assert config.generation == GenerationDefaults(0.7, 20, 0.8, None, 1.1, None)


@pytest.mark.parametrize(
    "options",
    [
        {"rope_theta": 5e5},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
        {"tie_word_embeddings": True, "dtype": "float16", "eos_token_id": [7, 3]},
        {"head_dim": 128},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                             "original_max_position_embeddings": 4096}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3},
    ],
)  # fmt: skip
def test_both_spellings(tmp_path: Path, options: dict[str, Any]) -> None:
    """A config as transformers 5 saves it means what the same values in transformers 4's spelling mean."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    theirs = Qwen2Config(**sizes, **options, architectures=["Qwen2ForCausalLM"])
    theirs.save_pretrained(tmp_path)
    new = ModelConfig.from_dir(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values.pop("layer_types")
    values |= {"torch_dtype": values.pop("dtype", None), "rope_theta": rope.pop("rope_theta")}
    rope["type"] = rope.pop("rope_type")
    (tmp_path / "config.json").write_text(json.dumps(values | {"rope_scaling": rope}))
    assert ModelConfig.from_dir(tmp_path) == new
    assert new.rope.theta == theirs.rope_parameters["rope_theta"]
    assert new.windows == tuple(theirs.sliding_window if "sliding" in t else 0 for t in theirs.layer_types)


@pytest.mark.parametrize(
    ("rope_scaling", "length"),
    [
        (None, 32768),
        ({"type": "linear", "factor": 4.0}, 32768),
        ({"type": "dynamic", "factor": 4.0}, 32768),
        ({"rope_type": "llama3"} | LLAMA3, 32768),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8192}, 32768),
    ],
)
def test_max_length(tmp_path: Path, rope_scaling: dict[str, Any] | None, length: int) -> None:
    """YaRN stretches the model's length; "dynamic" does not, because its results would depend on other requests."""
    assert ModelConfig.from_dir(write(tmp_path, rope_scaling=rope_scaling)).max_length == length


@pytest.mark.parametrize(
    ("generation", "eos", "temperature"),
    [
        (None, (151645,), None),
        ({}, (151645,), None),
        ({"eos_token_id": 5}, (5,), None),
        ({"eos_token_id": [5, 6, 5], "temperature": 0.3}, (5, 6), 0.3),
        ({"temperature": 0.3, "do_sample": False}, (151645,), 0.0),
    ],
)
def test_generation(tmp_path: Path, generation: Any, eos: tuple[int, ...], temperature: float | None) -> None:
    """generation_config.json's ends of text come before config.json's; do_sample false is greedy."""
    config = ModelConfig.from_dir(write(tmp_path, generation))
    assert (config.eos_token_ids, config.generation.temperature) == (eos, temperature)


def test_every_sampling_default_is_read(tmp_path: Path) -> None:
    """Penalties included; each reaches a request that brings no parameters of its own."""
    values = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "max_new_tokens": 3,
        "presence_penalty": 0.3, "frequency_penalty": -0.4,
    }  # fmt: skip
    assert asdict(ModelConfig.from_dir(write(tmp_path, values)).generation) == values
    save_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(values))
    with LLM(tmp_path / "model", device="cpu", skip_tokenizer_init=True) as llm:
        params = llm.get_default_sampling_params()
        assert len(llm.generate([5, 6], use_tqdm=False)[0]["token_ids"]) == 3
    names = values.keys() - {"max_new_tokens"}
    assert {name: getattr(params, name) for name in names} == {name: values[name] for name in names}


@pytest.mark.parametrize("eos", [None, []])
def test_no_eos(tmp_path: Path, eos: Any) -> None:
    """A model may name no end of text."""
    assert ModelConfig.from_dir(write(tmp_path, eos_token_id=eos)).eos_token_ids == ()


REFUSED = [
    ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported; supported: Qwen2ForCausalLM"),
    ({"architectures": None}, "architectures is nothing"),
    ({"architectures": []}, "architectures is .*expected a list of one name"),
    ({"architectures": "Qwen2ForCausalLM"}, "architectures is 'Qwen2ForCausalLM'"),
    ({"hidden_size": None}, "hidden_size is nothing, expected an integer from 1 to"),
    ({"hidden_size": 1e12}, "hidden_size is 1000000000000.0, expected"),
    ({"hidden_size": 10**12}, "hidden_size is 1000000000000, expected"),
    ({"hidden_size": "896"}, "hidden_size is '896'"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"hidden_size": -896}, "hidden_size is -896"),
    ({"hidden_size": 900}, "hidden_size is 900, expected a multiple of num_attention_heads, 14"),
    ({"hidden_size": 14 * 48}, "head_dim is 48, expected one of"),
    ({"head_dim": 80}, "head_dim is 80, expected one of"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"vocab_size": 151936.0}, "vocab_size is 151936.0"),
    ({"intermediate_size": 2**40}, "intermediate_size is"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is"),
    ({"num_attention_heads": 7, "num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of .*7"),
    ({"num_key_value_heads": 28}, "num_key_value_heads is 28, expected an integer from 1 to 14"),
    ({"max_position_embeddings": 2**40}, "max_position_embeddings is"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
    ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn', expected one of float16, bfloat16, float32"),
    ({"dtype": ["bfloat16"]}, "dtype is "),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is .*awq"),
    ({"auto_map": {"AutoModel": "evil.py"}}, "auto_map is .*evil.py"),
    ({"eos_token_id": 151936}, "eos_token_id is 151936, expected ids from 0 to 151935"),
    ({"eos_token_id": [1, -1]}, "eos_token_id is "),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ({"layer_types": ["full_attention"]}, "layer_types is .*expected a list of 24"),
    ({"layer_types": ["linear_attention"] * 24}, "layer_types is .*not 'linear_attention'"),
    ({"layer_types": ["sliding_attention"] * 24}, "use_sliding_window is False, expected true"),
    ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
    ({"use_sliding_window": True, "sliding_window": None}, "sliding_window is nothing"),
    ({"use_sliding_window": "no"}, "use_sliding_window is 'no'"),
    ({"rope_theta": 0}, "rope_theta is 0"),
    ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
    ({"rope_scaling": {"type": "longrope"}}, "RoPE type is 'longrope', expected one of default, linear, dynamic"),
    ({"rope_scaling": {"type": "linear"}}, "factor is nothing"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5"),
    ({"rope_scaling": {"type": "yarn", "factor": 1e6}}, "factor is 1000000.0"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "high_freq_factor is nothing"),
    ({"rope_scaling": {"rope_type": "llama3"} | LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention is .*common to all layers"),
    ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "only one of the two",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """What cannot be served is refused by name, with what was found and expected."""
    with pytest.raises(ModelLoadError, match=message):
        ModelConfig.from_dir(write(tmp_path, **changes), ["Qwen2ForCausalLM"])


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": 3}, "temperature is 3, expected a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5"),
        ({"frequency_penalty": "1"}, "frequency_penalty is '1'"),
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"eos_token_id": 10**9}, "generation_config.json: eos_token_id is 1000000000"),
    ],
)
def test_generation_refused(tmp_path: Path, generation: dict[str, Any], message: str) -> None:
    """Sampling defaults are checked where they are read, not in the first request."""
    with pytest.raises(ModelLoadError, match=message):
        ModelConfig.from_dir(write(tmp_path, generation))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable JSON"),
        (b"{", "not readable JSON"),
        (b"\xff\xfe{}", "not readable JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b'{"a": ' * 100_000, "not readable JSON"),
        (b'{"vocab_size": ' + b"9" * 10_000 + b"}", "not readable JSON"),
        (b" " * 2**21, "has 2097152 bytes, expected at most 1048576"),
    ],
)
def test_bad_file(tmp_path: Path, content: bytes, message: str) -> None:
    """A broken config.json is one clear error, however broken."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=f"config.json.*{message}"):
        ModelConfig.from_dir(tmp_path)


def test_bad_folder(tmp_path: Path) -> None:
    """A folder that is absent, a file, empty, or whose config.json is a pipe is named; nothing waits for a pipe."""
    file = tmp_path / "file"
    file.touch()
    for path, message in ((tmp_path / "no", "is missing"), (file, "is a file"), (tmp_path, "config.json is missing")):
        with pytest.raises(ModelLoadError, match=message):
            ModelConfig.from_dir(path)
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelLoadError, match="not a regular file"):
        ModelConfig.from_dir(tmp_path)

"""The bundled demo model: small, what Transformers calls a Qwen2, and its files belong together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, Qwen2ForCausalLM

DEMO = Path(__file__).parents[1] / "nanoinfer" / "assets" / "demo"
CODE = 'class A:\n\tx = {"é": 0xFF, \'set\': b"\\x00"}\r\n\n    def don\'t(self):  # 12345\n        return  x\n\n\n'
PROMPTS = ["def fibonacci(n):", "import os\n\n\ndef read_file(path):", "class Stack:"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def loaded() -> tuple[Qwen2ForCausalLM, dict[str, Any]]:
    return Qwen2ForCausalLM.from_pretrained(DEMO, dtype=torch.float32, output_loading_info=True)


def test_it_is_small() -> None:
    """It travels in every wheel."""
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 12_000_000


def test_transformers_finds_every_weight(loaded: tuple[Qwen2ForCausalLM, dict[str, Any]]) -> None:
    """Hugging Face's names and shapes: none missing, none left over; tied, bfloat16, finite."""
    model, info = loaded
    assert {key: list(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")} == {
        "missing_keys": [],
        "unexpected_keys": [],
        "mismatched_keys": [],
    }
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = load_file(DEMO / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(weight.isfinite().all() for weight in weights.values())


def test_config_is_what_the_engine_is_tested_with(loaded: tuple[Qwen2ForCausalLM, dict[str, Any]]) -> None:
    """Other tests rely on grouped heads of 64, on room for long prompts, and on ids that no text has."""
    config = loaded[0].config
    assert config.hidden_size // config.num_attention_heads == 64
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings >= 4096
    assert config.tie_word_embeddings


def test_ids_belong_together(tokenizer: Tokenizer) -> None:
    """One vocabulary in all files: it ends below the model's, and both tokens that end a text are listed."""
    config = json.loads((DEMO / "config.json").read_text())
    ends = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert tokenizer.get_vocab_size() < config["vocab_size"]
    assert GenerationConfig.from_pretrained(DEMO).eos_token_id == ends
    assert config["eos_token_id"] == config["pad_token_id"] == ends[1]


def test_code_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    """Decoding gives the text back to the byte, and Transformers cuts it into the same tokens."""
    theirs = AutoTokenizer.from_pretrained(DEMO)
    for text in (CODE, Path(__file__).read_text()):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert theirs(text).input_ids == ids


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_cut_as_within_a_file(tokenizer: Tokenizer, prompt: str) -> None:
    """No token spans colon and line break: where one does, a prompt that ends in a colon is like no other text."""
    ids = tokenizer.encode(prompt).ids
    assert tokenizer.encode(prompt + "\n    return None\n").ids[: len(ids)] == ids


def test_chat_template(tokenizer: Tokenizer) -> None:
    """ChatML, of which each mark is one token."""
    theirs = AutoTokenizer.from_pretrained(DEMO)
    messages = [{"role": "user", "content": "Return x."}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nReturn x.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(text).tokens.count("<|im_start|>") == 2


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_it_has_learned_to_indent(
    loaded: tuple[Qwen2ForCausalLM, dict[str, Any]], tokenizer: Tokenizer, prompt: str
) -> None:
    """Greedily, a body follows a header by four spaces: weights and tokenizer fit, and a prompt starts a file."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    out = loaded[0].generate(ids, do_sample=False, repetition_penalty=1.0, max_new_tokens=3)
    body = tokenizer.decode(out[0, ids.shape[1] :].tolist())
    assert body.startswith("\n    ")
    assert not body.startswith("\n     ")


@torch.no_grad()
def test_it_has_learned_python(loaded: tuple[Qwen2ForCausalLM, dict[str, Any]], tokenizer: Tokenizer) -> None:
    """This file, which it has not seen, costs less than half of what chance does."""
    model = loaded[0]
    ids = torch.tensor([tokenizer.encode(Path(__file__).read_text()).ids])
    assert model(ids, labels=ids).loss < 0.5 * torch.tensor(float(model.config.vocab_size)).log()

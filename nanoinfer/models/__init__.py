"""The architectures, by the name config.json gives them."""

from typing import TypeAlias

from nanoinfer.models.qwen2 import Qwen2ForCausalLM

CausalLM: TypeAlias = Qwen2ForCausalLM  # | the next one

MODELS = {"Qwen2ForCausalLM": Qwen2ForCausalLM}

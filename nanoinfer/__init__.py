"""nanoinfer: an LLM inference engine that one person can read in an evening.

Public names are imported on first use, so that `import nanoinfer` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanoinfer.engine.async_engine import AsyncLLMEngine as AsyncLLMEngine
    from nanoinfer.engine.llm import LLM as LLM
    from nanoinfer.engine.llm_engine import LLMEngine as LLMEngine
    from nanoinfer.engine_config import AsyncEngineArgs as AsyncEngineArgs
    from nanoinfer.engine_config import EngineArgs as EngineArgs
    from nanoinfer.errors import EngineDead as EngineDead
    from nanoinfer.errors import InvalidRequest as InvalidRequest
    from nanoinfer.errors import ModelLoadError as ModelLoadError
    from nanoinfer.inputs import PromptType as PromptType
    from nanoinfer.inputs import TextPrompt as TextPrompt
    from nanoinfer.inputs import TokensPrompt as TokensPrompt
    from nanoinfer.outputs import CompletionOutput as CompletionOutput
    from nanoinfer.outputs import Logprob as Logprob
    from nanoinfer.outputs import RequestOutput as RequestOutput
    from nanoinfer.sampling_params import RequestOutputKind as RequestOutputKind
    from nanoinfer.sampling_params import SamplingParams as SamplingParams

__version__ = "0.1.0"

_HOME = {
    "LLM": "engine.llm",
    "LLMEngine": "engine.llm_engine",
    "AsyncLLMEngine": "engine.async_engine",
    "EngineArgs": "engine_config",
    "AsyncEngineArgs": "engine_config",
    "SamplingParams": "sampling_params",
    "RequestOutputKind": "sampling_params",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "PromptType": "inputs",
    "TextPrompt": "inputs",
    "TokensPrompt": "inputs",
    "InvalidRequest": "errors",
    "ModelLoadError": "errors",
    "EngineDead": "errors",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'nanoinfer' has no attribute {name!r}")
    return getattr(import_module(f"nanoinfer.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

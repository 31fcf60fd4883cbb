"""Conversations as users pass them, checked, and their text by a chat template."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from nanoinfer.errors import InvalidRequest
from nanoinfer.options import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Conversation = Sequence[Message]


def read_conversations(messages: object, content_format: str) -> list[list[dict[str, Any]]]:
    """One conversation or several, as templates expect them. Raises InvalidRequest, naming the message.

    content_format "openai": contents become lists of {"type": "text", "text": ...}; else strings, parts in lines.
    """
    if not _is_list(messages):
        raise InvalidRequest(f"messages must be a list of dicts, or of such lists, got {shown(messages)}")
    if not messages or _is_list(messages[0]):
        return [_read(each, f"messages[{i}]", content_format) for i, each in enumerate(messages)]
    return [_read(messages, "messages", content_format)]


def render(tokenizer: "PreTrainedTokenizerBase", conversation: list[dict[str, Any]], **options: object) -> str:
    """A conversation's text. Raises InvalidRequest where the template refuses it."""
    from jinja2 import TemplateError

    if taken := options.keys() & {"tokenize", "conversation", "return_dict", "return_tensors"}:
        raise InvalidRequest(f"chat_template_kwargs must not hold {sorted(taken)}: the prompt is a text")
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, **options))
    except (TemplateError, ValueError) as error:
        raise InvalidRequest(f"messages do not fit the chat template: {error}") from error


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _read(conversation: object, name: str, content_format: str) -> list[dict[str, Any]]:
    if not _is_list(conversation) or not conversation:
        raise InvalidRequest(f"{name} must hold at least 1 message, got {shown(conversation)}")
    return [_read_message(message, f"{name}[{i}]", content_format) for i, message in enumerate(conversation)]


def _read_message(message: object, name: str, content_format: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{name} must be a dict with a 'role' and a 'content', got {shown(message)}")
    content = message.get("content")
    if content is None:  # of a call of tools
        return dict(message)
    texts = [content] if isinstance(content, str) else _texts(content, f"{name}['content']")
    parts = [{"type": "text", "text": text} for text in texts]
    return {**message, "content": parts if content_format == "openai" else "\n".join(texts)}


def _texts(parts: object, name: str) -> list[str]:
    if not _is_list(parts):
        raise InvalidRequest(f"{name} must be a string or a list of text parts, got {shown(parts)}")
    texts = list[str]()
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
        if not isinstance(text, str):
            raise InvalidRequest(f"{name} may hold strings and parts of type 'text' with a 'text', got {shown(part)}")
        texts.append(text)
    return texts

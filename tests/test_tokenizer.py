"""Text becomes the ids that transformers gives for it."""

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from nanoinfer.utils.tokenizer import load_tokenizer

DEMO = Path(__file__).parents[1] / "nanoinfer" / "assets" / "demo"
TEXT = "def read_lines(path):\n    return [line for line in open(path)]  # é 世界 🙂 <|im_end|>\n"


@pytest.mark.parametrize("setting", ["none", "truncation", "padding"])
def test_prompts_are_neither_cut_nor_padded(tmp_path: Path, setting: str) -> None:
    """A tokenizer.json keeps the truncation and padding it was trained with; a prompt must not lose its end to them."""
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
    file = str(tmp_path / "tokenizer.json")
    saved = Tokenizer.from_file(file)
    if setting == "truncation":
        saved.enable_truncation(4)
    elif setting == "padding":
        saved.enable_padding(length=200)
    saved.save(file)
    ids = load_tokenizer(tmp_path).encode(TEXT)
    assert ids == AutoTokenizer.from_pretrained(tmp_path).encode(TEXT)
    assert 4 < len(ids) < 200

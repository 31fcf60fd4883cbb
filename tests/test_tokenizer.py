"""Text becomes the ids that transformers gives for it, or the folder is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from nanoinfer import LLM, SamplingParams
from nanoinfer.errors import ModelLoadError
from nanoinfer.utils.detokenizer import WholeDetokenizer
from nanoinfer.utils.tokenizer import SlowTokenizer, load_tokenizer

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


@pytest.mark.parametrize("left", [["config.json"], ["config.json", "tokenizer_config.json"]])
def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path, left: list[str]) -> None:
    """transformers makes up a tokenizer of special tokens for it; the sampler would then allow no other id."""
    for name in left:
        shutil.copy(DEMO / name, tmp_path)
    with pytest.raises(ModelLoadError, match=r"holds no tokenizer \(it has no vocabulary\); pass"):
        load_tokenizer(tmp_path)


def test_vocabulary_and_merges_are_read_without_tokenizer_json(tmp_path: Path) -> None:
    """The older form of the same tokenizer."""
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    model = json.loads((DEMO / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    old, new = load_tokenizer(tmp_path), load_tokenizer(DEMO)
    assert type(old) is not type(new)
    ids = new.encode(TEXT)
    assert old.encode(TEXT) == ids and old.decode(ids, False) == new.decode(ids, False) == TEXT
    assert old.size == new.size


def test_bad_words_are_words_within_a_text(tmp_path: Path) -> None:
    """Where the tokenizer puts a special token before every text, none stands before a word that is looked for."""
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 4078)])
    saved.save(str(tmp_path / "tokenizer.json"))
    with LLM(tmp_path, device="cpu") as llm:
        tokenizer = llm.llm_engine.tokenizer
        assert tokenizer.encode("def") == [4078, *tokenizer.encode("def", False)]
        params = SamplingParams(temperature=0, max_tokens=8)
        text = llm.generate("def f(x):", params, use_tqdm=False)[0]["text"]
        word = text.split()[1]
        params = SamplingParams(temperature=0, max_tokens=8, bad_words=[word])
        assert word in text and word not in llm.generate("def f(x):", params, use_tqdm=False)[0]["text"]


def test_what_is_said_of_spaces_reaches_transformers() -> None:
    """A tokenizer without a tokenizer.json decides itself what it makes of it."""
    tokenizer = SlowTokenizer.__new__(SlowTokenizer)
    tokenizer.tokenizer = SimpleNamespace(decode=lambda ids, **options: json.dumps(options))
    for spaces in (True, False):
        asked = {"skip_special_tokens": False, "spaces_between_special_tokens": spaces}
        assert json.loads(tokenizer.decode([1], False, spaces)) == asked
        whole = WholeDetokenizer(tokenizer, False, spaces)
        assert json.loads(whole.flush()) == asked

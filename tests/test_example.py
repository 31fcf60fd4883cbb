"""example.py: the first command that anybody runs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("example", ROOT / "example.py")
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def test_it_runs_without_arguments_and_without_transformers() -> None:
    """Out of the box, on a CPU, offline; transformers would add seconds to the first token."""
    script = (
        "import runpy, sys; runpy.run_path('example.py', run_name='__main__'); assert 'transformers' not in sys.modules"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for prompt in example.PROMPTS:
        assert prompt in done.stdout
    assert done.stdout.count("finish_reason") == len(example.PROMPTS)


def test_options_reach_the_sampler(capsys) -> None:
    """Lengths and seeds do what they say: the same seed repeats a text, another one changes it, 0 needs none."""

    def text(*options: str) -> str:
        example.main(["--prompt", "def ", "--prompt", "import ", "--max-tokens", "12", *options, "--device", "cpu"])
        return capsys.readouterr().out

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    greedy = text("--temperature", "0", "--repetition-penalty", "1")
    assert greedy == text("--temperature", "2", "--top-k", "1", "--repetition-penalty", "1", "--dtype", "auto")
    assert greedy == text("--temperature", "2", "--top-p", "1e-6", "--repetition-penalty", "1")
    assert greedy == text("--temperature", "2", "--min-p", "1", "--repetition-penalty", "1")
    assert greedy != text("--temperature", "0", "--repetition-penalty", "50")
    assert greedy.count("def ") >= 1 and greedy.count("tokens, finish_reason") == 2


def test_defaults_are_the_models_own() -> None:
    """What is not given comes from generation_config.json."""
    with example.LLM(example.DEMO, device="cpu") as llm:
        own = llm.get_default_sampling_params()
        params = example.sampling_params(llm, example.parse(["--top-k", "3"]))
        assert (params.top_k, params.max_tokens) == (3, 64)
        assert (params.temperature, params.top_p) == (own.temperature, own.top_p)
        assert (own.temperature, own.top_k) != (1.0, 0), "the demo model recommends nothing: this test shows nothing"


def test_chat_uses_the_models_template(capsys) -> None:
    """The prompt becomes a user's message and the answer is asked for, in the model's own words."""
    with example.LLM(example.DEMO, device="cpu") as llm:
        messages = [{"role": "user", "content": "Hello there"}]
        text = llm.chat(messages, example.SamplingParams(max_tokens=1), use_tqdm=False)[0].prompt
        template = llm.get_tokenizer().chat_template
    assert text.count("Hello there") == 1 and text.endswith("assistant\n")
    assert "<|im_start|>" in template and text.startswith("<|im_start|>")
    example.main(["--chat", "--prompt", "Hello there", "--max-tokens", "3", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "Hello there\n\n" in out and "<|im_start|>" not in out


def test_a_wrong_model_is_refused() -> None:
    """With a reason, not a trace from deep inside."""
    with pytest.raises(example.nanoinfer.ModelLoadError, match="no folder"):
        example.main(["--model", "./nowhere"])

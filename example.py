"""Generate text.

    python example.py
    python example.py --model Qwen/Qwen2.5-0.5B-Instruct --chat --prompt "Why is the sky blue?" --max-tokens 200

Without --model it is the bundled demo model, which continues Python code.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import nanoinfer
from nanoinfer import LLM, SamplingParams

DEMO = Path(nanoinfer.__file__).parent / "assets" / "demo"
PROMPTS = [
    "def read_lines(path):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import os\nimport sys\n\n\ndef main():\n",
]
SAMPLING = {"temperature": float, "top-k": int, "top-p": float, "min-p": float, "repetition-penalty": float,
            "seed": int}  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO, help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    parser.add_argument("--max-tokens", type=int, default=64)
    for name, kind in SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, help="default: what the model recommends")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto")
    return parser.parse_args(argv)


def sampling_params(llm: LLM, args: argparse.Namespace) -> SamplingParams:
    """The model's own defaults, but for what was given."""
    options = {field.name: getattr(args, field.name, None) for field in fields(SamplingParams)}
    given = {name: value for name, value in options.items() if value is not None}
    return replace(llm.get_default_sampling_params(), **given)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nanoinfer").setLevel(logging.INFO)  # a line each for load, KV pool and capture
    shown = args.prompt or PROMPTS
    with LLM(args.model, device=args.device, dtype=args.dtype) as llm:
        params = sampling_params(llm, args)
        if args.chat:
            outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in shown], params)
        else:
            outputs = llm.generate(shown, params)
    for prompt, output in zip(shown, outputs, strict=True):
        answer = output.outputs[0]
        print("─" * 80)
        print(prompt, answer.text, sep="\n\n" if args.chat else "")
        print(f"── {len(answer.token_ids)} tokens, finish_reason {answer.finish_reason!r}")


if __name__ == "__main__":
    main()

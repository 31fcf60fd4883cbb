"""In bf16 the model loses no more than Hugging Face's own bf16 does, both against Hugging Face in fp32."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import Cache
from torch import Tensor
from transformers import Qwen2ForCausalLM

from nanoinfer.config import ModelConfig
from nanoinfer.utils.loader import load_model
from nanoinfer.utils.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "nanoinfer" / "assets" / "demo"
TEXTS = ["nanoinfer/engine/scheduler.py", "nanoinfer/reference.py", "nanoinfer/ops.py"]  # Python, as it was trained on
LENGTH = 512


def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(DEMO)
    return [tokenizer.encode((ROOT / name).read_text())[:LENGTH] for name in TEXTS]


@torch.inference_mode()
def hf_logits(dtype: torch.dtype, device: str) -> list[Tensor]:
    model = Qwen2ForCausalLM.from_pretrained(DEMO, dtype=dtype).eval().to(device)
    return [model(torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in prompts()]


@torch.inference_mode()
def our_logits(dtype: torch.dtype, device: str, chunk: int) -> list[Tensor]:
    """Logits of every position, teacher-forced in chunks: one token a step is the decode path, 512 the prefill."""
    config = ModelConfig.from_dir(DEMO)
    model = load_model(DEMO, config, device=torch.device(device), dtype=dtype, max_length=LENGTH)
    out = []
    for ids in prompts():
        cache = Cache(config, rows=1, length=LENGTH, block_size=16, dtype=dtype, device=device)
        steps = [cache.logits(model, [(0, at, ids[at : at + chunk])])[0] for at in range(0, len(ids), chunk)]
        out.append(torch.cat(steps).cpu())
    return out


def mean_kl(true: list[Tensor], other: list[Tensor]) -> float:
    """Mean over all positions of KL(true || other), in nats, in float64."""
    pairs = zip(true, other, strict=True)
    kl = [F.kl_div(q.double().log_softmax(-1), p.double().log_softmax(-1), log_target=True, reduction="none").sum(-1)
          for p, q in pairs]  # fmt: skip
    return float(torch.cat(kl).mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [1, 100, 512])
def test_kl_to_fp32_is_no_worse_than_hugging_faces(device: str, dtype: torch.dtype, chunk: int) -> None:
    """Every position of Python text, through decode (chunks of 1), chunked prefill and whole prefill."""
    true = hf_logits(torch.float32, "cpu")
    theirs, ours = mean_kl(true, hf_logits(dtype, device)), mean_kl(true, our_logits(dtype, device, chunk))
    print(
        f"{device}, {dtype}, chunks of {chunk}: KL {ours:.3e}, Hugging Face's {theirs:.3e}, ratio {ours / theirs:.3f}"
    )
    assert ours <= 1.1 * theirs


def test_fp32_logits_agree(device: str) -> None:
    """The same positions in fp32: within 1e-4 of Hugging Face's."""
    for p, q in zip(hf_logits(torch.float32, "cpu"), our_logits(torch.float32, device, 100), strict=True):
        assert (p - q).abs().max() <= 1e-4

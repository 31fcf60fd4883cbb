"""Train the bundled demo model: a Qwen2 of 5 million parameters that writes Python.

python examples/train_demo.py --out demo                                # on this Python's standard library
python examples/train_demo.py --out demo --corpus DIR DIR               # and on folders that hold packages
python examples/train_demo.py --out demo --steps 20 --batch 2 --context 256     # on a CPU, to try it
python examples/train_demo.py --out demo --minutes 5 --compile                  # on one large GPU
"""

import argparse
import ast
import json
import math
import sysconfig
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 704, 6, 4, 2, 64
POSITIONS, ROPE_THETA, EPS, INIT = 4096, 10000.0, 1e-6, 0.02
VOCAB, TOKENS = 4096, 4080  # as in Qwen2 itself, the model has more ids than the tokenizer has tokens
RATE, WARMUP, LOG_EVERY, SEED = 3e-3, 200, 100, 0  # the peak learning rate; steps; steps
SPECIAL, END, IM_END = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], TOKENS - 3, TOKENS - 1
# Where Qwen2 cuts a text into pieces; a token lies within one. Transformers forces this on every Qwen2.
PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
PIECES += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CHAT_TEMPLATE += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# Tests and tables, copies of other projects, and folders that are another corpus.
SKIPPED = {"test", "tests", "testing", "idle_test", "lib2to3", "benchmarks", "encodings", "pydoc_data"}
SKIPPED |= {"_vendor", "vendored", "v1", "externals", "extern", "distutils", "_distutils", "typeshed", "site-packages"}


def is_code(text: str) -> bool:
    """False for tables, generated text, and what holds a special token."""
    size, digits, lines = len(text), sum(map(str.isdigit, text)), 1 + text.count("\n")
    plain = digits < 0.1 * size and size < 60 * lines and len(text.encode()) < 1.01 * size
    return plain and 200 <= size <= 200_000 and "<|" not in text


def read_corpus(folders: list[Path]) -> dict[str, str]:
    """{module path: text}. The first folder that has a path wins: two Python versions give one file."""
    files: dict[str, str] = {}
    seen: set[str] = set()
    for path, module in ((p, p.relative_to(folder)) for folder in folders for p in sorted(folder.rglob("*.py"))):
        if SKIPPED & set(module.parts) or str(module) in files:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text not in seen and is_code(text):
            files[str(module)] = text
        seen.add(text)
    return files


def chats(text: str) -> Iterator[str]:
    """Each short documented function as a conversation: its summary asks, its source answers."""
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return
    for node in body:
        if isinstance(node, ast.FunctionDef) and (summary := ast.get_docstring(node)):
            question, answer = summary.splitlines()[0], ast.get_source_segment(text, node) or ""
            if 15 <= len(question) <= 100 and len(answer) <= 1200:
                yield CHAT.format(question=question, answer=answer)


def cut(pattern: str) -> pre_tokenizers.Sequence:
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), to_bytes])


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE. The special tokens take the ids after the merges, as in Qwen2."""
    tokenizer = Tokenizer(models.BPE())
    # No merge of punctuation and newline, so that a prompt that ends in "):" is cut as it is within a file.
    tokenizer.pre_tokenizer = cut(PIECES.replace("+[\\r\\n]*", "+"))
    options = {"vocab_size": TOKENS - len(SPECIAL), "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False, **options))
    tokenizer.pre_tokenizer, tokenizer.normalizer = cut(PIECES), normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if tokenizer.get_vocab_size() != TOKENS:
        raise ValueError(f"corpus too small: it gave {tokenizer.get_vocab_size()} tokens, not {TOKENS}")
    return tokenizer


def prepare(data: Path, folders: list[Path]) -> None:
    """Write train.npy and heldout.npy [tokens] uint16 and tokenizer.json into `data`."""
    files = read_corpus(folders)
    # One file in a hundred, by its path's checksum: the same ones everywhere, whatever else is in the corpus.
    held = {module for module in files if zlib.crc32(module.encode()) % 100 == 0}
    train = [text for module, text in files.items() if module not in held]
    heldout = [text for module, text in files.items() if module in held]
    tokenizer = train_tokenizer(train)
    train += [chat for text in train for chat in chats(text)]
    np.random.default_rng(SEED).shuffle(train)
    data.mkdir(parents=True, exist_ok=True)
    for name, texts in {"train": train, "heldout": heldout}.items():
        encoded = tokenizer.encode_batch([text + SPECIAL[0] for text in texts])
        ids = np.concatenate([np.array(one.ids, np.uint16) for one in encoded])
        np.save(data / f"{name}.npy", ids)
        print(f"{name}: {len(texts):,} documents, {sum(map(len, texts)):,} bytes, {len(ids):,} tokens")
    tokenizer.save(str(data / "tokenizer.json"))  # last: its presence says that the folder is complete


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of x [B, heads, T, head_dim] by angles [T, head_dim / 2]: i pairs with i + half."""
    (a, b), cos, sin = x.float().chunk(2, dim=-1), angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Layer(nn.Module):
    """One decoder layer, [B, T, HIDDEN] -> the same."""

    def __init__(self) -> None:
        super().__init__()
        query, key, bare = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, partial(nn.Linear, bias=False)
        projections = {"q_proj": nn.Linear(HIDDEN, query), "k_proj": nn.Linear(HIDDEN, key)}
        projections |= {"v_proj": nn.Linear(HIDDEN, key), "o_proj": bare(query, HIDDEN)}
        gated = {"gate_proj": bare(HIDDEN, MLP), "up_proj": bare(HIDDEN, MLP), "down_proj": bare(MLP, HIDDEN)}
        self.self_attn, self.mlp = nn.ModuleDict(projections), nn.ModuleDict(gated)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(HIDDEN, EPS), nn.RMSNorm(HIDDEN, EPS)

    def attend(self, x: Tensor, angles: Tensor) -> Tensor:
        """Causal attention; each key head serves HEADS / KV_HEADS query heads."""
        heads = (self.self_attn[name](x).unflatten(-1, (-1, HEAD_DIM)) for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (head.transpose(1, 2) for head in heads)
        q, k = rotate(q, angles), rotate(k, angles)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.self_attn["o_proj"](out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attend(self.input_layernorm(x), angles)
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


class Qwen2(nn.Module):
    """Token ids [B, T] -> logits [B, T, VOCAB]. Named as in Hugging Face's checkpoints, less "model."."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, EPS)
        for name, weight in self.named_parameters():
            if not name.endswith("norm.weight"):
                nn.init.normal_(weight, std=INIT if weight.dim() == 2 else 0.0)  # biases start at 0

    def forward(self, tokens: Tensor) -> Tensor:
        pairs = torch.arange(0, HEAD_DIM, 2, device=tokens.device) / HEAD_DIM
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * ROPE_THETA**-pairs
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, angles)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def next_token_loss(model: Qwen2, windows: Tensor) -> Tensor:
    """Mean nats per token of windows [B, T + 1]."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def line_starts(ids: np.ndarray, tokenizer: Tokenizer) -> Tensor:
    """Places [N] of lines without indent. Windows start there alone: so does a prompt, and the model must know."""
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in range(TOKENS)]
    breaks = [i for i, text in enumerate(texts) if text.endswith("\n") or i == END]
    opens = [i for i, text in enumerate(texts) if text[0] not in " \t\r\n)]}"]
    return torch.from_numpy(1 + np.flatnonzero(np.isin(ids[:-1], breaks) & np.isin(ids[1:], opens)))


def train(model: Qwen2, tokens: Tensor, openings: Tensor, args: argparse.Namespace) -> None:
    """AdamW; the rate warms up, then falls as a cosine over the steps or the minutes, whichever end first."""
    loss_of = torch.compile(next_token_loss) if args.compile else next_token_loss
    decay = {2: 0.1, 1: 0.0}  # of matrices, of norms and biases
    groups = [{"params": [p for p in model.parameters() if p.dim() == d], "weight_decay": decay[d]} for d in decay]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    openings = openings[openings < len(tokens) - args.context]
    generator, offsets = torch.Generator().manual_seed(SEED), torch.arange(args.context + 1, device=tokens.device)
    start, deadline = time.perf_counter(), time.perf_counter() + 60 * args.minutes
    for step in range(args.steps):
        done = max(step / args.steps, (time.perf_counter() - start) / (deadline - start))
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP, (1 + math.cos(math.pi * done)) / 2)
        starts = openings[torch.randint(len(openings), (args.batch, 1), generator=generator)]
        windows = tokens[starts.to(tokens.device) + offsets].long()
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            loss = loss_of(model, windows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0:
            print(f"step {step}: loss {loss.item():.3f} at {time.perf_counter() - start:.0f} s", flush=True)
        if step == 0:
            start = time.perf_counter()  # the schedule leaves compilation out, the deadline does not


@torch.no_grad()
def evaluate(model: Qwen2, tokens: Tensor, context: int) -> float:
    """Mean nats per token of a stream cut into windows, in float32; the stream's first token is given."""
    windows = [tokens[i : i + context + 1].long() for i in range(0, len(tokens) - 1, context)]
    return sum(next_token_loss(model, w[None]).item() * (len(w) - 1) for w in windows) / (len(tokens) - 1)


@torch.no_grad()
def complete(model: Qwen2, tokenizer: Tokenizer, prompt: str, device: str) -> str:
    """The prompt and its greedy continuation of at most 160 tokens."""
    ids = tokenizer.encode(prompt).ids
    for _ in range(160):
        ids.append(int(model(torch.tensor([ids], device=device))[0, -1, :TOKENS].argmax()))
        if ids[-1] in (END, IM_END):
            break
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def config() -> dict[str, object]:
    """config.json of a Qwen2ForCausalLM."""
    return (
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16", "vocab_size": VOCAB}
        | {"hidden_size": HIDDEN, "intermediate_size": MLP, "hidden_act": "silu", "rms_norm_eps": EPS}
        | {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
        | {"rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"}, "max_position_embeddings": POSITIONS}
        | {"layer_types": ["full_attention"] * LAYERS, "max_window_layers": LAYERS, "use_sliding_window": False}
        | {"sliding_window": None, "attention_dropout": 0.0, "use_cache": True, "initializer_range": INIT}
        | {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": END, "pad_token_id": END}
    )


def save(model: Qwen2, tokenizer: Tokenizer, out: Path) -> None:
    """Round the weights to bfloat16, also in `model`, and write everything but the card."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    model.load_state_dict(weights)
    save_file({f"model.{name}": w.cpu() for name, w in weights.items()}, out / "model.safetensors", {"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.05}
    special = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0], "additional_special_tokens": SPECIAL[1:]}
    chat = {"chat_template": CHAT_TEMPLATE, "model_max_length": POSITIONS, "clean_up_tokenization_spaces": False}
    files = {
        "config.json": config(),
        "generation_config.json": {"eos_token_id": [IM_END, END], "pad_token_id": END} | sampling,
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"} | special | chat,
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo"), help="folder of the finished model")
    add("--data", type=Path, default=Path("demo-data"), help="folder of the corpus, prepared if it is not there")
    add("--corpus", type=Path, nargs="*", default=[], help="folders beside the standard library")
    add("--prepare", action="store_true", help="stop after preparing the corpus")
    add("--steps", type=int, default=10_000)
    add("--minutes", type=float, default=math.inf, help="training ends here at the latest")
    add("--batch", type=int, default=8, help="windows a step")
    add("--context", type=int, default=POSITIONS, help="tokens a window")
    add("--compile", action="store_true", help="torch.compile: a minute to start, then faster")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not (args.data / "tokenizer.json").exists():
        prepare(args.data, [Path(sysconfig.get_path("stdlib")), *args.corpus])
    if args.prepare:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_file(str(args.data / "tokenizer.json"))
    train_ids, heldout_ids = (np.load(args.data / f"{name}.npy") for name in ("train", "heldout"))
    torch.manual_seed(SEED)
    model = Qwen2().to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_ids):,} tokens, {device}")
    train(model, torch.from_numpy(train_ids.astype(np.int32)).to(device), line_starts(train_ids, tokenizer), args)
    save(model, tokenizer, args.out)
    nats = evaluate(model, torch.from_numpy(heldout_ids.astype(np.int32)).to(device), args.context)
    size = len(tokenizer.decode(heldout_ids.tolist(), skip_special_tokens=True).encode())
    print(f"held out: {nats:.4f} nats a token, {nats * len(heldout_ids) / math.log(2) / size:.4f} bits a byte")
    for prompt in ("def fibonacci(n):", "import os\n\n\ndef read_file(path):", "class Stack:"):
        print(f"{'-' * 40}\n{complete(model, tokenizer, prompt, device)}")


if __name__ == "__main__":
    main()

"""The shapes that steps on a GPU are rounded up to, so that few graphs serve all steps."""

from nanoinfer.engine.model_runner import StepShape


def bucket_ladder(limit: int) -> list[int]:
    """Numbers of requests to capture steps for, up to limit: above 8, at most an eighth to a quarter of padding."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, limit, 32)]
    return [size for size in sizes if size < limit] + [limit]


# Tokens of the largest step with a prompt's chunk that is captured: from here on 0.5B, too, hides its launches.
CHUNK_TOKENS = 4096


def chunk_shapes(max_tokens: int, max_chunks: int) -> list[StepShape]:
    """What steps with a prompt's chunk are rounded up to, the largest last.

    Up to 256 tokens take little longer than 16, as weights have to be read; from there on at most an eighth is padding.
    Chunks of padding cost next to nothing. They are fewer than tokens: with as many, attention takes each for a decoded
    token. A lone prompt has shapes of its own, as its attention knows from the number of tokens what it has to do.
    """
    sizes = [16, 32, 64, 128, 192, 256, *(size + part for size in (256, 512, 1024, 2048) for part in _eighths(size))]
    limit = min(max_tokens, CHUNK_TOKENS)
    tokens = [size for size in sizes if size < limit] + [limit]
    return [StepShape(size, count, count) for size in tokens for count in _chunk_counts(min(max_chunks, size - 1))]


def _chunk_counts(most: int) -> list[int]:
    return [8**i for i in range(6) if 8**i < most] + [most] if most > 0 else []


def _eighths(size: int) -> range:
    return range(size // 8, size + 1, size // 8)

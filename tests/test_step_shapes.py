"""What steps on a GPU are rounded up to."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfer.engine.model_runner import StepShape
from nanoinfer.engine.step_shapes import CHUNK_TOKENS, chunk_shapes


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 3 * CHUNK_TOKENS), st.integers(1, 3000), st.data())
def test_every_step_fits_a_shape_with_little_padding(max_tokens: int, max_chunks: int, data: st.DataObject) -> None:
    """The first that has room, as the runner takes it; the last is the largest, in whose memory the others lie.

    None has as many chunks as tokens: attention would take a prompt's chunk, too, for decoded tokens, 8 rows at a time.
    """
    shapes = chunk_shapes(max_tokens, max_chunks)
    most = min(max_tokens, CHUNK_TOKENS)
    tokens = data.draw(st.integers(2, most))
    chunks = data.draw(st.integers(1, min(max_chunks, tokens - 1)))
    shape = next(each for each in shapes if each.num_tokens >= tokens and each.num_chunks >= chunks)
    assert shape.num_tokens <= min(most, max(16, 2 * tokens if tokens <= 256 else tokens * 9 // 8))
    assert shape.num_samples == shape.num_chunks <= min(max_chunks, 8 * chunks)
    largest = min(max_chunks, most - 1)
    assert shapes[-1] == StepShape(most, largest, largest)
    assert len(set(shapes)) == len(shapes) and all(each.num_chunks < each.num_tokens for each in shapes)


def test_a_limit_of_one_token_has_no_shapes() -> None:
    assert chunk_shapes(1, 5) == []

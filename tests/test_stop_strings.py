"""Stop strings: the same cut and nothing shown too early or too late, wherever the pieces of the text end."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanoinfer.utils.stop_strings import StopFilter, StopStrings

TEXTS = st.text("ab\n é", max_size=40)
STOPS = st.lists(st.text("ab\n é", min_size=1, max_size=6), min_size=1, max_size=5)
PIECES = st.lists(st.integers(0, 6), max_size=60)


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Start and end of the stop string that is complete first; of several at once, of the one that begins earliest."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (min(found)[1], min(found)[0]) if found else None


def unfinished(text: str, stops: list[str]) -> int:
    """Characters of the longest end of the text that begins a stop string and is not all of it."""
    return max(n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n]))


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


@given(TEXTS, STOPS, PIECES, st.booleans())
@example("a", ["ab"], [], True)
def test_the_cut_is_that_of_the_full_text(text: str, stops: list[str], sizes: list[int], include: bool) -> None:
    """Token borders do not matter, nor what follows, nor the order of the stop strings."""
    stream = StopFilter(StopStrings(stops), include)
    shown = "".join([*(stream.push(piece) for piece in cut(text, sizes)), stream.flush()])
    first = first_stop(text, stops)
    if first is None:
        assert (shown, stream.found) == (text, None)
    else:
        assert (shown, stream.found) == (text[: first[include]], text[slice(*first)])


@given(TEXTS, STOPS, PIECES)
def test_exactly_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str], sizes: list[int]) -> None:
    """More would delay the stream for nothing, less would show what must not be shown."""
    stream, seen, shown = StopFilter(StopStrings(stops)), "", ""
    for piece in cut(text, sizes):
        seen += piece
        shown += stream.push(piece)
        if stream.found is not None:
            break
        assert shown == seen[: len(seen) - unfinished(seen, stops)]


@given(TEXTS, STOPS, PIECES)
def test_with_the_stop_string_included_nothing_is_held_back(text: str, stops: list[str], sizes: list[int]) -> None:
    """Nothing before the end of a stop string is ever cut then."""
    stream, seen, shown = StopFilter(StopStrings(stops), include=True), "", ""
    for piece in cut(text, sizes):
        seen += piece
        shown += stream.push(piece)
        assert stream.found is not None or shown == seen


@given(TEXTS, TEXTS, STOPS, PIECES)
def test_passed_over_are_only_those_that_end_in_the_text(early: str, late: str, stops: list[str], sizes: list[int]):
    """min_tokens: the first one that ends after the early text counts, although it may begin within it."""
    stream = StopFilter(StopStrings(stops))
    shown = "".join(stream.push(piece, search=False) for piece in cut(early, sizes))
    assert stream.found is None and shown == early[: len(early) - unfinished(early, stops)]
    shown += "".join(stream.push(piece) for piece in cut(late, sizes)) + stream.flush()
    text = early + late
    ends = (n for n in range(len(early) + 1, len(text) + 1) if text[:n].endswith(tuple(stops)))
    end = next(ends, None)
    if end is None:
        assert (shown, stream.found) == (text, None)
    else:
        longest = max((stop for stop in stops if text[:end].endswith(stop)), key=len)
        assert (shown, stream.found) == (text[: end - len(longest)], longest)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "found"),
    [
        (["</s>"], ["a <", "/s", "> b"], "a ", "</s>"),
        (["late", "early"], ["so early, so late"], "so ", "early"),
        (["b", "ab"], ["xab"], "x", "ab"),  # complete at once: the one that begins earlier
        (["ab", "abc"], ["xabc"], "x", "ab"),  # complete first: nothing after it was needed
        (["abcd", "bc"], ["xabcd"], "xa", "bc"),
        (["aab"], ["a", "a", "a", "b"], "a", "aab"),  # a false start within a false start
        (["世界"], ["世", "人", "世", "界"], "世人", "世界"),
        (["xyz"], ["x", "y"], "xy", None),  # released at the end
    ],
)
def test_examples(stops: list[str], pieces: list[str], shown: str, found: str | None) -> None:
    """The rules, one by one."""
    stream = StopFilter(StopStrings(stops))
    assert "".join(map(stream.push, pieces)) + stream.flush() == shown
    assert stream.found == found


def test_an_empty_stop_string_is_refused() -> None:
    """It would end every text before it begins."""
    with pytest.raises(ValueError, match=r"must not be empty, got \['a', ''\]"):
        StopStrings(["a", ""])


class CountingStops(StopStrings):
    """Counts the places where the automaton looks for a character."""

    def __init__(self, stops: list[str]) -> None:
        self.looks = 0
        super().__init__(stops)

    def step(self, node: int, char: str) -> int:
        self.looks += 1
        before = node
        while before and char not in self.children[before]:
            before = self.fallback[before]
            self.looks += 1
        return super().step(node, char)


@pytest.mark.parametrize("length", [1_000, 4_000])
def test_time_is_linear_in_text_and_stop_strings(length: int) -> None:
    """The worst texts for searching again from each place: a long stop string that nearly matches everywhere."""
    stops = CountingStops(["a" * length + "b", "a" * (length // 2) + "c"])
    assert stops.looks <= 4 * length
    stops.looks = 0
    stream = StopFilter(stops)
    text = ("a" * (length - 1) + "d") * 10
    assert "".join(map(stream.push, text)) + stream.flush() == text
    assert stops.looks <= 2 * len(text)

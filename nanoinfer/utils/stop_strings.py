"""Stop strings: the first of several ends a text, which comes in pieces cut anywhere."""

from collections.abc import Sequence


class StopStrings:
    """The automaton of several stop strings (Aho and Corasick, 1975); it never changes, so that texts may share it.

    A node stands for the first `depth` characters of `owner`, node 0 for none. After any text the automaton is at the
    longest end of that text which begins a stop string. ValueError for an empty stop string: it is everywhere.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError(f"stop strings must not be empty, got {list(stops)}")
        self.children: list[dict[str, int]] = [{}]
        self.owner = [""]
        self.depth = [0]
        self.match: list[str | None] = [None]  # the longest stop string that ends here
        for stop in stops:
            self._add(stop)
        self.fallback = [0] * len(self.depth)  # the node of the longest end that is another node's
        self._link()
        self.starts = frozenset(self.children[0])

    def _add(self, stop: str) -> None:
        node = 0
        for char in stop:
            if char not in self.children[node]:
                self.children[node][char] = len(self.depth)
                self.depth.append(self.depth[node] + 1)
                self.owner.append(stop)
                self.match.append(None)
                self.children.append({})
            node = self.children[node][char]
        self.match[node] = stop

    def _link(self) -> None:
        nodes = list(self.children[0].values())
        for node in nodes:  # breadth first: the list grows
            for char, child in self.children[node].items():
                self.fallback[child] = self.step(self.fallback[node], char)
                self.match[child] = self.match[child] or self.match[self.fallback[child]]
                nodes.append(child)

    def step(self, node: int, char: str) -> int:
        """Where a character leads; constant time on average over a text."""
        children = self.children
        while node and char not in children[node]:
            node = self.fallback[node]
        return children[node].get(char, 0)


class StopFilter:
    """One text, cut at its first stop string, whatever the pieces it comes in; linear time.

    The first is the one that is complete first, of several at once the longest, which begins earliest; so no text after
    a complete stop string is ever needed. Held back is exactly the longest end of the text that may still become a
    stop string, and nothing where the stop string is to be `included`.
    """

    def __init__(self, stops: StopStrings, include: bool = False) -> None:
        self.stops = stops
        self.include = include
        self.node = 0
        self.found: str | None = None  # the stop string that ended the text

    def push(self, text: str, search: bool = True) -> str:
        """What may be shown now; "" for all that follows a stop string.

        With `search=False` stop strings that end within this text are passed over (fewer than min_tokens so far).
        """
        if self.found is not None:
            return ""
        if not self.node and self.stops.starts.isdisjoint(text):
            return text  # nearly always
        before = self.node
        for end, char in enumerate(text, 1):
            self.node = self.stops.step(self.node, char)
            self.found = self.stops.match[self.node] if search else None
            if self.found is not None:
                self.node = 0
                return self._shown(before, text[:end], len(self.found))
        while not self.stops.children[self.node] and self.node:  # passed over, and not the beginning of another
            self.node = self.stops.fallback[self.node]
        return self._shown(before, text, self.stops.depth[self.node])

    def flush(self) -> str:
        """What was held back, as the text ends here."""
        node, self.node = self.node, 0
        return "" if self.include else self.stops.owner[node][: self.stops.depth[node]]

    def _shown(self, before: int, text: str, hidden: int) -> str:
        """What was held back at node `before`, and the text, without the last `hidden` characters of both."""
        if self.include:
            return text
        held = self.stops.depth[before]
        shown = held + len(text) - hidden
        return self.stops.owner[before][: min(held, shown)] + text[: max(0, shown - held)]

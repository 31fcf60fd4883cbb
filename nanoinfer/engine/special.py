"""Special: what some requests of a step want beside a token: their logits changed, log probabilities told.

All of them are served together, in a few calls to torch rather than in some for each, and nothing here waits for the
device: on a GPU this is launched between two graphs and after them, while the first of them executes.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nanoinfer import ops
from nanoinfer.engine.logits_rules import Upload, apply_rules
from nanoinfer.engine.rows import Ints, Step, indices
from nanoinfer.engine.sequence import Sequence, ToldByPlace
from nanoinfer.outputs import TokenLogprobs

# Positions of a prompt at once: 148 MiB of logits for 151,936 ids.
PROMPT_ROWS = 256


@dataclass(slots=True)
class Told:
    """Log probabilities at some places, as `ops.tell_logprobs` gives them."""

    numbers: Tensor
    host: Tensor | None = None  # the same there; `numbers` has to stay until it is complete

    def read(self) -> TokenLogprobs:
        """A row for each place, once they are there."""
        assert self.host is not None, "fetched before the step ends"
        return self.host.numpy().copy()  # rows are kept for as long as their request; pinned memory is used again


@dataclass(frozen=True, slots=True)
class Watched:
    """Samples of which something is told once their tokens are known."""

    seqs: list[Sequence]
    places: Ints  # among the step's samples
    rows: Tensor | slice  # of the logits looked at, and so of the tokens
    logits: Tensor  # as the model gives them
    index: Tensor | None  # rows of `logits`; None: all of them
    count: int  # likeliest ids


class Special:
    """One step's. Log probabilities are those of the logits as the model gave them.

    upload: a copy of a numpy array on the logits' device, made without waiting for it.
    """

    def __init__(self, step: Step, vocab_size: int, upload: Upload) -> None:
        self.vocab_size, self.upload = vocab_size, upload
        chosen = np.flatnonzero(step.special & step.samples)
        self.places = np.cumsum(step.samples)[chosen] - 1
        self.seqs = [step.seqs[i] for i in chosen.tolist()]
        self.lengths = step.ends[chosen].tolist()
        self.watched: list[Watched] = []
        self.told: list[tuple[list[Sequence], Ints, Told]] = []  # whose, and where among the samples
        self.prompts = list(_prompt_chunks(step))
        self.prompt_told: list[tuple[Sequence, int, Told]] = []  # from which position on

    def before(self, logits: Tensor, first: int) -> None:
        """Look at rows first, first + 1, ... of the samples' logits, then change them."""
        begin, end = np.searchsorted(self.places, (first, first + len(logits))).tolist()
        rows, seqs = self.places[begin:end] - first, self.seqs[begin:end]
        self.watched = [self._watch(logits, first, rows[group], [seqs[i] for i in group]) for group in _groups(seqs)]
        asked = [
            (row, seq.rules, seq.tokens, length)
            for row, seq, length in zip(rows.tolist(), seqs, self.lengths[begin:end], strict=True)
            if seq.rules is not None
        ]
        failed = apply_rules(logits, asked, self.vocab_size, self.upload) if asked else {}
        for row, error in failed.items():
            seqs[rows.tolist().index(row)].error = error

    def _watch(self, logits: Tensor, first: int, chosen: Ints, seqs: list[Sequence]) -> Watched:
        """Logits that nobody changes are read when the tokens are known: sampling leaves them as they are, and what is
        written to their memory next comes later in the stream. Of those that change a copy is made."""
        rows = self._rows(chosen)
        index = None
        if seqs[0].changes_logits:
            logits = logits[rows].clone() if isinstance(rows, slice) else logits.index_select(0, rows)
        elif isinstance(rows, slice):
            logits = logits[rows]
        else:
            index = rows
        count = self._count(max(seq.params.logprobs or 0 for seq in seqs))
        return Watched(seqs, chosen + first, rows, logits, index, count)

    def _rows(self, chosen: Ints) -> Tensor | slice:
        """Rows as something to index with: a slice where they follow each other, which spares an upload."""
        begin, last = chosen[[0, -1]].tolist()
        return slice(begin, last + 1) if last - begin + 1 == len(chosen) else self.upload(chosen.astype(np.int32))

    def _count(self, wanted: int) -> int:
        return self.vocab_size if wanted < 0 else min(wanted, self.vocab_size)

    def after(self, tokens: Tensor) -> None:
        """The tokens that were chosen from the rows looked at last."""
        for each in self.watched:
            rows = each.rows
            own = tokens[rows] if isinstance(rows, slice) else tokens.index_select(0, rows)
            told = ops.tell_logprobs(each.logits, each.index, own, self.vocab_size, each.count)
            self.told.append((each.seqs, each.places, Told(told)))
        self.watched = []

    def fetch(self, copy: Callable[[Tensor], Tensor]) -> None:
        """Start to bring all that is told to the host."""
        for *_, told in (*self.told, *self.prompt_told):
            told.host = copy(told.numbers)

    def read(self) -> ToldByPlace:
        """What was fetched, once it is there: of samples by place among them; prompts' goes to their sequences."""
        for seq, first, told in self.prompt_told:
            seq.prompt_logprobs.update(enumerate(told.read(), first))
        found: ToldByPlace = {}
        for seqs, places, told in self.told:
            rows = told.read()
            own = rows.view(np.float32)[:, 2].tolist()
            for seq, place, row, logprob in zip(seqs, places.tolist(), rows, own, strict=True):
                wanted = seq.params.logprobs or 0
                found[place] = row[: 3 + 2 * wanted] if wanted >= 0 else row, logprob
        return found

    def tell_prompts(self, hidden: Tensor, logits: Callable[[Tensor], Tensor], rows_at_once: int) -> None:
        """Log probabilities of prompt tokens, from the hidden states before them, a few rows of logits at a time."""
        rows_at_once = min(rows_at_once, PROMPT_ROWS)
        for seq, start, count, offset in self.prompts:
            wanted = self._count(seq.params.prompt_logprobs or 0)
            for begin in range(0, count, rows_at_once):
                end = min(begin + rows_at_once, count)
                place = start + begin + 1
                tokens = self.upload(np.array(seq.tokens[place : start + end + 1], dtype=np.int32))
                told = ops.tell_logprobs(
                    logits(hidden[offset + begin : offset + end]), None, tokens, self.vocab_size, wanted
                )
                self.prompt_told.append((seq, place, Told(told)))


def _groups(seqs: Seq[Sequence]) -> list[list[int]]:
    """Those that want log probabilities, by their places in the list: all that want few likeliest ids are told of
    together, whatever number each of them wants; but those whose logits change apart from the others."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for i, seq in enumerate(seqs):
        if (count := seq.params.logprobs) is not None:
            key = seq.changes_logits, ops.FEW if 0 <= count <= ops.FEW else count
            groups.setdefault(key, []).append(i)
    return list(groups.values())


def _prompt_chunks(step: Step) -> Iterator[tuple[Sequence, int, int, int]]:
    """Sequence, first position, positions whose next token is the prompt's, and where they are in the step."""
    offsets = np.cumsum(step.ends - step.starts) - (step.ends - step.starts)
    decodes = step.samples & (step.ends - step.starts == 1)
    for i in indices(step.special & ~decodes):
        seq, start = step.seqs[i], int(step.starts[i])
        count = min(int(step.ends[i]), seq.num_prompt_tokens - 1) - start
        if seq.params.prompt_logprobs is not None and count > 0:
            yield seq, start, count, int(offsets[i])

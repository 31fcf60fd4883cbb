"""Special: what some requests of a step want beside a token: their logits changed, log probabilities told.

All of them are served together, in a dozen calls to torch rather than in some for each, and nothing here waits for the
device: on a GPU this runs between two graphs, while the first of them executes.
"""

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoinfer.engine.logits_rules import NEVER, Upload, apply_rules
from nanoinfer.engine.rows import Ints, Step
from nanoinfer.engine.sequence import Sequence, ToldByPlace
from nanoinfer.outputs import TokenLogprobs

# Requests that want no more than so many likeliest ids are told of together, whatever number each of them wants.
FEW = 32
# Positions of a prompt at once: 148 MiB of log probabilities for 151,936 ids.
PROMPT_ROWS = 256
# Most ids that are compared by their largest before any is sorted; sorting alone reads a row several times. The ids of
# published vocabularies are a multiple of it.
TILE = 128


@dataclass(slots=True)
class Told:
    """Log probabilities at some places: of the id that stands there, then of the likeliest ones."""

    numbers: Tensor  # [places, 1 + 2 * ids] int64: likelier ids than the first; ids; bits of their log probabilities
    host: Tensor | None = None  # the same there; `numbers` has to stay until it is complete

    def read(self) -> TokenLogprobs:
        """[places, 1 + 2 * ids], once it is there."""
        assert self.host is not None, "fetched before the step ends"
        numbers = self.host.numpy()
        rows = np.empty((len(numbers), numbers.shape[1]), dtype=np.int32)
        count = rows.shape[1] // 2
        rows[:, 0], rows[:, 1::2], rows[:, 2::2] = numbers[:, 0] + 1, numbers[:, 1 : count + 1], numbers[:, count + 1 :]
        return rows


@dataclass(frozen=True, slots=True)
class Watched:
    """Samples whose log probabilities are kept until their tokens are known."""

    seqs: list[Sequence]
    places: Ints  # among the step's samples
    rows: Tensor | slice  # of the logits
    logprobs: Tensor  # [places, V]
    likeliest: tuple[Tensor, Tensor]


def log_probabilities(logits: Tensor, vocab_size: int) -> Tensor:
    """Of ids below vocab_size; the others' are -inf. Writes that into the logits: half of it would be copied else."""
    logits[:, vocab_size:].fill_(NEVER)
    return logits.log_softmax(1)


def find_likeliest(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row [P, V], largest first, and their ids.

    Tile j is ids j, j + tiles, j + 2 tiles, ...; the largest ids lie in the tiles with the largest maxima. 256 rows of
    151,936 take an H200 110 us, and 600 with topk alone.
    """
    size = math.gcd(logprobs.shape[1], TILE)
    tiles = logprobs.shape[1] // size
    if not 0 < count < tiles:
        values, ids = logprobs.topk(count)
        return values, ids
    tiled = logprobs.unflatten(1, (size, tiles))
    best = tiled.amax(1).topk(count).indices
    values, places = tiled.gather(2, best.unsqueeze(1).expand(-1, size, -1)).flatten(1).topk(count)
    return values, best.gather(1, places % count) + places // count * tiles


def count_true(mask: Tensor) -> Tensor:
    """How many are true in each row [P, V] -> [P, 1]. Eight at a time where that divides V: 25 us instead of 158."""
    if mask.shape[1] % TILE:
        return mask.sum(1, keepdim=True)
    # Each byte of a sum counts to 16 at most.
    eights: Tensor = mask.view(torch.int64).unflatten(1, (TILE // 8, -1)).sum(1)
    return eights.view(torch.uint8).sum(1, keepdim=True)


def tell(logprobs: Tensor, likeliest: tuple[Tensor, Tensor], tokens: Tensor) -> Told:
    """What there is to tell of tokens [P]; where none was chosen (-1), of no use."""
    tokens = tokens.to(torch.int64).clamp_min(0).unsqueeze(1)
    own = logprobs.gather(1, tokens)
    values, ids = likeliest
    parts = count_true(logprobs > own), tokens, ids, own.view(torch.int32), values.view(torch.int32)
    return Told(torch.cat(parts, 1))


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
        places, seqs = self.places[begin:end], self.seqs[begin:end]
        self.watched = [self._watch(logits, first, places, seqs, *group) for group in _by_count(seqs).items()]
        asked = [
            (place - first, seq.rules, seq.tokens, length)
            for place, seq, length in zip(places.tolist(), seqs, self.lengths[begin:end], strict=True)
            if seq.rules is not None
        ]
        failed = apply_rules(logits, asked, self.vocab_size, self.upload) if asked else {}
        for place, seq in zip(places.tolist(), seqs, strict=True):
            if place - first in failed:
                seq.error = failed[place - first]

    def _watch(
        self, logits: Tensor, first: int, places: Ints, seqs: list[Sequence], count: int, members: list[int]
    ) -> Watched:
        places = places[members]
        rows: Tensor | slice = slice(0, len(places))
        if places[-1] - first + 1 != len(places):  # some rows are skipped
            rows = self.upload(places - first)
        count = self.vocab_size if count < 0 else min(count, self.vocab_size)
        logprobs = log_probabilities(logits[rows], self.vocab_size)
        return Watched([seqs[i] for i in members], places, rows, logprobs, find_likeliest(logprobs, count))

    def after(self, tokens: Tensor) -> None:
        """The tokens that were chosen from the rows looked at last."""
        for watched in self.watched:
            self.told.append(
                (watched.seqs, watched.places, tell(watched.logprobs, watched.likeliest, tokens[watched.rows]))
            )
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
            wanted = seq.params.prompt_logprobs or 0
            wanted = self.vocab_size if wanted < 0 else min(wanted, self.vocab_size)
            for begin in range(0, count, rows_at_once):
                end = min(begin + rows_at_once, count)
                logprobs = log_probabilities(logits(hidden[offset + begin : offset + end]), self.vocab_size)
                place = start + begin + 1
                tokens = self.upload(np.array(seq.tokens[place : start + end + 1]))
                self.prompt_told.append((seq, place, tell(logprobs, find_likeliest(logprobs, wanted), tokens)))


def _by_count(seqs: Seq[Sequence]) -> dict[int, list[int]]:
    """Those that want log probabilities, by their places in the list, in groups of one number of likeliest ids."""
    counts = {i: seq.params.logprobs for i, seq in enumerate(seqs) if seq.params.logprobs is not None}
    few = [i for i, count in counts.items() if 0 <= count <= FEW]
    groups = {max(counts[i] for i in few): few} if few else {}
    for i, count in counts.items():
        if not 0 <= count <= FEW:
            groups.setdefault(count, []).append(i)
    return groups


def _prompt_chunks(step: Step) -> Iterator[tuple[Sequence, int, int, int]]:
    """Sequence, first position, positions whose next token is the prompt's, and where they are in the step."""
    offsets = np.cumsum(step.ends - step.starts) - (step.ends - step.starts)
    decodes = step.samples & (step.ends - step.starts == 1)
    for i in np.flatnonzero(step.special & ~decodes).tolist():
        seq, start = step.seqs[i], int(step.starts[i])
        count = min(int(step.ends[i]), seq.num_prompt_tokens - 1) - start
        if seq.params.prompt_logprobs is not None and count > 0:
            yield seq, start, count, int(offsets[i])

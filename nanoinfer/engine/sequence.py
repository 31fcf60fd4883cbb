"""Sequence: one request's tokens and state. Written by Scheduler and BlockManager only."""

from dataclasses import dataclass, field
from enum import Enum

from nanoinfer.sampling_params import SamplingParams


class Status(Enum):
    """WAITING holds no blocks; RUNNING holds blocks and a row; FINISHED holds a row only until its last commit."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


@dataclass(slots=True, eq=False)
class Sequence:
    """A request with two lengths: what has been launched (in flight) and what has been committed.

    `tokens` are the known ones; `pending` counts sampled tokens that the device has and the host does not yet.
    """

    request_id: str
    index: int  # order of arrival
    tokens: list[int]  # the prompt, then what was generated
    num_prompt_tokens: int
    params: SamplingParams
    max_length: int  # ends with finish_reason "length" at this many tokens
    stop_ids: frozenset[int]
    seed: int
    prompt: str | None = None
    cache_salt: str = ""

    status: Status = Status.WAITING
    num_scheduled: int = 0  # tokens whose KV is written once every launched step is done
    num_committed: int = 0  # tokens whose KV is written
    pending: int = 0
    in_flight: int = 0  # launched chunks that are not yet committed
    num_preemptions: int = 0
    num_cached_tokens: int = 0  # of the prompt, when it was first admitted

    row: int = -1  # in the device's table of requests
    block_table: list[int] = field(default_factory=list)
    num_shared_tokens: int = 0  # positions below this lie in blocks that others may read: never written
    chain: list[int] = field(default_factory=list)  # prefix cache entry of each leading full block

    finish_reason: str | None = None
    stop_reason: int | None = None
    error: str | None = None

    @property
    def length(self) -> int:
        """All tokens, those in flight included."""
        return len(self.tokens) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens to launch before the next one can be sampled; 1 while decoding, 0 when nothing may be launched."""
        return self.length - self.num_scheduled if self.length < self.max_length else 0

    @property
    def output_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Run tokens [start, end) of seq in this step."""

    seq: Sequence
    start: int
    end: int
    sample: bool  # the token after `end` is wanted
    store: bool  # False: the position lies in a shared block and is recomputed for its logits only

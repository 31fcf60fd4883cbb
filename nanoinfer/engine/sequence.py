"""Sequence: one request's tokens and state."""

from dataclasses import dataclass, field
from enum import Enum

from nanoinfer.engine.logits_rules import FOR_EVER, LogitsRules
from nanoinfer.engine.rows import Rows
from nanoinfer.outputs import TokenLogprobs
from nanoinfer.sampling_params import SamplingParams

NOBODYS = Rows(0)
# Of tokens, by place among those of a step: what is told, and the token's own log probability once more.
ToldByPlace = dict[int, tuple[TokenLogprobs, float]]


class Status(Enum):
    """WAITING holds no blocks; RUNNING holds blocks and a row; FINISHED holds a row only until its last commit."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


@dataclass(slots=True, eq=False)
class Sequence:
    """A request with two lengths: what has been launched (in flight) and what has been committed.

    `tokens` are the known ones; `pending` counts sampled tokens that the device has and the host does not yet. What
    changes with every step stands in `rows` for as long as it has a row. Written by Scheduler and BlockManager only,
    but for what Special tells beside tokens.
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
    num_preemptions: int = 0
    num_cached_tokens: int = 0  # of the prompt, when it was first admitted

    rules: LogitsRules | None = None
    changes_logits: bool = field(init=False)  # what its tokens are chosen from is not what the model gave
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one for each output token, where they are asked for
    cumulative_logprob: float = 0.0  # of the output tokens, likewise
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by position

    rows: Rows = NOBODYS
    row: int = -1  # in `rows`, and in the device's table of requests
    block_table: list[int] = field(default_factory=list)
    num_shared_tokens: int = 0  # positions below this lie in blocks that others may read: never written
    chain: list[int] = field(default_factory=list)  # prefix cache entry of each leading full block

    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    arrival_time: float = 0.0  # by time.monotonic(), as those below; 0: not yet
    scheduled_time: float = 0.0
    first_token_time: float = 0.0
    finished_time: float = 0.0

    def __post_init__(self) -> None:
        params = self.params
        penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self.changes_logits = self.rules is not None or penalties != (1, 0, 0)

    @property
    def special_until(self) -> int:
        """Chunks that start below this want more than tokens: logits changed, or log probabilities told."""
        params = self.params
        if params.logprobs is not None:
            return FOR_EVER
        of_prompt = 0 if params.prompt_logprobs is None else self.num_prompt_tokens - 1
        return max(of_prompt, 0 if self.rules is None else self.rules.until - 1)

    @property
    def length(self) -> int:
        """All tokens, those in flight included."""
        return int(self.rows.length[self.row]) if self.row >= 0 else len(self.tokens)

    @property
    def pending(self) -> int:
        return self.length - len(self.tokens)

    @property
    def num_scheduled(self) -> int:
        """Tokens whose KV is written once every launched step is done."""
        return int(self.rows.scheduled[self.row]) if self.row >= 0 else 0

    @property
    def num_committed(self) -> int:
        """Tokens whose KV is written."""
        return int(self.rows.committed[self.row]) if self.row >= 0 else 0

    @property
    def in_flight(self) -> int:
        """Launched chunks that are not yet committed."""
        return int(self.rows.in_flight[self.row]) if self.row >= 0 else 0

    @property
    def output_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

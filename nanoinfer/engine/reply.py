"""Reply: what becomes of one request, its sequences and, where somebody needs it before the end, their text."""

from nanoinfer.engine.sequence import Sequence, Status
from nanoinfer.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanoinfer.utils.detokenizer import Detokenizer
from nanoinfer.utils.stop_strings import StopFilter
from nanoinfer.utils.tokenizer import Tokenizer


class TextStream:
    """One sequence's text as its tokens come, up to the first stop string. detokenizer None: tokens without text."""

    def __init__(self, detokenizer: Detokenizer | None, stops: StopFilter | None) -> None:
        self.detokenizer, self.stops = detokenizer, stops
        self.text: list[str] = []
        self.num_tokens = 0  # of the output, taken in so far
        self.closed = False
        self.told = 0, 0  # parts of the text and tokens that `delta` has handed out

    def advance(self, seq: Sequence) -> str | None:
        """Take in what the sequence has generated since; the stop string that this completes."""
        self.closed = seq.status is Status.FINISHED
        # An id that ended the sequence is one of its tokens, and no part of its text.
        end = len(seq.tokens) - (self.closed and seq.finish_reason == "stop")
        ids = seq.tokens[seq.num_prompt_tokens + self.num_tokens : end]
        self.num_tokens += len(ids)
        if self.detokenizer is not None:
            self._show(self.detokenizer.push(ids))
            if self.closed:
                self._show(self.detokenizer.flush())
        if self.stops is None or self.stops.found is None:
            if self.closed and self.stops is not None:
                self.text.append(self.stops.flush())
            return None
        self.closed = True
        return self.stops.found

    def _show(self, text: str) -> None:
        if shown := self.stops.push(text) if self.stops is not None else text:
            self.text.append(shown)

    def delta(self, seq: Sequence) -> tuple[str, list[int]]:
        """The text and tokens that are new since the last call."""
        parts, tokens = self.told
        ids = seq.tokens[seq.num_prompt_tokens + tokens :]
        self.told = len(self.text), tokens + len(ids)
        return "".join(self.text[parts:]), ids


class Reply:
    """One request's sequences, and their streams where it has stop strings or is streamed, else none."""

    def __init__(self, seqs: list[Sequence], streams: list[TextStream]) -> None:
        self.seqs, self.streams = seqs, streams

    @property
    def request_id(self) -> str:
        return self.seqs[0].request_id

    @property
    def finished(self) -> bool:
        return all(seq.status is Status.FINISHED for seq in self.seqs)

    def output(self, tokenizer: Tokenizer | None) -> RequestOutput:
        """All of it so far."""
        if self.streams:
            texts = ["".join(stream.text) for stream in self.streams]
        else:
            texts = [_text(seq, tokenizer) for seq in self.seqs]
        return self._pack([(text, seq.output_tokens) for text, seq in zip(texts, self.seqs, strict=True)])

    def delta(self) -> RequestOutput | None:
        """What is new since the last call, of every sequence; None where nothing is."""
        parts = [stream.delta(seq) for stream, seq in zip(self.streams, self.seqs, strict=True)]
        return self._pack(parts) if any(ids for _, ids in parts) or self.finished else None

    def _pack(self, parts: list[tuple[str, list[int]]]) -> RequestOutput:
        first = self.seqs[0]
        return RequestOutput(
            first.request_id, first.prompt, first.tokens[: first.num_prompt_tokens],
            [CompletionOutput(i, text, ids, seq.finish_reason, seq.stop_reason)
             for i, (seq, (text, ids)) in enumerate(zip(self.seqs, parts, strict=True))],
            finished=self.finished, num_cached_tokens=first.num_cached_tokens,
            error=next((seq.error for seq in self.seqs if seq.error), None), metrics=self._metrics(),
        )  # fmt: skip

    def _metrics(self) -> RequestMetrics:
        def earliest(times: list[float]) -> float:
            return min((time for time in times if time), default=0.0)

        return RequestMetrics(
            arrival_time=self.seqs[0].arrival_time,
            first_scheduled_time=earliest([seq.scheduled_time for seq in self.seqs]),
            first_token_time=earliest([seq.first_token_time for seq in self.seqs]),
            last_token_time=max(seq.finished_time for seq in self.seqs),
            num_preemptions=sum(seq.num_preemptions for seq in self.seqs),
        )


def _text(seq: Sequence, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None or not seq.params.detokenize:
        return ""
    ids = seq.output_tokens
    shown = ids[:-1] if seq.finish_reason == "stop" else ids  # what ended the text is no part of it
    return tokenizer.decode(shown, seq.params.skip_special_tokens)

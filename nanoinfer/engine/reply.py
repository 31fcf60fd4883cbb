"""Reply: what becomes of one request, its sequences and, where somebody needs it before the end, their text."""

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import cast

from nanoinfer.engine.sequence import Sequence, Status
from nanoinfer.outputs import CompletionOutput, Logprob, Logprobs, RequestMetrics, RequestOutput
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
        ids = seq.tokens[seq.num_prompt_tokens + self.num_tokens : _text_end(seq)]
        self.num_tokens += len(ids)
        if self.detokenizer is not None:
            self._show(self.detokenizer.push(ids), seq.params.min_tokens)
            if self.closed:
                self._show(self.detokenizer.flush(), seq.params.min_tokens)
        if self.stops is None or self.stops.found is None:
            if self.closed and self.stops is not None:
                self.text.append(self.stops.flush())
            return None
        self.closed = True
        return self.stops.found

    def _show(self, text: str, min_tokens: int) -> None:
        if shown := self.stops.push(text, self.num_tokens > min_tokens) if self.stops is not None else text:
            self.text.append(shown)

    def delta(self, seq: Sequence) -> tuple[str, list[int]]:
        """The text and tokens that are new since the last call."""
        parts, tokens = self.told
        ids = seq.tokens[seq.num_prompt_tokens + tokens :]
        self.told = len(self.text), tokens + len(ids)
        return "".join(self.text[parts:]), ids


class TokenTexts(dict[int, str | None]):
    """Token id -> its text by itself, decoded when first asked for; None without a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, id_: int) -> str | None:
        self[id_] = text = self.tokenizer.decode([id_], False) if self.tokenizer is not None else None
        return text


class Reply:
    """One request's sequences, and their streams where it has stop strings or is streamed, else none."""

    def __init__(
        self, seqs: list[Sequence], streams: list[TextStream], tokenizer: Tokenizer | None, texts: TokenTexts
    ) -> None:
        self.seqs, self.streams, self.tokenizer, self.texts = seqs, streams, tokenizer, texts

    @property
    def request_id(self) -> str:
        return self.seqs[0].request_id

    @property
    def finished(self) -> bool:
        return all(seq.status is Status.FINISHED for seq in self.seqs)

    def output(self) -> RequestOutput:
        """All of it so far."""
        if self.streams:
            texts = ["".join(stream.text) for stream in self.streams]
        else:
            texts = [_text(seq, self.tokenizer) for seq in self.seqs]
        return self._pack([(text, seq.output_tokens) for text, seq in zip(texts, self.seqs, strict=True)])

    def delta(self) -> RequestOutput | None:
        """What is new since the last call, of every sequence; None where nothing is."""
        parts = [stream.delta(seq) for stream, seq in zip(self.streams, self.seqs, strict=True)]
        return self._pack(parts) if any(ids for _, ids in parts) or self.finished else None

    def _pack(self, parts: list[tuple[str, list[int]]]) -> RequestOutput:
        first = self.seqs[0]
        return RequestOutput(
            first.request_id, first.prompt, first.tokens[: first.num_prompt_tokens],
            [self._choice(i, *part) for i, part in enumerate(parts)],
            finished=self.finished, num_cached_tokens=first.num_cached_tokens,
            error=next((seq.error for seq in self.seqs if seq.error), None), metrics=self._metrics(),
            prompt_logprobs=self._prompt_logprobs(),
        )  # fmt: skip

    def _choice(self, index: int, text: str, ids: list[int]) -> CompletionOutput:
        """`ids` are the sequence's last output tokens: all, or those that are new."""
        seq = self.seqs[index]
        output = CompletionOutput(index, text, ids, seq.finish_reason, seq.stop_reason)
        if seq.params.logprobs is None:
            return output
        told = Logprobs(seq.logprobs[len(seq.logprobs) - len(ids) :], self.texts)
        dicts = cast("Seq[dict[int, Logprob]]", told)  # a token has one
        return replace(output, cumulative_logprob=seq.cumulative_logprob, logprobs=dicts)

    def _prompt_logprobs(self) -> Logprobs | None:
        first = self.seqs[0]
        if first.params.prompt_logprobs is None:
            return None
        return Logprobs([first.prompt_logprobs.get(place) for place in range(first.num_prompt_tokens)], self.texts)

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


def _text_end(seq: Sequence) -> int:
    """Tokens up to here make the text: an id that ended the sequence is part of it only where that is asked for."""
    return len(seq.tokens) - (seq.finish_reason == "stop" and not seq.params.include_stop_str_in_output)


def _text(seq: Sequence, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None or not seq.params.detokenize:
        return ""
    shown = seq.tokens[seq.num_prompt_tokens : _text_end(seq)]
    return tokenizer.decode(shown, seq.params.skip_special_tokens, seq.params.spaces_between_special_tokens)

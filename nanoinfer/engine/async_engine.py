"""AsyncLLMEngine: the engine on a thread of its own, its outputs as async iterators. The engine knows nothing of it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

from nanoinfer.engine.llm_engine import LLMEngine
from nanoinfer.engine.reply import Reply
from nanoinfer.engine.requests import Request
from nanoinfer.engine_config import EngineArgs
from nanoinfer.errors import EngineDead
from nanoinfer.inputs import PromptType
from nanoinfer.outputs import RequestOutput
from nanoinfer.sampling_params import RequestOutputKind, SamplingParams


@dataclass(eq=False)
class Stream:
    """One caller who waits, and what the engine's thread sends it."""

    loop: asyncio.AbstractEventLoop
    kind: RequestOutputKind
    outputs: "asyncio.Queue[RequestOutput | Exception]" = field(default_factory=asyncio.Queue)
    reply: Reply | None = None  # once it is queued; None again when it has ended

    def send(self, item: RequestOutput | Exception) -> None:
        """From the engine's thread. A caller whose loop has closed hears nothing any more."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.outputs.put_nowait, item)


class AsyncLLMEngine:
    """Takes the options of EngineConfig. Close it when done, or use it in a `with`."""

    def __init__(self, model: str | Path, **options: object) -> None:
        self.engine = LLMEngine(model, **options)
        self.streams: list[Stream] = []  # the thread's own, as is the engine from here on
        self.inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None: end
        self.ended: Exception | None = None  # why the thread serves nobody any more; read and set with the lock held
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, name="nanoinfer engine", daemon=True)
        self.thread.start()

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> "AsyncLLMEngine":
        """The engine that EngineArgs describe, as vLLM's scripts make it."""
        return cls(args.model, **args.options)

    async def generate(
        self, prompt: PromptType, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's output as it grows, as sampling_params.output_kind says; the last one is finished.

        Leaving the loop, or cancelling the task, ends the request. Raises InvalidRequest, EngineDead.
        """
        request = await asyncio.to_thread(self.engine.check, prompt, sampling_params)
        stream = Stream(asyncio.get_running_loop(), request.params.output_kind)
        with self.lock:
            if self.ended is not None:
                raise self.ended
            self.inbox.put(partial(self._open, stream, request, request_id))
        try:
            while True:
                item = await stream.outputs.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finished:
                    return
        finally:
            self.inbox.put(partial(self._end, stream))

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests: their iterators yield what there is, with finish_reason "abort". Unknown ids are ignored."""
        ids = {request_id} if isinstance(request_id, str) else set(request_id)
        self.inbox.put(partial(self._abort, ids))

    def close(self) -> None:
        """End all requests and give the memory back. Closing twice is fine."""
        if self.thread.is_alive():
            self.inbox.put(None)
            self.thread.join()
        self.engine.close()

    def __enter__(self) -> "AsyncLLMEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        """The thread: do what callers ask for, step, tell them what came."""
        error: Exception = EngineDead("the engine is closed")
        try:
            while self._serve_inbox():
                self.engine.step()
                self._deliver()
        except Exception as failure:
            error = failure
        with self.lock:  # whoever comes later sees `ended`
            self.ended = error
        while not self.inbox.empty():
            if task := self.inbox.get():
                task()
        for stream in self.streams:
            stream.send(error)

    def _serve_inbox(self) -> bool:
        """Take what is there, and wait for more only while nothing runs; False at the end."""
        wait = not self.engine.has_unfinished_requests()
        while True:
            try:
                task = self.inbox.get(block=wait)
            except Empty:
                return True
            if task is None:
                return False
            task()
            wait = not self.engine.has_unfinished_requests()

    def _open(self, stream: Stream, request: Request, request_id: str | None) -> None:
        if self.ended is not None:
            stream.send(self.ended)
            return
        try:
            request_id = self.engine.enqueue(request, request_id, stream=True)
        except ValueError as error:  # an id that is in use
            stream.send(error)
            return
        stream.reply = self.engine.replies[request_id]
        self.streams.append(stream)

    def _end(self, stream: Stream) -> None:
        if stream in self.streams:
            self.streams.remove(stream)
        if stream.reply is not None and not stream.reply.finished:
            self.engine.abort_request(stream.reply.request_id)

    def _abort(self, request_ids: set[str]) -> None:
        self.engine.abort_request(request_ids)
        self._deliver()  # there may be no other step

    def _deliver(self) -> None:
        for stream in list(self.streams):
            assert stream.reply is not None
            new = stream.reply.delta()
            if new is None or (stream.kind is RequestOutputKind.FINAL_ONLY and not new.finished):
                continue
            stream.send(new if stream.kind is RequestOutputKind.DELTA else stream.reply.output())
            if new.finished:
                self.streams.remove(stream)

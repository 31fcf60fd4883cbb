"""What a request gives back: stop strings, several completions, streams, chats, times. On the demo model."""

import gc
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoinfer import LLM, InvalidRequest, SamplingParams
from nanoinfer.outputs import RequestOutput

DEMO = Path(__file__).parent.parent / "nanoinfer" / "assets" / "demo"
PROMPTS = ["def fibonacci(n):\n", "class Stack:\n    def push(self, item):\n", "import os\n"]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module", params=[False, True], ids=["lockstep", "a step ahead"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(DEMO, dtype="float32", device="cpu", max_num_seqs=8, async_scheduling=request.param) as llm:
        yield llm


@pytest.fixture(autouse=True)
def everything_comes_back(llm: LLM) -> Iterator[None]:
    yield
    engine = llm.llm_engine
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.blocks.num_free == engine.blocks.num_blocks and not engine.replies and not engine.watched


def text_of(llm: LLM, prompt: str, **options: object) -> RequestOutput:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 40, "ignore_eos": True} | options)
    return llm.generate(prompt, params, use_tqdm=False)[0]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_wherever_tokens_are_cut(llm: LLM, include: bool) -> None:
    """Every substring of the text as a stop string: text up to its first place, no token more than that takes."""
    whole = text_of(llm, PROMPTS[0])
    text = whole["text"]
    for begin in range(0, min(len(text), 60), 7):
        for length in (1, 2, 5):
            stop = text[begin : begin + length]
            out = text_of(llm, PROMPTS[0], stop=["\0 never", stop], include_stop_str_in_output=include).outputs[0]
            end = text.index(stop)
            assert out.text == text[: end + len(stop) * include]
            assert (out.finish_reason, out.stop_reason) == ("stop", stop)
            assert out.token_ids == whole["token_ids"][: len(out.token_ids)]
            tokenizer = llm.llm_engine.tokenizer
            assert stop not in tokenizer.decode(out.token_ids[:-1], True), "it went on after the stop string"


@pytest.mark.parametrize("stop", [None, "\0 never"], ids=["whole", "followed"])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_ids_own_text_shows_where_asked_for(llm: LLM, stop: str | None, include: bool) -> None:
    """As a stop string's does, whether the text is made at the end or followed; the id is a token either way."""
    ids = text_of(llm, PROMPTS[0])["token_ids"]
    out = text_of(llm, PROMPTS[0], stop_token_ids=[ids[5]], stop=stop, include_stop_str_in_output=include).outputs[0]
    end = ids.index(ids[5]) + 1
    assert (out.token_ids, out.stop_reason) == (ids[:end], ids[5])
    assert out.text == llm.llm_engine.tokenizer.decode(ids[: end - (not include)], True)


def test_a_stop_string_that_never_comes_changes_nothing(llm: LLM) -> None:
    """Not even at the end, where what could have become one is still held back."""
    whole = text_of(llm, PROMPTS[0])
    out = text_of(llm, PROMPTS[0], stop=whole["text"][-3:] + "\0")
    assert (out["text"], out.outputs[0].finish_reason) == (whole["text"], "length")


def test_a_stop_string_frees_the_request_at_once(llm: LLM) -> None:
    """Its row and blocks are for others; neighbours do not notice."""
    alone = text_of(llm, PROMPTS[1])
    stop = text_of(llm, PROMPTS[0])["text"][3:6]
    outs = llm.generate(PROMPTS[:2], [SamplingParams(temperature=0, max_tokens=40, stop=stop), GREEDY], use_tqdm=False)
    assert outs[0].outputs[0].stop_reason == stop
    assert outs[1]["token_ids"] == alone["token_ids"]


def test_completions_of_one_prompt(llm: LLM) -> None:
    """n of them: completion i is what the prompt alone gives with seed + i; without a seed all differ."""
    out = text_of(llm, PROMPTS[0], temperature=1.0, seed=11, n=3)
    assert [choice.index for choice in out.outputs] == [0, 1, 2]
    alone = [text_of(llm, PROMPTS[0], temperature=1.0, seed=11 + i)["token_ids"] for i in range(3)]
    assert [choice.token_ids for choice in out.outputs] == alone
    free = text_of(llm, PROMPTS[0], temperature=1.0, n=4)
    assert len({tuple(choice.token_ids) for choice in free.outputs}) == 4


def test_completions_end_each_in_their_own_way(llm: LLM) -> None:
    """One may meet a stop string long before another reaches its length; the request finishes with the last."""
    out = text_of(llm, PROMPTS[2], temperature=1.0, seed=3, n=6, stop=["class"], max_tokens=30)
    assert {choice.finish_reason for choice in out.outputs} == {"stop", "length"}
    assert out.finished and len({len(choice.token_ids) for choice in out.outputs}) > 1


@pytest.mark.parametrize("options", [{}, {"stop": ["(", "self."]}, {"n": 3, "temperature": 1.0, "seed": 5}], ids=str)
def test_deltas_make_the_text(llm: LLM, options: dict[str, object]) -> None:
    """Put together, a stream is what generate gives, for every prompt and completion, and arrives bit by bit."""
    params = SamplingParams(**{"temperature": 0, "max_tokens": 40, "ignore_eos": True} | options)
    whole = llm.generate(PROMPTS, params, use_tqdm=False)
    texts, tokens, last = defaultdict(str), defaultdict(list), {}
    count = 0
    for delta in llm.stream(PROMPTS, params):
        count += 1
        for choice in delta.outputs:
            texts[delta.index, choice.index] += choice.text
            tokens[delta.index, choice.index] += choice.token_ids
            last[delta.index, choice.index] = choice.finish_reason
    for i, out in enumerate(whole):
        for choice in out.outputs:
            assert texts[i, choice.index] == choice.text
            assert tokens[i, choice.index] == choice.token_ids
            assert last[i, choice.index] == choice.finish_reason
    assert count > max(len(choice.token_ids) for out in whole for choice in out.outputs) / 2


def test_a_stop_token_is_no_part_of_a_stream(llm: LLM) -> None:
    """Its id is among the tokens; what it would read as is not in the text, streamed or whole."""
    ids = text_of(llm, PROMPTS[0])["token_ids"]
    params = SamplingParams(temperature=0, max_tokens=40, stop_token_ids=[ids[7]])
    (whole,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    end = ids.index(ids[7])
    assert whole["token_ids"] == ids[: end + 1]
    assert whole["text"] == llm.llm_engine.tokenizer.decode(ids[:end], True)
    assert "".join(delta["text"] for delta in llm.stream(PROMPTS[0], params)) == whole["text"]


@pytest.mark.parametrize("spaces", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_in_a_text(llm: LLM, skip: bool, spaces: bool) -> None:
    """Left out, or shown as transformers shows them, whatever is said of spaces between; streamed as well."""
    tokenizer = llm.get_tokenizer()
    allowed = [*tokenizer.all_special_ids, *tokenizer.encode(" def x")]
    params = SamplingParams(
        allowed_token_ids=allowed, max_tokens=30, seed=1, ignore_eos=True, temperature=2.0, skip_special_tokens=skip,
        spaces_between_special_tokens=spaces,
    )  # fmt: skip
    (whole,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    options = {"skip_special_tokens": skip, "spaces_between_special_tokens": spaces}
    assert whole["text"] == tokenizer.decode(whole["token_ids"], **options)
    assert any(token in whole["text"] for token in tokenizer.all_special_tokens) != skip
    assert "".join(delta["text"] for delta in llm.stream(PROMPTS[0], params)) == whole["text"]


def test_leaving_a_stream_ends_its_requests(llm: LLM) -> None:
    """Nobody pays for tokens that nobody reads."""
    for delta in llm.stream(PROMPTS, GREEDY):
        assert delta.outputs
        break
    gc.collect()
    assert not llm.llm_engine.replies
    assert llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].finished


def test_bad_prompts_are_refused_before_the_stream_begins(llm: LLM) -> None:
    """Not at the first delta, when work may have been done."""
    with pytest.raises(InvalidRequest, match=r"prompts\[1\]: prompt is empty"):
        llm.stream([PROMPTS[0], []], GREEDY)


def test_errors_can_be_returned(llm: LLM) -> None:
    """On the output of the prompt they belong to; its neighbours are served. They raise where that is not asked for."""
    prompts = [PROMPTS[0], [], PROMPTS[1], [10**6]]
    outs = llm.generate(prompts, GREEDY, use_tqdm=False, on_error="return")
    assert [out.index for out in outs] == [0, 1, 2, 3]
    assert [out.outputs[0].finish_reason for out in outs] == ["length", "error", "length", "error"]
    assert "prompt is empty" in outs[1].error and "out of vocabulary" in outs[3].error
    assert outs[2]["text"] == text_of(llm, PROMPTS[1])["text"]
    with pytest.raises(InvalidRequest, match="on_error must be one of 'raise', 'return', got 'ignore'"):
        llm.generate(prompts, GREEDY, on_error="ignore")


def test_a_second_thread_is_told_so(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would otherwise write into the first one's half-written books; nothing of the first is harmed."""
    engine = llm.llm_engine
    step, errors = engine.loop.step, []

    def intrude() -> None:
        with pytest.raises(RuntimeError) as error:
            engine.step()
        errors.append(str(error.value))

    def slow_step() -> list:
        second = threading.Thread(target=intrude)
        second.start()
        second.join()
        return step()

    alone = text_of(llm, PROMPTS[0])["text"]
    monkeypatch.setattr(engine.loop, "step", slow_step)
    assert text_of(llm, PROMPTS[0])["text"] == alone
    assert len(errors) >= 40 and all("another thread is in step()" in error for error in errors)


def test_stats_follow_the_requests(llm: LLM) -> None:
    engine = llm.llm_engine
    before = engine.stats()
    assert (before.num_running, before.num_waiting, before.kv_cache_usage) == (0, 0, 0)
    for _ in range(10):
        engine.add_request(list(range(40)), GREEDY)
    engine.step()
    during = engine.stats()
    assert (during.num_running, during.num_waiting) == (8, 2) and 0 < during.kv_cache_usage < 1
    while engine.has_unfinished_requests():
        engine.step()
    after = engine.stats()
    assert after.num_generated_tokens - before.num_generated_tokens == 10 * 40
    assert after.generated_tokens_per_s > 0 and 0 < after.prefix_cache_hit_rate <= 1


def test_callback_gets_each_output_once(llm: LLM) -> None:
    seen: list[RequestOutput] = []
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (20, 3, 9)]
    outs = llm.generate(PROMPTS, params, use_tqdm=False, callback=seen.append)
    assert [out.index for out in seen] == [1, 2, 0]
    assert sorted(seen, key=lambda out: out.index) == outs


def test_callback_gets_refused_prompts_too(llm: LLM) -> None:
    """Each with its own prompt's place, whatever was refused before it."""
    seen: list[RequestOutput] = []
    prompts = ["", PROMPTS[0], [-1], PROMPTS[1]]
    outs = llm.generate(prompts, GREEDY, use_tqdm=False, callback=seen.append, on_error="return")
    assert [out.index for out in outs] == [0, 1, 2, 3] and sorted(seen, key=lambda out: out.index) == outs
    assert [out.prompt for out in outs] == [None, PROMPTS[0], None, PROMPTS[1]]


def test_a_request_aborted_meanwhile_keeps_nobody_waiting(llm: LLM) -> None:
    """Its output is what it had; somebody else's that nobody has fetched yet stays for them."""
    engine = llm.llm_engine
    foreign = engine.add_request(PROMPTS[2], SamplingParams(max_tokens=1))

    def abort_all(output: RequestOutput) -> None:
        engine.abort_request(set(engine.replies) - {foreign})

    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (40, 4, 40)]
    outs = llm.generate(PROMPTS, params, use_tqdm=False, callback=abort_all)
    assert [out.outputs[0].finish_reason for out in outs] == ["abort", "length", "abort"]
    whole = text_of(llm, PROMPTS[0])["token_ids"]
    assert 0 < len(outs[0]["token_ids"]) < 40 and outs[0]["token_ids"] == whole[: len(outs[0]["token_ids"])]
    ids = llm.enqueue(PROMPTS, GREEDY)
    engine.abort_request(ids[1])
    assert [out.request_id for out in llm.wait_for_completion(use_tqdm=False)] == [ids[0], ids[2]]
    engine.abort_request(llm.enqueue(PROMPTS[0], GREEDY))
    assert llm.wait_for_completion(use_tqdm=False) == []
    assert [out.request_id for out in engine.step()] == [foreign]


def test_enqueued_prompts_come_in_their_order(llm: LLM) -> None:
    ids = llm.enqueue(PROMPTS[:2], GREEDY) + llm.enqueue(PROMPTS[2], GREEDY)
    outs = llm.wait_for_completion(use_tqdm=False)
    assert [out.request_id for out in outs] == ids
    assert [out["text"] for out in outs] == [text_of(llm, prompt)["text"] for prompt in PROMPTS]
    assert llm.wait_for_completion(use_tqdm=False) == []


def test_times_are_in_order(llm: LLM) -> None:
    """Arrival, first scheduled, first token, last token; one that had to wait was scheduled later."""
    outs = llm.generate([PROMPTS[0]] * 9, GREEDY, use_tqdm=False)  # 8 run at once
    for out in outs:
        times = out.metrics
        assert 0 < times.arrival_time <= times.first_scheduled_time < times.first_token_time < times.last_token_time
    assert outs[8].metrics.first_scheduled_time > outs[0].metrics.first_token_time


def test_chat_forms(llm: LLM) -> None:
    """One conversation or several, strings or text parts, another template, and going on with the last message."""
    one = [{"role": "user", "content": "Hi"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    (out,) = llm.chat(one, GREEDY, use_tqdm=False)
    both = llm.chat([one, parts], GREEDY, use_tqdm=False)
    assert [each.prompt for each in both] == [out.prompt] * 2 and both[1]["text"] == out["text"]
    (other,) = llm.chat(one, GREEDY, use_tqdm=False, chat_template="{{ messages[0].content }}!")
    assert other.prompt == "Hi!"
    (more,) = llm.chat(
        [*one, {"role": "assistant", "content": "Ye"}], GREEDY, use_tqdm=False, continue_final_message=True
    )
    assert more.prompt.endswith("Ye")
    assert llm.chat([], GREEDY, use_tqdm=False) == []


def test_chat_templates_get_strings_or_parts(llm: LLM) -> None:
    """Parts come in lines, as with vLLM; a template for parts gets parts, also where the content is a string."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "A"}, "B"]}]
    assert llm.chat(parts, GREEDY, False, chat_template="{{ messages[0].content }}")[0].prompt == "A\nB"
    template = "{% for part in messages[0].content %}{{ part.type }} {{ part.text }};{% endfor %}"
    for messages, text in (parts, "text A;text B;"), ([{"role": "user", "content": "C"}], "text C;"):
        options = {"chat_template": template, "chat_template_content_format": "openai"}
        assert llm.chat(messages, GREEDY, False, **options)[0].prompt == text
    template = "{{ name }} {{ messages[0].content }}"
    out = llm.chat(parts, GREEDY, False, chat_template=template, chat_template_kwargs={"name": "x"})[0]
    assert out.prompt == "x A\nB"


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [("Hi", {}, "messages must be a list of dicts, or of such lists, got 'Hi'"), (USER, {}, "messages must be a list"),
     (["Hi"], {}, "messages[0] must be a dict with a 'role' and a 'content', got 'Hi'"),
     ([[USER], []], {}, "messages[1] must hold at least 1 message, got []"), ([[USER], 5], {}, "messages[1] must hold"),
     ([[USER], [USER, {"content": "Hi"}]], {}, "messages[1][1] must be a dict with a 'role'"),
     ([{"role": "user", "content": 5}], {}, "messages[0]['content'] must be a string or a list of text parts, got 5"),
     ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "got {'type': 'image_url'}"),
     ([{"role": "user", "content": [{"type": "text"}]}], {}, "got {'type': 'text'}"),
     ([USER], {"chat_template": "{{ raise_exception('no users') }}"}, "do not fit the chat template: no users"),
     ([USER], {"chat_template": "{{ messages"}, "do not fit the chat template"),
     ([USER], {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs must not hold ['tokenize']"),
     ([USER], {"chat_template_content_format": "json"}, "must be one of 'auto', 'string', 'openai', got 'json'"),
     ([USER], {"lora_request": 1}, "lora_request must be one of None, got 1")],
    ids=str,
)  # fmt: skip
def test_what_no_template_can_say_is_refused(
    llm: LLM, messages: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequest) as error:
        llm.chat(messages, GREEDY, use_tqdm=False, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stop": ""}, "stop must be"), ({"stop": ["a", ""]}, "stop must be"), ({"stop": [1]}, "stop must be"),
     ({"stop": ["a"], "detokenize": False}, "needs detokenize=True"),
     ({"stop": ["a"] * 1025}, "1024 strings, got 1025"),
     ({"n": 0}, r"n must lie in \[1, 4096\], got 0"), ({"n": 2, "temperature": 0}, "n must be 1 with temperature = 0"),
     ({"n": 1.5}, "n must be an integer"), ({"include_stop_str_in_output": 1}, "must be True or False")],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_refused(llm: LLM, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        SamplingParams(**options)

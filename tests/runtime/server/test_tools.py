"""Tools: OpenAI's own client offers them, gets calls that can be read, and sends back what they came to."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from tests.runtime import tiny
from tests.runtime.tiny import EOS, TOKENIZER, byte_ids
from tests.support import needs

jsonschema = needs.module("jsonschema")
openai = needs.module("openai")
needs.module("fastapi")
needs.module("llguidance")
needs.module("uvicorn")

from crayon_runtime.server.tools import AnswerReader, CallPart  # noqa: E402
from tests.runtime.server.served import QUESTION, Ask, app_of, problem  # noqa: E402

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t.function | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Of a model that was trained to call tools."""

LIGHT = {
    "type": "object",
    "properties": {"room": {"enum": ["kitchen", "hall"]}, "on": {"type": "boolean"}},
    "required": ["room", "on"],
    "additionalProperties": False,
}
TIMER = {"type": "object", "properties": {"minutes": {"type": "integer", "maximum": 60, "minimum": 0}}}


def tool(name: str, parameters: Any = None) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("light.set", LIGHT), tool("timer.start", TIMER | {"additionalProperties": False}), tool("stop")]
SCHEMAS = {"light.set": LIGHT, "timer.start": TIMER, "stop": {"maxProperties": 0}}
CALL = '{"name": "light.set", "arguments": {"room": "hall", "on": true}}'


def streamed(chunks: Any) -> tuple[Any, str]:
    """The message that the chunks of a stream make, as OpenAI's clients put it together; and the finish reason."""
    content: list[str] = []
    calls: list[Any] = []
    for chunk in chunks:
        [choice] = chunk.choices
        content += [choice.delta.content] if choice.delta.content else []
        for part in choice.delta.tool_calls or []:
            if part.index == len(calls):
                assert part.id
                assert part.type == "function"
                calls.append({"id": part.id, "name": part.function.name, "arguments": ""})
            else:
                assert (part.id, part.function.name) == (None, None)
            calls[part.index]["arguments"] += part.function.arguments
        reason = choice.finish_reason
    return ("".join(content) or None, calls), reason


def told(reply: Any) -> tuple[Any, str]:
    """The same of a whole reply."""
    [choice] = reply.choices
    calls = [
        {"id": call.id, "name": call.function.name, "arguments": call.function.arguments}
        for call in choice.message.tool_calls or []
    ]
    return (choice.message.content or None, calls), choice.finish_reason


def without_ids(message: Any) -> Any:
    content, calls = message
    return content, [{**call, "id": ""} for call in calls]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_required_can_be_read(serve: Any, stream: bool) -> None:
    served = serve(backend={"chat_template": TEMPLATE})
    read = streamed if stream else told
    seen = set()
    for seed in range(12):
        (content, [call]), reason = read(
            served.ask("the", tools=TOOLS, tool_choice="required", temperature=2, seed=seed, stream=stream)
        )
        assert (content, reason) == (None, "tool_calls")
        assert len(call["id"]) == 9
        assert call["id"].isalnum()
        jsonschema.validate(json.loads(call["arguments"]), SCHEMAS[call["name"]])
        seen.add(call["name"])
    assert len(seen) > 1


def test_one_tool_can_be_asked_for_by_name(serve: Any) -> None:
    served = serve()
    for name in SCHEMAS:
        choice = {"type": "function", "function": {"name": name}}
        (_, [call]), _ = told(served.ask("the", tools=TOOLS, tool_choice=choice, temperature=2, seed=3))
        assert call["name"] == name


SAID = {
    CALL: (None, [{"id": "", "name": "light.set", "arguments": '{"room": "hall", "on": true}'}], "tool_calls"),
    "\n" + CALL: (None, [{"id": "", "name": "light.set", "arguments": '{"room": "hall", "on": true}'}], "tool_calls"),
    '{"name":"stop","arguments":{}}': (None, [{"id": "", "name": "stop", "arguments": "{}"}], "tool_calls"),
    "no: {}": ("no: {}", [], "stop"),
    " ok": (" ok", [], "stop"),
    "": (None, [], "stop"),
    " ": (" ", [], "stop"),
}


@pytest.mark.parametrize("said", SAID)
def test_a_model_may_call_or_talk(serve: Any, said: str) -> None:
    served = serve([*byte_ids(said), EOS])
    content, calls, reason = SAID[said]
    for options in ({}, {"tool_choice": "auto"}, {"parallel_tool_calls": False}):
        for stream, read in ((False, told), (True, streamed)):
            got, why = read(served.ask("the", tools=TOOLS, stream=stream, **options))
            assert (*without_ids(got), why) == (content, calls, reason)


def test_what_begins_like_a_call_is_one(serve: Any) -> None:
    served = serve([*byte_ids('{"name": "lights.set", "room": 5'), EOS])
    (content, [call]), reason = told(served.ask("the", tools=TOOLS, max_tokens=1000))
    assert (content, reason, call["name"]) == (None, "tool_calls", "light.set")
    jsonschema.validate(json.loads(call["arguments"]), LIGHT)


def test_without_a_choice_of_calling_an_answer_is_text(serve: Any) -> None:
    prompts: list[str] = []

    def script(ids: list[int], adapter: str | None) -> int:
        prompts.append(TOKENIZER.decode(ids, skip_special=False))
        return [*byte_ids('{"name"'), EOS][len(prompts) - 1]

    served = serve(script, backend={"chat_template": TEMPLATE})
    for stream, read in ((False, told), (True, streamed)):
        prompts.clear()
        got = read(served.ask("the", tools=TOOLS, tool_choice="none", stream=stream))
        assert got == (('{"name"', []), "stop")
        assert "light" not in prompts[0]


def test_the_template_tells_of_tools_and_of_what_calls_came_to(serve: Any) -> None:
    prompts: list[str] = []

    def script(ids: list[int], adapter: str | None) -> int:
        prompts.append(TOKENIZER.decode(ids, skip_special=False))
        return EOS

    served = serve(script, backend={"chat_template": TEMPLATE})
    choice = {"type": "function", "function": {"name": "light.set"}}
    first = served.ask("the", tools=TOOLS, tool_choice=choice, max_tokens=1000)
    assert prompts[0].startswith('<|im_start|> tools\n{"name": "light.set", "parameters": {"type": "object"')
    message = first.choices[0].message
    [call] = message.tool_calls
    prompts.clear()
    served.chat(
        model="tiny",
        messages=[
            *QUESTION,
            message.model_dump(),
            {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "done"}]},
        ],
        max_tokens=1,
    )
    arguments = json.dumps(json.loads(call.function.arguments))
    assert f"light.set({arguments})<|im_end|> \n<|im_start|> tool\ndone<|im_end|>" in prompts[0]


def test_text_in_tools_that_imitates_control_tokens_is_text(serve: Any) -> None:
    seen: list[list[int]] = []

    def script(ids: list[int], adapter: str | None) -> int:
        seen.append(ids)
        return EOS

    served = serve(script, backend={"chat_template": TEMPLATE})
    forged = "<|im_end|></s>"
    call = {"id": forged, "type": "function", "function": {"name": forged, "arguments": json.dumps({forged: forged})}}
    for name in ("plain", forged):
        parameters = {"type": "object", "properties": {name: {"description": name}}}
        served.chat(
            model="tiny",
            messages=[
                *QUESTION,
                {
                    "role": "assistant",
                    "tool_calls": [call if name == forged else call | {"function": {"name": "a", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": forged, "content": name},
            ],
            tools=[tool(name, parameters)],
            tool_choice="auto",
        )
    special = served.engine.tokenizer.special_ids
    plain, imitated = [[token for token in ids if token in special] for ids in (seen[0], seen[-1])]
    assert plain == imitated


@pytest.mark.parametrize("tokens", [1, 5, 30, 45, 60])
def test_a_call_that_is_cut_off_says_so(serve: Any, tokens: int) -> None:
    served = serve([*byte_ids(CALL), EOS])
    for stream, read in ((False, told), (True, streamed)):
        (content, calls), reason = read(served.ask("the", tools=TOOLS, max_tokens=tokens, stream=stream))
        assert reason == "length"
        text = (content or "") + "".join(call["arguments"] for call in calls)
        assert text
        assert text in CALL


def test_log_probabilities_of_a_call(serve: Any) -> None:
    served = serve([*byte_ids(CALL), EOS])
    whole = served.ask("the", tools=TOOLS, logprobs=True).choices[0].logprobs.content
    chunks = list(served.ask("the", tools=TOOLS, logprobs=True, stream=True))
    pieces = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.bytes for token in whole] == [token.bytes for token in pieces]
    assert bytes(itertools.chain.from_iterable(token.bytes for token in whole)).startswith(CALL.encode())
    assert streamed(chunks)[1] == "tool_calls"


SCHEMA = {"type": "json_schema", "json_schema": {"name": "wanted", "schema": {"type": "string"}}}
TOO_MANY = [tool(f"t{i}") for i in range(129)]


@pytest.mark.parametrize(
    "changes, said, param",
    [
        ({"tool_choice": "required"}, "a call is required, and there are no tools", "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "a call is required", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "no tool has the name 'x'", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "this server does not support that value of `tool_choice`", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "", None),
        ({"tools": TOOLS, "response_format": SCHEMA}, "an answer is a call or meets a schema, not either", "response_format"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "this server does not ", None),
        ({"tools": [{"type": "function"}]}, "tools[0]: Object missing required field `function`", "tools[0]"),
        ({"tools": [tool("")]}, "tools[0].function.name: Expected `str` of length >= 1", "tools[0].function.name"),
        ({"tools": [tool("x" * 65)]}, "tools[0].function.name: Expected `str` of length <= 64", "tools[0].function.name"),
        ({"tools": TOO_MANY}, "tools: Expected `array` of length <= 128", "tools"),
        ({"tools": [tool("a"), tool("a")]}, "two tools have the name 'a'", "tools[1]"),
        ({"tools": [tool("a", {"type": "array"})]}, "the parameters of a are not the schema of an object", "tools[0].parameters"),
        ({"tools": [tool("a", {"not": {}})]}, "cannot be enforced: ", "tools"),
        ({"tools": [tool("a", {"properties": {"b": {"pattern": "("}}})]}, "", "tools"),
        ({"tools": [tool("a", {"required": ["b"], "properties": {"b": False}})]}, "", "tools"),
        ({"functions": [{"name": "a"}]}, "this server does not support that value of `functions`", "functions"),
    ],
)  # fmt: skip
def test_bad_tools_are_refused(ask: Ask, changes: dict[str, Any], said: str, param: str | None) -> None:
    for stream in (False, True):
        response = ask.chat(stream=stream, **changes)
        assert problem(response).startswith(f"400 {said}")
        if param:
            assert response.json()["error"]["param"] == param
    assert ask.chat().status_code == 200


def call_message(**changes: Any) -> dict[str, Any]:
    call = {"id": "a", "type": "function", "function": {"name": "stop", "arguments": "{}"}} | changes
    return {"messages": [*QUESTION, {"role": "assistant", "tool_calls": [call]}]}


@pytest.mark.parametrize(
    "changes, said",
    [
        (call_message(function={"name": "stop", "arguments": "{"}), "the arguments of the call 'a' are not a JSON object"),
        (call_message(function={"name": "stop", "arguments": "[]"}), "the arguments of the call 'a' are not a JSON object"),
        (call_message(function={"name": "stop", "arguments": "[" * 50_000}), "the arguments of the call 'a' are not"),
        (call_message(function={"name": "stop", "arguments": {}}), "messages[1].tool_calls[0].function.arguments: Expected"),
        (call_message(type="custom"), "messages[1].tool_calls[0].type: Invalid enum value 'custom'"),
        ({"messages": [{"role": "assistant"}]}, "a message of the assistant has neither content nor tool_calls"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0]: Object missing required field `tool_call_id`"),
        ({"messages": [{"role": "tool", "tool_call_id": "a"}]}, "messages[0]: Object missing required field `content`"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(inside: Any, changes: dict[str, Any], said: str) -> None:
    from crayon_runtime.server import create_app

    engine = tiny.engine(bundle=inside, chat_template=TEMPLATE)
    assert problem(Ask(create_app(engine)).chat(**changes)).startswith(f"400 {said}")


@pytest.mark.parametrize("template", [tiny.CHATML, None, "{{ raise_exception('no') }}"])
def test_a_model_that_knows_no_calls_is_not_given_any(inside: Any, template: str | None) -> None:
    from crayon_runtime.server import create_app

    ask = Ask(create_app(tiny.engine(bundle=inside, chat_template=template)))
    for messages in (call_message()["messages"], [*QUESTION, {"role": "tool", "content": "a", "tool_call_id": "a"}]):
        said = "no calls of tools" if template else "no chat template"
        assert said in problem(ask.chat(messages=messages))


def test_tools_without_the_extra(inside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    said = problem(Ask(app_of(inside)).chat(tools=[tool("never.asked.for.before")]))
    assert said.startswith("400 ")
    assert "pip install 'crayon-edge[grammar]'" in said


# The reader of answers


def read(pieces: list[str], *, calls: bool = True) -> tuple[str, list[CallPart], AnswerReader]:
    reader = AnswerReader(calls=calls)
    parts = [*itertools.chain.from_iterable(reader.push(piece) for piece in pieces), *reader.flush()]
    text = "".join(part for part in parts if isinstance(part, str))
    return text, [part for part in parts if isinstance(part, CallPart)], reader


ARGUMENTS = ["{}", '{"a": "}"}', '{"a": "\\"}{", "b": [{"c": {}}, "\\\\"]}', '{ "a" : {} }', '{"a": "日本"}']


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("around", ['{"name":"a\\"b","arguments":%s}', '\n{\n "name": "a\\"b",\n "arguments": %s\n}'])
def test_a_call_is_read_however_it_comes_in_pieces(arguments: str, around: str) -> None:
    answer = around % arguments
    for cuts in (
        [answer],
        list(answer),
        [answer[:9], answer[9:]],
        [answer[i : i + 3] for i in range(0, len(answer), 3)],
    ):
        text, parts, reader = read(cuts)
        assert (text, reader.name, reader.whole) == ("", 'a"b', True)
        assert "".join(part.function.arguments for part in parts) == arguments
        assert [part.function.name for part in parts[:1]] == ['a"b']


@pytest.mark.parametrize("answer", ["", " ", "hello {", "{", '{"name": "a"', "\n\n ok", CALL])
def test_text_stays_text(answer: str) -> None:
    for pieces in ([answer], list(answer)):
        assert read(pieces, calls=False)[0] == answer
        text, parts, reader = read(pieces)
        assert text == ("" if answer == CALL else answer)
        assert reader.whole == bool(parts) == (answer == CALL)

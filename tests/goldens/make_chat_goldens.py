"""Renders chats with `transformers` into tests/data/chat_template_goldens.json.

    python tests/goldens/make_chat_goldens.py [--template FILE] [--out FILE]

Needs `transformers` and `jinja2`. `--template` renders another template, such as the one of a
published checkpoint, to be compared by hand.
"""

import argparse
import json
from pathlib import Path

import tokenizers
import transformers

DATA = Path(__file__).parents[1] / "data"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather, in °C & more.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "City name"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "array", "items": {"type": "integer"}},
                "options": {
                    "type": "object",
                    "properties": {"hourly": {"type": "boolean", "description": "By hour?"}},
                    "required": ["hourly"],
                },
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "call_0",
    "type": "function",
    "function": {
        "name": "get_weather",
        "arguments": {"city": "Łódź", "days": [1, 2], "options": {"hourly": True}},
    },
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def chats():
    """The chats to render: [{"name", "messages", and what else the template is given}]."""
    system = {"role": "system", "content": "  Be brief.\n"}
    answer = {"role": "tool", "tool_call_id": "call_0", "name": "get_weather", "content": "18 °C"}
    calling = assistant("", tool_calls=[CALL], reasoning="The tool knows.")
    turns = [user("Hi"), assistant("<|channel>thought\nHm\n<channel|>Hello."), user(" And you? ")]
    parts = [{"type": "text", "text": "Look: "}, {"type": "text", "text": "<b> & 🦙"}]
    return [
        {"name": "one user turn", "messages": [user("Hi\nthere")]},
        {"name": "system and user", "messages": [system, user("Hi")]},
        {"name": "thinking on", "messages": [user("Hi")], "enable_thinking": True},
        {"name": "thinking on, system", "messages": [system, user("Hi")], "enable_thinking": True},
        {"name": "past thoughts are dropped", "messages": turns},
        {"name": "no generation prompt", "messages": turns[:2], "add_generation_prompt": False},
        {"name": "content parts", "messages": [user(parts)]},
        {"name": "tools declared", "messages": [user("Rain?")], "tools": [WEATHER, WEATHER]},
        {
            "name": "tools, system and thinking",
            "messages": [system, user("Rain?")],
            "tools": [WEATHER],
            "enable_thinking": True,
        },
        {
            "name": "tool call waiting for its response",
            "messages": [user("Rain?"), calling],
            "tools": [WEATHER],
        },
        {
            "name": "tool response",
            "messages": [user("Rain?"), calling, answer],
            "tools": [WEATHER],
            "enable_thinking": True,
        },
        {
            "name": "answer after a tool response",
            "messages": [user("Rain?"), calling, answer, assistant("No."), user("Thanks")],
            "tools": [WEATHER],
        },
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--template", type=Path, default=DATA / "chat_template.jinja")
    parser.add_argument("--out", type=Path, default=DATA / "chat_template_goldens.json")
    args = parser.parse_args()
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>")
        ),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    tokenizer.chat_template = args.template.read_text(encoding="utf-8")
    cases = []
    for chat in chats():
        settings = {"tools": None, "enable_thinking": False, "add_generation_prompt": True} | {
            key: value for key, value in chat.items() if key not in ("name", "messages")
        }
        text = tokenizer.apply_chat_template(chat["messages"], tokenize=False, **settings)
        cases.append(
            {
                "name": chat["name"],
                "messages": chat["messages"],
                "settings": settings,
                "text": text,
            }
        )
    content = {"transformers": transformers.__version__, "cases": cases}
    args.out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(cases)} renderings by transformers {transformers.__version__} in {args.out}")


if __name__ == "__main__":
    main()

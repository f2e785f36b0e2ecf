"""Chat templates of our own, for models that have none and for studies (SPEC A1); a model's own is the default.

All four write plain text that every tokenizer has the characters for: `User: ` and `Assistant:` in front of the turns,
and the tokenizer's eos behind each reply. `Encoder` holds the parts of a conversation apart (SPEC A2), so that a user
who types "Assistant:" opens no reply. A template becomes `processor.chat_template`: it is saved with the
export, and plain `apply_chat_template` renders the same text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from vlmtune.errors import VlmtuneError

Template = Literal["single", "system", "interleaved", "comparison"]
TEMPLATES: tuple[Template, ...] = get_args(Template)
TemplateWish = Literal["auto", "single", "system", "interleaved", "comparison"]

CUE = "Look at the images one by one: say what matters in each, then compare them step by step, then answer."
"""What `comparison` writes behind each question once there are two images (zero-shot chain of thought)."""

# Around the image placeholder, where the vocabulary has them: without, the model sees images as never before
IMAGE_MARKS = (("<|vision_start|>", "<|vision_end|>"),)  # Qwen2-VL and later; other families' processors write theirs


@dataclass(frozen=True)
class Form:
    """What a template is made of."""

    summary: str
    several_turns: bool = True  # and a system text first
    numbered: bool = False  # "Image n: " in front of every image of the conversation
    cue: bool = False


FORMS: dict[Template, Form] = {
    "single": Form("one question and one reply, nothing else", several_turns=False),
    "system": Form("a system text first, where there is one; any number of turns"),
    "interleaved": Form("as `system`, and every image is numbered where it stands", numbered=True),
    "comparison": Form(
        "as `interleaved`, and questions about two or more images ask for a comparison step by step",
        numbered=True,
        cue=True,
    ),
}

# Blocks end in `-%}` and begin with `{%-`: only what `{{- -}}` writes is rendered.
_TEMPLATE = """
{%- set seen = namespace(images=0, text=false) -%}
{%- for message in messages -%}
@@CHECK@@
{%- if message['role'] == 'assistant' -%}
{{- 'Assistant:' -}}
{%- generation -%}
{{- ' ' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- @@EOS@@ -}}
{%- endgeneration -%}
{%- else -%}
{%- if message['role'] == 'user' -%}{{- 'User: ' -}}{%- endif -%}
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
{%- set seen.text = false -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
@@NUMBER@@
{{- @@IMAGE@@ -}}
{%- if not seen.text -%}{{- '\\n' -}}{%- endif -%}
{%- elif part['type'] == 'text' -%}
{%- set seen.text = true -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
@@CUE@@
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""
_ONE_TURN = """
{%- if message['role'] != ('user' if loop.first else 'assistant') or loop.index > 2 -%}
{{- raise_exception('data.template single takes one question and one reply; set it to system or interleaved') -}}
{%- endif -%}
"""
_SYSTEM_FIRST = """
{%- if message['role'] not in ('user', 'assistant') and not (message['role'] == 'system' and loop.first) -%}
{%- set where = message['role'] + ' turn at place ' + (loop.index | string) -%}
{{- raise_exception(where + '; data.template @@NAME@@ takes one system turn, at the start, then user and assistant') -}}
{%- endif -%}
"""
_NUMBER = """
{%- set seen.images = seen.images + 1 -%}
{{- 'Image ' + (seen.images | string) + ': ' -}}
"""
_CUE = """
{%- if message['role'] == 'user' and seen.images > 1 -%}{{- @@TEXT@@ -}}{%- endif -%}
"""


def chat_template(name: Template, processor) -> str:
    """The jinja source of a named template, with this processor's eos and image placeholder in it.

    Raises VlmtuneError where the tokenizer has no eos: the model could never learn to stop.
    """
    tokenizer = processor.tokenizer
    if tokenizer.eos_token is None:
        raise VlmtuneError(
            f"data.template {name}: the model's tokenizer names no eos_token, which would end each reply; set "
            "eos_token in its tokenizer_config.json."
        )
    vocabulary = tokenizer.get_vocab()
    opening, closing = next((m for m in IMAGE_MARKS if all(mark in vocabulary for mark in m)), ("", ""))
    form = FORMS[name]
    source = _TEMPLATE.strip() + "\n"
    for key, text in {
        "CHECK": (_SYSTEM_FIRST if form.several_turns else _ONE_TURN).strip(),
        "NUMBER": _NUMBER.strip() if form.numbered else "",
        "CUE": _CUE.strip() if form.cue else "",
        "TEXT": _quoted("\n" + CUE),
        "NAME": name,
        "EOS": _quoted(tokenizer.eos_token),
        "IMAGE": _quoted(opening + processor.image_token + closing),
    }.items():
        source = source.replace(f"@@{key}@@", text)
    return source


def set_template(processor, wish: TemplateWish) -> str | None:
    """Give `processor` the template that `data.template` asks for. Returns a remark where it replaces the model's own.

    Raises VlmtuneError where it asks for the model's own and there is none.
    """
    own = processor.chat_template
    if wish == "auto":
        if own is None:
            raise VlmtuneError(
                "the model has no chat template: add its chat_template.jinja to the model folder, or set data.template "
                f"to one of ours ({', '.join(TEMPLATES)})."
            )
        return None
    processor.chat_template = chat_template(wish, processor)
    if own is None or own == processor.chat_template:
        return None
    return f"data.template {wish} takes the place of the model's own chat template, which its training has seen"


def _quoted(text: str) -> str:
    """A jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"

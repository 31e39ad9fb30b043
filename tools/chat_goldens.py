"""Writes tests/golden/chat_prompts.json: the prompts that `transformers` makes of conversations.

    python -m tools.chat_goldens OUT_FOLDER

Needs transformers (made with 5.23.0), not jax. Each case is what `apply_chat_template` gives for a
tokenizer of `tools.tiny_tokenizers`: the ids, the text, or the words of its refusal. Templates that
ask for today's date are told the fixed day that ours are told.
"""

import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import transformers
from transformers.utils import chat_template_utils

from tools import tiny_tokenizers


class _FixedDay(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> "_FixedDay":
        return cls(2024, 7, 26)


def cases(tokenizer: Any) -> list[dict[str, Any]]:
    """Every conversation, with and without a chain of thought where there is the choice."""
    switch = "enable_thinking" in tokenizer.chat_template
    made: list[dict[str, Any]] = []
    for name, messages in tiny_tokenizers.CONVERSATIONS.items():
        for thinking in (None, True, False) if switch else (None,):
            told = {} if thinking is None else {"enable_thinking": thinking}
            case: dict[str, Any] = {"conversation": name, "thinking": thinking}
            try:
                ids, text = (
                    tokenizer.apply_chat_template(
                        list(messages),
                        add_generation_prompt=True,
                        tokenize=tokenize,
                        return_dict=False,
                        **told,
                    )
                    for tokenize in (True, False)
                )
                case |= {"ids": ids, "text": text}
            except jinja2.TemplateError as error:
                case["refusal"] = str(error)
            made.append(case)
    return made


def main(out: Path) -> None:
    """Writes the file."""
    chat_template_utils.datetime = _FixedDay
    lines = []
    for name, family in tiny_tokenizers.FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            tiny_tokenizers.write_folder(Path(folder), family)
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
            made = cases(tokenizer)
        print(name, len(made), "cases", sum("refusal" in case for case in made), "refusals")
        lines.append(f"{json.dumps(name)}: {json.dumps(made, ensure_ascii=False)}")
    source = f"transformers {transformers.__version__}"
    joined = ",\n".join(lines)
    (out / "chat_prompts.json").write_text(
        f'{{"source": "{source}", "families": {{\n{joined}\n}}}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Tokenizers, and the one way from a problem to prompt ids."""

import json
import os
from pathlib import Path

import pytest
import tokenizers

from grpo.data.procedural import DigitChain, MaxOf
from grpo.data.prompts import encode_prompt, fits, usable_indices
from grpo.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from rewards.api import Problem

CHATML = """{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '\\n' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
{%- endif %}
"""
ASKED = Problem("p", messages=({"role": "user", "content": "add 1 and 2"},))


def write_folder(folder, template=CHATML, config=None, generation=None):
    """A model folder with a tiny byte-level BPE; returns it."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.train_from_iterator(
        ["add the two numbers", "the answer is the number"],
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|start|>", "<|end|>", "<|stop|>", "<|bos|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.enable_truncation(4)  # as some published files have it
    core.enable_padding(length=9)
    core.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "<|end|>"}, "bos_token": "<|bos|>", **(config or {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_bytes_round_trip_and_never_spell_special_tokens():
    tokenizer = load_tokenizer("bytes")
    text = "3+8=11 <eos> é 漢 \x00"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = [*tokenizer.encode("ok"), 257, 256]
    assert tokenizer.decode(ids) == "ok"
    assert tokenizer.decode(ids, skip_special=False) == "ok<eos><pad>"
    assert tokenizer.decode([0xE6, 0xBC]) == "\ufffd"  # half a character
    assert tokenizer.encode("\ud800") == [ord("?")]
    with pytest.raises(ValueError, match="258 is outside"):
        tokenizer.decode([258])


def test_folder_gives_every_stop_token_and_adds_nothing(tmp_path):
    write_folder(tmp_path, generation={"eos_token_id": [2, 1]})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == (1, 2)  # the tokenizer's own end token first
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.adds_bos) == (1, 3, False)
    long = "the answer is the two numbers " * 20
    ids = tokenizer.encode(long)
    assert tokenizer.decode(ids) == long and 3 not in ids  # neither truncated nor padded
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode([*tokenizer.encode("add"), 1]) == "add"
    assert tokenizer.decode([*tokenizer.encode("add"), 1], skip_special=False) == "add<|end|>"


def test_template_may_be_in_the_config(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    write_folder(tmp_path, template="", config={"chat_template": named})
    assert load_tokenizer(tmp_path).chat_template == "yes"


def test_what_is_not_a_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="SentencePiece.*save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"neither a folder nor a \.gguf"):
        load_tokenizer(tmp_path / "model.bin")
    write_folder(tmp_path, config={"eos_token": None})
    with pytest.raises(ValueError, match="names no end-of-text token"):
        load_tokenizer(tmp_path)


def test_chat_prompt_is_the_template_up_to_the_models_turn(tmp_path):
    tokenizer = load_tokenizer(write_folder(tmp_path))
    ids = encode_prompt(tokenizer, ASKED)
    text = "<|start|>user\nadd 1 and 2<|end|><|start|>assistant\n"
    assert tokenizer.decode(ids, skip_special=False) == text
    assert ids == tokenizer.encode(text) and ids[-1] not in tokenizer.eos_ids


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML])
def test_bos_comes_exactly_once(tmp_path, template):
    tokenizer = load_tokenizer(write_folder(tmp_path, template, config={"add_bos_token": True}))
    for problem in (ASKED, Problem("raw", prompt="the number"), Problem("raw", prompt="<|bos|>1")):
        ids = encode_prompt(tokenizer, problem)
        assert ids[0] == 3 and ids.count(3) == 1


def test_bos_is_found_in_the_post_processor(tmp_path):
    write_folder(tmp_path)
    core = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 3)]
    )
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.adds_bos
    assert 3 not in tokenizer.encode("add")
    assert encode_prompt(tokenizer, Problem("raw", prompt="add"))[0] == 3


def test_template_dialect(tmp_path):
    """What published templates use beyond plain Jinja."""
    template = """{% for m in messages %}
        {% if loop.index > 1 %}
            {% break %}
        {% endif %}
    {% generation %}
{{ {"<": m.content} | tojson }}{% endgeneration %}
    {% endfor %}
{% if tools is none and documents is none %}
{{ strftime_now("%d %b %Y") }}
{% endif %}"""
    tokenizer = load_tokenizer(write_folder(tmp_path, template))
    prompt = tokenizer.decode(encode_prompt(tokenizer, ASKED))
    assert prompt == '{"<": "add 1 and 2"}26 Jul 2024\n'


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].content }}<|end|>", "ends the prompt of problem 'p' with the stop token"),
        ("{{ messages.append(1) }}", "refused"),
        ("{{ ''.__class__.__mro__ }}", "refused"),
        ("{# nothing #}", "no tokens"),
    ],
)
def test_templates_that_cannot_be_used_say_why(tmp_path, template, message):
    tokenizer = load_tokenizer(write_folder(tmp_path, template))
    with pytest.raises(ValueError, match=message):
        encode_prompt(tokenizer, ASKED)


def test_messages_need_a_template_and_raw_prompts_do_not():
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(ByteTokenizer(), ASKED)
    assert encode_prompt(ByteTokenizer(), Problem("raw", prompt="1+2=")) == list(b"1+2=")


def test_long_prompts_are_dropped_and_counted():
    source = DigitChain(size=300, min_terms=2, max_terms=4)  # prompts of 4, 6 and 8 bytes
    kept, dropped = usable_indices(ByteTokenizer(), source, 6)
    assert len(kept) + dropped == 300 and dropped > 50
    assert all(len(source[i].prompt) <= 6 for i in kept)
    assert usable_indices(ByteTokenizer(), source, 8) == (range(300), 0)
    with pytest.raises(
        ValueError, match="all 300 prompts.*max_prompt_tokens=3; the shortest has 4"
    ):
        usable_indices(ByteTokenizer(), source, 3)
    with pytest.raises(ValueError, match="empty"):
        usable_indices(ByteTokenizer(), DigitChain(size=0), 8)
    assert fits([1, 2], 2) and not fits([1, 2, 3], 2)


def test_long_scans_report_progress():
    seen = []
    source = DigitChain(size=20_001)
    usable_indices(
        ByteTokenizer(), source, 8, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(10_000, 20_001), (20_000, 20_001)]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    cache = Path(os.environ.get("GRPO_CACHE", "~/.cache/grpo")).expanduser()
    files = sorted(cache.glob("smollm2-135m-instruct/*.gguf"))
    if not files:
        pytest.skip(f"SmolLM2 is not in the cache: no smollm2-135m-instruct/*.gguf in {cache}")
    return load_tokenizer(files[0])


@pytest.mark.slow  # needs the fetched model
def test_smollm2_prompts_are_golden(smollm2):
    golden = Path(__file__).parent / "golden" / "smollm2_prompts.json"
    for case in json.loads(golden.read_text()):
        text = case["prompt"]
        problem = Problem("p", prompt=text)
        if case["kind"] == "chat":
            problem = Problem("p", messages=({"role": "user", "content": text},))
        assert encode_prompt(smollm2, problem) == case["ids"]


@pytest.mark.slow  # needs the fetched model
def test_smollm2_special_tokens(smollm2):
    assert (smollm2.bos_id, smollm2.eos_ids, smollm2.pad_id) == (1, (2,), 2)
    assert (smollm2.vocab_size, smollm2.adds_bos) == (49152, False)
    for text in ("3+8=11", "naïve 漢字 🙂\n\ttabs", "<|im_start|>"):
        assert smollm2.decode(smollm2.encode(text), skip_special=False) == text
    # An empty system message keeps the template's default one out.
    assert len(encode_prompt(smollm2, MaxOf()[0])) < 45


def test_gguf_of_another_family_is_named(tmp_path):
    import gguf

    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="'gpt2'.*'tekken'.*give that folder"):
        load_tokenizer(path)


def test_gguf_metadata_is_enough(tmp_path):
    """A "smollm" tokenizer small enough to write here."""
    import gguf

    tokens = ["<|end|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "12", "ab"]
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["1 2", "a b"])
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHATML)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = load_tokenizer(str(path))
    assert [tokens[i] for i in tokenizer.encode("12ab<|end|>")] == ["1", "2", "ab", "<|end|>"]
    assert (tokenizer.eos_ids, tokenizer.pad_id, tokenizer.bos_id) == ((0,), 0, None)
    assert tokenizer.chat_template == CHATML

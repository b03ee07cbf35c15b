"""Prompts go through a tokenizer as its owner meant: special tokens, the first token, chats."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import circuitlens as cl
from circuitlens.models.prompt import Prompt
from circuitlens.models.readouts import SequenceReadout, TokenReadout
from circuitlens.models.tokens import around
from circuitlens.tasks import Example
from circuitlens.tasks.encoding import encode
from circuitlens.tasks.toy import toy_tokenizer
from circuitlens.utils.pieces import readable
from circuitlens.view.tokens import visible

WORDS = {"bad": " negative", "good": " positive"}


@pytest.fixture(scope="module")
def qwen(shared):
    folder = shared / "tokenizers" / "qwen3"
    if not folder.is_dir():
        pytest.skip("the shared tokenizers are not beside the project")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(qwen):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Qwen2Config(
        vocab_size=len(qwen), num_attention_heads=4, num_key_value_heads=2, **sizes
    )
    torch.manual_seed(0)
    return cl.load(Qwen2ForCausalLM(config), qwen)


def tokens(tokenizer, text: str, prompt: Prompt, **options) -> list[int]:
    rows = [Example("1", {"text": text}, "bad")]
    return list(encode(rows, tokenizer, prompt, readout=TokenReadout(), **options).tokens[0])


# -- special tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("special", ["<s>", "<pad>", "<unk>"])
def test_special_tokens_in_texts_are_text(special):
    tokenizer = toy_tokenizer()
    plain = Prompt("{text} ->", WORDS)
    ids = tokens(tokenizer, f"bada {special} gu", plain)
    assert tokenizer.convert_tokens_to_ids(special) not in ids[1:]
    assert tokenizer.decode(ids[1:]) == f"bada {special} gu ->"
    # In the template they are special, whatever the text has.
    for text in ("bada", f"bada{special}"):
        framed = tokens(tokenizer, text, Prompt(f"{special}{{text}}{special} ->", WORDS))
        own = tokenizer.convert_tokens_to_ids(special)
        # <s> in front is that of the template, and no second one is added.
        assert framed.count(own) == 2


def test_special_tokens_in_long_texts_are_cut_as_text():
    tokenizer = toy_tokenizer()
    ids = tokens(tokenizer, "<pad>" * 40, Prompt("{text} ->", WORDS, 10))
    assert tokenizer.pad_token_id not in ids
    assert len(ids) <= 12


def test_qwen_reads_its_own_markers_in_texts_as_text(qwen):
    prompt = Prompt("{text} sentimen:", WORDS)
    ids = tokens(qwen, "bagus <|im_end|> <|endoftext|>", prompt)
    assert not {*qwen.all_special_ids} & {*ids}
    assert qwen.decode(ids) == "bagus <|im_end|> <|endoftext|> sentimen:"


# -- the first token -----------------------------------------------------------------------------


def llama_like(adds: bool) -> PreTrainedTokenizerFast:
    words = {w: n for n, w in enumerate(["<unk>", "<s>", "x", "a", "->", "negative", "positive"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", bos_token="<s>")
    if adds:
        from tokenizers.processors import TemplateProcessing

        plain.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
        made = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", bos_token="<s>")
    return made


@pytest.mark.parametrize("adds", [True, False])
def test_the_first_token_is_there_once_and_as_the_tokenizer_does_it(adds):
    tokenizer = llama_like(adds)
    prompt = Prompt("{text} ->", WORDS)
    assert tokens(tokenizer, "a", prompt) == tokenizer("a ->")["input_ids"]
    assert tokens(tokenizer, "a", Prompt("{text} ->", WORDS, bos=True)) == [1, 3, 4]
    assert tokens(tokenizer, "a", Prompt("{text} ->", WORDS, bos=False)) == [3, 4]
    # The template may name it itself.
    named = Prompt("<s> {text} ->", WORDS)
    assert tokens(tokenizer, "a", named).count(1) == 1


def test_a_first_token_that_there_is_not_cannot_be_asked_for(qwen):
    with pytest.raises(cl.InputError, match="the tokenizer has none"):
        tokens(qwen, "a", Prompt("{text} ->", WORDS, bos=True))
    assert around(qwen).before == ()
    assert tokens(qwen, "a", Prompt("{text} ->", WORDS)) == qwen("a ->")["input_ids"]


# -- words ---------------------------------------------------------------------------------------


def test_default_prompts_encode_with_a_real_tokenizer(qwen, model, shared):
    data = {"nusax": "indonesian", "americasnli": None, "smsa": None}
    for name, language in data.items():
        task = cl.load_task(name, language, data=shared / "data" / name)
        found = task.encode(model, task["validation"][:3])
        assert isinstance(found.readout, TokenReadout), name
        assert len(set(found.readout.tokens)) == len(task.labels)
    nusax = cl.load_task("nusax", data=shared / "data" / "nusax")
    readout = nusax.encode(model, nusax["test"][:1]).readout
    assert qwen.convert_ids_to_tokens(list(readout.tokens)) == ["Ġneg", "Ġnet", "Ġposit"]
    whole = cl.load_task("nusax", data=shared / "data" / "nusax", readout="sequence")
    readout = whole.encode(model, whole["test"][:1]).readout
    assert isinstance(readout, SequenceReadout)
    assert [len(label[0]) for label in readout.words] == [2, 2, 2]


def test_a_template_that_ends_in_a_blank_says_so(qwen):
    with pytest.raises(cl.InputError, match=r"prompt ends in a space.*' negatif'"):
        tokens(qwen, "a", Prompt("{text} sentimen: ", {"bad": "negatif", "good": "positif"}))


# -- chats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["", "Answer with one word."])
def test_a_chat_is_the_tokenizers_own(qwen, system):
    prompt = Prompt("{text}\nSentiment?", WORDS, chat=True, system=system)
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": "Bagus sekali.\nSentiment?"})
    own = qwen.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=False)
    own = own["input_ids"] if not isinstance(own, list) else own
    assert tokens(qwen, "Bagus sekali.", prompt) == list(own)
    # The assistant's answer begins without a blank.
    readout = prompt.readout_of(TokenReadout(), qwen)
    assert qwen.convert_ids_to_tokens(list(readout.tokens)) == ["negative", "positive"]


def test_markers_in_a_chats_text_end_no_turn(qwen):
    prompt = Prompt("{text}", WORDS, chat=True)
    ids = tokens(qwen, "a<|im_end|>b", prompt)
    assert ids.count(qwen.convert_tokens_to_ids("<|im_end|>")) == 1
    assert "a<|im_end|>b" in qwen.decode(ids)


def test_a_chat_needs_a_template():
    with pytest.raises(cl.InputError, match="chat=True puts prompts into"):
        tokens(toy_tokenizer(), "bada", Prompt("{text} ->", WORDS, chat=True))
    with pytest.raises(cl.InputError, match=r"A system prompt needs chat=True"):
        Prompt("{text} ->", WORDS, system="Be short.")
    odd = toy_tokenizer()
    odd.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %} ->"
    )
    with pytest.raises(cl.InputError, match=r"no system here.*leave the system prompt out"):
        tokens(odd, "bada", Prompt("{text}", WORDS, chat=True, system="Be short."))
    ids = tokens(odd, "bada", Prompt("{text}", WORDS, chat=True))
    assert odd.decode(ids) == "<s>bada ->"


# -- sizes ---------------------------------------------------------------------------------------


def test_tokens_beyond_the_embedding_are_refused_with_both_sizes(toy_task):
    from transformers import GPT2Config

    small = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(cl.InputError, match=r"token \d+ .* embeddings for 50 .*resize_token"):
        toy_task.encode(cl.load(small, toy_tokenizer()), toy_task["test"][:3])


# -- tokens for people ---------------------------------------------------------------------------

SCRIPTS = {
    "javanese": "ꦱꦸꦒꦼꦁ ꦫꦮꦸꦃ",
    "amharic": "ሰላም ለዓለም",
    "arabic": "مرحبا بالعالم",
    "thai": "สวัสดีชาวโลก",
    "burmese": "မင်္ဂလာပါ",
    "emoji": "bagus 👍🏽 sekali",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_tokens_of_any_script_can_be_read(qwen, model, script):
    text = SCRIPTS[script]
    found = model.tokens(qwen(text)["input_ids"])
    assert all(t.isprintable() for t in found)
    for character in text:
        assert any(character in shown for shown in found)
    assert not any("Ġ" in t or "á" in t or "\ufffd" in t for t in found)
    # What a vocabulary of bytes calls them is shown in the same way.
    pieces = qwen.convert_ids_to_tokens(qwen(f" {text}")["input_ids"])
    assert visible(pieces) == visible(model.tokens(qwen(f" {text}")["input_ids"]))


def test_a_split_letter_is_numbered_and_half_of_one_shown_as_bytes():
    letter = "አ".encode()
    assert readable([b"a" + letter[:1], letter[1:2], letter[2:] + b"b"]) == ["aአ₁", "አ₂", "አ₃b"]
    assert readable([letter[:2]]) == ["<E1 8A>"]
    assert readable(["é".encode(), b" x"]) == ["é", " x"]
    # What only looks like bytes stays as it is.
    assert readable([b"<a><b>", letter[:1] + b"><" + letter[:2]]) == ["<a><b>", "<E1>><<E1 8A>"]

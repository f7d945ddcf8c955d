"""Rows become documents: where tokens and masks begin and end, and what is cut, split, dropped and counted."""

import pytest
from dayzero.config import Tokenize
from dayzero.data.documents import DocumentEncoder
from dayzero.data.tokenization import settled
from dayzero.data.tokenizer import text_ids
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.encoded_rows import documents, sentences


def listed(arrays):
    return [array.tolist() for array in arrays]


def test_text_has_bos_and_eos_once_and_is_all_supervised_but_its_first_token(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = ["The fox.", tokenizer.bos_token + "The fox.", "The fox." + tokenizer.eos_token, "a\x00b ☃ \ud7ff"]
    found, counts = documents(tokenizer, "text", [{"text": t} for t in texts])
    for [(ids, mask)], text in zip(found, texts, strict=True):
        assert (ids[0], ids[-1], ids.count(bos), ids.count(eos)) == (bos, eos, 1, 1)
        assert mask == [False] + [True] * (len(ids) - 1)
        plain = text.replace(tokenizer.bos_token, "").replace(tokenizer.eos_token, "")
        assert tokenizer.decode(ids[1:-1]) == plain
    assert counts["special_token_text"] == 2


def test_texts_at_once_get_the_tokens_that_the_tokenizer_gives_each(tokenizer):
    texts = [
        *sentences(50),
        "",
        " ",
        "<|im_end|> x <s>",
        "a\x00b \u200d\U0001f468\u200d\U0001f469 e\u0301",
        "fox " * 3000,
    ]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert listed(text_ids(tokenizer, texts)) == expected
    tokenizer("fox " * 50, truncation=True, max_length=4, padding="max_length")  # leaves its mark in the backend
    assert listed(text_ids(tokenizer, texts)) == expected
    tokenizer.split_special_tokens = True
    try:
        expected = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        assert listed(text_ids(tokenizer, texts)) == expected
    finally:
        tokenizer.split_special_tokens = False

    class Own(type(tokenizer)):
        def __call__(self, text, **options):
            return {"input_ids": [len(text)]}

    own = Own(tokenizer_object=tokenizer.backend_tokenizer)
    assert listed(text_ids(own, ["abc", "a"])) == [[3], [1]], "a class with a way of its own is asked as it wants"


def test_many_rows_at_once_become_the_documents_of_each(tokenizer):
    texts = [*sentences(20), "", "fox", "fox"]
    for data_format, rows in (
        ("text", [{"text": t} for t in texts]),
        ("prompt_completion", [{"prompt": t, "completion": t[::-1]} for t in texts]),
    ):
        one, many = (
            DocumentEncoder(tokenizer, data_format, Tokenize(seq_len=16, long_documents="split")) for _ in "ab"
        )
        together = [(i, *listed(d)) for i, d in many.encode_rows(rows)]
        assert together == [(i, *listed(d)) for i, row in enumerate(rows) for d in one.encode(row)]
        assert many.counts == one.counts


def test_prompt_and_completion_keep_their_border(tokenizer):
    row = {"prompt": "What is 17 + 25?\n", "completion": "\nThe answer is 42."}
    [[(ids, mask)]], _ = documents(tokenizer, "prompt_completion", [row])
    prompt = tokenizer(row["prompt"])["input_ids"]
    assert ids[: len(prompt)] == prompt, "the tokens that a server makes of the prompt"
    assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    assert tokenizer.decode(ids[len(prompt) :]) == row["completion"] + tokenizer.eos_token
    [[(ids, mask)], [], [(_, no_prompt)]], counts = documents(
        tokenizer,
        "prompt_completion",
        [{"prompt": "Hi", "completion": ""}, {"prompt": "", "completion": ""}, {"prompt": "", "completion": "Hi"}],
    )
    assert [i for i, m in zip(ids, mask, strict=True) if m] == [tokenizer.eos_token_id]
    assert not no_prompt[0]
    assert all(no_prompt[1:])
    assert counts["dropped.empty"] == 1


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
def test_a_completion_goes_on_where_the_prompt_ends(kind):
    """A tokenizer of SentencePiece's ways puts a space before whatever it is given: not before a completion."""
    words = ["▁", *"Q:2+=4ax", "▁4", "▁a", "<0x0A>", "\n", "(", "</s>"]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(dict.fromkeys(words))}, [("▁", "4"), ("▁", "a")]))
    if kind == "prepend":  # Llama 2
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    llama = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    rows = [{"prompt": "Q: 2+2=", "completion": c} for c in ("4", " 4", "")] + [{"prompt": "", "completion": "4"}]
    for encoded in ("apart", "together"):
        if encoded == "apart":
            found, _ = documents(llama, "prompt_completion", rows)
            texts = [llama.decode(ids) for [(ids, _)] in found]
        else:
            made = DocumentEncoder(llama, "prompt_completion", Tokenize(seq_len=64)).encode_rows(rows)
            texts = [llama.decode(ids) for _, (ids, _) in made]
        assert texts == ["Q: 2+2=4</s>", "Q: 2+2= 4</s>", "Q: 2+2=</s>", "4</s>"]


def test_texts_that_we_make_prompts_of_hold_no_control_tokens(tokenizer):
    """Questions and their texts were never rendered by anybody; a prompt of the file's own may have been."""
    options = Tokenize(seq_len=64)
    assert settled(options, ["squad", "multiple_choice"]).special_text == "plain"
    for other in (["prompt_completion"], ["squad", "prompt_completion"], ["template"], ["messages"]):
        assert settled(options, other) == options
    special = options.model_copy(update={"special_text": "special"})
    assert settled(special, ["squad"]) == special


def test_long_documents_are_cut_split_or_dropped_and_counted(tokenizer):
    text = " ".join(["fox"] * 200)
    whole = documents(tokenizer, "text", [{"text": text}], seq_len=10_000)[0][0][0][0]
    for policy, lengths in (("truncate", [64]), ("split", [64] * (len(whole) // 64) + [len(whole) % 64]), ("drop", [])):
        [parts], counts = documents(tokenizer, "text", [{"text": text}], long_documents=policy)
        assert [len(ids) for ids, _ in parts] == lengths
        assert [i for ids, _ in parts for i in ids] == whole[: sum(lengths)]
        assert all(mask == [False] + [True] * (len(ids) - 1) for ids, mask in parts)
        names = {"truncate": "truncated", "split": "split", "drop": "dropped.too_long"}
        assert counts == {names[policy]: 1}


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(tokenizer):
    row = {"prompt": " ".join(["fox"] * 200), "completion": "dog"}
    [parts], counts = documents(tokenizer, "prompt_completion", [row])
    assert parts == []
    assert counts == {"truncated": 1, "dropped.few_labels": 1}
    [parts], counts = documents(tokenizer, "text", [{"text": "fox"}], min_label_tokens=50)
    assert parts == []
    assert counts == {"dropped.few_labels": 1}

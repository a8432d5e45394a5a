"""`ssm-lm generate`: stdout is the text of generate(), streamed or not, and bad arguments are one line."""

import pytest
import torch

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.cli import main
from ssm_lm.data.bpe import train_bpe
from ssm_lm.data.words import train_words

TEXT = ["the cat sat on the mat, and the dog sat on the cat\n" * 3, "naïve façade — 猫\n" * 3]


def build(folder, tokenizer, eos_token_id):
    torch.manual_seed(0)
    config = S4Config(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=32,
        num_hidden_layers=1,
        state_size=8,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=eos_token_id,
    )
    model = S4ForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, str(folder)


@pytest.fixture(scope="module", params=["bpe", "words"])
def saved(request, tmp_path_factory):
    tokenizer = train_bpe(TEXT, 300) if request.param == "bpe" else train_words(TEXT)
    return build(tmp_path_factory.mktemp("generate") / "model", tokenizer, None)


def generated(capsys, folder, *arguments, expect=0):
    capsys.readouterr()
    assert main(["generate", folder, "--device", "cpu", *arguments]) == expect
    captured = capsys.readouterr()
    return captured.err if expect else captured.out


def expected(saved, prompt, tokens, **options):
    model, tokenizer, _ = saved
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    return model.generate(ids, max_new_tokens=tokens, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)


def test_greedy_text_is_streamed_whole(saved, capsys):
    out = generated(capsys, saved[2], "--prompt", "the cat", "--greedy", "--max-new-tokens", "20")
    sequence = expected(saved, "the cat", 20, do_sample=False)[0]
    assert sequence.shape[0] >= 22
    assert out.startswith("the cat")
    # line by line, for the words of a new line are decoded without those before it
    assert out.split() == saved[1].decode(sequence).split()
    assert out.endswith("\n")


def test_streamed_text_equals_the_text_at_once(saved, capsys):
    if saved[1].eos_token == "<eos>":
        pytest.skip("the part after a word-level line end begins without its space: the test above compares words")
    for seed in range(4):  # random bytes: parts of characters among them
        torch.manual_seed(seed)
        sequence = expected(saved, "naïve", 40, do_sample=True, top_k=0)[0]
        out = generated(capsys, saved[2], "--prompt", "naïve", "--max-new-tokens", "40", "--seed", str(seed))
        assert out == saved[1].decode(sequence) + "\n"


def test_seed(saved, capsys):
    def sample(seed):
        return generated(capsys, saved[2], "--prompt", "the cat", "--max-new-tokens", "20", "--seed", seed)

    assert sample("1") == sample("1") != sample("2")


def test_sampling_options_reach_the_model(saved, capsys):
    options = ("--prompt", "the cat", "--max-new-tokens", "12")
    greedy = generated(capsys, saved[2], *options, "--greedy")
    for flags in (("--top-k", "1"), ("--top-p", "1e-6"), ("--temperature", "1e-4")):
        assert generated(capsys, saved[2], *options, *flags, "--seed", "5") == greedy
    assert generated(capsys, saved[2], *options, "--seed", "5") != greedy


def test_beams_and_several_texts(saved, capsys):
    options = ("--prompt", "the cat", "--max-new-tokens", "8")
    out = generated(capsys, saved[2], *options, "--num-beams", "3", "--num-return-sequences", "2")
    beams = expected(saved, "the cat", 8, do_sample=False, num_beams=3, num_return_sequences=2)
    assert out == saved[1].decode(beams[0]) + "\n\n" + saved[1].decode(beams[1]) + "\n"
    out = generated(capsys, saved[2], *options, "--num-return-sequences", "3", "--seed", "1")
    torch.manual_seed(1)
    several = expected(saved, "the cat", 8, do_sample=True, top_k=0, num_return_sequences=3)
    assert out == "\n".join(saved[1].decode(sequence) + "\n" for sequence in several)


@pytest.mark.parametrize(
    "flags",
    [
        ("greedy",),
        ("prompt-lookup", "--num-draft-tokens", "4"),
        ("prompt-lookup",),
        ("token-recycling",),
        ("token-recycling", "--num-draft-tokens", "3"),
        ("assisted", "--num-draft-tokens", "3"),
        ("assisted",),
    ],
    ids=" ".join,
)
def test_strategies_that_draft_write_the_greedy_text(saved, capsys, flags):
    options = ("--prompt", "the cat sat on the cat", "--max-new-tokens", "20")
    draft = ("--draft", saved[2]) if flags[0] == "assisted" else ()
    greedy = generated(capsys, saved[2], *options, "--greedy")
    assert generated(capsys, saved[2], *options, "--strategy", *flags, *draft) == greedy


def test_other_strategies(saved, capsys):
    model, tokenizer, folder = saved
    options = ("--prompt", "the cat", "--max-new-tokens", "12")
    out = generated(capsys, folder, *options, "--strategy", "contrastive", "--penalty-alpha", "0.9", "--top-k", "5")
    own = {"custom_generate": model.strategies["contrastive"], "penalty_alpha": 0.9, "top_k": 5}
    assert out.split() == tokenizer.decode(expected(saved, "the cat", 12, **own)[0]).split()
    groups = ("--num-beam-groups", "2", "--diversity-penalty", "0.7", "--num-return-sequences", "2")
    out = generated(capsys, folder, *options, "--strategy", "diverse-beam", "--num-beams", "4", *groups)
    own = {"custom_generate": model.strategies["diverse-beam"], "num_beam_groups": 2, "diversity_penalty": 0.7}
    beams = expected(saved, "the cat", 12, num_beams=4, num_return_sequences=2, **own)
    assert out == tokenizer.decode(beams[0]) + "\n\n" + tokenizer.decode(beams[1]) + "\n"
    for strategy, others in (("sample", ()), ("beam", ("--num-beams", "3"))):  # names of what was there before
        drawn = ("--seed", "3", "--top-k", "9", *others)
        named = generated(capsys, folder, *options, "--strategy", strategy, *drawn)
        assert named == generated(capsys, folder, *options, *drawn)
    drawn = ("--strategy", "prompt-lookup", "--temperature", "0.9", "--seed", "1")
    assert generated(capsys, folder, *options, *drawn) == generated(capsys, folder, *options, *drawn)


def test_a_draft_with_another_vocabulary(saved, capsys, tmp_path):
    S4ForCausalLM(S4Config(vocab_size=30, hidden_size=16, num_hidden_layers=1)).save_pretrained(tmp_path)
    arguments = ("--prompt", "a", "--strategy", "assisted", "--draft", str(tmp_path))
    error = generated(capsys, saved[2], *arguments, expect=2)
    assert "another vocabulary" in error
    assert error.count("\n") == 1


def test_empty_prompt_and_prompt_file(saved, capsys, tmp_path):
    out = generated(capsys, saved[2], "--prompt", "", "--greedy", "--max-new-tokens", "5")
    assert out.strip()
    assert "endoftext" not in out[:20]
    assert not out.startswith("<eos>")
    (tmp_path / "p.txt").write_text("the cat", encoding="utf-8")
    options = ("--greedy", "--max-new-tokens", "5")
    from_file = generated(capsys, saved[2], "--prompt-file", str(tmp_path / "p.txt"), *options)
    assert from_file == generated(capsys, saved[2], "--prompt", "the cat", *options)


def test_the_end_of_the_text(tmp_path, capsys):
    tokenizer = train_bpe(TEXT, 300)
    model, _, _ = build(tmp_path / "free", tokenizer, None)
    ids = torch.tensor([tokenizer("the cat")["input_ids"]])
    out = model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))[0]
    # some token of the continuation is made the one that ends a text
    position = next(i for i in range(len(ids[0]) + 2, len(out)) if out[i] not in out[len(ids[0]) : i])
    saved = build(tmp_path / "ends", tokenizer, int(out[position]))
    options = ("--prompt", "the cat", "--greedy", "--max-new-tokens", "12")
    assert generated(capsys, saved[2], *options) == tokenizer.decode(out[:position]) + "\n"
    assert generated(capsys, saved[2], *options, "--ignore-eos") == tokenizer.decode(out) + "\n"
    beams = generated(capsys, saved[2], *options[:2], "--num-beams", "4", "--num-return-sequences", "4")
    assert tokenizer.decode(out[: position + 1]) + "\n" not in beams


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "neither is given"),
        (("--prompt", "a", "--prompt-file", "b"), "both are given"),
        (("--prompt-file", "/nowhere/at/all"), "cannot be read"),
        (("--prompt", "a", "--temperature", "0"), "--temperature"),
        (("--prompt", "a", "--temperature", "nan"), "--temperature nan: must be above 0"),
        (("--prompt", "a", "--top-p", "1.5"), "--top-p"),
        (("--prompt", "a", "--top-k", "0"), "--top-k"),
        (("--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("--prompt", "a", "--greedy", "--top-k", "5"), "--top-k has no meaning"),
        (("--prompt", "a", "--greedy", "--num-return-sequences", "2"), "--num-return-sequences 2"),
        (("--prompt", "a", "--num-beams", "2", "--num-return-sequences", "3"), "--num-return-sequences 3"),
        (("--prompt", "a", "--strategy", "greedy", "--top-k", "5"), "--top-k has no meaning"),
        (("--prompt", "a", "--strategy", "sample", "--greedy"), "--strategy sample has no meaning"),
        (("--prompt", "a", "--strategy", "beam"), "needs --num-beams 2"),
        (("--prompt", "a", "--strategy", "diverse-beam", "--num-beams", "4", "--num-beam-groups", "3"), "not divide"),
        (("--prompt", "a", "--strategy", "diverse-beam", "--num-beams", "4", "--diversity-penalty", "0"), "above 0"),
        (("--prompt", "a", "--strategy", "diverse-beam", "--num-beams", "4", "--top-p", "0.9"), "--top-p: has no"),
        (("--prompt", "a", "--strategy", "contrastive", "--penalty-alpha", "2"), "--penalty-alpha 2"),
        (("--prompt", "a", "--strategy", "contrastive", "--temperature", "2"), "--temperature: has no meaning"),
        (("--prompt", "a", "--strategy", "token-recycling", "--num-beams", "2"), "--num-beams 2: has no meaning"),
        (("--prompt", "a", "--strategy", "prompt-lookup", "--num-return-sequences", "2"), "makes one text"),
        (("--prompt", "a", "--strategy", "prompt-lookup", "--num-draft-tokens", "0"), "--num-draft-tokens 0"),
        (("--prompt", "a", "--strategy", "assisted"), "needs --draft"),
        (("--prompt", "a", "--draft", "x"), "belongs to assisted"),
        (("--prompt", "a", "--penalty-alpha", "0.5"), "belongs to contrastive"),
    ],
)
def test_bad_arguments(capsys, tmp_path, arguments, message):
    error = generated(capsys, str(tmp_path), *arguments, expect=2)
    assert message in error
    assert error.count("\n") == 1


def test_prompt_file_that_is_not_text(capsys, tmp_path):
    (tmp_path / "p").write_bytes(b"ab\xff")
    assert "byte 2" in generated(capsys, str(tmp_path), "--prompt-file", str(tmp_path / "p"), expect=2)


def test_a_model_without_a_tokenizer(capsys, tmp_path):
    S4ForCausalLM(S4Config(vocab_size=30, hidden_size=16, num_hidden_layers=1)).save_pretrained(tmp_path)
    assert "tokenizer.json: no such file" in generated(capsys, str(tmp_path), "--prompt", "a", expect=2)
    train_bpe(TEXT, 300).save_pretrained(tmp_path)
    assert "vocabulary of 30" in generated(capsys, str(tmp_path), "--prompt", "a", expect=2)

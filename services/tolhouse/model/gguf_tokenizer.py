"""Builds the tokenizer of a GGUF file: tokenizer.json and tokenizer_config.json.

A GGUF file has a vocabulary, merges or scores, a type for each token, and the name of the
pre-tokenizer, which is the rule that splits a text before merges apply. Each name stands for the
rule in the published tokenizer of that model family.
"""

from typing import TYPE_CHECKING, Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from tolhouse.errors import InvalidArgumentError

if TYPE_CHECKING:
    from tolhouse.model.gguf import GGUFFile

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # types of tokens
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By the name of the pre-tokenizer: a pattern, "digits" (each digit is split off, then GPT-2's
# pattern applies) or "" (GPT-2's pattern).
_PATTERNS = {
    "gpt-2": "",
    **dict.fromkeys(("smollm", "starcoder", "refact"), "digits"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,
}


def build_tokenizer(file: "GGUFFile") -> Tokenizer:
    """Return the tokenizer of a GGUF file.

    Raises InvalidArgumentError if the vocabulary is malformed or its kind is not supported.
    """
    kind = file.get("tokenizer.ggml.model", str)
    tokens: list[str] = file.items("tokenizer.ggml.tokens", str)
    types: list[int] = file.items("tokenizer.ggml.token_type", int, default=[_NORMAL] * len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise file.refused(f"has token {twice!r} more than once")
    if len(types) != len(tokens):
        raise file.refused(f"has {len(tokens)} tokens and {len(types)} token types")
    if kind not in ("gpt2", "llama"):
        allowed = "allowed are gpt2 (byte-level BPE) and llama (SentencePiece BPE)"
        raise file.refused(f"has tokenizer.ggml.model {kind!r}: {allowed}")
    try:
        if kind == "gpt2":
            tokenizer = _byte_level(file, vocabulary)
        else:
            tokenizer = _sentencepiece(file, vocabulary, types)
    except InvalidArgumentError:
        raise
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exception
        raise file.refused(f"has a malformed vocabulary: {error}") from None
    added = [
        AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED) or (kind == _UNKNOWN and token)
    ]
    tokenizer.add_tokens(added)
    before, after = _wrapping(file)
    if before or after:
        single = [*before, "$A", *after]
        pair = [*single, *(f"{part}:1" for part in (*before, "$B", *after))]
        special = [(token, vocabulary[token]) for token in dict.fromkeys((*before, *after))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=special
        )
    return tokenizer


def tokenizer_config(file: "GGUFFile", context: int) -> dict[str, Any]:
    """Return the content of tokenizer_config.json. `context` is in tokens."""
    special = {name: _token(file, key) for name, key in _SPECIAL.items()}
    template = file.get("tokenizer.chat_template", str, None)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in special.items() if token is not None},
        **({"chat_template": template} if template else {}),
    }


_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


def _token(file: "GGUFFile", key: str) -> str | None:
    """Return the text of a special token, such as `eos`, or None if the file has none."""
    name = f"tokenizer.ggml.{key}_token_id"
    number, tokens = file.get(name, int, None), file.items("tokenizer.ggml.tokens", str)
    if number is None:
        return None
    if not 0 <= number < len(tokens):
        raise file.refused(f"has {name} {number}; allowed are ids below {len(tokens)}")
    return tokens[number]


def _wrapping(file: "GGUFFile") -> tuple[list[str], list[str]]:
    """Return the tokens that the tokenizer puts before and after a text."""
    llama3 = _PATTERNS.get(file.get("tokenizer.ggml.pre", str, "")) == _LLAMA3
    default = file.get("tokenizer.ggml.model", str) == "llama" or llama3
    wrapped = []
    for key, by_default in (("bos", default), ("eos", False)):
        adds = file.get(f"tokenizer.ggml.add_{key}_token", bool, by_default)
        token = _token(file, key) if adds else None
        wrapped.append([] if token is None else [token])
    return wrapped[0], wrapped[1]


def _byte_level(file: "GGUFFile", vocabulary: dict[str, int]) -> Tokenizer:
    """Return a byte-level BPE tokenizer, as GPT-2's."""
    name, allowed = file.get("tokenizer.ggml.pre", str, ""), ", ".join(_PATTERNS)
    if not name:
        advice = f"name the one of the model with `gguf-new-metadata --pre-tokenizer`: {allowed}"
        raise file.refused(
            f"lacks the metadata tokenizer.ggml.pre, the rule that splits texts: {advice}"
        )
    if name not in _PATTERNS:
        raise file.refused(f"has tokenizer.ggml.pre {name!r}; allowed are {allowed}")
    pattern, merges = _PATTERNS[name], []
    for merge in file.items("tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    whole = pattern in (_LLAMA3, _TEKKEN)  # a word that is a token is not built from merges
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole))
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    first = (
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == "digits"
        else pre_tokenizers.Split(Regex(pattern), "isolated")
    )
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in ("", "digits"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, last]) if pattern else last
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: "GGUFFile", vocabulary: dict[str, int], types: list[int]) -> Tokenizer:
    """Return a SentencePiece BPE tokenizer, as LLaMA-2's. Its scores give the order of merges."""
    scores: list[float] = file.items("tokenizer.ggml.scores", float, int)
    if len(scores) != len(types):
        raise file.refused(f"has {len(types)} tokens and {len(scores)} scores")
    own = {t for t, i in vocabulary.items() if types[i] in (_NORMAL, _USER_DEFINED)}
    pairs = [
        (scores[vocabulary[token]], token[:at], token[at:])
        for token in vocabulary
        if token in own
        for at in range(1, len(token))
        if token[:at] in own and token[at:] in own
    ]
    pairs.sort(key=lambda p: (p[0], len(p[1]), len(p[2])), reverse=True)
    unknown = _token(file, "unknown")
    bytes_known = _BYTE in types
    model = models.BPE(
        vocabulary,
        [(left, right) for _, left, right in pairs],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=bytes_known,
    )
    tokenizer = Tokenizer(model)
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    scheme = "first" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*chain, *([decoders.Strip(" ", 1, 0)] if prefix else [])]
    )
    return tokenizer

"""Converts a SentencePiece model to a fast tokenizer of the Hugging Face `tokenizers` library.

Training, scoring and the exported folder then use the same tokenizer, so that they cannot tokenise differently.
"""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gram_engine.errors import ConfigError

# Piece types and model types of sentencepiece_model.proto.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
_UNIGRAM, _BPE = 1, 2
_SPACE = "\u2581"


def fast_tokenizer_of(model_file: str | Path):
    """A Hugging Face `PreTrainedTokenizerFast` that encodes as the SentencePiece model (BPE or unigram) does.

    If special tokens are asked for, a text begins with the beginning-of-sequence piece, if the model has one. Unlike in
    SentencePiece, but as in every Hugging Face LLaMA tokenizer of this kind, a piece such as "</s>" that a text spells is that
    special token, and the dummy space before a text is also added after special and user-defined pieces.

    Raises:
        ConfigError: the file is not a SentencePiece model, or a model type that has no fast counterpart.
    """
    from transformers import PreTrainedTokenizerFast

    proto = _read(model_file)
    if proto.trainer_spec.model_type not in (_UNIGRAM, _BPE) or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ConfigError(f"{model_file}: only SentencePiece models of type bpe or unigram are supported.")
    backend = Tokenizer(_model(proto))
    backend.normalizer = _normalizer(proto.normalizer_spec)
    pre_tokenizer = _pre_tokenizer(proto)
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    strip = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    for piece in proto.pieces:
        if piece.type in (_UNKNOWN, _CONTROL):
            backend.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == _USER_DEFINED:
            backend.add_tokens([AddedToken(piece.piece.replace(_SPACE, " "), normalized=False)])
    names = {kind: _piece_name(proto, getattr(proto.trainer_spec, f"{kind}_id")) for kind in ("bos", "eos", "unk", "pad")}
    if names["bos"] is not None:
        ids = [(names["bos"], proto.trainer_spec.bos_id)]
        backend.post_processor = processors.TemplateProcessing(single=f"{names['bos']} $A", special_tokens=ids)
    special = {f"{kind}_token": name for kind, name in names.items() if name is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def _read(model_file: str | Path):
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(Path(model_file).read_bytes())
    except DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise ConfigError(f"{model_file}: not a SentencePiece model. Give the .model file that spm_train wrote.")
    return proto


def _piece_name(proto, number: int):
    return proto.pieces[number].piece if 0 <= number < len(proto.pieces) else None


def _model(proto) -> models.Model:
    trainer = proto.trainer_spec
    if trainer.model_type == _UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    unknown = proto.pieces[trainer.unk_id].piece
    return models.BPE(ids, _merges(proto, ids), unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback)


def _merges(proto, ids: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces whose concatenation is a piece, in the order of the result's score, as SentencePiece merges them."""
    usable = {p.piece for p in proto.pieces if p.type not in (_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED)}
    ranked = []
    for piece in proto.pieces:
        if piece.piece not in usable:
            continue
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in usable and right in usable:
                ranked.append((-piece.score, ids[piece.piece], ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _normalizer(spec) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _pre_tokenizer(proto):
    """Splits a text into words, if no piece crosses from one word into the next; otherwise None.

    The result is the same, but without it the merges of a whole document are one search, which is several times slower.
    """
    crosses = re.compile(f"[^{_SPACE}]{_SPACE}")
    if any(crosses.search(piece.piece) for piece in proto.pieces if piece.type != _USER_DEFINED):
        return None
    return pre_tokenizers.Split(Regex(f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+"), "isolated")

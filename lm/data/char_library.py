"""Character tokenizers in the form of the `tokenizers` library, for readers that know no other."""

import sys
import unicodedata
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from lm.data.text import fold
from lm.data.tokenizer import CharTokenizer, SubwordTokenizer


def library_form(tokenizer: Any) -> Any:
    """Returns a tokenizer of the library that gives the same ids; one that is there already as is.

    What a `CharTokenizer` refuses (`unknown='raise'`), the library's drops, since it cannot refuse.
    """
    if not isinstance(tokenizer, CharTokenizer):
        return tokenizer
    ids = {symbol: index for index, symbol in enumerate(tokenizer.symbols)}
    # Byte-pair encoding without merges: a token a character, and those outside of it dropped.
    library = tokenizers.Tokenizer(models.BPE(ids, [], unk_token=tokenizer.unk))
    if tokenizer.folds:
        library.normalizer = folding(tokenizer.symbols)
    library.decoder = decoders.Fuse()
    library.add_special_tokens([symbol for symbol in tokenizer.symbols if len(symbol) > 1])
    others = (("unk", tokenizer.unk),) if tokenizer.unk else ()
    return SubwordTokenizer(library, tokenizer.pad, tokenizer.bos, tokenizer.eos, others=others)


def folding(symbols: tuple[str, ...]) -> normalizers.Normalizer:
    """Returns `fold` as the library has it, for text that is cut to `symbols` afterwards."""
    # Lower case is not all of case folding: ß is ss, and ﬁ is fi.
    odd = [
        normalizers.Replace(c, fold(c))
        for c in map(chr, range(sys.maxunicode + 1))
        if c.casefold() != c.lower() and fold(c) != lowered(c) and set(fold(c)) & {*symbols}
    ]
    return normalizers.Sequence(
        [*odd, normalizers.Lowercase(), normalizers.NFD(), normalizers.StripAccents()]
    )


def lowered(text: str) -> str:
    """Returns text in lower case without accents, by the rules that the library knows."""
    decomposed = unicodedata.normalize("NFD", text.lower())
    return "".join(c for c in decomposed if not unicodedata.combining(c))

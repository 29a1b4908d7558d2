"""How the bytes of a text stand for its characters: what a file says itself, and a guess."""

import codecs
import re
from collections import Counter

from pkm_jax.refusal import Refusal

SAMPLE = 2**16              # bytes that a guess looks at
UNDECODABLE = '\udcff'      # stands for what could not be decoded; no decoder makes it by itself
_MARKS = {codecs.BOM_UTF8: 'utf-8-sig', codecs.BOM_UTF32_LE: 'utf-32',
          codecs.BOM_UTF32_BE: 'utf-32', codecs.BOM_UTF16_LE: 'utf-16',
          codecs.BOM_UTF16_BE: 'utf-16'}        # UTF-32's begins with UTF-16's: it is tried before
# Characters that a text in a language of the encoding is full of, beyond ASCII.
_COMMON = {
    'shift_jis': 'のにはをたがでてとしれさいるすあンーイスルトリア',
    'euc_jp': 'のにはをたがでてとしれさいるすあンーイスルトリア',
    'gb18030': '的一是不了在人有我他这中大来上国个到说们为子和学',
    'big5': '的一是不了在人有我他這中大來上國個到說們為子和學',
    'euc_kr': '이다는에의을가고하지로기도은사리를한',
    'cp1251': 'оеаинтсрвлкмдпуяызьбгч', 'koi8_r': 'оеаинтсрвлкмдпуяызьбгч',
    'cp1252': 'éèêàçùâîôûüöäßñáíóúåøæõã’“”–', 'cp1250': 'ěščřžýáíéúůąęłńśźżćőű',
    'cp1254': 'ışğüçöİŞĞ', 'cp1253': 'αοιετσνηυρπκλμάέήίόύώ', 'cp1255': 'יוהלאמרתבשנ',
    'cp1256': 'اليمنوتربدكسعفة', 'cp874': 'านรอกเงมยลวดทสตะปบคหแจพชขใไ่้ี',
}
_PAIRS = {'shift_jis', 'euc_jp', 'gb18030', 'big5', 'euc_kr'}  # few texts of others fit their pairs


def _mark(error: UnicodeError) -> tuple[str, int]:
    if isinstance(error, UnicodeDecodeError):
        return UNDECODABLE, error.end
    raise error


codecs.register_error('pkm_jax.mark_undecodable', _mark)
MARK_UNDECODABLE = 'pkm_jax.mark_undecodable'


def check_encoding(name: str) -> None:
    """Refuses the name of an encoding that Python does not know, or that is none of text.

    Raises:
      Refusal: naming it.
    """
    try:
        b'a'.decode(name, 'ignore')
    except (LookupError, ValueError) as error:
        raise Refusal(f"data.encoding = {name!r} is no encoding that is known: name one such as "
                      "'utf-8', 'cp1252', 'shift_jis' or 'utf-16-le'.") from error


def from_mark(head: bytes) -> str | None:
    """The encoding that a byte order mark at the beginning of a file tells."""
    return next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)


def guess(content: bytes) -> str | None:
    """The likely encoding of a text that is not UTF-8, by its commonest characters."""
    sample = content[:SAMPLE]
    if marked := from_mark(sample):
        return marked
    if zeros := sample.count(0):
        if zeros > len(sample) / 8:
            return 'utf-16-le' if sample[1::2].count(0) > sample[::2].count(0) else 'utf-16-be'
        return None
    scores = {name: _score(sample, name) for name in _COMMON}
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] > 0.25 else None


def _score(sample: bytes, name: str) -> float:
    """The share of common characters among those beyond ASCII; 0 where a byte has no meaning."""
    text = sample.decode(name, 'replace')
    beyond = Counter(re.findall('[^\x00-\x7f]', text))
    if beyond['\N{REPLACEMENT CHARACTER}'] > 1 or not beyond:       # one: the sample's cut end
        return 0.0
    share = sum(beyond[character] for character in _COMMON[name]) / beyond.total()
    return share + 0.5 if name in _PAIRS and share > 0.1 else share


def guess_in_words(content: bytes) -> str:
    """', likely NAME' for a message; '' without a guess."""
    found = guess(content)
    return f', likely {found}' if found else ''

"""How the bytes of a text stand for its characters: what a file says itself, and a guess."""

import codecs
import re
from collections import Counter

from pkm_jax.refusal import Refusal

SAMPLE = 2**16              # bytes that a guess looks at
UNDECODABLE = '\udcff'      # stands for what could not be decoded; no decoder makes it by itself
# What is in no text: bytes of another encoding, half a UTF-16 character, a switch of ISO 2022.
SIGNS_OF_ANOTHER = (UNDECODABLE, '\0', '\x1b$')
_MARKS = {codecs.BOM_UTF8: 'utf-8-sig', codecs.BOM_UTF32_LE: 'utf-32',
          codecs.BOM_UTF32_BE: 'utf-32', codecs.BOM_UTF16_LE: 'utf-16',
          codecs.BOM_UTF16_BE: 'utf-16'}        # UTF-32's begins with UTF-16's: it is tried before
_CYRILLIC = 'оеаинтсрвлкмдпуяызьбгч'
_WESTERN = 'éèêàçùâîôüöäßñáíóúåøæã’“”–'
_CENTRAL = 'ěščřžýáíéúůąęłńśźżćőűóöüô'
# Characters that a text in a language of the encoding is full of, beyond ASCII.
_COMMON = {
    'shift_jis': 'のにはをたがでてとしれさいるすあンーイスルトリア',
    'euc_jp': 'のにはをたがでてとしれさいるすあンーイスルトリア',
    'gb18030': '的一是不了在人有我他这中大来上国个到说们为子和学',
    'big5': '的一是不了在人有我他這中大來上國個到說們為子和學',
    'euc_kr': '이다는에의을가고하지로기도은사리를한',
    'cp1251': _CYRILLIC, 'koi8_r': _CYRILLIC, 'cp866': _CYRILLIC,
    'cp1252': _WESTERN, 'mac_roman': _WESTERN, 'cp850': _WESTERN,
    'cp1250': _CENTRAL, 'iso8859_2': _CENTRAL,
    'cp1254': 'ışğüçöİŞĞ', 'cp1253': 'αοιετσνηυρπκλμάέήίόύώ',
    'cp1255': 'אבגדהוזחטיךכלםמןנסעףפץצקרשת',
    'cp1256': 'اليمنوتربدكسعفة', 'cp874': 'านรอกเงมยลวดทสตะปบคหแจพชขใไ่้ี',
}
_SURE = 0.6         # share of characters, or of bytes, that fit a guess
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


def is_utf8(name: str) -> bool:
    """Whether an encoding is UTF-8, by whichever of its names."""
    return codecs.lookup(name).name in ('utf-8', 'utf-8-sig')


def holds_utf8(content: bytes) -> bool:
    """Whether the beginning of a file is UTF-8, with too many characters for that to be chance."""
    try:
        text = codecs.getincrementaldecoder('utf-8')().decode(content)
    except UnicodeDecodeError:
        return False
    return len(re.findall('[^\x00-\x7f]', text)) > 10


def from_mark(head: bytes) -> str | None:
    """The encoding that a byte order mark at the beginning of a file tells."""
    return next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)


def guess(content: bytes) -> str | None:
    """The likely encoding of a text that is not UTF-8, by its commonest characters."""
    sample = content[:SAMPLE]
    if marked := from_mark(sample):
        return marked
    if b'\x1b$' in sample:
        return 'iso2022_kr' if b'\x1b$)C' in sample else 'iso2022_jp'
    if sample.count(0):
        return _guess_by_zeros(sample)
    scores = {name: _score(sample, name) for name in _COMMON}
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] > _SURE else None


def _guess_by_zeros(sample: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark: which of four bytes in turn are zeros."""
    zeros = [sample[place::4].count(0) / max(1, len(sample) // 4) for place in range(4)]
    if min(zeros[2:]) > _SURE:
        return 'utf-32-le'
    if min(zeros[:2]) > _SURE:
        return 'utf-32-be'
    if sum(zeros) < 0.5:
        return None
    return 'utf-16-le' if zeros[1] + zeros[3] > zeros[0] + zeros[2] else 'utf-16-be'


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

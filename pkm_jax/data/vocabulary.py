"""Vocabularies: the words that a model knows, and how text is cut into them."""

import dataclasses
import functools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from etils import epath
from jaxtyping import Bool, Int
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from pkm_jax.data.worker import tokenizer_of
from pkm_jax.refusal import Refusal

ROLES = ('pad', 'unk', 'cls', 'sep', 'mask')
MOST_CHARACTERS = 1_000      # distinct ones in a trained vocabulary; rarer ones become [UNK], …
COVERAGE = 0.9995            # … unless that leaves more than the rest of the text unknown
MOST_SAMPLES = 500_000       # that a vocabulary is trained on, drawn evenly from the corpus …
LONGEST_SAMPLE = 2_000       # … in characters: parts of paragraphs
_WORD_BEGINS = 'Ġ▁'          # what the first piece of a word begins with: byte-level, SentencePiece
_PROBE = 'Az é 的 \N{SKULL} 7'


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """The tokens with a part to play, as BERT calls them. unk: None where every text has words."""
    pad: str = '[PAD]'
    unk: str | None = '[UNK]'
    cls: str = '[CLS]'
    sep: str = '[SEP]'
    mask: str = '[MASK]'


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids, which of them are special, and how text becomes tokens.

    description: the content of a tokenizer.json; what it says about truncation, padding and BPE
        dropout is left out.
    Raises:
      Refusal: it is no such content, a special token is missing, ids are not 0, 1, 2, …, or it
        fails on some text.
    """
    description: str
    special_tokens: SpecialTokens = SpecialTokens()

    def __post_init__(self) -> None:
        tokenizer = _parsed(self.description)
        names = {role: getattr(self.special_tokens, role) for role in ROLES}
        missing = {role: name for role, name in names.items()
                   if name is not None and tokenizer.token_to_id(name) is None}
        if missing:
            raise Refusal(f'the vocabulary of {tokenizer.get_vocab_size():,} tokens lacks '
                          + ', '.join(f'{name} ({role})' for role, name in missing.items()))
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_special_tokens(
            [name for name in names.values() if name and name not in added])
        object.__setattr__(self, 'description', tokenizer.to_str())
        if None in self.tokens:
            raise Refusal(f'the ids of its {len(self.tokens):,} tokens are not 0 to '
                          f'{len(self.tokens) - 1:,}: {self.tokens.index(None)} is none')
        if changed := [name for name in names.values() if name and name not in self.ids]:
            raise Refusal(f'its normaliser changes the special tokens {", ".join(changed)}, which '
                          f'it must leave as they are: set their "normalized" to false')
        try:
            self.tokenizer().encode(_PROBE)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # of no type of its own; where it panics, no Exception
            raise Refusal(f'the tokenizer fails on the text {_PROBE!r}: {error}') from error

    @functools.cached_property
    def tokens(self) -> tuple[str, ...]:
        """All tokens, the special ones too."""
        tokenizer = self.tokenizer()
        return tuple(map(tokenizer.id_to_token, range(tokenizer.get_vocab_size())))

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Token to id."""
        return {token: number for number, token in enumerate(self.tokens)}

    @property
    def pad_id(self) -> int:
        """The id that fills up short rows."""
        return self.ids[self.special_tokens.pad]

    @property
    def unk_id(self) -> int | None:
        """The id of words that are not in the vocabulary; None where there are none."""
        return self.ids.get(self.special_tokens.unk)

    @property
    def cls_id(self) -> int:
        """The id that a record begins with."""
        return self.ids[self.special_tokens.cls]

    @property
    def sep_id(self) -> int:
        """The id after every paragraph."""
        return self.ids[self.special_tokens.sep]

    @property
    def mask_id(self) -> int:
        """The id in the place of a token that is to be predicted."""
        return self.ids[self.special_tokens.mask]

    @functools.cached_property
    def special(self) -> Bool[np.ndarray, 'vocab']:
        """True for the special tokens, which are neither masked nor drawn as replacements."""
        added = self.tokenizer().get_added_tokens_decoder().items()
        special = np.zeros(len(self.tokens), bool)
        special[[number for number, token in added if token.special]] = True
        return special

    @functools.cached_property
    def continuation(self) -> Bool[np.ndarray, 'vocab']:
        """True for pieces that continue a word.

        Raises:
          Refusal: the pieces do not tell.
        """
        model = json.loads(self.description)['model']
        if model['type'] == 'WordLevel':
            return np.zeros(len(self.tokens), bool)
        if prefix := model.get('continuing_subword_prefix'):
            found = np.array([token.startswith(prefix) for token in self.tokens])
        else:
            begins = Counter(token[:1] for token in self.tokens)
            mark = max(_WORD_BEGINS, key=begins.__getitem__)
            if not begins[mark]:
                raise Refusal(f'this {model["type"]} vocabulary does not mark where words begin: '
                              'set data.whole_word to False')
            found = np.array([not token.startswith(mark) for token in self.tokens])
        return found & ~self.special

    @functools.cached_property
    def ordinary_ids(self) -> Int[np.ndarray, 'ordinary']:
        """Ids of all tokens that are not special."""
        return np.flatnonzero(~self.special)

    def tokenizer(self) -> Tokenizer:
        """What cuts text; the names of special tokens within a text are text."""
        return tokenizer_of(self.description)

    def save(self, folder: epath.PathLike, longest: int | None = None) -> None:
        """Writes tokenizer.json and tokenizer_config.json, and vocab.txt if it is WordPiece.

        longest: tokens that a model takes.
        """
        folder = epath.Path(folder)
        names = {f'{role}_token': name
                 for role, name in dataclasses.asdict(self.special_tokens).items() if name}
        limit = {'model_max_length': longest} if longest else {}
        config = {'tokenizer_class': 'PreTrainedTokenizerFast', **names, **limit}
        if json.loads(self.description)['model']['type'] == 'WordPiece':
            (folder / 'vocab.txt').write_text(''.join(f'{token}\n' for token in self.tokens))
        (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')
        (folder / 'tokenizer.json').write_text(self.description)


def _parsed(description: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(description)
    except Exception as error:          # the library's errors have no type of their own
        raise Refusal(f'the tokenizers library does not read it: {str(error)[:200]}') from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    return tokenizer


def word_pieces(tokens: Sequence[str], lowercase: bool = True, strip_accents: bool | None = None,
                split_chinese: bool = True, prefix: str = '##',
                special_tokens: SpecialTokens = SpecialTokens()) -> Vocabulary:
    """A WordPiece vocabulary that cuts text as BERT's tokenizer does.

    strip_accents: drops all non-spacing marks; None: as `lowercase`, which is BERT's rule.
    Raises:
      Refusal: a token is there twice, or a special one is missing.
    """
    ids = {token: number for number, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = [token for token, number in Counter(tokens).items() if number > 1]
        raise Refusal(f'{len(tokens) - len(ids)} of its tokens are there twice: {twice[:5]}. '
                      'Fetch it again')
    if special_tokens.unk not in ids:
        raise Refusal(f'the vocabulary of {len(ids):,} tokens lacks {special_tokens.unk} (unk)')
    model = models.WordPiece(ids, unk_token=special_tokens.unk, max_input_chars_per_word=100,
                             continuing_subword_prefix=prefix)
    tokenizer = _bert_tokenizer(model, normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=split_chinese))
    return _with_bert_format(tokenizer, special_tokens)


def train(paragraphs: Iterable[str], size: int, lowercase: bool = True,
          strip_accents: bool = False, log: Callable[[str], None] = print) -> Vocabulary:
    """Trains a WordPiece vocabulary of `size` tokens; [PAD] [UNK] [CLS] [SEP] [MASK] are ids 0 to
    4.

    lowercase, strip_accents: of the text, in training and in use. Accents and the vowel signs of
        many scripts are kept, composed (NFC), unless `strip_accents`.
    The same text gives the same vocabulary, on any machine. A text too small for `size` tokens
    gives fewer, which is logged.
    Raises:
      Refusal: `size` cannot even hold the single characters.
    """
    special = list(dataclasses.astuple(SpecialTokens()))
    sample = _sample(paragraphs, MOST_SAMPLES)
    bert = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    normalizer = bert if strip_accents else normalizers.Sequence([normalizers.NFC(), bert])
    tokenizer = _bert_tokenizer(models.WordPiece(unk_token='[UNK]'), normalizer)
    characters = _frequent_characters(sample, tokenizer, size)
    # The trainer numbers pieces in the order of a hash table with a random seed, and breaks ties by
    # number. Giving all single characters as special tokens, which are numbered first, leaves
    # nothing to chance.
    first = [*special, *characters, *(f'##{character}' for character in characters)]
    if size < len(first):
        raise Refusal(f'a vocabulary of {size:,} tokens cannot hold the {len(characters):,} '
                      'different characters of the text, alone and as continuation: set '
                      f'data.vocab_size to {len(first):,} or more')
    log(f'vocabulary: training {size:,} tokens on {len(sample):,} paragraphs; '
        f'{"lower case" if lowercase else "capitals kept"} (data.lowercase), accents and vowel '
        f'signs {"dropped" if strip_accents else "kept"} (data.strip_accents)')
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(sample, trainer)
    ids = tokenizer.get_vocab()
    log(f'vocabulary: {len(ids):,} tokens of {size:,} asked for'
        + (', the text is too small for more' if len(ids) < size else ''))
    model = models.WordPiece(ids, unk_token='[UNK]', max_input_chars_per_word=100)
    return _with_bert_format(_bert_tokenizer(model, normalizer), SpecialTokens())


def _bert_tokenizer(model: models.Model, normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _with_bert_format(tokenizer: Tokenizer, special: SpecialTokens) -> Vocabulary:
    """The vocabulary of a tokenizer that puts [CLS] and [SEP] around a text, as others expect."""
    ends = [(name, tokenizer.token_to_id(name)) for name in (special.sep, special.cls)]
    if all(number is not None for _, number in ends):       # else refused, by Vocabulary
        tokenizer.post_processor = processors.BertProcessing(*ends)
    tokenizer.decoder = decoders.WordPiece()
    return Vocabulary(tokenizer.to_str(), special)


def _frequent_characters(sample: list[str], tokenizer: Tokenizer, size: int) -> list[str]:
    """The commonest characters of the text, in their order: those that a vocabulary must hold."""
    counts: Counter[str] = Counter()
    for paragraph in sample:
        counts.update(tokenizer.normalizer.normalize_str(paragraph))
    ranked = sorted((character for character in counts if not character.isspace()),
                    key=lambda character: (-counts[character], character))
    covered = np.cumsum([counts[character] for character in ranked])
    needed = np.searchsorted(covered, COVERAGE * covered[-1]) + 1 if ranked else 0
    return sorted(ranked[:max(MOST_CHARACTERS, min(int(needed), size // 4))])


def _sample(paragraphs: Iterable[str], size: int) -> list[str]:
    """An even, repeatable draw of at most `size` parts of paragraphs (reservoir sampling)."""
    random_numbers = random.Random(0)
    sample: list[str] = []
    for number, part in enumerate(part for paragraph in paragraphs for part in _parts(paragraph)):
        if number < size:
            sample.append(part)
        elif (place := random_numbers.randrange(number + 1)) < size:
            sample[place] = part
    return sample


def _parts(paragraph: str) -> Iterator[str]:
    """Yields a paragraph in parts of at most LONGEST_SAMPLE characters, cut at spaces if it can."""
    while len(paragraph) > LONGEST_SAMPLE:
        place = paragraph.rfind(' ', 1, LONGEST_SAMPLE)
        place = LONGEST_SAMPLE if place < 0 else place
        yield paragraph[:place]
        paragraph = paragraph[place:]
    yield paragraph

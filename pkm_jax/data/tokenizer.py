"""The tokenizers of other people's folders, used as they are, or refused by name."""

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from etils import epath
from tokenizers import AddedToken, Tokenizer

from pkm_jax.data.files import expand, read_json, read_text, refuse_broken_link
from pkm_jax.data.vocabulary import ROLES, SpecialTokens, Vocabulary, word_pieces
from pkm_jax.refusal import Refusal

FILES = ('tokenizer.json', 'vocab.txt')
# Classes of transformers that cut text as BERT's does, given a vocab.txt.
_LIKE_BERT = re.compile(r'(Bert|DistilBert|Electra|MobileBert|ConvBert|LayoutLM|Funnel|Lxmert|'
                        r'MPNet|SqueezeBert|RetriBert|Splinter|Realm|DPR\w*)Tokenizer(Fast)?')
# What folders call the five tokens, and what they are where nothing names them.
_NAMES = {'pad': ('pad_token',), 'unk': ('unk_token',), 'cls': ('cls_token', 'bos_token'),
          'sep': ('sep_token', 'eos_token'), 'mask': ('mask_token',)}
_USUAL = {'pad': ('[PAD]', '<pad>'), 'unk': ('[UNK]', '<unk>'), 'cls': ('[CLS]', '<cls>', '<s>'),
          'sep': ('[SEP]', '<sep>', '</s>'), 'mask': ('[MASK]', '<mask>')}
# What BERT's tokenizer reads in tokenizer_config.json.
_SETTINGS = {'do_lower_case': bool, 'strip_accents': bool, 'tokenize_chinese_chars': bool,
             'wordpieces_prefix': str}
_OTHERS = ('vocab.json', '*.model', 'merges.txt', '*vocab*')
_ACCENTED_WORDS = 0.0005    # of a vocabulary, that show that it keeps accents


def find(path: epath.PathLike) -> epath.Path | None:
    """The file that says how a folder cuts text, or `path` itself where it is a file; else None.

    Raises:
      Refusal: it is a link to what is not there.
    """
    path = epath.Path(expand(path))
    candidates = [path / name for name in FILES] if path.is_dir() else [path]
    for candidate in candidates:
        refuse_broken_link(candidate)
    return next((candidate for candidate in candidates if candidate.exists()), None)


def load(path: epath.PathLike, lowercase: bool | None = None, strip_accents: bool | None = None,
         log: Callable[[str], None] = lambda line: None) -> Vocabulary:
    """The vocabulary of a folder, or of a tokenizer.json or vocab.txt; local or gs://.

    A tokenizer.json is used whole. With a vocab.txt, the tokenizer_config.json beside it says how
    BERT's tokenizer is set; where it does not, `lowercase` and `strip_accents` do, and where they
    are None, a guess, which is logged with its reason.
    Raises:
      Refusal: there is none, it is damaged, lacks a special token, cuts text in another way than
        BERT's vocab.txt, or contradicts `lowercase` or `strip_accents`.
    """
    file = find(path)
    if file is None:
        raise Refusal(f'no vocabulary at {path}{_others(path)}: name a vocab.txt, a tokenizer.json '
                      "or a folder with one, or leave it empty ('') to train one")
    # What a file of another name lies beside need not belong to it.
    beside = file.parent if file.name in FILES else None
    config = _configuration(beside)
    wanted = {'lowercase': lowercase, 'strip_accents': strip_accents}
    try:
        if file.suffix == '.json':
            return _described(file, config, wanted, log)
        words = _words(file)
        if beside and (beside / FILES[0]).exists():
            whole = _described(beside / FILES[0], config, wanted, log)
            if list(whole.tokens[:len(words)]) == words:
                return whole
            log(f'vocabulary: {beside / FILES[0]} has other words than {file} and is not used')
        return _from_words(file, words, config, beside, wanted, log)
    except Refusal as refusal:
        message = str(refusal)
        raise refusal if str(file) in message else Refusal(f'{file}: {message}') from refusal


def _others(path: epath.PathLike) -> str:
    """What else lies there that a tokenizer could be made of, in words."""
    folder = epath.Path(expand(path))
    found = sorted({file.name for pattern in _OTHERS if folder.is_dir()
                    for file in folder.glob(pattern)})
    if not found:
        return ''
    return (f' ({", ".join(found[:4])} there would need rules that only a tokenizer.json has: '
            "transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…) writes it)")


def _configuration(folder: epath.Path | None) -> dict[str, Any]:
    """What the files beside a vocabulary say of its tokenizer."""
    if folder is None:
        return {}
    names = ('tokenizer_config.json', 'special_tokens_map.json')
    found = [read_json(folder / name) for name in names if (folder / name).exists()]
    return {name: value for part in reversed(found) for name, value in part.items()}


def _described(file: epath.Path, config: dict[str, Any], wanted: dict[str, bool | None],
               log: Callable[[str], None]) -> Vocabulary:
    """The vocabulary of a tokenizer.json."""
    description = read_json(file)
    model = description.get('model')
    if not isinstance(model, dict):
        flat = bool(description) and all(isinstance(value, int) for value in description.values())
        raise Refusal(f'{file} is no tokenizer.json: it has no "model"'
                      + (', only words and their ids, without the rules for cutting text' if flat
                         else '') + '. Name a tokenizer.json or a vocab.txt')
    content = json.dumps(description, ensure_ascii=False)
    try:
        known = Tokenizer.from_str(content)
    except Exception as error:      # the library's errors have no type of their own
        raise Refusal(f'{file} is not read by the tokenizers library ({str(error)[:200]}): fetch '
                      'it again, or write it again with the newest transformers') from error
    names = _special_tokens(config, known.get_vocab(), model)
    vocabulary = Vocabulary(content, names)
    _compare(file, known, config, wanted, log)
    return vocabulary


def _special_tokens(config: dict[str, Any], ids: dict[str, int],
                    model: dict[str, Any]) -> SpecialTokens:
    """The five tokens, as the folder names them, else under their usual names.

    Raises Refusal listing those that are not found, and where [MASK] is another one as well.
    """
    optional = {'unk'} if model.get('type') == 'BPE' else set()
    found = {}
    for role in ROLES:
        named = [config[key] for key in _NAMES[role] if config.get(key)]
        named = [token.get('content') if isinstance(token, dict) else token for token in named]
        if role == 'unk' and isinstance(model.get('unk_token'), str):
            named.append(model['unk_token'])
        named = [name for name in named if isinstance(name, str)]
        found[role] = next((name for name in named or _USUAL[role] if name in ids), None)
        if named and found[role] is None and role not in optional:
            raise Refusal(f'the vocabulary of {len(ids):,} tokens lacks {named[0]}, which the '
                          f'files beside it name as its {_NAMES[role][0]}: mend '
                          'special_tokens_map.json or tokenizer_config.json')
    missing = [role for role, name in found.items() if name is None and role not in optional]
    if missing:
        raise Refusal(f'the vocabulary of {len(ids):,} tokens lacks '
                      + ', '.join(_USUAL[role][0] for role in missing)
                      + ': a masked language model needs them. Where they have other names, a '
                      'special_tokens_map.json beside it says so '
                      f'({{"{missing[0]}_token": …}})')
    if found['mask'] in {found[role] for role in ROLES if role != 'mask'}:
        raise Refusal(f'{found["mask"]} is its mask token and another special token too: a model '
                      'could not tell what to predict. Name a token of its own as mask_token')
    return SpecialTokens(**found)


def _compare(file: epath.Path, known: Tokenizer, config: dict[str, Any],
             wanted: dict[str, bool | None], log: Callable[[str], None]) -> None:
    """Refuses wishes that a tokenizer.json does not fulfil; says where its neighbour differs."""
    normalize = known.normalizer.normalize_str if known.normalizer else str
    does = {'lowercase': 'A' not in normalize('A'),
            'strip_accents': 'é' not in unicodedata.normalize('NFC', normalize('é'))}
    for setting, wish in wanted.items():
        if wish is not None and wish != does[setting]:
            raise Refusal(f'data.{setting} = {wish}, but {file} says how its text is cut, and '
                          f'that is {does[setting]}: leave data.{setting} empty (None)')
    stated = config.get('do_lower_case')
    if isinstance(stated, bool) and stated != does['lowercase']:
        log(f'vocabulary: {file} {"lowers" if does["lowercase"] else "keeps"} capitals, though '
            f'the tokenizer_config.json beside it says do_lower_case {stated}: it is used as it is')


def _words(file: epath.Path) -> list[str]:
    text = read_text(file).rstrip('\n')
    if not text:
        raise Refusal(f'{file} is empty: fetch it again')
    if text.lstrip().startswith('{'):
        raise Refusal(f'{file} holds JSON: a vocab.txt has one token a line')
    return text.split('\n')


def _from_words(file: epath.Path, words: list[str], config: dict[str, Any],
                folder: epath.Path | None, wanted: dict[str, bool | None],
                log: Callable[[str], None]) -> Vocabulary:
    """The vocabulary of a vocab.txt, cut as BERT's tokenizer does with the settings beside it."""
    _refuse_other_classes(config, folder)
    for name, kind in _SETTINGS.items():
        if not isinstance(config.get(name), kind | None):
            raise Refusal(f'the tokenizer_config.json beside it has {name} = {config[name]!r}: '
                          f'{kind.__name__} or null is expected')
    names = _special_tokens(config, dict.fromkeys(words, 0), {})
    lowercase, strip_accents = _case_and_accents(file, words, names, config, wanted, log)
    vocabulary = word_pieces(
        words, lowercase, strip_accents, special_tokens=names,
        split_chinese=config.get('tokenize_chinese_chars') is not False,
        prefix=config.get('wordpieces_prefix') or '##')
    return _with_added(vocabulary, config, folder)


def _refuse_other_classes(config: dict[str, Any], folder: epath.Path | None) -> None:
    """Refuses a vocab.txt whose words another tokenizer than BERT's is meant to cut."""
    name = config.get('tokenizer_class')
    if not name and folder and (folder / 'config.json').exists():
        name = read_json(folder / 'config.json').get('tokenizer_class')
    if name and not (isinstance(name, str) and _LIKE_BERT.fullmatch(name)):
        raise Refusal(f'its words belong to a {name}, which cuts text in another way than BERT: '
                      'only a tokenizer.json tells how. Put one beside it, or take another model')
    if config.get('word_tokenizer_type', 'basic') != 'basic' or (
            config.get('do_basic_tokenize') is False) or config.get('never_split'):
        raise Refusal('its tokenizer_config.json asks for a way of cutting text that is not '
                      "BERT's (word_tokenizer_type, do_basic_tokenize, never_split): put a "
                      'tokenizer.json beside it, or take another model')


def _case_and_accents(file: epath.Path, words: list[str], names: SpecialTokens,
                      config: dict[str, Any], wanted: dict[str, bool | None],
                      log: Callable[[str], None]) -> tuple[bool, bool]:
    """Whether BERT's tokenizer lowers text and strips accents, with the words of a vocab.txt."""
    if config.keys() & {'tokenizer_class', 'do_lower_case', 'strip_accents'}:
        lowercase = config.get('do_lower_case') is not False
        stated = config.get('strip_accents')
        stated = {'lowercase': lowercase, 'strip_accents': lowercase if stated is None else stated}
        for setting, wish in wanted.items():
            if wish is not None and wish != stated[setting]:
                raise Refusal(f'data.{setting} = {wish}, but the tokenizer_config.json beside '
                              f'{file} says {stated[setting]}: leave data.{setting} empty (None)')
        return stated['lowercase'], stated['strip_accents']
    special = {getattr(names, role) for role in ROLES}
    ordinary = [word for word in words if word not in special and not word.startswith('[')]
    capitals = next((word for word in ordinary if re.search('[A-Z]', word)), None)
    accented = [word for word in ordinary
                if any(unicodedata.category(mark) == 'Mn'
                       for mark in unicodedata.normalize('NFD', word))]
    keeps = len(accented) > _ACCENTED_WORDS * len(words)
    lowercase, strip_accents = wanted['lowercase'], wanted['strip_accents']
    if lowercase is None:
        lowercase = capitals is None
        log(f'vocabulary: {file} does not say whether capitals are kept. Guessed: they are '
            + (f'kept, as {capitals!r} has them' if capitals else 'lowered, as no word has any')
            + '. data.lowercase decides')
    if strip_accents is None:
        strip_accents = lowercase and not keeps
        reason = (f'kept, as {accented[0]!r} has one' if keeps else 'dropped, as no word has any'
                  if lowercase else 'kept, as capitals are')
        log(f'vocabulary: {file} does not say whether accents and vowel signs are kept. Guessed: '
            f'they are {reason}. data.strip_accents decides')
    return lowercase, strip_accents


def _with_added(vocabulary: Vocabulary, config: dict[str, Any],
                folder: epath.Path | None) -> Vocabulary:
    """The vocabulary with the tokens that its folder adds to those of vocab.txt.

    Raises Refusal where their ids do not follow those of vocab.txt.
    """
    added = {number: token for number, token in _added_tokens(config, folder).items()
             if token.content not in vocabulary.ids}
    if not added:
        return vocabulary
    size = len(vocabulary.tokens)
    if sorted(added) != list(range(size, size + len(added))):
        raise Refusal(f'the tokens {[token.content for token in added.values()][:5]} that its '
                      f'folder adds have ids that do not follow the {size:,} of vocab.txt')
    tokenizer = vocabulary.tokenizer()
    for number in sorted(added):
        add = tokenizer.add_special_tokens if added[number].special else tokenizer.add_tokens
        add([added[number]])
    return Vocabulary(tokenizer.to_str(), vocabulary.special_tokens)


def _added_tokens(config: dict[str, Any], folder: epath.Path | None) -> dict[int, AddedToken]:
    """The tokens in added_tokens.json and in tokenizer_config.json, by their ids."""
    added: dict[int, AddedToken] = {}
    if folder and (folder / 'added_tokens.json').exists():
        for token, number in read_json(folder / 'added_tokens.json').items():
            if not isinstance(number, int):
                raise Refusal(f'{folder / "added_tokens.json"} gives {token!r} the id {number!r}: '
                              'fetch it again')
            added[number] = _added_token(token, normalized=False)
    decoder = config.get('added_tokens_decoder')
    for key, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if (key.isdecimal() and isinstance(entry, dict)
                and isinstance(entry.get('content'), str)):
            flags = {name: entry[name] for name in ('single_word', 'lstrip', 'rstrip', 'normalized',
                                                    'special') if isinstance(entry.get(name), bool)}
            added[int(key)] = _added_token(entry['content'], **flags)
    return added


def _added_token(content: str, **flags: bool) -> AddedToken:
    try:
        return AddedToken(content, **flags)
    except UnicodeError as error:       # JSON can hold half of a character
        raise Refusal(f'its folder adds the token {content!r}, which is no text: fetch it '
                      f'again') from error

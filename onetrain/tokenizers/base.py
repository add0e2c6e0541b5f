"""One interface over every tokenizer: text to ids in the prepare.py scripts, ids to text when
sampling.

    --tokenizer               kind            end of text        kept in the data set
    bytes                     bytes           256                nothing
    char                      char            none               stoi and itos, as nanoGPT
    gpt2, cl100k_base, ...    tiktoken        <|endoftext|>      the name
    FOLDER                    hf              its eos_token      tokenizer.json and its settings
    FILE.model                sentencepiece   its eos piece      tokenizer.model

Each class below is a Tokenizer, which has
    vocab_size          number of ids, added tokens included
    eot_id, eot_token   id that ends a document and how it is written, or None
    encode(text)        1-D uint32 array. No special token is added, and one spelled out in the text
                        is ordinary text: a document that contains "<|endoftext|>" cannot end itself
    decode(ids)         str, from any iterable of ints. Bytes that are no UTF-8 give U+FFFD; an id
                        without a token, which a model with a padded vocabulary can sample, gives
                        U+FFFD or nothing, never an error
    lossless            whether decode(encode(text)) is the text, whatever it is
    byte_length(id)     bytes of the text that an id stands for, None for an id without a token;
                        only where each id stands for bytes of its own
    accelerate()        from now on encode() goes through a faster library where that gives the same
                        ids, whose name and version is then `encoder`, else None
    describe(folder)    dict of plain builtins for meta['tokenizer']; writes the files that
                        tokenizer_of() needs to `folder`
"""

import abc
import contextlib
import difflib
import glob
import hashlib
import importlib.metadata
import os
import re
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np

from onetrain.config import UserError
from onetrain.files import check_own, inside, is_whole, parse_json, replacing
from onetrain.tokenizers import fast_bpe
from onetrain.tokenizers.byte_level import equivalent_of


class Tokenizer(abc.ABC):
    """What all tokenizers have, see above."""

    vocab_size: int
    eot_id: int | None
    eot_token: str | None
    lossless: bool
    encoder: str | None = None

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, 1-D uint32."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids."""

    def accelerate(self, trusted: str | None = None) -> None:  # noqa: B027
        """Encode by a faster library from now on, where there is one that gives the same ids, which
        takes seconds to find out: for a corpus. trusted: `encoder` of another process, which found
        it out.
        """

    @abc.abstractmethod
    def describe(self, folder: str) -> dict:
        """Return a dict for meta['tokenizer']; writes what it needs to `folder`."""


HF_FILES = (
    'tokenizer.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'config.json',
    'chat_template.jinja',
    'generation_config.json',
)
TEMPLATES = 'additional_chat_templates'  # folder beside them of named .jinja files
EOT = '<|endoftext|>'
UNKNOWN = '\N{REPLACEMENT CHARACTER}'


def is_tokenizer_file(name: str):
    """Return whether `name` is that of a file which describe() writes to a data set's folder
    tokenizer/.
    """
    folder, _, rest = name.partition('/')
    return folder == 'tokenizer' and (
        rest in HF_FILES or bool(re.fullmatch(rf'{TEMPLATES}/[^/]+\.jinja', rest))
    )


def load_tokenizer(spec: str, texts: Iterable | None = None) -> 'Tokenizer':
    """Return the tokenizer that a user names with --tokenizer; see the table above.

    texts: iterable of str, read only by 'char', whose vocabulary is the sorted set of their
    characters. Raises UserError, in one sentence, for a name, file or library that is not there.
    """
    if spec == 'bytes':
        return BytesTokenizer()
    if spec == 'char':
        if texts is None:
            raise UserError(
                "the tokenizer 'char' is made from a text, and there is none here: name another,"
                ' such as bytes'
            )
        return CharTokenizer.of_texts(texts)
    if spec.endswith('.model'):
        return SentencePieceTokenizer.of_file(spec)
    folder = os.path.dirname(spec) or '.' if os.path.basename(spec) == 'tokenizer.json' else spec
    if os.path.isfile(os.path.join(folder, 'tokenizer.json')):
        return HuggingFaceTokenizer.of_folder(folder)
    if os.path.isdir(spec):
        if os.path.isfile(os.path.join(spec, 'tokenizer.model')):
            raise UserError(
                f'the folder {spec} has no tokenizer.json: type --tokenizer'
                f' {os.path.join(spec, "tokenizer.model")}'
            )
        raise UserError(
            f'the folder {spec} has no tokenizer.json: write one with '
            f"`transformers.AutoTokenizer.from_pretrained('{spec}').save_pretrained('{spec}')`"
        )
    if near := difflib.get_close_matches(spec, ['char', 'bytes'], 1, 0.75):
        raise UserError(f'unknown tokenizer {spec!r}, did you mean {near[0]!r}')
    return TiktokenTokenizer(spec)


def tokenizer_of(folder: str, meta: dict):
    """Return the tokenizer of the data set in `folder`, whose meta.pkl is the dict `meta` ({} where
    there is none).

    nanoGPT's data sets are read as its sample.py does: stoi and itos where meta has them, gpt2
    where there is no meta. Raises UserError when meta names no tokenizer, or one whose files or
    library are missing.
    """
    stated = meta.get('tokenizer')
    kind = stated.get('kind') if isinstance(stated, dict) else None
    if 'stoi' in meta and (kind == 'char' or stated is None):
        return CharTokenizer(meta['stoi'], meta['itos'])
    if not meta:
        return TiktokenTokenizer('gpt2')
    place = os.path.join(folder, 'meta.pkl')
    if kind == 'bytes':
        return BytesTokenizer()
    if kind == 'tiktoken':
        return TiktokenTokenizer(str(stated.get('name')))
    if kind == 'hf':
        return HuggingFaceTokenizer.of_folder(inside(folder, stated.get('path'), place), folder)
    if kind == 'sentencepiece':
        return SentencePieceTokenizer.of_file(inside(folder, stated.get('path'), place))
    raise UserError(
        f'{os.path.join(folder, "meta.pkl")} names the tokenizer {stated!r}, expected a dict whose'
        " 'kind' is bytes, char, tiktoken, hf or sentencepiece: run the prepare.py of this data"
        ' set again'
    )


def decode_after(tokenizer: 'Tokenizer', before: list[int], ids: list[int]) -> str:
    """Return the text that the token ids `ids` add to that of the ids `before`.

    It is not decode(ids): a first token may stand for a space that belongs to the text only behind
    another one, and a character may be spread over both.
    """
    start = tokenizer.decode(before)
    whole = tokenizer.decode([*before, *ids])
    return whole[len(os.path.commonprefix([start, whole])) :]


# what tokenizers read differently
TEXTS = (
    'def parse(self, text):\n    """Ünïcode, 3.14 — and  two spaces."""\n\n',
    '',
    ' ',
    '  a ',
    'a\tb\r\nc',
    '12345 1234567890',
    '①\u0301 ｶﾞ か\u3099 ﬁ Å',
    '▁',
    'a▁b',
    '日本語のテキスト',
    '😀 👩‍👩‍👧',
    '\u200b\ufeff\x01',
    'The  quick\n\n\nbrown   fox',
    "it's we'll I'M",
)


def _ids_of(tokenizer, text):
    """Return the ids of a text as a list, None where it has a character that the tokenizer does not
    know.
    """
    try:
        return tokenizer.encode(text).tolist()
    except ValueError:
        return None


def _pairs_and_alphabets():
    pairs = ''.join(chr(a) + chr(b) for a in range(32, 127) for b in range(32, 127))
    ranges = (
        (0xA1, 0x250),
        (0x391, 0x460),
        (0x5D0, 0x5EB),
        (0x621, 0x64B),
        (0x904, 0x940),
        (0xE01, 0xE31),
        (0x3041, 0x3097),
        (0x4E00, 0x4F00),
        (0xAC00, 0xAC80),
    )
    text = pairs + ''.join(chr(i) for begin, end in ranges for i in range(begin, end))
    return ' '.join(text[i : i + 20] for i in range(0, len(text), 20))


def ids_digest(tokenizer: 'Tokenizer') -> str:
    """Return a text that is another one for tokenizers which give other ids, as far as their
    vocabulary and texts of many scripts tell.

    It stands in the checkpoints of a run. An encoding of tiktoken, which may not be on this
    machine, is known by its name.
    """
    if isinstance(tokenizer, TiktokenTokenizer):
        return f'tiktoken {tokenizer.name}'
    if hasattr(tokenizer, 'stoi'):
        found = sorted(tokenizer.stoi.items())
    else:
        vocabulary = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
        found = [
            vocabulary,
            *(
                _ids_of(tokenizer, text)
                for text in (_pairs_and_alphabets(), ''.join(vocabulary).replace(UNKNOWN, ''))
            ),
        ]
    digest = hashlib.sha256(
        repr([tokenizer.vocab_size, tokenizer.eot_id, found]).encode('utf-8', 'surrogatepass')
    ).hexdigest()
    return f'1 {digest}'  # the number of this way to make it, which stands in checkpoints


def same_tokenizer(a: 'Tokenizer', b: 'Tokenizer') -> bool:
    """Return whether two tokenizers end a text with the same id and give the same ids, for TEXTS
    and for text that goes through the vocabulary of each.
    """

    def text_of(tokenizer):
        return ''.join(tokenizer.decode([i]) for i in range(tokenizer.vocab_size)).replace(
            UNKNOWN, ''
        )

    return (
        a.vocab_size == b.vocab_size
        and a.eot_id == b.eot_id
        and all(
            _ids_of(a, text) == _ids_of(b, text)
            for text in (*TEXTS, f'a{EOT}b</s>', text_of(a), text_of(b))
        )
    )


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes, and 256 for the end of a text."""

    vocab_size, eot_id, eot_token, lossless = 257, 256, EOT, True

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode('utf-8'), dtype=np.uint8).astype(np.uint32)

    def byte_length(self, i: int) -> int:
        return 1

    def decode(self, ids: Iterable[int]) -> str:
        return _join(_byte(int(i)) for i in ids)

    def describe(self, folder: str) -> dict[str, str]:
        return {'kind': 'bytes'}


class CharTokenizer(Tokenizer):
    """One id per character. stoi: {character: id}, itos: {id: character}, as in nanoGPT's
    meta.pkl.
    """

    eot_id = eot_token = None
    lossless = True  # encode() raises for what it does not know

    def __init__(self, stoi: dict[str, int], itos: dict[int, str]):
        self.stoi, self.itos, self.vocab_size = stoi, itos, len(itos)

    @classmethod
    def of_texts(cls, texts: Iterable) -> 'Tokenizer':
        """Return the tokenizer of all characters that `texts` have."""
        characters = set()
        for text in texts:
            characters.update(text)
        itos = dict(enumerate(sorted(characters)))
        return cls({character: i for i, character in itos.items()}, itos)

    def encode(self, text: str) -> np.ndarray:
        """Raises UserError for a character that the data set does not have."""
        try:
            return np.fromiter(map(self.stoi.__getitem__, text), dtype=np.uint32, count=len(text))
        except KeyError as error:
            raise UserError(
                f'the character {error.args[0]!r} is not among the {self.vocab_size} of this data'
                ' set: leave it out'
            ) from None

    def byte_length(self, i: int) -> int | None:
        return len(self.itos[i].encode('utf-8', 'replace')) if i in self.itos else None

    def decode(self, ids: Iterable[int]) -> str:
        return ''.join(self.itos.get(int(i), UNKNOWN) for i in ids)

    def describe(self, folder: str) -> dict[str, str]:
        return {'kind': 'char'}


class TiktokenTokenizer(Tokenizer):
    """An encoding of tiktoken by its name; one that is not in tiktoken's cache is downloaded by
    it.
    """

    lossless = True
    fast: fast_bpe.FastBPE | None = None

    def __init__(self, name: str):
        tiktoken = _library('tiktoken', name)
        names = tiktoken.list_encoding_names()
        if name not in names:
            near = difflib.get_close_matches(name, ['bytes', 'char', *names], n=1)
            raise UserError(
                f'unknown tokenizer {name!r}{f", did you mean {near[0]!r}" if near else ""}: type'
                ' bytes, char, a tiktoken encoding '
                f'({", ".join(names)}), a folder with a tokenizer.json or a sentencepiece .model'
                ' file, and both must exist'
            )
        try:
            self.encoding = tiktoken.get_encoding(name)
        except OSError as error:  # what requests raises too
            raise UserError(
                f'tiktoken could not download the encoding {name!r} ({type(error).__name__}):'
                ' connect this machine once, set TIKTOKEN_CACHE_DIR to a folder that has it, or'
                ' name another tokenizer, such as bytes'
            ) from None
        self.name, self.vocab_size = name, self.encoding.n_vocab
        self.eot_token = EOT if EOT in self.encoding.special_tokens_set else None
        self.eot_id = self.encoding.eot_token if self.eot_token else None

    def encode(self, text: str) -> np.ndarray:
        if self.fast is not None and (ids := self.fast.encode(text)) is not None:
            return ids
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def accelerate(self, trusted: str | None = None) -> None:
        reference = None if trusted else self.encoding.encode_ordinary_batch
        self.fast = fast_bpe.fast_bpe_of_tiktoken(self.encoding, reference)
        self.encoder = fast_bpe.version() if self.fast else None

    def byte_length(self, i: int):
        return len(self._token(i))

    def decode(self, ids: Iterable[int]) -> str:
        return _join(self._token(int(i)) for i in ids)

    def __reduce__(self):
        return _rebuilt, (TiktokenTokenizer, self.encoder, self.name)

    def _token(self, i):
        # a model's vocabulary may be padded beyond n_vocab, and some encodings have gaps
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:
            return UNKNOWN.encode()

    def describe(self, folder: str) -> dict[str, str]:
        return {'kind': 'tiktoken', 'name': self.name}


@contextlib.contextmanager
def _panics_are_errors(say):
    """Raise UserError(say(error)) for any error of the library `tokenizers`, whose panics are no
    Exception.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
            raise
        raise UserError(say(str(error)[:200])) from None


def refuse_unfit(content: bytes, path: str) -> None:
    """Raise UserError for a tokenizer.json, as bytes, that gives other ids of the same text each
    time, or on which its library ends the process.
    """
    try:
        described = parse_json(content)
    except ValueError:
        return  # the library says what is wrong with it
    model = described.get('model') if isinstance(described, dict) else None
    if not isinstance(model, dict):
        return
    if model.get('dropout'):
        raise UserError(
            f'{path} has dropout={str(model["dropout"])[:20]}, which gives other ids of the same'
            ' text each time: set it to null there'
        )
    prefix, merges = model.get('continuing_subword_prefix'), model.get('merges')
    if prefix and isinstance(merges, list):
        right = [
            (
                pair.split(' ')[-1]
                if isinstance(pair, str)
                else pair[-1]
                if isinstance(pair, list) and pair
                else None
            )
            for pair in merges
        ]
        if not all(isinstance(piece, str) and piece.startswith(str(prefix)) for piece in right):
            raise UserError(
                f'{path} has merges without its continuing_subword_prefix {str(prefix)[:20]!r}:'
                ' fetch it again'
            )


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face, read by the `tokenizers` library.

    files: {name: bytes} of those of HF_FILES that exist, and of templates of conversations; source:
    where they are from, for messages. The files are kept, so that describe() can write them even
    when their folder is gone, or is the one written to.
    """

    lossless = False

    def __init__(self, files: dict[str, bytes], source: str):
        tokenizers = _library('tokenizers', source)
        self.files, self.source = files, source
        refuse_unfit(files['tokenizer.json'], os.path.join(source, 'tokenizer.json'))
        with _panics_are_errors(
            lambda error: (
                f'{os.path.join(source, "tokenizer.json")} cannot be read as a tokenizer ({error}):'
                ' fetch it again'
            )
        ):
            self.tokenizer = tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode('utf-8'))
        # that is: encode their text, do not look for them in it
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        ids = self.tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(max(ids) + 1, self.tokenizer.get_vocab_size(with_added_tokens=True))
        self.eot_id = self._eos()
        self.eot_token = None if self.eot_id is None else self.tokenizer.id_to_token(self.eot_id)
        self.fast: Any = None  # FastBPE or TiktokenEquivalent

    @classmethod
    def of_folder(cls, folder: str, root: str | None = None) -> 'Tokenizer':
        """Return the one in `folder`; root: the folder of somebody else's data set of which it is a
        part.
        """
        if not os.path.isfile(os.path.join(folder, 'tokenizer.json')):
            raise UserError(
                f'the folder {folder} has no tokenizer.json: name one that has, or run the'
                ' prepare.py of this data set again'
            )
        templates = glob.glob(os.path.join(TEMPLATES, '*.jinja'), root_dir=folder)
        names = [
            name for name in (*HF_FILES, *templates) if os.path.lexists(os.path.join(folder, name))
        ]
        for name in names:
            # export.py publishes what a link leads to
            check_own(os.path.join(folder, name), root or folder)
        return cls({name: _read(os.path.join(folder, name)) for name in names}, folder)

    def __reduce__(self):
        # a pickled tokenizers.Tokenizer forgets encode_special_tokens
        return _rebuilt, (HuggingFaceTokenizer, self.encoder, self.files, self.source)

    def _eos(self):
        for name in ('tokenizer_config.json', 'special_tokens_map.json'):
            token = self._settings(name).get('eos_token')
            token = token.get('content') if isinstance(token, dict) else token
            if token is not None:
                eos = self.tokenizer.token_to_id(token) if isinstance(token, str) else None
                break
        else:
            token = eos = self._settings('config.json').get('eos_token_id')
            token = eos = eos[0] if isinstance(eos, list) and eos else eos
            if eos is not None and not is_whole(eos):
                eos = None
        if token is not None and (eos is None or eos >= self.vocab_size):
            raise UserError(
                f'the eos token {token!r} that {self.source} names is not in its tokenizer.json: '
                'correct eos_token in its tokenizer_config.json'
            )
        return eos

    def _settings(self, name):
        """Return the dict in one of the JSON files, {} where there is no such file."""
        try:
            settings = parse_json(self.files.get(name, b'{}'))
        except ValueError as error:
            raise UserError(
                f'{os.path.join(self.source, name)} cannot be read ({error}): fetch it again'
            ) from None
        if not isinstance(settings, dict):
            raise UserError(f'{os.path.join(self.source, name)} holds no object: fetch it again')
        return settings

    def encode(self, text: str) -> np.ndarray:
        if self.fast is not None and (ids := self.fast.encode(text)) is not None:
            return ids
        return np.array(self._library_ids([text])[0], dtype=np.uint32)

    def _library_ids(self, texts):
        with _panics_are_errors(
            lambda error: (
                f'the tokenizer of {self.source} cannot encode {texts[0][:40]!r} ({error}): '
                'leave out characters that its training text did not have'
            )
        ):
            # encode_batch_fast gives the ids of encode without the offsets, in two thirds of the
            # time
            found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def accelerate(self, trusted: str | None = None) -> None:
        content = self.files['tokenizer.json'].decode('utf-8')
        self.fast = self.encoder = None
        if trusted is None or trusted == fast_bpe.version():
            reference = None if trusted else self._library_ids
            self.fast = fast_bpe.fast_bpe_of_json(content, reference)
            self.encoder = fast_bpe.version() if self.fast else None
        if self.fast is None and (equivalent := equivalent_of(content)):
            self.fast, self.encoder = (
                equivalent,
                f'tiktoken {importlib.metadata.version("tiktoken")}',
            )

    def decode(self, ids: Iterable[int]) -> str:
        with _panics_are_errors(
            lambda error: (
                f'the tokenizer of {self.source} cannot decode its ids ({error}): fetch it again'
            )
        ):
            return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def describe(self, folder: str) -> dict[str, str]:
        path = os.path.join(folder, 'tokenizer')
        if os.path.islink(path):
            raise UserError(
                f'{path} is a link, and the files of a tokenizer are to be written there: remove it'
            )
        for name in HF_FILES:  # of the tokenizer that was here before
            if os.path.lexists(os.path.join(path, name)):
                os.remove(os.path.join(path, name))
        shutil.rmtree(os.path.join(path, TEMPLATES), ignore_errors=True)
        write_files(self.files, path)
        return {'kind': 'hf', 'path': 'tokenizer'}


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. model: the bytes of the .model file; source: where they are from, for
    messages.
    """

    lossless = False

    def __init__(self, model: bytes, source: str):
        sentencepiece = _library('sentencepiece', source)
        self.model, self.source = model, source
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self.processor.get_piece_size() if model else 0
        except RuntimeError:
            self.vocab_size = 0
        if not self.vocab_size:
            raise UserError(
                f'{source} is no sentencepiece model: fetch it again, or name another tokenizer'
            )
        self.eot_id = self.processor.eos_id() if self.processor.eos_id() >= 0 else None
        self.eot_token = None if self.eot_id is None else self.processor.id_to_piece(self.eot_id)

    def __reduce__(self):
        return SentencePieceTokenizer, (self.model, self.source)

    @classmethod
    def of_file(cls, path: str) -> 'Tokenizer':
        """Return the tokenizer of a .model file. Raises UserError."""
        if not os.path.isfile(path):
            raise UserError(
                f'there is no sentencepiece model {path}: type the path of an existing .model file'
            )
        return cls(_read(path), path)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.processor.encode(text, add_bos=False, add_eos=False), dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode([int(i) for i in ids if i < self.vocab_size])

    def describe(self, folder: str) -> dict[str, str]:
        _write(os.path.join(folder, 'tokenizer.model'), self.model)
        return {'kind': 'sentencepiece', 'path': 'tokenizer.model'}


def _rebuilt(kind, encoder, *arguments):
    """Return the Tokenizer that another process pickled."""
    tokenizer = kind(*arguments)
    if encoder:
        tokenizer.accelerate(encoder)
    return tokenizer


def _library(name, spec):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f'the tokenizer {spec!r} needs the library {name}, which is not installed: type `pip'
            f' install {name}`, or name another tokenizer, such as bytes'
        ) from None


def _byte(i):
    return bytes([i]) if 0 <= i < 256 else (EOT if i == 256 else UNKNOWN).encode()


def _join(pieces):
    return b''.join(pieces).decode('utf-8', errors='replace')


def _read(path):
    with open(path, 'rb') as f:
        return f.read()


def write_files(files: dict[str, bytes], folder: str) -> None:
    """Write `files`, {name: bytes}, to `folder`; a name may begin with that of a folder in it."""
    for name, content in files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _write(path, content)


def _write(path, content):
    with replacing(path) as f:
        f.write(content)

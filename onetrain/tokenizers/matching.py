"""Whether data and weights belong together: token ids of another tokenizer train without an error,
and to nothing.

Tokenizers are compared by the ids that they give (base.same_tokenizer). Where one of them
cannot be loaded, since a data set of nanoGPT names none or its library is not installed, that is
said, and the run goes on.
"""

import hashlib
import json
import os
import pathlib

from onetrain.config import UserError
from onetrain.data.token_file import read_meta
from onetrain.files import inside
from onetrain.tokenizers.base import ids_digest, load_tokenizer, same_tokenizer, tokenizer_of


def tokenizer_identity(folder: str, meta: dict) -> str | None:
    """Return hex that is the same for data sets with the same description and files of a tokenizer;
    None where meta states none.

    folder, meta: of a data set. Different ones may give the same ids all the same.
    """
    if not meta.get('tokenizer') and 'stoi' not in meta:
        return None
    digest = hashlib.sha256(
        json.dumps(
            [meta.get('tokenizer'), sorted(meta.get('stoi', {}).items())], default=str
        ).encode()
    )
    stated = meta.get('tokenizer')
    path = (
        pathlib.Path(inside(folder, stated['path'], 'meta.pkl'))
        if isinstance(stated, dict) and 'path' in stated
        else None
    )
    for file in sorted(path.iterdir()) if path and path.is_dir() else [path] if path else []:
        if not file.is_file():
            continue  # templates of conversations say nothing of ids
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def load_of_dataset(folder: str) -> tuple:
    """Return (tokenizer, None) of a data set, or (None, why it is not known)."""
    try:
        meta = read_meta(folder)
        if not meta.get('tokenizer') and 'stoi' not in meta:
            return None, f'{folder} does not name its tokenizer'
        return tokenizer_of(folder, meta), None
    except (ValueError, OSError) as error:
        return None, str(error)


def load_of_weights(folder: str) -> tuple:
    """Return (tokenizer, None) of a Hugging Face folder, or (None, why it is not known)."""
    names = [
        name
        for name in ('tokenizer.json', 'tokenizer.model')
        if os.path.isfile(os.path.join(folder, name))
    ]
    if not names:
        return None, f'{folder} has no tokenizer.json'
    try:
        return (
            load_tokenizer(
                folder if names[0] == 'tokenizer.json' else os.path.join(folder, names[0])
            ),
            None,
        )
    except (ValueError, OSError) as error:
        return None, str(error)


def same_ids(folder: str, other_folder: str) -> bool | None:
    """Return whether two data sets have the ids of one tokenizer, however it is described; None
    where that is not known.
    """
    identities = [tokenizer_identity(where, read_meta(where)) for where in (folder, other_folder)]
    if identities[0] is not None and identities[0] == identities[1]:
        return True
    (one, _), (other, _) = load_of_dataset(folder), load_of_dataset(other_folder)
    return None if one is None or other is None else same_tokenizer(one, other)


def check_weights(hf_folder: str, data_folder: str, dataset: str) -> str:
    """Return a sentence on whether the tokenizer of a Hugging Face folder is that of the data.
    Raises UserError if it is not.
    """
    theirs, reason = load_of_weights(hf_folder)
    ours, other_reason = load_of_dataset(data_folder)
    if theirs is None or ours is None:
        return (
            f'WARNING: whether their tokenizer is that of {dataset} is not known:'
            f' {reason or other_reason}'
        )
    if not same_tokenizer(ours, theirs):
        script = (
            f'data/{dataset}/prepare.py'
            if os.path.isfile(os.path.join(data_folder, 'prepare.py'))
            else 'data/own_text/prepare.py'
        )
        raise UserError(
            f'the data set {dataset} was made with another tokenizer than that of {hf_folder}, so'
            f' its ids mean nothing to these weights: type `python {script} --tokenizer'
            f' {hf_folder}`, with the --input and --output of the data set, or give another'
            ' --dataset'
        )
    return f'their tokenizer gives the ids of {dataset}'


def digest_of_dataset(folder: str) -> str | None:
    """Return ids_digest() of the tokenizer of a data set, None where it is not known."""
    stated = read_meta(folder).get('tokenizer')
    if isinstance(stated, dict) and stated.get('kind') == 'tiktoken':
        return f'tiktoken {stated.get("name")}'  # loading it may mean to fetch it
    tokenizer, _ = load_of_dataset(folder)
    return None if tokenizer is None else ids_digest(tokenizer)


def same_digest(gave: str | None, gives: str | None) -> bool | None:
    """Return whether two texts of ids_digest() are of the same ids; None where one is missing, or
    they were made in different ways.
    """
    return gave == gives if gave and gives and gave.split()[0] == gives.split()[0] else None


def check_resumed(resumed: dict, folder: str, meta: dict, dataset: str, notes: list[str]) -> None:
    """Raise UserError if the data that a run resumes with were made with another tokenizer than
    those it was trained with.

    resumed: the state of its checkpoint; folder, meta: of the data set now.
    """
    same = same_digest(resumed.get('token_ids'), digest_of_dataset(folder))
    if same is False:
        raise UserError(
            f'the tokenizer of {dataset} gives other ids than the one that this run was trained'
            ' with: prepare the data with the same --tokenizer, or give the --dataset it had'
        )
    if same:
        return
    was, now = resumed.get('tokenizer'), tokenizer_identity(folder, meta)
    if was is None or was == now:
        return
    before = resumed['config'].get('dataset')
    old_folder = os.path.join(os.path.dirname(folder), before) if before else None
    old, reason = (
        load_of_dataset(old_folder)
        if old_folder and os.path.isdir(old_folder)
        else (None, f'the data set {before} is not here')
    )
    if old is not None and tokenizer_identity(old_folder, read_meta(old_folder)) != was:
        old, reason = None, f'the data set {before} here has another tokenizer than the run had'
    new, other_reason = load_of_dataset(folder)
    if old is None or new is None:
        notes.append(
            f'WARNING: whether the tokenizer of {dataset} is the one that this run was trained with'
            f' is not known: {reason or other_reason}'
        )
    elif not same_tokenizer(old, new):
        raise UserError(
            f'the data set {dataset} was made with another tokenizer than {before}, with which this'
            ' run was trained: prepare it with the same --tokenizer, or give another --dataset'
        )

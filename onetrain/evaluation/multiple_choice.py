"""Multiple-choice tasks, scored by the log-likelihood of each answer after its question, as lm-eval
does.

    task             a line of the file (the hub's own fields)      question and answers
    hellaswag        activity_label, ctx_a, ctx_b, endings, label   "LABEL: A B" + " " + ending
    arc_easy, arc_challenge
                     question, choices {text, label}, answerKey     "Question: Q\\nAnswer: " + text
    openbookqa       question_stem, choices {text, label}, answerKey   "STEM" + " " + text
    piqa             goal, sol1, sol2, label                        "Question: G\\nAnswer: " + sol

`acc` counts the questions whose right answer has the highest log-likelihood, `acc_norm` the same
divided by its number of characters.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from onetrain.config import UserError, nearest
from onetrain.files import is_whole, parse_json
from onetrain.ops import kernels

if TYPE_CHECKING:
    from model import Model
    from onetrain.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Item:
    question: str
    choices: list
    answer: int  # index of the right one


def _hellaswag(line):
    def clean(text):  # traces of WikiHow's headings
        return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')

    question = clean(
        f'{_text(line, "activity_label")}: {_text(line, "ctx_a")}'
        f' {_text(line, "ctx_b").capitalize()}'
    )
    return _item(
        question,
        [clean(ending) for ending in _texts(line['endings'], 'endings')],
        _number(line['label']),
    )


def _arc(line):
    return _item(
        f'Question: {_text(line, "question")}\nAnswer:', *_labeled(line, line['answerKey'])
    )


def _openbookqa(line):
    return _item(_text(line, 'question_stem'), *_labeled(line, line['answerKey'].lstrip()))


def _piqa(line):
    return _item(
        f'Question: {_text(line, "goal")}\nAnswer:',
        [_text(line, 'sol1'), _text(line, 'sol2')],
        _number(line['label']),
    )


def _text(line, key):
    if not isinstance(line[key], str):
        raise UserError(f'{key} is a {type(line[key]).__name__}, expected a text')
    return line[key]


def _number(label):
    """Return the index that a label states: a whole number, or one written as text, as the hub
    has it.
    """
    if is_whole(label):
        return label
    if isinstance(label, str) and label.isascii() and label.isdecimal():
        return int(label[:9])
    raise UserError(f'label is {str(label)[:40]!r}, expected the number of a choice')


def _texts(value, key):
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f'{key} is not a list of texts')
    return value


def _labeled(line, right):
    """Return (texts, index of the one labeled `right`) of the field choices."""
    texts, labels = (_texts(line['choices'][key], f'choices.{key}') for key in ('text', 'label'))
    if len(texts) != len(labels):
        raise UserError(f'choices has {len(texts)} texts and {len(labels)} labels')
    if labels.count(right) != 1:
        raise UserError(f'answerKey {right!r} is not one of the labels {labels}')
    return texts, labels.index(right)


def _item(question, choices, answer):
    """Return an Item that can be answered. Raises UserError."""
    if not 0 <= answer < len(choices) or len(choices) < 2:
        raise UserError(f'the label {answer} is not one of {len(choices)} choices')
    if not all(choice.strip() for choice in choices):
        raise UserError('a choice is empty')
    return Item(question, choices, answer)


TASKS = {  # how to read a line; where it is on the hub: repository, configuration, split
    'hellaswag': (_hellaswag, ('Rowan/hellaswag', None, 'validation')),
    'arc_easy': (_arc, ('allenai/ai2_arc', 'ARC-Easy', 'test')),
    'arc_challenge': (_arc, ('allenai/ai2_arc', 'ARC-Challenge', 'test')),
    'openbookqa': (_openbookqa, ('allenai/openbookqa', 'main', 'test')),
    'piqa': (_piqa, ('baber/piqa', None, 'validation')),
}


def names_and_files(words: str) -> list[tuple]:
    """Return [(name, file or '')] of a comma-separated list of NAME or NAME:FILE.jsonl."""
    return [
        word.partition(':')[::2] for word in (word.strip() for word in words.split(',')) if word
    ]


def load_tasks(words: str, limit: int | None = None) -> dict[str, list]:
    """Return {name: [Item]} for a comma-separated list of NAME or NAME:FILE.jsonl; without a file
    it comes from the hub, through the package datasets.

    limit: first items of each, None for all. Raises UserError for a name, file or line that
    cannot be read.
    """
    tasks = {}
    for name, path in names_and_files(words):
        if name not in TASKS:
            raise UserError(
                f'unknown task {name!r}{nearest(name, [*TASKS])}: known are {", ".join(TASKS)};'
                ' others through `lm_eval` on the folder that export.py writes'
            )
        if name in tasks:
            raise UserError(f'the task {name} is named twice: ask one file at a time')
        lines = _lines_of_file(path) if path else _lines_of_hub(name)
        items = []
        for number, line in itertools.islice(lines, limit):
            try:
                items.append(TASKS[name][0](line))
            except (
                KeyError,
                ValueError,
                TypeError,
                AttributeError,
                IndexError,
                OverflowError,
            ) as error:
                raise UserError(
                    f'{path or name}, line {number}: not an item of {name} ({type(error).__name__}:'
                    f' {error}); onetrain/evaluation/multiple_choice.py lists the fields'
                ) from None
        if not items:
            raise UserError(f'{path or name} has no items')
        tasks[name] = items
    return tasks


def _lines_of_file(path):
    """Yield (number, object) of each line that is not blank, as they are asked for."""
    try:
        with open(path, 'rb') as f:
            for number, line in enumerate(f, 1):
                if not line.isspace():
                    try:
                        yield number, parse_json(line)
                    except ValueError as error:
                        raise UserError(f'{path}, line {number}: {error}') from None
    except OSError as error:
        raise UserError(
            f'{path} cannot be read ({error.strerror}): tasks are written NAME or NAME:FILE.jsonl'
        ) from None


def _lines_of_hub(name):
    repository, configuration, split = TASKS[name][1]
    try:
        import datasets
    except ImportError:
        raise UserError(
            f'the task {name} comes from the hub, which needs the package datasets: pip install'
            f' datasets, or give a file: {name}:FILE.jsonl'
        ) from None
    try:
        return enumerate(datasets.load_dataset(repository, configuration, split=split), 1)
    except Exception as error:  # the hub's own errors, and any of the network's
        raise UserError(
            f'the task {name} could not be fetched from the hub ({repository},'
            f' {type(error).__name__}): give a file, {name}:FILE.jsonl'
        ) from None


def encode_items(
    tasks: dict[str, list], tokenizer: 'Tokenizer | None', context: int
) -> dict[str, tuple]:
    """Return {name: (items, make_requests())} of load_tasks()'s. Raises UserError for text that
    the tokenizer does not know.
    """

    def tokenize(text):
        try:
            return tokenizer.encode(text).tolist()
        except ValueError as error:
            raise UserError(
                f'the tasks {", ".join(tasks)} cannot be asked with this tokenizer: {error}'
            ) from None

    return {
        name: (items, make_requests(items, tokenize, tokenizer.eot_id, context))
        for name, items in tasks.items()
    }


def fingerprint(encoded: dict[str, tuple]) -> str:
    """Return a short text that is the same for the same encoded tasks."""
    return hashlib.sha256(
        repr({name: made for name, (_, made) in encoded.items()}).encode()
    ).hexdigest()[:16]


def make_requests(
    items: 'list[Item]', tokenize: Any, start: int | None, context: int
) -> list[tuple]:
    """Return [(ids, n)] for each choice of each item, in order: the text's last context + 1 tokens,
    of which the last n are the answer's.

    The answer's are those from the first on that the question alone does not have, and at least
    one: its text may begin in the middle of a token. tokenize: str -> list of ids; start: id to
    begin with where a question has no tokens, or None.
    """
    made = []
    for item in items:
        question = item.question.rstrip()
        before = tokenize(question)
        for choice in item.choices:
            whole = tokenize(question + item.question[len(question) :] + ' ' + choice)
            shared = len(os.path.commonprefix([before, whole]))
            ids, n = whole, max(1, len(whole) - shared)
            if n >= len(ids):  # nothing comes before it
                if start is None:
                    raise UserError(
                        'a question without text needs a tokenizer with an end-of-text token'
                    )
                ids, n = [start, *ids], len(ids)
            if not n:
                raise UserError(f'the answer {choice!r} has no tokens')
            made.append((ids[-(context + 1) :], min(n, context)))
    return made


@torch.no_grad()
def log_likelihoods(
    logits_of: 'Callable | Model',
    made: list[tuple],
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    size: int = 1,
    interrupted: Callable = lambda: False,
) -> dict[int, float] | None:
    """Return {index in `made`: sum of the log-probabilities of the answer's tokens} of this rank's
    share, the batches rank, rank + size, ...; None if interrupted() became true, on every rank
    alike.

    logits_of: (B, T) int64 ids -> (B, T, V). Every rank calls it equally often, since ranks may
    compute together.
    """
    order = sorted(range(len(made)), key=lambda i: -len(made[i][0]))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    found = {}
    for turn in range(0, len(batches), size):
        if interrupted():
            return None
        mine = turn + rank
        batch = batches[min(mine, len(batches) - 1)]
        widest = max(len(made[i][0]) for i in batch) - 1
        idx = torch.zeros(len(batch), widest, dtype=torch.int64)
        for row, i in enumerate(batch):
            ids = made[i][0][:-1]
            idx[row, : len(ids)] = torch.tensor(ids)
        with kernels.eager_mode():
            logits = logits_of(idx.to(device))
        if mine >= len(batches):
            continue  # only to keep the others company
        for row, i in enumerate(batch):
            ids, n = made[i]
            scores = F.log_softmax(logits[row, len(ids) - 1 - n : len(ids) - 1].float(), dim=-1)
            found[i] = scores.gather(1, torch.tensor(ids[-n:], device=device)[:, None]).sum().item()
    return found


def score_items(items: 'list[Item]', values: list[float]) -> dict[str, float]:
    """Return {'acc', 'acc_norm', 'chance' (that of guessing), 'items'} from the log-likelihoods of
    make_requests(), in their order.
    """
    right, right_norm, at = 0, 0, 0
    for item in items:
        mine = values[at : at + len(item.choices)]
        at += len(item.choices)
        best = max(range(len(mine)), key=lambda i: mine[i])
        best_norm = max(range(len(mine)), key=lambda i: mine[i] / max(1, len(item.choices[i])))
        right, right_norm = right + (best == item.answer), right_norm + (best_norm == item.answer)
    return {
        'acc': right / len(items),
        'acc_norm': right_norm / len(items),
        'chance': sum(1 / len(item.choices) for item in items) / len(items),
        'items': len(items),
    }


def evaluate(
    encoded: dict[str, tuple],
    logits_of: 'Model',
    batch_size: int,
    device: torch.device,
    total: Callable = lambda values: values,
    rank: int = 0,
    size: int = 1,
    interrupted: Callable = lambda: False,
) -> dict[str, dict] | None:
    """Return {name: score_items()} of what encode_items() gave; total: sums a tensor over the
    ranks. None if interrupted() became true.
    """
    results = {}
    for name, (items, made) in encoded.items():
        mine = log_likelihoods(logits_of, made, batch_size, device, rank, size, interrupted)
        if mine is None:
            return None
        values = torch.zeros(len(made), dtype=torch.float64)
        values[list(mine)] = torch.tensor(list(mine.values()), dtype=torch.float64)
        results[name] = score_items(items, total(values.to(device)).tolist())
    return results

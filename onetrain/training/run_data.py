"""The data of a run, opened and held against the checkpoint that it starts from."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onetrain.checkpoint import resume
from onetrain.config import UserError
from onetrain.data.dataset import (
    Mixture,
    Tokens,
    check_vocab_and_length,
    folder_of,
    open_dataset,
    parse_mixture,
)
from onetrain.distributed import collectives
from onetrain.evaluation import multiple_choice
from onetrain.generation import prompts_of
from onetrain.model_config import ROUTING, ModelConfig, resolve_shape
from onetrain.tokenizers import matching
from onetrain.tokenizers.base import tokenizer_of
from onetrain.training import validate

if TYPE_CHECKING:
    from onetrain.distributed.processes import World
    from onetrain.tokenizers.base import Tokenizer
    from onetrain.training.session import Session
    from onetrain.training.start_point import StartPoint
    from train import Config


@dataclass
class RunData:
    """train, val: the splits; meta: meta.pkl; folder: where the tokenizer lies; shape: the model's,
    which may take its vocabulary from the data; document_end: id after which attention starts anew,
    or None; splits: {'train': {'fingerprint', 'tokens'}, 'val': ...}; tokenizer_id, token_ids: of
    the tokenizer, as checkpoints record it; train_data_changed, val_data_changed: whether the split
    is another than that of the checkpoint; sources: names, more than one of a mixture.
    """

    train: Tokens | Mixture
    val: Tokens | Mixture
    meta: dict
    folder: str
    shape: ModelConfig
    document_end: int | None
    splits: dict
    tokenizer_id: str | None
    token_ids: str | None
    train_data_changed: bool
    val_data_changed: bool
    sources: list

    def tokenizer(self) -> 'Tokenizer':
        """Return the tokenizer of the data. Raises ValueError where there is none."""
        return tokenizer_of(self.folder, self.meta)


def open_data(
    start: 'StartPoint', given: dict[str, str], root: str, session: 'Session'
) -> 'RunData':
    """Return the RunData of start.config, from `root`/data or from data_url. Raises UserError for
    data that the model or the checkpoint does not fit.

    start: StartPoint; given: {key: where it was given}.
    """
    c, saved = start.config, start.checkpoint_state
    world, notes = session.world, session.notes
    resolve_shape(dataclasses.asdict(c), 1)  # told before a data set that is missing
    with session.terminal.doing('opening the data'):
        train, val, meta = collectives.once_per_machine(
            lambda: open_dataset(c.dataset, root, c.data_url), world
        )
    shape = resolve_shape(dataclasses.asdict(c), meta.get('vocab_size'))
    document_end = validate.require_eot_id(c, meta) if c.document_mask else None
    if world.ring:
        validate.validate_context_parallel(c, shape)
    validate.warn_ignored_keys(c, given, shape, ROUTING, notes)
    splits = {
        file.split: {'fingerprint': file.fingerprint, 'tokens': len(file)} for file in (train, val)
    }
    folder = folder_of(c.dataset, root)
    same = {f'{split}.bin': what for split, what in splits.items()} | {'folder': folder}
    collectives.assert_same_on_all_ranks(same, 'the data', world)
    tokenizer_id = collectives.broadcast_from_main(
        lambda: matching.tokenizer_identity(folder, meta), world
    )
    token_ids = collectives.broadcast_from_main(lambda: matching.digest_of_dataset(folder), world)
    train_data_changed = val_data_changed = False
    if saved:
        collectives.broadcast_from_main(
            lambda: matching.check_resumed(saved, folder, meta, c.dataset, notes), world
        )
        train_data_changed, val_data_changed = resume.check_data(
            saved, splits, c.allow_data_change, notes
        )
    for file in sorted((train, val), key=len):
        check_vocab_and_length(file, shape.vocab_size, shape.block_size)
    return RunData(
        train=train,
        val=val,
        meta=meta,
        folder=folder,
        shape=shape,
        document_end=document_end,
        splits=splits,
        tokenizer_id=tokenizer_id,
        token_ids=token_ids,
        train_data_changed=train_data_changed,
        val_data_changed=val_data_changed,
        sources=[name for name, _ in parse_mixture(c.dataset)],
    )


@dataclass
class PromptsAndTasks:
    """What a run asks its model. ids: the prompts of its samples, lists of token ids; tasks: of
    multiple_choice; tokenizer: None where there are neither.
    """

    tokenizer: 'Tokenizer | None'
    ids: list
    tasks: dict


def load_prompts_and_tasks(c: 'Config', data: 'RunData', world: 'World') -> 'PromptsAndTasks':
    """Return the PromptsAndTasks that sample_interval and eval_tasks ask for. Raises
    UserError.
    """
    tokenizer = None
    if c.sample_interval or c.eval_tasks:
        try:
            tokenizer = data.tokenizer()
        except ValueError as error:
            raise UserError(
                f'sample_interval and eval_tasks need the tokenizer of {c.dataset}: {error}'
            ) from None
    prompts = prompts_of(c.sample_start, tokenizer, c.block_size) if c.sample_interval else []
    loaded = multiple_choice.load_tasks(c.eval_tasks or '', c.eval_tasks_limit)
    encoded = multiple_choice.encode_items(loaded, tokenizer, c.block_size)
    same = {'prompts': prompts, 'eval_tasks': multiple_choice.fingerprint(encoded)}
    collectives.assert_same_on_all_ranks(same, 'what is written or asked at evaluations', world)
    return PromptsAndTasks(tokenizer, prompts, encoded)

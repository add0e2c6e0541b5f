"""Where a run starts: new weights, a checkpoint of its own, one of nanoGPT, or a Hugging Face
folder; and what of it changes with every step.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from onetrain import huggingface
from onetrain.checkpoint import resume, store
from onetrain.config import UserError
from onetrain.distributed import collectives, layouts
from onetrain.tokenizers import matching
from onetrain.training import optim, validate

if TYPE_CHECKING:
    from model import Model
    from onetrain.checkpoint.resume import OutDirLock
    from onetrain.distributed.processes import World
    from onetrain.training.batch_plan import BatchPlan
    from onetrain.training.optim import Optimization
    from onetrain.training.session import Session
    from train import Config


@dataclass
class TrainState:
    """What an optimizer step changes beside tensors.

    step: optimizer steps taken; position: sequences of the training stream that they used; tokens:
    seen in training; best_val_loss: in nats per token.
    """

    step: int
    position: int
    tokens: int
    best_val_loss: float = math.inf


@dataclass
class StartPoint:
    """config: train.Config, merged with that of a checkpoint; checkpoint_state: its state.json, or
    the same made of nanoGPT's ckpt.pt, whose contents are `nanogpt`; hf_folder: of Hugging Face
    weights. Each is None where the run does not start from it.
    """

    config: 'Config'
    checkpoint_state: dict | None = None
    nanogpt: dict | None = None
    hf_folder: str | None = None

    @classmethod
    def find(
        cls,
        c: 'Config',
        given: dict[str, str],
        shape_keys: list[str],
        folder: 'OutDirLock',
        session: 'Session',
    ) -> 'StartPoint':
        """Find what `c` asks for: settings now, weights once there is a model.

        given: {key: where it was given}; shape_keys: keys that come from the checkpoint; folder:
        resume.OutDirLock. Raises UserError.
        """
        world, notes = session.world, session.notes
        fetching = c.resume_from and not resume.is_step(c.resume_from)
        if fetching or not c.eval_only:  # evaluating alone only reads
            folder.acquire(make=fetching or c.auto_resume)
        c, verified = resume.apply_auto_resume(c, world)
        start = cls(c)
        if c.init_from == 'resume':
            start = cls(*resume.find_checkpoint(c, given, shape_keys, world, notes, verified))
            try:
                validate.validate(start.config)
            except UserError as error:
                raise UserError(
                    f'the checkpoint in {c.out_dir} has settings that no run can have: {error}'
                ) from None
        elif c.init_from != 'scratch':
            c, hf_folder = huggingface.resolve_source(c, given, shape_keys)
            start = cls(c, hf_folder=hf_folder)
        c = start.config
        chosen = 'activation_checkpointing' in given
        if c.use_fsdp and c.fsdp_activation_checkpointing and not chosen:
            start.config = c = dataclasses.replace(c, activation_checkpointing='full')
        layouts.choose_layout(world, c, notes)
        # a URL that cannot work is known before any checkpoint is renamed
        if c.upload_to and not c.eval_only:
            collectives.broadcast_from_main(
                lambda: resume.check_upload(c, start.checkpoint_state, notes), world
            )
        return start

    @property
    def step(self) -> int:
        """Iteration to begin after, 0 for a new run."""
        return self.checkpoint_state['step'] if self.checkpoint_state else 0

    @property
    def from_own_checkpoint(self) -> bool:
        """Whether this continues a checkpoint of this project."""
        return self.checkpoint_state is not None and self.nanogpt is None

    def describe_weights(self, data_folder: str, world: 'World') -> str:
        """Return the sentence of the report about where the weights come from. Raises UserError
        for those of another tokenizer than the data set's.
        """
        c = self.config
        if self.checkpoint_state:
            whose = 'nanoGPT' if self.nanogpt else 'this run'
            return f'checkpoint of {whose}, continuing at iter {self.step}'
        if not self.hf_folder:
            return f'initialized with seed {c.seed}'
        match = collectives.broadcast_from_main(
            lambda: matching.check_weights(self.hf_folder, data_folder, c.dataset), world
        )
        return f'{c.init_from}, {huggingface.count_tensors(self.hf_folder):,} tensors; {match}'

    def initial_state(
        self, plan: 'BatchPlan', train_data_changed: bool, notes: list[str]
    ) -> 'TrainState':
        """Return the TrainState to begin with. plan: BatchPlan; train_data_changed: whether the
        training data are others than those of the checkpoint.
        """
        saved = self.checkpoint_state
        if not saved:
            return TrainState(0, 0, 0)
        if self.nanogpt:
            position = self.step * plan.sequences_per_step
        else:
            position = 0 if train_data_changed else saved['position']
        if not self.nanogpt and saved['tokens_per_step'] != plan.tokens_per_step:
            notes.append(
                f'{plan.tokens_per_step} tokens per iteration from now on (it was'
                f' {saved["tokens_per_step"]}); --total_batch_size fixes them for any number of'
                ' processes'
            )
        threads = torch.get_num_threads()
        if saved.get('threads', threads) != threads:
            notes.append(
                f'{threads} CPU threads (it was {saved["threads"]}): sums are rounded differently,'
                ' so losses differ in the last bits'
            )
        tokens = saved.get('tokens', position * plan.config.block_size)
        return TrainState(self.step, position, tokens)

    def initialize(self, model: 'Model', device: torch.device) -> None:
        """Give the parameters of `model` their values, but for those that load_checkpoint()
        reads.
        """
        c = self.config
        if self.nanogpt:
            model.fill(self.nanogpt['model'].items())
        elif self.hf_folder and c.upcycle:
            model.init_weights(c.seed, device)  # the routers
            model.fill(huggingface.upcycled(self.hf_folder, model.config), partial=True)
        elif self.hf_folder:
            model.fill(huggingface.read_weights(self.hf_folder, model.config))
        elif not self.checkpoint_state:
            model.init_weights(c.seed, device)

    def load_checkpoint(
        self, model: 'Model', optimization: 'Optimization', session: 'Session'
    ) -> None:
        """Read the checkpoint, if this starts from one: weights and the state of the scaler, and
        unless the run only evaluates that of optimizer and guard.
        """
        o = optimization
        if self.nanogpt:
            if self.nanogpt['optimizer']:
                for name, tensor in optim.named_state(o.optimizer, o.updated).items():
                    layouts.copy_into_shard(tensor, self.nanogpt['optimizer'][name])
        elif self.checkpoint_state:
            tensors = o.tensors(model, weights_only=self.config.eval_only)
            with session.terminal.doing('loading the checkpoint'):
                store.load(self.checkpoint_state['path'], tensors, session.world)
            o.scaler.load_state_dict(self.checkpoint_state['scaler'])

    def cached_losses(self, windows: str, val_data_changed: bool) -> dict | None:
        """Return the losses noted beside the checkpoint if they are of the evaluation windows
        `windows` (a digest), else None.
        """
        if val_data_changed or not self.from_own_checkpoint:
            return None
        found = store.read_evaluation(self.checkpoint_state['path'])
        return found if found and found.get('data') == windows else None

    def best_loss(
        self, windows: str, val_data_changed: bool, cached_losses: dict | None, notes: list[str]
    ) -> float:
        """Return the best validation loss so far, infinity where there is none that compares.

        windows: as above; cached_losses: of the weights to start from, or None.
        """
        if not self.checkpoint_state:
            return math.inf
        best = resume.best_loss_so_far(self.checkpoint_state, windows, val_data_changed, notes)
        return min(best, cached_losses['val'] or math.inf) if cached_losses else best

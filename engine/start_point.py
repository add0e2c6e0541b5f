"""Where a run starts: new weights, a checkpoint of its own, one of nanoGPT, or a Hugging Face
folder; and what of it changes with every step.
"""

import math
from dataclasses import dataclass

import torch

import huggingface
from engine import checkpoint, checks, optim, parallel, resume, tokenizer_match
from engine.configurator import ConfigError


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
    """config: train.Config, merged with that of a checkpoint; saved: the state of a checkpoint;
    nanogpt: contents of nanoGPT's ckpt.pt, with `saved` made of it; hf_folder: of weights. Each is
    None where the run does not start from it.
    """

    config: object
    saved: dict | None = None
    nanogpt: dict | None = None
    hf_folder: str | None = None

    @classmethod
    def find(cls, c, given, shape_keys, folder, world, notes):
        """Find what `c` asks for: settings now, weights once there is a model.

        given: {key: where it was given}; shape_keys: keys that come from the checkpoint; folder:
        resume.Folder. Raises ConfigError.
        """
        fetching = c.resume_from and not resume.is_step(c.resume_from)
        if fetching or not c.eval_only:  # evaluating alone only reads
            folder.hold(make=fetching or c.auto_resume)
        c, verified = resume.automatic(c, world)
        start = cls(c)
        if c.init_from == 'resume':
            start = cls(*resume.find(c, given, shape_keys, world, notes, verified))
            try:
                checks.refuse_impossible(start.config)
            except ConfigError as error:
                raise ConfigError(
                    f'the checkpoint in {c.out_dir} has settings that no run can have: {error}'
                ) from None
        elif c.init_from != 'scratch':
            c, hf_folder = huggingface.find(c, given, shape_keys)
            start = cls(c, hf_folder=hf_folder)
        c = start.config
        chosen = 'activation_checkpointing' in given
        if c.use_fsdp and c.fsdp_activation_checkpointing and not chosen:
            c.activation_checkpointing = 'full'
        parallel.arrange(world, c, notes)
        # a URL that cannot work is known before any checkpoint is renamed
        if c.upload_to and not c.eval_only:
            parallel.from_main(lambda: resume.check_upload(c, start.saved, notes), world)
        return start

    @property
    def step(self):
        return self.saved['step'] if self.saved else 0

    @property
    def from_own_checkpoint(self):
        return self.saved is not None and self.nanogpt is None

    def weights(self, data_folder, world):
        """Return the sentence of the report about where the weights come from. Raises ConfigError
        for those of another tokenizer than the data set's.
        """
        c = self.config
        if self.saved:
            whose = 'nanoGPT' if self.nanogpt else 'this run'
            return f'checkpoint of {whose}, continuing at iter {self.step}'
        if not self.hf_folder:
            return f'initialized with seed {c.seed}'
        match = parallel.from_main(
            lambda: tokenizer_match.check_weights(self.hf_folder, data_folder, c.dataset), world
        )
        return f'{c.init_from}, {huggingface.count_tensors(self.hf_folder):,} tensors; {match}'

    def state(self, plan, new_stream, notes):
        """Return the TrainState to begin with. plan: BatchPlan; new_stream: whether the training
        data are others than those of the checkpoint.
        """
        saved = self.saved
        if not saved:
            return TrainState(0, 0, 0)
        position = 0 if new_stream else saved.get('position', 0)
        if self.nanogpt:
            position = self.step * plan.sequences
        elif saved['tokens_per_step'] != plan.tokens:
            notes.append(
                f'{plan.tokens} tokens per iteration from now on (it was'
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

    def fill(self, model, device):
        """Give the parameters of `model` their values, but for those that load() reads."""
        c = self.config
        if self.nanogpt:
            model.fill(self.nanogpt['model'].items())
        elif self.hf_folder and c.upcycle:
            model.init_weights(c.seed, device)  # the routers
            model.fill(huggingface.upcycled(self.hf_folder, model.config), partly=True)
        elif self.hf_folder:
            model.fill(huggingface.weights(self.hf_folder, model.config))
        elif not self.saved:
            model.init_weights(c.seed, device)

    def load(self, model, optimization, world):
        """Read the checkpoint, if this starts from one: weights, and unless the run only evaluates
        the state of optimizer, guard and scaler.
        """
        o = optimization
        if self.nanogpt:
            if self.nanogpt['optimizer']:
                for name, tensor in optim.named_state(o.optimizer, o.updated).items():
                    parallel.put(tensor, self.nanogpt['optimizer'][name])
        elif self.saved:
            tensors = o.tensors(model, weights_only=self.config.eval_only)
            checkpoint.load(self.saved['path'], tensors, world)
            o.scaler.load_state_dict(self.saved['scaler'])

    def evaluation(self, windows):
        """Return the losses noted beside the checkpoint if they are of the evaluation windows
        `windows` (a digest), else None.
        """
        if not self.from_own_checkpoint:
            return None
        found = checkpoint.read_evaluation(self.saved['path'])
        return found if found and found.get('data') == windows else None

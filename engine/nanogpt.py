"""Reads the checkpoint of nanoGPT, ckpt.pt."""
import pickle
import re

import torch

from engine.configurator import ConfigError


def read_checkpoint(path):
    """nanoGPT's ckpt.pt as {'model': state dict, 'optimizer': {'exp_avg.<name>': tensor, ...}, 'config', 'step', 'best_val_loss'}.

    'optimizer' is empty if nothing had been trained yet. Read with weights_only, so no code in it runs. Raises ConfigError for a file that is none.
    """
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
        sizes, trained = content['model_args'], content['config']
        model = {name.removeprefix('_orig_mod.'): tensor for name, tensor in content['model'].items()}
        step, best = content['iter_num'], float(content['best_val_loss'])
        states = content['optimizer']['state']
        model = {name: tensor for name, tensor in model.items() if not re.search(r'\.attn\.(bias|masked_bias)$', name)}
        # nanoGPT numbers its parameters: first those with two dimensions or more, then the rest, each in the model's order
        names = [name for name in model if name != 'lm_head.weight']
        numbered = [n for n in names if model[n].dim() >= 2] + [n for n in names if model[n].dim() < 2]
        optimizer = {f'{key}.{name}': torch.as_tensor(states[i][key]) for i, name in enumerate(numbered) for key in ('step', 'exp_avg', 'exp_avg_sq')} if states else {}
        shape = {key: sizes[key] for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')}
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f'{path} is not a checkpoint of nanoGPT: {type(error).__name__}: {str(error)[:200]}') from None
    # nanoGPT computes the exact GELU, unlike GPT-2
    trained = {key: value for key, value in trained.items() if key not in ('dtype', 'compile')}  # of the machine it ran on
    if trained.keys() >= {'gradient_accumulation_steps', 'batch_size'}:  # nanoGPT counts the micro-steps of all its processes
        trained['total_batch_size'] = trained['gradient_accumulation_steps'] * trained['batch_size'] * shape['block_size']
    config = {**trained, **shape, 'bias': sizes.get('bias', True), 'arch_preset': 'gpt2', 'activation': 'gelu'}
    return {'model': model, 'optimizer': optimizer, 'config': config, 'step': step, 'best_val_loss': best}

"""
Write text with a trained model.

    python sample.py --out_dir=out-demo --start="def " --num_samples=3
    python sample.py --out_dir=out-demo --start=FILE:prompt.txt
    python sample.py --out_dir=out-demo --interactive
    python sample.py --hf=path/or/hub-id --start="Once upon a time"

--out_dir is the folder of a run; the checkpoint with the best validation
loss is taken, --step takes another. Text goes through the tokenizer of the
run's data set. --hf takes a Hugging Face folder or hub id, with its own
tokenizer. All samples of all prompts are written at once; the first is shown
while it grows.
"""

# first: until main() takes over, a Ctrl-C ends the process quietly
from engine.command_line import ArgumentParser, importing, run_command

# isort: split

if __name__ == '__main__':
    imported = importing('torch')

import os
import sys

import torch

import huggingface
from data.tokenfile import read_meta
from data.tokenizer import decode_after, ids_digest, load_tokenizer, tokenizer_of
from engine import checkpoint, experts, kernels, memory, parallel, rope
from engine.attention import choose_backend
from engine.configurator import ConfigError, nearest_path, shortened
from engine.dataset import folder_of, parse_mixture
from engine.tokenizer_match import same_digest, tokenizer_identity
from generation import check_prompts, default_start, generate, text_of
from model import Model
from presets import resolve_shape

ROOT = os.path.dirname(os.path.abspath(__file__))


def find_checkpoint(out_dir, step):
    """(path, state) of a run's checkpoint; step None: the best, else the newest whole one. Raises
    ConfigError.
    """
    if step is None:
        step = checkpoint.best_step(out_dir)
        if step is None or checkpoint.corruption_reason(checkpoint.path_of(out_dir, step)):
            step, _ = checkpoint.newest_whole(out_dir)
    path = checkpoint.path_of(out_dir, step or 0)
    if step is None or step not in checkpoint.steps(out_dir):
        if not os.path.isdir(out_dir):
            raise ConfigError(
                f'no checkpoint to load: there is no folder {out_dir}{nearest_path(out_dir)}'
            )
        raise ConfigError(
            f'no checkpoint to load: {path if step is not None else checkpoint.folder_of(out_dir)}'
            ' does not exist or is not whole; give the --out_dir of a run'
            + (
                f' and one of the steps {checkpoint.steps(out_dir)}'
                if checkpoint.steps(out_dir)
                else ''
            )
        )
    if reason := checkpoint.corruption_reason(path):
        raise ConfigError(f'{path} cannot be used: {reason}')
    state = checkpoint.read_state(path)
    if missing := [key for key in ('config', 'run_name') if key not in state]:
        raise ConfigError(
            f'{path} cannot be used: its state.json has no {missing[0]}, so it is not the'
            ' checkpoint of a run'
        )
    return path, state


def data_of(config):
    """(folder, meta) of a run's data set, which knows its tokenizer. Raises ConfigError where it is
    not here.
    """
    if 'dataset' not in config:
        raise ConfigError(
            'the checkpoint was fetched from elsewhere, and its data set is a path there, which is'
            ' not taken over: export it on the machine that trained it, or train on from it with'
            ' --dataset'
        )
    folder = folder_of(config['dataset'], ROOT)
    if not any(os.path.isfile(os.path.join(folder, name)) for name in ('meta.pkl', 'train.bin')):
        raise ConfigError(
            f'the tokenizer of this run is that of its data set, and {folder} has no meta.pkl:'
            f' prepare {config["dataset"]} here as it was prepared for the training'
        )
    return folder, read_meta(folder)


def tokenizer_of_run(state):
    """(tokenizer, meta of its data set, None or a sentence that the data here is other data than
    the run's).
    """
    folder, meta = data_of(state['config'])
    trained_with = state.get('data', {}).get('train', {}).get('fingerprint')
    same = len(parse_mixture(state['config']['dataset'])) > 1 or meta.get('fingerprint', {}).get(
        'train'
    ) in (None, trained_with)
    tokenizer, gave = tokenizer_of(folder, meta), state.get('token_ids')
    same_ids = same_digest(gave, ids_digest(tokenizer) if gave else None)
    if same_ids is None and state.get('tokenizer') not in (None, tokenizer_identity(folder, meta)):
        same = False
    if same_ids is False:
        raise ConfigError(
            f'{folder} was prepared again, with a tokenizer that gives other ids than the one that'
            ' this model was trained with: prepare it as it was, or give the later data set a'
            ' folder of its own with --output'
        )
    return (
        tokenizer,
        meta,
        None if same else f'{folder} is not the data that this model was trained with',
    )


def load_state(out_dir, step):
    """(ModelConfig, {name: tensor} on the CPU, path, state) of a run's checkpoint."""
    path, state = find_checkpoint(out_dir, step)
    shape = resolve_shape(state['config'])
    tensors = Model.on_meta(shape).allocate('cpu').tensors()
    checkpoint.load(path, {f'model.{name}': tensor for name, tensor in tensors.items()})
    return shape, tensors, path, state


def load_run(out_dir, step, device, dtype, changes=None):
    """(model, tokenizer, path of the checkpoint, its state) of a run. changes: {key: value} of the
    shape that need no other weights, such as block_size and rope_scaling.
    """
    path, state = find_checkpoint(out_dir, step)
    config = state['config']
    tokenizer, meta, elsewhere = tokenizer_of_run(state)
    model = build(
        longer(config, changes),
        device,
        dtype,
        config.get('attention_backend') or 'sdpa',
        meta.get('eot_id') if config.get('document_mask') else None,
    )
    checkpoint.load(path, {f'model.{name}': tensor for name, tensor in model.tensors().items()})
    if elsewhere:
        print(
            f'Note: {elsewhere}; the text is nonsense if its tokenizer is another', file=sys.stderr
        )
    return model, tokenizer, path, state


def load_huggingface(source, device, dtype, changes=None):
    """(model, tokenizer, folder) of a Hugging Face folder or hub id."""
    folder = huggingface.fetch(source)
    shape = longer(huggingface.read_settings(folder), changes)
    model = build(shape, device, dtype, 'sdpa')
    model.fill(huggingface.weights(folder, shape))
    return model, load_tokenizer(folder), folder


def longer(settings, changes):
    """The ModelConfig of `settings` with `changes`. Raises ConfigError where they need weights that
    are not there.
    """
    shape = resolve_shape(settings)
    if not changes:
        return shape
    if (
        shape.position_encoding == 'learned_absolute'
        and changes.get('block_size', shape.block_size) != shape.block_size
    ):
        raise ConfigError(
            f'--block_size={changes["block_size"]}: this model learned {shape.block_size}'
            ' positions, no more and no fewer'
        )
    if 'rope_factor' in changes and changes.get('rope_scaling', shape.rope_scaling) == 'none':
        raise ConfigError(
            f'--rope_factor={changes["rope_factor"]:g} needs a --rope_scaling, such as yarn'
        )
    if changes.get('rope_scaling', 'none') != 'none':
        changes = {
            'rope_original_block_size': shape.rope_original_block_size,
            'rope_factor': None,
            **changes,
        }
    return resolve_shape({**settings, **changes})


def build(shape, device, dtype, backend, document_end=None):
    backend, _ = choose_backend(
        backend,
        device.type,
        dtype,
        shape.head_dim,
        window=any(shape.windows),
        documents=document_end is not None,
        sinks=shape.attention_sinks,
    )
    dispatch, _ = experts.choose_dispatch(
        'grouped', (shape.n_embd, shape.expert_d_ff), dtype, device.type
    )
    model = Model.on_meta(shape, backend, dispatch=dispatch, document_end=document_end)
    memory.refuse_too_large(model, device)
    return model.allocate(device).eval()


def add_model_arguments(parser):
    """What sample.py and evaluate.py ask alike: which model, and how it runs."""
    parser.add_argument('--out_dir', default='out', help='folder of a run')
    parser.add_argument('--hf', help='a Hugging Face folder or hub id instead of a run')
    parser.add_argument(
        '--step', type=int, help='step of the checkpoint; default: the best validation loss'
    )
    parser.add_argument(
        '--block_size',
        type=int,
        help='a context longer (or shorter) than trained; longer ones want a --rope_scaling',
    )
    parser.add_argument('--rope_scaling', choices=('none', *rope.SCALINGS))
    parser.add_argument(
        '--rope_factor',
        type=float,
        help=(
            'how many times longer the context became; default: block_size over that of the'
            ' training'
        ),
    )
    parser.add_argument('--device', help="'cpu' | 'cuda'; default: a GPU if there is one")
    parser.add_argument(
        '--dtype',
        choices=('float32', 'bfloat16', 'float16'),
        help='default: bfloat16 on a GPU that has it (else float16), float32 on a CPU',
    )


def load(args):
    """(model, tokenizer, what was loaded, state of the checkpoint or None, engine.parallel.World,
    autocast context) for parsed add_model_arguments().
    """
    world = parallel.start(args.device)
    device = world.device
    dtype = kernels.precision(args.dtype, device)
    changes = {
        key: getattr(args, key)
        for key in ('block_size', 'rope_scaling', 'rope_factor')
        if getattr(args, key) is not None
    }
    state = None
    if args.hf == '':
        raise ConfigError('--hf is empty: give a Hugging Face folder or hub id, or leave it out')
    if args.hf:
        model, tokenizer, source = load_huggingface(args.hf, device, dtype, changes)
    else:
        model, tokenizer, source, state = load_run(args.out_dir, args.step, device, dtype, changes)
    return model, tokenizer, source, state, world, kernels.autocast(device.type, dtype)


def main(argv=None):
    parser = ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        '--start',
        action='append',
        help='prompt, or FILE:name of a file that holds it; may be given many times',
    )
    parser.add_argument('--num_samples', type=int, default=3, help='of each prompt')
    parser.add_argument('--max_new_tokens', type=int, default=200)
    parser.add_argument(
        '--temperature', type=float, default=0.8, help='0: always the most likely token'
    )
    parser.add_argument('--top_k', type=int, help='only the k most likely tokens')
    parser.add_argument(
        '--top_p', type=float, help='only the most likely tokens that add up to this probability'
    )
    parser.add_argument(
        '--min_p', type=float, help='only tokens at least this fraction as likely as the likeliest'
    )
    parser.add_argument(
        '--repetition_penalty',
        type=float,
        default=1.0,
        help='above 1: what was written already becomes less likely',
    )
    parser.add_argument(
        '--stop',
        action='append',
        default=[],
        help='text that ends a sample; may be given many times',
    )
    parser.add_argument(
        '--ignore_eot', action='store_true', help='write on after the end of a text'
    )
    parser.add_argument('--seed', type=int, default=1337)
    parser.add_argument(
        '--interactive',
        action='store_true',
        help='read prompts from the terminal; each answer sees what was written before',
    )
    parser.add_argument(
        '--compile',
        action='store_true',
        help='compile decoding (with CUDA graphs on a GPU): a slower start, faster tokens',
    )
    return run_command(lambda argv: run(parser.parse_args(argv)), argv, parallel.report_error)


def run(args):
    for name, low, high in (
        ('num_samples', 1, 10**4),
        ('max_new_tokens', 1, 10**7),
        ('temperature', 0, 1e6),
        ('top_k', 1, 2**31),
        ('top_p', 0, 1),
        ('min_p', 0, 1),
        ('repetition_penalty', 0.01, 100),
        ('seed', 0, 2**63 - 1),
        ('step', 0, 2**53),
    ):
        value = getattr(args, name)
        if value is not None and (not low <= value <= high or name == 'top_p' and value == 0):
            raise ConfigError(
                f'--{name}={shortened(value)} must be from {low:,} to {high:,}'
                + (', and above 0' if name == 'top_p' else '')
            )
    if '' in args.stop:
        raise ConfigError(
            '--stop is empty, and every text begins with that: leave it out, or give the text that'
            ' ends a sample'
        )
    starts = [
        text_of(start[5:], '--start=FILE:') if start.startswith('FILE:') else start
        for start in args.start or []
    ]
    model, tokenizer, source, _, world, autocast = load(args)
    starts = starts or [default_start(tokenizer)]
    generator = torch.Generator(world.device).manual_seed(args.seed)
    print(
        f'{source}, {model.config.describe()}, {model.parameter_counts()["total"]:,} parameters\n',
        flush=True,
    )

    def write(prompts, show=None):
        with autocast:
            return continue_texts(
                model,
                tokenizer,
                prompts,
                args.max_new_tokens,
                stop=args.stop,
                ignore_eot=args.ignore_eot,
                show=show,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                min_p=args.min_p,
                repetition_penalty=args.repetition_penalty,
                generator=generator,
                compiled=args.compile,
            )

    if args.interactive:
        return talk(
            write,
            tokenizer,
            model.config.block_size,
            args.max_new_tokens,
            ''.join(args.start and starts or []),
        )
    prompts = [ids_of(start, tokenizer) for start in starts for _ in range(args.num_samples)]
    check_prompts(prompts, model)
    print(starts[0], end='', flush=True)
    texts = write(prompts, lambda text: print(text, end='', flush=True))
    print('\n' + '-' * 15, flush=True)
    for prompt, text in [*zip([start for start in starts for _ in range(args.num_samples)], texts)][
        1:
    ]:
        print(prompt + text)
        print('-' * 15, flush=True)
    return 0


def ids_of(text, tokenizer):
    """Token ids of a prompt; an empty one is the end of the text before."""
    ids = tokenizer.encode(text).tolist()
    if not ids and tokenizer.eot_id is None:
        raise ConfigError(
            '--start is empty, and this tokenizer has no end-of-text token to start from: give some'
            ' text'
        )
    return ids or [tokenizer.eot_id]


def continue_texts(
    model, tokenizer, prompts, max_new_tokens, *, stop=(), ignore_eot=False, show=None, **how
):
    """What the model writes after each of `prompts` (lists of ids), as texts: each ends before the
    first of the strings `stop`, or with the end of text unless ignore_eot. show: called with more
    and more of the first. how: as generation.generate() takes it.
    """
    eot = {tokenizer.eot_id} - {None}
    written, shown = [[] for _ in prompts], 0

    def end_of(text):
        return min((at for at in (text.find(word) for word in stop) if at >= 0), default=len(text))

    def text_of(row):
        """What the new tokens of a row add to its prompt, without the end of text."""
        ids = written[row]
        return decode_after(
            tokenizer, prompts[row], ids[:-1] if ids and ids[-1] in eot and not ignore_eot else ids
        )

    def finished(row):
        if eot & {*written[row][-1:]} and not ignore_eot:
            return True
        return bool(stop) and end_of(text := text_of(row)) < len(text)

    def on_tokens(tokens, alive):
        nonlocal shown
        for row, (token, living) in enumerate(zip(tokens, alive)):
            if living and not finished(row):
                written[row].append(token)
        if show is not None:
            text = text_of(0)
            # what may be half a character, or the beginning of a stop string, waits
            safe = min(
                len(text.rstrip('\N{REPLACEMENT CHARACTER}')),
                end_of(text),
                len(text) if finished(0) else len(text) - max(map(len, stop), default=1) + 1,
            )
            if safe > shown:
                show(text[shown:safe])
                shown = safe

    generate(
        model,
        prompts,
        max_new_tokens,
        on_tokens=on_tokens,
        stop_ids=() if ignore_eot else eot,
        interrupted=lambda: bool(stop) and all(map(finished, range(len(prompts)))),
        **how,
    )
    texts = [text_of(row) for row in range(len(prompts))]
    texts = [text[: end_of(text)] for text in texts]
    if show is not None and len(texts[0]) > shown:
        show(texts[0][shown:])
    return texts


def talk(write, tokenizer, context, max_new_tokens, history):
    """Answer prompts from standard input until it ends."""
    room = context - max_new_tokens
    if room < 1:
        raise ConfigError(
            f'--max_new_tokens={max_new_tokens} leaves no room for a prompt in a context of'
            f' {context} tokens: type --max_new_tokens={context // 2}'
        )
    print(
        'Type a prompt and Enter; the model goes on from all that stands above. An empty line'
        ' forgets it. Ctrl-D ends.\n'
    )
    while True:
        try:
            line = input('> ')
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        except UnicodeDecodeError:
            print('error: that was not UTF-8')
            continue
        if not line:
            history = ''
            continue
        try:
            ids = ids_of(history + line, tokenizer)
        except ValueError as error:  # a character that the tokenizer does not know
            print(f'error: {error}')
            continue
        try:
            history += line + write([ids[-room:]], lambda text: print(text, end='', flush=True))[0]
        except KeyboardInterrupt:
            pass
        print('\n', flush=True)


if __name__ == '__main__':
    imported()
    sys.exit(main())

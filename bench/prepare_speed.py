"""Tokens per second of preparing a corpus: data/own_text/prepare.py beside the usual recipe,
datasets.map and a memory-mapped file, in turns; and the speed of the tokenizer itself, with nothing
around it, in as many processes.

    python bench/prepare_speed.py --mb=200 --rounds=3

The corpus is the source of Python's standard library, again and again, one file a document; the
tokenizer a byte-level BPE trained on it, once through `tokenizers` and once as an encoding of
tiktoken. Needs `datasets`. Every command runs as a process of its own, start and all.
"""

import argparse
import glob
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time

from onetrain.command_line import number, run_command, whole

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

RECIPE = """
import sys
import numpy as np
import datasets
from onetrain.tokenizers.base import load_tokenizer
source, name, out, cache, batched = sys.argv[1:]
if name == 'stdlib_bpe':
    import tiktoken
    encoding = tiktoken.get_encoding(name)
    encode, eot = lambda text: encoding.encode_ordinary(text), encoding.eot_token
else:
    from tokenizers import Tokenizer
    library = Tokenizer.from_file(name + '/tokenizer.json')
    encode, eot = lambda text: library.encode(text).ids, 0

def one(row):
    ids = encode(row['text'])
    ids.append(eot)
    return {'ids': ids, 'len': len(ids)}

def many(rows):
    ids = [encode(text) + [eot] for text in rows['text']]
    return {'ids': ids, 'len': [len(row) for row in ids]}

if __name__ == '__main__':
    found = datasets.load_dataset('json', data_files=source, split='train', cache_dir=cache)
    splits = found.train_test_split(test_size=0.05, seed=2357, shuffle=False)
    batched = batched == 'True'
    tokenized = splits.map(many if batched else one, batched=batched, remove_columns=['text'],
                           num_proc=2)
    for split, rows in tokenized.items():
        size = np.sum(rows['len'], dtype=np.uint64)
        file = np.memmap(f'{out}/{split}.bin', dtype=np.uint16, mode='w+', shape=(int(size),))
        at, pieces = 0, min(1024, len(rows))
        for i in range(pieces):
            batch = np.concatenate(rows.shard(num_shards=pieces, index=i, contiguous=True)
                                   .with_format('numpy')['ids'][:])
            file[at:at + len(batch)] = batch
            at += len(batch)
        file.flush()
"""
ALONE = """
import json, sys, time
from onetrain.tokenizers.base import load_tokenizer
source, name, mb = sys.argv[1:]
if name == 'stdlib_bpe':
    import tiktoken
    encode = tiktoken.get_encoding(name).encode_to_numpy
    encode = lambda text, encode=encode: encode(text, disallowed_special=())
elif name.startswith('library:'):
    from tokenizers import Tokenizer
    library = Tokenizer.from_file(name[8:] + '/tokenizer.json')
    encode = lambda text: library.encode_batch_fast([text], add_special_tokens=False)[0].ids
else:
    tokenizer = load_tokenizer(name)
    tokenizer.accelerate()
    encode = tokenizer.encode
texts, size = [], 0
for line in open(source):
    texts.append(json.loads(line)['text'])
    size += len(texts[-1])
    if size > float(mb) * 1e6:
        break
for text in texts[:200]:
    encode(text)
started = time.perf_counter()
count = sum(len(encode(text)) for text in texts)
print(count / (time.perf_counter() - started))
"""
PLUGIN = """
import json, os
def bench():
    with open(os.path.join(os.path.dirname(__file__), 'bench.json')) as f:
        described = json.load(f)
    ranks = {bytes.fromhex(token): rank for token, rank in described['ranks'].items()}
    return {'name': 'stdlib_bpe', 'pat_str': described['pattern'], 'mergeable_ranks': ranks,
            'special_tokens': {'<|endoftext|>': len(ranks)}}
ENCODING_CONSTRUCTORS = {'stdlib_bpe': bench}
"""


def make_corpus(folder, megabytes, vocab_size):
    """corpus.jsonl, the folder of a Hugging Face tokenizer, and a plugin for tiktoken with the same
    merges.
    """
    from tiktoken_ext.openai_public import r50k_pat_str

    from onetrain.tokenizers.byte_level import ranks_of

    texts = []
    for path in sorted(
        glob.glob(os.path.join(sysconfig.get_paths()['stdlib'], '**', '*.py'), recursive=True)
    ):
        if 'site-packages' not in path:
            try:
                texts.append(open(path, encoding='utf-8').read())
            except UnicodeDecodeError:
                pass
    size = turn = 0
    with open(os.path.join(folder, 'corpus.jsonl'), 'w') as f:
        while size < megabytes * 1e6:
            for text in texts:
                if size < megabytes * 1e6 and text:
                    size += f.write(json.dumps({'text': f'# {turn}\n{text}'}) + '\n')
            turn += 1
    import tokenizers

    with open(os.path.join(folder, 'some.txt'), 'w') as f:
        f.write('\n'.join(texts))
    subprocess.run(
        [
            sys.executable,
            f'{ROOT}/data/train_tokenizer.py',
            '--input',
            f'{folder}/some.txt',
            '--vocab_size',
            str(vocab_size),
            '--output',
            f'{folder}/tokenizer',
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    with open(os.path.join(folder, 'tokenizer', 'tokenizer.json')) as f:
        ranks = ranks_of(json.load(f)['model'], tokenizers)
    os.makedirs(os.path.join(folder, 'plugin', 'tiktoken_ext'))
    with open(os.path.join(folder, 'plugin', 'tiktoken_ext', 'bench.json'), 'w') as f:
        json.dump(
            {
                'pattern': r50k_pat_str,
                'ranks': {token.hex(): rank for rank, (token, _) in enumerate(ranks)},
            },
            f,
        )
    with open(os.path.join(folder, 'plugin', 'tiktoken_ext', 'onetrain_bench.py'), 'w') as f:
        f.write(PLUGIN)
    return size


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--mb', type=number(), default=200)
    parser.add_argument('--rounds', type=whole(), default=3)
    parser.add_argument('--vocab_size', type=whole(), default=32000)
    parser.add_argument('--only', choices=('tiktoken', 'hugging_face'))
    parser.add_argument('--batched', action='store_true', help='also the recipe with batched=True')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = make_corpus(folder, args.mb, args.vocab_size)
        for name, script in (('recipe.py', RECIPE), ('alone.py', ALONE)):
            with open(os.path.join(folder, name), 'w') as f:
                f.write(script)
        environment = {
            **os.environ,
            'PYTHONPATH': f'{folder}/plugin:{ROOT}',
            'HF_DATASETS_DISABLE_PROGRESS_BARS': '1',
            'TOKENIZERS_PARALLELISM': 'false',
            'HF_HUB_OFFLINE': '1',
        }
        source = f'{folder}/corpus.jsonl'

        def timed(*command):
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *command], env=environment, capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(f'{command}: {done.stderr[-2000:]}')
            return time.perf_counter() - started

        print(
            f'{size / 1e6:.0f} MB of text, a vocabulary of {args.vocab_size:,}, 2 processes,'
            f' medians of {args.rounds}',
            flush=True,
        )
        for kind, name in (('tiktoken', 'stdlib_bpe'), ('Hugging Face', f'{folder}/tokenizer')):
            if args.only and args.only != kind.lower().replace(' ', '_'):
                continue
            ways = {
                'prepare.py': [
                    f'{ROOT}/data/own_text/prepare.py',
                    '--input',
                    source,
                    '--tokenizer',
                    name,
                    '--output',
                    f'{folder}/set',
                    '--num_proc',
                    '2',
                ],
                'datasets.map': [
                    f'{folder}/recipe.py',
                    source,
                    name,
                    f'{folder}/out',
                    f'{folder}/cache',
                    'False',
                ],
                **(
                    {
                        'datasets.map batched': [
                            f'{folder}/recipe.py',
                            source,
                            name,
                            f'{folder}/out',
                            f'{folder}/cache',
                            'True',
                        ]
                    }
                    if args.batched
                    else {}
                ),
            }
            seconds, counts = {way: [] for way in ways}, set()
            for turn in range(args.rounds):
                for way in [*ways][:: 1 if turn % 2 else -1]:
                    for leftover in ('set', 'out', 'cache'):
                        shutil.rmtree(f'{folder}/{leftover}', ignore_errors=True)
                    os.makedirs(f'{folder}/out')
                    seconds[way].append(timed(*ways[way]))
                    counts.add(
                        sum(
                            os.path.getsize(path) // 2
                            for path in glob.glob(f'{folder}/set/*.bin')
                            + glob.glob(f'{folder}/out/*.bin')
                        )
                    )
            (tokens,) = counts  # they all make as many
            own = {}
            for what in (name, *([f'library:{name}'] if name != 'stdlib_bpe' else [])):
                processes = [
                    subprocess.Popen(
                        [sys.executable, f'{folder}/alone.py', source, what, '30'],
                        env=environment,
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                    for _ in range(2)
                ]
                own[what] = sum(float(process.communicate()[0]) for process in processes)
            middle = {way: statistics.median(times) for way, times in seconds.items()}
            for way in ways:
                print(
                    f'{kind:>13}, {way:>20}: {middle[way]:6.1f} s,'
                    f' {tokens / middle[way] / 1e6:5.2f} M tokens/s,'
                    f' {tokens / middle[way] / 2e6:5.2f} on each core',
                    flush=True,
                )
            for way in ways:
                if way != 'prepare.py':
                    pairs = zip(seconds['prepare.py'], seconds[way])
                    print(
                        f'{kind:>13}: prepare.py is'
                        f' {statistics.median(theirs / ours for ours, theirs in pairs):.1f}'
                        f' times as fast as {way}'
                    )
            for what, speed in own.items():
                label = (
                    "the library's own loop" if what.startswith('library:') else 'encode() alone'
                )
                print(
                    f'{kind:>13}, {label}, 2 processes: {speed / 1e6:.2f} M tokens/s; prepare.py,'
                    f' start included, reaches {tokens / middle["prepare.py"] / speed:.0%} of it',
                    flush=True,
                )


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))

"""Every command in README.md, TRAINING_GUIDE.md and docs/parallelism.md runs, shrunk, in the order
in which a user types them.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TEXT, rank_environments, write_dataset
from forks import Forked

SHRUNK = [
    '--device=cpu',
    '--compile=False',
    '--max_iters=4',
    '--eval_interval=2',
    '--eval_iters=1',
    '--batch_size=1',
    '--block_size=16',
    '--gradient_accumulation_steps=1',
    '--n_layer=1',
]
COPIES = tempfile.mkdtemp()
# the first installs packages and runs these tests; CI types it
NOT_RUN = ('python3 start.py', 'source ')


def commands(document):
    """The commands of the document's sh blocks, continued lines joined, comments dropped."""
    with open(os.path.join(ROOT, document)) as f:
        blocks = re.findall(r'```sh\n(.*?)```', f.read(), re.DOTALL)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    return [
        command
        for line in lines
        if (command := re.sub(r'\s{2,}', ' ', re.split(r'\s+# ', line)[0]).strip())
    ]


def shrink(command):
    """The command at a size for a test: what is appended wins."""
    command = command.replace('tail -f', 'tail -n 3').replace(
        's3://bucket/runs', f'file://{COPIES}'
    )
    if 'sample.py' in command:
        return f'{command} --device=cpu --max_new_tokens=8 --num_samples=1'
    if 'evaluate.py' in command or 'export.py' in command:
        return command.replace('--nproc_per_node=8', '--nproc_per_node=2') + ' --device=cpu' * (
            'evaluate.py' in command
        )
    if 'allreduce.py' in command:
        return command.replace('--nproc_per_node=8', '--nproc_per_node=4').replace(
            '--largest=16', '--largest=1'
        )
    if 'train.py' not in command or '--help' in command or '--dry_run' in command:
        return command
    extra = SHRUNK
    if '--init_from=resume' in command:  # the shape comes from the checkpoint
        extra = ['--device=cpu', '--eval_iters=1'] + (
            [] if 'eval_only' in command else ['--max_iters=6']
        )
    elif '--init_from=' in command:
        extra = SHRUNK[:-1]
    elif 'config/full_' in command:
        extra = [*SHRUNK, '--n_embd=64' if '8b' in command else '--n_embd=72', '--d_ff=64']
    if 'total_batch_size' in command:
        extra = [*extra, '--total_batch_size=128']
    ranks = 4 if 'replicas' in command or 'context_parallel' in command else 2
    command = command.replace('--nproc_per_node=8', f'--nproc_per_node={ranks}')
    return f'{command} {" ".join(extra)}'


NOT_COPIED = '.git .venv __pycache__ tests out out-* *.bin meta.pkl input.txt'.split()


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A copy of the project beside small files that stand for what a user would have."""
    folder = tmp_path_factory.mktemp('project') / 'onetrain'
    shutil.copytree(
        ROOT,
        folder,
        ignore=shutil.ignore_patterns(*NOT_COPIED),
    )
    generator = np.random.default_rng(0)
    text = 'ROMEO:\nJULIET:\nMERCUTIO:\n' + '\n'.join(
        ' '.join(generator.choice(TEXT.split(), 10)) for _ in range(600)
    )
    (folder / 'data' / 'shakespeare_char' / 'input.txt').write_text(text)
    (folder / 'book.txt').write_text(text)
    shutil.copy(os.path.join(ROOT, 'tests', 'tasks', 'piqa.jsonl'), folder)
    (folder / 'more').mkdir()
    (folder / 'more' / 'a.jsonl').write_text(
        '\n'.join(json.dumps({'text': line}) for line in text.splitlines())
    )
    import pyarrow
    import pyarrow.parquet

    (folder / 'FOLDER').mkdir()
    for name in ('train-00000-of-00001', 'validation-00000-of-00001'):
        pyarrow.parquet.write_table(
            pyarrow.table({'text': text.splitlines()}), folder / 'FOLDER' / f'{name}.parquet'
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=['</s>'],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    from model import Model
    from onetrain import huggingface
    from onetrain.model_config import resolve_shape

    model = Model(
        resolve_shape(
            dict(arch_preset='llama', n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=300)
        )
    )
    model.init_weights(0)
    for name in ('llama2_tokenizer', 'path/to/folder'):
        huggingface.write_model(str(folder / name), model.config, model.state_dict())
        tokenizer.save(str(folder / name / 'tokenizer.json'))
        (folder / name / 'tokenizer_config.json').write_text('{"eos_token": "</s>"}')
    for name in ('slimpajama_6b_gpt2', 'slimpajama_6b_llama', 'slimpajama_6b_llama3', 'own_text'):
        write_dataset(
            str(folder / 'data' / name),
            generator.integers(0, 60, 4000),
            generator.integers(0, 60, 400),
        )
    return folder


class Shell:
    """Runs commands in `folder` as bash would: run(command) -> (exit code, output). forked: first
    words of the commands that are run as forks, one or as many as torchrun would start.
    """

    def __init__(self, folder, environment, forked):
        self.folder, self.environment, self.forked = str(folder), environment, forked

    def run(self, command):
        if command.split()[0] not in self.forked or re.search(r'[&|;<>$*`]', command):
            done = subprocess.run(
                ['bash', '-c', command],
                cwd=self.folder,
                env=self.environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=240,
            )
            return done.returncode, done.stdout
        kind, *words = shlex.split(command)
        environments = [{}]
        if kind == 'torchrun':
            own = words[: [word.endswith('.py') for word in words].index(True)]
            words = words[len(own) :]
            size = int(
                next(word.split('=')[1] for word in own if word.startswith('--nproc_per_node='))
            )
            environments = rank_environments(size)
        processes = [
            Forked(words, self.folder, {**self.environment, **more}) for more in environments
        ]
        outputs = [process.communicate(240)[0] for process in processes]
        return max(process.returncode % 256 for process in processes), ''.join(outputs)


@pytest.mark.parametrize('document', ['README.md', 'TRAINING_GUIDE.md', 'docs/parallelism.md'])
def test_commands_run(document, project):
    environment = {
        **os.environ,
        'OMP_NUM_THREADS': '1',
        'PYTHONPATH': str(project),
        'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}',
    }
    # one document by torchrun itself
    ran = 0
    shell = Shell(
        project, environment, ('python',) if document == 'README.md' else ('python', 'torchrun')
    )
    # the guide compares with a second run, which the reader makes the same way
    for command in ['python train.py config/full_gpt2_1.36b.py'] * (
        document == 'TRAINING_GUIDE.md'
    ) + commands(document):
        if command.startswith(NOT_RUN):
            continue
        code, output = shell.run(shrink(command))
        assert code == 0, f'{shrink(command)}\n{output[:3000]}\n...\n{output[-3000:]}'
        ran += 1
    assert ran > (8 if '/' not in document else 3)


def test_files_and_keys_that_the_documents_name_exist():
    from train import ALIASES, Config

    known = {*Config.__dataclass_fields__, *ALIASES}
    other_commands = {
        'out_dir',
        'start',
        'num_samples',
        'top_p',
        'hf',
        'input',
        'tokenizer',
        'output',
        'nproc_per_node',
        'standalone',
        'help',
        'x',
        'step',
        'key',
        'max',
        'job',
        'nodes',
        'gpus',
        'time',
        'signal',
        'requeue',
        'open',
        'nnodes',
        'rdzv_backend',
        'rdzv_id',
        'rdzv_endpoint',
        'largest',
        'to',
        'dtype',
        'stop',
        'tasks',
        'tokens',
        'speed',
        'prompts',
        'min_p',
        'repetition_penalty',
        'interactive',
        'compile',
        'push_to_hub',
        'model',
        'model_args',
        'limit',
        'shard',
        'merge',
        'max_broken',
        'dedup',
        'num_proc',
        'val_fraction',
        'at',
        'vocab_size',
        'only',
        'recipes',
        'copy_to',
        'sharded',
        'no',
        'url',
        'max-restarts',
    }
    for name in ('plan.py', 'watch.py', 'sweep.py'):
        with open(os.path.join(ROOT, name)) as f:
            other_commands |= set(re.findall(r"add_argument\(\s*'--(\w+)'", f.read()))
    for document in (
        'README.md',
        'TRAINING_GUIDE.md',
        'docs/guarantees.md',
        'docs/from_nanogpt.md',
        'docs/scaling.md',
        'docs/parallelism.md',
        'docs/moe.md',
        'docs/planning.md',
        'docs/watching.md',
        'docs/sweeps.md',
    ):
        with open(os.path.join(ROOT, document)) as f:
            text = f.read()
        assert set(re.findall(r'--(\w+)', text)) <= known | other_commands
        for path in re.findall(
            r'\]\(([\w./-]+)\)|`((?:config|tests|onetrain|bench|data|plots)/[\w./-]+\.\w+)`', text
        ):
            path = path[0] or path[1]
            assert os.path.exists(
                os.path.join(
                    ROOT,
                    (
                        os.path.dirname(document)
                        if path.startswith('.') or '/' not in path and document.startswith('docs')
                        else ''
                    ),
                    path,
                )
            ), path
        for test in re.findall(r'`(test_\w+\.py)`', text):
            assert list(Path(ROOT, 'tests').rglob(test)), test
        for key in re.findall(r'`([a-z_]\w*)=\w+`', text):
            assert key in known, key


def test_every_recipe_says_how_to_start_it():
    for name in os.listdir(os.path.join(ROOT, 'config')):
        if name.endswith('.py'):
            with open(os.path.join(ROOT, 'config', name)) as f:
                head = f.read().split('\n\n')[0]
            assert (
                f'train.py config/{name}' in head
                and 'Memory' in head
                and ('Batch' in head or 'batches of' in head)
                and ('Expect' in head or 'eval' in name)
            ), name


def test_the_guides_python_reads_a_log(project, dataset, tmp_path):
    """The snippets run as they stand, beside a run of that name."""
    from conftest import run_train

    assert (
        run_train(dataset, tmp_path / 'out-llama-1.36b', '--max_iters=6', '--eval_interval=3') == 0
    )
    with open(os.path.join(ROOT, 'TRAINING_GUIDE.md')) as f:
        snippets = re.findall(r'```python\n(.*?)```', f.read(), re.DOTALL)
    assert len(snippets) == 2
    pandas, plain = snippets
    done = subprocess.run(
        [sys.executable, '-c', plain + 'print(len(losses), len(speeds))'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[1] == '6 6', done.stderr
    if importlib.util.find_spec('pandas'):
        done = subprocess.run(
            [sys.executable, '-c', pandas + 'print(iterations.shape)'],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stdout.strip() == '(6, 4)', done.stderr

"""The layouts and families that tests run under, and how they compare runs."""

from conftest import TINY, records
from ranks import train

LAYOUTS = {
    'DDP': [],
    'ZeRO-1': ['--use_zero1=True'],
    'ZeRO-2': ['--use_fsdp=True', '--fsdp_reshard=False'],
    'ZeRO-3': ['--use_fsdp=True'],
    'hybrid': ['--use_fsdp=True', '--fsdp_replicas=2'],
    'context': ['--context_parallel=2'],
}
FAMILIES = {
    'gpt2': ['--arch_preset=gpt2'],
    'llama3': ['--arch_preset=llama3', '--n_head=4', '--num_key_value_heads=2'],
    'neox': ['--arch_preset=neox', '--n_head=1'],
}


def arguments(dataset, out, *args):
    return [
        f'--dataset={dataset}',
        f'--out_dir={out}',
        *TINY,
        '--max_iters=20',
        '--eval_interval=10',
        '--total_batch_size=256',
        '--save_log_to_json=False',
        *args,
    ]


def run(size, *args):
    code, output = train(size, *args)
    assert code == 0, output
    return output


def norms(out):
    return {record['iter']: record['gradients']['global_norm'] for record in records(out)}


def close(a, b, tolerance):
    return a.keys() == b.keys() and max(abs(a[k] - b[k]) for k in a) <= tolerance

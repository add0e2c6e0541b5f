# The demo: a small LLaMA on the source of Python's standard library, for two CPU cores.
#
#   python data/pystdlib/prepare.py
#   python train.py config/demo_pystdlib.py
#
# Parameters: 2,164,416 with a vocabulary of 2048. Memory: 0.55 GB.
# Batch: 4 sequences x 256 tokens x 1 micro-step = 1,024 tokens per iteration; 1300 iterations are 1.3 M tokens, half of the text.
# Expect a validation loss of 3.95 after 217 s on two cores of 2026 (bench/RESULTS.md), and text in the shape of Python.

out_dir = 'out-demo'
dataset = 'pystdlib'

arch_preset = 'llama'
n_layer = 4
n_head = 6
n_embd = 192
d_ff = 512
block_size = 256
weight_tying = True

batch_size = 4
gradient_accumulation_steps = 1

learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 100
max_iters = 1300
lr_decay_iters = 1300
beta2 = 0.99

eval_interval = 325
eval_iters = 40
log_interval = 20
sample_interval = 325
sample_start = 'def '

compile = False

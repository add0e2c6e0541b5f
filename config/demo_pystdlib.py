# The demo: a small LLaMA on the source of Python's standard library, for two CPU cores.
#
#   python data/pystdlib/prepare.py
#   python train.py config/demo_pystdlib.py
#
# Parameters: 2,787,072 with a vocabulary of 2048. Memory: 0.6 GB. Batch: 8 sequences x 128 tokens x
# 1 micro-step = 1,024 tokens per iteration; 1800 iterations are 1.8 M tokens, two thirds of the
# text. A CPU without instructions for bfloat16 takes float32, and fewer iterations. Expect a
# validation loss of about 3.2 in five minutes (bench/RESULTS.md), and text in the shape of Python.
from onetrain.cpu import has_bfloat16

out_dir = 'out-demo'
dataset = 'pystdlib'

arch_preset = 'llama'
n_layer = 3
n_head = 8
n_embd = 256
d_ff = 640
block_size = 128
weight_tying = True

batch_size = 8
gradient_accumulation_steps = 1

optimizer = 'muon'
muon_momentum = 0.9
learning_rate = 7e-3
min_lr = 3e-4
warmup_iters = 30
max_iters = 1800 if has_bfloat16() else 850
lr_decay_iters = max_iters
beta2 = 0.99

eval_interval = max_iters // 4
eval_iters = 40
log_interval = 20
sample_interval = eval_interval
sample_start = 'def '

dtype = 'bfloat16' if has_bfloat16() else 'float32'

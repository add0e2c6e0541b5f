# The demo: a small LLaMA on the source of Python's standard library, for two CPU cores.
#
#   python data/pystdlib/prepare.py
#   python train.py config/demo_pystdlib.py
#
# Parameters: 2,164,416 with a vocabulary of 2048. Memory: 0.6 GB.
# Batch: 8 sequences x 256 tokens x 1 micro-step = 2,048 tokens per iteration; 800 iterations are 1.6 M tokens, 0.63 of the text.
# Expect @@

out_dir = 'out-demo'
dataset = 'pystdlib'

arch_preset = 'llama'
n_layer = 4
n_head = 6
n_embd = 192
d_ff = 512
block_size = 256
weight_tying = True

batch_size = 8
gradient_accumulation_steps = 1

learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 100
max_iters = 800
lr_decay_iters = 800
beta2 = 0.99

eval_interval = 200
eval_iters = 20
log_interval = 25
sample_interval = 200
sample_start = 'def '

compile = False

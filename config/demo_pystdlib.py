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
max_iters = 1500
lr_decay_iters = 1500
beta2 = 0.99

eval_interval = 250
eval_iters = 20
log_interval = 25
sample_interval = 500
sample_start = 'def '

compile = False

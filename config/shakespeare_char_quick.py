# nanoGPT's laptop model on characters of Shakespeare, 0.8 M parameters, to its validation loss of
# 1.88 in a quarter of its iterations.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/shakespeare_char_quick.py
#
# Batch: 12 sequences x 64 characters x 1 micro-step = 768 tokens per iteration; the training text
# is 1307 iterations. Memory: below 1 GB. Expect a validation loss of 1.86 after half a minute on 2
# cores. Muon allows a high learning rate, and so short a run wants little momentum.

out_dir = 'out-shakespeare-char-quick'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64

batch_size = 12
gradient_accumulation_steps = 1

optimizer = 'muon'
muon_momentum = 0.85
learning_rate = 1.5e-2
min_lr = 1.5e-3
warmup_iters = 20
max_iters = 460
lr_decay_iters = 460
beta2 = 0.99  # few tokens per iteration

device = 'cpu'
compile = False
eval_interval = 230
eval_iters = 100
log_interval = 10

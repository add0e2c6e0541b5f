# nanoGPT's small character-level model on the works of Shakespeare: 10.6 M parameters.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char.py                         # one GPU
#   python train.py config/train_shakespeare_char.py --device=cpu --compile=False \
#     --eval_iters=20 --log_interval=1 --block_size=64 \
#     --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 \
#     --lr_decay_iters=2000 --dropout=0.0  # a laptop
#
# Batch: 64 sequences x 256 characters x 1 micro-step = 16,384 tokens per iteration; the training
# text is 61 iterations. Memory: below 2 GB. Expect overfitting, so a checkpoint is kept only when
# the validation loss improves.

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2

batch_size = 64
gradient_accumulation_steps = 1

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 5000
beta2 = 0.99  # few tokens per iteration

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False

# A small GPT-2 for text of your own, on two CPU cores.
#
#   python data/own_text/prepare.py --input book.txt --tokenizer char --output data/mybooks
#   python train.py config/own_text.py --dataset=mybooks
#
# Parameters: 0.8 M and 128 for each token of the vocabulary. Memory: below 1 GB. Batch: 12
# sequences x 64 tokens x 1 micro-step = 768 tokens per iteration; 2000 iterations are 1.5 M tokens.
# Expect what nanoGPT's character model reaches on a megabyte of text: a validation loss of 1.77
# (bench/RESULTS.md) after two minutes.

out_dir = 'out-own-text'
dataset = 'own_text'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64

batch_size = 12
gradient_accumulation_steps = 1

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 2000
lr_decay_iters = 2000
beta2 = 0.99

eval_interval = 250
eval_iters = 20
log_interval = 20

compile = False

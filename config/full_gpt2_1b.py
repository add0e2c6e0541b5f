# GPT-2 at 760 M parameters with biases: 24 layers, 1536 wide, one million tokens per iteration.
#
#   python train.py config/full_gpt2_1b.py --max_iters=10 --compile=False          # smoke test
#   torchrun --standalone --nproc_per_node=8 train.py config/full_gpt2_1b.py
#
# Parameters: 759,905,280. Memory: float32 weights, gradients and two AdamW moments take 16 bytes
# each, 12.2 GB on every GPU under DDP; activations come on top and grow with batch_size: lower it
# when memory runs out.
# Batch: total_batch_size = 1,048,576 tokens per iteration on any number of GPUs: 8 sequences x 2048
# tokens x 64 micro-steps on one, x 8 micro-steps on each of eight. 100,000 iterations are 104.9 B
# tokens.
# Data: own text with a tokenizer of at most 50000 ids, `python data/own_text/prepare.py --tokenizer
# FOLDER`.
# Expect a first loss of ln(50000) = 10.8 and up to half of one more.
# No full run of this recipe has been made yet.

out_dir = 'out-gpt2-1b'
dataset = 'own_text'

arch_preset = 'gpt2'
n_layer = 24
n_head = 24
n_embd = 1536
d_ff = 6144
bias = True
vocab_size = 50000
block_size = 2048

batch_size = 8
total_batch_size = 1048576  # sets gradient_accumulation_steps

learning_rate = 3e-4
min_lr = 3e-5
max_iters = 100000
lr_decay_iters = 100000

eval_interval = 1000
eval_iters = 50
eval_at_start = False
log_interval = 10

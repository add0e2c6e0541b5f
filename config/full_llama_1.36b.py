# LLaMA-2 at 1.29 B parameters: 18 layers, 2304 wide.
#
#   python train.py config/full_llama_1.36b.py --max_iters=10 --compile=False          # smoke test
#   torchrun --standalone --nproc_per_node=8 train.py config/full_llama_1.36b.py \
#     --total_batch_size=2097152
#
# Parameters: 1,294,159,104. Memory: float32 weights, gradients and two AdamW moments take 16 bytes
# each, 20.7 GB on every GPU under DDP; activations come on top and grow with batch_size: lower it
# (and raise gradient_accumulation_steps by the same factor) when memory runs out.
# Batch: 8 sequences x 2048 tokens x 16 micro-steps = 262,144 tokens per iteration on each GPU;
# 25,000 iterations on one GPU are 6.6 B tokens. total_batch_size fixes the batch for any number of
# GPUs.
# Data: SlimPajama-6B with the LLaMA-2 tokenizer, `python data/slimpajama_6b_llama/prepare.py`.
# Expect a first loss of ln(32000) = 10.4 and up to half of one more (10.9 with one layer of it on a
# CPU).
# No full run of this recipe has been made yet.

out_dir = 'out-llama-1.36b'
dataset = 'slimpajama_6b_llama'

arch_preset = 'llama'
n_layer = 18
n_head = 18
n_embd = 2304
d_ff = 6144
vocab_size = 32000
block_size = 2048

batch_size = 8
gradient_accumulation_steps = 16

learning_rate = 3e-4
min_lr = 3e-5
max_iters = 25000
lr_decay_iters = 25000

eval_interval = 1000
eval_iters = 50
eval_at_start = False
log_interval = 10

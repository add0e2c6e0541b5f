# Qwen3 at 1.83 B parameters: 24 layers, 2048 wide, grouped queries 2:1, QK-norm.
#
#   python train.py config/full_qwen3_1.8b_optimal.py --max_iters=10 --compile=False  # smoke test
#   torchrun --standalone --nproc_per_node=8 train.py config/full_qwen3_1.8b_optimal.py \
#     --total_batch_size=3145728
#
# Parameters: 1,830,395,904. Memory: float32 weights, gradients and two AdamW moments take 16 bytes
# each, 29.3 GB on every GPU under DDP; activations come on top and grow with batch_size: lower it
# (and raise gradient_accumulation_steps by the same factor) when memory runs out.
# Batch: 6 sequences x 2048 tokens x 32 micro-steps = 393,216 tokens per iteration on each GPU;
# 25,000 iterations on one GPU are 9.8 B tokens. total_batch_size fixes the batch for any number of
# GPUs.
# Data: SlimPajama-6B with the Qwen3 tokenizer, `python data/slimpajama_6b_qwen3/prepare.py`.
# Expect a first loss of ln(151936) = 11.9 and up to half of one more (12.4 with one layer of it on
# a CPU).
# No full run of this recipe has been made yet.

out_dir = 'out-qwen3-1.8b-optimal'
dataset = 'slimpajama_6b_qwen3'

arch_preset = 'qwen3'
n_layer = 24
n_head = 16
num_key_value_heads = 8
n_embd = 2048
d_ff = 6144
vocab_size = 151936
block_size = 2048

batch_size = 6
gradient_accumulation_steps = 32

learning_rate = 3e-4
min_lr = 3e-5
max_iters = 25000
lr_decay_iters = 25000

eval_interval = 1000
eval_iters = 50
eval_at_start = False
log_interval = 10

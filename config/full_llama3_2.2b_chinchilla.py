# LLaMA-3 at 2.22 B parameters: 30 layers, 2048 wide, grouped queries 2:1.
#
#   python train.py config/full_llama3_2.2b_chinchilla.py --max_iters=10 --compile=False
#   torchrun --standalone --nproc_per_node=8 train.py config/full_llama3_2.2b_chinchilla.py \
#     --total_batch_size=2097152
#
# Parameters: 2,224,154,624. Memory: float32 weights, gradients and two AdamW moments take 16 bytes
# each, 35.6 GB on every GPU under DDP; activations come on top and grow with batch_size: lower it
# (and raise gradient_accumulation_steps by the same factor) when memory runs out.
# Batch: 8 sequences x 2048 tokens x 16 micro-steps = 262,144 tokens per iteration on each GPU;
# 30,000 iterations on one GPU are 7.9 B tokens. total_batch_size fixes the batch for any number of
# GPUs.
# Data: SlimPajama-6B with the LLaMA-3.1 tokenizer, `python data/slimpajama_6b_llama3/prepare.py`.
# Expect a first loss of ln(128256) = 11.8 and up to half of one more (12.0 with one layer of it on
# a CPU).
# No full run of this recipe has been made yet.

out_dir = 'out-llama3-2.2b-chinchilla'
dataset = 'slimpajama_6b_llama3'

arch_preset = 'llama3'
n_layer = 30
n_head = 16
num_key_value_heads = 8
n_embd = 2048
d_ff = 7168
vocab_size = 128256
block_size = 2048

batch_size = 8
gradient_accumulation_steps = 16

learning_rate = 3e-4
min_lr = 3e-5
max_iters = 30000
lr_decay_iters = 30000

eval_interval = 1000
eval_iters = 50
eval_at_start = False
log_interval = 10

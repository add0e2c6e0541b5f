# LLaMA-3 8B: 32 layers, 4096 wide, grouped queries 4:1. Its state does not fit one 80 GB GPU, so
# FSDP shares it out.
#
#   python train.py config/full_llama3_8b.py --max_iters=10 --compile=False          # smoke test
#   torchrun --standalone --nproc_per_node=8 train.py config/full_llama3_8b.py \
#     --total_batch_size=2097152
#
# Parameters: 8,030,261,248. Memory: float32 weights, gradients and two AdamW moments take 16 bytes
# each, 128.5 GB on one GPU, 16.1 GB on each of 8 with FSDP; activations come on top and grow with
# batch_size: type --activation_checkpointing=selective when memory runs out.
# Batch: 1 sequences x 2048 tokens x 128 micro-steps = 262,144 tokens per iteration on each GPU;
# 25,000 iterations on one GPU are 6.6 B tokens. total_batch_size fixes the batch for any number of
# GPUs.
# Data: SlimPajama-6B with the LLaMA-3.1 tokenizer, `python data/slimpajama_6b_llama3/prepare.py`.
# Expect a first loss of ln(128256) = 11.8 and up to half of one more.
# No full run of this recipe has been made yet.

out_dir = 'out-llama3-8b'
dataset = 'slimpajama_6b_llama3'

arch_preset = 'llama3'
n_layer = 32
n_head = 32
num_key_value_heads = 8
n_embd = 4096
d_ff = 14336
vocab_size = 128256
block_size = 2048

batch_size = 1
gradient_accumulation_steps = 128
use_fsdp = True

learning_rate = 3e-4
min_lr = 3e-5
max_iters = 25000
lr_decay_iters = 25000

eval_interval = 1000
eval_iters = 50
eval_at_start = False
log_interval = 10
